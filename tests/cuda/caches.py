"""Caches full of random codes and numbers, and a reading of codes that shares nothing with the package."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import cache, codebooks, quantizers, rotations, trellis
from jaxquant._stacks import KVCache, Stack, Store

KV_HEADS = 2
BOOKS = {  # one of each kind that the kernels know
    "2 uniform": codebooks.uniform(2),
    "2": codebooks.on_grid(codebooks.lloyd_max(2)),
    "3": codebooks.on_grid(codebooks.lloyd_max(3)),
    "4": codebooks.on_grid(codebooks.lloyd_max(4)),
    "4 bytes": codebooks.on_grid(codebooks.Codebook(centroids=jnp.asarray(np.linspace(-1.3, 1.5, 16) ** 3 - 0.2))),
    "8": codebooks.lloyd_max(8),
}


def name_of(case: Any) -> str:
    """Name a case by what sets it apart from the usual one, a named tuple of its defaults."""
    apart = "-".join(str(x) for x, usual in zip(case, type(case)(), strict=True) if x != usual)
    return apart.replace("'", "") or "usual"


@functools.cache
def quick_to_compile() -> dict[str, bool]:
    """Give options that make the CPU compiler several times as fast, if it still has them."""
    options = {"xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quantizer(
    book: str, dim: int, rotation: str = "hadamard", dtype: Any = "float16", rule: Any = "norm", seed: int = 0
) -> Any:
    """Make a quantizer with one of `BOOKS`, or a trellis such as "2 trellis 64" of so many bits and states.

    "2 trellis 64 other" has other levels than are shipped.
    """
    rng = np.random.default_rng(seed)
    turn: Any = rotations.Identity(dim=dim)
    if rotation == "haar":
        turn = rotations.Dense(matrix=jnp.asarray(np.linalg.qr(rng.standard_normal((dim, dim)))[0], jnp.float32))
    elif rotation.startswith("hadamard"):
        turn = rotations.Hadamard(signs=jnp.asarray(rng.choice([-1, 1], (3 if "3" in rotation else 1, dim)), jnp.int8))
    if "trellis" in book:
        bits, _, states, *other = book.split()
        code = trellis.code((((int(bits),), dim),), states=int(states))
        if other:
            levels = rng.standard_normal(code.tables[0][0].shape).astype(np.float16).astype(np.float32)
            code = dataclasses.replace(code, tables=((jnp.asarray(levels),),))
        return trellis.Trellis(rotation=turn, code=code, scale=rule, scale_dtype=dtype)
    return quantizers.Scalar(rotation=turn, codebook=BOOKS[book], bits=int(book[0]), scale=rule, scale_dtype=dtype)


def filled(
    keys: Any,
    values: Any,
    *,
    layer: int,
    lengths: tuple[int, ...],
    sizes: tuple[float, float] = (1.0, 1.0),
    growth: tuple[float, float] = (1.0, 1.0),
    **shape: Any,
) -> KVCache:
    """Fill a cache, beyond the length of a row too.

    Args:
        keys: their quantizer.
        values: theirs.
        layer: whose lengths are given; those of other layers differ.
        lengths: tokens of the rows.
        sizes: of the keys and of the values.
        growth: of the scales of keys and of values, from a row's first tokens to its last.
        shape: as in `cache.init`.
    """
    rng = np.random.default_rng(0)
    shape |= {"layers": max(2, layer + 1), "batch": len(lengths), "kv_heads": KV_HEADS, "dtype": "float32"}
    empty = jax.eval_shape(functools.partial(cache.init, **shape), keys, values)

    def floats(leaf: Any, size: float) -> jax.Array:
        return jnp.asarray((rng.standard_normal(leaf.shape) * size).astype(leaf.dtype))

    def store(held: Store, made: Any, size: float, growth: float) -> Store:
        codes = held.codes
        if codes.scales is None:
            made, codes = held.quantizer, quantizers.Quantized(codes=floats(codes.codes, size))
        else:
            scales = size * made.dim**0.5 * np.exp(0.5 * rng.standard_normal(codes.scales.shape))
            scales *= growth ** np.linspace(0, 1, scales.shape[-1])
            codes = quantizers.Quantized(
                codes=jnp.asarray(rng.integers(0, 256, codes.codes.shape, dtype=np.uint8)),
                scales=jnp.asarray(scales.astype(codes.scales.dtype)),
            )
        return Store(quantizer=made, codes=codes, sinks=floats(held.sinks, size), window=floats(held.window, size))

    stacks = tuple(
        Stack(keys=store(held.keys, keys, sizes[0], growth[0]), values=store(held.values, values, sizes[1], growth[1]))
        for held in empty.stacks
    )
    others = 7 * (np.arange(shape["layers"])[:, None] - layer)
    length = jnp.asarray(np.clip(np.asarray(lengths) + others, 0, shape["capacity"]).astype(np.int32))
    return KVCache(stacks=stacks, length=length, exact_from=jnp.zeros_like(length), places=empty.places)


def indices(made: quantizers.Scalar, packed: np.ndarray) -> np.ndarray:
    """Give the levels' indices: fields and planes as `packing` documents them, and `Scalar`'s order of 4-bit codes."""
    start, shift, codes = 0, 0, np.zeros((), int)
    for width in {3: (2, 1)}.get(made.bits, (made.bits,)):
        part = packed[..., start : start + made.dim * width // 8].astype(int)
        planes = [(part >> width * p) % 2**width for p in range(8 // width)]
        codes = codes + (np.concatenate(planes, axis=-1) << shift)
        start, shift = start + part.shape[-1], shift + width
    return codes if made.bits != 4 else np.where(codes < 8, codes + 8, 15 - codes)


def decoded(made: Any, packed: np.ndarray) -> np.ndarray:
    """Look levels up, in float64: a trellis' windows are cut out of rings of bits."""
    if isinstance(made, quantizers.Scalar):
        return np.asarray(made.codebook.centroids, np.float64)[indices(made, packed)]
    ring = np.unpackbits(packed, axis=-1, bitorder="little").astype(int)
    width, count = ring.shape[-1] // made.dim, made.code.memory + ring.shape[-1] // made.dim
    windows = sum(np.roll(ring, -i, axis=-1)[..., ::width] << i for i in range(count))
    return np.asarray(made.code.tables[0][0], np.float64)[windows]


def tokens(held: Store, index: int, length: np.ndarray, exact_from: np.ndarray) -> np.ndarray:
    """Give the vectors that attention reads, in float64: [batch, kv_heads, capacity, dim]."""
    sinks, ring = (np.asarray(x)[index].astype(np.float64) for x in (held.sinks, held.window))
    made, codes = held.quantizer, np.asarray(held.codes.codes)[index]
    if not isinstance(made, quantizers.Exact):
        levels = decoded(made, codes)
        scales = np.asarray(held.codes.scales)[index].astype(np.float64) * made.dim**-0.5
        codes = scales[..., None] * (levels @ _rotation(made))
    x = np.concatenate([sinks, codes.astype(np.float64)], axis=2)
    for row, (stop, exact) in enumerate(zip(length, exact_from, strict=True)):
        for p in range(max(stop - ring.shape[2], exact, sinks.shape[2]), stop):
            x[row, :, p] = ring[row, :, p % ring.shape[2]]
    return x


def _rotation(made: Any) -> np.ndarray:
    return np.asarray(_restore()(made.rotation, np.eye(made.dim, dtype=np.float32)), np.float64)


@functools.cache
def _restore():
    return jax.jit(lambda rotation, y: rotation.unrotate(y), compiler_options=quick_to_compile())
