"""Draw the pictures of the README from the tables of the documents, so that no figure is kept twice.

python tests/bench/plot_readme.py [FOLDER]           # default: docs/images
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 380, 62, 14, 64, 52
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; stroke: #ffffff; stroke-width: 3; paint-order: stroke }
.small { font-size: 12px; fill: #59636e }
.title { font-size: 16px; font-weight: 600 } .card { fill: #ffffff } .grid { stroke: #d1d9e0; stroke-width: 1 }
.one { stroke: #1f2328; stroke-width: 1.5; stroke-dasharray: 5 4 }
.a { --c: #0969da } .b { --c: #bc4c00 } .c { --c: #1a7f37 } .d { --c: #8250df }
.line { fill: none; stroke: var(--c); stroke-width: 2 } .mark { fill: var(--c) }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; stroke: #0d1117 } .small { fill: #9198a1 }
  .card { fill: #0d1117 } .grid { stroke: #30363d } .one { stroke: #f0f6fc }
  .a { --c: #4493f8 } .b { --c: #f0883e } .c { --c: #3fb950 } .d { --c: #ab7df8 }
}
"""


def table(document: str, head: str) -> Iterator[list[str]]:
    """Read the rows of the first table of a document whose head starts so."""
    lines = iter((DOCS / document).read_text(encoding="utf-8").splitlines())
    if not any(line.startswith(head) for line in lines):
        raise ValueError(f"{document} has no table that starts with {head!r}")
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def quality() -> str:
    """Draw the KL divergence against bytes per token."""
    measured = list(table("evaluation.md", "| keys, values | sinks"))
    plain = [(float(row[2]), float(row[4]), row[0]) for row in measured if row[1] == "0, 0"]
    kept = [(float(row[2]), float(row[4]), row[0]) for row in measured if row[1] != "0, 0"]
    calibrated = [
        (float(row[0]) * 2 * 128 / 8, float(row[3]), f"{float(row[0]):g} bits")
        for row in table("calibration.md", "| bits | perplexity")
        if row[3]
    ]
    low, high = -3.2, -0.7

    def x(size: float) -> float:
        return LEFT + (size - 50) / 160 * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        return TOP + (high - math.log10(kl)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for kl in (0.001, 0.003, 0.01, 0.03, 0.1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(kl):.1f}" y2="{y(kl):.1f}"/>')
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y(kl) + 4:.1f}" text-anchor="end">{kl}</text>')
    for size in (64, 96, 128, 160, 192):
        parts.append(f'<text class="small" x="{x(size):.1f}" y="{HEIGHT - 32}" text-anchor="middle">{size}</text>')
    axis = "bytes per token and kv head (16 bits: 512)"
    parts.append(f'<text class="small" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{axis}</text>')
    for kind, shape, points, said in (
        ("a", "circle", plain, "TurboQuant"),
        ("b", "square", calibrated, "calibrated"),
        ("c", "triangle", kept, "TurboQuant, 4 sinks, window 128"),
    ):
        places = [(x(size), y(kl), name) for size, kl, name in points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
        parts.append(f'<g class="{kind}"><polyline class="line" points="{path}"/>')
        parts += [mark(shape, px, py) for px, py, _ in places] + ["</g>"]
        for place in (0, -1):
            (px, py, name), right = places[place], (kind, place) == ("c", -1)  # where no line is in the way
            where = f'x="{px + 9 if right else px - 9:.1f}" y="{py + (-5 if right else 15):.1f}"'
            where += f' text-anchor="{"start" if right else "end"}"'
            parts.append(f'<text class="small" {where}>{name}</text>')
        row = {"a": 0, "b": 1, "c": 2}[kind]
        parts.append(f'<g class="{kind}">{mark(shape, 238, 80 + 20 * row)}</g>')
        parts.append(f'<text class="small" x="250" y="{84 + 20 * row}">{said}</text>')
    return picture("What compression costs", "KL divergence from 16 bits, nats; a 28M-parameter llama", parts)


def speed() -> str:
    """Draw the speed of decode attention against the fastest in bfloat16."""
    rows = [row for row in table("kernels.md", "| rows x tokens") if "=" not in row[0]]  # other heads are there too
    names = ["K4/V4", "K4/V2", "K2/V2", "K3/V3"]
    values = {row[0]: [float(re.split(r"[ (]", cell)[0]) if cell else None for cell in row[2:]] for row in rows}
    most, left = 7.4, 112
    step = (HEIGHT - TOP - BOTTOM) / len(values)

    def x(times: float) -> float:
        return left + times / most * (WIDTH - left - RIGHT)

    parts = []
    for times in range(8):
        line = f'x1="{x(times):.1f}" x2="{x(times):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="{"one" if times == 1 else "grid"}" {line}/>')
        parts.append(f'<text class="small" x="{x(times):.1f}" y="{HEIGHT - 32}" text-anchor="middle">{times}</text>')
    for place, (shape, found) in enumerate(values.items()):
        top = TOP + place * step
        rows_of, _, tokens = shape.partition(" x ")
        parts.append(f'<text x="8" y="{top + step / 2:.1f}">{rows_of} row{"s" if rows_of != "1" else ""}</text>')
        parts.append(f'<text class="small" x="8" y="{top + step / 2 + 16:.1f}">{tokens} tokens</text>')
        height = (step - 8) / len(found)
        for kind, times, name in zip("abcd", found, names, strict=True):
            if times is None:  # not measured
                continue
            where = top + 4 + names.index(name) * height
            bar = f'x="{left}" y="{where:.1f}" width="{x(times) - left:.1f}" height="{height - 2:.1f}"'
            parts.append(f'<g class="{kind}"><rect class="mark" {bar}/></g>')
            parts.append(
                f'<text class="small" x="{x(times) + 4:.1f}" y="{where + height - 4:.1f}">{name} {times:.2f}</text>'
            )
    axis = "times as fast as the fastest in bfloat16 (dashed)"
    parts.append(f'<text class="small" x="{(left + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{axis}</text>')
    return picture("Decode attention on an H200", "32 query heads on 8 kv heads of 128, whole operation", parts)


def mark(shape: str, x: float, y: float) -> str:
    """Draw a point that can be told from the others without its colour."""
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    return f'<path class="mark" d="M{x:.1f} {y - 6:.1f} l6 10.5 h-12 z"/>'


def picture(title: str, said: str, parts: list[str]) -> str:
    """Put a picture on a card of its own, in the reader's light or dark."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    card = f'<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    words = f'<text class="title" x="14" y="26">{title}</text><text class="small" x="14" y="46">{said}</text>'
    return "\n".join([head, f"<title>{title}: {said}</title><style>{STYLE}</style>", card, words, *parts, "</svg>\n"])


def main() -> None:
    """Write the pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in {"quality": quality(), "speed": speed()}.items():
        (folder / f"{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
