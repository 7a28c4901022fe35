"""Functions that ``forward`` gives to torch: hooks on tensors, on what autograd saves."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazy_einsum import OptimizedModule
from lazy_einsum.closures import around
from lazy_einsum.surroundings import Itself

einsum = torch.einsum


class Recording(nn.Module):
    """Keeps the gradients of a result in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.gradients: list[Tensor] = []

    def keep(self, gradient: Tensor) -> None:
        self.gradients.append(gradient)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * einsum("ij,jk,kl->il", x, self.w, self.w)
        y.register_hook(lambda gradient: self.keep(gradient * len(x)))
        return einsum("ij,jk,kl->il", y, self.w, self.w)


class Retaining(Recording):
    def forward(self, x: Tensor) -> Any:
        y = 2 * einsum("ij,jk,kl->il", x, self.w, self.w)
        y.retain_grad()
        return y, einsum("ij,jk,kl->il", y, self.w, self.w)


class Accumulating(Recording):
    def forward(self, x: Tensor) -> Tensor:
        self.w.register_post_accumulate_grad_hook(lambda leaf: self.keep(leaf.grad.clone()))
        return einsum("ij,jk,kl->il", x, self.w, self.w)


def pair(kind: type[Recording]) -> tuple[Recording, Recording]:
    torch.manual_seed(0)
    theirs, ours = kind(), kind()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def x(n: int) -> Tensor:
    torch.manual_seed(n)
    return torch.randn(n, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", [Recording, Accumulating])
@pytest.mark.parametrize("dynamic", [False, True])
def test_effects_of_hooks(kind: type[Recording], dynamic: bool) -> None:
    theirs, child = pair(kind)
    ours = OptimizedModule(child, dynamic=dynamic)
    for n in (3, 3, 4, 5, 6, 7, 8):
        for model in (theirs, ours):
            model(x(n)).sum().backward()
    assert len(child.gradients) == len(theirs.gradients) >= 7
    for mine, expected in zip(child.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(mine, expected)
    info = ours.cache_info()
    assert info.fallbacks == 0 and info.hits >= 1
    if dynamic:
        assert any(entry.is_generic for entry in ours.specializations.values())


def test_retained_gradient() -> None:
    theirs, child = pair(Retaining)
    ours = OptimizedModule(child)
    for _ in range(3):
        (mine, result), (expected, other) = ours(x(3)), theirs(x(3))
        (result.sum() + mine.sum()).backward()
        (other.sum() + expected.sum()).backward()
        assert mine.retains_grad
        torch.testing.assert_close(mine.grad, expected.grad)
    assert ours.cache_info().fallbacks == 0 and ours.cache_info().hits == 2


@pytest.mark.parametrize("kind", [Recording, Retaining])  # a weight with a hook is kept by it in eager mode too
def test_nothing_is_kept(kind: type[Recording]) -> None:
    child = kind()
    ours = OptimizedModule(child)
    for _ in range(2):
        ours(x(3))
    dropped = weakref.ref(child), weakref.ref(child.w), weakref.ref(ours)
    del child, ours
    gc.collect()
    assert [reference() for reference in dropped] == [None] * 3


def test_hook_with_a_function_around() -> None:
    """What the function that makes ``forward`` shares with its hooks is not kept either."""

    def make() -> tuple[nn.Module, list[Tensor]]:
        kept = [torch.ones(()).double()]

        class Child(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x * 2
                y.register_hook(lambda gradient: gradient * kept[-1])
                return y

        return Child(), kept

    child, kept = make()
    ours = OptimizedModule(child)
    for factor in (1.0, 5.0, 7.0):
        kept.append(torch.tensor(factor).double())
        given = x(3)
        ours(given).sum().backward()
        torch.testing.assert_close(given.grad, torch.full_like(given, 2 * factor))
    assert ours.cache_info().fallbacks == 0
    dropped = weakref.ref(kept[0])
    del child, kept, ours
    gc.collect()
    assert dropped() is None


def test_saved_tensors_hooks_are_left_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return torch.linalg.cholesky(x).sin()

    ours = OptimizedModule(Failing())
    good = torch.eye(3, dtype=torch.float64, requires_grad=True)
    ours(good).sum().backward()
    for bad in (-torch.eye(3, dtype=torch.float64, requires_grad=True), good):
        if bad is good:
            ours(bad)
        else:
            with pytest.raises(torch.linalg.LinAlgError):
                ours(bad.detach().requires_grad_())
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert ours.cache_info().fallbacks == 0


def test_threads() -> None:
    theirs, child = pair(Recording)
    ours = OptimizedModule(child)
    errors: list[BaseException] = []
    given = {n: (x(n), x(n)) for n in (2, 3)}

    def work(n: int) -> None:
        try:
            mine, expected = given[n]
            for _ in range(5):
                a, *_ = torch.autograd.grad(ours(mine).sum(), mine)
                b, *_ = torch.autograd.grad(theirs(expected).sum(), expected)
                torch.testing.assert_close(a, b)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(2 + i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(child.gradients) == len(theirs.gradients) == 30


def test_around() -> None:
    def make(factor: Any) -> Any:
        def hook(value: float, power: int = 1, *, bias: float = 0.0) -> float:
            return float(factor * value**power + bias)

        return hook

    made = around(make(2), (3,), (2,), {"bias": 0.5})
    assert made(4.0) == 48.5 and made(4.0, 1, bias=0.0) == 12.0
    assert made.__name__ == "hook" and made.__qualname__ == make(2).__qualname__


def test_a_function_that_is_made_again_is_the_same() -> None:
    def make(factor: float) -> Any:
        return lambda gradient: gradient * factor

    one, other = (Itself(around(make(factor), [None], (), {}), "hook") for factor in (2.0, 3.0))
    assert one == other and hash(one) == hash(other)
    assert one != Itself(around(lambda gradient: gradient, (), (), {}), "hook")
