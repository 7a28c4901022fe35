"""Gather the numbers that multiply or divide tensors: a chain of multilinear calls keeps one, at its end."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..graph import (
    Writers,
    copy_graph,
    empty_like,
    facts,
    fresh_storage,
    is_dense,
    is_einsum,
    may_require_grad,
    same_mode,
    stamp,
    type_of,
    uses,
)
from ..scalars import ONE, Factor, Linear, dtype_of, read_linear, tensors


def fuse_scalars(reassociate: bool | None = None) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that gathers scalar factors.

    Before::

        half = x / 2
        product = torch.einsum("ij,jk->ik", half, 3.0 * y)

    After::

        einsum = torch.einsum("ij,jk->ik", x, y)
        mul = einsum * 1.5

    A factor leaves a value only where all uses of the value are in one call that is multilinear in it, and it enters
    the result of that call to the power of the call's degree: squared for
    ``einsum("ij,ik->jk", z, z)``, inverted for a denominator. It keeps its Python type, and stays where it is before a
    change of dtype or of grad mode, before a write to the memory that it
    would then be read from, and where it could drive normal numbers out of range.

    Requires: nothing; without facts tensors are taken to be real floating point.
    Ensures: same values up to rounding, exact for integers; each value that was memory of its own still is; a number
    that nothing is merged with stays in the form it was written in.

    Args:
        reassociate: True moves factors in float16 as well; False moves none.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        if reassociate is False:
            return copy_graph(graph)
        gather = _Gather(graph, reassociate)
        new = gather.run()
        while gather.merged:
            # A value that two calls used may be used by one now, into which its factor can go.
            gather = _Gather(new, reassociate)
            new = gather.run()
        return new

    return run


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A value of the old graph as ``factor`` times ``core``, a node of the new graph.

    Attributes:
        core: what remains without the factor.
        factor: what was taken out.
        private: whether ``core`` lies in memory that was made for it alone and that nothing else will read.
        as_written: whether the factor is that of one call alone.
    """

    core: fx.Node
    factor: Factor
    private: bool
    as_written: bool = False


class _Gather:
    """One run of the pass over one graph.

    The old graph is read in order; ``values`` and ``scaled`` say what each of its nodes became in the new one.
    """

    def __init__(self, graph: fx.Graph, reassociate: bool | None) -> None:
        self.old = graph
        self.new = empty_like(graph)
        self.reassociate = reassociate
        self.writers = Writers(graph)
        self.storages: Iterator[int] = itertools.count(fresh_storage(graph))
        self.sharers = Counter(known.storage for node in graph.nodes if (known := facts(node)))
        self.values: dict[fx.Node, fx.Node] = {}
        self.scaled: dict[fx.Node, _Scaled] = {}
        self.merged = False

    def run(self) -> fx.Graph:
        among = tensors(self.old)
        linear = {node: read_linear(node, among) for node in self.old.nodes}
        for node in self.old.nodes:
            found = linear[node]
            value = self.take(node, found) if found else None
            if value is None:
                self.values[node] = self.new.node_copy(node, self.values.__getitem__)
            elif self.may_pass_on(node, value, linear):
                self.values[node], self.scaled[node] = value.core, value
            else:
                self.values[node] = self.give(node, value)
        return self.new

    def take(self, node: fx.Node, linear: Linear) -> _Scaled | None:
        """``node`` with its own factor and those of its operands taken out; ``None`` where there is none to take."""
        if linear.only_scales and dtype_of(linear.operands[0][0]) != dtype_of(node):
            # The number changes the dtype: integers times a float.
            return None
        total = linear.factor
        scaled = [operand for operand, _ in linear.operands if operand in self.scaled]
        for operand, degree in linear.operands:
            if operand in self.scaled:
                total = total.times(self.scaled[operand].factor.power(degree))
        if linear.only_scales:
            (operand, _), *_ = linear.operands
            inner = self.scaled.get(operand)
            if inner is None:
                return _Scaled(self.values[operand], total, self.is_private(operand), as_written=True)
            self.merged = True
            return _Scaled(inner.core, total, inner.private)
        if scaled and total.fits(dtype_of(node), self.reassociate):
            self.merged = True
            return self.without_factors(node, linear, total)
        # Each factor fits alone, but not their product.
        for operand in dict.fromkeys(scaled):
            self.values[operand] = self.give(operand, self.scaled.pop(operand))
        return None

    def without_factors(self, node: fx.Node, linear: Linear, total: Factor) -> _Scaled:
        """The call of ``node`` on operands without their factors."""
        core = self.new.node_copy(node, self.values.__getitem__)
        if linear.factor != ONE:
            # number / tensor: the number in the call takes up all factors.
            core.args = tuple(argument if isinstance(argument, fx.Node) else total.number for argument in core.args)
            return _Scaled(core, ONE, private=True)
        known = facts(node)
        if known is None:
            return _Scaled(core, total, private=linear.layout == "any")
        bases = [
            operand for operand, _ in linear.operands if (base := facts(operand)) and base.storage == known.storage
        ]
        inner = facts(self.values[bases[0]]) if bases else None
        stamp(core, replace(known, storage=inner.storage if inner else next(self.storages)))
        return _Scaled(core, total, private=not bases)

    def is_private(self, node: fx.Node) -> bool:
        """Whether the memory of ``node`` (of the old graph, used once) was made by it and is seen by nothing else."""
        known = facts(node)
        if known is None:
            return is_einsum(node) and len(node.args) > 2 and uses(node) == 1
        return node.op.startswith("call_") and uses(node) == 1 and self.sharers[known.storage] == 1

    def may_pass_on(self, node: fx.Node, value: _Scaled, linear: Mapping[fx.Node, Linear | None]) -> bool:
        """Whether the one user of ``node`` can take ``value.core`` in its place, and the factor go to its result."""
        if len(node.users) != 1:
            return False
        (user,) = node.users
        target = linear[user]
        if target is None:
            return False
        degrees = [degree for operand, degree in target.operands if operand is node]
        if len(degrees) != uses(node) or dtype_of(user) != dtype_of(node):
            return False
        grown = target.factor
        for degree in degrees:
            grown = grown.times(value.factor.power(degree))
        dtype = dtype_of(node)
        if not (value.factor.fits(dtype, self.reassociate) and grown.fits(dtype, self.reassociate)):
            return False
        scaled, plain = type_of(node), type_of(value.core)
        if scaled is None or plain is None:
            same_layout = target.layout != "needed"
        else:
            same_layout = target.layout == "any" or (scaled.stride == plain.stride and is_dense(user))
        return (
            same_layout
            and same_mode(node, user)
            and self.writers.allow([value.core], node, user)
            and not self.writers.hold(user)
        )

    def give(self, node: fx.Node, value: _Scaled) -> fx.Node:
        """The value of ``node`` again, from ``value``."""
        if value.as_written:
            return self.new.node_copy(node, self.values.__getitem__)
        known = facts(node)
        # What is dropped must not have changed the type, nor have stood between a value and a region without grad.
        if known is None:
            same_type = value.factor.kind is int
        else:
            same_type = may_require_grad(value.core) == may_require_grad(node)
            # What came of a region without grad may say that it requires some because of a later write to it.
            same_type = same_type and (known.grad or not may_require_grad(value.core))
        if value.factor.value == 1 and value.private and same_type:
            core = value.core
            before = facts(core)
            core.meta = dict(node.meta)
            if known is not None and before is not None:
                # It still runs where it stands, which may be another grad mode.
                stamp(core, replace(known, grad=before.grad, movable=before.movable))
            return core
        scaled = self.new.call_function(operator.mul, (value.core, value.factor.number))
        scaled.meta = dict(node.meta)
        return scaled
