"""How far does torch follow the JAX path over the same codes, and how far can any implementation?

    python tests/bench/bench_torch_agreement.py --model DIR --tokens FILE:NAME [--prompts 8] [--json FILE]

A quantizer is not continuous: a number next to a threshold gets another code after any rounding, which moves later
layers by more than rounding, and so on. So beside torch against JAX stands JAX against itself with its embedding moved
by one part in ten million, half a unit in the last place of float32: whoever differs no more than that computes the
same thing. For every cache and prompt the table has the leading new tokens that agree in greedy generation; the most
probable tokens that agree where both read one continuation; and the largest difference of a logit there.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

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

MOVED = 1e-7
CACHES = {"exact": (0, 0), "K4/V2": (0, 0), "K4/V2, 4 sinks, window 128": (4, 128)}


class Jax:
    """The JAX path: greedy tokens, and logits along given ones."""

    def __init__(self, model: models.Model, pair: tuple[Any, Any], capacity: int):
        exact = quantizers.Exact(dim=model.architecture.dim, dtype="float32")
        self.model, self.capacity = model, capacity
        self.pairs = {name: (exact, exact) if name == "exact" else pair for name in CACHES}

    def cache(self, name: str) -> Any:
        sinks, window = CACHES[name]
        return self.model.decoder.init_cache(
            *self.pairs[name], batch=1, capacity=self.capacity, sinks=sinks, window=window, dtype="float32"
        )

    def generate(self, name: str, prompt: list[int], new: int) -> list[int]:
        return models.generate(None, self.model.decoder, self.cache(name), [prompt], max_tokens=new).tokens[0]

    def read(self, name: str, prompt: list[int], tokens: list[int]) -> np.ndarray:
        first, held = self.model.decoder(jnp.asarray([prompt], jnp.int32), self.cache(name))
        rest, _ = self.model.decoder(jnp.asarray([tokens], jnp.int32), held)
        return np.asarray(jnp.concatenate([first[0, -1:], rest[0, :-1]]))


class Torch:
    """The same with transformers."""

    def __init__(self, model: Any, pair: tuple[Any, Any]):
        self.model, self.pair = model, pair

    def cache(self, name: str) -> Cache:
        sinks, window = CACHES[name]
        if name == "exact":
            return DynamicCache(config=self.model.config)
        return CompressedCache(self.model.config, *self.pair, sinks=sinks, window=window)

    def generate(self, name: str, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=self.cache(name), max_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def read(self, name: str, prompt: list[int], tokens: list[int]) -> np.ndarray:
        cache = self.cache(name)
        first = self.model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1:]
        rest = self.model(torch.tensor([tokens]), past_key_values=cache).logits[0, :-1]
        return torch.cat([first, rest]).numpy()


def moved(model: models.Model) -> None:
    """Move every number of the embedding by about half a unit in its last place, up or down."""
    embedding = next(leaf for path, leaf in nnx.state(model.decoder).flat_state() if "embed" in str(path[0]))
    sign = jax.random.rademacher(jax.random.key(1), embedding[...].shape, jnp.float32)
    embedding[...] = embedding[...] * (1 + MOVED * sign)


def leading(one: list[int], other: list[int]) -> int:
    """Count leading tokens that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="FILE[:NAME] of token ids or text")
    parser.add_argument("--prompts", type=int, default=8, help="one after the other from the start of the tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    transformers.logging.disable_progress_bar()
    jax.config.update("jax_default_matmul_precision", "highest")
    ours, other = (models.load(options.model, dtype="float32") for _ in range(2))
    moved(other)
    # Levels that do not depend on the machine, so that both paths have the same on all of them.
    pair = turboquant.kv(jax.random.key(0), dim=ours.architecture.dim, bits_k=4, bits_v=2, fused=False)
    capacity = -(-(options.prompt + options.new) // 64) * 64
    of_torch = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    reference = Jax(ours, pair, capacity)
    peers = {"torch": Torch(of_torch, pair), f"JAX moved by {MOVED:g}": Jax(other, pair, capacity)}
    ids = token_files.read(ours, options.tokens).astype(int)
    prompts = [ids[i * options.prompt : (i + 1) * options.prompt].tolist() for i in range(options.prompts)]

    found = []
    for name in CACHES:
        for number, prompt in enumerate(prompts):
            tokens = reference.generate(name, prompt, options.new)
            logits = reference.read(name, prompt, tokens)
            for peer, way in peers.items():
                got = way.read(name, prompt, tokens)
                found.append({
                    "cache": name, "prompt": number, "peer": peer,
                    "leading": leading(tokens, way.generate(name, prompt, options.new)),
                    "same_top": int((got.argmax(-1) == logits.argmax(-1)).sum()),
                    "difference": float(np.median(np.abs(got - logits).max(-1))),
                })  # fmt: skip
                print(found[-1], flush=True)
    print(f"\n{len(prompts)} prompts of {options.prompt} tokens and {options.new} new ones, float32\n")
    print("| cache | beside JAX | whole continuations the same | leading tokens, median | same top token | logits |")
    print("|---|---|---|---|---|---|")
    for name in CACHES:
        for peer in peers:
            rows = [row for row in found if (row["cache"], row["peer"]) == (name, peer)]
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
