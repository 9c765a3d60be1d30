"""Plans against caches that are really made, and against a search of every length."""

import json

import jax
import pytest
from typer.testing import CliRunner

from jaxquant import cache, models, plan, quantizers
from jaxquant.cli import app
from jaxquant.methods import turboquant
from jaxquant.models import architecture as architectures

SMALL = architectures.read(models.loading.SMALL)


@pytest.mark.parametrize(
    ("context", "batch", "sinks", "window"), [(1, 1, 0, 0), (37, 3, 2, 8), (512, 2, 4, 128)], ids=str
)
@pytest.mark.parametrize("bits", [None, (4, 2), (3, 3)], ids=str)
def test_planned_bytes_are_those_of_the_real_cache(context, batch, sinks, window, bits):
    pair = bits and turboquant.kv(jax.random.key(0), dim=SMALL.dim, bits_k=bits[0], bits_v=bits[1])
    exact = quantizers.Exact(dim=SMALL.dim)
    kept = {"sinks": sinks, "window": window} if pair else {}
    sizes = {"layers": SMALL.layers, "batch": batch, "kv_heads": SMALL.kv_heads, "capacity": context}
    real = cache.init(*(pair or (exact, exact)), **sizes, **kept)
    planned = plan.cache_bytes(SMALL, pair, context=context, batch=batch, sinks=sinks, window=window)
    assert planned == real.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(real))
    assert planned != plan.cache_bytes(SMALL, pair, context=context + 1, batch=batch, sinks=sinks, window=window)


@pytest.mark.parametrize("memory", [0, 99, 100, 101, 5_000, 123_456])
def test_longest_is_the_last_length_that_fits(memory):
    def held(tokens):
        return 100 + 7 * tokens + tokens % 3  # buffers are padded here and there

    machine = plan.Machine(devices=2, memory=memory + 1, bandwidth=1.0, reserve=0.1)
    found = plan.plan(held, 50, machine, context=10, batch=1, share=1.0)
    room = 2 * (memory + 1) * 0.9 - 50
    lengths = [tokens for tokens in range(1, 40_000) if held(tokens) <= room]
    assert found.longest == max(lengths, default=0)
    assert found.fits == (held(10) <= room)


def test_time_is_what_is_read_over_bandwidth_and_share():
    def held(tokens):
        return 1000 * tokens

    machine = plan.Machine(devices=4, memory=1e9, bandwidth=1e6)
    found = plan.plan(held, 8000, machine, context=100, batch=2, share=0.5, model_share=0.8, fixed=0.25)
    assert found.seconds == pytest.approx((8000 / 0.8 + 100_000 / 0.5) / 4e6 + 0.25)
    assert found.bytes_per_token == 500


def test_weights_of_a_known_model():
    from jaxquant.plan_cli import LLAMA_8B

    assert plan.weights(architectures.from_config(LLAMA_8B)) == 2 * 8_030_261_248  # as its model card counts


def test_command_shows_every_cache():
    arguments = ["plan", "--context", "1000", "--batch", "2", "--hbm", "0.5", "--bits", "K4V2,k2/v2", "--json"]
    run = CliRunner().invoke(app, [*arguments, "--model", str(models.loading.SMALL)])
    assert run.exit_code == 0, run.output
    caches = json.loads(run.stdout)["caches"]
    assert list(caches) == ["bf16", "fp8", "K4V2", "K2V2"]
    assert caches["fp8"]["cache"] == caches["bf16"]["cache"] // 2
    assert caches["K4V2"]["longest"] > 4 * caches["bf16"]["longest"]
    pair = turboquant.kv(jax.random.key(0), dim=SMALL.dim, bits_k=4, bits_v=2)
    assert caches["K4V2"]["cache"] == plan.cache_bytes(SMALL, pair, context=1000, batch=2)
    table = CliRunner().invoke(app, [*arguments[:-1], "--model", str(models.loading.SMALL)])
    assert "longest" in table.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.Machine(devices=0, memory=1, bandwidth=1), "devices must be positive, got 0"),
        (lambda: plan.Machine(devices=1, memory=float("inf"), bandwidth=1), "memory must be finite, got inf"),
        (lambda: plan.Machine(devices=1, memory=1, bandwidth=1, reserve=1.0), "reserve must be from 0 to below 1"),
        (lambda: plan.plan(int, 0, plan.Machine(1, 1, 1), context=0, batch=1, share=1), "context must be at least 1"),
        (lambda: plan.plan(int, 0, plan.Machine(1, 1, 1), context=1, batch=1, share=1.5), "^share must be above 0"),
        (
            lambda: plan.plan(int, 0, plan.Machine(1, 1, 1), context=1, batch=1, share=1, model_share=0),
            "model_share must be above 0",
        ),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
