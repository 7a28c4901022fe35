"""``fastest_order``: of a few good orders the one whose calls take the least time, measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .errors import MemoryLimitError
from .layout import Strides
from .orders import Choice, along, other_orders, plan_by_calls, within
from .plan import Plan
from .saved import WrittenNetwork
from .stopwatch import time_programs

MOST_TIMED = 4
"""So many orders are timed, the first one included."""

# To find those that are worth timing, the best others by the sizes are lowered: of so many operands in all, which takes
# some milliseconds each with gradients, but at least as many as are timed.
_LOWERED = 40
# An order is not timed that has an intermediate so many times as large as the largest tensor of the first one.
_LARGER = 2.0
# Another order is taken where it takes this part of the first one's time: less is noise.
_CLEARLY = 0.9


def fastest_order(
    network: WrittenNetwork, ratio: float | None, memory_limit: int | str | None, strides: Strides | None
) -> Choice:
    """The order of ``plan_by_calls``, unless another one takes clearly less time, forward, and backward where autograd
    follows an operand.

    Timed on random tensors of the operands' types: as many bytes again as the operands, and for each order in turn as
    many as it needs.

    Args:
        network: see ``plan_by_calls``; of plain sizes.
        ratio: see ``plan_by_calls``.
        memory_limit: see ``plan_by_calls``.
        strides: see ``plan_by_calls``.

    Raises:
        MemoryLimitError: see ``make_plan``.
    """
    first = plan_by_calls(network, ratio, "auto", memory_limit, strides)
    programs = {(program := first.lower(network, strides)).source: (program, first)}
    others = [(other.lower(network, strides), other) for other in _others(network, first.plan, ratio, memory_limit)]
    for program, other in sorted(others, key=lambda item: item[0].seconds):
        if len(programs) < MOST_TIMED:
            programs.setdefault(program.source, (program, other))
    timed = list(programs.values())
    rounds = time_programs([program for program, _ in timed], network.types) if len(timed) > 1 else []
    if not rounds:
        return first
    best, seconds = _fastest(rounds)
    choice = timed[best][1]
    chosen, *rest = sorted(seconds, key=lambda took: took != seconds[best])
    found_by = f"measurement: {_shown(chosen)}, of others {', '.join(map(_shown, rest))}"
    return choice._replace(plan=replace(choice.plan, optimizer=found_by))


def _fastest(rounds: Sequence[Sequence[float]]) -> tuple[int, list[float]]:
    """Which of those timed to take, the first one unless another is clearly faster; and the median seconds of each.

    Compared within each round: what slows the machine down for a while does so for all of them.
    """
    seconds = [statistics.median(took) for took in zip(*rounds, strict=True)]
    parts = [statistics.median(took[place] / took[0] for took in rounds) for place in range(len(seconds))]
    faster = [place for place, part in enumerate(parts) if part < _CLEARLY]
    return min(faster, key=seconds.__getitem__, default=0), seconds


def _shown(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if math.isfinite(seconds) else "none"


def _others(
    network: WrittenNetwork, first: Plan, ratio: float | None, memory_limit: int | str | None
) -> Iterator[Choice]:
    """Other orders, which keep the limits and need little more memory."""
    most = max(MOST_TIMED - 1, _LOWERED // len(first.shapes))
    largest = max(first.largest_intermediate, *map(math.prod, first.shapes))
    for order in other_orders(network, first.ssa_path)[:most]:
        try:
            plan = along(network, order, "measurement", memory_limit)
        except MemoryLimitError:
            continue
        choice = within(network, plan, ratio)
        if choice is not None and plan.largest_intermediate <= _LARGER * largest:
            yield choice
