"""Hugging Face decoders as Flax NNX modules that read and write a KVCache."""

from jaxquant.models.generation import Generation, generate, sample
from jaxquant.models.loading import Model, load

__all__ = ["Generation", "Model", "generate", "load", "sample"]
