"""A cache of pages that decoders extend: what continuous batching holds instead of one dense buffer a row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from jaxquant import _attention, paged
from jaxquant._kernels import xla
from jaxquant._pytree import pytree
from jaxquant.paged import Number, Pages
from jaxquant.protocols import Quantizer


@pytree
class PagedCache:
    """Pages of every layer, and which of them each row owns.

    All layers use one block table. Rows are chosen by the caller: `at` gives the same pages to other rows.

    Attributes:
        keys: quantizer of the keys.
        values: quantizer of the values.
        codes: of each layer, as `paged.Pages` holds them: of keys and of values.
        table: pages of each row in the order of its tokens; negative where it has none.
        length: tokens that each row holds.
    """

    keys: Quantizer
    values: Quantizer
    codes: tuple[tuple[PyTree[Any], PyTree[Any]], ...]
    table: Int[Array, "batch row_pages"]
    length: Int[Array, "layers batch"]

    @property
    def dim(self) -> int:
        """Length of a key or value vector."""
        return self.keys.dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages of a layer, kv heads, tokens of a page."""
        return self.layer(0).shape

    @property
    def capacity(self) -> int:
        """Most tokens that a row's entries of the table can hold."""
        return self.table.shape[1] * self.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of keys and values for each token of the pages and kv head."""
        count, heads, page = self.shape
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.codes))
        return held / (len(self.codes) * count * heads * page)

    def layer(self, index: int) -> Pages:
        """Give the pages of a layer."""
        keys, values = self.codes[index]
        return Pages(keys=self.keys, values=self.values, key_codes=keys, value_codes=values)

    def at(self, table: np.ndarray, length: np.ndarray) -> "PagedCache":
        """Give the same pages to rows that own them as `table` and `length` [batch] say."""
        layers = len(self.codes)
        return dataclasses.replace(
            self,
            table=jnp.asarray(table, jnp.int32),
            length=jnp.broadcast_to(jnp.asarray(length, jnp.int32), (layers, len(length))),
        )

    def attend(
        self,
        q: Float[Array, "batch new heads dim"],
        k: Float[Array, "batch new kv_heads dim"],
        v: Float[Array, "batch new kv_heads dim"],
        layer: int,
        *,
        mask: Bool[Array, "batch new"] | None = None,
        scale: Number | None = None,
        soft_cap: Number | None = None,
        sliding_window: int | Integer[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], "PagedCache"]:
        """Append tokens to one layer and attend causally from each of them: see `attention.attend`."""
        rule: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sliding_window": sliding_window}
        pages, before = self.layer(layer), self.length[layer]
        pages, after = paged.append(pages, self.table, before, k, v, mask=mask)
        if q.shape[1] == 1:
            out, lse = paged.decode_attention_paged(q[:, 0], pages, self.table, after, **rule)
            out, lse = out[:, None], lse[:, None]
            if mask is not None:
                out = jnp.where(mask[:, :, None, None], out, 0)
        else:
            out, lse = _prefill(q, pages, self.table, before, mask, _attention.rule_of(self.dim, **rule))
        written = (pages.key_codes, pages.value_codes)
        held = dataclasses.replace(
            self,
            codes=(*self.codes[:layer], written, *self.codes[layer + 1 :]),
            length=self.length.at[layer].set(after),
        )
        return out, lse, held


def init(
    keys: Quantizer,
    values: Quantizer,
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    pages: int,
    row_pages: int,
    page: int = 64,
) -> PagedCache:
    """Allocate pages that no row owns yet.

    Args:
        keys: quantizer of the keys.
        values: quantizer of the values, of the same dim.
        layers: of the model.
        batch: rows that are served at a time.
        kv_heads: heads of the keys and values.
        pages: of each layer, shared by all rows.
        row_pages: that one row can own at most.
        page: tokens of a page, 64 or 128.

    Raises:
        ValueError: a size is out of range, or the quantizers' dims differ.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
        >>> init(k, v, layers=2, batch=4, kv_heads=8, pages=10, row_pages=4).bytes_per_token
        100.0
    """
    for name, size in {"layers": layers, "batch": batch, "row_pages": row_pages}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    empty = [paged.init(keys, values, pages=pages, kv_heads=kv_heads, page=page) for _ in range(layers)]
    own = jax.tree.map(jnp.array, (keys, values))  # a step that donates the cache must not take the caller's with it
    return PagedCache(
        keys=own[0],
        values=own[1],
        codes=tuple((one.key_codes, one.value_codes) for one in empty),
        table=jnp.full((batch, row_pages), -1, jnp.int32),
        length=jnp.zeros((layers, batch), jnp.int32),
    )


@jax.jit
def _prefill(
    q: Array, pages: Pages, table: Array, before: Array, mask: Array | None, rule: xla.Rule
) -> tuple[Array, Array]:
    valid = jnp.ones(q.shape[:2], bool) if mask is None else mask
    position = jnp.where(valid, before[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)
    kv_heads = pages.shape[1]
    rows, where = _attention.rows_of(q, kv_heads), _attention.repeated(position, q.shape[2] // kv_heads)
    part = paged.gathered(rows, pages, jnp.clip(table, 0, pages.shape[0] - 1), where, rule)
    out, lse = (_attention.heads_of(x, q.shape[1]) for x in (part.out, part.lse[..., None]))
    return out.astype(q.dtype), lse[..., 0]
