"""Turn einsums into direct calls of torch, for the sizes and strides at hand."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ..blocks import lower_in_blocks
from ..cost import CPU, Machine
from ..graph import (
    Facts,
    Numbers,
    Writers,
    copy_graph,
    erase_unused_numbers,
    facts,
    fresh_storage,
    is_einsum,
    must_be_no_view,
    read_einsum,
    same_mode,
    stamp,
    type_of,
    uses,
)
from ..layout import Strides
from ..plan import Contraction, Plan
from ..program import CAT, ITEM, Call, Program, Value
from ..saved import SAVED, followed_types, lower_saving, memory_of
from ..scalars import ONE, Factor, Tensors, dtype_of, read_linear, tensors
from ..spec import EinsumSpec, fresh_symbols

# Sums of narrower integers change their dtype in torch.einsum, or not, by rules of its own; they are rare, and stay its
# business.
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64}
)


# Views that cost a call and hold no memory of their own.
_VIEWS = frozenset({"permute", "unsqueeze", "expand", "diagonal", "transpose"})
_MAY_VIEW = _VIEWS | {"reshape"}
# Longer chains become several trees: reading one is recursive.
_DEPTH = 64


def lower(
    reassociate: bool | None = None, exact: bool = False, machine: Machine = CPU
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that replaces einsums by the fewest calls that compute them.

    Before::

        einsum_1 = torch.einsum("abc,ac->ab", y, z)
        einsum = torch.einsum("abc,ac->ab", x, einsum_1)
        mul = einsum * 0.5

    After (shapes of three dimensions)::

        reshape = z.reshape((1000, 5, 1))
        bmm = y.bmm(reshape)
        ...

    Einsums that feed each other and nothing else are lowered together, so that each intermediate is laid out as the
    next step wants it, and so are scalings among them.

    Requires: exact facts; einsums of at most two operands (others stay, as do those of mixed or narrow integer dtypes,
    those under autocast, and those that autograd follows while an operand is written later).
    Ensures: a result has the strides that its facts say, except where only einsums use it; one that only leaves the
        graph may have others, if each view of a tensor with those is one of the result. It is a view of an operand
        where it was one before, and memory of its own where it was that.
        The code holds for the sizes and strides in the facts only.

    Args:
        reassociate: True moves factors in float16 as well; False moves none.
        exact: what leaves the graph has each stride that its facts say.
        machine: what the calls are to be fast on.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        among, writers = tensors(new), Writers(new)
        storages = itertools.count(fresh_storage(new))
        inner: set[fx.Node] = set()
        trees: list[_Tree] = []
        # From the last node to the first: the outermost einsum of a tree comes before those it takes in.
        for node in reversed(list(new.nodes)):
            tree = None if node in inner else _Reader(node, among, writers, reassociate).read()
            if tree is not None:
                inner.update(tree.nodes)
                trees.append(tree)
        # A view hands the strides of its operand on; all else makes memory of its own.
        blind = {node for tree in trees if not tree.is_view for node in tree.nodes}
        written: dict[fx.Node, fx.Node] = {}
        write = _Write(storages, {} if writers.none else None, writers, Numbers(new), machine)
        for tree in reversed(trees):
            leaves = [written.get(leaf, leaf) for leaf in tree.leaves]
            users = [user for user in tree.root.users if user not in blind]
            written[tree.root] = write.tree(tree, leaves, _asked(tree, users, exact))
        erase_unused_numbers(new)
        return new

    return run


class Lowered(NamedTuple):
    """What a tree of einsums became.

    Attributes:
        program: its calls.
        plan: the tree, its leaves numbered.
        leaves: names of the nodes that give its leaves.
        steps: names of the einsums that were the steps of ``plan``.
        calls: names of the nodes that call what is in ``program``, in order; some may be another tree's too.
    """

    program: Program
    plan: Plan
    leaves: tuple[str, ...]
    steps: tuple[str, ...]
    calls: tuple[str, ...]


LOWERED = "lazy_einsum_lowered"
"""Under this name the last call of a lowered tree has a ``Lowered`` in its ``meta``."""


class _Step(NamedTuple):
    """One einsum of a tree, its labels those of the whole.

    Attributes:
        operands: numbers of leaves, or steps.
        spec: what it computes.
        name: of its node.
    """

    operands: tuple[int | _Step, ...]
    spec: EinsumSpec
    name: str


@dataclass(frozen=True, slots=True)
class _Tree:
    """Einsums and scalings that are computed as one.

    Attributes:
        root: the node whose value they give.
        nodes: all that they replace, in the order of the graph.
        leaves: tensors that enter.
        step: the last einsum.
        factor: product of the scalings.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    step: _Step
    factor: Factor

    @property
    def is_view(self) -> bool:
        """Whether the result is a view of its only leaf."""
        return self.step.spec.is_view_only and self.factor == ONE


class _Reader:
    """Collects one tree from its root."""

    def __init__(self, root: fx.Node, among: Tensors, writers: Writers, reassociate: bool | None) -> None:
        self.root = root
        self.among = among
        self.writers = writers
        self.reassociate = reassociate
        self.factor = ONE
        self.nodes: list[fx.Node] = []
        self.leaves: list[fx.Node] = []
        self.free: Iterator[str] = iter(())
        self.depth = 0

    def read(self) -> _Tree | None:
        node = self.root
        scaled = self.scaling(node)
        if scaled is not None:
            operand, factor = scaled
            if uses(operand) != 1 or not same_mode(operand, node):
                return None
            found = self.pair(operand)
            # All is computed where the scaling stands, so that is where operands are read.
            if found is None or not self.writers.allow([operand, *found[1]], operand, node):
                return None
            if found[0].is_view_only and factor.value == 1:
                return None
            self.factor = factor
            self.nodes.append(node)
            node = operand
        found = self.pair(node)
        if found is None:
            return None
        self.free = fresh_symbols(found[0].labels)
        step = self.step(node, *found)
        self.nodes.reverse()
        return _Tree(self.root, tuple(self.nodes), tuple(self.leaves), step, self.factor)

    def scaling(self, node: fx.Node) -> tuple[fx.Node, Factor] | None:
        """What ``node`` scales and by how much, if it does only that and the factor may be applied elsewhere."""
        linear = read_linear(node, self.among)
        if linear is None or not linear.only_scales or self.reassociate is False:
            return None
        operand = linear.operands[0][0]
        factor = self.factor.times(linear.factor)
        dtype = dtype_of(node)
        if dtype not in _DTYPES or dtype_of(operand) != dtype:
            return None
        if not (linear.factor.fits(dtype, self.reassociate) and factor.fits(dtype, self.reassociate)):
            return None
        return operand, factor

    def step(self, node: fx.Node, spec: EinsumSpec, operands: Sequence[fx.Node]) -> _Step:
        self.nodes.append(node)
        self.depth += 1
        taken = tuple(
            self.operand(node, operand, term, len(operands))
            for operand, term in zip(operands, spec.inputs, strict=True)
        )
        self.depth -= 1
        return _Step(taken, spec, node.name)

    def operand(self, user: fx.Node, operand: fx.Node, term: str, siblings: int) -> int | _Step:
        """The number of a leaf, or the step that gives the operand whose labels are ``term``."""
        scaled = self.scaling(operand) if uses(operand) == 1 and same_mode(operand, self.root) else None
        # A lone operand times 1 is memory of its own, of which a view is none of the tensor that was scaled.
        fresh = siblings > 1 or (scaled is not None and scaled[1].value != 1)
        if scaled is not None and fresh and self.writers.allow([scaled[0]], operand, self.root):
            self.nodes.append(operand)
            operand, self.factor = scaled
        joins = uses(operand) == 1 and siblings == 2 and len(set(term)) == len(term) and self.depth < _DEPTH
        found = self.pair(operand) if joins else None
        if (
            found is not None
            and len(found[1]) == 2
            and same_mode(operand, self.root)
            and self.writers.allow(found[1], operand, self.root)
        ):
            spec, operands = found
            names = dict(zip(spec.output, term, strict=True))
            for label in spec.labels:
                if label not in names:
                    names[label] = next(self.free)
            return self.step(operand, spec.rename(names.__getitem__), operands)
        self.leaves.append(operand)
        return len(self.leaves) - 1

    def pair(self, node: fx.Node) -> tuple[EinsumSpec, tuple[fx.Node, ...]] | None:
        """The einsum ``node``, if it can be lowered."""
        found = read_einsum(node) if is_einsum(node) else None
        return found if found is not None and not why_not_lowered(node, found[1], self.writers) else None


def why_not_lowered(node: fx.Node, operands: Sequence[fx.Node], writers: Writers) -> str:
    """Why an einsum stays one; empty where it becomes direct calls."""
    known = facts(node)
    if known is None or known.type is None:
        return "its type is not known"
    if not known.movable:
        return "it runs in another mode than the rest (autocast, or a context of its own)"
    if len(operands) > 2:
        return "it has more than two operands, and its order is torch.einsum's"
    if writers.hold(node):
        return "autograd follows it, and an operand is written later"
    dtypes = {known.type.dtype, *(dtype_of(operand) for operand in operands)}
    if len(dtypes) == 1 and dtypes <= _DTYPES:
        return ""
    return "the dtypes differ, or are narrow integers"


class _Write(NamedTuple):
    """Writes trees into their graph.

    Attributes:
        storages: numbers for new memory.
        views: views written so far, to be used again; ``None`` where something is written in place, as a view has a
            place in autograd's graph of its own then.
        writers: what writes in the graph.
        numbers: writes sizes that vary.
        machine: what the calls are to be fast on.
    """

    storages: Iterator[int]
    views: dict[tuple[object, ...], fx.Node] | None
    writers: Writers
    numbers: Numbers
    machine: Machine

    def tree(self, tree: _Tree, leaves: Sequence[fx.Node], strides: Strides | None) -> fx.Node:
        """Replace the tree by its program.

        Args:
            tree: what is replaced.
            leaves: the nodes that give its leaves by now.
            strides: what is asked of the result's.

        Returns:
            What gives the value of ``tree.root`` now.
        """
        root, graph = tree.root, tree.root.graph
        known = facts(root)
        assert known is not None
        assert known.type is not None
        types = [entering for leaf in leaves if (entering := type_of(leaf))]
        # A factor of 1.0 is none: it was taken in only where it changes neither the type nor whose memory that is.
        scale = None if tree.factor.value == 1 else tree.factor.number
        plan, steps = _plan(tree)
        program = self.program(tree, plan, leaves, strides, scale)
        inside = replace(known, type=None, storage=next(self.storages), writes=())
        with graph.inserting_before(root):
            calls = self.calls(graph, program, leaves, inside)
            result = calls[-1]
            if not tree.is_view and any(entering.is_conj for entering in types):
                # ``dot`` of two lazily conjugated vectors gives a lazily conjugated result, torch.einsum does not.
                result = stamp(graph.call_method("resolve_conj", (result,)), inside)
            if not tree.is_view and program.calls[-1].target in _MAY_VIEW and must_be_no_view(root, self.writers):
                result = stamp(graph.call_method("detach", (result,)), inside)
        names, called = tuple(leaf.name for leaf in leaves), tuple(call.name for call in calls)
        result.meta = {**root.meta, LOWERED: Lowered(program, plan, names, steps, called)}
        stamp(result, replace(known, type=replace(known.type, stride=program.stride)))
        root.replace_all_uses_with(result)
        for node in reversed(tree.nodes):
            graph.erase_node(node)
        return result

    def program(
        self, tree: _Tree, plan: Plan, leaves: Sequence[fx.Node], strides: Strides | None, scale: complex | None
    ) -> Program:
        """The calls for a tree, of which autograd saves no more than is allowed."""
        types = [entering for leaf in leaves if (entering := type_of(leaf))]
        # A limit is one for a whole einsum of three operands or more, so the tree has to be just that.
        limits = [known[1] for node in tree.nodes if (known := node.meta.get(SAVED)) and known[0] == len(leaves)]
        followed = followed_types(tree.root, leaves)
        if not limits or followed is None:
            return lower_in_blocks(plan, types if followed is None else followed, strides, scale, self.machine)
        return lower_saving(plan, followed, memory_of(leaves), limits[0], strides, scale, self.machine)

    def calls(self, graph: fx.Graph, program: Program, leaves: Sequence[fx.Node], inside: Facts) -> list[fx.Node]:
        """Write the calls of a program at the insertion point; their nodes."""
        values = list(leaves)
        for call in program.calls:
            args = tuple(
                values[arg.number] if isinstance(arg, Value) else self.numbers.argument(arg) for arg in call.args
            )
            # The last call's value is the user's: two results are never one tensor.
            key = (call.target, args, call.kwargs, inside.grad) if call is not program.calls[-1] else None
            known = self.views.get(key) if self.views is not None and key is not None else None
            value = known or stamp(_call(graph, call, args), inside)
            if self.views is not None and key is not None and call.target in _VIEWS:
                self.views[key] = value
            values.append(value)
        return values[len(leaves) :]


def _call(graph: fx.Graph, call: Call, args: tuple[Any, ...]) -> fx.Node:
    if call.target == ITEM:
        return graph.call_function(operator.getitem, args)
    if call.target == CAT:
        *joined, dim = args
        return graph.call_function(torch.cat, (joined, dim))
    return graph.call_method(call.target, args, dict(call.kwargs))


def _plan(tree: _Tree) -> tuple[Plan, tuple[str, ...]]:
    """The tree as a plan, and the names of the nodes that are its steps."""
    terms: dict[int, str] = {}
    shapes: list[tuple[int, ...]] = [_shape(leaf) for leaf in tree.leaves]
    steps: list[Contraction] = []
    names: list[str] = []

    def write(step: _Step, output: str) -> int:
        numbers = []
        for operand, term in zip(step.operands, step.spec.inputs, strict=True):
            if isinstance(operand, int):
                terms[operand] = term
                numbers.append(operand)
            else:
                numbers.append(write(operand, term))
        spec = EinsumSpec(step.spec.inputs, output)
        taken = tuple(shapes[number] for number in numbers)
        steps.append(Contraction(tuple(numbers), spec, taken, spec.output_shape(taken), 0))
        names.append(step.name)
        shapes.append(steps[-1].shape)
        return len(shapes) - 1

    write(tree.step, tree.step.spec.output)
    spec = EinsumSpec(tuple(terms[number] for number in range(len(tree.leaves))), steps[-1].spec.output)
    plan = Plan(spec, tuple(shapes[: len(tree.leaves)]), tuple(steps), 0, 0, 0.0, 0, "given")
    return plan, tuple(names)


def _shape(node: fx.Node) -> tuple[int, ...]:
    known = type_of(node)
    assert known is not None
    return known.shape


def _asked(tree: _Tree, users: Sequence[fx.Node], exact: bool) -> Strides | None:
    """What is asked of the strides of a tree's result by those of its users that see them.

    Code of the graph may depend on each stride; code outside is only to find each view there that it found before.
    """
    known = type_of(tree.root)
    if tree.is_view or not users or known is None:
        return None
    return Strides(known.stride, exact or any(user.op != "output" for user in users))
