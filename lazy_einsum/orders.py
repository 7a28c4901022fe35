"""``plan_by_calls``: of orders that are about as good by the sizes, the one whose calls take the least time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .blocks import lower_in_blocks
from .errors import MemoryLimitError
from .kernels import lower_plan
from .labelsets import Network, Path
from .layout import Strides
from .plan import Optimize, Plan, plan_along, saved_elements
from .program import Program
from .saved import WrittenNetwork, lower_saving, plan_saving, saved_limit
from .sizes import is_symbolic

# With so many operands all orders are compared by their sizes (105 of five), and so many of the best by their calls.
_COMPARED = {3: 3, 4: 4, 5: 4}
# With gradients lowering takes longer. (For four operands it made 500 training steps with 500 sizes take 5 % longer.)
_COMPARED_FOLLOWED = {3: 3}
# Of what takes less seconds than this, most is the time of the calls themselves, and lowering more takes longer.
_LEAST = 50e-6
# An order is not lowered that takes so many times as long by its sizes as the best.
_FAR = 3.0
# Another order is clearly better where it takes this part of the time. (Less certain gains were losses: the order of
# ``e3nn_uvu_peredge`` that was to take 0.88 took 1.4.)
_CLEARLY, _CLEARLY_FOLLOWED = 0.85, 0.8
# Of more operands there are too many orders with neighbours for a look at each.
_MOST = 16
# Two orders take the same time by the sizes where they differ by rounding only.
_EQUAL = 1 + 1e-6

_Tree = Any  # an operand's number, or a pair of trees


class Choice(NamedTuple):
    """An order that was chosen.

    Attributes:
        plan: along this order.
        elements: what autograd may save of the calls that it is lowered to; ``None`` for no limit.
    """

    plan: Plan
    elements: float | None = None

    def lower(self, network: WrittenNetwork, strides: Strides | None) -> Program:
        """The calls for it."""
        if self.elements is None:
            return lower_in_blocks(self.plan, network.types, strides)
        return lower_saving(self.plan, network.types, network.memory, self.elements, strides)


def plan_by_calls(
    network: WrittenNetwork,
    ratio: float | None,
    optimize: Optimize = "auto",
    memory_limit: int | str | None = None,
    strides: Strides | None = None,
) -> Choice:
    """``plan_saving``, and for few operands a comparison of the best orders by the calls that they are lowered to.

    What the sizes alone don't tell is which operands have to be copied, and which sums are written out. (``dg_grad``:
    the best order by sizes takes 1.4 ms, another one 0.44, as it sums three terms and copies nothing.)

    Args:
        network: see ``plan_saving``.
        ratio: see ``plan_saving``.
        optimize: see ``make_plan``; only with ``"auto"`` orders are compared.
        memory_limit: see ``make_plan``.
        strides: what is asked of the strides of the result.

    Raises:
        MemoryLimitError: see ``make_plan``.
    """
    plan, limit = plan_saving(network, ratio, optimize, memory_limit)
    first = Choice(plan, None if limit is None else limit.elements)
    types = network.types
    followed = any(known.requires_grad for known in types)
    n_compared = (_COMPARED_FOLLOWED if followed else _COMPARED).get(len(types), 0)
    if (
        not 3 <= len(types) <= _MOST
        or optimize not in ("auto", True)
        or plan.seconds < _LEAST
        or any(network.frozen)
        or any(is_symbolic(size) for known in types for size in known.shape)
    ):
        return first
    if not n_compared:
        return _less_scattered(network, first, ratio, memory_limit)
    least = lower_plan(plan, types, strides).seconds * (_CLEARLY_FOLLOWED if followed else _CLEARLY)
    found: list[tuple[float, Plan]] = []
    chosen = _results(plan.ssa_path)
    for order in _best_orders(network)[:n_compared]:
        if _results(order) == chosen:
            continue
        try:
            other = along(network, order, "a comparison of calls", memory_limit)
        except MemoryLimitError:
            continue
        seconds = lower_plan(other, types, strides).seconds
        if seconds < least:
            found.append((seconds, other))
    for _, other in sorted(found, key=lambda item: item[0]):
        if (choice := within(network, other, ratio)) is not None:
            return choice
    return first


def _less_scattered(
    network: WrittenNetwork, first: Choice, ratio: float | None, memory_limit: int | str | None
) -> Choice:
    """``first``, or one of its neighbours that takes as long by the sizes and has less of the operands copied. (Nothing
    is lowered for that. ``ao2mo_occ_virt`` with gradients through Inductor: 2.4 ms, 2.0 where the outermost label of
    the large operand is summed first.)
    """
    best, least = first, _scattered(first.plan)
    if not least:
        return first
    path = first.plan.ssa_path
    ranked = _seconds_of(network, [path, *_neighbours(path)])
    for order in [order for order, seconds in ranked.items() if seconds <= ranked[path] * _EQUAL]:
        try:
            other = along(network, order, "a comparison of copies", memory_limit)
        except MemoryLimitError:
            continue
        scattered = _scattered(other)
        if scattered < least and (choice := within(network, other, ratio)) is not None:
            best, least = choice, scattered
    return best


def _scattered(plan: Plan) -> int:
    """Elements of the operands of which the labels that are summed first, or those that are kept, do not lie together:
    they are no matrix in memory, if they are contiguous.
    """
    elements = 0
    for step in plan.steps:
        for operand, term, other in zip(step.operands, step.spec.inputs, reversed(step.spec.inputs), strict=True):
            if operand < len(plan.shapes):
                sizes = dict(zip(term, plan.shapes[operand], strict=True))
                kinds = [(label in other, label in step.spec.output) for label in term if sizes[label] > 1]
                if len(list(itertools.groupby(kinds))) > len(set(kinds)):
                    elements += math.prod(sizes.values())
    return elements


def along(network: WrittenNetwork, path: Path, found_by: str, memory_limit: int | str | None) -> Plan:
    """The plan of a network along a path (see ``Plan.ssa_path``) that was found in this way.

    Raises:
        MemoryLimitError: see ``make_plan``.
    """
    follows = tuple(one.requires_grad for one in network.types)
    shapes = tuple(tuple(one.shape) for one in network.types)
    return plan_along(network.spec, shapes, path, found_by, memory_limit, follows=follows, frozen=network.frozen)


def within(network: WrittenNetwork, plan: Plan, ratio: float | None) -> Choice | None:
    """The choice of ``plan``; ``None`` where autograd would save too much of it, see ``plan_saving``."""
    most = None if ratio is None else saved_limit(network, ratio, plan.ssa_path)
    if most is None:
        return Choice(plan)
    saved = saved_elements(network.spec, plan.shapes, plan.ssa_path, most)
    return Choice(plan, most.elements) if saved <= most.elements else None


def other_orders(network: WrittenNetwork, path: Path) -> list[Path]:
    """Orders beside ``path`` that are not far from the best, best first by the sizes: of all for few operands, else of
    its neighbours.
    """
    all_orders = len(network.types) in _COMPARED
    found = _best_orders(network) if all_orders else _ranked(network, list(_neighbours(path)))
    known = _results(path)
    return [order for order in found if _results(order) != known]


def _neighbours(path: Path) -> Iterator[Path]:
    """Orders in which an operand of a value and the value beside that have changed places."""
    n = len(path) + 1
    children = {n + number: step for number, step in enumerate(path)}
    root = n + len(path) - 1
    for top, (left, right) in children.items():
        for inner, outer in ((left, right), (right, left)):
            for kept, moved in itertools.permutations(children[inner]) if inner in children else ():
                changed = {**children, top: (inner, moved), inner: (kept, outer)}
                yield _order_of_children(changed, root, n)


def _order_of_children(children: Mapping[int, tuple[int, ...]], root: int, n: int) -> Path:
    """The tree below ``root`` as pairs of numbers. (Not recursive: it may be as deep as it has operands.)"""
    inner, stack = [], [root]
    while stack:
        number = stack.pop()
        if number >= n:
            inner.append(number)
            stack += children[number]
    numbers = dict(zip(reversed(inner), range(n, n + len(inner)), strict=True))
    return tuple(tuple(sorted(numbers.get(child, child) for child in children[top])) for top in reversed(inner))


def _best_orders(network: WrittenNetwork) -> list[Path]:
    """All orders but those that are far from the best by the sizes, best first."""
    n = len(network.types)
    return _ranked(network, [_order_of(tree, n) for tree in _trees(tuple(range(n)))])


def _ranked(network: WrittenNetwork, orders: Sequence[Path]) -> list[Path]:
    """Those that are not far from the best by the sizes, best first."""
    seconds = _seconds_of(network, orders)
    limit = _FAR * min(seconds.values())
    return sorted((order for order in seconds if seconds[order] <= limit), key=seconds.__getitem__)


def _seconds_of(network: WrittenNetwork, orders: Sequence[Path]) -> dict[Path, float]:
    """What each takes by the sizes."""
    shapes = [one.shape for one in network.types]
    sizes = network.spec.sizes(shapes)
    follows = [one.requires_grad for one in network.types]
    labels = Network.of(network.spec, tuple(shapes), sizes, False).following(follows)
    return {order: labels.seconds(order) for order in orders}


def _results(order: Path) -> set[frozenset[int]]:
    """Which operands are in each result of an order: the same for orders that are one but for their numbers."""
    below = [frozenset([leaf]) for leaf in range(len(order) + 1)]
    for pair in order:
        below.append(frozenset().union(*(below[number] for number in pair)))
    return set(below)


def _trees(leaves: tuple[int, ...]) -> Iterator[_Tree]:
    """All ways to pair these up to one."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, *rest = leaves
    for chosen in range(2 ** len(rest) - 1):
        with_first = tuple(leaf for place, leaf in enumerate(rest) if chosen >> place & 1)
        others = tuple(leaf for place, leaf in enumerate(rest) if not chosen >> place & 1)
        yield from itertools.product(_trees((first, *with_first)), _trees(others))


def _order_of(tree: _Tree, n: int) -> Path:
    """A tree as pairs of numbers: operands from 0, results from ``n`` on."""
    pairs: list[tuple[int, ...]] = []

    def visit(part: _Tree) -> int:
        if isinstance(part, int):
            return part
        pairs.append(tuple(sorted((visit(part[0]), visit(part[1])))))
        return n + len(pairs) - 1

    visit(tree)
    return tuple(pairs)
