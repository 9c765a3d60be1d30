"""Packed caches in Flax models: an `attention_fn` for `nnx.MultiHeadAttention` and one for linen.

Both take the place of `dot_product_attention` at the seam that Flax offers for it: the module projects queries, keys
and values as before, and attention appends them to a `KVCache` and reads codes. A whole NNX model is changed by

    model = flax.attach(model, cache)

which shares its weights with the old one. All its layers share one cache, a variable of type `nnx.Cache` that follows
the model through `nnx.jit`, `nnx.split` and `nnx.merge`; `held` and `hold` read and replace it.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxquant import attention
from jaxquant import cache as caches
from jaxquant.cache import KVCache
from jaxquant.protocols import Quantizer

M = TypeVar("M", bound=nnx.Module)
Path = tuple[str | int, ...]


class Held(nnx.Module):
    """The cache of a model, as a variable."""

    def __init__(self, cache: KVCache):
        self.cache = nnx.Cache(cache)


class Attend(nnx.Module):
    """An `attention_fn` for one `nnx.MultiHeadAttention`.

    It is for causal self-attention over what the cache holds and the new tokens. The mask that Flax passes must be
    causal, and may hide padding: the token in row j of the mask is padding where its entry (j, j) is 0, and is then
    neither stored nor seen. Without a mask, more than one new token needs `is_causal=True`. A mask that is something
    else is refused, under `jit` only where `checkify.checkify` looks for it.

    Args:
        held: shared by all layers.
        layer: of the cache.

    Example:
        >>> import jax
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=4)
        >>> shared = Held(cache.init(keys, values, layers=1, batch=2, kv_heads=4, capacity=32))
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 64, attention_fn=nnx.data(Attend(shared, 0)), decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((2, 5, 64)), is_causal=True).shape
        (2, 5, 64)
        >>> shared.cache.get_value().length
        Array([[5, 5]], dtype=int32)
    """

    def __init__(self, held: Held, layer: int):
        self.held = held
        self.layer = layer

    def __call__(
        self, query: Array, key: Array, value: Array, *, mask: Array | None = None, is_causal: bool = False, **rest: Any
    ) -> Array:
        """Append the keys and values, and attend."""
        out, cache = _attend(self.held.cache.get_value(), self.layer, query, key, value, mask, is_causal, rest)
        self.held.cache.set_value(cache)
        return out


class _Layer(linen.Module):
    """The cache of the linen module that calls it."""

    start: Callable[[int, int], KVCache]

    @linen.compact
    def __call__(
        self, query: Array, key: Array, value: Array, mask: Array | None, rest: dict[str, Any]
    ) -> Float[Array, "*batch new heads dim"]:
        """Append the keys and values, and attend; `init` makes the cache and leaves it empty."""
        started = self.has_variable("cache", "kv")
        held = self.variable("cache", "kv", self.start, math.prod(key.shape[:-3]), key.shape[-2])
        out, cache = _attend(held.value, 0, query, key, value, mask, False, rest)
        if started:
            held.value = cache
        return out


def linen_attention_fn(
    keys: Quantizer,
    values: Quantizer,
    *,
    capacity: int,
    sinks: int = 0,
    window: int = 0,
    dtype: DTypeLike = jnp.bfloat16,
) -> Callable[..., Array]:
    """Make an `attention_fn` for linen's `MultiHeadDotProductAttention`: one for all layers.

    Each layer keeps a `KVCache` of one layer in the collection `cache`, with as many rows as the first input: pass
    `mutable=["cache"]` to `apply`. The mask must be causal, and may hide padding, as for `Attend`.

    Args:
        keys: quantizer of the keys.
        values: quantizer of the values.
        capacity: most tokens a row can hold.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        dtype: of the tokens kept exact.

    Example:
        >>> import jax
        >>> from jaxquant.methods import turboquant
        >>> fn = linen_attention_fn(*turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=4), capacity=32)
        >>> layer, x = linen.MultiHeadDotProductAttention(4, attention_fn=fn), jnp.ones((2, 5, 64))
        >>> mask = linen.make_causal_mask(x[..., 0])
        >>> variables = layer.init(jax.random.key(1), x, mask=mask)
        >>> out, changed = layer.apply(variables, x, mask=mask, mutable=["cache"])
        >>> jax.tree.leaves(changed, is_leaf=lambda node: isinstance(node, KVCache))[0].length
        Array([[5, 5]], dtype=int32)
    """

    def start(batch: int, kv_heads: int) -> KVCache:
        return caches.init(
            keys, values, layers=1, batch=batch, kv_heads=kv_heads, capacity=capacity,
            sinks=sinks, window=window, dtype=dtype,
        )  # fmt: skip

    def attend(
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        module: linen.Module | None = None,
    ) -> Array:
        rest = {"dropout_rate": dropout_rate, "deterministic": deterministic, "module": module}
        return _Layer(start, name="packed")(query, key, value, mask, rest)

    return attend


def attach(model: M, cache: KVCache, *, paths: Sequence[Path] | None = None) -> M:
    """Give a model's attention layers a packed cache.

    Args:
        model: stays as it is; the new one shares its variables, so that a step may donate it.
        cache: one layer for each `nnx.MultiHeadAttention`.
        paths: of the attention modules, as `nnx.iter_modules` names them, in the order of the cache's layers. None
            takes all of them in the order of their paths, numbers by their value.

    Returns:
        A model whose attention appends to the cache and reads from it.

    Raises:
        ValueError: the layers, heads or sizes of model and cache differ, or a path leads to no attention module.

    Example:
        >>> import jax
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> model = nnx.MultiHeadAttention(4, 64, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=16, bits_k=4, bits_v=4)
        >>> packed = attach(model, cache.init(keys, values, layers=1, batch=1, kv_heads=2, capacity=32))
        >>> out = packed(jnp.ones((1, 5, 64)), is_causal=True)
        >>> held(packed).length, model.attention_fn is nnx.dot_product_attention
        (Array([[5]], dtype=int32), True)
    """
    graph, state = nnx.split(model)
    changed: M = nnx.merge(graph, state)
    modules: dict[Any, Any] = {
        path: module for path, module in nnx.iter_modules(changed) if isinstance(module, nnx.MultiHeadAttention)
    }
    if paths is None:
        chosen = sorted(modules, key=_natural)
    else:
        chosen = [tuple(path) for path in paths]
        if strangers := [path for path in chosen if path not in modules]:
            raise ValueError(f"paths must lead to attention modules, got {strangers[0]}; there are {list(modules)}")
    if len(chosen) != cache.layers:
        raise ValueError(f"the cache has {cache.layers} layers and the model {len(chosen)} of nnx.MultiHeadAttention")
    shared = Held(cache)
    for layer, path in enumerate(chosen):
        module = modules[path]
        if (module.num_kv_heads, module.head_dim) != (cache.kv_heads, cache.dim):
            raise ValueError(
                f"{path} has {module.num_kv_heads} kv heads of {module.head_dim}; "
                f"the cache is for {cache.kv_heads} of {cache.dim}"
            )
        module.decode = False  # Flax's own cache would hold a second, uncompressed copy
        module.attention_fn = nnx.data(Attend(shared, layer))
    return changed


def held(model: nnx.Module) -> KVCache:
    """Return the cache of a model: to look at its length, to save it, to crop or reorder it.

    Raises:
        ValueError: the model has none, or several.
    """
    return _holder(model).cache.get_value()


def hold(model: nnx.Module, cache: KVCache) -> None:
    """Replace the cache of a model, in place: after a crop or a reorder, or for the next prompt.

    Raises:
        ValueError: the model has no cache, or several, or the new one has other layers or heads.
    """
    holder = _holder(model)
    old = holder.cache.get_value()
    if (cache.layers, cache.kv_heads, cache.dim) != (old.layers, old.kv_heads, old.dim):
        raise ValueError(
            f"the model's cache is for {old.layers} layers of {old.kv_heads} kv heads of {old.dim}; "
            f"cache has {cache.layers} of {cache.kv_heads} of {cache.dim}"
        )
    holder.cache.set_value(cache)


def _holder(model: nnx.Module) -> Held:
    holders = [module for _, module in nnx.iter_modules(model) if isinstance(module, Held)]
    if len(holders) != 1:
        raise ValueError(f"model must have one packed cache, as attach gives it, and has {len(holders)}")
    return holders[0]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort numbers by value, inside of names too."""
    parts = re.split(r"(\d+)", "/".join(map(str, path)))
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _attend(
    cache: KVCache,
    layer: int,
    query: Float[Array, "*batch new heads dim"],
    key: Float[Array, "*batch keys kv_heads dim"],
    value: Float[Array, "*batch keys kv_heads dim"],
    mask: Array | None,
    is_causal: bool,
    rest: dict[str, Any],
) -> tuple[Array, KVCache]:
    if rest.get("dropout_rate", 0.0) > 0 and not rest.get("deterministic", True):
        raise ValueError("attention over a packed cache has no dropout: pass deterministic=True")
    if rest.get("module") is not None:
        raise ValueError("attention over a packed cache has no weights to sow: pass sow_weights=False")
    lead, new = query.shape[:-3], query.shape[-3]
    if key.shape[-3] != new:
        raise ValueError(
            f"a packed cache is for self-attention without Flax's own cache (decode=False): "
            f"got {new} queries and {key.shape[-3]} keys"
        )
    if mask is None and new > 1 and not is_causal:
        raise ValueError("attention over a packed cache is causal: pass a causal mask, or is_causal=True")
    valid = None if mask is None else _padding(mask, lead, new)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if new == 1:
        cache = caches.append(cache, layer, k, v, mask=valid)
        out = attention.decode_attention(q[:, 0], cache, layer)[0][:, None]
        out = out if valid is None else jnp.where(valid[..., None, None], out, jnp.zeros((), out.dtype))
    else:
        out, _, cache = attention.prefill_attention(q, k, v, cache, layer, mask=valid)
    dtype = rest.get("dtype")
    return out.reshape(query.shape).astype(query.dtype if dtype is None else dtype), cache


def _padding(mask: Array, lead: tuple[int, ...], new: int) -> Bool[Array, "batch new"]:
    """Read which tokens are no padding off the diagonal of a causal mask."""
    if mask.shape[-2:] != (new, new) or mask.ndim != len(lead) + 3:
        raise ValueError(
            f"mask must have shape [batch, heads, {new}, {new}]: causal over the new tokens, not over those held; "
            f"got {list(mask.shape)}"
        )
    allowed = jnp.broadcast_to(mask != 0, (*lead, *mask.shape[-3:])).reshape(-1, *mask.shape[-3:])
    valid = jnp.diagonal(allowed[:, 0], axis1=-2, axis2=-1)
    causal = jnp.tril(jnp.ones((new, new), bool)) & valid[:, None, None, :]
    alike = jnp.all((allowed == causal) | ~valid[:, None, :, None])
    if isinstance(alike, Tracer):
        checkify.debug_check(alike, "mask is not causal with padding")
    elif not np.asarray(alike):
        raise ValueError("mask must be causal, and may hide padding: nothing else can be said to a packed cache")
    return valid
