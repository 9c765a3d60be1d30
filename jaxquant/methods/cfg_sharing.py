"""Share attention between the two halves of classifier-free guidance, and do not compute it twice.

Guidance runs a model on the same latents with and without the prompt. `share` computes a layer's self-attention for the
conditional half and gives its output to both: half the work, by construction. `Gate` decides at each step, by how alike
the two outputs were when both were last computed; the branch not taken is not executed. Both are of
`jaxquant.diffusion.guidance`.

Example:
    >>> gate = Gate(threshold=0.9)
    >>> state, out = gate.attend(gate.init(), lambda x: x + 1, jnp.array([[[1.0]], [[5.0]]]))
    >>> bool(gate.shares(state)), out.reshape(-1)
    (True, Array([2., 6.], dtype=float32))

References:
    Z. Yuan, H. Zhang, P. Lu, X. Ning, L. Zhang, T. Zhao, S. Yan, G. Dai, Y. Wang, "DiTFastAttn: Attention compression
    for diffusion transformer models", arXiv:2406.08552 (attention sharing across CFG).

Differs from the paper: it picks the layers and steps that share once, before sampling, by a search; a gate picks them
while sampling. Differs from tqai, whose hooks overwrite an output that was computed anyway, and which shares
cross-attention too: that is where the prompt comes in, so do not.
"""

import jax.numpy as jnp

from jaxquant.diffusion.guidance import Gate as Gate
from jaxquant.diffusion.guidance import share as share

EXAMPLES = (lambda: Gate(threshold=jnp.float32(0.9), refresh=jnp.int32(2)),)
