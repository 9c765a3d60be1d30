"""What the other frameworks do on an NVIDIA GPU: addresses by DLPack, order of streams, codes, memory and logits.

    python tests/cuda/interop_check.py [--model DIR] [--device cpu]

Needs JAX and torch with CUDA in one process; the cache's part needs transformers too. Takes less than a minute. Exit
status 1 where a check fails. `--device cpu` tries the script itself: torch against JAX on a CPU.
"""

import argparse
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the GPU's memory

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxquant import quantizers
from jaxquant.interop import dlpack
from jaxquant.methods import turboquant
from jaxquant.models.loading import SMALL

FAILED = []


def check(what: str, holds: bool, detail: object = "") -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}", flush=True)
    if not holds:
        FAILED.append(what)


def exchange(device: str) -> None:
    """Compare addresses and numbers."""
    for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "int8", "int32", "bool"):
        theirs = (torch.arange(64 * 128, device=device) % 7).reshape(64, 128).to(getattr(torch, name))
        ours = dlpack.to_jax(theirs)
        back = dlpack.from_jax(ours, torch)
        check(
            f"torch -> JAX -> torch shares memory, {name}",
            ours.unsafe_buffer_pointer() == theirs.data_ptr() == back.data_ptr()
            and str(ours.dtype) == name
            and bool((np.asarray(ours.astype(jnp.float32)) == theirs.float().cpu().numpy()).all()),
        )
        check(
            f"copy=True copies, {name}", dlpack.to_jax(theirs, copy=True).unsafe_buffer_pointer() != theirs.data_ptr()
        )
    x = torch.arange(4096.0, device=device).reshape(64, 64)
    check("permuted axes are shared", dlpack.to_jax(x.T).unsafe_buffer_pointer() == x.data_ptr())
    columns = dlpack.to_jax(x[:, ::2])
    check("strides that skip are copied", bool((np.asarray(columns) == x[:, ::2].cpu().numpy()).all()))
    refused: dict[str, Callable[[], Any]] = {
        "strides that skip, without a copy": lambda: dlpack.to_jax(x[:, ::2], copy=False)
    }
    if device == "cuda":
        refused["another device, without a copy"] = lambda: dlpack.to_jax(x, device=jax.devices("cpu")[0], copy=False)
    for name, call in refused.items():
        try:
            call()
            check(f"{name}: an error", False)
        except ValueError as error:
            check(f"{name}: an error", True, str(error)[:80])
    moved = dlpack.to_jax(x.cpu(), device=jax.devices(device)[0])
    check(f"CPU -> {device} moves", bool((np.asarray(moved) == x.cpu().numpy()).all()))


def order() -> None:
    """Neither side reads what the other has not finished writing: long work, then the exchange, many times."""
    wrong, big = 0, torch.randn(4096, 4096, device="cuda")
    double = jax.jit(lambda x: x @ x * 0 + 2)
    for i in range(20):
        with torch.cuda.stream(torch.cuda.Stream() if i % 2 else torch.cuda.current_stream()):
            busy = big
            for _ in range(10):
                busy = busy @ big * 1e-3
            theirs = busy * 0 + i
            ours = dlpack.to_jax(theirs)
            wrong += not bool((ours == i).all())
            wrong += not bool((dlpack.from_jax(double(ours), torch) == 2).all())
    check("streams are waited for", not wrong, f"{wrong} of 40 wrong")


def codes(device: str) -> None:
    """The codes of torch on the GPU are those of JAX, on the CPU and on the GPU."""
    from jaxquant.interop import _torch_codes

    x = torch.randn(2, 4, 2048, 128, device=device)
    places = {jax.devices(name)[0] for name in ("cpu", device)}
    for bits, scale in [(4, "preserve"), (2, "unbiased"), (3, "norm"), (8, "least_squares")]:
        quantizer = turboquant.mse(jax.random.key(0), dim=128, bits=bits, scale=scale, fused=False)
        packed, scales = _torch_codes.coder(quantizer).to(x.device).quantize(x)
        for place in places:
            code = quantizers.quantize(jax.device_put(quantizer, place), dlpack.to_jax(x, device=place))
            share = float(np.mean(np.asarray(code.codes) != packed.cpu().numpy()))
            check(f"{bits} bits, {scale}: codes of JAX on {place.platform}", share <= 1e-4, f"{share:.1e} differ")
        read = _torch_codes.coder(quantizer).to(x.device).dequantize((packed, scales), x)
        error = float(((read - x) ** 2).sum() / (x**2).sum())
        check(f"{bits} bits, {scale}: error", error < {8: 1e-3, 4: 0.012, 3: 0.04, 2: 0.16}[bits], f"{error:.5f}")


def logits(model: Any, pair: tuple[Any, Any], ids: torch.Tensor, device: str) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Read in chunks, forget, reorder and read on; give all logits, and the codes of the first layer before that."""
    from jaxquant.interop.torch import CompressedCache

    held = CompressedCache(model.config, *pair, sinks=2, window=16)
    with torch.no_grad():
        placed, ids = model.to(device), ids.to(device)
        parts = [placed(part, past_key_values=held).logits for part in ids.split([120, 1, 79], dim=1)]
        coded = [half.codes[0].cpu().numpy() for half in held.layers[0].halves]
        held.crop(-50)
        rows = torch.tensor([1, 1, 0], device=device)
        held.reorder_cache(rows)
        parts.append(placed(ids[rows, :5], past_key_values=held).logits.flatten(0, 1)[None].expand(2, -1, -1))
    return torch.cat([part.cpu() for part in parts], dim=1), coded


def cache(folder: Path, device: str) -> None:
    """Codes and logits on the GPU are those on the CPU, and memory grows by the packed bytes."""
    import transformers
    from transformers.cache_utils import DynamicCache

    from jaxquant.interop.torch import CompressedCache

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().amax(-1).median())

    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    pair = turboquant.kv(jax.random.key(0), dim=config.head_dim, bits_k=4, bits_v=2, fused=False)
    ids = torch.randint(2, config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    moved, _ = logits(model, pair, ids, "cpu")
    with torch.no_grad():
        weight.copy_(before)
        exact = model(ids, past_key_values=DynamicCache(config=config)).logits[:, :120]
    of_cpu, coded = logits(model, pair, ids, "cpu")
    found, there = logits(model, pair, ids, device)
    change = apart(exact, of_cpu[:, :120])
    check("compression was active", change > 0.1, f"changes logits by {change:.2e}")
    share = max(float(np.mean(a != b)) for a, b in zip(coded, there, strict=True))
    check("chunks: codes of the first layer as on the CPU", share <= 1e-3, f"{share:.1e} differ")
    # A code next to a threshold may be another one, and every later layer multiplies that: also on the CPU alone.
    floor, worst = apart(moved, of_cpu), apart(found, of_cpu)
    said = f"{worst:.2e} apart, {floor:.2e} on the CPU with an embedding moved by 1e-6"
    check("chunks, crop and reorder: logits as on the CPU", worst < min(2 * floor + 1e-3, change / 2), said)
    swapped, _ = logits(model, pair[::-1], ids, device)
    check("... which those of swapped bits are not", apart(swapped, of_cpu) > 2 * worst + 1e-3)
    if device == "cpu":
        return

    held = CompressedCache(config, *pair)
    held.update(*[torch.zeros(8, config.num_key_value_heads, 1, config.head_dim, device=device)] * 2, 0)
    x = torch.randn(8, config.num_key_value_heads, 8192, config.head_dim, device=device, dtype=torch.float32)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    held.update(x, x, 0)
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - allocated
    wanted = x.shape[0] * x.shape[1] * x.shape[2] * (config.head_dim * 6 // 8 + 4)
    check("memory grows by the packed bytes", wanted <= grown <= wanted + 16384, f"{grown:,} for {wanted:,}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=SMALL)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = options.device
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, jax {jax.__version__}")
    parts: dict[str, Callable[[], None]] = {"exchange": lambda: exchange(device), "codes": lambda: codes(device)}
    if device == "cuda":
        parts["order"] = order
    if importlib.util.find_spec("transformers"):
        parts["cache"] = lambda: cache(options.model, device)
    else:
        print("transformers is not installed: the cache was not checked")
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            part()
        except Exception:  # the other parts are still checked
            traceback.print_exc()
            check(f"{name} ran to its end", False)
        print(f"       {name}: {time.perf_counter() - began:.1f} s", flush=True)
    print(f"{len(FAILED)} failed")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
