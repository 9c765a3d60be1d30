"""The examples: somebody else's method passes the contract and is evaluated; nearest neighbours are found."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_methods
from typer.testing import CliRunner

from jaxquant import cli
from jaxquant.methods import turboquant

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def imported(name):
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return imported


def test_somebody_elses_method_keeps_the_contract(load):
    module = load("dithered")
    test_methods.check_module(module)
    trial = test_methods.Trial(module.EXAMPLES[0])
    for check in test_methods.CHECKS:
        check(trial)


def test_somebody_elses_method_is_evaluated(load):
    load("dithered")
    result = CliRunner().invoke(
        cli.app, ["eval", "--method", "dithered:kv", "--rows", "1", "--seq-len", "96", "--json"]
    )
    assert result.exit_code == 0, result.exception
    assert '"bytes_per_token": 68.0' in result.stdout


def test_the_dither_makes_the_error_independent_of_the_vector(load):
    """With one dither a draw, the mean over draws of what is decoded is the vector: subtractive dither is unbiased."""
    module = load("dithered")
    x = jnp.linspace(-1, 1, 64)

    def decoded(key):
        quantizer = module.kv(key, dim=64, bits_k=3, bits_v=3)[0]
        return quantizer.expand(quantizer.quantize(x))

    y = np.asarray(jax.lax.map(decoded, jax.random.split(jax.random.key(0), 2000), batch_size=100))
    step = 1 / 3.5
    inside = np.abs(x) < 1 - step  # at the ends, codes are cut off
    deviation = step / 12**0.5
    assert np.abs(y.mean(axis=0) - x)[inside].max() < 4.5 * deviation / 2000**0.5
    np.testing.assert_allclose(y.std(axis=0)[inside], deviation, rtol=0.08)


def test_search_over_codes_is_search_over_decoded_vectors(load):
    module = load("nearest_neighbours")
    x = jnp.asarray(module.clustered(np.random.default_rng(0), 2500, 48))
    base, queries = x[20:], x[:20]
    quantizer = turboquant.mse(jax.random.key(0), dim=48, bits=4, scale="unbiased")
    found = module.index(quantizer, base)
    scores, place = module.search(found, queries)
    held = np.asarray(quantizer.restore(quantizer.expand(quantizer.quantize(base))), np.float64)
    expected = np.asarray(queries, np.float64) @ held.T
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, np.asarray(place), axis=1), scores, atol=1e-5)
    assert place.max() < len(base)
    codes = sum(leaf.nbytes for leaf in jax.tree.leaves(found.codes))
    assert codes == 3 * module.BLOCK * (48 * 4 // 8 + 2)
    assert found.codes.codes.dtype == jnp.uint8
    # The zeros that fill the last block up are nobody's neighbours, even where every inner product is negative.
    scores, place = module.search(module.index(quantizer, jnp.abs(base)), -jnp.abs(queries))
    assert scores.max() < 0
    assert place.max() < len(base)


def test_recall_rises_with_bits_and_exact_search_is_exact(load, monkeypatch):
    module = load("nearest_neighbours")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)  # as if faiss were not there
    rows = module.compare("few", module.clustered(np.random.default_rng(1), 1100, 48), 100, (1, 4))
    exact, one, four = rows
    assert exact["recall_1@1"] == 1.0
    assert one["recall_1@1"] < four["recall_1@1"] <= 1.0
    assert four["recall_1@10"] > 0.95
    assert one["recall_1@1"] > 10 / 1000  # ten times a guess
    assert four["bytes_per_vector"] == 26
