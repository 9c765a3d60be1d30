"""Lossless tensor files: QATC, with NumPy and zstandard and no JAX to import."""
