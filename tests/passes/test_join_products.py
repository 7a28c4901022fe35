"""Products join a network where another order of contraction pays; all others stay what the user wrote."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import check_pass, lines, traced
from fuzzer import every_network
from torch import einsum, rand

from lazy_einsum import OptimizedModule
from lazy_einsum.passes.canonicalize import canonicalize
from lazy_einsum.passes.choose_paths import choose_paths
from lazy_einsum.passes.fuse_einsums import fuse_einsums
from lazy_einsum.passes.fuse_scalars import fuse_scalars
from lazy_einsum.passes.join_products import join_products
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.place_scalars import place_scalars

run = join_products()
N = 120


def tensor(*shape, grad=True, dtype=torch.float64):
    return (rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(grad)


A, B, C, V = tensor(N, N), tensor(N, N), tensor(N, N), tensor(N)


def joined(function, *inputs, pass_=run):
    """The equations after the pass."""
    return [line.split("'")[1] for line in check_pass(pass_, function, *inputs) if "einsum(" in line]


def forced(function, *inputs):
    """The equations after the pass, were it always to pay."""
    with every_network():
        return joined(function, *inputs)


def planned(graph):
    for pass_ in (canonicalize(), fuse_scalars(), run, fuse_einsums(), choose_paths(), place_scalars(), lower()):
        graph = pass_(graph)
    return graph


def untouched(function, *inputs):
    """Whether the pass leaves the program to the letter."""
    return check_pass(run, function, *inputs) == lines(traced(function, inputs).graph)


def test_a_chain_that_ends_in_a_vector():
    assert joined(lambda a, b, c, v: (a @ b @ c) @ v, A, B, C, V) == ["ab,bc->ac", "ab,bc->ac", "ab,b->a"]


@pytest.mark.parametrize(
    ("program", "equations"),
    [
        (lambda a, b: (a[:, :, None] * b).sum(1), ["ab,bc->abc", "abc->ac"]),
        (lambda a, b: (a.unsqueeze(1) * b[None]).sum(dim=-1), ["ab,cb->acb", "abc->ab"]),
        (lambda a, b: (a @ b).diagonal(), ["ab,bc->ac", "aa->a"]),
        (lambda a, b: (a @ b).trace(), ["ab,bc->ac", "aa->"]),
        (lambda a, b: (a @ b).sum(0), ["ab,bc->ac", "ab->b"]),
        (lambda a, b: ((a @ b) * a).sum() * 2, []),  # no order takes fewer products
        (lambda a, b: (a * b).sum(-1), []),  # a batch of dot products
        (lambda a, b: (a * b.T).sum(), []),
        (lambda a, b: (a[:, :, None] * b).sum(1, keepdim=True), []),
        (lambda a, b: (a[:, :, None] * b).exp().sum(1), []),
    ],
)
def test_products_element_by_element_and_sums(program, equations):
    assert joined(program, A, B) == equations


def test_a_batch_of_dot_products_is_left_alone():
    rows = tensor(20_000, 16, dtype=torch.float32), tensor(20_000, 16, dtype=torch.float32)
    assert untouched(lambda a, b: (a * b).sum(-1), *rows)


def test_a_view_that_has_a_hook_is_not_passed_by():
    def program(a, b):
        view = a[:, :, None]
        early = (view * b).sum(1)
        view.register_hook(lambda gradient: gradient * 5)
        return early

    with every_network():
        wrapped = OptimizedModule(program, on_untraceable="raise")
        ours, theirs = (torch.autograd.grad(run(A, B).sum(), A)[0] for run in (wrapped, program))
    torch.testing.assert_close(ours, theirs)


def test_a_view_that_adds_dimensions_goes_with_its_only_use():
    def program(a, b):
        return (a[:, :, None] * b).sum(1)

    assert lines(planned(traced(program, (A, B)).graph)) == ["mm = x0.mm(x1)", "return mm"]

    def kept(a, b):
        view = a[:, :, None]
        return view, (view * b).sum(1), (b[None] * b.unsqueeze(0).mul_(2)).sum(1)

    check_pass(planned, kept, A, tensor(N, N, grad=False))


def test_its_calls():
    def program(a, b, c, v):
        return (a @ b @ c) @ v

    assert lines(planned(traced(program, (A, B, C, V)).graph)) == [
        "mv = x2.mv(x3)",
        "mv_1 = x1.mv(mv)",
        "mv_2 = x0.mv(mv_1)",
        "return mv_2",
    ]
    check_pass(planned, program, A, B, C, V)


@pytest.mark.parametrize(
    "program",
    [
        lambda a, b, c, v: a @ (b @ (c @ v)),
        lambda a, b, c, v: v @ a @ b @ c,
        lambda a, b, c, v: F.linear(v, a, v) @ b,
        lambda a, b, c, v: (a @ b, c @ v),
        lambda a, b, c, v: a @ b.T,
        lambda a, b, c, v: torch.addmm(v, a, b),
        lambda a, b, c, v: (a @ b).relu() @ v,
        lambda a, b, c, v: torch.linalg.multi_dot([a, b, c, v]),
        lambda a, b, c, v: (a.T, b.movedim(0, 1)),
    ],
)
def test_what_is_in_the_best_order_already_stays(program):
    assert untouched(program, A, B, C, V)


def test_a_small_gain_is_none():
    small = [tensor(3, 3) for _ in range(3)]
    assert untouched(lambda a, b, c, v: (a @ b @ c) @ v, *small, tensor(3))


def test_a_thin_matrix_in_the_middle():
    def program(x, down, up):
        return x @ (down @ up)

    assert joined(program, tensor(4, 200), tensor(200, 2), tensor(2, 200)) == ["ab,bc->ac", "ab,bc->ac"]


def test_turned_operands_join_and_turned_results_stay_views():
    assert joined(lambda a, b, c, v: ((a @ b).mT @ c.T @ v).mT, A, B, C, tensor(N, 1)) == [
        "ab,bc->ac",
        "ab->ba",
        "ab->ba",
        "ab,bc->ac",
        "ab,bc->ac",
    ]
    found = check_pass(run, lambda a, b, v: (a @ b @ v).T, A, B, tensor(N, 1))
    assert any("getattr" in line for line in found)


def test_a_bias_is_added_behind():
    found = check_pass(run, lambda x, a, b, w, bias: F.linear(x @ (a @ b), w, bias), V, A, B, C, tensor(N))
    assert sum("einsum(" in line for line in found) == 3
    assert found[-2].startswith("linear = add(einsum")


@pytest.mark.parametrize(
    "program",
    [
        lambda x, a, b, c: torch.addmm(c, a @ b, x),
        lambda x, a, b, c: torch.baddbmm(c, a[None] @ b[None], x[None]),
        lambda x, a, b, c: torch.addmv(c[0], a @ b, x[:, 0]),
    ],
)
def test_what_other_calls_add(program):
    found = check_pass(run, program, tensor(N, 1), A, B, C[:, :1])
    assert any("= add(einsum" in line for line in found)


def test_what_is_added_in_the_middle_ends_the_network():
    def program(x, w1, b1, w2, w3):
        return F.linear(F.linear(x, w1, b1), w2) @ w3

    assert forced(program, A, B, V, C, tensor(N, N)) == ["ab,cb->ac", "ab,bc->ac"]


def test_einsums_and_products_join_each_other():
    def program(a, b, c, v):
        return einsum("ij,j->i", einsum("ij,jk->ik", a @ b, c), v)

    assert joined(program, A, B, C, V) == ["ab,bc->ac", "ij,jk->ik", "ij,j->i"]


def test_einsums_alone_are_the_next_pass_s():
    def program(a, b, c, v):
        return einsum("ij,j->i", einsum("ij,jk->ik", einsum("ij,jk->ik", a, b), c), v)

    assert untouched(program, A, B, C, V)


def test_a_value_with_two_uses_ends_a_network():
    def program(a, b, c, v):
        ab = a @ b
        return ab @ c @ v, ab

    assert joined(program, A, B, C, V) == ["ab,bc->ac", "ab,b->a"]
    assert untouched(lambda a, b, v: (a @ b) @ (a @ b), A, B, V)


def test_not_past_a_write():
    def program(a, b, v):
        a, ab = a * 1.0, None
        ab = a @ b
        a.add_(1.0)
        return ab @ v + a @ v

    assert untouched(program, A.detach(), B.detach(), V.detach())


def test_not_where_a_later_write_would_spoil_the_backward_pass():
    def program(a, b, v):
        v = v * 1.0
        out = (a @ b) @ v
        v.add_(1.0)
        return out

    program_lines = lines(traced(program, (A.detach(), B.detach(), V.detach())).graph)
    assert len(joined(program, A.detach(), B.detach(), V.detach())) == 2
    assert run(traced(program, (A, B, V)).graph) is not None
    assert lines(run(traced(program, (A, B, V)).graph)) == program_lines


def test_not_out_of_a_region_without_grad():
    def program(a, b, v):
        with torch.no_grad():
            ab = a @ b
        return ab @ v

    assert untouched(program, A, B, V)


def test_a_result_that_is_written_in_place():
    def program(a, b, v):
        with torch.no_grad():
            out = (a @ b) @ v
            out.add_(1.0)
        return out, out.T

    assert len(joined(program, A, B, tensor(N, 2))) == 2
    check_pass(planned, program, A, B, tensor(N, 2))


def test_results_lie_as_in_eager():
    def program(x, a, b, c):
        return (a @ b @ c) @ x, F.linear(x.mT, a @ (b @ c)), x.permute(2, 0, 1) @ (a @ (b @ c)).T

    x = tensor(3, N, 2)
    found = check_pass(planned, program, x, A, B, C)
    assert not any("einsum" in line for line in found)


def test_under_autocast_nothing_joins():
    inputs = [x.float().detach() for x in (A, B, V)]
    with torch.autocast("cpu", torch.bfloat16):
        graph = traced(lambda a, b, v: (a @ b) @ v, inputs).graph
    assert lines(run(graph)) == lines(graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_products_keep_their_order(dtype):
    inputs = [tensor(N, N, grad=False, dtype=dtype) for _ in range(2)] + [tensor(N, grad=False, dtype=dtype)]
    graph = traced(lambda a, b, v: (a @ b) @ v, inputs).graph
    assert lines(run(graph)) == lines(graph)
    assert sum("einsum" in line for line in lines(join_products(reassociate=True)(graph))) == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_stay(dtype):
    inputs = [torch.ones(shape, dtype=dtype) for shape in ((N, N), (N, N), (N,))]
    assert untouched(lambda a, b, v: (a @ b) @ v, *inputs)


def test_reassociate_false_joins_nothing():
    graph = traced(lambda a, b, v: (a @ b) @ v, (A, B, V)).graph
    assert lines(join_products(reassociate=False)(graph)) == lines(graph)


def test_a_memory_limit_that_only_a_network_keeps():
    def program(a, b, v):
        return (a @ b) @ v

    small = tensor(3, 3), tensor(3, 3), tensor(3)
    graph = traced(program, small).graph
    assert lines(run(graph)) == lines(graph)
    assert any("einsum" in line for line in lines(join_products(memory_limit=3 * 8)(graph)))
    assert lines(join_products(memory_limit=2 * 8)(graph)) == lines(graph)


def test_without_facts_nothing_changes():
    graph = torch.fx.symbolic_trace(lambda a, b, v: (a @ b) @ v).graph
    assert lines(run(graph)) == lines(graph)


def test_empty_and_broadcast_operands():
    def program(a, b, c):
        return (a @ b) @ c

    assert len(forced(program, tensor(5, 1, 2, 3), tensor(4, 3, 6), tensor(6, 1))) == 2
    assert len(forced(program, tensor(2, 0), tensor(0, 3), tensor(3, 4))) == 2
    assert len(forced(program, tensor(0, 3), tensor(3, 4), tensor(4))) == 2
