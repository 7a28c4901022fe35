"""Holds a record with symbols to records of single calls.

User code may do something else with a symbolic number than with a plain one, where it looks at more than its value:
``type(n) is int`` is true of one only. What it did for the sizes of calls that were recorded as they are tells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from .graph import EVERYTHING, NUMBER, facts, type_of
from .sizes import is_symbolic


def difference(exact: fx.Graph, generic: fx.Graph, symbols: Mapping[str, int | float]) -> str | None:
    """How the record of a call differs from what a generic record is for it; ``None`` where they agree.

    Args:
        exact: recorded for one call.
        generic: recorded with symbols.
        symbols: their values in that call.
    """
    scope = {"math": math, **symbols}
    ours = [node for node in exact.nodes if node.op != "placeholder"]
    theirs = [node for node in generic.nodes if node.op != "placeholder" and NUMBER not in node.meta]
    if len(ours) != len(theirs):
        return f"{len(theirs)} calls instead of {len(ours)}"
    inputs = [node for node in exact.nodes if node.op == "placeholder"]
    partner = dict(
        zip(inputs, [node for node in generic.nodes if node.op == "placeholder" and type_of(node)], strict=True)
    )

    def same(mine: Any, other: Any) -> bool:
        if isinstance(other, fx.Node) and not isinstance(mine, fx.Node):
            text = other.meta.get(NUMBER)
            return text is not None and bool(eval(text, scope) == mine)
        if isinstance(mine, fx.Node):
            return partner.get(mine) is other
        if type(mine) is not type(other):
            return False
        if isinstance(mine, (tuple, list)):
            return len(mine) == len(other) and all(map(same, mine, other))
        if isinstance(mine, dict):
            return list(mine) == list(other) and all(map(same, mine.values(), other.values()))
        if isinstance(mine, slice):
            return all(map(same, (mine.start, mine.stop, mine.step), (other.start, other.stop, other.step)))
        return bool(mine == other or (mine != mine and other != other))

    for mine, other in zip(ours, theirs, strict=True):
        partner[mine] = other
        known, found = type_of(mine), type_of(other)
        if mine.op != other.op or mine.target != other.target or not same(tuple(mine.args), tuple(other.args)):
            return f"{other.format_node()} instead of {mine.format_node()}"
        if not same(dict(mine.kwargs), dict(other.kwargs)):
            return f"{other.format_node()} instead of {mine.format_node()}"
        if (known is None) != (found is None):
            return f"{found} instead of {known} at {mine.format_node()}"
        if known is not None and found is not None:
            shape = tuple(eval(size.text, scope) if is_symbolic(size) else size for size in found.shape)
            layout = known.is_contiguous and not found.is_contiguous
            if known.dtype != found.dtype or known.shape != shape or layout:
                return f"{found} instead of {known} at {mine.format_node()}"
    return _difference_in_memory(exact, partner)


def _difference_in_memory(exact: fx.Graph, partner: Mapping[fx.Node, fx.Node]) -> str | None:
    """How two records differ in what writes reach and in which results share memory."""
    for mine in exact.nodes:
        first, second = facts(mine), facts(partner.get(mine, mine))
        if first is None or second is None or not (first.writes or second.writes):
            continue
        for node, other in partner.items():
            if _reaches(first.writes, node) != _reaches(second.writes, other):
                return f"a write to {node.format_node()} or not at {mine.format_node()}"
    results = next(node for node in exact.nodes if node.op == "output").all_input_nodes
    for one, other in itertools.combinations(results, 2):
        if _share(one, other) != _share(partner[one], partner[other]):
            return f"memory shared by {one.format_node()} and {other.format_node()} or not"
    return None


def _reaches(written: tuple[int, ...], node: fx.Node) -> bool:
    known = facts(node)
    return EVERYTHING in written or (known is not None and known.storage in written)


def _share(one: fx.Node, other: fx.Node) -> bool:
    first, second = facts(one), facts(other)
    return first is not None and second is not None and None is not first.storage == second.storage
