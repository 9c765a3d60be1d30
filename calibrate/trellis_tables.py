"""Train the levels of trellis codes for normal coordinates: search for codes, move levels to centroids, repeat.

python -m jaxquant.calibrate.trellis_tables -o jaxquant/trellis.npz [--bits 2] [--states 256]

writes what the package ships. It needs about an hour on two cores; a table that the file has is not trained again.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxquant import trellis
from jaxquant.trellis import Code

DIM = 128
_RELAXED = 1.8  # of the way to a centroid and beyond it: Lloyd's iteration, over-relaxed
_ROUNDS = 40
_SETTLING = 4  # rounds at the end that go to the centroids
_SAMPLES = 32  # of each level and round, at least
_TRIES = {4: 6, 8: 6, 16: 3, 32: 3, 64: 2}  # starts from other levels at 1 to 4 bits, of which the best is kept
_THOROUGH = {(2, 64): (8, 150)}  # starts and rounds of the largest table that fused attention reads (bits, states)


def train(
    key: PRNGKeyArray, *, bits: int, states: int, rounds: int = _ROUNDS
) -> tuple[Float[np.ndarray, " levels"], float]:
    """Train one table.

    Args:
        key: of the first levels and of the vectors.
        bits: of a coordinate.
        states: of the trellis.
        rounds: of the iteration.

    Returns:
        The levels of all windows, and the mean squared error on vectors they were not trained on.
    """
    first, *keys = jax.random.split(key, rounds + 2)
    size = states << bits
    half = np.asarray(jax.random.normal(first, (size // 2,)), np.float64) * (1 - 4.0**-bits) ** 0.5
    count = max(2048, _SAMPLES * size // 2 // DIM)
    for number, each in enumerate(keys[:-1]):
        y = sphere(each, count)
        code = coded(half, bits, states)
        seen = np.asarray(_windows(code, _encode(code, y))).reshape(-1)
        mirrored = seen >= size // 2
        places = np.where(mirrored, size - 1 - seen, seen)
        values = np.where(mirrored, -1, 1) * np.asarray(y, np.float64).reshape(-1)
        held, total = (np.bincount(places, weights, minlength=size // 2) for weights in (None, values))
        step = (1.0 if number >= rounds - _SETTLING else _RELAXED) * held / (held + 2)
        half += step * (total / np.maximum(held, 1) - half)
    code = coded(half, bits, states)
    y = sphere(keys[-1], count)
    return np.asarray(code.tables[0][0]), float(jnp.mean((trellis.decode(code, _encode(code, y)) - y) ** 2))


def sphere(key: PRNGKeyArray, count: int) -> Float[Array, "count dim"]:
    """Draw what a random rotation makes of unit vectors, times the root of their length."""
    y = jax.random.normal(key, (count, DIM))
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True) * DIM**0.5


def coded(half: Float[np.ndarray, " half"], bits: int, states: int) -> Code:
    """Make a code of the levels of the windows whose highest bit is 0, rounded as they are stored."""
    half = half.astype(np.float16).astype(np.float32)
    table = jnp.asarray(np.concatenate([half, -half[::-1]]))
    return Code(tables=((table,),), runs=(((bits,), DIM),), states=states)


def best(bits: int, states: int) -> tuple[Float[np.ndarray, " levels"], float]:
    """Train from several starts where that is cheap, and keep the best."""
    tries, rounds = _THOROUGH.get((bits, states), (_TRIES.get(states, 1) if bits <= 4 else 1, _ROUNDS))
    keys = [jax.random.key(1000 * bits + start) for start in range(tries)]
    found = (train(key, bits=bits, states=states, rounds=rounds) for key in keys)
    return min(found, key=lambda pair: pair[1])


@jax.jit
def _encode(code: Code, y: Float[Array, "count dim"]) -> UInt8[Array, "count n_bytes"]:
    return trellis.encode(code, y)


@jax.jit
def _windows(code: Code, packed: UInt8[Array, "count n_bytes"]) -> Array:
    return trellis.windows(code, packed)


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--states", type=int, nargs="*", default=list(trellis.STATES))
    options = parser.parse_args(None if arguments is None else list(arguments))
    tables: dict[str, np.ndarray] = {}
    if options.output.exists():
        with np.load(options.output, allow_pickle=False) as found:
            tables = dict(found)
    for states in options.states:
        for bits in options.bits:
            name = f"{bits}.{states}"
            if name not in tables and bits <= trellis.most_bits(states):
                table, error = best(bits, states)
                tables[name] = table[: len(table) // 2].astype(np.float16)
                np.savez_compressed(options.output, **tables)  # pyright: ignore[reportArgumentType]
                print(f"{bits} bits, {states} states: {error:.5f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
