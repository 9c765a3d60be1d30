"""Calibration: statistics, bases and bit allocation for a model (planned; empty for now)."""
