"""``Trace``: what a trace gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .data import Constant, Structure, unflatten
from .state import Path, Reads


@dataclass(frozen=True)
class Result:
    """How to build what ``forward`` returns from the graph's flat output.

    Attributes:
        structure: containers.
        leaves: for each leaf a constant, or the number of the output.
    """

    structure: Structure | int
    leaves: tuple[Constant | int, ...]

    def __call__(self, values: Sequence[Any]) -> Any:
        """What ``forward`` returns, where the graph gave ``values``."""
        return unflatten(
            self.structure, [values[leaf] if isinstance(leaf, int) else leaf.value for leaf in self.leaves]
        )


@dataclass(frozen=True)
class Trace:
    """What ``trace`` gives.

    Attributes:
        graph: placeholders for the tensors among the arguments, ``get_attr`` nodes for what is read of the module,
            ``Facts`` on every node.
        reads: what ``forward`` read of the module.
        state: paths of the ``get_attr`` nodes, by their target.
        result: how to build what ``forward`` returns from the graph's flat output; ``None`` where that is the result
            itself.
        writes: whether the graph writes to each of the tensors among the arguments and then of those read of the
            module.
        switches_grad: whether ``forward`` switches the grad mode on the way.
        conditions: on the symbols among the arguments, as Python expressions, that make the graph right.
        switches_modes: whether it switches others.
        absent: attributes that ``forward`` asked tensors among the arguments (by number) for, and that these lack.
    """

    graph: fx.Graph
    reads: Reads
    state: Mapping[str, Path]
    result: Result | None
    writes: tuple[bool, ...]
    switches_grad: bool
    conditions: tuple[str, ...] = ()
    switches_modes: bool = False
    absent: tuple[tuple[int, str], ...] = ()

    def equals(self, other: Trace) -> bool:
        """Whether both do the same, and this depends on no more than ``other``."""
        same = all(other.reads.get(key) == found for key, found in self.reads.items())
        return (
            same
            and str(self.graph) == str(other.graph)
            and replace(self, graph=other.graph, reads=other.reads) == other
        )
