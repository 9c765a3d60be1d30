"""Attention over stored tokens, one private file per backend."""
