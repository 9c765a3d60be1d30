"""Every Python block of the documents runs: each document as one program, and the blocks for each extra as another."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python( \w+)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXTRAS = {"torch": "transformers", "mlx": "mlx_lm"}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(path: Path, extra: str = "") -> str:
    """Join the Python blocks, each on the line it has in the document, so that errors point there.

    A block that opens with "python torch" needs that extra.
    """
    text = path.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for match in BLOCK.finditer(text):
        if (match.group(1) or "").strip() != extra:
            continue
        first = text[: match.start(2)].count("\n")
        code = match.group(2).splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path).strip()], ids=lambda path: path.name)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(path), str(path), "exec"), {"__name__": "__document__"})


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_that_need_an_extra_run(path, extra, tmp_path, monkeypatch):
    code = blocks(path, extra)
    if not code.strip():
        return
    pytest.importorskip(EXTRAS[extra], reason=f"needs the extra jaxquant[{extra}]")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(path), "exec"), {"__name__": "__document__"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path):
    assert "@@" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_a_block_that_fails_is_noticed(tmp_path):
    broken = tmp_path / "broken.md"
    broken.write_text("text\n```python\nassert False\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        exec(compile(blocks(broken), str(broken), "exec"), {})
