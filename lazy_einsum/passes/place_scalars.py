"""Put each multiplication by a number on the smallest tensor of its chain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from typing import NamedTuple

from torch import fx

from ..frozen import frozen_values
from ..graph import (
    Facts,
    Writers,
    copy_graph,
    facts,
    fresh_storage,
    fresh_type,
    is_dense,
    same_mode,
    stamp,
    type_of,
    uses,
)
from ..scalars import ONE, Factor, Linear, Tensors, dtype_of, read_linear, tensors
from ..signature import TensorType


def place_scalars(reassociate: bool | None = None) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that chooses where a scalar factor is cheapest.

    Before (x and z are thin, y is short)::

        einsum = torch.einsum("ab,bc->ac", x, y)          # 2 x 2
        einsum_1 = torch.einsum("ab,bc->ac", einsum, z)   # 2 x 100
        mul = einsum_1 * 0.784

    After::

        einsum = torch.einsum("ab,bc->ac", x, y)
        mul = einsum * 0.784
        einsum_1 = torch.einsum("ab,bc->ac", mul, z)

    A scaling of the result of a multilinear call that nothing else uses may as well scale one operand of that call, and
    so on up the chain; it moves to the place with the fewest elements, if that
    has fewer than where it stands. The numerator of ``number / tensor`` takes it for nothing.

    Requires: facts (without them, nothing moves).
    Ensures: same values up to rounding, exact for integers; each value that was memory of its own still is.

    Args:
        reassociate: True moves factors in float16 as well; False moves none.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        if reassociate is False:
            return new
        among = set(tensors(new))
        writers, frozen = Writers(new), frozen_values(new)
        storages = itertools.count(fresh_storage(new))
        for node in list(new.nodes):
            found = read_linear(node, among)
            if (
                found is None
                or not found.only_scales
                or type_of(node) is None
                or not found.factor.fits(dtype_of(node), reassociate)
            ):
                continue
            if node in frozen:
                continue  # it is computed once, wherever it stands
            best = min(_places(node, found, among, writers, frozen, reassociate), key=lambda place: place.cost)
            if best.path:
                among.add(_move(node, found.factor, best, storages))
        return new

    return run


class _Place(NamedTuple):
    """Where a scaling may stand.

    Attributes:
        cost: elements that it then multiplies, in the backward pass too.
        path: calls from the one whose result is scaled down to the one whose operand would be; empty for where it
            stands.
        last: what the last call of the path is.
        operand: number of its operand occurrence, ``None`` for the number in a ``number / tensor``.
    """

    cost: int
    path: tuple[fx.Node, ...]
    last: Linear
    operand: int | None


def _places(
    scaling: fx.Node,
    own: Linear,
    among: Tensors,
    writers: Writers,
    frozen: Set[fx.Node],
    reassociate: bool | None,
) -> Iterator[_Place]:
    """All places for ``scaling``, the nearest first; the first is where it stands."""
    known = type_of(scaling)
    assert known is not None
    yield _Place(_cost(known), (), own, 0)
    open_paths: list[tuple[fx.Node, ...]] = [(own.operands[0][0],)]
    while open_paths:
        path = open_paths.pop(0)
        call = path[-1]
        found, result = read_linear(call, among), type_of(call)
        if found is None or result is None or result.dtype != known.dtype or uses(call) != 1:
            continue
        if not same_mode(call, scaling) or not writers.allow([call], call, scaling) or writers.hold(call):
            continue
        if len(path) == 1 and found.layout != "any" and result.stride != known.stride:
            # What scaling gives is dense; the call would give a view with gaps in its place.
            continue
        for number, (operand, degree) in enumerate(found.operands):
            entering = type_of(operand)
            if (
                entering is None
                or entering.dtype != known.dtype
                or {d for o, d in found.operands if o is operand} != {degree}
            ):
                continue
            if degree == 1 and (found.layout == "any" or is_dense(operand)):
                # What is computed once may as well be scaled then; a tensor of the module would be doubled.
                is_free = operand in frozen and operand.op != "get_attr"
                yield _Place(0 if is_free else _cost(entering), path, found, number)
                open_paths.append((*path, operand))
            elif degree == -1 and found.factor != ONE and found.factor.times(own.factor).fits(known.dtype, reassociate):
                yield _Place(0, path, found, None)


def _cost(known: TensorType) -> int:
    return known.numel * (2 if known.requires_grad else 1)


def _move(scaling: fx.Node, factor: Factor, place: _Place, storages: Iterator[int]) -> fx.Node:
    """Move ``scaling`` to ``place``; return the call that scales now."""
    last, found = place.path[-1], place.last
    facts_before = [known for node in place.path if (known := facts(node))]
    if place.operand is None:
        number = found.factor.times(factor).number
        last.args = tuple(argument if isinstance(argument, fx.Node) else number for argument in last.args)
        scaled, source = last, None
    else:
        source = found.operands[place.operand][0]
        with scaling.graph.inserting_before(last):
            scaled = scaling.graph.node_copy(scaling, lambda _: source)
        occurrence = [operand for operand, _ in found.operands[: place.operand]].count(source)
        _replace_occurrence(last, source, occurrence, scaled)
    _restamp(scaling, place.path, facts_before, source, scaled, storages)
    scaling.replace_all_uses_with(place.path[0])
    scaling.graph.erase_node(scaling)
    return scaled


def _restamp(
    scaling: fx.Node,
    path: tuple[fx.Node, ...],
    before: list[Facts],
    source: fx.Node | None,
    scaled: fx.Node,
    storages: Iterator[int],
) -> None:
    """Facts after a move.

    The first call of the path now gives what ``scaling`` gave; a call that returns a view returns one of scaled memory.
    """
    outer = facts(scaling)
    assert outer is not None
    assert len(before) == len(path)
    storage = outer.storage
    path[0].meta = {**path[0].meta, **scaling.meta}
    for upper, lower, node in zip(before, before[1:], path[1:], strict=False):
        storage = storage if upper.storage == lower.storage else lower.storage
        stamp(node, replace(lower, storage=storage))
    if source is None:
        return
    entering = facts(source)
    assert entering is not None
    assert entering.type is not None
    is_view = before[-1].storage == entering.storage
    scaled.meta = {
        **source.meta,
        **{key: value for key, value in scaling.meta.items() if key not in ("tensor_meta", "type")},
    }
    stamp(scaled, replace(outer, type=fresh_type(entering.type), storage=storage if is_view else next(storages)))


def _replace_occurrence(node: fx.Node, old: fx.Node, occurrence: int, new: fx.Node) -> None:
    """Put ``new`` where ``old`` occurs for the time ``occurrence`` (from 0) among the arguments of ``node``."""
    seen = -1

    def change(argument: fx.Node) -> fx.Node:
        nonlocal seen
        seen += argument is old
        return new if argument is old and seen == occurrence else argument

    node.args = fx.node.map_arg(node.args, change)
    node.kwargs = fx.node.map_arg(node.kwargs, change)
