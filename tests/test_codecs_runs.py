"""QATQ's run grammars against the greedy rules as they are written in its specification."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.v2 import runs

GRAMMARS = {"long": runs.LONG, "packed": runs.PACKED}
octets = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 80)), max_size=40).map(
    lambda pairs: np.repeat(
        np.array([value for value, _ in pairs], np.uint8), np.array([count for _, count in pairs], int)
    )
)


def greedy(source: list[int], grammar: runs.Grammar) -> list[tuple[int, int, int]]:
    def equal(at: int) -> int:
        end = at
        while end < len(source) and source[end] == source[at]:
            end += 1
        return end - at

    tokens, at = [], 0
    while at < len(source):
        start = at
        if source[at] == 0 or equal(at) >= grammar.threshold:
            kind = runs.ZERO if source[at] == 0 else runs.REPEAT
            at += min(equal(at), grammar.cap)
        else:
            kind = runs.RAW
            at += 1
            while at < len(source) and source[at] and equal(at) < grammar.threshold and at - start < grammar.cap:
                at += 1
        tokens.append((kind, start, at - start))
    return tokens


@settings(deadline=None)
@given(octets, st.sampled_from(sorted(GRAMMARS)), st.sampled_from([5, 9, 63]))
def test_tokens_are_the_greedy_ones(source, name, cap):
    grammar = dataclasses.replace(GRAMMARS[name], cap=cap)
    found = runs.find(source, grammar)
    tokens = list(zip(found.kind.tolist(), found.start.tolist(), found.length.tolist(), strict=True))
    assert tokens == greedy(source.tolist(), grammar)


@settings(deadline=None)
@given(octets, st.sampled_from(sorted(GRAMMARS)))
def test_round_trip_size_and_bound(source, name):
    grammar = GRAMMARS[name]
    encoded = runs.encode(source, grammar)
    assert len(encoded) == runs.size(source, grammar) >= runs.at_least(source, grammar)
    out = np.full_like(source, 77)
    runs.read(np.frombuffer(encoded, np.uint8), out, grammar, "body")
    assert out.tobytes() == source.tobytes()


def test_windows_do_not_show(monkeypatch):
    source = np.repeat(np.random.default_rng(0).integers(0, 3, 900), 3).astype(np.uint8)
    whole = {name: runs.encode(source, grammar) for name, grammar in GRAMMARS.items()}
    monkeypatch.setattr(runs, "_WINDOW", 200)
    assert {"packed": runs.encode(source, runs.PACKED)} == {"packed": whole["packed"]}
    monkeypatch.setattr(runs, "_WINDOW", 1 << 17)
    long = np.repeat(np.array([0, 5, 0, 7, 7, 9], np.uint8), [140_000, 200_000, 1, 70_000, 2, 65_538])
    monkeypatch.setattr(runs, "_WINDOW", 1 << 22)
    expected = runs.encode(long, runs.LONG)
    monkeypatch.setattr(runs, "_WINDOW", 1 << 17)
    assert runs.encode(long, runs.LONG) == expected


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"\x00\x00\x00", "length 0"),
        (b"\x03\x00\x01", "kind 3"),
        (b"\x00\x00\x09", "passes the end"),
        (b"\x01\x00\x04ab", "reads past the end"),
        (b"\x00\x00\x03", "ends where a run is expected"),
        (b"\x00\x00\x04\x00", "1 bytes after the last run"),
        (b"\x02\x00", "ends where a run is expected"),
    ],
)
def test_bad_runs(body, match):
    with pytest.raises(CorruptError, match=match):
        runs.read(np.frombuffer(body, np.uint8), np.empty(4, np.uint8), runs.LONG, "body")
