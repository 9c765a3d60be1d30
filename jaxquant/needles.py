"""Pass-key retrieval: hide short facts in text, ask for them later, and mark the tokens that answer.

Perplexity is an average over easy tokens; whether a cache can still find one token among thousands shows here.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

_ANSWER = "\nAnswer:"
_OVERSHOOT = 16  # tokens by which a line may pass the place of the next key
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
    pieces: dict[int, str] = {}
    marked = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(tokens.tolist()):
        # By text, not by tokens: tokenizers join the colon's neighbours in their own ways.
        texts = [pieces.setdefault(token, tokenizer.decode([token])) for token in ids]
        ends = list(itertools.accumulate(map(len, texts)))
        whole = "".join(texts)
        found = whole.find(_ANSWER)
        while found >= 0:
            asked = found + len(_ANSWER)
            first = bisect.bisect_left(ends, asked) + 1
            stop = whole.find("\n", asked)
            last = bisect.bisect_right(ends, stop if stop >= 0 else len(whole))
            marked[row, first:last] = True
            found = whole.find(_ANSWER, asked)
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
        ValueError: the text is too short, a row has no room for its keys, or there are more keys than names.
    """
    if not 1 <= keys <= len(_WORDS) * len(_NOUNS):
        raise ValueError(f"keys must be from 1 to {len(_WORDS) * len(_NOUNS)}, got {keys}")
    lines = iter(text.replace(_ANSWER.strip(), "answer").splitlines(keepends=True))
    out = []
    for _ in range(count):
        names = generator.permutation([f"{word}-{noun}" for word in _WORDS for noun in _NOUNS])[:keys]
        values = generator.integers(10_000, 100_000, keys)
        pairs = list(zip(names, values, strict=True))
        facts = [f"The pass key for {name} is {value}. Remember it.\n" for name, value in pairs]
        questions = "".join(f"\nQuestion: what is the pass key for {name}?{_ANSWER} {value}\n" for name, value in pairs)
        tail = tokenizer.encode(questions, special=False)
        room = length - len(tail)
        spare = room - sum(len(tokenizer.encode(fact, special=False)) for fact in facts)
        if spare < room // 2:
            raise ValueError(f"length {length} leaves no room for text beside {keys} pass keys")
        places = sorted(generator.random(keys) * 0.75 * spare)
        body: list[str] = []
        waiting, used = list(facts), 0
        while used < spare:
            while waiting and used >= places[-len(waiting)]:
                body.append(waiting.pop(0))
            line = next(lines, None)
            if line is None:
                raise ValueError(f"text is too short for {count} rows of {length} tokens")
            # A line longer than what is left before the next fact would push the fact out of the row.
            limit = (places[-len(waiting)] if waiting else spare) - used
            piece = tokenizer.encode(line, special=False)
            if len(piece) > limit + _OVERSHOOT:
                line = tokenizer.decode(piece[: int(limit) + _OVERSHOOT]).rstrip("\n") + "\n"
                piece = tokenizer.encode(line, special=False)
            body.append(line)
            used += max(1, len(piece))
        ids = tokenizer.encode("".join(body), special=False)
        while len(ids) < room:
            extra = next(lines, None)
            if extra is None:
                raise ValueError(f"text is too short for {count} rows of {length} tokens")
            body.append(extra)
            ids = tokenizer.encode("".join(body), special=False)
        out.append(ids[:room] + tail)
    return np.array(out, np.int64)
