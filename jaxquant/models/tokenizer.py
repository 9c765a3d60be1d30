"""Text to token ids and back, by the folder's own `tokenizer.json`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer.

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
    """

    backend: tokenizers.Tokenizer

    @staticmethod
    def read(folder: Path) -> "Tokenizer":
        """Read `tokenizer.json`.

        Args:
            folder: the directory that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; only the fast tokenizer format is supported")
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the backend raises the bare class
            raise ValueError(f"{path}: not a tokenizer: {error}") from None

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Split a text into token ids.

        Args:
            text: any text.
            special: add what the model expects around a text, such as a beginning-of-text token.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Join token ids into text, leaving out special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, write: Callable[[str], object]) -> Callable[[int], None]:
        """Make a function that takes one token id at a time and writes text as soon as it is certain.

        A character may take several tokens; it is written when the last one has come. Each piece is what a token
        adds to the decoding of the piece before it, because some tokenizers decode a token differently alone.

        Args:
            write: called with each new piece of text.
        """
        written: list[int] = []
        waiting: list[int] = []

        def take(token: int) -> None:
            waiting.append(token)
            before = self.decode(written)
            text = self.decode(written + waiting)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                return
            write(text[len(before) :])
            written[:] = waiting
            waiting.clear()

        return take
