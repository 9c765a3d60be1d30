"""How the tokens of a row are dealt out to devices: in turn, page by page, so that all have a share at any length."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer


class Spread(NamedTuple):
    """Tokens dealt out along an axis of a mesh.

    Page p is page p // devices of device p % devices: the slots of a device are in the order of their tokens. All but
    `order` is for use inside a `shard_map`.

    Attributes:
        axis: of the mesh.
        devices: along that axis.
        page: consecutive tokens that stay together.
        slots: tokens that all devices together have room for, a multiple of `page * devices`.
    """

    axis: str
    devices: int
    page: int
    slots: int

    def token(self, slot: Integer[Array, "*n"], device: Integer[Array, ""] | None = None) -> Integer[Array, "*n"]:
        """Give the token in a slot of a device (this one if None)."""
        return (slot // self.page * self.devices + self._number(device)) * self.page + slot % self.page

    def slot(self, token: Integer[Array, "*n"]) -> Integer[Array, "*n"]:
        """Give the slot of a token on this device, or -1 where another device has it."""
        page = token // self.page
        mine = (page % self.devices == self._number(None)) & (token >= 0)
        return jnp.where(mine, page // self.devices * self.page + token % self.page, -1)

    def before(self, token: Integer[Array, "*n"], device: Integer[Array, ""] | None = None) -> Integer[Array, "*n"]:
        """Count the slots of a device (this one if None) whose tokens come before a token."""
        whole, rest = jnp.divmod(jnp.maximum(token, 0), self.page * self.devices)
        return whole * self.page + jnp.clip(rest - self._number(device) * self.page, 0, self.page)

    def gathered(self, x: Array) -> Array:
        """Give what every device has, on a new first axis: one collective."""
        return lax.all_gather(x, self.axis)

    def order(self) -> np.ndarray:
        """Give the place of each token in an array of all devices' slots, one device after the other."""
        token = np.arange(self.slots)
        page, within = np.divmod(token, self.page)
        return page % self.devices * (self.slots // self.devices) + page // self.devices * self.page + within

    def _number(self, device: Integer[Array, ""] | None) -> Integer[Array, ""]:
        return lax.axis_index(self.axis) if device is None else device
