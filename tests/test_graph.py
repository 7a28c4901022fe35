"""How einsums sit in a graph, and what may be moved."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from checks import check_facts, traced
from torch import einsum, fx, rand

from lazy_einsum.errors import EquationError
from lazy_einsum.graph import (
    EVERYTHING,
    Facts,
    Writers,
    copy_graph,
    erase_if_unused,
    facts,
    fresh_storage,
    fresh_type,
    read_einsum,
    same_mode,
    stamp,
    tensor_nodes,
    type_of,
    uses,
    write_einsum,
    writes,
)
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec

X, Y = rand(3, 4), rand(4, 5)


def calls(graph):
    return [node for node in graph.nodes if node.op.startswith("call_")]


def program_of(function, *inputs):
    return traced(function, inputs or (X, Y)).graph


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: einsum("ij,jk->ik", x, y),
        lambda x, y: einsum("i j, j k", [x, y]),
        lambda x, y: einsum("...j,jk->...k", x, y),
        lambda x, y: einsum(x, [3, 4], y, [4, 7], [3, 7]),
        lambda x, y: einsum(x, [..., 4], y, [4, 7], [..., 7]),
    ],
)
def test_every_form_is_read(call):
    graph = program_of(call)
    spec, operands = read_einsum(calls(graph)[0])
    assert str(spec.canonical()) == "ab,bc->ac"
    assert operands == tuple(graph.nodes)[:2]


def test_what_cannot_be_read_is_none():
    graph = fx.symbolic_trace(lambda x, y: (einsum("...j,jk", x, y), x + y, einsum(x, [..., 0], y, [0, 1]))).graph
    assert [read_einsum(node) for node in calls(graph)] == [None] * 3


def test_a_malformed_equation_names_what_is_wrong():
    graph = fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(EquationError, match="2 terms, but 1 operands"):
        read_einsum(graph.call_function(torch.einsum, ("ij,jk->ik", x)))
    with pytest.raises(EquationError):
        read_einsum(graph.call_function(torch.einsum, ("i->j", x)))


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (EinsumSpec(("xy", "yz"), "xz"), [(3, 4), (4, 5)]),
        (EinsumSpec(("xy",), "yx"), [(3, 4)]),
        (EinsumSpec(("xxy",), "yx"), [(3, 3, 4)]),
        (EinsumSpec(("xy",), "x"), [(3, 4)]),
        (EinsumSpec(("xy", "xy"), "xy"), [(3, 1), (1, 4)]),
        (EinsumSpec(("", "x"), "x"), [(), (4,)]),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_written_is_read_again_and_its_facts_are_true(spec, shapes, grad):
    inputs = [rand(shape, requires_grad=grad) for shape in shapes]
    graph = fx.Graph()
    operands = []
    for number, value in enumerate(inputs):
        operands.append(stamp(graph.placeholder(f"x{number}"), Facts(TensorType.of(value), number)))
    node = write_einsum(graph, spec, operands)
    stamp(graph.output(node), Facts())
    assert read_einsum(node) == (spec.canonical(), tuple(operands))
    check_facts(graph, inputs)


def test_facts_of_an_einsum_of_unknown_operands():
    graph = fx.Graph()
    x = graph.placeholder("x")
    like = stamp(graph.placeholder("y"), Facts(TensorType.of(X), 0, grad=False, where="here"))
    assert facts(write_einsum(graph, EinsumSpec(("xy",), "yx"), [x])) is None
    known = facts(write_einsum(graph, EinsumSpec(("xy",), "yx"), [x], like=like))
    assert known == Facts(None, EVERYTHING, (), False, True, "here")


def test_a_copy_has_the_same_code_and_facts():
    graph = program_of(lambda x, y: (einsum("ij,jk->ik", x, y) * 2, [x]))
    copy = copy_graph(graph)
    assert copy.python_code("self").src == graph.python_code("self").src
    assert [facts(node) for node in copy.nodes] == [facts(node) for node in graph.nodes]
    assert not set(copy.nodes) & set(graph.nodes)
    assert fresh_storage(copy) > max(known.storage or 0 for node in copy.nodes if (known := facts(node)))


@pytest.mark.parametrize("tensor", [X, X.t(), X[:, ::2], X[:, ::2].t(), X[:1].expand(5, 4), X[:0], rand(())])
def test_type_of_what_an_elementwise_call_makes(tensor):
    assert fresh_type(TensorType.of(tensor)) == TensorType.of(tensor * 2)


def test_uses_count_places():
    graph = program_of(lambda x, y: (einsum("ij,ij->i", x, x), torch.cat([y, y], dim=0)))
    assert [uses(node) for node in list(graph.nodes)[:2]] == [2, 2]
    x = next(iter(graph.nodes))
    assert list(tensor_nodes((x, [1, {"a": x}]))) == [x, x]


def test_writes_by_name_where_there_are_no_facts():
    graph = fx.Graph()
    y = graph.placeholder("y")
    writing = [
        graph.call_method("add_", (y, 1)),
        graph.call_method("zero_", (y,)),
        graph.call_method("__setitem__", (y, 0, 1)),
        graph.call_function(torch.relu_, (y,)),
        graph.call_function(torch.add, (y, 1), {"out": y}),
        graph.call_function(torch.nn.functional.relu, (y,), {"inplace": True}),
        graph.call_function(operator.setitem, (y, 0, 2)),
        graph.call_function(operator.iadd, (y, 1)),
        graph.call_module("anything", (y,)),
    ]
    pure = [
        graph.call_method("__add__", (y, 1)),
        graph.call_function(operator.add, (y, 1)),
        graph.call_function(torch.add, (y, 1), {"out": None}),
        graph.call_function(torch.nn.functional.relu, (y,), {"inplace": False}),
    ]
    assert [writes(node) for node in writing] == [(EVERYTHING,)] * len(writing)
    assert [writes(node) for node in pure] == [()] * len(pure)


def test_writers():
    def program(x, y):
        a = x.exp()
        b = y.exp()
        y.add_(1.0)
        c = a.view(-1)
        c.mul_(2.0)
        return a, b, c

    graph = program_of(program)
    x, y, a, b, add_, view, _, output = graph.nodes
    writers = Writers(graph)
    assert writers.write_any([y], b, view)
    assert not writers.write_any([y], b, add_)
    assert not writers.write_any([x], x, output)
    assert not writers.write_any([a], a, view)
    assert writers.write_any([a], a, output)
    assert writers.spoil_any([y], b)
    assert not writers.spoil_any([y], add_)
    assert not writers.spoil_any([x], x)
    assert writers.spoil_any([a], a)
    assert writers.allow([a], a, view)
    assert not writers.allow([a], a, output)
    assert not Writers(program_of(lambda x, y: x + 1)).spoil_any([x], x)


def test_a_call_that_may_write_anything():
    graph = program_of(lambda x, y: (x.exp(), y.exp()))
    x, y, _, b, output = graph.nodes
    stamp(b, replace(facts(b), writes=(EVERYTHING,)))
    writers = Writers(graph)
    assert writers.write_any([x], x, output)
    assert not writers.spoil_any([x], x)
    assert writers.spoil_any([y], y)


def test_what_autograd_keeps_must_not_be_written_later():
    def program(x, y):
        z = x * 1.0
        w = z * y
        z.add_(1.0)
        return w

    for requires_grad in (False, True):
        graph = program_of(program, X, rand(3, 4, requires_grad=requires_grad))
        _, _, z, w, *_ = graph.nodes
        writers = Writers(graph)
        assert writers.hold(w) == requires_grad
        assert writers.allow([z], z, w) != requires_grad


def test_modes():
    def program(x, y):
        a = x * 2
        with torch.no_grad():
            b = a * 2
            c = b * 2
        return a, b, c, c * 2

    nodes = [node for node in calls(program_of(program)) if type_of(node) is not None]
    a, b, c, d = nodes
    assert same_mode(b, c)
    assert same_mode(a, d)
    assert not same_mode(a, b)
    assert not same_mode(c, d)


def test_erasing_leaves_what_writes():
    graph = program_of(lambda x, y: (x.add_(1.0), x.exp(), y)[2])
    add_, exp = calls(graph)
    erase_if_unused([exp, add_])
    assert calls(graph) == [add_]
