"""A `transformers` model that continues caches which came from JAX, on a cache held in 16 bits.

Needs the extra `torch`.
"""

import copy
from pathlib import Path

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache

from jaxquant.cache import KVCache
from jaxquant.interop import dynamic_cache
from jaxquant.models.loading import SMALL

_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


class TorchModel:
    """One row through a model in float32, whose keys and values are rounded to bfloat16 after every step."""

    def __init__(self, folder: str | Path | None) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            SMALL if folder is None else folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def prefill(self, ids: np.ndarray) -> tuple[int, DynamicCache]:
        """Read a prompt and choose the next token."""
        logits, cache = self._run(DynamicCache(), ids.astype(np.int64)[None])
        return int(logits.argmax()), cache

    def step(self, cache: DynamicCache, token: int) -> tuple[np.ndarray, DynamicCache]:
        """Read one token; the cache that is given stays as it is."""
        return self._run(copy.deepcopy(cache), np.full((1, 1), token, np.int64))

    def take(self, cache: KVCache) -> DynamicCache:
        """Copy a cache that came."""
        return dynamic_cache.to_transformers(cache, dtype=torch.float32)[0]

    def give(self, cache: DynamicCache, capacity: int) -> KVCache:
        """Copy a cache that goes."""
        return dynamic_cache.from_transformers(cache, capacity=capacity, dtype=torch.bfloat16)

    def _run(self, cache: DynamicCache, ids: np.ndarray) -> tuple[np.ndarray, DynamicCache]:
        with torch.no_grad():
            logits = self._model(torch.from_numpy(ids), **{_ARGUMENT: cache}).logits[0, -1].numpy()
        for layer in cache.layers:
            for name in ("keys", "values"):
                part = getattr(layer, name)
                part[..., -ids.shape[1] :, :] = part[..., -ids.shape[1] :, :].bfloat16().float()
        return logits, cache
