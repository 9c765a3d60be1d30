"""What compressing one layer's keys or values alone costs: predicted from the Fisher information, and measured."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant import quantizers
from jaxquant.models.decoder import Decoder
from jaxquant.protocols import Quantizer

Progress = Callable[[int, int], object]


def predicted(
    quantizer: Quantizer,
    samples: Float[np.ndarray, "kv_heads samples dim"],
    fisher: Float[np.ndarray, "kv_heads dim dim"],
) -> float:
    """Predict the KL divergence, in nats a token, of compressing the keys, or the values, of one layer.

    `sum_heads E[e^T F e] / 2` over the errors e of samples: the second-order term, with errors of different tokens
    taken for independent.

    Args:
        quantizer: of the layer.
        samples: vectors it will meet.
        fisher: of the layer, as `fisher.collect` gives it.
    """
    x = jnp.asarray(samples, jnp.float32)
    errors = np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x)) - x, np.float64)
    return float(np.einsum("htd,hde,hte->", errors, fisher, errors) / (2 * x.shape[1]))


def measured(
    decoder: Decoder,
    tokens: Int[np.ndarray, "rows tokens"],
    keys: Sequence[Quantizer],
    values: Sequence[Quantizer],
    *,
    progress: Progress | None = None,
) -> Float[np.ndarray, "layers 2"]:
    """Measure the mean KL divergence, in nats a token, with one layer's keys, or values, compressed at a time.

    Args:
        decoder: the network.
        tokens: rows of token ids.
        keys: quantizer of each layer.
        values: likewise.
        progress: called with the runs done and all runs.
    """
    layers = decoder.architecture.layers
    total = np.zeros((layers, 2))
    for index, row in enumerate(tokens):
        _, exact = scored(decoder, row, keys, values, np.zeros((layers, 2), bool))
        for place in np.ndindex(layers, 2):
            where = np.zeros((layers, 2), bool)
            where[place] = True
            _, changed = scored(decoder, row, keys, values, where)
            total[place] += divergence(exact, changed)
            if progress is not None:
                progress(2 * (layers * index + place[0]) + place[1] + 1, 2 * layers * len(tokens))
    return total / len(tokens)


def scored(
    decoder: Decoder,
    row: Int[np.ndarray, " tokens"],
    keys: Sequence[Quantizer],
    values: Sequence[Quantizer],
    where: Bool[np.ndarray, "layers 2"],
) -> tuple[float, Float[np.ndarray, "tokens vocabulary"]]:
    """Predict a row with some of the keys and values compressed, without a cache.

    Args:
        decoder: the network.
        row: of token ids.
        keys: quantizer of each layer.
        values: likewise.
        where: keys, and values, of which layers are compressed.

    Returns:
        The mean negative log-likelihood of the next token, in nats, and the logarithms of all predictions.
    """
    graph, state = nnx.split(decoder)
    pairs = tuple(zip(keys, values, strict=True))
    nll, found = _scored(graph, state, jnp.asarray(row, jnp.int32), pairs, jnp.asarray(where))
    return float(nll), np.asarray(found)


def divergence(first: Float[np.ndarray, "tokens vocabulary"], second: Float[np.ndarray, "tokens vocabulary"]) -> float:
    """Give the mean KL divergence of predictions from others, in nats, from their logarithms."""
    return float(np.mean(np.sum(np.exp(first) * (first - second), axis=-1), dtype=np.float64))


def _predict(
    graph: nnx.GraphDef,
    state: PyTree[Array],
    tokens: Int[Array, " tokens"],
    pairs: tuple[tuple[Quantizer, Quantizer], ...],
    where: Bool[Array, "layers 2"],
) -> tuple[Float[Array, ""], Float[Array, "tokens vocabulary"]]:
    decoder: Decoder = nnx.merge(graph, state)

    def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        out = []
        for half, (quantizer, x) in enumerate(zip(pairs[layer], (k, v), strict=True)):
            coded = quantizer.quantize(jnp.swapaxes(x, 1, 2))
            kept = jnp.swapaxes(quantizer.restore(quantizer.expand(coded)), 1, 2)
            out.append(jnp.where(where[layer, half], kept.astype(x.dtype), x))
        return q, out[0], out[1]

    found = jax.nn.log_softmax(decoder(tokens[None], tap=tap)[0][0])
    return -jnp.mean(jnp.take_along_axis(found[:-1], tokens[1:, None], axis=-1)), found


_scored = jax.jit(_predict, static_argnums=0)
