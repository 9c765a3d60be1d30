"""Rows of a table measured by several processes: each takes the next row that none has begun, on cores of its own.

A row has a file of its own, written whole or not at all, so that an interrupted run goes on where it stopped, and
processes never write to the same file. Claims are of one run, and forgotten with it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `Work` and `share` read."""
    parser.add_argument("--processes", type=int, default=1, help="that measure at the same time")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no row is begun")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)


class Work:
    """What this process does of the work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.claims: Path | None = options.claims
        self.ends = time.monotonic() + options.limit
        self.failed: list[str] = []

    def do(self, name: str, what: Callable[[], Any]) -> Any:
        """Do something unless another process has begun it or time is up; a failure is told, and work goes on.

        Returns:
            What it returned, or None where it was not done.
        """
        if time.monotonic() > self.ends or not self._claim(name):
            return None
        try:
            return what()
        except Exception:
            self.failed.append(name)
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return None

    def _claim(self, name: str) -> bool:
        if self.claims is None:
            return True
        try:
            (self.claims / file_name(name)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def end(self) -> None:
        """Leave with status 1 if something failed."""
        if self.failed:
            sys.exit(f"{len(self.failed)} failed: {', '.join(self.failed)}")


def share(options: argparse.Namespace, *extra: str) -> None:
    """Run this command in `--processes` processes that share the work and the cores, and wait for them.

    A thread pool is as large as the cores that its process may run on, so that processes do not crowd each other out.
    """
    began = time.monotonic()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, *sys.argv, *extra, "--processes", "1", "--claims", claims]
        command += ["--limit", str(options.limit)]
        running = []
        for i in range(options.processes):
            if cores:
                first, last = (len(cores) * j // options.processes for j in (i, i + 1))
                os.sched_setaffinity(0, cores[first:last] or [cores[i % len(cores)]])
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        if cores:
            os.sched_setaffinity(0, cores)
        failed = sum(process.wait() != 0 for process in running)
    options.limit -= time.monotonic() - began
    if failed:
        print(f"{failed} of {options.processes} processes failed", file=sys.stderr)


def file_name(words: str) -> str:
    """Make the name of a file of any words."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in words) + ".json"


def write(file: Path, row: Any) -> None:
    """Write a row, whole or not at all."""
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(row, indent=1))
    part.replace(file)
