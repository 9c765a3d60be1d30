"""Size of a snapshot of the small model's cache, packed and uncompressed, and that it decodes to the same bits.

    python tests/bench/bench_snapshot.py --tokens 2048

The cache holds the first tokens of the shipped held-out text. "held" counts codes, scales and exact tokens without the
unused capacity; "file" is everything, the quantizers and the index included.
"""

import argparse
import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant import models, snapshot
from jaxquant.methods import turboquant
from jaxquant.models import loading
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import Exact


def caches(dim: int) -> dict[str, tuple[Quantizer, Quantizer, int, int]]:
    """Return quantizers of keys and values, sinks and window of every kind of cache by name."""
    found: dict[str, tuple[Quantizer, Quantizer, int, int]] = {
        "bfloat16": (Exact(dim=dim), Exact(dim=dim), 0, 0),
    }
    for bits in (4, 3, 2):
        keys, values = turboquant.kv(jax.random.key(0), dim=dim, bits_k=bits, bits_v=bits)
        found[f"{bits} bits, 4 sinks, window 64"] = keys, values, 4, 64
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = models.load()
    text = (loading.SMALL / "held_out.txt").read_text()
    ids = jnp.asarray(model.tokenizer.encode(text)[: arguments.tokens])[None]
    graph, state = nnx.split(model.decoder)
    step = jax.jit(lambda tokens, cache: nnx.merge(graph, state)(tokens, cache))
    rows = []
    for name, (keys, values, sinks, window) in caches(model.architecture.dim).items():
        held = model.decoder.init_cache(
            keys, values, batch=1, capacity=arguments.tokens + 1, sinks=sinks, window=window, dtype=jnp.bfloat16
        )
        _, held = step(ids, held)
        assert held is not None
        for profile in ("fast", "balanced", "small"):
            file = io.BytesIO()
            start = time.perf_counter()
            snapshot.save(file, held, profile=profile)
            middle = time.perf_counter()
            again = snapshot.load(file.getvalue())
            end = time.perf_counter()
            expected, found = (step(ids[:, -1:], cache)[0] for cache in (held, again))
            assert np.asarray(expected).tobytes() == np.asarray(found).tobytes(), "the logits differ"
            row = {"cache": name, "profile": profile, "held_bytes": held.nbytes, "file_bytes": file.tell()}
            row |= {"ratio": file.tell() / held.nbytes, "save_s": middle - start, "load_s": end - middle}
            rows.append(row)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'cache':30} {'profile':9} {'held':>10} {'file':>10} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['cache']:30} {row['profile']:9} {row['held_bytes']:10,} {row['file_bytes']:10,} {row['ratio']:7.3f}"
        )


if __name__ == "__main__":
    main()
