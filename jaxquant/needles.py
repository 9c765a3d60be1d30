"""Pass-key retrieval: hide short facts in text, ask for them later, and mark the tokens that answer.

Perplexity is an average over easy tokens; whether a cache can still find one token among thousands shows here.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

_ANSWER = "\nAnswer:"
_TOKENS_OF_A_LINE = 16
_WORDS = "amber birch cobalt delta ember falcon garnet harbor indigo jasper".split()
_NOUNS = "anchor beacon canyon dagger engine forest glacier hammer island jungle".split()


@runtime_checkable
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
    lines = iter(text.replace(_ANSWER.strip(), "answer").splitlines(keepends=True))
    out = []
    for _ in range(count):
        names = generator.permutation([f"{word}-{noun}" for word in _WORDS for noun in _NOUNS])[:keys]
        values = generator.integers(10_000, 100_000, keys)
        pairs = list(zip(names, values, strict=True))
        facts = [f"The pass key for {name} is {value}. Remember it.\n" for name, value in pairs]
        questions = "".join(f"\nQuestion: what is the pass key for {name}?{_ANSWER} {value}\n" for name, value in pairs)
        tail = tokenizer.encode(questions, special=False)
        places = np.sort(generator.random(keys))[::-1] * 0.75
        room = length - len(tail)
        if sum(len(tokenizer.encode(fact, special=False)) for fact in facts) > room // 2:
            raise ValueError(f"length {length} leaves no room for text beside {keys} pass keys")
        body: list[str] = []
        ids: list[int] = []
        while len(ids) < room:
            more = list(itertools.islice(lines, max(1, (room - len(ids)) // _TOKENS_OF_A_LINE)))
            if not more:
                raise ValueError(f"text is too short for {count} rows of {length} tokens")
            body += more
            hidden = list(body)
            for fact, place in zip(facts, places, strict=True):
                hidden.insert(int(place * len(body)), fact)
            ids = tokenizer.encode("".join(hidden), special=False)
        out.append(ids[:room] + tail)
    return np.array(out, np.int64)
