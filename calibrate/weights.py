"""Weights in a few bits: the directions of the values in the widths that they are worth, and all other layers alike.

A direction of a kv head is one output of W_V with the inputs of W_O that read it. Its error in the layer's output is
that of W_V times what W_O makes of it, plus that of W_O times the size of the values, which is 1 in the basis that
`calibrate.absorb` put into the weights. Bits go where they save most; none at all is what deleting the direction is, so
that the rank falls exactly where that is cheapest.

References:
    S. Salfati, "Quantization dominates rank reduction for KV-cache compression", arXiv:2604.11501 (quantize the values'
    eigenbasis instead of cutting it off).
    A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant", arXiv:2504.19874 (the code of a vector).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxquant import quantizers
from jaxquant.methods import turboquant
from jaxquant.models.loading import Model, hugging_face_name

WIDTHS = tuple(range(9))
_GROUP = 128  # numbers that share a scale


class Packed(NamedTuple):
    """A matrix in codes.

    Attributes:
        axis: of the kernel along which its vectors lie.
        bits: of each vector; 0 means that it is zero.
        codes: by width, the vectors of that width in order: codes and scales.
    """

    axis: int
    bits: Int[np.ndarray, " vectors"]
    codes: dict[int, quantizers.Quantized]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, and one for each vector's width where they differ."""
        widths = self.bits.size if len(set(self.bits.tolist())) > 1 else 1
        return widths + sum(code.nbytes for code in self.codes.values())


@functools.cache
def coder(length: int, bits: int) -> quantizers.Scalar:
    """Give the quantizer of pieces of vectors of some length: one and the same wherever weights are packed."""
    dim = next((size for size in range(min(_GROUP, length), 1, -1) if length % size == 0 and size % 2 == 0), None)
    if dim is None:
        raise ValueError(f"vectors of {length} numbers cannot be cut into pieces of an even length")
    return turboquant.mse(jax.random.key(0), dim=dim, bits=bits, scale="least_squares", rounds=1, fused=False)


def encode(vectors: Float[np.ndarray, "vectors length"], bits: int) -> quantizers.Quantized:
    """Code vectors in pieces."""
    made = coder(vectors.shape[1], bits)
    return quantizers.quantize(made, jnp.asarray(vectors, jnp.float32).reshape(len(vectors), -1, made.dim))


def decode(code: quantizers.Quantized, length: int, bits: int) -> Float[np.ndarray, "vectors length"]:
    """Invert `encode`, but for what was lost."""
    found = quantizers.dequantize(coder(length, bits), code)
    return np.asarray(found).reshape(found.shape[0], length)


def pack(kernel: Float[np.ndarray, "inputs outputs"], bits: Int[np.ndarray, " vectors"], *, axis: int) -> Packed:
    """Code the vectors of a kernel along an axis, each in its own width."""
    vectors, codes = np.moveaxis(kernel, axis, 1), {}
    for width in sorted(set(bits.tolist()) - {0}):
        whole = encode(vectors, width)  # of all vectors: one shape is compiled, however many have the width
        codes[width] = jax.tree.map(lambda leaf, width=width: np.asarray(leaf)[bits == width], whole)
    return Packed(axis, bits.astype(np.uint8), codes)


def unpack(packed: Packed, shape: tuple[int, int]) -> Float[np.ndarray, "inputs outputs"]:
    """Decode a kernel."""
    out = np.zeros((shape[1 - packed.axis], shape[packed.axis]), np.float32)
    for width, code in packed.codes.items():
        chosen = packed.bits == width

        def filled(leaf: Any) -> np.ndarray:
            return np.concatenate([leaf, np.zeros((len(out) - len(leaf), *leaf.shape[1:]), leaf.dtype)])

        out[chosen] = decode(jax.tree.map(filled, code), out.shape[1], width)[: chosen.sum()]
    return np.ascontiguousarray(np.moveaxis(out, 1, packed.axis))


def allot(model: Model, bits: float | int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Choose the widths of every direction of the values, for the least error of all layers' outputs.

    Args:
        model: whose value basis is absorbed, or not.
        bits: mean of W_V and W_O.

    Returns:
        For each layer the widths of W_V's outputs and of W_O's inputs.

    Raises:
        ValueError: `bits` is not in 0..8.
    """
    if not 0 <= bits <= max(WIDTHS):
        raise ValueError(f"bits must be from 0 to {max(WIDTHS)}, got {bits}")
    losses, costs = [], []
    a = model.architecture
    shared = a.heads // a.kv_heads
    for layer in model.decoder.layers:
        values, outputs = _kernels(layer)
        reads = np.sum(outputs.reshape(a.kv_heads, shared, a.dim, a.hidden) ** 2, axis=(1, 3)).reshape(-1)
        losses += [_errors(values.T) * reads[:, None], _errors(outputs)]
        costs += [len(values.T), len(outputs)]
    # Every bit of a vector costs the same, and saves less than the bit before: the best ones are taken.
    saved = np.minimum.accumulate(-np.diff(np.concatenate(losses), axis=1), axis=1)
    best = np.argsort(-saved.reshape(-1), kind="stable")[: round(bits * len(saved))]
    chosen = np.bincount(best // saved.shape[1], minlength=len(saved))
    parts = np.split(chosen, np.cumsum(costs)[:-1])
    return list(zip(parts[::2], parts[1::2], strict=True))


def compress(
    model: Model,
    bits: float | int,
    *,
    everything: bool = False,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> tuple[Model, dict[str, Packed]]:
    """Put the weights of a model into codes.

    Args:
        model: left as it is.
        bits: mean of the weights that are coded.
        everything: the linear layers beside W_V and W_O too, all their vectors in the same whole number of bits.
        progress: called with the layers done and all of them.

    Returns:
        The model with the weights that the codes stand for, and the codes by the name of the tensor.

    Raises:
        ValueError: `bits` is not in 0..8, or not a whole number from 1 where `everything` is asked for.
    """
    if everything and (bits != round(bits) or not 1 <= bits <= 8):
        raise ValueError(f"bits must be a whole number from 1 to 8 where all layers are coded, got {bits}")
    graph, state = nnx.split(model.decoder)
    decoder = nnx.merge(graph, state)
    packed: dict[str, Packed] = {}
    for i, (layer, (values, outputs)) in enumerate(zip(decoder.layers, allot(model, bits), strict=True)):
        chosen: dict[tuple[str, str], tuple[np.ndarray, int]] = {
            ("self_attn", "v_proj"): (values, 0), ("self_attn", "o_proj"): (outputs, 1)
        }  # fmt: skip
        if everything:
            for block, name in (
                ("self_attn", "q_proj"), ("self_attn", "k_proj"),
                ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"),
            ):  # fmt: skip
                width = getattr(getattr(layer, block), name).kernel[...].shape[1]
                chosen[block, name] = (np.full(width, int(bits)), 0)
        for (block, name), (widths, axis) in chosen.items():
            linear: Any = getattr(getattr(layer, block), name)
            kernel = np.asarray(linear.kernel[...], np.float32)
            coded = pack(kernel, widths, axis=axis)
            linear.kernel = nnx.Param(jnp.asarray(unpack(coded, kernel.shape), linear.kernel[...].dtype))
            packed[hugging_face_name(("layers", i, block, name, "kernel"))] = coded
        progress(i + 1, model.architecture.layers)
    return dataclasses.replace(model, decoder=decoder), packed


def cut(model: Model, bits: float | int) -> Model:
    """Keep the best directions of every head in 16 bits and delete the rest: what `compress` is compared with.

    Args:
        model: whose value basis is absorbed, so that directions come in falling order of worth.
        bits: mean of W_V and W_O; 16 keeps everything.
    """
    a = model.architecture
    kept = round(a.dim * bits / 16)
    graph, state = nnx.split(model.decoder)
    decoder = nnx.merge(graph, state)
    for layer in decoder.layers:
        attention = layer.self_attn
        values, outputs = _kernels(layer)
        values = values.reshape(a.hidden, a.kv_heads, a.dim).copy()
        outputs = outputs.reshape(a.heads, a.dim, a.hidden).copy()
        values[:, :, kept:], outputs[:, kept:] = 0, 0
        for linear, kernel in ((attention.v_proj, values), (attention.o_proj, outputs)):
            old = linear.kernel[...]
            linear.kernel = nnx.Param(jnp.asarray(kernel.reshape(old.shape), jnp.bfloat16).astype(old.dtype))
    return dataclasses.replace(model, decoder=decoder)


def _kernels(layer: Any) -> list[np.ndarray]:
    return [np.asarray(linear.kernel[...], np.float32) for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj)]


def _errors(vectors: Float[np.ndarray, "vectors length"]) -> Float[np.ndarray, "vectors widths"]:
    """Give the squared error of every vector in every width."""
    found = [np.sum(vectors**2, axis=1)]
    for bits in WIDTHS[1:]:
        found.append(np.sum((vectors - decode(encode(vectors, bits), vectors.shape[1], bits)) ** 2, axis=1))
    return np.minimum.accumulate(np.stack(found, axis=1), axis=1).astype(np.float64)


def dense_nbytes(model: Model, names: Any) -> int:
    """Give the bytes of some tensors in 16 bits."""
    state = {hugging_face_name(path): weight for path, weight in nnx.to_flat_state(nnx.state(model.decoder))}
    return sum(2 * math.prod(state[name][...].shape) for name in names)
