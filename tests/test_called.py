"""What code reads that Python or a library calls, and what is looked up in roundabout ways, is in the key."""

from __future__ import annotations

import collections
import contextlib
import cProfile
import dataclasses
import functools
import operator
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lazy_einsum import OptimizedModule, UntraceableError
from lazy_einsum.impure import Called
from lazy_einsum.surroundings import read_by_called

STATE: dict[str, Any] = {}


class Object:
    """Each of its methods reads the state, and is named nowhere."""

    @property
    def factor(self) -> float:
        return STATE["a"]

    def __len__(self) -> int:
        return int(STATE["a"])

    def __bool__(self) -> bool:
        return STATE["a"] > 2

    def __iter__(self) -> Iterator[float]:
        return iter([STATE["a"]])

    def __contains__(self, key: object) -> bool:
        return key == STATE["a"]

    def __eq__(self, other: object) -> bool:
        return other == STATE["a"]

    def __hash__(self) -> int:
        return 1

    def __format__(self, spec: str) -> str:
        return str(STATE["a"])

    def __float__(self) -> float:
        return STATE["a"]

    def __index__(self) -> int:
        return int(STATE["a"])

    def __call__(self, x: Tensor) -> Tensor:
        return x * STATE["a"]

    def __getitem__(self, index: int) -> float:
        return STATE["a"]

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        return STATE["a"]


class Meta(type):
    def __getattr__(cls, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        return STATE["a"]


class OfMeta(metaclass=Meta):
    pass


class Descriptor:
    def __get__(self, instance: object, owner: type) -> float:
        return STATE["a"]


class Described:
    described = Descriptor()


class Looked:
    def __getattribute__(self, name: str) -> Any:
        return STATE["a"] if name == "looked" else object.__getattribute__(self, name)


@contextlib.contextmanager
def context() -> Iterator[float]:
    yield STATE["a"]


def in_context(x: Tensor) -> Tensor:
    with context() as factor:
        return x * factor


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x * STATE["a"]


def key(number: int) -> float:
    return -number if STATE["a"] > 2 else number


def times(x: Tensor, unused: int = 0) -> Tensor:
    return x * STATE["a"]


def numbers() -> Iterator[float]:
    yield STATE["a"]


def _closure() -> Callable[[Tensor], Tensor]:
    state = STATE
    return lambda x: x * state["a"]


@dataclasses.dataclass
class Config:
    a: float = 2.0


OBJECT, DESCRIBED, LOOKED, CONFIG = Object(), Described(), Looked(), Config()
IN_LIST = [_closure()]
PARTS = types.SimpleNamespace(deep=types.SimpleNamespace(a=2.0))
Pair = collections.namedtuple("Pair", "a b")
COUNTER = collections.Counter(a=2)
CHAIN = collections.ChainMap({}, {"a": 2.0})
MODULE = types.ModuleType("a_module_that_forward_imports")
LAZY = types.ModuleType("a_module_with_getattr")
exec("STATE = {}\ndef __getattr__(name):\n    return STATE[name]", LAZY.__dict__)


def imports(x: Tensor) -> Tensor:
    import a_module_that_forward_imports

    return x * a_module_that_forward_imports.a


def imports_from(x: Tensor) -> Tensor:
    from a_module_that_forward_imports import a

    return x * a


def set_all(value: float) -> None:
    """Everything that children below read."""
    STATE["a"] = LAZY.STATE["a"] = CHAIN.maps[1]["a"] = value  # type: ignore[attr-defined]
    PARTS.deep.a = PARTS.given = MODULE.a = CONFIG.a = value  # type: ignore[attr-defined]
    PARTS.pair = Pair(value, 0)
    COUNTER["a"] = int(value)


CHILDREN: dict[str, Callable[[Tensor], Tensor]] = {
    "property": lambda x: x * OBJECT.factor,
    "len": lambda x: x * len(OBJECT),
    "bool": lambda x: x * 2 if OBJECT else x,
    "iter": lambda x: x * sum(OBJECT),
    "contains": lambda x: x * 2 if 5.0 in OBJECT else x,
    "eq": lambda x: x * 2 if OBJECT == 5.0 else x,
    "format": lambda x: x * float(f"{OBJECT}"),
    "float": lambda x: x * float(OBJECT),
    "index": lambda x: x * list(range(20))[OBJECT],
    "call": lambda x: OBJECT(x),
    "getitem": lambda x: x * OBJECT[0],
    "getattr of a class": lambda x: x * OBJECT.anything,
    "getattr of a metaclass": lambda x: x * OfMeta.anything,
    "getattr of a module": lambda x: x * LAZY.a,
    "descriptor": lambda x: x * DESCRIBED.described,
    "getattribute": lambda x: x * LOOKED.looked,
    "context manager": in_context,
    "decorated function": lambda x: decorated(x),
    "partial": functools.partial(times, unused=1),
    "key for sorting": lambda x: x[sorted([0, 1, 2], key=key)],
    "map": lambda x: x * sum(map(times, [1, 2])),
    "callback of re": lambda x: x * float(re.sub("a", lambda found: str(STATE["a"]), "a")),
    "generator": lambda x: x * sum(numbers()),
    "closure in a list": lambda x: IN_LIST[0](x),
    "attrgetter": lambda x: x * operator.attrgetter("deep.a")(PARTS),
    "getattr with a text": lambda x: x * getattr(PARTS, "given", 1.0),
    "named tuple": lambda x: x * PARTS.pair.a,
    "Counter": lambda x: x * COUNTER["a"],
    "ChainMap": lambda x: x * CHAIN["a"],
    "asdict": lambda x: x * dataclasses.asdict(CONFIG)["a"],
    "import": imports,
    "import from": imports_from,
}


@pytest.mark.parametrize("name", CHILDREN)
def test_what_is_called_by_others_is_in_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
    child = CHILDREN[name]
    model = OptimizedModule(child, on_untraceable="raise")
    x = torch.arange(12.0).reshape(3, 4)
    for value in (2.0, 2.0, 5.0, 2.0, 5.0):
        set_all(value)
        assert torch.equal(model(x), child(x)), value
    # Nothing is built anew where nothing has changed.
    assert model.cache_info().misses == 2


def test_attributes_that_come_and_go() -> None:
    def child(x: Tensor) -> Tensor:
        return x * getattr(PARTS, "sometimes", 1.0) * (2 if hasattr(PARTS, "another") else 1)

    model = OptimizedModule(child, on_untraceable="raise")
    x = torch.ones(3)
    for change in (
        lambda: None,
        lambda: setattr(PARTS, "sometimes", 3.0),
        lambda: setattr(PARTS, "another", 1),
        lambda: delattr(PARTS, "sometimes"),
        lambda: delattr(PARTS, "another"),
    ):
        change()
        assert torch.equal(model(x), child(x))


NAME = "scale"


class Named(torch.nn.Module):
    """Looks a class attribute up by a name that it is given."""

    names = ("scale",)
    scale = 2.0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "global":
            return x * getattr(self, NAME)
        if self.how == "computed":
            return x * getattr(self, "".join(["sc", "ale"]))
        for name in self.names if self.how == "class" else ("scale",):
            x = x * getattr(self, name)
        return x


class NamedAndSpelt(Named):
    def other(self) -> float:
        return self.scale


class Plain:
    names = ("scale",)
    scale = 2.0

    def use(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x * getattr(self, name)
        return x


PLAIN = Plain()


def helper(x: Tensor) -> Tensor:
    return x * Plain.scale


def profiled(x: Tensor) -> Tensor:
    profile = cProfile.Profile()
    profile.enable()
    result = helper(x)
    profile.disable()
    return result


@pytest.mark.parametrize("how", ["global", "computed", "class", "tuple"])
@pytest.mark.parametrize("kind", [Named, NamedAndSpelt])
def test_class_attributes_by_names_that_are_given(kind: type[Named], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    child = kind(how)
    model = OptimizedModule(child, on_untraceable="raise")
    x = torch.ones(3)
    for value in (2.0, 3.0, 2.0):
        monkeypatch.setattr(Named, "scale", value)
        assert torch.equal(model(x), x * value)
    assert model.cache_info().misses == 2


@pytest.mark.parametrize("child", [lambda x: x * PLAIN.scale, lambda x: PLAIN.use(x), helper, profiled])
def test_class_attributes_of_plain_objects(child: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = OptimizedModule(child, on_untraceable="ignore")
    x = torch.ones(3)
    for value in (2.0, 3.0, 2.0):
        monkeypatch.setattr(Plain, "scale", value)
        assert torch.equal(model(x), x * value)


def test_functions_that_wrap_themselves_and_objects_of_a_class_of_their_own() -> None:
    class Proxy:
        @property
        def __class__(self) -> type:
            raise RuntimeError("asked for its class")

        def factor(self) -> float:
            return STATE["a"]

    proxy = Proxy()

    def around(x: Tensor) -> Tensor:
        return x * proxy.factor()

    around.__wrapped__ = around  # type: ignore[attr-defined]
    called = Called(key.__code__, {"key": around}, (), Proxy)
    assert not list(read_by_called({key.__code__: {(): called}}, set()))
    set_all(2.0)
    model = OptimizedModule(lambda x: around(x), on_untraceable="ignore")
    for value in (2.0, 5.0):
        set_all(value)
        assert torch.equal(model(torch.ones(3)), torch.full((3,), value))


def test_sizes_that_vary() -> None:
    set_all(2.0)
    model = OptimizedModule(lambda x: torch.einsum("ij,kj->ik", x, x) * OBJECT.factor, on_untraceable="raise")
    for n in range(2, 9):
        model(torch.rand(n, 4))
    set_all(5.0)
    x = torch.rand(7, 4)
    torch.testing.assert_close(model(x), x @ x.T * 5)


def test_only_functions_that_nobody_found_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking the garbage collector takes longer than all else."""
    set_all(2.0)
    asked = []
    monkeypatch.setattr("lazy_einsum.surroundings.gc.get_referrers", lambda *codes: asked.append(codes) or [])

    def child(x: Tensor) -> Tensor:
        inner = lambda y: [y * w for w in (1.0, 2.0)]  # noqa: E731
        return sum(inner(x)) * OBJECT.factor + sum(w for w in (1.0, 2.0)) + decorated(x)

    OptimizedModule(child)(torch.ones(3))
    # One that reads nothing.
    OptimizedModule(lambda x: x + 1)(torch.ones(3))
    assert not asked
    called = {times.__code__: {(id(globals()),): Called(times.__code__, globals(), (), type(None))}}
    assert [str(reading.variable) for reading in read_by_called(called, set())] == [f"{__name__}.STATE"]
    assert not list(read_by_called(called, {times}))
    assert not asked


def _reader(get: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * get()


class Holder:
    """Gives a function that is named nowhere."""

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        return HELD[0]


HELD: list[Callable[[Tensor], Tensor]] = []
HOLDER = Holder()
FIRST = _reader(lambda: 1.0)
COMPILED = compile("def read(x):\n    return x * factor", "<text>", "exec")


@pytest.mark.parametrize("child", [lambda x: FIRST(x) + HOLDER.function(x), lambda x: FIRST(x) + HELD[0](x)])
def test_functions_of_one_code_are_told_apart(child: Callable[[Tensor], Tensor]) -> None:
    """By their enclosing variables, and by their global ones; of the first one it is known what it reads."""
    x = torch.ones(3)
    numbers = [1.0]
    HELD[:] = [_reader(lambda: numbers[0])]
    model = OptimizedModule(child, on_untraceable="raise")
    for value in (2.0, 2.0, 5.0):
        numbers[0] = value
        assert torch.equal(model(x), child(x))
    assert model.cache_info().misses == 2

    scopes: list[dict[str, Any]] = [{"factor": 1.0}, {"factor": 1.0}]
    for scope in scopes:
        exec(COMPILED, scope)
    first = scopes[0]["read"]
    HELD[:] = [scopes[1]["read"]]
    model = OptimizedModule(lambda x: first(x) + HOLDER.function(x), on_untraceable="raise")
    for value in (2.0, 5.0):
        scopes[1]["factor"] = value
        assert torch.equal(model(x), x + x * value)


class Wide:
    """With its class it has more attributes than are taken to be settings."""


for number in range(40):
    setattr(Wide, f"c{number}", float(number))
WIDE = Wide()
for number in range(40):
    setattr(WIDE, f"a{number}", float(number))


def test_attributes_of_an_object_are_taken_where_those_of_its_class_are_too_many() -> None:
    model = OptimizedModule(lambda x: x * sum(getattr(WIDE, f"a{number}") for number in range(40)))
    x = torch.ones(3)
    for value in (3.0, 100.0):
        WIDE.a3 = value  # type: ignore[attr-defined]
        assert torch.equal(model(x), x * (sum(range(40)) - 3 + value))


GETTER = operator.attrgetter("scale")


class Got(torch.nn.Module):
    scale = 2.0
    shift = 7.0

    def forward(self, x: Tensor) -> Tensor:
        return x * GETTER(self)

    def other(self) -> float:
        return self.scale + self.shift


def test_getters_that_hold_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OptimizedModule(Got(), on_untraceable="raise")
    x = torch.ones(3)
    for value in (2.0, 3.0):
        monkeypatch.setattr(Got, "scale", value)
        assert torch.equal(model(x), x * value)
    monkeypatch.setitem(globals(), "GETTER", operator.attrgetter("shift"))
    assert torch.equal(model(x), x * 7)


def test_forward_that_sets_a_profiler_is_not_specialized() -> None:
    def child(x: Tensor) -> Tensor:
        sys.setprofile(None)
        return helper(x)

    with pytest.raises(UntraceableError, match="sets a profiler"):
        OptimizedModule(child, on_untraceable="raise")(torch.ones(3))
