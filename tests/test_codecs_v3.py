import concurrent.futures
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3 import chunks, coders, dtypes, halves, layout, nibbles, planes, symbols

DATA = Path(__file__).parent / "data" / "v3"
BF16 = np.dtype(ml_dtypes.bfloat16)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def gaussian(shape: tuple[int, ...], dtype: np.dtype = BF16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(shape[-1]))
    return (rng.standard_normal(shape) * scale).astype(dtype)


def only(result: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    assert isinstance(result, np.ndarray)
    return result


def named(result: np.ndarray | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    assert isinstance(result, dict)
    return result


def test_same_can_fail():
    a = np.array([np.nan, 0.0], np.float32)
    assert same(a, a.copy())
    assert not same(a, a.astype(np.float64))
    assert not same(np.array([0.0]), np.array([-0.0]))
    assert not same(a, a.reshape(2, 1))


@st.composite
def tensors(draw) -> np.ndarray:
    dtype = dtypes.named(draw(st.sampled_from(list(dtypes.FORMATS))))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 100]), max_size=4)))
    if np.prod(shape, dtype=np.int64) > 200_000:
        shape = shape[:2]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 256, size, dtype=np.uint8)  # every bit pattern: NaN payloads, infinities, subnormals
    kind = draw(st.sampled_from(["random", "constant", "few", "ramp", "repeated", "normal"]))
    if kind == "constant":
        raw[:] = draw(st.integers(0, 255))
    elif kind == "few":
        raw &= 3
    elif kind == "ramp":
        raw = np.cumsum(raw & 1, dtype=np.uint8)
    elif kind == "normal" and dtype.kind in "fcV" and "int" not in dtype.name:
        with np.errstate(all="ignore"):
            raw = rng.standard_normal(size // dtype.itemsize).astype(dtype).view(np.uint8)
    values = raw.view(dtype).reshape(shape) if size else np.zeros(shape, dtype)
    if kind == "repeated" and shape:
        values = values[rng.integers(0, max(1, shape[0] // 4), shape[0])] if shape[0] else values
    return values


@settings(deadline=None, max_examples=120)
@given(
    tensors(),
    st.sampled_from(["fast", "balanced", "small"]),
    st.sampled_from([1, 64, 1000, 1 << 14, 1 << 21]),
    st.data(),
)
def test_round_trip(values: np.ndarray, profile: str, chunk: int, data: st.DataObject):
    axis = data.draw(st.integers(0, max(0, values.ndim - 1)))
    chunk = max(chunk, values.nbytes // 50)
    coded = v3.encode(values, profile=profile, chunk=chunk, axis=axis)
    assert same(only(v3.decode(coded)), values)
    tokens = values.shape[axis] if values.ndim else 1
    start = data.draw(st.integers(0, tokens))
    stop = data.draw(st.integers(start, tokens))
    with v3.open(coded) as reader:
        reader.verify()
        if values.ndim:
            part = reader.read("", start, stop)
            assert same(part, values[(slice(None),) * axis + (slice(start, stop),)])


KINDS = {
    "raw": (lambda rng: rng.integers(0, 256, (64, 64), dtype=np.uint8), chunks.RAW, 0),
    "constant": (lambda rng: np.full((64, 64), np.nan, np.float32), chunks.CONSTANT, 0),
    "planes": (lambda rng: rng.integers(0, 9, (64, 64), dtype=np.int32), chunks.PLANES, planes.NONE),
    "delta": (
        lambda rng: np.cumsum(rng.integers(0, 3, (256, 64)), axis=0, dtype=np.int32) * 77 + 12345,
        chunks.PLANES,
        planes.DELTA,
    ),
    "delta twice": (
        lambda rng: (np.arange(512)[:, None] ** 2 * 3 + rng.integers(0, 2, (512, 32))).astype(np.uint32),
        chunks.PLANES,
        planes.DELTA_TWICE,
    ),
    "smooth": (
        lambda rng: np.sin(np.arange(512)[:, None] * 0.002 + np.arange(64)).astype(np.float32),
        chunks.PLANES,
        planes.DELTA_TWICE | planes.ORDERED,
    ),
    "symbols 4": (lambda rng: gaussian((512, 64)), chunks.SYMBOLS, 4),
    "symbols 4, f32": (lambda rng: gaussian((512, 64), np.dtype("f4")), chunks.SYMBOLS, 4),
    "symbols 4, sorted": (
        lambda rng: gaussian((4096, 128)) + np.where(rng.random(128) < 0.5, 99, 0).astype(BF16),
        chunks.SYMBOLS,
        4 | chunks.SORTED,
    ),
    "symbols 4, f64": (lambda rng: gaussian((512, 64), np.dtype("f8")), chunks.SYMBOLS, 4),
    "symbols 8": (lambda rng: gaussian((512, 64), np.dtype("f2")), chunks.SYMBOLS, 8),
    "symbols 8, fp8": (
        lambda rng: gaussian((512, 64), np.dtype(ml_dtypes.float8_e4m3fn)),
        chunks.SYMBOLS,
        8,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_chosen_and_exact(name: str):
    make, kind, parameter = KINDS[name]
    values = make(np.random.default_rng(0))
    coded = v3.encode(values, profile="small" if "sorted" in name else "balanced")
    assert same(only(v3.decode(coded)), values)
    assert tuple(coded[layout.HEADER_BYTES :][:2]) == (kind, parameter)


@pytest.mark.parametrize(("rows", "cols"), [(511, 64), (33, 96), (2049, 32)])
@pytest.mark.parametrize("dtype", [BF16, np.dtype("f4")])
def test_nibbles_keep_escapes_and_odd_rows(rows: int, cols: int, dtype: np.dtype):
    values = gaussian((rows, cols), dtype)
    values[::50, ::3] = np.array(0, dtype)
    values[7, 1], values[8, 2], values[-1, -1] = np.nan, np.inf, -1e-30
    coded = v3.encode(values, profile="fast")
    assert coded[layout.HEADER_BYTES] == chunks.NIBBLES
    assert same(only(v3.decode(coded)), values)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([4, 8]),
    st.integers(0, 2**32 - 1),
)
def test_splits_are_exact_for_any_bits_and_any_model(rows: int, cols: int, itemsize: int, shift: int, seed: int):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, rows * cols * itemsize, dtype=np.uint8).view(f"u{itemsize}")
    low = np.zeros_like(words) if itemsize == 2 else words & words.dtype.type((1 << (8 * itemsize - 16)) - 1)
    base = rng.integers(0, 256, cols, dtype=np.uint8)
    out = low.copy()
    packed, noise, escapes = nibbles.split(words, base)
    nibbles.merge(packed, noise, base, through_bytes(escapes, words.size), out)
    assert np.array_equal(out, words)
    tile = next(tile for tile in (8, 4, 2, 1) if cols % tile == 0)
    against = rng.choice(np.array([0, 0x8000], np.uint16), cols)
    bases = rng.integers(0, 1 << (16 - shift), cols).astype(np.uint16)
    order = rng.permutation(cols) if seed % 2 else None
    model = symbols.Model(shift, bases, against, tile, order)
    out = low.copy()
    coded, bits, escapes = symbols.split(words, model)
    symbols.merge(coded, bits, model, through_bytes(escapes, words.size), out)
    assert np.array_equal(out, words)


def through_bytes(escapes: halves.Escapes, words: int) -> halves.Escapes:
    return halves.unpack_escapes(halves.pack_escapes(escapes), words)


def test_signs_follow_the_previous_token_or_the_channel():
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((3000, 96))).astype(BF16).view(np.uint16)
    x[:, :32] |= np.cumsum(rng.random((3000, 32)) < 0.05, axis=0).astype(np.uint16) << 15  # rarely changes
    x[:, 32:64] |= np.uint16(0x8000)  # always negative
    coded = v3.encode(x.view(BF16))
    assert same(only(v3.decode(coded)), x.view(BF16))
    random_sign = x ^ (rng.integers(0, 2, x.shape).astype(np.uint16) << 15)
    saved = len(v3.encode(random_sign.view(BF16))) - len(coded)
    assert saved > 0.5 * 64 / 96 * x.size / 8  # over half a bit of the sign for two thirds of the channels


@pytest.mark.parametrize("word", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("predictor", [planes.NONE, planes.DELTA, planes.DELTA_TWICE, planes.XOR])
def test_differences_of_any_words_come_back_and_are_those_of_the_description(word, predictor):
    bits, rng = 8 * np.dtype(word).itemsize, np.random.default_rng(predictor)
    words = rng.integers(0, 2**bits, (40, 3), dtype=np.uint64).astype(word)
    words[:4, 0] = [0, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    for ordered in (0, planes.ORDERED):
        changed = planes.difference(words.reshape(-1), 3, predictor | ordered)
        assert same(planes.undo_difference(changed, 3, predictor | ordered).reshape(40, 3), words)
    if predictor == planes.DELTA:
        half, column = 2 ** (bits - 1), words[:, 1].tolist()
        steps = [(b - a + half) % (2 * half) - half for a, b in itertools.pairwise(column)]
        found = planes.difference(words.reshape(-1), 3, predictor).reshape(40, 3)[1:, 1]
        assert found.tolist() == [2 * step if step >= 0 else -2 * step - 1 for step in steps]  # zigzag


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_prefix_xor(rows: int, cols: int, seed: int):
    x = np.random.default_rng(seed).integers(0, 1 << 16, (rows, cols)).astype(np.uint16)
    expected = np.bitwise_xor.accumulate(x, axis=0)
    symbols.prefix_xor(x)
    assert np.array_equal(x, expected)


def test_blocks_do_not_show(monkeypatch):
    values = gaussian((1000, 64))
    values[500:, :9] = -np.abs(values[500:, :9])
    words = values.reshape(-1).view(np.uint16)
    whole = [v3.encode(values, profile=profile) for profile in ("fast", "balanced")]
    monkeypatch.setattr(halves, "BLOCK", 64 * 10)
    monkeypatch.setattr(planes, "BLOCK", 77)
    assert [v3.encode(values, profile=profile) for profile in ("fast", "balanced")] == whole
    for coded in whole:
        assert only(v3.decode(coded)).reshape(-1).view(np.uint16).tobytes() == words.tobytes()


def test_repeated_rows_cost_an_index():
    rng = np.random.default_rng(3)
    distinct = gaussian((64, 128))
    values = distinct[rng.integers(0, 64, 4096)]
    coded = v3.encode(values)
    assert len(coded) < 1.1 * (0.7 * distinct.nbytes + 4096)
    assert same(only(v3.decode(coded)), values)


def test_incompressible_codes_stay_raw():
    codes = np.random.default_rng(0).integers(0, 256, (4096, 256), dtype=np.uint8)
    assert len(v3.encode(codes)) < codes.nbytes + 200


def test_named_tensors_and_metadata():
    held = {
        "stack0/keys/codes": np.arange(96, dtype=np.uint8).reshape(2, 3, 16),
        "stack0/length": np.int32(7) * np.ones((), np.int32),
        "": np.zeros((0, 4), BF16),
        "µ/层": np.array([True, False]),
    }
    coded = v3.encode(held, metadata={"model": "m", "note": "ü", "": ""}, axis={"stack0/keys/codes": 1})
    back = named(v3.decode(coded))
    assert list(back) == list(held)
    assert all(same(back[name], np.asarray(held[name])) for name in held)
    with v3.open(coded) as reader:
        assert reader.metadata == {"model": "m", "note": "ü", "": ""}
        assert reader.names == tuple(held)
        assert reader.shapes["stack0/keys/codes"] == (2, 3, 16)
        assert reader.dtypes[""] == BF16
    assert v3.decode(v3.encode({})) == {}


def test_big_endian_and_strided_arrays_are_stored_by_value():
    values = np.arange(1000, dtype=">f4").reshape(40, 25)[::2, ::-1]
    assert np.array_equal(only(v3.decode(v3.encode(values))), values)


def test_random_access_reads_only_what_it_needs():
    values = gaussian((4, 1024, 2, 64))
    coded = v3.encode(values, axis=1, chunk=1 << 16)  # 256 tokens per chunk
    reads: list[tuple[int, int]] = []

    def fetch(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return coded[offset : offset + length]

    with v3.open(fetch, size=len(coded)) as reader:
        assert len(reads) == 3  # header, footer, index
        reads.clear()
        part = reader.read("", 300, 500, at=(2,))
        assert same(part, values[2, 300:500])
        records = reader.tensors[""].chunks
        wanted = records[2 * 4 + 1]
        assert reads == [(int(wanted["offset"]), int(wanted["length"]))]
        reads.clear()
        assert same(reader.read("", 0, 1), values[:, :1])
        assert reads == [(int(r["offset"]), int(r["length"])) for r in records[::4]]
        reads.clear()
        assert reader.read("", 5, 5).shape == (4, 0, 2, 64)
        assert not reads


def test_a_short_ranged_read_is_resumed():
    values = gaussian((512, 64))
    coded = v3.encode(values)
    with v3.open(lambda offset, length: coded[offset : offset + min(length, 1000)], size=len(coded)) as reader:
        assert same(reader.read(""), values)
    with pytest.raises(CorruptError, match="ends at"), v3.open(lambda offset, length: b"", size=len(coded)):
        pass
    with pytest.raises(TypeError, match="size="):
        v3.open(lambda offset, length: b"")


def test_every_kind_of_source(tmp_path: Path):
    values = gaussian((300, 40))
    coded = v3.encode(values, chunk=4096)
    path = tmp_path / "x.qatc"
    path.write_bytes(coded)
    for source in (coded, bytearray(coded), memoryview(coded), np.frombuffer(coded, np.uint8), str(path), path):
        assert same(only(v3.decode(source)), values)
    with path.open("rb") as file:
        assert same(only(v3.decode(file, threads=3)), values)
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open(f"file://{path}", "rb") as file, v3.open(file) as reader:
        assert same(reader.read("", 17, 60), values[17:60])


def test_out_is_filled_or_refused():
    values = gaussian((64, 32))
    coded = v3.encode(values)
    out = np.empty_like(values)
    assert v3.decode(coded, out=out) is out
    assert same(out, values)
    with pytest.raises(ValueError, match="out must be"):
        v3.decode(coded, out=np.empty((64, 32), np.float32))
    with pytest.raises(ValueError, match="out must be"):
        v3.decode(coded, out=np.empty((32, 64), BF16).T)


@pytest.mark.parametrize("at", [(0, 1200), (-1, 5), (7, 6)])
def test_reads_outside_are_refused(at: tuple[int, int]):
    with v3.open(v3.encode(gaussian((1000, 32)))) as reader, pytest.raises(IndexError, match="lie outside"):
        reader.read("", *at)


def test_threads_change_nothing():
    values = gaussian((4000, 96))
    coded = v3.encode(values, chunk=1 << 15)
    assert v3.encode(values, chunk=1 << 15, threads=4) == coded
    assert same(only(v3.decode(coded, threads=4)), values)


def test_a_pipe_gets_the_same_bytes():
    values = gaussian((2000, 64))
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, concurrent.futures.ThreadPoolExecutor(1) as reader:
        got = reader.submit(source.read)
        with os.fdopen(write, "wb") as sink, v3.Writer(sink, chunk=1 << 15) as writer:
            writer.add("", values)
        assert got.result(timeout=60) == v3.encode(values, chunk=1 << 15)


def test_an_iterator_is_taken_piece_by_piece():
    values = gaussian((1000, 64))
    taken: list[int] = []

    def pieces():
        for start in range(0, 1000, 10):
            taken.append(start)
            yield values[start : start + 10]

    class Watch(io.BytesIO):
        seen = 0

        def write(self, data) -> int:
            self.seen = self.seen or (len(taken) if len(taken) else 0)
            return super().write(data)

    sink = Watch()
    with v3.Writer(sink, chunk=1 << 14) as writer:
        writer.add("x", pieces())
        writer.add("none", iter(()), dtype=np.dtype(np.int8))
    assert 0 < sink.seen < 20  # the first chunk went out while pieces were still to come
    back = named(v3.decode(sink.getvalue()))
    assert same(back["x"], values)
    assert same(back["none"], np.empty(0, np.int8))


def test_append_extends_and_adds(tmp_path: Path):
    path = tmp_path / "x.qatc"
    values = gaussian((600, 64))
    with v3.Writer(path, metadata={"a": "1"}) as writer:
        writer.add("grows", values[:200])
    first = path.read_bytes()
    for start in (200, 400):
        with v3.Writer(path, append=True, metadata={"b": str(start)}) as writer:
            writer.append("grows", values[start : start + 200])
            writer.add(f"new{start}", values[:3])
    assert path.read_bytes()[layout.HEADER_BYTES : len(first)] == first[layout.HEADER_BYTES :]
    with v3.open(path) as reader:
        assert reader.metadata == {"a": "1", "b": "400"}
        assert same(reader.read("grows", 150, 450), values[150:450])
        assert reader.names == ("grows", "new200", "new400")
    with v3.Writer(path, append=True) as writer, pytest.raises(ValueError, match="is float32"):
        writer.append("grows", values.astype(np.float32))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.qatc"
    values = gaussian((100, 64))
    path.write_bytes(v3.encode(values))
    for append in (False, True):
        writer = v3.Writer(path, append=append)
        writer.add("other", values)
        with pytest.raises(ValueError, match="exists already"), writer:
            writer.add("other", values)
        assert os.listdir(tmp_path) == ["x.qatc"]
        assert same(only(v3.decode(path)), values)


@pytest.mark.parametrize("append", [False, True])
def test_kill_leaves_the_old_file_or_the_new(tmp_path: Path, append: bool):
    path = tmp_path / "x.qatc"
    values = gaussian((64, 64))
    with v3.Writer(path) as writer:
        writer.add("old", values)
    script = (
        "import numpy as np, sys\nfrom jaxquant.codecs import v3\n"
        f"w = v3.Writer({str(path)!r}, append={append}, chunk=1 << 16)\n"
        "w.add('new', (np.random.default_rng(i).standard_normal((256, 64)) for i in range(40)))\n"
        "print('written', flush=True); sys.stdin.read(1)\nw.close()\nprint('closed', flush=True); sys.stdin.read()"
    )
    for delay in (0.0, 0.002, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        if delay:
            child.stdin.write(b"x")
            child.stdin.flush()
            time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        with v3.open(path) as reader:
            reader.verify()
            assert reader.names in ({True: [("old",), ("old", "new")], False: [("old",), ("new",)]}[append])
            if not delay:
                assert reader.names == ("old",)
        with v3.Writer(path) as writer:
            writer.add("old", values)


def small_files() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    repeated = gaussian((6, 32))[rng.integers(0, 6, 32)]
    return {
        "nibbles": v3.encode(gaussian((16, 32)), profile="fast"),
        "symbols": v3.encode(gaussian((16, 32)), profile="balanced"),
        "f16": v3.encode(gaussian((16, 32), np.dtype("f2"))),
        "planes": v3.encode(np.arange(300, dtype=np.int32) * 3),
        "repeated": v3.encode(repeated),
        "several": v3.encode(
            {"a": np.zeros((9, 9)), "b": rng.integers(0, 255, 50, dtype=np.uint8)}, metadata={"k": "v"}
        ),
    }


def reseal(data: bytes) -> bytes:
    """Recompute every checksum of a damaged file whose header, footer and index are in their places."""
    offset, length, _, _ = struct.unpack("<QQQ8s", data[-32:])
    records_at: list[tuple[int, tuple[int, int, int, int]]] = []
    index = bytearray(data[offset : offset + length])
    with v3.open(_with_sums(data, bytes(index))) as reader:
        for tensor in reader.tensors.values():
            blob = tensor.chunks.tobytes()
            at = index.find(blob)
            for i, record in enumerate(tensor.chunks):
                records_at.append((at + i * layout.CHUNK.itemsize, record.item()))
    for at, (start, _, _, size) in records_at:
        index[at + 8 : at + 16] = struct.pack("<Q", xxhash.xxh3_64_intdigest(data[start : start + size]))
    return _with_sums(data, bytes(index))


def _with_sums(data: bytes, index: bytes) -> bytes:
    offset = struct.unpack("<Q", data[-32:-24])[0]
    return data[:offset] + index + layout.footer(index, offset)


@pytest.mark.parametrize("name", small_files())
def test_every_truncation_is_refused(name: str):
    data = small_files()[name]
    for length in range(len(data)):
        with pytest.raises(CodecError):
            v3.decode(data[:length])


@pytest.mark.parametrize("name", small_files())
def test_every_flipped_bit_is_refused(name: str):
    data = small_files()[name]
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(CodecError):
            v3.decode(bytes(damaged))


@pytest.mark.parametrize("name", small_files())
def test_bytes_behind_a_valid_checksum_are_not_trusted(name: str):
    data, rng = small_files()[name], np.random.default_rng(0)
    end = struct.unpack("<Q", data[-32:-24])[0]
    refused = 0
    assert reseal(data) == data
    for at in range(layout.HEADER_BYTES, end):
        damaged = bytearray(data)
        damaged[at] = (damaged[at] + int(rng.integers(1, 256))) % 256
        try:
            v3.decode(reseal(bytes(damaged)))
        except CodecError:
            refused += 1
    assert refused > 0


def test_a_frame_that_claims_more_is_refused_before_it_is_decoded():
    bomb = coders.compressed(np.zeros(1 << 24, np.uint8), 3)
    tracemalloc.start()
    with pytest.raises(CorruptError, match="claims 16777216 bytes where 100 belong"):
        coders.decode(coders.ZSTD, np.frombuffer(bomb, np.uint8), 100)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def claim(shape: tuple[int, ...], records: list[tuple[int, int, int, int]], body: bytes = b"") -> bytes:
    tensor = layout.Tensor("", "float32", shape, 0, np.array(records, layout.CHUNK))
    index = layout.index([tensor], {})
    return layout.header() + body + index + layout.footer(index, layout.HEADER_BYTES + len(body))


def test_claims_are_checked_before_allocation():
    tracemalloc.start()
    start = time.perf_counter()
    claimed = claim((1 << 40,), [])
    assert len(claimed) < 130
    with pytest.raises(LimitError, match="exceed the limit"):
        v3.decode(claimed)
    with pytest.raises(LimitError, match="exceed the limit"):
        v3.decode(claim((1 << 63, 1 << 63, 1 << 63), []))
    with pytest.raises(CorruptError, match="do not hold its"):
        v3.decode(claim((1 << 30,), []))
    with pytest.raises(CorruptError, match="claims more than"):
        v3.decode(claim((1 << 30,), [(24, 0, 1 << 30, 0)]))
    with pytest.raises(CorruptError, match="impossible shape"):
        v3.decode(claim((0, 1 << 62), []))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert time.perf_counter() - start < 2
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(decoded_bytes=1023), "tensors of 1024 bytes or more"),
        (Limits(tensors=1), "2 tensors exceed"),
        (Limits(chunks=3), "chunks exceed the limit of 3"),
        (Limits(text_bytes=5), "6 bytes of names and metadata"),
    ],
)
def test_limits(limits: Limits, match: str):
    values = np.arange(128, dtype=np.float32)
    coded = v3.encode({"ab": values, "cd": values}, metadata={"k": "v"}, chunk=256)
    with pytest.raises(LimitError, match=match):
        v3.decode(coded, limits=limits)
    exact = Limits(decoded_bytes=1024, tensors=2, chunks=4, text_bytes=6)
    assert same(named(v3.decode(coded, limits=exact))["cd"], values)


def test_contradictions_of_the_index_are_refused():
    body = np.arange(64, dtype=np.float32).tobytes()
    chunk = chunks.HEAD.pack(chunks.RAW, 0, 0, 0, 64, 1) + body
    digest = xxhash.xxh3_64_intdigest(chunk)
    good = (layout.HEADER_BYTES, digest, 64, len(chunk))
    assert same(only(v3.decode(claim((64,), [good], chunk))), np.arange(64, dtype=np.float32))
    with pytest.raises(CorruptError, match="overlap"):
        v3.decode(claim((128,), [good, good], chunk))
    with pytest.raises(CorruptError, match="outside"):
        v3.decode(claim((64,), [(2**64 - 8, digest, 64, len(chunk))], chunk))
    with pytest.raises(CorruptError, match="outside"):
        v3.decode(claim((64,), [(0, digest, 64, len(chunk))], chunk))
    with pytest.raises(CorruptError, match="checksum of chunk 0"):
        v3.decode(claim((64,), [(*good[:1], digest ^ 1, *good[2:])], chunk))
    with pytest.raises(CorruptError, match="longer than its raw values"):
        v3.decode(claim((63,), [(good[0], digest, 63, len(chunk))], chunk))


def test_other_versions_and_files_are_unsupported():
    coded = v3.encode(np.arange(3))
    for data in (b"PK\3\4" + bytes(99), b"QATC\2" + bytes(99), b"QATC\4" + coded[5:]):
        with pytest.raises(UnsupportedError, match="QATC"):
            v3.decode(data)
    for data in (b"", b"QAT", b"QATC", b"QATC\3", coded[:40]):
        with pytest.raises(CorruptError):
            v3.decode(data)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: v3.encode(np.array(["a"])), TypeError, "cannot be stored"),
        (lambda: v3.encode(np.arange(3), profile="best"), ValueError, "profile='best'"),
        (lambda: v3.encode(np.arange(3), chunk=0), ValueError, "chunk=0"),
        (lambda: v3.encode(np.arange(3), threads=0), ValueError, "threads=0"),
        (lambda: v3.encode(np.arange(3), axis=1), ValueError, "axis=1"),
        (lambda: v3.Writer(io.BytesIO()).append("x", np.arange(3)), KeyError, "x"),
        (lambda: v3.Writer(io.BytesIO(), append=True), ValueError, "needs a path"),
        (lambda: v3.Writer(io.BytesIO()).add("x", iter(())), ValueError, "dtype="),
    ],
)
def test_wrong_arguments(call, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        call()


def test_the_wire_format_does_not_drift():
    expected = np.load(DATA / "expected.npz")
    files = sorted(DATA.glob("*.qatc"))
    assert [file.stem for file in files] == sorted(expected.files)
    for file in files:
        values = only(v3.decode(file))
        words = expected[file.stem]
        assert values.reshape(-1).view(np.uint8).tobytes() == words.tobytes(), file.stem


@pytest.mark.parametrize("extra", ["", "import jax;"])
def test_import_without_jax(extra: str):
    found = "'jax' in sys.modules or 'ml_dtypes' in sys.modules"
    code = f"import sys;{extra}from jaxquant.codecs import v3; sys.exit({found})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == bool(extra)
