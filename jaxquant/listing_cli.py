"""`jaxquant info` and `jaxquant methods`: what there is."""

import importlib.metadata
import sys
from typing import Annotated

import typer
from rich.table import Table

import jaxquant
from jaxquant import _console
from jaxquant._console import Json, out


def info(as_json: Json = False) -> None:
    """Show versions, devices, and what this installation can do."""
    import jax

    from jaxquant import catalogue
    from jaxquant.models.architecture import FAMILIES

    report = {
        "jaxquant": jaxquant.__version__,
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "model families": list(FAMILIES),
        "methods": catalogue.names(),
    }
    _console.show(report, as_json, title="jaxquant")


def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
) -> None:
    """List the methods, one file each, with their sources and what they cost."""
    from jaxquant import catalogue

    if markdown:
        return print(catalogue.page(), end="")
    report = {}
    with _console.bar() as bar:
        for entry in bar.track(list(catalogue.entries().values()), description="counting"):
            settings = {name: catalogue.cost(builder)._asdict() for name, builder in entry.builders.items()}
            report[entry.name] = {
                "summary": entry.summary,
                "source": entry.source,
                "caches": bool(settings),
                "cost": settings.pop("", None),
                "variants": settings,
            }
    if as_json:
        return _console.print_json(report)
    table = Table("method", "what it does", "source", "bytes per token", "encode", "decode", show_lines=True)
    for name, entry in report.items():
        for variant, cost in {"": entry["cost"], **entry["variants"]}.items():
            cells = []
            if cost is not None:
                cells = [f"{cost['bytes_per_token']:.0f} at {cost['bits']} bits"]
                cells += [f"{cost[part]:.0f}" for part in ("encode", "decode")]
            about = ["", ""] if variant else [entry["summary"], entry["source"]]
            table.add_row(f"{name}, {variant}" if variant else name, *about, *cells)
    out.print(table)
    out.print(
        "Bytes of key and value for one kv head of 128; floating-point operations a coordinate, as XLA counts them."
    )
