"""What every verb of the command prints, and how."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

out, err = Console(), Console(stderr=True)

ModelDir = Annotated[
    Path | None, typer.Option("--model", help="Hugging Face folder; default: the small model in the package.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def bar() -> Bar:
    """Make a progress bar on stderr, where somebody looks at it."""
    return Bar(console=err, transient=True, disable=not err.is_terminal)


def advance(bar: Bar) -> Callable[[str, int, int], None]:
    """Make a function of a description, what is done and what there is to do, that moves the bar."""
    tasks: dict[str, Any] = {}

    def step(description: str, done: int, total: int) -> None:
        if description not in tasks:
            tasks[description] = bar.add_task(description, total=total)
        bar.update(tasks[description], completed=done)

    return step


def show(report: dict[str, Any], as_json: bool, *, title: str) -> None:
    """Print a report as a table of two columns, or as JSON."""
    if as_json:
        return print_json(report)
    table = Table(title=title, show_header=False)
    for name, value in report.items():
        shown = ", ".join(value) if isinstance(value, list) else f"{value:,.4g}" if isinstance(value, float) else value
        table.add_row(name, str(shown))
    out.print(table)


def print_json(report: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(report, indent=2))
