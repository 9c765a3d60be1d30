"""Share attention between the two halves of classifier-free guidance, and do not compute it twice.

Guidance runs a model on the same latents with and without the prompt. `share` computes a block for the conditional half
and gives its output to both: half the work, by construction. `gate` decides at each step, by how alike the two outputs
were when both were last computed; the branch not taken is not executed.

References:
    Z. Yuan, H. Zhang, P. Lu, X. Ning, L. Zhang, T. Zhao, S. Yan, G. Dai, Y. Wang, "DiTFastAttn: Attention compression
    for diffusion transformer models", arXiv:2406.08552, section 3.4 (attention sharing across CFG).

Differs from the paper: it picks the layers and steps that share once, before sampling, by a search; `gate` picks them
while sampling. Differs from tqai, whose hooks overwrite an output that was computed anyway, and which shares
cross-attention too: that is where the prompt comes in, so do not.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxquant._pytree import pytree

Block = Callable[[Float[Array, " halves *rest"]], Float[Array, " halves *rest"]]


@pytree
class Likeness:
    """How alike the halves were.

    Attributes:
        cosine: of the two outputs when both were last computed.
        shared: steps since then.
    """

    cosine: Float[Array, ""]
    shared: Int[Array, ""]


@pytree
class Sharing:
    """When to share.

    Attributes:
        threshold: least cosine of the two outputs.
        steps: most steps in a row that share; then both are computed again.
    """

    threshold: float | Float[Array, ""] = 0.95
    steps: int | Int[Array, ""] = 4

    def init(self) -> Likeness:
        """Start with unlike halves: the first step computes both."""
        return Likeness(cosine=jnp.float32(-1.0), shared=jnp.int32(0))


def share(block: Block, x: Float[Array, " halves *rest"]) -> Float[Array, " halves *rest"]:
    """Compute a block for the conditional half, `x[0]`, and give its output to both.

    Args:
        block: maps any number of halves, the leading axis, such as a self-attention.
        x: the conditional and the unconditional half.

    Example:
        >>> share(lambda x: x + 1, jnp.array([[1.0], [5.0]]))
        Array([[2.],
               [2.]], dtype=float32)
    """
    if x.shape[0] != 2:
        raise ValueError(f"x must have the conditional and the unconditional half as its first axis, got {x.shape}")
    out = block(x[:1])
    return jnp.broadcast_to(out, (2, *out.shape[1:]))


def gate(
    sharing: Sharing, state: Likeness, block: Block, x: Float[Array, " halves *rest"]
) -> tuple[Likeness, Float[Array, " halves *rest"]]:
    """Share if the halves were alike when both were last computed, and that was not long ago.

    Args:
        sharing: when to share.
        state: of this block; the first one is `sharing.init()`.
        block: as in `share`.
        x: likewise.

    Returns:
        The state for the next step, and the output of both halves.

    Example:
        >>> state, out = gate(Sharing(), Sharing().init(), lambda x: x + 1, jnp.array([[1.0], [5.0]]))
        >>> out
        Array([[2.],
               [6.]], dtype=float32)
    """

    def once(x: Array) -> tuple[Likeness, Array]:
        return Likeness(cosine=state.cosine, shared=state.shared + 1), share(block, x)

    def twice(x: Array) -> tuple[Likeness, Array]:
        out = block(x)
        first, second = out.astype(jnp.float32).reshape(2, -1)
        size = jnp.linalg.norm(first) * jnp.linalg.norm(second)
        cosine = jnp.sum(first * second) / jnp.maximum(size, 1e-30)
        return Likeness(cosine=cosine, shared=jnp.int32(0)), out

    return lax.cond((state.cosine >= sharing.threshold) & (state.shared < sharing.steps), once, twice, x)


EXAMPLES = (lambda: Sharing(threshold=jnp.float32(0.9), steps=jnp.int32(2)),)
