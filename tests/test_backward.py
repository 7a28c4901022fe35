"""The backward pass of a way: its gradients come in the layouts that autograd gives them."""

from __future__ import annotations

import pytest
import torch
from equations import make_operands

from lazy_einsum.backward import arrival_seconds, backward
from lazy_einsum.kernels import _write_way, _Writer
from lazy_einsum.layout import Sizes, contiguous_layout, label_strides, memory_order
from lazy_einsum.program import Program, run
from lazy_einsum.ways import Context, Way, ways

SIZES = Sizes(a=3, b=4, c=5, d=6)

EQUATIONS = [
    "ab,bc->ac",
    "ba,bc->ac",
    "ab,cb->ac",
    "ba,cb->ca",
    "dab,dbc->dac",
    "abd,bcd->adc",
    "ab,b->a",
    "a,ab->b",
    "abc,b->ac",
    "a,b->ab",
    "ab,ac->abc",
    "ab,bc->abc",
    "ab,ab->ab",
    "ab,ab->a",
    "dab,dab->d",
    "abc,cd->abd",
    "abc,bd->acd",
]


def ways_of(equation: str, sizes: Sizes) -> list[Way]:
    left, output = equation.split("->")
    one, two = (contiguous_layout(tuple(term), sizes) for term in left.split(","))
    return list(ways(Context(sizes, torch.float64, follows=True), one, two, output, output))


def program_of(way: Way, equation: str, operands: list[torch.Tensor]) -> Program:
    writer = _Writer(SIZES, 2)
    for number, term in enumerate(equation.split("->")[0].split(",")):
        writer.layouts[number] = contiguous_layout(tuple(term), SIZES)
    context = Context(SIZES, torch.float64, follows=True)
    return writer.program(_write_way(writer, context, way, *((1, 0) if way.swap else (0, 1)), None), 0.0)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_come_in_the_layouts_that_autograd_gives_them(equation: str) -> None:
    terms = equation.split("->")[0].split(",")
    for way in ways_of(equation, SIZES):
        operands = [x.requires_grad_() for x in make_operands([[SIZES[i] for i in t] for t in terms], torch.float64)]
        result = run(program_of(way, equation, operands), operands)
        gradients = torch.autograd.grad(result, operands, torch.randn_like(result))
        assert backward(way, (False, False), SIZES).seconds == 0
        expected = backward(way, (True, True), SIZES)
        for number, (term, gradient) in enumerate(zip(terms, gradients, strict=True)):
            layout = expected.gradients[number]
            assert layout is not None
            strides = label_strides(layout, SIZES)
            assert [strides[label] for label in term] == list(gradient.stride()), (way, number)
            alone = backward(way, (number == 0, number == 1), SIZES)
            assert alone.gradients[number] == layout
            assert alone.gradients[1 - number] is None
            assert 0 < alone.seconds < expected.seconds


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_gradient_that_comes_as_the_result_lies_needs_no_copy(equation: str) -> None:
    sizes = Sizes.fromkeys("abcd", 64)
    for way in ways_of(equation, sizes):
        as_is = arrival_seconds(way, way.result, sizes)
        order = memory_order(way.result.labels, label_strides(way.result, sizes))
        across = contiguous_layout(tuple(reversed(order)), sizes)
        assert as_is == 0
        if len(order) > 2:
            assert arrival_seconds(way, across, sizes) > 0
