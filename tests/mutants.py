"""Make faults by hand and see whether the tests notice: `python tests/mutants.py [--only NAME ...] [--json]`.

Each fault of `tests/data/mutants.toml` is put into a copy of the tree, never into the tree itself, and the tests that
it names are run there. A fault is noticed if one of them fails, and survives if all pass. Exit status 1 if any does.
Needs a POSIX system: every run is a fork of a process that has imported what is slow to import.
"""

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "data" / "mutants.toml"
_LONGEST = 300  # seconds of one run of tests
_BROKEN = (2, 3, 4, 5)  # pytest did not get to run what it was asked to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    Attributes:
        name: of the fault.
        file: that it is in, from the root of the tree.
        old: text that occurs there once.
        new: text in its place.
        breaks: what is wrong then.
        tests: the narrowest ones that should notice.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def area(self) -> str:
        """The folder of modules that the fault is in, or the module."""
        path = Path(self.file)
        return path.stem if path.parent == Path("jaxquant") else str(path.parent).removeprefix("jaxquant/")

    def applied(self, text: str) -> str:
        """Put the fault into the text of its file.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(f"{self.name}: the old text occurs {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def read() -> list[Mutant]:
    """Read the list."""
    found = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**(one | {"tests": tuple(one["tests"])})) for one in found]


def copy(folder: Path) -> Path:
    """Copy what git knows of the tree, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in listed.split("\0"):
        source, target = ROOT / name, folder / name
        if name and os.path.lexists(source):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def run(mutant: Mutant, tree: Path) -> dict[str, object]:
    """Apply a fault to a copy of the tree, run its tests, and take it back."""
    file = tree / mutant.file
    text = file.read_text(encoding="utf-8")
    began = time.perf_counter()
    try:
        changed = mutant.applied(text)
    except ValueError as error:
        return {"verdict": "does not apply", "seconds": 0.0, "tail": str(error)}
    try:
        file.write_text(changed, encoding="utf-8")
        code, tail = tested(mutant.tests, tree)
    finally:
        file.write_text(text, encoding="utf-8")
    verdict = "survived" if code == 0 else "tests did not run" if code in _BROKEN else "noticed"
    if verdict == "survived" and " skipped" in tail and " passed" not in tail:
        verdict = "tests were skipped"
    return {"verdict": verdict, "seconds": round(time.perf_counter() - began, 1), "tail": tail}


def tested(tests: Sequence[str], tree: Path) -> tuple[int, str]:
    """Run tests up to the first that fails, in a process of their own; give its status and its last lines."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = os.fork()  # of a process that has imported what is slow to import, and nothing of jaxquant
        if not child:
            _test(tests, tree, output.fileno())
        latest = time.monotonic() + _LONGEST
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < latest:
            time.sleep(0.2)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1, f"not done after {_LONGEST} s"
        output.seek(0)
        return os.waitstatus_to_exitcode(status), "\n".join(output.read().splitlines()[-12:])


def _test(tests: Sequence[str], tree: Path, output: int) -> NoReturn:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    sys.path[:1] = [str(tree)]
    sys.dont_write_bytecode = True
    code = 3
    try:
        code = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def table(report: dict[str, dict[str, object]]) -> str:
    """Count faults by the folder or module that they are in, in Markdown."""
    lines = ["| in | faults | noticed |", "|---|---|---|"]
    for area in sorted({str(found["area"]) for found in report.values()}):
        verdicts = [found["verdict"] for found in report.values() if found["area"] == area]
        lines.append(f"| {area} | {len(verdicts)} | {verdicts.count('noticed')} |")
    return "\n".join(lines)


def main() -> int:
    """Run the faults that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of names, of faults")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    if not hasattr(os, "fork"):
        parser.error("needs a POSIX system, such as Linux or macOS")
    chosen = [one for one in read() if not arguments.only or one.name.startswith(tuple(arguments.only))]
    if not chosen:
        parser.error(f"no fault begins with {' or '.join(arguments.only)}")
    for name in ("jax", "jax.experimental.pallas", "flax.nnx", "optax"):
        importlib.import_module(name)
    console = Console(stderr=True)
    report: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tree = copy(Path(scratch))
        for one in chosen:
            found = run(one, tree)
            report[one.name] = {"file": one.file, "area": one.area, "breaks": one.breaks, **found}
            console.print(f"{found['verdict']:>18}  {one.name}: {one.breaks} ({found['seconds']} s)", markup=False)
            if found["verdict"] != "noticed":
                console.print(str(found["tail"]), markup=False, style="dim")
    left = [name for name, found in report.items() if found["verdict"] != "noticed"]
    if arguments.json:
        print(json.dumps({"noticed": len(report) - len(left), "of": len(report), "faults": report}, indent=2))
    else:
        print(table(report))
    console.print(f"{len(report) - len(left)} of {len(report)} noticed" + (f"; not: {', '.join(left)}" if left else ""))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
