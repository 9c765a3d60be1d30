"""`jaxquant report`: what the page says is what was measured, whatever a file is called and whenever it is killed."""

import copy
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxquant import _report_drawing, _report_inputs, _report_page, cli, models, report
from jaxquant._markup import Markup, tag
from jaxquant.evaluate import Scores
from jaxquant.models.loading import SMALL
from jaxquant.report import Limits, Row

HOSTILE = "<img src=x onerror=alert(1)>&\"'.txt"


class Page(HTMLParser):
    """Elements with their attributes, the numbers, and the text of each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what was not open"

    def handle_data(self, data):
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    def values(self):
        return [json.loads(attributes["value"]) for tag, attributes in self.elements if tag == "data"]


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Run once, over a text whose name would be markup."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / HOSTILE.replace("/", "")
    text.write_text((SMALL / "held_out.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    arguments = ["--bits", "K8V8,K2V2", "--methods", "turboquant", "--rows", "1", "--seq-len", "256"]
    arguments += ["--needle-rows", "1", "--hbm", "24", "--tokens", text, "--json", "-o", folder / "r.html"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxquant", "report", *map(str, arguments)])
        result = run(*arguments)
    assert sorted(path.name for path in folder.iterdir()) == sorted([text.name, "r.html"])
    return json.loads(result.stdout), (folder / "r.html").read_text(encoding="utf-8"), text


def test_the_numbers_are_those_of_the_cache(written):
    found, _, _ = written
    assert found["baseline"]["bytes_per_token"] == 2 * 2 * 64
    assert [row["name"] for row in found["rows"]] == ["turboquant K8V8", "turboquant K2V2"]
    assert [row["bytes_per_token"] for row in found["rows"]] == [2 * (64 + 2), 2 * (64 / 4 + 2)]
    assert 0 < found["rows"][0]["kl"] < 0.005 < 0.2 < found["rows"][1]["kl"]
    assert 1 > found["rows"][0]["top1"] > found["rows"][1]["top1"]
    assert found["recommended"] == "turboquant K8V8"
    assert found["rows"][0]["missed"] == []
    assert len(found["rows"][1]["missed"]) >= 2
    assert found["text"]["predicted_tokens"] == 256
    assert 0 < found["text"]["answer_tokens"] < 30
    assert found["sensitivity"]["name"] == "turboquant K8V8"
    layers = found["sensitivity"]["keys"] + found["sensitivity"]["values"]
    assert len(layers) == 2 * 5
    assert min(layers) > 0
    assert max(layers) < sum(layers) < 5 * found["rows"][0]["kl"]  # each alone, so together the same order


def test_the_page_shows_the_numbers_of_the_json(written):
    found, text, _ = written
    page = Page(text)
    assert not page.open
    shown = page.values()
    for row in (found["baseline"], *found["rows"]):
        assert row["bytes_per_token"] in shown
        assert row["perplexity"] in shown
        assert row["needles"] in shown
    for row in found["rows"]:
        assert row["kl"] in shown
        assert row["top1"] in shown
        assert f"{row['kl']:.5f}" in "".join(page.words["data"])
    assert set(found["sensitivity"]["keys"] + found["sensitivity"]["values"]) <= set(shown)
    for planned in found["plan"]["caches"].values():
        assert planned["longest"] in shown
        assert planned["cache"] / 2**30 in shown
    assert json.loads("".join(page.words["script"])) == found
    assert len(shown) == len(re.findall("<data ", text)) > 30


def test_a_changed_number_is_noticed(written):
    found, _, _ = written
    changed = copy.deepcopy(found)
    changed["rows"][1]["kl"] = 0.123456789
    assert found["rows"][1]["kl"] not in Page(_report_page.page(changed)).values()


def test_nothing_is_fetched_and_nothing_runs(written):
    _, text, _ = written
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "link", "iframe", "object", "embed", "base", "form"})
    for name, attributes in page.elements:
        assert attributes.keys().isdisjoint({"src", "href", "srcset", "action", "onclick", "onload", "onerror"})
        assert name != "script" or attributes["type"] == "application/json"
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not re.search(r"url\(|@import", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"] * 4


def test_names_of_files_are_text(written):
    _, text, path = written
    assert "<img" not in text
    assert HOSTILE in "".join(Page(text).words["dd"])
    command = shlex.split("".join(Page(text).words["code"]))
    assert command[:2] == ["jaxquant", "report"]
    assert command[command.index("--tokens") + 1] == str(path)
    assert command[command.index("--bits") + 1] == "K8V8,K2V2"


def test_every_string_of_a_report_is_escaped(written):
    found, _, _ = written

    def poison(value):
        if isinstance(value, str):
            return value + "</script><b zz='\">"
        if isinstance(value, dict):
            return {name: poison(one) for name, one in value.items()}
        return [poison(one) for one in value] if isinstance(value, list) else value

    text = _report_page.page(poison(found))
    page = Page(text)
    assert not page.open
    assert not any(attributes.keys() & {"zz"} for _, attributes in page.elements)
    assert text.count("</script>") == 1


def test_tables_and_pictures_can_be_read_without_seeing_colours(written):
    found, text, _ = written
    page = Page(text)
    tables = [tag for tag, _ in page.elements if tag == "table"]
    assert len(tables) == 3
    assert sum(tag == "caption" for tag, _ in page.elements) == 3
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")
    scrolls = [attributes for tag, attributes in page.elements if attributes.get("class") == "scroll"]
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in scrolls)
    assert len(scrolls) == 3
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 4
    assert all(set(picture["aria-labelledby"].split()) <= set(ids) for picture in pictures)
    assert all(row["bits"] in page.words["text"] for row in found["rows"])
    assert {"turboquant", "keys", "values", "limit 0.05"} <= set(page.words["text"])
    described = " ".join(page.words["desc"])
    assert all(f"{row['kl']:.5f}" in described for row in found["rows"])


def row(name, size, kl, top1=0.99, needles=0.98, limits=None):
    made = Row(name=name, method="m", bits="", bytes_per_token=size, cache_bytes=1, perplexity=9.0, kl=kl, top1=top1,
               needles=needles)  # fmt: skip
    base = dataclasses.replace(made, needles=None if needles is None else 0.98, kl=0.0, top1=1.0)
    return dataclasses.replace(made, missed=report.missed(made, base, limits or Limits()))


def test_the_cheapest_setting_within_the_limits_is_recommended():
    rows = [row("large", 132.0, 0.001), row("good", 68.0, 0.05), row("small", 36.0, 0.0501)]
    assert report.recommended(rows).name == "good"
    assert report.recommended([*rows, row("as small", 68.0, 0.04)]).name == "as small"
    assert report.recommended([*rows, row("forgets", 40.0, 0.01, needles=0.92)]).name == "good"
    assert report.recommended([*rows, row("differs", 40.0, 0.01, top1=0.899)]).name == "good"
    assert report.recommended([*rows, row("at the limits", 40.0, 0.05, top1=0.9, needles=0.98 - 0.05)]).name != "small"
    assert report.recommended([*rows, row("no keys asked", 40.0, 0.01, needles=None)]).name == "no keys asked"
    strict = Limits(kl=1e-4)
    assert report.recommended([row("good", 68.0, 0.05, limits=strict)]) is None
    bad = [row("worse", 36.0, 0.9), row("bad", 68.0, 0.2), row("broken", 20.0, float("nan"))]
    assert report.recommended(bad) is None
    assert report.nearest(bad).name == "bad"
    assert "not finite" in bad[2].missed[0]
    assert bad[1].missed == ("KL 0.2000 above 0.05",)


def test_the_page_says_when_nothing_keeps_the_limits(written):
    found = copy.deepcopy(written[0])
    found |= {"recommended": None, "nearest": "turboquant K2V2", "plan": None, "sensitivity": None}
    found["rows"][0]["kl"] = None
    words = " ".join(word for words in Page(_report_page.page(found)).words.values() for word in words)
    assert "no setting keeps the limits" in words
    assert all(reason in words for reason in found["rows"][1]["missed"])
    assert "not finite" in words
    assert "What fits" not in words
    assert "Not measured: every setting is a pipeline" in words


def scores(kl):
    flat = np.full((1, 4), kl, np.float32)
    hit = np.ones((1, 4), bool)
    return Scores(baseline_nll=flat, compressed_nll=flat, kl=flat, baseline_hit=hit, compressed_hit=hit, agreement=hit)


@pytest.fixture(scope="module")
def small():
    return models.load()


def candidates(model, *methods, bits=((4, 2),), **given):
    return _report_inputs.candidates(model, methods, bits, **({"sinks": 0, "window": 0, "seed": 0} | given))


def text_of(model, **given):
    usual = {"start": 0, "rows": 1, "length": 4, "needle_file": None, "needle_rows": 0, "seed": 0}
    return _report_inputs.gather(model, None, **(usual | given))


def test_a_setting_that_did_not_compress_is_an_error(small, monkeypatch):
    monkeypatch.setattr(report, "_scores", lambda *_: scores(0.0))
    with pytest.raises(RuntimeError, match=r"turboquant K4V2: .*did not compress"):
        report.measure(candidates(small, "turboquant"), text_of(small), Limits(), progress=lambda *_: None)
    monkeypatch.undo()
    found = candidates(small, "turboquant", window=512)
    with pytest.raises(RuntimeError, match=r"turboquant K4V2: .*compression was not active"):
        report.measure(found, text_of(small), Limits(), progress=lambda *_: None)


def test_progress_rises_to_the_end(small, monkeypatch):
    monkeypatch.setattr(report, "_scores", lambda *given: given[-1](1, 2) or given[-1](2, 2) or scores(0.1))
    monkeypatch.setattr(report, "_layers", lambda *_: None)
    steps = []
    found = candidates(small, "turboquant", "kivi")
    asking = text_of(small, needle_rows=1, length=256)
    asking = dataclasses.replace(asking, marked=np.ones((1, 4), bool))
    report.measure(found, asking, Limits(), progress=lambda *step: steps.append(step))
    assert steps == [("measuring", 500 * i, 4000) for i in range(1, 9)]


def test_settings_are_built_for_the_model(small, tmp_path):
    found = candidates(small, "turboquant", "kivi", "turboquant", bits=((4, 4), (2, 2)))
    assert [one.name for one in found] == ["turboquant K4V4", "turboquant K2V2", "kivi K4V4", "kivi K2V2"]
    for one in found:
        assert one.nbytes(batch=2, tokens=96) == one.trial.cache(2, 96).nbytes
    kept = candidates(small, "turboquant", sinks=4, window=32)[0].trial.cache(1, 96)
    assert kept.bytes_per_token > found[0].trial.cache(1, 96).bytes_per_token
    assert [one.name for one in candidates(small, "test_report:OBJECT")] == ["test_report:OBJECT"]
    with pytest.raises(ValueError, match="turboquant K9V1: bits"):
        candidates(small, "turboquant", bits=((9, 1),))
    with pytest.raises(ValueError, match="nothing to measure"):
        candidates(small)


OBJECT = __import__("jaxquant.methods.uniform", fromlist=["asymmetric"]).asymmetric(dim=64, bits=5)


def test_pass_keys_are_hidden_in_the_text_and_need_not_be(small):
    plain, asking = text_of(small), text_of(small, length=256, needle_rows=2)
    assert plain.asking is None
    assert asking.asking.shape == (2, 257)
    assert asking.marked.shape == (2, 256)
    assert asking.rows.shape == (1, 257)
    np.testing.assert_array_equal(asking.rows[0, :5], plain.rows[0])
    other = text_of(small, length=256, needle_rows=2, seed=1)
    assert (other.asking != asking.asking).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--bits", "4"], ValueError, "bits must look like K4V2"),
        (["--methods", "nonsense"], ValueError, "must be one of .*turboquant"),
        (["--methods", " ,"], ValueError, "nothing to measure"),
        (["--methods", "no.such.module:X"], ValueError, "no.such.module:X"),
        (["--max-kl", "0"], ValueError, "kl must be positive, got 0"),
        (["--min-top1", "1.5"], ValueError, "top1 must be a share from 0 to 1, got 1.5"),
        (["--max-needle-loss", "-1"], ValueError, "needles must be a share"),
        (["--seq-len", "4096"], ValueError, "--seq-len must be at most the model's 2048 positions, got 4096"),
        (["--rows", "9999"], ValueError, "tokens holds"),
        (["--tokens", "{0}/two.npy"], ValueError, "--tokens must name one long row"),
        (["--tokens", "{0}/ids.npy"], ValueError, "token id 70000 is outside the model's vocabulary of 1280"),
        (["--needles", "{0}/row.npy", "--seq-len", "8"], ValueError, "--needles must name rows"),
        (["--needles", "{0}/two.npy", "--seq-len", "8"], ValueError, "do not ask for pass keys"),
        (["--calibration", "{0}/ids.npy"], ValueError, "ids.npy"),
        (["--hbm", "-1"], ValueError, "memory must be positive"),
        (["--model", "{0}/missing"], FileNotFoundError, "no such folder"),
        (["-o", "{0}/missing/r.html"], FileNotFoundError, "no such folder as"),
        (["-o", "{0}"], IsADirectoryError, "is a folder"),
    ],
)
def test_wrong_input_is_named_before_anything_is_measured(arguments, error, message, tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", np.full(5000, 70_000))
    np.save(tmp_path / "row.npy", np.ones(9, np.int64))
    np.save(tmp_path / "two.npy", np.ones((3, 9), np.int64))
    monkeypatch.setattr(report, "measure", lambda *_, **__: pytest.fail("was measured"))
    old = tmp_path / "r.html"
    old.write_text("old")
    given = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(error, match=message):
        run("-o", old, "--needle-rows", "1", *given)
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "r.html", "row.npy", "two.npy"]


def test_a_run_that_is_killed_while_it_writes_leaves_nothing(written, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from jaxquant.codecs import atomic\n"
        "{0}os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with atomic.replacing(sys.argv[1]) as file:\n"
        "    file.write(b'half a page')\n"
    )
    for prefix, code, left in (("", -signal.SIGKILL, []), ("# ", 0, ["r.html"])):
        command = [sys.executable, "-c", script.format(prefix), str(tmp_path / "r.html")]
        assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == code
        assert [path.name for path in tmp_path.iterdir()] == left


def test_a_failure_leaves_no_page(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("compression was not active")

    monkeypatch.setattr(report, "measure", fail)
    with pytest.raises(RuntimeError, match="not active"):
        run("-o", tmp_path / "r.html", "--needle-rows", "0", "--bits", "K4V4", "--methods", "turboquant")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "points", [[(1.0, 0.0, "a")], [(5.0, 0.1, ""), (5.0, 0.1, "same")], [(i, 10.0**-i, "K4V4") for i in range(30)]]
)
@pytest.mark.parametrize("whole", [True, False])
def test_charts_draw_whatever_is_measured(points, whole):
    drawn = _report_drawing.chart(
        [_report_drawing.Line(name=str(i), points=points) for i in range(7)],
        name="n", title="t", description="d", x_label="x", y_label="y", width=326, height=370, limit=(0.05, "limit"),
        ring=points[0][:2], whole=whole,
    )  # fmt: skip
    assert isinstance(drawn, Markup)
    numbers = [float(value) for value in re.findall(r' (?:x|y|cx|cy|x1|x2|y1|y2)="([^"]*)"', drawn)]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= 0 or whole is False
    assert len({attributes.get("d") for tag, attributes in Page(drawn).elements if tag == "path"}) >= 6


def test_lower_is_better_and_smaller_is_left():
    lines = [_report_drawing.Line(name="a", points=[(10, 1.0, "first"), (20, 0.01, "second")])]
    drawn = Page(
        _report_drawing.chart(
            lines, name="n", title="t", description="d", x_label="x", y_label="y", width=300, height=200
        )
    )
    marks = [a["transform"] for tag, a in drawn.elements if "mark" in a.get("class", "")]
    (x0, y0), (x1, y1) = ([float(word) for word in re.findall(r"[\d.]+", mark)] for mark in marks)
    assert x0 < x1
    assert y0 < y1


def test_tags_escape():
    assert tag("p", "<&", tag("b", '"'), title='"<') == '<p title="&quot;&lt;">&lt;&amp;<b>&quot;</b></p>'
    assert tag("meta", charset="utf-8", id=None) == '<meta charset="utf-8">'
