"""Models of other packages give what they give without the wrapper, and train alike. ``-m models`` runs all of them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from behaviour import tensors_in
from models import MODELS, Model, flops
from torch import Tensor, nn

from lazy_einsum import FallbackWarning, OptimizedModule

STEPS = 10
CASES = [
    pytest.param(model, id=model.name, marks=[] if model.quick else [pytest.mark.models, pytest.mark.slow])
    for model in MODELS
]


def _seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def _build(model: Model) -> nn.Module:
    _seed(0)
    try:
        return model.build()  # of the default dtype
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")


def _arguments(model: Model, size: int) -> tuple[Any, ...]:
    arguments = model.arguments(size)
    return tuple(x.to(model.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def _loss(result: Any) -> Tensor:
    values = [value for value in tensors_in(result) if value.is_floating_point() or value.is_complex()]
    return torch.stack([value.abs().square().mean() for value in values]).sum()


def _run(model: Model, module: nn.Module, call: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Losses of training steps on sizes in turn, and all parameters and gradients in the end."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    losses = []
    for step in range(STEPS):
        _seed(step)
        optimizer.zero_grad()
        loss = _loss(call(*_arguments(model, model.sizes[step % 3])))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [x for parameter in module.parameters() for x in (parameter.detach(), parameter.grad)]


def _close(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        bound = 1e-8 if dtype is torch.float64 else 1e-4
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound * scale)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model", CASES)
def test_model(model: Model) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        theirs, ours = _build(model), _build(model)
        wrapped = OptimizedModule(ours)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for mode in (False, True):
                theirs.train(mode)
                ours.train(mode)
                for size in model.sizes:
                    _seed(size)
                    expected = tensors_in(theirs(*_arguments(model, size)))
                    _seed(size)
                    found = tensors_in(wrapped(*_arguments(model, size)))
                    assert len(found) == len(expected)
                    for one, other in zip(found, expected, strict=True):
                        _close(one, other, model.dtype)
            expected_losses, expected_state = _run(model, theirs, theirs)
            losses, state = _run(model, ours, wrapped)
        for one, other in zip([*losses, *state], [*expected_losses, *expected_state], strict=True):
            _close(one, other, model.dtype)
        fallen = [str(warning.message) for warning in caught if issubclass(warning.category, FallbackWarning)]
        assert wrapped.cache_info().fallbacks <= model.fallbacks, fallen
        inside, total = flops(ours, wrapped, _arguments(model, model.sizes[0]))
        share = inside / max(1, total)
        print(
            f"{model.name}: {'whole' if not fallen else fallen[0][:300]}; {share:.0%} of FLOPs; {wrapped.cache_info()}"
        )
        assert share >= model.share
    finally:
        torch.set_default_dtype(before)


def test_the_table() -> None:
    """What it promises: enough models of enough packages, of which most are specialized as a whole."""
    packages = {model.name.split(":")[0] for model in MODELS}
    assert len(MODELS) >= 15 and len(packages) >= 8
    assert sum(model.fallbacks == 0 for model in MODELS) >= 12
    assert sum(model.quick for model in MODELS) >= 5


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_most_contractions_lie_in_specializations() -> None:
    """Over the whole table, in training."""
    counts = {}
    for model in MODELS:
        try:
            module = model.build()
        except ImportError:
            continue
        wrapped = OptimizedModule(module)
        arguments = model.arguments(model.sizes[0])
        wrapped(*arguments)  # which may set up something
        counts[model.name] = flops(module, wrapped, arguments)
    inside, total = map(sum, zip(*counts.values(), strict=True))
    print(f"{inside / total:.1%} of {total:,} FLOPs in specializations: {counts}")
    assert inside >= 0.9 * total
