"""Networks of bfloat16 tensors: errors stay below a bound that grows with the root of the number of terms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lazy_einsum import OptimizedModule

Shapes = tuple[tuple[int, ...], ...]

EPSILON = torch.finfo(torch.bfloat16).eps


def einsum(equation: str) -> Callable[..., Tensor]:
    return partial(torch.einsum, equation)


NETWORKS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "chain": (einsum("ab,bc,cd->ad"), ((40, 300), (300, 200), (200, 3))),
    "long chain": (
        einsum("ab,bc,cd,de,ef,fg->ag"),
        ((8, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 8)),
    ),
    "batch": (einsum("zij,zjk,zk->zi"), ((50, 8, 16), (50, 16, 32), (50, 32))),
    "scaled attention": (einsum("bgk,bkd,bk->bgd"), ((4, 16, 128), (4, 128, 16), (4, 128))),
    "quadratic form": (einsum("za,ab,zb->z"), ((20, 200), (200, 200), (20, 200))),
    "symmetric contraction": (einsum("wxvik,ekc,bci,be->bcwxv"), ((4, 4, 4, 9, 11), (5, 11, 8), (20, 8, 9), (20, 5))),
    "tensor product": (einsum("zui,zj,zuv,ijk->zvk"), ((20, 16, 3), (20, 3), (20, 16, 16), (3, 3, 5))),
    "short sums": (einsum("zab,zb,za->z"), ((64, 4, 3), (64, 3), (64, 4))),
    "dot products": (einsum("za,za,a->z"), ((64, 512), (64, 512), (512,))),
    "products": (lambda a, b, c, x: (a @ b @ c) @ x, ((64, 64), (64, 64), (64, 64), (64, 2))),
    "products and einsums": (
        lambda a, b, x: torch.einsum("ij,jk->ik", a @ b, x.mT).sum(0),
        ((32, 96), (96, 64), (48, 64)),
    ),
    "low rank": (
        lambda x, w, a, b: x @ w + torch.einsum("ni,ir,ro->no", x, a, b),
        ((32, 64), (64, 64), (64, 4), (4, 64)),
    ),
}
STEPS = {name: len(shapes) - 1 for name, (_, shapes) in NETWORKS.items()}


def operands_of(shapes: Shapes) -> list[Tensor]:
    """Random numbers that bfloat16 can hold, so that only the computation rounds; in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


def bound(network: Callable[..., Tensor], operands: list[Tensor], steps: int) -> Tensor:
    """How far each element of a result in bfloat16 may be off: its own rounding, and for each step before the last what
    rounding independently adds to a sum: the root of the sum of the squares of all terms.
    """
    # All terms are products of one element of each operand, so their squares are the terms of the squared operands.
    terms = network(*(x.square() for x in operands)).sqrt()
    return EPSILON * (network(*operands).abs() + 2 * steps**0.5 * terms)


def excess(result: Tensor, name: str) -> float:
    """The largest error of a result, in parts of what it may be."""
    network, shapes = NETWORKS[name]
    operands = operands_of(shapes)
    return float(((result.double() - network(*operands)).abs() / bound(network, operands, STEPS[name])).max())


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("reassociate", [None, True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_errors_stay_below_the_bound(name: str, reassociate: bool | None) -> None:
    network, shapes = NETWORKS[name]
    narrow = [x.bfloat16() for x in operands_of(shapes)]
    model = OptimizedModule(network, reassociate=reassociate, on_untraceable="raise")
    result = model(*narrow)
    assert result.dtype == torch.bfloat16
    assert excess(result, name) < 1
    exact, eager = network(*operands_of(shapes)), network(*narrow)
    off = [root_mean_square(x.double() - exact) for x in (result, eager)]
    assert off[0] <= 1.5 * off[1] + EPSILON / 8 * root_mean_square(exact)


@pytest.mark.parametrize("reassociate", [None, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_as_near_as_those_of_torch(name: str, reassociate: bool | None) -> None:
    network, shapes = NETWORKS[name]
    model = OptimizedModule(network, reassociate=reassociate, on_untraceable="raise")

    def gradients(function: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        operands = [x.to(dtype).requires_grad_() for x in operands_of(shapes)]
        result = function(*operands)
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        return torch.autograd.grad(result, operands, cotangent)

    exact = gradients(network, torch.float64)
    eager, found = gradients(network, torch.bfloat16), gradients(model, torch.bfloat16)
    for one, other, value in zip(found, eager, exact, strict=True):
        assert one.dtype == torch.bfloat16
        off = root_mean_square(one.double() - value), root_mean_square(other.double() - value)
        assert off[0] <= 1.5 * off[1] + EPSILON / 8 * root_mean_square(value)


def test_the_bound_is_one_that_narrow_sums_break() -> None:
    """Control: eager keeps it, and a sum that is rounded to bfloat16 at each term does not."""
    for name, (network, shapes) in NETWORKS.items():
        assert excess(network(*(x.bfloat16() for x in operands_of(shapes))), name) < 1, name
    x, y, z = (x.bfloat16() for x in operands_of(NETWORKS["dot products"][1]))
    total = torch.zeros(64, dtype=torch.bfloat16)
    for place in range(512):
        total = total + x[:, place] * y[:, place] * z[place]
    assert excess(total, "dot products") > 1
