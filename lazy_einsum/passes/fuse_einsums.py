"""Inline einsums into the einsums that use them, so that one contraction order is chosen for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..graph import MAX_LABELS, Writers, copy_graph, erase_if_unused, is_einsum, read_einsum, same_mode, type_of, uses
from ..saved import WRITTEN, written_einsums
from ..spec import EinsumSpec

_Read = tuple[EinsumSpec, tuple[fx.Node, ...]]

# Narrower integers (and bool) are summed into int64 by some calls of torch.einsum and not by others, so that two calls
# in one may differ in dtype from one after the other.
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64})
_HALF = frozenset({torch.float16, torch.complex32})


def fuse_einsums(reassociate: bool | None = None) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that makes one einsum of several.

    Before::

        einsum = torch.einsum("ij,jk->ik", x, y)
        einsum_1 = torch.einsum("ik,ij->i", einsum, x)

    After::

        einsum_1 = torch.einsum("ab,bc,ad->a", x, y, x)

    An einsum is inlined where it is used exactly once, and by an einsum; where nothing between the two writes memory
    that it reads (nor anything later, if autograd keeps operands); where both run in the same grad mode and outside
    autocast; where
    the result has no more labels than ``torch.einsum`` takes; and where the dtype keeps range and exactness in any
    order (in float16 it does not).

    Requires: nothing; without facts ranks are read off the equations, an ellipsis stops the pass, and operands are
    taken to be of one floating point dtype.
    Ensures: einsums that take part in no fusion keep their text.

    Args:
        reassociate: True fuses in float16 as well; False fuses nothing.

    Raises:
        EquationError: the result of an einsum has another number of dimensions than the equation that uses it says.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        if reassociate is False:
            return new
        writers = Writers(new)
        read: dict[fx.Node, _Read] = {}
        for node in list(new.nodes):
            found = read_einsum(node) if is_einsum(node) and not writers.hold(node) else None
            if found is None:
                continue
            spec, operands, consumed = _inline_operands(node, *found, read, writers, reassociate)
            read[node] = spec, operands
            if consumed:
                spec = spec.canonical()
                node.args = (str(spec), *operands)
                erase_if_unused(consumed)
        return new

    return run


def _inline_operands(
    node: fx.Node,
    spec: EinsumSpec,
    operands: tuple[fx.Node, ...],
    read: dict[fx.Node, _Read],
    writers: Writers,
    reassociate: bool | None,
) -> tuple[EinsumSpec, tuple[fx.Node, ...], list[fx.Node]]:
    """The einsum ``node`` with all operands inlined that may be, and what was inlined."""
    consumed: list[fx.Node] = []
    written = written_einsums(node, spec)
    # From the last operand to the first, so that positions to the left stay valid.
    for position in reversed(range(len(operands))):
        operand = operands[position]
        if operand not in read or uses(operand) != 1 or not _may_fuse(operand, node, writers, reassociate):
            continue
        inner, inner_operands = read[operand]
        fused = spec.inline(position, inner)
        if fused.n_labels > MAX_LABELS or _merges_broadcasts(spec.inputs[position], inner):
            continue
        spec, operands = fused, (*operands[:position], *inner_operands, *operands[position + 1 :])
        written = written.inline(position, written_einsums(operand, inner))
        consumed.append(operand)
    if consumed:
        node.meta[WRITTEN] = written
    return spec, operands, consumed


def _may_fuse(inner: fx.Node, outer: fx.Node, writers: Writers, reassociate: bool | None) -> bool:
    reads: Sequence[fx.Node] = inner.all_input_nodes
    dtypes = {known.dtype for node in (*reads, inner, *outer.all_input_nodes, outer) if (known := type_of(node))}
    allowed = _DTYPES | _HALF if reassociate else _DTYPES
    return len(dtypes) <= 1 and dtypes <= allowed and same_mode(inner, outer) and writers.allow(reads, inner, outer)


def _merges_broadcasts(term: str, inner: EinsumSpec) -> bool:
    """Whether the outer einsum takes a diagonal of dimensions that one inner operand has and another may broadcast.

    (It takes one where ``term`` repeats a label.)
    ``einsum("ii->i", einsum("ij,ij->ij", x, y))`` with x of shape (3, 1) must not become ``einsum("ii,ii->i", x, y)``,
    as there is no diagonal of x.
    """
    for label in dict.fromkeys(term):
        merged = {name for name, place in zip(inner.output, term, strict=True) if place == label}
        if len(merged) == 1:
            continue
        holders = [labels for labels in inner.inputs if merged & set(labels)]
        if len(holders) > 1 and any(len(merged & set(labels)) > 1 for labels in holders):
            return True
    return False
