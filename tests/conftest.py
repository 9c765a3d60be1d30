"""Strict settings for every test: no implicit dtype promotion, eight simulated devices, no GPU needed."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
