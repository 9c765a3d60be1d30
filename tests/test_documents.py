"""What documents show is true: Python blocks run, commands exist, links lead somewhere, papers are listed.

Each document runs as one program, and its blocks for each extra as another.
"""

import ast
import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from jaxquant import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LANGUAGES = {"", "python", "python torch", "python mlx", "python numcodecs"}
EXTRAS = {"torch": "transformers", "mlx": "mlx_lm", "numcodecs": "numcodecs"}
CODE = re.compile(r"^\s*(?:import [\w.]+( as \w+)?|from [\w.]+ import .*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^(?:\S*/)?(jaxquant|python)$")
SOURCES = [path for folder in ("jaxquant", "codecs", "calibrate", "examples") for path in (ROOT / folder).rglob("*.py")]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)


def blocks(path, extra=""):
    """Join the Python blocks, each on the line it has in the document, so that errors point there.

    A block that opens with "python torch" needs that extra.
    """
    text = path.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for match in FENCE.finditer(text):
        if match[1] != f"python {extra}".strip():
            continue
        first = text[: match.start(2)].count("\n")
        code = match[2].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def escaped(text):
    """Find Python that no test runs: in a block of another or no language, or indented as code."""
    found = [f"```{match[1]}" for match in FENCE.finditer(text) if match[1] not in LANGUAGES]
    found += [match[2] for match in FENCE.finditer(text) if match[1] == "" and CODE.search(match[2])]
    return found + [match[0] for match in CODE.finditer(FENCE.sub("", text))]


def shown(text):
    """List the commands of a document: lines of blocks without a language, and code in the text."""
    lines = [
        line for match in FENCE.finditer(text) if match[1] == "" for line in match[2].replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for line in lines:
        for part in re.split(r"&&|\|\||;", " ".join(line.split())):
            words = part.split(" #")[0].strip()
            while "=" in words.split(" ")[0] or words.startswith("export "):  # settings of the environment
                words = words.partition(" ")[2]
            if COMMAND.match(words.split(" ")[0]) and " " in words:
                yield words


def wrong(command):
    """Say what is wrong with a command, if something is."""
    words = shlex.split(re.sub(r"[\[\]]", " ", command.split(" > ")[0]))
    words = [word for word in words if word not in ("...", "/")]
    if words[0].endswith("python"):
        return wrong_script(words[1:])
    found = typer.main.get_command(cli.app)
    words = words[1:]
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0).rstrip(",")
        if name not in found.commands and hasattr(found, "commands") and name.upper() == name:
            return None
        if name not in found.commands:
            return f"no command {name}"
        found = found.commands[name]
    options = {option for parameter in found.params for option in parameter.opts}
    if hasattr(found, "commands"):
        options |= {
            option for part in found.commands.values() for parameter in part.params for option in parameter.opts
        }
    unknown = [word for word in (word.partition("=")[0] for word in words) if word.startswith("--")]
    return ", ".join(f"no option {word}" for word in unknown if word not in options | {"--help"}) or None


def wrong_script(words):
    """Likewise for `python FILE` and `python -m MODULE`."""
    if words[0] == "-m":
        return None if importlib.util.find_spec(words[1]) else f"no module {words[1]}"
    script = ROOT / words[0]
    if not script.is_file():
        return f"no file {words[0]}" if words[0].endswith(".py") else None
    source = script.read_text(encoding="utf-8")
    beside = (script.with_name(f"{name}.py") for name in re.findall(r"^import (\w+)$", source, re.MULTILINE))
    source += "".join(file.read_text(encoding="utf-8") for file in beside if file.is_file())
    names = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - {"--help"}
    known = {
        name for name in names if f'"{name}"' in source or re.search(rf"\b{name[2:].replace('-', '_')}\b\s*:", source)
    }
    return ", ".join(f"no option {name}" for name in sorted(names - known)) or None


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path).strip()], ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(path), str(path), "exec"), {"__name__": "__document__"})


@pytest.mark.parametrize("extra", EXTRAS)
@every_document
def test_examples_that_need_an_extra_run(path, extra, tmp_path, monkeypatch):
    code = blocks(path, extra)
    if not code.strip():
        return
    pytest.importorskip(EXTRAS[extra], reason=f"needs the extra jaxquant[{extra}]")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(path), "exec"), {"__name__": "__document__"})


@every_document
def test_no_python_escapes(path):
    assert not escaped(path.read_text(encoding="utf-8"))


@every_document
def test_commands_exist(path):
    found = {command: wrong(command) for command in shown(path.read_text(encoding="utf-8"))}
    assert not {command: problem for command, problem in found.items() if problem}


@every_document
def test_nothing_is_left_to_fill_in(path):
    assert "@@" not in path.read_text(encoding="utf-8")


@every_document
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_paper_of_the_tutorial_keeps_the_contract(tmp_path, monkeypatch):
    """The first block of the tutorial is a whole file, which passes what the tutorial says that it passes."""
    import test_methods

    text = (ROOT / "docs" / "tutorials" / "paper.md").read_text(encoding="utf-8")
    (tmp_path / "pairs.py").write_text(next(m[2] for m in FENCE.finditer(text) if m[1] == "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs = importlib.import_module("pairs")
    test_methods.check_module(pairs)
    trial = test_methods.Trial(pairs.EXAMPLES[0]())
    for check in test_methods.CHECKS:
        check(trial)


def test_the_readme_repeats_what_the_documents_measured():
    """Its rows are those of evaluation.md, and its pictures are drawn from the tables as they are."""
    rows = re.findall(r"^\| K\d/V\d .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    evaluation = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert rows
    assert all(row in evaluation.splitlines() for row in rows)
    calibration = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    for bits, size, found in re.findall(
        r"^\| calibrated, (\d) bits \| 0, 0 \| ([\d.]+) \| (.*?%) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    ):
        perplexity, kl, top = found.split(" | ")
        assert float(size) == int(bits) * 2 * 128 / 8
        assert re.search(rf"^\| {bits}\.000 \| {perplexity} \| [^|]* \| {kl} \| {top} \|", calibration, re.MULTILINE), (
            bits
        )
    drawn = runpy.run_path(str(ROOT / "tests" / "bench" / "plot_readme.py"))
    for name in ("quality", "speed"):
        picture = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert picture == drawn[name](), "python tests/bench/plot_readme.py"


def bibliography():
    """Read docs/references.bib: for every arXiv id, its fields; and the titles of all."""
    text = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    entries = [dict(re.findall(r"^  (\w+) = \{(.*)\},$", block, re.MULTILINE)) for block in text.split("\n@")]
    return {entry["eprint"]: entry for entry in entries if "eprint" in entry}, [entry["title"] for entry in entries]


def citations():
    """List (file, quoted title or None, arXiv id) of all docstrings and documents."""
    quoted = re.compile(r"(?:\"([^\"]+)\"[^\"]{0,60}?)?arXiv[: ]((?:\d{4}\.\d{4,5})|math-ph/\d{7})")
    for path in [*SOURCES, *DOCUMENTS]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for title, identifier in quoted.findall(text):
            yield path.name, title, identifier


def test_every_cited_paper_is_listed_with_the_same_title():
    listed, _ = bibliography()
    for file, title, identifier in citations():
        assert identifier in listed, f"{file}: {identifier} is not in docs/references.bib"
        full = listed[identifier]["title"].lower()
        title = title.rstrip(",").lower()
        assert not title or title in (full, full.partition(":")[0]) or file.endswith(".md"), (file, title, full)
    assert set(listed) == {identifier for _, _, identifier in citations()}, "listed and cited nowhere"


def test_years_and_other_papers_of_the_list():
    listed, titles = bibliography()
    for identifier, entry in listed.items():
        assert entry["year"] == ("2006" if "/" in identifier else f"20{identifier[:2]}"), entry
    assert len(set(titles)) == len(titles)
    docstrings = " ".join(
        (ast.get_docstring(node) or "")
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    cited = " ".join(docstrings.split()).lower()
    by_id = {entry["title"] for entry in listed.values()}
    unnamed = [title for title in titles if title not in by_id and f'"{title.lower()}"' not in cited]
    assert unnamed in ([], ["Differential quantization of communication signals"])  # a patent, cited by its number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```py\nx\n```\n", 1),
        ("```\nfrom jaxquant import cache\n```\n", 1),
        ("text\n\n    import jax\n", 1),
        ("```python\nimport jax\n```\n", 0),
        ("```\njaxquant info\n```\n", 0),
    ],
)
def test_python_that_escapes_is_noticed(text, found):
    assert len(escaped(text)) == found


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("jaxquant eval --bits-k 4 --needles FILE:NAME", None),
        ("jaxquant eval --bits 4", "no option --bits"),
        ("jaxquant evaluate", "no command evaluate"),
        ("jaxquant qatc encode IN OUT --dtype bf16 [--threads N]", None),
        ("jaxquant qatc encode --level 3", "no option --level"),
        ("python examples/missing.py", "no file examples/missing.py"),
        ("python tests/bench/bench_core.py --scale preserve", None),
        ("python tests/bench/bench_core.py --colour", "no option --colour"),
    ],
)
def test_a_wrong_command_is_noticed(command, problem):
    assert wrong(command) == problem
    assert list(shown(f"text\n\n```\nexport A=b && {command}  # why\n```\n")) == [command]
    assert list(shown(f"text `{command}` text\n")) == [command]


def test_a_block_that_fails_is_noticed(tmp_path):
    broken = tmp_path / "broken.md"
    broken.write_text("text\n```python\nassert False\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        exec(compile(blocks(broken), str(broken), "exec"), {})
