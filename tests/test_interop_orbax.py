"""Caches as Orbax checkpoints: the same bits, on other devices than those that saved them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxquant
from jaxquant import cache, sharding
from jaxquant.cache import KVCache
from jaxquant.codecs.errors import CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.methods import turboquant

pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
from jaxquant.interop import orbax

DIM, KV_HEADS, LAYERS, BATCH = 16, 4, 3, 4


def filled(**kwargs) -> KVCache:
    keys, values = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)
    sizes = {"layers": LAYERS, "batch": BATCH, "kv_heads": KV_HEADS, "capacity": 24}
    held = cache.init(keys, values, **sizes, **{"sinks": 2, "window": 3, "exact_layers": (0,), **kwargs})
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        k, v = (jnp.asarray(rng.normal(size=(BATCH, 9, KV_HEADS, DIM)), jnp.float32) for _ in range(2))
        held = cache.append(held, layer, k, v)
    return held


def identical(a: KVCache, b: KVCache) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "cache"
    orbax.save(folder, filled())
    return folder


def test_what_is_restored_is_what_was_saved(saved):
    assert identical(orbax.restore(saved), filled())
    assert not identical(orbax.restore(saved), filled(window=4))
    with pytest.raises(ValueError, match="already exists"):
        orbax.save(saved, filled())


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
sys.path.insert(0, {tests!r})
from test_interop_orbax import filled, identical
from jaxquant import sharding
from jaxquant.interop import orbax

action, folder, data, model = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mesh = Mesh(np.array(jax.devices()).reshape(data, model), ("data", "model"))
place = lambda cache: sharding.shardings(sharding.Layout(mesh, batch="data", kv_heads="model"), cache)
if action == "save":
    held = filled()
    orbax.save(folder, jax.device_put(held, place(held)))
else:
    held = orbax.restore(folder, shardings=place)
    assert identical(jax.device_get(held), jax.device_get(filled()))
    codes = held.stacks[0].keys.codes.codes
    assert codes.sharding.num_devices == data * model
    assert codes.addressable_shards[0].data.nbytes * data * model == codes.nbytes
    print("restored")
"""


def run(action: str, folder: Path, data: int, model: int) -> str:
    code = textwrap.dedent(SHARDED).format(tests=str(Path(__file__).parent))
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={data * model}",
        "PYTHONPATH": str(Path(jaxquant.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, action, str(folder), str(data), str(model)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cache_saved_on_one_mesh_is_restored_on_another(tmp_path):
    run("save", tmp_path / "cache", 2, 2)
    assert "restored" in run("restore", tmp_path / "cache", 4, 1)
    assert identical(orbax.restore(tmp_path / "cache"), filled())


def test_shardings_say_what_they_cannot_split():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    held = filled()
    placed = jax.device_put(held, sharding.shardings(sharding.Layout(mesh, batch="data"), held))
    assert placed.length.addressable_shards[0].data.shape == (LAYERS, BATCH // 2)
    assert identical(jax.device_get(placed), jax.device_get(held))
    with pytest.raises(ValueError, match="kv_heads must be an axis of the mesh, one of"):
        sharding.shardings(sharding.Layout(mesh, kv_heads="model"), held)
    with pytest.raises(ValueError, match="batch must be a multiple of the 2 devices that share it, got 3"):
        sharding.shardings(sharding.Layout(mesh, batch="data"), cache.reorder(held, jnp.arange(3)))


def forged(saved: Path, folder: Path, change) -> Path:
    """Copy a checkpoint and change what it says of itself."""
    import shutil

    shutil.copytree(saved, folder)
    path = next((folder / "jaxquant").glob("*"))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return folder


def half(record: dict) -> dict:
    return record["cache"]["fields"]["stacks"]["items"][0]["fields"]["keys"]["fields"]


def swapped_codes(record: dict) -> None:
    stack = record["cache"]["fields"]["stacks"]["items"][0]["fields"]
    keys, values = (stack[name]["fields"] for name in ("keys", "values"))
    keys["codes"], values["codes"] = values["codes"], keys["codes"]


LIES = {
    "another version": (lambda r: r.update(version=2), UnsupportedError, "version"),
    "another class": (lambda r: half(r)["quantizer"].update({"class": "os:system"}), UnsupportedError, "a caller"),
    "a missing array": (lambda r: half(r).update(window={"array": "x"}), CorruptError, "'x' is missing"),
    "no cache": (lambda r: r.update(cache={"value": 3}), CorruptError, "is no cache"),
    "other bits": (lambda r: half(r)["quantizer"]["fields"].update(bits=3), CorruptError, "do not fit"),
    "codes of other bits": (swapped_codes, CorruptError, "codes must be"),
    "places twice": (lambda r: r["cache"]["fields"].update(places=[[0, 0]] * 3), CorruptError, "do not fit"),
    "full empty arrays": (lambda r: r.update(empty={"cache/x": [[3], "float32"]}), CorruptError, "not described"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie, saved, tmp_path):
    change, error, match = LIES[lie]
    with pytest.raises(error, match=match):
        orbax.restore(forged(saved, tmp_path / "forged", change))


def test_other_folders_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        orbax.restore(tmp_path / "none")
    with pytest.raises(UnsupportedError, match="no checkpoint of a cache"):
        orbax.restore(tmp_path)
    with pytest.raises(LimitError, match="decoded bytes"):
        orbax.restore(saved, limits=Limits(decoded_bytes=100))
