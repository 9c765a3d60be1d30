"""The plug-in contract: what a rotation and a quantizer must offer to work in every part of jaxquant.

A plug-in is a frozen pytree dataclass (`jaxquant._pytree.pytree`) that satisfies one of these protocols. Nothing is
registered: pass the object. Methods are plain functions of arrays, so they fuse into the caller's `jit`, and they
take any number of leading axes.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree


@runtime_checkable
class Rotation(Protocol):
    """An orthogonal map of R^dim that spreads a vector's energy over its coordinates."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Map vectors into the coordinates in which they are coded; computed in float32, returned in x's dtype."""
        ...

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Map coordinates back; the inverse and the transpose of `rotate`."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """A per-vector code whose decoder is linear after a table lookup: `dequantize = restore . expand`.

    The split is what lets attention work on codes. With `project` the transpose of `restore`,

        <q, dequantize(code)> = <project(q), expand(code)>     and
        sum_t p_t dequantize(code_t) = restore(sum_t p_t expand(code_t)),

    so a query is rotated once, an output is un-rotated once, and only `expand` runs per token.
    """

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    def quantize(self, x: Float[Array, "*batch dim"], /) -> PyTree[Any]:
        """Code vectors; every leaf of the result keeps the leading axes of `x`, and its bytes are the storage."""
        ...

    def expand(self, code: PyTree[Any], /) -> Float[Array, "*batch width"]:
        """Look codes up and scale them, in the coordinates of the code (float32)."""
        ...

    def restore(self, y: Float[Array, "*batch width"], /) -> Float[Array, "*batch dim"]:
        """Map expanded codes, or any weighted sum of them, back to vectors (float32)."""
        ...

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Map queries into the coordinates of the code: the transpose of `restore` (float32)."""
        ...
