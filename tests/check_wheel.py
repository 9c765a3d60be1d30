"""Check an installed wheel: every module of the tree is in it, nothing else is, and all three packages import.

Usage: python tests/check_wheel.py WHEEL TREE, outside the tree, in an environment that holds only the wheel.
"""

import importlib
import pkgutil
import sys
import zipfile
from pathlib import Path

EXTRAS = ("mlx", "numcodecs", "torch")  # an environment without extras has none of these


def main(wheel: str, tree: str) -> None:
    expected = {
        str(Path("jaxquant") / path.relative_to(Path(tree) / "jaxquant"))
        for path in (Path(tree) / "jaxquant").rglob("*.py")
    }
    for name in ("codecs", "calibrate"):  # links, which rglob does not follow
        expected |= {f"jaxquant/{path.relative_to(tree)}" for path in (Path(tree) / name).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        small = [info for info in archive.infolist() if info.filename.startswith("jaxquant/models/small/")]
    packed = {name for name in names if name.endswith(".py")}
    assert packed == expected, f"missing: {sorted(expected - packed)}; unexpected: {sorted(packed - expected)}"
    assert "jaxquant/py.typed" in names
    sources = {
        f"jaxquant/_kernels/sources/{path.name}" for path in (Path(tree) / "jaxquant/_kernels/sources").iterdir()
    }
    assert sources <= set(names), f"missing: {sorted(sources - set(names))}"
    assert sum(info.file_size for info in small) <= 4_000_000, "the model in the package is too large"
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
    print(f"{len(packed)} modules, model of {sum(info.file_size for info in small):,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
