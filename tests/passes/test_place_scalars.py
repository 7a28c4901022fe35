"""A factor goes where there is least to multiply."""

from __future__ import annotations

import torch
from checks import check_pass, lines, traced
from torch import einsum, rand

from lazy_einsum.passes.fuse_scalars import fuse_scalars
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.place_scalars import place_scalars

run = place_scalars()


def tensor(*shape):
    return rand(shape, dtype=torch.float64, requires_grad=True)


WIDE, TALL, THIRD = tensor(2, 100), tensor(100, 2), tensor(2, 100)


def test_on_the_small_intermediate():
    def program(x, y, z):
        return einsum("ij,jk->ik", einsum("ij,jk->ik", x, y), z) * 0.784

    assert check_pass(run, program, WIDE, TALL, THIRD) == [
        "einsum = einsum('ij,jk->ik', x0, x1)",
        "mul_1 = einsum.mul(0.784)",
        "einsum_1 = einsum('ij,jk->ik', mul_1, x2)",
        "return einsum_1",
    ]


def test_on_an_operand_in_the_form_it_was_written():
    found = check_pass(run, lambda q, k: einsum("id,jd->ij", q, k) / 3, tensor(4, 8), tensor(20, 8))
    assert found[0] == "div_1 = x0.div(3)"


def test_through_other_calls():
    def program(x, y):
        return -(x.t() @ y).sum(0)

    assert check_pass(run, program, tensor(2, 9), tensor(2, 30))[1:2] == ["neg_1 = neg(t)"]


def test_stays_where_it_is_when_nothing_is_smaller():
    for program in (
        lambda x: einsum("ij->i", x) * 2,
        lambda x: einsum("ij->ji", x) * 2,
        lambda x: x.exp() * 2,
    ):
        assert check_pass(run, program, WIDE) == lines(traced(program, (WIDE,)).graph)


def test_a_numerator_takes_it_for_nothing():
    assert check_pass(run, lambda x: 3 * (5 / x), WIDE)[0] == "truediv = truediv(15, x0)"


def test_a_value_with_two_uses_is_not_scaled():
    def program(x, y):
        z = einsum("ij,kj->ik", x, y)
        return z * 2, z

    assert check_pass(run, program, tensor(50, 2), tensor(50, 2)) == lines(
        traced(program, (tensor(50, 2), tensor(50, 2))).graph
    )


def test_an_operand_that_occurs_twice_is_scaled_once():
    found = check_pass(run, lambda x: einsum("ij,kj->ik", x, x) * 2.0, tensor(50, 2))
    assert found[-2].endswith("einsum('ij,kj->ik', mul_1, x0)")


def test_not_past_a_write_or_a_mode():
    def written(x):
        z = einsum("ij,kj->ik", x, x)
        z.add_(1.0)
        return z * 2.0

    def mode(x):
        z = einsum("ij,kj->ik", x, x)
        with torch.no_grad():
            return z * 2.0

    for program in (written, mode):
        x = tensor(50, 2)
        assert check_pass(run, program, x) == lines(traced(program, (x,)).graph)


def test_integers_and_half():
    x = torch.arange(100).reshape(50, 2)
    assert check_pass(run, lambda x: einsum("ij,kj->ik", x, x) * 3, x)[0] == "mul_1 = x0.mul(3)"
    half = lambda x: einsum("ij,kj->ik", x, x) * 3  # noqa: E731
    assert check_pass(run, half, x.half()) == lines(traced(half, (x.half(),)).graph)
    for division in (lambda x: einsum("ij,kj->ik", x, x) / 3, lambda x: einsum("ij,kj->ik", x, x) * 0.5):
        assert check_pass(run, division, x) == lines(traced(division, (x,)).graph)


def test_gathering_and_placing_twice_changes_nothing_more():
    def program(x, y, z):
        return 3 * einsum("ij,jk->ik", einsum("ij,jk->ik", x / 2, y), 4.0 * z)

    def both(graph):
        return run(fuse_scalars()(graph))

    assert check_pass(both, program, WIDE, TALL, THIRD)[1].endswith("(einsum, 6.0)")


def test_views_on_the_way_become_views_of_what_is_scaled():
    def program(x, y):
        z = einsum("i,j->ij", x, y).t() * 2.0
        z.add_(1.0)
        return z, x

    found = check_pass(run, program, tensor(3), tensor(40))
    assert found[0] == "mul_1 = x0.mul(2.0)"


def test_not_where_a_view_with_gaps_would_take_the_place_of_a_dense_result():
    def program(x, y):
        return -einsum("i,j->ij", x, y).diagonal(), (x * 3.0).expand(50, 50).mul(0.5)

    check_pass(run, program, tensor(50), tensor(50))
    check_pass(lambda graph: run(fuse_scalars()(graph)), program, tensor(50), tensor(50))
    check_pass(lambda graph: lower()(run(fuse_scalars()(graph))), program, tensor(50), tensor(50))
