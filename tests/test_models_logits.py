"""Logits of every family against `transformers`: stored ones always, fresh ones where torch is installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import CONFIGS, GOLDEN, make_tensors, reference_logits, tokens, write_folder
from safetensors.numpy import load_file, save_file

from jaxquant import models

REFERENCE_LM = Path(__file__).parents[2] / "shared" / "reference-lm"


def tolerance(expected: np.ndarray) -> float:
    """Bound float32 rounding: about 20 roundings in a row per layer, each half an ulp of values a few times larger."""
    return 100 * float(np.finfo(np.float32).eps) * float(np.abs(expected).max())


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = models.load(folder, dtype=jnp.float32)
    return np.asarray(jax.jit(lambda t: model.decoder(t)[0])(ids))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_the_stored_ones(family: str, tmp_path: Path, golden: dict[str, np.ndarray]) -> None:
    found = logits(write_folder(tmp_path, family), tokens())
    np.testing.assert_allclose(found, golden[family], rtol=0, atol=tolerance(golden[family]))


CONFIG_MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 501.0}),
    ("llama", {"rms_norm_eps": 1e-3}),
    ("llama_llama3", {"rope_scaling": None}),
    ("llama_llama3", {"rope_scaling": {**CONFIGS["llama_llama3"]["rope_scaling"], "high_freq_factor": 3.0}}),
    ("llama_linear", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.1}}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"rope_theta": 501.0}),
    ("gemma3_text", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gemma3_text", {"rope_local_base_freq": 51.0}),
    ("gemma3_text", {"rope_scaling": None}),
    ("gemma3_text", {"query_pre_attn_scalar": 25}),
    ("gemma3_text", {"final_logit_softcapping": 4.1}),
    ("gemma3_text", {"hidden_activation": "silu"}),
]


@pytest.mark.parametrize(("family", "change"), CONFIG_MISTAKES)
def test_a_wrong_config_is_noticed(
    family: str, change: dict[str, Any], tmp_path: Path, golden: dict[str, np.ndarray]
) -> None:
    folder = write_folder(tmp_path, family)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[family], **change}))
    error = np.abs(logits(folder, tokens()) - golden[family]).max()
    assert error > 10 * tolerance(golden[family])


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("llama", "model.layers.1.post_attention_layernorm.weight"),
        ("llama_linear", "model.layers.0.self_attn.o_proj.bias"),
        ("llama_linear", "model.layers.0.mlp.down_proj.bias"),
        ("qwen2", "model.layers.0.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("gemma3_text", "model.layers.1.post_feedforward_layernorm.weight"),
        ("gemma3_text", "model.layers.0.pre_feedforward_layernorm.weight"),
    ],
)
def test_every_small_tensor_counts(family: str, tensor: str, tmp_path: Path, golden: dict[str, np.ndarray]) -> None:
    folder = write_folder(tmp_path, family)
    tensors = make_tensors(CONFIGS[family])
    neutral = 1 if "norm" in tensor and family != "gemma3_text" else 0
    tensors[tensor] = np.full_like(tensors[tensor], neutral)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.abs(logits(folder, tokens()) - golden[family]).max() > 10 * tolerance(golden[family])


def test_rows_longer_than_the_window_are_tested() -> None:
    assert tokens().shape[1] > 3 * CONFIGS["mistral"]["sliding_window"]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_multimodal_folder(prefix: str, tmp_path: Path, golden: dict[str, np.ndarray]) -> None:
    folder = write_folder(tmp_path, "gemma3_text")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed["vision_tower.vision_model.embeddings.patch_embedding.weight"] = np.zeros((2, 2), np.float32)
    renamed["multi_modal_projector.mm_input_projection_weight"] = np.zeros((2, 2), np.float32)
    save_file(renamed, folder / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": CONFIGS["gemma3_text"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    found = logits(folder, tokens())
    np.testing.assert_allclose(found, golden["gemma3_text"], rtol=0, atol=tolerance(golden["gemma3_text"]))


@pytest.fixture
def transformers_logits(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> Callable[[Path, np.ndarray], np.ndarray]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return reference_logits


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", CONFIGS)
def test_the_stored_logits_are_those_of_transformers(
    family: str, tmp_path: Path, golden: dict[str, np.ndarray], transformers_logits: Callable
) -> None:
    fresh = transformers_logits(write_folder(tmp_path, family), tokens())
    np.testing.assert_allclose(golden[family], fresh, rtol=0, atol=tolerance(fresh))


@pytest.mark.filterwarnings("default")
def test_the_small_model_in_transformers(transformers_logits: Callable) -> None:
    model = models.load(dtype=jnp.float32)
    text = (model.folder / "held_out.txt").read_text(encoding="utf-8")
    ids = np.asarray(model.tokenizer.encode(text[:3000]), np.int32)[None, :512]
    expected = transformers_logits(model.folder, ids)
    np.testing.assert_allclose(logits(model.folder, ids), expected, rtol=0, atol=tolerance(expected))


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not REFERENCE_LM.is_dir(), reason="needs the reference model beside the checkout")
def test_the_reference_model_in_transformers(transformers_logits: Callable) -> None:
    with np.load(REFERENCE_LM / "eval_tokens.npz") as stored:
        ids = stored["held_out"][None, :256].astype(np.int32)
    expected = transformers_logits(REFERENCE_LM, ids)
    np.testing.assert_allclose(logits(REFERENCE_LM, ids), expected, rtol=0, atol=tolerance(expected))
