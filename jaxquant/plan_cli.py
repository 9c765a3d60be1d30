"""`jaxquant plan`: the command line of `plan`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jaxquant import _console
from jaxquant._console import Json, out

if TYPE_CHECKING:
    from jaxquant.plan import Machine

# Of the read bandwidth of an H200, over whole operations, 32 rows of 131,072 tokens: docs/kernels.md.
MEASURED = {"bf16": 0.99, "K4V4": 0.84, "K4V2": 0.81, "K2V2": 0.78, "K3V3": 0.73}
ASSUMED = 0.5  # where nothing was measured
LAYER = {"bf16": 7e-6}  # seconds that are left of a layer of the steps there, without weights, on average
PACKED_LAYER = 20e-6
WEIGHTS = 0.83  # what 13 GiB of weights add to a step, there: 3.78 ms on average, where reading them takes 3.15
GIB = 2.0**30


def plan(
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder; default: Llama-3.1-8B's shapes.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 32_768,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    devices: Annotated[int, typer.Option(min=1, help="That share the model and the cache.")] = 1,
    hbm: Annotated[float, typer.Option(help="Memory of a device, in GB (10^9 bytes).")] = 141.0,
    bandwidth: Annotated[float, typer.Option(help="That a device reads at, in GB/s.")] = 4550.0,
    bits: Annotated[str, typer.Option(help="Of keys and values; several with commas.")] = "K4V4,K4V2,K3V3,K2V2",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens of a row that stay exact.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="Newest tokens of a row that stay exact.")] = 0,
    calibration: Annotated[Path | None, typer.Option(help="Of the model: one more line.")] = None,
    reserve: Annotated[float, typer.Option(help="Share of the memory to keep free.")] = 0.08,
    as_json: Json = False,
) -> None:
    """Show bytes, longest context and predicted decode time of a model, before anything is allocated.

    Without --model the shapes of Llama-3.1-8B are taken.
    """
    import jax

    from jaxquant import plan as planning
    from jaxquant.attention_benchmark import widths
    from jaxquant.methods import turboquant
    from jaxquant.models import architecture as architectures

    shape = architectures.from_config(LLAMA_8B) if model is None else architectures.read(model)
    machine = planning.Machine(devices=devices, memory=hbm * 1e9, bandwidth=bandwidth * 1e9, reserve=reserve)
    pairs: dict[str, Any] = {"bf16": None}
    for name in bits.split(","):
        keys, values = widths(name)
        pairs[name.upper().replace("/", "")] = turboquant.kv(
            jax.random.key(0), dim=shape.dim, bits_k=keys, bits_v=values
        )
    if calibration is not None:
        from jaxquant.calibrate import files

        found = files.read(calibration)
        pairs[f"calibrated, {found.bits:.3g} bits"] = found.keys, found.values
    weights = planning.weights(shape)

    rows = {}
    for name, pair in pairs.items():

        def held(tokens: int, pair: Any = pair) -> int:
            kept = {"sinks": min(sinks, tokens - 1), "window": window}
            return planning.cache_bytes(shape, pair, context=tokens, batch=batch, **kept)

        given = {"layers": shape.layers, "weights": weights, "context": context, "batch": batch}
        rows[name] = predicted(name, held, machine, **given)
        if name == "bf16":  # a byte a coordinate and no scale, as serving engines store it
            half = predicted(name, lambda tokens, held=held: held(tokens) // 2, machine, **given)
            rows["fp8"] = half | {"share_measured": False}
    if as_json:
        return _console.print_json(
            {"context": context, "batch": batch, "devices": devices, "hbm_gb": hbm, "caches": rows}
        )
    table = Table(title=f"{batch} x {context:,} tokens on {devices} x {hbm:g} GB, {weights / GIB:.2f} GiB of weights")
    for header in ("cache", "GiB", "bytes/token", "fits", "longest", "ms/step", "of bandwidth"):
        table.add_column(header, justify="left" if header == "cache" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name, f"{row['cache'] / GIB:,.2f}", f"{row['bytes_per_token']:,.0f}", "yes" if row["fits"] else "no",
            f"{row['longest']:,}", f"{1e3 * row['seconds']:.2f}",
            f"{row['share']:.0%}" + ("" if row["share_measured"] else " (assumed)"),
        )  # fmt: skip
    out.print(table)


def predicted(
    kind: str,
    held: Callable[[int], int],
    machine: "Machine",
    *,
    layers: int,
    weights: int,
    context: int,
    batch: int,
) -> dict[str, Any]:
    """Plan one kind of cache, at the share of the bandwidth that was measured for it, or half where none was.

    Args:
        kind: bf16, or bits such as K4V2 where they are TurboQuant's.
        held: gives the bytes of the cache for a number of tokens a row.
        machine: to run on.
        layers: of the model.
        weights: bytes of the model.
        context: tokens of a row.
        batch: rows.

    Returns:
        The fields of `plan.Plan`, `share`, and `share_measured`.
    """
    from jaxquant import plan as planning

    share = MEASURED.get(kind)
    fixed = layers * LAYER.get(kind, PACKED_LAYER)
    shares = {"share": share or ASSUMED, "model_share": WEIGHTS}
    found = planning.plan(held, weights, machine, context=context, batch=batch, **shares, fixed=fixed)
    return dataclasses.asdict(found) | {"share": share or ASSUMED, "share_measured": share is not None}


LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
