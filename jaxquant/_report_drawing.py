"""Line charts as SVG, readable without colour: every line has its own marker, dashes and a label beside it."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from jaxquant._markup import Markup, join, tag

_FLOOR = 1e-8  # what a logarithmic axis shows of anything smaller
_LETTER, _LINE = 6.9, 14.0  # of a label of 12 pixels: widest mean letter, height
_MISLEADING = 80.0  # square pixels of overlap that are as bad as a label nearer to another point
_PHONE = 500  # pixels: narrower pictures are for phones
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 14.0, 46.0
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4")
_MARKERS = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-5.5L5.5,4.5H-5.5z",
    "M0,-6L6,0L0,6L-6,0z",
    "M-5.5,-4.5H5.5L0,5.5z",
    "M-2,-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
)

Number = int | float
Box = tuple[Number, Number, Number, Number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Points that belong together.

    Attributes:
        name: shown beside its last point.
        points: x, y and a label, which may be empty, in the order in which they are connected.
    """

    name: str
    points: Sequence[tuple[Number, Number, str]]


def chart(
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    width: int,
    height: int,
    limit: tuple[Number, str] | None = None,
    ring: tuple[Number, Number] | None = None,
    whole: bool = False,
) -> Markup:
    """Draw lines over a logarithmic axis.

    Args:
        lines: to draw; y is not negative.
        name: of the picture in the page, for the ids of its title and description.
        title: in words, for those who do not see it.
        description: likewise, longer.
        x_label: of the axis.
        y_label: likewise.
        width: in pixels.
        height: likewise.
        limit: a level to mark, with its label.
        ring: a point to mark.
        whole: whether x counts from the least of its numbers in whole steps, else it starts at 0.
    """
    levels = [max(y, _FLOOR) for line in lines for _, y, _ in line.points] + ([limit[0]] if limit else [])
    columns = [x for line in lines for x, _, _ in line.points]
    low, high = math.log10(min(levels)) - 0.2, math.log10(max(levels)) + 0.18
    room = 1.22 if width < _PHONE else 1.1  # for labels of the last points
    left, right = (min(columns) - 0.3, max(columns) + 0.3) if whole else (0.0, room * max(columns))
    inner = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def at(x: Number, y: Number) -> tuple[float, float]:
        share = (math.log10(max(y, _FLOOR)) - low) / (high - low)
        return _LEFT + inner[0] * (x - left) / (right - left), _TOP + inner[1] * (1 - share)

    parts = [tag("title", title, id=f"{name}-title"), tag("desc", description, id=f"{name}-description")]
    for y in _decades(low, high):
        _, row = at(0, y)
        parts += [
            _rule(_LEFT, row, width - _RIGHT, row, "grid"),
            _text(f"{y:.0e}" if y < 1e-4 else f"{y:g}", _LEFT - 7, row + 4, "end"),
        ]
    for x in _steps(left, right, 5 if width < _PHONE else 9, whole=whole):
        column, _ = at(x, 1)
        parts += [
            _rule(column, height - _BOTTOM, column, height - _BOTTOM + 5, "axis"),
            _text(f"{x:g}", column, height - _BOTTOM + 19, "middle"),
        ]
    parts += [
        _rule(_LEFT, height - _BOTTOM, width - _RIGHT, height - _BOTTOM, "axis"),
        _text(x_label, _LEFT + inner[0] / 2, height - 7, "middle"),
        tag("text", y_label, transform=f"translate(12 {_TOP + inner[1] / 2:.1f}) rotate(-90)", text_anchor="middle"),
    ]
    drawn = [[at(x, y) for x, y, _ in line.points] for line in lines]
    taken = [_around(*place, 7.0) for places in drawn for place in places]
    taken += [
        _around(*place, 3.0) for places in drawn for ends in itertools.pairwise(places) for place in _along(*ends)
    ]
    if limit is not None:
        _, row = at(0, limit[0])
        parts += [_rule(_LEFT, row, width - _RIGHT, row, "limit"), _text(limit[1], width - _RIGHT, row - 5, "end")]
        taken += [
            (width - _RIGHT - _LETTER * len(limit[1]), row - _LINE - 3, width - _RIGHT, row),
            (_LEFT, row - 1, width - _RIGHT, row + 1),
        ]
    if ring is not None:
        x, y = at(*ring)
        taken.append(_around(x, y, 12.0))
        parts.append(tag("circle", class_="ring", cx=f"{x:.1f}", cy=f"{y:.1f}", r="11"))
    frame, marks = (_LEFT, 0.0, width, height - _BOTTOM), [place for places in drawn for place in places]
    for number, (line, places) in enumerate(zip(lines, drawn, strict=True)):
        kind = number % len(_MARKERS)
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(tag("path", class_=f"line s{kind}", d=path, stroke_dasharray=_DASHES[kind] or None))
        parts += [
            tag("path", class_=f"mark s{kind}", d=_MARKERS[kind], transform=f"translate({x:.1f} {y:.1f})")
            for x, y in places
        ]
        parts.append(_label(line.name, *places[-1], frame, marks, taken, f"name s{kind}"))
    for number, line in enumerate(lines):
        kind = f"s{number % len(_MARKERS)}"
        parts += [
            _label(label, *at(x, y), frame, marks, taken, f"beside {kind}") for x, y, label in line.points if label
        ]
    return tag(
        "svg", join(*parts), role="img", viewBox=f"0 0 {width} {height}", width=width, height=height,
        aria_labelledby=f"{name}-title {name}-description", xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def _label(
    text: str, x: Number, y: Number, frame: Box, marks: list[tuple[float, float]], taken: list[Box], kind: str
) -> Markup:
    """Write a label beside a point, where it covers least of what is there, and is nearer to no other point."""
    size = (1.1 if kind.startswith("name") else 1.0) * _LETTER * len(text)
    places = [
        (x + dx - shift * size, y + dy)
        for dx, dy, shift in (
            (10, 4, 0), (-10, 4, 1), (0, -11, 0.5), (0, 20, 0.5), (9, -9, 0), (9, 18, 0), (-9, -9, 1), (-9, 18, 1),
            (0, -26, 0.5), (0, 35, 0.5), (12, -24, 0), (-12, -24, 1), (12, 33, 0), (-12, 33, 1),
        )
    ]  # fmt: skip
    boxes = [(left, base - _LINE + 3, left + size, base + 3) for left, base in places]
    costs = [
        sum(_shared(box, other) for other in taken)
        + 9 * _outside(box, frame)
        + _MISLEADING * sum(_distance(box, *mark) < _distance(box, x, y) for mark in marks)
        for box in boxes
    ]
    best = costs.index(min(costs))
    taken.append(boxes[best])
    return _text(text, *places[best], "start", kind)


def _along(start: tuple[float, float], stop: tuple[float, float]) -> list[tuple[float, float]]:
    """Give points of a segment, a few pixels apart."""
    count = 1 + int(math.dist(start, stop) / 6)
    shares = [i / count for i in range(1, count)]
    return [(start[0] + (stop[0] - start[0]) * share, start[1] + (stop[1] - start[1]) * share) for share in shares]


def _around(x: Number, y: Number, reach: Number) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _distance(box: Box, x: Number, y: Number) -> float:
    return math.hypot(max(box[0] - x, x - box[2], 0.0), max(box[1] - y, y - box[3], 0.0))


def _shared(one: Box, other: Box) -> Number:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, frame: Box) -> Number:
    return (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, frame)


def _decades(low: Number, high: Number) -> list[float]:
    """Give the levels that a logarithmic axis names: powers of ten, and 2 and 5 between where they are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low <= math.log10(f) + p <= high]


def _steps(low: Number, high: Number, most: int, *, whole: bool) -> list[float]:
    """Give at most so many round numbers, evenly apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    step = max(1.0, step) if whole else step
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _rule(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> Markup:
    return tag("line", class_=kind, x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}")


def _text(text: str, x: Number, y: Number, anchor: str, kind: str | None = None) -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)
