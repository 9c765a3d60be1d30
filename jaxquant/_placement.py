"""Where the parts of a cache are: which axes of a mesh rows, kv heads and tokens go along, for every array of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxquant._spread import Spread
from jaxquant._stacks import KVCache, Stack, Store
from jaxquant.mixed import Mixed
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a mesh the axes of a cache go along.

    Attributes:
        mesh: of devices.
        batch: the axis for rows (data parallel), None to have all of them everywhere.
        kv_heads: for kv heads, and the query heads that share them (tensor parallel).
        tokens: for tokens (sequence parallel).
        page: tokens that stay together where tokens are dealt out.

    Raises:
        ValueError: an axis is not one of the mesh, or is used twice.

    Example:
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> Layout(mesh, kv_heads="model").queries == PartitionSpec(None, "model")
        True
    """

    mesh: Mesh
    batch: str | None = None
    kv_heads: str | None = None
    tokens: str | None = None
    page: int = 128

    def __post_init__(self):
        """Check the axes."""
        used = {
            name: getattr(self, name) for name in ("batch", "kv_heads", "tokens") if getattr(self, name) is not None
        }
        for name, axis in used.items():
            if axis not in self.mesh.axis_names:
                raise ValueError(f"{name} must be an axis of the mesh, one of {self.mesh.axis_names}, got {axis!r}")
        if len(set(used.values())) < len(used):
            raise ValueError(f"batch, kv_heads and tokens must go along different axes, got {used}")
        if self.page < 1:
            raise ValueError(f"page must be at least 1, got {self.page}")

    @property
    def queries(self) -> PartitionSpec:
        """Of queries and outputs [batch, heads, ...] of a decode step."""
        return PartitionSpec(self.batch, self.kv_heads)

    @property
    def chunk(self) -> PartitionSpec:
        """Of queries, keys, values and outputs [batch, new, heads, ...] of a chunk."""
        return PartitionSpec(self.batch, None, self.kv_heads)

    def devices(self, axis: str | None) -> int:
        """Count the devices along an axis."""
        return 1 if axis is None else self.mesh.shape[axis]


def specs(layout: Layout, cache: KVCache) -> KVCache:
    """Give the `PartitionSpec` of every leaf of a cache.

    Example:
        >>> from jaxquant import sharding
        >>> from jaxquant.methods import turboquant
        >>> layout = Layout(jax.make_mesh((1,), ("model",)), kv_heads="model")
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> c = sharding.init(layout, k, v, layers=2, batch=1, kv_heads=2, capacity=256)
        >>> specs(layout, c).stacks[0].keys.codes.codes == PartitionSpec(None, None, "model", None)
        True
    """
    exact = PartitionSpec(None, layout.batch, layout.kv_heads)
    coded = PartitionSpec(None, layout.batch, layout.kv_heads, layout.tokens)
    row = PartitionSpec(None, layout.batch)

    def store(old: Store) -> Store:
        return Store(
            quantizer=quantizer_specs(layout, old.quantizer),
            codes=jax.tree.map(lambda _: coded, old.codes),
            sinks=exact,  # pyright: ignore[reportArgumentType]
            window=exact,  # pyright: ignore[reportArgumentType]
        )

    stacks = tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in cache.stacks)
    return dataclasses.replace(cache, stacks=stacks, length=row, exact_from=row)


def shardings(layout: Layout, cache: KVCache) -> KVCache:
    """Give the `NamedSharding` of every leaf of a cache: for `jax.device_put`, or `out_shardings` of `jax.jit`.

    Args:
        layout: of the cache.
        cache: of arrays, or of `jax.ShapeDtypeStruct` as `jax.eval_shape` makes it.

    Raises:
        ValueError: the rows or kv heads are not a multiple of the devices that share them.
    """
    check(layout, batch=cache.batch, kv_heads=cache.kv_heads)
    return jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs(layout, cache))


def spread_of(layout: Layout, slots: int) -> Spread | None:
    """Say how the coded tokens of a row are dealt out, with room for whole pages on every device."""
    if layout.tokens is None:
        return None
    devices = layout.devices(layout.tokens)
    pages = -(-slots // (layout.page * devices))
    return Spread(axis=layout.tokens, devices=devices, page=layout.page, slots=pages * layout.page * devices)


def check(layout: Layout, **sizes: int) -> None:
    """Raise a ValueError where the devices along an axis cannot share a size evenly."""
    for name, size in sizes.items():
        devices = layout.devices(getattr(layout, name))
        if size % devices:
            raise ValueError(f"{name} must be a multiple of the {devices} devices that share it, got {size}")


def mapped(layout: Layout, local: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
    """Give `jax.shard_map` of a function over a layout's mesh; explicit axes have arguments put where they belong."""
    over = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    types = dict(zip(layout.mesh.axis_names, layout.mesh.axis_types, strict=True))
    if AxisType.Explicit not in types.values():
        return over

    def placed(leaf: Array, spec: PartitionSpec) -> Array:
        known = (axis if types.get(axis) is AxisType.Explicit else None for axis in spec)
        return jax.sharding.reshard(leaf, NamedSharding(layout.mesh, PartitionSpec(*known)))

    return lambda *arrays: over(*jax.tree.map(placed, arrays, in_specs))


def quantizer_specs(layout: Layout, quantizer: Quantizer | PerLayer) -> Any:
    """Shard what has an entry for each kv head, which `Mixed` may have but for its trellis; all else is everywhere."""
    one = jax.eval_shape(lambda q: q.at(0), quantizer) if isinstance(quantizer, PerLayer) else quantizer
    whole = PartitionSpec()
    if isinstance(one, Mixed) and one.mean.ndim > 1:
        whole = PartitionSpec(*(None,) * isinstance(quantizer, PerLayer), layout.kv_heads)

    def spec(path: Any, _: Any) -> PartitionSpec:
        shared = any(getattr(key, "name", None) == "code" for key in path)
        return PartitionSpec() if shared else whole

    return jax.tree_util.tree_map_with_path(spec, quantizer)
