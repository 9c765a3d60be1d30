"""Coding by the CUDA kernel, emulated: the bytes that XLA writes, where it writes them."""

import functools
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import appends, caches, emulate
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


USUAL = Case()
ROUNDS = Case(keys="8", values="4", rotation="hadamard 3", x="float32", rules=("unbiased", "norm"))
LAST_RULE = Case(keys="2", values="4 bytes", x="float16", wild=True, rules=("least_squares", "norm"))
STACKS = Case(keys="3", exact_layers=(1,), new=2)
WILD = Case(x="float32", scales=("float32", "float16"), wild=True, new=6)
MANY = Case(keys="3", new=40, lengths=(3, 30, 0), cores=1)
OFFSETS = Case(keys="2 uniform", values="4 bytes", dim=64, rules=("preserve", "least_squares"), new=17)
CASES = [
    USUAL,
    MANY,
    WILD,
    ROUNDS,
    LAST_RULE,
    STACKS,
    Case(keys="3", values="8", wild=True, scales=("bfloat16", "float32"), new=16),
    Case(keys="8", values="3", dim=64, new=1, rules=("norm", "preserve"), masked=False),
    Case(
        keys="4", values="2", dim=64, x="float32", rules=("least_squares", "preserve"), scales=("bfloat16", "float32")
    ),
    Case(keys="2 uniform", values="4", dim=256, new=17, rules=("unbiased", "least_squares")),
    Case(keys="4 bytes", values="3", dim=256, new=1, rotation="hadamard 3", x="float16", rules=("norm", "unbiased")),
    Case(keys="3", values="2", rotation="haar", rules=("unbiased", "preserve"), lengths=(0, 48, 47)),
    Case(keys="4", values="8", rotation="identity", x="float16", new=33, lengths=(20, 0, 1)),
    OFFSETS,
    Case(keys="8", values="8", dim=64, rules=("preserve", "least_squares"), new=3),
    Case(sinks=3, window=4, lengths=(0, 2, 46), new=7),
    Case(keys="2", layer=2, exact_layers=(0,), new=20, lengths=(0, 5, 30, 31, 1)),
]


def filled(case: Case) -> KVCache:
    keys, values = (
        caches.quantizer(book, case.dim, case.rotation, dtype, rule, seed=seed)
        for seed, (book, dtype, rule) in enumerate(zip((case.keys, case.values), case.scales, case.rules, strict=True))
    )
    return appends.filled(case, keys, values)


def compare(case: Case, before: KVCache, got: KVCache, want: KVCache) -> None:
    """Compare all bytes, of the slots that were not written too.

    Vectors of float32 are rotated as sums of two numbers of 8 bits, so coordinates are off by 2^-17 of the largest:
    where there are as many thresholds as at 8 bits, or such inputs, one code of a thousand may lie beside XLA's.
    """
    for made, written, codes, right, scales, right_scales in appends.coded(before, got, want):
        apart = np.abs(caches.indices(made, codes[written]) - caches.indices(made, right[written]))
        assert apart.max(initial=0) <= 1, "codes are not even neighbours"
        share = 1e-3 if made.bits == 8 or case.x == "float32" else 0
        assert np.count_nonzero(apart) <= share * apart.size, "codes differ"
        same = ~apart.any(axis=-1)
        error = np.abs(scales - right_scales)[written][same]
        bound = max(float(jnp.finfo(made.scale_dtype).eps), 2**-17)
        assert (error <= bound * right_scales[written][same]).all(), "scales differ"


@functools.cache
def reference(case: Case) -> tuple[KVCache, KVCache]:
    before = filled(case)
    return before, appends.append(case, before, "xla")


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=caches.name_of)
def test_codes_are_those_of_xla(case):
    before, want = reference(case)
    with emulate.installed(cores=case.cores):
        compare(case, before, appends.append(case, before, "cuda"), want)


# Text of the sources, what stands there instead, and a case that must notice.
MUTANTS = {
    "a stage of butterflies": ("for (int half = 4; half < HELD", "for (int half = 8; half < HELD", USUAL),
    "signs": ("signs[at] < 0 ?", "signs[at] > 0 ?", USUAL),
    "signs of later rounds": ("const float sign = signs[round * D + ", "const float sign = signs[", ROUNDS),
    "the lower half of float32": ("turn(out, x, basis);\n#pragma unroll\n        for (int c", "for (int c", ROUNDS),
    "the scale rule": ("if (RULE == 1) scale *=", "if (RULE == 1) scale += 0 *", USUAL),
    "the rule `unbiased`": ("if (RULE == 2) scale *=", "if (RULE == 2) scale += 0 *", USUAL),
    "the rule `least_squares`": ("if (RULE == 3) scale *=", "if (RULE == 3) scale += 0 *", LAST_RULE),
    "order of 4-bit codes": ("BITS != 4 ? rank : rank >= 8 ?", "true ? rank : rank >= 8 ?", USUAL),
    "third bits of half the lanes": ("made.third[i] << t / 2", "made.third[i]", MANY),
    "limit of float16": ("if (SCALES) scale = fminf", "if (false) scale = fminf", WILD),
    "wild vectors": ("if (attempt) grown[v] = tame(y[v]);", "", WILD),
    "NaN": ("x != x ? 0.0f :", "", WILD),
    "padding": ("wanted[v] = tile.slot[v] >= 0 &&", "wanted[v] =", USUAL),
    "heads of a token": ("+ tile.head) * (2 * D)", ") * (2 * D)", USUAL),
    "heads of float32": ("kv_heads + tile.head, t, flips", "kv_heads, t, flips", WILD),
    "rows": ("rows.quotient(tile.token[v])", "0", USUAL),
    "quotients": ("least + (n - least * by >= by)", "least", USUAL),
    "layers of another stack": ("held = index[0];", "held = index[0] < layers ? index[0] : 0;", STACKS),
    "the layer": ("held = index[0];", "held = 0;", USUAL),
    "thresholds": ("(levels[i] + levels[i - 1]) / 2;", "levels[i];", USUAL),
    "vectors read ahead": ("fetch(words, bytes_of(after, 0)", "fetch(words, bytes_of(tile, 0)", MANY),
    "squares of levels": ("some[half], some[half], squares)", "some[half], some[half], 0)", USUAL),
    "levels less 128": ("books.offset -= 128.0f;", "", OFFSETS),
    "the offset of levels": ("- 2.0f * offset * (float)sum", "+ 2.0f * offset * (float)sum", MANY),
    "levels of both vectors": ("(t % 2 ? even : odd, 1)", "(t % 2 ? odd : even, 1)", USUAL),
    "later tiles": ("now = next, tile = after;", "now = tiles, tile = after;", MANY),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_in_the_source_are_seen(mistake):
    old, new, case = MUTANTS[mistake]
    before, want = reference(case)
    with emulate.installed(cores=case.cores, replace=(old, new)):
        got = jax.block_until_ready(appends.append(case, before, "cuda"))
    with pytest.raises(AssertionError):
        compare(case, before, got, want)


def test_what_is_not_supported_is_said():
    fewer = codebooks.Codebook(centroids=jnp.array([-1.0, 0.0, 1.0]), grid="bytes")
    usual = caches.quantizer("4", 64)
    for made, reason in (
        (turboquant.prod(jax.random.key(0), dim=64, bits=3), "vectors are held by Residual, not by quantizers.Scalar"),
        (quantizers.Exact(dim=64), "vectors are held by Exact, not by quantizers.Scalar"),
        (turboquant.mse(jax.random.key(0), dim=64, bits=5), "vectors have 5 bits and a codebook of grid 'free'"),
        (
            quantizers.Scalar(rotation=usual.rotation, codebook=fewer, bits=2),
            "vectors have 3 levels, not 4",
        ),
        (caches.quantizer("4", 80, "identity"), "dim is 80, not 64, 128 or 256"),
        (usual, None),
    ):
        c = cache.init(made, made, layers=1, batch=1, kv_heads=1, capacity=8)
        assert cuda_encode.unsupported(c.stacks[0].keys) == reason
        if reason:
            x = jnp.ones((1, 1, 1, made.dim))
            with pytest.raises(ValueError, match=f"^implementation 'cuda' cannot code for this cache: {reason}$"):
                cache.append(c, 0, x, x, implementation="cuda")


def test_a_misspelt_implementation_is_an_error():
    wrong: Any = "cudda"
    made = caches.quantizer("4", 64)
    c, x = cache.init(made, made, layers=1, batch=1, kv_heads=1, capacity=8), jnp.ones((1, 1, 1, 64))
    message = "implementation must be None, 'xla' or 'cuda', got 'cudda'|Type-check"
    with pytest.raises((ValueError, TypeCheckError), match=message):
        cache.append(c, 0, x, x, implementation=wrong)
