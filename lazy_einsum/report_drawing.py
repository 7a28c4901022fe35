"""Contraction trees as places and lines, for the page and for the figure."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from .report_text import count, n_bytes, seconds, shape_text

if TYPE_CHECKING:
    from .report import OrderReport

LEVELS = 5
"""Colours for costs."""


class Spot(NamedTuple):
    """An operand, or a step.

    Attributes:
        x: from left to right, in units of one operand.
        y: from the operands, at 0, down to the result.
        level: of cost, from 0 to ``LEVELS - 1``; -1 for operands.
        label: what stands beside it.
        title: all that is said of it.
    """

    x: float
    y: float
    level: int
    label: str
    title: str


class Line(NamedTuple):
    """A tensor on its way from where it is made to where it is used.

    Attributes:
        start: number of the spot that makes it.
        end: number of the spot that uses it.
        width: from 1 up: the logarithm of its elements.
    """

    start: int
    end: int
    width: float


class Drawing(NamedTuple):
    """A contraction tree: its operands and steps by number, and the lines between them."""

    spots: tuple[Spot, ...]
    lines: tuple[Line, ...]


def draw(order: OrderReport, most_flops: int) -> Drawing:
    """Place the operands side by side, each step below what it consumes.

    Args:
        order: what is drawn.
        most_flops: of a step, in the hottest colour.
    """
    n = len(order.operands)
    children = [step.operands for step in order.steps]
    used = {operand for operands in children for operand in operands}
    places: dict[int, float] = {}
    depth = [0.0] * (n + len(children))
    for number, operands in enumerate(children, n):
        depth[number] = 1 + max(depth[operand] for operand in operands)
    # Operands in the order in which a walk from the result meets them, so that no lines cross.
    roots = [number for number in range(n + len(children)) if number not in used]
    waiting = roots[::-1]
    visited: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number in visited:
            continue
        visited.add(number)
        if number < n:
            places[number] = float(len(places))
        else:
            waiting += reversed(children[number - n])
    for number, operands in enumerate(children, n):
        places[number] = sum(places[operand] for operand in operands) / len(operands)
    spots = []
    for number, operand in enumerate(order.operands):
        title = f"{number}: {operand.name}, {operand.type}, {n_bytes(operand.bytes)}"
        spots.append(Spot(places[number], depth[number], -1, str(number), title))
    for number, step in enumerate(order.steps, n):
        what = f"{step.equation} " if step.equation else ""
        title = (
            f"{number}: {what}by {step.kernel}, {shape_text(step.shape)}, {count(step.flops)} FLOPs, "
            f"{n_bytes(step.result_bytes)}, {seconds(step.seconds)} expected"
        )
        heat = math.log(step.flops + 1) / math.log(most_flops + 2)
        level = min(LEVELS - 1, int(LEVELS * heat**2))
        spots.append(Spot(places[number], depth[number], level, str(number), title))
    sizes = [math.prod(operand.shape) for operand in order.operands] + [math.prod(step.shape) for step in order.steps]
    lines = [
        Line(operand, number, 1 + math.log10(max(sizes[operand], 1)))
        for number, operands in enumerate(children, n)
        for operand in operands
    ]
    return Drawing(tuple(spots), tuple(lines))


_STEP, _ROW, _EDGE = 34, 30, 20


def svg(drawing: Drawing, label: str) -> str:
    """The drawing as inline SVG; colours are classes of the page."""
    places = [(_EDGE + spot.x * _STEP, _EDGE + spot.y * _ROW) for spot in drawing.spots]
    width = _EDGE + max((x for x, _ in places), default=0)
    height = _EDGE + max((y for _, y in places), default=0)
    parts = [
        f'<svg role="img" aria-label="{escape(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">'
    ]
    for line in drawing.lines:
        (x, y), (to_x, to_y) = places[line.start], places[line.end]
        # Straight down to the row above its end: on the way nothing else is in this column, so that no lines cross.
        turn, half = to_y - _ROW, to_y - _ROW / 2
        curve = f"M{x:.0f} {y:.0f}V{turn:.0f}C{x:.0f} {half:.0f} {to_x:.0f} {half:.0f} {to_x:.0f} {to_y:.0f}"
        parts.append(f'<path d="{curve}" stroke-width="{line.width:.1f}"/>')
    for spot, (x, y) in zip(drawing.spots, places, strict=True):
        kind = "leaf" if spot.level < 0 else f"l{spot.level}"
        parts.append(
            f'<g class="{kind}"><title>{escape(spot.title)}</title><circle cx="{x:.0f}" cy="{y:.0f}" r="10"/>'
            f'<text x="{x:.0f}" y="{y:.0f}" dy=".35em">{escape(spot.label)}</text></g>'
        )
    return "".join([*parts, "</svg>"])
