"""Converted folders: the same results as what they were made from, and files that lie.

The model is a random llama with a calibration whose numbers are random too: what is absorbed is exact for any basis.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxquant import attention, cli, models, packed_weights, prepared
from jaxquant.calibrate import files, weights
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.mixed import Mixed

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16


def mixed(seed: int) -> Mixed:
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(KV_HEADS)])
    levels = [np.sort(rng.normal(size=(KV_HEADS, 8, 2**width)), axis=-1) for width in (4, 2)]
    return Mixed(
        mean=jnp.asarray(0.1 * rng.normal(size=(KV_HEADS, DIM)), jnp.float32),
        analysis=jnp.asarray(basis, jnp.float32),
        synthesis=jnp.asarray(basis, jnp.float32),
        weights=jnp.full((KV_HEADS, DIM), 1 / DIM),
        levels=tuple(jnp.asarray(table, jnp.float32) for table in levels),
        widths=((4, 8), (2, 8)),
        dim=DIM,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = model_folders.write_folder(tmp_path_factory.mktemp("model"), "llama")
    np.save(made / "ids.npy", np.random.default_rng(0).integers(0, 40, 300))
    return made


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def calibration(folder, model, tmp_path_factory) -> Path:
    keys, values = ([mixed(10 * half + layer) for layer in range(LAYERS)] for half in range(2))
    made = files.Calibration(
        keys=tuple(keys), values=tuple(values), fingerprint=files.fingerprint(model), setting={"made": "up"}
    )
    path = tmp_path_factory.mktemp("calibration") / "c"
    files.write(path, made)
    return path


def run(*arguments) -> dict:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def converted(folder, calibration, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "folder"
    report = run(
        "convert", "--model", folder, "--calibration", calibration, "--sinks", 2, "--window", 3, "--weights", 6,
        "--all-linear", "-o", out,
    )  # fmt: skip
    assert report["largest_logit_difference"] < 1e-4
    assert report["coded_bytes"] < 0.5 * report["coded_bytes_in_16_bits"]
    assert report["weights_file_bytes"] == (out / packed_weights.FILE).stat().st_size
    return out


def score(folder: Path, *more) -> dict:
    tokens = ["--tokens", folder / "ids.npy", "--rows", 1, "--seq-len", 40, "--chunk", 20]
    return run("eval", "--model", folder, *tokens, *more)


def test_what_the_folder_says_is_what_the_calibration_says(converted, folder):
    shutil.copyfile(folder / "ids.npy", converted / "ids.npy")
    ours = score(converted)
    theirs = score(converted, "--calibration", converted / "calibration.safetensors", "--sinks", 2, "--window", 3)
    assert ours["compressed"] == theirs["compressed"]
    assert "as the folder says, 2 sinks, window 3" in ours["setting"]
    assert ours["compressed"] != score(converted, "--bits-k", 4)["compressed"], "options take the place of the folder"


def leaves(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_report_measures_what_the_folder_says(converted, folder, tmp_path):
    """The weights in codes, the calibration and its sinks and window; a folder that says nothing has no such row."""
    text = ["--tokens", folder / "ids.npy", "--rows", 1, "--seq-len", 40, "--chunk", 20, "--needle-rows", 0]
    text += ["--methods", "turboquant", "--bits", "K4V4", "--sinks", 2, "--window", 3, "--max-kl", 9, "--min-top1", 0]
    found = run("report", "--model", converted, *text, "--hbm", 1, "-o", tmp_path / "own.html")
    plain = run("report", "--model", folder, *text, "-o", tmp_path / "plain.html")
    scored = score(converted)["compressed"]
    own = "converted 2 sinks, window 3"
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {"turboquant K4V4", own}
    assert [rows[own][name] for name in ("kl", "bytes_per_token")] == pytest.approx(
        [scored[name] for name in ("kl", "bytes_per_token")],
        rel=0.02,  # the report's baseline holds 16 bits
    )
    assert rows[own]["kl"] != rows["turboquant K4V4"]["kl"]
    assert found["recommended"] == found["sensitivity"]["name"] == own
    assert len(found["sensitivity"]["keys"]) == LAYERS
    assert min(found["sensitivity"]["keys"]) > 0
    ready = prepared.read(converted)
    for batch, capacity in ((1, 32_768), (3, 100)):
        assert ready.nbytes(batch=batch, capacity=capacity) == ready.cache(batch=batch, capacity=capacity).nbytes
    assert found["plan"]["caches"][own]["cache"] == ready.cache(batch=1, capacity=32_768).nbytes
    assert [row["name"] for row in plain["rows"]] == ["turboquant K4V4"]


def test_a_prepared_cache_is_the_one_that_init_makes(converted):
    made = files.read(converted / "calibration.safetensors")
    model = models.load(converted)
    want = model.decoder.init_cache(made.keys, made.values, batch=3, capacity=20, sinks=2, window=3)
    got = prepared.read(converted).cache(batch=3, capacity=20)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert leaves(got) == leaves(want)
    assert [leaf.shape for leaf in jax.tree.leaves(got)] == [leaf.shape for leaf in jax.tree.leaves(want)]
    x = jnp.ones((3, 5, KV_HEADS, DIM))
    q = jnp.ones((3, 5, HEADS, DIM))
    out = [attention.prefill_attention(q, x, x, held, 1)[0] for held in (got, want)]
    assert leaves(out[0]) == leaves(out[1])
    other = model.decoder.init_cache(made.values, made.keys, batch=3, capacity=20, sinks=2, window=3)
    assert leaves(other) != leaves(want)
    with pytest.raises(ValueError, match="capacity 3, got 1 and 2"):
        prepared.read(converted).cache(batch=1, capacity=2)
    codes = got.stacks[0].keys.codes.codes
    again = prepared.read(converted).cache(batch=3, capacity=20)
    codes.delete()
    assert np.asarray(again.stacks[0].keys.codes.codes).size, "caches share no buffer that a step could donate"


def test_packed_weights_are_the_weights_bit_for_bit(converted, tmp_path):
    plain, packed = models.load(converted, dtype="float32"), packed_weights.load(converted, dtype="float32")
    assert leaves(models.loading.nnx.state(plain.decoder)) == leaves(models.loading.nnx.state(packed.decoder))
    small = tmp_path / "small"
    shutil.copytree(converted, small)
    (small / "model.safetensors").unlink()
    few, all_of_it = (run("run", "A B C D", "--model", each, "--max-tokens", 3) for each in (small, converted))
    assert (few["text"], few["cache_bytes"]) == (all_of_it["text"], all_of_it["cache_bytes"])


def test_transformers_reads_the_converted_weights(converted):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.random.default_rng(0).integers(0, 40, (1, 20))
    ours = np.asarray(packed_weights.load(converted, dtype="float32").decoder(jnp.asarray(ids, jnp.int32))[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - ours).max() < 1e-4 * np.abs(ours).max()
    assert np.abs(found[:, ::-1] - ours).max() > 1e-2 * np.abs(ours).max()


def error(model, made) -> float:
    """Relative squared error of W_V and W_O."""
    parts = []
    for mine, theirs in zip(model.decoder.layers, made.decoder.layers, strict=True):
        for old, new in zip(weights._kernels(mine), weights._kernels(theirs), strict=True):
            parts.append((np.sum((new - old) ** 2), np.sum(old**2)))
    lost, whole = np.sum(parts, axis=0)
    return lost / whole


def test_bits_are_spent_where_they_save_most(model):
    """Gaussian Lloyd-Max errors bound the codes; a direction that nobody reads gets none."""
    for bits, bound in ((2, 0.118), (4, 0.0096), (8, 0.0001)):
        made, packed = weights.compress(model, bits)
        widths = np.concatenate([one.bits for one in packed.values()])
        assert widths.mean() == pytest.approx(bits)
        assert error(model, made) < 1.3 * bound
    graph, state = models.loading.nnx.split(model.decoder)
    decoder = models.loading.nnx.merge(graph, state, copy=True)
    kernel = decoder.layers[0].self_attn.o_proj.kernel
    unread = np.array(kernel[...])
    unread.reshape(KV_HEADS, -1, DIM, unread.shape[1])[1, :, 3] = 0
    kernel[...] = jnp.asarray(unread)
    _, packed = weights.compress(dataclasses.replace(model, decoder=decoder), 3)
    values = packed["model.layers.0.self_attn.v_proj.weight"].bits.reshape(KV_HEADS, DIM)
    assert values[1, 3] == 0
    assert (values > 0).sum() == values.size - 1
    nothing, _ = weights.compress(model, 0)
    assert error(model, nothing) == 1


def test_a_matrix_comes_back_from_its_codes():
    kernel = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)  # one shape is compiled for both axes
    for axis in (0, 1):
        bits = np.arange(kernel.shape[1 - axis]) % 9
        found = weights.unpack(weights.pack(kernel, bits, axis=axis), kernel.shape)
        errors = np.sum((found - kernel) ** 2, axis=axis) / np.sum(kernel**2, axis=axis)
        assert (errors[bits == 0] == 1).all()
        assert errors[bits == 2].mean() < 0.2
        assert errors[bits == 8].max() < 1e-3
        assert np.sum((found.T.reshape(kernel.shape) - kernel) ** 2) > np.sum(kernel**2)


def test_cutting_keeps_whole_directions(model):
    half = weights.cut(model, 8)
    for layer in half.decoder.layers:
        values, outputs = weights._kernels(layer)
        assert (values.reshape(-1, KV_HEADS, DIM)[:, :, : DIM // 2] != 0).all()
        assert not values.reshape(-1, KV_HEADS, DIM)[:, :, DIM // 2 :].any()
        assert not outputs.reshape(HEADS, DIM, -1)[:, DIM // 2 :].any()
    assert error(model, weights.cut(model, 16)) < 1e-5


def forged(path: Path, key: str, change, tensors=lambda _: None) -> None:
    with v3.open(path) as reader:
        held = {name: reader.read(name) for name in reader.names}
        record = json.loads(reader.metadata[key])
    change(record)
    tensors(held)
    path.write_bytes(v3.encode(held, metadata={key: json.dumps(record)}))


def store(record: dict) -> dict:
    return record["cache"]["fields"]["stacks"]["items"][0]["fields"]["keys"]["fields"]


LIES = {
    "another version": (lambda r: r.update(version=2), UnsupportedError, "version"),
    "other weights": (lambda r: r.update(weights="x"), UnsupportedError, "other weights"),
    "another class": (lambda r: store(r)["quantizer"].update({"class": "os:system"}), UnsupportedError, "a caller"),
    "a missing array": (lambda r: store(r).update(window={"array": "x"}), CorruptError, "does not fit together"),
    "no cache": (lambda r: r.update(cache={"value": 3}), CorruptError, "does not fit together"),
    "places": (lambda r: r["cache"]["fields"].update(places=[[0, 0]] * 2), CorruptError, "do not fill"),
    "other sinks": (lambda r: store(r).update(sinks={"array": "cache/length"}), CorruptError, "does not fit together"),
    "codes": (lambda r: store(r).update(codes={"array": "cache/length"}), CorruptError, "codes have another shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_the_cache_are_refused(lie, converted, tmp_path):
    copy = shutil.copytree(converted, tmp_path / "copy")
    change, error, match = LIES[lie]
    forged(copy / prepared.FILE, prepared.KEY, change)
    with pytest.raises(error, match=match):
        prepared.read(copy)


NAME = "model.layers.1.self_attn.v_proj.weight"
WRONG = {
    "another version": (lambda r: r.update(version=2), lambda t: None, UnsupportedError, "version"),
    "an axis": (lambda r: r["axes"].update({NAME: 2}), lambda t: None, CorruptError, "axes"),
    "a missing tensor": (lambda r: None, lambda t: t.pop("model.norm.weight"), CorruptError, "model.norm.weight"),
    "widths": (lambda r: None, lambda t: t.update({f"{NAME}/bits": t[f"{NAME}/bits"] * 0 + 9}), CorruptError, "9 bits"),
    "counts": (lambda r: None, lambda t: t.update({f"{NAME}/bits": t[f"{NAME}/bits"] * 0 + 6}), CorruptError, "must"),
    "a dtype": (
        lambda r: None,
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float64)}),
        CorruptError,
        "must be float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", WRONG)
def test_weights_that_do_not_fit_are_refused(lie, converted, tmp_path):
    copy = shutil.copytree(converted, tmp_path / "copy")
    change, tensors, error, match = WRONG[lie]
    forged(copy / packed_weights.FILE, packed_weights.KEY, change, tensors)
    with pytest.raises(error, match=match):
        packed_weights.load(copy)


def test_damage_is_found(converted, tmp_path):
    copy = shutil.copytree(converted, tmp_path / "copy")
    for name, read in ((prepared.FILE, prepared.read), (packed_weights.FILE, packed_weights.load)):
        data = (copy / name).read_bytes()
        for cut in (0, 10, len(data) // 2, len(data) - 1):
            (copy / name).write_bytes(data[:cut])
            with pytest.raises(CodecError):
                read(copy)
        (copy / name).write_bytes(data)
        with pytest.raises(LimitError, match="exceed the limit"):
            read(copy, limits=Limits(decoded_bytes=100))
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(copy)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "needs --calibration, --weights, or both"),
        (["--all-linear", "--calibration", "c"], "--all-linear needs --weights"),
        (["--weights", "9"], "bits must be from 0 to 8, got 9"),
        (["--weights", "2.5", "--all-linear"], "a whole number from 1 to 8"),
    ],
)
def test_what_cannot_be_converted_is_refused(folder, tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        run("convert", "--model", folder, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
