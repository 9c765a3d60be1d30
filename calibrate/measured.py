"""What text showed about a model, in a file: an interrupted measurement continues, and another budget reuses it."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxquant.calibrate.fisher import Fisher
from jaxquant.calibrate.statistics import Statistics

_KEY = "jaxquant.measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's statistics and information over the first rows of some text.

    Attributes:
        statistics: of the rows so far.
        fisher: likewise.
        text: what the rows are, in words.
        identity: of the model, all rows and the settings, as `identity` gives it.
    """

    statistics: Statistics
    fisher: Fisher
    text: str
    identity: str

    def __add__(self, other: "Measured") -> "Measured":
        """Join what different text showed about one model."""
        return Measured(
            statistics=self.statistics + other.statistics,
            fisher=self.fisher + other.fisher,
            text=f"{self.text}; {other.text}",
            identity=f"{self.identity}+{other.identity}",
        )

    def save(self, path: Path) -> None:
        """Write a file, in place of what was there before; a reader never sees half of it."""
        arrays = {f"statistics.{field.name}": np.asarray(getattr(self.statistics, field.name)) for field in _FIELDS}
        arrays |= {"fisher.keys": self.fisher.keys, "fisher.values": self.fisher.values}
        record = json.dumps({"text": self.text, "identity": self.identity})
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={_KEY: record})
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> "Measured":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                record = (file.metadata() or {}).get(_KEY)
                if record is None:
                    raise ValueError(f"{path}: not a measurement: its metadata has no {_KEY!r}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged measurement: {error}") from None
        try:
            words = json.loads(record)
            text, identity = str(words["text"]), str(words["identity"])
            parts = {field.name: arrays.pop(f"statistics.{field.name}") for field in _FIELDS}
            rows, tokens = (int(parts.pop(name).item()) for name in ("rows", "tokens"))
            information = Fisher(keys=arrays.pop("fisher.keys"), values=arrays.pop("fisher.values"), tokens=tokens)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged measurement: {error!r}") from None
        statistics = Statistics(rows=rows, tokens=tokens, **parts)
        return Measured(statistics=statistics, fisher=information, text=text, identity=identity)


_FIELDS = dataclasses.fields(Statistics)


def identity(fingerprint: str, rows: Int[np.ndarray, "rows tokens"], *settings: float | int) -> str:
    """Hash what a measurement depends on.

    Example:
        >>> identity("a", np.zeros((1, 2), np.int64), 3.0) == identity("a", np.zeros((1, 2), np.int64), 2.0)
        False
    """
    digest = hashlib.blake2b(repr((fingerprint, rows.shape, settings)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(rows, np.int64).tobytes())
    return digest.hexdigest()
