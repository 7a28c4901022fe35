"""Let matrix products join the einsums around them, or each other, where another order of contraction pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from ..graph import copy_graph, facts, is_einsum, stamp, type_of, write_einsum
from ..networks import Networks, pays
from ..products import is_permutation
from ..spec import EinsumSpec

_LEAST = 5e-6


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
                if _gains(networks, root, memory_limit):
                    for node in networks.parts[root]:
                        if not is_einsum(node):
                            _write(node, *networks.own[node])
        return new

    return run


def _gains(networks: Networks, root: fx.Node, memory_limit: int | None) -> bool:
    """Whether the network of ``root`` is to be joined."""
    spec, operands = networks.whole[root]
    parts = [part for part in networks.parts[root] if not is_permutation(part)]
    if len(operands) < 2 or len(parts) < 2 or all(map(is_einsum, parts)):
        return False
    if len(operands) == 2 and not any(_is_matrix_product(networks.own[part].spec) for part in parts):
        # What is multiplied element by element and summed gains where it is a product of matrices or vectors. As a
        # batch of dot products it is slower (20,000 of length 16: 256 us for 199, with gradients 6,061 for 582).
        first, second = spec.inputs
        if not any(label in spec.output for label in set(first) ^ set(second)):
            return False
    results = [known for part in parts if (known := type_of(part))]
    plan = networks.plan(spec, operands, memory_limit)
    if plan is None or len(results) < len(parts):
        return False
    if memory_limit is not None and any(known.numel * known.dtype.itemsize > memory_limit for known in results[1:]):
        return True
    return pays(plan.seconds, networks.seconds(root), _LEAST)


def _is_matrix_product(spec: EinsumSpec) -> bool:
    return len(spec.inputs) == 2 and not set(spec.inputs[0] + spec.inputs[1]) <= set(spec.output)


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
    node.target, node.args = torch.add, (einsum, added)
