"""Products are distributed over sums with a product for a term where that pays, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import check_pass, lines, traced
from fuzzer import every_network
from torch import einsum, rand

from lazy_einsum.passes.canonicalize import canonicalize
from lazy_einsum.passes.choose_paths import choose_paths
from lazy_einsum.passes.distribute import distribute
from lazy_einsum.passes.fuse_einsums import fuse_einsums
from lazy_einsum.passes.fuse_scalars import fuse_scalars
from lazy_einsum.passes.join_products import join_products
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.place_scalars import place_scalars

run = distribute()


def tensor(*shape, dtype=torch.float64):
    return (rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(dtype.is_floating_point)


X, W, UP, DOWN, BIAS = tensor(4, 300), tensor(320, 300), tensor(320, 2), tensor(2, 300), tensor(320)
ALL = X, W, UP, DOWN, BIAS


def planned(graph):
    passes = canonicalize(), fuse_scalars(), run, join_products(), fuse_einsums(), choose_paths(), place_scalars()
    for pass_ in (*passes, lower()):
        graph = pass_(graph)
    return graph


def untouched(function, *inputs):
    """Whether the pass leaves the program to the letter."""
    return check_pass(run, function, *inputs) == lines(traced(function, inputs).graph)


def test_a_low_rank_update_of_a_weight():
    assert check_pass(run, lambda x, w, b, a, bias: F.linear(x, w + 0.5 * (b @ a), bias), *ALL) == [
        "linear_1 = linear(x0, x1, x4)",
        "einsum = einsum('ab,cd,db->ac', x0, x2, x3)",
        "linear = add(linear_1, einsum, alpha=0.5)",
        "return linear",
    ]


def test_the_calls_of_one():
    found = check_pass(planned, lambda x, w, b, a, bias: x @ (w + b @ a / 4).T, *ALL)
    assert sum(".mm(" in line for line in found) == 2
    assert sum(".matmul(" in line for line in found) == 1
    assert found[-2].endswith("alpha=0.25)")


@pytest.mark.parametrize(
    "program",
    [
        lambda x, w, b, a, bias: x @ (w + b @ a).T,
        lambda x, w, b, a, bias: x @ (b @ a + w).mT,
        lambda x, w, b, a, bias: x @ (w - b @ a).t(),
        lambda x, w, b, a, bias: (w + b @ a) @ x.T,
        lambda x, w, b, a, bias: torch.add(w, b @ a, alpha=3) @ x[0],
        lambda x, w, b, a, bias: F.linear(x, w.add(-(b @ a))),
        lambda x, w, b, a, bias: F.linear(x, w + 2 * (b @ a) / 5, bias),
        lambda x, w, b, a, bias: einsum("bi,oi->bo", x, w + einsum("or,ri->oi", b, a)),
        lambda x, w, b, a, bias: torch.addmm(bias, x, (w.T + a.T @ b.T)),
        lambda x, w, b, a, bias: F.linear(x.expand(3, 4, 300), w + b @ a, bias),
        lambda x, w, b, a, bias: x @ (w + b @ a + (b * 2) @ a.relu()).T,
    ],
)
def test_forms(program):
    found = check_pass(run, program, *ALL)
    assert any("einsum('a" in line and line.count(",") > 3 for line in found)
    check_pass(planned, program, *ALL)


def test_two_products():
    found = check_pass(run, lambda x, w, b, a, bias: (b @ a + b.relu() @ a.relu()) @ x.T, *ALL)
    assert [line.split(" = ")[1].split("(")[0] for line in found[-4:-1]] == ["matmul.matmul", "einsum", "add"]


def test_a_gradient_of_the_term_only():
    inputs = [x.detach().requires_grad_(x is UP or x is DOWN) for x in ALL]
    assert len(check_pass(run, lambda x, w, b, a, bias: F.linear(x, w + b @ a, bias), *inputs)) == 4


@pytest.mark.parametrize(
    "program",
    [
        # A value that others use too.
        lambda x, w, b, a, bias: (F.linear(x, s := w + b @ a), s),
        lambda x, w, b, a, bias: (F.linear(x, w + (d := b @ a)), d),
        lambda x, w, b, a, bias: F.linear(x, w + (d := b @ a) + d),
        # Terms that are no products, that are added to themselves, or that broadcast.
        lambda x, w, b, a, bias: F.linear(x, w + w),
        lambda x, w, b, a, bias: F.linear(x, w + bias[:, None]),
        lambda x, w, b, a, bias: F.linear(x, w + (b @ a)[:1]),
        lambda x, w, b, a, bias: F.linear(x, w * (b @ a)),
        lambda x, w, b, a, bias: F.linear(x, (w + b @ a).relu()),
        lambda x, w, b, a, bias: F.linear(x, b @ a - w),
        lambda x, w, b, a, bias: F.linear(x, torch.add(b @ a, w, alpha=2)),
        # A term with a bias of its own.
        lambda x, w, b, a, bias: F.linear(x, w + F.linear(b, a.T, a[0])),
        # Nothing is gained.
        lambda x, w, b, a, bias: F.linear(x, w) + x @ a.T @ b.T,
        lambda x, w, b, a, bias: F.linear(x.repeat(2000, 1), w + b @ a),
    ],
)
def test_what_stays(program):
    assert untouched(program, *ALL)


def test_no_diagonal_is_taken_of_what_broadcasts():
    def program(w, x, y, v):
        return einsum("ii,i->i", w + x * y, v)

    with every_network():
        assert untouched(program, tensor(3, 3), tensor(3, 1), tensor(1, 3), tensor(3))


def test_not_past_writes():
    def to_a_leaf(x, w, b, a):
        s = w + b @ a
        b.add_(1.0)
        return F.linear(x, s)

    def to_the_sum(x, w, b, a):
        s = w + b @ a
        s.add_(1.0)
        return F.linear(x, s)

    def between(x, w, b, a):
        w = w * 1.0
        s = w + b @ a
        w.zero_()
        return F.linear(x, s)

    inputs = [x.detach() for x in (X, W, UP, DOWN)]
    for program in (to_a_leaf, to_the_sum, between):
        assert untouched(program, *inputs)


def test_not_out_of_a_region_without_grad():
    def program(x, w, b, a):
        with torch.no_grad():
            s = w + b @ a
        return F.linear(x, s)

    assert untouched(program, X, W, UP, DOWN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_coarse_types_and_integers_stay(dtype):
    inputs = [x.detach().to(dtype) for x in (X, W, UP, DOWN)]
    graph = traced(lambda x, w, b, a: x @ (w + b @ a).T, inputs).graph
    assert lines(run(graph)) == lines(graph)
    if dtype.is_floating_point:
        assert lines(distribute(reassociate=True)(graph)) != lines(graph)
    single = traced(lambda x, w, b, a: x @ (w + b @ a).T, [x.detach() for x in (X, W, UP, DOWN)]).graph
    assert lines(distribute(reassociate=False)(single)) == lines(single)


def test_a_memory_limit_that_the_terms_do_not_keep():
    graph = traced(lambda x, w, b, a: F.linear(x, w + b @ a), (X, W, UP, DOWN)).graph
    assert lines(distribute(memory_limit=7 * 8)(graph)) == lines(graph)
    assert lines(distribute(memory_limit=8 * 8)(graph)) != lines(graph)


def test_a_factor_that_does_not_fit():
    assert untouched(lambda x, w, b, a, bias: F.linear(x, w + (b @ a) * 1e-200), *ALL)


def test_small_ones_too():
    def program(x, w, b, a):
        return F.linear(x, w + b @ a)

    small = tensor(2, 3), tensor(4, 3), tensor(4, 2), tensor(2, 3)
    assert untouched(program, *small)
    with every_network():
        assert len(check_pass(run, program, *small)) == 4
