"""Code tensors of torch with JAX, without copying them on the way there or back.

python examples/interop_dlpack.py            # needs jaxquant[torch]
"""

import jax
import torch

from jaxquant import quantizers
from jaxquant.interop import dlpack
from jaxquant.methods import turboquant

if __name__ == "__main__":
    x = torch.randn(1024, 128, device="cuda" if jax.default_backend() == "gpu" else "cpu")
    ours = dlpack.to_jax(x)
    print("the same memory:", ours.unsafe_buffer_pointer() == x.data_ptr())

    quantizer = turboquant.mse(jax.random.key(0), dim=128, bits=4)
    code = quantizers.quantize(quantizer, ours)
    packed = dlpack.from_jax(code.codes, torch)  # [1024, 64] bytes
    read = dlpack.from_jax(quantizers.dequantize(quantizer, code), torch)
    print("packed:", tuple(packed.shape), packed.dtype, "of", tuple(x.shape), x.dtype)
    print(f"relative squared error: {((read - x) ** 2).sum() / (x**2).sum():.4f}")
