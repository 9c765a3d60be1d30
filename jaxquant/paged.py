"""Codes of one layer in pages, for serving engines: rows own pages through a block table that the caller allocates.

A page holds `page` consecutive tokens of one row for every kv head, the tokens of one head next to each other. Token t
of row b is in slot t % page of page `table[b, t // page]`. Rows may share pages, a common prefix for instance; nothing
here allocates, frees or copies a page.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from jaxquant import _attention
from jaxquant._kernels import cuda, cuda_formats, nvrtc, pallas, xla
from jaxquant._pytree import pytree
from jaxquant._stacks import Stack, Store
from jaxquant.protocols import Quantizer

_STEP = 512  # tokens that the XLA path decodes at a time

Number = float | Float[Array, ""]


@pytree
class Pages:
    """The pages of one layer.

    Attributes:
        keys: quantizer of the keys.
        values: quantizer of the values.
        key_codes: what `keys.quantize` returns, every leaf [pages, kv_heads, page, ...].
        value_codes: likewise.
    """

    keys: Quantizer
    values: Quantizer
    key_codes: PyTree[Any]
    value_codes: PyTree[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, kv heads, tokens of a page."""
        return jax.tree.leaves(self.key_codes)[0].shape[:3]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def init(keys: Quantizer, values: Quantizer, *, pages: int, kv_heads: int, page: int = 64) -> Pages:
    """Allocate empty pages.

    Args:
        keys: quantizer of the keys.
        values: quantizer of the values, of the same dim.
        pages: how many.
        kv_heads: heads of the keys and values.
        page: tokens of a page, 64 or 128.

    Raises:
        ValueError: a size is out of range, or the quantizers' dims differ.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
        >>> init(k, v, pages=10, kv_heads=8).shape
        (10, 8, 64)
    """
    for name, size in {"pages": pages, "kv_heads": kv_heads}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if page not in (64, 128):
        raise ValueError(f"page must be 64 or 128, got {page}")
    if keys.dim != values.dim:
        raise ValueError(f"keys and values must have the same dim, got {keys.dim} and {values.dim}")

    def empty(quantizer: Quantizer) -> PyTree[Any]:
        code = jax.eval_shape(quantizer.quantize, jax.ShapeDtypeStruct((quantizer.dim,), jnp.float32))
        return jax.tree.map(lambda leaf: jnp.zeros((pages, kv_heads, page, *leaf.shape), leaf.dtype), code)

    return Pages(keys=keys, values=values, key_codes=empty(keys), value_codes=empty(values))


@jax.jit
def append(
    pages: Pages,
    table: Integer[Array, "batch row_pages"],
    length: Integer[Array, " batch"],
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    *,
    mask: Bool[Array, "batch new"] | None = None,
) -> tuple[Pages, Int[Array, " batch"]]:
    """Write tokens to the end of every row, and give the new lengths.

    Inside a jitted step that donates the pages, they are updated in place. Tokens for which the table has no page, or a
    negative one, are dropped.

    Args:
        pages: to write to.
        table: pages of each row, in the order of its tokens.
        length: tokens that each row holds.
        k: keys, as attention will read them.
        v: values.
        mask: False marks padding, anywhere in the row; such tokens are not stored.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> table, length = jnp.array([[3, 1]]), jnp.array([0])
        >>> x = jnp.ones((1, 70, 2, 64))
        >>> append(init(k, v, pages=4, kv_heads=2), table, length, x, x)[1]
        Array([70], dtype=int32)
    """
    check_table(table, length)
    count, kv_heads, page = pages.shape
    for name, x in {"k": k, "v": v}.items():
        if x.shape != (table.shape[0], k.shape[1], kv_heads, pages.keys.dim):
            raise ValueError(
                f"{name} must have shape [batch, new, kv_heads, dim] = "
                f"{[table.shape[0], k.shape[1], kv_heads, pages.keys.dim]}, got {list(x.shape)}"
            )
    valid = jnp.ones(k.shape[:2], bool) if mask is None else mask
    start, rank = length.astype(jnp.int32), jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    position = start[:, None] + rank - 1
    capacity = table.shape[1] * page
    owner = jnp.take_along_axis(table.astype(jnp.int32), jnp.minimum(position, capacity - 1) // page, axis=1)
    stored = valid & (position < capacity) & (owner >= 0)
    owner, slot = jnp.where(stored, owner, count), position % page

    def put(leaf: Array, new: Array) -> Array:
        return leaf.at[owner, :, slot].set(jnp.swapaxes(new, 1, 2).astype(leaf.dtype), mode="drop")

    def written(quantizer: Quantizer, codes: PyTree[Any], x: Array) -> PyTree[Any]:
        return jax.tree.map(put, codes, quantizer.quantize(jnp.swapaxes(x, 1, 2)))

    after = Pages(
        keys=pages.keys,
        values=pages.values,
        key_codes=written(pages.keys, pages.key_codes, k),
        value_codes=written(pages.values, pages.value_codes, v),
    )
    return after, jnp.minimum(start + jnp.sum(valid, axis=1, dtype=jnp.int32), capacity)


def decode_attention_paged(
    q: Float[Array, "batch heads dim"],
    pages: Pages,
    table: Integer[Array, "batch row_pages"],
    length: Integer[Array, " batch"],
    *,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
    implementation: Literal["xla", "cuda", "pallas"] | None = None,
) -> tuple[Float[Array, "batch heads dim"], Float[Array, "batch heads"]]:
    """Attend from the newest token of every row to all tokens in its pages.

    Args:
        q: queries of the token appended last; neighbouring query heads share a kv head.
        pages: after the `append` of that token.
        table: pages of each row, in the order of its tokens; entries beyond its length are not used.
        length: tokens that each row holds.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores, `cap * tanh(score / cap)`.
        sliding_window: newest tokens that may be seen; all if None.
        implementation: as in `attention.decode_attention`; None picks the fastest there is.

    Returns:
        The output in q's dtype and the natural log-sum-exp of the scores in float32, as
        `attention.decode_attention` gives them.

    Raises:
        ValueError: a shape does not fit, or an argument is out of range.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> table, x = jnp.array([[3, 1]]), jnp.ones((1, 70, 2, 64))
        >>> pages, length = append(init(k, v, pages=4, kv_heads=2), table, jnp.array([0]), x, x)
        >>> decode_attention_paged(jnp.ones((1, 8, 64)), pages, table, length)[0].shape
        (1, 8, 64)
    """
    check_table(table, length)
    kv_heads, dim = pages.shape[1], pages.keys.dim
    if q.shape[0] != table.shape[0] or q.shape[2] != dim or not q.shape[1] or q.shape[1] % kv_heads:
        raise ValueError(
            f"q must have shape [batch, heads, dim] = [{table.shape[0]}, a multiple of {kv_heads}, {dim}], "
            f"got {list(q.shape)}"
        )
    chosen = _choose(implementation, pages, q.shape[1] // kv_heads)
    rule = _attention.rule_of(pages.keys.dim, scale, soft_cap, sliding_window)
    return _decode(q, pages, table, length, rule, chosen)


def _choose(implementation: str | None, pages: Pages, heads: int) -> str:
    if implementation not in (None, "xla", "cuda", "pallas"):
        raise ValueError(f"implementation must be None, 'xla', 'cuda' or 'pallas', got {implementation!r}")
    if implementation == "xla" or (implementation is None and not nvrtc.available()):
        return "xla"
    if implementation == "pallas":
        codes = ((pages.keys, pages.key_codes), (pages.values, pages.value_codes))
        obstacles = [pallas.unreadable(quantizer, code) for quantizer, code in codes]
    else:
        obstacles = [cuda_formats.unreadable(pages.keys), cuda_formats.unreadable(pages.values)]
        obstacles += [f"are for {heads} query heads a kv head, more than 16" if heads > 16 else None]
    if implementation is None:
        return "xla" if any(obstacles) else "cuda"
    if any(obstacles):
        raise ValueError(f"{implementation!r} cannot read these pages: they {next(filter(None, obstacles))}")
    return implementation


@functools.partial(jax.jit, static_argnames="implementation")
def _decode(
    q: Array, pages: Pages, table: Array, length: Array, rule: xla.Rule, implementation: str
) -> tuple[Array, Array]:
    count, kv_heads, page = pages.shape
    table = jnp.clip(table.astype(jnp.int32), 0, count - 1)
    length = jnp.minimum(length.astype(jnp.int32), table.shape[1] * page)
    if implementation == "cuda":
        quantizers, codes = (pages.keys, pages.values), (pages.key_codes, pages.value_codes)
        never = jnp.zeros((1, q.shape[0]), jnp.int32)
        part = cuda.attend(quantizers, codes, q, 0, length[None], never, rule, table=table)
        return part.out.reshape(q.shape), part.lse.reshape(q.shape[:2])
    rows = q.reshape(q.shape[0], kv_heads, -1, q.shape[2]).astype(jnp.float32)
    position = jnp.broadcast_to(length[:, None] - 1, (q.shape[0], rows.shape[2]))
    if implementation == "pallas":
        quantizers, codes = (pages.keys, pages.values), (pages.key_codes, pages.value_codes)
        part = pallas.attend(quantizers, codes, rows, position, jnp.zeros_like(length), rule, table=table)
    else:
        part = gathered(rows, pages, table, position, rule)
    return part.out.reshape(q.shape).astype(q.dtype), part.lse.reshape(q.shape[:2])


def gathered(rows: Array, pages: Pages, table: Array, position: Array, rule: xla.Rule) -> xla.Partial:
    """Gather a few pages of every row at a time, attend to them as to a short cache, and merge."""
    _, kv_heads, page = pages.shape
    batch, dim = rows.shape[0], rows.shape[3]
    few = min(_STEP // page, table.shape[1])
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % few)))
    nothing = jnp.zeros((1, batch, kv_heads, 0, dim), jnp.float32)

    def body(i: Array, joined: xla.Partial) -> xla.Partial:
        own = lax.dynamic_slice_in_dim(table, i * few, few, axis=1)

        def taken(leaf: Array) -> Array:
            found = jnp.swapaxes(leaf[own], 1, 2)
            return found.reshape(1, batch, kv_heads, few * page, *leaf.shape[3:])

        keys, values = (
            Store(quantizer=quantizer, codes=jax.tree.map(taken, codes), sinks=nothing, window=nothing)
            for quantizer, codes in ((pages.keys, pages.key_codes), (pages.values, pages.value_codes))
        )
        short = Stack(keys=keys, values=values)
        never = jnp.zeros(batch, jnp.int32)
        part = xla.coded(short, jnp.int32(0), rows, position - i * (few * page), never, rule)
        return xla.merge([joined, part])

    first, stop = jnp.int32(0), jnp.max(position) // (few * page) + 1
    if rule.sliding_window is not None:
        first = jnp.maximum(jnp.min(position) - rule.sliding_window + 1, 0) // (few * page)
    start = xla.Partial(jnp.zeros_like(rows), jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32))
    return lax.fori_loop(first, stop, body, start)


def check_table(table: Array, length: Array) -> None:
    """Refuse a table and lengths that do not fit each other.

    Raises:
        ValueError: they have different rows, or the table has no pages.
    """
    if length.shape != table.shape[:1]:
        raise ValueError(f"length must have one entry a row of table, {table.shape[0]}, got {list(length.shape)}")
    if not table.shape[1]:
        raise ValueError("table must have at least one page for each row")
