"""Time from imports to a model with an empty cache, of a converted folder and of what it was made from.

    python tests/bench/bench_start.py --model DIR --calibration FILE --converted FOLDER

Every start is a process of its own; imports are not counted, compiling the steps is not included. The two take turns;
no turn is begun after `--seconds`, but for the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def start(kind: str, folder: str, calibration: str) -> None:
    """Print the seconds of one start."""
    import jax

    from jaxquant.trial import Trial

    jax.block_until_ready(jax.numpy.zeros(()))
    began = time.perf_counter()
    chosen = Trial.ready(Path(folder)) if kind == "ready" else Trial.calibrated(
        Path(folder), Path(calibration), sinks=4, window=32
    )  # fmt: skip
    jax.block_until_ready(chosen.cache(1, 1024))
    print(time.perf_counter() - began)


def main() -> None:
    """Run from the command line."""
    if len(sys.argv) > 1 and sys.argv[1] == "start":
        return start(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--converted", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = {
        "model and calibration": ("calibrated", arguments.model, arguments.calibration),
        "converted folder": ("ready", arguments.converted, ""),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    began = time.perf_counter()
    for turn in range(arguments.repeats):  # in turn, so that a busy machine is busy for both
        if turn and time.perf_counter() - began > arguments.seconds:
            break
        for name, case in cases.items():
            done = subprocess.run([sys.executable, __file__, "start", *case], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name}: a start failed, and said why above")
            found[name].append(float(done.stdout))
    medians = {name: statistics.median(times) for name, times in found.items()}
    print("| start from | seconds, median | least | most |\n|---|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {medians[name]:.3f} | {min(times):.3f} | {max(times):.3f} |")
    ratio = medians["converted folder"] / medians["model and calibration"]
    print(f"\n{len(found['converted folder'])} starts of each; the converted folder takes {ratio:.2f} of the time")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": found, "ratio": ratio}))


if __name__ == "__main__":
    main()
