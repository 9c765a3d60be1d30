"""`jaxquant qatc`: encode, decode, inspect and verify lossless tensor files."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import rich.console
import rich.progress
import rich.table
import typer

app = typer.Typer(help="Lossless tensor files, compatible with QATQ.", no_args_is_help=True, add_completion=False)

Source = Annotated[str, typer.Argument(metavar="IN", help='File to read, "-" for standard input.')]
Target = Annotated[str, typer.Argument(metavar="OUT", help='File to write, "-" for standard output.')]
Threads = Annotated[int | None, typer.Option(min=1, help="Chunks at the same time; all cores by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def encode(
    source: Source,
    target: Target,
    dtype: Annotated[str | None, typer.Option(help="Of raw values: f32, f16, bf16, ...; .npy needs none.")] = None,
    shape: Annotated[str | None, typer.Option(help="Of raw values, such as 4096,8,128; v3 profiles keep it.")] = None,
    profile: Annotated[str, typer.Option(help="v2, parity (both decoded by QATQ), fast, balanced or small.")] = "v2",
    chunk: Annotated[int | None, typer.Option(min=1, help="Values per chunk.")] = None,
    stride: Annotated[int, typer.Option(min=0, help="Values from one token to the next, a hint.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Encode raw little-endian values or a .npy file."""
    from jaxquant.codecs import files, qatc

    if profile not in qatc.PROFILES:
        raise typer.BadParameter(f"{profile!r} is none of {', '.join(qatc.PROFILES)}", param_hint="--profile")
    sizes = _shape(shape)
    with _reporting(target, as_json) as (progress, report):
        report(
            files.encode_file(
                source,
                target,
                dtype=dtype,
                shape=sizes,
                profile=profile,
                chunk=chunk,
                stride=stride,
                threads=threads,
                progress=progress,
            )
        )


@app.command()
def decode(source: Source, target: Target, threads: Threads = None, as_json: Json = False) -> None:
    """Decode to raw little-endian values, or to .npy if OUT ends so."""
    from jaxquant.codecs import files

    with _reporting(target, as_json) as (progress, report):
        report(files.decode_file(source, target, threads=threads, progress=progress))


@app.command()
def verify(source: Source, threads: Threads = None, as_json: Json = False) -> None:
    """Check every checksum and structure; exit 0 if the file is whole."""
    from jaxquant.codecs import files

    with _reporting("", as_json) as (progress, report):
        report(files.verify_file(source, threads=threads, progress=progress))


@app.command()
def inspect(source: Source, as_json: Json = False) -> None:
    """Show format, sizes and the strategy of every chunk, without decoding."""
    from jaxquant.codecs import files

    with _one_line_errors():
        found = files.inspect_file(source)
        if as_json:
            typer.echo(json.dumps(found))
            return
        rows = {key: value for key, value in found.items() if not isinstance(value, list | tuple | dict)}
        console = rich.console.Console()
        console.print(_table("Property", "Value", rows=[[key, _shown(value)] for key, value in rows.items()]))
        for name, items in found.items():
            if isinstance(items, list | tuple) and items and isinstance(items[0], dict):
                shown = [[str(index), *map(_shown, item.values())] for index, item in enumerate(items[:32])]
                console.print(_table(name, *items[0], rows=shown))
                if len(items) > len(shown):
                    console.print(f"... and {len(items) - len(shown)} more")


def _table(*columns: str, rows: list[list[str]]) -> rich.table.Table:
    table = rich.table.Table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = (-1,)
    if min(sizes) < 0:
        raise typer.BadParameter(f"{text!r} is no list of sizes such as 4096,8,128", param_hint="--shape")
    return sizes


@contextlib.contextmanager
def _reporting(target: str, as_json: bool) -> Iterator[tuple[Callable[[int, int], None], Callable[[dict], None]]]:
    """Progress and a closing line on standard error; JSON on standard output."""
    if as_json and target == "-":
        raise typer.BadParameter("standard output cannot hold both the values and JSON", param_hint="--json")
    console = rich.console.Console(stderr=True)
    results: list[dict] = []
    with _one_line_errors():
        with rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.DownloadColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total), results.append
        for result in results:
            if as_json:
                typer.echo(json.dumps(result))
            else:
                typer.echo(", ".join(f"{key} {_shown(value)}" for key, value in result.items()), err=True)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        print(f"jaxquant: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
