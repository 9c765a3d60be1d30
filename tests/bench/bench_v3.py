"""Size and one-core speed of QATC v3 against what a user would pick instead, in one run on the same bytes.

    python tests/bench/bench_v3.py --model DIR --tokens FILE.npz:held_out --tokens FILE.npz:wikitext2_test
    python tests/bench/bench_v3.py                      # generated tensors only

With --model (a Hugging Face folder; needs torch and transformers) keys after RoPE and values of the first --length
tokens are coded in bfloat16, one tensor [tokens, heads, dim] per layer. Peers that are not installed are left out:
pip install zipnn pcodec blosc2 openzl. Every result is decoded and compared. Speed is process CPU time: codecs take
turns, and each is quoted relative to a reference in the same round, as the median over rounds.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import zstandard

from jaxquant.codecs import qatc, v3


@dataclass(frozen=True)
class Codec:
    """A peer: bytes from a tensor and back; `slow` ones run once."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.ndarray], object]
    slow: bool = False


def _zstd(level: int) -> Codec:
    encoder, decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Codec(
        lambda x: encoder.compress(x.reshape(-1).view(np.uint8).data),
        lambda z, _: decoder.decompress(z),
        slow=level > 9,
    )


def _v3(profile: str) -> Codec:
    return Codec(lambda x: v3.encode(x, profile=profile), lambda z, _: v3.decode(z))


def _zipnn() -> Codec:
    module = importlib.import_module("zipnn")
    formats = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    held = {
        name: module.ZipNN(input_format="byte", bytearray_dtype=value, threads=1) for name, value in formats.items()
    }
    return Codec(
        lambda x: bytes(held[x.dtype.name].compress(bytearray(x.view(np.uint8)))),
        lambda z, x: held[x.dtype.name].decompress(z),
    )


def _pcodec(channel_major: bool) -> Codec:
    module = importlib.import_module("pcodec")
    config = module.ChunkConfig(compression_level=8)

    def encode(x: np.ndarray) -> bytes:
        rows = x.reshape(len(x), -1)
        if x.dtype.name == "bfloat16":  # no such type there: integers of the same order
            words = rows.view(np.uint16)
            rows = words ^ ((words.view(np.int16) >> 15).view(np.uint16) | np.uint16(0x8000))
        rows = np.ascontiguousarray(rows.T) if channel_major else rows
        return bytes(module.standalone.simple_compress(rows.reshape(-1), config))

    def decode(z: bytes, x: np.ndarray) -> np.ndarray:
        words = module.standalone.simple_decompress(z)
        words = np.ascontiguousarray(words.reshape(-1, len(x)).T) if channel_major else words
        if x.dtype.name == "bfloat16":
            words = words ^ (~(words.view(np.int16) >> 15).view(np.uint16) | np.uint16(0x8000))
        return words

    return Codec(encode, decode, slow=True)


def _blosc2() -> Codec:
    module = importlib.import_module("blosc2")
    module.set_nthreads(1)
    return Codec(
        lambda x: module.compress2(
            x.view(np.uint8), typesize=x.itemsize, codec=module.Codec.ZSTD, clevel=1, filters=[module.Filter.SHUFFLE]
        ),
        lambda z, _: module.decompress2(z),
    )


def _openzl() -> Codec:
    """The hand-built graph: exponent and the rest apart, FSE for the exponent (float16 does not compress so)."""
    zl = importlib.import_module("openzl.ext")
    held = {}
    for name, node in (("bfloat16", "BFloat16Deconstruct"), ("float32", "Float32Deconstruct"), ("float16", None)):
        compressor = zl.Compressor()
        compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        if node:
            store, fse = zl.graphs.Store()(compressor), zl.graphs.Fse()(compressor)
            graph = getattr(zl.nodes, node)()(compressor, sign_frac=store, exponent=fse)
        else:
            graph = zl.graphs.Compress()(compressor)
        compressor.select_starting_graph(graph)
        held[name] = compressor
    decoder = zl.DCtx()

    def encode(x: np.ndarray) -> bytes:
        words = x.reshape(-1).view(f"u{x.itemsize}")
        context = zl.CCtx()
        context.ref_compressor(held[x.dtype.name])
        return context.compress([zl.Input(zl.Type.Numeric, words)])

    return Codec(encode, lambda z, _: np.array(decoder.decompress(z)[0].content.as_nparray()))


def codecs(slow: bool) -> dict[str, Codec]:
    """Ours, zstd, and whatever peers are installed."""
    found = {f"v3 {profile}": _v3(profile) for profile in ("fast", "balanced", "small")}
    found |= {"v2": Codec(lambda x: qatc.encode(x.reshape(-1), threads=1), lambda z, _: qatc.decode(z, threads=1))}
    found |= {"zstd -3": _zstd(3), "zstd -19": _zstd(19)}
    optional: dict[str, Callable[[], Codec]] = {
        "ZipNN": _zipnn,
        "OpenZL": _openzl,
        "blosc2 shuffle zstd": _blosc2,
        "pcodec": lambda: _pcodec(False),
        "pcodec, channel-major": lambda: _pcodec(True),
    }
    for name, make in optional.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"without {name}: {error}")
    return {name: codec for name, codec in found.items() if slow or not codec.slow}


def _entropy(values: np.ndarray) -> float:
    counts = np.bincount(values.reshape(-1))
    share = counts[counts > 0] / values.size
    return float(-(share @ np.log2(share)))


def bounds(pieces: list[np.ndarray]) -> dict[str, float]:
    """Order-0 entropy of the exponents with all other bits raw, plain and given the channel, as a share of raw."""
    plain = given = total = 0.0
    for piece in pieces:
        bits = 8 * piece.itemsize
        exponent = {"bfloat16": 8, "float16": 5, "float32": 8}[piece.dtype.name]
        words = piece.reshape(len(piece), -1).view(f"u{piece.itemsize}").astype(np.int64)
        exponents = (words >> (bits - 1 - exponent)) & ((1 << exponent) - 1)
        channel = np.arange(words.shape[1])
        plain += piece.size * (bits - exponent + _entropy(exponents))
        given += piece.size * (bits - exponent + _entropy(exponents + (channel << exponent)) - np.log2(channel.size))
        total += piece.size * bits
    return {"bound: order-0 exponent": plain / total, "bound: order-0 exponent given channel": given / total}


def caches(model: str, tokens: str, length: int) -> dict[str, list[np.ndarray]]:
    """Keys and values of every layer of a Hugging Face model, [tokens, heads, dim] bfloat16."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    file, _, member = tokens.rpartition(":")
    with np.load(file) as archive:
        ids = torch.from_numpy(archive[member][:length].astype(np.int64))[None]
    llm = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    cache = transformers.DynamicCache()
    with torch.no_grad():
        llm(ids, past_key_values=cache, use_cache=True)

    def array(tensor) -> np.ndarray:
        return tensor[0].transpose(0, 1).contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    return {
        f"{member} keys": [array(layer.keys) for layer in cache.layers],
        f"{member} values": [array(layer.values) for layer in cache.layers],
    }


def generated(tokens: int = 4096, channels: int = 1024) -> dict[str, list[np.ndarray]]:
    """Tensors [tokens, channels] with log-normal channel scales, correlated tokens or channel means; and noise."""
    rng = np.random.default_rng(1)
    scale = np.exp(rng.standard_normal(channels, dtype=np.float32))
    correlated = rng.standard_normal((tokens, channels), dtype=np.float32)
    for t in range(1, tokens):
        correlated[t] = 0.9 * correlated[t - 1] + np.sqrt(np.float32(1 - 0.81)) * correlated[t]
    correlated *= scale
    cosine = np.where(np.arange(channels) < channels // 2, 0.7, 0.3)  # of two tokens, set by the mean
    mean = rng.standard_normal(channels) * np.sqrt(cosine / (1 - cosine))
    biased = (rng.standard_normal((tokens, channels), dtype=np.float32) + mean.astype(np.float32)) * scale**0.6
    bf16 = ml_dtypes.bfloat16
    noise = rng.standard_normal((tokens, channels), dtype=np.float32)
    return {
        "correlated bf16": [correlated.astype(bf16)],
        "correlated f16": [correlated.astype(np.float16)],
        "correlated f32": [correlated],
        "biased bf16": [biased.astype(bf16)],
        "biased f16": [biased.astype(np.float16)],
        "biased f32": [biased],
        "noise bf16": [noise.astype(bf16)],
    }


def _timed(function: Callable[[], list]) -> tuple[list, float]:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def measure(pieces: list[np.ndarray], contestants: dict[str, Codec], rounds: int) -> dict[str, dict[str, float]]:
    """Ratio of size, and CPU seconds per round, of every codec on one set of tensors."""
    raw = sum(piece.nbytes for piece in pieces)
    rows: dict[str, dict[str, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, codec in contestants.items():
            if codec.slow and turn:
                continue
            coded, spent = _timed(lambda codec=codec: [codec.encode(piece) for piece in pieces])
            decoded, back = _timed(
                lambda codec=codec, coded=coded: [codec.decode(z, x) for z, x in zip(coded, pieces, strict=True)]
            )
            times[name].append((spent, back))
            if not turn:
                for got, piece in zip(decoded, pieces, strict=True):
                    same = np.asarray(memoryview(got) if isinstance(got, bytes | bytearray) else got)
                    assert same.reshape(-1).view(np.uint8).tobytes() == piece.tobytes(), f"{name} is not lossless"
                rows[name] = {"ratio": sum(len(z) for z in coded) / raw}
    for name, spent in times.items():
        rows[name]["encode GB/s"] = raw / 1e9 / statistics.median(pair[0] for pair in spent)
        rows[name]["decode GB/s"] = raw / 1e9 / statistics.median(pair[1] for pair in spent)
        for peer, which, key in (("ZipNN", 0, "encode / ZipNN"), ("zstd -3", 1, "decode / zstd -3")):
            if peer in times and len(spent) == len(times[peer]):
                pairs = zip(times[peer], spent, strict=True)
                rows[name][key] = statistics.median(theirs[which] / ours[which] for theirs, ours in pairs)
    return rows


def main() -> None:
    """Print one table per set of tensors, and optionally all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder of a Llama-architecture model")
    parser.add_argument("--tokens", action="append", default=[], help="FILE.npz:MEMBER, repeatable")
    parser.add_argument("--length", type=int, default=4096, help="tokens per cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="leave out zstd -19 and pcodec, and the generated tensors")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    sets: dict[str, list[np.ndarray]] = {}
    for tokens in args.tokens:
        sets |= caches(args.model, tokens, args.length)
    if not args.quick:
        sets |= generated()
    contestants, results = codecs(slow=not args.quick), {}
    for name, pieces in sets.items():
        rows: dict[str, dict[str, float]] = {key: {"ratio": value} for key, value in bounds(pieces).items()}
        rows |= measure(pieces, contestants, args.rounds)
        results[name] = rows
        columns = ("ratio", "encode GB/s", "decode GB/s", "encode / ZipNN", "decode / zstd -3")
        shape = f"{len(pieces)} x {pieces[0].shape} {pieces[0].dtype}"
        print(f"\n{name}: {shape}\n{'':38}" + "".join(f"{column:>17}" for column in columns))
        for codec, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
            cells = [
                f"{row[column]:17.{4 if column == 'ratio' else 2}f}" if column in row else " " * 17
                for column in columns
            ]
            print(f"{codec:38}" + "".join(cells), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
