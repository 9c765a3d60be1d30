"""Window: from step to step send some of the tokens anew and reuse the codes of the others, none for too long.

At each step there is room for a share of the tokens. One token in `staleness` is due in turn, whatever it looks like,
so that no code is older than that; what room is left goes to the tokens that moved farthest from what is held. Only
codes are held, and the payload is the sent tokens' codes and places: its size is static, and smaller than all codes by
the share.

References:
    Z. Yuan, H. Zhang, P. Lu, X. Ning, L. Zhang, T. Zhao, S. Yan, G. Dai, Y. Wang, "DiTFastAttn: Attention compression
    for diffusion transformer models", arXiv:2406.08552 (attention shared across steps).

Differs from the paper: it reuses whole attention outputs in steps and layers chosen before; this reuses single tokens'
codes, chosen by how far they moved. Differs from tqai, which compares with the cached input, never with what the codes
decode to, and in a decode loop compares different tokens. This is for streams: the tokens of a text are not steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxquant._pytree import pytree, static
from jaxquant.methods import turboquant
from jaxquant.protocols import Quantizer
from jaxquant.streams import Stream


@pytree
class Tokens:
    """Codes of every token, and the step.

    Attributes:
        codes: every leaf [batch, heads, tokens, ...].
        steps: sent, of each row.
    """

    codes: PyTree[Any]
    steps: Int[Array, " batch"]


@pytree
class Some:
    """Codes of some tokens.

    Attributes:
        codes: every leaf [batch, heads, sent, ...].
        place: of each among the tokens.
    """

    codes: PyTree[Any]
    place: Int[Array, "batch heads sent"]


@pytree
class Window:
    """Send a share of the tokens at each step.

    Attributes:
        share: of the tokens that there is room for; never less than 1 in `staleness`.
        staleness: most steps that a code is reused, its own included.
    """

    share: float = static(default=0.5)
    staleness: int = static(default=8)

    def start(self, quantizer: Quantizer, x: Float[Array, "batch heads tokens dim"], /) -> PyTree[Any]:
        """Code all tokens."""
        return quantizer.quantize(x)

    def load(self, quantizer: Quantizer, payload: PyTree[Any], /) -> Tokens:
        """Hold all codes."""
        return Tokens(codes=payload, steps=jnp.ones(jax.tree.leaves(payload)[0].shape[0], jnp.int32))

    def send(
        self,
        state: Tokens,
        quantizer: Quantizer,
        x: Float[Array, "batch heads tokens dim"],
        fresh: Bool[Array, "batch heads tokens"],
        /,
    ) -> Some:
        """Code the tokens that are due, then those marked fresh, then those that moved farthest."""
        tokens = x.shape[2]
        room = min(tokens, max(round(self.share * tokens), -(-tokens // self.staleness)))
        moved = jnp.sum((x - self.value(state, quantizer)) ** 2, axis=-1)
        moved = moved / (1.0 + jnp.max(moved, axis=-1, keepdims=True))  # below 1
        turn = jnp.arange(tokens, dtype=jnp.int32) % self.staleness
        due = (turn == (state.steps % self.staleness)[:, None])[:, None]
        urgent = jnp.where(due, 4.0, 0.0) + jnp.where(fresh, 2.0, 0.0) + moved
        order = jnp.argsort(-urgent, axis=-1, stable=True)
        place = order[..., :room].astype(jnp.int32)
        return Some(codes=quantizer.quantize(jnp.take_along_axis(x, place[..., None], axis=2)), place=place)

    def follow(self, state: Tokens, quantizer: Quantizer, payload: Some, /) -> Tokens:
        """Replace the codes that were sent."""
        row, head = jnp.ogrid[: payload.place.shape[0], : payload.place.shape[1]]
        where = (row[..., None], head[..., None], payload.place)
        codes = jax.tree.map(lambda old, new: old.at[where].set(new), state.codes, payload.codes)
        return Tokens(codes=codes, steps=state.steps + 1)

    def value(self, state: Tokens, quantizer: Quantizer, /) -> Float[Array, "batch heads tokens dim"]:
        """Decode what is held."""
        return quantizer.restore(quantizer.expand(state.codes))


def stream(key: PRNGKeyArray, *, dim: int, bits: int, share: float = 0.5, staleness: int = 8) -> Stream:
    """Build a stream coded with TurboQuant.

    Args:
        key: of the rotation.
        dim: of the vectors.
        bits: a coordinate.
        share: of the tokens sent at each step.
        staleness: most steps that a code is reused.

    Example:
        >>> stream(jax.random.key(0), dim=64, bits=4).strategy.staleness
        8
    """
    quantizer = turboquant.mse(key, dim=dim, bits=bits, scale="least_squares", fused=False)
    return Stream(quantizer=quantizer, strategy=Window(share=share, staleness=staleness))


EXAMPLES = (lambda: stream(jax.random.key(0), dim=64, bits=4, staleness=4),)
