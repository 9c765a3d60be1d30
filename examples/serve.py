"""Serve requests with continuous batching, from the same bytes of memory in 16 bits and packed.

    python examples/serve.py [--requests 12] [--kilobytes 640]

Twelve questions that begin with the same 128 tokens arrive at once. Both servers may use the same bytes for pages: the
one whose pages hold codes has five times as many, so that nobody has to give pages back and start again, and the
common beginning is computed once. What that is worth in tokens a second depends on the machine: on a CPU attention
over codes is slower than over 16 bits (docs/kernels.md has the GPU).
"""

import argparse
import time
from typing import Any

import jax

from jaxquant import models, quantizers, serving, token_files
from jaxquant.methods import turboquant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--kilobytes", type=int, default=640, help="of pages, all layers together")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer")
    options = parser.parse_args()

    model = models.load()
    a, page = model.architecture, 64
    ids = token_files.read(model, None).astype(int).tolist()
    common = ids[:128]
    prompts = [common + ids[200 + 70 * i : 200 + 70 * i + 20 + 4 * i] for i in range(options.requests)]
    exact = quantizers.Exact(dim=a.dim)
    ways: dict[str, Any] = {
        "bfloat16": (exact, exact),
        "K4/V2": turboquant.kv(jax.random.key(0), dim=a.dim, bits_k=4, bits_v=2, fused=False),
    }
    print(
        f"{'cache':<10}{'pages':>7}{'bytes':>10}{'evicted':>9}{'shared':>8}{'prefilled':>11}{'steps':>7}{'tokens/s':>10}"
    )
    for name, (keys, values) in ways.items():
        vector = sum(
            leaf.size * leaf.dtype.itemsize for half in (keys, values) for leaf in jax.tree.leaves(_code(half))
        )
        pages = options.kilobytes * 1024 // (vector * a.layers * a.kv_heads * page)
        server = serving.Batcher(
            model.decoder, keys, values, rows=options.rows, pages=pages, row_pages=5, page=page, end_ids=model.end_ids
        )
        server.submit(common[:70], max_tokens=2)  # compiles
        server.run()
        server.counts = serving.Counts()
        for prompt in prompts:
            server.submit(prompt, max_tokens=options.new)
        began = time.perf_counter()
        answers = server.run()
        seconds = time.perf_counter() - began
        assert all(len(answer) <= options.new for answer in answers.values())
        assert server.free_pages == pages
        counts, tokens = server.counts, sum(map(len, answers.values()))
        print(
            f"{name:<10}{pages:>7}{server.cache.nbytes:>10,}{counts.evicted:>9}{counts.shared:>8}"
            f"{counts.prefilled:>11}{counts.steps:>7}{tokens / seconds:>10.1f}",
            flush=True,
        )


def _code(quantizer: Any) -> Any:
    return jax.eval_shape(quantizer.quantize, jax.ShapeDtypeStruct((quantizer.dim,), "float32"))


if __name__ == "__main__":
    main()
