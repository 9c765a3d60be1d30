"""Second-order delta: predict a step by the straight line through the two before it, in a closed loop.

Where features drift steadily, 2 p - pp misses less than p does. Where they jitter, it misses more: for independent
noise the second difference has sqrt(3) times the amplitude of the first. So each vector takes the better of both, or
none, by what it would leave to code.

References:
    W. Feng et al., "QuantSparse: Comprehensively compressing video diffusion transformer with model quantization and
    attention sparsification", arXiv:2509.23681, whose second-order residuals are stable between steps.

Differs from the paper: it reparameterizes sparse attention by second-order residuals, projected to few directions, to
recover what sparsity lost; this codes the features themselves. Differs from tqai, whose payload carries two previous
tensors uncompressed.
"""

import jax
from jaxtyping import PRNGKeyArray

from jaxquant.methods import delta
from jaxquant.pipeline import Pipeline
from jaxquant.streams import Stream


def stream(key: PRNGKeyArray, *, dim: int, bits: int, limit: float = 1.0, keyframe: int = 16) -> Stream:
    """Build a stream coded with TurboQuant; see `delta.stream`.

    Example:
        >>> stream(jax.random.key(0), dim=64, bits=4).strategy.order
        2
    """
    return delta.stream(key, dim=dim, bits=bits, order=2, limit=limit, keyframe=keyframe)


def pipeline(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, limit: float = 1.0, group: int = 16) -> Pipeline:
    """Build a pipeline; see `delta.pipeline`.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).keys.predict.order
        2
    """
    return delta.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, order=2, limit=limit, group=group)


EXAMPLES = (
    lambda: stream(jax.random.key(0), dim=64, bits=4),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, group=4),
)
