"""What a calibrated code is compared with: directions deleted, directions set apart, and INT4 a channel.

References:
    S. Salfati, "Quantization dominates rank reduction for KV-cache compression", arXiv:2604.11501: at equal bytes,
    quantizing all directions beats deleting some, because what is deleted may decide which token attention looks at. In
    a direction of amplitude a, deletion costs a^2 and a uniform quantizer of b bits over -a..a a^2 / (3 * 2^(2b)), in
    any metric that is quadratic in the error.

Differs from the paper: directions that are set apart hold 6 bits in place of 16, which costs as much as 16 in
perplexity and less in bytes; the levels are fitted to samples.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxquant._pytree import pytree, static
from jaxquant.calibrate import bases, fit
from jaxquant.calibrate.bases import Basis
from jaxquant.calibrate.fit import Fitted
from jaxquant.calibrate.statistics import Statistics
from jaxquant.mixed import Mixed
from jaxquant.models.decoder import Decoder
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import Quantized

Half = Literal["keys", "values"]
HALVES: tuple[Half, Half] = ("keys", "values")

_SCORED = 256  # queries at a time


@pytree
class Truncated:
    """Keep the coordinates of a few directions in float16, and delete the others.

    Attributes:
        mean: is subtracted first.
        directions: orthonormal rows.
    """

    mean: Float[Array, "*heads dim"]
    directions: Float[Array, "*heads rank dim"]
    dim: int = static()

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Project."""
        y = jnp.matmul(x.astype(jnp.float32) - self.mean[..., None, :], self.directions.mT, precision="highest")
        return Quantized(codes=y.astype(jnp.float16))

    def expand(self, code: Quantized, /) -> Float[Array, "*batch coded"]:
        """Cast; the last coordinate is 1, and stands for the mean."""
        y = code.codes.astype(jnp.float32)
        return jnp.concatenate([y, jnp.ones((*y.shape[:-1], 1), jnp.float32)], axis=-1)

    def restore(self, y: Float[Array, "*batch coded"], /) -> Float[Array, "*batch dim"]:
        """Sum the directions."""
        x = jnp.matmul(y[..., :-1], self.directions, precision="highest")
        return x + y[..., -1:] * self.mean[..., None, :]

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch coded"]:
        """Multiply queries with the directions and the mean."""
        q = q.astype(jnp.float32)
        y = jnp.matmul(q, self.directions.mT, precision="highest")
        return jnp.concatenate([y, jnp.sum(q * self.mean[..., None, :], axis=-1, keepdims=True)], axis=-1)


def delete(found: Statistics, half: Half, *, rank: int) -> tuple[Truncated, ...]:
    """Keep the `rank` directions of most variance of every head.

    Args:
        found: statistics of a model.
        half: keys or values.
        rank: directions that are kept, 1 to dim.

    Returns:
        The quantizer of every layer.
    """
    covariance = found.key_covariance if half == "keys" else found.value_covariance
    mean = getattr(found, half) / found.tokens
    if not 1 <= rank <= mean.shape[-1]:
        raise ValueError(f"rank must be from 1 to {mean.shape[-1]}, got {rank}")
    vectors = np.swapaxes(np.linalg.eigh(covariance)[1], -1, -2)[..., ::-1, :][..., :rank, :]
    return tuple(
        Truncated(mean=jnp.asarray(m, jnp.float32), directions=jnp.asarray(d, jnp.float32), dim=mean.shape[-1])
        for m, d in zip(mean, vectors, strict=True)
    )


def channels(found: Statistics, half: Half, *, bits: int = 4) -> tuple[Mixed, ...]:
    """Round every channel to integers of a scale of its own, the largest sample at the end of the range.

    Args:
        found: statistics of a model.
        half: keys or values.
        bits: of an integer, 2 to 8.

    Returns:
        The quantizer of every layer; it holds no scale a token.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    samples = found.key_samples if half == "keys" else found.value_samples
    dim = samples.shape[-1]
    scales = np.maximum(np.abs(samples).max(axis=2), 1e-30) / (2 ** (bits - 1) - 1)
    integers = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float32)
    out = []
    for scale in scales:
        diagonal = np.eye(dim) * scale[:, None]
        out.append(
            Mixed(
                mean=jnp.zeros(scale.shape, jnp.float32),
                analysis=jnp.asarray(np.eye(dim) / scale[:, None], jnp.float32),
                synthesis=jnp.asarray(diagonal, jnp.float32),
                weights=jnp.full(scale.shape, 1 / dim, jnp.float32),
                levels=(jnp.broadcast_to(jnp.asarray(integers), (*scale.shape, 2**bits)),),
                widths=((bits, dim),), dim=dim, rule="none",
            )
        )  # fmt: skip
    return tuple(out)


def eigenbasis(found: Statistics, half: Half, *, choices: tuple[int, ...] = (0, 2, 3, 4, 6)) -> Fitted:
    """Fit the paper's basis: eigenvectors of the keys' covariance, or of the values' weighted by squared attention."""
    if half == "keys":
        covariance = found.key_covariance
    else:
        covariance = found.weighted_values / found.importance[..., None, None]
    metric = np.broadcast_to(np.eye(covariance.shape[-1]), covariance.shape)
    basis: Basis = bases.karhunen_loeve(covariance, metric)
    samples = found.key_samples if half == "keys" else found.value_samples
    return fit.fit(basis, getattr(found, half) / found.tokens, samples, choices=choices)


def split(fitted: Fitted, *, top: int, above: int = 6, below: int = 3) -> tuple[Mixed, ...]:
    """Set the `top` eigen-coordinates of every head apart.

    Args:
        fitted: of keys or values, as `eigenbasis` gives it.
        top: coordinates that are set apart, a multiple of 8.
        above: bits of each of them.
        below: bits of each of the others.

    Returns:
        The quantizer of every layer.
    """
    layers, _, dim = fitted.mean.shape
    if top % 8 or not 0 <= top <= dim:
        raise ValueError(f"top must be a multiple of 8 from 0 to {dim}, got {top}")
    return fit.build(fitted, np.tile(np.repeat([above, below], [top, dim - top]), (layers, 1)))


def flips(
    decoder: Decoder, tokens: Int[np.ndarray, "rows tokens"], keys: tuple[Quantizer, ...]
) -> Float[np.ndarray, " layers"]:
    """Give the share of queries, in each layer, whose most attended token is another over compressed keys.

    Args:
        decoder: the network; what a layer attends to is computed from exact keys in the layers before.
        tokens: rows of token ids.
        keys: quantizer of each layer.
    """
    graph, state = nnx.split(decoder)
    rows = [np.asarray(_flips(graph, state, jnp.asarray(row, jnp.int32), keys)) for row in tokens]
    return np.mean(rows, axis=0)


def _flipped(
    graph: nnx.GraphDef, state: PyTree[Array], tokens: Int[Array, " tokens"], keys: tuple[Quantizer, ...]
) -> Float[Array, " layers"]:
    decoder: Decoder = nnx.merge(graph, state)
    a = decoder.architecture
    shares = []

    def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        exact = jnp.swapaxes(k[0].astype(jnp.float32), 0, 1)
        code = keys[layer].quantize(exact)
        kept = keys[layer].restore(keys[layer].expand(code))
        queries = jnp.swapaxes(q[0].astype(jnp.float32), 0, 1).reshape(a.kv_heads, -1, q.shape[1], a.dim)
        size = min(_SCORED, q.shape[1])
        places = jnp.arange(q.shape[1], dtype=jnp.int32)

        def block(first: Array) -> Array:
            start = jnp.minimum(first, q.shape[1] - size)
            part = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=2)
            at = start + jnp.arange(size, dtype=jnp.int32)
            best = []
            for x in (exact, kept):
                scores = jnp.einsum("hgqd,htd->hgqt", part, x, precision="highest")
                best.append(jnp.argmax(jnp.where(places[None] <= at[:, None], scores, -jnp.inf), axis=-1))
            return jnp.sum((best[0] != best[1]) & (at >= first), axis=-1)

        starts = jnp.arange(0, q.shape[1], size, dtype=jnp.int32)
        shares.append(jnp.sum(jax.lax.map(block, starts)) / (queries.shape[0] * queries.shape[1] * q.shape[1]))
        return q, k, v

    decoder.hidden(tokens[None], tap=tap)
    return jnp.stack(shares)


_flips = jax.jit(_flipped, static_argnums=0)
