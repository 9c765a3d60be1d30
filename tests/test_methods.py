"""The contract of `jaxquant.methods`: every file there is found, and every example of it must survive this.

A new method needs no edit here. What is asked of an example depends on the protocol it satisfies.
"""

import functools
import importlib
import pkgutil
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import methods, protocols, quantizers

MODULES = [
    importlib.import_module(f"{methods.__name__}.{found.name}") for found in pkgutil.iter_modules(methods.__path__)
]
EXAMPLES = {
    f"{module.__name__.rpartition('.')[2]}-{i}": example()
    for module in MODULES
    for i, example in enumerate(getattr(module, "EXAMPLES", ()))
}
QUANTIZERS = {name: example for name, example in EXAMPLES.items() if isinstance(example, protocols.Quantizer)}
EPS = float(np.finfo(np.float32).eps)


def check_module(module):
    doc = module.__doc__ or ""
    assert doc.strip(), "no docstring"
    assert "References:" in doc, "no References in the docstring"
    assert re.search(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", doc), "no arXiv id in the docstring"
    assert isinstance(getattr(module, "EXAMPLES", None), tuple), "no EXAMPLES tuple"
    assert module.EXAMPLES, "EXAMPLES is empty"
    assert all(map(callable, module.EXAMPLES)), "EXAMPLES must be functions, so that an import computes nothing"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_module_names_its_source_and_gives_examples(module):
    check_module(module)


def test_modules_were_found_and_a_bad_one_is_refused():
    assert MODULES
    assert EXAMPLES
    assert set(QUANTIZERS) == set(EXAMPLES), "an example satisfies no protocol that is tested here"
    bad = type(methods)("bad", "Does something.")
    bad.EXAMPLES = (lambda: 1,)
    with pytest.raises(AssertionError, match="no References"):
        check_module(bad)
    assert not isinstance(object(), protocols.Quantizer)


def vectors(quantizer, count=5):
    return jax.random.normal(jax.random.key(2), (2, count, quantizer.dim))


def perturbed(quantizer):
    """The same method with every number a little different."""

    def change(leaf):
        return leaf * (1 + 2.0**-10) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[::-1]

    return jax.tree.map(change, quantizer)


@functools.cache
def traces():
    return {}


@functools.cache
def program(name):
    """Everything the contract asks, in one compiled function; `traces` counts how often it was traced."""
    traces()[name] = 0

    @jax.jit
    def run(quantizer, x, q):
        traces()[name] += 1
        code = quantizer.quantize(x)
        expanded = quantizer.expand(code)
        single = quantizer.quantize(x.astype(jnp.bfloat16))
        _, scanned = jax.lax.scan(lambda _, row: (None, quantizer.quantize(row)), None, x)
        mapped = jax.vmap(jax.vmap(quantizer.quantize))(x)
        return {
            "code": code,
            "expanded": expanded,
            "restored": quantizer.restore(expanded),
            "projected": quantizer.project(q),
            "half": quantizer.restore(quantizer.expand(single)),
            "scanned": scanned,
            "mapped": mapped,
        }

    return run


@functools.cache
def result(name):
    quantizer = QUANTIZERS[name]
    x = vectors(quantizer)
    return jax.tree.map(np.asarray, program(name)(quantizer, x, x[:, ::-1]))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_shapes_dtypes_and_finite_values(name):
    quantizer, out = QUANTIZERS[name], result(name)
    assert out["restored"].shape == (2, 5, quantizer.dim)
    assert out["projected"].shape == out["expanded"].shape == (2, 5, out["expanded"].shape[-1])
    assert {out[part].dtype for part in ("expanded", "restored", "projected", "half")} == {np.dtype("float32")}
    for leaf in jax.tree.leaves(out["code"]):
        assert leaf.shape[:2] == (2, 5), "every leaf of a code keeps the leading axes"
    for leaf in jax.tree.leaves(out):
        assert np.isfinite(leaf.astype(np.float32)).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_decoding_resembles_the_input(name):
    x, out = np.asarray(vectors(QUANTIZERS[name])), result(name)
    for part in ("restored", "half"):
        error = np.sum((x - out[part]) ** 2) / np.sum(x**2)
        assert error < 0.5
        assert np.sum((x[:, ::-1] - out[part]) ** 2) / np.sum(x**2) > 0.5
    assert np.sum((out["half"] - out["restored"]) ** 2) / np.sum(x**2) < 0.05


@pytest.mark.parametrize("name", QUANTIZERS)
def test_project_is_the_transpose_of_restore(name):
    quantizer, out = QUANTIZERS[name], result(name)
    q = np.asarray(vectors(quantizer))[:, ::-1].astype(np.float64)
    left = np.sum(q * out["restored"], axis=-1)
    right = np.sum(out["projected"].astype(np.float64) * out["expanded"], axis=-1)
    size = np.linalg.norm(q, axis=-1) * np.linalg.norm(out["expanded"].astype(np.float64), axis=-1)
    atol = 8 * quantizer.dim * EPS * size
    assert (np.abs(left - right) <= atol).all()
    assert (np.abs(left - right[:, ::-1]) > atol).any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_scan_and_vmap_give_the_same_code(name):
    out = result(name)
    chex.assert_trees_all_equal(out["scanned"], out["code"])
    chex.assert_trees_all_equal(out["mapped"], out["code"])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_numbers_do_not_retrace(name):
    quantizer, x = QUANTIZERS[name], vectors(QUANTIZERS[name])
    other = program(name)(perturbed(quantizer), x + 1, x)
    assert traces()[name] == 1
    changed = [
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(program(name)(quantizer, x, x)), strict=True)
    ]
    assert all(changed), "numbers were baked into the program"
    assert traces()[name] == 1


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tree_round_trip(name):
    quantizer = QUANTIZERS[name]
    leaves, structure = jax.tree.flatten(quantizer)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(quantizer)
    assert jax.tree.structure(again) == structure
    assert hash(structure) == hash(jax.tree.structure(again))
    jax.tree.map(lambda leaf: None, quantizer)
    jax.tree.unflatten(structure, [object()] * len(leaves))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bytes_are_counted(name):
    code = quantizers.quantize(QUANTIZERS[name], vectors(QUANTIZERS[name]))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(code))
    assert held < 10 * QUANTIZERS[name].dim * 2, "no smaller than 16-bit vectors"
    assert getattr(code, "nbytes", held) == held
