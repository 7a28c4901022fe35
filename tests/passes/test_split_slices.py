"""Disjoint slices of one tensor become one split where autograd follows it, and nobody can tell."""

from __future__ import annotations

import pytest
import torch
from checks import check_pass, lines, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import rand

from lazy_einsum import OptimizedModule
from lazy_einsum.graph import Writers
from lazy_einsum.passes.split_slices import split_slices

run = split_slices()


def tensor(*shape, dtype=torch.float64, grad=True):
    return (rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(grad)


X = tensor(4, 10)


def splits(function, *inputs):
    """The arguments of the splits that the pass puts in."""
    found = check_pass(run, function, *inputs)
    return [line.partition("split_with_sizes(")[2][:-1] for line in found if "split_with_sizes(" in line]


def untouched(function, *inputs):
    """Whether the pass leaves the program to the letter."""
    return check_pass(run, function, *inputs) == lines(traced(function, inputs).graph)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[:, :3].exp() @ x[:, 3:6].T, "[3, 3, 4], 1"),
        (lambda x: x[:, 3:6].exp() @ x[:, :3].T, "[3, 3, 4], 1"),
        (lambda x: x[..., 1:4].exp() + x[..., -3:].sin(), "[1, 3, 3, 3], 1"),
        (lambda x: x[:2].exp() + x[2:].sin(), "[2, 2], 0"),
        (lambda x: x[0].exp() + x[3].sin(), "[1, 2, 1], 0"),
        (lambda x: x[:, 0].exp() + x[:, -1].sin(), "[1, 8, 1], 1"),
        (lambda x: x[..., 2].exp() + x[:, 4:6].sum(1), "[2, 1, 1, 2, 4], 1"),
        (lambda x: x.narrow(1, 0, 5).exp() + x.narrow(-1, 5, 5).sin(), "[5, 5], 1"),
        (lambda x: x.select(1, 0).exp() + x.select(-1, -1).sin(), "[1, 8, 1], 1"),
        (lambda x: x[:, :5].exp() + x[:, 5:].sin() + x[:, :5].cos(), "[5, 5], 1"),
        (lambda x: x[:, 2:5].reshape(-1).exp() + x[:, 5:8].permute(1, 0).reshape(-1), "[2, 3, 3, 2], 1"),
        (lambda x: (x * 2)[:, :5].exp() + x[:, 5:].sin(), None),
    ],
)
def test_slices(function, expected):
    assert splits(function, X) == ([expected] if expected else [])
    if expected:
        assert not any("slice(" in line for line in check_pass(run, function, X))


def test_slices_that_overlap_come_of_several_splits():
    def program(x):
        return x[:, :5].exp() + x[:, 3:8].sin() + x[:, 5:].cos() + x[:, 8:].sum()

    assert splits(program, X) == ["[5, 5], 1", "[3, 5, 2], 1"]

    def three(x):
        return x[:, :5].exp() + x[:, 3:8].sin() + x[:, 5:].cos()

    assert splits(three, X) == ["[5, 5], 1"]
    assert sum("slice(" in line for line in check_pass(run, three, X)) == 1


def test_slices_along_several_dimensions():
    def program(x):
        return x[:, :5].exp() @ x[:, 5:].T + x[:2].exp() @ x[2:].T.contiguous()[:, :1].expand(10, 4)

    assert sorted(splits(lambda x: (x[:, :5] @ x[:, 5:].T).sum() + (x[:2] @ x[2:].T).sum(), X)) == [
        "[2, 2], 0",
        "[5, 5], 1",
    ]


def test_slices_of_slices():
    def program(x):
        left, right = x[:, :6], x[:, 6:]
        return left[:, :2].exp().sum() + left[:, 2:].sin().sum() + right.sum()

    assert splits(program, X) == ["[6, 4], 1", "[2, 4], 1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex128])
def test_dtypes_and_layouts(dtype):
    x = tensor(4, 6, 10, dtype=dtype).detach().permute(2, 0, 1).requires_grad_()
    assert splits(lambda x: x[:, 1:3] * x[:, 3:4], x) == ["[1, 2, 1], 1"]
    y = tensor(3, 4, dtype=dtype).detach()[:, :1].expand(3, 8).requires_grad_()
    assert splits(lambda y: y[:, :4] * y[:, 4:], y) == ["[4, 4], 1"]
    assert splits(lambda x: x[:, 0] * x[:, 2] * x[:, 3], x) == ["[1, 1, 1, 1], 1"]


def grown(x):
    left = x[:, :5]
    left += 1
    return left * x[:, 5:]


def grown_whole(x):
    left, right = x[:, :5], x[:, 5:]
    result = left * right
    x += 1
    return result


def grown_view(x):
    left, right = x[:, :5], x[:, 5:]
    left.reshape(2, 2, 5).mul_(2)
    return left + right


def written_in_the_middle(x):
    left = x[:, :5].exp()
    x.mul_(2)
    return left + x[:, 5:]


def hooked(x):
    left = x[:, :5]
    left.register_hook(lambda gradient: gradient * 2)
    return left * x[:, 5:]


def without_grad(x):
    with torch.no_grad():
        return x[:, :5] * x[:, 5:]


def one_without_grad(x):
    with torch.no_grad():
        left = x[:, :5].exp()
    return left * x[:, 5:]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :5].exp(),
        lambda x: (x[:, :5], x[:, 5:].exp()),
        lambda x: (x[:, :5].reshape(2, 2, 5), x[:, 5:].exp()),
        lambda x: x[:, ::2] * x[:, 1::2],
        lambda x: x[:, 0:4:2] * x[:, 4:8:2],
        lambda x: x.narrow(dim=1, start=0, length=5) * x.narrow(dim=1, start=5, length=5),
        lambda x: x[:2, :5] * x[2:, 5:],
        lambda x: x[:, [0, 1]] * x[:, [2, 3]],
        lambda x: x[None, :2] * x[None, 2:],
        lambda x: x[:, :0].sum() + x[:, 0:0].sum(),
        lambda x: x[:, :5] * x.detach()[:, 5:],
        lambda x: x.detach()[:, :5] * x.detach()[:, 5:],
        without_grad,
        one_without_grad,
    ],
)
def test_untouched(function):
    assert untouched(function, X)


@pytest.mark.parametrize("function", [grown, grown_whole, grown_view, written_in_the_middle])
def test_what_is_written_is_left_alone(function):
    # Of a tensor that is no leaf: eager code of such a kind fails otherwise.
    assert untouched(lambda x: function(x * 1), X)


def test_slices_among_modes_are_left_alone():
    def program(x):
        with torch.autograd.graph.save_on_cpu():
            left = x[:, :5].exp()
        return left * x[:, 5:]

    graph = traced(program, (X,)).graph
    assert lines(run(graph)) == lines(graph)


def test_hooked_slices_are_left_alone():
    model = OptimizedModule(hooked, on_untraceable="raise")
    torch.testing.assert_close(torch.autograd.grad(model(X).sum(), X), torch.autograd.grad(hooked(X).sum(), X))
    assert "split_with_sizes" not in model.code


def test_not_followed():
    assert untouched(lambda x: x[:, :5] * x[:, 5:], X.detach())


def test_unstamped_graphs_are_left_alone():
    graph = torch.fx.symbolic_trace(lambda x: x[:, :5] * x[:, 5:]).graph
    assert lines(run(graph)) == lines(graph)
    assert Writers(graph).none


def test_sizes_that_vary():
    model = OptimizedModule(lambda x: (x[:, :5] * x[:, 5:]).exp())
    for n in range(2, 12):
        x = tensor(n, 10)
        torch.testing.assert_close(
            torch.autograd.grad(model(x).sum(), x), torch.autograd.grad((x[:, :5] * x[:, 5:]).exp().sum(), x)
        )
    assert model.cache_info().misses < 5
    assert "split_with_sizes([5, 5], 1)" in model.code
    # Along a dimension of which no size is known slices stay.
    model = OptimizedModule(lambda x: (x[:2] * x[2:4]).exp())
    for n in range(5, 12):
        model(tensor(n, 10))
    assert model.cache_info().misses < 5
    assert "split_with_sizes" not in model.code


def test_second_derivatives():
    def program(x):
        return (x[:, :5].sin() * x[:, 5:].exp()).sum()

    results = []
    for function in (program, OptimizedModule(program)):
        (first,) = torch.autograd.grad(function(X), X, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), X)))
    torch.testing.assert_close(*results)


def test_gradients_of_some_pieces_only():
    def program(x):
        return x[:, :5].exp(), x[:, 5:].sin()

    gradients = []
    for function in (program, OptimizedModule(program)):
        gradients += torch.autograd.grad(function(X)[1].sum(), X)
    torch.testing.assert_close(*gradients)


@st.composite
def programs(draw):
    """Steps on a list of values that starts with a leaf and a tensor made of it."""
    steps = []
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["slice"] * 12 + ["view", "write", "new", "new", "no_grad", "keep"]))
        index = draw(
            st.sampled_from([slice(0, 2), slice(2, 4), slice(4, None), slice(-2, None), slice(1, 3), 0, 3, -1])
        )
        form = draw(st.sampled_from([(index,), (slice(None), index), (slice(None), index), (..., index)]))
        # Mostly the first two.
        number = draw(st.sampled_from([0, 1])) if kind == "slice" and draw(st.booleans()) else draw(st.integers(0, 20))
        steps.append((kind, number, form))
    return steps


def program_of(steps):
    def program(x):
        values, kept = [x, x.sin()], []
        for kind, number, index in steps:
            value = values[number % len(values)]
            try:
                if kind == "slice":
                    values.append(value[index])
                elif kind == "view":
                    values.append(value.reshape(-1) if number % 2 else value.unsqueeze(0))
                elif kind == "write":
                    # Not to the leaf, nor to what autograd keeps for another value.
                    if number % len(values) and value.numel():
                        value += 1
                elif kind == "new":
                    values.append(value * 2 if number % 2 else value + value)
                elif kind == "no_grad":
                    with torch.no_grad():
                        values.append(value[index] * 2)
                else:
                    kept.append(value)
            except IndexError:
                continue
        return (*kept, *(value.sum() for value in values[1:]))

    return program


@settings(deadline=None, max_examples=150)
@given(programs())
def test_random_programs(steps):
    program = program_of(steps)
    x = tensor(6, 7)
    try:
        program(x.detach().clone().requires_grad_())
    except RuntimeError:
        return
    check_pass(run, program, x)
