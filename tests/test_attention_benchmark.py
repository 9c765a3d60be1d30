"""The benchmark of attention as users run it, on shapes that take no time."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxquant import _attention_peers, _stopwatch, attention_benchmark, cli

SMALL = ["--heads", "4", "--kv-heads", "2", "--dim", "64", "--batch", "2", "--tokens", "256"]


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["benchmark", "attention", *SMALL, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_report_has_every_row_and_says_what_failed(tmp_path):
    file = tmp_path / "report.json"
    report = json.loads(run("--bits", "K4V2", "--implementation", "xla,none", "--json", "--output", str(file)).stdout)
    assert report == json.loads(file.read_text())
    peer, row, failed = report["results"]
    assert (peer["bits"], peer["implementation"]) == ("bf16", "xla")
    assert (row["bits"], row["implementation"]) == ("K4V2", "xla")
    assert row["bytes"] == 2 * 256 * 2 * (64 // 2 + 64 // 4 + 4)
    assert peer["bytes"] == 2 * 256 * 2 * 64 * 2 * 2
    assert row["share"] == pytest.approx(row["bytes"] / row["ms"] * 1e3 / report["read_bandwidth"])
    assert row["speedup"] == pytest.approx(peer["ms"] / row["ms"])
    assert row["error"] < 1e-5
    assert failed["failed"].partition(":")[0] in ("ValueError", "TypeCheckError")
    assert "ms" not in failed


def test_table_and_wrong_arguments():
    assert "K2V2" in run("--bits", "K2V2").stdout
    for arguments, message in (
        (["--bits", "44"], "bits must look like K4V2"),
        (["--batch", "1"], "given equally often"),
        (["--kv-heads", "3"], "multiple of --kv-heads = 3"),
        (["--bits", "K2V2", "--implementation", "none"], "implementation must be|Type-check"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(*arguments)


def test_error_sees_a_wrong_result(monkeypatch):
    shape = attention_benchmark.Shape(batch=2, tokens=100, heads=4, kv_heads=2, dim=64)
    assert attention_benchmark.error(shape, attention_benchmark.scalars((4, 4), 64), "xla") < 1e-5
    true = attention_benchmark.attention.decode_attention
    wrong = {
        "heads in another order": lambda q, c, layer, **rest: true(q[:, ::-1], c, layer, **rest),
        "another layer": lambda q, c, layer, **rest: true(q, c, 0, **rest),
        "a newer token unseen": lambda q, c, layer, **rest: true(q, c, layer, sliding_window=90, **rest),
    }
    for name, attend in wrong.items():
        monkeypatch.setattr(attention_benchmark.attention, "decode_attention", attend)
        assert attention_benchmark.error(shape, attention_benchmark.scalars((4, 4), 64), "xla") > 1e-2, name


def test_times_grow_with_the_work():
    x = jnp.ones((256, 256))
    once = _stopwatch.median(lambda y: y @ x * 1e-3, x)
    often = _stopwatch.median(lambda y: functools.reduce(lambda z, _: z @ x * 1e-3, range(32), y), x)
    assert once < often
    assert _stopwatch.read_bandwidth(2**20) > 0


def test_random_cache_is_full_and_as_large_as_said():
    shape = attention_benchmark.Shape(batch=2, tokens=128, heads=4, kv_heads=2, dim=64)
    made = attention_benchmark.filled(shape, attention_benchmark.scalars((3, 2), 64), layers=3)
    assert made.length.tolist() == [[128, 128]] * 3
    held = [store.codes for store in (made.stacks[0].keys, made.stacks[0].values)]
    assert sum(code.nbytes for code in held) == 3 * shape.nbytes((3, 2))
    assert len(np.unique(held[0].codes)) == 256
    assert set(_attention_peers.peers(1, 8, 2, 1, 64)) == {"xla"}
