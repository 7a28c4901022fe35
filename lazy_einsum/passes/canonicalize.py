"""Write every call that is an einsum as one canonical ``torch.einsum``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import EquationError
from ..graph import EINSUM_TARGETS, MAX_LABELS, Writers, copy_graph, facts, given, is_order_free, read_einsum, type_of
from ..spec import EinsumSpec, symbol

_Read = tuple[EinsumSpec, tuple[fx.Node, ...]]


def canonicalize() -> Callable[[fx.Graph], fx.Graph]:
    """The pass that brings einsums into one form.

    Before::

        einsum = torch.einsum("...J, ...Jk", [x, y])
        tensordot = torch.tensordot(einsum, z, 1)

    After::

        einsum = torch.einsum("ab,abc->ac", x, y)
        einsum_1 = torch.einsum("ab,bcd->acd", einsum, z)

    A call is left as it is where it can't be read (unknown ranks, unknown keyword arguments), where its equation is
    malformed (running it raises as it did), where its operands differ in dtype, where a dtype has no rule of its own,
    under autocast, and where autograd follows it and an operand is written later; of three operands or more also where
    they are narrow integers (the letters may decide in which order ``torch.einsum`` contracts them).

    Requires: facts, for anything that depends on a rank.
    Ensures: text with explicit output, letters in order of appearance, no spaces, no ``...``, operands as separate
    arguments.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        writers = Writers(new)
        for node in list(new.nodes):
            rule = _RULES.get(node.target) if node.op in ("call_function", "call_method") else None
            found = rule(node) if rule and _may_change(node) and not writers.hold(node) else None
            if found is not None:
                _rewrite(node, *found, writers)
        return new

    return run


def _may_change(node: fx.Node) -> bool:
    known = facts(node)
    return known is None or known.movable


def _rewrite(node: fx.Node, spec: EinsumSpec, operands: Sequence[fx.Node], writers: Writers) -> None:
    """Make ``node`` the einsum ``spec`` of ``operands``, in place, so that its users, name and facts stay."""
    types = [type_of(operand) for operand in operands]
    if spec.n_labels > MAX_LABELS or len({known.dtype for known in types if known}) > 1:
        return
    if len(operands) > 2 and not is_order_free(node, operands, writers):
        return
    spec = spec.canonical()
    node.op, node.target = "call_function", torch.einsum
    node.args, node.kwargs = (str(spec), *operands), {}


def _read_torch_einsum(node: fx.Node) -> _Read | None:
    try:
        return read_einsum(node)
    except EquationError:
        return None


def _read_tensordot(node: fx.Node) -> _Read | None:
    """``tensordot(a, b, dims=2)`` in all its forms: ``dims`` a number, a pair of lists, or a list of two lists."""
    arguments = dict(zip(("a", "b", "dims"), node.args, strict=False)) | given(node.kwargs)
    if not set(arguments) <= {"a", "b", "dims"} or len(node.args) > 3:
        return None
    left, right, dims = arguments.get("a"), arguments.get("b"), arguments.get("dims", 2)
    types = type_of(left), type_of(right)
    if types[0] is None or types[1] is None or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if not (
        types[0].dtype == types[1].dtype
        and (types[0].dtype.is_floating_point or types[0].dtype.is_complex or types[0].dtype is torch.int64)
    ):
        return None
    ranks = len(types[0].shape), len(types[1].shape)
    pairs = _tensordot_pairs(dims, ranks)
    if pairs is None:
        return None
    first = [symbol(number) for number in range(ranks[0])]
    second = [symbol(ranks[0] + number) for number in range(ranks[1])]
    for one, two in pairs:
        second[two] = first[one]
    contracted = {first[one] for one, _ in pairs}
    output = "".join(label for label in first + second if label not in contracted)
    return EinsumSpec(("".join(first), "".join(second)), output), (left, right)


def _tensordot_pairs(dims: Any, ranks: tuple[int, int]) -> list[tuple[int, int]] | None:
    """Pairs of dimensions that are contracted, ``None`` where ``dims`` is in no known form or out of range."""
    if type(dims) is int:
        if not 0 <= dims <= min(ranks):
            return None
        return [(ranks[0] - dims + number, number) for number in range(dims)]
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    if not all(isinstance(side, (tuple, list)) and all(type(dim) is int for dim in side) for side in dims) or len(
        dims[0]
    ) != len(dims[1]):
        return None
    if any(not -rank <= dim < rank for side, rank in zip(dims, ranks, strict=True) for dim in side):
        return None
    pairs = [(one % ranks[0], two % ranks[1]) for one, two in zip(*dims, strict=True)]
    if len({one for one, _ in pairs}) < len(pairs) or len({two for _, two in pairs}) < len(pairs):
        return None
    return pairs


# To teach the pass another call, add a row: its target and a rule that reads it as a spec and operands, or gives None
# where the call is in a form that the rule does not know.
_RULES: dict[Any, Callable[[fx.Node], _Read | None]] = {
    **dict.fromkeys(EINSUM_TARGETS, _read_torch_einsum),
    **dict.fromkeys((torch.tensordot, torch.functional.tensordot), _read_tensordot),
}
