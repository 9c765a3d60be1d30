"""`jaxquant convert`: a model folder whose weights and cache are ready for use."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxquant import _console
from jaxquant._console import Json, ModelDir


def convert(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="File that `jaxquant calibrate` made for this model: its value basis goes into the weights."),
    ] = None,
    model: ModelDir = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens of a row that the folder's cache keeps exact.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="Newest tokens of a row that it keeps exact.")] = 0,
    weights: Annotated[
        float | None, typer.Option(help="Mean bits of W_V and W_O; without it weights keep their numbers.")
    ] = None,
    all_linear: Annotated[
        bool, typer.Option("--all-linear", help="Code the other linear layers too, in as many bits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a folder that starts faster: value basis in the weights, cache worked out, weights in few bits."""
    from jaxquant import models, packed_weights, prepared
    from jaxquant.calibrate import absorb, files
    from jaxquant.calibrate import weights as coding

    if calibration is None and weights is None:
        raise ValueError("convert needs --calibration, --weights, or both: without them there is nothing to change")
    if all_linear and weights is None:
        raise ValueError("--all-linear needs --weights, the bits")
    if (output / "config.json").exists():
        raise ValueError(f"{output} holds a model already; give a new folder")
    found = models.load(model, dtype="float32")
    report: dict[str, Any] = {"folder": str(output)}
    changed, made = found, None
    if calibration is not None:
        changed, made = absorb.absorb(found, files.read(calibration))
        report["largest_logit_difference"] = absorb.difference(found, changed)
    packed = None
    if weights is not None:
        with _console.bar() as bar:
            step = _console.advance(bar)
            changed, packed = coding.compress(
                changed, weights, everything=all_linear, progress=lambda done, total: step("weights", done, total)
            )
        if made is not None:
            made = dataclasses.replace(made, fingerprint=files.fingerprint(changed))
    absorb.write_folder(changed, made, output)
    if packed is not None:
        report["coded_bytes"] = sum(one.nbytes for one in packed.values())
        report["coded_bytes_in_16_bits"] = coding.dense_nbytes(changed, packed)
        report["weights_file_bytes"] = packed_weights.write(output, changed, packed)
    if made is not None:
        report["calibration"] = str(output / "calibration.safetensors")
        cache = changed.decoder.init_cache(
            made.keys, made.values, batch=1, capacity=sinks + 1, sinks=sinks, window=window
        )
        prepared.write(output, cache)
    _console.show(report, as_json, title="converted")
