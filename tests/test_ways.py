"""Each way to contract two tensors, whether it is the best one or not, gives what torch.einsum gives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from test_backward import EQUATIONS

from lazy_einsum.cost import CPU, INDUCTOR, Machine
from lazy_einsum.kernels import _write_way, _Writer
from lazy_einsum.layout import Layout, Sizes, contiguous_layout, label_strides
from lazy_einsum.program import Program, compile_program, run
from lazy_einsum.sizes import SymbolicSize
from lazy_einsum.ways import SHORT, Context, Way, _matrix, is_matrix, matrix_view, ways

SMALL = {"a": 3, "b": 4, "c": 5, "d": 6}
LARGE = {"a": 9, "b": 8, "c": 17, "d": 12}
LONG = {"a": 2, "b": 2, "c": 2, "d": 2, "e": 50}


def laid_out(
    term: str, order: tuple[str, ...], sizes: Mapping[str, int], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A random tensor with the labels of ``term`` as dimensions, that lies in memory in this order."""
    own = [label for label in order if label in term]
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn([sizes[label] for label in own], generator=generator, dtype=dtype)
    return tensor.permute([own.index(label) for label in term])


def all_ways(
    equation: str,
    operands: list[torch.Tensor],
    sizes: Mapping[str, int],
    hint: str = "",
    ahead: str = "",
    machine: Machine = CPU,
) -> tuple[list[Way], list[Layout]]:
    left, output = equation.split("->")
    layouts = [Layout(tuple(term), x.stride()) for term, x in zip(left.split(","), operands, strict=True)]
    context = Context(Sizes(sizes), operands[0].dtype, any(x.requires_grad for x in operands), machine=machine)
    return list(ways(context, *layouts, output, hint or output, ahead)), layouts


def program_of(
    way: Way,
    layouts: list[Layout],
    sizes: Mapping[str, int],
    operands: list[torch.Tensor],
    machine: Machine = CPU,
) -> Program:
    writer = _Writer(Sizes(sizes), 2, machine)
    writer.layouts.update(enumerate(layouts))
    pair = (1, 0) if way.swap else (0, 1)
    context = Context(Sizes(sizes), operands[0].dtype, any(x.requires_grad for x in operands), machine=machine)
    return writer.program(_write_way(writer, context, way, *pair, None), 0.0)


@pytest.mark.parametrize("machine", [CPU, INDUCTOR], ids=["", "generated"])
@pytest.mark.parametrize("follows", [False, True], ids=["", "followed"])
@pytest.mark.parametrize("sizes", [SMALL, LARGE, LONG], ids=["small", "large", "long"])
@pytest.mark.parametrize("equation", [*EQUATIONS, "eab,ebc->eac", "eab,abc->ec", "abe,abc->ec", "a,ab->b"])
def test_every_way_computes_the_contraction(
    equation: str, sizes: Mapping[str, int], follows: bool, machine: Machine
) -> None:
    if "e" in equation and "e" not in sizes:
        sizes = {**sizes, "e": 7}
    left, output = equation.split("->")
    terms = left.split(",")
    for order in itertools.islice(itertools.permutations(sorted(set(equation) - set(",->"))), 0, None, 3):
        operands = [laid_out(term, order, sizes).requires_grad_(follows) for term in terms]
        expected = torch.einsum(equation, *operands)
        found, layouts = all_ways(equation, operands, sizes, "".join(order), output[:1], machine)
        assert found
        for way in found:
            assert way.seconds > 0
            program = program_of(way, layouts, sizes, operands, machine)
            result = run(program, operands)
            assert result.stride() == way.result.strides, way
            own = label_strides(way.result, sizes)
            seen = result.as_strided([sizes[label] for label in output], [own[label] for label in output])
            torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(compile_program(program)(*operands), result, rtol=0, atol=0)


@pytest.mark.parametrize("machine", [CPU, INDUCTOR], ids=["", "generated"])
@pytest.mark.parametrize("follows", [False, True], ids=["", "followed"])
def test_all_kinds_are_among_them(follows: bool, machine: Machine) -> None:
    kinds = set()
    for equation, sizes in itertools.product(EQUATIONS, (SMALL, LARGE)):
        terms = equation.split("->")[0].split(",")
        operands = [laid_out(term, tuple("abcd"), sizes).requires_grad_(follows) for term in terms]
        kinds |= {way.kind for way in all_ways(equation, operands, sizes, machine=machine)[0]}
    # Generated code would stack the gradients of slices.
    loops = {"loop"} if machine is CPU or not follows else set()
    assert kinds == {"product", "multiply", "multiply and sum"} | loops


def test_products_that_broadcast_where_code_is_generated() -> None:
    """Inductor makes copies part of the product, which then reads across memory for each element; it writes the product
    in any order.
    """
    sizes = {"a": 128, "b": 64, "c": 1, "d": 64}
    operands = [laid_out(term, tuple("abd"), sizes) for term in ("ab", "ad")]
    lie = contiguous_layout(tuple("bda"), Sizes(sizes))
    for machine in (CPU, INDUCTOR):
        found, _ = all_ways("ab,ad->bda", operands, sizes, machine=machine)
        (way,) = [way for way in found if way.result == lie]
        assert way.copies == (machine is CPU, machine is CPU)
        along = min(found, key=lambda way: way.seconds)
        assert along.result != lie
        assert machine is CPU or way.seconds - along.seconds > 128 * 64 * 64 * INDUCTOR.strided_element / 2


def _sums(equation: str, sizes: Mapping[str, int], machine: Machine) -> list[Way]:
    operands = [laid_out(term, tuple("abcd"), sizes, torch.float32) for term in equation.split("->")[0].split(",")]
    return [way for way in all_ways(equation, operands, sizes, machine=machine)[0] if way.kind == "multiply and sum"]


def test_products_that_are_summed_where_code_is_generated() -> None:
    # Nothing is written and read between the two.
    sizes = {"a": 300, "b": 800, "c": 1, "d": 1}
    (called,), (generated,) = (_sums("ab,ab->a", sizes, machine) for machine in (CPU, INDUCTOR))
    assert generated.seconds < 0.75 * called.seconds
    # The result may be the largest tensor, and the product some times as large.
    assert _sums("ab,bc->ac", {**SMALL, "a": 1000, "b": 3, "c": 1000}, INDUCTOR)
    assert not _sums("ab,bc->ac", {**SMALL, "a": 1000, "b": 5, "c": 1000}, INDUCTOR)


def test_a_product_that_broadcasts_may_lie_as_the_next_sum_wants() -> None:
    sizes = {"a": 30, "b": 3, "c": 4, "d": 5}
    operands = [laid_out(term, tuple("adbc"), sizes) for term in ("adb", "ac")]

    def orders(ahead: str) -> set[str]:
        return {"".join(way.result.dims) for way in all_ways("adb,ac->adbc", operands, sizes, ahead=ahead)[0]}

    # What is summed next first, and the long dimensions last.
    assert "bcad" in orders("bc") - orders("")


def _has_loop(equation: str, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64) -> bool:
    plain = {label: int(size) for label, size in sizes.items()}
    operands = [laid_out(term, tuple("abcd"), plain, torch.float64).to(dtype) for term in equation[:-4].split(",")]
    return any(way.kind == "loop" for way in all_ways(equation, operands, sizes)[0])


def test_sums_are_written_out_only_where_they_are_short() -> None:
    equation = "ab,bc->ac"
    sizes = {"a": 30, "b": SHORT, "c": 40}
    assert _has_loop(equation, sizes)
    assert not _has_loop(equation, {**sizes, "b": SHORT + 1})
    # Of nothing there is no first term.
    assert not _has_loop(equation, {**sizes, "b": 0})
    # Code for many sizes can't have as many terms as one of them.
    assert not _has_loop(equation, {**sizes, "b": SymbolicSize.symbol("s0", 4)})
    assert _has_loop(equation, {**sizes, "a": SymbolicSize.symbol("s0", 30)})
    # A sum in a narrow type is rounded at each term.
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
        assert not _has_loop(equation, sizes, dtype)


@pytest.mark.parametrize("naive", [False, True])
def test_views_are_remembered_apart_for_products_in_plain_loops(naive: bool) -> None:
    context = Context(Sizes(a=30, b=40), torch.float64)
    layout = Layout(("a", "b"), (90, 2))
    strides = label_strides(layout, context.sizes)
    wanted = {each: matrix_view(layout, ("a", "b"), strides, context.sizes, each) for each in (False, True)}
    assert wanted[False] != wanted[True]
    for each in (naive, not naive, naive):
        assert _matrix(context, layout, ("a", "b"), strides, each, False) == wanted[each]


def test_what_is_a_matrix_to_the_library() -> None:
    sizes = Sizes(a=30, b=40, c=50)
    cases = [
        (("a", "b", "c"), (2000, 50, 1), True),
        (("a", "b", "c"), (2000, 1, 40), True),
        (("a", "b", "c"), (1, 1500, 30), False),
        (("a", "b", "c"), (50, 1500, 1), True),
        (("a", "b", "c"), (2000, 0, 1), False),
        (("a", "b", "c"), (2000, 1, 0), False),
        (("a", "", "c"), (1, 1, 30), False),
        (("a", "", "c"), (50, 50, 1), True),
        (("a", "b", ""), (1, 30, 1), False),
        (("a", "b", ""), (40, 1, 1), True),
        (("b", "c"), (1, 40), True),
        (("", "c"), (1, 40), True),
        (("c",), (40,), True),
    ]
    for groups, strides, expected in cases:
        assert is_matrix(groups, strides, sizes) == expected, (groups, strides)


@pytest.mark.parametrize("machine", [CPU, INDUCTOR], ids=["", "generated"])
@pytest.mark.parametrize("equation", [*EQUATIONS, "abd,bcd->abc"])
def test_every_way_can_be_differentiated_twice(equation: str, machine: Machine) -> None:
    left, _ = equation.split("->")
    operands = [laid_out(term, tuple("dbac"), SMALL).requires_grad_() for term in left.split(",")]

    def derivatives(result: torch.Tensor) -> list[torch.Tensor]:
        first = torch.autograd.grad(result.sin().sum(), operands, create_graph=True)
        return [*first, *torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), operands)]

    expected = derivatives(torch.einsum(equation, *operands))
    found, layouts = all_ways(equation, operands, SMALL, machine=machine)
    for way in found:
        result = run(program_of(way, layouts, SMALL, operands, machine), operands)
        for gradient, reference in zip(derivatives(result), expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("machine", [CPU, INDUCTOR], ids=["", "generated"])
@pytest.mark.parametrize("equation", ["ab,bc->ac", "ab,b->a", "dab,dbc->dac", "a,ab->b", "ab,ac->abc"])
def test_lazily_conjugated_and_expanded_operands(equation: str, machine: Machine) -> None:
    left, _ = equation.split("->")
    terms = left.split(",")
    for change in (torch.conj, lambda x: x[..., :1].expand(x.shape), lambda x: x[:1].expand(x.shape)):
        operands = [laid_out(term, tuple("abcd"), SMALL, torch.complex128) for term in terms]
        operands[0] = change(operands[0])
        found, layouts = all_ways(equation, operands, SMALL, machine=machine)
        for way in found:
            result = run(program_of(way, layouts, SMALL, operands, machine), operands)
            own = label_strides(way.result, SMALL)
            output = equation.split("->")[1]
            seen = result.as_strided([SMALL[label] for label in output], [own[label] for label in output])
            seen = seen.conj() if result.is_conj() and not seen.is_conj() else seen
            torch.testing.assert_close(seen, torch.einsum(equation, *operands), rtol=1e-12, atol=1e-12)
