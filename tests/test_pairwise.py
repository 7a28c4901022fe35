"""Every contraction of the file of random pairs, and those of models: right, and so are its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from contestants import named
from pairwise import Contraction, model_contractions, random_pairs

from lazy_einsum import OptimizedModule


def small(case: Contraction) -> Contraction:
    """The same contraction, of about 4000 multiply-adds where it has few labels."""
    return case.sized(lambda sized: math.prod(sized.sizes.values()) <= 4096)


CASES = [small(case) for case in model_contractions() + random_pairs()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_torch(case: Contraction) -> None:
    operands = [x.requires_grad_() for x in case.operands(torch.float64)]
    model = OptimizedModule(named(case.equation, len(operands)), on_untraceable="raise")
    expected = torch.einsum(case.equation, *operands)
    scale = math.sqrt(math.prod(case.sizes.values()) / max(expected.numel(), 1))
    with torch.no_grad():
        torch.testing.assert_close(model(*operands), expected, rtol=1e-10, atol=1e-10 * scale)
    result = model(*operands)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10 * scale)
    cotangent = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    gradients = torch.autograd.grad(result, operands, cotangent)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, operands, cotangent), strict=True):
        size = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * max(size, 1.0))
    assert model.cache_info().fallbacks == 0
