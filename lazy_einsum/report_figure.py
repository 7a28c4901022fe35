"""A ``Report`` as a figure of matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import LazyEinsumError
from .report_drawing import LEVELS, draw
from .report_text import count, n_bytes, shortened

if TYPE_CHECKING:
    from .report import OrderReport, Report

_MOST = 6
"""Networks that are drawn: those that take longest."""

_HEAT = ("#c9ddf0", "#a9d3b0", "#ecd67c", "#f0a35e", "#e2695f")


class PlotError(LazyEinsumError, ImportError):
    """What draws figures is not installed."""


def draw_figure(report: Report) -> Any:
    """The contraction trees of the networks that take longest, as written and optimized: widths are sizes, colours are
    costs.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("plot() needs matplotlib: pip install 'lazy_einsum[plot]'") from None
    networks = sorted(report.networks, key=lambda network: -network.optimized.seconds)[:_MOST]
    rows = max(1, len(networks))
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    figure.suptitle(report.name)
    axes = figure.subplots(rows, 2, squeeze=False)
    for pair, network in zip(axes, networks, strict=False):
        orders = (network.written, network.optimized)
        most = max(step.flops for order in orders if order is not None for step in order.steps)
        for place, order, title in zip(pair, orders, ("as written", "optimized"), strict=True):
            place.axis("off")
            if order is not None:
                text = f"{title}: {count(order.flops)} FLOPs, at most {n_bytes(order.largest_bytes)}"
                place.set_title(f"{shortened(network.equation, 60)}\n{text}", fontsize=9)
                _draw(place, order, most)
    for place in axes[len(networks) :].flat:
        place.axis("off")
    return figure


def _draw(axes: Any, order: OrderReport, most: int) -> None:
    drawing = draw(order, most)
    for line in drawing.lines:
        start, end = drawing.spots[line.start], drawing.spots[line.end]
        axes.plot([start.x, end.x], [-start.y, -end.y], color="#8a94a0", linewidth=line.width, zorder=1)
    colours = ["white" if spot.level < 0 else _HEAT[spot.level * len(_HEAT) // LEVELS] for spot in drawing.spots]
    xs, ys = [spot.x for spot in drawing.spots], [-spot.y for spot in drawing.spots]
    axes.scatter(xs, ys, s=160, c=colours, edgecolors="#5a6572", zorder=2)
    for spot in drawing.spots:
        axes.text(spot.x, -spot.y, spot.label, ha="center", va="center", fontsize=7, zorder=3)
    axes.margins(0.1)
