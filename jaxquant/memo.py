"""Remember what a text encoder gave for a prompt: a bounded memo, keyed by content, as explicit state.

Prompts are compared token by token, so that no collision can return another prompt's result. Of a full memo the entry
goes that was not asked for longest. Everything runs under `jit`; the encoder is in a branch, and does not run on a hit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer, PyTree

from jaxquant._pytree import pytree


@pytree
class Memo:
    """Prompts and results.

    Attributes:
        prompts: tokens of the prompts, padding included: it is part of what the encoder reads.
        values: results; every leaf has the entries as its first axis.
        used: when each entry was last asked for; 0 if it is empty.
        clock: questions so far.
        hits: of them, answered from the memo.
    """

    prompts: Integer[Array, "entries tokens"]
    values: PyTree[Array]
    used: Int[Array, " entries"]
    clock: Int[Array, ""]
    hits: Int[Array, ""]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def init(
    encoder: Callable[[Array], PyTree[Array]], prompt: Integer[Array, " tokens"] | jax.ShapeDtypeStruct, *, entries: int
) -> Memo:
    """Make an empty memo for prompts of one length.

    Args:
        encoder: from the tokens of one prompt to any tree of arrays.
        prompt: an array, or a `jax.ShapeDtypeStruct`, as the encoder takes it.
        entries: prompts to remember.

    Raises:
        ValueError: `entries` is less than 1.

    Example:
        >>> init(lambda prompt: prompt * 0.5, jnp.zeros(7, jnp.int32), entries=3).values.shape
        (3, 7)
    """
    if entries < 1:
        raise ValueError(f"entries must be at least 1, got {entries}")
    value = jax.eval_shape(encoder, prompt)
    values, prompts = jax.tree.map(lambda x: jnp.zeros((entries, *x.shape), x.dtype), (value, prompt))
    zero = jnp.int32(0)
    return Memo(prompts=prompts, values=values, used=jnp.zeros(entries, jnp.int32), clock=zero, hits=zero)


def ask(
    memo: Memo, encoder: Callable[[Array], PyTree[Array]], prompts: Integer[Array, "batch tokens"]
) -> tuple[Memo, PyTree[Array], Bool[Array, " batch"]]:
    """Give the encoder's results, from the memo where it has them.

    Prompts are taken one after the other: a prompt that is there twice is encoded once. Under `vmap` both branches run,
    and nothing is saved.

    Args:
        memo: from `init`, with the same encoder.
        encoder: a pure function of the tokens of one prompt.
        prompts: as in `init`, and a batch of them.

    Returns:
        The memo with these prompts in it, the results, and whether each was a hit.

    Raises:
        ValueError: prompts have another length.
        TypeError: prompts have another dtype.

    Example:
        >>> encoder = lambda prompt: prompt * 2
        >>> memo = init(encoder, jnp.zeros(2, jnp.int32), entries=4)
        >>> memo, values, hit = ask(memo, encoder, jnp.array([[1, 2], [3, 4], [1, 2]]))
        >>> values[2], hit
        (Array([2, 4], dtype=int32), Array([False, False,  True], dtype=bool))
    """
    if prompts.shape[1] != memo.prompts.shape[1]:
        raise ValueError(f"prompts must have {memo.prompts.shape[1]} tokens, got {prompts.shape[1]}")
    if prompts.dtype != memo.prompts.dtype:
        raise TypeError(f"prompts must be {memo.prompts.dtype}, got {prompts.dtype}")

    def one(memo: Memo, prompt: Array) -> tuple[Memo, Any]:
        same = (memo.used > 0) & jnp.all(memo.prompts == prompt, axis=1)
        hit = jnp.any(same)
        entry = jnp.where(hit, jnp.argmax(same), jnp.argmin(memo.used))
        value = lax.cond(hit, lambda: jax.tree.map(lambda x: x[entry], memo.values), lambda: encoder(prompt))
        clock = memo.clock + 1
        after = Memo(
            prompts=memo.prompts.at[entry].set(prompt),
            values=jax.tree.map(lambda held, x: held.at[entry].set(x), memo.values, value),
            used=memo.used.at[entry].set(clock),
            clock=clock,
            hits=memo.hits + hit.astype(jnp.int32),
        )
        return after, (value, hit)

    memo, (values, hits) = lax.scan(one, memo, prompts)
    return memo, values, hits
