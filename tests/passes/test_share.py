"""What several einsums contract alike is computed once where that pays, and nobody can tell."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from checks import check_pass, lines, traced
from fuzzer import every_network
from torch import einsum, rand

import lazy_einsum
from lazy_einsum import OptimizedModule
from lazy_einsum.passes.canonicalize import canonicalize
from lazy_einsum.passes.choose_paths import choose_paths
from lazy_einsum.passes.fuse_einsums import fuse_einsums
from lazy_einsum.passes.fuse_scalars import fuse_scalars
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.place_scalars import place_scalars
from lazy_einsum.passes.share import share

run = share()


def tensor(*shape, dtype=torch.float64, grad=False):
    return (rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(grad)


def follow(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


#: Large enough for a product to cost more than a copy.
A, B, C, D = (tensor(96, 96) for _ in range(4))
ALL = A, B, C, D


def planned(graph):
    passes = canonicalize(), fuse_scalars(), fuse_einsums(), run, choose_paths(), place_scalars(), lower()
    for pass_ in passes:
        graph = pass_(graph)
    return graph


def untouched(function, *inputs):
    """Whether the pass leaves the program to the letter."""
    return check_pass(run, function, *inputs) == lines(traced(function, inputs).graph)


def products(function, *inputs):
    """How many matrix products the calls of a program have in the end."""
    found = check_pass(planned, function, *inputs)
    return sum(".mm(" in line or ".bmm(" in line for line in found)


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_parts_of_two():
    found = check_pass(run, lambda a, b, c, d: (einsum("ab,bc,cd->ad", a, b, c), einsum("ab,ca,bd->cd", b, a, d)), *ALL)
    assert found == [
        "einsum_2 = einsum('ab,bc->ac', x0, x1)",
        "einsum = einsum('ab,bc->ac', einsum_2, x2)",
        "einsum_1 = einsum('ab,bc->ac', einsum_2, x3)",
        "return (einsum, einsum_1)",
    ]


@pytest.mark.parametrize(
    ("program", "most"),
    [
        # Wholes: the same, operands in another order, the result turned.
        (lambda a, b, c, d: einsum("ij,jk->ik", a, b).tanh() + einsum("xy,yz->xz", a, b).sin(), 1),
        (lambda a, b, c, d: einsum("ij,jk->ik", a, b).tanh() + einsum("yz,xy->xz", b, a).sin(), 1),
        (lambda a, b, c, d: einsum("ik,kl->il", h := einsum("ij,jk->ik", a, b), c) + h * einsum("ij,jk->ik", a, b), 2),
        # A whole and a part, either way round.
        (lambda a, b, c, d: einsum("ij,jk->ik", a, b).sin() @ einsum("ij,jk,kl->il", a, b, c), 2),
        (lambda a, b, c, d: einsum("ij,jk,kl->il", a, b, c) + einsum("ij,jk->ki", a, b).sin(), 2),
        # Parts of three, and one of three tensors.
        (
            lambda a, b, c, d: (
                einsum("ij,jk,kl->il", a, b, c)
                + einsum("ij,jk,lk->il", a, b, d)
                + einsum("kl,ij,jk->li", c.sin(), a, b)
            ),
            4,
        ),
        (
            lambda a, b, c, d: einsum("ij,jk,kl,lm->im", a, b, c, d) + einsum("ij,jk,kl,ml->im", a, b, c, d.sin()),
            4,
        ),
        # One tensor several times, and diagonals.
        (lambda a, b, c, d: einsum("ij,kj,kl->il", a, a, b) + einsum("kl,ij,kj->li", c, a, a), 3),
        # These lie in memory in two ways.
        (lambda a, b, c, d: einsum("ij,jk,kl->il", a, a, b) + einsum("jk,kl,ij->il", a, b, a), 3),
        (lambda a, b, c, d: einsum("ij,jj,jk->ik", a, b, c) + einsum("jk,ij,jj->ik", c, a, b), 1),
        # Both, in turn: what is equal once its operands are.
        (
            lambda a, b, c, d: (
                einsum("ij,jk->ik", einsum("ij,jk->ik", a, b).sin(), c) + einsum("ij,jk->ik", a, b).cos()
            ),
            2,
        ),
    ],
)
def test_one_product_less(program, most):
    assert products(program, *ALL) == most
    check_pass(run, program, *ALL)
    check_pass(planned, program, *follow(*ALL))


def test_sums():
    x = tensor(300, 300)
    found = check_pass(run, lambda x: einsum("ij->i", x).sin() + einsum("kl->k", x).cos(), x)
    assert found[:3] == ["einsum = einsum('ij->i', x0)", "sin = einsum.sin()", "cos = einsum.cos()"]


def test_with_gradients_to_one_result():
    def program(a, b, c, d):
        return einsum("ab,bc,cd->ad", a, b, c).sin() + einsum("ab,ca,bd->cd", b, a, d)

    assert products(program, *follow(*ALL)) == 3
    for only in range(4):
        assert products(program, *(x.requires_grad_(n == only) for n, x in enumerate(follow(*ALL)))) == 3


def test_results_without_gradients_are_copies():
    def program(a, b, c, d):
        return einsum("ij,jk->ik", a, b), einsum("xy,yz->xz", a, b), einsum("xy,yz,zi->xi", a, b, c)

    found = check_pass(run, program, *ALL)
    assert found[1] == "clone = einsum.clone()"
    assert found[-1] == "return (einsum, clone, einsum_2)"
    assert products(program, *ALL) == 2


def test_integers():
    inputs = [torch.randint(-(2**40), 2**40, (96, 96)) for _ in range(4)]
    program = lambda a, b, c, d: einsum("ab,bc,cd->ad", a, b, c) + einsum("ab,ca,bd->cd", b, a, d)  # noqa: E731
    assert len(check_pass(run, program, *inputs)) == 5


# -- what is not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        # Other tensors, other labels, another sum.
        lambda a, b, c, d: einsum("ij,jk->ik", a, b) + einsum("ij,jk->ik", a, c),
        lambda a, b, c, d: einsum("ij,jk->ik", a, b) + einsum("ij,kj->ik", a, b),
        lambda a, b, c, d: einsum("ij,jk->ik", a, b) + einsum("ij,jk->ik", b, a),
        lambda a, b, c, d: einsum("ij,jk->ik", a, b) + einsum("ij,jk->i", a, b),
        lambda a, b, c, d: einsum("ij,jk,kl->il", a, b, c) + einsum("ij,jk,jl->il", a, b, d),
        # Random numbers are none that are the same.
        lambda a, b, c, d: einsum("ij,jk->ik", torch.rand_like(a), b) + einsum("ij,jk->ik", torch.rand_like(a), b),
        # Views.
        lambda a, b, c, d: einsum("ij->ji", a) + einsum("ij->ji", a),
    ],
)
def test_what_is_not_equal(program):
    assert untouched(program, *ALL)


def test_what_does_not_pay():
    def program(a, b, c, d):
        return einsum("ab,bc,cd->ad", a, b, c) + einsum("ab,ca,bd->cd", b, a, d)

    small = [x[:4, :4] for x in ALL]
    assert untouched(program, *small)
    # The vectors first.
    assert untouched(lambda a, b, c, d: einsum("ab,bc,c->a", a, b, c[0]) + einsum("ab,ca,b->c", b, a, d[0]), *ALL)
    with every_network():
        assert len(check_pass(run, program, *small)) == 5


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(
    "results",
    [
        # Each with a gradient of its own, or in a graph of its own.
        lambda one, two: (one, two),
        lambda one, two: (one.sin(), two.cos()),
        lambda one, two: (one, two.cos()),
        lambda one, two: (one.cos(), two),
        lambda one, two: (one, one + two),
        lambda one, two: (one.T, one + two),
        lambda one, two: (two.reshape(-1), one + two),
    ],
)
def test_gradients_of_several_results(results, every):
    def program(a, b, c, d):
        return results(einsum("ij,jk->ik", a, b), einsum("xy,yz->xz", a, b))

    with every_network() if every else nullcontext():
        assert untouched(program, *follow(*ALL))
        # Without gradients it is the memory that counts.
        assert len(check_pass(run, program, *ALL)) < len(lines(traced(program, ALL).graph)) + 1


def test_two_backward_passes_one_after_the_other():
    def program(a, b, c, d):
        return einsum("ij,jk,kl->il", a, b, c).sin(), einsum("ij,jk,kl->il", a, b, d).sin()

    leaves = follow(*ALL)
    one, two = OptimizedModule(program)(*leaves)
    one.sum().backward()
    two.sum().backward()
    again = follow(*ALL)
    sum(result.sum() for result in program(*again)).backward()
    for ours, theirs in zip(leaves, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_inside():
    def program(a, b, c, d):
        one = einsum("ij,jk->ik", a, b).sin()
        (g,) = torch.autograd.grad(one.sum(), a)
        return einsum("ij,jk->ik", a, b).cos() + g

    assert untouched(program, *follow(*ALL))


def _write_operand(a, b):
    one = einsum("ij,jk->ik", a, b).sin()
    a.mul_(2)
    return one + einsum("ij,jk->ik", a, b)


def _write_through_a_view(a, b):
    one = einsum("ij,jk->ik", a, b).sin()
    b.view(-1)[0] = 3
    return one + einsum("ij,jk->ik", a, b)


def _write_first(a, b):
    one = einsum("ij,jk->ik", a, b)
    one.mul_(2)
    return one + einsum("ij,jk->ik", a, b)


def _write_first_behind(a, b):
    one = einsum("ij,jk->ik", a, b)
    two = einsum("ij,jk->ik", a, b)
    one.mul_(2)
    return one + two


def _write_second(a, b):
    one = einsum("ij,jk->ik", a, b)
    two = einsum("ij,jk->ik", a, b)
    two.T.add_(1)
    return one + two


@pytest.mark.parametrize(
    "program", [_write_operand, _write_through_a_view, _write_first, _write_first_behind, _write_second]
)
def test_not_past_writes(program):
    with every_network():
        assert untouched(program, A.clone(), B.clone())


def test_a_write_elsewhere_hinders_nothing():
    def program(a, b, c):
        one = einsum("ij,jk->ik", a, b).sin()
        c.mul_(2)
        return one + einsum("ij,jk->ik", a, b) + c

    assert len(check_pass(run, program, A, B, C.clone())) == 6


def _hook_on_first(a, b):
    one = einsum("ij,jk->ik", a, b)
    one.register_hook(lambda g: g * 3)
    return one.sin() + einsum("ij,jk->ik", a, b)


def _hook_on_second(a, b):
    one = einsum("ij,jk->ik", a, b)
    two = einsum("ij,jk->ik", a, b)
    two.register_hook(lambda g: g * 3)
    return one.sin() + two


def _hook_between(a, b):
    one = einsum("ij,jk->ik", a, b).sin()
    one.register_hook(lambda g: g * 3)
    return one + einsum("ij,jk->ik", a, b)


def _retained(a, b):
    one = einsum("ij,jk->ik", a, b)
    one.retain_grad()
    return one.sin() + einsum("ij,jk->ik", a, b)


@pytest.mark.parametrize("program", [_hook_on_first, _hook_on_second, _hook_between, _retained])
def test_not_past_hooks(program):
    graph = traced(program, follow(A, B)).graph
    with every_network():
        assert lines(run(graph)) == lines(graph)


def test_not_across_regions():
    def without_grad(a, b):
        with torch.no_grad():
            one = einsum("ij,jk->ik", a, b)
        return one.sin() + einsum("ij,jk->ik", a, b)

    def around(a, b):
        one = einsum("ij,jk->ik", a, b)
        with torch.no_grad():
            two = einsum("ij,jk->ik", a, b)
        return one.sin() + two

    def inference(a, b):
        one = einsum("ij,jk->ik", a, b)
        with torch.inference_mode():
            two = einsum("ij,jk->ik", a, b)
        return one.sin() + two

    with every_network():
        assert untouched(without_grad, *follow(A, B))
        assert untouched(around, *follow(A, B))
        graph = traced(inference, [A, B]).graph
        assert lines(run(graph)) == lines(graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_coarse_types_only_wholes(dtype):
    inputs = [x.to(dtype) for x in ALL]
    graph = traced(lambda a, b, c, d: einsum("ab,bc,cd->ad", a, b, c) + einsum("ab,bc,cd->ad", a, b, d), inputs).graph
    assert lines(run(graph)) == lines(graph)
    graph = traced(lambda a, b, c, d: einsum("ab,bc->ac", a, b).sin() + einsum("ab,bc->ac", a, b), inputs).graph
    assert len(lines(run(graph))) < len(lines(graph))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_narrow_types_stay(dtype):
    inputs = [torch.randint(0, 2, (64, 64)).to(dtype) for _ in range(2)]
    graph = traced(lambda a, b: (einsum("ab,bc->ac", a, b), einsum("ab,bc->ac", a, b)), inputs).graph
    assert lines(run(graph)) == lines(graph)


def test_orders_of_the_users_own_and_memory():
    def program(a, b, c, d):
        return einsum("ab,bc,cd->ad", a, b, c) + einsum("ab,ca,bd->cd", b, a, d)

    graph = traced(program, ALL).graph
    assert lines(share("greedy")(graph)) == lines(graph)
    assert lines(share(memory_limit=96 * 96 * 8)(graph)) != lines(graph)
    thin = [tensor(400, 2), tensor(2, 400), tensor(400, 2), tensor(400, 2)]
    graph = traced(lambda a, b, c, d: einsum("ab,bc,cd->ad", a, b, c) + einsum("ab,ca,bd->cd", b, a, d), thin).graph
    with every_network():
        assert all("einsum('ab,bc->ac', x0, x1)" not in line for line in lines(share(memory_limit=99_000)(graph)))


# -- through all passes ------------------------------------------------------------------------------------------------


def test_sizes_that_vary():
    def program(a, b, c, d):
        return einsum("ab,bc,cd->ad", a, b, c).sin() + einsum("ab,ca,bd->cd", b, a, d)

    module = OptimizedModule(program, on_untraceable="raise")
    for size in (90, 91, 92, 93, 97, 64):
        inputs = [rand(size, 96), *(x.float() for x in ALL[1:])]
        torch.testing.assert_close(module(*inputs), program(*inputs), rtol=1e-4, atol=1e-4)
    generic = [entry for entry in module.specializations.values() if entry.is_generic]
    assert generic and all(entry.hits for entry in generic)
    assert generic[0].stages["share"].count("einsum(") == 3


def test_the_one_shot_functions():
    def program(a, b, c, d):
        return einsum("ab,bc,cd->ad", a, b, c).sin() + einsum("ab,ca,bd->cd", b, a, d)

    found = lazy_einsum.optimize_einsums_full(program, ALL)
    assert sum(node.target is torch.functional.einsum for node in found.graph.nodes) == 3
    for size in (96, 5, 1):
        inputs = [x[:size] if n == 0 else x for n, x in enumerate(ALL)]
        torch.testing.assert_close(found(*inputs), program(*inputs))
