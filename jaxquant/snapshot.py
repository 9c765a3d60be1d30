"""KV caches as files: save one, load all or part of it, and continue decoding with the same bits.

A snapshot is one QATC v3 file, which any reader of that format can take apart: `stack0/keys/codes` and its like are
tensors [layers, batch, kv_heads, tokens, ...] with the tokens on axis 3. Only tokens that are held are written; the
rest of the capacity is allocated on load. The quantizers travel along, as their arrays and the names of their classes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from jaxquant import _descriptions, _snapshot_reader, _stacks
from jaxquant._stacks import Store
from jaxquant.cache import KVCache
from jaxquant.codecs import v3, workers
from jaxquant.codecs.limits import Limits

CHUNK = 1 << 19  # bytes: of short rows a layer at a time can be fetched alone


def save(
    path: Any,
    cache: KVCache,
    *,
    profile: str = "balanced",
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> None:
    """Write a cache to a file, in place of what was there before; a reader never sees half of it.

    What a row held before `crop` shortened it is not written.

    Args:
        path: of the file, or a binary file object, which may be a pipe.
        cache: to save.
        profile: "fast" for transfer, "balanced", or "small" for archives.
        metadata: strings to keep with it, such as the model's name and the prompt's hash; `qatc.open(path).metadata`.
        threads: chunks encoded at a time; all cores by default.

    Raises:
        TypeError: a quantizer holds something that is neither an array, a plain value nor a pytree dataclass.

    Example:
        >>> import tempfile
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> held = cache.init(k, v, layers=2, batch=1, kv_heads=2, capacity=4096, window=16)
        >>> for layer in range(2):
        ...     held = cache.append(held, layer, jnp.ones((1, 100, 2, 64)), jnp.ones((1, 100, 2, 64)))
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     save(file.name, held)
        ...     again, second = load(file.name), load(file.name, layers=[1])
        >>> again.capacity, int(again.length[1, 0]), second.layers
        (4096, 100, 1)
        >>> bool((cache.materialize(again, 1)[0] == cache.materialize(held, 1)[0]).all())
        True
    """
    texts = dict(metadata or {})
    if _snapshot_reader.KEY in texts:
        raise ValueError(f"metadata must not have the key {_snapshot_reader.KEY!r}, which describes the cache")
    length, exact_from = np.asarray(cache.length), np.asarray(cache.exact_from)
    small: dict[str, np.ndarray] = {"length": length, "exact_from": exact_from}
    stacks = []
    for index, stack in enumerate(cache.stacks):
        stacks.append({})
        for half, store in {"keys": stack.keys, "values": stack.values}.items():
            name = f"stack{index}/{half}/quantizer"
            quantizer = _descriptions.describe(store.quantizer, name, small)
            sizes = {"sinks": store.sinks.shape[3], "window": store.window.shape[3], "dtype": store.sinks.dtype.name}
            stacks[-1][half] = {"quantizer": quantizer, **sizes}
    record = {
        "version": _snapshot_reader.VERSION,
        "capacity": cache.capacity,
        "kv_heads": cache.kv_heads,
        "places": cache.places,
        "stacks": stacks,
    }
    texts[_snapshot_reader.KEY] = json.dumps(record)
    with v3.Writer(
        path, profile=profile, chunk=CHUNK, metadata=texts, threads=threads or workers.available()
    ) as writer:
        for name, values in small.items():
            writer.add(name, values)
        for index, stack in enumerate(cache.stacks):
            layers = _snapshot_reader.members(cache.places, index)
            for half, store in {"keys": stack.keys, "values": stack.values}.items():
                _write(writer, f"stack{index}/{half}", store, length[layers], exact_from[layers])


def _write(writer: v3.Writer, name: str, store: Store, length: np.ndarray, exact_from: np.ndarray) -> None:
    """Write what a store holds: nothing beyond the longest row, and zeros where a row holds nothing."""
    sinks, window, used = store.sinks.shape[3], store.window.shape[3], int(length.max())

    def put(label: str, leaf: Array, position: np.ndarray, first: int | np.ndarray) -> None:
        values = np.array(leaf[:, :, :, : position.shape[2]])
        unheld = (position < first) | (position >= length[:, :, None])
        np.moveaxis(values, 2, 3)[unheld] = 0
        # The exponents of numbers compress, those of words of 16 bits are not known as such.
        writer.add(label, values.view(ml_dtypes.bfloat16) if _snapshot_reader.is_bits(store, leaf) else values, axis=3)

    slots = np.arange(max(used - sinks, 0))[None, None]
    for path, leaf in jax.tree_util.tree_leaves_with_path(store.codes):
        put(_snapshot_reader.label(name, path), leaf, slots + sinks, 0)
    put(f"{name}/sinks", store.sinks, np.arange(min(used, sinks))[None, None], 0)
    ring = np.asarray(_stacks.ring_positions(jnp.asarray(length.reshape(-1)), window)) if window else np.empty(0)
    ring = ring.reshape(*length.shape, window)[:, :, : min(used, window)]
    put(f"{name}/window", store.window, ring, np.maximum(exact_from, 0)[:, :, None])


def load(
    source: Any,
    *,
    layers: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    tokens: int | None = None,
    size: int | None = None,
    classes: Iterable[type] = (),
    limits: Limits | None = None,
    threads: int | None = None,
) -> KVCache:
    """Read a cache, or some of its layers, rows and first tokens, without fetching the rest.

    Args:
        source: a path (mapped into memory), buffer, seekable file object, or a callable `read(offset, length)`.
        layers: which, in the order wanted; all by default.
        rows: of the batch, which, in the order wanted; all by default.
        tokens: to keep of each row, from its start, as `cache.crop` does; the capacity stays.
        size: bytes of the file, needed for a callable only.
        classes: quantizers, rotations and so on from outside of jaxquant that the file may name.
        limits: what the file may claim, the memory of the cache included.
        threads: chunks decoded at a time; all cores by default.

    Returns:
        The cache. Attention over it gives the same bits as over the one that was saved.

    Raises:
        UnsupportedError: not a snapshot, one of a later version, or one that needs a class not in `classes`.
        CorruptError: the file contradicts itself or a checksum.
        LimitError: it claims more than `limits` allow; nothing was allocated for it.
        IndexError: a layer or row is not in the cache.
        ValueError: no layers or rows are asked for, or a negative number of tokens.
    """
    limits = limits or Limits()
    with v3.open(source, size=size, limits=limits) as reader:
        part = _snapshot_reader.Part(reader, limits, threads or workers.available(), classes)
        return part.cache(layers, rows, tokens)
