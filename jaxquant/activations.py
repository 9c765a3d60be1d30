"""Activations in few bits: what a network computes with, or what its backward pass remembers.

`fake_quantize` rounds in the forward pass and lets gradients through: a network can be trained, or tried, with coded
activations, and no memory is saved. The others compute forward exactly and keep packed codes for the backward pass in
place of activations, which is where the memory of training is:

==============  =====================  ===============================  ==============================================
function        remembers              gradient of its input            gradient of its parameters
==============  =====================  ===============================  ==============================================
`linear`        x packed               exact                            linear in x: unbiased if the quantizer is
`elementwise`   x packed               off by at most |f''| |error|     none
`checkpoint`    a block's x packed     of the block at the decoded x    of the block at the decoded x
==============  =====================  ===============================  ==============================================

Any `protocols.Quantizer` packs; `stochastic.Stochastic` is unbiased. Codes carry a name, so that under `jax.checkpoint`
the policy `SAVE_CODES` keeps them, and nothing else.

References:
    Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through stochastic neurons for conditional
    computation", arXiv:1308.3432 (the straight-through estimator).
    T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174.
    J. Chen et al., "ActNN: Reducing training memory footprint via 2-bit activation compressed training",
    arXiv:2104.14129.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from jaxquant.protocols import Quantizer

NAME = "jaxquant_codes"
SAVE_CODES = jax.checkpoint_policies.save_only_these_names(NAME)
"""Policy for `jax.checkpoint`: keep packed codes for the backward pass, compute everything else again."""


@jax.custom_vjp
def fake_quantize(quantizer: Quantizer, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Code and decode, in x's dtype; derivatives pass as through the identity.

    Args:
        quantizer: of vectors as long as the last axis.
        x: activations.

    Raises:
        ValueError: the last axis is not `quantizer.dim`.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> quantizer = turboquant.mse(jax.random.key(0), dim=64, bits=2)
        >>> jax.grad(lambda x: fake_quantize(quantizer, x)[3])(jnp.ones(64))[2:5]
        Array([0., 1., 0.], dtype=float32)
    """
    return _decode(quantizer, quantizer.quantize(_checked(quantizer, x)), x.dtype)


def linear(
    quantizer: Quantizer, x: Float[Array, "*batch dim"], weight: Float[Array, "dim outputs"]
) -> Float[Array, "*batch outputs"]:
    """Multiply by a matrix; its gradient is formed from packed x.

    Args:
        quantizer: of vectors of length dim.
        x: activations.
        weight: the matrix.

    Raises:
        ValueError: the last axis of x is not `quantizer.dim`.

    Example:
        >>> from jaxquant.stochastic import Stochastic
        >>> quantizer = Stochastic(key=jax.random.key(0), dim=64, bits=2)
        >>> linear(quantizer, jnp.ones((10, 64)), jnp.ones((64, 3))).shape
        (10, 3)
    """
    return _linear(quantizer, _checked(quantizer, x), weight)


def elementwise(f: Callable[[Array], Array]) -> Callable[[Quantizer, Array], Array]:
    """Make an activation function that remembers packed x.

    Args:
        f: acts on every element alone.

    Returns:
        A function of a quantizer and x.

    Example:
        >>> from jaxquant.stochastic import Stochastic
        >>> gelu = elementwise(jax.nn.gelu)
        >>> gelu(Stochastic(key=None, dim=64, bits=4), jnp.zeros((10, 64))).shape
        (10, 64)
    """
    block = checkpoint(lambda _, x: f(x))
    return lambda quantizer, x: block(quantizer, (), x)


def checkpoint(block: Callable[[Any, Array], PyTree[Array]]) -> Callable[[Quantizer, Any, Array], PyTree[Array]]:
    """Make a block that remembers its input packed, and computes the rest again for the backward pass.

    `jax.checkpoint` with less to remember: the forward pass is exact, and derivatives are those of the block at the
    decoded input.

    Args:
        block: a function of parameters and x; whatever is to have a gradient is an argument.

    Returns:
        A function of a quantizer, the parameters and x.

    Example:
        >>> from jaxquant.stochastic import Stochastic
        >>> block = checkpoint(lambda weight, x: jnp.tanh(x @ weight))
        >>> quantizer = Stochastic(key=jax.random.key(0), dim=64, bits=2)
        >>> jax.grad(lambda w: block(quantizer, w, jnp.ones((10, 64))).sum())(jnp.zeros((64, 3))).shape
        (64, 3)
    """

    @jax.custom_vjp
    def run(quantizer: Quantizer, params: Any, x: Array) -> PyTree[Array]:
        return block(params, _checked(quantizer, x))

    def forward(quantizer: Quantizer, params: Any, x: Array) -> tuple[PyTree[Array], Any]:
        return run(quantizer, params, x), (quantizer, params, _codes(quantizer, x), _like(x))

    def backward(saved: Any, cotangent: PyTree[Array]) -> tuple[None, Any, Array]:
        quantizer, params, code, like = saved
        # Nothing of the block is computed again, or decoded, before its turn.
        code, cotangent = lax.optimization_barrier((code, cotangent))
        pull = jax.vjp(block, params, _decode(quantizer, code, like.dtype))[1]
        return None, *pull(cotangent)

    run.defvjp(forward, backward)
    return run


@jax.custom_vjp
def _linear(quantizer: Quantizer, x: Array, weight: Array) -> Array:
    return x @ weight


def _linear_forward(quantizer: Quantizer, x: Array, weight: Array) -> tuple[Array, Any]:
    return x @ weight, (quantizer, _codes(quantizer, x), weight)


def _linear_backward(saved: Any, cotangent: Array) -> tuple[None, Array, Array]:
    quantizer, code, weight = saved
    code, cotangent = lax.optimization_barrier((code, cotangent))
    x = _decode(quantizer, code, cotangent.dtype)
    rows = tuple(range(x.ndim - 1))
    return None, cotangent @ weight.T, jnp.tensordot(x, cotangent, (rows, rows))


def _fake_forward(quantizer: Quantizer, x: Array) -> tuple[Array, None]:
    return fake_quantize(quantizer, x), None


def _fake_backward(_: None, cotangent: Array) -> tuple[None, Array]:
    return None, cotangent


_linear.defvjp(_linear_forward, _linear_backward)
fake_quantize.defvjp(_fake_forward, _fake_backward)


def _codes(quantizer: Quantizer, x: Array) -> Any:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, NAME), quantizer.quantize(x))


def _decode(quantizer: Quantizer, code: Any, dtype: Any) -> Array:
    return quantizer.restore(quantizer.expand(code)).astype(dtype)


def _like(x: Array) -> Array:
    """Carry a dtype where only arrays may go."""
    return jnp.zeros((0,), x.dtype)


def _checked(quantizer: Quantizer, x: Array) -> Array:
    if x.shape[-1] != quantizer.dim:
        raise ValueError(f"x has shape {x.shape}; its last axis must be the quantizer's dim, {quantizer.dim}")
    return x
