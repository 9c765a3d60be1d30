"""Strict settings for every test: no implicit dtype promotion, two simulated devices, no GPU needed."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
