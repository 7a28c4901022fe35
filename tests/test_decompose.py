"""The calls that torch.einsum makes are what it does: same work, dtypes, strides, errors, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from behaviour import differences, observe
from equations import ROWS, Row, equations, make_operands, row_id
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazy_einsum import FallbackWarning, OptimizedModule
from lazy_einsum.decompose import eager_calls
from lazy_einsum.program import Program, run
from lazy_einsum.signature import TensorType

# More operands would keep the strategy "optimal" busy for minutes.
MANY = [item for item in ROWS if 2 < len(item[1].shapes) < 7]
NARROW = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]
ORDERS: list[dict[str, Any]] = [{}, {"strategy": "greedy"}, {"strategy": "optimal"}, {"enabled": False}]


def same(row: Row, operands: list[Tensor]) -> None:
    """One call of torch.einsum against the calls found for tensors without data."""
    try:
        expected = torch.einsum(row.equation, *operands)
    except RuntimeError:
        return
    calls = eager_calls(row.equation, [TensorType.of(operand) for operand in operands])
    if calls is None:
        assert any(operand.numel() == 0 for operand in operands)
        return
    program = Program(len(operands), tuple(calls), tuple(expected.shape), expected.stride(), 0.0)
    result = run(program, operands)
    assert torch.equal(result, expected)
    assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("item", MANY, ids=row_id)
def test_same_for_the_table(item: tuple[str, Row], order: dict[str, Any]) -> None:
    with torch.backends.opt_einsum.flags(**order):
        for dtype in (torch.int8, torch.float64):
            for strided in (False, True):
                same(item[1], make_operands(item[1].shapes, dtype, strided=strided))


def long_equations() -> st.SearchStrategy[Row]:
    return equations(max_operands=6).filter(lambda row: len(row.shapes) > 2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(long_equations(), st.sampled_from(NARROW), st.sampled_from(ORDERS), st.integers(0, 9))
def test_same_for_random_equations(row: Row, dtype: torch.dtype, order: dict[str, Any], seed: int) -> None:
    with torch.backends.opt_einsum.flags(**order):
        same(row, make_operands(row.shapes, dtype, seed, strided=True))


def has_elements(row: Row) -> bool:
    """Where there are none, eager lets some mixtures of dtypes through that are refused on tensors without data."""
    return all(math.prod(shape) for shape in row.shapes)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def compare(function: Callable[..., Any], inputs: list[Tensor], modes: Callable[[], Any] = nothing) -> OptimizedModule:
    """Two calls wrapped and unwrapped, each on copies; what is specialized holds no einsum of many operands."""
    wrapped = OptimizedModule(function)
    for _ in range(2):
        sets = [[x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(2)]
        with modes():
            theirs = observe(function, tuple(sets[0]), module=function)
            ours = observe(wrapped, tuple(sets[1]), module=function)
        assert differences(ours, theirs) == []
        assert not [w for w in ours.warned if w.category is FallbackWarning] or theirs.error is not None
        if theirs.error is None:
            for a, b in zip(ours.leaves, theirs.leaves, strict=True):
                assert a.stride() == b.stride()
                assert a.dtype.is_floating_point or torch.equal(a, b)
    assert not wrapped.cache_info().currsize or "einsum(" not in wrapped.code
    return wrapped


@settings(max_examples=25, deadline=None, derandomize=True)
@given(long_equations(), st.sampled_from(NARROW), st.integers(0, 9))
def test_narrow_integers(row: Row, dtype: torch.dtype, seed: int) -> None:
    """The dtype of the result depends on the order, and the values wrap around."""
    assume(has_elements(row))
    compare(
        lambda *operands: torch.einsum(row.equation, *operands), make_operands(row.shapes, dtype, seed, strided=True)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(long_equations(), st.data())
def test_mixed_dtypes(row: Row, data: st.DataObject) -> None:
    """What raises and what promotes depends on the order."""
    assume(has_elements(row))
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.int64, torch.int8, torch.bool])
    operands = [make_operands((shape,), data.draw(dtypes), 1)[0] for shape in row.shapes]
    for operand in operands:
        operand.requires_grad_(operand.is_floating_point())
    compare(lambda *operands: torch.einsum(row.equation, *operands), operands)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(long_equations(), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_autocast(row: Row, dtype: torch.dtype, requires_grad: bool) -> None:
    """What is cast depends on which steps are matrix products."""
    operands = [operand.requires_grad_(requires_grad) for operand in make_operands(row.shapes, torch.float32, 1)]
    compare(
        lambda *operands: torch.einsum(row.equation, *operands), operands, lambda: torch.autocast("cpu", dtype=dtype)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(long_equations(), st.data())
def test_operands_written_later(row: Row, data: st.DataObject) -> None:
    """Whether the backward pass goes through, or finds a saved operand overwritten, depends on what each step keeps."""
    operands = [operand.requires_grad_() for operand in make_operands(row.shapes, torch.float64, 1)]
    written = data.draw(st.integers(0, len(operands) - 1))

    def function(*operands: Tensor) -> Any:
        copies = [operand * 1 for operand in operands]
        result = torch.einsum(row.equation, *copies)
        copies[written].add_(1)
        return result, copies[written]

    compare(function, operands)
    inputs = [operand.detach().clone().requires_grad_() for operand in operands]
    errors = []
    for call in (function, OptimizedModule(function)):
        result, copy = call(*inputs)
        try:
            torch.autograd.grad(result.sum() + copy.sum(), inputs)
        except RuntimeError as error:
            errors.append(str(error).split("which is output")[0])
        else:
            errors.append("")
    assert bool(errors[0]) == bool(errors[1]), errors


def test_the_settings_are_in_the_key() -> None:
    """The dtype follows them; einsums of two operands ask for none."""

    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("ij,ik,jk->i", x, y, z)

    wrapped = OptimizedModule(function)
    inputs = make_operands(((2, 3), (2, 4), (3, 4)), torch.int8)
    for flags in (*ORDERS, *ORDERS):
        with torch.backends.opt_einsum.flags(**flags):
            result, expected = wrapped(*inputs), function(*inputs)
        assert result.dtype == expected.dtype and torch.equal(result, expected)
    assert wrapped.cache_info()[:2] == (4, 4)
    assert "torch.backends.opt_einsum.strategy" in dict(wrapped.prepare(*inputs).signature.state)
    pair = OptimizedModule(lambda x, y: torch.einsum("ij,ik->jk", x, y))
    assert not pair.prepare(*inputs[:2]).signature.state


def test_order_decides_the_dtype() -> None:
    """Control: some rows have another dtype, or raise, in another order."""
    seen = set()
    for flags in ORDERS:
        with torch.backends.opt_einsum.flags(**flags):
            for _, row in MANY:
                try:
                    dtype = torch.einsum(row.equation, *make_operands(row.shapes, torch.int8)).dtype
                except RuntimeError:
                    dtype = None
                seen.add((row.equation, dtype))
    assert len(seen) > len({equation for equation, _ in seen})


def test_sizes_that_vary() -> None:
    """The order that torch takes depends on sizes: nothing of it may get into code that is generic in them."""

    def plain(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("ij,ik,jk->i", x, y, z)

    def written(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1
        result = torch.einsum("ij,ik,jk->i", x, y, z)
        return result, x.add_(1)

    for function, dtype in ((plain, torch.int8), (written, torch.float64)):
        wrapped = OptimizedModule(function, on_untraceable="raise")
        for size in range(2, 9):
            inputs = make_operands(((size, 3), (size, 4), (3, 4)), dtype)
            inputs = [x.requires_grad_(dtype.is_floating_point) for x in inputs]
            assert differences(observe(wrapped, tuple(inputs)), observe(function, tuple(inputs))) == []
