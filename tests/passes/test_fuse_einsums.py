"""Einsums that feed each other become one, where that changes nothing."""

from __future__ import annotations

import pytest
import torch
from checks import check_pass, specs, traced
from torch import einsum, fx, rand

from lazy_einsum.errors import EquationError
from lazy_einsum.passes.fuse_einsums import fuse_einsums

run = fuse_einsums()
X, Y = rand(3, 4, dtype=torch.float64), rand(4, 5, dtype=torch.float64)


def fused(function, *inputs):
    return [line.split("'")[1] for line in check_pass(run, function, *inputs) if "einsum(" in line]


def test_a_chain_becomes_one():
    def chain(a, b, c, d):
        ab = einsum("ij,jk->ik", a, b)
        abc = einsum("ab,bc->ac", ab, c)
        return einsum("tr,ry->yt", abc, d)

    inputs = [rand(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert fused(chain, *inputs) == ["ab,bc,cd,de->ea"]


def test_both_operands_at_once():
    assert fused(lambda x, y: einsum("ik,ik->i", einsum("ij,jk->ik", x, y), einsum("ij,jk->ik", x, y)), X, Y) == [
        "ab,bc,ad,dc->a"
    ]


def test_a_view_is_inlined_and_a_view_of_a_view_stays_one():
    assert fused(lambda x: einsum("ab->ba", einsum("ij->ji", x)), X) == ["ab->ab"]
    assert fused(lambda x: einsum("a->", einsum("ii->i", x)), X[:, :3].clone()) == ["aa->"]


def test_the_diagonal_of_a_product():
    assert fused(lambda x, y: einsum("ii->i", einsum("ij,jk->ik", x, y)), X, Y[:, :3]) == ["ab,ba->a"]


def test_the_diagonal_of_what_was_broadcast_stays():
    def program(x, y):
        return einsum("ii->i", einsum("ij,ij->ij", x, y))

    assert fused(program, rand(3, 1, dtype=torch.float64), rand(1, 3, dtype=torch.float64)) == ["ij,ij->ij", "ii->i"]


def test_broadcast_operands():
    def program(x, y, z):
        return einsum("ik,kl->il", einsum("ij,jk->ik", x, y), z)

    one = rand(3, 1, dtype=torch.float64), rand(4, 1, dtype=torch.float64), rand(6, 2, dtype=torch.float64)
    assert fused(program, *one) == ["ab,bc,cd->ad"]


def test_no_elements():
    assert fused(lambda x, y: einsum("ik->i", einsum("ij,jk->ik", x, y)), X[:, :0], Y[:0]) == ["ab,bc->a"]


def test_a_value_with_two_uses_stays():
    def twice_by_one(x, y):
        z = einsum("ij,jk->ik", x, y)
        return einsum("ik,ik->i", z, z)

    def by_two(x, y):
        z = einsum("ij,jk->ik", x, y)
        return einsum("ik->i", z), z.relu()

    def returned(x, y):
        z = einsum("ij,jk->ik", x, y)
        return z, einsum("ik->i", z)

    for program in (twice_by_one, by_two, returned):
        assert len(fused(program, X, Y)) == 2


def test_not_past_a_write_to_an_operand():
    def program(x, y):
        z = einsum("ij,jk->ik", x, y)
        x.add_(1.0)
        return einsum("ik,ij->i", z, x)

    assert len(fused(program, X, Y)) == 2


def test_not_past_a_write_to_a_view_of_an_operand():
    def program(x, y):
        row = x[0]
        z = einsum("ij,jk->ik", x, y)
        row.mul_(2.0)
        return einsum("ik->i", z)

    assert len(fused(program, X, Y)) == 2


def test_past_a_write_to_other_memory():
    def program(x, y):
        other = torch.zeros(3)
        z = einsum("ij,jk->ik", x, y)
        other.add_(1.0)
        return einsum("ik->i", z), other

    assert fused(program, X, Y) == ["ab,bc->a"]


def test_not_where_a_later_write_would_spoil_the_backward_pass():
    def program(x, y, w):
        y = y * 1.5
        z = einsum("ij,jk->ik", x, y)
        out = einsum("ik,kl->il", z, w)
        y.add_(1.0)
        return out

    w = rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert len(fused(program, X, Y, w)) == 2
    assert fused(program, X, Y, w.detach()) == ["ab,bc,cd->ad"]


def test_not_into_another_grad_mode():
    def program(x, y):
        with torch.no_grad():
            z = einsum("ij,jk->ik", x, y)
        return einsum("ik,ij->i", z, x)

    assert len(fused(program, X.clone().requires_grad_(), Y)) == 2


def test_within_one_region_without_grad():
    def program(x, y):
        with torch.no_grad():
            z = einsum("ik->i", einsum("ij,jk->ik", x, y))
        return z * x[:, 0]

    assert fused(program, X.clone().requires_grad_(), Y) == ["ab,bc->a"]


def test_float16_only_when_allowed():
    def program(x, y):
        return einsum("ik->i", einsum("ij,jk->ik", x, y))

    half = X.half(), Y.half()
    assert len(specs(run(traced(program, half).graph))) == 2
    assert len(specs(fuse_einsums(True)(traced(program, half).graph))) == 1
    assert len(specs(fuse_einsums(False)(traced(program, (X, Y)).graph))) == 2


def test_integers_wrap_as_before():
    large = torch.full((3, 4), 2**31 + 7), torch.full((4, 5), 2**33 + 1)
    assert fused(lambda x, y: einsum("ik,ij->i", einsum("ij,jk->ik", x, y), x), *large) == ["ab,bc,ad->a"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_narrow_integers_stay(dtype):
    x = torch.ones(3, 4, dtype=dtype)
    assert len(fused(lambda x: einsum("i,j->ij", einsum("ij->i", x), einsum("ij->j", x)), x)) == 3


def test_too_many_labels_stop_it():
    def program(x, y, one):
        inner = einsum("ax,xb->ab", x, y)
        return einsum("ab," + ",".join("cdefghijklmnopqrstuvwxyz") + "->a", inner, *[one] * 24)

    def many(a, b):
        left = einsum("abcdefghijklmnopqrstuvwxyz,abcdefghijklmnopqrstuvwxyA->zA", a, a)
        return einsum("zA,abcdefghijklmnopqrstuvwxyz,abcdefghijklmnopqrstuvwxyA->", left, b, b)

    ones = rand(3, 3, dtype=torch.float64), rand(3, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert len(fused(program, *ones)) == 1
    full = torch.full((1,) * 26, 2.0, dtype=torch.float64)
    # 26 + 2 labels inside, 27 outside: 53 together.
    assert len(specs(run(traced(many, (full, full)).graph))) == (1 if 27 + 25 <= 52 else 2)


def test_without_facts_only_what_is_fused_changes():
    def program(x, y):
        z = einsum("ij, jk -> ik", x, y)
        alone = einsum("pq->qp", x)
        return einsum("Ik,Ij->I", z, x), alone

    graph = run(fx.symbolic_trace(program).graph)
    assert specs(graph) == ["pq->qp", "ab,bc,ad->a"]


def test_without_facts_an_ellipsis_stays():
    graph = run(fx.symbolic_trace(lambda x, y: einsum("...k->...", einsum("...j,jk->...k", x, y))).graph)
    assert specs(graph) == ["...j,jk->...k", "...k->..."]


def test_ranks_that_do_not_fit_are_named():
    graph = fx.symbolic_trace(lambda x, y: einsum("i,ij->i", einsum("ij,jk->ik", x, y), x)).graph
    with pytest.raises(EquationError, match=r"gives 2 dimensions; expected 1"):
        run(graph)
