"""A `quantizers.Scalar` as plain arrays, and codes as bytes, for frameworks that code with arithmetic of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.quantizers import Scalar

FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the fields that codes of so many bits are split into: see `jaxquant.packing`."""


def packed_fields(codes: Any, bits: int) -> list[Any]:
    """Pack all codes but the last ones that do not fill 8, in any framework's arrays: a plane of bytes a field."""
    whole = codes.shape[-1] // 8 * 8
    parts, shift = [], 0
    for width in FIELDS[bits]:
        plane = whole * width // 8
        field = (codes[..., :whole] >> shift) & (2**width - 1)
        packed = field[..., :plane]
        for p in range(1, 8 // width):
            packed = packed | (field[..., p * plane : (p + 1) * plane] << (width * p))
        parts.append(packed)
        shift += width
    return parts


def unpacked_fields(packed: Any, bits: int, length: int, join: Callable[[list[Any]], Any]) -> tuple[Any, Any]:
    """Undo `packed_fields`, joining arrays along their last axis; give the bytes of the last codes too."""
    whole = length // 8 * 8
    codes, start, shift = None, 0, 0
    for width in FIELDS[bits]:
        plane = whole * width // 8
        part = packed[..., start : start + plane]
        field = join([(part >> (width * p)) & (2**width - 1) for p in range(8 // width)])
        codes = field if codes is None else codes | (field << shift)
        start, shift = start + plane, shift + width
    return codes, packed[..., start:]


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
