"""What every pass promises, as one function to call: ``check_pass``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from behaviour import clone_tree, differences, observe
from torch import fx

from lazy_einsum.graph import Facts, facts, is_einsum
from lazy_einsum.signature import Arguments, TensorType
from lazy_einsum.specialize import compile_graph, finish
from lazy_einsum.tracing import Trace, trace

Pass = Callable[[fx.Graph], fx.Graph]


def traced(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Trace:
    """The program that ``function`` is for ``inputs``, with facts on every node."""
    return trace(function, Arguments.of(tuple(inputs), {})[0])


def lines(graph: fx.Graph) -> list[str]:
    """The calls of a graph, one line each, and what it returns."""
    found = []
    for node in graph.nodes:
        arguments = [repr(argument) for argument in node.args]
        arguments += [f"{name}={value!r}" for name, value in node.kwargs.items()]
        if node.op == "call_function":
            found.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({', '.join(arguments)})")
        elif node.op == "call_method":
            found.append(f"{node.name} = {arguments[0]}.{node.target}({', '.join(arguments[1:])})")
        elif node.op == "output":
            found.append(f"return {node.args[0]!r}")
    return found


def shape_of_code(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Targets and arguments with nodes by number: what must not change when a pass runs again."""
    number = {node: place for place, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, plain(item)) for key, item in value.items())
        return (type(value), repr(value))

    return [
        (node.op, str(node.target) if node.op != "call_function" else node.target, plain(node.args), plain(node.kwargs))
        for node in graph.nodes
    ]


def check_pass(pass_: Pass, function: Callable[..., Any], *inputs: torch.Tensor) -> list[str]:
    """Hold ``pass_`` to its promises on the program of ``function``.

    Same results, gradients, dtypes, shapes, contiguity, aliasing and writes as eager; the argument untouched; a well-
    formed
    graph; nothing left to do the second time; facts that are true of what really happens.

    Returns:
        The calls of the new graph.
    """
    program = traced(function, inputs)
    before = shape_of_code(program.graph), [facts(node) for node in program.graph.nodes]
    new = pass_(program.graph)
    assert new is not program.graph
    assert before == (shape_of_code(program.graph), [facts(node) for node in program.graph.nodes]), (
        "the argument changed"
    )
    new.lint()
    assert shape_of_code(pass_(new)) == shape_of_code(new), "the second run changes something"
    run = finish(compile_graph(new, ()), program, grad=True)
    copies = clone_tree(tuple(inputs)), clone_tree(tuple(inputs))
    problems = differences(observe(run, copies[0]), observe(function, copies[1]))
    if specs(new):
        # The stride that a result must have is given by its facts, until ``lower`` writes code that gives it.
        problems = [problem for problem in problems if "strides" not in problem]
    assert not problems, problems
    check_facts(new, inputs)
    return lines(new)


def check_facts(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Run ``graph`` on ``inputs`` node by node and hold each value against the facts of its node."""
    grad = torch.is_grad_enabled()
    try:
        _Witness(graph).run(*clone_tree(tuple(inputs)))
    finally:
        torch.set_grad_enabled(grad)


class _Witness(fx.Interpreter):
    """Compares each value with what its node says of it."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=graph)
        self.has_einsums = any(is_einsum(node) for node in graph.nodes)
        self.numbers: dict[int, int | None] = {}
        self.kept: list[torch.Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        tensors = [self.env[node] for node in n.all_input_nodes if isinstance(self.env[node], torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = super().run_node(n)
        known = facts(n)
        assert known is not None, f"{n} has no facts"
        for node, tensor, version in zip(n.all_input_nodes, tensors, versions, strict=False):
            if tensor._version != version:
                assert set(known.writes) & {-1, facts(node).storage}, f"{n} writes {node}, its facts say {known.writes}"
        if known.type is not None:
            self._compare(n, result, known)
        return result

    def _compare(self, node: fx.Node, value: torch.Tensor, known: Facts) -> None:
        assert known.type is not None
        true = TensorType.of(value)
        for name in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(true, name) == getattr(known.type, name), (
                f"{name} of {node} is {getattr(true, name)}, not {known.type}"
            )
        if value.numel() and not self.has_einsums:
            # Before einsums are lowered, the facts say which strides they have to have in the end. Dimensions of size 1
            # have none that matter.
            strides = zip(true.shape, true.stride, known.type.stride)
            assert all(size == 1 or one == other for size, one, other in strides), (
                f"strides of {node}: {true.stride}, not {known.type.stride}"
            )
        address = value.untyped_storage().data_ptr()
        copies_at_need = getattr(node.target, "__name__", node.target) in ("reshape", "flatten", "contiguous", "ravel")
        if value.numel() and not (copies_at_need and self.has_einsums):
            self.kept.append(value)
            assert self.numbers.setdefault(address, known.storage) == known.storage, (
                f"{node} lies in the memory of another storage number"
            )


def specs(graph: fx.Graph) -> list[str]:
    """The equations of the einsums, in order."""
    return [node.args[0] for node in graph.nodes if is_einsum(node)]
