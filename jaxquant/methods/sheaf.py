"""Score tokens by how little their neighbours foretell them: the Laplacian of a sheaf over the graph of tokens.

Tokens are the nodes of a path, or of a 2-D or 3-D grid, with an edge between neighbours along each axis. An edge
e = (u, w) has a space of its own, into which restriction maps F_u, F_w take the vectors of its ends. They agree where
F_u x_u = F_w x_w, and the Laplacian is (L x)_u = sum_e F_u^T (F_u x_u - F_w x_w). A token scores its part of <x, L x>,

    score_u = sum_e |F_u x_u - F_w x_w|^2 / (2 sum_e (|F_u x_u|^2 + |F_w x_w|^2)),

over its edges: 0 where all agree, up to 1 where they contradict it. With identity maps this is the Laplacian of the
graph; `aligned` learns an orthogonal map for each axis.

References:
    J. Hansen, T. Gebhart, "Sheaf neural networks", arXiv:2012.06333 (the sheaf Laplacian); F. Barbero, C. Bodnar, H.
    Sáez de Ocáriz Borde, M. Bronstein, P. Veličković, P. Liò, "Sheaf neural networks with connection Laplacians",
    arXiv:2206.08702 (orthogonal maps by alignment, in closed form).

Differs from the paper: maps are shared by all edges of an axis, aligned on the data itself and not on local tangent
spaces; nothing is diffused, the energy is the score. Differs from tqai, whose `sheaf` is one number for a tensor, the
second difference along the tokens, always in the upper half of its range.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant._pytree import pytree, static
from jaxquant.methods import tiered
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class Sheaf:
    """Disagreement with the neighbours.

    Over a path, the last token of a call is remembered as a neighbour of the first of the next.

    Attributes:
        maps: for each axis, the restriction maps at the lower and at the upper end of its edges; None is the identity.
        grid: tokens along each axis, the last one fastest; None is a path of any length.
    """

    maps: Float[Array, "axes 2 edge dim"] | None = None
    grid: tuple[int, ...] | None = static(default=None)

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Float[Array, "batch kv_heads dim"]:
        """Start without a token before the first: NaN marks that there is none."""
        return jnp.full((batch, kv_heads, dim), jnp.nan, jnp.float32)

    def score(
        self,
        state: Float[Array, "batch kv_heads dim"],
        x: Float[Array, "batch kv_heads tokens dim"],
        ctx: Context,
        /,
    ) -> tuple[Float[Array, "batch kv_heads dim"], Float[Array, "batch kv_heads tokens"]]:
        """Compare each token with its neighbours; a token without any scores 1."""
        x = x.astype(jnp.float32)
        tokens = x.shape[2]
        if self.grid is not None and math.prod(self.grid) != tokens:
            raise ValueError(f"grid {self.grid} has {math.prod(self.grid)} tokens, got {tokens}")
        grid = (tokens,) if self.grid is None else self.grid
        shaped = x.reshape(*x.shape[:2], *grid, x.shape[-1])
        apart = energy = jnp.zeros(shaped.shape[:-1], jnp.float32)
        for axis in range(len(grid)):
            lower, upper = (self._restrict(axis, end, shaped) for end in (0, 1))
            place = 2 + axis
            low = jax.lax.slice_in_dim(lower, 0, grid[axis] - 1, axis=place)
            high = jax.lax.slice_in_dim(upper, 1, grid[axis], axis=place)
            differ, size = _squares(low - high), _squares(low) + _squares(high)
            for ahead in ((0, 1), (1, 0)):
                width = [(0, 0)] * (place) + [ahead] + [(0, 0)] * (apart.ndim - place - 1)
                apart, energy = apart + jnp.pad(differ, width), energy + jnp.pad(size, width)
        apart, energy = (part.reshape(x.shape[:3]) for part in (apart, energy))
        if self.grid is None:
            known = ~jnp.isnan(state[..., 0])
            low, high = self._restrict(0, 0, jnp.nan_to_num(state)), self._restrict(0, 1, x[:, :, 0])
            apart = apart.at[:, :, 0].add(jnp.where(known, _squares(low - high), 0.0))
            energy = energy.at[:, :, 0].add(jnp.where(known, _squares(low) + _squares(high), 0.0))
        return x[:, :, -1], jnp.where(energy > 0, apart / (2 * jnp.where(energy > 0, energy, 1.0)), 1.0)

    def _restrict(self, axis: int, end: int, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch edge"]:
        if self.maps is None:
            return x
        return jnp.einsum("...d,ed->...e", x, self.maps[axis, end], precision="highest")


def aligned(x: Float[Array, "*batch tokens dim"], *, grid: tuple[int, ...] | None = None) -> Sheaf:
    """Learn an orthogonal map for each axis: the rotation that takes tokens closest to the next ones along it.

    Args:
        x: tokens to learn from.
        grid: see `Sheaf`.

    Example:
        >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> x = jnp.stack([jnp.array([1.0, 2.0]), turn @ jnp.array([1.0, 2.0])])
        >>> sheaf, ctx = aligned(x), Context(layer=jnp.int32(0), step=jnp.zeros(1, jnp.int32))
        >>> bool(sheaf.score(sheaf.init(1, 1, 2), x[None, None], ctx)[1].max() < 1e-6)
        True
    """
    shape = (x.shape[-2],) if grid is None else grid
    shaped = x.astype(jnp.float32).reshape(-1, *shape, x.shape[-1])
    maps = []
    for axis in range(len(shape)):
        low = jax.lax.slice_in_dim(shaped, 0, shape[axis] - 1, axis=1 + axis).reshape(-1, x.shape[-1])
        high = jax.lax.slice_in_dim(shaped, 1, shape[axis], axis=1 + axis).reshape(-1, x.shape[-1])
        left, _, right = jnp.linalg.svd(jnp.einsum("nd,ne->de", high, low, precision="highest"))
        maps.append(jnp.stack([left @ right, jnp.eye(x.shape[-1])]))
    return Sheaf(maps=jnp.stack(maps), grid=grid)


def _squares(x: Array) -> Array:
    return jnp.sum(x * x, axis=-1)


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, share: float = 0.25, block: int = 32
) -> Pipeline:
    """Build a pipeline that gives the tokens their neighbours do not foretell their lower bits.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys in the upper tier.
        bits_v: a coordinate of values in the upper tier.
        share: of the capacity that the upper tier has room for.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).scorer.grid is None
        True
    """
    return tiered.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, share=share, scorer=Sheaf(), block=block)


EXAMPLES = (
    lambda: Sheaf(),
    lambda: Sheaf(maps=jnp.broadcast_to(jnp.eye(64), (1, 2, 64, 64))),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
