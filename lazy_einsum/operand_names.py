"""What the user calls the tensors and calls of a graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from .argument_names import argument_names
from .graph import facts, type_of
from .report import CallReport, OperandReport
from .signature import Symbol, TensorType
from .specialize import Specialization


def call_text(node: fx.Node) -> str:
    """A call as a line of code, its operands by name."""
    if node.op == "call_method":
        receiver, *rest = node.args
        return f"{node.name} = {receiver}.{node.target}({_arguments(rest, node.kwargs)})"
    return f"{node.name} = {name_of(node)}({_arguments(node.args, node.kwargs)})"


def _arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items() if value is not None)])


def name_of(node: fx.Node) -> str:
    """Name of the function that a node calls."""
    return str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", str(node.target))


def written_call(node: fx.Node) -> CallReport:
    """A call of the user's, its equation where it has one."""
    known = facts(node)
    text = name_of(node)
    equation = next((argument for argument in node.args if isinstance(argument, str)), None)
    return CallReport(f"{text} {equation!r}" if equation else text, known.where if known else "")


class Names:
    """Says what a node is to the user.

    Args:
        entry: whose graphs the nodes are of.
        traced: the nodes as recorded, by name.
    """

    def __init__(self, entry: Specialization, traced: Mapping[str, fx.Node]) -> None:
        child = entry.module
        prefix = entry.signature.module
        self._prefix = f"{prefix}." if prefix else ""
        own = child.get_submodule(prefix) if isinstance(child, nn.Module) and prefix and _has(child, prefix) else child
        arguments = entry.signature.arguments
        names = argument_names(own, arguments)
        leaves = [number for number, leaf in enumerate(arguments.leaves) if isinstance(leaf, (TensorType, Symbol))]
        placeholders = [node.name for node in traced.values() if node.op == "placeholder"]
        self._arguments = {node: names[leaf] for node, leaf in zip(placeholders, leaves, strict=False)}
        self._kinds: dict[str, str] = {}
        if isinstance(own, nn.Module):
            self._kinds |= {name: "parameter" for name, _ in own.named_parameters(remove_duplicate=False)}
            self._kinds |= {name: "buffer" for name, _ in own.named_buffers(remove_duplicate=False)}
        self._traced = traced

    def operand(self, node: fx.Node) -> OperandReport:
        """A node that enters a network."""
        known = type_of(node)
        assert known is not None
        origin = self._traced.get(node.name)
        stamped = facts(origin if origin is not None else node)
        name, kind = self._describe(node)
        shape = tuple(map(int, known.shape))
        where = stamped.where if stamped is not None and kind != "argument" else ""
        return OperandReport(name, kind, str(known), shape, math.prod(shape) * known.dtype.itemsize, where)

    def _describe(self, node: fx.Node) -> tuple[str, str]:
        if node.op == "placeholder":
            return self._arguments.get(node.name, node.name), "argument"
        if node.op == "get_attr":
            name = str(node.target)
            return self._prefix + name, self._kinds.get(name, "attribute")
        source = node
        while len(inputs := [n for n in source.all_input_nodes if type_of(n) is not None]) == 1:
            (source,) = inputs
        origin = self._describe(source)[0] if source is not node and source.op in ("placeholder", "get_attr") else ""
        call = self._traced.get(node.name, node)
        return f"{name_of(call)} of {origin}" if origin else f"{name_of(call)} ({node.name})", "computed"


def _has(child: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in child.named_modules())
