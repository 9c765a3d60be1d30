"""Perplexity against bytes of W_V and W_O: quantized in the basis of the values, in their own, and cut to a lower rank.

    python tests/bench/bench_weights.py --model DIR --calibration FILE --tokens FILE:NAME

Every row of a block holds the same bytes: scales and widths are counted, and the cut keeps as many directions in 16
bits as fit. `all` codes the other linear layers too. Perplexity is that of the model without a cache, in float32.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant import evaluate, models, token_files
from jaxquant.calibrate import absorb, files, weights
from jaxquant.models.loading import Model


@jax.jit(static_argnames="graph")
def nll(graph: nnx.GraphDef, state: nnx.State, row: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of a row's tokens after the first."""
    logits = jax.nn.log_softmax(nnx.merge(graph, state)(row[None, :-1])[0][0])
    return -jnp.mean(jnp.take_along_axis(logits, row[1:, None], axis=1))


def perplexity(model: Model, rows: np.ndarray) -> float:
    """Exponential of the mean over all rows."""
    graph, state = nnx.split(model.decoder)
    return float(np.exp(np.mean([nll(graph, state, jnp.asarray(row, jnp.int32)) for row in rows])))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = models.load(arguments.model, dtype="float32")
    turned, _ = absorb.absorb(model, files.read(arguments.calibration))
    rows = evaluate.rows(
        token_files.read(model, arguments.tokens), start=0, count=arguments.rows, length=arguments.seq_len
    )
    found = []

    def note(name: str, bits: float, nbytes: int, made: Model) -> None:
        found.append({"weights": name, "bits": bits, "bytes": nbytes, "perplexity": perplexity(made, rows)})
        if not arguments.json:
            print(f"{name:32} {bits:5.2f} {nbytes:12,} {found[-1]['perplexity']:9.3f}", flush=True)

    _, packed = weights.compress(model, 1)
    dense = weights.dense_nbytes(model, packed)
    note("16 bits", 16, dense, model)
    note("16 bits, basis absorbed", 16, dense, turned)
    for bits in arguments.bits:
        made, packed = weights.compress(turned, bits)
        nbytes = sum(one.nbytes for one in packed.values())
        note("values' basis, quantized", bits, nbytes, made)
        own, packed = weights.compress(model, bits)
        note("own basis, quantized", bits, sum(one.nbytes for one in packed.values()), own)
        kept = round(model.architecture.dim * nbytes / dense)
        cut = weights.cut(turned, 16 * nbytes / dense)
        note("values' basis, cut", bits, kept * dense // model.architecture.dim, cut)
    for bits in (8.0, 4.0, 3.0):
        made, packed = weights.compress(turned, bits, everything=True)
        if bits == 8.0:
            note("all, 16 bits", 16, weights.dense_nbytes(model, packed), model)
        note("all, quantized", bits, sum(one.nbytes for one in packed.values()), made)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
