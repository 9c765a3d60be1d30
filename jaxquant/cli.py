"""The `jaxquant` command: the only place where strings become objects."""

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jaxquant import (
    _console,
    benchmark_cli,
    calibration_cli,
    conversion_cli,
    listing_cli,
    migration_cli,
    plan_cli,
    qatc_cli,
    report_cli,
)
from jaxquant._console import Json, ModelDir, err, out

if TYPE_CHECKING:
    from jaxquant.trial import Trial

app = typer.Typer(
    name="jaxquant",
    help="KV-cache compression for JAX: packed low-bit caches, evaluation, lossless tensor files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(qatc_cli.app, name="qatc")
app.add_typer(benchmark_cli.app, name="benchmark")
app.command()(plan_cli.plan)
app.command()(listing_cli.info)
app.command()(listing_cli.methods)

Method = Annotated[str, typer.Option(help="A name that `jaxquant methods` lists, or package.module:Object.")]
CacheMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="A name that `jaxquant methods` lists, or package.module:Object. "
        "Without it and the next four, the folder's own, where `jaxquant convert` wrote one; else turboquant.",
    ),
]
BitsK = Annotated[int | None, typer.Option("--bits-k", help="Bits per coordinate of keys; 4.")]
BitsV = Annotated[int | None, typer.Option("--bits-v", help="Bits per coordinate of values; 4.")]
Sinks = Annotated[int | None, typer.Option(min=0, help="First tokens of a row that stay exact; 4, and 0 for eval.")]
Window = Annotated[int | None, typer.Option(min=0, help="Newest tokens of a row that stay exact; 32, and 0 for eval.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the rotations (and of sampling).")]

_LINES = (  # labels, keys and formats of the numbers in a report, in reading order
    ("cache of the prompt, bytes held", "cache_bytes", ",.0f"),
    ("scored text: bytes per token and kv head", "bytes_per_token", ".1f"),
    ("perplexity", "perplexity", ".4f"),
    ("KL divergence, nats", "kl", ".5f"),
    ("same most probable token", "top1", ".2%"),
    ("pass-key tokens right", "needle_accuracy", ".2%"),
    ("prefill, tokens/s", "prefill_tokens_per_second", ",.1f"),
    ("decode, tokens/s", "decode_tokens_per_second", ",.1f"),
)


def main() -> None:
    """Run the command; an error of the user's input is one line on stderr and exit status 1."""
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
        err.print(f"jaxquant: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@benchmark_cli.app.command(name="vectors")
def benchmark(
    method: Method = "turboquant",
    bits: Annotated[list[int] | None, typer.Option(help="Repeat for several; default 2 3 4 6 8.")] = None,
    dim: Annotated[int, typer.Option(help="Length of the vectors.")] = 128,
    vectors: Annotated[int, typer.Option(min=1, help="How many.")] = 16_384,
    inputs: Annotated[
        str, typer.Option("--input", help="Their statistics; a wrong name lists what there is.")
    ] = "gaussian",
    scale: Annotated[str, typer.Option(help="norm, preserve, unbiased or least_squares.")] = "norm",
    rotation: Annotated[str, typer.Option(help="hadamard, haar, rotor or identity.")] = "hadamard",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure error, size and speed of a quantizer on synthetic vectors, beside the theoretical bounds."""
    import jax

    from jaxquant import benchmark as measure
    from jaxquant import catalogue

    if inputs not in measure.INPUTS:
        raise ValueError(f"--input must be one of {', '.join(measure.INPUTS)}, got {inputs!r}")
    build = catalogue.find(method, "mse")
    given = {"scale": scale, "rotation": rotation}
    settings = {name: value for name, value in given.items() if name in inspect.signature(build).parameters}
    rotate, draw = jax.random.split(jax.random.key(seed))
    x = measure.INPUTS[inputs](draw, vectors, dim)
    rows = []
    with _console.bar() as bar:
        for width in bar.track(bits or [2, 3, 4, 6, 8], description="measuring"):
            quantizer = build(rotate, dim=dim, bits=width, **settings)
            quality, speed = measure.quality(quantizer, x), measure.speed(quantizer, x)
            upper, lower = measure.bounds(width)
            rows.append({
                "bits": width, "nmse": quality.nmse, "upper_bound": upper, "shannon_bound": lower,
                "snr_db": quality.snr, "cosine": quality.cosine, "worst_cosine": quality.worst_cosine,
                "gain": quality.gain, "bytes_per_vector": quality.bytes_per_vector,
                "ratio_to_16_bit": 2 * dim / quality.bytes_per_vector,
                "quantize_per_second": speed.quantize, "dequantize_per_second": speed.dequantize,
                "quantize_per_matmul": speed.quantize_ratio, "dequantize_per_matmul": speed.dequantize_ratio,
            })  # fmt: skip
    if as_json:
        return _console.print_json({"method": method, "dim": dim, "vectors": vectors, "input": inputs, "scale": scale,
                            "rotation": rotation, "seed": seed, "results": rows})  # fmt: skip
    table = Table(title=f"{method}, {inputs} vectors of {dim}, rotation {rotation}, scale {scale}")
    for header in ("bits", "NMSE", "bound", "Shannon", "SNR dB", "bytes", "quantize/s", "decode/s"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["bits"]), f"{row['nmse']:.3g}", f"{row['upper_bound']:.2g}", f"{row['shannon_bound']:.2g}",
            f"{row['snr_db']:.1f}", f"{row['bytes_per_vector']:.0f}",
            f"{row['quantize_per_second']:.2g}", f"{row['dequantize_per_second']:.2g}",
        )  # fmt: skip
    out.print(table)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: ModelDir = None,
    method: CacheMethod = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    sinks: Sinks = None,
    window: Window = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this probability.")] = 1.0,
    exact: Annotated[bool, typer.Option("--exact", help="Do not compress.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt from a packed cache."""
    chosen = _trial(model, method, bits_k, bits_v, sinks, window, seed, exact_tokens=(4, 32))
    write = None if as_json else lambda text: out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    if write is not None:
        write(prompt)
    result = chosen.generate(
        prompt,
        compressed=not exact,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=write,
    )
    if as_json:
        return _console.print_json({"prompt": prompt, **result})
    out.print()
    _console.show({name: value for name, value in result.items() if name != "text"}, False, title="cache")


@app.command()
def compare(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: ModelDir = None,
    method: CacheMethod = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    sinks: Sinks = None,
    window: Window = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    text: Annotated[
        Path | None, typer.Option(help="Text to score; default: held-out Python source in the package.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of it to score.")] = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt with and without compression, and measure what it saved and what it cost."""
    from jaxquant import comparison

    chosen = _trial(model, method, bits_k, bits_v, sinks, window, seed, exact_tokens=(4, 32))
    with _console.bar() as bar:
        report = comparison.compare(
            chosen, prompt, max_tokens=max_tokens, text=text, rows=rows, seq_len=seq_len, progress=_console.advance(bar)
        )
    if as_json:
        return _console.print_json(report)
    for name in ("baseline", "compressed"):
        out.rule(name)
        out.print(prompt, report[name]["text"], sep="", markup=False, highlight=False, soft_wrap=True)
    out.rule()
    table = Table("", "baseline (16 bit)", "compressed")
    for label, key, form in _LINES:
        cells = [format(report[name][key], form) if key in report[name] else "" for name in ("baseline", "compressed")]
        table.add_row(label, *cells)
    out.print(table)
    out.print(report["setting"], highlight=False, soft_wrap=True)


app.command()(calibration_cli.calibrate)
app.command()(conversion_cli.convert)
app.command()(migration_cli.migrate)
app.command()(report_cli.report)


@app.command(name="eval")
def evaluate(
    model: ModelDir = None,
    tokens: Annotated[
        str | None, typer.Option(help="FILE[:NAME]: .npy, member of .npz, or a text file; default: held-out text.")
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="First token.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows; row i is tokens[start + i (T+1):][:T+1].")] = 6,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="T, tokens that a row predicts.")] = 1024,
    method: CacheMethod = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File that `jaxquant calibrate` made; it takes the place of method and bits.")
    ] = None,
    sinks: Sinks = None,
    window: Window = None,
    needles: Annotated[str | None, typer.Option(help="FILE:NAME of rows [n, T] with questions for pass keys.")] = None,
    needle_rows: Annotated[int, typer.Option(min=1, help="Rows of them.")] = 4,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of a prefill step.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL divergence, agreement and pass-key retrieval through the packed cache."""
    from jaxquant import comparison
    from jaxquant.trial import Trial

    if calibration is None:
        chosen = _trial(model, method, bits_k, bits_v, sinks, window, seed, exact_tokens=(0, 0))
    else:
        chosen = Trial.calibrated(model, calibration, sinks=sinks or 0, window=window or 0)
    with _console.bar() as bar:
        report = comparison.measure(
            chosen, tokens, start=start, rows=rows, seq_len=seq_len, needle_file=needles, needle_rows=needle_rows,
            chunk=chunk, batch=batch, progress=_console.advance(bar),
        )  # fmt: skip
    if as_json:
        return _console.print_json(report)
    table = Table("", "baseline", "compressed")
    for label, key, form in _LINES:
        if any(key in report[name] for name in ("baseline", "compressed")):
            cells = [
                format(report[name][key], form) if key in report[name] else "" for name in ("baseline", "compressed")
            ]
            table.add_row(label, *cells)
    out.print(table)
    out.print(report["setting"], highlight=False, soft_wrap=True)


def _trial(
    model: Path | None,
    method: str | None,
    bits_k: int | None,
    bits_v: int | None,
    sinks: int | None,
    window: int | None,
    seed: int,
    *,
    exact_tokens: tuple[int, int],
) -> "Trial":
    """Load a model, and the cache that its folder describes unless the options say something else."""
    from jaxquant import catalogue, prepared
    from jaxquant.trial import Trial

    asked = any(option is not None for option in (method, bits_k, bits_v, sinks, window))
    if not asked and model is not None and (model / prepared.FILE).is_file():
        return Trial.ready(model)
    bits_k, bits_v = (4 if bits is None else bits for bits in (bits_k, bits_v))
    sinks, window = (
        default if size is None else size for size, default in zip((sinks, window), exact_tokens, strict=True)
    )
    build = catalogue.find(method or "turboquant")
    return Trial.load(model, build, bits_k=bits_k, bits_v=bits_v, sinks=sinks, window=window, seed=seed)
