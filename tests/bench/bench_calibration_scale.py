"""What calibrating a model of 8B shapes takes: seconds of a row of text, layer by layer, and memory.

python tests/bench/bench_calibration_scale.py [--layers 2 4] [--tokens 4096] [--json]

A random decoder of few layers is measured twice, with `--layers` layers; both sums are linear in the layers, so the two
give what a layer costs and what all layers share (embedding, predictions), and from them what `--whole` layers would.
Codebooks are fitted on the host: one layer is timed.
"""

import argparse
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.calibrate import bases, fisher, fit, statistics
from jaxquant.models.architecture import from_config
from jaxquant.models.decoder import Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--whole", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=6, help="of text, for the extrapolation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    found = [measured(layers, options) for layers in options.layers]
    few, many = options.layers
    report = {"device": jax.devices()[0].device_kind, "layers": options.layers, "measured": found}
    whole = {}
    for name, (first, second) in {name: [one[name] for one in found] for name in found[0]}.items():
        whole[name] = first + (second - first) / (many - few) * (options.whole - few)
    held = jax.devices()[0].memory_stats()
    report["peak GB"] = {  # of the process, whatever the layers: not to be extrapolated
        "device": held["peak_bytes_in_use"] / 1e9 if held else None,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    report["whole"] = whole | {
        "layers": options.whole,
        "seconds": options.rows * (whole["statistics, s a row"] + whole["information, s a row"])
        + whole["codebooks, s on the host"],
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['device']}, rows of {options.tokens} tokens\n\n| | {few} layers | {many} layers | {options.whole} |"
    )
    print("|---|---|---|---|")
    for name in found[0]:
        print(f"| {name} | {found[0][name]:.3g} | {found[1][name]:.3g} | {whole[name]:.3g} |")
    print(f"\n{options.rows} rows: {report['whole']['seconds']:.0f} s and compilation")
    peaks = ", ".join(f"{size:.1f} GB of the {place}" for place, size in report["peak GB"].items() if size)
    print(f"peak, with up to {many} layers: {peaks}")


def measured(layers: int, o: argparse.Namespace) -> dict[str, float]:
    """Measure one row."""
    config = {
        "model_type": "llama", "vocab_size": o.vocabulary, "hidden_size": o.hidden, "head_dim": o.dim,
        "intermediate_size": o.intermediate, "num_attention_heads": o.heads, "num_key_value_heads": o.kv_heads,
        "num_hidden_layers": layers, "max_position_embeddings": o.tokens,
    }  # fmt: skip
    architecture = from_config(config)

    def create(key: jax.Array) -> Decoder:
        return Decoder(architecture, dtype=jnp.bfloat16, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(create, jax.random.key(0)))
    narrow = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(create(key))))
    decoder = nnx.merge(graph, narrow(jax.random.key(0)))  # no weight is ever held in float32
    tokens = np.random.default_rng(0).integers(0, o.vocabulary, (1, o.tokens))
    seconds = []
    sums: list[statistics.Statistics | fisher.Fisher] = []
    for run in (
        lambda: statistics.collect(decoder, tokens, batch=1, samples=1024),
        lambda: fisher.collect(jax.random.key(0), decoder, tokens, temperature=3.0),
    ):
        run()  # compiles
        began = time.perf_counter()
        sums.append(run())
        seconds.append(time.perf_counter() - began)
    found, information = sums
    assert isinstance(found, statistics.Statistics)
    assert isinstance(information, fisher.Fisher)
    began = time.perf_counter()
    for half in ("key", "value"):
        metric = bases.shrunk(getattr(information, half + "s")[:1], 0.1)
        basis = bases.karhunen_loeve(bases.shrunk(getattr(found, half + "_covariance")[:1], 0.01), metric)
        fit.fit(basis, getattr(found, half + "s")[:1] / o.tokens, getattr(found, half + "_samples")[:1])
    codebooks = layers * (time.perf_counter() - began)
    return {
        "statistics, s a row": seconds[0],
        "information, s a row": seconds[1],
        "codebooks, s on the host": codebooks,
        "weights, GB": sum(x.nbytes for x in jax.tree.leaves(nnx.state(decoder))) / 1e9,
    }


if __name__ == "__main__":
    main()
