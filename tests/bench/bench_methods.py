"""Every method at 2, 3 and 4 bits on one model, as a table: perplexity, KL, top-1, pass keys, bytes, cost.

python tests/bench/bench_methods.py --model DIR --tokens FILE:NAME --out FOLDER [--processes N] [--json]

Methods are found in jaxquant/methods and in the modules of --also. Rows that --out already has are not measured again,
so an interrupted run goes on where it stopped, and `--processes N` shares them out over N processes and the cores.
Text, pass keys and calibration come from different parts of --tokens, in this order from its start. Everything is
float32, products of matrices included.

"KL at these bytes" divides a row's KL by that of TurboQuant at as many bytes per token, between whose rows log KL is
linear in bytes: below 1 is better than TurboQuant, and methods whose side information differs in size can be compared.
Pipelines keep their newest tokens exact, and are divided by TurboQuant in a pipeline that does so too.
Encode and decode are floating-point operations a coordinate that the quantizers take, as XLA counts them. Prefill and
step are times of attention through a cache of one layer, with all that a pipeline does: of 512 tokens at once and of
one more behind them, as multiples of TurboQuant's at the same bits: medians of the ratios of calls in turns, in one
process. They are processor times where JAX runs on the CPU, which count what this process does alone, and wall times
elsewhere.
"""

import argparse
import functools
import importlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import workers
from jaxtyping import Array, PRNGKeyArray

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
    parser.add_argument("--sinks", type=int, default=0, help="first tokens of a row that stay exact")
    parser.add_argument("--window", type=int, default=0, help="newest tokens of a row that stay exact")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--also", nargs="+", default=[], help="modules outside of jaxquant.methods")
    parser.add_argument("--out", type=Path, help="folder of rows, read first; each is written when it is measured")
    parser.add_argument("--table", action="store_true", help="print what --out has, and measure nothing")
    parser.add_argument("--json", action="store_true")
    workers.add_options(parser)
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.processes > 1:
        if options.out is None:
            parser.error("--processes needs --out")
        workers.share(options)
        options.table = True

    name = (
        f"{'built-in model' if options.model is None else options.model.name}, {options.rows} x {options.seq_len:,} "
        "tokens of text and as many with pass keys"
        + (f", {options.sinks} sinks and a window of {options.window} exact" if options.sinks or options.window else "")
    )
    text, mine, rows = Text(options), workers.Work(options), []
    work = settings(options, text)
    for i, (method, builder, bits) in enumerate(work):
        label = f"{method}, {bits} bits, {name}"
        file = options.out and options.out / workers.file_name(label)
        row: dict[str, Any] | None = None
        if file and file.exists():
            row = json.loads(file.read_text())
        elif not options.table:
            row = mine.do(label, functools.partial(text.row, method, builder, bits))
            if row is not None:
                print(f"[{i + 1}/{len(work)}] {label}: {brief(row)}", file=sys.stderr, flush=True)
                if file:
                    workers.write(file, row)
        rows.append({"method": method, "bits": bits} if row is None else row)
    if options.claims is None:
        compare(rows)
        print(json.dumps(rows, indent=2) if options.json else table(rows, name))
    mine.end()


def settings(options: argparse.Namespace, text: "Text") -> list[tuple[str, Callable[..., Any], int]]:
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
        chosen["fisher, gradients"] = text.informed
    peers = [(ANCHOR, chosen.pop(ANCHOR))]
    if any(inspect.signature(builder).return_annotation is Pipeline for builder in chosen.values()):
        peers.append((FRESH, newest))
    work = [(name, builder, bits) for name, builder in peers for bits in sorted({*ANCHORED, *options.bits})]
    for bits in options.bits:
        work += [(name, builder, bits) for name, builder in sorted(chosen.items())]
    if 8 not in options.bits:
        work += [(name, builder, 8) for name, builder in sorted(chosen.items()) if name.partition(",")[0] in SERVED]
    return work


def newest(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> Pipeline:
    """Build TurboQuant as a pipeline, which keeps the tokens of an unfinished block."""
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
    return Pipeline(keys=keys, values=values, block=32)


class Text:
    """Rows of text and of pass keys, and what of a model has to be measured once, when it is first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, options.rows

    @functools.cached_property
    def model(self) -> models.Model:
        """The model, in float32."""
        return models.load(self.options.model, dtype="float32")

    @functools.cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of text and then of pass keys, where their answers are, and rows to calibrate on."""
        o, model = self.options, self.model
        ids = token_files.read(model, o.tokens)
        plain = evaluate.rows(ids, start=0, count=o.rows, length=o.seq_len)
        words = model.tokenizer.decode(ids[plain.size : plain.size + 3 * plain.size].tolist())
        asking = needles.hide(
            np.random.default_rng(0), words, model.tokenizer, count=o.rows, length=o.seq_len + 1, keys=o.keys
        )
        calibration = evaluate.rows(ids, start=4 * plain.size, count=o.calibration_rows, length=o.seq_len - 1)
        return np.concatenate([plain, asking]), needles.answers(asking, model.tokenizer), calibration

    @functools.cached_property
    def measured(self) -> statistics.Statistics:
        """Statistics of the model."""
        return statistics.collect(self.model.decoder, self.parts[2], samples=1024)

    @functools.cached_property
    def information(self) -> fisher.Information:
        """What `fisher` scores tokens by."""
        found = gradients.collect(jax.random.key(0), self.model.decoder, self.parts[2])
        return fisher.information(found.keys, found.values)

    def informed(self, key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> Pipeline:
        """Build `fisher` with the information of the model."""
        return fisher.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, scorer=self.information)

    @functools.cached_property
    def usual(self) -> list[Array]:
        """Log-probabilities without compression."""
        exact = Exact(dim=self.model.architecture.dim, dtype="float32")
        tokens = self.parts[0]
        return self.predict(
            self.model.decoder.init_cache(
                exact, exact, batch=len(tokens), capacity=tokens.shape[1] - 1, dtype="float32"
            )
        )

    def predict(self, cache: Cache) -> list[Array]:
        """Give log-probabilities of the tokens that follow, for as many tokens at a time as attention reads at once.

        Only attention is compiled for a method, and once for all layers.
        """
        fed = jnp.asarray(self.parts[0][:, :-1], jnp.int32)
        found = []
        for start in range(0, fed.shape[1], CHUNK):
            logits, after = self.model.decoder(fed[:, start : start + CHUNK], cache)
            assert after is not None
            cache = after
            found.append(jax.nn.log_softmax(logits))
        if int(jnp.min(cache.length)) != fed.shape[1]:
            raise RuntimeError(f"the cache took {int(jnp.min(cache.length))} of {fed.shape[1]} tokens")
        return found

    def row(self, method: str, builder: Callable[..., Any], bits: int) -> dict[str, Any]:
        """Measure one row of the table; a method that there is not at these bits says why."""
        start = time.perf_counter()
        row: dict[str, Any] = {"method": method, "bits": bits, "device": jax.devices()[0].device_kind}
        try:
            measured = self.measured if catalogue.wanted(builder) else None
            built = compression.build(
                self.model, builder, jax.random.key(0), bits_k=bits, bits_v=bits, measured=measured
            )
        except ValueError as error:
            return row | {"refused": str(error)}
        row |= self.measure(built)
        row["prefill_time"], row["step_time"] = times(built, self.model, bits)
        counted = catalogue.cost(builder, dim=self.model.architecture.dim, bits=bits)
        row |= {"encode_operations": counted.encode, "decode_operations": counted.decode}
        row["peer"] = FRESH if isinstance(built, Pipeline) else ANCHOR
        return row | {"seconds": round(time.perf_counter() - start, 1)}

    def measure(self, built: compression.Compression) -> dict[str, Any]:
        """Measure what a cache does to predictions, and its bytes."""
        model, (tokens, answers, _) = self.model, self.parts
        capacity = tokens.shape[1] - 1
        kept = {"sinks": self.options.sinks, "window": self.options.window}
        cache = trial.Trial(model=model, compression=built, **kept, setting="").cache(len(tokens), capacity)
        held = cache.bytes_per_token
        following = np.split(tokens[:, 1:], range(CHUNK, capacity, CHUNK), axis=1)
        parts = [
            compared(usual, found, jnp.asarray(next_ones, jnp.int32))
            for usual, found, next_ones in zip(self.usual, self.predict(cache), following, strict=True)
        ]
        found = Compared(*(np.concatenate(some, axis=1) for some in zip(*parts, strict=True)))
        if held >= 4 * model.architecture.dim or found.moved.max() < 1e-4:
            raise RuntimeError(f"{held} bytes a token, no log-probability moved by 0.0001: compression was not active")
        text, asked = slice(self.rows), slice(self.rows, None)
        return {
            "bytes_per_token": held,
            "baseline_perplexity": float(np.exp(found.usual_loss[text].mean(dtype=np.float64))),
            "perplexity": float(np.exp(found.loss[text].mean(dtype=np.float64))),
            "kl": float(found.kl[text].mean(dtype=np.float64)),
            "top1": float(found.agrees[text].mean()),
            "baseline_pass_keys": float(found.usual_hit[asked][answers].mean()),
            "pass_keys": float(found.hit[asked][answers].mean()),
            "answers": int(answers.sum()),
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
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    ratios = []
    for pair in zip(attends(built, model), attends(usual, model), strict=True):
        seconds = np.empty((9, 2))
        for call in pair:
            call()
        for turn, row in enumerate(seconds):
            for i in (0, 1) if turn % 2 else (1, 0):
                start = clock()
                pair[i]()
                row[i] = clock() - start
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
        peers = [peer for peer in rows if peer["method"] == row["peer"] and "kl" in peer]
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
    if not measured:
        return f"{name}: nothing measured yet."
    first, devices = measured[0], sorted({row["device"] for row in measured})
    lines = [
        f"{name}: perplexity {first['baseline_perplexity']:.3f} and {first['baseline_pass_keys']:.1%} of "
        f"{first['answers']} pass-key tokens without compression. Measured on {' and '.join(devices)}.",
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
    for title, missing in (
        ("Not at these bits", [row for row in rows if "refused" in row]),
        ("Not measured yet", [row for row in rows if not row.keys() & {"kl", "refused"}]),
    ):
        if missing:
            lines += ["", f"{title}: {'; '.join('{method} at {bits}'.format_map(row) for row in missing)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
