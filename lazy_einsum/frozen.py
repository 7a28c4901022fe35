"""Frozen values: what a graph computes from frozen tensors only, and so the same at each call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Set

from torch import fx

from .graph import EVERYTHING, facts, type_of, writes
from .state import Path, Reads, SameAs, path_name

FROZEN = "lazy_einsum_frozen"
"""Under this name the ``get_attr`` node of a frozen tensor has that tensor's qualified name in its ``meta``."""

# These give memory as it comes.
_UNINITIALIZED = frozenset({"empty_like", "new_empty", "new_empty_strided"})
# Their memory lies in streams and allocators that folds know of.
_DEVICES = frozenset({"cpu", "cuda"})


def mark_frozen(
    graph: fx.Graph, state: Mapping[str, Path], reads: Reads, module: str, is_frozen: Callable[[str], bool]
) -> None:
    """Mark the ``get_attr`` nodes of frozen tensors, in place.

    Args:
        graph: as it was traced.
        state: paths of the ``get_attr`` nodes, by their target.
        reads: what was read of the module.
        module: name of the submodule that was traced; empty for the child itself.
        is_frozen: whether a tensor is frozen, by its qualified name.
    """
    aliases: dict[Path, list[Path]] = {}
    for (path, _), found in reads.items():
        if isinstance(found, SameAs):
            aliases.setdefault(found.path, []).append(path)
    for node in graph.nodes:
        if node.op != "get_attr" or type_of(node) is None:
            continue
        path = state[str(node.target)]
        same = [path, *aliases.get(path, ())]
        names = [f"{module}.{path_name(other)}".removeprefix(".") for other in same if _is_named(other)]
        name = next(filter(is_frozen, names), None)
        if name is not None:
            node.meta[FROZEN] = name


def _is_named(path: Path) -> bool:
    """Whether ``named_parameters`` or ``named_buffers`` has what lies at ``path``."""
    *modules, (how, _) = path
    return how in ("parameter", "buffer") and all(step == "module" for step, _ in modules)


def frozen_values(graph: fx.Graph) -> Set[fx.Node]:
    """The nodes whose values are those of frozen tensors, or are computed from these alone by calls that write nothing,
    draw no random numbers, run in the modes of the whole, and are not followed by autograd.
    """
    marked = [node for node in graph.nodes if node.op == "get_attr" and FROZEN in node.meta]
    if not marked:
        return frozenset()
    # Calls of which nothing is known (live submodules) are taken to keep the promise.
    written = {storage for node in graph.nodes for storage in writes(node)} - {EVERYTHING}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        known = facts(node)
        if known is None or known.storage in written or known.storage == EVERYTHING:
            continue
        if node.op == "get_attr":
            entering = known.type
            if FROZEN in node.meta and entering and not entering.is_inference and entering.device.type in _DEVICES:
                found.add(node)
        elif node.op.startswith("call_") and known.steady and not known.writes and _gives_tensors(node):
            operands = node.all_input_nodes
            follows = known.grad and any(map(_requires_grad, operands))
            name = getattr(node.target, "__name__", node.target)
            if operands and found.issuperset(operands) and not follows and name not in _UNINITIALIZED:
                found.add(node)
    return found


def _requires_grad(operand: fx.Node) -> bool:
    known = type_of(operand)
    return known is not None and known.requires_grad


def _gives_tensors(node: fx.Node) -> bool:
    """Whether a call gives a tensor, or several, which are then taken from what it gives; others have effects only."""
    known = facts(node)
    is_tensor = known is not None and known.storage is not None
    return is_tensor or (bool(node.users) and all(user.target is operator.getitem for user in node.users))
