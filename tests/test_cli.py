"""The command as users run it: every verb, its JSON, its exit status and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxquant import cli
from jaxquant.methods import uniform
from jaxquant.models.loading import SMALL

SHORT = ["--rows", "1", "--seq-len", "96"]


@pytest.fixture
def run():
    def invoke(*arguments):
        result = CliRunner().invoke(cli.app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_info_and_methods(run):
    report = json.loads(run("info", "--json").stdout)
    assert report["jaxquant"]
    assert "llama" in report["model families"]
    listed = json.loads(run("methods", "--json").stdout)
    assert "2504.19874" in listed["turboquant"]["source"]
    assert listed["turboquant"]["caches"]
    assert listed["turboquant"]["cost"]["bytes_per_token"] == 2 * (128 * 4 / 8 + 2)
    assert set(listed["uniform"]["variants"]) == {"symmetric", "Hadamard"}
    for name, entry in listed.items():
        assert entry["source"], name
        if entry["caches"]:
            assert entry["cost"]["bytes_per_token"] > 0, name
            assert entry["cost"]["encode"] > 0, name
            assert entry["cost"]["decode"] > 0, name
    assert set(listed) == set(report["methods"])
    assert "turboquant" in run("methods").stdout


def test_the_page_of_methods_is_up_to_date(run):
    def comparable(page):
        """All but the counted operations, which belong to a version of XLA."""
        return re.sub(r"^(\| \[.*? bits) \| \d+ \| \d+ ", r"\1", page, flags=re.MULTILINE)

    written = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert comparable(written) == comparable(run("methods", "--markdown").stdout), "jaxquant methods --markdown"
    assert comparable(written) != comparable(written.replace("132.0", "133.0"))


def test_a_method_that_asks_for_statistics_and_an_object_are_evaluated(run):
    fitted = json.loads(run("eval", "--method", "oscar", "--bits-k", "3", "--bits-v", "3", *SHORT, "--json").stdout)
    assert fitted["compressed"]["bytes_per_token"] == 2 * (64 * 3 / 8 + 4)
    assert fitted["compressed"]["kl"] > 0
    report = json.loads(run("eval", "--method", "test_cli:OBJECT", *SHORT, "--json").stdout)
    assert report["compressed"]["bytes_per_token"] == 2 * (64 * 5 / 8 + 4)
    with pytest.raises(ValueError, match="asks for weather"):
        run("eval", "--method", "test_cli:asking_too_much", *SHORT)


OBJECT = uniform.asymmetric(dim=64, bits=5)


def asking_too_much(key, *, bits_k, bits_v, weather):
    raise AssertionError


def test_benchmark_reports_error_between_the_bounds(run):
    report = json.loads(run("benchmark", "--bits", "2", "--bits", "4", "--vectors", "2048", "--json").stdout)
    assert [row["bits"] for row in report["results"]] == [2, 4]
    for row in report["results"]:
        assert row["shannon_bound"] < row["nmse"] < row["upper_bound"]
        assert row["bytes_per_vector"] == 128 * row["bits"] / 8 + 2
        assert row["quantize_per_second"] > 0
    assert "Shannon" in run("benchmark", "--bits", "2", "--vectors", "64").stdout


def test_run_continues_and_compare_reports_both(run):
    prompt = "import numpy as np"
    packed = json.loads(run("run", prompt, "--max-tokens", "8", "--bits-v", "2", "--json").stdout)
    whole = json.loads(run("run", prompt, "--max-tokens", "8", "--exact", "--json").stdout)
    assert packed["tokens"] == whole["tokens"] == 8
    assert 0 < packed["bytes_per_token"] < whole["bytes_per_token"] == 2 * 2 * 64

    report = json.loads(run("compare", prompt, "--max-tokens", "8", "--bits-v", "2", *SHORT, "--json").stdout)
    baseline, compressed = report["baseline"], report["compressed"]
    assert compressed["cache_bytes"] < baseline["cache_bytes"]
    assert baseline["text"] == whole["text"]
    assert compressed["text"] == packed["text"]
    assert compressed["kl"] > 0
    assert 0 < compressed["top1"] < 1
    assert baseline["perplexity"] != compressed["perplexity"]
    assert {"needle_accuracy", "decode_tokens_per_second"} <= baseline.keys() & compressed.keys()
    shown = run("compare", prompt, "--max-tokens", "8", "--bits-v", "2", *SHORT).stdout
    assert "KL divergence" in shown
    assert "K4/V2" in shown


def test_eval_reads_tokens_of_every_kind_alike(run, tmp_path):
    from jaxquant import models

    text = (SMALL / "held_out.txt").read_text(encoding="utf-8")[:6000]
    ids = np.array(models.load().tokenizer.encode(text, special=False))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    np.savez(tmp_path / "ids.npz", held=ids)
    sources = [f"{tmp_path}/text.txt", f"{tmp_path}/ids.npy", f"{tmp_path}/ids.npz:held"]
    reports = [
        json.loads(run("eval", "--tokens", source, "--start", "3", *SHORT, "--json").stdout) for source in sources
    ]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["compressed"]["bytes_per_token"] == 2 * (64 * 4 / 8 + 2)
    assert reports[0]["baseline"]["perplexity"] > 1
    assert reports[0]["scored_tokens"] == 96


def test_eval_asks_for_pass_keys(run, tmp_path):
    from jaxquant import models, needles

    text = (SMALL / "held_out.txt").read_text(encoding="utf-8")
    rows = needles.hide(np.random.default_rng(0), text, models.load().tokenizer, count=1, length=97, keys=1)
    np.savez(tmp_path / "needles.npz", rows=rows)
    report = json.loads(run("eval", *SHORT, "--needles", f"{tmp_path}/needles.npz:rows", "--json").stdout)
    assert 0 <= report["compressed"]["needle_accuracy"] <= 1
    assert "needle_accuracy" in report["baseline"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", ""], "prompt is empty"),
        (["run", "x", "--method", "nonsense"], "--method must be one of .*turboquant.*, or package.module:Object"),
        (["run", "x", "--method", "os.path:nonsense"], "--method 'os.path:nonsense'"),
        (["run", "x", "--bits-k", "9"], "bits must be an integer from 1 to 8, got 9"),
        (["run", "x", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["run", "x", "--max-tokens", "100000"], "exceed the model's"),
        (["benchmark", "--input", "nonsense"], "--input must be one of gaussian"),
        (["benchmark", "--scale", "nonsense"], "scale"),
        (["benchmark", "--rotation", "nonsense"], "rotation"),
        (["eval", "--tokens", "no.npy"], "no.npy: no such file"),
        (["eval", "--rows", "100000"], "rows of 1024 \\+ 1 need"),
    ],
)
def test_errors_name_the_argument(run, arguments, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.npy", np.lib.format.magic(1, 0) + b"\x76\x00{", "cut.npy cannot be read: EOF"),
        ("no.npz", b"PK\3\4nothing", "no.npz cannot be read: File is not a zip file"),
        ("long.npy", np.array([1, 2**63], np.uint64), "token id 9223372036854775808 is outside the model.s vocabulary"),
        ("negative.npy", np.array([3, -1]), "must hold token ids, .* got -1 to 3"),
        ("objects.npy", np.array([{}], object), "objects.npy cannot be read: Object arrays"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_read_is_named(run, tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(ValueError, match=message):
        run("eval", "--tokens", str(file))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_fits_every_generator(run, seed):
    refused = run("eval", f"--seed={seed}")
    assert refused.exit_code == 2
    assert "--seed" in refused.stderr


def test_exit_status_and_streams():
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "jaxquant", *arguments], capture_output=True, text=True, check=False
        )

    failed = call("run", "")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.strip() == "jaxquant: prompt is empty: give at least one character to continue"
    assert call("eval", "--rows", "many").returncode == 2
    done = call("info", "--json")
    assert done.returncode == 0
    json.loads(done.stdout)
