"""The best way for each step of a plan, and with it the layout of each intermediate: ``choose``.

Dynamic programming over the tree: of each value a few layouts are kept, each with the cheapest way to get there, until
its consumer chooses. Nothing is written here: see ``kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .backward import arrival_seconds, backward, call_seconds
from .layout import (
    Layout,
    Sizes,
    Strides,
    contiguous_layout,
    count_calls,
    group_strides,
    label_strides,
    shape_of,
)
from .plan import Contraction
from .ways import Context, Way, after_sums, copy_seconds, flipped, walk_order_seconds, ways

# Up to so many steps, how many layouts of each intermediate are kept until its consumer chooses.
_LAYOUTS = ((4, 8), (24, 4), (math.inf, 2))


class Choice(NamedTuple):
    """A value of a plan in one of its layouts.

    Attributes:
        layout: the layout.
        seconds: modelled time to get there, children included.
        way: how; ``None`` for an operand, or for a contiguous copy of one.
        children: which choices of the step's operands it takes.
    """

    layout: Layout
    seconds: float
    way: Way | None = None
    children: tuple[int, int] = (0, 0)


class Saving(NamedTuple):
    """What autograd saves has a price.

    Attributes:
        price: seconds per element.
    """

    price: float

    def copies(self, context: Context, layout: Layout) -> list[Choice]:
        """A copy of an operand, to be saved in place of one that lies in more memory than it has elements."""
        sizes = context.sizes
        if _span(layout, sizes) <= sizes[layout.labels]:
            return []
        strides, machine = label_strides(layout, sizes), context.machine
        seconds = machine.launch + copy_seconds(layout.labels, strides, sizes, machine)
        return [Choice(contiguous_layout(layout.dims, sizes), seconds)]

    def seconds(self, context: Context, way: Way, pair: Sequence[tuple[Layout, bool, bool]]) -> float:
        """The price of what one step saves.

        Args:
            context: shared by all steps.
            way: how the step is done.
            pair: of each operand: its layout, whether it is one of the plan, whether autograd follows it.
        """
        sizes = context.sizes
        elements = 0
        for place in (0, 1):
            layout, is_given, _ = pair[place ^ way.swap]
            if not pair[place ^ way.swap ^ 1][2]:
                continue
            if is_given and not _is_copied(way, place, layout, sizes):
                elements += _span(layout, sizes)
            else:
                # Memory of an operand may be saved for another step anyway, that of a copy is not.
                elements += sizes[layout.labels] * (1 + is_given)
        return self.price * elements


def _span(layout: Layout, sizes: Sizes) -> int:
    """Elements of the memory that a tensor lies in, as far as its strides tell."""
    shape = shape_of(layout.dims, sizes)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, layout.strides, strict=True))


def choose(
    context: Context,
    steps: Sequence[Contraction],
    operands: Sequence[Layout],
    wanted: tuple[str, ...],
    strides: Strides | None,
    follows: Sequence[bool],
    saving: Saving | None,
) -> list[list[Choice]]:
    """For each value of the plan the layouts worth keeping, cheapest first."""
    choices = [[Choice(layout, 0.0), *(saving.copies(context, layout) if saving else ())] for layout in operands]
    follows = list(follows)
    sizes = context.sizes
    most = next(kept for limit, kept in _LAYOUTS if len(steps) <= limit)
    hints = _hints(steps, operands, order_asked_for(wanted, strides, sizes))
    consumers = _consumers(steps)
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        keep = 1 if last else most
        # Results that lie in memory alike are the same to the consumer, whatever the order of their dimensions.
        best: dict[tuple[tuple[str, int], ...], Choice] = {}
        left, right = step.operands
        consumer = consumers.get(len(operands) + number)
        ahead = consumer.spec.summed if consumer is not None else ""
        followed = follows[left], follows[right]
        follows.append(any(followed))
        arrivals: dict[tuple[int, int, Layout], float] = {}
        # What takes longer than this is not kept: how much longer need not be known.
        limit = math.inf
        for i, a in enumerate(choices[left]):
            for j, b in enumerate(choices[right]):
                one, two, spent = after_sums(context, a.layout, b.layout, step.spec.output)
                spent += a.seconds + b.seconds
                for way in ways(context, one, two, step.spec.output, hints[number], ahead):
                    total = spent + way.seconds
                    if total <= limit and any(followed):
                        seconds, gradients = backward(way, followed, sizes, context.machine)
                        total += seconds
                        for side, gradient in enumerate(gradients):
                            inner = (a, b)[side].way
                            if gradient is None or inner is None:
                                continue
                            key = side, (i, j)[side], gradient
                            if key not in arrivals:
                                arrivals[key] = arrival_seconds(inner, gradient, sizes, context.machine)
                            total += arrivals[key]
                    if total <= limit and context.machine.generates:
                        total += _copied_products_seconds(context, way, (one, a.way), (two, b.way))
                    if total <= limit and saving:
                        given = [
                            (summed, number < len(operands) and summed is choice.layout and not index, follows[number])
                            for number, index, choice, summed in ((left, i, a, one), (right, j, b, two))
                        ]
                        total += saving.seconds(context, way, given)
                    if total <= limit and last:
                        total += finish_seconds(context, way, wanted, strides, any(followed))
                    place = tuple(sorted(label_strides(way.result, sizes).items()))
                    known = best.get(place)
                    if known is None or total < known.seconds:
                        best[place] = Choice(way.result, total, way, (i, j))
                if len(best) >= keep:
                    limit = sorted([choice.seconds for choice in best.values()])[keep - 1]
        choices.append(sorted(best.values(), key=lambda choice: choice.seconds)[:keep])
    return choices


def _copied_products_seconds(context: Context, way: Way, *pair: tuple[Layout, Way | None]) -> float:
    """What it takes more if a step copies the elementwise product of a step before: generated code multiplies in the
    order of the copy, where the operands lie across.
    """
    sizes, machine = context.sizes, context.machine
    seconds = 0.0
    for place, groups in enumerate((way.first, way.second)):
        layout, inner = pair[place ^ way.swap]
        if inner is None or inner.kind != "multiply" or not _is_copied(way, place, layout, sizes):
            continue
        strides, order = label_strides(layout, sizes), "".join(flipped(groups) if way.flips[place] else groups)
        own = label_strides(contiguous_layout(tuple(order), sizes), sizes)
        across = walk_order_seconds(order, (strides, own), sizes, machine)
        seconds += max(0.0, across - copy_seconds(order, strides, sizes, machine))
    return seconds


def _is_copied(way: Way, place: int, layout: Layout, sizes: Sizes) -> bool:
    """Whether a way copies its first (0) or second (1) operand, which lies so."""
    if way.flips[place] or way.copies[place]:
        return True
    return group_strides((way.first, way.second)[place], label_strides(layout, sizes), sizes) is None


def _consumers(steps: Sequence[Contraction]) -> dict[int, Contraction]:
    """The step that takes each value of a plan."""
    return {operand: step for step in steps for operand in step.operands}


def order_asked_for(wanted: tuple[str, ...], strides: Strides | None, sizes: Sizes) -> tuple[str, ...]:
    """The dimensions of the result, outermost in memory first, as far as that is asked for."""
    return wanted if strides is None else tuple(wanted[dim] for dim in strides.order(shape_of(wanted, sizes)))


def _hints(steps: Sequence[Contraction], operands: Sequence[Layout], wanted: tuple[str, ...]) -> list[str]:
    """For each step an order of all labels that its consumers would like: first the labels that the next contraction
    sums, as its other operand has them, last those of the whole result.
    """
    final = "".join(wanted)
    n = len(operands)
    consumers = _consumers(steps)
    hints = []
    for number in range(len(steps)):
        step = consumers.get(n + number)
        other = ""
        if step is not None:
            partner = step.operands[0] if step.operands[1] == n + number else step.operands[1]
            other = operands[partner].labels if partner < n else ""
        hints.append(final + "".join(label for label in other if label not in final))
    return hints


def finish_seconds(
    context: Context, way: Way, wanted: tuple[str, ...], strides: Strides | None, follows: bool
) -> float:
    """Time to bring the result of a way into the order that was asked for, and its gradient back if autograd follows:
    gradients are taken to lie as what they are gradients of.
    """
    sizes, machine = context.sizes, context.machine
    seconds = (machine.launch + follows * call_seconds(machine)) * count_calls(way.result, wanted)
    if not is_finished(way.result, wanted, strides, sizes):
        order = order_asked_for(wanted, strides, sizes)
        seconds += copy_seconds("".join(order), label_strides(way.result, sizes), sizes, machine)
        if follows:
            seconds += arrival_seconds(way, contiguous_layout(order, sizes), sizes, machine)
    return seconds


def is_finished(result: Layout, wanted: tuple[str, ...], strides: Strides | None, sizes: Sizes) -> bool:
    """Whether a view of a result is all that is asked for."""
    if strides is None:
        return True
    own = group_strides(wanted, label_strides(result, sizes), sizes)
    assert own is not None
    return strides.allow(shape_of(wanted, sizes), own)
