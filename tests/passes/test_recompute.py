"""A product that several networks use is computed in each of them where they then take less time."""

from __future__ import annotations

import pytest
import torch
from checks import check_pass, lines, traced
from fuzzer import every_network
from torch import einsum, rand

from lazy_einsum import OptimizedModule
from lazy_einsum.passes.canonicalize import canonicalize
from lazy_einsum.passes.choose_paths import choose_paths
from lazy_einsum.passes.fuse_einsums import fuse_einsums
from lazy_einsum.passes.join_products import join_products
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.recompute import recompute
from lazy_einsum.passes.share import share

run = recompute()


def tensor(*shape, dtype=torch.float64, grad=False):
    return rand(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


N = 128
A, B = tensor(N, N), tensor(N, N)
V, W = tensor(N), tensor(N)
ALL = A, B, V, W


def planned(graph):
    for pass_ in (canonicalize(), run, join_products(), fuse_einsums(), share(), choose_paths(), lower()):
        graph = pass_(graph)
    return graph


def kernels(function, *inputs):
    """The kernels of products in the end."""
    found = check_pass(planned, function, *inputs)
    return [name for line in found for name in ("bmm", "mm", "mv", "dot") if f".{name}(" in line]


def untouched(function, *inputs, pass_=run):
    """Whether the pass leaves the program to the letter."""
    return check_pass(pass_, function, *inputs) == lines(traced(function, inputs).graph)


def two(a, b, v, w):
    h = a @ b
    return h @ v, w @ h


# -- what is copied ----------------------------------------------------------------------------------------------------


def test_each_user_gets_its_own_product():
    found = check_pass(run, two, *ALL)
    assert sum("x0.matmul(x1)" in line for line in found) == 2
    assert len(found) == 5
    assert kernels(two, *ALL) == ["mv"] * 4


def summed(a, b, v, w):
    x, y = two(a, b, v, w)
    return x + y


def test_with_gradients():
    leaves = [x.clone().requires_grad_() for x in ALL]
    assert kernels(summed, *leaves) == ["mv"] * 4
    assert kernels(summed, *leaves[:2], V, W) == ["mv"] * 4


def test_results_that_may_be_differentiated_one_after_the_other():
    leaves = [x.clone().requires_grad_() for x in ALL]
    assert untouched(two, *leaves)
    # Of these autograd follows what uses the product, and not the product.
    assert not untouched(two, A, B, *leaves[2:])
    for model in (two, OptimizedModule(two)):
        x, y = model(*leaves)
        x.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()


def test_einsums_and_other_products():
    def program(a, b, v, w):
        h = einsum("ij,jk->ik", a, b)
        return torch.mv(h, v), einsum("i,ik->k", w, h), torch.nn.functional.linear(v, h)

    assert kernels(program, *ALL) == ["mv"] * 6


def test_through_a_permutation():
    def program(a, b, v, w):
        h = a @ b
        return h.T @ v, h @ w

    assert kernels(program, *ALL) == ["mv"] * 4


def test_one_of_several():
    def program(a, b, v, w):
        h, k = a @ b, b @ a
        return h @ v, w @ h, k @ b, b @ k

    found = check_pass(planned, program, *ALL)
    assert sum(".mv(" in line for line in found) == 4
    assert sum(".matmul(" in line for line in found) == 3


def test_the_wrapper_does_so():
    def child(a, b, v, w):
        h = a @ b
        return (h @ v).relu() + w @ h

    model = OptimizedModule(child)
    leaves = [x.clone().requires_grad_() for x in ALL]
    torch.testing.assert_close(model(*leaves), child(*leaves))
    assert model.code.count(".mv(") == 4
    ours, eager = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (model, child))
    torch.testing.assert_close(ours, eager)


# -- what is not -------------------------------------------------------------------------------------------------------


def kept_by_its_users(a, b, v, w):
    h = a @ b
    return h @ a, b @ h


def result(a, b, v, w):
    h = a @ b
    return h, h @ v, w @ h


def result_by_a_view(a, b, v, w):
    h = a @ b
    return h.T, h @ v, w @ h


def other_user(a, b, v, w):
    h = a @ b
    return h.relu(), h @ v, w @ h


def twice_in_one(a, b, v, w):
    h = a @ b
    return h @ h, h @ v


def written(a, b, v, w):
    h = a @ b
    x = h @ v
    h.mul_(2)
    return x, w @ h


def written_by_a_view(a, b, v, w):
    h = a @ b
    x = h @ v
    h.t().mul_(2)
    return x, w @ h


def operand_written(a, b, v, w):
    a = a * 1
    h = a @ b
    x = h @ v
    a.mul_(2)
    return x, w @ h


def in_another_mode(a, b, v, w):
    h = a @ b
    with torch.no_grad():
        x = h @ v
    return x, w @ h


def hook_between(a, b, v, w):
    a = a * 1
    h = a @ b
    x = h @ v
    if a.requires_grad:
        a.register_hook(lambda gradient: gradient * 2)
    return x + w @ h


def many_users(a, b, v, w):
    h = a @ b
    return h @ v, w @ h, h @ w, v @ h, h @ (v + w)


KEPT = [kept_by_its_users, result, result_by_a_view, other_user, twice_in_one, written, written_by_a_view]
KEPT += [operand_written, many_users]


@pytest.mark.parametrize("program", KEPT, ids=lambda program: program.__name__)
def test_kept(program):
    assert untouched(program, *ALL)


def test_kept_across_modes():
    assert untouched(in_another_mode, *(x.clone().requires_grad_() for x in ALL))


def test_kept_across_hooks():
    leaves = [x.clone().requires_grad_() for x in ALL]
    model = OptimizedModule(hook_between, on_untraceable="raise")
    ours, eager = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (model, hook_between))
    torch.testing.assert_close(ours, eager)
    assert model.code.count(".matmul(") == 3


def test_what_gains_nothing_does_not_keep_others_from_it():
    def program(a, b, v, w):
        h = a
        for _ in range(20):
            k = h @ b
            h = k @ a + b @ k
        h = h @ a
        return h @ v, w @ h

    assert len(kernels(program, *ALL)) == 4


def test_hooks_see_the_one_value():
    def child(a, b, v, w):
        h = a @ b
        h.register_hook(lambda gradient: gradient * 2)
        return h @ v, w @ h

    leaves = [x.clone().requires_grad_() for x in ALL]
    model = OptimizedModule(child)
    ours, eager = (torch.autograd.grad(sum(x.sum() for x in f(*leaves)), leaves) for f in (model, child))
    torch.testing.assert_close(ours, eager)
    assert model.code.count(".mv(") < 4


def test_small_ones_are_kept():
    assert untouched(two, tensor(4, 4), tensor(4, 4), tensor(4), tensor(4))


def test_elementwise_products_are_not_computed_twice():
    def program(x, y):
        h = x * y
        return h.sum(0), h.sum(1)

    assert untouched(program, tensor(300, 300), tensor(300, 300))


def test_no_diagonal_is_taken_of_what_broadcasts():
    def program(x, y, v, w):
        h = x @ y * w
        return einsum("ii,i->i", h, v), h @ v

    with every_network():
        assert untouched(program, tensor(3, 2), tensor(2, 3), tensor(3), tensor(3, 1))


def test_types_whose_order_is_the_users():
    operands = [x.half() for x in ALL]
    assert untouched(two, *operands)
    assert untouched(two, *operands, pass_=recompute(reassociate=None))
    assert untouched(two, *ALL, pass_=recompute(reassociate=False))
    assert not untouched(two, *ALL, pass_=recompute(reassociate=True))


def test_limits():
    leaves = [x.clone().requires_grad_() for x in ALL]
    assert not untouched(summed, *leaves, pass_=recompute(saved_limit=1.1))
    # Of the operands alone this much is saved.
    assert untouched(summed, *leaves, pass_=recompute(saved_limit=0.4))
    assert not untouched(two, *ALL, pass_=recompute(saved_limit=0.4))
    assert untouched(two, *ALL, pass_=recompute(memory_limit=8 * (N - 1)))
    assert not untouched(two, *ALL, pass_=recompute(memory_limit=8 * N))


def test_without_facts_nothing_is_changed():
    graph = torch.fx.symbolic_trace(two).graph
    assert lines(run(graph)) == lines(graph)
