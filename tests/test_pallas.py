"""The Pallas kernels, interpreted, against the XLA path and a float64 oracle; and what they lower to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import cache, codebooks, packing, quantizers, rotations
from jaxquant._kernels import pallas, pallas_triton, xla
from jaxquant._stacks import Stack, Store
from jaxquant.methods import turboquant

LAYERS, BATCH, KV_HEADS = 2, 3, 2
LENGTHS = (1, 190, 0)


def quick_to_compile():
    """Give options that make the CPU compiler four times as fast, if it still has them."""
    options = {"xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


kernel = jax.jit(pallas.coded, static_argnames=("grid", "interpret", "dtype"), compiler_options=quick_to_compile())
reference = jax.jit(xla.coded)

# bits of keys, bits of values, dim, queries a kv head, sinks, window, sliding window, soft cap, hidden tokens, grid:
# every width as keys and as values, every dim, and rows from 1 to 16, each with several of the others.
CASES = [
    (4, 4, 128, 4, 0, 0, None, None, False, "triton"),
    (4, 2, 96, 16, 4, 8, None, 5.0, False, "triton"),
    (4, 3, 64, 1, 0, 5, 50, None, True, "triton"),
    (4, 8, 80, 7, 3, 0, 130, 2.0, False, "triton"),
    (3, 4, 80, 16, 0, 9, None, None, True, "triton"),
    (3, 3, 256, 1, 2, 0, 70, None, False, "triton"),
    (3, 2, 128, 8, 0, 0, None, 3.0, False, "triton"),
    (2, 2, 64, 4, 1, 3, None, None, False, "triton"),
    (2, 4, 256, 2, 0, 70, 90, 4.0, False, "triton"),
    (8, 2, 80, 4, 5, 0, None, None, True, "triton"),
    (1, 5, 128, 2, 0, 0, None, None, False, "triton"),
    (6, 7, 96, 1, 2, 2, None, None, False, "triton"),
    (4, 2, 128, 4, 4, 8, None, None, False, "tpu"),
    (3, 8, 80, 16, 0, 0, 100, 5.0, True, "tpu"),
    (8, 3, 64, 1, 0, 6, None, None, False, "tpu"),
    (2, 4, 256, 5, 2, 0, 30, None, False, "tpu"),
]


def scalar(bits, dim, seed, **kwargs):
    u = np.random.default_rng(seed).normal(size=dim)
    matrix = np.roll(np.eye(dim) - 2 * np.outer(u, u) / (u @ u), seed + 1, axis=0)  # orthogonal, not symmetric
    book = kwargs.pop("codebook", codebooks.lloyd_max(bits))
    rotation = rotations.Dense(matrix=jnp.asarray(matrix.astype(np.float32)))
    return quantizers.Scalar(rotation=rotation, codebook=book, bits=bits, **kwargs)


def filled(keys, values, *, lengths=LENGTHS, sinks=0, window=0, capacity=190, seed=0):
    """Fill two layers with random codes and scales, beyond the length of a row too."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, BATCH, KV_HEADS)

    def store(quantizer):
        size = packing.packed_size(quantizer.dim, bits=quantizer.bits)
        codes = rng.integers(0, 256, (*shape, capacity - sinks, size), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (*shape, capacity - sinks)) * quantizer.dim**0.5
        return Store(
            quantizer=quantizer,
            codes=quantizers.Quantized(codes=jnp.asarray(codes), scales=jnp.asarray(scales.astype(np.float16))),
            sinks=jnp.zeros((*shape, sinks, quantizer.dim)),
            window=jnp.zeros((*shape, window, quantizer.dim)),
        )

    return Stack(keys=store(keys), values=store(values)), jnp.asarray(lengths, jnp.int32)


def queries(dim, rows, seed=1):
    q = np.random.default_rng(seed).normal(size=(BATCH, KV_HEADS, rows, dim)) * 2
    return jnp.asarray(q.astype(np.float32))


def rule_of(dim, *, sliding=None, cap=None, visible=None):
    return xla.Rule(
        scale=jnp.float32(dim**-0.5),
        soft_cap=None if cap is None else jnp.float32(cap),
        sliding_window=None if sliding is None else jnp.int32(sliding),
        visible=visible,
    )


def unpacked(packed, bits):
    """Read codes as `packing` documents them: fields of 1, 2 and 4 bits, planes within a field."""
    dim, start, shift, codes = packed.shape[-1] * 8 // bits, 0, 0, 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
        part = packed[..., start : start + dim * width // 8].astype(int)
        planes = [(part >> width * p) % 2**width for p in range(8 // width)]
        codes = codes + (np.concatenate(planes, axis=-1) << shift)
        start, shift = start + part.shape[-1], shift + width
    return codes


def decoded(store, layer, *, scaled=True):
    made, code = store.quantizer, store.codes
    codes = unpacked(np.asarray(code.codes[layer]), made.bits)
    if made.bits == 4:  # a sign, 8 where below the middle, and a count from there
        codes = np.where(codes < 8, codes + 8, 15 - codes)
    codes = np.minimum(codes, len(made.codebook.centroids) - 1)
    levels = np.asarray(made.codebook.centroids, np.float64)[codes] * made.dim**-0.5
    if scaled:
        levels = levels * np.asarray(code.scales[layer], np.float64)[..., None]
    return levels @ np.asarray(made.rotation.matrix, np.float64)


def oracle(stack, layer, q, position, exact_from, rule, *, scaled=True, masked=True, swapped=False):
    """Attend in float64 to the tokens that are neither sinks nor in a row's exact window; flags plant a mistake."""
    k, v = (decoded(store, layer, scaled=scaled) for store in (stack.keys, stack.values)[:: -1 if swapped else 1])
    scores = np.einsum("bhrd,bhtd->bhrt", np.asarray(q, np.float64), k) * float(rule.scale)
    if rule.soft_cap is not None:
        scores = float(rule.soft_cap) * np.tanh(scores / float(rule.soft_cap))
    token = np.arange(stack.slots) + stack.sinks
    position = np.asarray(position)[:, :, None]
    seen = token <= position
    if masked:
        if rule.sliding_window is not None:
            seen &= token > position - int(rule.sliding_window)
        if rule.visible is not None:
            seen &= np.asarray(rule.visible)[:, None, stack.sinks :]
        seen &= (token <= position - stack.window) | (token < np.asarray(exact_from)[:, None, None])
    else:
        seen = np.ones_like(seen)
    scores = np.where(seen[:, None], scores, -np.inf)
    peak = scores.max(axis=-1, initial=-1e300)
    weights = np.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total[..., None] > 0, np.einsum("bhrt,bhtd->bhrd", weights, v) / total[..., None], 0.0)
        return out, np.where(total > 0, peak + np.log(total), -np.inf)


def distance(got, want):
    """Relative error of the output, or the absolute one of the log-sum-exp if that is larger."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    assert np.array_equal(np.isfinite(lse), np.isfinite(want[1])), "not the same rows see something"
    some = np.isfinite(lse)
    assert not out[~some].any(), "rows that see nothing give 0"
    return max(np.linalg.norm(out - want[0]) / np.linalg.norm(want[0]), np.abs(lse[some] - want[1][some]).max())


def arguments_of(stack, length, rows, rule, exact_from=(0, 0, 0)):
    position = jnp.broadcast_to(length[:, None] - 1, (BATCH, rows))
    q = queries(stack.keys.quantizer.dim, rows)
    return stack, jnp.int32(1), q, position, jnp.asarray(exact_from, jnp.int32), rule


def inputs(case):
    bits_k, bits_v, dim, rows, sinks, window, sliding, cap, hidden, grid = case
    stack, length = filled(scalar(bits_k, dim, 3), scalar(bits_v, dim, 4), sinks=sinks, window=window)
    visible = jnp.asarray(np.random.default_rng(5).random((BATCH, stack.slots + sinks)) < 0.7) if hidden else None
    rule = rule_of(dim, sliding=sliding, cap=cap, visible=visible)
    return arguments_of(stack, length, rows, rule), grid


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel_equals_xla_and_float64(case):
    arguments, grid = inputs(case)
    got = kernel(*arguments, grid=grid)
    want = oracle(*arguments)
    # Sums of 190 scores of size 10 and of 256 products in float32: 1e-5 is about ten times their rounding.
    assert distance(got, want) < 1e-5
    if case in CASES[::3]:
        assert distance(got, reference(*arguments)) < 1e-5

    stack, _, *rest = arguments
    wrong = {"layer": oracle(stack, 0, *rest)}
    wrong["keys and values"] = oracle(*arguments, swapped=True)
    wrong["scale"] = oracle(*arguments, scaled=False)
    for name, result in wrong.items():
        assert distance(got, result) > 1e-2, name
    with pytest.raises(AssertionError, match="not the same rows"):
        distance(got, oracle(*arguments, masked=False))


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_float16_operands_stay_within_one_in_a_thousand(size):
    """Sizes outside of float16's range come through, since only ratios of scales are rounded to it."""
    values = scalar(4, 128, 4, scale_dtype="float32")
    stack, length = filled(scalar(4, 128, 3), values)
    codes = stack.values.codes
    codes = quantizers.Quantized(codes=codes.codes, scales=codes.scales.astype(jnp.float32) * size)
    scaled = Store(quantizer=values, codes=codes, sinks=stack.values.sinks, window=stack.values.window)
    arguments = arguments_of(Stack(keys=stack.keys, values=scaled), length, 4, rule_of(128))
    want, _ = oracle(*arguments)
    for dtype, bound in (("float16", 1e-3), ("float32", 1e-5)):
        out, _ = kernel(*arguments, dtype=dtype)
        assert np.linalg.norm(np.asarray(out) - want) < bound * np.linalg.norm(want)


@pytest.mark.parametrize("grid", ["triton", "tpu"])
def test_any_codebook_and_every_split(grid):
    """Levels without symmetry, fewer than the bits could tell apart; more tokens than a split or a block holds."""
    book = codebooks.Codebook(centroids=jnp.array([-2.0, -0.9, -0.1, 0.2, 0.5, 1.1, 3.0, 3.1, 3.7, 4.4, 5.0]))
    made = scalar(4, 64, 0, codebook=book)
    arguments = arguments_of(*filled(made, made, capacity=1200, lengths=(700, 1200, 513)), 4, rule_of(64))
    got = kernel(*arguments, grid=grid)
    assert distance(got, oracle(*arguments)) < 1e-5
    last = jnp.asarray(arguments[3]) - 1
    assert distance(got, oracle(*arguments[:3], last, *arguments[4:])) > 1e-5, "one token of 1200 must matter"


def test_cropped_rows_read_codes_where_the_window_forgot():
    stack, length = filled(scalar(4, 64, 3), scalar(4, 64, 4), window=20, lengths=(1, 178, 0))
    arguments = arguments_of(stack, length, 2, rule_of(64), exact_from=(0, 170, 0))
    got = kernel(*arguments)
    assert distance(got, oracle(*arguments)) < 1e-5
    never = jnp.zeros_like(arguments[4])
    assert distance(got, oracle(*arguments[:4], never, arguments[5])) > 1e-2


def test_layer_may_be_known_only_at_run_time():
    arguments, _ = inputs(CASES[7])
    stack, layer, *rest = arguments
    for index in (layer, jnp.int32(0)):
        assert distance(kernel(stack, index, *rest), oracle(stack, int(index), *rest)) < 1e-5


def test_cuda_kernel_takes_the_stacked_buffers_whole():
    """Lowered for a GPU, which takes none: one custom call reads the codes, and no other operation touches them."""
    arguments, _ = inputs(CASES[0])
    call = jax.jit(lambda stack, *rest: pallas.coded(stack, *rest, grid="triton", interpret=False))
    text = call.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    codes = arguments[0].keys.codes.codes
    kind = f"tensor<{'x'.join(map(str, codes.shape))}xui8>"
    uses = [line for line in text.splitlines() if kind in line and "func.func" not in line]
    assert len(uses) == 1, uses
    assert "__gpu$xla.gpu.triton" in uses[0]


def test_what_is_not_supported_is_said():
    residual = turboquant.prod(jax.random.key(0), dim=64, bits=3)
    plain, odd = scalar(3, 64, 0), scalar(3, 12, 0)
    whole = quantizers.Exact(dim=64)
    for keys, values, reason in (
        (residual, plain, "its keys are coded by Residual, not Scalar"),
        (plain, whole, "its values are coded by Exact, not Scalar"),
        (odd, odd, "its keys have dim 12, not a multiple of 8"),
        (plain, plain, None),
    ):
        stack = cache.init(keys, values, layers=1, batch=1, kv_heads=1, capacity=8).stacks[0]
        assert pallas.supports(stack) == reason
        if reason is not None:
            q, position = jnp.ones((1, 1, 1, keys.dim)), jnp.zeros((1, 1), jnp.int32)
            with pytest.raises(ValueError, match=reason):
                pallas.coded(stack, 0, q, position, jnp.zeros(1, jnp.int32), rule_of(keys.dim))
    many = jnp.ones((1, 1, 65, 64)), jnp.zeros((1, 65), jnp.int32)
    with pytest.raises(ValueError, match="at most 64 rows for each kv head, got 65"):
        pallas.coded(stack, 0, *many, jnp.zeros(1, jnp.int32), rule_of(64))
    assert pallas_triton.BLOCK % 64 == 0  # a page is a whole number of blocks
