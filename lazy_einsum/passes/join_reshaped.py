"""Let products join each other through calls that reshape what lies between them, where another order pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ..cost import ITEM, walk_seconds
from ..dimensions import Dimensions
from ..graph import (
    GIVES,
    Facts,
    Numbers,
    copy_graph,
    erase_if_unused,
    facts,
    fresh_storage,
    must_be_no_view,
    stamp,
    type_of,
    uses,
    write_einsum,
)
from ..networks import Networks, pays
from ..products import Product, spellings
from ..spec import EinsumSpec, symbol


def join_reshaped(
    optimize: object = "auto", memory_limit: int | None = None, reassociate: bool | None = None
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that makes products einsums of more dimensions where they are then contracted in a better order.

    Before (a Khatri-Rao product times a matrix)::

        mul = a.reshape((30, 1, 20)) * b.reshape((1, 40, 20))
        reshape = mul.reshape((1200, 20))
        matmul = w @ reshape

    After::

        reshape_1 = w.reshape((50, 30, 40))
        einsum = torch.einsum("ab,cb->acb", a, b)
        einsum_1 = torch.einsum("abc,bcd->ad", reshape_1, einsum)

    A reshape takes dimensions together, or apart; a Kronecker product is a product and a reshape. Where the dimensions
    of all that a reshape has to do with are taken as far apart as any takes them, it does nothing, and products feed
    each other as they do in ``join_products``, by the same rules. Where the best order for all of them takes clearly
    less time than what ``join_products`` would make of them, they are written as einsums, of views that take operands
    apart (which is never a copy), and the result is put together again. All other calls stay as the user wrote them, to
    the letter: reshapes too that take one dimension apart in a way that does not fit another's (12 into 2 and 6, where
    it is 3 times 4 elsewhere).

    Requires: exact facts (without them nothing is changed).
    Ensures: einsums that take part in no such network stay as they are.

    Args:
        optimize: the search for contraction orders, see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        reassociate: True joins float16 and bfloat16 as well; False joins nothing.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        if reassociate is False:
            return new
        products = [product for node in list(new.nodes) if (product := _take_apart(node)) is not None]
        dimensions = Dimensions(new, reassociate)
        if not any(_is_between(node, dimensions) for node in dimensions.reshapes):
            return copy_graph(graph) if products else new
        plain = Networks(new, optimize, reassociate)
        networks = Networks(new, optimize, reassociate, dimensions)
        write = _Write(networks, dimensions, Numbers(new))
        paying = [root for root in networks.roots() if _pays(networks, plain, dimensions, root, memory_limit)]
        for root in paying:
            write.network(root)
        # What reshaped a value, gave its dimensions another order, or added some for a product, is no longer needed.
        written = {part for root in paying for part in networks.parts[root]}
        needless = written.union(dimensions.reshapes, dimensions.passed)
        erase_if_unused([node for node in reversed(new.nodes) if node in needless])
        for product in products:
            if product.einsum not in written:
                product.put_together()
        return new

    return run


class _Kronecker(NamedTuple):
    """A Kronecker product as an einsum and a reshape.

    Attributes:
        einsum: the product.
        reshape: takes its dimensions together, two and two.
        call: operation, target and arguments of the node that this was.
    """

    einsum: fx.Node
    reshape: fx.Node
    call: tuple[str, Any, tuple[Any, ...]]

    def put_together(self) -> None:
        """Make both the call that it was."""
        self.reshape.op, self.reshape.target, self.reshape.args = self.call
        self.einsum.graph.erase_node(self.einsum)


def _take_apart(node: fx.Node) -> _Kronecker | None:
    """Make an einsum and a reshape of a Kronecker product. (Its sizes are numbers: it does not trace with symbols.)"""
    known, call = facts(node), (node.op, node.target, node.args)
    operands = node.args if node.target in _KRON and len(node.args) == 2 and not node.kwargs else ()
    types = [entering for operand in operands if (entering := type_of(operand)) is not None]
    if known is None or known.type is None or len(types) < 2 or {one.dtype for one in types} != {known.type.dtype}:
        return None
    rank = len(known.type.shape)
    terms = ["".join(symbol(2 * dim + side) for dim in range(rank)) for side in (0, 1)]
    inputs = tuple(term[rank - len(one.shape) :] for term, one in zip(terms, types, strict=True))
    output = "".join(label for pair in zip(*terms, strict=True) for label in pair if label in "".join(inputs))
    spec = EinsumSpec(inputs, output)
    sizes = spec.sizes([one.shape for one in types])
    steps: dict[str, int] = {}
    for outer, inner, stride in zip(*terms, known.type.stride, strict=True):
        steps |= {inner: stride, outer: stride * sizes.get(inner, 1)}
    kind = replace(known.type, shape=tuple(sizes[x] for x in output), stride=tuple(steps[x] for x in output))
    with node.graph.inserting_before(node):
        einsum = node.graph.call_function(torch.einsum, (str(spec.canonical()), *operands))
    stamp(einsum, replace(known, type=kind))
    _become(node, torch.reshape, einsum, known.type.shape)
    return _Kronecker(einsum, node, call)


def _is_between(node: fx.Node, dimensions: Dimensions) -> bool:
    """Whether a product comes before a reshape, and one after it, that use nothing else."""
    while uses(node) == 1:
        (user,) = node.users
        if dimensions.product(user) is None:
            return False
        if user not in dimensions.reshapes:
            operand = dimensions.reshapes[node].operand
            while operand in dimensions.reshapes and uses(operand) == 1:
                operand = dimensions.reshapes[operand].operand
            return uses(operand) == 1 and dimensions.product(operand) is not None
        node = user
    return False


def _pays(networks: Networks, plain: Networks, dimensions: Dimensions, root: fx.Node, memory_limit: int | None) -> bool:
    """Whether a network that goes on through reshapes takes clearly less time than the networks in it."""
    parts = networks.parts[root]
    spec, operands = networks.whole[root]
    own = set(parts)
    roots = [part for part in plain.roots() if part in own]
    if len(roots) < 2 or len(operands) < 3:
        return False
    plan = networks.plan(spec, operands, memory_limit)
    if plan is None:
        return False
    before = sum(_seconds(plain, part, memory_limit) for part in roots)
    copies = sum(_copy_seconds(part) for part in parts if part in dimensions.reshapes)
    return pays(plan.seconds, before + copies)


def _seconds(plain: Networks, root: fx.Node, memory_limit: int | None) -> float:
    """What is expected of a network without reshapes."""
    spec, operands = plain.whole[root]
    plan = plain.plan(spec, operands, memory_limit) if plain.joins(root, memory_limit) else None
    return plain.seconds(root) if plan is None else plan.seconds


def _copy_seconds(node: fx.Node) -> float:
    """What is expected of a reshape that copies, as its operand can't be viewed in the other shape."""
    known, operand = facts(node), facts(node.all_input_nodes[0])
    if known is None or known.type is None or operand is None or known.storage == operand.storage:
        return 0.0
    return walk_seconds(known.type.numel, 1, 1, 1, 1, 2 * ITEM * known.type.numel)


_KRON = spellings("kron")


class _Write(NamedTuple):
    """Writes networks as einsums.

    Attributes:
        networks: of which some are written.
        dimensions: their shapes.
        numbers: writes sizes that vary.
    """

    networks: Networks
    dimensions: Dimensions
    numbers: Numbers

    def network(self, root: fx.Node) -> None:
        """Make each call of a network an einsum in the shapes of ``dimensions``, but for those that reshape."""
        values: dict[fx.Node, fx.Node] = {}
        for node in reversed(self.networks.parts[root]):
            product = self.networks.own[node]
            operands = [values.get(operand) or self.apart(operand, node) for operand in product.operands]
            if node is root:
                self.root(node, product, operands)
            elif node in self.dimensions.reshapes:
                (values[node],) = operands
            elif product.spec.is_view_only:
                # Of what the operand is now, which a reshape may have copied before.
                with node.graph.inserting_before(node):
                    values[node] = write_einsum(node.graph, product.spec, operands, like=node)
            else:
                values[node] = _become(node, torch.einsum, str(product.spec.canonical()), *operands)
                stamp(node, self.facts_apart(node))

    def apart(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """A view of an operand in which its dimensions are taken apart."""
        known, shape = facts(operand), self.dimensions.shape(operand)
        assert known is not None
        assert known.type is not None
        if shape == known.type.shape:
            return operand
        with user.graph.inserting_before(user):
            view = user.graph.call_method("reshape", (operand, self.numbers.argument(shape)))
        # It is made in the mode of what uses it.
        mode = facts(user)
        assert mode is not None
        # (A view that is made without grad says that it requires grad where its tensor does.)
        apart = replace(self.facts_apart(operand), grad=mode.grad, movable=mode.movable, where=mode.where, writes=())
        assert apart.type is not None
        kind = replace(apart.type, is_leaf=not known.type.requires_grad, is_parameter=False)
        return stamp(view, replace(apart, type=kind))

    def facts_apart(self, node: fx.Node) -> Facts:
        """The facts of a value, were its dimensions taken apart."""
        known = facts(node)
        assert known is not None
        assert known.type is not None
        shape, stride = self.dimensions.shape(node), self.dimensions.strides(node, known.type.stride)
        return replace(known, type=replace(known.type, shape=shape, stride=stride))

    def root(self, node: fx.Node, product: Product, operands: Sequence[fx.Node]) -> None:
        """Make the last call of a network an einsum, take the dimensions of that together, and add what it adds."""
        known, kind, graph = facts(node), type_of(node), node.graph
        assert known is not None
        assert kind is not None
        apart = self.facts_apart(node)
        is_whole, added = self.dimensions.shape(node) == kind.shape, product.added
        if is_whole and added is None:
            _become(node, torch.einsum, str(product.spec.canonical()), *operands)
            return
        # What is not a view to the user must not be one to autograd.
        detached = added is None and must_be_no_view(node, self.networks.writers)
        if added is not None:
            storage = fresh_storage(graph)
            apart, known = replace(apart, storage=storage), replace(known, storage=storage)
        with graph.inserting_before(node):
            value = stamp(graph.call_function(torch.einsum, (str(product.spec.canonical()), *operands)), apart)
            value.meta[GIVES] = node.name
            if not is_whole and (detached or added is not None):
                value = stamp(graph.call_method("reshape", (value, self.numbers.argument(kind.shape))), known)
        if added is not None:
            _become(node, torch.add, value, added)
        elif detached:
            _become(node, torch.detach, value)
        else:
            _become(node, torch.reshape, value, self.numbers.argument(kind.shape))


def _become(node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Make a node another call; its facts stay."""
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}
    return node
