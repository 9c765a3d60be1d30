"""Check an installed wheel and the sdist: every module of the tree is in it, nothing else is, and all packages import.

Usage: python tests/check_wheel.py WHEEL TREE SDIST, outside the tree, in an environment that holds only the wheel.
"""

import importlib
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

EXTRAS = ("mlx", "numcodecs", "torch")  # an environment without extras has none of these
LARGEST, QUICK = 4_000_000, 0.5  # bytes of a file; seconds of an import
TIMED = """
import sys, time
start = time.perf_counter()
import jaxquant
print(time.perf_counter() - start, "jax" in sys.modules)
"""


def check_contents(sizes: dict[str, int]) -> None:
    """Refuse tests, large files, and whatever is neither a module nor data of the package."""
    tests = [name for name in sizes if {"tests", "conftest.py"} & set(Path(name).parts) or "/test_" in f"/{name}"]
    assert not tests, f"tests: {tests}"
    large = {name: size for name, size in sizes.items() if size > LARGEST}
    assert not large, f"larger than {LARGEST:,} bytes: {large}"


def check_import() -> float:
    """Import jaxquant in processes of its own: quickly, and without JAX."""
    seconds = []
    for _ in range(5):
        said = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True).stdout.split()
        assert said[1] == "False", "importing jaxquant imported jax"
        seconds.append(float(said[0]))
    assert min(seconds) < QUICK, f"importing jaxquant takes {min(seconds):.2f} s"
    return min(seconds)


def main(wheel: str, tree: str, sdist: str) -> None:
    expected = {
        str(Path("jaxquant") / path.relative_to(Path(tree) / "jaxquant"))
        for path in (Path(tree) / "jaxquant").rglob("*.py")
    }
    for name in ("codecs", "calibrate"):  # links, which rglob does not follow
        expected |= {f"jaxquant/{path.relative_to(tree)}" for path in (Path(tree) / name).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        check_contents({info.filename: info.file_size for info in archive.infolist()})
        small = [info for info in archive.infolist() if info.filename.startswith("jaxquant/models/small/")]
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2]: member.size for member in archive.getmembers() if member.isfile()}
    check_contents(inside)
    assert {"LICENSE", "README.md", "pyproject.toml", "codecs/qatc.py", "calibrate/make.py"} <= set(inside)
    packed = {name for name in names if name.endswith(".py")}
    assert packed == expected, f"missing: {sorted(expected - packed)}; unexpected: {sorted(packed - expected)}"
    files = {
        path for path in (Path(tree) / "jaxquant").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    expected = {f"jaxquant/{path.relative_to(Path(tree) / 'jaxquant')}" for path in files}
    data = {name for name in names if name.startswith("jaxquant/") and not name.endswith(".py")}
    assert data == expected, f"missing: {sorted(expected - data)}; unexpected: {sorted(data - expected)}"
    assert sum(info.file_size for info in small) <= LARGEST, "the model in the package is too large"
    strangers = {name.split("/")[0] for name in names if not name.startswith("jaxquant")}
    assert not strangers, f"top-level names beside jaxquant: {strangers}"

    jaxquant = importlib.import_module("jaxquant")
    assert not Path(jaxquant.__file__).is_relative_to(tree), f"imported from the tree: {jaxquant.__file__}"
    assert "jax" not in sys.modules, "importing jaxquant imported jax"
    importlib.import_module("jaxquant.codecs")
    assert "jax" not in sys.modules, "importing jaxquant.codecs imported jax"
    for module in pkgutil.walk_packages(jaxquant.__path__, "jaxquant."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
    assert importlib.import_module("jaxquant.calibrate")
    size = sum(info.file_size for info in small)
    print(f"imported in {check_import():.2f} s; {len(packed)} modules, model of {size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
