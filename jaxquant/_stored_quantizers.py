"""Quantizers in QATC v3 files that may be hostile: their arrays, and what their codes look like."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant import _descriptions, _stacks
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, UnsupportedError
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer

_WIDEST = 1 << 12  # longest axis of a quantizer's array: some are loops when traced


class StoredQuantizers:
    """The quantizers that a file describes.

    Args:
        reader: of the file.
        classes: from outside of jaxquant that the file may name.
    """

    def __init__(self, reader: v3.Reader, classes: Iterable[type]) -> None:
        self._reader = reader
        self._classes = {_descriptions.name_of(kind): kind for kind in classes}
        self._arrays: dict[str, Array] = {}

    def rebuild(self, node: Any, name: str, layers: int, kv_heads: int) -> tuple[Quantizer | PerLayer, Any]:
        """Rebuild a quantizer, and trace what the code of one vector looks like: stored codes must look the same.

        Args:
            node: its description.
            name: of what it codes, for errors.
            layers: that it is for.
            kv_heads: of the vectors.

        Raises:
            CodecError: the file names a class that is not allowed, or what it describes is no quantizer that works.
        """
        try:
            quantizer = _descriptions.rebuild(node, self._array, self._classes)
            each = quantizer.at(0) if isinstance(quantizer, PerLayer) else quantizer
            if not isinstance(each, Quantizer) or type(quantizer.dim) is not int or quantizer.dim < 1:
                raise CorruptError(f"{name}: {type(each).__name__} is no quantizer")
            if isinstance(quantizer, PerLayer) and {leaf.shape[0] for leaf in jax.tree.leaves(quantizer)} != {layers}:
                raise CorruptError(f"{name}: its quantizers are not for {layers} layers")
            return quantizer, code_of(quantizer, kv_heads)
        except CodecError:
            raise
        except Exception as error:  # whatever a class makes of fields that do not fit each other
            raise CorruptError(f"{name}: its quantizer does not work: {str(error)[:200]}") from None

    def _array(self, name: str) -> Array:
        """Read an array of a quantizer, once."""
        if name not in self._arrays:
            tensor = self._reader.tensors.get(name)
            if tensor is None or max(tensor.shape, default=0) > _WIDEST:
                raise CorruptError(f"{name!r} is no tensor of the file, or too large for a quantizer's")
            self._arrays[name] = on_device(self._reader.read(name), name)
        return self._arrays[name]


def code_of(quantizer: Quantizer | PerLayer, kv_heads: int) -> Any:
    """Trace what the code of one vector looks like."""
    code = _stacks.code_shapes(quantizer, (1, kv_heads, 1))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[3:], leaf.dtype), code)


def on_device(values: np.ndarray, name: str) -> Array:
    """Put values into a JAX array of the same dtype.

    Raises:
        UnsupportedError: JAX would narrow them.
    """
    array = jnp.asarray(values)
    if array.dtype != values.dtype:
        raise UnsupportedError(f"tensor {name!r} is {values.dtype}, which JAX holds only with jax_enable_x64")
    return array
