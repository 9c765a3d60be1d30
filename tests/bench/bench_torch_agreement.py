"""How far does torch follow the JAX path over the same codes, and how far can any implementation?

    python tests/bench/bench_torch_agreement.py --model DIR --tokens FILE:NAME [--device cuda] [--json FILE]

A quantizer is not continuous: a number next to a threshold gets another code after any rounding, which moves later
layers by more than rounding, and so on. So beside torch against JAX stands JAX against itself with its channels in
another order, the same function whose sums are rounded differently: whoever differs no more than that computes the
same thing. For every cache and prompt the table has the leading new tokens that agree in greedy generation; the most
probable tokens that agree where both read one continuation; and the largest difference of a logit there.

All prompts are one batch, so that eight cost little more than one. No cache is begun after `--seconds`.
"""

import argparse
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from transformers.cache_utils import Cache, DynamicCache

from jaxquant import models, quantizers, token_files
from jaxquant.interop.torch import CompressedCache
from jaxquant.methods import turboquant

SAME = 1e-3  # of logits that differ by rounding alone
CACHES = {"exact": (0, 0), "K4/V2": (0, 0), "K4/V2, 4 sinks, window 128": (4, 128)}


@functools.partial(jax.jit, static_argnames=("graph", "last"))
def run(graph: Any, weights: Any, cache: Any, ids: jax.Array, last: int | None) -> tuple[jax.Array, Any]:
    """Read tokens; give the logits behind the last ones, all if None."""
    decoder = nnx.merge(graph, weights)
    hidden, cache = decoder.hidden(ids, cache)
    return decoder.logits(hidden if last is None else hidden[:, -last:]), cache


class Jax:
    """The JAX path: greedy tokens, and logits along given ones."""

    def __init__(self, model: models.Model, pair: tuple[Any, Any], capacity: int):
        exact = quantizers.Exact(dim=model.architecture.dim, dtype="float32")
        self.decoder, self.capacity = model.decoder, capacity
        self.pairs = {name: (exact, exact) if name == "exact" else pair for name in CACHES}

    def cache(self, name: str, rows: int) -> Any:
        sinks, window = CACHES[name]
        return self.decoder.init_cache(
            *self.pairs[name], batch=rows, capacity=self.capacity, sinks=sinks, window=window, dtype="float32"
        )

    def generate(self, name: str, prompts: np.ndarray, new: int) -> np.ndarray:
        held = self.cache(name, len(prompts))
        return np.array(models.generate(None, self.decoder, held, prompts.tolist(), max_tokens=new).tokens)

    def read(self, name: str, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        split, held = nnx.split(self.decoder), self.cache(name, len(prompts))
        first, held = run(*split, held, jnp.asarray(prompts, jnp.int32), 1)
        rest, _ = run(*split, held, jnp.asarray(tokens, jnp.int32), None)
        return np.asarray(jnp.concatenate([first, rest[:, :-1]], axis=1))


class Torch:
    """The same with transformers."""

    def __init__(self, model: Any, pair: tuple[Any, Any]):
        self.model, self.pair = model, pair

    def cache(self, name: str) -> Cache:
        sinks, window = CACHES[name]
        if name == "exact":
            return DynamicCache(config=self.model.config)
        return CompressedCache(self.model.config, *self.pair, sinks=sinks, window=window)

    def generate(self, name: str, prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts).to(self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=self.cache(name), max_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, prompts.shape[1] :].cpu().numpy()

    @torch.no_grad()
    def read(self, name: str, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        cache, device = self.cache(name), self.model.device
        first = self.model(torch.from_numpy(prompts).to(device), past_key_values=cache, logits_to_keep=1).logits
        rest = self.model(torch.from_numpy(tokens).to(device), past_key_values=cache).logits[:, :-1]
        return torch.cat([first, rest], dim=1).cpu().numpy()


def reorder(model: models.Model) -> None:
    """Put the channels between layers in another order: the same function, whose sums are rounded differently."""
    hidden = model.architecture.hidden
    order = np.random.default_rng(1).permutation(hidden)
    for path, leaf in nnx.state(model.decoder).flat_state():
        name = str(path[-2])
        if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"):
            if leaf[...].ndim == 2:  # biases are of what comes out
                leaf[...] = leaf[...][order]
        elif leaf[...].shape[-1] == hidden:
            leaf[...] = leaf[...][..., order]


def leading(one: np.ndarray, other: np.ndarray) -> int:
    """Count leading tokens that are the same."""
    return int((one == other).cumprod().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="FILE[:NAME] of token ids or text")
    parser.add_argument("--prompts", type=int, default=8, help="one after the other from the start of the tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of both frameworks")
    parser.add_argument("--seconds", type=float, default=120, help="begin no other cache after so many")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    began = time.perf_counter()
    transformers.logging.disable_progress_bar()
    jax.config.update("jax_default_matmul_precision", "highest")
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    ours, other = (models.load(options.model, dtype="float32") for _ in range(2))
    reorder(other)
    # Levels that do not depend on the machine, so that both paths have the same on all of them.
    pair = turboquant.kv(jax.random.key(0), dim=ours.architecture.dim, bits_k=4, bits_v=2, fused=False)
    capacity = -(-(options.prompt + options.new) // 64) * 64
    of_torch: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    of_torch = of_torch.to(options.device).eval()
    reference = Jax(ours, pair, capacity)
    peers = {"torch": Torch(of_torch, pair), "JAX in another order": Jax(other, pair, capacity)}
    ids = token_files.read(ours, options.tokens)[: options.prompts * options.prompt].astype(np.int64)
    prompts = ids.reshape(options.prompts, options.prompt)

    found = []
    for name in CACHES:
        if time.perf_counter() - began > options.seconds:
            print(f"{name}: not measured, the time is over", flush=True)
            continue
        tokens = reference.generate(name, prompts, options.new)
        logits = reference.read(name, prompts, tokens)
        for peer, way in peers.items():
            got, continued = way.read(name, prompts, tokens), way.generate(name, prompts, options.new)
            found += [
                {
                    "cache": name, "prompt": row, "peer": peer, "leading": leading(tokens[row], continued[row]),
                    "same_top": int((got[row].argmax(-1) == logits[row].argmax(-1)).sum()),
                    "difference": float(np.median(np.abs(got[row] - logits[row]).max(-1))),
                }
                for row in range(len(prompts))
            ]  # fmt: skip
            if name == "exact" and peer != "torch" and np.abs(got - logits).max() > SAME:
                raise SystemExit("another order of the channels is another function: this model has more of them")
            print(f"{name}, {peer}: {time.perf_counter() - began:.0f} s", flush=True)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"\n{len(prompts)} prompts of {options.prompt} tokens and {options.new} new ones, float32; {where}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}\n"
    )
    print("| cache | beside JAX | whole continuations the same | leading tokens, median | same top token | logits |")
    print("|---|---|---|---|---|---|")
    for name in CACHES:
        for peer in peers:
            rows = [row for row in found if (row["cache"], row["peer"]) == (name, peer)]
            if not rows:
                continue
            whole = sum(row["leading"] == options.new for row in rows)
            top = sum(row["same_top"] for row in rows) / (options.new * len(rows))
            print(
                f"| {name} | {peer} | {whole} of {len(rows)} | {statistics.median(row['leading'] for row in rows):g} | "
                f"{top:.1%} | {statistics.median(row['difference'] for row in rows):.1e} |"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
