"""Generate from a packed cache and from an exact one, side by side, and look at where the two part.

    python examples/generate.py [--model DIR] [--bits-k 4] [--bits-v 2]

Prompts of different length are padded, prefilled in chunks, and continued token by token in one compiled loop.
"""

from pathlib import Path
from typing import Annotated

import jax
import typer

from jaxquant import models, quantizers
from jaxquant.methods import turboquant

PROMPTS = ["import numpy as np\n\n\ndef mean(", "class Node:\n    def __init__(self"]


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder")] = None,
    bits_k: int = 4,
    bits_v: int = 2,
    new: Annotated[int, typer.Option(help="tokens")] = 32,
) -> None:
    """Continue the prompts twice."""
    loaded = models.load(model)
    dim = loaded.architecture.dim
    exact = quantizers.Exact(dim=dim)
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = {}
    packed = turboquant.kv(jax.random.key(0), dim=dim, bits_k=bits_k, bits_v=bits_v)
    for name, pair, sinks, window in (("exact", (exact, exact), 0, 0), ("packed", packed, 4, 16)):
        cache = loaded.decoder.init_cache(*pair, batch=len(prompts), capacity=256, sinks=sinks, window=window)
        result = models.generate(None, loaded.decoder, cache, prompts, max_tokens=new)
        found[name] = result.tokens
        print(f"--- {name}: {cache.nbytes:,} bytes")
        for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
            print(prompt + loaded.tokenizer.decode(tokens))
    for row, (one, other) in enumerate(zip(*found.values(), strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        print(f"row {row}: the first {same} of {len(one)} new tokens are the same")


if __name__ == "__main__":
    typer.run(main)
