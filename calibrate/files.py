"""The calibration file: the quantizers of every layer, for one model, in one safetensors file.

Its metadata has one key, `jaxquant.calibration`, a JSON object:

    {"version": 1, "fingerprint": ..., "layers": L, "kv_heads": H, "dim": D,
     "templates": [{"keys": {"rule": ..., "widths": [[bits, coordinates], ...], "basis": true}, "values": {...}}, ...],
     "setting": {...}}

and layer i's tensors are `i.keys.mean`, `.analysis`, `.synthesis`, `.weights`, `.levels.0`, ..., and so for values, all
float32 with kv_heads first. `basis` is false where the model itself gives the coordinates of the code.

Version 2 has halves whose last coordinates have a trellis code, as `"trellis": {"states": S, "runs": [[bits,
coordinates], ...]}` says, and tensors `.trellis.0`, ..., for each of those runs the levels of all windows.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxquant import trellis
from jaxquant.mixed import Mixed
from jaxquant.models.loading import Model

KEY = "jaxquant.calibration"
VERSION, TRELLIS_VERSION = 1, 2
_RULES = ("least_squares", "preserve", "none")
_SAMPLE = 4096  # elements of a weight that go into the fingerprint
_LIMITS = {"layers": 4096, "kv_heads": 4096, "dim": 4096}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Quantizers of every layer of one model.

    Attributes:
        keys: of each layer.
        values: of each layer.
        fingerprint: of the model, as `fingerprint` gives it.
        setting: what it was made with, for people.
    """

    keys: tuple[Mixed, ...]
    values: tuple[Mixed, ...]
    fingerprint: str
    setting: Mapping[str, Any]

    @property
    def bits(self) -> float:
        """Mean bits per coordinate of keys and values, gains included."""
        halves = (*self.keys, *self.values)
        return float(np.mean([8 * half.bytes_per_vector / half.dim for half in halves]))

    def check(self, model: Model) -> None:
        """Refuse a model that it was not made for.

        Raises:
            ValueError: the shapes or the weights differ.
        """
        a = model.architecture
        mine = (len(self.keys), self.keys[0].mean.shape[0], self.keys[0].dim)
        if mine != (a.layers, a.kv_heads, a.dim):
            raise ValueError(
                f"the calibration is for {mine[0]} layers of {mine[1]} kv heads of {mine[2]}; "
                f"the model has {a.layers} of {a.kv_heads} of {a.dim}"
            )
        if self.fingerprint != fingerprint(model):
            raise ValueError("the calibration was made for a model of the same shape with other weights")


def fingerprint(model: Model) -> str:
    """Hash a model's architecture and a sample of each of its weights, in bfloat16, whatever dtype it is loaded in.

    Example:
        >>> from jaxquant import models
        >>> len(fingerprint(models.load()))
        32
    """
    from flax import nnx

    digest = hashlib.blake2b(repr(model.architecture).encode(), digest_size=16)
    for path, weight in sorted(nnx.to_flat_state(nnx.state(model.decoder)), key=lambda item: repr(item[0])):
        flat = weight[...].reshape(-1)
        step = max(1, flat.shape[0] // _SAMPLE)
        digest.update(repr((path, weight[...].shape)).encode())
        digest.update(np.asarray(flat[::step].astype(jnp.bfloat16)).view(np.uint16).tobytes())
    return digest.hexdigest()


def write(path: Path, calibration: Calibration) -> None:
    """Write a file, in place of what was there before; a reader never sees half of it."""
    arrays: dict[str, np.ndarray] = {}
    templates = []
    for layer, halves in enumerate(zip(calibration.keys, calibration.values, strict=True)):
        templates.append({})
        for name, half in zip(("keys", "values"), halves, strict=True):
            template = {"rule": half.rule, "widths": half.widths, "basis": half.analysis is not None}
            if half.code is not None:
                runs = [(bits, count) for ((bits,), count) in half.code.runs]
                template["trellis"] = {"states": half.code.states, "runs": runs}
            templates[-1][name] = template
            for part, shape in _shapes(template, half.mean.shape[0], half.dim).items():
                array = np.asarray(_part(half, part), np.float32)
                if array.shape != shape:
                    raise ValueError(f"{part} of the {name} of layer {layer} has shape {array.shape}, not {shape}")
                arrays[f"{layer}.{name}.{part}"] = array
    record = {
        "version": TRELLIS_VERSION
        if any("trellis" in half for layer in templates for half in layer.values())
        else VERSION,
        "fingerprint": calibration.fingerprint,
        "layers": len(calibration.keys),
        "kv_heads": calibration.keys[0].mean.shape[0],
        "dim": calibration.keys[0].dim,
        "templates": templates,
        "setting": dict(calibration.setting),
    }
    data = save(arrays, metadata={KEY: json.dumps(record)})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Calibration:
    """Read a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, is something else, is of a later version, or contradicts itself.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise ValueError(f"{path}: not a calibration: its metadata has no {KEY!r}")
            record = _record(path, text)
            halves = {name: [] for name in ("keys", "values")}
            names = set(file.keys())
            for layer, template in enumerate(record["templates"]):
                for name, made in halves.items():
                    made.append(_half(path, file, names, f"{layer}.{name}", template[name], record))
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged calibration: {error}") from None
    if names:
        raise ValueError(f"{path}: damaged calibration: nothing describes the tensor {min(names)!r}")
    return Calibration(
        keys=tuple(halves["keys"]),
        values=tuple(halves["values"]),
        fingerprint=record["fingerprint"],
        setting=record["setting"],
    )


def _record(path: Path, text: str) -> dict[str, Any]:
    """Check everything but the tensors."""
    damaged = f"{path}: damaged calibration:"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{damaged} its metadata is not JSON") from None
    known = (VERSION, TRELLIS_VERSION)
    if not isinstance(record, dict) or type(record.get("version")) is not int or record["version"] not in known:
        found = record.get("version") if isinstance(record, dict) else None
        raise ValueError(
            f"{path}: calibration of version {str(found)[:20]}; this jaxquant reads versions {VERSION} and "
            f"{TRELLIS_VERSION}"
        )
    for name, most in _LIMITS.items():
        size = record.get(name)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"{damaged} {name} is {str(size)[:20]}, not a number from 1 to {most}")
    templates = record.get("templates")
    if not isinstance(templates, list) or len(templates) != record["layers"]:
        raise ValueError(f"{damaged} it has no template for each of {record['layers']} layers")
    for layer, template in enumerate(templates):
        for name in ("keys", "values"):
            if not isinstance(template, dict) or not _is_template(template.get(name), record["dim"]):
                raise ValueError(f"{damaged} the template of the {name} of layer {layer} is not valid")
    if not isinstance(record.get("fingerprint"), str) or not isinstance(record.get("setting"), dict):
        raise ValueError(f"{damaged} it has no fingerprint or setting")
    return record


def _is_template(template: Any, dim: int) -> bool:
    if not isinstance(template, dict) or template.get("rule") not in _RULES:
        return False
    widths: Any = template.get("widths")
    code = template.get("trellis", {"states": 4, "runs": []})
    if type(template.get("basis")) is not bool or not isinstance(code, dict):
        return False
    states: Any = code.get("states")
    coded: Any = code.get("runs")
    if type(states) is not int or states not in trellis.STATES:
        return False
    if not _are_runs(widths, 8, dim) or not _are_runs(coded, trellis.most_bits(states), dim):
        return False
    bits = sum(width * count for width, count in coded)
    if "trellis" in template and (not bits or bits % 8 or bits < states.bit_length() - 1):
        return False
    return 0 < sum(count for _, count in widths + coded) <= dim


def _are_runs(runs: Any, most: int, dim: int) -> bool:
    if not isinstance(runs, list):
        return False
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or any(type(number) is not int for number in run):
            return False
        if not 1 <= run[0] <= most or not 1 <= run[1] <= dim:
            return False
    return True


def _half(path: Path, file: Any, names: set[str], name: str, template: dict[str, Any], record: dict[str, Any]) -> Mixed:
    parts: dict[str, Any] = {"analysis": None, "synthesis": None}
    tables: dict[str, list[Any]] = {"levels": [], "trellis": []}
    for part, shape in _shapes(template, record["kv_heads"], record["dim"]).items():
        label = f"{name}.{part}"
        if label not in names:
            raise ValueError(f"{path}: damaged calibration: the tensor {label!r} is missing")
        names.remove(label)
        found = tuple(file.get_slice(label).get_shape())
        if found != shape or file.get_slice(label).get_dtype() != "F32":
            raise ValueError(f"{path}: damaged calibration: {label!r} is {list(found)}, not float32 {list(shape)}")
        array = file.get_tensor(label)
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: damaged calibration: {label!r} is not finite")
        kind = part.partition(".")[0]
        if kind in tables:
            tables[kind].append(jnp.asarray(array))
        else:
            parts[part] = jnp.asarray(array)
    code = None
    if "trellis" in template:
        code = trellis.Code(
            tables=tuple((table,) for table in tables["trellis"]),
            runs=tuple(((bits,), count) for bits, count in template["trellis"]["runs"]),
            states=template["trellis"]["states"],
        )
    widths = tuple((bits, count) for bits, count in template["widths"])
    return Mixed(
        **parts, levels=tuple(tables["levels"]), widths=widths, dim=record["dim"], rule=template["rule"], code=code
    )


def _shapes(template: Mapping[str, Any], heads: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Say which arrays a quantizer has, and their shapes."""
    widths, code = template["widths"], template.get("trellis", {"runs": []})
    width = sum(count for _, count in (*widths, *code["runs"]))
    shapes: dict[str, tuple[int, ...]] = {"mean": (heads, dim), "weights": (heads, width)}
    if template["basis"]:
        shapes |= {"analysis": (heads, width, dim), "synthesis": (heads, width, dim)}
    shapes |= {f"levels.{i}": (heads, count, 2**bits) for i, (bits, count) in enumerate(widths)}
    return shapes | {f"trellis.{i}": (code["states"] << bits,) for i, (bits, _) in enumerate(code["runs"])}


def _part(half: Mixed, part: str) -> Any:
    kind, _, place = part.partition(".")
    if kind == "trellis":
        assert half.code is not None
        return half.code.tables[int(place)][0]
    return half.levels[int(place)] if kind == "levels" else getattr(half, part)
