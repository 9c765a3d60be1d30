"""The two inner loops of the FNV-1a lanes, compiled by XLA for the CPU: two to four times as fast as NumPy's.

Imported only for large inputs, and only then does JAX get imported.
"""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

# A loop over so few lanes becomes one compiled function, where more would be a task per iteration, split over threads;
# and lanes an odd number of cache lines apart do not share cache sets.
LANES = 512
STEPS = (4032, 448, 64)
_PRIME = 0x100000001B3
_UNROLL = 16


class _Held(threading.local):
    """Work memory of a thread, reused."""

    def __init__(self) -> None:
        self.words = np.empty(0, np.uint64)
        self.columns: dict[tuple[int, ...], jax.Array] = {}


_held = _Held()


def low_bytes(starts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Run the low-byte automaton of every lane over all columns, from several starts.

    Args:
        starts: Low bytes of the lanes' states, uint8 `[starts, lanes]`.
        columns: Bytes, `[steps, lanes]`; steps is a multiple of 16.

    Returns:
        Low bytes at the end, `[starts, lanes]`.
    """
    return _call(_low_bytes, starts, columns.reshape(-1, _UNROLL, columns.shape[1]))


def hashes(starts: np.ndarray, words: np.ndarray, *, swapped: bool = False) -> np.ndarray:
    """Run FNV-1a of every lane over all words.

    Args:
        starts: State of every lane, uint64.
        words: Eight bytes of every lane at a time, `[steps / 8, lanes]`, uint64.
        swapped: Take the bytes of each 32-bit half most significant first.

    Returns:
        State of every lane at the end.
    """
    return _call(_hash_swapped if swapped else _hash_plain, starts, words)


def transposed(rows: np.ndarray) -> np.ndarray:
    """Copy words `[lanes, steps / 8]` into `[steps / 8, lanes]`, which the next call on this thread overwrites.

    XLA uses an array in place where it starts at a multiple of 64 bytes, and fresh memory costs as much as hashing it.
    """
    if _held.words.size < rows.size:
        memory = np.empty(rows.nbytes + 64, np.uint8)
        _held.words = memory[-memory.ctypes.data % 64 :][: rows.nbytes].view(np.uint64)
    words = _held.words[: rows.size].reshape(rows.shape[::-1])
    np.copyto(words, rows.T)
    return words


def columns(words: np.ndarray) -> np.ndarray:
    """Split words `[steps / 8, lanes]` into bytes `[steps, lanes]`, which the next call on this thread overwrites."""
    spent = _held.columns.pop(words.shape, None)
    if spent is None:
        spent = jnp.zeros((len(words), 8, words.shape[1]), jnp.uint8)
    made = _held.columns[words.shape] = _jitted(_split, donated=1)(words, spent)
    return np.asarray(made).reshape(-1, words.shape[1])


def _low_bytes(starts, blocks):
    def body(index, low):
        block = blocks[index]
        for step in range(_UNROLL):
            low = (low ^ block[step][None]) * jnp.uint8(_PRIME & 255)
        return low

    return jax.lax.fori_loop(0, blocks.shape[0], body, starts)


def _hash(starts, words, order):
    def body(index, state):
        word = words[index]
        for octet in order:
            state = (state ^ ((word >> jnp.uint64(8 * octet)) & jnp.uint64(255))) * jnp.uint64(_PRIME)
        return state

    return jax.lax.fori_loop(0, words.shape[0], body, starts)


def _hash_plain(starts, words):
    return _hash(starts, words, range(8))


def _hash_swapped(starts, words):
    return _hash(starts, words, (3, 2, 1, 0, 7, 6, 5, 4))


def _split(words, spent):
    shifts = jnp.arange(8, dtype=jnp.uint64) * 8
    return (words[:, None, :] >> shifts[None, :, None]).astype(jnp.uint8)


@contextlib.contextmanager
def wide():
    """Allow 64-bit words and choose the CPU, for this thread and this block alone."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@functools.cache
def _options() -> dict[str, str]:
    """Ask for registers of 512 bits, half as fast again where a CPU has them, if this version of XLA can be asked."""
    options = {"xla_cpu_prefer_vector_width": "512"}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(np.zeros(8, np.uint8))
    except (RuntimeError, TypeError, ValueError):
        return {}
    return options


@functools.cache
def _jitted(function, donated=()):
    return jax.jit(function, donate_argnums=donated, keep_unused=True, compiler_options=_options())


def _call(function, *arrays) -> np.ndarray:
    return np.asarray(_jitted(function)(*arrays))
