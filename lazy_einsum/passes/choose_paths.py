"""Give each einsum of many operands a contraction order: pairwise einsums along its plan."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import torch
from torch import fx

from ..graph import Writers, copy_graph, facts, fresh_storage, is_einsum, read_einsum, type_of, write_einsum
from ..plan import make_plan

# The dtypes in which an einsum has one dtype in any order of contraction (see fuse_einsums for the narrow integers).
_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.complex32,
        torch.int64,
    }
)


PLAN = "lazy_einsum_plan"
"""Under this name the last step of a planned einsum has the whole plan in its ``meta``."""


def choose_paths(
    optimize: object = "auto",
    memory_limit: int | None = None,
    element_limit: int | str | None = None,
    generic: bool = False,
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that chooses contraction orders.

    Before::

        einsum = torch.einsum("ab,bc,cd->ad", x, y, z)

    After (x is thin)::

        einsum_1 = torch.einsum("ab,bc->ac", x, y)
        einsum = torch.einsum("ab,bc->ac", einsum_1, z)

    Requires: facts; an einsum with an operand of unknown shape stays as it is, with a ``RuntimeWarning`` that names it.
    Ensures: no einsum of more than two operands, but for those of mixed or narrow integer dtypes those under autocast,
    and those that autograd follows while an operand is written later; the last step of each keeps the name and the
    facts of the whole.

    Args:
        optimize: see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        element_limit: the same in elements, as opt_einsum has it: a number, ``"max_input"`` or ``"max_output"``.
        generic: the result is to hold for other sizes of the same ranks.

    Raises:
        MemoryLimitError: no order was found that stays below the limit.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        writers = Writers(new)
        storages = itertools.count(fresh_storage(new))
        for node in list(new.nodes):
            found = read_einsum(node) if is_einsum(node) else None
            if found is None:
                if is_einsum(node):
                    _warn(node)
                continue
            spec, operands = found
            types = [entering for operand in operands if (entering := type_of(operand))]
            if len(types) != len(operands):
                _warn(node)
                continue
            known = facts(node)
            dtypes = {operand.dtype for operand in types}
            if (
                len(operands) < 3
                or len(dtypes) > 1
                or not dtypes <= _DTYPES
                or (known and not known.movable)
                or writers.hold(node)
            ):
                continue
            limit = element_limit if memory_limit is None else memory_limit // types[0].dtype.itemsize
            plan = make_plan(spec, [operand.shape for operand in types], optimize, limit, generic)
            node.meta[PLAN] = plan
            values = list(operands)
            for step in plan.steps[:-1]:
                with new.inserting_before(node):
                    values.append(
                        write_einsum(
                            new,
                            step.spec,
                            [values[number] for number in step.operands],
                            like=node,
                            storage=next(storages),
                        )
                    )
            last = plan.steps[-1]
            node.args = (str(last.spec.canonical()), *(values[number] for number in last.operands))
            node.kwargs = {}
        return new

    return run


def _warn(node: fx.Node) -> None:
    warnings.warn(
        f"einsum {node} ({node.format_node()}) has operands of unknown shape, so no contraction order is chosen for "
        "it; propagate shapes through the graph first (EfficientShapeProp)",
        RuntimeWarning,
        stacklevel=3,
    )
