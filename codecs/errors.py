"""What can go wrong with bytes from outside: three errors, by what the caller can do about them."""


class CodecError(ValueError):
    """Bytes that cannot be decoded; nothing partial was returned or left behind."""


class UnsupportedError(CodecError):
    """A valid-looking file of a kind, version or strategy this decoder does not know: use another decoder."""


class CorruptError(CodecError):
    """A file that contradicts itself or its checksum: fetch it again."""


class LimitError(CodecError):
    """A file that claims more than the caller's limits allow: raise the limits if the source is trusted."""
