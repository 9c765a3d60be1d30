"""Nearest neighbours by inner product over packed codes: the other use of a quantizer that keeps inner products.

python examples/nearest_neighbours.py [--base 10000] [--queries 200] [--json]

Base vectors are coded once, a query is rotated once, and scores come from codes, a block at a time. Beside it: exact
search, and product quantization from faiss (`pip install faiss-cpu`; left out where it is missing) with as many bytes
for codes. Recall 1@k is how often the true nearest neighbour is among the k best. Indexing includes training, which
TurboQuant does not have; compiling is not counted. Times are of the processor, all threads together.

References:
    A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant: Online vector quantization with near-optimal distortion
    rate", arXiv:2504.19874, s. 4.4; H. Jegou, M. Douze, C. Schmid, "Product quantization for nearest neighbor search",
    IEEE TPAMI 33 (2011).
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxquant import models, quantizers, token_files
from jaxquant.methods import turboquant
from jaxquant.protocols import Quantizer

BLOCK = 1024  # vectors that exist in float32 at a time
BEST = 10


class Index(NamedTuple):
    """Codes of the base, in blocks, and how many vectors there are."""

    quantizer: Quantizer
    codes: PyTree[Any]
    size: Int[Array, ""]


@jax.jit
def index(quantizer: Quantizer, base: Float[Array, "size dim"]) -> Index:
    """Code the base."""
    blocks = jnp.pad(base, ((0, -base.shape[0] % BLOCK), (0, 0))).reshape(-1, BLOCK, base.shape[1])
    return Index(quantizer, lax.map(quantizer.quantize, blocks), jnp.int32(base.shape[0]))


@functools.partial(jax.jit, static_argnames="best")
def search(
    found: Index, queries: Float[Array, "queries dim"], best: int = BEST
) -> tuple[Float[Array, "queries best"], Int[Array, "queries best"]]:
    """Give the largest inner products with decoded vectors, and whose they are."""
    projected = found.quantizer.project(queries)
    blocks = jax.tree.leaves(found.codes)[0].shape[0]

    def step(carry: tuple[Array, Array], block: tuple[Array, PyTree[Any]]) -> tuple[tuple[Array, Array], None]:
        number, codes = block
        place = number * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        scores = jnp.where(place < found.size, projected @ found.quantizer.expand(codes).T, -jnp.inf)
        scores = jnp.concatenate([carry[0], scores], axis=1)
        place = jnp.concatenate([carry[1], jnp.broadcast_to(place, (len(queries), BLOCK))], axis=1)
        scores, which = lax.top_k(scores, best)
        return (scores, jnp.take_along_axis(place, which, axis=1)), None

    start = jnp.full((len(queries), best), -jnp.inf), jnp.full((len(queries), best), -1, jnp.int32)
    (scores, place), _ = lax.scan(step, start, (jnp.arange(blocks, dtype=jnp.int32), found.codes))
    return scores, place


def clustered(generator: np.random.Generator, size: int, dim: int) -> Float[np.ndarray, "size dim"]:
    """Draw unit vectors around a hundred centres."""
    centres = generator.normal(size=(100, dim))
    x = centres[generator.integers(0, 100, size)] + generator.normal(size=(size, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def hidden_states(size: int) -> Float[np.ndarray, "size hidden"]:
    """Take unit vectors from the last layer of the small model over its held-out text."""
    model = models.load()
    length = 256
    ids = token_files.read(model, None)
    rows = min(-(-size // length), len(ids) // length)
    tokens = jnp.asarray(ids[: rows * length].reshape(rows, length), jnp.int32)
    states = jnp.concatenate([model.decoder.hidden(some)[0] for some in jnp.array_split(tokens, -(-rows // 8))])
    x = np.asarray(states, np.float32).reshape(-1, states.shape[-1])[:size]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def compare(name: str, x: Float[np.ndarray, "size dim"], queries: int, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure recall, bytes and seconds of exact search, TurboQuant and product quantization."""
    base, asked = x[queries:], x[:queries]
    dim = x.shape[1]

    def exact(base: Array) -> Callable[[Array], Array]:
        return lambda asked: lax.top_k(asked @ base.T, BEST)[1]

    truth = np.asarray(exact(jnp.asarray(base))(jnp.asarray(asked)))[:, 0]
    rows = []

    def row(method: str, bytes_: float, indexing: float, run: Callable[[], Any]) -> None:
        jax.block_until_ready(run())
        start = time.process_time()
        found = np.asarray(jax.block_until_ready(run()))
        seconds = time.process_time() - start
        recall = {f"recall_1@{k}": float(np.mean(np.any(found[:, :k] == truth[:, None], axis=1))) for k in (1, BEST)}
        rows.append({
            "data": name, "dim": dim, "base": len(base), "queries": len(asked), "method": method,
            "bytes_per_vector": bytes_, **recall, "index_seconds": indexing, "search_seconds": seconds,
        })  # fmt: skip
        print(line(rows[-1]), file=sys.stderr, flush=True)

    scan = jax.jit(lambda asked, base: lax.top_k(asked @ base.T, BEST)[1])
    held = jnp.asarray(base), jnp.asarray(asked)
    row("exact, float32", 4.0 * dim, 0.0, lambda: scan(held[1], held[0]))
    for bits in widths:
        quantizer = turboquant.mse(jax.random.key(0), dim=dim, bits=bits, scale="unbiased")
        jax.block_until_ready(index(quantizer, held[0]))
        start = time.process_time()
        codes = jax.block_until_ready(index(quantizer, held[0]))
        indexing = time.process_time() - start
        one = quantizers.quantize(quantizer, held[0][:1]).nbytes
        row(f"TurboQuant, {bits} bits", one, indexing, lambda codes=codes: search(codes, held[1])[1])
        if importlib.util.find_spec("faiss") is None:
            print("faiss is not installed: no product quantization", file=sys.stderr)
        elif dim % (pieces := dim * bits // 8) == 0:
            import faiss  # pyright: ignore[reportMissingImports]

            start = time.process_time()
            product = faiss.IndexPQ(dim, pieces, 8, faiss.METRIC_INNER_PRODUCT)
            product.train(base)
            product.add(base)
            indexing = time.process_time() - start
            row(
                f"faiss PQ, {pieces} x 8 bits", pieces, indexing, lambda product=product: product.search(asked, BEST)[1]
            )
    return rows


def line(row: dict[str, Any]) -> str:
    """Write a row of the table."""
    return (
        f"| {row['data']} | {row['method']} | {row['bytes_per_vector']:.0f} | {row['recall_1@1']:.1%} | "
        f"{row['recall_1@10']:.1%} | {row['index_seconds']:.2f} | {row['search_seconds']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--dims", type=int, nargs="*", default=[200, 768, 1536])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = {
        f"clustered, {dim}": clustered(np.random.default_rng(dim), options.base + options.queries, dim)
        for dim in options.dims
    }
    data["hidden states"] = hidden_states(options.base + options.queries)
    rows = []
    for name, x in data.items():
        print(f"{name}: {len(x)} vectors", file=sys.stderr, flush=True)
        rows += compare(name, x, options.queries, tuple(options.bits))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| data | method | bytes per vector | recall 1@1 | recall 1@10 | indexing, s | search, s |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(line(r))


if __name__ == "__main__":
    main()
