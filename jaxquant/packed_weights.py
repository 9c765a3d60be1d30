"""A model's weights in one QATC v3 file: the codes of those that were coded, and every other number as it was.

`weights.qatc` holds `NAME/bits` (the width of each vector), `NAME/4/codes` and `NAME/4/scales` for each width that
occurs, and plain tensors under their Hugging Face names. What `load` makes of them is bit for bit what the safetensors
files beside it hold.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxquant.calibrate import weights
from jaxquant.calibrate.weights import Packed
from jaxquant.codecs import v3, workers
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.models import architecture as architectures
from jaxquant.models.decoder import Decoder
from jaxquant.models.loading import Model, end_ids, hugging_face_name
from jaxquant.models.tokenizer import Tokenizer
from jaxquant.quantizers import Quantized

FILE = "weights.qatc"
KEY = "jaxquant.weights"  # of the metadata that describes them
VERSION = 1


def write(folder: Path, model: Model, packed: dict[str, Packed]) -> int:
    """Write the weights of a model into a folder, and return the bytes of the file.

    Args:
        folder: to write to.
        model: that `weights.compress` made.
        packed: likewise.
    """
    axes = {name: one.axis for name, one in packed.items()}
    with v3.Writer(
        folder / FILE, metadata={KEY: json.dumps({"version": VERSION, "axes": axes})}, threads=workers.available()
    ) as writer:
        for path, weight in nnx.to_flat_state(nnx.state(model.decoder)):
            name = hugging_face_name(path)
            if name not in packed:
                array = np.asarray(weight[...], np.float32)
                writer.add(name, np.ascontiguousarray(array.T) if path[-1] == "kernel" else array)
                continue
            writer.add(f"{name}/bits", packed[name].bits)
            for width, code in packed[name].codes.items():
                writer.add(f"{name}/{width}/codes", np.asarray(code.codes))
                writer.add(f"{name}/{width}/scales", np.asarray(code.scales))
    return writer.nbytes


def load(folder: Path, *, dtype: DTypeLike | None = None, limits: Limits | None = None) -> Model:
    """Load a model from its codes.

    Args:
        folder: with `weights.qatc`, `config.json` and `tokenizer.json`.
        dtype: of weights and activations; None is float32 on a CPU and bfloat16 elsewhere.
        limits: what the file may claim.

    Raises:
        FileNotFoundError: a file is missing.
        CodecError: `weights.qatc` is damaged, of another version, or does not fit `config.json`.
        ValueError: `config.json` describes a decoder that is not supported.
    """
    compute = (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16) if dtype is None else dtype
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{folder / FILE}: no such file; `jaxquant convert --weights` makes one")
    architecture = architectures.read(folder)
    abstract = nnx.eval_shape(lambda: Decoder(architecture, dtype=compute, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    loaded = []
    with v3.open(folder / FILE, limits=limits) as reader:
        axes = _axes(reader)
        for path, variable in nnx.to_flat_state(state):
            name = hugging_face_name(path)
            array = (_unpacked if name in axes else _plain)(reader, name, path[-1] == "kernel", variable.shape, axes)
            loaded.append((path, nnx.Param(jnp.asarray(array, dtype=compute))))
    return Model(
        folder=folder,
        architecture=architecture,
        decoder=nnx.merge(graph, nnx.from_flat_state(loaded)),
        tokenizer=Tokenizer.read(folder),
        end_ids=end_ids(folder),
    )


def _axes(reader: v3.Reader) -> dict[str, int]:
    try:
        record = json.loads(reader.metadata[KEY])
    except KeyError:
        raise UnsupportedError(f"the file holds no weights: its metadata has no {KEY!r}") from None
    except (ValueError, RecursionError):
        raise CorruptError(f"the metadata {KEY!r} is not valid JSON") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UnsupportedError(f"the weights are not of version {VERSION}")
    axes = record.get("axes")
    if not isinstance(axes, dict) or any(axis not in (0, 1) or type(axis) is not int for axis in axes.values()):
        raise CorruptError("the axes of the weights are not valid")
    return axes


def _expect(reader: v3.Reader, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = reader.tensors.get(name)
    if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
        found = tensor and f"{tensor.dtype}{list(tensor.shape)}"
        raise CorruptError(f"{name!r} must be {dtype}{list(shape)}, not {found}")
    return reader.read(name)


def _plain(reader: v3.Reader, name: str, kernel: bool, shape: tuple[int, ...], axes: dict[str, int]) -> np.ndarray:
    array = _expect(reader, name, "float32", shape[::-1] if kernel else shape)
    return array.T if kernel else array


def _unpacked(reader: v3.Reader, name: str, kernel: bool, shape: tuple[int, ...], axes: dict[str, int]) -> np.ndarray:
    if not kernel or len(shape) != 2:
        raise CorruptError(f"{name!r} is no matrix")
    length, vectors = shape[axes[name]], shape[1 - axes[name]]
    bits = _expect(reader, f"{name}/bits", "uint8", (vectors,))
    if bits.max(initial=0) > max(weights.WIDTHS):
        raise CorruptError(f"{name!r} has vectors of {bits.max()} bits")
    codes = {}
    for width in sorted(set(bits.tolist()) - {0}):
        try:
            dim = weights.coder(length, width).dim
        except ValueError as error:
            raise CorruptError(f"{name!r}: {error}") from None
        count, pieces = int((bits == width).sum()), length // dim
        code = _expect(reader, f"{name}/{width}/codes", "uint8", (count, pieces, -(-dim * width // 8)))
        scales = _expect(reader, f"{name}/{width}/scales", "float16", (count, pieces))
        codes[width] = Quantized(codes=code, scales=scales)  # pyright: ignore[reportArgumentType]
    return weights.unpack(Packed(axes[name], bits, codes), (shape[0], shape[1]))


def recognizes(folder: Path) -> bool:
    """Tell whether a folder holds weights in codes.

    >>> recognizes(Path("no/such/folder"))
    False
    """
    return (folder / FILE).is_file()
