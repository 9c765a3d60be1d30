"""What an import costs: no JAX until a module that needs it is named."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

import jaxquant

ROOT = pathlib.Path(jaxquant.__file__).parents[1]


def loads_jax(code):
    """Run `code` in a fresh interpreter and say whether JAX came with it."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('jax' in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    return {"True": True, "False": False}[run.stdout.strip().splitlines()[-1]]


def test_importing_the_package_loads_no_jax_and_is_quick():
    start = time.perf_counter()
    assert not loads_jax("pass")
    bare = time.perf_counter() - start
    start = time.perf_counter()
    assert not loads_jax("import jaxquant; assert 'cache' in dir(jaxquant); assert jaxquant.__version__")
    assert time.perf_counter() - start < 2 * bare + 0.5


def test_the_check_can_fail():
    assert loads_jax("import jaxquant; jaxquant.cache")


def test_codecs_load_no_jax():
    codec = ROOT / "codecs" / "qatc.py"
    if not codec.exists():
        pytest.skip("the codecs are not in this tree")
    assert not loads_jax("from jaxquant.codecs import qatc; qatc.encode")


def test_submodules_load_on_first_use_and_unknown_names_are_refused():
    assert jaxquant.cache is sys.modules["jaxquant.cache"]
    assert {"attention", "cache", "packing", "quantizers"} <= set(dir(jaxquant))
    assert not any(name.startswith("_") and not name.startswith("__") for name in jaxquant._SUBMODULES)
    with pytest.raises(AttributeError, match="module 'jaxquant' has no attribute 'missing'"):
        _ = jaxquant.missing


def test_the_core_never_imports_what_stands_above_it():
    """In a fresh interpreter: the mechanisms load no methods, models, codecs, calibration or command line."""
    code = (
        "from jaxquant import attention, cache, quantizers\nimport sys\n"
        "above = ['methods', 'models', 'codecs', 'calibrate', 'cli', 'interop', 'evaluate']\n"
        "loaded = [name for name in above if f'jaxquant.{name}' in sys.modules]\nassert not loaded, loaded"
    )
    assert loads_jax(code)


def test_no_import_starts_a_backend():
    """`jax.distributed.initialize`, and every setting of a backend, must come before it starts."""
    code = (
        "import importlib, pkgutil, jaxquant\n"
        "for found in pkgutil.walk_packages(jaxquant.__path__, 'jaxquant.'):\n"
        "    if '__main__' in found.name: continue\n"
        "    try: importlib.import_module(found.name)\n"
        "    except ImportError as problem: assert 'jaxquant' not in str(problem.name), problem\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge.backends_are_initialized(), found.name\n"
    )
    assert loads_jax(code)
