"""Continue prompts: prefill in chunks of one shape, then one jitted step per token.

Both steps are compiled once per decoder, cache and chunk size, whatever the prompt's length: the last chunk is the
full one, and what a row lacks is padded on the left of its first.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxquant.models.decoder import Decoder
from jaxquant.protocols import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations, and how long they took.

    Attributes:
        tokens: the new token ids of each row, without the one that ended it.
        cache: what the cache holds at the end: the prompts and every new token but the last.
        warmup_seconds: running both steps once on padding alone; compilation, if they were not compiled yet.
        prefill_seconds: reading the prompts.
        decode_seconds: all decode steps together.
        decode_tokens: tokens that the decode steps produced, over all rows.
    """

    tokens: list[list[int]]
    cache: Cache
    warmup_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Decode throughput over all rows; NaN where no step ran."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else float("nan")


@jax.jit
def sample(
    key: PRNGKeyArray,
    logits: Float[Array, "*batch vocabulary"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_p: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] = 0,
) -> Int[Array, "*batch"]:
    """Draw token ids from the softmax of logits, cut to its head.

    Args:
        key: randomness.
        logits: unnormalised log-probabilities.
        temperature: divides the logits; must be positive.
        top_p: keeps the most probable tokens up to this total probability, and the one that crosses it.
        top_k: keeps this many; 0 keeps all.

    Returns:
        One token id per leading index.

    References: top_p is nucleus sampling, Holtzman et al., "The Curious Case of Neural Text Degeneration",
    arXiv:1904.09751.

    >>> int(sample(jax.random.key(0), jnp.array([0.0, 9.0, 1.0]), top_k=1))
    1
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    rank = jnp.arange(logits.shape[-1])
    keep = ((before < top_p) | (rank == 0)) & ((rank < top_k) | (jnp.asarray(top_k) == 0))
    choice = jax.random.categorical(key, jnp.where(keep, ordered, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[..., None], axis=-1)[..., 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _prefill(
    graph: nnx.GraphDef,
    state: PyTree,
    cache: Cache,
    tokens: Int[Array, "batch chunk"],
    mask: Bool[Array, "batch chunk"],
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    decoder: Decoder = nnx.merge(graph, state)
    hidden, extended = decoder.hidden(tokens, cache, mask=mask)
    assert extended is not None
    return decoder.logits(hidden[:, -1:])[:, 0], extended


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _decode(
    graph: nnx.GraphDef, state: PyTree, cache: Cache, tokens: Int[Array, " batch"], mask: Bool[Array, " batch"]
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    decoder: Decoder = nnx.merge(graph, state)
    logits, extended = decoder(tokens[:, None], cache, mask=mask[:, None])
    assert extended is not None
    return logits[:, 0], extended


@jax.jit
def _greedy(logits: Float[Array, "batch vocabulary"]) -> Int[Array, " batch"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def generate(
    key: PRNGKeyArray | None,
    decoder: Decoder,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    end_ids: Collection[int] = (),
    chunk: int = 256,
    on_token: Callable[[int, int], object] | None = None,
) -> Generation:
    """Continue every prompt through the cache.

    The cache is donated: use the one that comes back. It may hold tokens already; the prompts follow them.

    Args:
        key: randomness; may be None where `temperature` is 0.
        decoder: the network.
        cache: one row per prompt, as `decoder.init_cache` makes it.
        prompts: token ids, at least one in each row; rows may differ in length.
        max_tokens: new tokens per row at most.
        temperature: 0 takes the most probable token; see `sample` otherwise.
        top_p: see `sample`.
        top_k: see `sample`.
        end_ids: token ids that end a row.
        chunk: tokens per prefill step.
        on_token: called with row and token id for every new token as it comes.

    Raises:
        ValueError: an argument is out of its range, a prompt is empty or holds an unknown id, or prompt and
            continuation do not fit the capacity.
    """
    prompt_tokens, prompt_mask = _pad(prompts, chunk, decoder.architecture.vocabulary)
    _check(key, cache, prompt_mask, max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    graph, state = nnx.split(decoder)
    rows = len(prompts)

    def choose(logits: Float[Array, "batch vocabulary"], step: int) -> Int[Array, " batch"]:
        if temperature == 0 or key is None:
            return _greedy(logits)
        return sample(jax.random.fold_in(key, step), logits, temperature=temperature, top_p=top_p, top_k=top_k)

    start = time.perf_counter()
    nothing = np.zeros_like(prompt_mask[:, :chunk])
    _, cache = _prefill(graph, state, cache, prompt_tokens[:, :chunk], nothing)
    logits, cache = _decode(graph, state, cache, prompt_tokens[:, 0], nothing[:, 0])
    jax.block_until_ready((choose(logits, 0), cache))
    warm = time.perf_counter()

    for first in range(0, prompt_tokens.shape[1], chunk):
        chosen = slice(first, first + chunk)
        logits, cache = _prefill(graph, state, cache, prompt_tokens[:, chosen], prompt_mask[:, chosen])
    jax.block_until_ready((logits, cache))
    prefilled = time.perf_counter()

    tokens: list[list[int]] = [[] for _ in range(rows)]
    running = np.ones(rows, dtype=bool)
    decoded = 0
    token = np.asarray(choose(logits, 0))
    for step in range(max_tokens):
        if step:
            logits, cache = _decode(graph, state, cache, token, running)
            token = np.asarray(choose(logits, step))
            decoded += int(running.sum())
        for row in np.flatnonzero(running).tolist():
            if int(token[row]) in end_ids:
                running[row] = False
                continue
            tokens[row].append(int(token[row]))
            if on_token is not None:
                on_token(row, int(token[row]))
        if not running.any():
            break
    jax.block_until_ready(cache)
    return Generation(
        tokens=tokens,
        cache=cache,
        warmup_seconds=warm - start,
        prefill_seconds=prefilled - warm,
        decode_seconds=time.perf_counter() - prefilled,
        decode_tokens=decoded,
    )


def _pad(prompts: Sequence[Sequence[int]], chunk: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left to whole chunks; the mask is False on padding."""
    if chunk < 2:
        raise ValueError(f"chunk={chunk} must be at least 2")
    if not prompts:
        raise ValueError("prompts is empty: give at least one row")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{row}] is empty: a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompts[{row}] holds an id outside 0..{vocabulary - 1}: {min(prompt)}..{max(prompt)}")
    width = -(-max(map(len, prompts)) // chunk) * chunk
    tokens = np.zeros((len(prompts), width), dtype=np.int32)
    mask = np.zeros((len(prompts), width), dtype=bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def _check(
    key: PRNGKeyArray | None,
    cache: Cache,
    mask: np.ndarray,
    max_tokens: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if temperature > 0 and key is None:
        raise ValueError(f"key is needed where temperature={temperature} is above 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative; 0 keeps every token")
    held = np.asarray(cache.length).max(axis=0)
    if held.shape[0] != mask.shape[0]:
        raise ValueError(f"cache has {held.shape[0]} rows for {mask.shape[0]} prompts")
    # The last new token is returned, not stored.
    longest = int((held + mask.sum(axis=1)).max())
    if longest + max_tokens - 1 > cache.capacity:
        raise ValueError(
            f"{longest} tokens held and prompted, with max_tokens={max_tokens}, exceed the cache's {cache.capacity}"
        )
