"""Numbers are gathered by degree, and only where that changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from checks import check_pass, lines, traced
from torch import einsum, fx, rand

from lazy_einsum.passes.fuse_scalars import fuse_scalars

run = fuse_scalars()
X, Y = rand(3, 4, dtype=torch.float64) + 1, rand(4, 5, dtype=torch.float64) + 1
N, M = torch.arange(12).reshape(3, 4), torch.arange(20).reshape(4, 5)


def calls(function, *inputs):
    return check_pass(run, function, *inputs)[:-1]


def numbers(found):
    """The Python numbers in lines of code, in order."""
    pattern = r"(?<![\w.'])-?\d+\.?\d*(?:e-?\d+)?(?![\w'])"
    import re

    return [eval(text) for line in found for text in re.findall(pattern, line.split(" = ", 1)[1])]


def test_one_number_is_left_at_the_end():
    def program(x, y):
        return 4.0 * einsum("ij,jk->ik", x / 2, 3.0 * y)

    assert calls(program, X, Y) == ["einsum = einsum('ij,jk->ik', x0, x1)", "mul = mul(einsum, 6.0)"]


@pytest.mark.parametrize(
    ("program", "factor"),
    [
        (lambda x, y: einsum("ij,jk->ik", 2.0 * x, y), 2.0),
        (lambda x, y: einsum("ij,ik->jk", 2.0 * x, 3.0 * x), 6.0),
        (lambda x, y: -einsum("ij,jk->ik", -2.0 * x, y), 2.0),
        (lambda x, y: (2.0 * x) @ y / 4, 0.5),
        (lambda x, y: torch.mm(x * 8, y.mul(0.25)), 2.0),
        (lambda x, y: torch.tensordot(x / 4, y, 1) * 2, 0.5),
        (lambda x, y: torch.nn.functional.linear(x / 4, y.T) * 2, 0.5),
        (lambda x, y: torch.nn.functional.linear(input=x / 4, weight=y.T * 2, bias=None), 0.5),
        (lambda x, y: (2.0 * x).t().T.permute(1, 0).sum(0) * 3, 6.0),
        (lambda x, y: torch.div(torch.mul(x, 6), 2), 3.0),
        (lambda x, y: x.multiply(6).true_divide(4), 1.5),
        (lambda x, y: (x * 2.0) * (x / 4), 0.5),
        (lambda x, y: x / (2.0 * (x + 1)), 0.5),
        (lambda x, y: (6 * x) / (2.0 * (x + 1)), 3.0),
        (lambda x, y: torch.negative(x) * 2, -2),
    ],
)
def test_every_spelling(program, factor):
    found = calls(program, X, Y)
    assert numbers(found)[-1:] == [factor] or f"{factor}" in found[-1]
    assert sum(" mul(" in line or ".mul(" in line for line in found if "x0, x0" not in line) <= 2


def twice(operation):
    def program(x):
        z = 2.0 * x
        return operation(z)

    return program


@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        (lambda z: z * z, 4.0),
        (lambda z: einsum("ij,ik->jk", z, z), 4.0),
        (lambda z: einsum("ij,ij,ij->i", z, z, z), 8.0),
        (lambda z: (z * z) / 4.0, 1.0),
    ],
)
def test_a_value_used_twice_by_one_call_counts_twice(operation, factor):
    found = calls(twice(operation), X)
    assert numbers(found) in ([factor], [])


def test_a_quotient_of_one_value():
    assert numbers(calls(twice(lambda z: (z / z) * 3.0), X)) == [3.0]


def test_a_denominator_divides():
    assert calls(lambda x: 5.0 / (2.0 * x), X) == ["truediv = truediv(2.5, x0)"]
    product = calls(lambda x, y: einsum("ij,jk->ik", x, y) / (2.0 * einsum("ij,jk->ik", x, y + 0)), X, Y)
    assert numbers(product)[-1] == 0.5


def test_a_value_used_elsewhere_too_keeps_its_factor():
    def by_two(x, y):
        z = 3 * einsum("ij,jk->ik", x, y) / 4.0
        return 2.0 * einsum("ik,ij->i", z, x) + z[:, 0]

    assert numbers(calls(by_two, X, Y))[:1] == [0.75]

    def chain_meets_chain(a, b, c):
        p = 3.0 * c
        w = 2.0 * a
        z = einsum("ij,jk->ik", w, b)
        q = p * z
        return q + z

    check_pass(run, chain_meets_chain, X, Y, rand(3, 5, dtype=torch.float64))


def test_not_past_anything_that_is_not_linear():
    for program in (
        lambda x: (2.0 * x).exp() * 3.0,
        lambda x: (2.0 * x + 1.0) * 3.0,
        lambda x: torch.cat([2.0 * x, x]) * 3.0,
        lambda x: (2.0 * x) ** 2 * 3.0,
        lambda x: (x * 7).div(2.0, rounding_mode="floor") * 3.0,
        lambda x: (2.0 * x).float() * 3.0,
        lambda x: (2.0 * x).sum(dtype=torch.float32) * 3.0,
    ):
        assert check_pass(run, program, X) == lines(traced(program, (X,)).graph)


def test_a_lone_number_stays_as_it_was_written():
    for program in (lambda x: x / 3, lambda x: 3 / x, lambda x: -x, lambda x: torch.mul(x, 2), lambda x: x * 1):
        assert check_pass(run, program, X) == lines(traced(program, (X,)).graph)


def test_not_past_a_write():
    def unscaled_value_is_written(x, y):
        z = 2.0 * x
        x.add_(1.0)
        return einsum("ij,jk->ik", z, y)

    def scaled_value_is_written(x, y):
        z = 2.0 * x
        z.add_(1.0)
        return 3.0 * z

    def through_a_view(x, y):
        z = 2.0 * x
        x[0].mul_(5.0)
        return 3.0 * z

    def the_input_is_scaled_in_place(x, y):
        x *= 3.0
        return einsum("ij,ij->i", x, x)

    for program in (unscaled_value_is_written, scaled_value_is_written, through_a_view, the_input_is_scaled_in_place):
        assert check_pass(run, program, X, Y) == lines(traced(program, (X, Y)).graph)


def test_not_where_a_later_write_would_spoil_the_backward_pass():
    def program(x, y):
        base = x + 1.0
        z = 2.0 * base
        w = einsum("ij,jk->ik", z, y)
        base.mul_(5.0)
        return w * 3.0

    y = Y.clone().requires_grad_()
    assert check_pass(run, program, X, y) == lines(traced(program, (X, y)).graph)


def test_not_into_another_grad_mode():
    def program(x, y):
        with torch.no_grad():
            z = 2.0 * x
        return einsum("ij,jk->ik", z, y) * 3.0

    check_pass(run, program, X.clone().requires_grad_(), Y)

    def cancels(x, y):
        z = x * x
        with torch.no_grad():
            w = -(-1 * z)
        return einsum("ij,jk->ik", w, y)

    check_pass(run, cancels, X.clone().requires_grad_(), Y)


def test_what_is_fresh_stays_fresh():
    def program(x):
        return (x * 2) * 0.5

    assert calls(program, X) == ["mul = mul(x0, 1.0)"]
    assert numbers(calls(lambda x: einsum("ij->ji", x) * 2 * 0.5, X)) == [1.0]
    # A result that nobody else sees needs no copy.
    assert calls(lambda x, y: einsum("ij,jk->ik", 2.0 * x, y) * 0.5, X, Y) == ["einsum = einsum('ij,jk->ik', x0, x1)"]


def test_integers_stay_exact():
    large = torch.tensor([[2**55 + 1, 3], [5, 7]])
    assert calls(lambda x: 2 * (3 * x), large) == ["mul = mul(x0, 6)"]
    assert numbers(calls(lambda x, y: -2 * einsum("ij,jk->ik", 3 * x, y), N, M)) == [-6]
    # A product that does not fit, and a division, stay where they are.
    for program in (lambda x: 2**40 * (2**40 * x), lambda x: 3 * (x / 2), lambda x: 2.0 * (3 * x)):
        check_pass(run, program, large)
    narrow = torch.arange(4, dtype=torch.uint8)
    check_pass(run, lambda x: 100 * (2 * x), narrow)
    check_pass(run, lambda x: 100 * (-x), narrow)


def test_numbers_that_change_the_dtype_stay():
    for program in (lambda x: (2j * x) * 3.0, lambda x: 3.0 * (2j * einsum("ij->ji", x)), lambda x: (x * 2.5) * 2):
        check_pass(run, program, X)
    check_pass(run, lambda x: (x * 2.5) * 2, N)
    check_pass(run, lambda x: (x * True) * 2 * 3, torch.ones(3, dtype=torch.bool))
    z = rand(3, 4, dtype=torch.complex128)
    assert len(calls(lambda z: 2j * einsum("ij->i", 3j * z), z)) == 2


def test_zero_infinity_and_nan_stay():
    for number in (0.0, 0, math.inf, math.nan):
        found = check_pass(run, lambda x, number=number: x * number * 2.0, X)
        assert len(found) == 3
    assert len(check_pass(run, lambda x: (x / 0.0) * 2.0, X)) == 3


def test_the_range_of_the_dtype_is_kept():
    x, y = torch.full((2, 64), 200.0).half(), torch.full((64, 2), 200.0).half()
    half = lambda x, y: einsum("ij,jk->ik", x / 1000.0, y) * 2.0  # noqa: E731
    assert check_pass(run, half, x, y) == lines(traced(half, (x, y)).graph)
    assert len(lines(fuse_scalars(True)(traced(lambda x, y: einsum("ij,jk->ik", x / 10, y) * 2.0, (x, y)).graph))) == 3

    x = torch.full((2, 2), 1e25)
    single = lambda x: einsum("ij,jk->ik", x * 1e-25, x * 1e-25)  # noqa: E731
    assert check_pass(run, single, x) == lines(traced(single, (x,)).graph)
    # Each alone may move, together they may not.
    both = lambda x: einsum("ij,jk->ik", x * 1e-8, x / 1e8) * 1e4  # noqa: E731
    assert check_pass(run, both, x) == lines(traced(both, (x,)).graph)


def test_arithmetic_on_sizes_is_none_on_tensors():
    graph = fx.symbolic_trace(lambda x: x.reshape(x.shape[0] * 2 * 2, -1) * 3.0 * 2.0).graph
    found = lines(run(graph))
    assert "mul = mul(getitem, 2)" in found
    assert found[-2].endswith("mul(reshape, 6.0)")


def test_without_facts():
    def program(x, y):
        return math.pi * einsum("ij,jk->ik", x, math.e * y / 3) / 2

    graph = run(fx.symbolic_trace(program).graph)
    assert len(graph.nodes) == 5
    assert list(graph.nodes)[3].args[1] == pytest.approx(math.pi * math.e / 6)
    written = fx.symbolic_trace(lambda x: (x.clone().mul_(4.0) * 2.0) * 3.0).graph
    assert len(run(written).nodes) == 5


def test_nothing_moves_when_reassociation_is_refused():
    graph = traced(lambda x: 2.0 * (3.0 * x), (X,)).graph
    assert lines(fuse_scalars(False)(graph)) == lines(graph)
