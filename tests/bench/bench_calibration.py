"""Calibrated caches beside their peers: perplexity on two texts, KL divergence, agreement, and all rows of pass keys.

python tests/bench/bench_calibration.py --model DIR --tokens FILE --output FOLDER [--tables NAME ...] [--json]

FILE is an .npz with `held_out`, `wikitext2_test` (one long row each) and `needles` (rows). What takes long is done once
and kept in FOLDER: what is measured of the model, and the scores of every setting. A run that was interrupted goes on,
`--needle-rows` may be raised later, and `--processes N` shares the work out over N processes and the cores.
Calibration reads `held_out` from 100,000 and `wikitext2_test` from 200,000 on, scores are of the first rows of both,
and the pass keys that calibration sees are made by the library: nothing that is scored is calibrated on.

Everything is float32, products of matrices included. Bits count all that is held: codes, gains, scales, sinks, window.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workers
from flax import nnx

from jaxquant import evaluate, models, needles, quantizers
from jaxquant.cache import KVCache
from jaxquant.calibrate import make, rank
from jaxquant.calibrate.measured import Measured
from jaxquant.methods import trellis, turboquant

CHUNK, NEEDLE_BATCH = 256, 4
TEXTS = {  # name: rows of code, rows of English, share of rows with pass keys
    "code and pass keys": (6, 0, 0.5),
    "code": (6, 0, 0.0),
    "English": (0, 6, 0.0),
    "pass keys": (6, 0, 1.0),
    "English and pass keys": (0, 6, 0.5),
    "code, English, pass keys": (3, 3, 0.5),
    "twice the text": (12, 0, 0.5),
}
MAIN = "code and pass keys"
BITS = (3.0, 2.5, 2.25, 2.0)
EXACT = ((0, 0), (4, 128))
STATES = 256  # of trellis codes
COLUMNS = (
    "bits", "perplexity", "%", "KL, nats", "same top token", "pass keys", "WikiText-2, %", "KL", "top token",
)  # fmt: skip

Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a table: how to make the quantizers of keys and values."""

    table: str
    name: str
    text: str | None
    build: Callable[["Bench"], Pair]
    sinks: int = 0
    window: int = 0
    flips: bool = False
    needles: bool = True

    @property
    def file(self) -> str:
        """Name of the file with its scores."""
        return workers.file_name(f"{self.table} {self.name} {self.sinks} {self.window}")


class Bench:
    """The model, what was measured of it, and what was fitted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.perf_counter()
        self.model = models.load(options.model, dtype="float32")
        with np.load(options.tokens, allow_pickle=False) as members:
            self.tokens = {name: members[name].astype(np.int64) for name in members}

    def say(self, *words: object) -> None:
        print(f"{time.perf_counter() - self.began:6.0f} s", *words, file=sys.stderr, flush=True)

    @functools.cache  # noqa: B019 - one object a process
    def measured(self, text: str) -> Measured:
        """Measure the model on a text, or read what was measured."""
        code, english, retrieval = TEXTS[text]
        found: Measured | None = None
        sources = {"held_out": (code, 100_000), "wikitext2_test": (english, 200_000)}
        for name, (rows, start) in sources.items():
            rows = round(rows * self.options.share)
            if rows:
                part = make.measure(
                    self.model, self.tokens[name], start=start, rows=rows, seq_len=self.options.row_len,
                    retrieval=retrieval, keep=self.options.output / f"{text} {name}.measured",
                    progress=lambda what, done, total: self.say(text, what, done, "of", total),
                )  # fmt: skip
                found = part if found is None else found + part
        assert found is not None
        return found

    @functools.cache  # noqa: B019
    def candidates(self, text: str, metric: make.Metric = "information", states: int = 0) -> make.Candidates:
        """Fit codebooks."""
        self.say("fitting codebooks:", text, metric)
        return make.candidates(self.measured(text), metric=metric, states=states)

    @functools.cache  # noqa: B019
    def eigenbasis(self, half: rank.Half) -> Any:
        """Fit the bases of the peers."""
        return rank.eigenbasis(self.measured(MAIN).statistics, half)

    def calibrated(
        self,
        bits: float,
        *,
        text: str = MAIN,
        metric: make.Metric = "information",
        layer_groups: int | None = None,
        method: make.Allocation = "exact",
        states: int = 0,
    ) -> Pair:
        """Make our quantizers."""
        made = make.choose(
            self.model, self.measured(text), self.candidates(text, metric, states),
            bits=bits, layer_groups=layer_groups, method=method,
        )  # fmt: skip
        return made.keys, made.values

    def turboquant(self, k: int, v: int) -> Pair:
        """Make TurboQuant's quantizers, with the levels of the paper."""
        return turboquant.kv(jax.random.key(0), dim=self.model.architecture.dim, bits_k=k, bits_v=v, fused=False)

    def trellis(self, k: float, v: float) -> Pair:
        """Make trellis codes of rotated vectors."""
        return trellis.kv(jax.random.key(0), dim=self.model.architecture.dim, bits_k=k, bits_v=v, states=STATES)

    def score(self, setting: Setting) -> None:
        """Score one setting, as far as its file does not hold the scores yet."""
        o, file = self.options, self.options.output / setting.file
        report = json.loads(file.read_text()) if file.exists() else None
        if report is not None and (not setting.needles or len(report["needles"]) >= o.needle_rows):
            return
        pair = setting.build(self)
        if report is None:
            report = self.text(setting, pair)
        if setting.needles and len(report["needles"]) < o.needle_rows:
            hits = self.retrieved(functools.partial(self.cache, setting, pair), len(report["needles"]))
            report["needles"] += hits
        workers.write(file, report)
        self.say(setting.table, "|", setting.name, "|", row(report, self.reference))
        jax.clear_caches()

    def cache(self, setting: Setting, pair: Pair, rows: int, capacity: int) -> KVCache:
        """Make an empty compressed cache."""
        return self.model.decoder.init_cache(
            *pair, batch=rows, capacity=capacity, sinks=setting.sinks, window=setting.window
        )

    def exact(self, rows: int, capacity: int) -> KVCache:
        """Make an empty cache that does not compress."""
        exact = quantizers.Exact(dim=self.model.architecture.dim, dtype="float32")
        return self.model.decoder.init_cache(exact, exact, batch=rows, capacity=capacity, dtype="float32")

    def text(self, setting: Setting, pair: Pair) -> dict[str, Any]:
        """Score both texts."""
        o, dim = self.options, self.model.architecture.dim
        counts = {"held_out": o.rows, "wikitext2_test": o.other_rows}
        parts = {
            name: evaluate.rows(self.tokens[name], start=0, count=count, length=o.seq_len)
            for name, count in counts.items()
        }
        scores = evaluate.compare(
            self.model.decoder, np.concatenate(list(parts.values())),
            lambda rows: self.exact(rows, o.seq_len), lambda rows: self.cache(setting, pair, rows, o.seq_len),
            batch=o.batch,
        )  # fmt: skip
        held = self.cache(setting, pair, 1, o.seq_len).bytes_per_token
        report: dict[str, Any] = {
            "table": setting.table, "name": setting.name, "sinks": setting.sinks, "window": setting.window,
            "bits": 8 * held / (2 * dim), "bytes_per_token": held, "device": jax.devices()[0].device_kind,
            "needles": [],
        }  # fmt: skip
        rows = slice(0, 0)
        for name, count in counts.items():
            rows = slice(rows.stop, rows.stop + count)
            nll = [np.mean(x[rows], dtype=np.float64) for x in (scores.baseline_nll, scores.compressed_nll)]
            report[name] = {
                "baseline": float(np.exp(nll[0])), "perplexity": float(np.exp(nll[1])),
                "kl": float(scores.kl[rows].mean()), "top1": float(scores.agreement[rows].mean()),
            }  # fmt: skip
        if setting.flips:
            some = parts["held_out"][: max(1, o.rows // 3), :-1]
            report["flips"] = float(rank.flips(self.model.decoder, some, tuple(pair[0])).mean())
        return report

    def retrieved(self, cache: Callable[[int, int], KVCache], first: int) -> list[int]:
        """Count the tokens of pass keys that each row gets right, from one row on."""
        tokens = self.tokens["needles"][: self.options.needle_rows]
        marked = needles.answers(tokens, self.model.tokenizer)
        graph, state = nnx.split(self.model.decoder)
        out: list[int] = []
        for start in range(first, len(tokens), NEEDLE_BATCH):
            some = tokens[start : start + NEEDLE_BATCH]
            held, hits = cache(len(some), some.shape[1]), []
            for at in range(0, some.shape[1], CHUNK):
                best, held = _best(graph, state, jnp.asarray(some[:, at : at + CHUNK], jnp.int32), held)
                hits.append(np.asarray(best))
            right = np.concatenate(hits, axis=1)[:, :-1] == some[:, 1:]
            out += (right & marked[start : start + len(some)]).sum(axis=1).tolist()
        return out

    @functools.cached_property
    def reference(self) -> dict[str, list[int]]:
        """Count what each row asks for, and what an exact cache gets right."""
        file = self.options.output / "needles.json"
        known = json.loads(file.read_text()) if file.exists() else {"asked": [], "right": []}
        if len(known["right"]) < self.options.needle_rows:
            tokens = self.tokens["needles"][: self.options.needle_rows]
            known["asked"] = needles.answers(tokens, self.model.tokenizer).sum(axis=1).tolist()
            known["right"] += self.retrieved(self.exact, len(known["right"]))
            workers.write(file, known)
        return known


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _best(graph: nnx.GraphDef, state: Any, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    logits, cache = nnx.merge(graph, state)(tokens, cache)
    return jnp.argmax(logits, axis=-1), cache


def settings(model: models.Model) -> list[Setting]:
    """List the rows of all tables."""
    out = []
    for sinks, window in EXACT:
        kept = {"sinks": sinks, "window": window, "table": f"{sinks} sinks, window {window}"}
        for bits in BITS:
            out.append(Setting(name=f"calibrated {bits}", text=MAIN, build=calibrated(bits), **kept))
        for k, v in ((4, 4), (4, 3), (3, 3), (4, 2), (3, 2), (2, 2)):
            build = lambda b, k=k, v=v: b.turboquant(k, v)  # noqa: E731
            out.append(Setting(name=f"TurboQuant K{k}/V{v}", text=None, build=build, **kept))
    for bits in BITS:
        build = calibrated(bits, states=STATES)
        out.append(Setting(table="trellis", name=f"calibrated, trellis {bits}", text=MAIN, build=build))
    for k, v in ((2, 2), (2.25, 2.25), (2.5, 2.5), (3, 2), (3, 3)):
        build = lambda b, k=k, v=v: b.trellis(k, v)  # noqa: E731
        out.append(Setting(table="trellis", name=f"trellis K{k}/V{v}", text=None, build=build))
    for text in TEXTS:
        for bits in (2.5, 2.0):
            if text != MAIN:
                out.append(
                    Setting(
                        table="calibration text", name=f"{text}, {bits}", text=text, build=calibrated(bits, text=text)
                    )
                )
    for metric in ("worst", "attention"):
        for bits in (2.5, 2.0):
            build = calibrated(bits, metric=metric)
            out.append(Setting(table="metric", name=f"{metric}, {bits}", text=MAIN, build=build))
    for groups in (1, 2, 4):
        for bits in (2.5, 2.0):
            build = calibrated(bits, layer_groups=groups)
            out.append(Setting(table="templates", name=f"{groups} for all layers, {bits}", text=MAIN, build=build))
    out.append(
        Setting(table="templates", name="greedy, 2.5", text=MAIN, build=calibrated(2.5, method="greedy"))
    )  # fmt: skip
    out += [Setting(table="peers", name=name, text=MAIN, build=build, flips=True) for name, build in peers(model)]
    return out


def calibrated(bits: float, **kwargs: Any) -> Callable[[Bench], Pair]:
    return lambda bench: bench.calibrated(bits, **kwargs)


def peers(model: models.Model) -> list[tuple[str, Callable[[Bench], Pair]]]:
    """List the peers of the paper that compares deletion with quantization, at equal bytes."""
    layers, dim = model.architecture.layers, model.architecture.dim
    exact = [quantizers.Exact(dim=dim)] * layers

    def channels(bits: int) -> Callable[[Bench], Pair]:
        def build(b: Bench) -> Pair:
            keys, values = (rank.channels(b.measured(MAIN).statistics, half, bits=bits) for half in rank.HALVES)
            return keys, values

        return build

    def deleted(kept: int) -> Callable[[Bench], Pair]:
        def build(b: Bench) -> Pair:
            keys, values = (rank.delete(b.measured(MAIN).statistics, half, rank=kept) for half in rank.HALVES)
            return keys, values

        return build

    def split(top: int, above: int, below: int, both: bool) -> Callable[[Bench], Pair]:
        def build(b: Bench) -> Pair:
            values = rank.split(b.eigenbasis("values"), top=top, above=above, below=below)
            return rank.split(b.eigenbasis("keys"), top=top, above=above, below=below) if both else exact, values

        return build

    out = [(f"INT{bits} a channel, K and V", channels(bits)) for bits in (4, 3)]
    out += [
        (f"{dim * bits // 16} of {dim} directions in float16, K and V", deleted(dim * bits // 16)) for bits in (4, 3)
    ]
    for above, below in ((6, 3), (3, 2)):
        for both in (True, False):
            for top in (32, 64):
                name = f"top {top} at {above} bits, others {below}, {'K and V' if both else 'V, K exact'}"
                out.append((name, split(top, above, below, both)))
    out += [("calibrated 4.0", calibrated(4.0)), ("calibrated 2.5", calibrated(2.5))]
    return out


def row(report: dict[str, Any], reference: dict[str, list[int]]) -> str:
    """Format one row of a table."""
    cells = [f"{report['bits']:.3f}"]
    for name in ("held_out", "wikitext2_test"):
        got = report[name]
        change = f"{got['perplexity'] / got['baseline'] - 1:+.2%}"
        cells += [f"{got['perplexity']:.3f}", change] if name == "held_out" else [change]
        cells += [f"{got['kl']:.4f}", f"{got['top1']:.1%}"]
        if name == "held_out":
            cells.append(kept(report["needles"], reference))
    if "flips" in report:
        cells.append(f"{report['flips']:.2%}")
    return " | ".join(cells)


def kept(right: list[int], reference: dict[str, list[int]]) -> str:
    """Say how many tokens of pass keys were right, in the first 4 rows and in all that were tried."""
    counts = [n for n in (4, len(right)) if 0 < n <= len(right)]
    return "; ".join(
        f"{sum(right[:n])} of {sum(reference['asked'][:n])} ({sum(reference['right'][:n])}), {n} rows"
        for n in dict.fromkeys(counts)
    )


def show(reports: list[dict[str, Any]], reference: dict[str, list[int]]) -> None:
    """Print the tables."""
    if not reports:
        return
    base = reports[0]
    print(
        f"uncompressed: perplexity {base['held_out']['baseline']:.3f}, "
        f"WikiText-2 {base['wikitext2_test']['baseline']:.3f}; {base['device']}; "
        "pass keys: tokens right, in brackets those right without compression"
    )
    for table in dict.fromkeys(report["table"] for report in reports):
        columns = (*COLUMNS, "flips") if table == "peers" else COLUMNS
        print(f"\n{table}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
        for report in reports:
            if report["table"] == table:
                print(f"| {report['name']} | {row(report, reference)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tables", nargs="*", help="beginnings of the names of tables; all by default")
    parser.add_argument("--names", nargs="*", help="beginnings of the names of rows; all by default")
    parser.add_argument("--measure", action="store_true", help="measure the model, and score nothing")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--other-rows", type=int, default=6)
    parser.add_argument("--needle-rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--row-len", type=int, help="tokens of a row of calibration text")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows of calibration text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="print what --output has, and measure nothing")
    parser.add_argument("--json", action="store_true")
    workers.add_options(parser)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.processes > 1:
        for extra in (["--measure"], []):
            workers.share(options, *extra)
        options.table = True
    jax.config.update("jax_default_matmul_precision", "highest")
    bench, mine = Bench(options), workers.Work(options)
    wanted = [
        setting for setting in settings(bench.model)
        if (not options.tables or setting.table.startswith(tuple(options.tables)))
        and (not options.names or setting.name.startswith(tuple(options.names)))
    ]  # fmt: skip
    if options.measure:
        for text in dict.fromkeys(setting.text for setting in wanted if setting.text):
            mine.do(f"measuring {text}", functools.partial(bench.measured, text))
        mine.do("pass keys without compression", lambda: bench.reference)
    elif not options.table:
        for setting in wanted:
            mine.do(f"{setting.table}, {setting.name}", functools.partial(bench.score, setting))
    if options.claims is None and not options.measure:
        files = [options.output / setting.file for setting in wanted]
        reports = [json.loads(file.read_text()) for file in files if file.exists()]
        if options.json:
            print(json.dumps({"settings": reports, "needles": bench.reference}, indent=2))
        else:
            show(reports, bench.reference)
            missing = [setting.name for setting, file in zip(wanted, files, strict=True) if not file.exists()]
            if missing:
                print(f"\nNot measured yet: {'; '.join(missing)}.")
    mine.end()


if __name__ == "__main__":
    main()
