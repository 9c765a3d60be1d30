"""Model folders that say how their cache is to be compressed, so that a server starts without working it out again.

`jaxquant convert` puts `cache.qatc` beside the weights: the quantizers of every layer, what their codes look like, the
sinks and the window, and a fingerprint of the weights. It is one QATC v3 file.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from jaxquant import _descriptions
from jaxquant._stacks import KVCache, Stack, Store
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.protocols import Quantizer

FILE = "cache.qatc"
KEY = "jaxquant.cache"  # of the metadata that describes the cache
VERSION = 1
_CLASSES = {_descriptions.name_of(kind): kind for kind in (KVCache, Stack, Store)}
_ENDS = 1 << 20  # bytes at both ends of a weight file that go into the fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """How the cache of one model is compressed.

    Attributes:
        template: an empty cache of one row and one coded token, its arrays in NumPy.
    """

    template: KVCache

    @property
    def sinks(self) -> int:
        """First tokens of a row that stay exact."""
        return max(stack.sinks for stack in self.template.stacks)

    @property
    def window(self) -> int:
        """Newest tokens of a row that stay exact."""
        return max(stack.window for stack in self.template.stacks)

    def quantizers(self) -> tuple[list[Quantizer], list[Quantizer]]:
        """Give those of the keys, and those of the values, of every layer."""
        held = [(self.template.stacks[stack], index) for stack, index in self.template.places]
        halves = ([getattr(stack, half).at(index) for stack, index in held] for half in ("keys", "values"))
        keys, values = (jax.tree.map(jnp.asarray, each) for each in halves)
        return keys, values

    def cache(self, *, batch: int, capacity: int) -> KVCache:
        """Make an empty cache, the same as `cache.init` would, without asking the quantizers again.

        Raises:
            ValueError: a size is out of range.
        """
        if batch < 1 or capacity <= self.sinks:
            raise ValueError(f"batch must be at least 1 and capacity {self.sinks + 1}, got {batch} and {capacity}")

        def empty(leaf: np.ndarray, tokens: int) -> jax.Array:
            return jax.device_put(np.zeros((leaf.shape[0], batch, leaf.shape[2], tokens, *leaf.shape[4:]), leaf.dtype))

        def store(held: Store) -> Store:
            slots = capacity - held.sinks.shape[3]
            return Store(
                quantizer=jax.tree.map(jnp.array, held.quantizer),
                codes=jax.tree.map(lambda leaf: empty(leaf, slots), held.codes),
                sinks=empty(np.asarray(held.sinks), held.sinks.shape[3]),
                window=empty(np.asarray(held.window), held.window.shape[3]),
            )

        counts = np.zeros((self.template.layers, batch), np.int32)
        return KVCache(
            stacks=tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in self.template.stacks),
            length=jax.device_put(counts),
            exact_from=jax.device_put(counts),
            places=self.template.places,
        )

    def nbytes(self, *, batch: int, capacity: int) -> int:
        """Count the bytes that such a cache holds, without making it: they grow by as many with every token."""
        least = self.sinks + 1
        first, second = (self.cache(batch=batch, capacity=least + more).nbytes for more in (0, 1))
        return first + (capacity - least) * (second - first)


def write(folder: Path, cache: KVCache) -> None:
    """Say how the cache of a folder's model is compressed.

    Args:
        folder: with weights in safetensors files.
        cache: made for the model; what it holds does not matter.

    Raises:
        TypeError: a quantizer holds something that a file cannot hold.
    """

    def store(held: Store) -> Store:
        codes = jax.tree.map(
            lambda leaf: np.zeros((leaf.shape[0], 1, leaf.shape[2], 1, *leaf.shape[4:]), leaf.dtype), held.codes
        )
        sinks, window = (np.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype) for x in (held.sinks, held.window))
        return Store(quantizer=held.quantizer, codes=codes, sinks=sinks, window=window)  # pyright: ignore[reportArgumentType]

    template = KVCache(
        stacks=tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in cache.stacks),
        length=cache.length[:, :1],
        exact_from=cache.exact_from[:, :1],
        places=cache.places,
    )
    arrays: dict[str, np.ndarray] = {}
    node = _descriptions.describe(template, "cache", arrays)
    record = {"version": VERSION, "weights": fingerprint(folder), "cache": node}
    with v3.Writer(folder / FILE, metadata={KEY: json.dumps(record)}) as writer:
        for name, values in arrays.items():
            writer.add(name, values)


def read(folder: Path, *, classes: Iterable[type] = (), limits: Limits | None = None) -> Prepared:
    """Read how the cache of a folder's model is compressed.

    Args:
        folder: that `write` wrote to.
        classes: quantizers, rotations and so on from outside of jaxquant that the file may name.
        limits: what the file may claim.

    Raises:
        FileNotFoundError: the folder has no `cache.qatc`.
        UnsupportedError: it is of a later version, needs a class not in `classes`, or is for other weights.
        CorruptError: it contradicts itself or a checksum.
        LimitError: it claims more than `limits` allow; nothing was allocated for it.
    """
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{folder / FILE}: no such file; `jaxquant convert` makes one")
    with v3.open(folder / FILE, limits=limits) as reader:
        try:
            record = json.loads(reader.metadata[KEY])
        except KeyError:
            raise UnsupportedError(f"{folder / FILE} describes no cache: its metadata has no {KEY!r}") from None
        except (ValueError, RecursionError):
            raise CorruptError(f"{folder / FILE}: the metadata {KEY!r} is not valid JSON") from None
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise UnsupportedError(f"{folder / FILE} is not of version {VERSION}")
        if record.get("weights") != fingerprint(folder):
            raise UnsupportedError(f"{folder / FILE} was made for other weights than those beside it")
        known = _CLASSES | {_descriptions.name_of(kind): kind for kind in classes}
        try:
            template = _descriptions.rebuild(record.get("cache"), reader.read, known)  # pyright: ignore[reportArgumentType]
            _check(template)
        except CodecError:
            raise
        except Exception as error:  # whatever a class makes of fields that do not fit each other
            raise CorruptError(f"{folder / FILE}: the cache does not fit together: {str(error)[:200]}") from None
    return Prepared(template=template)


def fingerprint(folder: Path) -> str:
    """Hash the names, sizes and ends of the weight files: quick, whatever their size, and no proof of authenticity."""
    digest = xxhash.xxh3_128()
    coded = sorted(folder.glob("weights.qatc"))  # the same weights, which may be all that is left
    for path in coded or sorted(folder.glob("*.safetensors")):
        if path.name == "calibration.safetensors":
            continue
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, path.stat().st_size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _check(template: Any) -> None:
    """Check shapes alone: tracing quantizers is what a prepared folder saves."""
    layers, batch = template.length.shape
    held = [stack.layers for stack in template.stacks]
    places = sorted(tuple(place) for place in template.places)
    if not isinstance(template, KVCache) or batch != 1 or template.exact_from.shape != (layers, 1):
        raise ValueError("it is no cache of one row")
    if len(places) != layers or places != [(stack, i) for stack, size in enumerate(held) for i in range(size)]:
        raise ValueError("the layers do not fill the stacks")
    for stack in template.stacks:
        for store in (stack.keys, stack.values):
            lead, dim = (stack.layers, 1, template.kv_heads), store.quantizer.dim
            exact = [(*lead, size, dim) for size in (stack.sinks, stack.window)]
            leaves = jax.tree.leaves(store.codes)
            if dim != template.dim or [store.sinks.shape, store.window.shape] != exact or not leaves:
                raise ValueError("exact tokens have another shape")
            if any(leaf.shape[:4] != (*lead, 1) for leaf in leaves):
                raise ValueError("codes have another shape")
