"""Decode attention by the CUDA kernels, emulated: against XLA, and against an oracle in float64 that shares no code."""

import functools
import re
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import caches, emulate
from jaxtyping import TypeCheckError

from jaxquant import attention, cache, paged, quantizers, sharding, trellis
from jaxquant._kernels import cuda, nvrtc, xla
from jaxquant._stacks import KVCache
from jaxquant.methods import trellis as method
from jaxquant.methods import turboquant

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


class Case(NamedTuple):
    keys: str = "4"
    values: str = "4"
    dim: int = 128
    group: int = 4
    q: str = "float32"
    scales: tuple[str, str] = ("float16", "float16")
    rotation: str = "hadamard"
    capacity: int = 200
    lengths: tuple[int, ...] = (150, 33)
    sinks: int = 0
    window: int = 0
    sliding: int | None = None
    cap: float | None = None
    cropped: int | None = None  # length of the rows before they were cropped
    exact_layers: tuple[int, ...] = ()
    layer: int = 1
    cores: int = 132
    sizes: tuple[float, float] = (1.0, 1.0)  # of keys and values; queries undo the keys'
    growth: tuple[float, float] = (1.0, 1.0)  # of the scales of keys and values, from the first token to the last


# Every format of keys with three formats of values, and the other way around; everything else varies along.
GRID = [
    Case(
        keys=keys,
        values=values,
        dim=(64, 80, 96, 128, 256)[(2 * i + j) % 5],
        group=(1, 4, 16, 7, 2, 8, 9, 3, 5, 12)[(3 * i + 2 * j + j // 3) % 10],
        q=("float32", "bfloat16", "float16")[(i + j) % 3],
        scales=(
            ("float16", "bfloat16", "float32")[(i + j // 2) % 3],
            ("float32", "float16", "bfloat16")[(2 * i + j) % 3],
        ),
        rotation=("hadamard", "hadamard 3", "haar", "identity")[(i + i // 2 + j) % 4],
        capacity=(97, 64, 131, 80)[(i + j) % 4],
        lengths=((97, 33), (64, 1), (32, 131), (0, 79))[(i + j) % 4],
    )
    for i, keys in enumerate(caches.BOOKS)
    for j, values in enumerate(caches.BOOKS)
    if (j - i) % 6 in (0, 1, 4)
]
USUAL = Case(lengths=(0, 1, 200, 31))
OFFSETS = Case(keys="3", values="2 uniform", capacity=39, lengths=(39, 38))
SLIDING = Case(keys="2 uniform", values="3", sliding=40, capacity=333, lengths=(333, 20, 41))
CAPPED = Case(keys="8", values="4 bytes", sinks=4, window=16, cap=20.0, sliding=100, lengths=(150, 18, 3))
CROPPED = Case(values="2 uniform", sinks=2, window=64, cropped=150, lengths=(40, 140, 1))
LONG = Case(values="3", capacity=1100, lengths=(1100, 777), cores=1, growth=(1e3, 1e3), scales=("float32", "float32"))
GROWING = Case(
    keys="2 uniform",
    values="2",
    scales=("float16", "bfloat16"),
    capacity=901,
    lengths=(900, 513),
    cores=1,
    growth=(1.0, 1e4),
    group=12,
)
PARTS = Case(capacity=1300, lengths=(1300, 500), values="2 uniform")
HEADS = Case(capacity=530, lengths=(530, 2), group=16, cores=1)
WHOLE = Case(capacity=2100, lengths=(2100, 0, 300), values="2 uniform", q="bfloat16", cores=3)
LATE = Case(capacity=2100, lengths=(0,) * 33 + (2100, 40, 1500), cores=10, group=1, dim=64)
WIDE = Case(capacity=2104, lengths=(2104, 70, 0, 1500), cores=1, growth=(1e3, 1e3), scales=("float32", "float32"))
SPLIT = Case(capacity=4608, lengths=(4601,), cores=6, dim=64)
UNALIGNED = Case(capacity=700, lengths=(700, 351, 258), sliding=256, dim=64)
ROUNDS = Case(rotation="hadamard 3", group=8, q="float16")
SPECIAL = [
    USUAL,
    OFFSETS,
    SLIDING,
    CAPPED,
    CROPPED,
    LONG,
    ROUNDS,
    Case(values="8", cap=5.0),
    Case(values="3", sinks=3, window=20, sliding=10, lengths=(150, 22, 2)),
    Case(keys="2", values="2", window=24, cropped=60, lengths=(50, 33)),
    Case(keys="4 bytes", values="4", layer=0, exact_layers=(1,)),
    Case(keys="3", values="4", layer=2, exact_layers=(0,), lengths=(150, 0)),
    Case(sizes=(1e-4, 1e4), scales=("float32", "float32")),
    Case(keys="3", values="2 uniform", sizes=(1e4, 1e-4), scales=("bfloat16", "bfloat16"), dim=256),
    Case(keys="8", values="8", sizes=(1e4, 1e4), scales=("float32", "bfloat16"), dim=64),
    GROWING,
    PARTS,
    WHOLE,
    WHOLE._replace(group=16, rotation="haar", lengths=(0, 2100, 40), cores=7),
    LATE,
    UNALIGNED,
    WIDE,
    SPLIT,
    WIDE._replace(keys="3", values="2 uniform", group=8, q="bfloat16", window=24, cropped=1600, lengths=(1590, 20)),
    WIDE._replace(keys="2", values="4 bytes", dim=64, group=7, sinks=8, sliding=700, lengths=(1608, 650)),
    WIDE._replace(keys="2 uniform", values="3", dim=96, group=1, rotation="haar", cap=20.0, scales=("bfloat16",) * 2),
    Case(capacity=64, lengths=(64, 1, 0, 33) * 17, cores=5, group=1, dim=64),
    Case(capacity=700, lengths=(700, 1, 650) * 12, cores=4, group=1, dim=64, sliding=300),
    Case(
        keys="3", values="2 uniform", dim=256, capacity=600, lengths=(600, 599), cores=1, growth=(30.0, 1e-3), window=2
    ),
    Case(keys="4", values="4", dim=80, capacity=1050, lengths=(1049, 64), cores=1, sliding=1000, group=1),
]
RINGS = Case(keys="2 trellis 64", values="2 trellis 64", capacity=97, lengths=(97, 33))
APART = Case(keys="2 trellis 64 other", values="2 trellis 64", sinks=3, window=20, lengths=(150, 22))
SMALL_RINGS = Case(
    keys="2 trellis 64", values="2 trellis 64", dim=64, group=16, q="bfloat16", rotation="hadamard 3", cores=1
)
TRELLISES = [
    RINGS,
    APART,
    SMALL_RINGS,
    Case(keys="2 trellis 64", values="2 trellis 64", dim=256, group=3, rotation="haar", scales=("float32", "bfloat16")),
    Case(keys="2 trellis 16", values="1 trellis 256", group=8, q="float16", cap=20.0, sliding=40),
    Case(keys="1 trellis 16", values="2 trellis 32", group=1, window=24, cropped=60, lengths=(50, 33)),
    Case(keys="1 trellis 64", values="1 trellis 64", dim=256, group=12, rotation="identity", layer=0),
    Case(
        keys="4",
        values="2 trellis 64",
        group=5,
        capacity=901,
        lengths=(900, 513),
        cores=1,
        growth=(1.0, 1e4),
        scales=("float16", "bfloat16"),
    ),
    Case(keys="2 trellis 64", values="2 uniform", group=9, layer=2, exact_layers=(0,)),
    Case(keys="2 trellis 32", values="3", dim=64, capacity=640, lengths=(640, 500), sizes=(1e2, 1e-2)),
]
CASES = [*GRID, *SPECIAL, *TRELLISES]


def filled(case: Case) -> KVCache:
    keys, values = (
        caches.quantizer(book, case.dim, case.rotation, dtype, seed=seed)
        for seed, (book, dtype) in enumerate(zip((case.keys, case.values), case.scales, strict=True))
    )
    whole = (case.cropped,) * len(case.lengths) if case.cropped else case.lengths
    same = ("capacity", "sinks", "window", "exact_layers", "layer", "sizes", "growth")
    c = caches.filled(keys, values, lengths=whole, **{name: getattr(case, name) for name in same})
    return cache.crop(c, jnp.asarray(case.lengths)) if case.cropped else c


def queries(case: Case) -> jax.Array:
    q = np.random.default_rng(1).standard_normal((len(case.lengths), caches.KV_HEADS * case.group, case.dim))
    return jnp.asarray((q / case.sizes[0] / max(1, case.growth[0]) ** 0.5).astype(jnp.dtype(case.q)))


def attend(case: Case, c: KVCache, q: jax.Array, implementation: Any = "cuda") -> tuple[jax.Array, jax.Array]:
    """Attend with a layer that is not known when the function is traced."""
    options = {"soft_cap": case.cap, "sliding_window": case.sliding, "implementation": implementation}
    run = jax.jit(functools.partial(attention.decode_attention, **options), compiler_options=caches.quick_to_compile())
    return run(q, c, jnp.int32(case.layer))


def oracle(case: Case, c: KVCache, q: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    which, index = c.places[case.layer]
    length, exact_from = np.asarray(c.length)[case.layer], np.asarray(c.exact_from)[case.layer]
    k, v = (caches.tokens(held, index, length, exact_from) for held in (c.stacks[which].keys, c.stacks[which].values))
    rows = np.asarray(q, np.float64).reshape(len(length), caches.KV_HEADS, -1, case.dim)
    scores = np.einsum("bhrd,bhtd->bhrt", rows, k) * case.dim**-0.5
    if case.cap is not None:
        scores = case.cap * np.tanh(scores / case.cap)
    position = np.arange(k.shape[2])
    seen = position < length[:, None]
    if case.sliding is not None:
        seen &= position >= length[:, None] - case.sliding
    scores = np.where(seen[:, None, None], scores, -np.inf)
    peak = scores.max(axis=-1, initial=-1e300)
    weights = np.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total[..., None] > 0, np.einsum("bhrt,bhtd->bhrd", weights, v) / total[..., None], 0.0)
        lse = np.where(total > 0, peak + np.log(total), -np.inf)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def compare(case: Case, got: Any, want: Any) -> None:
    """Compare outputs by norm, and log-sum-exps with the largest.

    Weights are rounded to halves, by up to 2^-11. Scores come from queries of 16 bits (14 for half of a uniform key's
    coordinates), and from halves times halves where keys have 8 bits, which triples that error, or times sums of two
    halves where they are trellis codes, which all but ends it.
    """
    (out, lse), (right, right_lse) = ([np.asarray(x, np.float64) for x in pair] for pair in (got, want))
    some = np.isfinite(right_lse)
    assert np.array_equal(np.isfinite(lse), some), "not the same rows see something"
    assert not out[~some].any(), "rows that see nothing give 0"
    bound = 2**-10 if case.keys == "8" else 2**-11
    of_scores = 2**-15 if "trellis" in case.keys else bound / 2
    assert np.abs(lse[some] - right_lse[some]).max() < of_scores * max(1, np.abs(right_lse[some]).max())
    rounding = float(jnp.finfo(case.q).eps) / 12**0.5  # of the output to q's dtype
    assert np.linalg.norm(out - right) < np.hypot(bound, rounding) * np.linalg.norm(right)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=caches.name_of)
def test_kernel_equals_xla_and_float64(case):
    c, q = filled(case), queries(case)
    with emulate.installed(cores=case.cores):
        got = attend(case, c, q)
        compare(case, got, oracle(case, c, q))
        if case in CASES[::5]:
            compare(case, got, attend(case, c, q, "xla"))


# Text of the sources, what stands there instead, and a case that must notice.
MUTANTS = {
    "no scales of keys": ("read(stage + KEY_SCALES_AT, token, KEY_SCALES) * key_unit", "key_unit", USUAL),
    "tails are seen": ("if (here < begin || here + TILE > stop) {", "if (false) {", USUAL),
    "layer 0 of the codes": ("clamp(index[0], layers - 1)", "0", USUAL),
    "layer 0 of the lengths": ("clamp(layer[0], all_layers - 1)", "0", CROPPED),
    "values lose their signs": ("even = (z << 4) & 0x80808080u", "even = 0", USUAL),
    "keys have no negative levels": ("low[1] = permute(table[2], table[3], flipped);", "low[1] = 0;", USUAL),
    "keys have no positive levels": ("high[0] = permute(table[0], table[1], z >> 16)", "high[0] = 0", USUAL),
    "keys are not as far apart": ("offset = -1.0f;", "offset = 0.0f;", USUAL),
    "no offsets of values": ("value_book.offset * offset_sum", "0.0f * offset_sum", OFFSETS),
    "no offsets of keys": ("float bias = -(float)sum * key_book.offset;", "float bias = 0.0f;", OFFSETS),
    "third bits of values elsewhere": (": thirds(i, lane) << 2;", ": thirds(i, lane) << 1;", LONG),
    "third bits of the wrong half": ("lane / (LANES / 2) : 0;", "0 : 0;", OFFSETS),
    "outputs do not decay": ("decay *= fade;", "", LONG),
    "totals do not decay": ("total[k] *= fade;", "", LONG),
    "weights' factor moves alone": ("shrink = now / grown;", "", GROWING),
    "nobody waits for copies": ("wait_for_all_but<STAGES - 2>();", "", USUAL),
    "waits for one copy less": ("wait_for_all_but<STAGES - 2>();", "wait_for_all_but<STAGES - 1>();", LONG),
    "lanes do not wait for lanes": ("<STAGES - 2>();\n        sync_warp();", "<STAGES - 2>();", USUAL),
    "stages do not go around": ("slot_of_stage == STAGES - 1 ? 0 : slot_of_stage + 1;", "0;", LONG),
    "lower bytes of queries": ("(float)(256 * upper + lower);", "(float)(256 * upper);", USUAL),
    "a stage of the transform": ("mask = 1; mask < 32;", "mask = 1; mask < 16;", USUAL),
    "order of rounds": ("round = ROUNDS - 1; round >= 0; round--", "round = 0; round < ROUNDS; round++", ROUNDS),
    "the sliding window": ("SLIDING ? tokens - sliding[0] - sinks : 0", "0", SLIDING),
    "cropped windows": ("tokens - window > unexact ? tokens - window : unexact", "tokens - window", CROPPED),
    "the soft cap": ("if (SOFT_CAP) {", "if (false) {", CAPPED),
    "the last warp": ("w < WARPS; w++) {\n            const", "w < 7; w++) {\n            const", LONG),
    "parts of the total": ("total += totals[w];", "", PARTS),
    "parts of a row overlap": ("first += part * share;", "", PARTS),
    "the place of a part": ("(base + head) * blocks_y() + part;", "(base + head) * blocks_y();", PARTS),
    "heads of other warps": ("head = warp; head < heads; head += WARPS", "head = warp; head < 1; head += WARPS", HEADS),
    "rotated back by others' signs": ("(value_signs, lane);\n        sync", "(key_signs, lane);\n        sync", WHOLE),
    "lanes have others' queries": ("fragments[32 * n + lane] = frag", "fragments[32 * n + (lane ^ 1)] = frag", USUAL),
    "planes of keys weigh the same": ("c / L::STRIDE % 2 ? 4 : 1", "false ? 4 : 1", SLIDING),
    "rings do not close": ("((N * lane + N) % L::WORDS)", "((N * lane + N - 1) % L::WORDS)", RINGS),
    "rings of half a word do not close": ("(2 * lane + 2) % L::ROW) << 16", "2 * lane) << 16", SMALL_RINGS),
    "windows that begin in a word's last bits": ("funnel(low, high, at - 7)", "low >> (at - 7)", RINGS),
    "neighbours have the same level": ("levels[window >> bits & last]", "levels[window & last]", RINGS),
    "neighbours of values change places": ("second, 0x7632)", "second, 0x7610)", RINGS),
    "what halves of queries leave": ("return TWO_HALVES ? x + rest : x;", "return x;", RINGS),
    "keys of half a wide tile": ("first_j < EIGHTS;", "first_j < 4;", WIDE),
    "values of half a wide tile": ("s < EIGHTS / 2;", "s < 2;", WIDE),
    "scales of half a wide tile": ("for_keys = TILE *", "for_keys = 32 *", WIDE),
    "peaks of half a wide tile": ("j = 1; j < EIGHTS; j++) most", "j = 1; j < 4; j++) most", WIDE),
    "one chain of two": ("chain < CHAINS; chain++", "chain < 1; chain++", SPLIT),
    "wide tiles do not end": ("slot < begin || slot >= stop", "j < 4 && (slot < begin || slot >= stop)", WIDE),
    "values have the levels of keys": ("apart = any_lane(apart);", "apart = false;", APART),
    "keys have the levels of values": ("(!apart || lane < 16)", "!apart", APART),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_in_the_source_are_seen(mistake):
    old, new, case = MUTANTS[mistake]
    c, q = filled(case), queries(case)
    with emulate.installed(cores=case.cores, replace=(old, new)):
        got = jax.block_until_ready(attend(case, c, q))
    with pytest.raises(AssertionError):
        compare(case, got, oracle(case, c, q))


@needs_compiler
@pytest.mark.parametrize("mistake", ["codes", "scales", "layer", "lengths"])
def test_wrong_operands_are_seen(mistake):
    case = Case(keys="3", values="3", layer=2, exact_layers=(0,), lengths=(150, 60))
    c, q = filled(case), queries(case)
    # layer, index, lengths, exact_from are operands 1 to 4; codes and scales of keys 8 and 9, of values 12 and 13
    swap = {"codes": {8: 12, 12: 8}, "scales": {9: 13, 13: 9}, "layer": {2: 1}, "lengths": {3: 4}}[mistake]
    if mistake == "layer":
        case, c = case._replace(layer=1), filled(case)
    with emulate.installed(swap=swap):
        got = jax.block_until_ready(attend(case, c, q))
    with pytest.raises(AssertionError):
        compare(case, got, oracle(case, c, q))


def paged_attention(page: int, sliding: int | None, implementation: Any) -> tuple[jax.Array, jax.Array]:
    """Attend over rows of pages in no order; one row has no token, and one a single one."""
    keys, values = caches.quantizer("4", 64), caches.quantizer("2 uniform", 64, seed=1)
    table = jnp.asarray(np.random.default_rng(0).permutation(40)[: 4 * (640 // page)].reshape(4, -1))
    k, v = jax.random.normal(jax.random.key(1), (2, 4, 600, 2, 64))
    pages, length = paged.append(
        paged.init(keys, values, pages=40, kv_heads=2, page=page),
        *(table, jnp.zeros(4, jnp.int32), k, v),
        mask=jnp.arange(600) < jnp.array([[600], [1], [0], [300]]),
    )
    q = jax.random.normal(jax.random.key(2), (4, 8, 64))
    how = {"sliding_window": sliding, "implementation": implementation}
    jax.clear_caches()  # of what another emulation traced
    return jax.block_until_ready(paged.decode_attention_paged(q, pages, table, length, **how))


@needs_compiler
@pytest.mark.parametrize(("page", "sliding"), [(64, None), (128, 90), (64, 2**31 - 1)])
def test_pages_are_read_wherever_they_are(page, sliding):
    want = paged_attention(page, sliding, "xla")
    with emulate.installed(cores=2):
        got = paged_attention(page, sliding, "cuda")
    with emulate.installed(cores=2, replace=("* kv_heads + head) * page", "* kv_heads) * page")):
        wrong = paged_attention(page, sliding, "cuda")
    for one, other, far in zip(got, want, wrong, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3)  # queries have 16 bits, weights 11
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(far, other, rtol=0, atol=2e-3)


def rings(bits: float = 2, states: int = 64, **kwargs: Any) -> trellis.Trellis:
    return method.mse(jax.random.key(0), dim=64, bits=bits, states=states, **kwargs)


def usual_cache(keys: Any = None, values: Any = None, *, dim: int = 64, capacity: int = 64, **kwargs: Any) -> KVCache:
    keys, values = (made or caches.quantizer("4", dim) for made in (keys, values))
    return cache.init(keys, values, layers=1, batch=1, kv_heads=1, capacity=capacity, **kwargs)


def test_what_is_not_supported_is_said():
    residual = turboquant.prod(jax.random.key(0), dim=64, bits=3)
    free = turboquant.mse(jax.random.key(0), dim=64, bits=5)
    for c, heads, reason in (
        (usual_cache(residual), 1, "keys are held by Residual, not by quantizers.Scalar"),
        (usual_cache(values=quantizers.Exact(dim=64)), 1, "values are held by Exact, not by quantizers.Scalar"),
        (usual_cache(values=free), 1, "values have 5 bits and a codebook of grid 'free'"),
        (usual_cache(dim=48), 1, "keys have dim 48, not one of 64, 80, 96, 128, 256"),
        (usual_cache(), 17, "17 query heads share a kv head, more than 16"),
        (usual_cache(capacity=40, sinks=9), 1, "there is room for 31 coded tokens, fewer than 32"),
        (usual_cache(capacity=32), 16, None),
        (usual_cache(rings(bits=3), rings()), 1, "keys have trellis codes of 3 bits, more than 2"),
        (usual_cache(rings(), rings(states=128)), 1, "values have a trellis of 128 states, more than 64"),
        (usual_cache(rings(bits=1)), 1, "keys have trellis codes of dim 64, not a power of two from 128 to 256"),
        (usual_cache(rings(kind="3inst")), 1, "keys have trellis codes of kind 3inst, not table"),
        (usual_cache(rings(bits=1.5)), 1, "keys have trellis codes with 2 tables, more than one"),
        (usual_cache(rings(), rings(states=16)), 4, None),
    ):
        rule = xla.Rule(scale=jnp.float32(1), soft_cap=None, sliding_window=None, visible=None)
        assert cuda.unsupported(c.stacks[0], heads, rule) == reason
        if reason:
            with pytest.raises(ValueError, match=f"^implementation 'cuda' cannot read this cache: {reason}$"):
                attention.decode_attention(jnp.ones((1, heads, c.dim)), c, 0, implementation="cuda")
    with pytest.raises(ValueError, match="cannot read this cache: `visible` is given"):
        attention.decode_attention(
            jnp.ones((1, 1, 64)), usual_cache(), 0, visible=jnp.ones((1, 64), bool), implementation="cuda"
        )


def test_a_misspelt_implementation_is_an_error():
    wrong: Any = "cudda"
    message = "implementation must be None, 'xla' or 'cuda', got 'cudda'|Type-check"
    with pytest.raises((ValueError, TypeCheckError), match=message):
        attention.decode_attention(jnp.ones((1, 1, 64)), usual_cache(), 0, implementation=wrong)


@pytest.mark.parametrize(("lowest", "expected"), [(None, False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_kernels_are_for_gpus_from_8_0_on(monkeypatch, lowest, expected):
    monkeypatch.setattr(nvrtc, "capability", lambda: lowest)
    assert nvrtc.available() is expected


def test_trellis_codes_need_shared_memory(monkeypatch):
    c = usual_cache(rings(), rings())
    rule = xla.Rule(scale=jnp.float32(1), soft_cap=None, sliding_window=None, visible=None)
    for lowest, reason in (
        ((8, 0), "keys have trellis codes, for which compute capability 8.0 has too little shared memory"),
        ((9, 0), None),
    ):
        monkeypatch.setattr(nvrtc, "capability", lambda lowest=lowest: lowest)
        assert cuda.unsupported(c.stacks[0], 1, rule) == reason


@needs_compiler
def test_what_devices_exchange_leaves_the_kernel_in_one_piece():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = sharding.Layout(mesh, tokens="tokens", page=32)
    pair = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2, fused=True)
    held = sharding.init(layout, *pair, layers=1, batch=3, kv_heads=2, capacity=190)

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(q, held, implementation):
        return sharding.decode_attention(layout, q, held, 0, implementation=implementation)

    q = jax.random.normal(jax.random.key(3), (3, 8, 64))
    with emulate.installed():
        fused, plain = (attend.lower(q, held, name).compile().as_text() for name in ("cuda", "xla"))
    pieced = re.compile(r"65\]\S* concatenate\(")  # outputs of 64 numbers and a log-sum-exp
    assert pieced.search(plain)
    assert not pieced.search(fused)


@needs_compiler
@pytest.mark.parametrize(("sinks", "window", "cropped"), [(0, 0, None), (3, 20, None), (2, 40, 90)])
def test_tokens_dealt_out_to_devices_are_found(sinks, window, cropped):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = sharding.Layout(mesh, tokens="tokens", page=32)
    pair = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2, fused=True)
    sizes = {"layers": 2, "batch": 3, "kv_heads": 2, "capacity": 190, "sinks": sinks, "window": window}
    held = sharding.init(layout, *pair, **sizes)
    k, v = (jax.random.normal(jax.random.key(i), (3, 150, 2, 64)) for i in (1, 2))
    mask = jnp.arange(150) < jnp.array([150, 33, 0])[:, None]
    held = sharding.append(layout, held, 1, k, v, mask=mask, implementation="xla")
    held = held if cropped is None else cache.crop(held, cropped)
    q = jax.random.normal(jax.random.key(3), (3, 8, 64))
    with emulate.installed():
        got = sharding.decode_attention(layout, q, held, 1, implementation="cuda")
    want = sharding.decode_attention(layout, q, held, 1, implementation="xla")
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=5e-4)  # queries have 16 bits
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=5e-4)
    assert float(jnp.max(jnp.abs(want[0][0] - want[0][1]))) > 1e-2
    with pytest.raises(ValueError, match="dealt out to devices and `sliding_window`"):
        sharding.decode_attention(layout, q, held, 1, implementation="cuda", sliding_window=9)
