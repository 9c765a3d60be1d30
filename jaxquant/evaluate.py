"""What compression costs, measured through the cache that users get: perplexity, KL divergence, agreement, retrieval.

`compare` feeds the same tokens to a decoder twice, once over each of two caches, in chunks and, for the last tokens of
every row, one at a time. It refuses to report when the second cache did not compress: when it holds no fewer bytes,
when all tokens fit into what it keeps exact, or when no logit moved by more than rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant.cache import KVCache
from jaxquant.models.decoder import Decoder
from jaxquant.pipeline import PipelineCache
from jaxquant.protocols import Cache
from jaxquant.quantizers import Exact

Progress = Callable[[int, int], object]

_ROUNDING = 1e-5  # of the largest logit; float32 sums in another order stay below, 8-bit codes far above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-position results, [rows, tokens] each; position t predicts token t + 1.

    Attributes:
        baseline_nll: negative log-likelihood of the next token over the first cache, in nats.
        compressed_nll: over the second.
        kl: divergence of the second prediction from the first, KL(first || second), in nats.
        baseline_hit: whether the next token was the most probable one over the first cache.
        compressed_hit: over the second.
        agreement: whether both had the same most probable token.
    """

    baseline_nll: Float[np.ndarray, "rows tokens"]
    compressed_nll: Float[np.ndarray, "rows tokens"]
    kl: Float[np.ndarray, "rows tokens"]
    baseline_hit: Bool[np.ndarray, "rows tokens"]
    compressed_hit: Bool[np.ndarray, "rows tokens"]
    agreement: Bool[np.ndarray, "rows tokens"]

    @property
    def baseline_perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood over the first cache."""
        return float(np.exp(np.mean(self.baseline_nll, dtype=np.float64)))

    @property
    def compressed_perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood over the second cache."""
        return float(np.exp(np.mean(self.compressed_nll, dtype=np.float64)))

    def retrieval(self, answers: Bool[np.ndarray, "rows tokens"]) -> tuple[float, float]:
        """Give the share of answer tokens that were the most probable ones, over the first and the second cache.

        Args:
            answers: marks the tokens of answers among the predicted tokens, as `needles.answers` does.

        Raises:
            ValueError: nothing is marked.
        """
        if not answers.any():
            raise ValueError("answers marks no token: there is nothing to retrieve")
        return float(np.mean(self.baseline_hit[answers])), float(np.mean(self.compressed_hit[answers]))


def compare(
    decoder: Decoder,
    tokens: Int[np.ndarray, "rows tokens"],
    baseline: Callable[[int], Cache],
    compressed: Callable[[int], Cache],
    *,
    batch: int = 8,
    chunk: int = 256,
    stepwise: int = 8,
    progress: Progress | None = None,
) -> Scores:
    """Score every next token over two caches.

    Args:
        decoder: the network.
        tokens: rows of T + 1 token ids; T of them are fed and T predicted.
        baseline: makes an empty cache for a number of rows, of capacity T or more.
        compressed: likewise, for the cache under test.
        batch: rows at a time.
        chunk: most tokens of a prefill step.
        stepwise: last tokens of each row that are fed one at a time, through decode attention.
        progress: called with the tokens done and all tokens.

    Raises:
        ValueError: a row is too short.
        RuntimeError: the second cache did not compress, or a cache did not take every token.

    Example:
        >>> from jaxquant import models, quantizers
        >>> from jaxquant.methods import turboquant
        >>> model = models.load()
        >>> exact, dim = quantizers.Exact(dim=model.architecture.dim), model.architecture.dim
        >>> k, v = turboquant.kv(jax.random.key(0), dim=dim, bits_k=4, bits_v=4)
        >>> tokens = np.array([model.tokenizer.encode("from functools import partial, reduce")])
        >>> scores = compare(
        ...     model.decoder,
        ...     tokens,
        ...     lambda rows: model.decoder.init_cache(exact, exact, batch=rows, capacity=64),
        ...     lambda rows: model.decoder.init_cache(k, v, batch=rows, capacity=64),
        ... )
        >>> bool(0 < scores.kl.mean() < 1)
        True
    """
    rows, fed = tokens.shape[0], tokens.shape[1] - 1
    if fed < 1:
        raise ValueError(f"tokens must have at least 2 tokens a row, got {tokens.shape[1]}")
    graph, state = nnx.split(decoder)
    for name, size, least in (("batch", batch, 1), ("chunk", chunk, 1), ("stepwise", stepwise, 0)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    stepwise = min(stepwise, fed - 1)
    chunks = -(-(fed - stepwise) // chunk)
    chunk = -(-(fed - stepwise) // chunks)  # even chunks, so that one shape is compiled where they divide
    cuts = [*range(0, fed - stepwise, chunk), *range(fed - stepwise, fed)]
    parts: list[list[tuple[np.ndarray, ...]]] = []
    moved = 0.0
    for first in range(0, rows, batch):
        some = jnp.asarray(tokens[first : first + batch], jnp.int32)
        caches = baseline(some.shape[0]), compressed(some.shape[0])
        held = [cache.bytes_per_token for cache in caches]
        if held[1] >= min(held[0], 2 * 2 * caches[0].dim):
            raise RuntimeError(
                f"the compressed cache holds {held[1]} bytes a token and the baseline {held[0]}: "
                "compression was not active"
            )
        exact = _exact_tokens(caches[1], fed)
        if exact >= fed:
            raise RuntimeError(
                f"sinks and window keep {exact} tokens exact and a row has {fed}: compression was not active"
            )
        done = []
        for start, stop in zip(cuts, [*cuts[1:], fed], strict=True):
            logits, caches = zip(*(_step(graph, state, cache, some[:, start:stop]) for cache in caches), strict=True)
            change, scores = _score(*logits, some[:, start + 1 : stop + 1])
            moved = max(moved, float(change)) if np.isfinite(change) else np.inf
            done.append(tuple(np.asarray(score) for score in scores))
            if progress is not None:
                progress(first * fed + some.shape[0] * stop, rows * fed)
        for cache in caches:
            if int(jnp.min(cache.length)) != fed:
                raise RuntimeError(
                    f"a cache of capacity {cache.capacity} took {int(jnp.min(cache.length))} of {fed} tokens"
                )
        parts.append([tuple(np.concatenate(piece, axis=1) for piece in zip(*done, strict=True))])
    if moved < _ROUNDING:
        raise RuntimeError("the logits of the two caches differ by rounding alone: compression was not active")
    return Scores(
        **{
            field.name: np.concatenate([part[0][i] for part in parts])
            for i, field in enumerate(dataclasses.fields(Scores))
        }
    )


def _exact_tokens(cache: Cache, fed: int) -> int:
    """Give how many tokens of a row a compressed layer holds exactly."""
    if isinstance(cache, PipelineCache):
        return cache.exact_tokens
    assert isinstance(cache, KVCache)
    lossy = [
        stack
        for stack in cache.stacks
        if not all(isinstance(store.quantizer, Exact) for store in (stack.keys, stack.values))
    ]
    return min((stack.sinks + stack.window for stack in lossy), default=fed)


# One cache at a time, so that many caches compared with one baseline compile that once.
@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _step(
    graph: nnx.GraphDef, state: PyTree[Array], cache: Cache, tokens: Int[Array, "batch new"]
) -> tuple[Float[Array, "batch new vocabulary"], Cache]:
    decoder: Decoder = nnx.merge(graph, state)
    return decoder(tokens, cache)  # pyright: ignore[reportReturnType]


@jax.jit
def _score(
    baseline: Float[Array, "batch new vocabulary"],
    compressed: Float[Array, "batch new vocabulary"],
    following: Int[Array, "batch new"],
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    logits = baseline, compressed
    first, second = (jax.nn.log_softmax(x) for x in logits)
    best = [jnp.argmax(x, axis=-1) for x in logits]
    scores = (
        -_pick(first, following),
        -_pick(second, following),
        jnp.sum(jnp.exp(first) * (first - second), axis=-1),
        best[0] == following,
        best[1] == following,
        best[0] == best[1],
    )
    return jnp.max(jnp.abs(logits[0] - logits[1])) / jnp.max(jnp.abs(logits[0])), scores


def _pick(x: Float[Array, "batch new vocabulary"], index: Int[Array, "batch new"]) -> Float[Array, "batch new"]:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def rows(tokens: Sequence[int] | np.ndarray, *, start: int, count: int, length: int) -> Int[np.ndarray, "count fed"]:
    """Cut rows of `length` + 1 tokens out of a long text: row i is `tokens[start + i (length + 1):][:length + 1]`.

    Raises:
        ValueError: the text is too short.

    Example:
        >>> rows(np.arange(10), start=1, count=2, length=3)
        array([[1, 2, 3, 4],
               [5, 6, 7, 8]])
    """
    needed = start + count * (length + 1)
    if len(tokens) < needed:
        raise ValueError(
            f"tokens holds {len(tokens)} tokens; start {start} and {count} rows of {length} + 1 need {needed}"
        )
    return np.asarray(tokens[start:needed], np.int64).reshape(count, length + 1)
