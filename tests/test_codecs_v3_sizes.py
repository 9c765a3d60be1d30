"""How small v3 makes a real cache, and that each transform is what makes it so.

`tests/data/v3/cache.npz` holds keys of layer 2 and values of layer 0 of the model that ships with jaxquant, bfloat16
`[tokens, heads, dim]`, over the first 512 tokens of its held-out text. Limits are entropies of the data, computed
here: what a coder of exponents alone could reach at best.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from jaxquant.codecs import v3
from jaxquant.codecs.v3 import choose, chunks

CACHE = pathlib.Path(__file__).parent / "data" / "v3" / "cache.npz"


def cache(name: str) -> np.ndarray:
    """Return keys or values."""
    with np.load(CACHE) as archive:
        return archive[name].view(ml_dtypes.bfloat16)


def entropy(symbols: np.ndarray) -> float:
    """Return bits per symbol."""
    share = np.unique(symbols, return_counts=True)[1] / symbols.size
    return float(-(share @ np.log2(share)))


def exponents(values: np.ndarray) -> np.ndarray:
    """Return the exponent fields, `[tokens, channels]`."""
    return (values.view(np.uint16).reshape(len(values), -1) >> 7) & 255


def recurring_tokens() -> np.ndarray:
    """Return rows out of a hundred whose low mantissa bits differ nearly always, as a second layer's values do."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((100, 128), np.float32) * np.exp(rng.standard_normal(128, np.float32))
    words = rows.astype(ml_dtypes.bfloat16).view(np.uint16)[rng.integers(0, 100, 2048)]
    changed = np.repeat(rng.random((2048, 32)) > 0.1, 4, axis=1)
    return (words ^ rng.integers(0, 64, words.shape, dtype=np.uint16) * changed).view(ml_dtypes.bfloat16)


def _exponent_coder() -> tuple[np.ndarray, float]:
    keys = cache("keys")
    return keys, (8 + entropy(exponents(keys))) / 16


def _channel_coder() -> tuple[np.ndarray, float]:
    keys = cache("keys")
    given = np.mean([entropy(channel) for channel in exponents(keys).T])
    return keys, (8 + float(given)) / 16


def _distinct_rows() -> tuple[np.ndarray, float]:
    values = cache("values")
    words = values.view(np.uint16).reshape(len(values), -1)
    distinct = len(np.unique(words, axis=0)) / len(words)
    place = np.log2(len(words)) / (16 * words.shape[1])
    return values, distinct * (8 + entropy(exponents(values))) / 16 + place


def _recurring() -> tuple[np.ndarray, float]:
    tokens = recurring_tokens()
    return tokens, (8 + entropy(exponents(tokens))) / 16 - 0.1


def _without(module, name: str, result: object):
    return lambda: mock.patch.object(module, name, return_value=result)


def _without_context():
    flat = dataclasses.replace(choose.PROFILES["balanced"], context=0)
    return mock.patch.dict(choose.PROFILES, balanced=flat)


@pytest.mark.parametrize(
    ("profile", "limited", "switched_off"),
    [
        ("fast", _exponent_coder, _without(choose, "_nibbles", choose.Plan(99.0, 0))),
        ("balanced", _channel_coder, _without(choose, "_symbols", [])),
        ("balanced", _channel_coder, _without_context),
        ("fast", _distinct_rows, _without(chunks, "_repeated_rows", None)),
        ("balanced", _distinct_rows, _without(chunks, "_repeated_rows", None)),
        ("small", _distinct_rows, _without(chunks, "_repeated_rows", None)),
        ("balanced", _recurring, _without(choose, "_side_by_side", None)),
    ],
)
def test_a_cache_is_smaller_than_its_entropy_says_and_only_with_the_transform(
    profile: str, limited: Callable[[], tuple[np.ndarray, float]], switched_off: Callable
) -> None:
    values, limit = limited()
    data = v3.encode(values, profile=profile)
    assert np.asarray(v3.decode(data)).tobytes() == values.tobytes()
    assert len(data) <= limit * values.nbytes * 1.01  # headers and code tables of one small chunk
    with switched_off():
        without = v3.encode(values, profile=profile)
    assert len(without) > limit * values.nbytes * 1.01


def test_the_profiles_come_in_order() -> None:
    for name in ("keys", "values"):
        fast, balanced, small = (len(v3.encode(cache(name), profile=profile)) for profile in choose.PROFILES)
        assert small <= balanced <= fast * 1.002
