"""A plan run in blocks gives what it gives as a whole, and holds less at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from equations import Row, equations, make_operands
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import loops
from torch.utils._python_dispatch import TorchDispatchMode

from lazy_einsum import OptimizedModule, blocks, contract
from lazy_einsum.blocks import _in_blocks, lower_in_blocks
from lazy_einsum.cost import CPU
from lazy_einsum.kernels import lower_plan
from lazy_einsum.layout import Strides
from lazy_einsum.plan import Plan, make_plan
from lazy_einsum.program import CAT, Program, compile_program, run
from lazy_einsum.signature import TensorType
from lazy_einsum.sizes import SymbolicSize
from lazy_einsum.spec import EinsumSpec

# One intermediate has 60,000 elements, more than any operand and the result.
WIDE = "abc,adc,bde->ae", ((40, 30, 20), (40, 50, 20), (30, 50, 6))


class Sizes(TorchDispatchMode):
    """Notes the largest number of elements that any call gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every intermediate counts as large, and as very slow."""
    monkeypatch.setattr(blocks, "LARGE", 3 * 2**13)
    monkeypatch.setattr(blocks, "SMALL", 2**14)
    monkeypatch.setattr(blocks, "_FRESH", 1.0)


def plan_of(equation: str, operands: Sequence[torch.Tensor]) -> tuple[Plan, list[TensorType]]:
    spec = EinsumSpec.parse(equation, [x.dim() for x in operands])
    return make_plan(spec, [x.shape for x in operands]), [TensorType.of(x) for x in operands]


def joins(program: Program) -> bool:
    return any(call.target == CAT for call in program.calls)


@settings(max_examples=150, deadline=None)
@given(row=equations(max_operands=5), data=st.data())
def test_every_label_in_blocks_of_every_length(row: Row, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**20))
    operands = make_operands(row.shapes, torch.int64, seed, strided=True)
    plan, types = plan_of(row.equation, operands)
    shape = plan.spec.output_shape(row.shapes)
    large = [(label, size) for label, size in zip(plan.spec.output, shape, strict=True) if size > 1]
    if len(operands) < 2 or not large:
        return
    label, size = data.draw(st.sampled_from(large))
    length = data.draw(st.integers(1, size - 1))
    order = data.draw(st.permutations(range(len(shape))))
    scale = data.draw(st.sampled_from([None, 3]))
    program, _ = _in_blocks(plan, types, label, length, order, scale, CPU)
    result = compile_program(program)(*operands)
    expected = loops(plan.spec, operands) * (scale or 1)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(run(program, operands), result, rtol=0, atol=0)
    assert result.permute(order).is_contiguous()
    assert result.stride() == program.stride
    assert joins(program)


def test_blocks_hold_less_at_a_time(small: None) -> None:
    operands = make_operands(WIDE[1], torch.float64)
    plan, types = plan_of(WIDE[0], operands)
    whole, parts = lower_plan(plan, types), lower_in_blocks(plan, types)
    assert joins(parts)
    assert not joins(whole)
    found, largest = [], []
    for program in (whole, parts):
        with Sizes() as sizes:
            found.append(run(program, operands))
        largest.append(sizes.largest)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert largest[1] < largest[0] / 2


def test_what_does_not_depend_on_the_label_is_computed_once() -> None:
    operands = make_operands(((6, 5), (5, 4), (4, 3), (3, 2)), torch.int64)
    spec = EinsumSpec.parse("ab,bc,cd,de->ae", [2] * 4)
    plan = make_plan(spec, [x.shape for x in operands], optimize=((2, 3), (1, 2), (0, 1)))
    program, _ = _in_blocks(plan, [TensorType.of(x) for x in operands], "a", 2, (0, 1), None, CPU)
    n_products = sum(call.target in ("mm", "bmm") for call in program.calls)
    assert n_products == 2 + 3
    torch.testing.assert_close(run(program, operands), torch.linalg.multi_dot([x.double() for x in operands]).long())


def test_the_strides_that_are_asked_for(small: None) -> None:
    operands = make_operands(WIDE[1], torch.float64)
    plan, types = plan_of(WIDE[0], operands)
    for stride in ((6, 1), (1, 40)):
        program = lower_in_blocks(plan, types, Strides(stride))
        assert joins(program)
        assert run(program, operands).stride() == stride


def test_no_blocks_where_they_give_other_strides_than_are_asked_for_exactly(small: None) -> None:
    operands = make_operands(((40, 30, 20), (40, 50, 20), (30, 50, 6), (1,)), torch.float64)
    plan, types = plan_of("abc,adc,bde,f->fae", operands)
    for stride in ((240, 6, 1), (6, 6, 1), (1, 6, 1), (40, 1, 40), (1, 1, 40)):
        program = lower_in_blocks(plan, types, Strides(stride))
        assert joins(program)
        assert run(program, operands).stride() == program.stride == stride
    # No dense tensor has a dimension with a stride of 3 here.
    assert not joins(lower_in_blocks(plan, types, Strides((3, 6, 1))))
    assert joins(lower_in_blocks(plan, types, Strides((3, 6, 1), exact=False)))


def test_wholes(small: None) -> None:
    """Where autograd keeps all intermediates, or the result is the largest of all, there are no blocks."""
    operands = make_operands(WIDE[1], torch.float64)
    plan, types = plan_of(WIDE[0], operands)
    assert joins(lower_in_blocks(plan, types))
    types[1] = TensorType.of(operands[1].requires_grad_())
    assert not joins(lower_in_blocks(plan, types))
    chain = make_operands(((50, 3), (3, 3), (3, 50)), torch.float64)
    assert not joins(lower_in_blocks(*plan_of("ab,bc,cd->ad", chain)))


def test_sizes_that_vary_have_no_blocks(small: None) -> None:
    """Code for blocks holds for one size only."""
    operands = make_operands(WIDE[1], torch.float64)
    plan, types = plan_of(WIDE[0], operands)
    assert joins(lower_in_blocks(plan, types))
    rows = SymbolicSize.symbol("s0", 40)
    types = [replace(known, shape=(rows, *known.shape[1:])) for known in types[:2]] + types[2:]
    plan = replace(plan, shapes=tuple(known.shape for known in types))
    assert not joins(lower_in_blocks(plan, types))


def test_intermediates_no_larger_than_the_result_stay_whole(small: None) -> None:
    operands = make_operands(((100, 40), (40, 40), (40, 100)), torch.float64)
    plan, types = plan_of("ab,bc,cd->ad", operands)
    assert plan.steps[0].size * 8 > blocks.LARGE
    assert not joins(lower_in_blocks(plan, types))


def test_blocks_that_leave_intermediates_large_gain_nothing(small: None) -> None:
    # Two blocks of the only label that counts; either has an intermediate of 80 kB.
    operands = make_operands(((2, 100, 5), (2, 100, 5), (100, 100, 3)), torch.float64)
    spec = EinsumSpec.parse("abc,adc,bde->ae", [3, 3, 3])
    plan = make_plan(spec, [x.shape for x in operands], optimize=((0, 1), (0, 1)))
    assert not joins(lower_in_blocks(plan, [TensorType.of(x) for x in operands]))


def test_the_number_of_blocks_is_limited(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 2**10)
    program = lower_in_blocks(*plan_of(WIDE[0], make_operands(WIDE[1], torch.float64)))
    (joined,) = (call for call in program.calls if call.target == CAT)
    assert 1 < len(joined.args) - 1 <= blocks._MOST < 40


def test_blocks_have_to_be_clearly_better(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, types = plan_of(WIDE[0], make_operands(WIDE[1], torch.float64))
    parts, whole = lower_in_blocks(plan, types).seconds, lower_plan(plan, types).seconds
    n_bytes = 8 * sum(step.size for step in plan.steps[:-1] if 8 * step.size > blocks.LARGE)
    for part, joined in ((0.8, True), (0.95, False)):
        monkeypatch.setattr(blocks, "_FRESH", (parts / part - whole) / n_bytes)
        assert joins(lower_in_blocks(plan, types)) == joined


def test_einsum_runs_in_blocks(small: None) -> None:
    operands = make_operands(WIDE[1], torch.float64)
    contract._prepare.cache_clear()
    try:
        contract.einsum(WIDE[0], *operands)  # asks torch.einsum for the strides of its result
        with Sizes() as sizes:
            result = contract.einsum(WIDE[0], *operands)
    finally:
        contract._prepare.cache_clear()
    assert sizes.largest < 30_000
    torch.testing.assert_close(result, torch.einsum(WIDE[0], *operands), rtol=1e-12, atol=1e-12)


def test_an_empty_result_of_large_intermediates(small: None) -> None:
    operands = make_operands(((0, 80), (80, 40, 2), (40, 40, 2)), torch.float64)
    plan, types = plan_of("ab,bcd,ced->ae", operands)
    assert run(lower_in_blocks(plan, types), operands).shape == (0, 40)
    spec = plan.spec
    plan = make_plan(spec, [x.shape for x in operands], optimize=((1, 2), (0, 1)))
    assert plan.steps[0].size * 8 > blocks.LARGE
    assert run(lower_in_blocks(plan, types), operands).shape == (0, 40)


def test_small_intermediates_stay_whole() -> None:
    operands = make_operands(WIDE[1], torch.float64)
    assert not joins(lower_in_blocks(*plan_of(WIDE[0], operands)))


def test_large_intermediates_of_a_module() -> None:
    """Two of 16 MB, with the thresholds as they are."""
    equation, shapes = "abc,adc,bde->ae", ((32, 256, 8), (32, 512, 8), (256, 512, 2))
    operands = make_operands(shapes, torch.float32)
    spec = EinsumSpec.parse(equation, [3, 3, 3])
    plan = make_plan(spec, shapes, optimize=((0, 1), (0, 1)))
    assert plan.largest_intermediate * 4 > 2 * blocks.LARGE
    program = lower_in_blocks(plan, [TensorType.of(x) for x in operands])
    assert joins(program)
    wrapped = OptimizedModule(lambda x, y, z: torch.einsum(equation, x, y, z), optimize=((0, 1), (0, 1)))
    with torch.no_grad():
        result = wrapped(*operands)
    assert "torch.cat" in wrapped.code
    expected = torch.einsum(equation, *(x.double() for x in operands)).float()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    followed = [x.requires_grad_() for x in operands]
    wrapped(*followed).sum().backward()
    assert "torch.cat" not in wrapped.code


def test_the_pass_writes_blocks_into_a_graph(small: None) -> None:
    operands = make_operands(WIDE[1], torch.float64)
    wrapped = OptimizedModule(lambda x, y, z: 2 * torch.einsum(WIDE[0], x, y, z).t())
    with torch.no_grad():
        result = wrapped(*operands)
        expected = 2 * torch.einsum(WIDE[0], *operands).t()
    assert wrapped.code.count("torch.cat") == 1
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
