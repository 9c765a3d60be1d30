"""`jaxquant benchmark attention`: the command line of `attention_benchmark`. `benchmark vectors` is the default."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup


class _VectorsByDefault(TyperGroup):
    """Take options without a command as those of `vectors`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command where none is named."""
        return super().parse_args(ctx, args if args and args[0] in (*self.commands, "--help") else ["vectors", *args])


app = typer.Typer(cls=_VectorsByDefault, help="Measure quantizers of vectors (the default), or attention.")
out, err = Console(), Console(stderr=True)


@app.command()
def attention(
    batch: Annotated[list[int] | None, typer.Option(help="Rows; repeat for several, along with --tokens.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a row, one for each --batch.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of keys and values.")] = 8,
    dim: Annotated[int, typer.Option(min=8, help="Length of a vector.")] = 128,
    bits: Annotated[str, typer.Option(help="Of keys and values, such as K4V2; several with commas.")] = (
        "K4V4,K4V2,K2V2,K3V3"
    ),
    implementation: Annotated[str, typer.Option(help="xla, pallas, cuda; several with commas.")] = "xla",
    ejkernel: Annotated[bool, typer.Option("--ejkernel", help="Time its attention over its own codes too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write the JSON object to a file too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speedups into a file; needs the extra `plot`.")] = None,
) -> None:
    """Measure decode attention over codes beside attention over bfloat16 and the bandwidth of the memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the device
    import jax

    from jaxquant import _stopwatch, attention_benchmark

    if len(batch or []) != len(tokens or []):
        raise ValueError(f"--batch and --tokens must be given equally often, got {batch} and {tokens}")
    if heads % kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads = {kv_heads}, got {heads}")
    pairs = list(zip(batch or [], tokens or [], strict=True)) or None
    widths = [attention_benchmark.widths(name) for name in bits.split(",")]
    shapes = attention_benchmark.shapes(pairs, heads=heads, kv_heads=kv_heads, dim=dim)
    bandwidth = _stopwatch.read_bandwidth()
    rows = []
    for shape in shapes:
        for row in attention_benchmark.measure(shape, widths, implementation.split(","), bandwidth, ejkernel=ejkernel):
            rows.append(row)
            err.print(_line(row), highlight=False, markup=False, soft_wrap=True)
    names = implementation.split(",")
    own = [row for row in rows if row["bits"] != "bf16" and row["implementation"] in names]
    failures = [row["failed"] for row in own if "failed" in row]
    if len(failures) == len(shapes) * len(widths) * len(names):
        raise RuntimeError(failures[0])
    report = {
        "device": jax.devices()[0].device_kind,
        "host": platform.processor() or platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxquant", "jax", "jaxlib")},
        "read_bandwidth": bandwidth,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "results": rows,
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")
    if plot is not None:
        attention_benchmark.plot(rows, str(plot))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    title = f"{report['device']}: {heads} heads, {kv_heads} kv heads of {dim}; reads {bandwidth / 1e9:,.0f} GB/s"
    table = Table(title=title)
    for header in ("rows x tokens", "bits", "by", "ms", "GB/s", "of peak", "speed", "error"):
        table.add_column(header, justify="left" if header in ("bits", "by") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*("failed" if cell == row.get("failed") else cell for cell in _cells(row)))
    out.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    first = [f"{row['batch']} x {row['tokens']:,}", row["bits"], row["implementation"]]
    if "failed" in row:
        return [*first, row["failed"]]
    rate = row["bytes"] / row["ms"] / 1e6
    speedup = f"{row['speedup']:.2f}x" if row.get("speedup") else ""
    error = f"{row['error']:.1e}" if "error" in row else ""
    return [*first, f"{row['ms']:.4f}", f"{rate:,.0f}", f"{row['share']:.0%}", speedup, error]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(cell for cell in _cells(row) if cell)
