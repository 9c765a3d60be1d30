"""Coding by the CUDA kernel, emulated: the bytes that XLA writes, where it writes them."""

import functools
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import caches, emulate
from jaxtyping import TypeCheckError

from jaxquant import cache, codebooks, quantizers
from jaxquant._kernels import cuda_encode
from jaxquant._stacks import KVCache
from jaxquant.methods import turboquant

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


class Case(NamedTuple):
    keys: str = "4"
    values: str = "2 uniform"
    dim: int = 128
    rules: tuple[str, str] = ("preserve", "unbiased")
    x: str = "bfloat16"
    scales: tuple[str, str] = ("float16", "float16")
    rotation: str = "hadamard"
    new: int = 5
    lengths: tuple[int, ...] = (0, 13, 40)  # before
    capacity: int = 48
    sinks: int = 0
    window: int = 0
    exact_layers: tuple[int, ...] = ()
    layer: int = 1
    masked: bool = True
    wild: bool = False
    cores: int = 132


WILD = Case(x="float32", scales=("float32", "float16"), wild=True, new=6)
MANY = Case(keys="3", new=19, lengths=(3, 30, 0), cores=1)
CASES = [
    Case(),
    MANY,
    WILD,
    Case(keys="3", values="8", wild=True, scales=("bfloat16", "float32"), new=16),
    Case(keys="2", values="4 bytes", x="float16", wild=True, rules=("least_squares", "norm")),
    Case(keys="8", values="3", dim=64, new=1, rules=("norm", "preserve"), masked=False),
    Case(keys="4", values="2", dim=64, x="float32", rules=("least_squares", "preserve"), scales=("bfloat16", "float32")),
    Case(keys="2 uniform", values="4", dim=256, new=17, rules=("unbiased", "least_squares")),
    Case(keys="4 bytes", values="3", dim=256, new=1, rotation="hadamard 3", x="float16", rules=("norm", "unbiased")),
    Case(keys="8", values="4", rotation="hadamard 3", x="float32", rules=("unbiased", "norm")),
    Case(keys="3", values="2", rotation="haar", rules=("unbiased", "preserve"), lengths=(0, 48, 47)),
    Case(keys="4", values="8", rotation="identity", x="float16", new=33, lengths=(20, 0, 1)),
    Case(sinks=3, window=4, lengths=(0, 2, 46), new=7),
    Case(keys="3", layer=1, exact_layers=(1,), new=2),
    Case(keys="2", layer=2, exact_layers=(0,), new=20, cores=1, lengths=(0, 5, 30, 31, 1)),
]


def name_of(case: Case) -> str:
    return "-".join(str(x) for x, usual in zip(case, Case(), strict=True) if x != usual).replace("'", "") or "usual"


def filled(case: Case) -> KVCache:
    keys, values = (
        caches.quantizer(book, case.dim, case.rotation, dtype, rule, seed=seed)
        for seed, (book, dtype, rule) in enumerate(
            zip((case.keys, case.values), case.scales, case.rules, strict=True)
        )
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
        x[:, 1, 1, 0, 7], x[:, 1, 1, 1, :2] = 1e38, (-np.inf, np.inf)
        x[:, 2, 0, 0], x[:, 2, 0, 1] = np.nan, 1e-42
    with np.errstate(over="ignore"):
        k, v = (jnp.asarray(part.astype(jnp.dtype(case.x))) for part in x)
    return k, v, jnp.asarray(rng.random(shape[:2]) < 0.8) if case.masked else None


def append(case: Case, c: KVCache, layer: Any, implementation: Any) -> KVCache:
    k, v, mask = inputs(case)
    run = jax.jit(
        functools.partial(cache.append, mask=mask, implementation=implementation),
        compiler_options=caches.quick_to_compile(),
    )
    return run(c, layer, k, v)


def compare(case: Case, before: KVCache, got: KVCache, want: KVCache) -> tuple[int, int]:
    """Compare all bytes; count codes that lie beside XLA's, of those written."""
    for one, other in ((got.length, want.length), (got.exact_from, want.exact_from)):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    beside = total = 0
    for old, mine, right in zip(before.stacks, got.stacks, want.stacks, strict=True):
        for name in ("keys", "values"):
            was, ours, theirs = (getattr(stack, name) for stack in (old, mine, right))
            for leaf in ("sinks", "window"):
                assert np.array_equal(np.asarray(getattr(ours, leaf)), np.asarray(getattr(theirs, leaf)))
            was, codes, wanted = (np.asarray(store.codes.codes) for store in (was, ours, theirs))
            written = (was != wanted).any(axis=-1)
            assert np.array_equal((was != codes).any(axis=-1), written), "not the same slots were written"
            if ours.codes.scales is None:
                assert np.array_equal(codes, wanted)
                continue
            scales, right_scales = (np.asarray(x.codes.scales).astype(np.float64) for x in (ours, theirs))
            assert np.array_equal(scales[~written], right_scales[~written])
            made = ours.quantizer
            apart = np.abs(caches.indices(made, codes[written]) - caches.indices(made, wanted[written]))
            assert apart.max(initial=0) <= 1
            beside, total = beside + int(np.count_nonzero(apart)), total + apart.size
            error = np.abs(scales - right_scales)[written] / np.maximum(right_scales[written], 1e-30)
            ulp = float(jnp.finfo(made.scale_dtype).eps)
            assert error.max(initial=0) <= max(ulp, 1e-6), error.max()
    return beside, total


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_codes_are_those_of_xla(case):
    before = filled(case)
    want = append(case, before, case.layer, "xla")
    with emulate.installed(cores=case.cores):
        got = append(case, before, jnp.int32(case.layer) if case.exact_layers else case.layer, "cuda")
        beside, total = compare(case, before, got, want)
        print(name_of(case), beside, total)
