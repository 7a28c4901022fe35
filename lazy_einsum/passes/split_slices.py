"""Take disjoint slices of one tensor by one ``split``, where autograd follows it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from ..graph import Writers, copy_graph, facts, fresh_storage, keepers, stamp, type_of
from ..signature import TensorType
from ..sizes import is_symbolic


def split_slices() -> Callable[[fx.Graph], fx.Graph]:
    """The pass that joins slices.

    Before (x has 100 columns)::

        getitem = x[:, :30]
        getitem_1 = x[:, 30:90]

    After::

        split = x.split_with_sizes([30, 60, 10], 1)
        getitem = split[0]
        getitem_1 = split[1]

    The gradient of each slice is a tensor as large as ``x``, filled with zeros, and all of them are added up; that of a
    split is written once. (A training step of e3nn's convolution, which takes 11 slices of its weights: 20.7 ms, and
    11.8 with splits.)

    The pieces are views of ``x`` as the slices were. But views that come several at once may not be written, so slices
    stay where one, or a view of one, leaves the graph, is written, or is given to what may do anything with it, and
    where ``x`` is written. So do those along a dimension whose size is not known. Slices that overlap come of several
    splits.

    Requires: facts; graphs without are left as they are.
    Ensures: every value is what it was, and lies as it did.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        writers = Writers(new)
        storages = itertools.count(fresh_storage(new))
        # Pieces that are put in are visited too: slices may have slices.
        for node in new.nodes:
            for slices in _groups(node):
                if len(slices) > 1 and not writers.spoil_any([node], node):
                    _split(node, slices, storages)
        return new

    return run


class _Slice(NamedTuple):
    """A slice of a tensor along one dimension.

    Attributes:
        dim: the dimension.
        start: its first place.
        length: how many places.
        node: what takes it.
        drops: whether the dimension is gone, as of ``x[:, 3]``.
    """

    dim: int
    start: int
    length: int
    node: fx.Node
    drops: bool


def _groups(source: fx.Node) -> Iterator[list[_Slice]]:
    """Slices of a tensor that can be taken at once, in order of their places."""
    found: dict[int, list[_Slice]] = {}
    for user in source.users:
        taken = _read(user, source)
        if taken is not None and not keepers(user):
            found.setdefault(taken.dim, []).append(taken)
    for slices in found.values():
        rest = sorted(slices, key=lambda taken: (taken.start, taken.length))
        while rest:
            group: list[_Slice] = []
            left: list[_Slice] = []
            for taken in rest:
                same = bool(group) and taken[:3] == group[-1][:3]
                fits = not group or same or taken.start >= group[-1].start + group[-1].length
                (group if fits else left).append(taken)
            yield group
            rest = left


def _read(node: fx.Node, source: fx.Node) -> _Slice | None:
    """The slice that a node takes; ``None`` where it does something else, or is not followed."""
    known, whole = facts(node), type_of(source)
    if known is None or known.type is None or whole is None or not known.movable:
        return None
    # (A view that is made without grad says that it requires grad.)
    if not (known.grad and known.type.requires_grad):
        return None
    if node.kwargs:
        return None
    given: tuple[Any, ...] = node.args[1:]
    if node.target is operator.getitem:
        index = given[0] if isinstance(given[0], tuple) else given
    elif node.op == "call_method" and node.target in ("narrow", "select") and all(type(item) is int for item in given):
        dim, start, *length = given
        index = (*[slice(None)] * (dim % len(whole.shape)), slice(start, start + length[0]) if length else start)
    else:
        return None
    return _place(node, index, whole.shape)


def _place(node: fx.Node, index: tuple[object, ...], shape: tuple[int, ...]) -> _Slice | None:
    """The slice of an index, if it takes whole numbers along one dimension, and all of the others."""
    if any(type(item) not in (int, slice, type(Ellipsis)) for item in index):
        return None
    missing = len(shape) - len(index) + index.count(Ellipsis)
    place = index.index(Ellipsis) if Ellipsis in index else len(index)
    index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    chosen = [(dim, item) for dim, item in enumerate(index) if item != slice(None)]
    if len(chosen) != 1:
        return None
    dim, item = chosen[0]
    size = shape[dim]
    if is_symbolic(size):
        return None
    if type(item) is int:
        return _Slice(dim, item % size, 1, node, True)
    assert isinstance(item, slice)
    if item.step not in (None, 1) or not all(type(bound) in (int, type(None)) for bound in (item.start, item.stop)):
        return None
    start, stop, _ = item.indices(size)
    return _Slice(dim, start, stop - start, node, False) if start < stop else None


def _split(source: fx.Node, slices: list[_Slice], storages: Iterator[int]) -> None:
    """Replace slices by the pieces of one split, before the first of them."""
    graph, whole, dim = source.graph, type_of(source), slices[0].dim
    assert whole is not None
    lengths: list[int] = []
    pieces: dict[int, int] = {}
    end = 0
    for taken in slices:
        if taken.start in pieces:
            continue
        if taken.start > end:
            lengths.append(taken.start - end)
        pieces[taken.start] = len(lengths)
        lengths.append(taken.length)
        end = taken.start + taken.length
    if end < whole.shape[dim]:
        lengths.append(whole.shape[dim] - end)
    first = min(taken.node for taken in slices)
    known = facts(first)
    assert known is not None
    with graph.inserting_before(first):
        together = graph.call_method("split_with_sizes", (source, lengths, dim))
        stamp(together, replace(known, type=None, storage=next(storages)))
    for taken in slices:
        _replace(taken, together, pieces[taken.start], whole)


def _replace(taken: _Slice, together: fx.Node, piece: int, whole: TensorType) -> None:
    """Replace one slice by a piece."""
    node, graph = taken.node, taken.node.graph
    known = facts(node)
    assert known is not None
    assert known.type is not None
    with graph.inserting_before(node):
        value = stamp(graph.call_function(operator.getitem, (together, piece)), known)
        if taken.drops:
            shape = tuple(1 if dim == taken.dim else size for dim, size in enumerate(whole.shape))
            stamp(value, replace(known, type=replace(known.type, shape=shape, stride=whole.stride)))
            value = stamp(graph.call_method("squeeze", (value, taken.dim)), known)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
