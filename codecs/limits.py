"""What a caller allows bytes from outside to claim, checked before anything is allocated for them."""

import dataclasses

from jaxquant.codecs import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bound what a file may claim; the defaults are those of QATQ 0.4.2, which a file it writes never exceeds.

    A decode holds at most its result, one chunk's working space per thread and the encoded bytes it was given.

    Attributes:
        values: Elements in the whole file.
        decoded_bytes: Bytes of the decoded result.
        encoded_bytes: Bytes of the file itself.
        chunks: Chunks in the file.
        chunk_values: Elements in one chunk.
        chunk_bytes: Encoded bytes of one chunk.

    Example:
        >>> small = Limits(values=1_000_000)
        >>> small.check("values", 2_000_000, "container header, offset 8")
        Traceback (most recent call last):
            ...
        jaxquant.codecs.errors.LimitError: container header, offset 8: 2000000 values, limit 1000000
    """

    values: int = 1 << 32
    decoded_bytes: int = 1 << 34
    encoded_bytes: int = 1 << 40
    chunks: int = 1 << 20
    chunk_values: int = 1 << 26
    chunk_bytes: int = 268_435_492

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
