"""The public face of QATC v2: round trips, sizes, limits and errors."""

import io
import mmap
import subprocess
import sys
import time
import tracemalloc

import fixtures_qatc
import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxquant.codecs import qatc, v2
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.v2 import byteplanes, compact, container, fnv, payload, zframes

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def test_same_sees_what_equality_does_not():
    assert not same(np.array([0.0], np.float32), np.array([-0.0], np.float32))
    quiet, signalling = np.array([0x7FC00001, 0x7FA12345], np.uint32).view(np.float32).reshape(2, 1)
    assert not same(quiet, signalling)


@st.composite
def arrays(draw) -> np.ndarray:
    """Any bit patterns, with runs and repeats, of any of the three dtypes."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    pattern = draw(st.binary(max_size=200))
    repeats = draw(st.sampled_from([1, 1, 3, 50]))
    data = pattern * repeats
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)


@settings(deadline=None, max_examples=60)
@given(arrays(), st.sampled_from(["v2", "parity"]), st.sampled_from([None, 1, 7, 1 << 26]), st.sampled_from([1, 2]))
@example(np.empty(0, np.float32), "v2", None, 1)
@example(np.empty(0, np.float16), "parity", 4, 2)
@example(np.array([0x7FA12345, 0x80000000, 0xFFFFFFFF], np.uint32).view(np.float32), "v2", 2, 1)
def test_round_trip(array, profile, chunk, threads):
    encoded = qatc.encode(array, profile=profile, chunk=chunk, threads=threads)
    assert same(qatc.decode(encoded, threads=threads), array)
    summary = qatc.inspect(encoded)
    assert (summary.values, summary.raw_nbytes, summary.nbytes) == (array.size, array.nbytes, len(encoded))


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=300), st.sampled_from([None, 1, 5]))
def test_opaque_bytes(data, chunk):
    encoded = qatc.encode_bytes(data, chunk=chunk)
    assert qatc.decode_bytes(encoded, len(data), chunk=chunk) == data


def test_opaque_bytes_insist_on_length_padding_and_layout():
    encoded = qatc.encode_bytes(b"0123456789", chunk=1)
    with pytest.raises(CorruptError, match="3 values"):
        qatc.decode_bytes(encoded, 13)
    with pytest.raises(CorruptError, match="padding"):
        qatc.decode_bytes(encoded, 9)
    with pytest.raises(CorruptError, match="not of 2"):
        qatc.decode_bytes(encoded, 10, chunk=2)


@pytest.mark.parametrize("name", fixtures_qatc.PUBLIC)
def test_public_fixtures(name):
    make, size = fixtures_qatc.PUBLIC[name]
    values = make()
    parity = qatc.encode(values, profile="parity")
    assert len(parity) == size
    assert len(qatc.encode(values)) < size
    assert len(qatc.encode(values, chunk=65536)) < len(qatc.encode(values, profile="parity", chunk=65536))


# FNV-1a-64 of the fixtures' bytes as their repository has them.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ramp", 0x6F42AE7C6E314989),
        ("wave", 0x260CF16D8EB205F1),
        ("noisy", 0x216F15E2B9EB431E),
        ("stress", 0x8788D5A828E81325),
    ],
)
def test_fixture_formulas(name, expected):
    assert fnv.fnv1a(fixtures_qatc.PUBLIC[name][0]()) == expected


SETS = fixtures_qatc.synthetic() | {
    name: words.view(ml_dtypes.bfloat16) for name, words in fixtures_qatc.native().items()
}


@pytest.mark.parametrize("name", SETS)
def test_default_is_never_larger(name):
    values = SETS[name]
    assert same(qatc.decode(qatc.encode(values)), values)
    assert len(qatc.encode(values)) <= len(qatc.encode(values, profile="parity"))
    assert len(qatc.encode(values, chunk=20_000)) <= len(qatc.encode(values, chunk=20_000, profile="parity"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("constant", np.full(1 << 20, 0x3F80, np.uint16)),
        ("constant f32", np.full(1 << 19, 0x3F9D70A4, np.uint32)),
        ("one high byte", (0x3F00 + np.arange(1 << 20) * 37 % 251).astype(np.uint16)),
        (
            "sparse",
            (np.random.default_rng(0).integers(0, 1 << 16, 1 << 20) * (np.arange(1 << 20) % 5 == 0)).astype("u2"),
        ),
        ("drifting", (0x3D00 + np.arange(1 << 20) % 128 * 101 + np.arange(1 << 20) // 4096).astype(np.uint16)),
    ],
)
def test_no_input_is_slow(name, words):
    # QATQ needs 4 to 15 seconds for the first two. The bound is CPU time, hashing included, with much to spare.
    values = words.view(np.float16 if words.itemsize == 2 else np.float32)
    for profile in ("v2", "parity"):
        start = time.process_time()
        encoded = qatc.encode(values, profile=profile, chunk=values.size, threads=1)
        assert time.process_time() - start < 2.5
        assert same(qatc.decode(encoded), values)


def test_kv_like_is_smaller_by_the_entropy_code():
    words = fixtures_qatc.channels(512).reshape(-1)
    values = words.view(ml_dtypes.bfloat16)
    default, parity = len(qatc.encode(values)), len(qatc.encode(values, profile="parity"))
    high = np.bincount(words >> 8, minlength=256) / words.size
    entropy = -(high[high > 0] * np.log2(high[high > 0])).sum() / 8
    # Order 0 of the high byte and nothing saved on the low one, within a Huffman code's 2 % and the frames' headers.
    assert default < words.size * (1 + 1.02 * entropy) + 200
    assert default < 0.97 * parity


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 20, 23])
def test_strided_xor_is_undone_to_the_last_word(stride, size):
    words = np.random.default_rng(size).integers(0, 1 << 16, size, dtype=np.uint16)
    residual = byteplanes.xor_previous(words, stride)
    assert residual.tolist() == [int(w) ^ (int(words[i - stride]) if i >= stride else 0) for i, w in enumerate(words)]
    byteplanes.undo_xor(residual, stride)
    assert same(residual, words)


def test_stride_hint():
    words = fixtures_qatc.native()["piecewise"]
    values = words.view(ml_dtypes.bfloat16)
    hinted = qatc.encode(values, stride=128)
    assert qatc.inspect(hinted).chunks[0].strategy == "strided-xor-byte-plane-zstd"
    assert len(hinted) < 0.7 * len(qatc.encode(values))
    assert len(hinted) <= len(qatc.encode(values, stride=128, profile="parity"))
    assert same(qatc.decode(hinted), values)


def test_threads_do_not_change_the_bytes():
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    one, three = (qatc.encode(values, chunk=30_000, threads=threads) for threads in (1, 3))
    assert one == three
    assert same(qatc.decode(one, threads=3), values)


def test_batched_hashing_checks_every_chunk(monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setattr(fnv, "_XLA_BLOCK", 1 << 12)
    values = np.random.default_rng(0).standard_normal(12 * 70_001).astype(np.float32)
    encoded = bytearray(qatc.encode(values, chunk=70_000, threads=1))
    whole = container.parse(memoryview(encoded), qatc.Limits())
    assert same(qatc.decode(encoded), values)
    encoded[whole.starts[5] + 20] ^= 1
    encoded[24:32] = fnv.fnv1a(encoded[32:]).to_bytes(8, "big")
    with pytest.raises(CorruptError, match=r"chunk 5 at offset \d+, offset 20: checksum"):
        qatc.decode(encoded)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((3, 4), np.float32), r'shape \(3, 4\).*profile="balanced"'),
        (np.float32(1), r'shape \(\).*profile="balanced"'),
        (np.zeros(3, np.int32), 'dtype int32.*profile="balanced"'),
        (np.zeros(3, np.float64), 'dtype float64.*profile="balanced"'),
        (np.zeros(3, ml_dtypes.float8_e4m3fn), 'dtype float8_e4m3fn.*profile="balanced"'),
    ],
)
def test_what_v2_cannot_express(array, match):
    with pytest.raises(ValueError, match=match):
        qatc.encode(array)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"profile": "zip"}, "profile: 'zip'"),
        ({"chunk": 0}, "chunk: 0 values"),
        ({"chunk": (1 << 26) + 1}, "chunk: 67108865 values"),
        ({"threads": 0}, "threads: 0"),
        ({"stride": 4}, "stride: 4"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        qatc.encode(np.zeros(10, np.float32), **{"chunk": 5} | arguments)


def test_modes_and_strategies_name_what_they_refuse():
    with pytest.raises(ValueError, match="mode: 'nope'"):
        qatc.encode_payload(np.zeros(3, np.float32), mode="nope")
    with pytest.raises(ValueError, match="only f32"):
        qatc.encode_payload(np.zeros(3, np.float16), mode="lossy-i4")
    with pytest.raises(ValueError, match="strategy: 9 does not serve f32"):
        qatc.encode_payload(np.zeros(3, np.float32), strategy=9)
    with pytest.raises(ValueError, match="stride: 0 is outside 1 to 2"):
        qatc.encode_payload(np.zeros(3, np.float16), strategy=10)
    with pytest.raises(ValueError, match="too small"):
        qatc.encode_payload(np.array([1], np.uint32).view(np.float32), mode="lossy-i4")
    with pytest.raises(ValueError, match="overflows"):
        qatc.encode_payload(np.full(4, 3e38, np.float32), mode="phase1-q4")


def test_every_buffer_is_accepted(tmp_path):
    values = np.arange(5000, dtype=np.float32)
    encoded = qatc.encode(values)
    path = tmp_path / "x.qatc"
    path.write_bytes(encoded)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for source in (bytearray(encoded), memoryview(encoded), np.frombuffer(encoded, np.uint8), mapped):
            assert same(qatc.decode(source), values)
        assert same(qatc.decode(file), values)
    for source in (path, str(path), io.BytesIO(encoded)):
        assert same(qatc.decode(source), values)
    with pytest.raises(TypeError, match="int is no contiguous buffer"):
        qatc.decode(5)
    strided, swapped = np.zeros(20, np.float32)[::2], values.astype(">f4")
    assert same(qatc.decode(qatc.encode(strided)), np.ascontiguousarray(strided))
    assert same(qatc.decode(qatc.encode(swapped)), values)


def test_decode_into_an_array():
    values = np.arange(5000, dtype=np.float16)
    out = np.empty(5000, np.float16)
    for chunk in (None, 999):
        out[:] = 0
        found = qatc.decode(qatc.encode(values, chunk=chunk), out=out)
        assert np.shares_memory(found, out)
        assert same(out, values)
    with pytest.raises(ValueError, match="out: float32 of 5000 values, but the file holds float16 of 5000"):
        qatc.decode(qatc.encode(values), out=np.empty(5000, np.float32))


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"values": 999}, "1000 values, limit 999"),
        ({"decoded_bytes": 3999}, "4000 decoded bytes, limit 3999"),
        ({"encoded_bytes": 50}, "encoded bytes, limit 50"),
        ({"chunks": 3}, "4 chunks, limit 3"),
        ({"chunk_values": 249}, "chunk 0 at offset 36, offset 8: 250 chunk values, limit 249"),
        ({"chunk_bytes": 100}, "chunk 0 at offset 36: .* chunk bytes, limit 100"),
    ],
)
def test_limits(limits, match):
    encoded = qatc.encode(np.random.default_rng(0).random(1000, np.float32), chunk=250)
    qatc.decode(encoded, limits=qatc.Limits(values=1000, decoded_bytes=4000, chunks=4, chunk_values=250))
    with pytest.raises(LimitError, match=match):
        qatc.decode(encoded, limits=qatc.Limits(**limits))


def _claiming(values: int, body: bytes, strategy: int = 7) -> bytes:
    return payload.head(4, values, 0) + payload.exact_head(strategy, "f32") + body


@pytest.mark.parametrize(
    "data",
    [
        _claiming(1 << 26, b""),
        _claiming(1 << 26, zframes.MAGIC + b"\xa0" + (1 << 28).to_bytes(4, "little") + b"\x01\x00\x00"),
        _claiming(1 << 18, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))),
        _claiming(1 << 18, zframes.MAGIC + b"\x00\xa8" + b"\x01\x00\x00"),
        _claiming(1 << 18, zframes.MAGIC + b"\xc0" + b"\xff" * 8 + b"\x01\x00\x00"),
    ],
    ids=["empty", "claimed size", "bomb", "2 GiB window", "2**64 - 1"],
)
def test_bombs_cost_no_memory(data):
    limits = qatc.Limits(values=1 << 18, decoded_bytes=1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            qatc.decode(data, limits=limits)
        assert tracemalloc.get_traced_memory()[1] < 4 * limits.decoded_bytes
    finally:
        tracemalloc.stop()


def test_memory_of_an_ordinary_decode_is_bounded():
    values = np.zeros(1 << 20, np.float32)
    values[::3] = np.random.default_rng(0).standard_normal(values[::3].size)
    for strategy in range(9):
        small = values if strategy in (1, 5, 7, 8) else np.zeros_like(values)
        encoded = qatc.encode_payload(small, strategy=strategy)
        tracemalloc.start()
        try:
            qatc.decode(encoded, limits=qatc.Limits(decoded_bytes=values.nbytes), threads=1)
            assert tracemalloc.get_traced_memory()[1] < 4 * values.nbytes
        finally:
            tracemalloc.stop()


def _zstd(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


PLANES = bytes(range(200)) * 8


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        (_zstd(PLANES), True),
        (_zstd(PLANES, level=19, write_checksum=True), True),
        (_zstd(PLANES, write_content_size=False), True),
        (_zstd(PLANES[:700]) + _zstd(b"") + _zstd(PLANES[700:]), True),
        (b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + _zstd(PLANES) + b"\x50\x2a\x4d\x18\0\0\0\0", True),
        (_zstd(PLANES)[:-1], False),
        (_zstd(PLANES) + b"\0", False),
        (_zstd(PLANES) + b"\x50\x2a\x4d\x18\x05\0\0\0", False),
        (_zstd(PLANES + b"\0"), False),
        (_zstd(PLANES[:-1]), False),
        (_zstd(PLANES, write_checksum=True)[:-1] + b"\0", False),
        (b"", False),
    ],
)
def test_zstd_frames(body, valid):
    words = np.empty(400, np.uint32)
    byteplanes.merge(list(np.frombuffer(PLANES, np.uint8).reshape(4, 400)), words)
    data = payload.head(4, 400, payload.checksum(words)) + payload.exact_head(7, "f32") + body
    if valid:
        assert qatc.decode(data).tobytes() == words.tobytes()
    else:
        with pytest.raises(CorruptError, match="byte-plane-zstd"):
            qatc.decode(data)


def test_hand_made_frames_are_what_zstd_reads():
    rng = np.random.default_rng(0)
    for sizes in ([1], [255], [256, 3], [70_000], [131_072, 131_073], [400_000]):
        rows = [rng.integers(0, 256, size, np.uint8) for size in sizes] + [np.full(sizes[0], 9, np.uint8)]
        kinds = [zframes.RAW] * len(sizes) + [zframes.RLE]
        blocks: list = [zframes.Blocks(kind=kind, data=row) for kind, row in zip(kinds, rows, strict=True)]
        frame = b"".join(zframes.join(blocks))
        assert zstandard.ZstdDecompressor().decompress(frame) == np.concatenate(rows).tobytes()


def test_other_generations_are_named():
    with pytest.raises(UnsupportedError, match="QATC version 1"):
        qatc.decode(b"QATC\x01" + bytes(40))
    with pytest.raises(UnsupportedError, match="magic"):
        qatc.decode(b"PK\x03\x04" + bytes(40))
    with pytest.raises(CorruptError, match="0 bytes"):
        qatc.decode(b"")


def test_mixed_dtypes_are_refused():
    chunks = [qatc.encode_payload(np.ones(5, dtype)) for dtype in (np.float16, np.float32)]
    body = b"".join(len(chunk).to_bytes(4, "big") + chunk for chunk in chunks)
    with pytest.raises(CorruptError, match=r"chunk 1 .*dtype f32 after chunks of f16"):
        qatc.decode(container.head(10, 2, fnv.fnv1a(body)) + body)


def test_highly_compressible_arrays_get_larger_chunks():
    zeros = np.zeros(3 * v2.CHUNK, np.float16)
    assert compact.chunk_values(zeros.view(np.uint16), v2.CHUNK) > zeros.size
    assert len(qatc.encode(zeros)) < 400


def _imported(statement: str) -> str:
    code = f"import sys; {statement}; print('jax' in sys.modules, 'ml_dtypes' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_codecs_do_not_import_jax():
    small = "import numpy as np; from jaxquant.codecs import qatc; qatc.decode(qatc.encode(np.ones(99, np.float32)))"
    assert _imported(small).startswith("False")
    assert _imported("import jax").startswith("True")


def test_v3_is_found_by_its_version_byte():
    pytest.importorskip("jaxquant.codecs.v3")
    values = np.arange(24, dtype=np.int8).reshape(2, 3, 4)
    encoded = qatc.encode(values, profile="balanced", threads=1)
    assert same(qatc.decode(encoded), values)
    assert qatc.inspect(encoded).tensors[0].shape == (2, 3, 4)
    with pytest.raises(LimitError):
        qatc.decode(encoded, limits=qatc.Limits(decoded_bytes=23))
    with qatc.open(encoded) as reader:
        assert reader.names == ("",)
