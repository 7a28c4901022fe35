"""Let matrix products join the einsums around them, or each other, where another order of contraction pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from ..errors import MemoryLimitError
from ..graph import Writers, copy_graph, facts, is_einsum, stamp, type_of, write_einsum
from ..networks import Read, inline_operands
from ..plan import make_plan, order_seconds
from ..products import Product, is_permutation, read_product
from ..spec import EinsumSpec

# By so much of its time, and by so many seconds, a network has to become faster by the cost model. That knows sizes
# alone; what is left as it was written runs as it did.
_GAIN = 0.1
_SECONDS = 1e-6


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

    Products, permutations of dimensions and einsums that feed each other and nothing else are a network, by the rules
    of ``fuse_einsums``. Where the best order for the whole of it takes clearly less time than what is there (each
    product as it is written, einsums among each other in their own best order), or where only it keeps the memory
    limit, all are written as einsums, and ``fuse_einsums`` makes one of them. All other products stay the calls that
    the user wrote, to the letter.

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
            networks = _Networks(new, optimize, memory_limit, reassociate)
            for root in networks.roots():
                if networks.gains(root):
                    networks.write(root)
        return new

    return run


class _Networks:
    """The networks of a graph.

    Attributes:
        own: what each call computes that is a product, a permutation or an einsum.
        whole: the same with all inlined that may be.
        parts: the calls that this replaces, users before what they use.
        inlined: the calls that are part of another's network.
    """

    def __init__(self, graph: fx.Graph, optimize: object, memory_limit: int | None, reassociate: bool | None) -> None:
        self.optimize = optimize
        self.memory_limit = memory_limit
        self.reassociate = reassociate
        self.writers = Writers(graph)
        self.own: dict[fx.Node, Product] = {}
        self.whole: dict[fx.Node, Read] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self.inlined: set[fx.Node] = set()
        usable: dict[fx.Node, Read] = {}
        for node in graph.nodes:
            product = None if self.writers.hold(node) else read_product(node, reassociate)
            if product is None:
                continue
            spec, operands, taken = inline_operands(
                node, product.spec, product.operands, usable, self.writers, reassociate
            )
            self.own[node], self.whole[node] = product, (spec, operands)
            self.parts[node] = [node, *(part for inner in taken for part in self.parts[inner])]
            self.inlined.update(taken)
            if product.added is None:
                usable[node] = spec, operands

    def roots(self) -> Iterator[fx.Node]:
        """The calls whose values others than their network see."""
        for node in self.own:
            if node in self.inlined:
                continue
            # A permutation at the end stays a view of what it permutes.
            while is_permutation(node) and self.own[node].operands[0] in self.inlined:
                (node,) = self.own[node].operands
            if not is_permutation(node):
                yield node

    def gains(self, root: fx.Node) -> bool:
        """Whether the network is to be joined."""
        spec, operands = self.whole[root]
        parts = [part for part in self.parts[root] if not is_permutation(part)]
        if len(operands) < 3 or all(map(is_einsum, parts)):
            return False
        types = [known for operand in operands if (known := type_of(operand))]
        results = [known for part in parts if (known := type_of(part))]
        if len(types) < len(operands) or len(results) < len(parts):
            return False
        limit = None if self.memory_limit is None else self.memory_limit // types[0].dtype.itemsize
        shapes = [known.shape for known in types]
        try:
            plan = make_plan(spec.canonical(), shapes, self.optimize, limit)
        except MemoryLimitError:
            return False
        if limit is not None and any(known.numel > limit for known in results[1:]):
            return True
        before = self.seconds(parts)
        return plan.seconds < before * (1 - _GAIN) and plan.seconds < before - _SECONDS

    def seconds(self, parts: list[fx.Node]) -> float:
        """What the cost model expects of these calls, were only the einsums among them fused."""
        einsums: dict[fx.Node, Read] = {}
        total = 0.0
        for part in reversed(parts):
            spec, operands, _ = self.own[part]
            if is_einsum(part):
                spec, operands, taken = inline_operands(part, spec, operands, einsums, self.writers, self.reassociate)
                for inner in taken:
                    del einsums[inner]
                einsums[part] = spec, operands
            else:
                total += self.plan_seconds(spec, operands)
        return total + sum(self.plan_seconds(*einsum) for einsum in einsums.values())

    def plan_seconds(self, spec: EinsumSpec, operands: Sequence[fx.Node]) -> float:
        """What the cost model expects of one einsum."""
        shapes = [known.shape for operand in operands if (known := type_of(operand))]
        if len(shapes) < 3:
            return order_seconds(spec, shapes, ((0, 1),))
        return make_plan(spec.canonical(), shapes, self.optimize).seconds

    def write(self, root: fx.Node) -> None:
        """Write the calls of a network as einsums, in place."""
        for node in self.parts[root]:
            if is_einsum(node):
                continue
            spec, operands, added = self.own[node]
            if added is None:
                node.args = (str(spec.canonical()), *operands)
                node.target = torch.einsum
            else:
                with node.graph.inserting_before(node):
                    einsum = write_einsum(node.graph, spec, operands, like=node)
                known, base = facts(einsum), facts(node)
                assert known is not None and known.type is not None and base is not None and base.type is not None
                # The sum lies in memory as its first operand does.
                stamp(einsum, replace(known, type=replace(known.type, stride=base.type.stride)))
                node.args = (einsum, added)
                node.target = torch.add
            node.op, node.kwargs = "call_function", {}
