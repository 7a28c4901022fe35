"""Inline einsums into the einsums that use them, so that one contraction order is chosen for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from ..graph import Writers, copy_graph, erase_if_unused, is_einsum, read_einsum
from ..networks import Read, inline_operands, why_apart
from ..saved import WRITTEN, written_einsums


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
        read: dict[fx.Node, Read] = {}
        for node in list(new.nodes):
            found = read_einsum(node) if is_einsum(node) and not writers.hold(node) else None
            if found is None:
                continue
            spec, operands, consumed = inline_operands(node, *found, read, writers, reassociate)
            read[node] = spec, operands
            if consumed:
                written = written_einsums(node, found[0])
                for operand, position in consumed.items():
                    written = written.inline(position, written_einsums(operand, read[operand][0]))
                node.meta[WRITTEN] = written
                spec = spec.canonical()
                node.args = (str(spec), *operands)
                erase_if_unused(consumed)
        return new

    return run


def left_apart(graph: fx.Graph, reassociate: bool | None = None) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """The einsums that the pass leaves apart though one uses the other: inner, outer, why.

    Args:
        graph: what the pass is given.
        reassociate: as for the pass.
    """
    writers = Writers(graph)
    read: dict[fx.Node, Read] = {}
    for node in graph.nodes:
        found = read_einsum(node) if is_einsum(node) else None
        if found is None:
            continue
        if reassociate is False or writers.hold(node):
            reason = "reassociate=False" if reassociate is False else "autograd follows it, and an operand is written"
            yield from ((operand, node, reason) for operand in found[1] if is_einsum(operand))
            continue
        read[node] = found
        yield from ((inner, node, reason) for inner, reason in why_apart(node, read, writers, reassociate))
        spec, operands, _ = inline_operands(node, *found, read, writers, reassociate)
        read[node] = spec, operands
