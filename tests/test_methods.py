"""The contract of `jaxquant.methods`: every file there is found, and every example of it must survive this.

A new method needs no edit here, and one outside of jaxquant takes the same test: JAXQUANT_CONTRACT=package.module. What
is asked of an example depends on the protocol it satisfies. Each check is shown to refuse a method that breaks it
(`BROKEN`).
"""

import dataclasses
import functools
import importlib
import inspect
import os
import pkgutil
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import attention, cache, methods, protocols, quantizers, rotations
from jaxquant.diffusion.guidance import Gate
from jaxquant.methods import uniform
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import pytree, static
from jaxquant.streams import Stream

NAMES = [f"{methods.__name__}.{found.name}" for found in pkgutil.iter_modules(methods.__path__)]
NAMES += os.environ.get("JAXQUANT_CONTRACT", "").split()
MODULES = [importlib.import_module(name) for name in NAMES]
EXAMPLES = {
    f"{module.__name__.rpartition('.')[2]}-{i}": example()
    for module in MODULES
    for i, example in enumerate(getattr(module, "EXAMPLES", ()))
}
QUANTIZERS = {name: example for name, example in EXAMPLES.items() if isinstance(example, protocols.Quantizer)}
PROTOCOLS = [
    kind
    for kind in vars(protocols).values()
    if inspect.isclass(kind) and getattr(kind, "_is_protocol", False) and kind.__module__ == protocols.__name__
]
EPS = float(np.finfo(np.float32).eps)
LEAD = (2, 5)


def check_module(module):
    doc = module.__doc__ or ""
    assert doc.strip(), "no docstring"
    assert "References:" in doc, "no References in the docstring"
    named = re.search(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})|References:\s+No (paper|arXiv id)", doc)
    assert named, "no arXiv id in the docstring, and no word that there is none"
    assert isinstance(getattr(module, "EXAMPLES", None), tuple), "no EXAMPLES tuple"
    assert module.EXAMPLES, "EXAMPLES is empty"
    assert all(map(callable, module.EXAMPLES)), "EXAMPLES must be functions, so that an import computes nothing"
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = [f for f in own if not f.__name__.startswith("_")]
    assert all(f.__doc__ for f in public), "a function has no docstring"
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    assert any(">>>" in (thing.__doc__ or "") for thing in [module, *public, *kinds]), "no example in a docstring"
    if hasattr(module, "kv") or hasattr(module, "fit"):
        assert re.search(r"Differs from the papers?:", doc), "does not say where it differs from the paper"


def vectors(quantizer):
    return jax.random.normal(jax.random.key(2), (*LEAD, quantizer.dim))


@functools.cache
def hostile(dim):
    """Vectors with one bad one among good ones, by kind."""
    good = np.asarray(jax.random.normal(jax.random.key(3), (*LEAD, dim)))
    kinds = {"zero": 0.0, "nan": np.nan, "infinite": np.inf, "huge": -3e38, "tiny": 1e-40}
    out = {}
    for name, value in kinds.items():
        out[name] = good.copy()
        out[name][0, 2] = value
        if name in ("nan", "infinite"):
            out[name][1, 3, 5] = value
    out["mixed"] = good.copy()
    out["mixed"][0, 2] *= np.where(np.arange(dim) % 2, 1e38, -1e-38)
    return out


class Trial:
    """A quantizer and what it does, compiled once; `traces` counts how often."""

    def __init__(self, quantizer):
        self.quantizer, self.traces = quantizer, 0
        self.x = vectors(quantizer)

        @jax.jit
        def run(quantizer, x, q):
            self.traces += 1
            code = quantizer.quantize(x)
            expanded = quantizer.expand(code)
            half = x.astype(jnp.bfloat16)
            _, scanned = jax.lax.scan(lambda _, row: (None, quantizer.quantize(row)), None, x)
            some = jax.random.normal(jax.random.key(4), (2, *expanded.shape))
            return {
                "code": code,
                "expanded": expanded,
                "restored": quantizer.restore(expanded),
                "projected": quantizer.project(q),
                "half": quantizer.quantize(half),
                "widened": quantizer.quantize(half.astype(jnp.float32)),
                "half_restored": quantizer.restore(quantizer.expand(quantizer.quantize(half))),
                "scanned": scanned,
                "mapped": jax.vmap(jax.vmap(quantizer.quantize))(x),
                "some": some,
                "some_restored": quantizer.restore(some),
                "sum_restored": quantizer.restore(some[0] + 2 * some[1]),
            }

        self.run = run

    @functools.cached_property
    def out(self):
        return jax.tree.map(np.asarray, self.run(self.quantizer, self.x, self.x[:, ::-1]))


TRIALS = {name: Trial(example) for name, example in QUANTIZERS.items()}


def check_shapes(trial):
    """Shapes, dtypes, finite values."""
    quantizer, out = trial.quantizer, trial.out
    assert out["restored"].shape == (*LEAD, quantizer.dim)
    assert out["projected"].shape == out["expanded"].shape == (*LEAD, out["expanded"].shape[-1])
    assert {out[part].dtype for part in ("expanded", "restored", "projected")} == {np.dtype("float32")}
    for leaf in jax.tree.leaves(out["code"]):
        assert leaf.shape[:2] == LEAD, "every leaf of a code keeps the leading axes"
    for leaf in jax.tree.leaves(out):
        assert np.isfinite(leaf.astype(np.float32)).all()


def check_resembles(trial):
    """Decoding resembles what was coded, and nothing else."""
    x, out = np.asarray(trial.x), trial.out
    for part in ("restored", "half_restored"):
        assert np.sum((x - out[part]) ** 2) / np.sum(x**2) < 0.5
        assert np.sum((x[:, ::-1] - out[part]) ** 2) / np.sum(x**2) > 0.5


def check_bfloat16(trial):
    """Vectors in bfloat16 are coded as the same numbers in float32."""
    chex.assert_trees_all_equal(trial.out["half"], trial.out["widened"])


def check_transpose(trial):
    """<q, restore(y)> = <project(q), y> for codes and for any other y, such as a weighted sum of codes."""
    out = trial.out
    q = np.asarray(trial.x)[:, ::-1].astype(np.float64)
    pairs = [(out["expanded"], out["restored"]), *zip(out["some"], out["some_restored"], strict=True)]
    for y, restored in pairs:
        left = np.sum(q * restored, axis=-1)
        right = np.sum(out["projected"].astype(np.float64) * y, axis=-1)
        size = np.linalg.norm(out["projected"].astype(np.float64), axis=-1) * np.linalg.norm(y, axis=-1)
        size = np.maximum(size, np.linalg.norm(q, axis=-1) * np.linalg.norm(restored.astype(np.float64), axis=-1))
        atol = 8 * trial.quantizer.dim * EPS * size
        assert (np.abs(left - right) <= atol).all(), "project is not the transpose of restore"
        assert (np.abs(left - right[:, ::-1]) > atol).any()


def check_linear(trial):
    """Restoring a sum of codes is the sum of what each restores to."""
    out = trial.out
    expected = out["some_restored"][0] + 2 * out["some_restored"][1]
    bound = 8 * trial.quantizer.dim * EPS * np.linalg.norm(expected, axis=-1, keepdims=True)
    assert (np.abs(out["sum_restored"] - expected) <= bound).all(), "restore is not linear"


def check_scan_and_vmap(trial):
    """A vector's code depends on that vector alone: scan and vmap give the same codes."""
    chex.assert_trees_all_equal(trial.out["scanned"], trial.out["code"])
    chex.assert_trees_all_equal(trial.out["mapped"], trial.out["code"])


def check_hostile(trial):
    """NaN, infinities, extreme and zero vectors decode to finite ones and reach no other vector."""
    for name, x in hostile(trial.quantizer.dim).items():
        out = trial.run(trial.quantizer, jnp.asarray(x), trial.x)
        assert np.isfinite(np.asarray(out["restored"])).all(), name
        clean = jnp.asarray(np.where(np.isfinite(x).all(axis=-1, keepdims=True) & (np.abs(x) < 1e6), x, 1.0))
        same = trial.run(trial.quantizer, clean, trial.x)
        good = np.asarray(clean == x).all(axis=-1)
        for mine, theirs in zip(jax.tree.leaves(out["code"]), jax.tree.leaves(same["code"]), strict=True):
            assert (np.asarray(mine)[good] == np.asarray(theirs)[good]).all(), f"{name}: one bad vector reached another"


def check_one_trace(trial):
    """Other numbers retrace nothing, every array matters, and no number is part of the structure."""
    quantizer, before = trial.quantizer, trial.out
    leaves, structure = jax.tree.flatten(quantizer)

    def result(tree, x):
        out = trial.run(tree, x, trial.x[:, ::-1])
        return [np.asarray(leaf) for name in ("code", "restored", "projected") for leaf in jax.tree.leaves(out[name])]

    usual = [leaf for name in ("code", "restored", "projected") for leaf in jax.tree.leaves(before[name])]
    for i, leaf in enumerate(leaves):
        other = leaf * 1.25 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[..., ::-1]
        changed = result(jax.tree.unflatten(structure, [*leaves[:i], other, *leaves[i + 1 :]]), trial.x)
        assert any((a != b).any() for a, b in zip(usual, changed, strict=True)), f"array {i} is not used"
    moved = result(quantizer, trial.x * jnp.abs(trial.x) + 1)
    coded = len(jax.tree.leaves(before["code"])) + 1
    assert all((a != b).any() for a, b in zip(usual[:coded], moved[:coded], strict=True)), "the input does not matter"
    assert trial.traces == 1, "other numbers retraced"
    for node in jax.tree.leaves(quantizer, is_leaf=lambda node: dataclasses.is_dataclass(node)):
        assert not floats_in_structure(node), "a static field holds a float"


def floats_in_structure(node):
    if not dataclasses.is_dataclass(node):
        return False
    fields = [(field, getattr(node, field.name)) for field in dataclasses.fields(node)]
    if any(field.metadata.get("static") and isinstance(value, float) for field, value in fields):
        return True
    return any(floats_in_structure(value) for _, value in fields)


def check_tree(trial):
    """The tree survives a round trip, and JAX may put anything into its leaves."""
    quantizer = trial.quantizer
    leaves, structure = jax.tree.flatten(quantizer)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves), "a leaf is not an array"
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(quantizer)
    assert jax.tree.structure(again) == structure
    assert hash(structure) == hash(jax.tree.structure(again))
    jax.tree.map(lambda leaf: None, quantizer)
    jax.tree.unflatten(structure, [object()] * len(leaves))


def check_bytes(trial):
    """The bytes of a code are all there is, they are counted, and they are fewer than those of 16-bit vectors."""
    code = quantizers.quantize(trial.quantizer, trial.x)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(code))
    assert held < LEAD[0] * LEAD[1] * trial.quantizer.dim * 2, "no smaller than 16-bit vectors"
    assert code.nbytes == held, "nbytes does not count every byte"
    packed = cache.init(trial.quantizer, trial.quantizer, layers=1, batch=1, kv_heads=2, capacity=8)
    assert packed.bytes_per_token == 2 * held / (LEAD[0] * LEAD[1])


def check_cache(trial):
    """Attention over the codes of a cache is attention over decoded vectors."""
    quantizer = trial.quantizer
    k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, quantizer.dim)) for i in (5, 6))
    q = jax.random.normal(jax.random.key(7), (1, 4, quantizer.dim))

    @jax.jit
    def run(quantizer, q, k, v):
        held = cache.init(quantizer, quantizer, layers=1, batch=1, kv_heads=2, capacity=8)
        held = cache.append(held, 0, k[:, :4], v[:, :4])
        held = cache.append(held, 0, k[:, 4:], v[:, 4:])
        decoded = [quantizer.restore(quantizer.expand(quantizer.quantize(jnp.swapaxes(x, 1, 2)))) for x in (k, v)]
        return attention.decode_attention(q, held, 0, implementation="xla")[0], *decoded

    out, k, v = (np.asarray(x, np.float64) for x in run(quantizer, q, k, v))
    q = np.asarray(q, np.float64)
    for head in range(4):
        scores = k[0, head // 2] @ q[0, head] / quantizer.dim**0.5
        weights = np.exp(scores - scores.max())
        expected = (weights / weights.sum()) @ v[0, head // 2]
        size = np.abs(v[0, head // 2]).max()
        np.testing.assert_allclose(out[0, head], expected, atol=200 * EPS * size)
        swapped = (weights[::-1] / weights.sum()) @ v[0, head // 2]
        assert np.abs(out[0, head] - swapped).max() > 200 * EPS * size


CHECKS = [
    check_shapes, check_resembles, check_bfloat16, check_transpose, check_linear, check_scan_and_vmap, check_hostile,
    check_one_trace, check_tree, check_bytes, check_cache,
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_module_names_its_source_and_gives_examples(module):
    check_module(module)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer(name, check):
    check(TRIALS[name])


def test_every_example_satisfies_a_protocol():
    assert len(MODULES) >= 9
    composed = (Pipeline, Stream, Gate)
    for name, example in EXAMPLES.items():
        assert any(isinstance(example, kind) for kind in (*PROTOCOLS, *composed)), f"{name} satisfies no protocol"
    assert not any(isinstance(object(), kind) for kind in PROTOCOLS)


@pytest.mark.parametrize(
    ("doc", "examples", "message"),
    [
        ("", (1,), "no docstring"),
        ("Does something.", (1,), "no References"),
        ("Does something.\n\nReferences: somebody.", (1,), "no arXiv id"),
        ("Does something.\n\nReferences: arXiv:2504.19874.", None, "no EXAMPLES"),
        ("Does something.\n\nReferences: arXiv:2504.19874.", (), "EXAMPLES is empty"),
        ("Does something.\n\nReferences: arXiv:2504.19874.", (1,), "EXAMPLES must be functions"),
        ("Does something.\n\nReferences: arXiv:2504.19874.", (lambda: 1,), "no example in a docstring"),
    ],
)
def test_a_module_that_breaks_the_contract_is_refused(doc, examples, message):
    module = type(methods)("bad", doc)
    if examples is not None:
        module.EXAMPLES = examples
    with pytest.raises(AssertionError, match=message):
        check_module(module)


@pytree
class Sound(uniform.Uniform):
    """What the broken methods below are, but for one fault each."""


@pytree
class ForgetsToRotateQueries(uniform.Uniform):
    def project(self, q, /):
        return q.astype(jnp.float32)


@pytree
class RestoresWithABias(uniform.Uniform):
    def restore(self, y, /):
        return self.rotation.unrotate(y) + 1e-3


@pytree
class ExpandsToHalf(uniform.Uniform):
    def expand(self, code, /):
        return super(ExpandsToHalf, self).expand(code).astype(jnp.bfloat16)


@pytree
class FlipsSigns(uniform.Uniform):
    def expand(self, code, /):
        return -super(FlipsSigns, self).expand(code)


@pytree
class RoundsInHalf(uniform.Uniform):
    def quantize(self, x, /):
        kept = jax.lax.reduce_precision(x, 8, 4) if x.dtype == jnp.bfloat16 else x
        return super(RoundsInHalf, self).quantize(kept)


@pytree
class OneScaleForAll(uniform.Uniform):
    def quantize(self, x, /):
        code = super(OneScaleForAll, self).quantize(x)
        return uniform.Steps(
            codes=code.codes, scales=jnp.full_like(code.scales, jnp.max(code.scales)), zeros=code.zeros
        )


@pytree
class DropsAnAxis(uniform.Uniform):
    def quantize(self, x, /):
        code = super(DropsAnAxis, self).quantize(x)
        assert code.zeros is not None
        zeros = code.zeros[:1] if code.zeros.ndim == 2 else code.zeros
        return uniform.Steps(codes=code.codes, scales=code.scales, zeros=zeros)


@pytree
class TrustsItsInput(uniform.Uniform):
    def quantize(self, x, /):
        y = self.rotation.rotate(x.astype(jnp.float32))
        low, high = jnp.min(y, axis=-1), jnp.max(y, axis=-1)
        code = super(TrustsItsInput, self).quantize(x)
        return uniform.Steps(codes=code.codes, scales=(high - low) / 15, zeros=low)


@pytree
class IgnoresItsClip(uniform.Uniform):
    def quantize(self, x, /):
        plain = uniform.Uniform(rotation=self.rotation, clip=jnp.float32(1), bits=self.bits, symmetric=self.symmetric)
        return plain.quantize(x)


@pytree
class FloatInStructure(uniform.Uniform):
    gain: float = static(default=1.5)


@pytree
class KeepsTheVector(uniform.Uniform):
    def quantize(self, x, /):
        code = super(KeepsTheVector, self).quantize(x)
        return uniform.Steps(codes=code.codes, scales=x.astype(jnp.float32), zeros=code.zeros)

    def expand(self, code, /):
        return self.rotation.rotate(code.scales)


@pytree
class Hides(uniform.Steps):
    @property
    def nbytes(self):
        return self.codes.nbytes


@pytree
class CountsCodesOnly(uniform.Uniform):
    def quantize(self, x, /):
        code = super(CountsCodesOnly, self).quantize(x)
        return Hides(codes=code.codes, scales=code.scales, zeros=code.zeros)


@pytree
class DoublesKeysInACache(uniform.Uniform):
    """Right for vectors [2, 5, dim], wrong where there are heads."""

    def expand(self, code, /):
        y = super(DoublesKeysInACache, self).expand(code)
        return y * 2 if y.ndim == 4 and y.shape[-2] == 8 else y


BROKEN = {
    ForgetsToRotateQueries: check_transpose,
    RestoresWithABias: check_linear,
    ExpandsToHalf: check_shapes,
    FlipsSigns: check_resembles,
    RoundsInHalf: check_bfloat16,
    OneScaleForAll: check_scan_and_vmap,
    DropsAnAxis: check_shapes,
    TrustsItsInput: check_hostile,
    IgnoresItsClip: check_one_trace,
    FloatInStructure: check_one_trace,
    KeepsTheVector: check_bytes,
    CountsCodesOnly: check_bytes,
    DoublesKeysInACache: check_cache,
}


def made(kind, clip=0.95):
    return kind(rotation=rotations.hadamard(jax.random.key(0), 64), clip=jnp.asarray(clip, jnp.float32), bits=4)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_method_is_refused(kind):
    with pytest.raises((AssertionError, TypeError, ValueError)):
        BROKEN[kind](Trial(made(kind)))


def test_what_is_not_an_array_is_refused():
    with pytest.raises(AssertionError, match="a leaf is not an array"):
        check_tree(Trial(dataclasses.replace(made(Sound), clip=0.95)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_same_method_without_a_fault_is_accepted(check):
    check(SOUND)


SOUND = Trial(made(Sound))
