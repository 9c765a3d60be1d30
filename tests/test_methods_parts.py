"""The contract of `jaxquant.methods` for scorers, monitors, pipelines and streams: what every example must survive.

A new method needs no edit here; what is asked of an example depends on what it is.
"""

import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import methods, pipeline, protocols, streams
from jaxquant.pipeline import Pipeline
from jaxquant.streams import Stream

EXAMPLES = {
    f"{found.name}-{i}": example()
    for found in pkgutil.iter_modules(methods.__path__)
    for i, example in enumerate(getattr(importlib.import_module(f"{methods.__name__}.{found.name}"), "EXAMPLES", ()))
}


def of(kind):
    return {name: example for name, example in EXAMPLES.items() if isinstance(example, kind)}


SCORERS, MONITORS = of(protocols.Scorer), of(protocols.Monitor)
PIPELINES, STREAMS = of(Pipeline), of(Stream)
B, T, H, G, D = 2, 9, 2, 2, 64
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling takes the time


def perturbed(tree):
    """The same with every floating-point number a little different."""

    def change(leaf):
        return leaf * (1 + 2.0**-10) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(change, tree)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 2


def check_tree(example):
    leaves, structure = jax.tree.flatten(example)
    assert all(isinstance(leaf, jax.Array) or leaf == -float("inf") or leaf == float("inf") for leaf in leaves)
    assert hash(structure) == hash(jax.tree.structure(jax.tree.unflatten(structure, leaves)))


def test_all_kinds_were_found():
    assert len(SCORERS) >= 12
    assert len(MONITORS) >= 2
    assert len(PIPELINES) >= 12
    assert len(STREAMS) >= 4


# --- scorers


@pytest.mark.parametrize("name", SCORERS)
def test_scorer(name):
    scorer, traced = SCORERS[name], []
    check_tree(scorer)
    x, v = normal(1, B, H, 8, D), normal(2, B, H, 8, D)

    @jax.jit
    def run(scorer, x, v):
        traced.append(1)

        def context(x, start):
            mass = jnp.sum(x**2, axis=-1)
            return protocols.Context(layer=jnp.int32(0), step=jnp.full(x.shape[0], start), values=v, received=mass)

        start = scorer.init(x.shape[0], H, D)
        state, whole = scorer.score(start, x, context(x, 0))
        again, second = scorer.score(state, x, context(x, 8))
        _, half = scorer.score(start, x.astype(jnp.bfloat16), context(x.astype(jnp.bfloat16).astype(jnp.float32), 0))
        mapped = jax.vmap(lambda x, v: scorer.score(
            scorer.init(1, H, D), x[None], protocols.Context(
                jnp.int32(0), jnp.zeros(1, jnp.int32), v[None], jnp.sum(x**2, axis=-1)[None]
            )
        )[1][0])(x, v)  # fmt: skip

        def body(state, x):
            return scorer.score(state, x, context(x, 0))

        _, scanned = jax.lax.scan(body, start, jnp.stack([x, x]))
        return {"state": state, "again": again, "whole": whole, "second": second, "half": half, "mapped": mapped,
                "scanned": scanned}  # fmt: skip

    out = run(scorer, x, v)
    assert out["whole"].shape == (B, H, 8)
    for leaf in jax.tree.leaves(out["state"]):
        assert leaf.shape[0] == B, "every leaf of a state has the rows first"
    assert jax.tree.structure(out["state"]) == jax.tree.structure(out["again"])
    for part in ("whole", "second", "half"):
        assert out[part].dtype == jnp.float32
        assert np.isfinite(out[part]).all()
    np.testing.assert_allclose(out["mapped"], out["whole"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["scanned"][0], out["whole"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["half"], out["whole"], rtol=0.1, atol=0.1)
    run(perturbed(scorer), x, v)
    assert len(traced) == 1


ATTENTIVE = {name: scorer for name, scorer in SCORERS.items() if isinstance(scorer, protocols.AttentiveScorer)}


@pytest.mark.parametrize("name", ATTENTIVE)
def test_queries_may_be_split_over_calls(name):
    scorer = ATTENTIVE[name]
    weights, queries, scores = jax.nn.softmax(normal(1, B, H, 7, 6)), normal(2, B, H, 7, D), normal(3, B, H, 6)
    valid = jnp.asarray(np.tril(np.ones((B, 7), bool), 5))

    def fed(cuts):
        state, now, first = scorer.init(B, H, D), scores, 0
        for size in cuts:
            part = slice(first, first + size)
            assert isinstance(scorer, protocols.AttentiveScorer)
            state, now = scorer.attend(state, now, weights[:, :, part], queries[:, :, part], valid[:, part])
            first += size
        return state, now

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fed((7,)), fed((3, 1, 3)))
    wrong = jax.tree.leaves(fed((6,)))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(fed((7,))), wrong, strict=True))


# --- monitors


@pytest.mark.parametrize("name", MONITORS)
def test_monitor(name):
    monitor, traced = MONITORS[name], []
    check_tree(monitor)
    entropies = jnp.asarray([[1.0, 3.0], [1.0, 0.1], [1.5, 0.0], [0.5, 2.0]])
    matrix = normal(4, D, D) * 0.1

    @jax.jit
    def run(monitor, entropies):
        traced.append(1)

        def body(state, entropy):
            seen = protocols.Observation(entropy=entropy, pushforward=lambda change: change @ matrix)
            return monitor.observe(state, seen, jnp.full(B, 0.45))

        return jax.lax.scan(body, monitor.init(B, H, D), entropies)

    state, threshold = run(monitor, entropies)
    assert threshold.shape == (4, B)
    for leaf in jax.tree.leaves(state):
        assert leaf.shape[0] == B
        assert np.isfinite(leaf).all()
    assert (np.asarray(threshold) != np.float32(0.45)).any(), "it never moved the threshold"
    run(perturbed(monitor), entropies)
    assert len(traced) == 1


# --- pipelines


@functools.cache
def traces():
    return {}


@functools.cache
def program(name):
    traces()[name] = 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(example, q, k, v):
        traces()[name] += 1
        empty = pipeline.init(example, layers=1, batch=B, kv_heads=H, capacity=12, sinks=1, window=1)
        whole, _, held = empty.attend(q, k, v, 0)

        def one(held, token):
            out, _, held = held.attend(*(x[:, None] for x in token), jnp.int32(0))
            return held, out[:, 0]

        after, single = jax.lax.scan(one, empty, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
        return {"whole": whole, "held": held.state, "single": jnp.moveaxis(single, 0, 1), "after": after.state}

    return run


def tokens(seed=5):
    return normal(seed, B, T, H * G, D), normal(seed + 1, B, T, H, D), normal(seed + 2, B, T, H, D)


@functools.cache
def result(name):
    return jax.tree.map(np.asarray, program(name)(PIPELINES[name], *tokens()))


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_gives_the_same_in_one_chunk_and_in_a_scan_over_tokens(name):
    out = result(name)
    check_tree(PIPELINES[name])
    assert np.isfinite(out["whole"]).all()
    assert np.abs(out["whole"]).max() > 0.1
    np.testing.assert_allclose(out["single"], out["whole"], atol=2e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=2e-3),
        out["after"], out["held"],
    )  # fmt: skip
    for leaf in jax.tree.leaves(out["held"]):
        assert leaf.shape[:2] == (1, B), "every leaf of a state has the layers and rows first"


@pytest.mark.parametrize("name", PIPELINES)
def test_other_numbers_do_not_retrace_a_pipeline(name):
    result(name)
    q, k, v = tokens()
    other = program(name)(perturbed(PIPELINES[name]), q, k, v)
    assert traces()[name] == 1
    if jax.tree.leaves((PIPELINES[name].keys, PIPELINES[name].values)):
        assert (np.asarray(other["whole"]) != result(name)["whole"]).any(), "numbers were baked into the program"


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_stores_codes_alone(name):
    example = PIPELINES[name]
    size = 64 * example.block
    shapes = jax.eval_shape(lambda p: pipeline.init(p, layers=1, batch=1, kv_heads=H, capacity=size), example)
    bytes_of = [np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.state.store)]
    assert sum(bytes_of) < 0.6 * size * H * 2 * 2 * D, "no smaller than 16-bit vectors"
    held = pipeline.init(example, layers=1, batch=1, kv_heads=H, capacity=4 * example.block)
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(held.state))
    assert held.bytes_per_token == counted / (H * 4 * example.block)
    spare = sum(leaf.nbytes for leaf in jax.tree.leaves(held.pipeline) if isinstance(leaf, jax.Array))
    assert held.nbytes == counted + spare


@pytest.mark.parametrize("name", ["h2o-1", "kivi-1", "tiered-0"])
def test_pipeline_maps_over_rows_and_takes_bfloat16(name):
    example = PIPELINES[name]
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens())

    def run(q, k, v):
        held = pipeline.init(example, layers=1, batch=q.shape[0], kv_heads=H, capacity=12)
        return held.attend(q, k, v, 0)[0]

    whole = jax.jit(run)(q, k, v)
    assert whole.dtype == jnp.bfloat16
    mapped = jax.jit(jax.vmap(lambda *row: run(*(x[None] for x in row))[0]))(q, k, v)
    np.testing.assert_allclose(mapped.astype(jnp.float32), whole.astype(jnp.float32), atol=0.02)
    assert np.isfinite(whole.astype(jnp.float32)).all()


# --- streams


@pytest.mark.parametrize("name", STREAMS)
def test_stream(name):
    stream, traced = STREAMS[name], []
    check_tree(stream)
    x = normal(9, 5, 1, B, H, 8, D) * 0.05 + normal(8, B, H, 8, D)
    x = x[:, 0]

    @jax.jit
    def run(stream, x):
        traced.append(1)
        state, first = streams.start(stream, x[0])

        def body(state, now):
            state, payload = streams.step(stream, state, now)
            return state, (payload, streams.value(stream, state))

        state, (payloads, values) = jax.lax.scan(body, state, x[1:])
        return first, payloads, values, state

    first, payloads, values, state = run(stream, x)
    held = streams.receive(stream, None, first)
    for step in range(4):
        held = streams.receive(stream, held, jax.tree.map(lambda leaf, step=step: leaf[step], payloads))
        there = stream.strategy.value(held, stream.quantizer)
        np.testing.assert_allclose(there, values[step], atol=1e-5)
        error = jnp.sum((there - x[step + 1]) ** 2) / jnp.sum(x[step + 1] ** 2)
        assert error < 0.03
    for leaf in jax.tree.leaves(payloads):
        assert leaf.dtype != jnp.float32, "a payload carries numbers that were not coded"
    sent = sum(leaf[0].nbytes for leaf in jax.tree.leaves(payloads))
    assert sent < 0.6 * 2 * x[0].size
    assert state.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    run(perturbed(stream), x)
    assert len(traced) == 1
