"""Compute a product anew for each of several users, where their networks then take less time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import fx

from ..graph import (
    MAX_LABELS,
    copy_graph,
    facts,
    fresh_storage,
    is_einsum,
    keepers,
    lead_to_one_end,
    may_require_grad,
    stamp,
    uses,
)
from ..networks import Networks, merges_broadcasts, pays
from ..plan import Plan
from ..products import read_product
from ..saved import Step, Written, save_more

# Users of a product, and products of a graph, that are looked at: planning takes milliseconds for each.
_USERS, _PRODUCTS = 4, 16


def recompute(
    optimize: object = "auto",
    memory_limit: int | None = None,
    reassociate: bool | None = None,
    saved_limit: float | None = None,
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that gives each user of a product a copy of its own, if the copies are then contracted in other orders.

    Before (``v`` and ``w`` are vectors)::

        matmul = a @ b
        matmul_1 = matmul @ v
        matmul_2 = w @ matmul

    After::

        matmul_3 = a @ b
        matmul_1 = matmul_3 @ v
        matmul = a @ b
        matmul_2 = w @ matmul

    ``join_products`` and ``fuse_einsums`` then make ``a @ (b @ v)`` and ``(w @ a) @ b`` of them. A product is copied
    only where all its users are products too, and where the best orders of their networks, with it in each of them,
    take clearly less time than it and the best orders around it. Where autograd follows, only if no more is saved for
    the backward pass than ``saved_limit`` allows, and if the users lead to one result of the graph: to differentiate
    several that share a product, one after the other, is an error of the user's, which copies would hide.

    Requires: exact facts (without them nothing is changed). Float16 and bfloat16 products are not copied.
    Ensures: what is not copied stays as it is, and what is keeps its text.

    Args:
        optimize: the search for contraction orders, see ``make_plan``.
        memory_limit: bytes that no intermediate may exceed.
        reassociate: True copies float16 and bfloat16 products as well; False copies nothing.
        saved_limit: what autograd may save, in parts of what it saves of the products as they are.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        best = copy_graph(graph)
        if reassociate is False:
            return best
        before: Networks | None = None
        nodes, tried = _by_name(best), 0
        for name in list(nodes):
            node = nodes[name]
            if not _has_product_users(node, reassociate):
                continue
            before = before or Networks(best, optimize, reassociate)
            if not _promises(before, node) or tried == _PRODUCTS:
                continue
            tried += 1
            other = copy_graph(best)
            copies = _copy(other, name)
            after = Networks(other, optimize, reassociate)
            if _gains(before, after, name, copies, memory_limit, saved_limit):
                best, nodes, before = other, _by_name(other), None
        return best

    return run


def _by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes}


def _has_product_users(node: fx.Node, reassociate: bool | None) -> bool:
    if not 2 <= len(node.users) <= _USERS or uses(node) != len(node.users):
        return False
    product = read_product(node, reassociate)
    if product is None or product.added is not None or len(product.operands) < 2 or keepers(node):
        return False
    return all(read_product(user, reassociate) is not None for user in node.users)


def _promises(networks: Networks, node: fx.Node) -> bool:
    """Whether a product may be copied, and the networks of its users with it in them take less time than both now."""
    if node not in networks.own or any(user not in networks.own for user in node.users):
        return False
    spec, operands, _ = networks.own[node]
    if any(networks.writers.part(operands, node, user) for user in node.users):
        return False
    if may_require_grad(node) and not lead_to_one_end(node.graph, *node.users):
        # The backward pass of one result frees what that of another needs: to do so twice is an error.
        return False
    before, after = networks.plan_seconds(spec, operands), 0.0
    for root in networks.roots():
        whole, leaves = networks.whole[root]
        if node in leaves:
            before += networks.plan_seconds(whole, leaves)
            position = leaves.index(node)
            inlined = whole.inline(position, spec)
            if inlined.n_labels > MAX_LABELS or merges_broadcasts(whole.inputs[position], spec):
                return False
            after += networks.plan_seconds(inlined, (*leaves[:position], *operands, *leaves[position + 1 :]))
    return pays(after, before)


def _copy(graph: fx.Graph, name: str) -> list[str]:
    """Give each user of a node but the last one a copy; names of the copies."""
    node = _by_name(graph)[name]
    known = facts(node)
    assert known is not None
    copies = []
    for user in list(node.users)[:-1]:
        with graph.inserting_before(user):
            copy = graph.node_copy(node)
        copy.meta = dict(node.meta)
        stamp(copy, replace(known, storage=fresh_storage(graph)))
        user.replace_input_with(node, copy)
        copies.append(copy.name)
    return copies


def _gains(
    before: Networks, after: Networks, name: str, copies: list[str], memory_limit: int | None, saved_limit: float | None
) -> bool:
    """Whether the graph with copies is the better one."""
    copied = {name, *copies}
    # All copies have to become parts of other networks, and these have to be joined.
    if not copied <= {node.name for node in after.inlined}:
        return False
    old, new = _touched(before, after, copied)
    joined = [root for root in new if any(part.name in copied for part in after.parts[root])]
    if not all(after.joins(root, memory_limit) or all(map(is_einsum, after.parts[root])) for root in joined):
        return False
    there = sum(_seconds(before, root, memory_limit) for root in old)
    here = sum(_seconds(after, root, memory_limit) for root in new)
    if not pays(here, there):
        return False
    if saved_limit is None or not any(map(may_require_grad, new)):
        return True
    nodes = _by_name(new[0].graph)
    written, planned = list(_written(before, old, nodes)), list(_planned(after, new, memory_limit))
    results = {result for *_, result in (*written, *planned)}
    taken = dict.fromkeys(
        nodes[operand.name] for root in old for part in before.parts[root] for operand in before.own[part].operands
    )
    leaves = [operand for operand in taken if operand not in results]
    if not (_is_closed(written, leaves) and _is_closed(planned, leaves)):
        return False
    return not save_more(saved_limit, written, planned, leaves)


def _is_closed(steps: list[Step], leaves: list[fx.Node]) -> bool:
    """Whether each operand is a leaf or the result of a step before."""
    known: set[object] = set(leaves)
    for _, operands, result in steps:
        if not known.issuperset(operands):
            return False
        known.add(result)
    return True


def _touched(before: Networks, after: Networks, names: set[str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The networks of both graphs that have one of these calls in them, or one that is in such a network of the other
    graph, and so on: they compute the same.
    """
    found: list[list[fx.Node]] = [[], []]
    while True:
        known = len(names)
        for place, networks in enumerate((before, after)):
            found[place] = [
                root for root in networks.roots() if any(part.name in names for part in networks.parts[root])
            ]
            names = names.union(part.name for root in found[place] for part in networks.parts[root])
        if len(names) == known:
            return found[0], found[1]


def _written(networks: Networks, roots: list[fx.Node], nodes: dict[str, fx.Node]) -> Iterator[Step]:
    """The products of networks one by one, in nodes of another graph with the same names."""
    parts = {part for root in roots for part in networks.parts[root]}
    for part in (node for node in networks.own if node in parts):
        spec, operands, _ = networks.own[part]
        yield Written.plain(spec), [nodes[operand.name] for operand in operands], nodes[part.name]


def _planned(networks: Networks, roots: list[fx.Node], memory_limit: int | None) -> Iterator[Step]:
    """The best orders of networks."""
    for root in roots:
        spec, operands = networks.whole[root]
        yield _plan(networks, root, memory_limit) or Written.plain(spec), list(operands), root


def _seconds(networks: Networks, root: fx.Node, memory_limit: int | None) -> float:
    """What a network takes: as it is written, or in the best order."""
    plan = _plan(networks, root, memory_limit)
    return min(networks.seconds(root), plan.seconds) if plan is not None else networks.seconds(root)


def _plan(networks: Networks, root: fx.Node, memory_limit: int | None) -> Plan | None:
    spec, operands = networks.whole[root]
    return networks.plan(spec, operands, memory_limit) if len(operands) > 1 else None
