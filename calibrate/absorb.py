"""Put the basis of the values into the weights: the model then computes values in the coordinates of the code.

With A the analysis of a kv head, completed to an invertible matrix, W_V becomes W_V A^T and W_O becomes A^-T W_O for
each query head that reads it: the same function, and nothing to multiply at run time.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import save_file

from jaxquant.calibrate import files
from jaxquant.calibrate.files import Calibration
from jaxquant.mixed import Mixed
from jaxquant.models.loading import Model, hugging_face_name

_SHARD = 4 << 30  # bytes of a weight file


def absorb(model: Model, calibration: Calibration) -> tuple[Model, Calibration]:
    """Change a model and its calibration so that values need no basis; both arguments are left as they are.

    Args:
        model: with weights in float32, so that rounding stays small.
        calibration: of that model.

    Raises:
        ValueError: the calibration is for another model, or its value basis is absorbed already.
    """
    calibration.check(model)
    graph, state = nnx.split(model.decoder)
    decoder = nnx.merge(graph, state)
    a = model.architecture
    values = []
    for layer, half in zip(decoder.layers, calibration.values, strict=True):
        basis = completed(half)
        inverse = np.linalg.inv(basis)
        attention = layer.self_attn
        for name in ("kernel", "bias"):
            weight = getattr(attention.v_proj, name, None)
            if weight is not None and weight[...] is not None:
                old = np.asarray(weight[...], np.float64).reshape(-1, a.kv_heads, a.dim)
                new = np.einsum("nhd,hed->nhe", old, basis).reshape(weight[...].shape)
                setattr(attention.v_proj, name, nnx.Param(jnp.asarray(new, weight[...].dtype)))
        output = attention.o_proj.kernel[...]
        old = np.asarray(output, np.float64).reshape(a.kv_heads, -1, a.dim, a.hidden)
        new = np.einsum("hde,hgdn->hgen", inverse, old).reshape(output.shape)
        attention.o_proj.kernel = nnx.Param(jnp.asarray(new, output.dtype))
        mean = np.einsum("hed,hd->he", basis, np.asarray(half.mean, np.float64))
        values.append(
            dataclasses.replace(half, mean=jnp.asarray(mean, jnp.float32), analysis=None, synthesis=None)
        )  # fmt: skip
    changed = dataclasses.replace(model, decoder=decoder)
    return changed, dataclasses.replace(calibration, values=tuple(values), fingerprint=files.fingerprint(changed))


def completed(half: Mixed) -> Float[np.ndarray, "kv_heads dim dim"]:
    """Complete the analysis of the coded coordinates to an invertible matrix.

    The rows that are added are orthogonal to every vector that a coordinate stands for, so that the inverse begins with
    the synthesis.

    Raises:
        ValueError: there is no basis, because it is absorbed already.
    """
    if half.analysis is None or half.synthesis is None:
        raise ValueError("the calibration has no value basis: it is absorbed in the model already")
    synthesis, analysis = (np.asarray(x, np.float64) for x in (half.synthesis, half.analysis))
    rest = np.linalg.svd(synthesis, full_matrices=True)[2][:, half.width :]
    return np.concatenate([analysis, rest], axis=1)


def difference(first: Model, second: Model, *, tokens: int = 256) -> float:
    """Give the largest difference of two models' logits on random tokens, as a share of the largest logit."""
    ids = np.random.default_rng(0).integers(0, first.architecture.vocabulary, (1, tokens))
    one, other = (np.asarray(model.decoder(jnp.asarray(ids, jnp.int32))[0]) for model in (first, second))
    return float(np.abs(one - other).max() / np.abs(one).max())


def write_folder(model: Model, calibration: Calibration | None, folder: Path) -> None:
    """Write a model as a Hugging Face folder in float32, with its calibration beside the weights.

    Args:
        model: what `absorb` returned; its tokenizer and configuration are copied from where it was read.
        calibration: likewise, becomes `calibration.safetensors`; None leaves it out.
        folder: is made; must not hold a model yet.

    Raises:
        ValueError: the folder holds a model, or the family's folders hold more than a text decoder.
    """
    if model.architecture.family == "gemma3":
        raise ValueError("gemma3 folders hold a vision tower, which would be lost; convert a gemma3_text folder")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model") and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=2), encoding="utf-8")
    shards: list[dict[str, np.ndarray]] = [{}]
    for path, weight in nnx.to_flat_state(nnx.state(model.decoder)):
        array = np.asarray(weight[...], np.float32)
        array = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
        if shards[-1] and sum(part.nbytes for part in shards[-1].values()) + array.nbytes > _SHARD:
            shards.append({})
        shards[-1][hugging_face_name(path)] = array
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if calibration is not None:
        files.write(folder / "calibration.safetensors", calibration)
