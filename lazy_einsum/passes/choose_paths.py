"""Give each einsum of many operands a contraction order: pairwise einsums along its plan."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from ..choice import choose_order
from ..decompose import VIEWS, eager_calls
from ..frozen import frozen_values
from ..graph import (
    Writers,
    copy_graph,
    facts,
    fresh_storage,
    is_einsum,
    is_order_free,
    read_einsum,
    stamp,
    type_of,
    write_einsum,
)
from ..layout import Strides
from ..plan import Plan, make_plan
from ..program import Value
from ..progress import with_progress
from ..saved import SAVED, written_network
from ..signature import TensorType
from ..sizes import is_symbolic

PLAN = "lazy_einsum_plan"
"""Under this name the last step of a planned einsum has the whole plan in its ``meta``."""


def choose_paths(
    optimize: object = "auto",
    memory_limit: int | None = None,
    element_limit: int | str | None = None,
    generic: bool = False,
    saved_limit: float | None = None,
    measure: bool = False,
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that chooses contraction orders.

    Before::

        einsum = torch.einsum("ab,bc,cd->ad", x, y, z)

    After (x is thin)::

        einsum_1 = torch.einsum("ab,bc->ac", x, y)
        einsum = torch.einsum("ab,bc->ac", einsum_1, z)

    Where the result depends on the order (see ``is_order_free``), the calls are those that ``torch.einsum`` itself
    would make.

    Requires: facts; an einsum with an operand of unknown shape stays as it is, with a ``RuntimeWarning`` that names it.
    The settings of ``torch.backends.opt_einsum`` are in the key where an einsum had three operands from the start.
    Ensures: no einsum of more than two operands, except in generic code where the result depends on the order; the last
    step of each keeps the name and the facts of the whole.

    Args:
        optimize: see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        element_limit: the same in elements, as opt_einsum has it: a number, ``"max_input"`` or ``"max_output"``.
        generic: the result is to hold for other sizes of the same ranks.
        saved_limit: what autograd may save for the backward pass, in parts of what it saves of the einsums as they were
            written; see ``plan_by_calls``.
        measure: time a few orders of each einsum; see ``choose_order``.

    Raises:
        MemoryLimitError: no order was found that stays below the limit.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        writers, frozen = Writers(new), frozen_values(new)
        storages = itertools.count(fresh_storage(new))
        nodes = list(new.nodes)
        for node in with_progress(nodes, len(nodes), "measuring orders") if measure else nodes:
            found = read_einsum(node) if is_einsum(node) else None
            if found is None:
                if is_einsum(node):
                    _warn(node)
                continue
            spec, operands = found
            types = [entering for operand in operands if (entering := type_of(operand))]
            if len(types) != len(operands):
                _warn(node)
            elif len(operands) < 3:
                pass
            elif is_order_free(node, operands, writers):
                limit = element_limit if memory_limit is None else memory_limit // types[0].dtype.itemsize
                network = written_network(node, spec, operands, frozen)
                if generic or network is None:
                    plan = make_plan(spec, [operand.shape for operand in types], optimize, limit, generic)
                else:
                    result = type_of(node)
                    strides = None if result is None else Strides(result.stride, exact=False)
                    plan, elements = choose_order(network, saved_limit, optimize, limit, strides, measure)
                    if elements is not None:
                        node.meta[SAVED] = len(operands), elements
                node.meta[PLAN] = plan
                _follow_plan(node, plan, operands, storages)
            elif not generic and not any(is_symbolic(size) for operand in types for size in operand.shape):
                _follow_eager(node, operands, types, storages)
        return new

    return run


def _follow_plan(node: fx.Node, plan: Plan, operands: Sequence[fx.Node], storages: Iterator[int]) -> None:
    values = list(operands)
    for step in plan.steps[:-1]:
        with node.graph.inserting_before(node):
            taken = [values[number] for number in step.operands]
            values.append(write_einsum(node.graph, step.spec, taken, like=node, storage=next(storages)))
    last = plan.steps[-1]
    node.args = (str(last.spec.canonical()), *(values[number] for number in last.operands))
    node.kwargs = {}


def _follow_eager(
    node: fx.Node, operands: Sequence[fx.Node], types: Sequence[TensorType], storages: Iterator[int]
) -> None:
    known, equation = facts(node), node.args[0]
    calls = eager_calls(equation, types) if known and isinstance(equation, str) else None
    if known is None or calls is None:
        return
    # No types: nothing is to be changed about these calls, or moved.
    inside = replace(known, type=None, movable=False, writes=())
    values = list(operands)
    for call in calls[:-1]:
        args = tuple(values[arg.number] if isinstance(arg, Value) else arg for arg in call.args)
        source = facts(args[0]) if call.target in VIEWS else None
        with node.graph.inserting_before(node):
            value = node.graph.call_method(call.target, args, dict(call.kwargs))
        values.append(stamp(value, replace(inside, storage=source.storage if source else next(storages))))
    last = calls[-1]
    node.op, node.target = "call_method", last.target
    node.args = tuple(values[arg.number] if isinstance(arg, Value) else arg for arg in last.args)
    node.kwargs = dict(last.kwargs)
    stamp(node, replace(known, movable=False))


def _warn(node: fx.Node) -> None:
    warnings.warn(
        f"einsum {node} ({node.format_node()}) has operands of unknown shape, so no contraction order is chosen for "
        "it; propagate shapes through the graph first (EfficientShapeProp)",
        RuntimeWarning,
        stacklevel=3,
    )
