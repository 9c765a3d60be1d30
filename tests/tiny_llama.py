"""A llama of random weights, small enough to differentiate and to check by brute force."""

from typing import Any

from flax import nnx

from jaxquant.models.architecture import from_config
from jaxquant.models.decoder import Decoder

DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY = 16, 4, 2, 2, 64


def decoder(**more: Any) -> Decoder:
    """Build it; `more` goes into its configuration."""
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "head_dim": DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS,
    }  # fmt: skip
    return Decoder(from_config(config | more), rngs=nnx.Rngs(0))
