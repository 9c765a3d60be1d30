"""Diffusion transformers: guidance that shares work, tiled decoding, picture quality, and a small model to try it."""
