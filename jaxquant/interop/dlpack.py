"""Move tensors between JAX and any framework that speaks DLPack, without a copy where both can share the memory.

The documentation's table says which transfers share memory. Memory that is shared is one buffer: whoever writes to it
changes it for the other, and a JAX array must never change, so a tensor that is still written to is handed over with
`copy=True`.
"""

import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_WIDE = frozenset({"float64", "int64", "uint64", "complex128"})


def to_jax(x: Any, *, device: Any = None, copy: bool | None = None) -> jax.Array:
    """Hand a tensor of another framework to JAX.

    Args:
        x: anything with `__dlpack__`: a tensor of torch, MLX, CuPy or TensorFlow, a NumPy array.
        device: the `jax.Device` where the array shall be; where the tensor is if None.
        copy: None copies where the memory cannot be shared: on another device, with strides that skip or repeat
            elements, read-only in NumPy, or not aligned to 64 bytes on a CPU. True always copies, False never does.

    Raises:
        TypeError: `x` does not speak DLPack, or JAX would hold its dtype in another one.
        ValueError: `copy` is False and the memory cannot be shared, or JAX has no device for this memory.

    Example:
        >>> shared = np.arange(64, dtype=np.float32)
        >>> to_jax(shared).sum()
        Array(2016., dtype=float32)
    """
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"x must have __dlpack__, as tensors of torch, MLX and NumPy do, got {type(x).__name__}")
    dtype = str(getattr(x, "dtype", "")).rpartition(".")[2]
    if dtype in _WIDE and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            f"x has dtype {dtype}, which JAX would hold in 32 bits: cast it first, or set jax_enable_x64 to keep it"
        )
    try:
        shared = jax.dlpack.from_dlpack(x, device=device, copy=None if copy else copy)
        # JAX takes copy=True and shares all the same; waiting lets the caller write to x as soon as this returns.
        return jnp.array(shared, copy=True).block_until_ready() if copy else shared
    except BufferError:
        if not isinstance(x, np.ndarray):
            raise  # torch says it well: a tensor that requires a gradient, or with a lazy conjugate
        if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
            raise TypeError(f"x must hold numbers, got dtype {x.dtype}") from None
        if copy is False:
            raise ValueError(f"x cannot be shared without a copy: NumPy does not export {_describe(x)}") from None
        return jax.device_put(jnp.array(x.astype(x.dtype.newbyteorder("=")), copy=True), device)
    except RuntimeError as error:  # a JaxRuntimeError
        if "striding" in str(error):
            if copy is False:
                raise ValueError(f"x cannot be shared without a copy: its strides are not compact, {error}") from None
            return jax.dlpack.from_dlpack(_compact(x), device=device)
        raise ValueError(
            f"x is on {getattr(x, 'device', 'a device')}, and JAX sees {', '.join(map(str, jax.devices()))}: move it, "
            f"or install JAX for that device ({error})"
        ) from error


def from_jax(x: jax.Array, framework: ModuleType, *, copy: bool | None = None) -> Any:
    """Hand an array of JAX to another framework.

    Args:
        x: an array on one device.
        framework: a module with `from_dlpack`: `torch`, `mlx.core`, `numpy`, `cupy`.
        copy: None copies where the memory cannot be shared. True always copies, and the result may be written to.
            False never does.

    Raises:
        TypeError: `x` is not an array with a value, or is a key.
        ValueError: `x` is spread over several devices, or the framework does not take its dtype or device, or `copy` is
            False and the memory cannot be shared.

    Example:
        >>> from_jax(jnp.arange(3), np)
        array([0, 1, 2], dtype=int32)
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        raise TypeError(f"x must be a jax.Array with a value (not inside jit), got {type(x).__name__}")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"x has dtype {x.dtype}; of a key, hand over jax.random.key_data(x)")
    if x.is_deleted():
        raise ValueError("x was deleted or donated: its memory is gone")
    if len(x.sharding.device_set) > 1:
        raise ValueError(
            f"x is spread over {len(x.sharding.device_set)} devices; hand over its addressable_shards one by one"
        )
    try:
        return framework.from_dlpack(x, copy=copy)  # pyright: ignore[reportAttributeAccessIssue]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{framework.__name__} does not take {x.dtype} on {next(iter(x.devices()))} by DLPack with copy={copy}: "
            f"{error}"
        ) from error


def _compact(x: Any) -> Any:
    """Copy a tensor so that no element is skipped or repeated, with its own framework."""
    if hasattr(x, "contiguous"):
        return x.contiguous()
    module = type(x).__module__
    for name in (module, module.partition(".")[0]):
        for function in ("ascontiguousarray", "contiguous"):
            if hasattr(sys.modules.get(name), function):
                return getattr(sys.modules[name], function)(x)
    raise ValueError(f"x has strides that skip or repeat elements: copy it first ({module} has no contiguous)")


def _describe(x: np.ndarray) -> str:
    if not x.flags.writeable:
        return "read-only arrays"
    return f"dtype {x.dtype!r}"
