"""What attention may read of a cache, from a list of tokens in float64; nothing of the caches under test is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import quantizers
from jaxquant.methods import turboquant


@functools.cache
def pair(dim=16, bits_k=4, bits_v=2):
    return turboquant.kv(jax.random.key(3), dim=dim, bits_k=bits_k, bits_v=bits_v, fused=False)


@functools.cache
def _matrix(dim, bits):
    quantizer = next(q for q in pair(dim) if q.bits == bits)
    return np.asarray(quantizer.rotation.rotate(jnp.eye(quantizer.dim)), np.float64)


def decoded(quantizer, x):
    """Decode the codes that JAX gives vectors, in float64; every call has one shape, which compiles once."""
    dim, most = quantizer.dim, 1024
    vectors = np.asarray(x, np.float32).reshape(-1, dim)
    parts = [np.zeros((0, dim))]
    for first in range(0, len(vectors), most):
        part = vectors[first : first + most]
        code = quantizers.quantize(quantizer, jnp.asarray(np.pad(part, ((0, most - len(part)), (0, 0)))))
        levels = np.asarray(quantizer.levels(code), np.float64) * np.asarray(code.scales, np.float64)[..., None]
        parts.append(levels[: len(part)] @ _matrix(dim, quantizer.bits).T / dim**0.5)
    return np.concatenate(parts).reshape(x.shape)


class Oracle:
    """Slots of every row, exact and decoded, and which of them lost their exact copy."""

    def __init__(self, quantizer, *, sinks=0, window=0, sliding=None, padding=(0,)):
        self.quantizer, self.sinks, self.window, self.sliding = quantizer, sinks, window, sliding
        self.padding = list(padding)
        self.exact = self.coded = np.zeros((len(self.padding), 1, 0, quantizer.dim), np.float32)
        self.lost = np.zeros(0, bool)
        self.oldest = 0  # slot that a sliding window still holds

    def copy(self):
        other = object.__new__(Oracle)
        other.__dict__ = {**self.__dict__, "padding": list(self.padding), "lost": self.lost.copy()}
        return other

    @property
    def length(self):
        return len(self.lost)

    def append(self, x, *, record=False):
        """Add tokens [batch, kv_heads, new, dim], and give what their attention reads."""
        before = self.length
        coded = decoded(self.quantizer, x)
        first = self.length == 0 and self.exact.shape[:2] != x.shape[:2]  # the heads are not known before
        self.exact = x if first else np.concatenate([self.exact, x], axis=2)
        self.coded = coded if first else np.concatenate([self.coded, coded], axis=2)
        self.lost = np.concatenate([self.lost, np.zeros(x.shape[2], bool)])
        self.lost[: max(0, self.length - self.window)] = True
        seen = 0 if self.sliding is None else max(0, before - self.sliding + 1)
        if self.sliding is not None and not record:
            self.oldest = max(self.oldest, self.length - self.sliding + 1)
        return self.read()[:, :, seen:]

    def read(self):
        slot = np.arange(self.length)
        rank = slot - np.asarray(self.padding)[:, None]
        exact = ((rank >= 0) & (rank < self.sinks)) | ~self.lost
        return np.where(exact[:, None, :, None], self.exact, self.coded)

    def can_crop(self, end):
        return self.sliding is None or end in (0, self.length) or self.oldest <= max(0, end - self.sliding + 1)

    def crop(self, end):
        self.exact, self.coded, self.lost = self.exact[:, :, :end], self.coded[:, :, :end], self.lost[:end]
        if self.sliding is not None:
            self.oldest = max(self.oldest, self.length - self.sliding + 1) if end else 0

    def take(self, rows):
        self.exact, self.coded = self.exact[rows], self.coded[rows]
        self.padding = [self.padding[row] for row in rows]
