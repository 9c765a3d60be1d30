"""Guidance that leaves work out, tiled decoding, a memo, layouts, PSNR and the float64 audit."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import chunked_attention, float64, layouts, memo
from jaxquant.diffusion import dit, flow, guidance, quality, tiles, vae

EPS = float(np.finfo(np.float32).eps)
DATA = pathlib.Path(__file__).parent / "data"
SIDE, HIDDEN, HEADS, LAYERS, CLASSES = 16, 64, 4, 2, 5
TOKENS = (SIDE // 2) ** 2


@pytest.fixture
def without_type_checker():
    """The package's own messages, as users meet them: the type checker of the test run stands in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def network():
    """A random network whose every part matters: its zero-initialised output would hide all others."""

    def build(key):
        return dit.DiT(side=SIDE, classes=CLASSES, hidden=HIDDEN, heads=HEADS, layers=LAYERS, rngs=nnx.Rngs(key))

    @jax.jit
    def weights(key):
        leaves, tree = jax.tree.flatten(nnx.state(build(key)))
        keys = jax.random.split(key, len(leaves))
        noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0)))), weights(jax.random.key(1)))


def inputs(rows=2):
    x = jax.random.normal(jax.random.key(2), (2 * rows, SIDE, SIDE, 1))
    time = jnp.linspace(0.1, 0.9, 2 * rows)
    return x, time, jnp.array([0, 1, CLASSES, CLASSES])[: 2 * rows]


# Guidance


def test_guidance_goes_from_unconditional_through_conditional_and_beyond():
    with_condition, without = jnp.array([3.0, -1.0]), jnp.array([1.0, 5.0])
    both = jnp.concatenate([with_condition, without])
    for scale, expected in ((0.0, without), (1.0, with_condition), (2.5, 2.5 * with_condition - 1.5 * without)):
        assert np.allclose(guidance.guide(both, scale=scale), expected)
        assert not np.allclose(guidance.guide(jnp.concatenate([without, with_condition]), scale=scale), expected)
    assert np.array_equal(guidance.pair(with_condition), [3.0, -1.0, 3.0, -1.0])


def test_sharing_runs_attention_on_the_conditional_half_alone():
    seen = []

    def attend(x):
        seen.append(x.shape[0])
        return jnp.cumsum(x, axis=1)

    x = jax.random.normal(jax.random.key(0), (6, 4, 8))
    out = guidance.share(attend, x)
    assert seen == [3]
    assert np.array_equal(out[:3], attend(x[:3]))
    assert np.array_equal(out[3:], attend(x[:3]))
    assert not np.array_equal(out[3:], attend(x[3:]))


def flops(**options):
    model = network()
    graph, state = nnx.split(model)

    def run(state, x, time, label):
        return nnx.merge(graph, state)(x, time, label, **options)

    operations = jax.jit(run).lower(state, *inputs()).compile().cost_analysis()
    assert operations is not None
    return operations["flops"]


def shared(layer, attend, x):
    return guidance.share(attend, x)


def test_sharing_removes_what_attention_of_one_half_costs():
    """From 2 rows of 4: four projections, scores and mixing, two operations for each multiplication."""
    of_projections = 2 * 2 * TOKENS * HIDDEN * 4 * HIDDEN
    of_attention = 2 * 2 * 2 * TOKENS * TOKENS * HIDDEN
    expected = LAYERS * (of_projections + of_attention)
    full = flops()
    removed = full - flops(around=shared)
    # The rest: norms, scaling, and a softmax of some ten operations for each of its weights.
    softmax = LAYERS * 2 * HEADS * TOKENS * TOKENS * 12
    assert expected <= removed <= expected + softmax
    early = full - flops(around=lambda layer, attend, x: shared(layer, attend, x) if layer < 1 else attend(x))
    assert np.isclose(early, removed / LAYERS, rtol=0.02)


def test_a_gate_compares_then_shares_then_compares_again():
    gate = guidance.Gate(threshold=0.9, refresh=2)
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    near, far = jnp.concatenate([x, x + 0.01]), jnp.concatenate([x, -x])
    runs = []

    def attend(x):
        jax.debug.callback(lambda: runs.append(x.shape[0]))
        return 2 * x

    step = jax.jit(lambda state, x: gate.attend(state, attend, x))

    def follow(x, steps):
        runs.clear()
        state = gate.init()
        outs = []
        for _ in range(steps):
            state, out = step(state, x)
            outs.append(out)
        jax.effects_barrier()
        return outs, list(runs)

    outs, sizes = follow(near, 7)
    assert sizes == [2, 1, 1, 2, 1, 1, 2]
    for out, size in zip(outs, sizes, strict=True):
        assert np.array_equal(out, 2 * near if size == 2 else guidance.pair(2 * x))
    assert follow(far, 4)[1] == [2, 2, 2, 2]
    first, second = np.asarray(near, np.float64).reshape(2, -1)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert np.isclose(step(gate.init(), near)[0].similarity, cosine, atol=1e-6)
    assert cosine < 1 - 1e-5


def test_a_gate_inside_sampling_agrees_with_no_gate_until_it_shares():
    model = network()

    def velocity(gate):
        def run(state, x, time, label):
            states = list(state)

            def around(layer, attend, x):
                states[layer], out = gate.attend(states[layer], attend, x)
                return out

            out = model(x, time, label, around=around)
            return tuple(states), out

        return run

    noise, label = jax.random.normal(jax.random.key(3), (1, SIDE, SIDE, 1)), jnp.array([1])
    follow = functools.partial(flow.sample, noise=noise, labels=label, none=CLASSES, steps=3, scale=2.0)
    never, always = guidance.Gate(threshold=2.0), guidance.Gate(threshold=-2.0, refresh=100)
    _, plain = follow(lambda state, *x: (state, model(*x)), ())
    state, kept = follow(velocity(never), (never.init(),) * LAYERS)
    assert np.allclose(kept, plain, rtol=1e-4, atol=1e-4)
    assert all(int(each.age) == 0 and -1 <= each.similarity <= 1 for each in state)
    state, other = follow(velocity(always), (always.init(),) * LAYERS)
    assert not np.allclose(other, plain, rtol=1e-3, atol=1e-3)
    assert [int(each.age) for each in state] == [3] * LAYERS


@pytest.mark.parametrize("f", [guidance.guide, guidance.share])
def test_an_odd_batch_has_no_halves(f):
    with pytest.raises(ValueError, match="conditional and an unconditional half, got 3 rows"):
        f(jnp.ones((3, 2, 2)), scale=1.0) if f is guidance.guide else f(lambda x: x, jnp.ones((3, 2, 2)))


# The small transformer and its flow


def test_the_transformer_reads_all_it_is_given():
    model = jax.jit(network())
    x, time, label = inputs()
    out = model(x, time, label)
    assert out.shape == x.shape
    for other in ((x[::-1], time, label), (x, time[::-1], label), (x, time, label[::-1])):
        assert not np.allclose(model(*other), out, atol=1e-3)
    rolled = model(jnp.roll(x, 2, axis=1), time, label)
    assert not np.allclose(jnp.roll(out, 2, axis=1), rolled, atol=1e-3)  # places matter
    seen = []

    def tap(layer, q, k, v):
        seen.append((layer, k.shape, v.shape))
        return q, k, jnp.zeros_like(v)

    without = jax.jit(functools.partial(network(), tap=tap))(x, time, label)
    assert not np.allclose(without, out, atol=1e-3)
    shape = (4, TOKENS, HEADS, HIDDEN // HEADS)
    assert seen == [(layer, shape, shape) for layer in range(LAYERS)]


def test_patches_are_put_back_where_they_were():
    """With every block switched off and the embedding undone, a patch's output depends on that patch alone."""
    off = lambda layer, attend, x: jnp.zeros_like(x)  # noqa: E731
    model = jax.jit(functools.partial(network(), around=off))
    x, time, label = inputs()
    changed = model(x.at[:, 6, 9].add(1.0), time, label) - model(x, time, label)
    rows, columns = np.nonzero(np.abs(np.asarray(changed)).max((0, 3)) > 1e-6)
    assert set(rows) == {6, 7}
    assert set(columns) == {8, 9}


def test_a_flow_follows_straight_lines_exactly():
    """To one picture, the best velocity at (x, t) is (picture - x) / (1 - t); Euler's steps are then exact."""
    picture = jax.random.normal(jax.random.key(0), (1, 3, 3, 1))

    def best(state, x, time, label):
        return state, (picture - x) / (1 - time.reshape(-1, 1, 1, 1))

    noise = jax.random.normal(jax.random.key(1), picture.shape)
    for steps in (1, 5):
        _, out = flow.sample(best, (), noise, jnp.array([0]), none=1, steps=steps, scale=3.0)
        assert np.allclose(out, picture, atol=1e-5)
    many = jnp.broadcast_to(picture, (64, 3, 3, 1))
    labels = jnp.zeros(64, int)
    perfect = lambda x, time, label: best((), x, time, label)[1]  # noqa: E731
    assert flow.loss(jax.random.key(2), perfect, many, labels, none=1) < 1e-6
    assert flow.loss(jax.random.key(2), lambda *x: -perfect(*x), many, labels, none=1) > 1.0
    dropped = []
    flow.loss(jax.random.key(2), lambda x, t, c: dropped.append(c) or x, many, labels, none=1, dropped=0.5)
    assert 16 < int(dropped[0].sum()) < 48


# Tiles


@functools.cache
def decoder():
    return vae.Decoder(channels=3, hidden=6, rngs=nnx.Rngs(0))


def latents(height=18, width=22, frames=1):
    return jax.random.normal(jax.random.key(4), (1, frames, height, width, 3))


@functools.cache
def whole(height=18, width=22):
    return np.asarray(jax.jit(decoder())(latents(height, width)))


def rounding():
    return 64 * EPS * np.abs(whole()).max()


@pytest.mark.parametrize(("tile", "overlap", "halo"), [((9, 12), 2, 2), (9, 0, 2), (8, 1, 3), (40, 4, 2)])
def test_tiles_with_enough_context_give_the_whole(tile, overlap, halo):
    assert halo >= vae.REACH
    got = jax.jit(functools.partial(tiles.decode, decoder(), tile=tile, overlap=overlap, halo=halo))(latents())
    assert np.abs(got - whole()).max() <= rounding()


def test_tiles_without_enough_context_do_not_and_fading_helps():
    def error(**options):
        return float(np.abs(tiles.decode(decoder(), latents(), **options) - whole()).max())

    assert error(tile=9, overlap=2, halo=vae.REACH - 1) > 100 * rounding()
    hard, soft = error(tile=9, overlap=0, halo=0), error(tile=9, overlap=4, halo=0)
    assert rounding() < soft < hard


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    whole=st.integers(1, 60), size=st.integers(1, 30), overlap=st.integers(0, 6), halo=st.integers(0, 4),
    factor=st.integers(1, 4),
)  # fmt: skip
def test_weights_sum_to_one_and_halos_have_none(whole, size, overlap, halo, factor):
    size = min(size, whole)
    if whole > size <= overlap + 2 * halo:
        with pytest.raises(ValueError, match="tile must be larger than"):
            tiles._starts(whole, size, overlap + 2 * halo)
        return
    starts = tiles._starts(whole, size, overlap + 2 * halo)
    weights = tiles._weights(starts, whole, size, overlap, halo, factor)
    total = np.zeros(whole * factor)
    for weight, start in zip(weights, starts, strict=True):
        assert 0 <= start <= whole - size
        total[start * factor : (start + size) * factor] += weight
        if start:
            assert not weight[: halo * factor].any()
        if start + size < whole:
            assert not weight[len(weight) - halo * factor :].any()
        assert weight.min() >= 0
    assert np.allclose(total, 1)


def temporaries(f, *shapes):
    return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_tiles_is_one_tile():
    graph, state = nnx.split(decoder())

    def peak(side, **options):
        def run(state, x):
            model = nnx.merge(graph, state)
            return tiles.decode(model, x, **options) if options else model(x)

        return temporaries(run, state, jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32))

    tiled = {side: peak(side, tile=16, overlap=2, halo=2) for side in (64, 128)}
    assert tiled[128] - tiled[64] < 0.01 * tiled[64]
    one_tile = peak(16)
    assert tiled[128] < 2 * one_tile
    assert peak(128) > 20 * tiled[128]


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_chunks_of_frames_give_the_whole_video(chunk):
    model, x = decoder(), latents(6, 5, frames=9)
    expected = jax.jit(model)(x)

    @jax.jit
    def follow(x):
        state, first = tiles.in_time(model.step, model.init(x), x[:, :7], chunk=chunk)
        blind = tiles.in_time(lambda s, x: (s, model.step(s, x)[1]), model.init(x), x[:, :7], chunk=chunk)[1]
        return jnp.concatenate([first, model.step(state, x[:, 7:])[1]], axis=1), blind

    got, blind = follow(x)
    assert np.allclose(got, expected, atol=1e-6)
    assert np.allclose(blind, expected[:, :7], atol=1e-6) == (chunk >= 7)


@pytest.mark.parametrize("chunk", [1, 3, 7, 10])
def test_chunks_of_a_decoder_that_makes_more_frames_than_it_reads(chunk):
    x = latents(2, 2, frames=7)

    def step(seen, part):
        numbers = seen + jnp.arange(part.shape[1], dtype=jnp.float32)
        doubled = jnp.repeat(part + numbers[None, :, None, None, None], 2, axis=1)
        return seen + part.shape[1], doubled

    seen, got = tiles.in_time(step, jnp.float32(0), x, chunk=chunk)
    assert np.array_equal(got, step(jnp.float32(0), x)[1])
    assert seen == 7


def test_memory_of_chunks_does_not_grow_with_the_video():
    graph, state = nnx.split(decoder())

    def peak(frames):
        def run(state, x):
            model = nnx.merge(graph, state)
            return tiles.in_time(model.step, model.init(x), x, chunk=2)[1]

        return temporaries(run, state, jax.ShapeDtypeStruct((1, frames, 16, 16, 3), jnp.float32))

    assert peak(32) - peak(16) < 0.01 * peak(16)


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="overlap and halo must not be negative, got -1 and 0"):
        tiles.decode(decoder(), latents(), tile=8, overlap=-1)
    with pytest.raises(ValueError, match="larger than overlap \\+ 2 halo = 8 latents to advance, got 8"):
        tiles.decode(decoder(), latents(), tile=8, overlap=4, halo=2)
    with pytest.raises(ValueError, match="factor must be whole"):
        tiles.decode(lambda x: x[..., 1:, 1:, :], latents(), tile=8)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        tiles.in_time(lambda s, x: (s, x), (), latents(), chunk=0)


# Memo


def test_a_memo_encodes_each_prompt_once_and_forgets_the_oldest():
    runs = []

    def encoder(prompt):
        jax.debug.callback(lambda x: runs.append(int(x)), prompt[0])
        return {"states": jnp.outer(prompt.astype(jnp.float32), jnp.arange(3.0)), "length": jnp.sum(prompt > 0)}

    held = memo.init(encoder, jax.ShapeDtypeStruct((2,), jnp.int32), entries=2)
    ask = jax.jit(lambda held, prompts: memo.ask(held, encoder, prompts))

    def asked(held, *prompts):
        runs.clear()
        prompts = jnp.array([[p, 7] for p in prompts], jnp.int32)
        held, values, hits = ask(held, prompts)
        jax.effects_barrier()
        expected = np.asarray(prompts, np.float32)[:, :, None] * np.arange(3.0, dtype=np.float32)
        assert np.array_equal(values["states"], expected)
        return held, hits.tolist(), list(runs)

    held, hits, encoded = asked(held, 1, 2, 1)
    assert (hits, encoded) == ([False, False, True], [1, 2])
    held, hits, encoded = asked(held, 3)  # 2 was not asked for longest
    assert (hits, encoded) == ([False], [3])
    held, hits, encoded = asked(held, 1, 3, 2)
    assert (hits, encoded) == ([True, True, False], [2])
    assert int(held.hits) == 3
    assert held.nbytes == 2 * (2 * 4 + 2 * 3 * 4 + 4 + 4) + 2 * 4
    other = asked(held, 0)  # an empty entry is not the prompt of zeros
    assert other[1] == [False]


def test_an_empty_memo_does_not_know_the_prompt_of_zeros():
    encoder = lambda prompt: prompt + 5  # noqa: E731
    held = memo.init(encoder, jnp.zeros(2, jnp.int32), entries=1)
    _, value, hit = memo.ask(held, encoder, jnp.zeros((1, 2), jnp.int32))
    assert not hit[0]
    assert np.array_equal(value, [[5, 5]])
    with pytest.raises(ValueError, match="entries must be at least 1, got 0"):
        memo.init(encoder, jnp.zeros(2, jnp.int32), entries=0)
    with pytest.raises(ValueError, match="prompts must have 2 tokens, got 3"):
        memo.ask(held, encoder, jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(TypeError, match="prompts must be int32, got uint8"):
        memo.ask(held, encoder, jnp.zeros((1, 2), jnp.uint8))


# Layouts


@functools.cache
def wan():
    """Input, weights and output of WAN's self-attention in diffusers 0.42 (torch), drawn at random."""
    return dict(np.load(DATA / "wan_attention.npz"))


def wan_attention(data, **changes):
    def project(name, x):
        return x @ jnp.asarray(data[f"{name}.weight"]).T + jnp.asarray(data[f"{name}.bias"])

    x = jnp.asarray(data["x"])
    q, k, v = (project(name, x) for name in ("to_q", "to_k", "to_v"))
    options = {"heads": int(data["heads"]), "grid": tuple(int(i) for i in data["grid"]), **changes}
    weights = (jnp.asarray(data[f"norm_{name}.weight"]) for name in "qk")
    q, k, v = layouts.from_wan(q, k, v, *weights, **options)
    out, _ = chunked_attention.chunked_attention(q, k, v, q_chunk=7, kv_chunk=5)
    return np.asarray(project("to_out.0", layouts.merged(out)))


def test_wan_attention_is_that_of_diffusers():
    data = wan()
    assert np.abs(wan_attention(data) - data["out"]).max() < 1e-5 * np.abs(data["out"]).max()
    for wrong in ({"grid": (2, 4, 3)}, {"grid": (3, 2, 4)}, {"theta": 1000.0}, {"heads": 4}):
        assert np.abs(wan_attention(data, **wrong) - data["out"]).max() > 1e-3 * np.abs(data["out"]).max()
    swapped = {**data, "norm_q.weight": data["norm_k.weight"], "norm_k.weight": np.roll(data["norm_q.weight"], 1)}
    assert np.abs(wan_attention(swapped) - data["out"]).max() > 1e-3 * np.abs(data["out"]).max()


def test_angles_turn_each_axis_with_its_own_coordinates():
    angles = layouts.wan_angles((2, 3, 5), 12).reshape(2, 3, 5, 6)
    assert np.array_equal(angles[..., :2], np.broadcast_to(angles[:, :1, :1, :2], (2, 3, 5, 2)))
    assert np.array_equal(angles[..., 2:4], np.broadcast_to(angles[:1, :, :1, 2:4], (2, 3, 5, 2)))
    assert np.array_equal(angles[..., 4:], np.broadcast_to(angles[:1, :1, :, 4:], (2, 3, 5, 2)))
    assert np.allclose(angles[0, 0, :, 4], np.arange(5))
    angles = layouts.wan_angles((2, 3, 5), 16).reshape(2, 3, 5, 8)  # 16 = 8 for the frame, 4 for the row and the column
    for axis, (first, stop) in enumerate([(0, 4), (4, 6), (6, 8)]):
        along = np.moveaxis(angles[..., first:stop], axis, 0)
        assert np.array_equal(along, np.broadcast_to(along[:, :1, :1], along.shape))
        assert np.allclose(along[:, 0, 0, 0], np.arange(along.shape[0]))


def test_layouts_come_back():
    x = jnp.arange(2 * 3 * 24, dtype=jnp.float32).reshape(2, 3, 24)
    assert np.array_equal(layouts.merged(layouts.from_flat(x, heads=4)), x)
    assert np.array_equal(layouts.from_flat(x, heads=4)[1, 2, 3], x[1, 2, 18:])
    q, k, v = layouts.from_fused(x, heads=4, kv_heads=2)
    assert np.array_equal(jnp.concatenate([layouts.merged(part) for part in (q, k, v)], axis=2), x)
    assert [part.shape[2] for part in (q, k, v)] == [4, 2, 2]
    heads = layouts.heads_first(layouts.from_flat(x, heads=4))
    assert np.array_equal(heads[0, 1, 2], x[0, 2, 6:12])
    assert np.array_equal(layouts.heads_first(heads), layouts.from_flat(x, heads=4))
    for wrong in (lambda: layouts.from_flat(x, heads=5), lambda: layouts.from_fused(x, heads=5)):
        with pytest.raises(ValueError, match="heads do not divide"):
            wrong()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
            (32, 32, 8, 128),
        ),
        ({"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}, (40, 40, 40, 128)),
        ({"dim": 1536, "num_heads": 12, "num_layers": 30}, (30, 12, 12, 128)),
        ({"depth": 28, "hidden_size": 1152, "num_heads": 16}, (28, 16, 16, 72)),
    ],
    ids=["llama", "diffusers", "WAN", "DiT"],
)  # fmt: skip
def test_configurations_say_how_many_heads(config, expected):
    assert layouts.heads_of(config) == expected
    with pytest.raises(ValueError, match="config must name layers, heads and their size; it has nothing"):
        layouts.heads_of({})


# PSNR


def test_psnr_is_what_its_definition_says():
    rng = np.random.default_rng(0)
    reference = rng.random((3, 8, 9, 3))
    picture = reference + rng.normal(size=reference.shape) * np.array([0.01, 0.1, 1.0]).reshape(3, 1, 1, 1)
    expected = 10 * np.log10(1 / ((reference - picture) ** 2).mean((1, 2, 3)))
    got = quality.psnr(jnp.asarray(reference, jnp.float32), jnp.asarray(picture, jnp.float32))
    assert np.allclose(got, expected, rtol=1e-4)
    assert not np.allclose(got, expected[::-1], rtol=1e-4)
    scaled = [jnp.asarray(255 * x, jnp.float32) for x in (reference, picture)]
    assert np.allclose(quality.psnr(*scaled, peak=255.0), expected, rtol=1e-4)
    assert np.allclose(quality.psnr(*scaled) + 20 * np.log10(255), got, rtol=1e-3)
    # The mean of halves in decibels is another number.
    halves = [[jnp.asarray(x[:, i : i + 4], jnp.float32) for x in (reference, picture)] for i in (0, 4)]
    halves = np.mean([quality.psnr(*half) for half in halves], axis=0)
    assert not np.allclose(halves, expected, rtol=1e-5)
    assert np.isposinf(quality.psnr(jnp.ones((1, 2)), jnp.ones((1, 2)))[0])


def test_a_blank_picture_scores_the_variance():
    rng = np.random.default_rng(1)
    reference = rng.random((2, 20, 20, 3)) * np.array([1.0, 0.1]).reshape(2, 1, 1, 1) + np.array([0, 0.2, 0.4])
    expected = -10 * np.log10(reference.var((1, 2)).mean(1))
    assert np.allclose(quality.blank_psnr(jnp.asarray(reference, jnp.float32)), expected, rtol=1e-4)
    assert not np.allclose(expected, -10 * np.log10(reference.var((1, 2, 3))), rtol=1e-2)


@pytest.mark.usefixtures("without_type_checker")
def test_pictures_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match="must be the reference's"):
        quality.psnr(jnp.ones((1, 2, 3)), jnp.ones((1, 3, 2)))


# float64


def test_wide_leaves_are_found_and_narrowed():
    tree = {"a": [np.zeros(3), np.zeros(2, np.complex128)], "b": np.float64(1), "c": np.zeros(1, np.float32), "d": 1.0}
    tree["e"] = jax.random.key(0)
    assert float64.leaves(tree) == {"['a'][0]": (3,), "['a'][1]": (2,), "['b']": ()}
    after = float64.narrow(tree)
    assert float64.leaves(after) == {}
    assert [x.dtype.name for x in after["a"]] == ["float32", "complex64"]
    assert after["c"] is tree["c"]
    assert after["d"] is tree["d"]


def test_wide_operations_are_found_where_they_enter():
    def body(carry, x):
        return carry + jnp.sum(x * np.float64(3)), None  # widens

    def f(x):
        total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float64), x)
        return jnp.where(total > 0, x[0, 0], 2.0).astype(jnp.float32)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.ones((4, 3), jnp.float32)
        found = float64.operations(f, x)
        clean = float64.operations(lambda x: (x * 3).astype(jnp.float32), x)
        compiled = float64.hlo(f, x)
        narrow = float64.hlo(lambda x: x * 3, x)
    assert clean == []
    assert narrow == {}
    entries = [operation for operation in found if operation.widens and operation.name == "convert_element_type"]
    assert entries
    assert any("test_diffusion.py" in operation.where and "body" in operation.where for operation in entries)
    assert {"mul", "reduce_sum"} <= {operation.name for operation in found}
    assert not any(operation.widens for operation in found if operation.name == "reduce_sum")
    assert sum(compiled.values()) > 0
