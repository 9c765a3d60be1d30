"""Caches as Orbax checkpoints: every device writes and reads its own part, on the same mesh or on another.

Orbax comes with Flax. For a single file without Orbax, see `jaxquant.snapshot`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from jaxquant import _descriptions
from jaxquant._stacks import KVCache, Stack, Store
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer

VERSION = 1
_CLASSES = {_descriptions.name_of(kind): kind for kind in (KVCache, Stack, Store)}


def save(folder: str | Path, cache: KVCache, *, force: bool = False) -> None:
    """Write a cache, sharded or not, and wait until it is on the disk.

    Args:
        folder: is made; it holds the arrays as Orbax writes them, and a description of the rest.
        cache: to save.
        force: replace a folder that is there.

    Raises:
        ValueError: the folder is there.
        TypeError: a quantizer holds something that is neither an array, a plain value nor a pytree dataclass.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> held = cache.init(k, v, layers=1, batch=1, kv_heads=2, capacity=32)
        >>> held = cache.append(held, 0, jnp.ones((1, 5, 2, 64)), jnp.ones((1, 5, 2, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/cache", held)
        ...     restore(f"{folder}/cache").length
        Array([[5]], dtype=int32)
    """
    leaves, structure = jax.tree.flatten(cache)
    names = jax.tree.unflatten(structure, [jnp.zeros(()) for _ in leaves])
    order: dict[str, Any] = {}
    node = _descriptions.describe(names, "cache", order)
    # Descriptions name arrays in the order of the fields, which is the order of the leaves.
    named = dict(zip(order, leaves, strict=True))
    empty = {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in named.items() if not leaf.size}
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave({name: leaf for name, leaf in named.items() if leaf.size}),
        jaxquant=ocp.args.JsonSave({"version": VERSION, "cache": node, "empty": empty}),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(folder).absolute(), args=args, force=force)


def restore(
    folder: str | Path,
    *,
    shardings: Callable[[KVCache], Any] | None = None,
    classes: Iterable[type] = (),
    limits: Limits | None = None,
) -> KVCache:
    """Read a cache.

    Args:
        folder: that `save` wrote.
        shardings: is given the cache with a `jax.ShapeDtypeStruct` for each array, and returns a tree of shardings, as
            `jaxquant.sharding.shardings` does; by default everything goes to the first device.
        classes: quantizers, rotations and so on from outside of jaxquant that the folder may name.
        limits: what the folder may claim.

    Returns:
        The cache, bit for bit.

    Raises:
        FileNotFoundError: there is no such folder.
        UnsupportedError: no cache, one of a later version, or one that needs a class not in `classes`.
        CorruptError: its arrays do not fit each other.
        LimitError: it claims more than `limits` allow; nothing was allocated for it.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if not (path / "jaxquant").is_dir() or not (path / "arrays").is_dir():
        raise UnsupportedError(f"{path} is no checkpoint of a cache: it has no parts `jaxquant` and `arrays`")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        record = checkpointer.restore(path, args=ocp.args.Composite(jaxquant=ocp.args.JsonRestore()))["jaxquant"]
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise UnsupportedError(f"{path} is not of version {VERSION}")
        stored = _stored(path) | _empty(record.get("empty"))
        (limits or Limits()).check("decoded_bytes", sum(map(_nbytes, stored.values())), str(path))
        found = _rebuilt(record.get("cache"), stored, classes)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, found) if shardings is None else shardings(found)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), found, places
        )
        leaves, structure = jax.tree.flatten(wanted)
        target = dict(zip(_names(record["cache"]), leaves, strict=True))
        full = {name: leaf for name, leaf in target.items() if leaf.size}
        arrays = checkpointer.restore(path, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(full)))["arrays"]
    for name, leaf in target.items():
        if not leaf.size:
            arrays[name] = jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return jax.tree.unflatten(structure, [arrays[name] for name in target])


def _stored(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path / "arrays").item_metadata.tree
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.items()}


def _empty(record: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Read the shapes of arrays without elements, which Orbax does not store."""
    try:
        found = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype) in record.items()}
        if any(leaf.size for leaf in found.values()):
            raise ValueError("an array is not empty")
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptError(f"the empty arrays are not described: {str(error)[:200]}") from None
    return found


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _rebuilt(node: Any, stored: dict[str, jax.ShapeDtypeStruct], classes: Iterable[type]) -> KVCache:
    """Rebuild a cache of shapes, and check that they fit each other."""
    known = _CLASSES | {_descriptions.name_of(kind): kind for kind in classes}
    try:
        found = _descriptions.rebuild(node, stored.__getitem__, known)  # pyright: ignore[reportArgumentType]
    except KeyError as missing:
        raise CorruptError(f"the array {missing} is missing") from None
    if not isinstance(found, KVCache) or {*_names(node)} != stored.keys():
        raise CorruptError("what is described is no cache, or not of these arrays")
    try:
        _check(found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the arrays do not fit each other: {str(error)[:200]}") from None
    return found


def _check(cache: KVCache) -> None:
    layers, batch = cache.length.shape
    held = [stack.layers for stack in cache.stacks]
    places = sorted(tuple(place) for place in cache.places)
    if len(places) != layers or places != [(stack, i) for stack, size in enumerate(held) for i in range(size)]:
        raise ValueError("the layers do not fill the stacks")
    for stack in cache.stacks:
        for store in (stack.keys, stack.values):
            lead = (stack.layers, batch, cache.kv_heads)
            x = jax.ShapeDtypeStruct((batch, cache.kv_heads, cache.capacity - stack.sinks, cache.dim), jnp.float32)
            code = jax.eval_shape(_code, store.quantizer, x)
            wanted = [((stack.layers, *leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(code)]
            found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(store.codes)]
            exact = [(*lead, size, cache.dim) for size in (stack.sinks, stack.window)]
            if wanted != found or [store.sinks.shape, store.window.shape] != exact:
                raise ValueError(f"codes must be {wanted}, got {found}")
    if cache.exact_from.shape != (layers, batch):
        raise ValueError("exact_from must be [layers, batch]")


def _code(quantizer: Quantizer | PerLayer, x: Array) -> Any:
    return (quantizer.at(0) if isinstance(quantizer, PerLayer) else quantizer).quantize(x)


def _names(node: Any) -> list[str]:
    """List the arrays of a description in the order of the leaves."""
    match node:
        case {"array": name}:
            return [name]
        case {"items": items}:
            return [name for item in items for name in _names(item)]
        case {"fields": fields}:
            return [name for field in fields.values() for name in _names(field)]
        case _:
            return []
