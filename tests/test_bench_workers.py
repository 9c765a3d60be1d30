"""Rows of a table measured by several processes: each once, whole, on cores of its own, though one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes have no affinity here")

BENCH = Path(__file__).parent / "bench"
SCRIPT = """
import argparse, functools, os, pathlib, sys, time
sys.path.insert(0, {bench!r})
import workers

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
workers.add_options(parser)
options = parser.parse_args()
if options.processes > 1:
    workers.share(options)
    sys.exit(options.limit > 60)
mine = workers.Work(options)

def measure(name):
    if name == "row 3":
        raise RuntimeError("no such row")
    time.sleep(0.05)
    return {{"process": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}}

for i in range(12):
    name = f"row {{i}}"
    row = mine.do(name, functools.partial(measure, name))
    if row is not None:
        with (options.out / "log").open("a") as log:
            print(name, file=log)
        workers.write(options.out / workers.file_name(name), row)
mine.end()
"""


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(bench=str(BENCH)))
    (tmp_path / "rows").mkdir()

    def start(*arguments):
        command = [sys.executable, str(script), "--out", str(tmp_path / "rows"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        rows = {file.name: json.loads(file.read_text()) for file in sorted((tmp_path / "rows").glob("*.json"))}
        log = tmp_path / "rows" / "log"
        return done, rows, log.read_text().splitlines() if log.exists() else []

    return start


def test_every_row_is_measured_once_and_a_failure_stops_no_other(run):
    done, rows, log = run("--processes", "3", "--limit", "60")
    names = [f"row {i}" for i in range(12) if i != 3]
    assert sorted(log) == sorted(names)
    assert rows.keys() == {name.replace(" ", "-") + ".json" for name in names}
    assert len({row["process"] for row in rows.values()}) > 1
    assert done.returncode == 0
    assert "row 3 failed" in done.stderr
    assert "no such row" in done.stderr
    assert "1 of 3 processes failed" in done.stderr
    cores = {row["process"]: tuple(row["cores"]) for row in rows.values()}
    mine = os.sched_getaffinity(0)
    assert all(mine.issuperset(some) for some in cores.values())
    if len(mine) >= 3:
        assert len(set(cores.values())) == len(cores)
        assert len({core for some in cores.values() for core in some}) == sum(map(len, cores.values()))


def test_alone_a_process_does_all_and_says_what_failed(run):
    done, rows, _ = run()
    assert len(rows) == 11
    assert done.returncode == 1
    assert "1 failed: row 3" in done.stderr


def test_no_row_is_begun_after_the_limit(run):
    _, rows, _ = run("--limit", "0.3")
    assert 1 <= len(rows) < 11
    assert not run("--limit", "-1")[2][len(rows) :]
