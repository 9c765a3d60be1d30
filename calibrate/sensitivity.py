"""What compressing one layer's keys or values alone costs: predicted from the Fisher information, and measured."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

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
    graph, state = nnx.split(decoder)
    layers = decoder.architecture.layers
    pairs = tuple(zip(keys, values, strict=True))
    total = np.zeros((layers, 2))
    for index, row in enumerate(tokens):
        some = jnp.asarray(row, jnp.int32)
        exact = _logits(graph, state, some, pairs, jnp.int32(-1))
        for place in range(2 * layers):
            changed = _logits(graph, state, some, pairs, jnp.int32(place))
            total[place // 2, place % 2] += float(_divergence(exact, changed))
            if progress is not None:
                progress(2 * layers * index + place + 1, 2 * layers * len(tokens))
    return total / len(tokens)


def _run(
    graph: nnx.GraphDef,
    state: PyTree[Array],
    tokens: Int[Array, " tokens"],
    pairs: tuple[tuple[Quantizer, Quantizer], ...],
    where: Int[Array, ""],
) -> Float[Array, "tokens vocabulary"]:
    """Compress the keys of layer `where` / 2, or, where it is odd, the values."""
    decoder: Decoder = nnx.merge(graph, state)

    def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        out = []
        for half, (quantizer, x) in enumerate(zip(pairs[layer], (k, v), strict=True)):
            coded = quantizer.quantize(jnp.swapaxes(x, 1, 2))
            kept = jnp.swapaxes(quantizer.restore(quantizer.expand(coded)), 1, 2)
            out.append(jnp.where(where == 2 * layer + half, kept.astype(x.dtype), x))
        return q, out[0], out[1]

    return decoder(tokens[None], tap=tap)[0][0]


_logits = jax.jit(_run, static_argnums=0)


@jax.jit
def _divergence(first: Float[Array, "tokens vocabulary"], second: Float[Array, "tokens vocabulary"]) -> Array:
    a, b = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1))
