"""Globals, enclosing variables and class attributes that a module reads are in the key; changes to them are undone."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazy_einsum import FallbackWarning, OptimizedModule

SCALE = 2.0
TABLE: dict[str, Any] = {"factor": 1.0, "tensor": torch.ones(2), "nested": [1, 2]}
COUNT = 0


class Settings:
    shift = 3.0


SETTINGS = Settings()
SETTINGS.gain = 1.5
MODULE = types.ModuleType("a_module")
MODULE.flag = True


def helper(x: Tensor) -> Tensor:
    return x * SCALE + TABLE["factor"] + len(TABLE["nested"])


def make() -> tuple[type[nn.Module], Callable[[float], None]]:
    enclosed = 5.0

    class Reads(nn.Module):
        attribute = 1.0

        def forward(self, x: Tensor) -> Tensor:
            y = helper(x) + Settings.shift + enclosed + self.attribute + SETTINGS.gain
            return y if MODULE.flag else -y

    def change(value: float) -> None:
        nonlocal enclosed
        enclosed = value

    return Reads, change


def changes(
    reads: type[nn.Module], change: Callable[[float], None], patch: pytest.MonkeyPatch
) -> dict[str, Callable[[], Any]]:
    return {
        "global": lambda: patch.setitem(globals(), "SCALE", 7.0),
        "item of a global": lambda: patch.setitem(TABLE, "factor", 7.0),
        "nested item": lambda: patch.setitem(TABLE, "nested", [1, 2, 3]),
        "attribute of a global class": lambda: patch.setattr(Settings, "shift", 7.0),
        "attribute of a global object": lambda: patch.setattr(SETTINGS, "gain", 7.0),
        "attribute of a Python module": lambda: patch.setattr(MODULE, "flag", False),
        "enclosing variable": lambda: change(7.0),
        "class attribute": lambda: setattr(reads, "attribute", 7.0),
        "type of a global": lambda: patch.setitem(globals(), "SCALE", 2),
    }


@pytest.mark.parametrize("name", changes(*make(), pytest.MonkeyPatch()))
def test_what_is_read_is_in_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, change = make()
    child = reads()
    wrapped = OptimizedModule(child)
    x = torch.ones(2)
    for _ in range(2):
        assert torch.equal(wrapped(x), child(x))
    assert wrapped.cache_info()[:2] == (1, 1)
    changes(reads, change, monkeypatch)[name]()
    for _ in range(2):
        assert torch.equal(wrapped(x), child(x))
    assert wrapped.cache_info()[:2] == (2, 2) and wrapped.cache_info().fallbacks == 0


def test_what_is_not_read_is_not_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = OptimizedModule(lambda x: x * SCALE)
    x = torch.ones(2)
    wrapped(x)
    monkeypatch.setitem(TABLE, "factor", 9.0)
    monkeypatch.setattr(Settings, "shift", 9.0)
    wrapped(x)
    assert wrapped.cache_info()[:2] == (1, 1)


def test_changes_are_undone_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return x * COUNT

    seen = []

    def appends(x: Tensor) -> Tensor:
        seen.append(len(seen))
        return x * len(seen)

    x = torch.ones(2)
    monkeypatch.setitem(globals(), "COUNT", 0)
    for function, name in ((counts, "COUNT"), (appends, "seen")):
        wrapped = OptimizedModule(function)
        with pytest.warns(FallbackWarning, match=f"changes .*{name}"):
            assert torch.equal(wrapped(x), x)
        assert torch.equal(wrapped(x), 2 * x)
    assert COUNT == 2 and seen == [0, 1]


class Registry(OrderedDict[str, Any]):
    """Gives instances for the classes that it holds, as registries of activations do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


REGISTRY = Registry(tanh=nn.Tanh, relu=nn.ReLU)


def test_a_registry_is_left_as_it_is() -> None:
    def forward(x: Tensor) -> Tensor:
        return x * len(REGISTRY)

    x = torch.ones(3)
    for _ in range(2):
        torch.testing.assert_close(OptimizedModule(forward, on_untraceable="ignore")(x), forward(x))
        assert list(REGISTRY.values()) == [nn.Tanh, nn.ReLU] and type(REGISTRY["tanh"]) is nn.Tanh
