"""Networks: what an einsum becomes when the einsums that it alone uses are inlined into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from .graph import MAX_LABELS, Writers, same_mode, type_of, uses
from .spec import EinsumSpec

Read = tuple[EinsumSpec, tuple[fx.Node, ...]]
"""An einsum and its operands."""

# Narrower integers (and bool) are summed into int64 by some calls of torch.einsum and not by others, so that two calls
# in one may differ in dtype from one after the other.
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64})
_HALF = frozenset({torch.float16, torch.complex32})


def inline_operands(
    node: fx.Node,
    spec: EinsumSpec,
    operands: tuple[fx.Node, ...],
    read: Mapping[fx.Node, Read],
    writers: Writers,
    reassociate: bool | None,
) -> tuple[EinsumSpec, tuple[fx.Node, ...], list[fx.Node]]:
    """The einsum ``node`` with all operands inlined that may be, and what was inlined.

    Args:
        node: the einsum, or a call that is one under another name.
        spec: what it computes.
        operands: of what.
        read: the same for the nodes before it, as they are once their operands are inlined; no other is inlined.
        writers: what writes in the graph.
        reassociate: True inlines in float16 as well.
    """
    consumed: list[fx.Node] = []
    # From the last operand to the first, so that positions to the left stay valid.
    for position in reversed(range(len(operands))):
        operand = operands[position]
        if operand not in read or uses(operand) != 1:
            continue
        inner, inner_operands = read[operand]
        if not _may_fuse(operand, inner_operands, node, writers, reassociate):
            continue
        fused = spec.inline(position, inner)
        if fused.n_labels > MAX_LABELS or _merges_broadcasts(spec.inputs[position], inner):
            continue
        spec, operands = fused, (*operands[:position], *inner_operands, *operands[position + 1 :])
        consumed.append(operand)
    return spec, operands, consumed


def _may_fuse(
    inner: fx.Node, reads: Sequence[fx.Node], outer: fx.Node, writers: Writers, reassociate: bool | None
) -> bool:
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
