"""Hugging Face decoders as Flax NNX modules that read and write a KVCache."""
