"""Generate with mlx-lm over a cache of 4-bit keys and 2-bit values.

python examples/interop_mlx.py [MODEL]       # needs jaxquant[mlx]; without a folder, the small model in the package
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache as make_exact_cache

from jaxquant import models
from jaxquant.interop.mlx import make_prompt_cache
from jaxquant.methods import turboquant


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=models.load().folder)
    parser.add_argument("--new", type=int, default=24)
    options = parser.parse_args()
    loaded: Any = mlx_lm.load(str(options.model))
    model, tokenizer = loaded[:2]
    dim = model.args.head_dim or model.args.hidden_size // model.args.num_attention_heads

    keys, values = turboquant.kv(jax.random.key(0), dim=dim, bits_k=4, bits_v=2)
    caches = {"16 bits": make_exact_cache(model), "K4/V2": make_prompt_cache(model, keys, values)}
    for name, cache in caches.items():
        text = mlx_lm.generate(
            model, tokenizer, "import os\nimport sys\n\ndef main(", max_tokens=options.new, prompt_cache=cache
        )
        print(f"--- {name}, {sum(layer.nbytes for layer in cache):,} bytes\n{text}\n")


if __name__ == "__main__":
    main()
