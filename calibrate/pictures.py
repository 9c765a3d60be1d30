"""Pictures of a calibration, for `jaxquant calibrate --report DIR`; needs matplotlib, the extra `plot`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.calibrate.files import Calibration
from jaxquant.calibrate.make import Candidates
from jaxquant.mixed import Mixed


def write(folder: Path, found: Candidates, made: Calibration) -> list[Path]:
    """Draw the worth of every coordinate, the bits of every layer, and what each layer is predicted to lose.

    Args:
        folder: is made where it is missing.
        found: what keys and values could be coded with.
        made: what was chosen.

    Returns:
        The files, PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError('pictures need matplotlib: pip install "jaxquant[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    halves = {"keys": (found.keys, made.keys), "values": (found.values, made.values)}
    draw = {"spectra": _spectrum, "bits": _bits, "predicted_loss": _loss}
    files = []
    for name, picture in draw.items():
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
        for axis, (half, (fitted, quantizers)) in zip(axes, halves.items(), strict=True):
            axis.set_title(half)
            picture(figure, axis, fitted, quantizers)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files


def _spectrum(figure: Any, axis: Any, fitted: Any, quantizers: tuple[Mixed, ...]) -> None:
    worth = fitted.basis.worth.mean(axis=1)
    for layer, line in enumerate(worth):
        axis.semilogy(line, label=f"layer {layer}" if len(worth) <= 10 else None, linewidth=1)
    axis.set_xlabel("coordinate")
    axis.set_ylabel("variance in the metric, nats")
    if len(worth) <= 10:
        axis.legend(fontsize=7, ncols=2)


def _bits(figure: Any, axis: Any, fitted: Any, quantizers: tuple[Mixed, ...]) -> None:
    table = np.zeros((len(quantizers), quantizers[0].dim))
    for layer, quantizer in enumerate(quantizers):
        bits = [bits for bits, count in quantizer.widths for _ in range(count)]
        table[layer, : len(bits)] = bits
    image = axis.imshow(table, aspect="auto", interpolation="nearest", vmin=0, vmax=max(fitted.choices))
    axis.set_xlabel("coordinate, in falling order of bits")
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, label="bits")


def _loss(figure: Any, axis: Any, fitted: Any, quantizers: tuple[Mixed, ...]) -> None:
    lines = fitted.losses.sum(axis=(2, 3)) / 2
    for layer in range(lines.shape[1]):
        axis.semilogy(fitted.choices, lines[:, layer], color="tab:gray", linewidth=0.8)
        bits = 8 * quantizers[layer].bytes_per_vector / quantizers[layer].dim
        axis.annotate(str(layer), (bits, np.interp(bits, fitted.choices, lines[:, layer])))
    axis.set_xlabel("bits of every coordinate; numbers: the layers where they were put")
    axis.set_ylabel("predicted KL divergence, nats a token")
