"""Every contraction of the file of random pairs, and those of models: right, and so are its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from contestants import named
from pairwise import Contraction, cases, model_contractions, random_pairs
from torch import Tensor

from lazy_einsum import OptimizedModule


def small(case: Contraction) -> Contraction:
    """The same contraction, of about 4000 multiply-adds where it has few labels."""
    return case.sized(lambda sized: math.prod(sized.sizes.values()) <= 4096)


def check(case: Contraction, dtype: torch.dtype, tolerance: float, device: str) -> None:
    """Values without and with autograd, and the gradients of all operands, are those of ``torch.einsum`` in float64.

    The tolerance is relative to the largest value, as each is a sum of terms of any sign.
    """
    exact = [x.requires_grad_() for x in case.operands(torch.float64, device)]
    operands = [x.detach().to(dtype).requires_grad_() for x in exact]
    model = OptimizedModule(named(case.equation, len(operands)), on_untraceable="raise")

    def compare(found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == dtype
        atol = tolerance * max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=atol)

    expected = torch.einsum(case.equation, *exact)
    with torch.no_grad():
        compare(model(*operands), expected)
    result = model(*operands)
    compare(result, expected)
    cotangent = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64, device=device).reshape(expected.shape)
    gradients = torch.autograd.grad(result, operands, cotangent.to(dtype))
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, cotangent), strict=True):
        compare(found, wanted)


@pytest.mark.parametrize("case", [small(case) for case in model_contractions() + random_pairs()], ids=str)
def test_results_and_gradients_are_those_of_torch(case: Contraction, device: str) -> None:
    check(case, torch.float64, 1e-10, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_they_are_so_in_the_sizes_of_the_benchmark(case: Contraction, device: str) -> None:
    # Other sizes are contracted in other ways.
    check(case, torch.float32, 1e-4, device)
