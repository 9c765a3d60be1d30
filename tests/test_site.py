"""What the site is made with: pages from files, links, formulas. Building it is a step of `.ci/run`."""

import importlib.util
import pkgutil
import sys
from pathlib import Path

import pytest

import jaxquant
from jaxquant import methods

pytest.importorskip("mkdocs", reason="needs the dependency group docs")
pytest.importorskip("latex2mathml", reason="needs the dependency group docs")
ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pages, mathematics, docstrings = load("pages"), load("mathematics"), load("docstrings")


class Page:
    def __init__(self, uri):
        self.file = type("File", (), {"src_uri": uri})()


def test_every_public_module_has_a_page():
    found = {name for names in pages.modules().values() for name in names}
    for module in pkgutil.walk_packages(jaxquant.__path__, "jaxquant."):
        parts = module.name.split(".")
        if any(part.startswith("_") for part in parts) or parts[-1] == "cli" or parts[-1].endswith("_cli"):
            continue
        if module.ispkg and module.name not in ("jaxquant.codecs.v2", "jaxquant.codecs.v3"):
            continue
        inside = module.name.startswith(("jaxquant.codecs.v2.", "jaxquant.codecs.v3.", "jaxquant.methods."))
        assert (module.name in found) != inside, module.name
    assert "jaxquant.cache" in found


def test_every_method_has_a_page():
    found = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    assert {path.stem for path in pages.methods()} == found


def test_a_page_of_a_method_has_its_row_and_no_other():
    page = pages.method("h2o")
    assert "::: jaxquant.methods.h2o" in page
    assert "| h2o |" in page
    assert "turboquant" not in page
    assert "| 2 | turboquant | 68.0 |" in pages.method("turboquant")
    assert "## What it costs" not in pages.method("snr")  # no cache, no cost


@pytest.mark.parametrize(
    ("uri", "text", "expected"),
    [
        ("index.md", "[a](docs/kernels.md#how)", "[a](kernels.md#how)"),
        ("index.md", '<img src="docs/images/speed.svg">', '<img src="images/speed.svg">'),
        ("tutorials/paper.md", "[a](../../CONTRIBUTING.md#x)", "[a](../contributing.md#x)"),
        ("methods.md", "[a](../jaxquant/methods/h2o.py)", "[a](methods/h2o.md)"),
        ("contributing.md", "[a](docs/references.bib)", "[a](references.md)"),
        ("examples/index.md", "[a](generate.py)", "[a](generate.md)"),
        ("index.md", "[a](docs/missing.md)", "[a](docs/missing.md)"),  # mkdocs refuses it
        ("index.md", "[a](https://arxiv.org)", "[a](https://arxiv.org)"),
        ("index.md", "```python torch\n```", "```python\n```"),
    ],
)
def test_links_of_the_repository_lead_to_pages(uri, text, expected):
    assert pages.on_page_markdown(text, Page(uri)) == expected


def test_every_command_and_option_is_shown():
    text = pages.commands()
    for words in (
        "## jaxquant eval",
        "## jaxquant qatc encode",
        "## jaxquant benchmark attention",
        "`--needle-rows`",
        r"\[:T+1]",
    ):
        assert words in text


def test_examples_and_papers_are_listed_in_order():
    assert pages.examples()[:2] == ["quantize_in_jit", "generate"]
    assert "[arXiv:2504.19874](https://arxiv.org/abs/2504.19874) (2025)" in pages.papers()
    assert "python tests" not in pages.example(ROOT / "examples" / "generate.py")
    assert "    python examples/flax_attach.py" in pages.example(ROOT / "examples" / "flax_attach.py")
    assert "bench_attention.py" in pages.on_page_markdown("<!-- scripts -->", Page("methodology.md"))


def test_formulas_become_mathml_and_unknown_ones_stop_the_build():
    inline = mathematics.on_page_content('<span class="arithmatex">\\(x_1 &lt; 2\\)</span>, and')
    assert inline.startswith('<span style="white-space: nowrap"><math')
    assert "<mo>&#x0003C;</mo>" in inline
    assert inline.endswith(",</span> and")
    block = mathematics.on_page_content('<div class="arithmatex">\\[\\frac{a}{b}\\]</div>')
    assert "<mfrac>" in block
    assert 'display="block"' in block
    with pytest.raises(ValueError, match="no MathML"):
        mathematics.on_page_content('<span class="arithmatex">\\(\\nonsense{x}\\)</span>')


def test_examples_and_commands_of_docstrings_are_shown_as_such():
    class Documented:
        docstring = type(
            "Docstring", (), {"value": "Do.\n\npython x [-y]\n\nExample:\n    >>> 1\n    1\n\nFor Example: no."}
        )()

    docstrings.Examples().on_object(obj=Documented)
    assert Documented.docstring.value == "Do.\n\n    python x [-y]\n\nExamples:\n    >>> 1\n    1\n\nFor Example: no."
