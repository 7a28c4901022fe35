"""Where a module can't be traced as a whole, its submodules are specialized, each on its own."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from behaviour import differences, observe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lazy_einsum import FallbackWarning, OptimizedModule, UntraceableError, parts
from lazy_einsum.live import is_part

einsum = torch.einsum


def x_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator).requires_grad_()


class Block(nn.Module):
    """Has something to optimize."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)
        self.b = nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + einsum("bi,ij,jk->bk", x, self.a, self.b) * scale


class Choosing(nn.Module):
    """Looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x, scale=2.0)


class Plain(nn.Module):
    """Has nothing to optimize, nor have its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).exp()


class Counting(nn.Module):
    """Can't be traced: it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Choosing()])
        self.named = nn.ModuleDict({"last": Block()})
        self.plain = Plain()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return self.plain(self.named["last"](x, scale=0.5))


def _no_traces(module: nn.Module) -> None:
    assert all("_compiled_call_impl" not in part.__dict__ for part in module.modules())


def test_parts_are_specialized() -> None:
    expected, module = Counting(), Counting()
    wrapped = OptimizedModule(module)
    with pytest.warns(FallbackWarning) as caught:
        wrapped(x_of(4))
    (message,) = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert "Counting runs as it is, not optimized: forward depends on the values of a tensor" in message
    assert "specialized on their own: blocks.0, blocks.1.inner, named.last" in message
    assert "blocks.1 runs as it is: forward depends on the values of a tensor" in message
    assert module.calls == 1
    expected(x_of(4))
    for rows in (4, 5, 4, 6, 7, 8, 9):
        problems = differences(observe(wrapped, (x_of(rows),), module=module), observe(expected, (x_of(rows),)))
        assert not problems, problems
    assert module.calls == expected.calls == 8
    info = wrapped.cache_info()
    assert info.fallbacks == 8 and info.hits > 10
    assert {name: state[:11] for name, state in info.parts.items()} == {
        "blocks.0": "specialized",
        "blocks.1": "forward dep",
        "blocks.1.inner": "specialized",
        "named.last": "specialized",
        "plain": "nothing to ",
    }
    names = {signature.module for signature in wrapped.specializations}
    assert names == {"blocks.0", "blocks.1.inner", "named.last"}
    assert any(entry.is_generic for entry in wrapped.specializations.values())
    report = str(wrapped.explain())
    assert "blocks.0: specialized" in report and "plain: nothing to optimize" in report
    _no_traces(module)


def test_training_in_parts() -> None:
    plain = Counting()
    wrapped = OptimizedModule(copy.deepcopy(plain), on_untraceable="ignore")
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, wrapped)]
    for step in range(12):
        losses = []
        for module, optimizer in zip((plain, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            loss = module(x_of(3 + step % 5)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_hooks_of_parts_fire() -> None:
    module = Counting()
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    fired: list[str] = []
    module.blocks[0].register_forward_pre_hook(lambda m, a: fired.append(f"before {type(m).__name__}"))
    module.blocks[0].register_forward_hook(lambda m, a, o: (fired.append("after"), o * 2)[1])
    module.blocks[1].inner.register_forward_hook(lambda m, a, o: fired.append("inner"))
    for _ in range(3):
        fired.clear()
        found = wrapped(x_of(4))
        assert fired == ["before Block", "after", "inner"]
        torch.testing.assert_close(found, module(x_of(4)))
    assert wrapped.cache_info().parts["blocks.0"] == "specialized"


def test_other_threads_see_the_child_as_it_is() -> None:
    class Waiting(Counting):
        def forward(self, x: Tensor) -> Tensor:
            float(x.detach().sum())  # no trace gets further
            inside.set()
            assert go_on.wait(60)
            return super().forward(x)

    inside, go_on = threading.Event(), threading.Event()
    module = Waiting()
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    go_on.set()
    expected = wrapped(x_of(4))
    go_on.clear()
    inside.clear()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(wrapped(x_of(4))))
    thread.start()
    assert inside.wait(60)
    before = wrapped.cache_info()
    torch.testing.assert_close(module.blocks[0](x_of(5)), Block.forward(module.blocks[0], x_of(5)))
    assert wrapped.cache_info() == before
    go_on.set()
    thread.join()
    torch.testing.assert_close(results[0], expected)
    _no_traces(module)


def test_errors_pass_through_and_leave_nothing() -> None:
    module = Counting()
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    wrapped(x_of(4))
    with pytest.raises(ValueError, match="does not match"):
        wrapped(torch.zeros(4, 7, dtype=torch.float64))
    _no_traces(module)
    torch.testing.assert_close(wrapped(x_of(4)), module(x_of(4)))


def test_parts_in_checkpoints() -> None:
    """A checkpoint runs its part twice, and both must save the same: so neither is specialized."""

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return result

    expected, module = Saving(), Saving()
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    for rows in (4, 4, 5):
        problems = differences(observe(wrapped, (x_of(rows),), module=module), observe(expected, (x_of(rows),)))
        assert not problems, problems
    assert wrapped.cache_info().parts == {"block": "called by a checkpoint, or under other saved-tensor hooks"}


def test_a_kind_of_call_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that was refused for several sizes is refused for the others without a trace."""
    import lazy_einsum.specialize as specialize

    tried: list[Any] = []
    trace = specialize.trace

    def counting(module: Any, arguments: Any, is_leaf: Any, hooked: Any) -> Any:
        tried.append(arguments)
        return trace(module, arguments, is_leaf, hooked)

    monkeypatch.setattr(specialize, "trace", counting)
    wrapped = OptimizedModule(lambda x: x * float(x.detach().sum()), on_untraceable="ignore", dynamic=False)
    for rows in (2, 2, 2, *range(3, 12), 2, 3):
        torch.testing.assert_close(wrapped(x_of(rows)), wrapped.module(x_of(rows)))
    assert [arguments.leaves[0].shape[0] for arguments in tried] == [2, 2, 3]
    assert wrapped.cache_info().fallbacks == 14


def test_what_a_first_call_sets() -> None:
    """Lazy initialization refuses the first call only."""

    class Lazy(nn.Module):
        grid: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None or self.grid.shape[0] != x.shape[1]:
                self.grid = torch.arange(x.shape[1], dtype=x.dtype)
            return x * self.grid

    wrapped = OptimizedModule(Lazy(), on_untraceable="ignore")
    for rows in (3, 3, 3, 4):
        torch.testing.assert_close(wrapped(x_of(rows)), wrapped.module(x_of(rows)))
    assert wrapped.cache_info()[:2] == (1, 3) and wrapped.cache_info().fallbacks == 1


def test_submodules_that_come_and_go() -> None:
    module = Counting()
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    wrapped(x_of(4))
    module.blocks[0] = Block()
    module.named["last"].a = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    torch.testing.assert_close(wrapped(x_of(4)), module(x_of(4)))
    module.blocks.append(Block())
    torch.testing.assert_close(wrapped(x_of(4)), module(x_of(4)))
    assert wrapped.cache_info().parts["blocks.2"] == "specialized"


def test_raise_and_leaves() -> None:
    with pytest.raises(UntraceableError, match="forward depends on the values"):
        OptimizedModule(Counting(), on_untraceable="raise")(x_of(4))
    wrapped = OptimizedModule(Counting(), on_untraceable="ignore", leaf_modules=["blocks.0", Choosing])
    wrapped(x_of(4))
    assert set(wrapped.cache_info().parts) == {"blocks.1.inner", "named.last", "plain"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(x_of(4))


class Looking(nn.Module):
    """Looks at values, and at whether calls of its submodule go through a dispatcher."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.dispatched: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.dispatched.append(is_part(self.inner))
        return self.inner(x) if x.sum() > -1e9 else x


def test_parts_without_gain_are_left_alone_after_a_while() -> None:
    module = Looking(Plain())
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    for _ in range(200):
        torch.testing.assert_close(wrapped(x_of(3)), module.inner(x_of(3)))
    tried = [number for number, dispatched in enumerate(module.dispatched) if dispatched]
    assert tried[: parts.PATIENCE] == list(range(parts.PATIENCE)) and 0 < len(tried) - parts.PATIENCE <= 4
    wrapped(x_of(4))
    assert module.dispatched[-1], "another shape"
    assert wrapped.cache_info().fallbacks == 201
    fruitful = Looking(Block())
    wrapped = OptimizedModule(fruitful, on_untraceable="ignore")
    for _ in range(200):
        wrapped(x_of(3))
    assert all(fruitful.dispatched)


def test_what_is_left_alone_without_gradients_is_tried_with_them() -> None:
    module = Looking(Plain())
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    with torch.no_grad():
        for _ in range(parts.PATIENCE + 1):
            wrapped(x_of(3))
    assert not module.dispatched[-1]
    wrapped(x_of(3))
    assert module.dispatched[-1]


def test_kinds_of_calls_without_gain_are_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MAX_FRUITLESS", 3)
    whole = parts.WholeDispatcher
    run, counts = whole.run_as_it_is, []

    def counting(self: Any, call: Any) -> Any:
        result = run(self, call)
        counts.append(len(self._fruitless))
        return result

    monkeypatch.setattr(whole, "run_as_it_is", counting)
    wrapped = OptimizedModule(Looking(Plain()), on_untraceable="ignore")
    for rows in range(2, 10):
        wrapped(x_of(rows))
    assert len(counts) == 8 and max(counts) == 3
