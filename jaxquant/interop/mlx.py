"""A prompt cache for mlx-lm that holds packed codes: pass it to `generate` as `prompt_cache`.

It works with models whose layers use mlx-lm's `KVCache` or `RotatingKVCache`; layers with other states keep them
uncompressed. A layer decodes its codes when its attention asks for keys and values, and they are gone after it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models.base import create_causal_mask

from jaxquant.interop import _mlx_codes
from jaxquant.interop._halves import Half
from jaxquant.protocols import Quantizer


class CompressedKVCache:
    """Keys and values of one layer as packed codes, with the methods that mlx-lm's models and generation call.

    The first `sinks` tokens of a row and the newest `window` ones are read as they came, all others from their codes,
    by every token of the chunk at hand, its own included. With `window=0` that does not depend on how a prompt is cut
    into chunks, and agrees with `jaxquant.cache`; a window is counted from the newest token of a chunk.

    Args:
        keys: quantizer of the keys, a `quantizers.Scalar` or `Exact`.
        values: likewise of the values.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        sliding_window: newest tokens that attention sees, its own included; all if None. Older ones are not held.
        padding: slots of padding at the left of each row of a batch.

    Raises:
        ValueError: a size is out of range.
        TypeError: there is no MLX arithmetic for a quantizer.
    """

    def __init__(
        self,
        keys: Quantizer,
        values: Quantizer,
        *,
        sinks: int = 0,
        window: int = 0,
        sliding_window: int | None = None,
        padding: Sequence[int] | None = None,
    ):
        for name, size, least in (("sinks", sinks, 0), ("window", window, 0), ("sliding_window", sliding_window, 1)):
            if size is not None and size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        if padding is not None and min(padding, default=-1) < 0:
            raise ValueError(f"padding must be a number of slots for each row, none negative, got {list(padding)}")
        self.coders = _mlx_codes.coder(keys), _mlx_codes.coder(values)
        self.sinks, self.window, self.sliding_window = sinks, window, sliding_window
        self.padding = None if padding is None else list(padding)
        self.halves: tuple[Half, ...] = ()

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token; where there is padding, one for each row."""
        return self.size() if self.padding is None else mx.array([self.size() - gap for gap in self.padding])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add tokens, [batch, kv_heads, new, dim], and give all keys and values that they may see.

        Raises:
            ValueError: the shape or dtype is not that of the tokens before, or not the quantizers'.
        """
        rows = self.padding or [0] * keys.shape[0]
        if not self.halves:
            for name, x, coder in zip(("keys", "values"), (keys, values), self.coders, strict=True):
                if x.shape[-1] != coder.dim:
                    raise ValueError(f"{name} of the model have dim {x.shape[-1]}, and their quantizer {coder.dim}")
            if len(rows) != keys.shape[0]:
                raise ValueError(f"padding has {len(rows)} rows, and the model's batch {keys.shape[0]}")
            self.halves = tuple(
                Half(coder, sinks=self.sinks, window=self.window, like=x)
                for coder, x in zip(self.coders, (keys, values), strict=True)
            )
        for name, x, half in zip(("keys", "values"), (keys, values), self.halves, strict=True):
            batch, heads, _, dim = half.recent.shape
            fits = x.ndim == 4 and (x.shape[0], x.shape[1], x.shape[3]) == (batch, heads, dim)
            if not fits or x.dtype != half.recent.dtype:
                raise ValueError(
                    f"{name} must be [{batch}, {heads}, new, {dim}] in {half.recent.dtype}, like those before, got "
                    f"{list(x.shape)} in {x.dtype}"
                )
        seen = self._seen()
        for x, half in zip((keys, values), self.halves, strict=True):
            half.append(x, rows)
        read = tuple(half.read(rows) for half in self.halves)
        if self.sliding_window is not None:
            read = tuple(x[:, :, x.shape[2] - seen - keys.shape[2] :] for x in read)
            for half in self.halves:
                half.drop(half.end - self.sliding_window + 1)
        return read[0], read[1]

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> mx.array | str | None:
        """Say what each of `N` new tokens may see of the keys that `update_and_fetch` will return for them."""
        window_size = self.sliding_window if window_size is None else window_size
        seen = self._seen()
        hides = window_size is not None and seen + N > window_size
        if self.padding is None and not hides and not return_array:
            return None if N == 1 else "causal"
        left = None
        if self.padding is not None:
            left = mx.array([max(0, gap - (self.size() - seen)) for gap in self.padding])
        return create_causal_mask(N, offset=seen, window_size=window_size, left_padding=left)

    def size(self) -> int:
        """Count slots, padding and slots that slid out of sight included."""
        return self.halves[0].end if self.halves else 0

    def empty(self) -> bool:
        """Say whether nothing came yet."""
        return not self.halves

    def is_trimmable(self) -> bool:
        """Say whether `trim` has all that it may need: a sliding window must not have slid yet."""
        return not self.halves or self.halves[0].start == 0

    def trim(self, n: int) -> int:
        """Forget the newest `n` tokens, or all; give their number.

        Raises:
            ValueError: `n` is negative, or tokens are needed that slid out of sight.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        n = min(n, self.size())
        if n and n < self.size() and not self.is_trimmable():
            raise ValueError(f"trim of {n} tokens needs what slid out of the window of {self.sliding_window}")
        for half in self.halves:
            half.crop(half.end - n)
        return n

    def filter(self, batch_indices: mx.array | Sequence[int]) -> None:
        """Take rows in a new order, with repetition or omission."""
        rows = [int(row) for row in np.asarray(batch_indices)]
        if self.padding is not None:
            self.padding = [self.padding[row] for row in rows]
        for half in self.halves:
            half.select(lambda x: x[mx.array(rows)])

    @property
    def state(self) -> list[Any]:
        """All that is held: arrays for mlx-lm to evaluate and save, and one number each for keys and values."""
        return [[list(half.codes), half.recent, half.exact, half.start] for half in self.halves]

    @state.setter
    def state(self, held: Sequence[Any]) -> None:
        halves = []
        for coder, (codes, recent, exact, start) in zip(self.coders, held, strict=False):
            half = Half(coder, sinks=self.sinks, window=self.window, like=recent)
            half.codes, half.recent, half.exact, half.start = tuple(codes), recent, exact, int(start)
            halves.append(half)
        self.halves = tuple(halves)

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds, the quantizers' tables not included."""
        return sum(x.nbytes for half in self.halves for x in half.tensors)

    def _seen(self) -> int:
        """Count the slots held that the next token may see."""
        return self.size() if self.sliding_window is None else min(self.size(), self.sliding_window - 1)


def make_prompt_cache(
    model: Any,
    keys: Quantizer | Sequence[Quantizer],
    values: Quantizer | Sequence[Quantizer],
    *,
    sinks: int = 0,
    window: int = 0,
    exact_layers: Sequence[int] = (),
    padding: Sequence[int] | None = None,
) -> list[Any]:
    """Make a compressed cache for every layer of an mlx-lm model, as `mlx_lm.models.cache.make_prompt_cache` does.

    Args:
        model: of mlx-lm.
        keys: quantizer of the keys, or one for each layer.
        values: likewise of the values.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        exact_layers: layers that are not compressed; negative numbers count from the end.
        padding: slots of padding at the left of each row of a batch.

    Raises:
        ValueError: a size is out of range, or the number of quantizers is not that of the layers.
        TypeError: there is no MLX arithmetic for a quantizer.
    """
    layers: list[Any] = mlx_caches.make_prompt_cache(model)
    outside = [layer for layer in exact_layers if not -len(layers) <= layer < len(layers)]
    if outside:
        raise ValueError(f"exact_layers must be from {-len(layers)} to {len(layers) - 1}, got {outside}")
    exact = {layer % len(layers) for layer in exact_layers}
    each = []
    for name, given in {"keys": keys, "values": values}.items():
        if isinstance(given, Sequence) and len(given) != len(layers):
            raise ValueError(f"{name} must hold one quantizer for each of {len(layers)} layers, got {len(given)}")
        each.append(list(given) if isinstance(given, Sequence) else [given] * len(layers))
    for i, layer in enumerate(layers):
        if i in exact or type(layer) not in (mlx_caches.KVCache, mlx_caches.RotatingKVCache):
            continue
        layers[i] = CompressedKVCache(
            each[0][i], each[1][i], sinks=sinks, window=window,
            sliding_window=getattr(layer, "max_size", None), padding=padding,
        )  # fmt: skip
    return layers
