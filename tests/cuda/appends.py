"""What the tests of coding share: chunks of tame and of wild numbers, and a reading of all that an append left."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cuda import caches

from jaxquant import cache, quantizers
from jaxquant._stacks import KVCache


def filled(case: Any, keys: Any, values: Any) -> KVCache:
    """Fill the cache of a case."""
    same = ("capacity", "sinks", "window", "exact_layers", "layer", "lengths")
    return caches.filled(keys, values, **{name: getattr(case, name) for name in same})


def inputs(case: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Give keys, values and a mask."""
    rng = np.random.default_rng(2)
    shape = (len(case.lengths), case.new, caches.KV_HEADS, case.dim)
    x = rng.standard_normal((2, *shape)) * np.exp(rng.standard_normal((2, *shape[:3], 1)))
    if case.wild:
        x[:, 0, 0] = 0
        x[:, 0, 1, 0, 3], x[:, 0, 1, 1, 5] = np.inf, np.nan
        x[:, 1, 0, 0] *= 1e-30
        x[:, 1, 0, 1] *= 1e25
        x[:, 1, 1, 0, 7], x[:, 1, 1, 1, 4] = 1e38, -np.inf
        x[:, 2, 0, 0], x[:, 2, 0, 1] = np.nan, 1e-42
    with np.errstate(over="ignore"):
        k, v = (jnp.asarray(part.astype(jnp.dtype(case.x))) for part in x)
    return k, v, jnp.asarray(rng.random(shape[:2]) < 0.6) if case.masked else None


def append(case: Any, c: KVCache, implementation: Any) -> KVCache:
    """Append to a layer that is not known when the function is traced."""
    k, v, mask = inputs(case)
    run = jax.jit(
        functools.partial(cache.append, mask=mask, implementation=implementation),
        compiler_options=caches.quick_to_compile(),
    )
    return run(c, jnp.int32(case.layer), k, v)


class Coded(NamedTuple):
    """Codes and scales of one store, those that are right, and which of its slots were written."""

    quantizer: Any
    written: np.ndarray
    codes: np.ndarray
    right_codes: np.ndarray
    scales: np.ndarray
    right_scales: np.ndarray


def coded(before: KVCache, got: KVCache, want: KVCache) -> Iterator[Coded]:
    """Give what was coded, where all else, slots that were not written included, is equal to the byte."""
    for one, other in ((got.length, want.length), (got.exact_from, want.exact_from)):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    for old, mine, right in zip(before.stacks, got.stacks, want.stacks, strict=True):
        for name in ("keys", "values"):
            held, ours, theirs = (getattr(stack, name) for stack in (old, mine, right))
            for leaf in ("sinks", "window"):
                assert np.array_equal(np.asarray(getattr(ours, leaf)), np.asarray(getattr(theirs, leaf)))
            was, codes, wanted = (np.asarray(store.codes.codes) for store in (held, ours, theirs))
            written = (was != wanted).any(axis=-1)
            assert np.array_equal((was != codes).any(axis=-1), written), "not the same slots were written"
            if isinstance(ours.quantizer, quantizers.Exact):
                assert np.array_equal(codes, wanted)
                continue
            scales, right_scales = (np.asarray(x.codes.scales).astype(np.float64) for x in (ours, theirs))
            assert np.array_equal(scales[~written], right_scales[~written])
            yield Coded(ours.quantizer, written, codes, wanted, scales, right_scales)
