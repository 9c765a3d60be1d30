"""Artefacts made by the real QATQ 0.4.2: the same values out of them, the same bytes for them, the same verdicts."""

import hashlib
import json
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxquant.codecs import qatc
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.v2 import fnv
from jaxquant.codecs.v2.strategies import STRATEGIES

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LABELS = {strategy.label: wire for wire, strategy in STRATEGIES.items()}

with zipfile.ZipFile(pathlib.Path(__file__).parent / "data/qatc/vectors.zip") as archive:
    FILES = {name: archive.read(name) for name in archive.namelist()}
MANIFEST = json.loads(FILES["manifest.json"])
PAIRS = {pair["name"]: pair for pair in MANIFEST["pairs"]}
CORRUPT = {case["name"]: case for case in MANIFEST["corrupt"]}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_all_vectors_are_here():
    assert (len(PAIRS), len(CORRUPT)) == (204, 148)


@pytest.mark.parametrize("name", PAIRS)
def test_vector_decodes(name):
    pair = PAIRS[name]
    data = FILES[pair["encoded"]]
    assert _sha256(data) == pair["encoded_sha256"]
    values = qatc.decode(data)
    assert values.dtype == DTYPES[pair["dtype"]]
    assert _sha256(values.tobytes()) == pair["decoded_sha256"]
    if pair["lossless_roundtrip"]:
        assert values.tobytes() == FILES[pair["input"]]


@pytest.mark.parametrize("name", PAIRS)
def test_vector_encodes_to_the_same_bytes(name):
    pair = PAIRS[name]
    values = np.frombuffer(FILES[pair["input"]], DTYPES[pair["dtype"]])
    expected = FILES[pair["encoded"]]
    if pair["mode"] == "qatc":
        encoded = qatc.encode(values, profile="parity", chunk=int(name.rpartition("per")[2]), threads=1)
    elif pair["how"].startswith("program's own"):
        strategy = LABELS[pair["strategy"]]
        stride = int.from_bytes(expected[36:40], "big") if strategy == 10 else 0
        encoded = qatc.encode_payload(values, strategy=strategy, stride=stride)
    elif pair["mode"] == "qatq-exact":
        encoded = qatc.encode(values, profile="parity", stride=128 if "stride" in pair["how"] else 0)
    else:
        encoded = qatc.encode_payload(values, mode=pair["mode"])
    assert encoded == expected


def _kind(error: str) -> type[CodecError]:
    """Which of our three errors the reference's own error must be."""
    name = error.split("(")[0].split(" ")[0]
    if name in ("InvalidMagic", "UnsupportedVersion", "UnsupportedMode"):
        return UnsupportedError
    return LimitError if name in ("ValueCountTooLarge", "ContainerLimitExceeded") else CorruptError


@pytest.mark.parametrize("name", CORRUPT)
def test_mutated_artefact_gets_the_real_verdict(name):
    case = CORRUPT[name]
    data = FILES["corrupt/" + case["file"]]
    if name == "qatc-bf16-smooth-10-per4__ok-wrong-declared-chunk":
        # A valid 16-bit container: only the real program's command line reads those, its library refuses them all.
        assert data == FILES["qatc-bf16-smooth-10-per4.qatc"]
        assert qatc.decode(data).tobytes() == FILES["qatc-bf16-smooth-10-per4.in"]
        return
    accepted = [verdict for verdict in case["reference"].values() if verdict["ok"]]
    if accepted:
        values = qatc.decode(data).tobytes()
        found = {"len": len(values), "fnv": f"{fnv.fnv1a(values):016x}"}
        assert found in [{key: verdict[key] for key in found} for verdict in accepted]
        return
    with pytest.raises(CodecError, match=r"(offset|header|payload|container|chunk).*: ") as raised:
        qatc.decode(data)
    kinds = {_kind(verdict["error"]) for verdict in case["reference"].values()}
    # An unknown strategy or dtype tag is one error with every other bad exact body in the reference, but not here.
    assert type(raised.value) in kinds | ({UnsupportedError} if "strategy" in name or "dtype" in name else set())


def test_a_wrong_byte_is_noticed():
    pair = PAIRS["bf16-smooth-15"]
    encoded = bytearray(FILES[pair["encoded"]])
    encoded[-1] ^= 1
    with pytest.raises(CorruptError, match="offset 20: checksum"):
        qatc.decode(encoded)
