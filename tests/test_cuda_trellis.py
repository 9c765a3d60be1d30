"""Trellis codes by the CUDA kernel, emulated: rings as good as those that XLA finds, and nearly always the same."""

import functools
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import caches, emulate

from jaxquant import cache, quantizers, trellis
from jaxquant._stacks import KVCache

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


class Case(NamedTuple):
    bits: tuple[int, int] = (2, 2)  # of keys and of values
    states: tuple[int, int] = (64, 128)
    dim: int = 128
    rules: tuple[str, str] = ("preserve", "unbiased")
    x: str = "bfloat16"
    scales: tuple[str, str] = ("float16", "float16")
    rotation: str = "hadamard"
    new: int = 3
    lengths: tuple[int, ...] = (0, 13, 40)  # before
    capacity: int = 48
    sinks: int = 0
    window: int = 0
    exact_layers: tuple[int, ...] = ()
    layer: int = 1
    masked: bool = True
    wild: bool = False
    cores: int = 132


USUAL = Case()
MANY = Case(states=(16, 32), new=20, lengths=(3, 30, 0), cores=1, dim=64)
WILD = Case(states=(32, 256), x="float32", scales=("float32", "float16"), wild=True, rotation="hadamard 3")
LAST_RULE = Case(states=(256, 16), bits=(1, 3), rules=("least_squares", "norm"), scales=("bfloat16", "float32"))
STACKS = Case(states=(64, 64), exact_layers=(1,), new=2)
CASES = [
    USUAL,
    MANY,
    WILD,
    LAST_RULE,
    STACKS,
    Case(bits=(3, 1), states=(64, 64), dim=256, new=1, rules=("norm", "preserve"), x="float16", masked=False),
    Case(bits=(3, 1), states=(256, 16), rules=("unbiased", "least_squares"), rotation="haar", new=2),
    Case(bits=(1, 3), states=(128, 128), dim=64, rotation="identity", layer=2, exact_layers=(0,)),
    Case(bits=(1, 3), states=(32, 32), sinks=3, window=4, lengths=(0, 2, 46), new=7),
]


def name_of(case: Case) -> str:
    return "-".join(str(x) for x, usual in zip(case, Case(), strict=True) if x != usual).replace("'", "") or "usual"


def quantizer(bits: int, states: int, dim: int, rotation: str, dtype: Any, rule: Any, seed: int) -> trellis.Trellis:
    turn = caches.quantizer("4", dim, rotation, seed=seed).rotation
    code = trellis.code((((bits,), dim),), states=states)
    return trellis.Trellis(rotation=turn, code=code, scale=rule, scale_dtype=dtype)


def filled(case: Case) -> KVCache:
    settings = zip(case.bits, case.states, case.scales, case.rules, strict=True)
    keys, values = (
        quantizer(bits, states, case.dim, case.rotation, dtype, rule, seed)
        for seed, (bits, states, dtype, rule) in enumerate(settings)
    )
    same = ("capacity", "sinks", "window", "exact_layers", "layer", "lengths")
    return caches.filled(keys, values, **{name: getattr(case, name) for name in same})


def inputs(case: Case) -> tuple[jax.Array, jax.Array, jax.Array | None]:
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


def append(case: Case, c: KVCache, implementation: Any) -> KVCache:
    """Append to a layer that is not known when the function is traced."""
    k, v, mask = inputs(case)
    run = jax.jit(
        functools.partial(cache.append, mask=mask, implementation=implementation),
        compiler_options=caches.quick_to_compile(),
    )
    return run(c, jnp.int32(case.layer), k, v)


def compare(case: Case, before: KVCache, got: KVCache, want: KVCache) -> None:
    """Compare all bytes, of the slots that were not written too.

    Coordinates are off by some 2^-21, and a vector may have two rings whose errors are that close: one vector of fifty
    may have another ring.
    """
    for one, other in ((got.length, want.length), (got.exact_from, want.exact_from)):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    different = vectors = 0
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
            apart = (codes != wanted).any(axis=-1)
            different, vectors = different + np.count_nonzero(apart), vectors + np.count_nonzero(written)
            scales, right_scales = (np.asarray(x.codes.scales).astype(np.float64) for x in (ours, theirs))
            assert np.array_equal(scales[~written], right_scales[~written])
            same = written & ~apart
            error = np.abs(scales - right_scales)[same]
            bound = max(float(jnp.finfo(ours.quantizer.scale_dtype).eps), 2**-18)
            assert (error <= bound * right_scales[same]).all(), "scales differ"
    assert different <= vectors / 50, f"{different} of {vectors} rings differ"


@functools.cache
def reference(case: Case) -> tuple[KVCache, KVCache]:
    before = filled(case)
    return before, append(case, before, "xla")


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rings_are_those_of_xla(case):
    before, want = reference(case)
    with emulate.installed(cores=case.cores):
        compare(case, before, append(case, before, "cuda"), want)
