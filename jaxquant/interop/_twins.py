"""Quantizers in the arithmetic of another framework: what is the same in all of them."""

import abc
from collections.abc import Callable
from typing import Any, TypeVar

from jaxquant.quantizers import Exact, Scalar

T = TypeVar("T")


class Twin(abc.ABC):
    """A quantizer in the arithmetic of another framework; what of `_halves.Coder` is the same in all of them.

    Args:
        dim: length of the vectors.
        **tables: arrays of the framework, which nothing changes.
    """

    def __init__(self, dim: int, **tables: Any):
        self.dim = dim
        self.tables = tables

    @abc.abstractmethod
    def quantize(self, x: Any, /) -> tuple[Any, ...]:
        """Code tokens [batch, kv_heads, tokens, dim]."""

    @abc.abstractmethod
    def dequantize(self, code: tuple[Any, ...], like: Any, /) -> Any:
        """Decode tokens, in the dtype of `like`."""

    def __deepcopy__(self, memo: dict) -> "Twin":
        return self  # nothing in it changes


def twin(quantizer: Any, *, scalar: Callable[[Scalar], T], exact: Callable[[Exact], T]) -> T:
    """Make the twin of a quantizer with the class of its kind.

    Raises:
        TypeError: there is none.

    Example:
        >>> twin(Exact(dim=64), scalar=lambda one: one.bits, exact=lambda one: one.dim)
        64
    """
    match quantizer:
        case Scalar():
            return scalar(quantizer)
        case Exact():
            return exact(quantizer)
        case _:
            raise TypeError(f"quantizer must be a quantizers.Scalar or Exact, got {type(quantizer).__name__}")
