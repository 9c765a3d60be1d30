"""Generate with transformers over packed codes, beside transformers' own caches and beside the JAX path.

    python tests/bench/bench_torch.py --model DIR --tokens FILE:NAME [--device cuda] [--dtype bfloat16] [--json FILE]

Every cache continues the same prompt greedily with `model.generate`. Tokens a second are those of the median decode
step over all repeats, which take turns; prefill is the median time to the first logits; bytes are those of every
distinct tensor storage that can be reached from the cache. `same` counts the leading tokens that agree with the JAX
path over K4/V2 codes, and with the uncompressed cache.

A quantizer is not continuous: a number next to a threshold gets another code after any rounding, which moves later
layers by more than rounding, and so on. So the JAX path's own continuation is also read by torch, and the distance of
the two logits is put beside that of torch from itself with its embedding moved by rounding, one part in a million in
float32.

No repeat is begun after `--seconds`. What fails, such as a backend that is not installed, is named and left out.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from jaxquant import models, token_files
from jaxquant.interop.torch import CompressedCache
from jaxquant.methods import turboquant

sys.path.insert(0, str(Path(__file__).parent.parent))
from interop_storage import reachable

QUANTIZED = {"quanto": {"axis_key": 0, "axis_value": 0}, "hqq": {"axis_key": 1, "axis_value": 1}}


class Clock(transformers.LogitsProcessor):
    """Notes when the logits of every step are there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if scores.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def generated(model: Any, ids: torch.Tensor, cache: Cache, count: int) -> tuple[list[int], float, list[float]]:
    """Give the new tokens, the seconds to the first logits, and those of every later step."""
    clock = Clock()
    began = time.perf_counter()
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
        logits_processor=[clock],
    )  # fmt: skip
    steps = [late - early for early, late in zip(clock.times, clock.times[1:], strict=False)]
    return out[0, ids.shape[1] :].tolist(), clock.times[0] - began, steps


def jax_path(
    folder: Path, ids: list[int], count: int, quantizers: tuple[Any, Any], dtype: str
) -> tuple[list[int], np.ndarray]:
    """Continue with the JAX decoder over its own cache; give the tokens and the logits that chose them."""
    model = models.load(folder, dtype=jnp.dtype(dtype))
    keys, values = quantizers

    def cache() -> Any:
        return model.decoder.init_cache(keys, values, batch=1, capacity=-(-(len(ids) + count) // 64) * 64, dtype=dtype)

    tokens = models.generate(None, model.decoder, cache(), [ids], max_tokens=count).tokens[0]
    read, held = model.decoder(jnp.asarray([ids], jnp.int32), cache())
    more, _ = model.decoder(jnp.asarray([tokens], jnp.int32), held)
    return tokens, np.asarray(jnp.concatenate([read[0, -1:], more[0, :-1]])).astype(np.float32)


@torch.no_grad()
def forced(model: Any, ids: torch.Tensor, tokens: list[int], cache: Cache) -> np.ndarray:
    """Give the logits from which each of the tokens would be chosen."""
    first = model(ids, past_key_values=cache).logits[0, -1:]
    rest = model(torch.tensor([tokens], device=ids.device), past_key_values=cache).logits[0, :-1]
    return torch.cat([first, rest]).float().cpu().numpy()


def distances(model: Any, ids: torch.Tensor, tokens: list[int], of_jax: np.ndarray, pair: tuple[Any, Any]) -> None:
    """Print how far torch is from JAX, and from itself."""
    ways = {
        "exact": lambda: DynamicCache(config=model.config),
        "packed": lambda: CompressedCache(model.config, *pair),
    }
    found = {name: forced(model, ids, tokens, make()) for name, make in ways.items()}
    weight = model.get_input_embeddings().weight
    before, amount = weight.detach().clone(), max(1e-6, torch.finfo(weight.dtype).eps)
    with torch.no_grad():
        weight.copy_(weight.float() * (1 + amount * torch.randn_like(weight, dtype=torch.float32)))
    moved = {name: forced(model, ids, tokens, make()) for name, make in ways.items()}
    with torch.no_grad():
        weight.copy_(before)
    same = int((found["packed"].argmax(-1) == of_jax.argmax(-1)).sum())
    print(f"\nreading the JAX path's continuation: {same}/{len(tokens)} most probable tokens are the same; median over")
    print("tokens of the largest difference of a logit:")
    for name, (one, other) in {
        "torch - JAX, K4/V2": (found["packed"], of_jax),
        f"torch - torch with an embedding moved by {amount:.0e}, K4/V2": (found["packed"], moved["packed"]),
        f"torch - torch with an embedding moved by {amount:.0e}, DynamicCache": (found["exact"], moved["exact"]),
        "K4/V2 - DynamicCache": (found["packed"], found["exact"]),
    }.items():
        print(f"  {name:<63}{np.median(np.abs(one - other).max(-1)):.2e}", flush=True)


def agreement(one: list[int], other: list[int]) -> int:
    """Count leading tokens that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def caches(config: Any, quantizers: tuple[Any, Any]) -> dict[str, Callable[[], Cache]]:
    """List what to measure; a backend of transformers that is not installed says so when it is made."""
    keys, values = quantizers
    ways: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=config),
        "CompressedCache K4/V2": lambda: CompressedCache(config, keys, values),
        "CompressedCache K4/V2, 4 sinks, window 128": lambda: CompressedCache(
            config, keys, values, sinks=4, window=128
        ),
    }
    for backend, axes in QUANTIZED.items():
        for bits in (4, 2):
            ways[f"QuantizedCache {backend} {bits} bits"] = lambda backend=backend, bits=bits, axes=axes: (
                QuantizedCache(backend=backend, config=config, nbits=bits, **axes)
            )
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="FILE[:NAME] of token ids or text; the prompt is its start")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-jax", action="store_true", help="leave the JAX path out")
    parser.add_argument("--seconds", type=float, default=60, help="begin no repeat after so many, but for the first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    transformers.logging.disable_progress_bar()
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch multiplies, on a GPU too
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    row = token_files.read(models.load(options.model), options.tokens)[: options.prompt].astype(int).tolist()
    ids = torch.tensor([row], device=options.device)
    config = model.config
    # Levels that do not depend on the machine, so that both paths have the same on all of them.
    pair = turboquant.kv(jax.random.key(0), dim=config.head_dim, bits_k=4, bits_v=2, fused=False)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.processor() or 'CPU'}"
    print(
        f"{options.model.name}, {options.dtype}, {len(row)} + {options.new} tokens, batch 1; {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}",
        flush=True,
    )
    began, reference = time.perf_counter(), []
    if not options.without_jax:
        try:
            reference, of_jax = jax_path(options.model, row, options.new, pair, options.dtype)
            distances(model, ids, reference, of_jax, pair)
        except Exception as error:  # the caches can be measured all the same
            print(f"JAX path: not measured: {type(error).__name__}: {str(error)[:200]}", flush=True)
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)

    found: dict[str, dict[str, Any]] = {}
    ways = caches(config, pair)
    for repeat in range(options.repeats + 1):  # the first warms up
        if repeat > 1 and time.perf_counter() - began > options.seconds:
            print(f"{repeat - 1} repeats: the time is over", flush=True)
            break
        for name, make in list(ways.items()):
            try:
                cache = make()
                tokens, prefill, steps = generated(model, ids, cache, options.new)
            except Exception as error:  # whatever another project's backend raises
                print(f"{name}: not measured: {type(error).__name__}: {str(error)[:200]}", flush=True)
                del ways[name]
                found.pop(name, None)
                continue
            entry = found.setdefault(name, {"tokens": tokens, "bytes": reachable(cache), "prefill": [], "steps": []})
            if repeat:
                entry["prefill"].append(prefill)
                entry["steps"] += steps
            del cache
            gc.collect()

    plain = found["DynamicCache"]
    print(
        f"\n{'cache':<46}{'tokens/s':>9}{'of exact':>9}{'prefill s':>10}{'bytes':>12}{'of exact':>9}  same: jax, exact"
    )
    for name in ways:
        entry = found[name]
        speed = 1 / statistics.median(entry["steps"])
        entry["tokens_per_second"] = speed
        entry["prefill"] = statistics.median(entry["prefill"])
        entry["same_as_jax"] = agreement(entry["tokens"], reference) if reference else None
        entry["same_as_exact"] = agreement(entry["tokens"], plain["tokens"])
        print(
            f"{name:<46}{speed:>9.1f}{speed / plain['tokens_per_second']:>9.2f}"
            f"{entry['prefill']:>10.3f}{entry['bytes']:>12,}{entry['bytes'] / plain['bytes']:>9.3f}  "
            f"{'-' if entry['same_as_jax'] is None else entry['same_as_jax']}/{options.new}, "
            f"{entry['same_as_exact']}/{options.new}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"jax": reference, "caches": found}, indent=1))


if __name__ == "__main__":
    main()
