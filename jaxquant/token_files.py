"""Token ids from files: arrays of ids, or text."""

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxquant import models
from jaxquant.models.loading import SMALL


def read(model: models.Model, source: str | None) -> Int[np.ndarray, "*rows tokens"]:
    """Read `FILE[:NAME]`: token ids from .npy or .npz, or text; None for the held-out text in the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no member NAME, or holds something else than token ids of the model.
    """
    if source is None:
        return np.array(model.tokenizer.encode(text(None), special=False))
    path, _, name = source.rpartition(":") if ".npz:" in source else (source, "", "")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.endswith(".npz"):
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as members:
                ids = members[name] if name in members else list(members)
        elif path.endswith(".npy"):
            ids = np.load(path, allow_pickle=False)
        else:
            ids = np.array(model.tokenizer.encode(text(Path(path)), special=False))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if isinstance(ids, list):
        raise ValueError(f"{path} has the members {', '.join(ids)}; name one as {path}:NAME")
    if not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"{source} must hold token ids, got {ids.dtype} of shape {list(ids.shape)}")
    if ids.min() < 0:
        raise ValueError(f"{source} must hold token ids, which are not negative, got {ids.min()} to {ids.max()}")
    if ids.max() >= model.architecture.vocabulary:
        raise ValueError(f"token id {ids.max()} is outside the model's vocabulary of {model.architecture.vocabulary}")
    return ids.astype(np.int64)


def row(model: models.Model, source: str | None) -> Int[np.ndarray, " tokens"]:
    """Read what `--tokens` names.

    Raises:
        ValueError: it is not one long row, or `read` refuses it.
    """
    ids = read(model, source)
    if ids.ndim != 1:
        raise ValueError(f"--tokens must name one long row of token ids, got an array of shape {list(ids.shape)}")
    return ids


def rows(model: models.Model, source: str) -> Int[np.ndarray, "rows tokens"]:
    """Read what `--needles` names.

    Raises:
        ValueError: it is not rows of at least two tokens, or `read` refuses it.
    """
    ids = read(model, source)
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"--needles must name rows of token ids, got an array of shape {list(ids.shape)}")
    return ids


def text(path: Path | None) -> str:
    """Read a text file; None for the held-out text in the package."""
    path = SMALL / "held_out.txt" if path is None else path
    return path.read_text(encoding="utf-8", errors="replace")
