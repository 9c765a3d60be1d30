"""The calibration file against hostile input, the absorbed basis against the original model, and both verbs.

The model is a random llama with biases and the tokenizer of the small one; only the verbs run the small one.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import CONFIGS, make_tensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jaxquant import cli, evaluate, models, quantizers
from jaxquant.calibrate import absorb, files, make, pictures, tradeoff
from jaxquant.calibrate.measured import Measured
from jaxquant.models.loading import SMALL

LAYERS, DIM = 3, 32
CONFIG = {
    **CONFIGS["llama"], "vocab_size": 1280, "num_hidden_layers": LAYERS, "head_dim": DIM, "attention_bias": True,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(make_tensors(CONFIG), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, folder / name)
    return models.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def measured(model):
    ids = np.array(model.tokenizer.encode((SMALL / "held_out.txt").read_text(encoding="utf-8")[:20_000]))
    return make.measure(model, ids, rows=4, seq_len=256)


@pytest.fixture(scope="module")
def found(measured):
    return make.candidates(measured)


@pytest.fixture(scope="module")
def made(model, measured, found):
    return make.choose(model, measured, found, bits=2.5)


class Stopped(Exception):
    """Somebody pulled the plug."""


def test_an_interrupted_measurement_goes_on_where_it_stopped(model, measured, tmp_path):
    ids = np.array(model.tokenizer.encode((SMALL / "held_out.txt").read_text(encoding="utf-8")[:20_000]))
    kept, done = tmp_path / "kept", []

    def progress(what, at, total):
        done.append(at)
        if done == [1, 2]:
            raise Stopped

    with pytest.raises(Stopped):
        make.measure(model, ids, rows=4, seq_len=256, keep=kept, progress=progress)
    again = make.measure(model, ids, rows=4, seq_len=256, keep=kept, progress=progress)
    assert done == [1, 2, 3, 4], "rows that were measured are not measured again"
    for field in dataclasses.fields(again.statistics):
        np.testing.assert_array_equal(getattr(again.statistics, field.name), getattr(measured.statistics, field.name))
    np.testing.assert_array_equal(again.fisher.keys, measured.fisher.keys)
    np.testing.assert_array_equal(again.fisher.values, measured.fisher.values)
    assert not np.array_equal(again.fisher.keys, again.fisher.values)
    assert (again.text, again.identity) == (measured.text, measured.identity)
    assert list(tmp_path.iterdir()) == [kept]

    with pytest.raises(ValueError, match="another model, text or setting"):
        make.measure(model, ids, rows=4, seq_len=256, keep=kept, seed=1)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged measurement"):
        Measured.load(kept)
    save_file({"x": np.zeros(1)}, kept)
    with pytest.raises(ValueError, match="not a measurement"):
        Measured.load(kept)
    save_file({"x": np.zeros(1)}, kept, metadata={"jaxquant.measured": "{}"})
    with pytest.raises(ValueError, match="damaged measurement"):
        Measured.load(kept)


def test_measurements_of_different_text_add_up(measured):
    both = measured + dataclasses.replace(measured, text="other", identity="other")
    assert both.statistics.tokens == both.fisher.tokens == 2 * measured.statistics.tokens
    np.testing.assert_allclose(both.fisher.keys, measured.fisher.keys)
    np.testing.assert_allclose(both.statistics.key_covariance, measured.statistics.key_covariance)
    assert both.text == f"{measured.text}; other"


def test_every_metric_and_search_makes_quantizers_of_one_budget(model, measured, found):
    seen = {"information": found.keys.basis.worth}
    for metric in ("worst", "attention"):
        other = make.candidates(measured, metric=metric, types=2)
        seen[metric] = other.keys.basis.worth
        assert set(other.setting["shared_codebooks"]) == {"keys", "values"}
        made = make.choose(model, measured, other, bits=2.5, steps=2, method="greedy")
        assert made.bits <= 2.5
        assert made.setting["metric"] == metric
        before, after = made.setting["attention_kl"]
        assert after <= before
    assert not np.allclose(seen["worst"], seen["information"], rtol=1e-3)
    assert not np.allclose(seen["attention"], seen["worst"], rtol=1e-3)


def same(first, second):
    assert (first.fingerprint, first.setting) == (second.fingerprint, second.setting)
    for mine, theirs in zip((*first.keys, *first.values), (*second.keys, *second.values), strict=True):
        assert (mine.widths, mine.dim, mine.rule) == (theirs.widths, theirs.dim, theirs.rule)
        for field in ("mean", "analysis", "synthesis", "weights"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))
        for a, b in zip(mine.levels, theirs.levels, strict=True):
            np.testing.assert_array_equal(a, b)


def test_files_come_back_and_know_their_model(model, made, tmp_path):
    files.write(tmp_path / "c", made)
    again = files.read(tmp_path / "c")
    same(again, made)
    again.check(model)
    swapped = dataclasses.replace(made, keys=made.values, values=made.keys)
    with pytest.raises(AssertionError):
        same(again, swapped)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert made.bits <= 2.5 < made.bits + 8 / (2 * LAYERS * DIM), "less is left than one more bit for a group costs"
    assert made.setting["predicted_kl"] > 0


def test_another_model_is_refused(model, made):
    weight = model.decoder.layers[2].mlp.up_proj.kernel
    kept = weight[...]
    try:
        weight[...] = kept * 1.01
        with pytest.raises(ValueError, match="same shape with other weights"):
            made.check(model)
    finally:
        weight[...] = kept
    made.check(model)
    short = dataclasses.replace(made, keys=made.keys[:2], values=made.values[:2])
    with pytest.raises(ValueError, match="is for 2 layers of 2 kv heads of 32; the model has 3 of 2 of 32"):
        short.check(model)


def changed(path, made, *, record=None, arrays=None):
    """Write a file whose description or tensors were tampered with."""
    files.write(path, made)
    with safe_open(path, framework="numpy") as file:
        described = json.loads(file.metadata()[files.KEY])
    tensors = load_file(path)
    if record:
        record(described)
    if arrays:
        arrays(tensors)
    save_file(tensors, path, metadata={files.KEY: json.dumps(described)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=3), "calibration of version 3; this jaxquant reads versions 1 and 2"),
        (lambda r: r.update(dim=10**9), "dim is 1000000000"),
        (lambda r: r.update(layers=True), "layers is True"),
        (lambda r: r.update(kv_heads=3), "not float32 \\[3, 32\\]"),
        (lambda r: r.update(templates=[]), "no template for each"),
        (lambda r: r.pop("fingerprint"), "no fingerprint"),
        (lambda r: r["templates"][1].pop("values"), "template of the values of layer 1"),
        (lambda r: r["templates"][0]["keys"].update(widths=[[2, 10**6]]), "template of the keys of layer 0"),
        (lambda r: r["templates"][0]["keys"].update(widths=[[9, 8]]), "template of the keys of layer 0"),
        (lambda r: r["templates"][0]["keys"].update(widths=[[2, 8]]), "0.keys"),
        (lambda r: r["templates"][0]["keys"].update(rule="x"), "template of the keys of layer 0"),
        (lambda r: r["templates"][0]["keys"].update(basis=False), "nothing describes the tensor"),
    ],
)
def test_a_description_that_lies_is_refused(made, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        files.read(changed(tmp_path / "c", made, record=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.keys.mean"), "'0.keys.mean' is missing"),
        (lambda t: t.update({"0.keys.mean": t["0.keys.mean"][:1]}), "0.keys.mean"),
        (lambda t: t.update({"0.keys.mean": t["0.keys.mean"].astype(np.float64)}), "not float32"),
        (lambda t: t.update({"2.values.weights": t["2.values.weights"] * np.nan}), "'2.values.weights' is not finite"),
        (lambda t: t.update({"extra": np.zeros(3, np.float32)}), "nothing describes the tensor 'extra'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(made, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        files.read(changed(tmp_path / "c", made, arrays=change))


def test_what_is_no_calibration_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read(tmp_path / "none")
    files.write(tmp_path / "c", made)
    data = (tmp_path / "c").read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "short").write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged calibration"):
            files.read(tmp_path / "short")
    with pytest.raises(ValueError, match="not a calibration"):
        files.read(SMALL / "model.safetensors")
    save_file({}, tmp_path / "text", metadata={files.KEY: "{"})
    with pytest.raises(ValueError, match="metadata is not JSON"):
        files.read(tmp_path / "text")


def test_the_absorbed_model_gives_the_same_logits_and_loads(model, made, tmp_path):
    changed_model, new = absorb.absorb(model, made)
    assert absorb.difference(model, changed_model) < 1e-4
    assert new.values[0].analysis is None
    with pytest.raises(ValueError, match="other weights"):
        new.check(model)
    with pytest.raises(ValueError, match="absorbed in the model already"):
        absorb.absorb(changed_model, new)

    # Values of the new model are the old ones in the coordinates of the code.
    ids = jnp.asarray(np.random.default_rng(0).integers(0, model.architecture.vocabulary, (1, 40)), jnp.int32)
    seen = []

    def tap(layer, q, k, v):
        seen.append(np.swapaxes(np.asarray(v[0], np.float64), 0, 1))
        return q, k, v

    for each in (model, changed_model):
        each.decoder.hidden(ids, tap=tap)
    half = made.values[0]
    expected = np.einsum("hid,hed->hie", seen[0], np.asarray(half.analysis, np.float64))
    coded = seen[model.architecture.layers][..., : half.width]
    np.testing.assert_allclose(coded, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(coded[::-1], expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    inverse = np.linalg.inv(absorb.completed(half))
    kept = [
        np.asarray(quantizers.dequantize(each, quantizers.quantize(each, jnp.asarray(v, jnp.float32))), np.float64)
        for each, v in ((half, seen[0]), (new.values[0], seen[model.architecture.layers]))
    ]
    back = np.einsum("hie,hde->hid", kept[1], inverse)
    alike = np.isclose(back, kept[0], rtol=0, atol=1e-4 * np.abs(kept[0]).max()).all(-1)
    assert alike.mean() > 0.95, "rounding may decide a near tie differently, not more"
    assert not np.isclose(kept[1], kept[0], rtol=0, atol=1e-4 * np.abs(kept[0]).max()).all(-1).any()

    absorb.write_folder(changed_model, new, tmp_path / "folder")
    loaded = models.load(tmp_path / "folder", dtype="float32")
    assert absorb.difference(changed_model, loaded) == 0.0
    files.read(tmp_path / "folder" / "calibration.safetensors").check(loaded)
    with pytest.raises(ValueError, match="holds a model already"):
        absorb.write_folder(changed_model, new, tmp_path / "folder")

    wrong = dataclasses.replace(half, analysis=jnp.swapaxes(absorb.completed(half), 1, 2)[:, : half.width])
    broken, _ = absorb.absorb(model, dataclasses.replace(made, values=(wrong, *made.values[1:])))
    assert absorb.difference(model, broken) < 1e-3, "any invertible basis is absorbed exactly"


def test_transformers_reads_the_absorbed_folder(model, made, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    absorb.write_folder(*absorb.absorb(model, made), tmp_path / "folder")
    ids = np.random.default_rng(0).integers(0, model.architecture.vocabulary, (1, 40))
    expected = np.asarray(model.decoder(jnp.asarray(ids, jnp.int32))[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(found[:, ::-1] - expected).max() > 1e-2 * np.abs(expected).max()


def test_exact_keys_beside_coded_values_are_scored(model, made):
    exact, half = quantizers.Exact(dim=DIM, dtype="float32"), quantizers.Exact(dim=DIM)
    tokens = np.random.default_rng(0).integers(0, model.architecture.vocabulary, (1, 25))
    scores = evaluate.compare(
        model.decoder, tokens,
        lambda rows: model.decoder.init_cache(exact, exact, batch=rows, capacity=24, dtype="float32"),
        lambda rows: model.decoder.init_cache([half] * LAYERS, made.values, batch=rows, capacity=24),
        stepwise=0,
    )  # fmt: skip
    assert scores.kl.mean() > 1e-4


def test_a_template_for_all_layers_makes_one_stack(model, measured, found):
    shared = make.choose(model, measured, found, bits=3.0, layer_groups=1)
    held = model.decoder.init_cache(shared.keys, shared.values, batch=1, capacity=64)
    assert len(held.stacks) == 1
    assert 8 * held.bytes_per_token / (2 * model.architecture.dim) == shared.bits <= 3.0
    with pytest.raises(ValueError, match="layer_groups must be from 1 to 3"):
        make.choose(model, measured, found, bits=3.0, layer_groups=4)


def test_large_models_are_written_in_shards(model, made, tmp_path, monkeypatch):
    monkeypatch.setattr(absorb, "_SHARD", 100_000)
    absorb.write_folder(model, made, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert absorb.difference(model, models.load(tmp_path, dtype="float32")) == 0.0


def test_methods_are_scored_as_the_model_scores_them(model, measured, found, made):
    row = np.random.default_rng(5).integers(0, model.architecture.vocabulary, 48)
    points = tradeoff.points(model, measured, found, row)
    assert [point.method for point in points].count("calibrated") == len(tradeoff.BITS)
    logits = np.asarray(jax.nn.log_softmax(model.decoder(jnp.asarray(row[None], jnp.int32))[0][0]))
    exact = np.exp(-np.mean(logits[np.arange(47), row[1:]]))
    assert points[0].perplexity == pytest.approx(exact, rel=1e-5)
    ours = [point for point in points if point.method == "calibrated"]
    assert [point.bits for point in ours] == pytest.approx(tradeoff.BITS, abs=8 / (2 * LAYERS * DIM))
    assert ours[-1].kl < ours[0].kl
    theirs = {round(point.bits, 4): point.kl for point in points if point.method == "TurboQuant"}
    assert set(theirs) == {2.5, 3.0, 4.5}, "codes and a scale of 16 bits for 32 coordinates"
    deleted = {round(point.bits, 4): point.kl for point in points if point.method == "directions deleted"}
    assert set(deleted) == {4.0}
    assert deleted[4.0] > ours[-1].kl
    lost = tradeoff.losses(model, measured, made, row)
    swapped = tradeoff.losses(model, measured, dataclasses.replace(made, keys=made.keys[::-1]), row)
    assert (lost.measured > 0).all()
    np.testing.assert_array_equal(swapped.measured[1], lost.measured[1])
    assert (swapped.measured[[0, 2], 0] != lost.measured[[0, 2], 0]).all()


def test_pictures_show_what_was_chosen(model, measured, found, made, tmp_path):
    pytest.importorskip("matplotlib")
    lost = tradeoff.Losses(np.full((LAYERS, 2), 1e-3), np.full((LAYERS, 2), 2e-3))
    points = [
        tradeoff.Point("uncompressed", 16.0, 5.0, 0.0), tradeoff.Point("a", 2.0, 6.0, 0.1),
        tradeoff.Point("b", 2.0, 7.0, 0.2),
    ]  # fmt: skip
    first = pictures.write(tmp_path / "first", found, made, lost, points)
    assert [path.name for path in first] == [
        "spectra.png",
        "bits.png",
        "predicted_loss.png",
        "losses.png",
        "methods.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in first)
    changed = make.choose(model, measured, found, bits=3.5)
    other = pictures.write(tmp_path / "other", found, changed, lost, points[:2])
    alike = [mine.read_bytes() == theirs.read_bytes() for mine, theirs in zip(first, other, strict=True)]
    assert alike == [True, False, False, True, False], "bits and losses follow the budget, the spectra do not"


def test_pictures_ask_for_matplotlib_before_the_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["calibrate", "-o", str(tmp_path / "c"), "--report", str(tmp_path / "r")])
    assert isinstance(result.exception, RuntimeError)
    assert 'pip install "jaxquant[plot]"' in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("coder", [[], ["--quantizer", "trellis", "--states", "16"]], ids=["codebooks", "trellis"])
def test_calibrate_eval_convert(tmp_path, coder):
    def run(*arguments):
        result = CliRunner().invoke(cli.app, [*arguments, "--json"])
        if result.exception is not None:
            raise result.exception
        return json.loads(result.stdout)

    made = run("calibrate", "--rows", "2", "--seq-len", "256", "--bits", "2.5", *coder, "-o", str(tmp_path / "c"))
    assert made["bytes"] == (tmp_path / "c").stat().st_size
    ringed = [half.code is not None for half in files.read(tmp_path / "c").values]
    assert any(ringed) == bool(coder)
    assert 2.4 < made["bits"] <= 2.5
    assert made["tokens"] == 512
    score = ["eval", "--rows", "1", "--seq-len", "96", "--start", "4000"]
    ours = run(*score, "--calibration", str(tmp_path / "c"))
    assert ours["compressed"]["bytes_per_token"] * 8 / 128 == made["bits"] < 2.75
    assert ours["compressed"]["kl"] > 0
    folder = run("convert", "--calibration", str(tmp_path / "c"), "-o", str(tmp_path / "folder"))
    assert folder["largest_logit_difference"] < 1e-4
    with pytest.raises(ValueError, match="other weights"):
        run(*score, "--model", folder["folder"], "--calibration", str(tmp_path / "c"))
    with pytest.raises(ValueError, match="does not hold one byte of gain"):
        run("calibrate", "--rows", "2", "--seq-len", "256", "--bits", "0.01", "-o", str(tmp_path / "d"))
