"""What a caller allows bytes from outside to claim, checked before anything is allocated for them."""

import dataclasses

from jaxquant.codecs import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bound what a file may claim; the defaults are those of QATQ 0.4.2, which a file it writes never exceeds.

    The first two hold for every file, the rest for one generation each.

    A decode holds at most its result, one chunk's working space per thread and the encoded bytes it was given.

    Attributes:
        decoded_bytes: Bytes of the decoded result, all tensors together.
        chunks: Chunks in the file.
        values: v2, elements in the whole file.
        encoded_bytes: v2, bytes of the file itself.
        chunk_values: v2, elements in one chunk.
        chunk_bytes: v2, encoded bytes of one chunk.
        tensors: v3, tensors in the file.
        text_bytes: v3, bytes of all names and metadata together.

    Example:
        >>> small = Limits(values=1_000_000)
        >>> small.check("values", 2_000_000, "container header, offset 8")
        Traceback (most recent call last):
            ...
        jaxquant.codecs.errors.LimitError: container header, offset 8: 2000000 values, limit 1000000
    """

    decoded_bytes: int = 1 << 34
    chunks: int = 1 << 20
    values: int = 1 << 32
    encoded_bytes: int = 1 << 40
    chunk_values: int = 1 << 26
    chunk_bytes: int = 268_435_492
    tensors: int = 1 << 16
    text_bytes: int = 1 << 24

    def check(self, what: str, claimed: int, where: str) -> None:
        """Raise LimitError if the file claims more than is allowed.

        Args:
            what: Name of the limit.
            claimed: What the file says or would need.
            where: The place that says so, for the message.

        Raises:
            LimitError: `claimed` exceeds the limit.
        """
        allowed = getattr(self, what)
        if claimed > allowed:
            raise errors.LimitError(f"{where}: {claimed} {what.replace('_', ' ')}, limit {allowed}")
