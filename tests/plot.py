"""Pictures of what the benchmark saved: ``python tests/plot.py TABLE.json PICTURE.svg [TITLE]``, of networks or of an
epoch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Table = Mapping[str, Mapping[str, float]]
"""Seconds of each contestant, by name, for each network."""


def pyplot() -> Any:
    """matplotlib's, drawing to files only.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("matplotlib draws the pictures; install it with: pip install 'lazy_einsum[plot]'") from None
    # No display, letters as letters, and the same file for the same table.
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lazy_einsum", "font.size": 8})
    import matplotlib.pyplot

    return matplotlib.pyplot


def ratios(table: Table) -> dict[str, tuple[float, float | None]]:
    """For each network that a peer can run how many times as long as ours the best peer takes, and eager if it can;
    those that gain least come first.
    """
    found = {}
    for name, took in table.items():
        peers = [seconds for peer, seconds in took.items() if peer != "ours"]
        if peers:
            eager = took["eager"] / took["ours"] if "eager" in took else None
            found[name] = (min(peers) / took["ours"], eager)
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def draw(table: Table, path: str, title: str) -> None:
    """Write a picture: a row for each network, times of eager and of the best peer over ours on a logarithmic axis.

    Args:
        table: what ``--save`` writes.
        path: of the picture; its ending is the format.
        title: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    found = ratios(table)
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.155 * len(found)), layout="constrained")
    rows = range(len(found))
    best = [peer for peer, _ in found.values()]
    eager = [(row, value) for row, (_, value) in zip(rows, found.values(), strict=True) if value is not None]
    for row, value in eager:
        axes.plot([best[row], value], [row, row], color="0.8", linewidth=1, zorder=1)
    axes.axvline(1, color="0.3", linewidth=1, zorder=1)
    rings = {"s": 34, "facecolors": "none", "edgecolors": "#d95f02", "linewidths": 1.2, "zorder": 3}
    axes.scatter([value for _, value in eager], [row for row, _ in eager], label="torch.einsum", **rings)
    axes.scatter(best, rows, s=14, color="#1b6ca8", zorder=2, label="the fastest of all others, torch.einsum too")
    axes.set_xscale("log")
    highest = max([*best, *(value for _, value in eager)])
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if min(0.7, *best) <= tick <= 1.5 * highest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(rows, found, fontsize=7)
    axes.set_ylim(-1, len(found))
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("time over that of lazy_einsum; to the right of 1 lazy_einsum is faster")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="lower right", frameon=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
    plt.close(figure)


def draw_epoch(times: Mapping[str, Sequence[float]], path: str, title: str) -> None:
    """Write a picture: seconds since the start at the end of each step, a line for each contestant.

    Args:
        times: what ``epoch --save`` writes.
        path: of the picture; its ending is the format.
        title: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    colors = ("0.3", "#1b6ca8", "#63b0e8", "#7a5195", "#d95f02", "#e6a15c", "#2a9d6f")
    lines = list(zip(times.items(), colors, strict=False))
    for (name, seconds), color in sorted(lines, key=lambda line: -line[0][1][-1]):
        steps = range(1, len(seconds) + 1)
        axes.step(steps, seconds, where="post", color=color, label=f"{seconds[-1]:.3g} s  {name}", linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("training step, each of another batch size")
    axes.set_ylabel("seconds since the start")
    axes.set_xlim(1, max(map(len, times.values())))
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
    plt.close(figure)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        saved = json.load(file)
    is_epoch = all(isinstance(seconds, list) for seconds in saved.values())
    title = sys.argv[3] if len(sys.argv) > 3 else "An epoch" if is_epoch else "Networks from many fields"
    (draw_epoch if is_epoch else draw)(saved, sys.argv[2], title)
