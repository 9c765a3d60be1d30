"""Pictures of a calibration, for `jaxquant calibrate --report DIR`; needs matplotlib, the extra `plot`."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.calibrate.files import Calibration
from jaxquant.calibrate.fit import Fitted
from jaxquant.calibrate.make import Candidates
from jaxquant.calibrate.tradeoff import Losses, Point
from jaxquant.mixed import Mixed

_NAMED = 10  # layers that a legend has room for


def check() -> None:
    """Refuse to begin what could not be drawn in the end.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError('pictures need matplotlib: pip install "jaxquant[plot]"')


def write(folder: Path, found: Candidates, made: Calibration, lost: Losses, points: list[Point]) -> list[Path]:
    """Draw the worth of every coordinate, the bits of every layer and head, what each layer loses, and other methods.

    Args:
        folder: is made where it is missing.
        found: what keys and values could be coded with.
        made: what was chosen.
        lost: what each layer loses, predicted and measured.
        points: of all methods.

    Returns:
        The files, PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    halves = {"keys": (found.keys, made.keys), "values": (found.values, made.values)}
    draw = {"spectra": _spectrum, "bits": _bits, "predicted_loss": _loss}
    files = []
    for name, picture in draw.items():
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axis, (half, (fitted, quantizers)) in zip(figure.subplots(1, 2), halves.items(), strict=True):
            axis.set_title(half)
            picture(axis, fitted, quantizers)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
    pictures: dict[str, Callable[[Any], None]] = {
        "losses": lambda axes: _losses(axes, lost),
        "methods": lambda axes: _methods(axes, points),
    }
    for name, picture in pictures.items():
        figure = Figure(figsize=(12, 4), layout="constrained")
        picture(figure.subplots(1, 2))
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
    return files


def _losses(axes: Any, lost: Losses) -> None:
    for axis, half, name in zip(axes, (0, 1), ("keys", "values"), strict=True):
        x, y = lost.predicted[:, half], np.maximum(lost.measured[:, half], 1e-9)
        axis.loglog(x, y, "o", markersize=5)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        axis.loglog(ends, ends, linewidth=0.8, color="gray", label="in step")
        for layer, place in enumerate(zip(x, y, strict=True)):
            axis.annotate(str(layer), place, xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set_title(f"{name}, one layer at a time")
        axis.set_xlabel("predicted: an order, not nats")
        axis.set_ylabel("measured KL divergence, nats a token")
        axis.legend(fontsize=8)


def _methods(axes: Any, points: list[Point]) -> None:
    base, *others = points
    for axis, label in zip(axes, ("perplexity", "kl"), strict=True):
        for method in dict.fromkeys(point.method for point in others):
            some = sorted(point for point in others if point.method == method)
            axis.plot([point.bits for point in some], [getattr(point, label) for point in some], "o-", label=method)
        if label == "perplexity":
            axis.axhline(base.perplexity, color="gray", linewidth=0.8, label="uncompressed")
        axis.set_yscale("log")
        axis.set_xlabel("bits of a coordinate, everything that is held")
        axis.legend(fontsize=8)
    axes[0].yaxis.set_minor_formatter("{x:.3g}")
    axes[0].yaxis.set_major_formatter("{x:.3g}")
    axes[0].set_ylabel("perplexity")
    axes[1].set_ylabel("KL divergence, nats a token")


def _spectrum(axis: Any, fitted: Fitted, quantizers: tuple[Mixed, ...]) -> None:
    worth = fitted.basis.worth.mean(axis=1)
    for layer, line in enumerate(worth):
        axis.semilogy(line, label=f"layer {layer}", linewidth=1)
    axis.set_xlabel("coordinate")
    axis.set_ylabel("variance in the metric, mean of the heads")
    if len(worth) <= _NAMED:
        axis.legend(fontsize=7, ncols=2)


def _bits(axis: Any, fitted: Fitted, quantizers: tuple[Mixed, ...]) -> None:
    table = np.zeros((len(quantizers), quantizers[0].dim))
    for layer, quantizer in enumerate(quantizers):
        bits = [bits for bits, count in quantizer.widths for _ in range(count)]
        bits += [] if quantizer.code is None else quantizer.code.widths
        table[layer, : len(bits)] = bits
    image = axis.imshow(table, aspect="auto", interpolation="nearest", vmin=0, vmax=max(fitted.choices))
    axis.set_xlabel("coordinate, in falling order of bits")
    axis.set_ylabel("layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(image, ax=axis, label="bits")


def _loss(axis: Any, fitted: Fitted, quantizers: tuple[Mixed, ...]) -> None:
    scalar = [place for place, bits in enumerate(fitted.choices) if bits >= 0]
    widths = [fitted.choices[place] for place in scalar]
    lines = fitted.losses[scalar].sum(axis=(2, 3)) / 2
    for layer, (line, quantizer) in enumerate(zip(lines.T, quantizers, strict=True)):
        drawn = axis.semilogy(widths, line, linewidth=0.8, label=f"layer {layer}")[0]
        bits = 8 * quantizer.bytes_per_vector / quantizer.dim
        loss = np.exp(np.interp(bits, widths, np.log(line)))
        axis.plot(bits, loss, "o", color=drawn.get_color(), markersize=4)
    axis.set_xlabel("bits of every coordinate, without a trellis; dots: the mean bits of a layer")
    axis.set_ylabel("predicted loss: an order, not nats")
    if len(quantizers) <= _NAMED:
        axis.legend(fontsize=7, ncols=2)
