"""What a Hugging Face `config.json` says about a decoder, in the words of this library."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxquant.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Describe a decoder: every field decides a shape or a code path, so the whole is static under `jit`.

    Attributes:
        family: the `model_type` of the folder.
        vocabulary: number of token ids.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward blocks.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        dim: coordinates per head.
        ropes: rotary embedding of each layer.
        windows: sliding window of each layer, in tokens, the token itself included; None sees everything.
        norm_epsilon: added to the mean square before the root.
        activation: gate of the feed-forward blocks.
        scale: multiplies attention scores.
        embedding_scale: multiplies the embedded tokens.
        tied: the output projection is the embedding.
        qkv_bias: query, key and value projections have a bias.
        output_bias: the attention output projection has a bias.
        mlp_bias: the feed-forward projections have a bias.
        qk_norm: queries and keys are normalised per head before rotation.
        norm_plus_one: norms multiply by 1 + weight, in float32, instead of by weight.
        post_norms: attention and feed-forward outputs are normalised before they join the residual stream.
        logit_soft_cap: bound of the logits; None leaves them.
        max_positions: longest context, in tokens, that the folder promises.
    """

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    norm_epsilon: float
    activation: Literal["silu", "gelu_tanh"]
    scale: float
    embedding_scale: float = 1.0
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    logit_soft_cap: float | None = None
    max_positions: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.ropes)


_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _rope(settings: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = float(settings.get("rope_theta", theta))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(settings["factor"]))
    return Rope(
        theta=theta,
        scaling="llama3",
        factor=float(settings["factor"]),
        low_frequency_factor=float(settings["low_freq_factor"]),
        high_frequency_factor=float(settings["high_freq_factor"]),
        original_positions=int(settings.get("original_max_position_embeddings", max_positions)),
    )


def _sizes(config: Mapping[str, Any], *, dim: int | None, epsilon: float, positions: int, tied: bool) -> dict[str, Any]:
    """Read the fields that mean the same in every family; the keywords are the family's own defaults."""
    sizes = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        size = config[name] if name in sizes else config.get(name)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"config.json: {name} must be an integer from 1, got {size!r}")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    head_dim: int = config.get("head_dim") or dim or config["hidden_size"] // heads
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim={head_dim} is odd; rotary embeddings need an even one")
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return {
        "family": config["model_type"],
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": head_dim,
        "norm_epsilon": config.get("rms_norm_eps", epsilon),
        "activation": _ACTIVATIONS[name],
        "scale": head_dim**-0.5,
        "tied": config.get("tie_word_embeddings", tied),
        "max_positions": config.get("max_position_embeddings", positions),
    }


def _uniform(config: Mapping[str, Any], window: int | None, fields: dict[str, Any]) -> Architecture:
    """Finish a family with one rotary embedding, whose layers see either everything or one window."""
    layers = config["num_hidden_layers"]
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = _rope(settings, config.get("rope_theta", 10_000.0), fields["max_positions"])
    first_windowed = config.get("max_window_layers", 0)
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first_windowed else "" for i in range(layers)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return Architecture(**fields, ropes=(rope,) * layers, windows=windows)


def _llama(config: Mapping[str, Any]) -> Architecture:
    sizes = _sizes(config, dim=None, epsilon=1e-6, positions=2048, tied=False)
    bias = config.get("attention_bias", False)
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": config.get("mlp_bias", False)}
    return _uniform(config, None, sizes | biases)


def _mistral(config: Mapping[str, Any]) -> Architecture:
    sizes = _sizes(config, dim=None, epsilon=1e-6, positions=131_072, tied=False)
    return _uniform(config, config.get("sliding_window", 4096), sizes)


def _qwen_window(config: Mapping[str, Any]) -> int | None:
    return config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None


def _qwen2(config: Mapping[str, Any]) -> Architecture:
    sizes = _sizes(config, dim=None, epsilon=1e-6, positions=32_768, tied=False)
    return _uniform({"max_window_layers": 28, **config}, _qwen_window(config), sizes | {"qkv_bias": True})


def _qwen3(config: Mapping[str, Any]) -> Architecture:
    sizes = _sizes(config, dim=128, epsilon=1e-6, positions=32_768, tied=False)
    bias = config.get("attention_bias", False)
    features = {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}
    return _uniform({"max_window_layers": 28, **config}, _qwen_window(config), sizes | features)


def _gemma3(config: Mapping[str, Any]) -> Architecture:
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208, **config}
    config = {"hidden_activation": "gelu_pytorch_tanh", **config}
    if config.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is not supported; jaxquant reads causal decoders")
    sizes = _sizes(config, dim=256, epsilon=1e-6, positions=131_072, tied=True)
    layers = config["num_hidden_layers"]
    pattern = config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
    settings = config.get("rope_parameters") or {"full_attention": config.get("rope_scaling") or {}}
    theta = {
        "full_attention": config.get("rope_theta", 1_000_000.0),
        "sliding_attention": config.get("rope_local_base_freq", 10_000.0),
    }
    ropes = {kind: _rope(settings.get(kind) or {}, base, sizes["max_positions"]) for kind, base in theta.items()}
    sizes["scale"] = config.get("query_pre_attn_scalar", 256) ** -0.5
    bias = config.get("attention_bias", False)
    return Architecture(
        **sizes,
        ropes=tuple(ropes[kind] for kind in kinds),
        windows=tuple(config.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds),
        embedding_scale=config["hidden_size"] ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        logit_soft_cap=config.get("final_logit_softcapping"),
    )


def _gemma3_folder(config: Mapping[str, Any]) -> Architecture:
    if "text_config" not in config:
        raise ValueError("config.json: model_type 'gemma3' without a text_config")
    return _gemma3({"tie_word_embeddings": config.get("tie_word_embeddings", True), **config["text_config"]})


FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3_folder,
}


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read an architecture from the contents of a `config.json`.

    Args:
        config: the parsed file, in its present (`rope_parameters`) or older (`rope_theta`) spelling.

    Returns:
        The architecture of the text decoder.

    Raises:
        ValueError: the model type, rotary scaling or activation is not supported, or a field is missing.

    >>> from_config({"model_type": "gpt2"})
    Traceback (most recent call last):
    ValueError: config.json: model_type 'gpt2' is not one of llama, mistral, qwen2, qwen3, gemma3_text, gemma3
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](config)
    except KeyError as missing:
        raise ValueError(f"config.json: the field {missing} is missing (model_type {family!r})") from None


def read(folder: Path) -> Architecture:
    """Read the architecture of a Hugging Face folder.

    Args:
        folder: a directory that holds `config.json`.

    Raises:
        FileNotFoundError: there is no `config.json` in it.
        ValueError: the file is not JSON, or describes a decoder that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a model folder holds config.json, *.safetensors, tokenizer.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return from_config(config)
