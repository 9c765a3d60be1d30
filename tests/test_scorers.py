"""Scorers, exponents and streams against float64 NumPy and against theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import quantizers, streams
from jaxquant.methods import (
    bsa,
    delta,
    delta2,
    dense_sparse,
    fisher,
    h2o,
    lyapunov,
    palm,
    sheaf,
    snapkv,
    snr,
    stability,
    turboquant,
    window,
)  # fmt: skip
from jaxquant.protocols import Context, Observation
from jaxquant.streams import Predict

B, H, N, D = 2, 2, 12, 16
X = np.random.default_rng(0).normal(size=(B, H, N, D)) * 2
V = np.random.default_rng(1).normal(size=(B, H, N, D))


def context(step=0, layer=0, values=None, received=None):
    return Context(jnp.int32(layer), jnp.full(B, step, jnp.int32), values, received)


def scored(scorer, x=X, cuts=(N,), **kwargs):
    state, parts, first = scorer.init(B, H, x.shape[-1]), [], 0
    for size in cuts:
        part = jnp.asarray(x[:, :, first : first + size], jnp.float32)
        state, scores = scorer.score(state, part, context(**kwargs))
        parts.append(np.asarray(scores, np.float64))
        first += size
    return np.concatenate(parts, axis=2)


def agree(got, want, wrong):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    assert np.abs(got - wrong).max() > 1e-2


def test_palm():
    probe = turboquant.mse(jax.random.key(1), dim=D, bits=2, fused=False)
    x32 = jnp.asarray(X, jnp.float32)
    missed = X - np.asarray(quantizers.dequantize(probe, quantizers.quantize(probe, x32)), np.float64)

    def reference(rate, *, with_surprise=True):
        surprise = np.log1p((missed**2).mean(-1)) if with_surprise else np.ones(X.shape[:3])
        mean, variance, out = X[:, :, 0].copy(), np.ones((B, H, D)), np.ones((B, H, N))
        for t in range(1, N):
            away = X[:, :, t] - mean
            novelty = (np.abs(away) / np.sqrt(variance + 1e-10)).mean(-1)
            out[:, :, t] = np.tanh(np.sqrt(novelty * surprise[:, :, t]) / 2)
            mean += rate * away
            variance += rate * (away**2 - variance)
        return out

    scorer = palm.Palm(probe=probe, rate=jnp.float32(0.2))
    agree(scored(scorer), reference(0.2), reference(0.2, with_surprise=False))
    agree(scored(scorer, cuts=(5, 1, 6)), reference(0.2), reference(0.9))
    outlier = X.copy()
    outlier[:, :, 7] += 20
    assert (scored(scorer, outlier).argmax(-1) == np.where(scored(scorer, outlier)[..., 0] == 1, 0, 7)).all()
    assert (scored(scorer, outlier)[:, :, 1:].argmax(-1) == 6).all()


def test_snr():
    assert np.asarray(1 / (1 + snr.cosine(101)))[50] == pytest.approx(0.5, abs=0.02)  # half way, half noise
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    want = (signal / (1 - signal))[[999, 500, 0]]
    np.testing.assert_allclose(snr.linear(3), want, rtol=1e-3)
    scorer = snr.Noise(snr=jnp.array([0.0, 1.0, 3.0]))
    for step, share in {0: 1.0, 1: 0.5, 2: 0.25, 9: 0.25}.items():
        assert (scored(scorer, step=step) == share).all()


def test_fisher():
    information = np.random.default_rng(2).uniform(size=(2, 3, H, D, D))
    scorer = fisher.information(jnp.asarray(information[0]), jnp.asarray(information[1]))
    diagonal = np.einsum("klhdd->klhd", information)
    want = np.einsum("hd,bhtd->bht", diagonal[0, 1], X**2) + np.einsum("hd,bhtd->bht", diagonal[1, 1], V**2)
    wrong = np.einsum("hd,bhtd->bht", diagonal[1, 1], X**2) + np.einsum("hd,bhtd->bht", diagonal[0, 1], V**2)
    agree(scored(scorer, layer=1, values=jnp.asarray(V, jnp.float32)), want, wrong)
    square, weight, average, out = (X**2).mean(-1), 0.0, 0.0, []
    for t in range(N):
        weight, average = 0.8 * weight + 0.2, 0.8 * average + 0.2 * square[:, :, t]
        out.append(np.minimum(np.log1p(average / weight), 3) / 3)
    want = np.stack(out, axis=-1)
    agree(scored(fisher.Proxy(decay=jnp.float32(0.8)), cuts=(7, 5)), want, want[:, :, ::-1])


@pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("learned", [False, True])
def test_sheaf_is_the_energy_of_the_laplacian(grid, learned):
    axes = len(grid)
    maps = np.random.default_rng(3).normal(size=(axes, 2, 5, D)) if learned else None
    scorer = sheaf.Sheaf(maps=None if maps is None else jnp.asarray(maps, jnp.float32), grid=grid)
    # the coboundary of every edge, as a matrix, and the Laplacian made of it
    places = np.arange(N).reshape(grid)
    laplacian, apart, size = np.zeros((N * D, N * D)), np.zeros((B, H, N)), np.zeros((B, H, N))
    for axis in range(axes):
        low, high = (np.eye(D), np.eye(D)) if maps is None else maps[axis]
        ends = (np.take(places, range(grid[axis] - 1), axis), np.take(places, range(1, grid[axis]), axis))
        for u, w in zip(ends[0].ravel(), ends[1].ravel(), strict=True):
            edge = np.zeros((low.shape[0], N * D))
            edge[:, u * D : u * D + D], edge[:, w * D : w * D + D] = low, -high
            laplacian += edge.T @ edge
            energy = np.square(X.reshape(B, H, -1) @ edge.T).sum(-1)
            both = np.square(X[:, :, u] @ low.T).sum(-1) + np.square(X[:, :, w] @ high.T).sum(-1)
            for node in (u, w):
                apart[:, :, node] += energy
                size[:, :, node] += both
    quadratic = np.einsum("bhi,ij,bhj->bh", X.reshape(B, H, -1), laplacian, X.reshape(B, H, -1))
    np.testing.assert_allclose(apart.sum(-1) / 2, quadratic)
    want = apart / (2 * size)
    agree(scored(scorer), want, want[:, :, ::-1])
    assert (want <= 1).all()
    with pytest.raises(ValueError, match="tokens, got 11"):
        scored(scorer, X[:, :, :11], cuts=(11,))


def test_sheaf_over_a_path_remembers_the_token_before():
    split = scored(sheaf.Sheaf(), cuts=(6, 6))
    # the last token before the cut has not met the one after it; the one after it has met both
    before, after = X[:, :, 5], X[:, :, 6]
    want = scored(sheaf.Sheaf())
    np.testing.assert_allclose(np.delete(split, 5, 2), np.delete(want, 5, 2), rtol=1e-4)
    one = np.square(before - X[:, :, 4]).sum(-1) / (2 * (np.square(before).sum(-1) + np.square(X[:, :, 4]).sum(-1)))
    np.testing.assert_allclose(split[:, :, 5], one, rtol=1e-4)
    assert np.abs(split[:, :, 6] - one).max() > 1e-3
    assert not np.allclose(before, after)
    assert (scored(sheaf.Sheaf(), X[:, :, :1], cuts=(1,)) == 1).all()


def test_aligned_maps_make_a_rotating_stream_harmonic():
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(D, D)))[0]
    x = [np.random.default_rng(5).normal(size=D)]
    for _ in range(40):
        x.append(turn @ x[-1])
    x = np.broadcast_to(np.stack(x), (B, H, 41, D))
    learned = sheaf.aligned(jnp.asarray(x[0, 0], jnp.float32))
    assert scored(learned, x, cuts=(41,)).max() < 1e-5
    assert scored(sheaf.Sheaf(), x, cuts=(41,)).mean() > 0.1
    assert learned.maps is not None
    np.testing.assert_allclose(learned.maps[0, 0] @ learned.maps[0, 0].T, np.eye(D), atol=1e-5)


@pytest.mark.parametrize("aware", [False, True])
def test_block_salience(aware):
    scorer = bsa.BlockSalience(optimism=jnp.float32(0.5), decay=jnp.float32(0.9), size=5, query_aware=aware)
    queries = np.random.default_rng(6).normal(size=(B, H, 7, D)) + 1
    state = scorer.init(B, H, D)
    state, _ = scorer.attend(
        state, jnp.zeros((B, H, 1)), jnp.zeros((B, H, 7, 1)), jnp.asarray(queries, jnp.float32), jnp.ones((B, 7), bool)
    )
    got = np.asarray(scorer.score(state, jnp.asarray(X, jnp.float32), context())[1])
    share = 0.9 ** np.arange(6, -1, -1)
    center = np.einsum("n,bhnd->bhd", share, queries) / share.sum()
    spread = np.sqrt(np.einsum("n,bhnd->bhd", share, queries**2) / share.sum() - center**2)

    def reference(optimism):
        out = np.zeros((B, H, N))
        for first in range(0, N, 5):
            block = X[:, :, first : first + 5]
            mean = block.mean(2)
            if not aware:
                apart = np.linalg.norm(block - mean[:, :, None], axis=-1) / np.linalg.norm(mean, axis=-1)[..., None]
                out[:, :, first : first + 5] = apart * optimism / 0.5
                continue
            for t in range(block.shape[2]):
                logits = [
                    (center * key).sum(-1) + optimism * np.linalg.norm(spread * key, axis=-1)
                    for key in (mean, block[:, :, t])
                ]
                out[:, :, first + t] = np.maximum(*logits) / D**0.5
        return out

    agree(got, reference(0.5), reference(0.1))


@pytest.mark.parametrize("pool", [1, 3])
def test_accumulated_attention_and_votes(pool):
    weights = np.random.default_rng(7).dirichlet(np.ones(N), size=(B, H, 6))
    scores = np.random.default_rng(8).uniform(size=(B, H, N))
    valid = np.array([[True] * 6, [True] * 4 + [False] * 2])
    decay = np.exp(-1 / 5)
    scorer = h2o.Mass(decay=jnp.float32(decay)) if pool == 1 else snapkv.Votes(observed=jnp.float32(5), pool=pool)
    arrays = (jnp.asarray(x, jnp.float32) for x in (scores, weights, np.zeros((B, H, 6, D))))
    _, got = scorer.attend(None, *arrays, jnp.asarray(valid))
    want = scores.copy()
    for b in range(B):
        for n in range(valid[b].sum()):
            padded = np.pad(weights[b, :, n], ((0, 0), (pool // 2, pool // 2)))
            pooled = np.stack([padded[:, i : i + N] for i in range(pool)]).mean(0)
            want[b] = decay * want[b] + pooled
    agree(np.asarray(got), want, scores + weights.sum(2))


# --- monitors


def observed(monitor, entropies, matrix=None):
    state, out = monitor.init(1, 1, 2), []
    for entropy in entropies:
        seen = Observation(jnp.full(1, entropy), lambda x: x if matrix is None else x @ jnp.asarray(matrix).T)
        state, threshold = monitor.observe(state, seen, jnp.full(1, 0.5))
        out.append(float(threshold[0]))
    return state, out


def test_stability_compares_the_newest_with_all_that_the_ring_holds():
    monitor = stability.Stability(
        tolerance=jnp.float32(0.2), fallen=jnp.float32(0.1), risen=jnp.float32(0.9), window=4, newest=2
    )
    entropies = [1.0, 1.0, 1.0, 1.99, 2.0, 2.0, 2.0, 0.5, 0.5, 1.0, 1.0]
    want = []
    for t in range(len(entropies)):
        held = entropies[max(0, t - 3) : t + 1]
        shift = np.mean(held[-2:]) / np.mean(held) - 1
        want.append(0.1 if shift < -0.2 else 0.9 if shift > 0.2 else 0.5)
    assert len(set(want)) == 3
    np.testing.assert_allclose(observed(monitor, entropies)[1], want, rtol=1e-6)


def test_exponents_of_maps_from_the_literature():
    matrix = jnp.array([[2.0, 1.0], [0.0, 0.5]])
    rate, _, direction = lyapunov.exponent(lambda x: matrix @ x / 1.7, jnp.ones(2), jnp.array([0.3, 1.0]), steps=200)
    assert float(rate) == pytest.approx(np.log(2 / 1.7), abs=0.02)
    assert float(jnp.linalg.norm(direction)) == pytest.approx(1.0, abs=1e-5)
    logistic, *_ = lyapunov.exponent(lambda x: 4 * x * (1 - x), jnp.float32(0.3), jnp.float32(1.0), steps=20_000)
    assert float(logistic) == pytest.approx(np.log(2), abs=0.02)  # Ulam and von Neumann

    def henon(x):
        return jnp.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])

    rate, *_ = lyapunov.exponent(henon, jnp.array([0.1, 0.1]), jnp.array([1.0, 0.0]), steps=20_000)
    assert float(rate) == pytest.approx(0.419, abs=0.01)  # Hénon; Wolf et al. 1985: .603 bits
    noise = jax.random.normal(jax.random.key(0), (3,))
    still, *_ = lyapunov.exponent(lambda x: x, noise, noise, steps=10)
    assert float(still) == pytest.approx(0.0, abs=1e-6)  # what stays the same neither grows nor shrinks


def test_lyapunov_steers_by_growth():
    monitor = lyapunov.EXAMPLES[0]()
    state, threshold = observed(monitor, [1.0] * 12, [[3.0, 1.0], [0.0, 0.2]])
    assert float(state.growth[0, 0]) == pytest.approx(np.log(3), abs=0.05)
    assert threshold[-1] == pytest.approx(0.3)
    state, threshold = observed(monitor, [1.0] * 12, np.eye(2) * 0.5)
    assert float(state.growth[0, 0]) == pytest.approx(np.log(0.5), abs=1e-4)
    assert threshold[-1] == pytest.approx(0.6)
    assert observed(monitor, [1.0] * 3, np.eye(2) * 0.9)[1][-1] == pytest.approx(0.5)
    state, _ = observed(monitor, [1.0] * 3, np.zeros((2, 2)))
    assert np.isfinite(np.asarray(state.direction)).all()


# --- streams


def drifting(steps=48, drift=0.05, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    start, slope = random.normal(size=(2, 1, 2, 16, 64))
    time = np.arange(steps)[:, None, None, None, None]
    return jnp.asarray(start + drift * slope * time + noise * random.normal(size=(steps, 1, 2, 16, 64)), jnp.float32)


def errors(stream, x):
    """Relative squared error of each step, and orders of predictions."""
    state, _ = streams.start(stream, x[0])

    def body(state, now):
        state, payload = streams.step(stream, state, now)
        error = jnp.sum((streams.value(stream, state) - now) ** 2) / jnp.sum(now**2)
        return state, (error, payload.order if hasattr(payload, "order") else 0)

    _, (error, order) = jax.jit(lambda x: jax.lax.scan(body, state, x))(x[1:])
    return np.asarray(error), np.asarray(order)


def test_errors_of_a_closed_loop_do_not_grow_and_those_of_an_open_loop_do():
    x = drifting(steps=64)
    stream = delta.stream(jax.random.key(0), dim=64, bits=3, keyframe=1 << 20)
    closed, order = errors(stream, x)
    assert (order == 1).mean() > 0.95
    assert closed[-16:].mean() < 1.5 * closed[:16].mean()
    # open: differences of the input, summed up by the receiver
    quantizer = stream.quantizer
    changes = quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x[1:] - x[:-1]))
    summed = np.asarray(x[0] + jnp.cumsum(changes, axis=0))
    open_loop = np.square(summed - x[1:]).sum((1, 2, 3, 4)) / np.square(x[1:]).sum((1, 2, 3, 4))
    assert open_loop[-1] > 20 * open_loop[0]
    assert closed[-1] < 0.1 * open_loop[-1]


def test_each_order_is_used_where_it_helps():
    plain = delta.stream(jax.random.key(0), dim=64, bits=3, limit=0.0, keyframe=1 << 20)
    first = delta.stream(jax.random.key(0), dim=64, bits=3, keyframe=1 << 20)
    second = delta2.stream(jax.random.key(0), dim=64, bits=3, keyframe=1 << 20)
    line = drifting(drift=0.2)
    (alone, none), (one, _), (two, order) = (errors(stream, line) for stream in (plain, first, second))
    assert (none == 0).all()
    assert one[8:].mean() < 0.3 * alone[8:].mean()
    assert two[8:].mean() < 0.5 * one[8:].mean()
    assert (order == 2).mean() > 0.5
    _, order = errors(second, drifting(drift=0.0, noise=0.1))
    assert (order == 1).mean() > 0.9  # jitter: the second difference is the larger one
    _, order = errors(second, drifting(drift=0.0, noise=3.0))
    assert (order == 0).mean() > 0.5


def test_keyframes_and_fresh_tokens_are_sent_whole():
    stream = delta.stream(jax.random.key(0), dim=64, bits=3, keyframe=8)
    _, order = errors(stream, drifting())
    assert [t + 1 for t in range(len(order)) if (order[t] == 0).all()] == [8, 16, 24, 32, 40]
    noisy = snr.stream(jax.random.key(0), dim=64, bits=3, steps=48, threshold=0.9)
    _, order = errors(noisy, drifting())
    share = 1 / (1 + np.asarray(snr.cosine(48)))
    assert ((order == 0).all((1, 2, 3)) == (share[1:] >= 0.9) | (np.arange(1, 48) % 16 == 0)).all()
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        delta.stream(jax.random.key(0), dim=64, bits=3, order=3)
    with pytest.raises(ValueError, match="its last axis must be the quantizer's dim, 64"):
        streams.start(stream, jnp.zeros((1, 2, 3, 32)))


def test_the_cache_form_of_delta_decodes_what_the_loop_had():
    q = delta.pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, order=2, group=4).keys
    x = jnp.moveaxis(drifting(steps=8, drift=0.1)[:, 0], 0, 2)  # [heads, tokens, steps, dim]
    code = q.quantize(x)
    one = streams.Stream(quantizer=q.quantizer, strategy=Predict(limit=jnp.float32(1.0), keyframe=1 << 20, order=2))
    for group in range(2):
        state, _ = streams.start(one, x[None, :, :, 4 * group])
        for step in range(4):
            if step:
                state, _ = streams.step(one, state, x[None, :, :, 4 * group + step])
            np.testing.assert_allclose(q.expand(code)[:, :, 4 * group + step], streams.value(one, state)[0], atol=1e-4)
    assert (np.asarray(code.order)[..., [0, 4]] == 0).all()
    assert (np.asarray(code.order)[..., [1, 5]] == 1).any()


def test_no_code_is_older_than_its_staleness_and_the_farthest_tokens_go_first():
    stream = window.stream(jax.random.key(0), dim=64, bits=8, share=0.5, staleness=8)
    x = drifting(steps=20, drift=0.0)
    state, _ = streams.start(stream, x[0])
    age = np.zeros((1, 2, 16), int)
    for step in range(1, 20):
        moved = x[step].at[:, :, 3].add(10.0 * step)
        state, payload = streams.step(stream, state, moved)
        assert payload.place.shape == (1, 2, 8)
        age += 1
        np.put_along_axis(age, np.asarray(payload.place), 0, axis=2)
        assert (age[:, :, 3] == 0).all(), "a token that moved was not sent"
        assert age.max() < 8
        error = jnp.sum((streams.value(stream, state) - moved) ** 2) / jnp.sum(moved**2)
        assert error < 1e-3
    least = window.stream(jax.random.key(0), dim=64, bits=8, share=0.01, staleness=4)
    state, _ = streams.start(least, x[0])
    assert streams.step(least, state, x[1])[1].place.shape == (1, 2, 4)


# --- outliers


def test_outliers_are_stored_by_themselves():
    sparse, _ = dense_sparse.kv(jax.random.key(0), dim=64, bits_k=2, bits_v=2, count=2)
    x = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    x[:, 5] += 30
    x[np.arange(200), np.arange(200) % 60 + 4] -= 50
    code = sparse.quantize(jnp.asarray(x))
    y = np.asarray(sparse.restore(sparse.expand(code)))
    plain = np.asarray(quantizers.dequantize(sparse.dense, quantizers.quantize(sparse.dense, jnp.asarray(x))))
    largest = np.argsort(-np.abs(x), axis=-1)[:, :2]
    assert (np.sort(code.place, axis=-1) == np.sort(largest, axis=-1)).all()
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(code.outlier), np.argsort(code.place, -1), -1),
        np.take_along_axis(x, np.sort(largest, -1), -1).astype(np.float16),
    )
    assert np.square(x - y).sum() < 0.15 * np.square(x - plain).sum()
    assert code.nbytes == 200 * (64 * 2 // 8 + 2 + 2 * 3)
    with pytest.raises(ValueError, match="count must be from 1 to dim = 64, got 65"):
        dense_sparse.kv(jax.random.key(0), dim=64, bits_k=2, bits_v=2, count=65)
