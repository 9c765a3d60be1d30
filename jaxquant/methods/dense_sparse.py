"""Dense and sparse: take the largest coordinates of every vector out, and quantize the rest.

A quantizer's step follows the largest coordinate. The `count` coordinates farthest from zero are stored by themselves,
as an index and 16 bits, and count as zero for the quantizer of the rest:

    x ~ restore(dense code) + sparse.

References:
    C. Hooper, S. Kim, H. Mohammadzadeh, M. W. Mahoney, Y. S. Shao, K. Keutzer, A. Gholami, "KVQuant: Towards 10 million
    context length LLM inference with KV cache quantization", arXiv:2401.18079, section 3.4.

Differs from the paper: the number of outliers of a vector is static, where the paper's thresholds (1 % of all numbers,
for keys from calibration and by channel) let it vary; the rest is coded by any quantizer of this library, and its
non-uniform codes are another method.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, PRNGKeyArray, PyTree, UInt

from jaxquant._pytree import pytree, static
from jaxquant.methods import turboquant
from jaxquant.protocols import Quantizer

_LARGEST = 65504.0  # of float16


@pytree
class Parts:
    """Codes of a vector in two parts.

    Attributes:
        dense: code of what is left.
        place: of each outlier.
        outlier: the coordinate.
    """

    dense: PyTree[Any]
    place: UInt[Array, "*batch count"]
    outlier: Float16[Array, "*batch count"]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class DenseSparse:
    """A quantizer and the outliers it does not see.

    Attributes:
        dense: quantizer of the rest.
        count: outliers of a vector.
    """

    dense: Quantizer
    count: int = static(default=2)

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.dense.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Parts:
        """Take the outliers out and code the rest."""
        x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST)
        _, place = jax.lax.top_k(jnp.abs(x), self.count)
        outlier = jnp.take_along_axis(x, place, axis=-1).astype(jnp.float16)
        inside = jnp.any(place[..., None] == jnp.arange(self.dim), axis=-2)
        return Parts(
            dense=self.dense.quantize(jnp.where(inside, 0.0, x)),
            place=place.astype(jnp.uint8 if self.dim <= 256 else jnp.uint16),
            outlier=outlier,
        )

    def expand(self, code: Parts, /) -> Float[Array, "*batch width"]:
        """Put the expanded rest and the outliers, in their places, side by side."""
        there = code.place[..., None].astype(jnp.int32) == jnp.arange(self.dim)
        sparse = jnp.sum(jnp.where(there, code.outlier[..., None].astype(jnp.float32), 0.0), axis=-2)
        return jnp.concatenate([self.dense.expand(code.dense), sparse], axis=-1)

    def restore(self, y: Float[Array, "*batch width"], /) -> Float[Array, "*batch dim"]:
        """Restore the rest and add."""
        return self.dense.restore(y[..., : -self.dim]) + y[..., -self.dim :]

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Project for the rest, beside the query itself."""
        return jnp.concatenate([self.dense.project(q), q.astype(jnp.float32)], axis=-1)


def kv(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, count: int | None = None
) -> tuple[DenseSparse, DenseSparse]:
    """Build the pair of quantizers for a cache: TurboQuant for the rest.

    Args:
        key: of both rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        count: outliers of a vector, 3 bytes each; None takes 1 % of the coordinates, at least 1.

    Raises:
        ValueError: `count` is not from 1 to `dim`.

    Example:
        >>> kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)[0].count
        1
    """
    count = max(1, round(dim / 100)) if count is None else count
    if not 1 <= count <= dim:
        raise ValueError(f"count must be from 1 to dim = {dim}, got {count}")
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v, fused=False)
    return DenseSparse(dense=keys, count=count), DenseSparse(dense=values, count=count)


EXAMPLES = (
    lambda: kv(jax.random.key(0), dim=64, bits_k=3, bits_v=2, count=2)[0],
    lambda: kv(jax.random.key(0), dim=64, bits_k=3, bits_v=2, count=2)[1],
)
