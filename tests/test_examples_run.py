"""The examples run as their docstrings say, and examples/README.md lists all of them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from jaxquant import models

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ARGUMENTS = {
    "flax_attach": "",
    "flax_sharded_decoder": "",
    "generate": "--new 8",
    "migrate_cache": "",
    "orbax_cache": "",
    "property_test": "",
    "quantize_in_jit": "",
}
LONG = {
    "guided_sampling": "--train 4 --steps 3",
    "serve": "--requests 3 --new 4",
    "nearest_neighbours": "--base 500 --queries 20 --dims 48",
    "train_packed": "--steps 4 --layers 2",
}
ELSEWHERE = {  # in tests of their own
    "dithered": "test_examples",
    "evaluate_transformers": "test_interop_examples",
    "interop_dlpack": "test_interop_examples",
    "interop_mlx": "test_interop_examples",
    "interop_torch": "test_interop_examples",
    "sharded_decode": "test_sharding_processes",
}


def run(name, arguments, folder):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, tmp_path):
    assert run(name, ARGUMENTS[name].split(), tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_longer_example_runs(name, tmp_path):
    assert f"`{LONG[name]}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert run(name, LONG[name].split(), tmp_path).strip()


@pytest.mark.slow
def test_the_small_model_is_trained(tmp_path):
    """Two steps on four packages of the standard library: a folder that loads."""
    library = tmp_path / "library"
    for package in ("asyncio", "email", "http", "json"):
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / package, library / package)
    (library / "LICENSE.txt").write_text(
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n8. By copying the text\n\n\nOther licences\n"
    )
    sizes = "--steps 2 --microsteps 1 --batch 1 --needle-pool 8 --context 1024"
    run("train_small_model", ["--out", "small", "--library", str(library), *sizes.split()], tmp_path)
    assert models.load(tmp_path / "small").architecture.layers == 5


def test_learning_lowers_the_divergence(tmp_path):
    before, after = re.findall(r"(\d\.\d+)", run("calibrate_with_optax", ["--steps", "60"], tmp_path).splitlines()[-1])
    assert float(after) < float(before)


def test_every_example_is_listed_and_run():
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    listed = re.findall(r"^\d+\. \[(\w+)\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M)
    assert [title for title, _ in listed] == [name for _, name in listed]
    assert sorted(name for _, name in listed) == sorted(files)
    assert files == {*ARGUMENTS, *LONG, *ELSEWHERE, "calibrate_with_optax", "train_small_model"}
    for name, test in ELSEWHERE.items():
        assert f'"{name}' in (ROOT / "tests" / f"{test}.py").read_text(encoding="utf-8"), name
