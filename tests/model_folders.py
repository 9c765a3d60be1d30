"""Tiny model folders of every family, and how their golden logits were made.

    python tests/model_folders.py        # needs torch and transformers; writes tests/data/models/logits.npz

Weights come from the raw bits of a counter-based generator, so that every NumPy makes the same folder.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

GOLDEN = Path(__file__).parent / "data" / "models" / "logits.npz"
TOKENS = 24
WINDOW = 6

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama", "rope_theta": 500.0},
    "llama_llama3": {**SIZES, "model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama_linear": {
        **SIZES,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {**SIZES, "model_type": "mistral", "rope_theta": 500.0, "sliding_window": WINDOW},
    "qwen2": {
        **SIZES,
        "model_type": "qwen2",
        "rope_theta": 500.0,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**SIZES, "model_type": "qwen3", "rope_theta": 500.0},
    "gemma3_text": {
        **{name: value for name, value in SIZES.items() if name != "hidden_act"},
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors that Hugging Face stores for a config, written out from the file format, not from jaxquant."""
    family = config["model_type"]
    hidden, wide, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, out, inner in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out, inner)
            if config.get("attention_bias") or (family == "qwen2" and name != "o"):
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out,)
        for name, out, inner in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (out, inner)
            if config.get("mlp_bias"):
                shapes[f"{prefix}mlp.{name}_proj.bias"] = (out,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
        if family in ("qwen3", "gemma3_text"):
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (dim,) for name in "qk"}
    return shapes


def make_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draw bfloat16 weights, large enough that attention is far from uniform."""
    tensors = {}
    for seed, (name, shape) in enumerate(tensor_shapes(config).items()):
        raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
        uniform = (raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1
        if "norm" in name:
            values = (0.0 if config["model_type"] == "gemma3_text" else 1.0) + 0.5 * uniform
        elif name.endswith("bias"):
            values = uniform
        else:
            values = uniform * (6.0 / shape[-1]) ** 0.5
        tensors[name] = values.reshape(shape).astype(ml_dtypes.bfloat16)
    return tensors


def write_folder(folder: Path, name: str, *, shards: int = 1) -> Path:
    """Write the folder of `CONFIGS[name]`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    tensors = make_tensors(config)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {tensor: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, tensor in enumerate(tensors)}
        for file in sorted(set(files.values())):
            part = {tensor: tensors[tensor] for tensor in tensors if files[tensor] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    vocabulary = {chr(ord("A") + i): i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tokens() -> np.ndarray:
    """Draw two rows of token ids."""
    raw = np.random.Philox(key=1234).random_raw(2 * TOKENS)
    return (raw % SIZES["vocab_size"]).astype(np.int32).reshape(2, TOKENS)


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Ask `transformers` for the logits, in float32, with its plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.numpy()


if __name__ == "__main__":
    import tempfile

    golden = {}
    for family in CONFIGS:
        with tempfile.TemporaryDirectory() as temporary:
            golden[family] = reference_logits(write_folder(Path(temporary), family), tokens())
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN, **golden)
