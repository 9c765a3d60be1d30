"""What `inspect` says of a file."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """One payload as `inspect` sees it.

    Attributes:
        offset: Of the payload, in bytes from the start of the file.
        nbytes: Of the payload.
        values: Elements in it.
        mode: QATQ's name of the mode.
        strategy: QATQ's name of the exact strategy, empty in other modes.
    """

    offset: int
    nbytes: int
    values: int
    mode: str
    strategy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A file as `inspect` sees it.

    Attributes:
        format: "QATC v2" or "QATQ v1".
        dtype: "f32", "f16" or "bf16".
        values: Elements.
        raw_nbytes: Bytes of the decoded values.
        nbytes: Bytes of the file.
        chunks: Its payloads.
    """

    format: str
    dtype: str
    values: int
    raw_nbytes: int
    nbytes: int
    chunks: tuple[Chunk, ...]

    @property
    def ratio(self) -> float:
        """Encoded bytes per decoded byte."""
        return self.nbytes / self.raw_nbytes if self.raw_nbytes else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.nbytes / self.raw_nbytes if self.raw_nbytes else None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a v3 file as `inspect` sees it.

    Attributes:
        name: Empty for an array that was encoded without one.
        dtype: NumPy's name.
        shape: Sizes of all axes.
        raw_nbytes: Bytes of the decoded values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw_nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorsSummary:
    """A v3 file as `inspect` sees it.

    Attributes:
        format: "QATC v3".
        raw_nbytes: Bytes of all decoded values.
        nbytes: Bytes of the file.
        tensors: What it holds.
    """

    format: str
    raw_nbytes: int
    nbytes: int
    tensors: tuple[Tensor, ...]

    @property
    def ratio(self) -> float:
        """Encoded bytes per decoded byte."""
        return self.nbytes / self.raw_nbytes if self.raw_nbytes else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.nbytes / self.raw_nbytes if self.raw_nbytes else None}
