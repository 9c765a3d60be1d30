"""Where the parts of a cache live on a mesh of devices."""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant._stacks import KVCache, Stack, Store

T = TypeVar("T")


def shardings(cache: KVCache, mesh: Mesh, *, batch: str | None = None, kv_heads: str | None = None) -> KVCache:
    """Give the sharding of every array of a cache, as a tree of the cache's own shape.

    Rows and heads never look at each other in attention, so that splitting them costs no communication; quantizers are
    on every device.

    Args:
        cache: of arrays, or of `jax.ShapeDtypeStruct` as `jax.eval_shape` makes it.
        mesh: of devices.
        batch: axis of the mesh that splits the rows.
        kv_heads: axis of the mesh that splits the heads of keys and values.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the rows or heads.

    Example:
        >>> import numpy as np
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> c = cache.init(k, v, layers=2, batch=2, kv_heads=2, capacity=32)
        >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        >>> placed = jax.device_put(c, shardings(c, mesh, batch="data", kv_heads="model"))
        >>> placed.stacks[0].keys.codes.codes.sharding.spec
        PartitionSpec(None, 'data', 'model')
    """
    for name, axis, size in (("batch", batch, cache.batch), ("kv_heads", kv_heads, cache.kv_heads)):
        if axis is None:
            continue
        if axis not in mesh.shape:
            raise ValueError(f"{name} must be one of the mesh's axes, {', '.join(mesh.axis_names)}, got {axis!r}")
        if size % mesh.shape[axis]:
            raise ValueError(f"{name}={axis!r} splits {size} into {mesh.shape[axis]} parts, which does not divide it")

    def placed(tree: T, *spec: str | None) -> Any:
        return jax.tree.map(lambda _: NamedSharding(mesh, P(*spec)), tree)

    def store(held: Store) -> Store:
        parts = (placed(part, None, batch, kv_heads) for part in (held.codes, held.sinks, held.window))
        codes, sinks, window = parts
        return Store(quantizer=placed(held.quantizer), codes=codes, sinks=sinks, window=window)

    return KVCache(
        stacks=tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in cache.stacks),
        length=placed(cache.length, None, batch),
        exact_from=placed(cache.exact_from, None, batch),
        places=cache.places,
    )
