"""Read KV caches from snapshots that may be hostile; see `snapshot.load`."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from jaxquant import cache
from jaxquant._stacks import Stack, Store
from jaxquant._stored_quantizers import StoredQuantizers, on_device
from jaxquant.cache import KVCache
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.quantizers import Exact, PerLayer

KEY = "jaxquant.snapshot"  # of the metadata that describes the cache
VERSION = 1
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def members(places: Sequence[Sequence[int]], stack: int) -> list[int]:
    """List the layers of a stack in the order in which it holds them."""
    return sorted((i for i, place in enumerate(places) if place[0] == stack), key=lambda layer: places[layer][1])


def label(name: str, path: tuple[Any, ...]) -> str:
    """Name the tensor of one leaf of the codes."""
    return f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"


def is_bits(store: Store, leaf: Array) -> bool:
    """Tell whether a leaf of the codes holds bfloat16 numbers as their bits, which a file holds as numbers."""
    quantizer = store.quantizer.stacked if isinstance(store.quantizer, PerLayer) else store.quantizer
    return isinstance(quantizer, Exact) and leaf.dtype == jnp.uint16


class Part:
    """A snapshot being read. What it says is checked before anything is allocated from it."""

    def __init__(self, reader: v3.Reader, limits: Limits, threads: int, classes: Iterable[type]) -> None:
        self.reader, self.limits, self.threads = reader, limits, threads
        self.quantizers = StoredQuantizers(reader, classes)
        self.claimed = 0
        try:
            record = json.loads(reader.metadata[KEY])
        except KeyError:
            raise UnsupportedError(f"the file is no snapshot: its metadata has no {KEY!r}") from None
        except (ValueError, RecursionError):
            raise CorruptError(f"the metadata {KEY!r} is not valid JSON") from None
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise UnsupportedError(f"the snapshot is not of version {VERSION}")
        self.capacity = _integer(record, "capacity", 1)
        self.kv_heads = _integer(record, "kv_heads", 1)
        self.places: Any = record.get("places")
        self.stacks: Any = record.get("stacks")
        self.length, self.exact_from = self._counts("length"), self._counts("exact_from")
        self._check_places()

    def _counts(self, name: str) -> np.ndarray:
        tensor = self.reader.tensors.get(name)
        if tensor is None or tensor.dtype != "int32" or len(tensor.shape) != 2 or not tensor.nbytes:
            raise CorruptError(f"the snapshot has no int32 tensor {name!r} of layers and rows")
        values = self.reader.read(name)
        if values.min() < 0 or values.max() > self.capacity:
            raise CorruptError(f"{name!r} lies outside of 0 to the capacity, {self.capacity}")
        return values

    def _check_places(self) -> None:
        count = len(self.stacks) if isinstance(self.stacks, list) else 0
        pairs = self.places if isinstance(self.places, list) else []
        valid = all(isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair) for pair in pairs)
        if not count or not valid or len(pairs) != len(self.length) or self.exact_from.shape != self.length.shape:
            raise CorruptError("the snapshot's layers, stacks and lengths do not fit each other")
        held = [len(members(pairs, stack)) for stack in range(count)]
        if sorted(map(tuple, pairs)) != [(stack, i) for stack in range(count) for i in range(held[stack])] or 0 in held:
            raise CorruptError("the snapshot's layers do not fill its stacks")

    def cache(self, layers: Sequence[int] | None, rows: Sequence[int] | None, tokens: int | None) -> KVCache:
        """Read the part that was asked for."""
        count, batch = self.length.shape
        wanted, row_list = _chosen("layers", layers, count), _chosen("rows", rows, batch)
        if tokens is not None and tokens < 0:
            raise ValueError(f"tokens must not be negative, got {tokens}")
        stacks, places = [], [(0, 0)] * len(wanted)
        for index in range(len(self.stacks)):
            members = [(at, self.places[layer][1]) for at, layer in enumerate(wanted) if self.places[layer][0] == index]
            for place, (at, _) in enumerate(members):
                places[at] = (len(stacks), place)
            if members:
                indices = [i for _, i in members]
                stores = [self._store(index, half, indices, row_list, tokens) for half in ("keys", "values")]
                stacks.append(Stack(keys=stores[0], values=stores[1]))
        if len({half.quantizer.dim for stack in stacks for half in (stack.keys, stack.values)}) > 1:
            raise CorruptError("the snapshot's quantizers differ in dim")
        if any(stack.keys.sinks.shape != stack.values.sinks.shape for stack in stacks) or any(
            stack.keys.window.shape != stack.values.window.shape for stack in stacks
        ):
            raise CorruptError("keys and values of the snapshot differ in exact tokens")
        found = KVCache(
            stacks=tuple(stacks),
            length=jnp.asarray(self.length[np.ix_(wanted, row_list)]),
            exact_from=jnp.asarray(self.exact_from[np.ix_(wanted, row_list)]),
            places=tuple(places),
        )
        return found if tokens is None else cache.crop(found, tokens)

    def _store(self, index: int, half: str, layers: list[int], rows: list[int], tokens: int | None) -> Store:
        record = self.stacks[index].get(half) if isinstance(self.stacks[index], dict) else None
        if not isinstance(record, dict) or record.get("dtype") not in _FLOATS:
            raise CorruptError(f"the {half} of stack {index} are not described")
        sinks, window = _integer(record, "sinks", 0), _integer(record, "window", 0)
        if sinks >= self.capacity:
            raise CorruptError(
                f"{sinks} exact first tokens of the {half} of stack {index} leave none of {self.capacity}"
            )
        held = members(self.places, index)
        used = int(self.length[held].max())
        kept = used if tokens is None else min(tokens, used)
        name, slots = f"stack{index}/{half}", self.capacity - sinks
        quantizer, code = self.quantizers.rebuild(record.get("quantizer"), name, len(held), self.kv_heads)
        vector = jax.ShapeDtypeStruct((quantizer.dim,), record["dtype"])

        def take(tensor: str, item: jax.ShapeDtypeStruct, stored: int, wanted: int, room: int) -> Array:
            shape = (len(held), self.length.shape[1], self.kv_heads, stored, *item.shape)
            return self._leaf(tensor, item, shape, layers, rows, wanted, room)

        def coded(path: tuple[Any, ...], item: jax.ShapeDtypeStruct) -> Array:
            return take(label(name, path), item, max(used - sinks, 0), max(kept - sinks, 0), slots)

        return Store(
            quantizer=PerLayer(stacked=quantizer.at(jnp.array(layers)))
            if isinstance(quantizer, PerLayer)
            else quantizer,
            codes=jax.tree_util.tree_map_with_path(coded, code),
            sinks=take(f"{name}/sinks", vector, min(used, sinks), min(kept, sinks), sinks),
            window=take(f"{name}/window", vector, min(used, window), min(used, window), window),
        )

    def _leaf(
        self,
        name: str,
        item: jax.ShapeDtypeStruct,
        stored: tuple[int, ...],
        layers: list[int],
        rows: list[int],
        tokens: int,
        room: int,
    ) -> Array:
        """Read the first tokens of some layers and rows of one tensor into an array with room for more."""
        tensor = self.reader.tensors.get(name)
        bits = item.dtype == np.uint16 and tensor is not None and tensor.dtype == "bfloat16"
        dtype = "bfloat16" if bits else item.dtype.name
        if tensor is None or (tensor.shape, tensor.dtype, tensor.axis) != (stored, dtype, 3):
            found = tensor and f"{tensor.dtype}{list(tensor.shape)} with its tokens on axis {tensor.axis}"
            raise CorruptError(f"{name!r} must be {dtype}{list(stored)} with its tokens on axis 3, not {found}")
        shape = (len(layers), len(rows), self.kv_heads, room, *item.shape)
        self.claimed += math.prod(shape) * item.dtype.itemsize
        self.limits.check("decoded_bytes", self.claimed, "the cache")
        out = np.zeros(shape, ml_dtypes.bfloat16 if bits else item.dtype)
        if stored[:2] == shape[:2] and layers == list(range(stored[0])) and rows == list(range(stored[1])):
            out[:, :, :, :tokens] = self.reader.read(name, 0, tokens, threads=self.threads)
        else:
            for place, layer in enumerate(layers):
                for at, row in enumerate(rows):
                    part = self.reader.read(name, 0, tokens, at=(layer, row), threads=self.threads)
                    out[place, at, :, :tokens] = part
        return on_device(out.view(item.dtype), name)


def _integer(record: dict[str, Any], key: str, low: int) -> int:
    value = record.get(key)
    if type(value) is not int or not low <= value < 1 << 31:
        raise CorruptError(f"the snapshot's {key} is {str(value)[:40]!r}, not a number from {low}")
    return value


def _chosen(name: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    if wanted is None:
        return list(range(count))
    if not len(wanted):
        raise ValueError(f"{name} must not be empty; None takes all")
    if any(not -count <= i < count for i in wanted):
        raise IndexError(f"{name} must be from {-count} to {count - 1}, got {list(wanted)}")
    return [int(i) % count for i in wanted]
