"""`jaxquant report`: the command line of `report`."""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant import _console, plan_cli
from jaxquant._console import Json, ModelDir, out

if TYPE_CHECKING:
    from jaxquant import models
    from jaxquant._report_inputs import Candidate


def report(
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    model: ModelDir = None,
    tokens: Annotated[
        str | None, typer.Option(help="FILE[:NAME]: .npy, member of .npz, or a text file; default: held-out text.")
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="First token.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows; row i is tokens[start + i (T+1):][:T+1].")] = 4,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="T, tokens that a row predicts.")] = 512,
    methods: Annotated[
        str, typer.Option(help="Names that `jaxquant methods` lists, or package.module:Object; several with commas.")
    ] = "turboquant,uniform",
    bits: Annotated[str, typer.Option(help="Of keys and values; several with commas.")] = ("K8V8,K6V4,K4V4,K4V2,K2V2"),
    calibration: Annotated[
        list[Path] | None, typer.Option(help="File that `jaxquant calibrate` made, as one more setting; repeatable.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens of a row that stay exact.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="Newest tokens of a row that stay exact.")] = 0,
    needles: Annotated[
        str | None,
        typer.Option(help="FILE:NAME of rows [n, T] with questions for pass keys; default: hidden in the text."),
    ] = None,
    needle_rows: Annotated[int, typer.Option(min=0, help="Rows with pass keys; 0 for none.")] = 4,
    most_kl: Annotated[float, typer.Option("--max-kl", help="Largest KL divergence to recommend, nats.")] = 0.05,
    least_top1: Annotated[float, typer.Option("--min-top1", help="Smallest share of the same top token.")] = 0.9,
    most_lost: Annotated[
        float, typer.Option("--max-needle-loss", help="Largest share of pass-key tokens that may be lost.")
    ] = 0.05,
    hbm: Annotated[
        float | None, typer.Option(help="Memory of a device, in GB (10^9 bytes): predicts what fits and how fast.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(help="That such a device reads at, in GB/s.")] = 4550.0,
    devices: Annotated[int, typer.Option(min=1, help="Such devices that share the model.")] = 1,
    planned_tokens: Annotated[int, typer.Option("--context", min=1, help="Tokens of a row to predict.")] = 32_768,
    planned_rows: Annotated[int, typer.Option("--plan-batch", min=1, help="Rows to predict.")] = 1,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of a prefill step.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of rotations, pass keys and their places.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure many settings of one model's cache and write a page: what each saves, what it costs, which to take.

    A folder that `jaxquant convert` wrote is measured with the cache that it describes too.
    """
    from jaxquant import _report_inputs as inputs
    from jaxquant import _report_page, plan, prepared
    from jaxquant import report as measuring
    from jaxquant.attention_benchmark import widths
    from jaxquant.codecs import atomic
    from jaxquant.trial import Trial, load_model

    began = time.perf_counter()
    _check_writable(output)
    limits = measuring.Limits(kl=most_kl, top1=least_top1, needles=most_lost)
    machine = None
    if hbm is not None:
        machine = plan.Machine(devices=devices, memory=hbm * 1e9, bandwidth=bandwidth * 1e9)
    pairs = [widths(name) for name in _several(bits)]
    with _console.bar() as bar:
        step = _console.advance(bar)
        step("reading the model", 0, 1)
        own = Trial.ready(model) if model is not None and (model / prepared.FILE).is_file() else None
        found = load_model(model) if own is None else own.model
        text = inputs.gather(
            found, tokens, start=start, rows=rows, length=seq_len, needle_file=needles, needle_rows=needle_rows,
            seed=seed,
        )  # fmt: skip
        settings = inputs.candidates(
            found, _several(methods), pairs, sinks=sinks, window=window, seed=seed, calibrations=calibration or (),
            own=own,
        )  # fmt: skip
        step("reading the model", 1, 1)
        measured = measuring.measure(settings, text, limits, chunk=chunk, batch=batch, progress=step)
    planned = None
    if machine is not None:
        kinds = _planned(found, settings, machine, planned_tokens, planned_rows)
        planned = {"context": planned_tokens, "batch": planned_rows, "devices": devices, "hbm_gb": hbm,
                   "bandwidth_gb": bandwidth, "caches": kinds}  # fmt: skip
    a = found.architecture
    whole = {
        "model": {
            "name": "the small model in the package" if model is None else found.folder.resolve().name,
            "folder": "in the package" if model is None else str(model),
            **{name: getattr(a, name) for name in ("family", "layers", "heads", "kv_heads", "dim")},
        },
        "text": {"source": text.source, "rows": rows, "length": seq_len, "sinks": sinks, "window": window,
                 "predicted_tokens": measured.predicted_tokens, "answer_tokens": measured.answer_tokens},
        **{
            name: value
            for name, value in dataclasses.asdict(measured).items()
            if name not in ("predicted_tokens", "answer_tokens")
        },
        "nearest": measuring.nearest(measured.rows).name,
        "plan": planned,
        "made": {
            "command": shlex.join(["jaxquant", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seconds": time.perf_counter() - began,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("jaxquant", "jax", "jaxlib")},
            "hardware": _hardware(),
        },
    }  # fmt: skip
    whole = _finite(whole)
    page = _report_page.page(whole).encode()
    with atomic.replacing(output) as file:
        file.write(page)
    if as_json:
        return _console.print_json(whole)
    out.print(f"recommended: {whole['recommended'] or 'none, see the page'}", highlight=False, markup=False)
    out.print(f"{output}: {len(page):,} bytes", highlight=False, markup=False, soft_wrap=True)


def _several(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _check_writable(output: Path) -> None:
    """Refuse what could not be written in the end, before anything is measured."""
    if output.is_dir():
        raise IsADirectoryError(f"--output {output}: is a folder")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: no such folder as {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"--output {output}: {output.parent} cannot be written to")


def _planned(
    model: "models.Model", settings: "list[Candidate]", machine: Any, tokens: int, rows: int
) -> dict[str, dict[str, Any]]:
    from jaxquant import plan

    given = {"layers": model.architecture.layers, "weights": plan.weights(model.architecture),
             "context": tokens, "batch": rows}  # fmt: skip

    def exact(count: int) -> int:
        return plan.cache_bytes(model.architecture, None, context=count, batch=rows)

    kinds = {"16 bit": plan_cli.predicted("bf16", exact, machine, **given)}
    for one in settings:

        def held(count: int, one: "Candidate" = one) -> int:
            return one.nbytes(batch=rows, tokens=count)

        kind = one.bits if one.method == "turboquant" else ""
        kinds[one.name] = plan_cli.predicted(kind, held, machine, **given)
    return kinds


def _hardware() -> dict[str, Any]:
    import jax

    found = jax.devices()
    processor = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        lines = listed.read_text(errors="replace").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {"device": found[0].device_kind, "devices": len(found), "host": processor, "cpus": os.cpu_count()}


def _finite(value: Any) -> Any:
    """Put null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
