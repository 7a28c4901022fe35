"""Einsums become direct calls that give the same values in the same layout and memory."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from checks import check_pass, lines, traced
from equations import GROUPS
from hypothesis import strategies as st
from torch import einsum, rand

from lazy_einsum.passes.canonicalize import canonicalize
from lazy_einsum.passes.choose_paths import choose_paths
from lazy_einsum.passes.fuse_einsums import fuse_einsums
from lazy_einsum.passes.fuse_scalars import fuse_scalars
from lazy_einsum.passes.lower import lower
from lazy_einsum.passes.place_scalars import place_scalars

run = lower()


def planned(graph):
    """All passes."""
    for pass_ in (canonicalize(), fuse_scalars(), fuse_einsums(), choose_paths(), place_scalars(), lower()):
        graph = pass_(graph)
    return graph


def tensor(*shape):
    return rand(shape, dtype=torch.float64, requires_grad=True)


def test_a_matrix_product_is_one_call():
    assert check_pass(run, lambda x, y: einsum("ij,jk->ik", x, y), tensor(3, 4), tensor(4, 5))[0] == "mm = x0.mm(x1)"


def test_a_chain_of_batched_products():
    found = check_pass(
        planned, lambda x, y, z: einsum("zij,zjk,zk->zi", x, y, z), tensor(64, 8, 4), tensor(64, 4, 5), tensor(64, 5)
    )
    assert sum(".bmm(" in line for line in found) == 2
    assert not any("permute" in line for line in found)
    assert not any("einsum" in line for line in found)


def test_views_stay_views():
    def program(x):
        y = einsum("abc->cab", x)
        y.mul_(2.0)
        d = einsum("aab->ab", x)
        d += 1.0
        return y

    x = rand(3, 3, 4, dtype=torch.float64)
    assert not any("einsum" in line for line in check_pass(run, program, x))
    assert check_pass(run, lambda x: einsum("ij->ij", x), x[0])


def test_what_was_fresh_is_fresh():
    def program(x):
        y = einsum("ij->i", x)
        y.add_(1.0)
        return y

    for shape in ((3, 4), (3, 1), (1, 1)):
        check_pass(run, program, rand(shape, dtype=torch.float64))
    check_pass(planned, lambda x: einsum("ij->ji", x * 2.0), tensor(3, 4))
    check_pass(planned, lambda x: einsum("ij->ji", x) * 1.0, tensor(3, 4))


@pytest.mark.parametrize("view", [lambda z: z.view(-1), lambda z: z.t().contiguous().view(-1), lambda z: z.relu()])
def test_layout_is_that_of_eager(view):
    for equation in ("ij,jk->ik", "ij,jk->ki", "ij,jk,kl->li", "ij,jk,kl->il"):
        operands = [tensor(3, 4), tensor(4, 5), tensor(5, 6)][: equation.count(",") + 1]
        try:
            view(einsum(equation, *operands))
        except RuntimeError:
            continue
        check_pass(planned, lambda *o, equation=equation: view(einsum(equation, *o)), *operands)


def test_an_intermediate_may_lie_as_the_next_step_wants_it():
    def program(x, y, z):
        return einsum("aik,ka->ai", einsum("ij,ajk->aik", x, y), z)

    check_pass(planned, program, tensor(3, 4), tensor(6, 4, 5), tensor(5, 6))
    check_pass(run, program, tensor(3, 4), tensor(6, 4, 5), tensor(5, 6))


def test_scalings_join_the_program():
    found = check_pass(planned, lambda x, y: einsum("ij,jk->ik", x / 2, y) * 3, tensor(2, 30), tensor(30, 40))
    assert sum(".mul(" in line or ".div(" in line for line in found) == 1
    assert found[0] == "mul = x0.mul(1.5)"


def test_a_factor_of_one_is_none_where_it_changes_nothing():
    def product(x, y):
        return einsum("ij,jk->ik", x, y)

    for one in (1.0, 1, 3 / 3):
        found = check_pass(planned, lambda x, y, one=one: product(x, y) / one, tensor(2, 30), tensor(30, 40))
        assert not any(".mul(" in line or ".div(" in line for line in found)
    # A result that would be a view of its operand is a copy of it; integers become floats, reals complex.
    for program, operands in (
        (lambda x: einsum("ij->ji", x) * 1.0, [tensor(3, 4)]),
        (lambda x: einsum("ij->ji", x * 0.5) * 2.0, [tensor(3, 4)]),
        (lambda x: einsum("ij->i", x) * 1.0, [tensor(3, 4)]),
        (lambda x, y: product(x, y) * 1.0, [torch.ones(3, 4, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)]),
        (lambda x, y: product(x, y) * 1j / 1j, [tensor(3, 4), tensor(4, 5)]),
    ):
        check_pass(planned, program, *operands)


def test_lazily_conjugated_operands():
    x, y = rand(4, dtype=torch.complex128), rand(4, dtype=torch.complex128)
    for equation in ("i,i->", "i,j->ij", "i,i->i"):
        check_pass(run, lambda x, y, equation=equation: einsum(equation, x.conj(), y.conj()), x, y)
    check_pass(run, lambda x: einsum("i->i", x.conj()), x)
    check_pass(run, lambda x: einsum("i->", x.conj().imag), x)


def test_operands_are_read_before_they_are_written():
    def program(x, y):
        z = einsum("ij,jk->ik", x, y)
        x.add_(1.0)
        return z * 2.0

    check_pass(run, program, rand(30, 4, dtype=torch.float64), rand(4, 50, dtype=torch.float64))
    check_pass(planned, program, rand(3, 4, dtype=torch.float64), rand(4, 5, dtype=torch.float64))


def test_a_diagonal_over_a_product_and_values_used_twice():
    def program(x, y):
        z = einsum("ij,jk->ik", x, y)
        return einsum("ii->i", z), einsum("ij,ij->", z, z), z

    check_pass(run, program, tensor(4, 4), tensor(4, 4))


def test_a_chain_in_float16_keeps_its_order():
    x = torch.full((2, 2), 200.0).half()
    check_pass(planned, lambda x, y: einsum("ik,kl->il", einsum("ij,jk->ik", x / 1000.0, y), y), x, x + 1)


def test_no_elements():
    check_pass(run, lambda x, y: einsum("ij,jk->ik", x, y), tensor(3, 0), tensor(0, 5))
    check_pass(planned, lambda x, y, z: einsum("ij,jk,kl->il", x, y, z), tensor(0, 2), tensor(2, 5), tensor(5, 3))


def test_what_is_left_to_torch():
    narrow = torch.ones(3, 4, dtype=torch.int32)
    program = lambda x: einsum("ij->i", x)  # noqa: E731
    assert check_pass(run, program, narrow) == lines(traced(program, (narrow,)).graph)

    def written_later(x, y):
        z = x * 2
        w = einsum("ij,jk->ik", z, y)
        z.add_(1.0)
        return w

    assert any("einsum" in line for line in check_pass(run, written_later, tensor(3, 4), tensor(4, 5)))
    assert not any("einsum" in line for line in check_pass(run, written_later, rand(3, 4), rand(4, 5)))


def test_in_regions_without_grad():
    def program(x, y):
        with torch.no_grad():
            z = einsum("ij,jk->ik", x, y) * 2.0
        return einsum("ik,kl->il", z * 3.0, y.T)

    check_pass(planned, program, tensor(3, 4), tensor(4, 5))


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_of_equations(group):
    for equation, shapes in GROUPS[group]:
        check_pass(planned, lambda *o, equation=equation: einsum(equation, *o), *[tensor(*shape) for shape in shapes])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_random_chains_with_strided_operands(data):
    letters = "abcd"
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in letters}
    terms = [
        "".join(data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=3, unique=True))) for _ in range(4)
    ]
    kept = [label for label in letters if label in "".join(terms)]
    output = "".join(data.draw(st.permutations(kept)))[: data.draw(st.integers(0, 3))]
    inputs = []
    for term in terms:
        order = data.draw(st.permutations(range(len(term))))
        base = rand([sizes[term[place]] * 2 for place in order], dtype=torch.float64)
        base = base[tuple(slice(None, None, 2) for _ in term)]
        inputs.append(base.permute([order.index(place) for place in range(len(term))]).requires_grad_())
    equation = ",".join(terms[:2]) + "->" + "".join(dict.fromkeys(terms[0] + terms[1]))
    inner = equation.split("->")[1]

    def program(w, x, y, z):
        first = einsum(equation, w, x) * 2.0
        return einsum(f"{inner},{terms[2]},{terms[3]}->{output}", first, y / 4.0, z)

    check_pass(planned, program, *inputs)


def test_a_result_that_leaves_the_graph_keeps_the_views_of_eager_not_its_strides():
    def program(x, y):
        return einsum("efbad,cf->abcde", x, y)

    def seen(x, y):
        return program(x, y).relu()

    operands = rand(6, 5, 4, 3, 2, dtype=torch.float64), rand(7, 5, dtype=torch.float64)
    eager = program(*operands)
    assert not eager.is_contiguous()
    check_pass(run, program, *operands)
    # Elementwise calls hand strides on, so inside of the graph they are those of eager.
    check_pass(run, seen, *operands)
