"""Greedy continuations that keep a hash of every logit, for comparing one process or framework with another."""

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.cache import KVCache
from jaxquant.models.decoder import Decoder


class Continued(NamedTuple):
    """What came after a cache.

    Attributes:
        tokens: the first is the one that was given.
        digests: by number of tokens, a hash of all logits up to there.
        first_seconds: until the first of them was there.
        state: the cache at the end.
    """

    tokens: list[int]
    digests: dict[int, str]
    first_seconds: float
    state: Any


def greedy(
    step: Callable[[Any, int], tuple[np.ndarray, Any]], state: Any, token: int, lengths: Sequence[int]
) -> Continued:
    """Continue with the most probable token, as many times as the largest of `lengths`.

    Args:
        step: feeds one token to a state, and returns the logits behind it and the next state.
        state: a cache of any kind.
        token: first to be fed.
        lengths: at which to note the hash of the logits.
    """
    began = time.perf_counter()
    tokens, digests, digest, first = [token], {}, hashlib.blake2b(digest_size=16), 0.0
    for count in range(1, max(lengths) + 1):
        logits, state = step(state, tokens[-1])
        tokens.append(int(logits.argmax()))
        first = first or time.perf_counter() - began
        digest.update(np.ascontiguousarray(logits).tobytes())
        if count in lengths:
            digests[count] = digest.hexdigest()
    return Continued(tokens, digests, first, state)


class JaxModel:
    """A decoder that reads and writes a `KVCache`, one row of it."""

    def __init__(self, decoder: Decoder) -> None:
        self._graph, self._weights = nnx.split(decoder)

    def prefill(self, cache: KVCache, ids: Int[np.ndarray, " tokens"]) -> tuple[int, KVCache]:
        """Read a prompt and choose the next token."""
        logits, cache = _step(self._graph, self._weights, cache, jnp.asarray(ids, jnp.int32)[None])
        return int(np.asarray(logits).argmax()), cache

    def step(self, cache: KVCache, token: int) -> tuple[np.ndarray, KVCache]:
        """Read one token; the cache that is given stays as it is."""
        logits, cache = _step(self._graph, self._weights, cache, jnp.full((1, 1), token, jnp.int32))
        return np.asarray(logits), cache


# Timing several ways of a product on a GPU, each process would choose one of its own, which rounds in its own way.
@functools.partial(jax.jit, static_argnames="graph", compiler_options={"xla_gpu_autotune_level": 0})
def _step(
    graph: nnx.GraphDef, weights: PyTree, cache: KVCache, ids: Int[Array, "1 new"]
) -> tuple[Float[Array, " vocabulary"], KVCache]:
    decoder: Decoder = nnx.merge(graph, weights)
    with jax.default_matmul_precision("highest"):  # of float32 as PyTorch multiplies it
        hidden, extended = decoder.hidden(ids, cache)
        assert isinstance(extended, KVCache)
        return decoder.logits(hidden[:, -1:])[0, 0], extended
