"""A model and one setting of its cache: generate with it, and report what it saves and costs.

These are the reports behind `jaxquant run`, `compare` and `eval`, as plain dictionaries.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant import (
    compression,
    evaluate,
    models,
    needles,
    packed_weights,
    pipeline,
    prepared,
    quantizers,
    token_files,
)
from jaxquant.calibrate import files
from jaxquant.models.loading import SMALL
from jaxquant.pipeline import Pipeline
from jaxquant.prepared import Prepared
from jaxquant.protocols import Cache, Quantizer

Progress = Callable[[str, int, int], object]


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
        model = packed_weights.load(folder) if packed_weights.recognizes(folder) else models.load(folder)
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
        model = models.load(folder)
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
        found, model = files.read(path), models.load(folder)
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

    def compare(
        self, prompt: str, *, max_tokens: int, text: Path | None, rows: int, seq_len: int, progress: Progress
    ) -> dict[str, Any]:
        """Continue a prompt with and without compression, and score held-out text over both caches.

        The baseline holds 16 bits a number. Pass keys are hidden in the same text and asked for.

        Args:
            prompt: text to continue.
            max_tokens: new tokens at most.
            text: file to score; None for the held-out text in the package.
            rows: rows of it to score.
            seq_len: tokens of a row.
            progress: called with a description, what is done and what there is to do.
        """
        generated = {}
        for i, name in enumerate(("baseline", "compressed")):
            progress("generating", i, 2)
            generated[name] = self.generate(prompt, compressed=bool(i), max_tokens=max_tokens)
        progress("generating", 2, 2)
        words = token_files.text(text)
        ids = np.array(self.model.tokenizer.encode(words, special=False))
        scored = self._score(
            evaluate.rows(ids, start=0, count=rows, length=seq_len), "bfloat16", 256, 8, "scoring text", progress
        )
        hidden = needles.hide(
            np.random.default_rng(0),
            words,
            self.model.tokenizer,
            count=rows,
            length=seq_len + 1,
            keys=min(100, max(1, seq_len // 128)),
        )
        found = self._retrieve(hidden, "bfloat16", 256, 8, progress)
        return _report(self.setting, scored, found, generated)

    def measure(
        self,
        tokens: str | None,
        *,
        start: int,
        rows: int,
        seq_len: int,
        needle_file: str | None,
        needle_rows: int,
        chunk: int,
        batch: int,
        progress: Progress,
    ) -> dict[str, Any]:
        """Score rows of tokens, and rows with pass keys, over a cache of the model's own dtype and the compressed one.

        Args:
            tokens: `FILE[:NAME]` of token ids or text; None for the held-out text in the package.
            start: first token.
            rows: rows to score.
            seq_len: tokens that a row predicts.
            needle_file: `FILE:NAME` of rows with questions, or None.
            needle_rows: rows of it.
            chunk: tokens of a prefill step.
            batch: rows at a time.
            progress: called with a description, what is done and what there is to do.
        """
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        ids = token_files.read(self.model, tokens)
        if ids.ndim != 1:
            raise ValueError(f"--tokens must name one long row of token ids, got an array of shape {list(ids.shape)}")
        chosen = evaluate.rows(ids, start=start, count=rows, length=seq_len)
        scored = self._score(chosen, dtype, chunk, batch, "scoring text", progress)
        found = None
        if needle_file is not None:
            hidden = token_files.read(self.model, needle_file)
            if hidden.ndim != 2:
                raise ValueError(f"--needles must name rows of token ids, got an array of shape {list(hidden.shape)}")
            found = self._retrieve(hidden[:needle_rows].astype(np.int64), dtype, chunk, batch, progress)
        return _report(self.setting, scored, found, {"baseline": {}, "compressed": {}})

    def _score(
        self, tokens: np.ndarray, dtype: str, chunk: int, batch: int, description: str, progress: Progress
    ) -> tuple[evaluate.Scores, float, float]:
        if tokens.max() >= self.model.architecture.vocabulary:
            raise ValueError(
                f"token id {tokens.max()} is outside the model's vocabulary of {self.model.architecture.vocabulary}"
            )
        capacity = tokens.shape[1] - 1
        scores = evaluate.compare(
            self.model.decoder,
            tokens,
            lambda rows: self.baseline(rows, capacity, dtype),
            lambda rows: self.cache(rows, capacity),
            batch=batch,
            chunk=chunk,
            progress=lambda done, total: progress(description, done, total),
        )
        held = self.baseline(1, capacity, dtype).bytes_per_token, self.cache(1, capacity).bytes_per_token
        return scores, *held

    def _retrieve(
        self, rows: np.ndarray, dtype: str, chunk: int, batch: int, progress: Progress
    ) -> tuple[float, float]:
        marked = needles.answers(rows, self.model.tokenizer)
        scores, *_ = self._score(rows, dtype, chunk, batch, "asking for pass keys", progress)
        return scores.retrieval(marked)


def _setting(model: models.Model, method: str, sinks: int, window: int) -> str:
    a = model.architecture
    name = "the small model in the package" if model.folder == SMALL else model.folder.name
    return (
        f"{name}, {a.layers} layers, {a.kv_heads} kv heads of {a.dim}; {method}, {sinks} sinks, window {window}; "
        f"{jax.devices()[0].device_kind}"
    )


def _report(
    setting: str,
    scored: tuple[evaluate.Scores, float, float],
    found: tuple[float, float] | None,
    generated: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    scores, *held = scored
    perplexities = scores.baseline_perplexity, scores.compressed_perplexity
    report: dict[str, Any] = {"setting": setting, "scored_tokens": scores.kl.size}
    for i, name in enumerate(("baseline", "compressed")):
        report[name] = {**generated[name], "perplexity": perplexities[i], "bytes_per_token": held[i]}
        if found is not None:
            report[name]["needle_accuracy"] = found[i]
    report["compressed"] |= {"kl": float(scores.kl.mean()), "top1": float(scores.agreement.mean())}
    return report
