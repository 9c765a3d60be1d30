"""A cache for Hugging Face transformers that holds packed codes: pass it to a model as `past_key_values`.

It works with any decoder whose layers use `transformers.Cache` for attention over all tokens, a sliding window or
chunks; layers of linear attention and convolutions keep the uncompressed states that transformers gives them. A layer
decodes its codes when its attention asks for keys and values, and they are gone after it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from jaxquant.interop import _torch_codes
from jaxquant.interop._halves import Half
from jaxquant.protocols import Quantizer


class CompressedCache(Cache):
    """Keys and values of a transformers model as packed codes.

    The first `sinks` tokens of a row and the newest `window` ones are read as they came, all others from their codes,
    by every token of the chunk at hand, its own included. With `window=0` that does not depend on how a prompt is cut
    into chunks, and agrees with `jaxquant.cache`; a window is counted from the newest token of a chunk. No gradient
    flows through a cache.

    Args:
        config: of the model.
        keys: quantizer of the keys, a `quantizers.Scalar` or `Exact`, or one for each layer.
        values: likewise for the values.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        exact_layers: layers that are not compressed; negative numbers count from the end.
        padding: slots of padding at the left of each row, or the tokenizer's attention_mask, so that the first tokens
            after it are the sinks; without sinks it changes nothing. Where `generate` repeats rows, so does the cache.

    Raises:
        ValueError: a size is out of range, or the number of quantizers is not that of the layers.
        TypeError: there is no torch arithmetic for a quantizer.
        NotImplementedError: the model needs a kind of layer that cannot be compressed.

    Example:
        >>> import jax
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from jaxquant.methods import turboquant
        >>> sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=32, bits_k=4, bits_v=2)
        >>> cache = CompressedCache(model.config, keys, values)
        >>> with torch.no_grad():
        ...     out = model(torch.arange(8)[None], past_key_values=cache)
        >>> cache.get_seq_length(), cache.layers[0].nbytes  # 2 heads, 8 tokens, 16 + 8 bytes of codes and two scales
        (8, 448)
    """

    def __init__(
        self,
        config: Any,
        keys: Quantizer | Sequence[Quantizer],
        values: Quantizer | Sequence[Quantizer],
        *,
        sinks: int = 0,
        window: int = 0,
        exact_layers: Sequence[int] = (),
        padding: Sequence[int] | torch.Tensor | None = None,
    ):
        for name, size in {"sinks": sinks, "window": window}.items():
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")
        layers: list[Any] = DynamicCache(config=config).layers
        outside = [layer for layer in exact_layers if not -len(layers) <= layer < len(layers)]
        if outside:
            raise ValueError(f"exact_layers must be from {-len(layers)} to {len(layers) - 1}, got {outside}")
        exact = {layer % len(layers) for layer in exact_layers}
        halves = [_each_layer(name, half, len(layers)) for name, half in {"keys": keys, "values": values}.items()]
        offsets = None if padding is None else _offsets(padding)
        for i, layer in enumerate(layers):
            if i in exact or not isinstance(layer, DynamicLayer):
                continue
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise NotImplementedError(
                    f"layer {i} needs a {type(layer).__name__}, which cannot be compressed; exact_layers can name it"
                )
            layers[i] = CompressedLayer(
                *(half[i] for half in halves),
                sinks=sinks,
                window=window,
                sliding_window=getattr(layer, "sliding_window", None),
                padding=offsets,
            )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, everything included: codes, exact tokens, exact layers, and the quantizers' tables."""
        storages = (tensor.untyped_storage() for tensor in self._tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())

    def activate_past_recording(self) -> None:
        """Hold what slides out of sight until the next `crop`, as assisted generation over sliding windows needs."""
        for layer in self.layers:
            activate = getattr(layer, "activate_past_recording", None)
            if activate is not None:
                activate()

    def _tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                for half in layer.halves:
                    yield from half.tensors
                    yield from half.coder.tables.values()  # pyright: ignore[reportAttributeAccessIssue]
            else:
                states = [list(x.values()) if isinstance(x, dict) else [x] for x in vars(layer).values()]
                yield from (x for state in states for x in state if isinstance(x, torch.Tensor))


class CompressedLayer(CacheLayerMixin):
    """One attention layer of a `CompressedCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        keys: _torch_codes.Torch,
        values: _torch_codes.Torch,
        *,
        sinks: int,
        window: int,
        sliding_window: int | None,
        padding: list[int] | None,
    ):
        super().__init__()
        self.coders = keys, values
        self.sinks, self.window, self.sliding_window = sinks, window, sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._given_padding = padding
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds, the quantizers' tables not included."""
        return sum(tensor.untyped_storage().nbytes() for half in self.halves for tensor in half.tensors)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, dtypes and device from the first tokens."""
        rows = key_states.shape[0]
        given = [0] if self._given_padding is None else self._given_padding
        if rows % len(given):
            raise ValueError(f"padding has {len(given)} rows, and the model's batch {rows}, which is not a multiple")
        self.padding = [offset for offset in given for _ in range(rows // len(given))]
        for name, x, coder in zip(("keys", "values"), (key_states, value_states), self.coders, strict=True):
            if x.shape[-1] != coder.dim:
                raise ValueError(f"{name} of the model have dim {x.shape[-1]}, and their quantizer {coder.dim}")
        self.halves = tuple(
            Half(coder.to(x.device), sinks=self.sinks, window=self.window, like=x)
            for coder, x in zip(self.coders, (key_states, value_states), strict=True)
        )
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, [batch, kv_heads, new, dim], and give all keys and values that they may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, x, half in zip(("key_states", "value_states"), (key_states, value_states), self.halves, strict=True):
            held = half.recent
            fits = x.ndim == 4 and (x.shape[0], x.shape[1], x.shape[3]) == (*held.shape[:2], held.shape[3])
            if not fits or x.dtype != held.dtype or x.device != held.device:
                raise ValueError(
                    f"{name} must be [{held.shape[0]}, {held.shape[1]}, new, {held.shape[3]}] in {held.dtype} on "
                    f"{held.device}, like those before, got {list(x.shape)} in {x.dtype} on {x.device}"
                )
        length, new = self.get_seq_length(), key_states.shape[2]
        self._trim()
        for x, half in zip((key_states, value_states), self.halves, strict=True):
            half.append(x, self.padding)
        keys, values = (half.read(self.padding) for half in self.halves)
        if self.sliding_window is not None:
            seen = min(length, self.sliding_window - 1) + new
            keys, values = keys[:, :, keys.shape[2] - seen :], values[:, :, values.shape[2] - seen :]
            self._trim()
        return keys, values

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Give the number of keys that `update` will return for so many new tokens, and the slot of the first."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]  # a tensor before 5.2
        length = self.get_seq_length()
        seen = length if self.sliding_window is None else min(length, self.sliding_window - 1)
        return seen + new, length - seen

    def get_seq_length(self) -> int:
        """Count slots, padding and slots that slid out of sight included."""
        return self.halves[0].end if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Give the sliding window, or -1: without one there is no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # what it was called before 5.8

    def activate_past_recording(self) -> None:
        """Hold what slides out of sight until the next `crop`, which may bring it back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: as a negative number; or, as transformers 5.0 calls it, the positive number to keep.

        Raises:
            RuntimeError: tokens are needed that slid out of sight and were not recorded.
        """
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        end = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        end = max(end, 0)
        if self.sliding_window is not None:
            start = self.halves[0].start
            if 0 < end < length and start > max(end - self.sliding_window + 1, 0):
                raise RuntimeError(
                    f"crop to {end} of {length} slots needs what slid out of the window of {self.sliding_window}: call "
                    "activate_past_recording before the tokens that may be taken back"
                )
        for half in self.halves:
            half.crop(end)
        self._trim(always=True)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows in a new order, with repetition or omission."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the rows."""
        if not self.is_initialized:
            return
        if any(self.padding):
            self.padding = [self.padding[row] for row in torch.arange(len(self.padding))[indices.cpu()].tolist()]
        else:
            self.padding = [0] * (int(indices.sum()) if indices.dtype == torch.bool else len(indices))
        for half in self.halves:
            half.select(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        self.halves: tuple[Half, ...] = ()
        self.padding: list[int] = []
        self.is_initialized = False

    def _trim(self, *, always: bool = False) -> None:
        """Let go of what has slid out of sight."""
        if self.sliding_window is not None and (always or not self.record_past):
            for half in self.halves:
                half.drop(half.end - self.sliding_window + 1)


def _each_layer(name: str, quantizer: Quantizer | Sequence[Quantizer], layers: int) -> list[_torch_codes.Torch]:
    """Give the coder of each layer, one for layers that share a quantizer."""
    if not isinstance(quantizer, Sequence):
        return [_torch_codes.coder(quantizer)] * layers
    if len(quantizer) != layers:
        raise ValueError(f"{name} must hold one quantizer for each of {layers} layers, got {len(quantizer)}")
    made = {id(each): _torch_codes.coder(each) for each in quantizer}
    return [made[id(each)] for each in quantizer]


def _offsets(padding: Sequence[int] | torch.Tensor) -> list[int]:
    """Give the slots of padding of each row."""
    if isinstance(padding, torch.Tensor) and padding.ndim == 2:
        mask = padding.bool()
        offsets = (~mask).long().cumprod(1).sum(1)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= offsets[:, None]):
            raise ValueError("padding must be at the left of every row of the attention_mask")
        return offsets.tolist()
    offsets = [int(offset) for offset in padding]
    if not offsets or min(offsets) < 0:
        raise ValueError(f"padding must be a number of slots for each row, none negative, got {offsets}")
    return offsets
