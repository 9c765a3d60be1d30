"""Delta: code the change since the step before, in a closed loop.

The reference is what was decoded, not what was sent in, so that errors do not add up: the error of a step is the error
of its own code. Keyframes, coded without a reference, come at a fixed distance and wherever a prediction would not
help. A quantizer that stores a norm has an error in proportion to what it codes; a change of a tenth of the vector has
a hundredth of its energy, and so has the error.

`stream` codes steps of a diffusion model; `pipeline` codes the tokens of a cache one after the other, in groups.

References:
    No paper: differential pulse-code modulation, C. C. Cutler, US patent 2,605,361 (1952). Its use between the steps of
    a diffusion model, for attention outputs: Z. Yuan, H. Zhang, P. Lu, X. Ning, L. Zhang, T. Zhao, S. Yan, G. Dai, Y.
    Wang, "DiTFastAttn: Attention compression for diffusion transformer models", arXiv:2406.08552.

Differs from tqai, whose payload carries the previous tensor uncompressed: this one holds codes and one byte a vector.
"""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxquant.methods import turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.streams import Differential, Predict, Stream


def stream(key: PRNGKeyArray, *, dim: int, bits: int, order: int = 1, limit: float = 1.0, keyframe: int = 16) -> Stream:
    """Build a stream coded with TurboQuant.

    Args:
        key: of the rotation.
        dim: of the vectors.
        bits: a coordinate.
        order: of the predictions, 1 or 2.
        limit: relative error up to which a prediction is used.
        keyframe: steps from one keyframe to the next.

    Raises:
        ValueError: `order` is neither 1 nor 2.

    Example:
        >>> stream(jax.random.key(0), dim=64, bits=4).strategy.order
        1
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    quantizer = turboquant.mse(key, dim=dim, bits=bits, scale="least_squares", fused=False)
    return Stream(quantizer=quantizer, strategy=_predict(order, limit, keyframe))


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, order: int = 1, limit: float = 1.0, group: int = 16
) -> Pipeline:
    """Build a pipeline whose blocks are coded token by token, each against those before it in the block.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        order: of the predictions, 1 or 2.
        limit: relative error up to which a prediction is used.
        group: tokens from one keyframe to the next.

    Raises:
        ValueError: `order` is neither 1 nor 2.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).block
        16
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    first, second = jax.random.split(key)
    predict = _predict(order, limit, 1 << 30)
    keys, values = (
        Differential(
            quantizer=turboquant.mse(each, dim=dim, bits=bits, scale="least_squares", fused=False),
            predict=predict,
            group=group,
        )
        for each, bits in ((first, bits_k), (second, bits_v))
    )
    return Pipeline(keys=keys, values=values, block=group)


def _predict(order: int, limit: float, keyframe: int) -> Predict:
    return Predict(gain=jnp.float32(1.0), limit=jnp.float32(limit), keyframe=jnp.int32(keyframe), order=order)


EXAMPLES = (
    lambda: stream(jax.random.key(0), dim=64, bits=4),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, group=4),
)
