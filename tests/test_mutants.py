"""The list of faults does not rot: every one still applies, and the tests that should notice it are there."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

FAULTS = mutants.read()
PACKAGES = ("jaxquant", "codecs", "calibrate")


def test_every_fault_applies():
    for fault in FAULTS:
        path = mutants.ROOT / fault.file
        text = path.read_text(encoding="utf-8")
        changed = fault.applied(text)
        if path.suffix == ".py":
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), f"{fault.name} changes nothing"


def test_the_tests_of_every_fault_are_there():
    for fault in FAULTS:
        assert fault.tests, fault.name
        for test in fault.tests:
            file, _, name = test.partition("::")
            function = name.partition("[")[0].rpartition("::")[2]
            assert not name or f"def {function}(" in (mutants.ROOT / file).read_text(encoding="utf-8"), test


def test_a_fault_that_no_longer_applies_is_noticed():
    gone = dataclasses.replace(FAULTS[0], old="no such text")
    twice = dataclasses.replace(FAULTS[0], old="def ")
    same = dataclasses.replace(FAULTS[0], new=FAULTS[0].old)
    for fault in (gone, twice, same):
        with pytest.raises(ValueError, match=fault.name):
            fault.applied((mutants.ROOT / fault.file).read_text(encoding="utf-8"))


def test_names_differ_and_every_folder_of_the_package_is_there():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 64
    folders = {str(Path(fault.file).parent) for fault in FAULTS}
    tree = {
        str(path.parent.relative_to(mutants.ROOT)) for name in PACKAGES for path in (mutants.ROOT / name).rglob("*.py")
    }
    assert tree <= folders


def test_the_table_counts_by_folder():
    report = {one.name: {"area": one.area, "verdict": "noticed" if i else "survived"} for i, one in enumerate(FAULTS)}
    lines = mutants.table(report).splitlines()[2:]
    counts = {area.strip(): (int(all_), int(seen)) for _, area, all_, seen, _ in (line.split("|") for line in lines)}
    assert counts["packing"] == (2, 1)
    assert {"methods", "interop", "calibrate", "codecs/v2", "codecs/v3", "_kernels", "_kernels/sources"} <= set(counts)
    assert sum(count for count, _ in counts.values()) == len(FAULTS) == sum(seen for _, seen in counts.values()) + 1


RUNNER = """
import dataclasses, json, pathlib, sys
import mutants

tree = pathlib.Path(sys.argv[1])
fault = mutants.Mutant(
    name="one", file="module.py", old="return 1", new="return 2", breaks="", tests=("test_module.py::test_one",)
)
faults = [
    fault,
    dataclasses.replace(fault, tests=("test_module.py::test_callable",)),
    dataclasses.replace(fault, tests=("test_module.py::test_gone",)),
    dataclasses.replace(fault, tests=("test_module.py::test_skipped",)),
    dataclasses.replace(fault, old="gone"),
]
print(json.dumps([mutants.run(one, tree)["verdict"] for one in faults]))
"""
TESTS = """
import pytest
import module

def test_one():
    assert module.one() == 1

def test_callable():
    assert module.one

@pytest.mark.skip
def test_skipped():
    assert module.one() == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
def test_the_runner_tells_noticed_from_survived(tmp_path):
    (tmp_path / "module.py").write_text("def one():\n    return 1\n", encoding="utf-8")
    (tmp_path / "test_module.py").write_text(TESTS, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path)], cwd=Path(mutants.__file__).parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [
        "noticed",
        "survived",
        "tests did not run",
        "tests were skipped",
        "does not apply",
    ]
    assert "return 1" in (tmp_path / "module.py").read_text(encoding="utf-8")
