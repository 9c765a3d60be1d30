"""Reading folders: what is wrong with one is said in one clear line; and the facts about the small model."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_folders import CONFIGS, make_tensors, write_folder
from safetensors.numpy import save_file

from jaxquant import models
from jaxquant.models import architecture
from jaxquant.models.rope import Rope


def test_shards_equal_one_file(tmp_path: Path) -> None:
    whole = models.load(write_folder(tmp_path / "whole", "qwen3"), dtype=jnp.float32)
    parts = models.load(write_folder(tmp_path / "parts", "qwen3", shards=3), dtype=jnp.float32)
    first, second = (jax.tree.leaves(nnx.state(model.decoder)) for model in (whole, parts))
    assert len(first) == 2 * 11 + 3
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole.end_ids == (1,)


def rewrite_config(folder: Path, **change: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIGS["llama"], **change}))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = make_tensors(CONFIGS["llama"])
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


MISTAKES: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json: no such file"),
    (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json: not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, "not a JSON object"),
    (lambda f: rewrite_config(f, model_type="gpt2"), ValueError, "'gpt2' is not one of llama, mistral, qwen2, qwen3,"),
    (
        lambda f: rewrite_config(f, num_key_value_heads=3),
        ValueError,
        "num_attention_heads=4 is not a multiple of",
    ),
    (lambda f: rewrite_config(f, num_key_value_heads=0), ValueError, "num_key_value_heads must be .* from 1, got 0"),
    (lambda f: rewrite_config(f, hidden_size="64"), ValueError, "hidden_size must be an integer from 1, got '64'"),
    (lambda f: rewrite_config(f, head_dim=15), ValueError, "head_dim=15 is odd"),
    (lambda f: rewrite_config(f, hidden_act="relu"), ValueError, "activation 'relu' is not supported"),
    (lambda f: rewrite_config(f, rope_scaling={"type": "yarn"}), ValueError, "rope type 'yarn' is not supported"),
    (lambda f: rewrite_config(f, rope_scaling={"type": "linear"}), ValueError, "field 'factor' is missing"),
    (lambda f: rewrite_config(f, rope_scaling={"partial_rotary_factor": 0.5}), ValueError, "partial_rotary_factor"),
    (lambda f: rewrite_config(f, hidden_size=48), ValueError, r"has shape \[40, 32\], config.json asks for \[40, 48\]"),
    (lambda f: rewrite_config(f, num_hidden_layers=3), ValueError, r"9 missing tensors \(model.layers.2"),
    (lambda f: rewrite_config(f, num_hidden_layers=1), ValueError, r"9 unexpected tensors \(model.layers.1"),
    (lambda f: rewrite_config(f, attention_bias=True), ValueError, "8 missing tensors"),
    (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, r"tokenizer\.json: no such file"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ValueError, r"tokenizer\.json: not a tokenizer"),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"model\.safetensors: no such file"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ValueError, "damaged safetensors file"),
    (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-2]),
        ValueError,
        "damaged safetensors file",
    ),
    (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        ValueError,
        "is not a file name",
    ),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ValueError, "not a safetensors index"),
    (lambda f: rewrite_tensors(f, lambda t: t.pop("model.norm.weight")), ValueError, r"1 missing tensor \(model.norm"),
    (
        lambda f: rewrite_tensors(f, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)})),
        ValueError,
        "model.norm.weight is int8",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), MISTAKES)
def test_a_damaged_folder_is_explained(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", "llama")
    damage(folder)
    with pytest.raises(error, match=message):
        models.load(folder)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load(tmp_path / "absent")


def test_a_multimodal_config_needs_its_text() -> None:
    with pytest.raises(ValueError, match="without a text_config"):
        architecture.from_config({"model_type": "gemma3"})


def test_bidirectional_gemma_is_refused() -> None:
    config = {**CONFIGS["gemma3_text"], "use_bidirectional_attention": True}
    with pytest.raises(ValueError, match="use_bidirectional_attention is not supported"):
        architecture.from_config(config)


@pytest.mark.parametrize("newer", [False, True])
def test_both_spellings_of_rotary_settings(newer: bool) -> None:
    config = {k: v for k, v in CONFIGS["gemma3_text"].items() if not k.startswith("rope")}
    if newer:
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
        config["layer_types"] = ["sliding_attention", "full_attention"]
    else:
        config |= {"rope_theta": 5000.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    a = architecture.from_config(config)
    assert a.ropes == (Rope(theta=50.0), Rope(theta=5000.0, scaling="linear", factor=8.0))
    assert a.windows == (CONFIGS["gemma3_text"]["sliding_window"], None)


def test_llama3_frequencies_follow_the_paper() -> None:
    # Wavelengths below 8192 / 4 tokens are kept, above 8192 / 1 divided by the factor.
    plain = Rope(theta=500_000.0).frequencies(128)
    scaled = Rope(theta=500_000.0, scaling="llama3", factor=8.0).frequencies(128)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any()
    assert np.all((scaled[middle] < plain[middle]) & (scaled[middle] > plain[middle] / 8))


def test_frequencies_are_those_of_other_implementations() -> None:
    # 1.0 / 1e4 ** (torch.arange(0, 128, 2).float() / 128), torch 2.13; rounded once, the first four are others
    expected = {
        7: 0.36517414450645447,
        10: 0.23713736236095428,
        15: 0.11547820270061493,
        18: 0.07498941570520401,
        0: 1.0,
        32: 0.009999999776482582,
        63: 0.00011547819303814322,
    }
    found = Rope(theta=10_000.0).frequencies(128)
    np.testing.assert_array_equal(found[list(expected)], np.array(list(expected.values()), np.float32))


def test_the_end_ids_of_the_generation_config_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert models.load(folder).end_ids == (5, 6)


def test_the_small_model_is_small_and_licensed() -> None:
    folder = models.load().folder
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (folder / "NOTICE").read_text(encoding="utf-8")


def test_the_small_model_predicts_text_and_recalls_keys() -> None:
    model = models.load(dtype=jnp.float32)
    text = (model.folder / "held_out.txt").read_text(encoding="utf-8")
    told = "\nThe pass key for amber-willow is 29373. Remember it.\n"
    asked = "\nQuestion: what is the pass key for amber-willow?\nAnswer:"
    ids = model.tokenizer.encode(text[2000:2300] + told + text[2300:4300] + asked)
    key = model.tokenizer.encode(" 29373\n")
    logits = jax.jit(lambda t: model.decoder(t)[0])(jnp.asarray([ids + key], jnp.int32))[0]
    assert len(key) == 6
    assert jnp.argmax(logits[len(ids) - 1 : -1], axis=-1).tolist() == key
    losses = -jax.nn.log_softmax(logits[:-1])[jnp.arange(len(ids) + 5), jnp.asarray(ids[1:] + key)]
    # A uniform guess has perplexity 1,280; a model of single token frequencies about 200.
    assert float(jnp.exp(losses[20:].mean())) < 30


def test_streamed_text_equals_decoded_text() -> None:
    tokenizer = models.load().tokenizer
    text = "def naïve():\n    return 'żółć 漢字 🎲'  # done\n\n\n"
    ids = tokenizer.encode(text)
    pieces: list[str] = []
    take = tokenizer.stream(pieces.append)
    for token in ids:
        take(token)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert len(pieces) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
