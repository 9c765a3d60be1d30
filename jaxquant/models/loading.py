"""Read a Hugging Face folder into a decoder."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxquant.models import architecture as architectures
from jaxquant.models.architecture import Architecture
from jaxquant.models.decoder import Decoder
from jaxquant.models.tokenizer import Tokenizer

SMALL = Path(__file__).parent / "small"
"""The folder of the model that ships with the package."""

# Tensors that folders may hold beside a decoder's own: vision towers, and buffers that older exports saved.
_FOREIGN = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with what is needed to talk to it.

    Attributes:
        folder: where it was read from.
        architecture: its shapes and features.
        decoder: the network.
        tokenizer: text to token ids and back.
        end_ids: token ids that end a continuation.
    """

    folder: Path
    architecture: Architecture
    decoder: Decoder
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]


def load(path: Path | str | None = None, dtype: DTypeLike | None = None) -> Model:
    """Load a model from a Hugging Face folder: `config.json`, `*.safetensors`, `tokenizer.json`.

    Tensors are read one at a time from memory-mapped files and cast on the way, so that the peak is the
    decoder plus one tensor.

    Args:
        path: the folder; None takes the small model that ships with the package.
        dtype: dtype of weights and activations; None is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError: the folder describes a decoder that is not supported, or its tensors do not fit it.

    >>> model = load()
    >>> model.architecture.family
    'llama'
    """
    folder = SMALL if path is None else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a local folder in the Hugging Face layout")
    compute = (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16) if dtype is None else dtype
    architecture = architectures.read(folder)
    tokenizer = Tokenizer.read(folder)
    return Model(
        folder=folder,
        architecture=architecture,
        decoder=load_decoder(folder, architecture, dtype=compute),
        tokenizer=tokenizer,
        end_ids=end_ids(folder),
    )


def load_decoder(folder: Path, architecture: Architecture, *, dtype: DTypeLike) -> Decoder:
    """Load the weights of a folder into a decoder.

    Args:
        folder: holds `model.safetensors`, or shards with their `model.safetensors.index.json`.
        architecture: what the folder's `config.json` says.
        dtype: dtype of weights and activations.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected, or of the wrong shape, or a file is damaged.
    """
    abstract = nnx.eval_shape(lambda: Decoder(architecture, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    wanted = {hugging_face_name(path): path for path, _ in nnx.to_flat_state(state)}
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(state)}
    with contextlib.ExitStack() as stack:
        tensors = dict(_tensors(folder, stack))
        if architecture.tied:
            tensors.pop("lm_head.weight", None)
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise ValueError(f"{folder}: {_count(missing, 'missing')}; config.json promises them")
        if unexpected := sorted(tensors.keys() - wanted.keys()):
            raise ValueError(f"{folder}: {_count(unexpected, 'unexpected')}; config.json does not describe them")
        loaded: list[tuple[tuple[Any, ...], nnx.Param]] = []
        for name, path in wanted.items():
            file, stored = tensors[name]
            transposed = path[-1] == "kernel"
            expected = shapes[path][::-1] if transposed else shapes[path]
            found = tuple(file.get_slice(stored).get_shape())
            if found != expected:
                raise ValueError(f"{folder}: {stored} has shape {list(found)}, config.json asks for {list(expected)}")
            array = file.get_tensor(stored)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{folder}: {stored} is {array.dtype}; only floating-point weights are supported")
            loaded.append((path, nnx.Param(jnp.asarray(array.T if transposed else array, dtype=dtype))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def hugging_face_name(path: tuple[Any, ...]) -> str:
    """Name the tensor that a Hugging Face folder holds for a parameter.

    Args:
        path: the parameter's path in the decoder.

    >>> hugging_face_name(("layers", 0, "mlp", "up_proj", "kernel"))
    'model.layers.0.mlp.up_proj.weight'
    """
    parts = [str(part) for part in path]
    if parts[-1] in ("kernel", "embedding"):
        parts[-1] = "weight"
    name = ".".join(parts)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _tensors(folder: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield every tensor's plain name with the open file and the name it has there."""
    for name, file in _files(folder, stack):
        if _FOREIGN.search(name):
            continue
        # Multimodal folders put the decoder under one of two prefixes, depending on their age.
        plain = re.sub(r"^(language_model\.|model\.language_model\.)(?!model\.|lm_head\.)", "model.", name)
        yield plain.removeprefix("language_model."), (file, name)


def _files(folder: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Any]]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from None
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index}: shard {shard!r} is not a file name")
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; weights must be in safetensors files")
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged safetensors file: {error}") from None
        for name in file.keys():
            yield name, file


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''} ({shown})"


def end_ids(folder: Path) -> tuple[int, ...]:
    """Read the ids that end a text, from generation_config.json or else config.json."""
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
            if ids is not None:
                return tuple(np.atleast_1d(ids).tolist())
    return ()
