"""What the other frameworks do on an NVIDIA GPU: addresses by DLPack, order of streams, codes, memory and logits.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python tests/cuda/interop_check.py [--model DIR]

Needs JAX and torch with CUDA in one process; the cache's part needs transformers too. Exit status 1 where a check
fails.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxquant import models, quantizers
from jaxquant.interop import dlpack
from jaxquant.methods import turboquant

FAILED = []


def check(what: str, holds: bool, detail: object = "") -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}", flush=True)
    if not holds:
        FAILED.append(what)


def exchange() -> None:
    """Compare addresses and numbers."""
    for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "int8", "int32", "bool"):
        theirs = (torch.arange(64 * 128, device="cuda") % 7).reshape(64, 128).to(getattr(torch, name))
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
    x = torch.arange(4096.0, device="cuda").reshape(64, 64)
    check("permuted axes are shared", dlpack.to_jax(x.T).unsafe_buffer_pointer() == x.data_ptr())
    columns = dlpack.to_jax(x[:, ::2])
    check("strides that skip are copied", bool((np.asarray(columns) == x[:, ::2].cpu().numpy()).all()))
    for name, call in {
        "strides that skip, without a copy": lambda: dlpack.to_jax(x[:, ::2], copy=False),
        "another device, without a copy": lambda: dlpack.to_jax(x, device=jax.devices("cpu")[0], copy=False),
    }.items():
        try:
            call()
            check(f"{name}: an error", False)
        except ValueError as error:
            check(f"{name}: an error", True, str(error)[:80])
    moved = dlpack.to_jax(x.cpu(), device=jax.devices("cuda")[0])
    check("CPU -> GPU moves", bool((np.asarray(moved) == x.cpu().numpy()).all()))


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
            wrong += float(dlpack.to_jax(theirs).sum()) != i * big.numel()
            wrong += float(dlpack.from_jax(double(dlpack.to_jax(theirs)), torch).sum()) != 2 * big.numel()
    check("streams are waited for", not wrong, f"{wrong} of 40 wrong")


def codes() -> None:
    """The codes of torch on the GPU are those of JAX, on the CPU and on the GPU."""
    from jaxquant.interop import _torch_codes

    x = torch.randn(2, 4, 2048, 128, device="cuda")
    cpu = jax.devices("cpu")[0]
    for bits, scale in [(4, "preserve"), (2, "unbiased"), (3, "norm"), (8, "least_squares")]:
        quantizer = turboquant.mse(jax.random.key(0), dim=128, bits=bits, scale=scale, fused=False)
        packed, scales = _torch_codes.coder(quantizer).to(x.device).quantize(x)
        for device in (cpu, jax.devices("cuda")[0]):
            code = quantizers.quantize(jax.device_put(quantizer, device), dlpack.to_jax(x, device=device))
            share = float(np.mean(np.asarray(code.codes) != packed.cpu().numpy()))
            check(f"{bits} bits, {scale}: codes of JAX on {device.platform}", share <= 1e-4, f"{share:.1e} differ")
        read = _torch_codes.coder(quantizer).to(x.device).dequantize((packed, scales), x)
        error = float(((read - x) ** 2).sum() / (x**2).sum())
        check(f"{bits} bits, {scale}: error", error < {8: 1e-3, 4: 0.012, 3: 0.04, 2: 0.16}[bits], f"{error:.5f}")


def cache(folder: Path) -> None:
    """Logits on the GPU are those on the CPU, and memory grows by the packed bytes."""
    import transformers
    from transformers.cache_utils import DynamicCache

    from jaxquant.interop.torch import CompressedCache

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    pair = turboquant.kv(jax.random.key(0), dim=config.head_dim, bits_k=4, bits_v=2, fused=False)
    ids = torch.randint(2, config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        held = CompressedCache(config, *pair, sinks=2, window=16)
        with torch.no_grad():
            placed = model.to(device)
            parts = [placed(part.to(device), past_key_values=held).logits for part in ids.split([120, 1, 79], dim=1)]
        held.crop(-50)
        held.reorder_cache(torch.tensor([1, 1, 0], device=device))
        with torch.no_grad():
            parts.append(placed(ids[[1, 1, 0], :5].to(device), past_key_values=held).logits.flatten(0, 1)[None])
        found[device] = [part.cpu() for part in parts]
    worst = max(float((a - b).abs().max()) for a, b in zip(*found.values(), strict=True))
    with torch.no_grad():
        exact = model(ids.cuda(), past_key_values=DynamicCache(config=config)).logits[:, :120].cpu()
    change = float((exact - found["cuda"][0]).abs().max())
    check("compression was active", change > 0.1, f"changes logits by {change:.2e}")
    # A code next to a threshold may differ, so not rounding alone; far less than compression itself.
    check("chunks, crop and reorder: logits as on the CPU", worst < change / 20, f"largest difference {worst:.2e}")

    held = CompressedCache(config, *pair)
    held.update(*[torch.zeros(8, config.num_key_value_heads, 1, config.head_dim, device="cuda")] * 2, 0)
    x = torch.randn(8, config.num_key_value_heads, 8192, config.head_dim, device="cuda", dtype=torch.float32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held.update(x, x, 0)
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before
    wanted = x.shape[0] * x.shape[1] * x.shape[2] * (config.head_dim * 6 // 8 + 4)
    check("memory grows by the packed bytes", wanted <= grown <= wanted + 16384, f"{grown:,} for {wanted:,}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=models.load().folder)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, jax {jax.__version__}")
    exchange()
    order()
    codes()
    if importlib.util.find_spec("transformers"):
        cache(options.model)
    else:
        print("transformers is not installed: the cache was not checked")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
