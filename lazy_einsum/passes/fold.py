"""Compute what depends on frozen tensors only once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Set
from dataclasses import replace

from torch import fx

from ..folds import Fold
from ..frozen import FROZEN, frozen_values
from ..graph import (
    copy_graph,
    erase_if_unused,
    facts,
    fresh_storage,
    is_dense,
    keepers,
    stamp,
    type_of,
)
from ..sizes import is_symbolic


def fold(memory_limit: int | None = None) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that puts one call in the place of all that a value takes to compute of frozen tensors.

    Before (a and b are frozen)::

        einsum = torch.einsum("ab,bc->ac", a, b)
        einsum_1 = torch.einsum("ab,bc->ac", x, einsum)

    After::

        fold = lazy_einsum_folds_fold(a, b)
        einsum_1 = torch.einsum("ab,bc->ac", x, fold)

    The call is a ``Fold``. Views stay outside of it, so that what is kept is memory of its own. Where a value may leave
    the graph, or be kept by what is called with it, a copy does; that pays only where more than one call was saved, or
    one with several operands.

    Requires: exact facts.
    Ensures: values of folds are not written, not returned, and not given to what may do so; nor are views of them.

    Args:
        memory_limit: bytes that no value may exceed.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        frozen = frozen_values(new)
        storages = itertools.count(fresh_storage(new))
        for node in _roots(new, frozen, memory_limit):
            _write(node, storages)
        erase_if_unused([node for node in reversed(new.nodes) if node in frozen and node.op != "get_attr"])
        return new

    return run


def _roots(graph: fx.Graph, frozen: Set[fx.Node], memory_limit: int | None) -> list[fx.Node]:
    """The values to fold: those that others than frozen ones need, where they can be kept."""
    roots: list[fx.Node] = []
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in frozen and (node.op == "get_attr" or node not in needed):
            continue
        if node in frozen and _can_be_kept(node, memory_limit) and (not keepers(node) or _is_worth_a_copy(node)):
            roots.append(node)
        else:
            needed.update(node.all_input_nodes)
    return roots


def _can_be_kept(node: fx.Node, memory_limit: int | None) -> bool:
    """Whether the value is a tensor in memory of its own, and fills that."""
    known = type_of(node)
    if known is None or not is_dense(node) or any(map(is_symbolic, (*known.shape, *known.stride))):
        return False
    if known.is_conj or known.is_neg or isinstance(node.target, Fold):
        return False
    if memory_limit is not None and known.numel * known.dtype.itemsize > memory_limit:
        return False
    return _owns_memory(node)


def _owns_memory(node: fx.Node) -> bool:
    """Whether all that lies in the memory of ``node`` is a view of it."""
    views = {node}
    for other in node.graph.nodes:
        is_taken = not views.isdisjoint(other.all_input_nodes)
        if _storage(other) == _storage(node) and other is not node:
            if not is_taken:
                return False
            views.add(other)
        elif is_taken and _storage(other) is None:  # several views
            views.add(other)
    return True


def _storage(node: fx.Node) -> int | None:
    known = facts(node)
    return known.storage if known is not None else None


def _is_worth_a_copy(node: fx.Node) -> bool:
    """Whether a copy of the value takes less than computing it."""
    calls = [call for call in _computation(node) if call.op != "get_attr" and _can_be_kept(call, None)]
    return len(calls) > 1 or any(len(call.all_input_nodes) > 1 for call in calls)


def _computation(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it depends on, in the order of the graph."""
    found = {node}
    stack = [node]
    while stack:
        more = [operand for operand in stack.pop().all_input_nodes if operand not in found]
        found.update(more)
        stack += more
    return sorted(found)


def _write(node: fx.Node, storages: Iterator[int]) -> None:
    """Put a call of a ``Fold`` in the place of ``node``."""
    known = facts(node)
    assert known is not None and known.type is not None
    computation = _computation(node)
    tensors = [taken for taken in computation if taken.op == "get_attr"]
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for number, taken in enumerate(tensors):
        values[taken] = graph.placeholder(f"v{number}")
    for taken in computation:
        if taken not in values:
            args, kwargs = fx.node.map_arg((taken.args, taken.kwargs), values.__getitem__)
            values[taken] = graph.create_node(taken.op, taken.target, args, kwargs, name=f"v{len(values)}")
    graph.output(values[node])
    folded = Fold(tuple(str(taken.meta[FROZEN]) for taken in tensors), graph, replace(known.type, is_inference=False))
    with node.graph.inserting_before(node):
        value = node.graph.create_node("call_function", folded, tuple(tensors), {}, name="fold")
        stamp(value, known)
        if keepers(node):
            stamp(value, replace(known, storage=next(storages)))
            value = stamp(node.graph.call_method("clone", (value,)), known)
    node.replace_all_uses_with(value)
