"""Let matrix products join the einsums around them, or each other, where another order of contraction pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from ..graph import GIVES, copy_graph, facts, is_einsum, stamp, write_einsum
from ..networks import Networks
from ..spec import EinsumSpec


def join_products(
    optimize: object = "auto", memory_limit: int | None = None, reassociate: bool | None = None
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that turns products into einsums where they are then contracted in a better order.

    Before (x is a vector)::

        matmul = a @ b
        linear = torch.nn.functional.linear(x, matmul.T, bias)

    After::

        einsum = torch.einsum("ab,bc->ac", a, b)
        einsum_1 = torch.einsum("ab->ba", einsum)
        einsum_2 = torch.einsum("a,ba->b", x, einsum_1)
        linear = torch.add(einsum_2, bias)

    Products (of matrices, or element by element), sums over dimensions, diagonals, permutations and einsums that feed
    each other and nothing else are a network, by the rules of ``fuse_einsums``. Where the best order for the whole of
    it takes clearly less time than what is there (each call as it is written, einsums among each other in their own
    best order), or where only it keeps the memory limit, all are written as einsums, and ``fuse_einsums`` makes one of
    them. All other calls stay as the user wrote them, to the letter.

    Requires: exact facts (without them nothing is changed). The order of float16 and bfloat16 products is the user's.
    Ensures: einsums stay as they are.

    Args:
        optimize: the search for contraction orders, see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        reassociate: True joins float16 and bfloat16 as well; False joins nothing.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        if reassociate is not False:
            networks = Networks(new, optimize, reassociate)
            for root in networks.roots():
                if networks.joins(root, memory_limit):
                    for node in networks.parts[root]:
                        if not is_einsum(node):
                            _write(node, *networks.own[node])
        return new

    return run


def _write(node: fx.Node, spec: EinsumSpec, operands: Sequence[fx.Node], added: fx.Node | None) -> None:
    """Make a call an einsum, in place, and what it adds a sum behind that."""
    before = node.all_input_nodes
    node.op, node.kwargs = "call_function", {}
    if added is None:
        node.target, node.args = torch.einsum, (str(spec.canonical()), *operands)
        for view in before:
            while not view.users:  # it only added dimensions for this call
                (viewed,) = view.all_input_nodes
                node.graph.erase_node(view)
                view = viewed
        return
    base = facts(node)
    with node.graph.inserting_before(node):
        einsum = write_einsum(node.graph, spec, operands, like=node)
    known = facts(einsum)
    assert known is not None and known.type is not None and base is not None and base.type is not None
    # The sum lies in memory as its first operand does.
    stamp(einsum, replace(known, type=replace(known.type, stride=base.type.stride)))
    einsum.meta[GIVES] = node.name
    node.target, node.args = torch.add, (einsum, added)
