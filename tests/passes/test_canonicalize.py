"""Every form of einsum becomes one text."""

from __future__ import annotations

import pytest
import torch
from checks import check_pass
from torch import einsum, rand

from lazy_einsum.passes.canonicalize import canonicalize

run = canonicalize()
X, Y = rand(3, 4, dtype=torch.float64), rand(4, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: einsum("ij,jk->ik", x, y),
        lambda x, y: einsum(" i j , j k -> i k ", x, y),
        lambda x, y: einsum("ij,jk", x, y),
        lambda x, y: einsum("bA,Ac->bc", x, y),
        lambda x, y: einsum("...j,j...->...", x, y[:, :3]) if False else einsum("...j,jk->...k", x, y),
        lambda x, y: einsum("ij,jk->ik", [x, y]),
        lambda x, y: einsum("ij,jk->ik", (x, y)),
        lambda x, y: einsum(x, [0, 1], y, [1, 2], [0, 2]),
        lambda x, y: einsum(x, [0, 1], y, [1, 2]),
        lambda x, y: einsum(x, [..., 1], y, [1, 2], [..., 2]),
        lambda x, y: torch.tensordot(x, y, 1),
        lambda x, y: torch.tensordot(x, y, dims=1),
        lambda x, y: torch.tensordot(x, y, ([1], [0])),
        lambda x, y: torch.tensordot(x, y, dims=([-1], [0])),
    ],
)
def test_all_forms_of_a_matrix_product(call):
    (line, _) = check_pass(run, call, X, Y)
    assert line.endswith("einsum('ab,bc->ac', x0, x1)")


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ij->", [(3, 4)], "ab->"),
        ("ba", [(3, 4)], "ab->ba"),
        ("ii->i", [(3, 3)], "aa->a"),
        ("...ij->...ji", [(2, 3, 4)], "abc->acb"),
        ("i...,...->...", [(3, 2, 4), (4,)], "abc,c->bc"),
        (",->", [(), ()], ",->"),
        ("aB,Ba", [(3, 4), (4, 3)], "ab,ba->"),
        ("zZ", [(3, 4)], "ab->ba"),
    ],
)
def test_text(equation, shapes, expected):
    inputs = [rand(shape, dtype=torch.float64) for shape in shapes]
    line, _ = check_pass(run, lambda *operands: einsum(equation, *operands), *inputs)
    assert f"'{expected}'" in line


def test_names_and_users_stay():
    assert check_pass(run, lambda x: einsum("ij->ji", x).relu(), X) == [
        "einsum = einsum('ab->ba', x0)",
        "relu = einsum.relu()",
        "return relu",
    ]


def test_operands_of_two_dtypes_stay_as_they_are():
    line, _ = check_pass(run, lambda x, y: einsum("IJ,J->I J", x, y), X, torch.arange(4))
    assert "'IJ,J->I J'" in line


def test_a_tensordot_that_writes_its_result_elsewhere_stays():
    def program(x, y):
        out = torch.zeros(3, 5, dtype=x.dtype)
        torch.tensordot(x, y, 1, out=out)
        return out

    assert any("tensordot" in line for line in check_pass(run, program, X, Y))


def test_tensordot_of_everything_and_nothing():
    assert "'ab,ab->'" in check_pass(run, lambda x: torch.tensordot(x, x, 2), X)[0]
    assert "'ab,cd->abcd'" in check_pass(run, lambda x: torch.tensordot(x, x, 0), X)[0]
    assert "'ab,ba->'" in check_pass(run, lambda x, y: torch.tensordot(x, y, ([1, 0], [0, 1])), X, X.t().clone())[0]


def test_broadcast_tensordot():
    assert "'ab,bc->ac'" in check_pass(run, lambda x, y: torch.tensordot(x, y, 1), X[:, :1], Y)[0]


def test_an_operand_written_later_holds_an_einsum_under_autograd():
    def program(x, y):
        z = x * 2
        w = einsum("I J,J k->Ik", z, y)
        z.add_(1.0)
        return w

    assert "'I J,J k->Ik'" in check_pass(run, program, X.clone().requires_grad_(), Y)[1]
    assert "'ab,bc->ac'" in check_pass(run, program, X, Y)[1]
