"""What the site has beside docs/: the README, examples, methods, modules, commands and papers, made from their files.

Links in documents name files of the repository, so that they work there too; here they become links to pages.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
MOVED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "examples/index.md": "examples/README.md",
}
PACKAGES = ("jaxquant", *(f"jaxquant.{name}" for name in ("calibrate", "codecs", "diffusion", "interop", "models")))
ALSO = {  # public classes whose module is private
    "jaxquant.cache": ["jaxquant._stacks.KVCache"],
    "jaxquant.pipeline": ["jaxquant._pipeline.Pipeline"],
}
LINK = re.compile(r"(\]\(|src=\"|srcset=\")([^)#:\"\s]+)((?:#[^)\"]*)?[)\"])")
FENCE = re.compile(r"^```(\w+) \w+$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Add what is found in folders to the navigation."""
    sections = {title: item for entry in config["nav"] for title, item in entry.items()}
    sections["Examples"] += [{name: f"examples/{name}.md"} for name in examples()]
    sections["Methods"] += [{path.stem: f"methods/{path.stem}.md"} for path in methods()]
    for package, found in modules().items():
        sections["API"].append({package: [{name.removeprefix("jaxquant."): f"api/{name}.md"} for name in found]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages themselves."""
    made = {uri: (ROOT / source).read_text(encoding="utf-8") for uri, source in MOVED.items()}
    made |= {f"examples/{name}.md": example(ROOT / "examples" / f"{name}.py") for name in examples()}
    made |= {f"methods/{path.stem}.md": method(path.stem) for path in methods()}
    made |= {f"api/{name}.md": module(name) for found in modules().values() for name in found}
    made |= {"api/index.md": index(), "cli.md": commands(), "references.md": papers()}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Lead links to pages, and name the language of a block alone."""
    uri = page.file.src_uri
    source = MOVED.get(uri, f"docs/{uri}")

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / target).exists():
            return match[0]  # a page that is made here, or a mistake: mkdocs knows
        return match[1] + posixpath.relpath(site(target), posixpath.dirname(uri) or ".") + match[3]

    text = text.replace("<!-- scripts -->", scripts())
    return FENCE.sub(r"```\1", LINK.sub(led, text))


def site(path: str) -> str:
    """Find the page for a file of the repository.

    Example:
        >>> site("docs/kernels.md"), site("jaxquant/methods/h2o.py"), site("README.md")
        ('kernels.md', 'methods/h2o.md', 'index.md')
    """
    made = {source: uri for uri, source in MOVED.items()} | {"docs/references.bib": "references.md"}
    if path in made:
        return made[path]
    folder, name = posixpath.split(path)
    if folder == "jaxquant/methods":
        return f"methods/{Path(name).stem}.md"
    if folder == "examples":
        return f"examples/{Path(name).stem}.md"
    return path.removeprefix("docs/")


def examples() -> list[str]:
    """List the scripts in the order in which examples/README.md has them."""
    return re.findall(r"\]\((\w+)\.py\)", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"))


def methods() -> list[Path]:
    """List the files of methods."""
    return sorted(path for path in (ROOT / "jaxquant" / "methods").glob("*.py") if path.stem != "__init__")


def modules() -> dict[str, list[str]]:
    """List the public modules of every package."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        folder = ROOT.joinpath(*package.split("."))
        files = [path for path in folder.glob("*.py") if not path.stem.startswith("_")]
        names = [path.stem for path in files if path.stem != "cli" and not path.stem.endswith("_cli")]
        if package == "jaxquant.codecs":
            names += ["v2", "v3"]
        found[package] = [f"{package}.{name}" for name in sorted(names)]
    return found


def example(path: Path) -> str:
    """Show a script below what it says of itself."""
    code = path.read_text(encoding="utf-8")
    title, _, rest = (ast.get_docstring(ast.parse(code)) or "").partition("\n")
    rest = re.sub(r"^(?=python )", "    ", rest, flags=re.MULTILINE)  # commands
    body = code.split('"""', 2)[2].strip()
    return f"# {title.rstrip('.')}\n{rest}\n\n`examples/{path.name}`\n\n```python\n{body}\n```\n"


def method(name: str) -> str:
    """Show a file of methods, what it costs, and what was measured of it."""
    lines = [f"::: jaxquant.methods.{name}", ""]
    costs = list(rows("methods.md", 0, f"[{name}]"))
    if any(" bits " in row for row in costs[2:]):
        lines += ["## What it costs", "", "What is counted: [all methods](../methods.md).", "", *costs, ""]
    for title in ("A 28M-parameter llama", "Built-in model"):
        measured = list(rows("methods-compared.md", 1, name, title))
        if len(measured) > 2:
            lines += [f"## Measured: {title.lower()}", "", "Beside [the other methods](../methods-compared.md).", ""]
            lines += [*measured, ""]
    return "\n".join(lines)


def rows(document: str, column: int, start: str, section: str = "") -> Iterator[str]:
    """Take the head of a section's table, and the rows in which a cell starts so; links lose their target."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    lines = text.partition(f"## {section}")[2].partition("\n## ")[0] if section else text
    for place, line in enumerate(line for line in lines.splitlines() if line.startswith("|")):
        cell = line.split("|")[column + 1].strip()
        if place < 2 or (cell.startswith(start) if start.startswith("[") else cell == start):
            yield re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)


def module(name: str) -> str:
    """Show a module."""
    also = [
        f"::: {path}\n    options: {{heading_level: 2, show_root_full_path: false}}\n" for path in ALSO.get(name, [])
    ]
    return "\n".join([f"::: {name}\n", *also])


def index() -> str:
    """List the modules in their own words."""
    lines = ["# API", "", "One import path for every name: `from jaxquant import cache`.", ""]
    for package, found in modules().items():
        lines += [f"## {package}", "", "| module | |", "|---|---|"]
        for name in found:
            path = ROOT.joinpath(*name.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
            lines.append(f"| [{name}]({name}.md) | {said} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Show every command with its arguments and options, as `--help` does."""
    from jaxquant import cli

    def shown(command: Any, path: str) -> Iterator[str]:
        for name, part in getattr(command, "commands", {}).items():
            yield from shown(part, f"{path} {name}")
        if hasattr(command, "commands"):
            return
        named = {p: [(p.name or "").upper()] if p.param_type_name == "argument" else p.opts for p in command.params}
        arguments = [names[0] for p, names in named.items() if p.param_type_name == "argument"]
        yield from (
            f"## {path}",
            "",
            (command.help or "").strip(),
            "",
            f"    {' '.join([path, *arguments])} [OPTIONS]",
            "",
        )
        yield from ("| option | |", "|---|---|")
        for p, names in named.items():
            said = re.sub(r"([|\[<*_])", r"\\\1", getattr(p, "help", None) or "")
            yield f"| {', '.join(f'`{name}`' for name in names)} | {said} |"
        yield ""

    found = typer.main.get_command(cli.app)
    text = "Exit status 0; 1 with one line on standard error; 2 for wrong usage. Progress goes to standard error."
    return "\n".join(["# Command line", "", text, "", *shown(found, "jaxquant")])


def scripts() -> str:
    """List tests/bench in the words of its files."""
    lines = ["| script | measures |", "|---|---|"]
    for path in sorted((ROOT / "tests" / "bench").glob("*.py")):
        said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"| `tests/bench/{path.name}` | {said} |")
    return "\n".join(lines)


def papers() -> str:
    """List docs/references.bib."""
    lines = ["# Papers", "", "What the code cites, by name; `docs/references.bib` in the repository is the list.", ""]
    for entry in entries((ROOT / "docs" / "references.bib").read_text(encoding="utf-8")):
        where = f"[arXiv:{e}](https://arxiv.org/abs/{e})" if (e := entry.get("eprint")) else entry["howpublished"]
        lines.append(f"- {entry['author'].replace(' and ', ', ')}, “{entry['title']}”, {where} ({entry['year']})")
    return "\n".join(lines) + "\n"


def entries(text: str) -> list[dict[str, str]]:
    r"""Read a BibTeX file in which every field has a line of its own.

    Example:
        >>> entries("@misc{key,\n  title = {T},\n}")
        [{'title': 'T'}]
    """
    return [
        dict(re.findall(r"^\s+(\w+) = \{(.*)\},?$", block, flags=re.MULTILINE)) for block in text.split("\n@") if block
    ]
