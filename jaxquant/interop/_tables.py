"""A `quantizers.Scalar` as plain arrays, for frameworks that code with arithmetic of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.quantizers import Scalar

FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the fields that codes of so many bits are split into: see `jaxquant.packing`."""


def tables(quantizer: Scalar) -> dict[str, np.ndarray]:
    """Give what coding needs.

    Returns:
        `matrix`: coordinates are `x @ matrix`, since any rotation is linear; `centroids` and `boundaries` of the
        codebook; `stored`: the level of every stored code; `order`: the stored code of every level.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> tables(turboquant.mse(jax.random.key(0), dim=64, bits=4))["order"]
        array([15, 14, 13, 12, 11, 10,  9,  8,  0,  1,  2,  3,  4,  5,  6,  7],
              dtype=uint8)
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        here = jax.device_put(quantizer, jax.local_devices(backend="cpu")[0])
        matrix = here.rotation.rotate(jnp.eye(here.dim))
        stored = np.array(here.stored_levels)
        order = np.argsort(stored, stable=True)[: here.codebook.centroids.shape[0]].astype(np.uint8)
        arrays = {"matrix": matrix, "centroids": here.codebook.centroids, "boundaries": here.codebook.boundaries}
        return {"stored": stored, "order": order} | {name: np.array(x) for name, x in arrays.items()}
