"""Calibration: what a few thousand tokens say about a model, and quantizers that make use of it."""
