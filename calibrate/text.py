"""Text to calibrate on: rows cut from the user's tokens, and rows that ask for something hidden far back.

Average text hardly ever asks for one token among thousands, and statistics of it starve the directions which that
takes: keys then look well by perplexity and forget pass keys. A share of rows with questions keeps them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxquant import evaluate, needles


def rows(
    generator: np.random.Generator,
    tokens: Sequence[int] | Int[np.ndarray, " tokens"],
    tokenizer: needles.Tokenizer,
    *,
    count: int,
    length: int,
    retrieval: float = 0.25,
    start: int = 0,
    keys: int | None = None,
) -> Int[np.ndarray, "count length"]:
    r"""Cut rows from a text and hide pass keys in a share of them.

    Args:
        generator: chooses the keys and their places.
        tokens: of the text.
        tokenizer: of the model.
        count: rows.
        length: tokens of a row.
        retrieval: share of the rows that hide pass keys and ask for them.
        start: first token of the text that is used.
        keys: pass keys of such a row; one for every 128 tokens by default, 16 at most.

    Returns:
        Ordinary rows first.

    Raises:
        ValueError: the text is too short, or the share is not in 0..1.

    Example:
        >>> from jaxquant import models
        >>> tokenizer = models.load().tokenizer
        >>> ids = tokenizer.encode("x = 1\n" * 2000)
        >>> rows(np.random.default_rng(0), ids, tokenizer, count=4, length=256, retrieval=0.5).shape
        (4, 256)
    """
    if not 0 <= retrieval <= 1:
        raise ValueError(f"retrieval must be a share from 0 to 1, got {retrieval}")
    asking = round(count * retrieval)
    plain = count - asking
    parts = []
    if plain:
        parts.append(evaluate.rows(tokens, start=start, count=plain, length=length - 1))
    if asking:
        after = np.roll(np.asarray(tokens[start:]), -plain * length)  # from the start again where the text is short
        text = tokenizer.decode(np.resize(after, 3 * asking * length).tolist())
        hidden = min(16, max(1, length // 128)) if keys is None else keys
        parts.append(needles.hide(generator, text, tokenizer, count=asking, length=length, keys=hidden))
    return np.concatenate(parts)
