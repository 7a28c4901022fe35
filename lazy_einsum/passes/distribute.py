"""Distribute products over sums with a term that is itself a product, where that pays: low-rank updates of weights."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx

from ..cost import ITEM, walk_seconds
from ..graph import (
    MAX_LABELS,
    copy_graph,
    erase_if_unused,
    facts,
    fresh_storage,
    given,
    same_mode,
    stamp,
    type_of,
    uses,
    write_einsum,
)
from ..networks import Networks, merges_broadcasts, pays
from ..products import may_reorder, spellings
from ..scalars import ONE, Factor, Tensors, read_linear, tensors
from ..signature import TensorType
from ..spec import EinsumSpec, symbol

# More than for ``join_products``, as there are more calls than before.
_LEAST = 10e-6

_ADD = spellings("add", "__add__") | {operator.add}
_SUB = spellings("sub", "subtract", "__sub__") | {operator.sub}


def distribute(
    optimize: object = "auto", memory_limit: int | None = None, reassociate: bool | None = None
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that multiplies the terms of a sum one by one.

    Before (a is thin)::

        matmul = b @ a
        mul = matmul * 0.5
        add = weight + mul
        linear = torch.nn.functional.linear(x, add, bias)

    After::

        linear_1 = torch.nn.functional.linear(x, weight, bias)
        einsum = torch.einsum("ab,cd,db->ac", x, b, a)
        linear = torch.add(linear_1, einsum, alpha=0.5)

    Only where a term is a product that nothing else uses, and the sum is used by one product only; where the time for
    that term, for scaling it and adding it, is clearly more than that for the new einsum in its best order and for
    adding its result. The other product stays the call that it was.

    Requires: exact facts (without them nothing is changed).
    Ensures: results are memory of their own, as they were.

    Args:
        optimize: the search for contraction orders, see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        reassociate: True changes float16 and bfloat16 as well; False changes nothing.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        while reassociate is not False:
            networks = Networks(new, optimize, reassociate)
            among = tensors(new)
            found = next(
                (
                    term
                    for product in networks.own
                    for term in _terms(networks, among, product)
                    if _gains(networks, term, memory_limit)
                ),
                None,
            )
            if found is None:
                break
            _write(networks, found, itertools.count(fresh_storage(new)))
        return new

    return run


class _Term(NamedTuple):
    """A term of a sum that a product may multiply by itself.

    Attributes:
        product: what multiplies the sum.
        place: number of the operand that is the sum.
        way: the permutations from the sum to that operand, as one.
        between: these permutations and the sum, users before what they use.
        scalings: calls that scale the term, users first.
        factor: by how much they, and the sum, scale it.
        term: the product in the term.
        rest: the other term.
    """

    product: fx.Node
    place: int
    way: EinsumSpec
    between: tuple[fx.Node, ...]
    scalings: tuple[fx.Node, ...]
    factor: Factor
    term: fx.Node
    rest: fx.Node

    def whole(self, networks: Networks) -> tuple[EinsumSpec, tuple[fx.Node, ...]]:
        """The product with the term, unscaled, in the place of the sum."""
        spec, operands, _ = networks.own[self.product]
        inner, leaves = networks.whole[self.term]
        fused = spec.inline(self.place, self.way.inline(0, inner))
        return fused, (*operands[: self.place], *leaves, *operands[self.place + 1 :])


def _terms(networks: Networks, among: Tensors, product: fx.Node) -> Iterator[_Term]:
    """The terms of sums among the operands of ``product``."""
    known = type_of(product)
    if known is None or not may_reorder(known.dtype, networks.reassociate):
        return
    if len(networks.own[product].operands) < 2:
        return
    for place, operand in enumerate(networks.own[product].operands):
        if operand not in product.all_input_nodes:
            continue  # the call has a view of it
        labels = "".join(symbol(number) for number in range(len(networks.own[product].spec.inputs[place])))
        way, between, total = EinsumSpec((labels,), labels), [], operand
        while uses(total) == 1 and total in networks.own and networks.own[total].spec.is_permutation:
            between.append(total)
            way = way.inline(0, networks.own[total].spec)
            (total,) = networks.own[total].operands
        between.append(total)
        for rest, term, factor in _read_sum(total):
            scalings = []
            while uses(term) == 1 and (scaled := read_linear(term, among)) is not None and scaled.only_scales:
                scalings.append(term)
                factor = factor.times(scaled.factor)
                ((term, _),) = scaled.operands
            found = _Term(product, place, way, tuple(between), tuple(scalings), factor, term, rest)
            if _is_free(networks, found):
                yield found


def _read_sum(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Factor]]:
    """The terms of a sum of two tensors of its own shape: the one that stays, the other, and what scales that."""
    named = given(node.kwargs)
    if node.op not in ("call_function", "call_method") or node.target not in _ADD | _SUB or len(node.args) != 2:
        return
    left, right = node.args
    alpha = Factor.of(named.get("alpha", 1))
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or alpha is None or not set(named) <= {"alpha"}:
        return
    types = [type_of(left), type_of(right), type_of(node)]
    if len({(known.shape, known.dtype, known.is_conj, known.is_neg) if known else None for known in types}) != 1:
        return
    if node.target in _SUB:
        yield left, right, alpha.times(Factor(-ONE.value, int))
        return
    yield left, right, alpha
    if alpha == ONE:
        yield right, left, ONE


def _is_free(networks: Networks, found: _Term) -> bool:
    """Whether nothing else uses what is distributed, and all of it may be computed where the product is."""
    term, product, writers = found.term, found.product, networks.writers
    known, base = type_of(term), type_of(product)
    if term not in networks.whole or networks.own[term].added is not None or known is None or base is None:
        return False
    inner, leaves = networks.whole[term]
    if merges_broadcasts(networks.own[product].spec.inputs[found.place], found.way.inline(0, inner)):
        return False
    if len(leaves) < 2 or known.dtype != base.dtype or not found.factor.fits(base.dtype, networks.reassociate):
        return False
    moved = (*found.between, *found.scalings, *networks.parts[term])
    if any(uses(node) != 1 for node in (*found.between, *found.scalings, term)):
        return False
    if not all(same_mode(node, product) and not writers.hold(node) for node in moved):
        return False
    return writers.allow((*leaves, found.rest), min(moved), product)


def _gains(networks: Networks, found: _Term, memory_limit: int | None) -> bool:
    spec, operands = found.whole(networks)
    total, result = type_of(found.between[-1]), type_of(found.product)
    plan = networks.plan(spec, operands, memory_limit) if spec.n_labels <= MAX_LABELS else None
    if plan is None or total is None or result is None or found.between[-1] in networks.frozen:
        return False
    before = networks.seconds(found.term) + (1 + len(found.scalings)) * _sum_seconds(total)
    return pays(plan.seconds + _sum_seconds(result), before, _LEAST)


def _sum_seconds(known: TensorType) -> float:
    """Time of an elementwise sum."""
    return walk_seconds(known.numel, 1, 1, False, 1, 3 * ITEM * known.numel)


def _write(networks: Networks, found: _Term, storages: Iterator[int]) -> None:
    """Make ``found.product`` the sum of two products, in place."""
    product, graph = found.product, found.product.graph
    known = facts(product)
    assert known is not None and known.type is not None
    whole, operand = found.whole(networks), networks.own[product].operands[found.place]
    with graph.inserting_before(product):
        rest = found.rest
        if len(found.between) > 1:
            rest = write_einsum(graph, found.way, (rest,), like=product)
        first = graph.node_copy(product, lambda node: rest if node is operand else node)
        second = write_einsum(graph, *whole, like=product, storage=next(storages))
    for node in (first, second):
        follows = known.grad and any(entry.requires_grad for n in node.all_input_nodes if (entry := type_of(n)))
        result = replace(known.type, requires_grad=follows, is_leaf=not follows)
        stamp(node, replace(known, type=result, storage=next(storages)))
    product.op, product.target, product.args = "call_function", torch.add, (first, second)
    product.kwargs = {} if found.factor == ONE else {"alpha": found.factor.number}
    erase_if_unused((*found.between, *found.scalings, *networks.parts[found.term]))
