"""Globals, enclosing variables and class attributes that a module reads are in the key; changes to them are undone."""

from __future__ import annotations

import contextvars
import functools
import importlib
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazy_einsum import FallbackWarning, OptimizedModule, surroundings

SCALE = 2.0
TABLE: dict[str, Any] = {"factor": 1.0, "tensor": torch.ones(2), "nested": [1, 2]}
COUNT = 0


class Settings:
    shift = 3.0


SETTINGS = Settings()
SETTINGS.gain = 1.5
MODULE = types.ModuleType("a_module")
MODULE.flag = True


class Inner(nn.Module):
    """Made inside of ``forward``."""

    offset = 1.0

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.offset + INNER_SHIFT

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(x)

    def negated(self, x: Tensor) -> Tensor:
        return -x


class OtherInner(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return x - 9


class Tool:
    power = 2.0

    def use(self, x: Tensor) -> Tensor:
        return x * self.power * TOOL_FACTOR


class Watchful(Tool):
    """Has its own way with attributes, as configurations of transformers."""

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


INNER_SHIFT = 0.5
TOOL_FACTOR = 1.5
CACHED_SCALE = 2.5


def helper(x: Tensor) -> Tensor:
    return x * SCALE + TABLE["factor"] + len(TABLE["nested"])


def make() -> tuple[type[nn.Module], Callable[[float], None]]:
    enclosed = 5.0

    class Reads(nn.Module):
        attribute = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.tool, self.watchful, self.inner = Tool(), Watchful(), Inner()

        def forward(self, x: Tensor) -> Tensor:
            y = helper(x) + Settings.shift + enclosed + self.attribute + SETTINGS.gain
            y = y + Inner()(x) + self.inner.negated(x) + self.tool.use(x) + self.watchful.use(x)
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
        "global that a module made inside reads": lambda: patch.setitem(globals(), "INNER_SHIFT", 7.0),
        "class attribute of a module made inside": lambda: patch.setattr(Inner, "offset", 7.0),
        "method of a module made inside": lambda: patch.setattr(Inner, "shifted", lambda self, x: x * 7),
        "class that is made inside": lambda: patch.setitem(globals(), "Inner", OtherInner),
        "global that a method of an attribute reads": lambda: patch.setitem(globals(), "TOOL_FACTOR", 7.0),
        "class attribute of an attribute": lambda: patch.setattr(Tool, "power", 7.0),
        "method of an attribute": lambda: patch.setattr(Tool, "use", lambda self, x: x * 7),
        "method of a submodule": lambda: patch.setattr(Inner, "negated", lambda self, x: x * 7),
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


@functools.cache
def cached_scale() -> float:
    return CACHED_SCALE


class Chooses(nn.Module):
    """Calls one of its methods, by a name that is put together."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def by_helper(self, x: Tensor) -> Tensor:
        return helper(x)

    def by_cache(self, x: Tensor) -> Tensor:
        return x * cached_scale()

    def by_nothing(self, x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"by_{self.way}")(x)


def test_what_does_not_run_is_not_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Chooses("nothing")
    wrapped = OptimizedModule(child)
    x = torch.ones(2)
    wrapped(x)
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    monkeypatch.setattr(Chooses, "by_helper", lambda self, x: helper(x) * SCALE)
    assert torch.equal(wrapped(x), child(x)) and wrapped.cache_info()[:2] == (1, 1)
    child.way = "helper"
    assert torch.equal(wrapped(x), child(x)) and wrapped.cache_info()[:2] == (1, 2)
    monkeypatch.setitem(globals(), "SCALE", 8.0)
    assert torch.equal(wrapped(x), child(x)) and wrapped.cache_info()[:2] == (1, 3)
    monkeypatch.setattr(Chooses, "by_helper", lambda self, x: -x)
    assert torch.equal(wrapped(x), child(x)) and wrapped.cache_info()[:2] == (1, 4)


def test_what_a_full_cache_once_read_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run while it is traced, but may later."""
    child = Chooses("cache")
    wrapped = OptimizedModule(child)
    x = torch.ones(2)
    cached_scale()
    try:
        assert torch.equal(wrapped(x), x * 2.5)
        monkeypatch.setitem(globals(), "CACHED_SCALE", 7.0)
        cached_scale.cache_clear()
        assert torch.equal(wrapped(x), x * 7.0)
    finally:
        cached_scale.cache_clear()


def test_what_runs_unwatched_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler is at work, so nobody sees which functions are called."""
    child = Chooses("helper")
    wrapped = OptimizedModule(child)
    x = torch.ones(2)
    sys.setprofile(lambda *_: None)
    try:
        wrapped(x)
    finally:
        sys.setprofile(None)
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    assert torch.equal(wrapped(x), child(x)) and wrapped.cache_info()[:2] == (0, 2)


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


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE")


@pytest.mark.parametrize("default", [False, True])
def test_a_context_variable_that_comes_and_goes(default: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        if default:
            return x * VARIABLE.get(7.0)
        try:
            return x * VARIABLE.get()
        except LookupError:
            return x - 1

    def with_value(value: float) -> tuple[Tensor, Tensor]:
        VARIABLE.set(value)
        return wrapped(x), forward(x)

    wrapped = OptimizedModule(forward, on_untraceable="ignore")
    x = torch.ones(2)
    for value in (3.0, 3.0, 4.0):
        assert torch.equal(*contextvars.copy_context().run(with_value, value))
    assert torch.equal(wrapped(x), forward(x))
    assert torch.equal(*contextvars.copy_context().run(with_value, 3.0))
    assert wrapped.cache_info().hits == 2 and wrapped.cache_info().fallbacks == 1


PACKAGE = """
from dataclasses import dataclass

SEEN = {}

@dataclass
class Out:
    value: object
    count: float

FACTOR = 2.0

def made():
    return FACTOR

def cached(x):
    if type(x) not in SEEN:
        SEEN[type(x)] = made()
    return x * SEEN[type(x)]

def counted(x):
    count = len(SEEN)
    SEEN["counted"] = 1
    return x * (count + 1)

def constant(x):
    count = float(len(SEEN))
    SEEN["constant"] = 1
    return Out(x * 2, count)

def branched(x, flag):
    if "branched" in SEEN:
        return x * (2 if flag.gain else 3)
    SEEN["branched"] = 1
    return x * 2

def kept(x):
    if "kept" not in SEEN:
        SEEN["kept"] = x * 2
    return SEEN["kept"] * x
"""


def test_what_a_first_call_adds_to_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where later calls, which find it there, do the same and depend on the same."""
    (tmp_path / "a_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(surroundings, "_PACKAGES", (f"{tmp_path}/",))
    package = importlib.import_module("a_package")

    class ReadsSettings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.settings = types.SimpleNamespace(gain=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return package.branched(x, self.settings)

    reads_settings = ReadsSettings()
    functions: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
        "cached": (lambda x: package.cached(x), True),
        "counted": (lambda x: package.counted(x), False),
        "constant": (lambda x: package.constant(x), False),
        "branched": (reads_settings, False),
        "kept": (lambda x: package.kept(x), False),
    }
    x = torch.ones(2)
    try:
        for name, (function, whole) in functions.items():
            package.SEEN.clear()
            wrapped = OptimizedModule(function, on_untraceable="ignore")
            found = [wrapped(x) for _ in range(3)]
            assert bool(package.SEEN) != whole, name
            package.SEEN.clear()
            expected = [function(x) for _ in range(3)]
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(*(item.value if name == "constant" else item for item in (one, other))), name
                assert name != "constant" or one.count == other.count
            assert (wrapped.cache_info().fallbacks == 0) == whole, name
    finally:
        del sys.modules["a_package"]


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
