"""Products join each other through calls that reshape, where another order of contraction pays."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from behaviour import clone_tree, differences, observe
from checks import check_pass, lines, traced
from fuzzer import every_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import rand

from lazy_einsum import OptimizedModule
from lazy_einsum.dimensions import Dimensions, blocks, quotient, read_reshape
from lazy_einsum.passes.join_reshaped import join_reshaped
from lazy_einsum.sizes import SymbolicSize

run = join_reshaped()


def tensor(*shape, grad=True, dtype=torch.float64):
    return (rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(grad)


A, B, C = tensor(3, 5), tensor(4, 5), tensor(2, 5)
W, X, V = tensor(6, 12), tensor(7, 3, 4), tensor(12)


def forced(function, *inputs):
    """The equations after the pass, were it always to pay."""
    with every_network():
        found = check_pass(run, function, *inputs)
    names = {line.split(" = ")[0] for line in found if " = " in line and not line.startswith("set_grad")}
    unused = {name for name in names if not any(re.search(rf"\b{name}\b", line.split(" = ")[-1]) for line in found)}
    assert not unused
    return [line.split("'")[1] for line in found if "einsum(" in line]


def untouched(function, *inputs):
    with every_network():
        return check_pass(run, function, *inputs) == lines(traced(function, inputs).graph)


def khatri_rao(a, b):
    return (a.reshape(a.shape[0], 1, a.shape[1]) * b.reshape(1, *b.shape)).reshape(len(a) * len(b), a.shape[1])


@pytest.mark.parametrize(
    ("program", "inputs", "equations"),
    [
        (lambda a, b, w: w @ khatri_rao(a, b), (A, B, W), ["ab,cb->acb", "abc,bcd->ad"]),
        (lambda a, b, w: w @ (a[:, None] * b).flatten(0, 1), (A, B, W), ["ab,cb->acb", "abc,bcd->ad"]),
        (lambda a, b, w: w @ (a[:, None] * b).view(-1, 5), (A, B, W), ["ab,cb->acb", "abc,bcd->ad"]),
        (lambda a, b, v: v @ torch.outer(a[:, 0], b[:, 0]).ravel(), (A, B, V), ["a,b->ab", "ab,ab->"]),
        # Taken apart: the product is taken together.
        (lambda w, x: torch.einsum("nab,cba->nc", x, (w @ w.T @ w).view(6, 4, 3)), (W, X), None),
        (lambda x, w: (x.flatten(1) @ w.T).unflatten(1, (2, 3)).transpose(1, 2) @ x[:, :2], (X, W), None),
        (lambda x, w: (w @ w.T).reshape(6, 2, 3) @ x[0], (X, W), ["abc->cab", "abc,cde->abde", "abcd,de->abce"]),
        (lambda x, w: (w @ w.T).unflatten(0, (2, 3))[:, :, None] @ w, (X, W), None),
        # One dimension in two ways: the second one stays.
        (
            lambda a, b, c, d, w: (torch.outer(a, b).ravel() * torch.outer(c, d).ravel()) @ w,
            (tensor(3), tensor(4), tensor(2), tensor(6), tensor(12, 2)),
            ["a,b->ab", "ab,ab->ab", "ab,abc->c"],
        ),
        # Dimensions of size 1, new and gone.
        (lambda a, w: (a @ a.T)[None, :, :, None].reshape(9, 1).squeeze(1) @ w, (A, tensor(9, 2)), None),
        (
            lambda a, w: (a @ a.T).unsqueeze(0).reshape(1, 9) @ w,
            (A, tensor(9, 2)),
            ["ab->ba", "ab,bc->ac", "ab,abc->c"],
        ),
        # A product passes by what only adds dimensions for it.
        (
            lambda a, b, w: (((a @ b.mT).reshape(-1) * w).unflatten(1, (3, 4))[..., None] * b).sum(-2),
            (A, B, W),
            ["ab->ba", "ab,bc->ac", "ab,cab->cab", "abc,cd->abcd", "abcd->abd"],
        ),
        # Kronecker products.
        (
            lambda w, a, b: w[:, :8] @ torch.kron(a, b),
            (W, tensor(2, 3), tensor(4, 5)),
            ["ab,cd->acbd", "abc,bcde->ade"],
        ),
        (lambda w, a, b: (w @ a.kron(b)) @ w[:6, :3], (W, tensor(3, 3), tensor(4, 2)), None),
        (lambda v, a, b: v @ torch.kron(a, b), (V, tensor(3), tensor(4)), ["a,b->ab", "ab,ab->"]),
        (lambda v, a, b: v @ torch.kron(a, b), (V, tensor(12, 2), tensor(3)), ["ab,c->abc", "a,abc->bc"]),
        (lambda v, a, b: torch.kron(b, a).T @ v, (V, tensor(12, 2), tensor(3)), None),
        (lambda w, a, b, c: w @ torch.kron(torch.kron(a, b), c), (W, tensor(2, 3), tensor(2, 1), tensor(3, 2)), None),
        (lambda w, a, b: w @ torch.kron(a.mT @ a, b), (W, tensor(5, 3), tensor(4, 1)), None),
        # A bias.
        (lambda a, b, w, v: F.linear((a[:, None] * b).reshape(1, -1), w.repeat(1, 5), v[:6]), (A, B, W, V), None),
        (
            lambda a, b, w, c: F.linear(w, khatri_rao(a, b).T, c[0]),
            (A, B, W, C),
            ["ab,cb->acb", "abc->cab", "abc,dbc->ad"],
        ),
        # Reshapes on both sides, and through einsums.
        (lambda x, w: torch.einsum("nk,mk->nm", x.reshape(7, 12), w) @ (w @ w.T), (X, W), None),
        (lambda a, b: torch.einsum("k,k->", khatri_rao(a, b).reshape(-1), khatri_rao(a, b).reshape(-1)), (A, B), None),
    ],
)
def test_equations(program, inputs, equations):
    found = forced(program, *inputs)
    if equations is not None:
        assert found == equations


@pytest.mark.parametrize(
    ("program", "inputs"),
    [
        (lambda a, b, w: w @ khatri_rao(a, b).exp(), (A, B, W)),
        # Sizes that have no common parts.
        (lambda a: (a @ a.T).reshape(4, 9) @ (a @ a.T).reshape(9, 4), (tensor(6, 2),)),
        # The elements are in another order.
        (lambda a, w: (a @ a.T)[[2, 0, 1]] @ w, (A, tensor(3, 2))),
        (lambda a, w: (a @ a.T)[:, torch.tensor([2, 0, 1])] @ w, (A, tensor(3, 2))),
        # Nothing comes before, or after.
        (lambda x, w: x.reshape(7, 12) @ w.T, (X, W)),
        (lambda w: (w @ w.T).reshape(2, 3, 6), (W,)),
        (lambda a, b: torch.kron(a @ a.T, b), (A, B)),
        (lambda a, b: torch.kron(a, b) + 1, (A, B)),
        (lambda a, b, w: w @ torch.kron(input=a, other=b), (tensor(3, 2), tensor(4, 2), W)),
        (lambda a, b, w: w @ torch.kron(a, b), tuple((10 * t.detach()).long() for t in (A[:, :2], B, W))),
        (lambda a, b, w: w @ torch.kron(a.float(), b).exp(), (A, B, W)),
        (lambda a, b, w: (w @ a.kron(b).exp(), khatri_rao(a, b).exp().T @ torch.kron(b, a).exp()), (A, B, W)),
        # Used twice.
        (lambda a, b, w: (lambda k: w @ k + k.sum())(khatri_rao(a, b)), (A, B, W)),
        # Read as another dtype, or conjugated.
        (lambda a, b, w: w.to(torch.complex128) @ khatri_rao(a, b).to(torch.complex128).conj(), (A, B, W)),
        (lambda a, b, w: w @ khatri_rao(a, b).conj(), tuple(t.detach().to(torch.complex128) for t in (A, B, W))),
        (lambda a, b, w: w @ khatri_rao(a.conj(), b), tuple(t.detach().to(torch.complex128) for t in (A, B, W))),
        (lambda a, b, w: w @ (a[:, None] * b).view(torch.int64).view(torch.float64).reshape(-1, 5), (A, B, W)),
        (lambda a, b, w: w @ khatri_rao(a, b), tuple(t.detach().to(torch.float16) for t in (A, B, W))),
        (lambda a, b, w: w @ khatri_rao(a, b), tuple((10 * t.detach()).long() for t in (A, B, W))),
    ],
)
def test_what_stays(program, inputs):
    assert untouched(program, *inputs)


def test_only_what_is_taken_apart_is_reshaped():
    with every_network():
        found = check_pass(run, lambda a, b, w: w @ khatri_rao(a, b), A, B, W)
    assert [line for line in found if ".reshape(" in line] == ["reshape_3 = x2.reshape((6, 3, 4))"]


def test_the_order_is_the_users():
    with every_network():
        found = check_pass(join_reshaped(reassociate=False), lambda a, b, w: w @ khatri_rao(a, b), A, B, W)
    assert not any("einsum" in line for line in found)


def test_writes_are_not_passed():
    def later(a, b, w):
        k = (a[:, None] * b).reshape(-1, 5)
        a.mul_(2)
        return w @ k

    def between(x, w):
        flat = (x @ x.mT).reshape(7, 9)
        y = flat.view(-1)
        y.add_(1)
        return flat @ w

    plain = [t.detach() for t in (A, B, W)]
    assert untouched(later, *plain)
    assert untouched(between, X.detach(), tensor(9, 2, grad=False))


def test_a_kronecker_product_of_what_is_written_later_is_computed_where_it_was():
    def program(a, b, w, c):
        k = torch.kron(a, b)
        a.mul_(2)
        return (w @ k).reshape(2, 3, 5, 5).flatten(2) @ (c @ c.T)

    forced(program, *(tensor(*shape, grad=False) for shape in ((3, 5), (4, 5), (6, 12), (25, 2))))


def test_it_has_to_pay():
    small = [tensor(*t.shape, grad=False) for t in (A, B, W)]
    assert check_pass(run, lambda a, b, w: w @ khatri_rao(a, b), *small) == lines(
        traced(lambda a, b, w: w @ khatri_rao(a, b), small).graph
    )
    large = tensor(2, 6400), tensor(80, 300), tensor(80, 300)
    found = check_pass(run, lambda w, a, b: w @ khatri_rao(a, b), *large)
    assert any("einsum" in line for line in found)


def test_copies_that_are_no_longer_made_count(monkeypatch):
    def turned(x, w):
        return (w @ w.T).T.reshape(12, 3) @ x

    w, x = tensor(6, 3), tensor(3, 2)
    assert check_pass(run, turned, x, w) == lines(traced(turned, (x, w)).graph)
    monkeypatch.setattr(importlib.import_module("lazy_einsum.passes.join_reshaped"), "walk_seconds", lambda *_: 1.0)
    assert any("einsum" in line for line in check_pass(run, turned, x, w))
    # Without the permutation the reshape is a view.
    plain = lambda x, w: (w @ w.T).reshape(12, 3) @ x  # noqa: E731
    assert check_pass(run, plain, x, w) == lines(traced(plain, (x, w)).graph)


def test_what_join_products_makes_faster_alone_is_its_business():
    """A reshape at the end of a chain is none between products."""
    a, v = tensor(200, 200), tensor(200)
    program = lambda a, v: ((a @ a) @ v).reshape(20, 10)  # noqa: E731
    assert check_pass(run, program, a, v) == lines(traced(program, (a, v)).graph)


@pytest.mark.parametrize("grad", [True, False])
def test_results_can_be_written_to(grad):
    """A result that is put together again is no view to autograd where eager's is none."""

    def program(a, b, c):
        return khatri_rao(a, b).T @ khatri_rao(a, b) @ c.T @ khatri_rao(c, c)[:2]

    def whole(x, w):
        return (x.reshape(7, 12) @ (w.T.reshape(3, 4, 6).reshape(12, 6) @ w).reshape(12, 12)).reshape(7, 3, 4) @ x[0].mT

    with every_network():
        for function, inputs in ((program, (A, B, C)), (whole, (X, W))):
            wrapped = OptimizedModule(function)
            with torch.set_grad_enabled(grad):
                result, expected = wrapped(*inputs), function(*inputs)
            assert result.shape == expected.shape
            assert result.stride() == expected.stride()
            result += A.sum()
            expected += A.sum()
            torch.testing.assert_close(result, expected)


def test_a_merged_result_of_a_call_without_gradients_can_be_written_to():
    x, k = tensor(7, 6), tensor(6, 6)

    def program(x, k):
        return (x.unflatten(1, (2, 3)).transpose(1, 2).reshape(7, 6) @ k).unflatten(1, (3, 2)).reshape(7, 6) @ k

    with every_network():
        wrapped = OptimizedModule(program)
        with torch.no_grad():
            result = wrapped(x, k)
    assert not differences(observe(wrapped, clone_tree((x, k))), observe(program, clone_tree((x, k))))
    result += x
    torch.testing.assert_close(result, program(x, k) + x)


def test_kronecker_products_for_all_batches():
    def program(x, a, b):
        return x @ torch.kron(a, b) @ torch.kron(b, a)[:, :2], torch.kron(a, b).exp()

    with every_network():
        wrapped = OptimizedModule(program, dynamic=True)
        for n in (2, 3, 5, 8, 1):
            arguments = tensor(n, 12), tensor(3, 4), tensor(4, 3)
            assert not differences(observe(wrapped, clone_tree(arguments)), observe(program, clone_tree(arguments)))
        generic = [entry for entry in wrapped.specializations.values() if entry.is_generic]
    assert len(generic) == 1
    # Two stay: what is sliced, and what is the argument of exp.
    assert generic[0].stages["recompute"].count("kron(") == 3
    assert generic[0].stages["join_reshaped"].count("kron(") == 2


def test_batches_of_all_sizes_run_one_code():
    def program(x, a, b):
        n = x.shape[0]
        return (x.reshape(n, -1) @ khatri_rao(a, b)).unflatten(1, (5, 1)).reshape(n, 5) @ a.T

    with every_network():
        wrapped = OptimizedModule(program, dynamic=True)
        for n in (2, 3, 5, 8, 1, 0, 30):
            arguments = tensor(n, 3, 4), A, B
            assert not differences(observe(wrapped, clone_tree(arguments)), observe(program, clone_tree(arguments)))
        code = [entry for entry in wrapped.specializations.values() if entry.is_generic]
    assert code and all("join_reshaped" in entry.stages for entry in code)
    assert all("einsum" in entry.stages["join_reshaped"] for entry in code)
    assert wrapped.cache_info().fallbacks == 0


@pytest.mark.parametrize("shapes", [((0, 5), (4, 5), (6, 0)), ((3, 0), (4, 0), (6, 12)), ((3, 5), (0, 5), (6, 0))])
def test_nothing_in_them(shapes):
    forced(lambda a, b, w: w @ khatri_rao(a, b), *(tensor(*shape) for shape in shapes))


def test_a_size_that_varies_is_taken_together_and_apart():
    def program(x, a):
        n = x.shape[0]
        return ((x @ a).reshape(n * 3, 4) @ a.T[:4, :2]).reshape(n, 3, 2) @ a[:2, :2]

    with every_network():
        wrapped = OptimizedModule(program, dynamic=True)
        for n in (2, 3, 5, 8, 30):
            arguments = tensor(n, 3, 4), tensor(4, 4)
            assert not differences(observe(wrapped, clone_tree(arguments)), observe(program, clone_tree(arguments)))
        (generic,) = (entry for entry in wrapped.specializations.values() if entry.is_generic)
    assert generic.stages["join_reshaped"].count("einsum") == 3


# -- the dimensions ----------------------------------------------------------------------------------------------------


def dimensions(function, *inputs):
    graph = traced(function, inputs).graph
    nodes = {node.name: node for node in graph.nodes}
    return Dimensions(graph, None), nodes


def test_dimensions_are_those_of_all_that_share_them():
    found, nodes = dimensions(lambda a, b, v: v @ torch.outer(a[:, 0], b[:, 0]).ravel(), A, B, V)
    assert found.shape(nodes["x2"]) == (3, 4)
    assert found.strides(nodes["x2"], (1,)) == (4, 1)
    assert found.shape(nodes["matmul"]) == ()


def test_a_reshape_that_does_not_fit_is_left_out_and_the_others_are_not():
    def program(a, w):
        k = (a @ a.T).reshape(4, 9)
        return k @ (a @ a.T).reshape(9, 4), (w @ w.T).reshape(4, 1, 1).reshape(2, 2)

    found, _ = dimensions(program, tensor(6, 2), tensor(2, 3))
    assert {node.name for node in found.reshapes} == {"reshape_2", "reshape_3"}


_shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_dimensions_of_reshaped_tensors(data):
    """Each reshape of a chain only takes together what the dimensions fall into."""
    shape = data.draw(_shapes)
    x = tensor(*shape)
    chain = []
    for _ in range(data.draw(st.integers(1, 3))):
        left, sizes = x.numel(), []
        while left > 1:
            size = data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
            sizes.append(size)
            left //= size
            if size == 1 and len(sizes) > 4:
                sizes.append(left)
                break
        chain.append(tuple(sizes))

    def program(x):
        for sizes in chain:
            x = x.reshape(sizes)
        return x

    found, nodes = dimensions(program, x)
    values = [node for node in nodes.values() if node.op != "output"]
    for node in found.reshapes:
        operand = found.reshapes[node].operand
        assert found.shape(node) == found.shape(operand)
    for node in values:
        shape = node.meta["lazy_einsum"].type.shape
        own = list(found.shape(node))
        for size in shape:  # each dimension is the product of its own
            product = 1
            while product < size:
                product *= own.pop(0)
            assert product == size
        assert not own


def test_quotient():
    s, t = SymbolicSize.symbol("s0", 6), SymbolicSize.symbol("s1", 6)
    assert quotient(12, 4) == 3
    assert quotient(12, 5) is None
    assert quotient(s * 6, 3) == s * 2
    assert quotient(s * t, t) == s
    assert quotient(s, t) is None
    assert quotient(s, 2) is None  # it is even in this call
    assert quotient(12, s) is None
    assert quotient(s * s, s) == s
    assert quotient(s * 4, s * 2) == 2


def test_blocks():
    n, m = SymbolicSize.symbol("s0", 4), SymbolicSize.symbol("s1", 4)
    assert blocks((2, 3, 4), (6, 4)) == (((0, 1), (0,)), ((2,), (1,)))
    assert blocks((6, 1, 4), (1, 2, 12)) == (((0, 2), (1, 2)),)
    assert blocks((2, 3), (7,)) is None
    assert blocks((n, 3), (n * 3,)) == (((0, 1), (0,)),)
    assert blocks((n, 3, 5), (n, 15)) == (((0,), (0,)), ((1, 2), (1,)))
    # Equal in this call, which is no proof.
    assert blocks((n, 4), (4, n)) is None
    assert blocks((n, m), (m, n)) is None


def test_regions_without_grad():
    def program(a, b, w):
        with torch.no_grad():
            y = w @ khatri_rao(a, b)
        return y * a.sum(), w.exp() @ khatri_rao(b, a)

    def apart(a, b, w):
        with torch.no_grad():
            k = khatri_rao(a, b)
        return w @ k

    assert len(forced(program, A, B, W)) == 4
    assert untouched(apart, A, B, W)


def test_what_reshapes():
    def reshapes(function, *inputs):
        return [node.name for node in traced(function, inputs).graph.nodes if read_reshape(node)]

    assert reshapes(lambda x: x.reshape(2, 12).unflatten(1, (4, 3)), tensor(2, 3, 4)) == ["reshape", "unflatten"]
    assert reshapes(lambda x: x.view(torch.int64), A.detach()) == []
    assert reshapes(lambda x: x[:1].reshape(5) + x[0], A) == ["reshape"]
    assert reshapes(lambda x: x[None, ..., None] + x[:, None, None, 1:], A) == ["getitem"]
