"""No einsum of many operands is left, and each has the facts and the name it had."""

from __future__ import annotations

import pytest
import torch
from checks import check_pass, lines, specs, traced
from torch import einsum, fx, rand

from lazy_einsum.errors import MemoryLimitError
from lazy_einsum.passes.choose_paths import choose_paths

run = choose_paths()


def tensor(*shape):
    return rand(shape, dtype=torch.float64, requires_grad=True)


def test_from_the_thin_end():
    found = check_pass(
        run, lambda a, b, x: einsum("ij,jk,kl->il", a, b, x), tensor(30, 30), tensor(30, 30), tensor(30, 1)
    )
    assert found == [
        "einsum_1 = einsum('ab,bc->ac', x1, x2)",
        "einsum = einsum('ab,bc->ac', x0, einsum_1)",
        "return einsum",
    ]


def test_an_einsum_of_two_stays():
    program = lambda x, y: einsum("ij, kj", x, y)  # noqa: E731
    inputs = tensor(3, 4), tensor(5, 4)
    assert check_pass(run, program, *inputs) == lines(traced(program, inputs).graph)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ii,ij,jk->k", [(4, 4), (4, 3), (3, 2)]),
        ("ij,kl,mn->", [(4, 4), (4, 3), (3, 2)]),
        ("ij,ij,ij->ij", [(4, 3)] * 3),
        ("ij,jk,kl,lm->im", [(2, 1), (5, 1), (1, 3), (3, 4)]),
        ("a,a,a,a->a", [(1,), (3,), (1,), (3,)]),
        ("ij,jk,kl->il", [(2, 0), (0, 3), (3, 2)]),
        (",a,->a", [(), (3,), ()]),
        ("...i,...j,...k->...", [(3, 2), (2, 3, 4), (5,)]),
    ],
)
def test_kinds_of_networks(equation, shapes):
    check_pass(run, lambda *operands: einsum(equation, *operands), *[tensor(*shape) for shape in shapes])


def test_integers():
    x = torch.arange(12).reshape(3, 4) * 2**60
    check_pass(run, lambda x, y, z: einsum("ij,kj,kl->il", x, y, z), x, x + 1, x + 2)
    narrow = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    program = lambda x, y, z: einsum("ij,ik,il->i", x, y, z)  # noqa: E731
    found = check_pass(run, program, narrow, narrow + 1, narrow + 2)
    assert not any("einsum(" in line for line in found) and any(".sum(" in line for line in found)


def test_an_operand_written_later_leaves_the_order_to_torch():
    def program(x, y, z):
        x = x * 1
        result = einsum("ij,jk,kl->il", x, y, z)
        x.add_(1)
        return result, x

    found = check_pass(run, program, tensor(3, 4), tensor(4, 5), tensor(5, 6))
    assert sum(".bmm(" in line for line in found) == 2 and not any("einsum(" in line for line in found)


def test_generic_code_leaves_the_order_to_torch():
    narrow = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    program = lambda x, y, z: einsum("ij,ik,il->i", x, y, z)  # noqa: E731
    inputs = narrow, narrow + 1, narrow + 2
    assert check_pass(choose_paths(generic=True), program, *inputs) == lines(traced(program, inputs).graph)


def test_an_operand_used_twice():
    assert (
        check_pass(run, lambda x, y: einsum("ij,ij,jk->ik", x, x, y), tensor(3, 4), tensor(4, 5))[-1] == "return einsum"
    )


def test_generic_orders_hold_for_other_sizes():
    program = lambda x, y, z: einsum("zij,zjk,zk->zi", x, y, z)  # noqa: E731
    graph = choose_paths(generic=True)(fx.symbolic_trace(program).graph) if False else None
    traced_at_one = traced(program, (rand(1, 2, 3), rand(1, 3, 1), rand(1, 1)))
    graph = choose_paths(generic=True)(traced_at_one.graph)
    module = fx.GraphModule(torch.nn.Module(), graph)
    for sizes in ((1, 1, 1), (5, 5, 5), (5, 1, 5), (1, 7, 1)):
        inputs = rand(sizes[0], 2, 3), rand(sizes[1], 3, 4), rand(sizes[2], 4)
        torch.testing.assert_close(module(*inputs), program(*inputs))


def test_named_strategies_and_limits():
    program = lambda *operands: einsum("ij,jk,kl,lm->im", *operands)  # noqa: E731
    graph = traced(program, [rand(2, 8), rand(8, 8), rand(8, 8), rand(8, 2)]).graph
    for optimize in ("greedy", "dp", [(0, 1), (0, 1), (0, 1)], lambda *_: [(0, 1), (1, 2), (0, 1)]):
        assert len(specs(choose_paths(optimize)(graph))) == 3
    with pytest.raises(MemoryLimitError):
        choose_paths(memory_limit=15 * 4)(graph)
    assert len(specs(choose_paths(memory_limit=16 * 4)(graph))) == 3
    assert len(specs(choose_paths(element_limit=16)(graph))) == 3


def test_operands_of_unknown_shape_are_named():
    graph = fx.symbolic_trace(lambda x, y, z: einsum("ij,jk,kl->il", x, y, z)).graph
    with pytest.warns(RuntimeWarning, match=r"einsum einsum .*unknown shape"):
        assert specs(run(graph)) == ["ij,jk,kl->il"]
