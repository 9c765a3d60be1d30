"""Chunks of a KV cache as bytes and back, for stores that keep such chunks elsewhere, as LMCache does.

A chunk is an array [2, layers, tokens, heads, dim], keys first. Its bytes are one QATC v3 file, whose tensors have the
tokens on axis 0, so that a reader fetches any range of tokens without the rest: `keys` and `values`
[tokens, layers, heads, dim] where the chunk is kept as it is, or the codes of any quantizer, such as `keys/0/codes`
[tokens, layers, heads, bytes]. The quantizers travel along, or both sides have them and the bytes name them by a hash.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant import _descriptions, _stacks
from jaxquant._stored_quantizers import StoredQuantizers, code_of, on_device
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer

KEY = "jaxquant.chunk"  # of the metadata that describes the chunk
VERSION = 1
CHUNK = 1 << 20  # bytes that a read decodes at least
HALVES = ("keys", "values")
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("f2"), "float32": np.dtype("f4")}
_MOST = 1 << 31

Quantizers = Quantizer | Sequence[Quantizer]


def serialize(
    chunk: np.ndarray | Array,
    *,
    keys: Quantizers | None = None,
    values: Quantizers | None = None,
    embed: bool = True,
    profile: str = "fast",
    chunk_bytes: int = CHUNK,
    threads: int = 1,
) -> bytes:
    """Write a chunk as bytes.

    Args:
        chunk: keys and values [2, layers, tokens, heads, dim] in bfloat16, float16 or float32.
        keys: quantizer of the keys, or one for each layer; None keeps every bit of keys and values.
        values: likewise of the values.
        embed: write the quantizers too. Those of a calibrated model are larger than most chunks: without them,
            `deserialize` must be given the same.
        profile: "fast", "balanced" or "small".
        chunk_bytes: that a read decodes at least: fewer make single tokens cheaper to reach, more compress better.
        threads: that encode at a time.

    Raises:
        ValueError: shape or dtype is another one, or only one half has a quantizer.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> chunk = np.random.default_rng(0).normal(size=(2, 2, 256, 4, 64)).astype(np.float16)
        >>> bool((deserialize(serialize(chunk)) == chunk).all())
        True
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> data = serialize(chunk, keys=keys, values=values)
        >>> deserialize(data, start=100, stop=101).shape, round(len(data) / chunk.nbytes, 2)
        ((2, 2, 1, 4, 64), 0.25)
    """
    if (keys is None) != (values is None):
        raise ValueError("keys and values must both be quantizers, or both None for a chunk that keeps every bit")
    array = chunk if keys is not None else np.asarray(chunk)
    if array.ndim != 5 or array.shape[0] != 2 or array.dtype.name not in _DTYPES or not math.prod(array.shape[3:]):
        raise ValueError(
            f"chunk must be [2, layers, tokens, heads, dim] in {', '.join(_DTYPES)}, "
            f"got {array.dtype.name}{list(array.shape)}"
        )
    record: dict[str, Any] = {"version": VERSION, "shape": array.shape, "dtype": array.dtype.name}
    tensors: dict[str, np.ndarray] = {}
    for half, x, quantizer in zip(HALVES, array, (keys, values), strict=True):
        if quantizer is None:
            tensors[half] = np.swapaxes(np.asarray(x), 0, 1)
        else:
            record[half] = _coded(half, jnp.asarray(x), quantizer, tensors, embed)
    metadata = {KEY: json.dumps(record)}
    return v3.encode(tensors, profile=profile, chunk=chunk_bytes, threads=threads, metadata=metadata)


def deserialize(
    data: v3.Source,
    *,
    start: int = 0,
    stop: int | None = None,
    keys: Quantizers | None = None,
    values: Quantizers | None = None,
    size: int | None = None,
    classes: Iterable[type] = (),
    limits: Limits | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Read a chunk, or some of its tokens, into an array [2, layers, tokens, heads, dim] of the dtype that it had.

    Args:
        data: a buffer, a path, a seekable file object, or a callable `read(offset, length)`.
        start: first token.
        stop: token after the last; None reads to the end.
        keys: quantizers that the chunk was coded with, where it does not hold them.
        values: likewise.
        size: bytes of the file, needed for a callable only.
        classes: quantizers, rotations and so on from outside of jaxquant that the file may name.
        limits: what the file may claim.
        threads: that decode at a time.

    Raises:
        UnsupportedError: no chunk, or one of a later version, or one that needs a class not in `classes` or other
            quantizers.
        CorruptError: it contradicts itself or a checksum.
        LimitError: it claims more than `limits` allow; nothing was allocated for it.
        IndexError: the tokens are not in the chunk.
    """
    limits = limits or Limits()
    with v3.open(data, size=size, limits=limits) as reader:
        record, shape = _record(reader)
        tokens = shape[2]
        stop = tokens if stop is None else stop
        if not 0 <= start <= stop <= tokens:
            raise IndexError(f"tokens {start} to {stop} lie outside of {tokens}")
        dtype = _DTYPES[record["dtype"]]
        wanted = (*shape[:2], stop - start, *shape[3:])
        limits.check("decoded_bytes", math.prod(wanted) * max(dtype.itemsize, 4), "the chunk")
        out = np.empty(wanted, dtype)
        stored = StoredQuantizers(reader, classes)
        for half, place, given in zip(HALVES, out, (keys, values), strict=True):
            groups = record.get(half)
            if groups is None:
                item = jax.ShapeDtypeStruct(shape[3:], dtype)
                read = _read(reader, half, item, (tokens, shape[1]), start, stop, threads)
                place[...] = np.swapaxes(read, 0, 1)
                continue
            known = (
                {} if given is None else {hashed: joined for _, joined, hashed, *_ in _grouped(half, given, shape[1])}
            )
            for group, layers in enumerate(_members(groups, half, shape[1])):
                name, node, hashed = f"{half}/{group}", groups[group].get("quantizer"), groups[group].get("hash")
                if node is not None:
                    quantizer, code = stored.rebuild(node, name, len(layers), shape[3])
                elif isinstance(hashed, str) and hashed in known:
                    quantizer = known[hashed]
                    code = code_of(quantizer, shape[3])
                else:
                    raise UnsupportedError(f"{name} is coded by a quantizer that is not in the file: pass {half}=")
                if quantizer.dim != shape[4]:
                    raise CorruptError(f"{name}: its quantizer is for vectors of {quantizer.dim}, not of {shape[4]}")

                def leaf(path: tuple[Any, ...], item: jax.ShapeDtypeStruct, name=name, layers=layers) -> Array:
                    label = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
                    item = jax.ShapeDtypeStruct((shape[3], *item.shape), item.dtype)
                    read = _read(reader, label, item, (tokens, len(layers)), start, stop, threads)
                    return on_device(np.moveaxis(read, 0, 2), label)

                codes = jax.tree_util.tree_map_with_path(leaf, code)
                with np.errstate(over="ignore"):
                    place[layers] = np.swapaxes(np.asarray(_decode(quantizer, codes)), 1, 2).astype(dtype)
        return out


def _coded(
    half: str, x: Array, quantizer: Quantizers, tensors: dict[str, np.ndarray], embed: bool
) -> list[dict[str, Any]]:
    """Code [layers, tokens, heads, dim], layers whose quantizers differ in their numbers alone together."""
    groups = []
    for group, (layers, joined, hashed, node, arrays) in enumerate(_grouped(half, quantizer, x.shape[0])):
        if joined.dim != x.shape[-1]:
            raise ValueError(
                f"{half}: the quantizer is for vectors of {joined.dim}, and the chunk's have {x.shape[-1]}"
            )
        codes = _quantize(joined, jnp.swapaxes(x[jnp.array(layers)], 1, 2))
        for path, leaf in jax.tree_util.tree_leaves_with_path(codes):
            label = f"{half}/{group}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            tensors[label] = np.moveaxis(np.asarray(leaf), 2, 0)
        groups.append({"layers": layers, "hash": hashed, "quantizer": node if embed else None})
        tensors |= arrays if embed else {}
    return groups


def _grouped(half: str, quantizer: Quantizers, layers: int) -> Iterator[tuple[list[int], Any, str, Any, dict]]:
    """Yield the layers of every group, their quantizer, its hash, its description and its arrays."""
    each = _stacks.each_layer(half, quantizer, layers)
    alike: dict[Any, list[int]] = {}
    for layer, one in enumerate(each):
        alike.setdefault(_stacks.form(one), []).append(layer)
    for group, members in enumerate(alike.values()):
        joined, arrays = _stacks.joined([each[layer] for layer in members]), {}
        node = _descriptions.describe(joined, f"{half}/{group}/quantizer", arrays)
        digest = hashlib.blake2b(json.dumps(node).encode(), digest_size=16)
        for array in arrays.values():
            digest.update(f"{array.dtype.name}{array.shape}".encode() + array.tobytes())
        yield members, joined, digest.hexdigest(), node, arrays


@jax.jit
def _quantize(quantizer: Quantizer | PerLayer, x: Array) -> PyTree[Array]:
    if isinstance(quantizer, PerLayer):
        return jax.vmap(lambda one, part: one.quantize(part))(quantizer.stacked, x)
    return quantizer.quantize(x)


@jax.jit
def _decode(quantizer: Quantizer | PerLayer, codes: PyTree[Array]) -> Array:
    if isinstance(quantizer, PerLayer):
        return jax.vmap(lambda one, part: one.restore(one.expand(part)))(quantizer.stacked, codes)
    return quantizer.restore(quantizer.expand(codes))


def _record(reader: v3.Reader) -> tuple[dict[str, Any], tuple[int, ...]]:
    try:
        record = json.loads(reader.metadata[KEY])
    except KeyError:
        raise UnsupportedError(f"the file is no chunk of a KV cache: its metadata has no {KEY!r}") from None
    except (ValueError, RecursionError):
        raise CorruptError(f"the metadata {KEY!r} is not valid JSON") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UnsupportedError(f"the chunk is not of version {VERSION}")
    shape = record.get("shape")
    sizes = tuple(n for n in shape if type(n) is int and 0 <= n < _MOST) if isinstance(shape, list) else ()
    if len(sizes) != 5 or shape != list(sizes) or sizes[0] != 2 or not sizes[3] * sizes[4]:
        raise CorruptError("the chunk's shape is not valid")
    if record.get("dtype") not in _DTYPES:
        raise CorruptError("the chunk's dtype is not valid")
    return record, sizes


def _members(groups: Any, half: str, layers: int) -> list[list[int]]:
    """List the layers of every group; each layer must be in one."""
    found: list[Any] = []
    for group in groups if isinstance(groups, list) else [None]:
        found.append(group.get("layers") if isinstance(group, dict) else None)
    valid = all(isinstance(layers, list) and layers for layers in found)
    members = [layer for layers in found for layer in layers] if valid else []
    unique = {layer for layer in members if type(layer) is int and 0 <= layer < layers}
    if len(members) != layers or len(unique) != layers:
        raise CorruptError(f"the {half} do not have one quantizer for each of {layers} layers")
    return found


def _read(
    reader: v3.Reader,
    name: str,
    item: jax.ShapeDtypeStruct,
    lead: tuple[int, int],
    start: int,
    stop: int,
    threads: int,
) -> np.ndarray:
    tensor, shape = reader.tensors.get(name), (*lead, *item.shape)
    if tensor is None or (tensor.shape, tensor.dtype, tensor.axis) != (shape, item.dtype.name, 0):
        found = tensor and f"{tensor.dtype}{list(tensor.shape)}"
        raise CorruptError(f"{name!r} must be {item.dtype.name}{list(shape)} with its tokens on axis 0, not {found}")
    return reader.read(name, start, stop, threads=threads)
