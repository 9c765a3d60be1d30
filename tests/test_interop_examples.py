"""The scripts for other frameworks run, on the small model in the package or on a random one."""

import importlib.util
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxquant import models

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"interop_dlpack": "torch", "interop_torch": "transformers", "interop_mlx": "mlx_lm"}


def need(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extra jaxquant[{'mlx' if 'mlx' in name else 'torch'}]")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, monkeypatch, capsys):
    need(NEEDS[name])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    new = [] if name == "interop_dlpack" else ["--new", "6"]
    monkeypatch.setattr(sys, "argv", [name, *new])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert {"interop_dlpack": "the same memory: True"}.get(name, "--- K4/V2") in said


@pytest.mark.filterwarnings("default")
def test_the_evaluation_recipe(monkeypatch, tmp_path):
    """On a small random model: the harness scores, pass keys are asked for, and compression was active."""
    need("transformers", "lm_eval")
    import torch
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = models.load().folder
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1280, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text((small / "held_out.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")

    recipe = runpy.run_path(str(EXAMPLES / "evaluate_transformers.py"))
    sizes = "--bits-k 2 --limit 1 --lengths 256 --rows 1 --chunk 100 --json".split()
    found = recipe["main"](
        ["--model", str(tmp_path / "model"), "--text", str(text), "--scratch", str(tmp_path), *sizes]
    )
    assert found["exact"].keys() == found["compressed"].keys()
    exact, compressed = (report["text bits_per_byte"] for report in found.values())
    assert exact != compressed, "nothing was compressed"
    assert abs(exact / compressed - 1) < 0.5
    assert "pass keys, 256 tokens" in found["exact"]

    # The harness's perplexity is that of one forward pass without it.
    ids = torch.tensor(
        [[0, *transformers.AutoTokenizer.from_pretrained(small).encode(text.read_text(), add_special_tokens=False)]]
    )
    with torch.no_grad():
        own = torch.log_softmax(model(ids[:, :-1]).logits.float(), -1).gather(2, ids[:, 1:, None]).sum()
    bits = -float(own) / np.log(2) / len(text.read_text(encoding="utf-8").encode())
    assert jax.numpy.allclose(bits, exact, rtol=1e-3)
