"""Files and the command line: whole or not at all, from pipes and mappings, one line for every error."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import typer.testing

from jaxquant import qatc_cli
from jaxquant.codecs import atomic, files, qatc
from jaxquant.codecs.errors import CorruptError

RUNNER = typer.testing.CliRunner()


@pytest.fixture
def raw(tmp_path) -> pathlib.Path:
    path = tmp_path / "values.f32"
    np.random.default_rng(0).standard_normal(50_000).astype(np.float32).tofile(path)
    return path


def run(*arguments: object, status: int = 0, data: bytes | None = None):
    result = RUNNER.invoke(qatc_cli.app, [str(argument) for argument in arguments], input=data)
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize("options", [[], ["--profile", "parity"], ["--chunk", "7000", "--threads", "2"]])
def test_round_trip(raw, tmp_path, options):
    encoded, decoded = tmp_path / "x.qatc", tmp_path / "y.f32"
    summary = json.loads(run("encode", raw, encoded, "--dtype", "f32", "--json", *options).stdout)
    assert (summary["raw_bytes"], summary["bytes"]) == (200_000, encoded.stat().st_size)
    run("decode", encoded, decoded)
    assert decoded.read_bytes() == raw.read_bytes()
    assert json.loads(run("verify", encoded, "--json").stdout)["valid"] is True


def test_streamed_file_is_the_same_as_in_memory(raw, tmp_path):
    encoded = tmp_path / "x.qatc"
    files.encode_file(str(raw), str(encoded), dtype="f32", chunk=7000)
    assert encoded.read_bytes() == qatc.encode(np.fromfile(raw, np.float32), chunk=7000)


def test_npy_keeps_dtype_and_refuses_bfloat16(tmp_path):
    source, encoded, decoded = tmp_path / "x.npy", tmp_path / "x.qatc", tmp_path / "y.npy"
    np.save(source, np.arange(100, dtype=np.float16))
    run("encode", source, encoded)
    run("decode", encoded, decoded)
    assert decoded.read_bytes() == source.read_bytes()
    encoded.write_bytes(qatc.encode(np.ones(3, ml_dtypes.bfloat16)))
    assert "cannot hold bfloat16" in run("decode", encoded, decoded, status=1).output
    assert decoded.read_bytes() == source.read_bytes()


def test_pipes(raw):
    program = [sys.executable, "-c", "from jaxquant.qatc_cli import app; app()"]
    encoded = subprocess.run(
        [*program, "encode", "-", "-", "--dtype", "f32"], input=raw.read_bytes(), capture_output=True, check=True
    ).stdout
    assert encoded == qatc.encode(np.fromfile(raw, np.float32))
    decoded = subprocess.run([*program, "decode", "-", "-"], input=encoded, capture_output=True, check=True).stdout
    assert decoded == raw.read_bytes()


def test_inspect(raw, tmp_path):
    encoded = tmp_path / "x.qatc"
    run("encode", raw, encoded, "--dtype", "f32", "--chunk", "20000")
    found = json.loads(run("inspect", encoded, "--json").stdout)
    assert (found["format"], found["values"], len(found["chunks"])) == ("QATC v2", 50_000, 3)
    assert found["nbytes"] == 32 + sum(4 + chunk["nbytes"] for chunk in found["chunks"])
    table = run("inspect", encoded).stdout
    assert "50,000" in table
    assert "byte-plane-zstd" in table


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["encode", "{raw}", "{out}"], 1, "dtype: raw values need one"),
        (["encode", "{raw}", "{out}", "--dtype", "float99"], 1, "dtype: 'float99'"),
        (["encode", "{raw}", "{out}", "--dtype", "i4"], 1, 'profile="balanced"'),
        (["encode", "{raw}", "{out}", "--dtype", "f32", "--shape", "3,4"], 1, r"shape: \(3, 4\)"),
        (["encode", "{raw}.no", "{out}", "--dtype", "f32"], 1, "No such file"),
        (["encode", "{raw}", "{out}/no/where", "--dtype", "f32"], 1, "No such file|Not a directory"),
        (["decode", "{raw}", "{out}"], 1, "magic"),
        (["encode", "{raw}", "{out}", "--profile", "zip"], 2, "none of v2"),
        (["encode", "{raw}", "{out}", "--dtype", "f32", "--shape", "a"], 2, "no list of sizes"),
        (["encode", "{raw}", "-", "--dtype", "f32", "--json"], 2, "cannot hold"),
        (["encode", "{raw}", "{out}", "--threads", "0"], 2, "threads"),
        (["encode", "{raw}"], 2, "OUT"),
    ],
)
def test_errors(raw, tmp_path, arguments, status, match):
    out = tmp_path / "out"
    result = run(*(part.format(raw=raw, out=out) for part in arguments), status=status)
    assert re.search(match, result.output)
    if status == 1:
        assert result.output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [raw.name]


def test_damage_leaves_the_old_file(raw, tmp_path):
    encoded, target = tmp_path / "x.qatc", tmp_path / "y.f32"
    run("encode", raw, encoded, "--dtype", "f32", "--chunk", "1000")
    damaged = bytearray(encoded.read_bytes())
    damaged[-5] ^= 4
    encoded.write_bytes(damaged)
    target.write_bytes(b"old")
    for verb in (["decode", encoded, target], ["verify", encoded]):
        assert "container, offset 24: checksum" in run(*verb, status=1).output
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["values.f32", "x.qatc", "y.f32"]


def test_damage_found_after_values_were_written(raw, tmp_path, monkeypatch):
    encoded, target = tmp_path / "x.qatc", tmp_path / "y.f32"
    values = np.fromfile(raw, np.float32)
    encoded.write_bytes(qatc.encode(values, chunk=1000))
    target.write_bytes(b"old")

    def breaks(view, limits, threads):
        yield values[:1000]
        raise CorruptError("chunk 1: damaged")

    monkeypatch.setattr(files.v2, "pieces", breaks)
    with pytest.raises(CorruptError):
        files.decode_file(str(encoded), str(target))
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3


def interrupted() -> bytes:
    raise KeyboardInterrupt


@pytest.mark.parametrize("unnamed", [True, False])
def test_replacing(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        monkeypatch.setattr(atomic, "_unnamed", lambda directory: None)
    path, link = tmp_path / "x", tmp_path / "link"
    with atomic.replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    link.symlink_to(path)
    with atomic.replacing(link) as file:
        file.write(b"two")
    assert link.is_symlink()
    assert path.read_bytes() == b"two"
    with pytest.raises(ValueError, match="whence"), atomic.replacing(path) as file:
        file.seek(file.write(b"three"), 9)
    with pytest.raises(KeyboardInterrupt), atomic.replacing(path) as file:
        file.write(interrupted())
    assert path.read_bytes() == b"two"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "x"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


KILLED = """
import sys
from jaxquant.codecs import files
print("ready", flush=True)
while True:
    files.encode_file(sys.argv[1], sys.argv[2], dtype="f32", chunk=500, threads=2)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="needs files without a name")
def test_kill_leaves_the_old_file_or_the_new_one(raw, tmp_path):
    target = tmp_path / "x.qatc"
    target.write_bytes(b"old")
    new = qatc.encode(np.fromfile(raw, np.float32), chunk=500)
    found = set()
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", KILLED, raw, target], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.005 + 0.04 * attempt)
            process.send_signal(signal.SIGKILL)
        content = target.read_bytes()
        assert content in (b"old", new)
        found.add(content == new)
        names = {path.name for path in tmp_path.iterdir()} - {"values.f32", "x.qatc"}
        # Between its two last steps a complete file may have a hidden name, never an incomplete one.
        assert all((tmp_path / name).read_bytes() == new for name in names)
        for name in names:
            (tmp_path / name).unlink()
    assert True in found


def test_progress_reaches_the_end(raw, tmp_path):
    encoded, seen = tmp_path / "x.qatc", []

    def report(done: int, total: int) -> None:
        seen.append((done, total))

    files.encode_file(str(raw), str(encoded), dtype="f32", chunk=10_000, progress=report)
    files.decode_file(str(encoded), str(tmp_path / "y"), progress=report)
    files.verify_file(str(encoded), progress=report)
    assert seen.count((200_000, 200_000)) >= 3
    assert all(done <= total for done, total in seen)


def test_numcodecs_codec():
    numcodecs = pytest.importorskip("numcodecs")
    from jaxquant.codecs import numcodecs_qatc

    numcodecs.registry.register_codec(numcodecs_qatc.QATC)
    codec = numcodecs.get_codec({"id": "qatc", "dtype": "bf16"})
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.empty_like(values)
    codec.decode(codec.encode(values), out=out)
    assert out.tobytes() == values.tobytes()
    assert numcodecs.get_codec(codec.get_config()).get_config() == codec.get_config()


def test_standard_input_of_any_kind(raw):
    assert qatc.decode(io.BytesIO(qatc.encode(np.fromfile(raw, np.float32)))).tobytes() == raw.read_bytes()


@pytest.mark.parametrize("profile", ["fast", "balanced"])
def test_v3_is_written_as_it_is_made(tmp_path, profile):
    source, target = tmp_path / "values.npy", tmp_path / "x.qatc"
    values = np.random.default_rng(0).standard_normal((1 << 16, 64), np.float32)
    np.save(source, values)
    found = files.encode_file(str(source), str(target), profile=profile, threads=1)
    assert target.read_bytes() == qatc.encode(values, profile=profile)
    assert found["bytes"] == target.stat().st_size
    tracemalloc.start()
    files.encode_file(str(source), str(target), profile=profile, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    qatc.encode(np.load(source, mmap_mode="r"), profile=profile, threads=1)
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < found["bytes"] < whole  # memory does not grow with the file, as it does for bytes


def test_v3_into_a_pipe(raw):
    program = [sys.executable, "-c", "from jaxquant.qatc_cli import app; app()"]
    encoded = subprocess.run(
        [*program, "encode", "-", "-", "--dtype", "f32", "--profile", "fast", "--shape", "500,100"],
        input=raw.read_bytes(),
        capture_output=True,
        check=True,
    ).stdout
    assert encoded == qatc.encode(np.fromfile(raw, np.float32).reshape(500, 100), profile="fast")
