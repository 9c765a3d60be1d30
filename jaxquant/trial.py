"""A model and one setting of its cache, to generate with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxquant import compression, models, packed_weights, pipeline, prepared, quantizers
from jaxquant.calibrate import files
from jaxquant.models.loading import SMALL
from jaxquant.pipeline import Pipeline
from jaxquant.prepared import Prepared
from jaxquant.protocols import Cache, Quantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A loaded model, and how its cache is to be compressed.

    Attributes:
        model: to run.
        compression: a pipeline, or the quantizers of keys and of values, one or one for each layer.
        sinks: first tokens of a row that stay exact.
        window: newest tokens of a row that stay exact.
        setting: all of it in words.
        prepared: makes the caches instead, where the folder says how.
    """

    model: models.Model
    compression: compression.Compression
    sinks: int
    window: int
    setting: str
    prepared: Prepared | None = None

    @staticmethod
    def ready(folder: Path) -> "Trial":
        """Load a model from a folder that says how its cache is compressed.

        Raises:
            ValueError: what it says is damaged, or for another model.
        """
        found = prepared.read(folder)
        model = load_model(folder)
        a, template = model.architecture, found.template
        if (a.layers, a.kv_heads, a.dim) != (template.layers, template.kv_heads, template.dim):
            raise ValueError(f"{folder / prepared.FILE} is for other layers or heads than config.json describes")
        setting = _setting(model, "as the folder says", found.sinks, found.window)
        return Trial(
            model=model, compression=((), ()), sinks=found.sinks, window=found.window, setting=setting, prepared=found
        )

    @staticmethod
    def load(
        folder: Path | None,
        method: Callable[..., Any] | Quantizer | Pipeline,
        *,
        bits_k: int,
        bits_v: int,
        sinks: int,
        window: int,
        seed: int,
    ) -> "Trial":
        """Load a model and build its quantizers, or its pipeline.

        Args:
            folder: Hugging Face folder; None for the small model in the package.
            method: builds the quantizers or the pipeline, as `build` says; or a pipeline, or one quantizer for both
                keys and values, whose bits are its own.
            bits_k: bits per coordinate of keys.
            bits_v: bits per coordinate of values.
            sinks: first tokens of a row that stay exact.
            window: newest tokens of a row that stay exact.
            seed: of the quantizers' key.
        """
        model = load_model(folder)
        if isinstance(method, Pipeline | Quantizer):
            built = method if isinstance(method, Pipeline) else (method, method)
            words = type(method).__name__
        else:
            built = compression.build(model, method, jax.random.key(seed), bits_k=bits_k, bits_v=bits_v)
            words = f"{method.__module__.rpartition('.')[2]} K{bits_k}/V{bits_v}"
        setting = _setting(model, words, sinks, window)
        return Trial(model=model, compression=built, sinks=sinks, window=window, setting=setting)

    @staticmethod
    def calibrated(folder: Path | None, path: Path, *, sinks: int, window: int) -> "Trial":
        """Load a model and a calibration of it.

        Args:
            folder: Hugging Face folder; None for the small model in the package.
            path: of the calibration.
            sinks: first tokens of a row that stay exact.
            window: newest tokens of a row that stay exact.

        Raises:
            ValueError: the calibration is damaged, or for another model.
        """
        found, model = files.read(path), load_model(folder)
        found.check(model)
        setting = _setting(model, f"calibrated to {found.bits:.3f} bits, gains included", sinks, window)
        pair = found.keys, found.values
        return Trial(model=model, compression=pair, sinks=sinks, window=window, setting=setting)

    def cache(self, rows: int, capacity: int) -> Cache:
        """Make an empty compressed cache."""
        if self.prepared is not None:
            return self.prepared.cache(batch=rows, capacity=capacity)
        if isinstance(self.compression, Pipeline):
            a = self.model.architecture
            return pipeline.init(
                self.compression, layers=a.layers, batch=rows, kv_heads=a.kv_heads, capacity=capacity,
                sinks=self.sinks, window=self.window,
            )  # fmt: skip
        return self.model.decoder.init_cache(
            *self.compression, batch=rows, capacity=capacity, sinks=self.sinks, window=self.window
        )

    def baseline(self, rows: int, capacity: int, dtype: str = "bfloat16") -> Cache:
        """Make an empty cache that does not compress."""
        exact = quantizers.Exact(dim=self.model.architecture.dim, dtype=dtype)  # pyright: ignore[reportArgumentType]
        return self.model.decoder.init_cache(exact, exact, batch=rows, capacity=capacity, dtype=dtype)

    def generate(
        self,
        prompt: str,
        *,
        compressed: bool,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        write: Callable[[str], object] | None = None,
    ) -> dict[str, Any]:
        """Continue a prompt.

        Args:
            prompt: text to continue.
            compressed: whether to compress the cache.
            max_tokens: new tokens at most.
            temperature: 0 takes the most probable token.
            top_p: keeps the most probable tokens up to this probability.
            seed: of the sampling.
            write: called with each new piece of text.

        Returns:
            `text`, `tokens` (new ones), `cache_bytes`, `bytes_per_token`, `prefill_tokens_per_second`,
            `decode_tokens_per_second`.

        Raises:
            ValueError: the prompt is empty, or too long for the model.
        """
        ids = self.model.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt is empty: give at least one character to continue")
        total = len(ids) + max_tokens
        if total > self.model.architecture.max_positions:
            raise ValueError(
                f"prompt of {len(ids)} tokens and --max-tokens {max_tokens} exceed the model's "
                f"{self.model.architecture.max_positions} positions"
            )
        capacity = -(-total // 64) * 64
        cache = self.cache(1, capacity) if compressed else self.baseline(1, capacity)
        take = None if write is None else self.model.tokenizer.stream(write)
        result = models.generate(
            jax.random.key(seed), self.model.decoder, cache, [ids],
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, end_ids=self.model.end_ids,
            chunk=min(256, -(-len(ids) // 16) * 16), on_token=None if take is None else lambda _, token: take(token),
        )  # fmt: skip
        report = {
            "text": self.model.tokenizer.decode(result.tokens[0]),
            "tokens": len(result.tokens[0]),
            "cache_bytes": result.cache.nbytes,
            "bytes_per_token": result.cache.bytes_per_token,
            "prefill_tokens_per_second": len(ids) / result.prefill_seconds,
        }
        if result.decode_tokens:
            report["decode_tokens_per_second"] = result.tokens_per_second
        return report


def load_model(folder: Path | None) -> models.Model:
    """Load a model, from its weights in codes where the folder has them.

    Args:
        folder: Hugging Face folder, or one that `jaxquant convert` wrote; None for the small model in the package.

    Raises:
        ValueError: what the folder holds is damaged, or not supported.
    """
    if folder is not None and packed_weights.recognizes(folder):
        return packed_weights.load(folder)
    return models.load(folder)


def _setting(model: models.Model, method: str, sinks: int, window: int) -> str:
    a = model.architecture
    name = "the small model in the package" if model.folder == SMALL else model.folder.name
    return (
        f"{name}, {a.layers} layers, {a.kv_heads} kv heads of {a.dim}; {method}, {sinks} sinks, window {window}; "
        f"{jax.devices()[0].device_kind}"
    )
