"""`jaxquant migrate`."""

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from jaxquant import _console
from jaxquant._console import Json, ModelDir, out


def migrate(
    model: ModelDir = None,
    tokens: Annotated[
        str | None, typer.Option(help="FILE[:NAME]: .npy, member of .npz, or a text file; default: held-out text.")
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="First token of the prompt.")] = 0,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 1024,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a continuation; repeat for several.")] = None,
    torch: Annotated[
        bool | None,
        typer.Option("--torch/--no-torch", help="Migrate to and from PyTorch too, in float32; default: if installed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Move a cache to another process and back; report bytes, time to the first token, and whether anything changed."""
    from jaxquant import models, token_files
    from jaxquant.interop import migration_trial

    if length and min(length) < 1:
        raise ValueError(f"--length must be at least 1, got {min(length)}")
    ids = token_files.read(models.load(model), tokens)
    if ids.ndim != 1 or len(ids) < start + prompt_tokens:
        raise ValueError(f"--tokens must name one row of {start + prompt_tokens} token ids, got {list(ids.shape)}")
    prompt = ids[start : start + prompt_tokens].astype(np.int64)
    lengths = tuple(sorted(length)) if length else migration_trial.LENGTHS
    with _console.bar() as bar:
        report = migration_trial.measure(model, prompt, lengths=lengths, torch=torch, progress=_console.advance(bar))
    if as_json:
        return _console.print_json(report)
    sizes = Table(f"{prompt_tokens:,} tokens", "bytes", "of 16 bit")
    for name, nbytes in report["transferred"].items():
        sizes.add_row(name, f"{nbytes:,}", f"{nbytes / report['raw_bytes']:.4f}")
    out.print(sizes)
    table = Table("migration", "bytes", "first token, s", *(f"{name.replace('_', ' ')}" for name in _CHECKS))
    for name, row in report["migrations"].items():
        checks = [_shown(row.get(check)) for check in _CHECKS]
        table.add_row(name, f"{row['bytes']:,}", f"{row['first_token_seconds']:.3f}", *checks)
    out.print(table)
    out.print(f"reading the prompt again takes {report['prefill_seconds']:.3f} s on this {report['device']}")


_CHECKS = ("same_tokens", "same_logits", "same_tokens_back", "same_logits_back")


def _shown(row: dict[int, bool] | None) -> str:
    return "" if row is None else ", ".join(f"{n}: {'yes' if same else 'NO'}" for n, same in row.items())
