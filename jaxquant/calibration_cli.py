"""`jaxquant calibrate`."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxquant import _console
from jaxquant._console import Json, ModelDir

_DRAWN = 1024  # last tokens of the text, on which pictures compare methods


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    model: ModelDir = None,
    tokens: Annotated[
        str | None, typer.Option(help="FILE[:NAME]: .npy, member of .npz, or a text file; default: held-out text.")
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="First token.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text.")] = 6,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=64, help="Tokens of a row; default: the model's context, 4096 at most."),
    ] = None,
    retrieval: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the rows in which pass keys are hidden and asked for.")
    ] = 0.5,
    bits: Annotated[
        float, typer.Option(help="Mean bits per coordinate of keys and values, everything included.")
    ] = 2.5,
    group: Annotated[int, typer.Option(help="Neighbouring coordinates of one width, a multiple of 8.")] = 8,
    layer_groups: Annotated[
        int | None, typer.Option(min=1, help="Runs of layers with one template each; default: one for each layer.")
    ] = None,
    metric: Annotated[
        Literal["information", "worst", "attention"],
        typer.Option(
            help="How errors count: by Fisher information, the same for the worst query, or attention's output."
        ),
    ] = "information",
    allocation: Annotated[Literal["exact", "greedy"], typer.Option(help="How bits are shared out.")] = "exact",
    head_types: Annotated[
        int, typer.Option(min=0, help="Types of heads for which shared codebooks are searched; 0: none.")
    ] = 0,
    quantizer: Annotated[
        Literal["scalar", "trellis"],
        typer.Option(help="scalar: a codebook for each coordinate; trellis: or a trellis code, where it leaves less."),
    ] = "scalar",
    states: Annotated[int, typer.Option(help="Of the trellis, a power of 2 from 4 to 1024.")] = 256,
    steps: Annotated[int, typer.Option(min=0, help="Of gradient descent on what codes of keys decode to.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of pass keys, labels and searches.")] = 0,
    keep: Annotated[
        Path | None,
        typer.Option(help="File for what is measured: a run that was interrupted, or has another budget, uses it."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for pictures; needs the extra `plot`.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on a few thousand tokens, and write quantizers of its keys and values that fit it."""
    from jaxquant import models, token_files
    from jaxquant.calibrate import files, make, pictures, tradeoff

    if report is not None:
        pictures.check()
    began = time.perf_counter()
    found = models.load(model)
    ids = token_files.read(found, tokens)
    with _console.bar() as bar:
        step = _console.advance(bar)
        measured = make.measure(
            found, ids, start=start, rows=rows, seq_len=seq_len, retrieval=retrieval, seed=seed, keep=keep,
            progress=step,
        )  # fmt: skip
        candidates = make.candidates(
            measured, metric=metric, types=head_types, states=states if quantizer == "trellis" else 0, seed=seed,
            progress=step,
        )  # fmt: skip
        made = make.choose(
            found, measured, candidates, bits=bits, group=group, layer_groups=layer_groups, method=allocation,
            steps=steps,
        )  # fmt: skip
        files.write(output, made)
        drawn = []
        if report is not None:
            unseen = ids[-min(len(ids), _DRAWN) :]
            lost = tradeoff.losses(found, measured, made, unseen)
            points = tradeoff.points(found, measured, candidates, unseen, progress=step)
            drawn = pictures.write(report, candidates, made, lost, points)
    summary = {
        "file": str(output),
        "bytes": output.stat().st_size,
        "bits": made.bits,
        "key_bits": [8 * half.bytes_per_vector / half.dim for half in made.keys],
        "value_bits": [8 * half.bytes_per_vector / half.dim for half in made.values],
        "predicted_kl": made.setting["predicted_kl"],
        **{name: made.setting[name] for name in ("shared_codebooks", "attention_kl") if name in made.setting},
        "tokens": measured.statistics.tokens,
        "seconds": time.perf_counter() - began,
    }
    if drawn:
        summary["pictures"] = [str(path) for path in drawn]
    if as_json:
        return _console.print_json(summary)
    for name in ("key_bits", "value_bits"):
        summary[name] = [f"{bits:.2f}" for bits in summary[name]]
    _console.show(summary, False, title="calibration")
