"""Generate with Hugging Face transformers over a cache of 4-bit keys and 2-bit values.

python examples/interop_torch.py [MODEL]     # needs jaxquant[torch]; without a folder, the small model in the package
"""

import argparse
import copy
from typing import Any

import jax
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from jaxquant import models
from jaxquant.interop.torch import CompressedCache
from jaxquant.methods import turboquant


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=models.load().folder)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new", type=int, default=24)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    greedy = {"max_new_tokens": options.new, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    keys, values = turboquant.kv(jax.random.key(0), dim=model.config.head_dim, bits_k=4, bits_v=2)
    prompt = tokenizer("import os\nimport sys\n\ndef main(", return_tensors="pt").to(options.device)
    cache, exact = CompressedCache(model.config, keys, values), DynamicCache(config=model.config)
    for name, held in {"16 bits": exact, "K4/V2": cache}.items():
        out = model.generate(**prompt, past_key_values=held, **greedy)
        print(f"--- {name}\n{tokenizer.decode(out[0])}\n")
    kept: list[Any] = list(exact.layers)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)
    print(f"bytes of {cache.get_seq_length()} tokens: {held:,} as they came, {cache.nbytes:,} packed, tables included")

    # A batch of prompts of different length: the sinks begin after the padding.
    batch = tokenizer(["class Node:\n    def", "def add(a, b):\n    return"], return_tensors="pt", padding=True)
    batch = batch.to(options.device)
    cache = CompressedCache(model.config, keys, values, sinks=4, window=16, padding=batch["attention_mask"])
    for row in model.generate(**batch, past_key_values=cache, **greedy):
        print("---", repr(tokenizer.decode(row, skip_special_tokens=True)))

    # One prefix, continued twice: prefill once, fork the cache.
    prefix = CompressedCache(model.config, keys, values)
    with torch.no_grad():
        model(prompt["input_ids"][:, :-1], past_key_values=prefix)
    for end in ("argv", "path"):
        text = prompt["input_ids"], tokenizer(end, return_tensors="pt", add_special_tokens=False).to(options.device)
        ids = torch.cat([text[0], text[1]["input_ids"]], dim=1)
        out = model.generate(ids, past_key_values=copy.deepcopy(prefix), **greedy)
        print("---", repr(tokenizer.decode(out[0, ids.shape[1] :])))


if __name__ == "__main__":
    main()
