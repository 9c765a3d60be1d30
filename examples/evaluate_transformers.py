"""Score a Hugging Face model over a compressed cache: lm-evaluation-harness, and pass keys hidden in long text.

    pip install "jaxquant[torch]" "lm-eval[hf]"
    python examples/evaluate_transformers.py --model DIR --tasks arc_easy,gsm8k --lengths 2048,8192,32768

Every forward pass reads its keys and values from codes, as in use, and the same runs once more without compression.
`--text FILE` adds the perplexity of a text through the harness, which needs nothing from the network.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers.cache_utils import Cache, DynamicCache

from jaxquant import models, needles
from jaxquant.interop.torch import CompressedCache
from jaxquant.methods import turboquant

simple_evaluate: Any = lm_eval.simple_evaluate
Harness: Any = HFLM  # its decorators hide its type


class CachedModel(Harness):
    """The harness's own class for transformers, with a cache in every pass."""

    make_cache: Callable[[], Cache]

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return self.model(inps, past_key_values=self.make_cache()).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, past_key_values=self.make_cache(), **kwargs)


class Words:
    """The two verbs of `needles.Tokenizer`, over a tokenizer of transformers."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Turn text into token ids."""
        return self.tokenizer.encode(text, add_special_tokens=special)

    def decode(self, ids: Any) -> str:
        """Turn token ids into text."""
        return self.tokenizer.decode(list(ids))


@torch.no_grad()
def pass_keys(model: Any, tokens: np.ndarray, words: Words, make_cache: Callable[[], Cache], chunk: int) -> float:
    """Give the share of the answers' tokens that are the most probable ones, reading rows in chunks."""
    right = []
    for row, marked in zip(tokens, needles.answers(tokens, words), strict=True):
        ids, cache, found = torch.tensor(row[None, :-1], device=model.device), make_cache(), []
        for first in range(0, ids.shape[1], chunk):
            logits = model(ids[:, first : first + chunk], past_key_values=cache).logits
            found.append(logits[0].argmax(-1).cpu().numpy())
        right += (np.concatenate(found) == row[1:])[marked].tolist()
    return float(np.mean(right))


def text_task(path: Path, folder: Path) -> dict[str, Any]:
    """Describe a text to the harness: pieces of 2,000 characters, one perplexity."""
    text = path.read_text(encoding="utf-8")
    pieces = [text[first : first + 2000] for first in range(0, min(len(text), 20_000), 2000)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": piece}) for piece in pieces), encoding="utf-8")
    return {
        "task": "text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    }


def evaluate(
    model: Any, tokenizer: Any, options: argparse.Namespace, make_cache: Callable[[], Cache]
) -> dict[str, Any]:
    """Run all that was asked for over one kind of cache."""
    words, report = Words(tokenizer), {}
    tasks: list[Any] = [task for task in options.tasks.split(",") if task]
    if options.text:
        tasks.append(text_task(options.text, options.scratch))
    if tasks:
        scored: Any = CachedModel(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
        scored.make_cache = make_cache
        found = simple_evaluate(scored, tasks=tasks, limit=options.limit, bootstrap_iters=0)
        for task, scores in found["results"].items():
            numbers = {name.removesuffix(",none"): x for name, x in scores.items() if isinstance(x, float)}
            report |= {f"{task} {name}": x for name, x in numbers.items()}
    hay = (options.hay or models.load().folder / "held_out.txt").read_text(encoding="utf-8")
    for length in (int(each) for each in options.lengths.split(",") if each):
        hidden = needles.hide(
            np.random.default_rng(0), hay, words, count=options.rows, length=length, keys=max(1, length // 128)
        )
        report[f"pass keys, {length} tokens"] = pass_keys(model, hidden, words, make_cache, options.chunk)
    return report


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table and return its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.load().folder, help="Hugging Face folder or name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits-k", type=int, default=4)
    parser.add_argument("--bits-v", type=int, default=2)
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--tasks", default="", help="names of lm-evaluation-harness, with commas")
    parser.add_argument("--limit", type=float, help="documents of every task")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=Path, help="file whose perplexity the harness shall measure")
    parser.add_argument("--lengths", default="", help="tokens of the rows that hide pass keys, with commas")
    parser.add_argument("--rows", type=int, default=4, help="rows of every length")
    parser.add_argument("--hay", type=Path, help="text to hide pass keys in")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prefill step")
    parser.add_argument("--scratch", type=Path, default=Path(), help="folder for what the harness reads")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device).eval()
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys, values = turboquant.kv(jax.random.key(0), dim=dim, bits_k=options.bits_k, bits_v=options.bits_v)
    ways: dict[str, Callable[[], Cache]] = {
        "exact": lambda: DynamicCache(config=config),
        "compressed": lambda: CompressedCache(config, keys, values, sinks=options.sinks, window=options.window),
    }
    with contextlib.redirect_stdout(sys.stderr):
        reports = {name: evaluate(model, tokenizer, options, make) for name, make in ways.items()}
    if options.json:
        print(json.dumps(reports))
    else:
        for name, exact in reports["exact"].items():
            print(f"{name:<40}{exact:>12.4f}{reports['compressed'][name]:>12.4f}")
    return reports


if __name__ == "__main__":
    main()
