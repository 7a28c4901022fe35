"""Lowering: right for all layouts and dtypes, as few calls as promised, and no surprise about the result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from equations import ROWS, Row, equations, make_operands, row_id
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import loops
from torch.utils._python_dispatch import TorchDispatchMode

from lazy_einsum.backward import arrival_seconds, backward
from lazy_einsum.best_ways import _copied_products_seconds, choose, finish_seconds
from lazy_einsum.cost import CPU, INDUCTOR, Machine
from lazy_einsum.kernels import lower, lower_plan
from lazy_einsum.layout import Sizes, Strides, contiguous_layout, elementwise_strides, label_strides
from lazy_einsum.plan import make_plan
from lazy_einsum.program import Program, Value, compile_program, operate, run
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec
from lazy_einsum.ways import Context, after_sums, copy_seconds, walk_order_seconds, ways


def parse(row: Row) -> EinsumSpec:
    return EinsumSpec.parse(row.equation, [len(shape) for shape in row.shapes])


def program_of(equation: str, operands: Sequence[torch.Tensor], contiguous: bool = False, **options: Any) -> Program:
    spec = EinsumSpec.parse(equation, [operand.dim() for operand in operands])
    types = [TensorType.of(operand) for operand in operands]
    if contiguous:
        options["strides"] = Strides.contiguous(spec.output_shape([operand.shape for operand in operands]))
    if len(operands) <= 2:
        return lower(spec, types, **options)
    return lower_plan(make_plan(spec, [operand.shape for operand in operands]), types, **options)


def targets(program: Program) -> list[str]:
    return [call.target for call in program.calls]


def normal_strides(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides where they matter."""
    return [0 if size == 1 or 0 in shape else stride for size, stride in zip(shape, strides, strict=True)]


def check(equation: str, operands: Sequence[torch.Tensor], tolerance: float = 1e-10, **options: Any) -> None:
    spec = EinsumSpec.parse(equation, [operand.dim() for operand in operands])
    expected = loops(spec, operands)
    for contiguous in (False, True):
        program = program_of(equation, operands, contiguous, **options)
        result = compile_program(program)(*operands)
        if operands[0].dtype == torch.int32 and len(operands) == 1 and spec.summed:
            # As in torch, the sum over a single operand of small integers is of int64.
            expected = expected.to(torch.int64)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run(program, operands), result, rtol=0, atol=0)
        assert tuple(result.shape) == program.shape
        assert normal_strides(result.shape, result.stride()) == normal_strides(program.shape, program.stride)
        assert result.is_contiguous() or not contiguous
        assert not any(result is operand for operand in operands)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_lowered_rows(item: tuple[str, Row], dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype == torch.int64:
        pytest.skip("CUDA multiplies no matrices of integers, in eager mode either")
    row = item[1]
    check(row.equation, make_operands(row.shapes, dtype, device=device))
    for seed in range(3):
        check(row.equation, make_operands(row.shapes, dtype, seed, strided=True, device=device))


@given(equations(), st.sampled_from([torch.float64, torch.int64, torch.int32, torch.complex128]), st.integers(0, 9))
def test_random_equations(row: Row, dtype: torch.dtype, seed: int) -> None:
    if dtype == torch.int32 and len(row.shapes) > 1 and parse(row).lone(row.shapes):
        # torch sums labels that one operand has to int64, and may then fail.
        dtype = torch.int64
    check(row.equation, make_operands(row.shapes, dtype, seed, strided=True))


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Any machine: some constants are up to 1,000 times as large or small."""
    drawn: dict[str, Any] = {"square": draw(st.sampled_from([1, 16]))}
    for field in fields(Machine):
        value = getattr(CPU, field.name)
        if isinstance(value, float) and draw(st.booleans()):
            drawn[field.name] = value * 10 ** draw(st.floats(-3, 3))
    return replace(CPU, **drawn)


@settings(deadline=None)
@given(equations(), machines(), st.integers(0, 9))
def test_programs_are_right_whatever_is_fast(row: Row, machine: Machine, seed: int) -> None:
    check(row.equation, make_operands(row.shapes, torch.int64, seed, strided=seed % 2 == 1), machine=machine)


class Calls(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_generated_copies_come_before_a_view() -> None:
    """Inductor lays out a copy as it likes, unless a view is taken of it; and where dimensions are merged by the same
    call, it copies element by element.
    """
    equation, operands = "abcd,ec,fd->abef", make_operands([(10, 10, 40, 40), (10, 40), (10, 40)], torch.float32)
    operands = [operand.requires_grad_() for operand in operands]
    names = {}
    for machine in (CPU, INDUCTOR):
        with Calls() as noted:
            compile_program(program_of(equation, operands, machine=machine))(*operands)
        names[machine] = noted.names
    # (``reshape`` is a copy and ``_unsafe_view`` where it is no view.)
    assert "_unsafe_view" in names[CPU] and "_unsafe_view" not in names[INDUCTOR]
    program = program_of("abc,cd->abd", make_operands([(300, 50, 20), (20, 3)], torch.float32), machine=INDUCTOR)
    copies = [place + 2 for place, name in enumerate(targets(program)) if name == "contiguous"]
    views = [call.args[0].number for call in program.calls if call.target == "reshape"]
    assert copies and set(copies) <= set(views)


def test_products_are_summed_without_a_tensor_between_where_code_is_generated() -> None:
    operands = make_operands([(30, 50000), (30, 50000)], torch.float32)
    assert "sum" not in targets(program_of("ab,ab->a", operands))
    assert targets(program_of("ab,ab->a", operands, machine=INDUCTOR)) == ["mul", "sum"]
    check("ab,ab->a", [operand.double() for operand in operands], machine=INDUCTOR)
    # Code that runs in the place of what was generated would hold the product.
    for shape, summed in (((2000, 30, 3), True), ((20_000, 10, 6), False)):
        found = targets(program_of("abc,abd->acd", make_operands([shape, shape], torch.float32), machine=INDUCTOR))
        assert ("sum" in found) == summed


def test_generated_products_lie_as_the_next_step_takes_them() -> None:
    """A copy of a product is part of its code, and has it go across the memory of its operands."""
    operands = make_operands([(128, 10, 64), (128, 10, 64), (10, 10, 10, 64)], torch.float32)
    program = program_of("abc,adc,ebdc->aec", operands, True, machine=INDUCTOR)
    (product,) = [place for place, name in enumerate(targets(program)) if name == "mul"]
    taken = next(place for place, name in enumerate(targets(program)) if name == "bmm")
    with Calls() as noted:
        compile_program(program)(*operands)
    # One copy of the matrices, one that has the product lie in order, none of the product as a matrix.
    assert targets(program)[product:taken].count("contiguous") <= 2 and noted.names.count("clone") <= 3


@pytest.mark.parametrize("size", [10, 2])
def test_copies_of_products_are_priced_as_products_where_code_is_generated(size: int) -> None:
    sizes = Sizes(a=128, b=10, c=64, d=size, e=10)
    context = Context(sizes, torch.float32, machine=INDUCTOR)
    one, two, other = (contiguous_layout(tuple(term), sizes) for term in ("abc", "acd", "edbc"))
    lie = contiguous_layout(tuple("abcd"), sizes)
    inner = next(way for way in ways(context, one, two, "abcd", "abcd") if way.result == lie)
    groups = ("c", "a", "db")
    way = next(way for way in ways(context, lie, other, "ace", "ace") if way.first == groups)
    way = way._replace(flips=(False, False))
    order, strides = "".join(groups), label_strides(lie, sizes)
    copied = copy_seconds(order, strides, sizes, INDUCTOR)
    walked = (strides, label_strides(contiguous_layout(groups, sizes), sizes))
    across = walk_order_seconds(order, walked, sizes, INDUCTOR)
    # Copies are dearer where rows are short.
    assert (across > copied) == (size > 2)
    added = _copied_products_seconds(context, way, (lie, inner), (other, None))
    assert copied + added == pytest.approx(max(across, copied))
    # Sums go along memory in any order, and what a matrix product gives is copied.
    for kind in ("multiply and sum", "product"):
        assert not _copied_products_seconds(context, way, (lie, inner._replace(kind=kind)), (other, None))


def test_a_factor_makes_no_copy_of_a_product() -> None:
    """Where it makes an expanded operand dense, the product lies otherwise than planned."""
    operands = [torch.rand(4, 1).expand(4, 5), torch.rand(4, 5, 1).expand(4, 5, 4)]
    for machine in (CPU, INDUCTOR):
        program = program_of("ac,bca->bca", operands, scale=2.5, machine=machine)
        assert "contiguous" not in targets(program)
        expected = 2.5 * torch.einsum("ac,bca->bca", *operands)
        torch.testing.assert_close(compile_program(program)(*operands), expected)


@pytest.mark.parametrize(
    ("equation", "dtype", "eager", "generated"),
    [
        ("ab,bc->ac", torch.float64, "mm", "bmm"),
        ("ab,b->a", torch.float64, "mv", "mv"),
        # A vector in a narrow type is a matrix.
        ("ab,b->a", torch.bfloat16, "mm", "bmm"),
    ],
)
def test_generated_code_multiplies_matrices_as_batches(
    equation: str, dtype: torch.dtype, eager: str, generated: str
) -> None:
    """Inductor copies the operands of ``mm`` as matrices, with divisions per element, those of ``bmm`` in loops."""
    operands = make_operands([(30,) * len(term) for term in equation.split("->")[0].split(",")], dtype)
    assert set(targets(program_of(equation, operands))) & {"mm", "bmm", "mv"} == {eager}
    for scale in (None, 3.0):
        program = program_of(equation, operands, scale=scale, machine=INDUCTOR)
        assert set(targets(program)) & {"mm", "bmm", "mv"} == {generated}
    if dtype is torch.float64:
        check(equation, operands, machine=INDUCTOR)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_small_integers_wrap_as_in_torch(dtype: torch.dtype) -> None:
    for _, row in ROWS:
        operands = make_operands(row.shapes, torch.int64)
        operands = [(operand * 37).to(dtype) for operand in operands]
        if len(operands) > 1 and parse(row).lone(row.shapes):
            continue
        result = run(program_of(row.equation, operands), operands)
        expected = torch.einsum(row.equation, *operands)
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(64, 4, 5), (3, 16, 16), (40, 2, 1)])
def test_integers_wrap_whatever_the_kernel(shape: tuple[int, int, int]) -> None:
    batch, rows, columns = shape
    for equation in ("zab,zb->za", "zab,zab->z", "zab,zcb->zac", "zab,zab->a"):
        terms = equation.split("->")[0].split(",")
        sizes = {"z": batch, "a": rows, "b": columns, "c": 3}
        for dtype in (torch.int8, torch.int32, torch.int64):
            top = torch.iinfo(dtype).max
            operands = [torch.randint(top // 2, top, [sizes[label] for label in term]).to(dtype) for term in terms]
            assert torch.equal(run(program_of(equation, operands), operands), torch.einsum(equation, *operands))


def test_bool_is_refused_where_torch_refuses_it() -> None:
    for _, row in ROWS:
        operands = [torch.ones(shape, dtype=torch.bool) for shape in row.shapes]
        if len(operands) > 2:
            continue
        try:
            expected = torch.einsum(row.equation, *operands)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                run(program_of(row.equation, operands), operands)
        else:
            result = run(program_of(row.equation, operands), operands)
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("a,a->", [(512,), (512,)]),
        ("ab,b->a", [(7, 512), (512,)]),
        ("ab,ab->", [(16, 32), (16, 32)]),
        ("zab,zb->za", [(64, 8, 16), (64, 16)]),
        ("za,za->z", [(64, 16), (64, 16)]),
        ("za,zab->zb", [(64, 16), (64, 16, 16)]),
        ("zij,zjk,zk->zi", [(64, 8, 4), (64, 4, 5), (64, 5)]),
    ],
)
def test_half_precision_is_as_accurate_as_torch(
    equation: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    operands = [torch.rand(shape, generator=generator).to(dtype) + 0.5 for shape in shapes]
    exact = torch.einsum(equation, *(operand.double() for operand in operands))
    result = run(program_of(equation, operands), operands)
    eager = torch.einsum(equation, *operands)
    assert result.dtype == dtype
    bound = (eager.double() - exact).abs().max() + exact.abs().max() * torch.finfo(dtype).eps
    assert (result.double() - exact).abs().max() <= bound


def test_half_precision_does_not_overflow_where_torch_does_not() -> None:
    one = torch.tensor([300.0, 300.0], dtype=torch.float16)
    other = torch.tensor([300.0, -300.0], dtype=torch.float16)
    for equation, operands in (
        ("a,a->", [one, other]),
        ("za,za->z", [one.expand(4, 2), other.expand(4, 2)]),
        ("za,zab->zb", [one.expand(4, 2), other[:, None].expand(4, 2, 3)]),
    ):
        result = run(program_of(equation, operands), operands)
        assert torch.equal(result, torch.einsum(equation, *operands))


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ab,bc->ac", [(3, 4), (4, 5)], ["mm"]),
        ("ab,cb->ac", [(3, 4), (5, 4)], ["permute", "mm"]),
        ("ba,bc->ca", [(4, 3), (4, 5)], ["permute", "mm"]),
        ("ab,b->a", [(3, 4), (4,)], ["mv"]),
        ("b,ab->a", [(4,), (3, 4)], ["mv"]),
        ("a,a->", [(4,), (4,)], ["dot"]),
        ("zab,zbc->zac", [(9, 3, 4), (9, 4, 5)], ["bmm"]),
        ("ab,ab->ab", [(3, 4), (3, 4)], ["mul"]),
        ("ab,b->ab", [(3, 4), (4,)], ["mul"]),
        ("a,b->ab", [(3,), (4,)], ["reshape", "mul"]),
        (",ab->ab", [(), (3, 4)], ["mul"]),
        ("ab->ba", [(3, 4)], ["permute"]),
        ("ab->ab", [(3, 4)], ["permute"]),
        ("ab->a", [(3, 4)], ["sum"]),
        ("ab->", [(3, 4)], ["sum"]),
        ("aa->a", [(3, 3)], ["diagonal"]),
        ("aa->", [(3, 3)], ["diagonal", "sum"]),
        ("ab,bc,cd->ad", [(3, 4), (4, 5), (5, 2)], ["mm", "mm"]),
        ("abc,cd->abd", [(3, 4, 5), (5, 6)], ["reshape", "mm", "reshape"]),
        ("zij,zjk,zk->zi", [(1000, 8, 4), (1000, 4, 5), (1000, 5)], ["reshape", "bmm", "bmm", "reshape"]),
    ],
)
def test_the_fewest_calls(equation: str, shapes: list[tuple[int, ...]], expected: list[str]) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    assert targets(program_of(equation, operands, len(operands) > 1)) == expected


def copied_elements(program: Program, operands: Sequence[torch.Tensor]) -> list[int]:
    """Size of each tensor that a call had to copy, and of the largest one of all, last."""
    values, found = list(operands), []
    for call in program.calls:
        receiver, *rest = [values[arg.number] if isinstance(arg, Value) else arg for arg in call.args]
        values.append(getattr(receiver, call.target)(*rest, **dict(call.kwargs)))
        same = values[-1].untyped_storage().data_ptr() == receiver.untyped_storage().data_ptr()
        if call.target in ("reshape", "contiguous", "clone") and not same:
            found.append(values[-1].numel())
    return [*found, max(value.untyped_storage().nbytes() // value.itemsize for value in values)]


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        # Both orders of each intermediate are possible; only one spares the copy.
        ("abc,cd,bde->ae", [(20, 30, 40), (40, 50), (30, 50, 90)]),
        ("abc,ad,be,cf->def", [(20, 21, 22), (20, 23), (21, 24), (22, 25)]),
        ("ijkl,ip,jq,kr,ls->pqrs", [(12, 12, 12, 12), (12, 2), (12, 3), (12, 5), (12, 7)]),
        ("efbad,cf->abcde", [(16, 24, 16, 16, 16), (24, 24)]),
        ("ab,bc,cd,de->ea", [(40, 30), (30, 50), (50, 20), (20, 60)]),
        ("zab,zbc,zcd->zad", [(9, 20, 30), (9, 30, 20), (9, 20, 40)]),
    ],
)
def test_intermediates_are_laid_out_for_their_use(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    *copied, largest = copied_elements(program_of(equation, operands), operands)
    assert all(10 * elements < largest for elements in copied)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("MP,Im->IPmM", [(4, 4), (1, 4)]),
        ("MP,Im->PIMm", [(4, 5), (1, 3)]),
        ("ab,bc->ca", [(4, 5), (5, 1)]),
        ("abc,cd->dab", [(2, 1, 3), (3, 4)]),
        ("ab,cd->bdac", [(4, 1), (1, 3)]),
        ("abc->cb", [(2, 1, 3)]),
        ("abcd->adb", [(4, 1, 2, 1)]),
    ],
)
def test_dimensions_of_size_one_have_the_strides_of_eager_where_code_may_see_them(
    equation: str, shapes: list[tuple[int, ...]]
) -> None:
    # torch.einsum lays out its results by the strides of its operands, those of dimensions of size 1 too.
    operands = [torch.randn(shape) for shape in shapes]
    expected = torch.einsum(equation, *operands)
    spec = EinsumSpec.parse(equation, [x.dim() for x in operands])
    program = lower(spec, [TensorType.of(x) for x in operands], Strides(expected.stride()))
    result = run(program, operands)
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected)


@st.composite
def _dense_strides(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor, its dimensions in any order."""
    order = draw(st.permutations(range(len(shape))))
    dense = torch.empty([shape[dim] for dim in order]).stride()
    return tuple(dense[order.index(dim)] for dim in range(len(shape)))


@settings(deadline=None)
@given(equations(), st.integers(0, 9), st.data())
def test_the_strides_that_are_asked_for_exactly(row: Row, seed: int, data: st.DataObject) -> None:
    spec = parse(row)
    if 0 in itertools.chain(*row.shapes):
        return
    asked = data.draw(_dense_strides(spec.output_shape(row.shapes)))
    operands = make_operands(row.shapes, torch.float64, seed, strided=True)
    scale = data.draw(st.sampled_from([None, 2.0]))
    if len(operands) == 1 and spec.is_view_only and scale is None:
        return
    program = program_of(row.equation, operands, strides=Strides(asked), scale=scale)
    result = run(program, operands)
    assert result.stride() == program.stride == asked
    torch.testing.assert_close(result, loops(spec, operands) * (scale or 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [(1, 2), (1, 7), (2, 1), (4, 4)])
def test_the_strides_of_a_tensor_that_is_scaled(stride: tuple[int, int]) -> None:
    operand = torch.ones(20).as_strided((2, 1), stride)
    for asked in ((1, 1), (1, 2)):
        program = program_of("ab->ab", [operand], strides=Strides(asked), scale=2.0)
        assert run(program, [operand]).stride() == program.stride == asked


def test_single_operands_without_a_sum_are_views() -> None:
    for _, row in ROWS:
        if not parse(row).is_view_only:
            continue
        (operand,) = make_operands(row.shapes, torch.float64)
        program = program_of(row.equation, [operand])
        assert set(targets(program)) <= {"permute", "diagonal"}
        result = run(program, [operand])
        assert result is not operand
        assert result._base is operand
        assert normal_strides(result.shape, result.stride()) == normal_strides(
            result.shape, torch.einsum(row.equation, operand).stride()
        )


def test_everything_else_is_fresh() -> None:
    for _, row in ROWS:
        operands = make_operands(row.shapes, torch.float64)
        if parse(row).is_view_only or 0 in [operand.numel() for operand in operands]:
            continue
        result = run(program_of(row.equation, operands), operands)
        for operand in operands:
            assert result.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr()


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_gradients(item: tuple[str, Row]) -> None:
    row = item[1]
    operands = [operand.requires_grad_() for operand in make_operands(row.shapes, torch.float64)]
    function = compile_program(program_of(row.equation, operands))

    def derivatives(result: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
        first = torch.autograd.grad((result * weights).sum() + result.pow(2).sum(), operands, create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), operands)
        return [*first, *second]

    expected = derivatives(torch.einsum(row.equation, *operands))
    for gradient, reference in zip(derivatives(function(*operands)), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "columns", "expands"), [((16, 24, 16, 16, 16), 64, True), ((64, 64, 8, 8, 8), 512, False)]
)
def test_operands_are_expanded_over_a_batch_under_autograd_where_they_are_small(
    shape: tuple[int, ...], columns: int, expands: bool
) -> None:
    # The gradient of an expanded operand is made for each of the batch, then summed.
    operands = [torch.empty(shape), torch.empty(columns, shape[1])]
    assert "expand" in targets(program_of("efbad,cf->abcde", operands))
    operands[1].requires_grad_()
    assert ("expand" in targets(program_of("efbad,cf->abcde", operands))) == expands


def test_sums_that_are_written_out_are_added_apart_under_autograd() -> None:
    # The gradients of ``addcmul`` take twice the calls of those of ``mul``. (Fewer elements make no loop.)
    operands = [torch.randn(2, 200_000), torch.randn(2, 2, 200_000)]
    assert "addcmul_" in targets(program_of("ab,acb->bc", operands))
    operands[0].requires_grad_()
    found = targets(program_of("ab,acb->bc", operands))
    assert "add_" in found and "addcmul_" not in found


@pytest.mark.parametrize(("equation", "shape"), [("ab,ab->b", (30, 500)), ("abc,abc->ac", (30, 5, 20))])
def test_products_are_summed_in_the_order_of_memory(equation: str, shape: tuple[int, ...]) -> None:
    # (18 us, 24 with the results outermost; 5 by 2,000: 20 and 61.)
    assert targets(program_of(equation, make_operands([shape, shape], torch.float32))) == ["mul", "sum"]


def test_a_product_is_laid_out_for_the_sum_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = [torch.empty(2400, 16, 3), torch.empty(2400, 3), torch.empty(3, 3, 3), torch.empty(2400, 16)]
    seconds = program_of("eui,ej,ijk,eu->euk", operands).seconds
    monkeypatch.setattr("lazy_einsum.ways._summed_first", lambda order, ahead: ())
    assert seconds < 0.9 * program_of("eui,ej,ijk,eu->euk", operands).seconds


def test_a_label_inside_a_merged_dimension_can_be_summed() -> None:
    # Not from a plan of ours, which sums such a label earlier; a chain of einsums that stays as written has it.
    spec = EinsumSpec.parse("abx,xcd,be->ce", [3, 3, 2])
    operands = make_operands(((2, 3, 4), (4, 5, 2), (3, 6)), torch.float64)
    from lazy_einsum.plan import Contraction, Plan

    first = EinsumSpec(("abx", "xcd"), "abcd")
    second = EinsumSpec(("abcd", "be"), "ce")
    shapes = tuple(tuple(operand.shape) for operand in operands)
    steps = (
        Contraction((0, 1), first, shapes[:2], (2, 3, 5, 2), 0),
        Contraction((3, 2), second, ((2, 3, 5, 2), shapes[2]), (5, 6), 0),
    )
    plan = Plan(spec, shapes, steps, 0, 0, 0.0, 0, "given")
    program = lower_plan(plan, [TensorType.of(operand) for operand in operands])
    torch.testing.assert_close(run(program, operands), loops(spec, operands))


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_scale(item: tuple[str, Row]) -> None:
    row = item[1]
    for dtype, scale in ((torch.float64, 2.5), (torch.int64, 3), (torch.complex128, 1 - 2j), (torch.float64, -2)):
        operands = make_operands(row.shapes, dtype)
        program = program_of(row.equation, operands, True, scale=scale)
        result = run(program, operands)
        torch.testing.assert_close(result, loops(parse(row), operands) * scale, rtol=1e-10, atol=1e-10)
        assert result.is_contiguous()


def test_scale_goes_to_the_fewest_elements() -> None:
    def scaled(equation: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: Any = 0.5) -> Any:
        operands = [torch.ones(shape).to(dtype) for shape in shapes]
        program = program_of(equation, operands, scale=scale)
        place = next(
            number for number, call in enumerate(program.calls) if call.target == "mul" and call.args[1] == scale
        )
        rest = {call.target for call in program.calls[place + 1 :]}
        return "result" if rest <= {"reshape", "permute"} else program.calls[place].args[0].number

    assert scaled("ab,bc->ac", (100, 90), (90, 2)) == 1
    assert scaled("ab,bc->ac", (4, 100), (100, 40)) == "result"
    assert scaled("ab,bc,cd->ad", (100, 50), (50, 2), (2, 100)) == 1
    assert scaled("a,b->ab", (3,), (4,)) == 0
    # From some thousand elements on a matrix product takes the factor for free.
    for equation, name in (("ab,bc->ac", "addmm"), ("zab,zbc->zac", "baddbmm"), ("zab,zbc->caz", "baddbmm")):
        operands = [torch.randn([80] * len(term)) for term in equation.split("->")[0].split(",")]
        program = program_of(equation, operands, scale=0.5)
        assert name in targets(program)
        assert "mul" not in targets(program)
        torch.testing.assert_close(run(program, operands), torch.einsum(equation, *operands) * 0.5)
    # Where the factor changes the type, or could leave the range of a narrow type, it stays on the result.
    assert scaled("ab,bc->ac", (100, 3), (3, 100), dtype=torch.int64) == "result"
    assert scaled("ab,bc->ac", (100, 3), (3, 100), dtype=torch.float16) == "result"
    assert scaled("ab,bc->ac", (100, 3), (3, 100), scale=0.5j) == "result"


def test_programs_promote_as_a_factor_on_the_result() -> None:
    operands = make_operands(((3, 4), (4, 5)), torch.int64)
    result = run(program_of("ab,bc->ac", operands, scale=0.5), operands)
    torch.testing.assert_close(result, torch.einsum("ab,bc->ac", *operands) * 0.5)


def test_lower_takes_two_operands_at_most() -> None:
    types = [TensorType.of(torch.ones(2, 2))] * 3
    with pytest.raises(ValueError, match="lower_plan"):
        lower(EinsumSpec.parse("ab,bc,cd->ad", [2, 2, 2]), types)


def test_intermediates_are_freed_and_source_is_shared() -> None:
    operands = [torch.randn(2, 16), *(torch.randn(16, 16) for _ in range(3))]
    program = program_of("ab,bc,cd,de->ae", operands)
    assert targets(program) == ["mm", "mm", "mm"]
    assert program.source.count("del ") == 1
    assert compile_program(program) is compile_program(program_of("xy,yz,zw,wv->xv", operands))


@st.composite
def _operands(draw: st.DrawFn) -> list[torch.Tensor]:
    """One to three operands that broadcast, in any order in memory, dimensions of size 1 with any stride."""
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 2, 0]), max_size=4))
    operands = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.sampled_from([0, 0, 0, *range(len(shape) + 1)]))
        own = [1 if draw(st.integers(0, 5)) == 0 else size for size in shape[start:]]
        order = draw(st.permutations(range(len(own))))
        gap = draw(st.sampled_from([1, 1, 2]))
        strides = [0] * len(own)
        step = 1
        for dim in order:
            strides[dim] = draw(st.sampled_from([step, 1, 2, 24])) if own[dim] == 1 else step
            step *= max(own[dim], 1) * gap
        operands.append(torch.zeros(20_000).as_strided(own, strides))
    return operands


@given(_operands(), st.integers(0, 2))
def test_strides_of_elementwise_results_are_those_of_torch(operands: list[torch.Tensor], kind: int) -> None:
    described = [(tuple(operand.shape), operand.stride()) for operand in operands]
    if len(operands) == 1:
        result = [operands[0].neg(), operands[0] * 2.0, operands[0].sigmoid()][kind]
        described += [((), ())] * (kind == 1)
    elif len(operands) == 2:
        result = [operands[0] * operands[1], torch.copysign(*operands), operands[0] == operands[1]][kind]
    else:
        result = torch.addcmul(*operands)
    assert elementwise_strides(tuple(result.shape), tuple(described)) == result.stride()


def test_narrow_transposed_matrices_are_copied_as_a_batch_of_one() -> None:
    # (As they are, torch copies 20,000 by 2 in six times the time.)
    for shapes, batch in ((((2, 2000), (2,)), True), (((2, 300), (2,)), False), (((60, 2000), (60,)), False)):
        operands = [x.requires_grad_() for x in make_operands(shapes, torch.float64)]
        spec = EinsumSpec.parse("ab,a->ba", [2, 1])
        types = [TensorType.of(x) for x in operands]
        program = lower(spec, types, strides=Strides.contiguous(shapes[0][::-1]))
        result = run(program, operands)
        assert result.is_contiguous()
        assert result.stride() == program.stride
        expected = torch.einsum("ab,a->ba", *operands)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        wanted = torch.autograd.grad(expected.sin().sum(), operands)
        found = torch.autograd.grad(result.sin().sum(), operands)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        copied = [call for call in program.calls if call.target == "contiguous"]
        as_batch = [call for call in program.calls if call.target == "reshape" and call.args[1][0] == 1]
        if copied:
            assert bool(as_batch) == batch
        assert copied or not batch


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        # The gradient of a matrix times a vector of few elements has short rows; that of a row times a matrix has not.
        ("k,kn->n", [(3,), (3, 160_000)], "mm"),
        ("nk,k->n", [(10_000, 3), (3,)], "bmm"),
        ("k,kn->n", [(512,), (512, 512)], "mv"),
        ("nk,k->n", [(512, 512), (512,)], "mv"),
        # Slices that are stacked for the gradient are out of the cache by then.
        ("k,knm->mn", [(7,), (7, 400, 400)], "mm"),
    ],
)
def test_rows_and_vectors_with_gradients(equation: str, shapes: list[tuple[int, ...]], expected: str) -> None:
    spec = EinsumSpec.parse(equation, [len(shape) for shape in shapes])
    for follows in (False, True):
        types = [TensorType.of(torch.empty(shape, requires_grad=follows)) for shape in shapes]
        program = lower(spec, types, Strides.contiguous(spec.output_shape(shapes)))
        kinds = [call.target for call in program.calls if call.target in ("mm", "mv", "bmm", "mul")]
        assert kinds == [expected if follows else "mv"], follows


def test_copies_are_made_as_gradients_want_them() -> None:
    # Faster to copy with the long label outside, but its gradient had rows of 6 elements then: 1,550 us, else 385.
    spec = EinsumSpec.parse("dba,ebfhgc->efhcdag", [3, 6])
    shapes = [(6, 6, 23), (15, 6, 23, 4, 2, 2)]
    result = torch.empty(138, 5520).view(6, 23, 15, 23, 4, 2, 2).permute(2, 3, 4, 5, 0, 1, 6)
    strides = {}
    for follows in (False, True):
        types = [TensorType.of(torch.empty(shape, requires_grad=follows)) for shape in shapes]
        program = lower(spec, types, Strides(result.stride()))
        operands = make_operands(shapes, torch.float32)
        values = list(operands)
        for call in program.calls:
            values.append(operate(call, values))
            if call.target == "mm":
                strides[follows] = [values[arg.number].stride() for arg in call.args if isinstance(arg, Value)]
    assert strides[False] != strides[True]
    assert (5520, 1) in strides[True]


@pytest.mark.parametrize(
    "equation", ["abc,acd,bde->ae", "ab,bc,cd->ad", "abc,ad,be,cf,dg,eh->fgh", "zabc,zad,zbe,cf,dg,ez->fgz"]
)
@pytest.mark.parametrize("size", [3, 30])
def test_what_is_kept_is_priced_to_the_end(equation: str, size: int) -> None:
    """Seconds of each choice are those of its way, of the way of each child, and of the gradients between them."""
    left, output = equation.split("->")
    terms = left.split(",")
    sizes = Sizes({label: size + place for place, label in enumerate(sorted(set("".join(terms))))})
    operands = [torch.empty([sizes[label] for label in term], requires_grad=True) for term in terms]
    spec = EinsumSpec.parse(equation, [x.dim() for x in operands])
    steps = make_plan(spec, [x.shape for x in operands]).steps
    context = Context(sizes, torch.float32, True)
    layouts = [contiguous_layout(tuple(term), sizes) for term in terms]
    choices = choose(context, steps, layouts, tuple(output), None, [True] * len(terms), None)
    assert any(len(kept) > 1 for kept in choices[len(terms) : -1])
    for step, kept in zip(steps, choices[len(terms) :], strict=True):
        for choice in kept:
            children = [choices[operand][place] for operand, place in zip(step.operands, choice.children, strict=True)]
            assert choice.way is not None
            way_back = backward(choice.way, (True, True), sizes)
            spent = after_sums(context, children[0].layout, children[1].layout, step.spec.output)[2]
            seconds = spent + choice.way.seconds + way_back.seconds
            for child, gradient in zip(children, way_back.gradients, strict=True):
                seconds += child.seconds
                if child.way is not None and gradient is not None:
                    seconds += arrival_seconds(child.way, gradient, sizes)
            if step is steps[-1]:
                seconds += finish_seconds(context, choice.way, tuple(output), None, True)
            assert choice.seconds == pytest.approx(seconds)
