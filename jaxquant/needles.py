"""Pass-key retrieval: hide short facts in text, ask for them later, and mark the tokens that answer.

Perplexity is an average over easy tokens; whether a cache can still find one token among thousands shows here.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int

_ANSWER = "\nAnswer:"
_WORDS = "amber birch cobalt delta ember falcon garnet harbor indigo jasper".split()
_NOUNS = "anchor beacon canyon dagger engine forest glacier hammer island jungle".split()


class Tokenizer(Protocol):
    """The two verbs that are needed here."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Turn text into token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text."""
        ...


def answers(tokens: Int[np.ndarray, "rows tokens"], tokenizer: Tokenizer) -> Bool[np.ndarray, "rows predicted"]:
    """Mark what follows each `Answer:` on a line of its own, up to the end of that line, among the predicted tokens.

    Args:
        tokens: rows that hold questions and answers, as `hide` writes them.
        tokenizer: of the tokens.

    Returns:
        One column less than `tokens`: column t speaks of token t + 1.

    Raises:
        ValueError: no row holds an answer.
    """
    prompt = tokenizer.encode(_ANSWER, special=False)
    ends: dict[int, bool] = {}
    marked = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(tokens.tolist()):
        starts = [i for i in range(len(ids)) if ids[i : i + len(prompt)] == prompt]
        for start in starts:
            for i in range(start + len(prompt), len(ids)):
                if ends.setdefault(ids[i], "\n" in tokenizer.decode([ids[i]])):
                    break
                marked[row, i] = True
    if not marked.any():
        raise ValueError(f"tokens holds no {_ANSWER!r}: these rows do not ask for pass keys")
    return marked[:, 1:]


def hide(
    generator: np.random.Generator, text: str, tokenizer: Tokenizer, *, count: int, length: int, keys: int = 4
) -> Int[np.ndarray, "count length"]:
    """Cut rows from a text and hide pass keys in them, each asked for once near the end of its row.

    Args:
        generator: chooses the keys and their places.
        text: to hide them in, long enough for `count` rows.
        tokenizer: of the model.
        count: rows.
        length: tokens of a row.
        keys: pass keys of a row.

    Raises:
        ValueError: the text is too short, or a row has no room for its keys.
    """
    lines = text.splitlines(keepends=True)
    out, line = [], 0
    for _ in range(count):
        names = generator.permutation([f"{word}-{noun}" for word in _WORDS for noun in _NOUNS])[:keys]
        values = generator.integers(10_000, 100_000, keys)
        questions = "".join(
            f"\nQuestion: what is the pass key for {name}?{_ANSWER} {value}\n"
            for name, value in zip(names, values, strict=True)
        )
        facts = [
            f"The pass key for {name} is {value}. Remember it.\n" for name, value in zip(names, values, strict=True)
        ]
        room = length - len(tokenizer.encode(questions, special=False))
        room -= sum(len(tokenizer.encode(fact, special=False)) for fact in facts)
        if room < length // 4:
            raise ValueError(f"length {length} leaves no room for text beside {keys} pass keys")
        body: list[str] = []
        while room > 0:
            if line == len(lines):
                raise ValueError(f"text is too short for {count} rows of {length} tokens")
            body.append(re.sub(_ANSWER.strip(), "answer", lines[line]))
            room -= len(tokenizer.encode(body[-1], special=False))
            line += 1
        for fact, place in zip(
            facts, sorted(generator.integers(0, max(1, len(body) * 3 // 4), keys))[::-1], strict=True
        ):
            body.insert(int(place), fact)
        ids = tokenizer.encode("".join(body), special=False)
        tail = tokenizer.encode(questions, special=False)
        out.append((ids[: length - len(tail)] + tail)[:length])
    return np.array(out, np.int64)
