"""Trellis codes on a GPU: vectors coded in a second, and decode attention over codes beside the fastest over bfloat16.

    python tests/bench/bench_trellis_gpu.py [--seconds 120] [--json FILE] [--quick]

Coding: vectors of dim 128 of bfloat16 into a donated cache, by bits and states, beside the fused append of scalar codes
and XLA's search; the squared error of what was written, over that of the vectors; and how many of some vectors have the
codes that XLA gives them. Attention: what `attention_benchmark` measures, with its peers that were the fastest; the
error is relative to attention in float64 over the decoded cache. Indented lines vary what the kernels choose.
What would begin after `--seconds` is left out. Exits with 1 where a target is missed on an H200, or a result is wrong.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp

from jaxquant import _attention_peers, _stopwatch, attention_benchmark, cache, quantizers
from jaxquant._kernels import cuda_encode, cuda_trellis
from jaxquant.attention_benchmark import Shape
from jaxquant.methods import trellis, turboquant

DIM, KV_HEADS = 128, 8
CODES = [(2, 128), (2, 64), (2, 256), (2, 16), (1, 256), (3, 64), (3, 256)]
VARIED = {(2, 128): (8, 5, 4), (2, 64): (8, 4), (2, 256): (4, 3)}  # blocks a multiprocessor
PEERS = ("cudnn", "pallas mqa")
TARGET_VECTORS, TARGET_SPEEDUP = 20e6, 2.5


def made(bits: int, states: int, seed: int = 0) -> Any:
    """Make a trellis quantizer of least squared error."""
    return trellis.mse(jax.random.key(seed), dim=DIM, bits=bits, states=states)


def empty(quantizer: Any, rows: int, tokens: int) -> Any:
    """Give the store of one layer's keys."""
    pair = (quantizer, quantizers.Exact(dim=DIM))
    return cache.init(*pair, layers=1, batch=rows, kv_heads=KV_HEADS, capacity=tokens).stacks[0].keys


def coding(quantizer: Any, rows: int, tokens: int, fused: bool = True, compared: int = 2048) -> dict[str, Any]:
    """Time coding, and compare some of the codes with those of XLA on the processor: both and their squared errors."""
    store = empty(quantizer, rows, tokens)
    x = jax.random.normal(jax.random.key(1), (rows, tokens, KV_HEADS, DIM), jnp.bfloat16)
    slot = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))

    def step(codes: Any, x: Any, slot: Any) -> Any:
        zero = codes.codes[0, 0, 0, 0, 0] >> 8  # each step depends on the one before
        held = type(store)(quantizer=quantizer, codes=codes, sinks=store.sinks, window=store.window)
        if fused:
            return cuda_encode.encode(held, 0, x, slot + zero.astype(jnp.int32))
        code = quantizer.quantize(jnp.swapaxes(x + zero.astype(x.dtype), 1, 2))
        return jax.tree.map(lambda old, new: new[None].astype(old.dtype), codes, code)

    taken = _stopwatch.median(step, store.codes, x, slot)
    row = {"ms": taken * 1e3, "vectors": x.size // DIM, "rate": x.size // DIM / taken}
    if not compared:
        return row
    codes = jax.tree.map(lambda leaf: leaf[0, 0, 0, :compared], jax.jit(step)(store.codes, x, slot))
    quantizer, codes, given = jax.device_put((quantizer, codes, x[0, :compared, 0]), jax.devices("cpu")[0])
    given = given.astype(jnp.float32)
    right = jax.jit(type(quantizer).quantize)(quantizer, given)
    row["same"] = float(jnp.mean((right.codes == codes.codes).all(axis=-1)))
    for name, code in (("error", codes), ("error_xla", right)):
        row[name] = float(jnp.sum((quantizers.dequantize(quantizer, code) - given) ** 2) / jnp.sum(given**2))
    return row


@contextlib.contextmanager
def blocks(count: int | None) -> Iterator[None]:
    """Let a multiprocessor hold so many blocks of the search."""
    chosen = cuda_trellis.shape
    varied = chosen if count is None else lambda *args: chosen(*args)._replace(blocks=count)
    with mock.patch.object(cuda_trellis, "shape", varied):
        cuda_trellis.kernel.cache_clear()
        yield
    cuda_trellis.kernel.cache_clear()


class Table:
    """Rows that are printed as they come, until time is up."""

    def __init__(self, seconds: float):
        self.until, self.rows = time.monotonic() + seconds, []

    def add(
        self, what: str, call: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], str]
    ) -> dict[str, Any]:
        """Measure one row, unless time is up; a failure is a row too."""
        row: dict[str, Any] = {"what": what}
        if time.monotonic() > self.until:
            row["failed"] = "left out: time is up"
        else:
            try:
                row |= call()
            except Exception as problem:  # what fails must not take the others along
                row["failed"] = _stopwatch.reason(problem)
        print(f"{what:<44}{row.get('failed') or show(row)}", flush=True)
        self.rows.append(row)
        return row


def shown(row: dict[str, Any]) -> str:
    """Tell what coding took."""
    text = f"{row['ms']:>9.3f} ms {row['rate'] / 1e6:>9.2f} M vectors/s"
    if "same" in row:
        text += f"   error {row['error']:.5f}, XLA's {row['error_xla']:.5f}; {row['same']:.2%} of the rings are XLA's"
    return text


def measure_coding(table: Table, quick: bool) -> None:
    """Fill in the rates of coding."""
    rows, tokens = (2, 64) if quick else (32, 2048)
    for bits, states in CODES[:2] if quick else CODES:
        name = f"append, trellis {bits} bits, {states} states"
        table.add(name, functools.partial(coding, made(bits, states), rows, tokens), shown)
    scalar, _ = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=2, bits_v=2, fused=True)
    table.add("append, scalar 2 bits", functools.partial(coding, scalar, rows, tokens), shown)


def vary_coding(table: Table) -> None:
    """Fill in rates with other numbers of blocks, and that of XLA."""
    for (bits, states), counts in VARIED.items():
        for count in counts:
            with blocks(count):
                call = functools.partial(coding, made(bits, states), 32, 2048, compared=0)
                table.add(f"  trellis {bits} bits, {states} states, {count} blocks", call, shown)
    plain = functools.partial(coding, made(2, 64), 1, 512, fused=False, compared=0)
    table.add("XLA's search, trellis 2 bits, 64 states", plain, shown)


class Attention:
    """Times of one shape."""

    def __init__(self, shape: Shape, bandwidth: float):
        self.shape, self.bandwidth, self.best = shape, bandwidth, float("inf")

    errors: ClassVar[dict[str, float]] = {}  # measured on the same small shape, whatever is timed

    def peer(self, call: Callable[[], float]) -> dict[str, Any]:
        """Time a peer."""
        taken = call()
        self.best = min(self.best, taken)
        return self.row(taken, self.shape.exact_bytes)

    def codes(self, name: str, pair: Any, bits: tuple[int, int]) -> dict[str, Any]:
        """Time attention over codes, and measure its error."""
        taken = attention_benchmark.seconds(self.shape, pair, "cuda")
        row = self.row(taken, self.shape.nbytes(bits)) | {"speedup": self.best / taken}
        if name not in self.errors:
            self.errors[name] = attention_benchmark.error(self.shape, pair, "cuda")
        return row | {"relative": self.errors[name]}

    def row(self, taken: float, nbytes: int) -> dict[str, Any]:
        """Put a row together."""
        return {"shape": repr(self.shape), "ms": taken * 1e3, "share": nbytes / taken / self.bandwidth}


def measure_attention(table: Table, quick: bool, bandwidth: float) -> None:
    """Fill in the times of attention."""

    def show(row: dict[str, Any]) -> str:
        text = f"{row['ms']:>9.4f} ms {row['share']:>5.0%} of bandwidth"
        if "relative" not in row:
            return text
        return text + f" {row['speedup']:>6.2f} x the fastest bf16   error {row['relative']:.1e}"

    scalar = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2, fused=True)
    two = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=2, bits_v=2, fused=True)
    some, fewer = ((made(2, states, 1), made(2, states, 2)) for states in (64, 32))
    large = [Shape(batch=32, tokens=131_072), Shape(batch=8, tokens=32_768)]
    for shape in [Shape(batch=1, tokens=512)] if quick else large:
        print(f"\n{shape}")
        of = Attention(shape, bandwidth)
        peers = _attention_peers.peers(shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.dim)
        for name in [name for name in peers if name in PEERS or quick]:
            table.add(f"bf16, {name}", functools.partial(of.peer, peers[name]), show)
        for name, pair, bits in (
            ("trellis K2V2, 64 states", some, (2, 2)),
            ("scalar K2V2", two, (2, 2)),
            ("scalar K4, trellis V2", (scalar[0], some[1]), (4, 2)),
            ("trellis K2V2, 32 states", fewer, (2, 2)),
        ):
            table.add(name, functools.partial(of.codes, name, pair, bits), show)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="after which nothing new is measured")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs at all")
    arguments = parser.parse_args()
    table, device = Table(arguments.seconds), jax.devices()[0].device_kind
    bandwidth = _stopwatch.read_bandwidth(2**20 if arguments.quick else None)
    print(f"{device}, jax {jax.__version__}: reads {bandwidth / 1e9:,.0f} GB/s", flush=True)
    measure_attention(table, arguments.quick, bandwidth)
    measure_coding(table, arguments.quick)
    if not arguments.quick:
        print()
        vary_coding(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": device, "read_bandwidth": bandwidth, "results": table.rows}) + "\n"
        )

    done = [row for row in table.rows if "failed" not in row]
    wrong = [row["what"] for row in done if row.get("same", 1.0) < 0.98 or row.get("relative", 0.0) > 1e-3]
    if "H200" in device:
        rates = {row["what"]: row["rate"] for row in done if "rate" in row}
        for states in (64, 128, 256):
            rate = rates.get(f"append, trellis 2 bits, {states} states", 0.0)
            print(f"{states} states: {rate / 1e6:.1f} of {TARGET_VECTORS / 1e6:.0f} M vectors/s")
        long = [row for row in done if "131072" in row.get("shape", "")]
        speedup = max((row["speedup"] for row in long if row["what"] == "trellis K2V2, 64 states"), default=0.0)
        print(f"attention: {speedup:.2f} of {TARGET_SPEEDUP} times the fastest bfloat16")
        wrong += ["attention"] if speedup < TARGET_SPEEDUP else []
        wrong += [name for name, rate in rates.items() if "2 bits, 128" in name and rate < TARGET_VECTORS]
    print("wrong or missed:", wrong or "nothing")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
