"""Trellis codes by the CUDA kernel, emulated: rings as good as those that XLA finds, and nearly always the same."""

import functools
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import appends, caches, emulate

from jaxquant import cache, trellis
from jaxquant._kernels import cuda_encode
from jaxquant._stacks import KVCache
from jaxquant.methods import trellis as method

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
WILD = Case(
    states=(32, 256), x="float32", scales=("float32", "float16"), wild=True, rotation="hadamard 3", masked=False
)
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
    return appends.filled(case, keys, values)


def compare(before: KVCache, got: KVCache, want: KVCache) -> None:
    """Compare all bytes, of the slots that were not written too.

    Coordinates are off by some 2^-21, and a vector may have two rings whose errors are that close: one vector of fifty
    may have another ring. Vectors of zeros have many that are as good.
    """
    different = vectors = 0
    for made, written, codes, right, scales, right_scales in appends.coded(before, got, want):
        apart = (codes != right).any(axis=-1)
        different += np.count_nonzero(apart & (right_scales > 0))
        vectors += np.count_nonzero(written)
        same = written & ~apart
        error = np.abs(scales - right_scales)[same]
        bound = max(float(jnp.finfo(made.scale_dtype).eps), 2**-18)
        assert (error <= bound * right_scales[same]).all(), "scales differ"
    assert different <= vectors / 50, f"{different} of {vectors} rings differ"


@functools.cache
def reference(case: Case) -> tuple[KVCache, KVCache]:
    before = filled(case)
    return before, appends.append(case, before, "xla")


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=caches.name_of)
def test_rings_are_those_of_xla(case):
    before, want = reference(case)
    with emulate.installed(cores=case.cores):
        compare(before, appends.append(case, before, "cuda"), want)


# Text of the sources, what stands there instead, and a case that must notice.
MUTANTS = {
    "the seam is not sought": ("i + own == seam ? 0.0f : BARRED;", "i + own == 0 ? 0.0f : BARRED;", USUAL),
    "the ring does not close": ("back<D, true>(space, seam,", "back<D, true>(space, 0,", USUAL),
    "the first pass begins late": ("(space, D - DEPTH, which", "(space, D / 2, which", USUAL),
    "the first pass ends before the seam": ("forward<DEPTH, true>(space, 0,", "forward<DEPTH, true>(space, 1,", USUAL),
    "levels of other windows": ("+ own) * BRANCHES + j]", "+ own) * BRANCHES + BRANCHES - 1 - j]", USUAL),
    "the second butterfly of a lane": ("const int k = e * LANES + lane;", "const int k = lane;", WILD),
    "symbols of the last word": ("(32 - BITS * (COUNT - s))", "(BITS * s)", LAST_RULE),
    "costs do not add up": ("error * error + bits_to_float(old[j]);", "error * error;", USUAL),
    "nobody waits for costs": ("lane);\n            sync_warp();", "lane);", USUAL),
    "other vectors' words": ("kept += VECTORS * STATES;", "kept += STATES;", USUAL),
    "the scale rule": ("if (RULE == 1) scale *=", "if (RULE == 1) scale += 0 *", USUAL),
    "the rule `unbiased`": ("if (RULE == 2) scale *=", "if (RULE == 2) scale += 0 *", USUAL),
    "the rule `least_squares`": ("if (RULE == 3) scale *=", "if (RULE == 3) scale += 0 *", LAST_RULE),
    "limit of float16": ("if (SCALES) scale = fminf", "if (false) scale = fminf", WILD),
    "wild vectors": ("y[i] *= range.down;", "", WILD),
    "NaN": ("x != x ? 0.0f :", "", WILD),
    "padding": ("group + v < vectors && at >= 0 &&", "group + v < vectors &&", MANY),
    "layers of another stack": ("held = index[0];", "held = index[0] < layers ? index[0] : 0;", STACKS),
    "the layer": ("const int held = index[0];", "const int held = 0;", USUAL),
    "later groups of vectors": ("group < vectors; group += stride)", "group < stride; group += stride)", MANY),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_in_the_source_are_seen(mistake):
    old, new, case = MUTANTS[mistake]
    before, want = reference(case)
    with emulate.installed(cores=case.cores, replace=(old, new)):
        got = jax.block_until_ready(appends.append(case, before, "cuda"))
    with pytest.raises(AssertionError):
        compare(before, got, want)


@needs_compiler
@pytest.mark.parametrize("states", [16, 64, 256])
def test_errors_are_those_of_xla(states):
    x = jax.random.normal(jax.random.key(0), (1, 96, 1, 128))
    made = quantizer(2, states, 128, "hadamard", "float32", "norm", 0)
    empty = cache.init(made, made, layers=1, batch=1, kv_heads=1, capacity=96)
    with emulate.installed():
        got = cache.append(empty, 0, x, x, implementation="cuda")
    want = cache.append(empty, 0, x, x, implementation="xla")
    errors = [np.sum((np.asarray(cache.materialize(c, 0)[0] - x)) ** 2, axis=-1) for c in (got, want)]
    np.testing.assert_allclose(*errors, rtol=1e-5)
    assert 0.06 < np.mean(errors[0]) / 128 < 0.09


def test_what_is_not_supported_is_said():
    for made, reason in (
        (method.mse(jax.random.key(0), dim=64, bits=2.5), "vectors have trellis codes with 2 tables, more than one"),
        (method.mse(jax.random.key(0), dim=64, bits=4), "vectors have bits 4, not one of 1, 2, 3"),
        (
            method.mse(jax.random.key(0), dim=64, bits=2, states=8),
            "vectors have states 8, not one of 16, 32, 64, 128, 256",
        ),
        (method.mse(jax.random.key(0), dim=48, bits=2), "vectors have dim 48, not one of 64, 128, 256"),
        (
            method.mse(jax.random.key(0), dim=64, bits=2, kind="1mad"),
            "vectors have a trellis of kind 1mad, not one of table",
        ),
        (method.mse(jax.random.key(0), dim=64, bits=2), None),
    ):
        c = cache.init(made, made, layers=1, batch=1, kv_heads=1, capacity=8)
        assert cuda_encode.unsupported(c.stacks[0].keys) == reason
        if reason:
            x = jnp.ones((1, 1, 1, made.dim))
            with pytest.raises(ValueError, match=f"^implementation 'cuda' cannot code for this cache: {reason}$"):
                cache.append(c, 0, x, x, implementation="cuda")
