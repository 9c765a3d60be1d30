"""Every method at 2, 3 and 4 bits on one model, as a table: perplexity, KL, top-1, pass keys, bytes, cost.

python tests/bench/bench_methods.py --model DIR --tokens FILE:NAME --out rows.json [--json]

Methods are found in jaxquant/methods and in the modules of --also. Rows that --out already has are not measured again,
so an interrupted run goes on where it stopped. Text, pass keys and calibration come from different parts of --tokens,
in this order from its start.

"KL at these bytes" divides a row's KL by that of TurboQuant at as many bytes per token, between whose rows log KL is
linear in bytes: below 1 is better than TurboQuant, and methods whose side information differs in size can be compared.
Pipelines keep their newest tokens exact, and are divided by TurboQuant in a pipeline that does so too.
Encode and decode are floating-point operations a coordinate that the quantizers take, as XLA counts them. Prefill and
step are processor times of attention through a cache of one layer, with all that a pipeline does: of 512 tokens at once
and of one more behind them, as multiples of TurboQuant's at the same bits, medians over calls in turns.
"""

import argparse
import importlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant import attention, catalogue, compression, evaluate, models, needles, pipeline, token_files, trial
from jaxquant import cache as caches
from jaxquant.calibrate import fisher as gradients
from jaxquant.calibrate import statistics
from jaxquant.methods import fisher, turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Cache
from jaxquant.quantizers import Exact

ANCHOR = "turboquant"
FRESH = f"{ANCHOR}, newest 32 exact"
ANCHORED = (1, 5, 8)  # bits of TurboQuant beside those asked for, since others are compared with it
SERVED = ("fp8", "uniform")  # measured at 8 bits too
CHUNK = 256  # tokens of a prefill step
HELD = 512  # tokens in the cache that is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, default=2, help="rows of text, and as many with pass keys")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--keys", type=int, default=8, help="pass keys of a row")
    parser.add_argument("--calibration-rows", type=int, default=4)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--also", nargs="+", default=[], help="modules outside of jaxquant.methods")
    parser.add_argument("--out", type=Path, help="file of rows, read first and written after each row")
    parser.add_argument("--table", action="store_true", help="print what --out has, and measure nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = models.load(options.model)
    name = (
        f"{'built-in model' if options.model is None else options.model.name}, {options.rows} x {options.seq_len:,} "
        "tokens of text and as many with pass keys"
    )
    held = None if options.table else Text(model, options)
    done = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    work = {f"{row[0]}, {row[2]} bits, {name}": row for row in settings(options, held)}
    for i, (label, (method, builder, bits)) in enumerate(work.items()):
        if label not in done and held is not None:
            start = time.perf_counter()
            try:
                done[label] = {"method": method, "bits": bits, **held.measure(builder, bits)}
            except ValueError as error:
                done[label] = {"method": method, "bits": bits, "refused": str(error)}
            done[label]["seconds"] = round(time.perf_counter() - start, 1)
            if options.out:
                options.out.write_text(json.dumps(done, indent=1))
        if label in done:
            print(f"[{i + 1}/{len(work)}] {label}: {brief(done[label])}", file=sys.stderr, flush=True)
    rows = []
    for label, (_, builder, bits) in work.items():
        row = done.get(label, {})
        if "kl" in row:
            counted = catalogue.cost(builder, dim=model.architecture.dim, bits=bits)
            row |= {"encode_operations": counted.encode, "decode_operations": counted.decode}
            row["peer"] = FRESH if inspect.signature(builder).return_annotation is Pipeline else ANCHOR
        rows.append(row)
    compare(rows)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows, name))


def settings(options: argparse.Namespace, held: "Text | None") -> list[tuple[str, Callable[..., Any], int]]:
    """List names, builders and bits; TurboQuant's first, with the bits that only it is measured at."""
    found = dict(catalogue.entries())
    for name in options.also:
        found[name] = catalogue.read(name, importlib.import_module(name))
    chosen = {
        f"{name}, {variant}" if variant else name: builder
        for name, entry in found.items()
        if options.methods is None or name in {ANCHOR, *options.methods}
        for variant, builder in entry.builders.items()
    }
    if "fisher" in chosen:  # the usual one has no calibration to score tokens by
        chosen["fisher, gradients"] = partial(fisher.pipeline, scorer=held and held.information())
    anchor = chosen.pop(ANCHOR)
    anchored = sorted({*ANCHORED, *options.bits})
    work = [(name, builder, bits) for name, builder in ((ANCHOR, anchor), (FRESH, newest)) for bits in anchored]
    for bits in options.bits:
        work += [(name, builder, bits) for name, builder in sorted(chosen.items())]
    if 8 not in options.bits:
        work += [(name, builder, 8) for name, builder in sorted(chosen.items()) if name.partition(",")[0] in SERVED]
    return work


def newest(key: Array, *, dim: int, bits_k: int, bits_v: int) -> Pipeline:
    """Build TurboQuant as a pipeline, which keeps the tokens of an unfinished block."""
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
    return Pipeline(keys=keys, values=values, block=32)


class Text:
    """Rows of text and of pass keys, and what of a model has to be measured once."""

    def __init__(self, model: models.Model, options: argparse.Namespace) -> None:
        self.model, self.rows, length = model, options.rows, options.seq_len
        ids = token_files.read(model, options.tokens)
        plain = evaluate.rows(ids, start=0, count=options.rows, length=length)
        words = model.tokenizer.decode(ids[plain.size : plain.size + 3 * plain.size].tolist())
        asking = needles.hide(
            np.random.default_rng(0), words, model.tokenizer, count=options.rows, length=length + 1, keys=options.keys
        )
        self.tokens = np.concatenate([plain, asking])
        self.answers = needles.answers(asking, model.tokenizer)
        self.calibration = evaluate.rows(ids, start=4 * plain.size, count=options.calibration_rows, length=length - 1)
        self.measured = statistics.collect(model.decoder, self.calibration, samples=1024)
        exact = Exact(dim=model.architecture.dim, dtype="float32")
        capacity = self.tokens.shape[1] - 1
        self.usual = self.predict(
            model.decoder.init_cache(exact, exact, batch=len(self.tokens), capacity=capacity, dtype="float32")
        )

    def predict(self, cache: Cache) -> list[Array]:
        """Give log-probabilities of the tokens that follow, for as many tokens at a time as attention reads at once.

        Only attention is compiled for a method, and once for all layers.
        """
        fed = jnp.asarray(self.tokens[:, :-1], jnp.int32)
        found = []
        for start in range(0, fed.shape[1], CHUNK):
            logits, after = self.model.decoder(fed[:, start : start + CHUNK], cache)
            assert after is not None
            cache = after
            found.append(jax.nn.log_softmax(logits))
        if int(jnp.min(cache.length)) != fed.shape[1]:
            raise RuntimeError(f"the cache took {int(jnp.min(cache.length))} of {fed.shape[1]} tokens")
        return found

    def information(self) -> fisher.Information:
        """Measure what `fisher` scores tokens by."""
        found = gradients.collect(jax.random.key(0), self.model.decoder, self.calibration)
        return fisher.information(found.keys, found.values)

    def measure(self, builder: Callable[..., Any], bits: int) -> dict[str, Any]:
        """Measure one row of the table."""
        model, capacity = self.model, self.tokens.shape[1] - 1
        built = compression.build(model, builder, jax.random.key(0), bits_k=bits, bits_v=bits, measured=self.measured)
        cache = trial.Trial(model=model, compression=built, sinks=0, window=0, setting="").cache(
            len(self.tokens), capacity
        )
        held = cache.bytes_per_token
        following = np.split(self.tokens[:, 1:], range(CHUNK, capacity, CHUNK), axis=1)
        parts = [
            compared(usual, found, jnp.asarray(tokens, jnp.int32))
            for usual, found, tokens in zip(self.usual, self.predict(cache), following, strict=True)
        ]
        found = Compared(*(np.concatenate(some, axis=1) for some in zip(*parts, strict=True)))
        if held >= 4 * model.architecture.dim or found.moved.max() < 1e-4:
            raise RuntimeError(f"{held} bytes a token, no log-probability moved by 0.0001: compression was not active")
        text, asked = slice(self.rows), slice(self.rows, None)
        prefill, step = times(built, model, bits)
        return {
            "bytes_per_token": held,
            "baseline_perplexity": float(np.exp(found.usual_loss[text].mean(dtype=np.float64))),
            "perplexity": float(np.exp(found.loss[text].mean(dtype=np.float64))),
            "kl": float(found.kl[text].mean(dtype=np.float64)),
            "top1": float(found.agrees[text].mean()),
            "baseline_pass_keys": float(found.usual_hit[asked][self.answers].mean()),
            "pass_keys": float(found.hit[asked][self.answers].mean()),
            "answers": int(self.answers.sum()),
            "prefill_time": prefill,
            "step_time": step,
        }


class Compared(NamedTuple):
    """Of each position: losses of the next token in nats, whether it is the likeliest, and how far predictions are."""

    usual_loss: Any
    loss: Any
    usual_hit: Any
    hit: Any
    agrees: Any
    kl: Any
    moved: Any


@jax.jit
def compared(usual: Array, found: Array, following: Array) -> Compared:
    best = [jnp.argmax(x, axis=-1) for x in (usual, found)]
    losses = [-jnp.take_along_axis(x, following[..., None], axis=-1)[..., 0] for x in (usual, found)]
    kl = jnp.sum(jnp.exp(usual) * (usual - found), axis=-1)
    moved = jnp.max(jnp.abs(usual - found), axis=-1)
    return Compared(*losses, best[0] == following, best[1] == following, best[0] == best[1], kl, moved)


def times(built: compression.Compression, model: models.Model, bits: int) -> tuple[float, float]:
    """Time attention through one layer, of tokens at once and of one behind them, over TurboQuant's in turn."""
    usual = turboquant.kv(jax.random.key(0), dim=model.architecture.dim, bits_k=bits, bits_v=bits)
    ratios = []
    for pair in zip(attends(built, model), attends(usual, model), strict=True):
        seconds = np.empty((9, 2))
        for call in pair:
            call()
        for turn, row in enumerate(seconds):
            for i in (0, 1) if turn % 2 else (1, 0):
                start = time.process_time()
                pair[i]()
                row[i] = time.process_time() - start
        ratios.append(float(np.median(seconds[:, 0] / seconds[:, 1])))
    return ratios[0], ratios[1]


def attends(built: compression.Compression, model: models.Model) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Give what runs the first tokens through a cache, and what runs the next one, four times."""
    a = model.architecture
    shape: dict[str, int] = {"layers": 1, "batch": 1, "kv_heads": a.kv_heads, "capacity": HELD + 1}
    if isinstance(built, Pipeline):
        empty: Cache = pipeline.init(built, **shape)
    else:
        keys, values = (half[0] if isinstance(half, tuple) else half for half in built)
        empty = caches.init(keys, values, **shape)
    x = [
        jax.random.normal(jax.random.key(i), (1, HELD + 1, heads, a.dim))
        for i, heads in enumerate((a.heads, a.kv_heads, a.kv_heads))
    ]
    held = passed(empty, *(some[:, :HELD] for some in x))[1]
    return (
        lambda: jax.block_until_ready(passed(empty, *(some[:, :HELD] for some in x))),
        lambda: [jax.block_until_ready(passed(held, *(some[:, HELD:] for some in x))[0]) for _ in range(4)],
    )


@jax.jit
def passed(cache: Cache, q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
    return attention.attend(q, k, v, cache, 0)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's KL as a multiple of TurboQuant's at the same bytes."""
    for row in rows:
        if "kl" not in row:
            continue
        peers = [peer for peer in rows if peer.get("method") == row["peer"]]
        if len(peers) < 2:  # not measured yet
            row["kl_ratio"] = math.nan
            continue
        anchors = sorted((peer["bytes_per_token"], math.log(peer["kl"])) for peer in peers)
        sizes, logs = np.array(anchors).T
        place = int(np.clip(np.searchsorted(sizes, row["bytes_per_token"]) - 1, 0, len(sizes) - 2))
        slope = (logs[place + 1] - logs[place]) / (sizes[place + 1] - sizes[place])
        usual = logs[place] + slope * (row["bytes_per_token"] - sizes[place])
        row["kl_ratio"] = row["kl"] / math.exp(usual)


def brief(row: dict[str, Any]) -> str:
    if "refused" in row:
        return row["refused"]
    return f"{row['bytes_per_token']:.1f} bytes, perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}"


def table(rows: list[dict[str, Any]], name: str) -> str:
    measured = [row for row in rows if "kl" in row]
    first = measured[0]
    lines = [
        f"{name}: perplexity {first['baseline_perplexity']:.3f} and {first['baseline_pass_keys']:.1%} of "
        f"{first['answers']} pass-key tokens without compression.",
        "",
        "| bits | method | bytes per token | perplexity | KL, nats | KL at these bytes | same top token | pass keys | "
        "encode | decode | prefill | step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(measured, key=lambda row: (row["bits"], row["kl_ratio"])):
        lines.append(
            f"| {row['bits']} | {row['method']} | {row['bytes_per_token']:.1f} | {row['perplexity']:.3f} | "
            f"{row['kl']:.4f} | {row['kl_ratio']:.2f} | {row['top1']:.1%} | {row['pass_keys']:.1%} | "
            f"{row['encode_operations']:.0f} | {row['decode_operations']:.0f} | "
            f"{row['prefill_time']:.1f} | {row['step_time']:.1f} |"
        )
    refused = sorted({row["method"] for row in rows if "refused" in row})
    if refused:
        lines += ["", f"Not at these bits: {', '.join(refused)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
