"""Squared error of normal vectors against bits: trellis codes, their peers and Shannon's bound; what encoding costs.

python tests/bench/bench_trellis.py [--json] [--plot FILE.svg] [--vectors 2048] [--states 4 8 ...] [--rounds 7]

Vectors are normal, of dim 128; errors are of whole quantizers, norm and rotation included, and bytes all that is held.
"Bits" leaves out the two bytes of the norm, which all have. Entropy-coded scalars are an integral, of the better of two
uniform quantizers with centroids, one with a level and one with a threshold at 0: what no code of fixed length reaches.
The rate of encoding is in processor time, all threads of the process together, medians of interleaved rounds.

Exits with 1 where the best trellis misses a target.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import codebooks, quantizers, trellis, viterbi
from jaxquant.methods import nestquant, turboquant
from jaxquant.methods import trellis as method
from jaxquant.protocols import Quantizer

DIM, NORM = 128, 2  # of a vector; bytes of its norm
BITS = (1, 2, 3, 4)
TARGETS = {1: 0.275, 2: 0.076, 3: 0.0205, 4: 0.0058}
BETWEEN = (1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75)
SUITED = 256  # states of what is measured at one number of states
TIMED = 512  # vectors


def entropy_coded(bits: float) -> float:
    """Integrate the error of uniform quantizers whose indices have an entropy of `bits`, and take the less."""
    return min(_uniform(bits, offset) for offset in (0.0, 0.5))


def _uniform(bits: float, offset: float) -> float:
    low, high = 1e-3, 20.0
    entropy = error = 0.0
    for _ in range(60):
        step = (low + high) / 2
        edges = step * (np.arange(-math.ceil(12 / step), math.ceil(12 / step) + 1) + offset)
        below = np.array([math.erfc(-edge / math.sqrt(2)) / 2 for edge in edges])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        mass, first = np.diff(below, prepend=0, append=1), -np.diff(density, prepend=0, append=0)
        held = mass > 1e-300
        entropy = -np.sum(mass[held] * np.log2(mass[held]))
        error = 1 - np.sum(first[held] ** 2 / mass[held])
        low, high = (step, high) if entropy > bits else (low, step)
    return float(error)


def measured(quantizer: Quantizer, vectors: int) -> dict[str, float]:
    """Give the error a coordinate, the bytes of a vector and the bits of a coordinate without the norm."""
    x = jax.random.normal(jax.random.key(7), (vectors, DIM))
    code = quantizers.quantize(quantizer, x)
    error = jnp.mean((quantizers.dequantize(quantizer, code) - x) ** 2, axis=-1)
    held = code.nbytes / vectors
    return {
        "bits": 8 * (held - NORM) / DIM,
        "bytes": held,
        "mse": float(error.mean()),
        "deviation": float(error.std()) / vectors**0.5,
    }


def curve(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every code at every width."""
    key, out = jax.random.key(0), []

    def add(name: str, quantizer: Quantizer, **more: Any) -> None:
        out.append({"code": name, **measured(quantizer, options.vectors), **more})
        print(f"{name}: {out[-1]}", file=sys.stderr, flush=True)

    for bits in BITS:
        add("Lloyd-Max", turboquant.mse(key, dim=DIM, bits=bits, fused=False))
        if bits > 1:
            add("E8, NestQuant", nestquant.lattice(key, dim=DIM, bits=bits))
        for states in options.states:
            add("trellis", method.mse(key, dim=DIM, bits=bits, states=states), states=states)
        for kind in ("1mad", "3inst"):
            add(f"trellis, {kind}", method.mse(key, dim=DIM, bits=bits, states=SUITED, kind=kind), states=SUITED)
    for bits in BETWEEN:
        add("trellis", method.mse(key, dim=DIM, bits=bits, states=SUITED), states=SUITED)
    return out


def costs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count what the search does for a vector, and time it beside Lloyd-Max."""
    x = jax.random.normal(jax.random.key(7), (TIMED, DIM))
    made: dict[tuple[str, int, int], Quantizer] = {}
    for bits in BITS:
        made["Lloyd-Max", bits, 0] = turboquant.mse(jax.random.key(0), dim=DIM, bits=bits, fused=False)
        for states in options.timed:
            made["trellis", bits, states] = method.mse(jax.random.key(0), dim=DIM, bits=bits, states=states)
    times: dict[tuple[str, int, int], list[float]] = {name: [] for name in made}
    for number in range(options.rounds + 1):  # the first one compiles
        for name, quantizer in made.items():
            start = time.process_time()
            jax.block_until_ready(quantizers.quantize(quantizer, x))
            if number:
                times[name].append(time.process_time() - start)
    out = []
    for (name, bits, states), taken in times.items():
        rate = TIMED / statistics.median(taken)
        row = {"code": name, "bits": bits, "states": states, "vectors_per_processor_second": rate}
        if states:
            depth = viterbi.depth(DIM, bits * DIM, states)
            row["flops"] = (DIM + 2 * depth) * (states << bits) * 5  # subtract, square, add, compare, select
        else:
            row["flops"] = DIM * (2**bits - 1) * 2  # compare, add
        row["times_lloyd_max"] = statistics.median(taken) / statistics.median(times["Lloyd-Max", bits, 0])
        out.append(row)
    return out


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot how far codes are from the bound, in decibels."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "jaxquant"
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    shown = sorted({row["states"] for row in rows if row["code"] == "trellis"} & {4, 16, 64, SUITED, 1024})
    lines: list[tuple[str, list[dict[str, Any]]]] = [
        (name, [row for row in rows if row["code"] == name]) for name in ("Lloyd-Max", "E8, NestQuant")
    ]
    rates = np.linspace(1, 4, 25)
    lines.append(("entropy-coded scalar", [{"bits": rate, "mse": entropy_coded(rate)} for rate in rates]))
    lines += [
        (f"trellis, {states} states", [r for r in rows if r["code"] == "trellis" and r["states"] == states])
        for states in shown
    ]
    for name, line in lines:
        line = sorted(line, key=lambda row: row["bits"])
        bits = [row["bits"] for row in line]
        excess = [10 * math.log10(row["mse"] * 4 ** row["bits"]) for row in line]
        axis.plot(bits, excess, "--" if name.startswith("entropy") else "o-", markersize=3, linewidth=1, label=name)
    axis.axhline(0, color="black", linewidth=1, label="Shannon")
    axis.set_xlabel("bits a coordinate, beside the norm")
    axis.set_ylabel("squared error above the bound, dB")
    axis.legend(fontsize=7, ncols=2)
    axis.set_ylim(-0.1, 4.5)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=2048)
    parser.add_argument("--states", type=int, nargs="*", default=list(trellis.STATES))
    parser.add_argument("--timed", type=int, nargs="*", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = curve(options)
    spent = costs(options) if options.rounds else []
    exact = [
        {
            "bits": bits,
            "shannon": 4.0**-bits,
            "entropy_coded": entropy_coded(bits),
            "lloyd_max_normal": codebooks.distortion(codebooks.lloyd_max(bits)),
        }
        for bits in BITS
    ]
    best = {bits: min(row["mse"] for row in rows if row["code"] == "trellis" and row["bits"] == bits) for bits in BITS}
    missed = [bits for bits in BITS if best[bits] > TARGETS[bits]]
    if options.plot:
        draw(rows, options.plot)
    report = {"rows": rows, "exact": exact, "costs": spent, "best": best, "targets": TARGETS, "missed": missed,
              "device": jax.devices()[0].device_kind, "processors": os.cpu_count()}  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    sys.exit(1 if missed else 0)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    rows = report["rows"]
    print("| | " + " | ".join(f"{bits} bit{'s' * (bits > 1)}" for bits in BITS) + " |\n|" + "---|" * (len(BITS) + 1))
    for label, name in (("Shannon", "shannon"), ("entropy-coded scalar", "entropy_coded")):
        print(f"| {label} | " + " | ".join(f"{row[name]:.5f}" for row in report["exact"]) + " |")
    for name, states in dict.fromkeys((row["code"], row.get("states", 0)) for row in rows):
        cells = []
        for bits in BITS:
            found = [r for r in rows if (r["code"], r.get("states", 0)) == (name, states) and int(r["bits"]) == bits]
            whole = min(found, key=lambda row: row["bits"], default=None)
            extra = "" if whole is None or whole["bits"] == bits else f" ({whole['bits']:.2f} bits)"
            cells.append("" if whole is None else f"{whole['mse']:.5f}{extra}")
        print(f"| {name}{f', {states} states' * bool(states)} | " + " | ".join(cells) + " |")
    print("\nbetween: " + ", ".join(f"{r['bits']:.2f}: {r['mse']:.5f}" for r in rows if r["bits"] in BETWEEN
                                    and r["code"] == "trellis"))  # fmt: skip
    print(f"\n{report['device']}, {report['processors']} processors\n")
    print("| code | bits | flops a vector | vectors/s of one processor | times Lloyd-Max |")
    print("|---|---|---|---|---|")
    for row in report["costs"]:
        states = f", {row['states']} states" * bool(row["states"])
        rate = row["vectors_per_processor_second"]
        print(f"| {row['code']}{states} | {row['bits']} | {row['flops']:,} | {rate:,.0f} | "
              f"{row['times_lloyd_max']:.1f} |")  # fmt: skip
    for bits in report["missed"]:
        print(f"missed: {bits} bits leave {report['best'][bits]:.5f}, more than {report['targets'][bits]}")


if __name__ == "__main__":
    main()
