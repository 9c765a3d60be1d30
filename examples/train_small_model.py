"""Train the small model that ships with jaxquant, from scratch, on Python's own standard library.

    python examples/train_small_model.py --out small --minutes 6

The text is the .py files of the standard library of one Python installation; files are held out by the hash of their
path. Rows that carry pass keys to be recalled much later make long-range retrieval measurable. The result is a
Hugging Face folder: a llama decoder with grouped heads, a byte-level BPE tokenizer, weights in bfloat16.
"""

import functools
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxquant.models.architecture import Architecture, from_config
from jaxquant.models.decoder import Decoder
from jaxquant.models.loading import hugging_face_name

CONTEXT = 2048
END = "<|endoftext|>"
# Tests, the editor and the graphics toolkit are absent from some installations; the encodings are tables, not text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "tkinter", "encodings"}
HELD_OUT_BYTES = 50_000
NEEDLE_SHARE = 0.15
# Recalled digits are a few tokens in a thousand: at weight one, recall is learned late or never.
ANSWER_WEIGHT = 10.0
ADJECTIVES = "amber azure brisk calm coral crimson dusty early frozen gentle golden hollow ivory jolly lunar mellow misty noble olive quiet rapid silver sunny velvet".split()  # noqa: E501
NOUNS = "anchor badger beacon canyon cedar comet delta ember falcon garden harbor island jacket kettle lantern meadow nickel orchard pebble raven saddle temple valley willow".split()  # noqa: E501
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1280,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


def read_library(root: Path) -> tuple[list[str], list[str]]:
    """Read the standard library below `root`: training files and held-out files, in the order of their hash."""
    paths = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    by_hash = sorted((hashlib.sha256(p.relative_to(root).as_posix().encode()).hexdigest(), p) for p in paths)
    train, held_out = [], []
    for digest, path in by_hash:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if int(digest[:8], 16) % 40 == 0 else train).append(text)
    return train, held_out


def held_out_text(files: Sequence[str]) -> str:
    """Join the first held-out files to about `HELD_OUT_BYTES`, cut at a line."""
    text = ""
    for file in files:
        # One long file would make the sample say little about the others.
        text += file[: HELD_OUT_BYTES // 5].rsplit("\n", 1)[0] + "\n"
        if len(text.encode()) >= HELD_OUT_BYTES:
            break
    return text.encode()[:HELD_OUT_BYTES].decode(errors="ignore").rsplit("\n", 1)[0] + "\n"


def statement(name: str, key: str) -> str:
    return f"\nThe pass key for {name} is {key}. Remember it.\n"


def question(name: str, key: str) -> str:
    return f"\nQuestion: what is the pass key for {name}?\nAnswer: {key}\n"


def draw_keys(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Draw distinct names with five-digit keys."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), size=count, replace=False)
    keys = rng.integers(10_000, 100_000, size=count)
    return [
        (f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}", str(key))
        for i, key in zip(chosen, keys, strict=True)
    ]


def train_tokenizer(files: Sequence[str], rng: np.random.Generator) -> Tokenizer:
    """Train byte-level BPE in which every digit stands alone, with the space before it if there is one."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    needles = [statement(*pair) + question(*pair) for _ in range(1000) for pair in draw_keys(rng, 8)]
    tokenizer.train_from_iterator([*files, *needles], trainer)
    return tokenizer


def needle_rows(
    tokenizer: Tokenizer, text: Int[np.ndarray, " tokens"], rng: np.random.Generator, *, rows: int, length: int
) -> Int[np.ndarray, "rows length"]:
    """Hide pass keys in crops of `text` and ask for each of them later, some of them twice."""
    out = np.empty((rows, length), np.uint16)
    for row in range(rows):
        pairs = draw_keys(rng, int(rng.integers(2, 3 + length // 160)))
        events: list[tuple[float, str]] = []
        for name, key in pairs:
            told, *asked = np.sort(rng.random(int(rng.integers(2, 4))))
            events += [(told, statement(name, key)), *((when, question(name, key)) for when in asked)]
        pieces = [tokenizer.encode(piece).ids for _, piece in sorted(events)]
        free = length - sum(map(len, pieces))
        start = int(rng.integers(0, len(text) - free))
        cuts = np.sort(rng.integers(0, free + 1, size=len(pieces)))
        crop, parts, last = text[start : start + free], [], 0
        for cut, piece in zip(cuts, pieces, strict=True):
            parts += [crop[last:cut], np.asarray(piece, np.uint16)]
            last = cut
        out[row] = np.concatenate([*parts, crop[last:]])
    return out


def answer_mask(tokenizer: Tokenizer, rows: Int[np.ndarray, "rows length"]) -> Bool[np.ndarray, "rows length"]:
    """Mark the five digits after every `Answer:`."""
    marker = tokenizer.encode("\nAnswer:").ids
    found = np.lib.stride_tricks.sliding_window_view(rows, len(marker), axis=1) == marker
    mask = np.zeros(rows.shape, bool)
    for row, at in zip(*np.nonzero(found.all(axis=-1)), strict=True):
        mask[row, at + len(marker) : at + len(marker) + 5] = True
    return mask


def loss(
    decoder: Decoder, rows: Int[Array, "batch length"], weights: Float[Array, "batch length"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the weighted loss, and the plain one to watch."""
    logits, _ = decoder(rows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return jnp.average(losses, weights=weights[:, 1:]), losses.mean()


def learning_rate(progress: Float[Array, ""], peak: Float[Array, ""]) -> Float[Array, ""]:
    """Warm up over the first 2 % of the run, then follow a cosine to zero."""
    return peak * jnp.minimum(progress / 0.02, 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1.0))))


def optimizer() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )


@functools.partial(jax.jit, static_argnames=("graph", "batch", "microsteps"), donate_argnames=("params", "moments"))
def train_steps(
    graph: nnx.GraphDef,
    params: nnx.State,
    moments: optax.OptState,
    key: PRNGKeyArray,
    text: Int[Array, " tokens"],
    needles: Int[Array, "rows length"],
    answers: Bool[Array, "rows length"],
    progress: Float[Array, " ends"],
    peak: Float[Array, ""],
    *,
    batch: int,
    microsteps: int,
) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
    """Run `microsteps` optimizer steps on fresh random crops, while progress moves from one end to the other."""
    carrying = round(batch * NEEDLE_SHARE)
    length = needles.shape[1]

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        params, moments = carry
        key, progress = inputs
        key_text, key_needle = jax.random.split(key)
        starts = jax.random.randint(key_text, (batch - carrying,), 0, text.shape[0] - length)
        crops = text[starts[:, None] + jnp.arange(length)]
        chosen = jax.random.randint(key_needle, (carrying,), 0, needles.shape[0])
        rows = jnp.concatenate((crops, needles[chosen])).astype(jnp.int32)
        asked = jnp.concatenate((jnp.zeros(crops.shape, bool), answers[chosen]))
        weights = jnp.where(asked, ANSWER_WEIGHT, 1.0)
        gradient, value = jax.grad(lambda p: loss(nnx.merge(graph, p), rows, weights), has_aux=True)(params)
        updates, moments = optimizer().update(gradient, moments, params)
        rate = learning_rate(progress, peak)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, moments), value

    keys = jax.random.split(key, microsteps)
    (params, moments), values = jax.lax.scan(
        step, (params, moments), (keys, jnp.linspace(progress[0], progress[1], microsteps))
    )
    return params, moments, values.mean()


@functools.partial(jax.jit, static_argnames="graph")
def score(graph: nnx.GraphDef, params: nnx.State, rows: Int[Array, "batch length"]) -> tuple[Array, Array]:
    """Return next-token losses, and whether the arg-max is right."""
    logits, _ = nnx.merge(graph, params)(rows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return losses, jnp.argmax(logits, -1) == rows[:, 1:]


def evaluate(graph: nnx.GraphDef, params: nnx.State, rows: np.ndarray, batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    parts = [score(graph, params, jnp.asarray(rows[i : i + batch], jnp.int32)) for i in range(0, len(rows), batch)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def write_folder(folder: Path, params: nnx.State, tokenizer: Tokenizer, held_out: str, licence: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in nnx.to_flat_state(params):
        array = np.asarray(jnp.asarray(value[...], jnp.bfloat16))
        tensors[hugging_face_name(path)] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": CONTEXT}) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")
    (folder / "NOTICE").write_text(
        "held_out.txt is an excerpt of the Python standard library, and the weights were trained on the rest of it by\n"
        "examples/train_small_model.py in the repository of jaxquant. The library's licence follows.\n\n" + licence,
        encoding="utf-8",
    )


def psf_licence(root: Path) -> str:
    """Cut the Python Software Foundation's agreement out of the installation's LICENSE.txt."""
    text = (root / "LICENSE.txt").read_text(encoding="utf-8")
    start = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    return text[start : text.index("\n\n\n", text.index("8. By copying", start))].strip() + "\n"


def main(
    out: Annotated[Path, typer.Option(help="folder to write")],
    library: Annotated[Path | None, typer.Option(help="a standard library; default: this Python's")] = None,
    minutes: Annotated[float | None, typer.Option(help="train for this long, after compilation")] = None,
    steps: Annotated[int | None, typer.Option(help="train for this many steps instead")] = None,
    batch: Annotated[int, typer.Option(help="rows of full length per step")] = 8,
    context: Annotated[int, typer.Option(help="tokens per row", min=1024)] = CONTEXT,
    needle_pool: Annotated[int, typer.Option(help="different rows with pass keys")] = 8192,
    microsteps: Annotated[int, typer.Option(help="steps per dispatch")] = 20,
    peak: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    short_share: Annotated[float, typer.Option(help="part of the run on rows of a quarter length")] = 0.6,
    key: Annotated[int, typer.Option(help="makes the random key")] = 0,
) -> None:
    """Train the model and write its folder; print held-out perplexity and needle accuracy."""
    if (minutes is None) == (steps is None):
        raise typer.BadParameter("give either --minutes or --steps")
    began = time.perf_counter()
    rng = np.random.default_rng(key)
    library = library or Path(sysconfig.get_paths()["stdlib"])
    train_files, held_out_files = read_library(library)
    if not held_out_files:
        raise typer.BadParameter(f"--library {library} holds too few .py files")
    tokenizer = train_tokenizer(train_files, rng)
    held_out = held_out_text(held_out_files)

    def join(files: Sequence[str]) -> np.ndarray:
        return np.concatenate([np.asarray([0, *e.ids], np.uint16) for e in tokenizer.encode_batch(list(files))])

    text, held_tokens, other = join(train_files), join([held_out]), join(held_out_files)
    span = min(1024, context)
    held_rows = held_tokens[: (len(held_tokens) - 1) // span * span + 1]
    held_rows = np.stack([held_rows[i : i + span + 1] for i in range(0, len(held_rows) - 1, span)])
    needle_test = needle_rows(tokenizer, other, rng, rows=32, length=span + 1)
    asked = answer_mask(tokenizer, needle_test)[:, 1:]

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    architecture: Architecture = from_config(CONFIG)
    decoder = Decoder(architecture, dtype=dtype, rngs=nnx.Rngs(key))
    graph, params = nnx.split(decoder)
    moments = optimizer().init(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{jax.devices()[0].device_kind}; {len(train_files)} files, {sum(map(len, train_files)):,} characters, "
        f"{len(text):,} tokens; held out {len(held_out_files)} files; {count:,} parameters; "
        f"prepared in {time.perf_counter() - began:.0f} s",
        flush=True,
    )

    def report(done: int) -> tuple[float, float]:
        losses, _ = evaluate(graph, params, held_rows)
        _, right = evaluate(graph, params, needle_test)
        perplexity, found = float(np.exp(losses.mean())), float(right[asked].mean())
        print(f"step {done}: held-out perplexity {perplexity:.3f}, needle accuracy {found:.3f}", flush=True)
        return perplexity, found

    licence = psf_licence(library)
    text_device = jnp.asarray(text)

    def stage(length: int, rows: int) -> Callable[..., tuple[nnx.State, optax.OptState, Array]]:
        """Compile the step for rows of one length, so that no compilation falls into the training time."""
        pool = needle_rows(tokenizer, text, rng, rows=needle_pool, length=length + 1)
        pool_device, answers = jnp.asarray(pool), jnp.asarray(answer_mask(tokenizer, pool))
        zeros = jnp.zeros(2)
        compiled = train_steps.lower(
            graph, params, moments, run_key, text_device, pool_device, answers, zeros, jnp.asarray(peak),
            batch=rows, microsteps=microsteps,
        ).compile()  # fmt: skip
        return lambda params, moments, key, progress: compiled(
            params, moments, key, text_device, pool_device, answers, progress, jnp.asarray(peak)
        )

    run_key = jax.random.key(key)
    short, long = stage(context // 4, 4 * batch), stage(context, batch)
    report(0)
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    step, done, pace, reported, train_loss, start = 0, 0.0, 0.0, 0.0, float("nan"), time.perf_counter()
    columns = (TextColumn("step {task.fields[step]} loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("train", total=1.0, step=0, loss=float("nan"))
        while done < 1.0:
            run_key, use = jax.random.split(run_key)
            span_of_progress = jnp.asarray([done, min(1.0, done + pace)])
            # Recall forms on short rows first, in many cheap steps.
            params, moments, value = (short if done < short_share else long)(params, moments, use, span_of_progress)
            train_loss = float(value)
            step += microsteps
            now = time.perf_counter() - start
            before, done = done, step / steps if steps is not None else now / (60 * (minutes or 1.0))
            pace = done - before
            progress.update(task, completed=min(done, 1.0), step=step, loss=train_loss)
            if done - reported >= 0.1:
                reported = done
                print(f"{now:.0f} s, training loss {train_loss:.4f} (perplexity {np.exp(train_loss):.3f})")
                report(step)
                write_folder(out, params, tokenizer, held_out, licence)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    perplexity, found = report(step)
    losses, _ = evaluate(graph, params, held_rows)
    held_bytes = len(tokenizer.decode(held_rows[:, 1:].reshape(-1).tolist()).encode())
    write_folder(out, params, tokenizer, held_out, licence)
    summary = {
        "device": jax.devices()[0].device_kind,
        "parameters": count,
        "steps": step,
        "tokens": step * batch * context,
        "seconds": round(time.perf_counter() - began),
        "training_loss": train_loss,
        "held_out_perplexity": perplexity,
        "held_out_bits_per_byte": float(losses.sum() / np.log(2) / held_bytes),
        "needle_accuracy": found,
        "needle_context": span,
        "folder_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
