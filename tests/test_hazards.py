"""The table of hazards: what user code does beside calling torch functions, and what a user does to a model meanwhile.

Each row runs wrapped and unwrapped, cold and warm, before and after a change; all that can be seen of the calls has to
be the same. A row says whether it is specialized, or refused with which reason.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import functools
import itertools
import logging
import os
import random
import re
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from behaviour import differences, observe
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree

from lazy_einsum import FallbackWarning, OptimizedModule
from lazy_einsum.data import flatten

einsum = torch.einsum
Arguments = Callable[[], tuple[Any, ...]]


class Program(nn.Module):
    """Runs ``function(self, *args)`` with the given attributes on itself."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def x34() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def plain() -> tuple[Any, ...]:
    return (x34(),)


def with_grad() -> tuple[Any, ...]:
    return (x34().requires_grad_(),)


def single() -> tuple[Any, ...]:
    return (torch.randn(3, 4),)


@dataclass
class Hazard:
    """One row.

    Attributes:
        name: of the row.
        make: makes the child; called twice, under one seed.
        arguments: makes the arguments of a call; called twice, under one seed.
        change: done to each of the two children after two calls.
        context: around each call.
        refused: why it is not specialized, as a regular expression; empty where it is.
        later: it is refused at the first call only, or in part: something is specialized.
        part: of the table.
    """

    name: str
    make: Callable[[], Any]
    arguments: Arguments = plain
    change: Callable[[Any], Any] | None = None
    context: Callable[[], Any] = contextlib.nullcontext
    refused: str = ""
    later: bool = False
    part: str = ""


ROWS: list[Hazard] = []
PART = ""


def hazard(name: str, make: Callable[[], Any], **options: Any) -> None:
    ROWS.append(Hazard(name, make, **options, part=PART))


def program(function: Callable[..., Any], **attributes: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Makes a ``Program`` with what the given functions make on itself."""
    return lambda: Program(function, **{name: make() for name, make in attributes.items()})


def enclosing(make: Callable[[], tuple[Callable[..., Any], Any]]) -> Callable[[], nn.Module]:
    """A ``Program`` of a function and what it encloses, which is at hand as ``child.__dict__["enclosed"]``."""

    def build() -> nn.Module:
        function, enclosed = make()
        child = Program(function)
        child.__dict__["enclosed"] = enclosed
        return child

    return build


# -- arguments and results --------------------------------------------------------------------------------------------
PART = "Arguments and results"


@dataclass
class Batch:
    x: Any
    scale: Any = 1.0

    def total(self) -> Tensor:
        return einsum("ij,ij->i", self.x, self.x) * self.scale


@dataclass(frozen=True)
class FrozenBatch:
    x: Any
    scale: Any = 1.0

    total = Batch.total


@dataclass(slots=True)
class SlotBatch:
    x: Any
    scale: Any = 1.0

    total = Batch.total


@dataclass(frozen=True, slots=True)
class FrozenSlotBatch:
    x: Any
    scale: Any = 1.0

    total = Batch.total


@dataclass
class Derived(Batch):
    """Has an attribute that is no field."""

    def __post_init__(self) -> None:
        self.doubled = self.x * 2


class Output(collections.OrderedDict[str, Any]):
    """As the outputs of Hugging Face's models: a dictionary with attributes, known to torch's pytrees."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


pytree.register_pytree_node(
    Output, lambda value: (list(value.values()), list(value)), lambda items, keys: Output(**dict(zip(keys, items)))
)


class Pair(NamedTuple):
    first: Any
    second: Any


class Color(enum.Enum):
    RED = 1
    BLUE = 2


for kind in (Batch, FrozenBatch, SlotBatch, FrozenSlotBatch, Derived):
    hazard(
        f"{kind.__name__} given",
        program(lambda self, b: b.total() + (b.doubled.sum() if hasattr(b, "doubled") else 0)),
        arguments=lambda kind=kind: (kind(x34().requires_grad_(), 2.0),),
    )
    hazard(f"{kind.__name__} returned", program(lambda self, x, kind=kind: kind(x * 2, [x + 1, None, "a"])))
hazard(
    "nested dataclasses, lists, dicts, named tuples",
    program(lambda self, b: Pair({"a": b["b"][0].total()}, [Batch(b["b"][1].first, FrozenBatch(1))])),
    arguments=lambda: ({"b": [Batch(x34(), 3), Pair(x34(), None)]},),
)
hazard(
    "registered class given and returned",
    program(lambda self, o: Output(y=o.x * 2, z=[o["x"] + 1])),
    arguments=lambda: (Output(x=x34().requires_grad_()),),
)
hazard("constants", program(lambda self, x, c: x * 2 if c is Color.RED else x), arguments=lambda: (x34(), Color.RED))
hazard("NumPy scalar given", program(lambda self, x, c: x * c), arguments=lambda: (x34(), np.float32(2.5)))
hazard(
    "keyword arguments in their order",
    program(lambda self, x, **kwargs: [kwargs, sum(kwargs.values(), x)]),
    arguments=lambda: (x34(),),
)
hazard(
    "dataclass changed",
    program(lambda self, b: (setattr(b, "x", b.x * 2), b.total())[1]),
    arguments=lambda: (Batch(x34()),),
    refused="changes a list, dictionary or object",
)
hazard(
    "dataclass handed back",
    program(lambda self, b: b),
    arguments=lambda: (Batch(x34()),),
    refused="returns a list, dictionary or object that it was given",
)
hazard("tensor subclass", program(lambda self, x: x * 2), arguments=lambda: (x34().as_subclass(Sub),), refused="Sub")


class Sub(Tensor):
    pass


# -- what lies outside of the module ----------------------------------------------------------------------------------
PART = "What lies outside of the module"

TABLE = [torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)]
WEIGHT = torch.randn(4, dtype=torch.float64, requires_grad=True)


class Tables:
    row = torch.ones(4, dtype=torch.float64)
    calls = 0


class WithTable(nn.Module):
    table = torch.ones(4, dtype=torch.float64)
    scale = 2.0
    activation = nn.Dropout(0.5)

    def helper(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.activation(x)) * self.table


def fresh_class() -> nn.Module:
    """An instance of a class of its own, which rows may change."""
    return type("WithTable", (WithTable,), {name: value for name, value in vars(WithTable).items() if name[0] != "_"})()


class Namespace:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def module_of_its_own() -> types.ModuleType:
    module = types.ModuleType("helpers")
    exec("scale = 2.0\ndef helper(x): return x * scale", module.__dict__)
    return module


def set_item(key: Any, value: Any) -> Callable[[Any], Any]:
    return lambda child: child.__dict__["enclosed"].__setitem__(key, value)


def set_attribute(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda child: setattr(child.__dict__["enclosed"], name, value)


def filled(value: float) -> Tensor:
    return torch.full((4,), value, dtype=torch.float64)


def enclosed_variable() -> nn.Module:
    table = filled(2.0)
    child = Program(lambda self, x: x * table)

    def change(value: Tensor) -> None:
        nonlocal table
        table = value

    child.__dict__["set"] = change
    return child


hazard("global tensors", program(lambda self, x: sum(einsum("ij,j->ij", x, t) for t in TABLE)))
hazard("global leaf that requires grad", program(lambda self, x: x * WEIGHT))
hazard("tensor of a global class", program(lambda self, x: x * Tables.row))
hazard("enclosed tensor replaced", enclosed_variable, change=lambda child: child.set(filled(5.0)))
hazard(
    "item of an enclosed list replaced",
    enclosing(lambda: (lambda t: (lambda self, x: x * t[1], t))([filled(1.0), filled(2.0)])),
    change=set_item(1, filled(5.0)),
)
hazard(
    "enclosed list of tensors grows",
    enclosing(lambda: (lambda t: (lambda self, x: sum(x * item for item in t), t))([filled(1.0), filled(2.0)])),
    change=lambda child: child.__dict__["enclosed"].append(filled(3.0)),
)
hazard(
    "enclosed tensor written",
    enclosing(lambda: (lambda t: (lambda self, x: x * t.add_(1), t))(filled(1.0))),
    change=lambda child: child.__dict__["enclosed"].mul_(2),
)
hazard(
    "enclosed tensor returned",
    enclosing(lambda: (lambda t: (lambda self, x: (x * t, t), t))(filled(1.0))),
)
hazard(
    "attributes of an enclosed object",
    enclosing(
        lambda: (lambda o: (lambda self, x: x * o.t * o.inner.k + (3 if hasattr(o, "late") else 0), o))(
            Namespace(t=filled(2.0), inner=Namespace(k=2.0), step=0)
        )
    ),
    change=lambda child: (
        setattr(child.__dict__["enclosed"].inner, "k", 5.0),
        setattr(child.__dict__["enclosed"], "late", 1),
    ),
)
hazard(
    "other attributes of an enclosed object",
    enclosing(lambda: (lambda o: (lambda self, x: x * o.k, o))(Namespace(k=2.0, step=0))),
    change=set_attribute("step", 1),
)
hazard("class attribute set", fresh_class, change=lambda child: setattr(type(child), "table", filled(3.0)))
hazard("instance attribute before a class attribute", fresh_class, change=lambda child: setattr(child, "scale", 7.0))
hazard("instance attribute before a method", fresh_class, change=lambda child: setattr(child, "helper", torch.sin))
hazard("module in a class", fresh_class, change=lambda child: type(child).activation.eval())
hazard("method replaced", fresh_class, change=lambda child: setattr(type(child), "helper", lambda self, x: x * 9))
hazard("forward replaced", fresh_class, change=lambda child: setattr(type(child), "forward", lambda self, x: x * 9))
hazard("forward of the instance", fresh_class, change=lambda child: setattr(child, "forward", lambda x: x * 9))
hazard(
    "forward of a submodule's instance",
    lambda: nn.Sequential(nn.Linear(4, 3)).double(),
    change=lambda child: setattr(child[0], "forward", lambda x: x * 9),
)
hazard(
    "enclosed function replaced",
    enclosing(lambda: (lambda f: (lambda self, x: f[0](x), f))([torch.sin])),
    change=set_item(0, torch.cos),
)
hazard(
    "variable of a Python module",
    enclosing(lambda: (lambda m: (lambda self, x: m.helper(x), m))(module_of_its_own())),
    change=set_attribute("scale", 7.0),
)
hazard(
    "function of a Python module",
    enclosing(lambda: (lambda m: (lambda self, x: m.helper(x), m))(module_of_its_own())),
    change=set_attribute("helper", torch.sin),
)
hazard("default argument", program(lambda self, x, t=TABLE[1], k=3.0: x * t * k))
hazard(
    "results of a cached function",
    enclosing(lambda: (lambda f: (lambda self, x: x * f(4), f))(functools.lru_cache(lambda n: torch.ones(n) * 2))),
)
hazard(
    "large enclosed list of numbers is taken for a registry",
    enclosing(lambda: (lambda t: (lambda self, x: x * 2 + 0 * len(t), t))(list(range(100)))),
    change=lambda child: child.__dict__["enclosed"].append(1),
)
CONTEXT_VARIABLE = contextvars.ContextVar("variable", default=2.0)
THREAD_LOCAL = threading.local()
THREAD_LOCAL.value = 2.0
hazard(
    "thread-local value",
    program(lambda self, x: x * THREAD_LOCAL.value),
    change=lambda child: setattr(THREAD_LOCAL, "value", 5.0),
)
hazard("context variable", program(lambda self, x: x * CONTEXT_VARIABLE.get()))
hazard(
    "tensor of an enclosed module",
    enclosing(lambda: (lambda m: (lambda self, x: x * m.weight[0], m))(nn.Linear(4, 4).double())),
    refused="neither an argument nor reached",
)
hazard(
    "enclosed module called",
    enclosing(lambda: (lambda m: (lambda self, x: m(x), m))(nn.Dropout(0.5))),
    change=lambda child: child.__dict__["enclosed"].eval(),
    refused="calls a Dropout that is not reached",
)
hazard(
    "large NumPy array outside",
    enclosing(lambda: (lambda t: (lambda self, x: x * float(t[0]), t))(np.ones(100_000))),
    change=set_item(0, 3.0),
    refused="NumPy array of 800000 bytes",
)


# -- effects and other inputs -----------------------------------------------------------------------------------------
PART = "Effects and other inputs"


def counting(self: Any, x: Tensor) -> Tensor:
    Tables.calls += 1
    return x * 2


def enclosed_effect(value: Any, effect: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> tuple[Callable[..., Any], Any]:
        held = value()

        def function(self: Any, x: Tensor) -> Tensor:
            effect(held)
            return x * (len(held) if hasattr(held, "__len__") else held.n)

        return function, held

    return enclosing(make)


for name, value, effect in (
    ("list", lambda: [1], lambda held: held.append(1)),
    ("nested list", lambda: {"a": [1]}, lambda held: held["a"].append(1)),
    ("dict", lambda: {"a": 1}, lambda held: held.update({len(held): 1})),
    ("set", lambda: {1}, lambda held: held.add(len(held) + 1)),
    ("deque", lambda: collections.deque([1]), lambda held: held.append(1)),
    ("Counter", lambda: collections.Counter(a=1), lambda held: held.update({"b": 1})),
    ("object", lambda: Namespace(n=1), lambda held: setattr(held, "n", held.n + 1)),
):
    hazard(f"enclosed {name} changed", enclosed_effect(value, effect), refused="changes held")


def mutable_default() -> nn.Module:
    def function(self: Any, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006 - that is the hazard
        seen.append(1)
        return x * len(seen)

    return Program(function)


def lazily_cached() -> nn.Module:
    cache: dict[int, Tensor] = {}

    def function(self: Any, x: Tensor) -> Tensor:
        if 4 not in cache:
            cache[4] = filled(2.0)
        return x * cache[4]

    return Program(function)


class CachedProperty(nn.Module):
    @functools.cached_property
    def factor(self) -> float:
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Verbose(nn.Module):
    verbose = False

    def forward(self, x: Tensor) -> Tensor:
        if self.verbose:
            print("forward", end="\r")
        LOGGER.debug("forward")
        return x * 2


LOGGER = logging.getLogger("a model")
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False


def with_effect(effect: Callable[[], Any]) -> Callable[[], nn.Module]:
    def function(self: Any, x: Tensor) -> Tensor:
        effect()
        return x * 2

    return program(function)


hazard("counter in a class", program(counting), refused=r"changes Tables\.calls")
hazard("list as a default argument grows", mutable_default, refused="__defaults__")
hazard("cache filled at the first call", lazily_cached, refused="changes cache", later=True)
hazard("cached property", CachedProperty, refused=r"sets self\.factor", later=True)
hazard("print that is not reached, log that is off", Verbose)
hazard("print", with_effect(lambda: print("", end="")), refused=r"calls print\(\)")
hazard("write to a stream", with_effect(lambda: sys.__stderr__.write("")), refused=r"write\(\)")
hazard("log", with_effect(lambda: LOGGER.warning("here")), refused="forward logs")
hazard("clock", with_effect(time.time), refused=r"calls time\(\)")
hazard("date", with_effect(datetime.datetime.now), refused=r"datetime\.now\(\)")
hazard("environment", with_effect(lambda: os.environ.get("HOME")), refused="reads the environment")
hazard("file", with_effect(lambda: open(os.devnull).close()), refused=r"calls open\(\)")
hazard("event set", with_effect(threading.Event().set), refused="uses threading")
hazard(
    "CUDA seeded",
    with_effect(lambda: torch.cuda.manual_seed(1)),
    refused="seeds torch's random generator of torch.cuda",
)
hazard("memory of CUDA asked for", with_effect(torch.cuda.memory_allocated), refused="uses torch.cuda.memory")
hazard(
    "CUDA device entered",
    with_effect(lambda: torch.cuda.device(-1).__enter__()),
    refused="enters a device of torch.cuda",
)
hazard(
    "CUDA stream entered", with_effect(lambda: torch.cuda.stream(None).__enter__()), refused="enters a StreamContext of"
)
hazard("stream waited for", with_effect(lambda: torch.Stream(device="cpu").query()), refused=r"Stream\.query\(\)")
hazard("seed asked for", program(lambda self, x: x * (torch.initial_seed() % 7)), refused="seed")
hazard(
    "iterator outside",
    enclosing(lambda: (lambda i: (lambda self, x: x * next(i), i))(itertools.count(1))),
    refused="may draw from i",
)
hazard(
    "Python's generator outside",
    enclosing(lambda: (lambda r: (lambda self, x: x * r.random(), r))(random.Random(0))),
    refused="may draw from r",
)
hazard(
    "NumPy's generator outside",
    enclosing(lambda: (lambda r: (lambda self, x: x * float(r.normal()), r))(np.random.default_rng(0))),
    refused="may draw from r",
)
hazard(
    "tensor attribute set",
    program(lambda self, x: (setattr(self, "h", x.detach() * 2), self.h + 1)[1]),
)
hazard(
    "type compared",
    program(lambda self, x: x * 2 if type(x) is torch.Tensor else x),
    refused="compares the type of a value",
)
hazard("class asked for", program(lambda self, x: x * 2 if x.__class__ is torch.Tensor else x))


def tagged() -> tuple[Any, ...]:
    x = x34()
    x.tag = 1  # type: ignore[attr-defined]
    return (x,)


hazard(
    "attribute of an argument",
    program(lambda self, x: x * (3 if hasattr(x, "tag") else 2)),
    arguments=tagged,
    refused="checked at later calls",
)


def tagging() -> nn.Module:
    child = program(
        lambda self, x: self.layer(x) * (3 if hasattr(self.layer(x), "tag") else 2),
        layer=lambda: nn.Linear(4, 4).double(),
    )()
    child.layer.register_forward_hook(lambda module, args, result: setattr(result, "tag", 1))
    return child


hazard(
    "attribute that a hook gives a result",
    tagging,
    refused="which a hook of a submodule may have given",
)
hazard(
    "attribute of a parameter",
    program(lambda self, x: self.w * x * (3 if getattr(self.w, "tag", 0) else 2), w=lambda: nn.Parameter(filled(1.0))),
    change=lambda child: setattr(child.w, "tag", 1),
)


class Keeps(nn.Module):
    """Keeps results as attributes and buffers, as ``function(self, x)`` says."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(4, 4).double()
        self.register_buffer("sum", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("empty", None)
        self.plain = torch.ones(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def buffer_replaced(self: Any, x: Tensor) -> Tensor:
    self.sum = self.sum * 0.5 + x.detach().sum(0)
    return x + self.sum


def buffer_filled(self: Any, x: Tensor) -> Tensor:
    self.empty = x.detach().sum(0)
    return x * 2


def attribute_kept(self: Any, x: Tensor) -> Tensor:
    scores = einsum("ij,kj->ik", x, self.inner(x))
    self.scores = scores.detach()
    self.inner.last = scores
    return scores * 2


def attribute_replaced(self: Any, x: Tensor) -> Any:
    before = self.plain
    self.plain = self.plain + x.detach().mean(0)
    return x * self.plain, before


def state_of_its_own(self: Any, x: Tensor) -> Tensor:
    if getattr(self, "state", None) is None:
        self.state = torch.zeros(3, 4, dtype=x.dtype)
    self.state = einsum("ij,jk->ik", x, self.inner.weight).detach() + self.state
    return self.state * x


def argument_kept(self: Any, x: Tensor) -> Tensor:
    self.given = x
    return x + 1


def result_kept(self: Any, x: Tensor) -> Tensor:
    self.sum = y = x.detach().sum(0) * 2
    return y


def buffer_grows(self: Any, x: Tensor) -> Tensor:
    self.sum = torch.cat([self.sum, x.detach()[0]])
    return x * self.sum.sum()


def parameter_replaced(self: Any, x: Tensor) -> Tensor:
    y = self.inner(x)
    self.inner.weight = nn.Parameter(self.inner.weight * 0.5)
    return y


def buffer_deleted(self: Any, x: Tensor) -> Tensor:
    y = x + getattr(self, "sum", 0)
    if hasattr(self, "sum"):
        del self.sum
    return y


for function in (
    buffer_replaced,
    buffer_filled,
    attribute_kept,
    attribute_replaced,
    state_of_its_own,
    argument_kept,
    result_kept,
):
    name = function.__name__.replace("_", " ")
    hazard(name, functools.partial(Keeps, function), arguments=with_grad, change=lambda child: child.inner.double())
hazard("buffer grows", functools.partial(Keeps, buffer_grows), refused="sets a parameter, buffer or submodule")
hazard("parameter replaced in forward", functools.partial(Keeps, parameter_replaced), refused="sets a parameter")
hazard("buffer deleted", functools.partial(Keeps, buffer_deleted), refused="sets a parameter", later=True)


# -- attributes -------------------------------------------------------------------------------------------------------
PART = "Attributes"


class Helped(nn.Linear):
    """Its ``forward`` calls another method."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.help(x))

    def help(self, x: Tensor) -> Tensor:
        return x * 2


hazard(
    "method of a submodule replaced in its instance",
    lambda: nn.Sequential(Helped(4, 4).double()),
    change=lambda child: setattr(child[0], "help", lambda x: x * 5),
)


@dataclass
class Settings:
    scale: float = 2.0
    sizes: list[int] = field(default_factory=lambda: [2, 3])


@dataclass(frozen=True, slots=True)
class FrozenSettings:
    scale: float = 2.0


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.step = 0
        self.scale = 2.0


class Trained(nn.Module):
    """Holds what can't be copied, and reads some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.generator = (i for i in range(3))
        self.large = np.zeros(300_000_000 // 8)
        self.local = threading.local()
        self.trainer = Trainer(self)
        self.w = nn.Parameter(filled(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * self.trainer.scale


class Bound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.first, self.second = self.linear.forward, self.helper

    def helper(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def of_attribute(use: Callable[[Tensor, Any], Tensor], make: Callable[[], Any]) -> Callable[[], nn.Module]:
    return program(lambda self, x: use(x, self.o), o=make)


def set_on(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda child: setattr(child.o, name, value)


hazard("dataclass", of_attribute(lambda x, o: x * o.scale * o.sizes[0], Settings), change=set_on("scale", 5.0))
hazard("frozen dataclass with slots", of_attribute(lambda x, o: x * o.scale, FrozenSettings))
hazard("object with slots", of_attribute(lambda x, o: x * o.scale, Slots), change=set_on("scale", 5.0))
hazard(
    "simple namespace",
    of_attribute(lambda x, o: x * o.scale, lambda: types.SimpleNamespace(scale=2.0)),
    change=set_on("scale", 5.0),
)
hazard(
    "dataclass replaced in forward", of_attribute(lambda x, o: x * dataclasses.replace(o, scale=3.0).scale, Settings)
)
hazard(
    "attribute of an object absent, then present",
    of_attribute(lambda x, o: x * getattr(o, "late", 2.0), lambda: Namespace(a=1)),
    change=set_on("late", 5.0),
)
hazard("trainer, lock, generator, large array", Trained, change=lambda child: setattr(child.trainer, "step", 1))
hazard("what is read of a trainer", Trained, change=lambda child: setattr(child.trainer, "scale", 5.0))
hazard("bound methods", Bound)
hazard(
    "partial",
    of_attribute(lambda x, o: o(x), lambda: functools.partial(F.leaky_relu, negative_slope=0.3)),
    change=lambda child: setattr(child, "o", functools.partial(F.leaky_relu, negative_slope=0.7)),
)
hazard(
    "set",
    of_attribute(lambda x, o: x * 2 if 2 in o else x, lambda: {1, 2}),
    change=lambda child: child.o.discard(2),
)
hazard("deque", of_attribute(lambda x, o: x * o[0], lambda: collections.deque([2.0])))
hazard("defaultdict", of_attribute(lambda x, o: x * o["a"], lambda: collections.defaultdict(float, a=2.0)))
hazard(
    "range", of_attribute(lambda x, o: x * sum(o), lambda: range(4)), change=lambda child: setattr(child, "o", range(5))
)
hazard(
    "NumPy scalars",
    of_attribute(lambda x, o: x[: o[0]] * o[1] * o[2], lambda: (np.int64(2), np.float64(0.1), np.float32(0.1))),
)
hazard(
    "NumPy scalar of another type",
    of_attribute(lambda x, o: x * o, lambda: np.float64(0.1)),
    change=lambda child: setattr(child, "o", np.float32(0.1)),
)
hazard(
    "small NumPy array",
    of_attribute(lambda x, o: x * float(o[0]) + o.sum(), lambda: np.array([2.0, 3.0])),
    change=lambda child: child.o.__setitem__(0, 5.0),
)
hazard("NumPy array as a tensor", of_attribute(lambda x, o: x * torch.tensor(o), lambda: np.ones(4)), refused="NumPy")
hazard(
    "torch's generator",
    of_attribute(lambda x, o: x + torch.rand(4, generator=o), lambda: torch.Generator().manual_seed(1)),
    change=lambda child: child.o.manual_seed(5),
)
hazard("lock used", of_attribute(lambda x, o: x * o.locked(), threading.Lock), refused="_thread.lock")


# -- state ------------------------------------------------------------------------------------------------------------
PART = "State"


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4)).double()


def linear() -> nn.Module:
    return nn.Linear(4, 3).double()


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def pruned() -> nn.Module:
    child = two_linears()
    prune.l1_unstructured(child[0], "weight", 0.5)
    return child


def quietly(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return build


def untie(child: Any) -> None:
    child[2].weight = nn.Parameter(child[0].weight.detach().clone())


def own_call() -> nn.Module:
    class Shifted(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x + 1)

    return Shifted(4, 3).double()


hazard("eval of a submodule", layers, change=lambda child: child[1].eval())
hazard("eval of dropout", layers, change=lambda child: child[2].eval())
hazard("eval of the whole", layers, change=lambda child: child.eval())
hazard("pruning added", two_linears, change=lambda child: prune.l1_unstructured(child[0], "weight", 0.5))
hazard("pruning removed", pruned, change=lambda child: prune.remove(child[0], "weight"))
hazard(
    "old weight_norm",
    quietly(lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3))).double()),
    arguments=with_grad,
    change=lambda child: child[0].weight_g.data.mul_(2),
)
hazard(
    "old spectral_norm",
    quietly(lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 3))).double()),
    change=lambda child: child.eval(),
)
hazard(
    "weight_norm removed",
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))).double(),
    change=lambda child: parametrize.remove_parametrizations(child[0], "weight"),
)
hazard(
    "spectral_norm",
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))).double(),
    change=lambda child: child.eval(),
)
hazard("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))).double())
hazard(
    "parametrization added",
    two_linears,
    change=lambda child: parametrize.register_parametrization(child[0], "weight", nn.Tanh()),
)
lazy_layer = functools.partial(nn.LazyLinear, 3, dtype=torch.float64)
hazard("lazy linear", lambda: nn.Sequential(lazy_layer()), change=lambda child: child.double())
hazard("lazy child", lazy_layer, change=lambda child: child.double())
hazard("to float32", lambda: two_linears().float(), arguments=single, change=lambda child: child.to(torch.float32))
hazard("half", lambda: two_linears().float(), arguments=single, change=lambda child: (child.half(), child.float()))
hazard("data set", linear, change=lambda child: setattr(child.weight, "data", torch.ones_like(child.weight)))
hazard(
    "data of another shape",
    lambda: nn.Linear(4, 3, bias=False).double(),
    change=lambda child: setattr(child.weight, "data", torch.ones(5, 4, dtype=torch.float64)),
)
hazard("data strided", linear, change=lambda child: setattr(child.weight, "data", torch.ones(4, 3).double().t()))
hazard("parameter removed", linear, change=lambda child: setattr(child, "bias", None))
hazard("parameter frozen", linear, change=lambda child: child.weight.requires_grad_(False))
hazard("tied", two_linears, change=lambda child: setattr(child[2], "weight", child[0].weight))
hazard("tied, then not", lambda: tied(), change=untie)
hazard("module replaced", two_linears, change=lambda child: child.__setitem__(1, nn.ReLU()))
hazard("module appended", two_linears, change=lambda child: child.append(nn.ReLU()))
hazard("module deleted", two_linears, change=lambda child: child.__delitem__(1))
hazard(
    "state loaded", two_linears, change=lambda child: child.load_state_dict(doubled(child.state_dict()), assign=True)
)
hazard("call of its own", own_call)
hazard("compiled submodule", lambda: nn.Sequential(torch.compile(linear(), backend="eager"), nn.Tanh()))
hazard("scripted submodule", quietly(lambda: nn.Sequential(torch.jit.script(layers()), nn.Tanh())), arguments=with_grad)
hazard(
    "scripted submodule read",
    quietly(lambda: Program(lambda self, x: self.s(x) + self.s.weight.sum(), s=torch.jit.script(linear()))),
    refused="looks into self.s",
)


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * 2 for name, value in state.items()}


def tied() -> nn.Module:
    child = two_linears()
    child[2].weight = child[0].weight
    return child


# -- contexts, gradients, hooks ---------------------------------------------------------------------------------------
PART = "Contexts, gradients, hooks"


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


def in_context(context: Callable[[], Any]) -> Callable[[], nn.Module]:
    def function(self: Any, x: Tensor) -> Any:
        y = x * 3
        with context():
            z = einsum("ij,jk,kl->il", y, self.w, self.w) * 2
        return y, z, einsum("ij,jk,kl->il", y, self.w, self.w)

    return program(function, w=lambda: nn.Parameter(torch.randn(4, 4, dtype=torch.float64)))


def nested_modes(self: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        first = x * 2
        with torch.inference_mode(False):
            second = self.w * 2
            with torch.no_grad():
                third = self.w * 3
            fourth = self.w * 4
        with torch.enable_grad():
            fifth = first * 3
    return first, second, third, fourth, fifth, x * self.w[0]


def views_asked(self: Any, x: Tensor) -> Any:
    """Views of what requires grad require it in inference mode too, whichever operation made them."""
    views = (
        torch.einsum("ij->ji", self.w),
        self.w.reshape(2, 8),
        self.w.mT,
        self.w.flatten(),
        self.w.unflatten(0, (2, 2)),
        torch.movedim(self.w, 0, 1),
        torch.broadcast_to(self.w, (2, 4, 4)),
        *torch.tensor_split(self.w, 2),
        self.w.detach(),
        self.w.mT.reshape(2, 8),
    )
    return x, [view * (2 if view.requires_grad else 3) for view in views]


def dropped_nothing(self: Any, x: Tensor) -> Any:
    """Dropout that drops nothing gives its operand itself."""
    h = x * 2
    y = self.d(h)
    y.mul_(3)
    return h + 1, y is h, nn.functional.dropout(self.w, 0.0, True) is self.w


def frozen_written(self: Any, x: Tensor) -> Any:
    """The first call ties a frozen parameter to autograd's graph."""
    self.w.movedim(0, 1).mul_(x.sum())
    return x * 2, self.w * 3


def default_dtype(self: Any, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return x + torch.ones(4) + torch.ones(4, dtype=torch.int64) / 3
    finally:
        torch.set_default_dtype(torch.float32)


def force(self: Any, x: Tensor) -> Any:
    x.requires_grad_()
    energy = einsum("ij,jk,kl->il", x, self.w, self.w).square().sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=self.training)
    return energy, -gradient


def force_of_a_copy(self: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        position = x.detach()
        position.requires_grad = True
        energy = einsum("ij,jk,kl->il", position, self.w, self.w).square().sum()
        (gradient,) = torch.autograd.grad(energy, position, create_graph=True)
    return energy, gradient


def required_in_between(self: Any, x: Tensor) -> Any:
    y = einsum("ij,kj->ik", x, x)
    x.requires_grad_()
    return y, einsum("ij,jk->ik", y, y) + einsum("ij,kj->ik", x, x)


@contextlib.contextmanager
def dual_level() -> Iterator[None]:
    with forward_ad.dual_level():
        yield


def forward_mode(self: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(dual * dual).tangent


class Layer(nn.Module):
    """Has something to optimize."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return einsum("bi,ij,jk->bk", x, self.weight, self.weight)


class Tagged(Tensor):
    """A subclass."""


def hooked_layer() -> nn.Module:
    child = Program(lambda self, x: self.layer(x) * 2, layer=Layer())
    child.layer.register_forward_hook(lambda module, args, result: result + 1)
    return child


def given_itself(module: nn.Module, child: nn.Module) -> None:
    """Hooks of ``module`` that change the result unless they are given ``module``."""
    module.register_forward_pre_hook(lambda given, args: (args[0] * (1 if given is module else 2),))
    module.register_forward_hook(lambda given, args, result: result * (1 if {given} == {module} else 2))
    module.register_full_backward_hook(lambda given, inputs, outputs: None if given is module else (inputs[0] * 2,))


def adds_a_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
    if len(module._forward_hooks) == 1:
        module.register_forward_hook(lambda module, args, result: result * 3)


def counted(self: Any, x: Tensor) -> Tensor:
    self.layer.calls = getattr(self.layer, "calls", 0) + 1
    return self.layer(x)


def untraceable_layer() -> nn.Module:
    child = Program(
        lambda self, x: einsum("bi,ij,jk->bk", self.layer(x), self.w, self.w), layer=Program(counted, layer=Layer())
    )
    child.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    child.layer.register_forward_hook(lambda module, args, result: result + module.layer.calls)
    return child


def giving_another_class() -> nn.Module:
    child = hooked_layer()
    child.layer.register_forward_hook(lambda module, args, result: result.as_subclass(Tagged))
    return child


def weight_outside() -> nn.Module:
    child = Program(lambda self, x: self.layer(x) * self.layer.weight.stride(0), layer=Layer())
    child.layer.register_forward_hook(lambda module, args, result: result + 1)
    return child


def hooked_argument() -> tuple[Any, ...]:
    y = x34().requires_grad_() * 1
    y.register_hook(lambda gradient: gradient * 5)
    return (y,)


def halves(context: Any) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 1, lambda tensor: tensor * 2)


def saved_in_turn(self: Any, x: Tensor) -> Any:
    factor = x.detach().sum()
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept * factor, lambda kept: kept):
        with torch.no_grad():
            y = x.sin()
        y = einsum("ij,jk->ik", x, self.w) * y
        with halves(None):
            y = y * y
        with torch.inference_mode():
            x.cos()
        y = y.sin() * y
    with halves(None):
        y = y.exp() * y
    return y.sin(), einsum("ij,jk,kl->il", y, self.w, self.w)


def left_at_once(self: Any, x: Tensor) -> Any:
    y = x * 2
    with halves(None):
        y = y.sin()
        with torch.inference_mode():
            x.cos()
    return y.exp() * y


def saved_at_once(self: Any, x: Tensor) -> Any:
    with halves(None), halves(None):
        return einsum("ij,jk->ik", x, self.w).sin()


def failing_in_hooks(self: Any, x: Tensor) -> Any:
    try:
        with halves(None):
            y = x.sin()
            y @ self.w.T[:3]
    except RuntimeError:
        return y * 2 + x.cos()


class Scaling(Program):
    """Has what hooks may use."""

    scale = 3.0

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, w=nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), scale=3.0)

    def scaled(self, gradient: Tensor) -> Tensor:
        return gradient * self.scale


def hooked(make_hook: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """A module whose result between two chains of einsums has the hook that ``make_hook`` makes."""

    def function(self: Any, x: Tensor) -> Any:
        y = einsum("ij,jk,kl->il", x, self.w, self.w) * 2
        early = einsum("ij,jk->ik", y, self.w)
        y.register_hook(make_hook(self, y))
        return early, 3 * einsum("ij,jk,kl->il", y, self.w, self.w)

    return lambda: Scaling(function)


def multiply_by(factor: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        return gradient * factor

    return hook


def keyword_only(self: Any, y: Tensor) -> Callable[..., Tensor]:
    factor = y.detach() ** 2
    return lambda g, *, factor=factor: g * factor


def hooks_of_a_loop(self: Any, x: Tensor) -> Any:
    y = einsum("ij,jk->ik", x, self.w)
    for number in range(3):
        y.register_hook(lambda g, number=number: g * (number + 2))
    return einsum("ij,jk->ik", y, self.w)


def hook_on_a_view(self: Any, x: Tensor) -> Any:
    y = einsum("ij,jk->ik", x, self.w)
    view = y.T
    z = einsum("ki,kl->il", view, self.w)
    view.register_hook(lambda g: g * 5)
    return z * 2, einsum("ki,kl->il", view, self.w), y


def hook_on_new_dims(self: Any, x: Tensor) -> Any:
    spread = x[:, :, None]
    early = (spread * self.w).sum(1)
    spread.register_hook(lambda g: g * 5)
    return early, (spread * self.w).sum(1)


def hook_and_write(self: Any, x: Tensor) -> Any:
    y = einsum("ij,jk->ik", x, self.w)
    y.register_hook(lambda g: g * 5)
    y.mul_(3)
    y.register_hook(lambda g: g + 1)
    return einsum("ij,jk->ik", y, self.w)


def hook_on_the_given(self: Any, x: Tensor) -> Any:
    x.register_hook(lambda g: g * 2)
    return einsum("ij,jk,kl->il", x, self.w, self.w)


def hook_without_gradients(self: Any, x: Tensor) -> Any:
    try:
        x.register_hook(lambda g: g * 2)
    except RuntimeError:
        return x * 3


def hook_that_shares() -> tuple[Callable[..., Any], list[float]]:
    factors = [2.0]

    def function(self: Any, x: Tensor) -> Any:
        y = x * 2
        y.register_hook(lambda g: g * factors[-1])
        return y.sin()

    return function, factors


def retained(self: Any, x: Tensor) -> Any:
    y = einsum("ij,jk->ik", x, self.w)
    y.retain_grad()
    return y, einsum("ij,jk->ik", y, self.w)


def retained_force(self: Any, x: Tensor) -> Any:
    y = einsum("ij,jk->ik", x, self.w)
    y.retain_grad()
    energy = einsum("ij,jk->", y, self.w)
    return energy, torch.autograd.grad(energy, x, create_graph=True)[0]


def hook_that_sets(self: Any, x: Tensor) -> Any:
    count = 1

    def hook(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return gradient * count

    y = x * 2
    y.register_hook(hook)
    y.register_hook(hook)
    return y.sin()


def hook_that_keeps(self: Any, x: Tensor) -> Any:
    kept: list[Tensor] = []
    y = x * 2
    y.register_hook(lambda g: kept.append(g) or g * len(kept))
    return y.sin()


def hook_of_an_inner_function(self: Any, x: Tensor) -> Any:
    factor = x.detach().cos()
    y = x * 2

    def attach() -> None:
        y.register_hook(lambda g: g * factor)

    attach()
    return y.sin()


def hook_of_a_made_function(self: Any, x: Tensor) -> Any:
    def make(factor: Tensor) -> Callable[[Tensor], None]:
        def attach(y: Tensor) -> None:
            y.register_hook(lambda g: g * factor)

        return attach

    y = x * 2
    make(x.detach().cos())(y)
    return y.sin()


def hook_of_an_inner_function_that_keeps(self: Any, x: Tensor) -> Any:
    kept: list[int] = []
    y = x * 2

    def attach() -> None:
        y.register_hook(lambda g: kept.append(1) or g * len(kept))

    attach()
    return y.sin()


def hook_that_keeps_in_a_tuple(self: Any, x: Tensor) -> Any:
    kept: tuple[list[int]] = ([],)
    y = x * 2
    y.register_hook(lambda g: kept[0].append(1) or g * len(kept[0]))
    return y.sin()


def hook_too_early(self: Any, x: Tensor) -> Any:
    factor = 2.0
    y = x * 2
    y.register_hook(lambda g: g * factor)
    factor = 4.0
    return y.sin()


def hook_on_view_without_grad(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        view = x.T
    if view.requires_grad:
        view.register_hook(lambda g: g * 4)
    return view


def required_of_a_view(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        view = x.T
    return x.T * (2 if view.requires_grad else 3)


def view_with_grad() -> tuple[Any, ...]:
    return (torch.ones(4, 3, dtype=torch.float64).T.requires_grad_(),)


def hook_removed(self: Any, x: Tensor) -> Any:
    y = x * 2
    y.register_hook(lambda g: g * 4).remove()
    return y.sin()


def hook_and_force(self: Any, x: Tensor) -> Any:
    y = x * 2
    y.register_hook(lambda g: g * 4)
    return torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0]


WEIGHTS: dict[str, Callable[[], Any]] = {"w": lambda: nn.Parameter(torch.randn(4, 4, dtype=torch.float64))}
BFLOAT16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)

hazard("autocast around", lambda: two_linears().float(), arguments=single, context=BFLOAT16)
hazard("autocast inside", lambda: in_context(BFLOAT16)().float(), arguments=single, refused="autocast")
hazard("inference mode around", linear, context=torch.inference_mode)
hazard("no_grad around", linear, arguments=with_grad, context=torch.no_grad)
hazard("inference mode inside", in_context(torch.inference_mode), arguments=with_grad)
hazard("inference mode inside of no_grad", in_context(torch.inference_mode), context=torch.no_grad)
hazard("inference mode inside of itself", in_context(torch.inference_mode), context=torch.inference_mode)
hazard("inference mode around, views", program(views_asked, **WEIGHTS), context=torch.inference_mode)
for where, context in (("", contextlib.nullcontext), (", in inference mode", torch.inference_mode)):
    layer = program(dropped_nothing, d=lambda: nn.Dropout(0.5).eval(), **WEIGHTS)
    hazard(f"dropout that drops nothing{where}", layer, arguments=with_grad, context=context)
FROZEN = {"w": lambda: nn.Parameter(torch.randn(4, 4, dtype=torch.float64), requires_grad=False)}
hazard(
    "frozen parameter written with gradients",
    program(frozen_written, **FROZEN),
    arguments=with_grad,
    change=lambda child: None,
)
hazard("modes nested", program(nested_modes, **WEIGHTS), arguments=lambda: (x34().requires_grad_(),))
hazard("inference mode as a decorator", program(torch.inference_mode()(lambda self, x: einsum("ij->ji", x) * 2)))
hazard("default dtype inside", program(default_dtype), arguments=with_grad)
hazard("device inside", in_context(lambda: torch.device("cpu")), arguments=with_grad)
hazard("device around", linear, context=lambda: torch.device("cpu"))
hazard(
    "checkpoint inside",
    program(lambda self, x: torch.utils.checkpoint.checkpoint(self.l, x, use_reentrant=False), l=linear),
    arguments=with_grad,
    refused="checkpointing",
)
hazard("custom Function", program(lambda self, x: Twice.apply(x)), arguments=with_grad, refused="autograd.Function")
hazard("force", program(force, **WEIGHTS), change=lambda child: child.eval())
hazard("force of what requires grad", program(force, **WEIGHTS), arguments=with_grad)
hazard("force of a copy", program(force_of_a_copy, **WEIGHTS))
hazard("force of a copy without grad mode", program(force_of_a_copy, **WEIGHTS), context=torch.no_grad)
hazard("requires_grad_ in between", program(required_in_between))
hazard("saved-tensor hooks around", linear, arguments=with_grad, context=functools.partial(halves, None))
hazard("saved-tensor hooks inside", in_context(functools.partial(halves, None)), arguments=with_grad)
hazard("save_on_cpu inside", in_context(torch.autograd.graph.save_on_cpu), arguments=with_grad)
hazard("saved-tensor hooks inside of others", program(saved_in_turn, **WEIGHTS), arguments=with_grad)
hazard("saved-tensor hooks and an inference mode left at once", program(left_at_once), arguments=with_grad)
hazard(
    "saved-tensor hooks inside, others around",
    in_context(functools.partial(halves, None)),
    arguments=with_grad,
    context=functools.partial(halves, None),
)
hazard("error inside of saved-tensor hooks", program(failing_in_hooks, **WEIGHTS), arguments=with_grad)
hazard(
    "two pairs of saved-tensor hooks entered at once",
    program(saved_at_once, **WEIGHTS),
    arguments=with_grad,
    refused="several modes at once",
)
hazard("hook on an argument", program(lambda self, x: x * 2), arguments=hooked_argument)
hazard("hook on a parameter", linear, change=lambda child: child.weight.register_hook(lambda gradient: gradient * 3))
for name, make_hook in {
    "": lambda self, y: lambda g: g * 3,
    ", with a tensor": lambda self, y: lambda g: g * y.detach(),
    ", with a default": lambda self, y: lambda g, k=y.shape[0]: g * k,
    ", with a default by keyword": keyword_only,
    ", a partial": lambda self, y: functools.partial(torch.mul, y.detach()),
    ", torch's own function": lambda self, y: torch.neg,
    ", made by a function": lambda self, y: multiply_by(y.detach().sum()),
}.items():
    hazard(f"hook on a result inside{name}", hooked(make_hook), arguments=with_grad)
for name, make_hook in {
    "with the module": lambda self, y: lambda g: g * self.scale,
    "a method": lambda self, y: self.scaled,
}.items():
    hazard(
        f"hook on a result inside, {name}",
        hooked(make_hook),
        arguments=with_grad,
        change=lambda child: setattr(child, "scale", 7.0),
    )
hazard("hook of an inner function", program(hook_of_an_inner_function), arguments=with_grad)
hazard("hook of a function made inside", program(hook_of_a_made_function), arguments=with_grad)
hazard("hooks of a loop on a result inside", program(hooks_of_a_loop, **WEIGHTS), arguments=with_grad)
hazard("hook on a view used before", program(hook_on_a_view, **WEIGHTS), arguments=with_grad)
hazard("hook on what new dimensions were added to", program(hook_on_new_dims, **WEIGHTS), arguments=with_grad)
hazard("hook on an argument inside", program(hook_on_the_given, **WEIGHTS), arguments=with_grad)
hazard("hook on a result without gradients inside", program(hook_without_gradients), arguments=plain)
hazard(
    "hook on a result inside, with what a function around shares",
    enclosing(hook_that_shares),
    arguments=with_grad,
    change=lambda child: child.__dict__["enclosed"].append(4.0),
)
hazard(
    "requires_grad of a view made without gradients",
    program(required_of_a_view),
    arguments=view_with_grad,
    refused="asks for requires_grad of a view",
)
hazard("retain_grad inside", program(retained, **WEIGHTS), arguments=with_grad)
hazard("retain_grad and autograd.grad inside", program(retained_force, **WEIGHTS), arguments=with_grad)
for name, make_hook, reason in (
    ("sets a variable", hook_that_sets, "sets count"),
    ("uses a list", hook_that_keeps, "uses a list"),
    ("uses a list, of an inner function", hook_of_an_inner_function_that_keeps, "uses a list"),
    ("uses a list in a tuple", hook_that_keeps_in_a_tuple, "uses a list"),
    ("uses what is set afterwards", hook_too_early, "sets a variable that it uses afterwards"),
    ("is on a view made without gradients", hook_on_view_without_grad, "while grad mode was off"),
    ("is removed", hook_removed, "remove of the handle"),
    ("comes before autograd.grad", hook_and_force, "differentiates after"),
    ("comes before a write", hook_and_write, "writes to a tensor after"),
):
    hazard(f"hook on a result inside that {name}", program(make_hook, **WEIGHTS), arguments=with_grad, refused=reason)
hazard("vmap inside", program(lambda self, x: torch.vmap(lambda row: row * 2)(x)), refused="torch.func")
hazard("jacobian inside", program(lambda self, x: torch.autograd.functional.jacobian(lambda z: (z * z).sum(), x)))
hazard("forward-mode differentiation inside", program(forward_mode), refused="forward-mode")
hazard("hook on a submodule", two_linears, change=lambda child: child[0].register_forward_hook(lambda m, a, o: o * 2))
hazard(
    "hook with keyword arguments",
    two_linears,
    change=lambda child: child[0].register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True),
)
hazard(
    "backward hook on a submodule",
    two_linears,
    arguments=with_grad,
    change=lambda child: child[0].register_full_backward_hook(lambda m, i, o: (i[0] * 3,)),
)


class Reading(nn.Module):
    """Has a submodule with a hook, and reads more of it than its result."""

    def __init__(self, read: Callable[[Any, Tensor], Any], hook: Callable[..., Any]) -> None:
        super().__init__()
        self.read = read
        self.layer = nn.Linear(4, 4).double()
        self.layer.scale = 2.0
        self.layer.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Any:
        return self.read(self, x)


def twice(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


def kept(module: nn.Module, args: Any, result: Tensor) -> None:
    module.last = result.detach()


def last_after(self: Any, x: Tensor) -> Any:
    y = self.layer(x)
    return y, self.layer.last


hazard(
    "submodule with hooks called twice",
    functools.partial(Reading, lambda self, x: self.layer(self.layer(x)) + self.layer.weight.sum(0), twice),
    change=lambda child: child.layer.register_forward_hook(twice),
)
hazard(
    "attribute of a submodule with hooks, read before its call",
    functools.partial(Reading, lambda self, x: self.layer.scale * self.layer(x), twice),
    change=lambda child: setattr(child.layer, "scale", 5.0),
)
hazard(
    "attribute of a submodule with hooks, read after its call",
    functools.partial(Reading, lambda self, x: self.layer(x) * self.layer.scale, twice),
    change=lambda child: setattr(child.layer, "scale", 5.0),
    refused="scale after the call",
)
hazard(
    "absent attribute of a submodule with hooks, read after its call",
    functools.partial(Reading, lambda self, x: self.layer(x) * getattr(self.layer, "other", 2.0), twice),
    change=lambda child: setattr(child.layer, "other", 5.0),
    refused="other after the call",
)
hazard(
    "attribute set, beside a submodule with hooks",
    functools.partial(Reading, lambda self, x: setattr(self, "kept", x * 2) or self.layer(x), twice),
    refused="sets self.kept, and a submodule",
)
hazard("attribute that a hook sets", functools.partial(Reading, last_after, kept), refused="last after the call")
hazard("hook on the child", two_linears, change=lambda child: child.register_forward_hook(lambda m, a, o: o * 2))
hazard("hooks on the child, given it", two_linears, change=lambda child: given_itself(child, child))
hazard("hooks on a submodule, given it", hooked_layer, change=lambda child: given_itself(child.layer, child))
hazard("hook added by a hook", hooked_layer, change=lambda child: child.layer.register_forward_pre_hook(adds_a_hook))
hazard("hooks removed", hooked_layer, change=lambda child: child.layer._forward_hooks.clear())
hazard("hooked submodule that can't be traced", untraceable_layer, later=True, refused="forward sets")
hazard(
    "hook that gives another class",
    giving_another_class,
    arguments=with_grad,
    refused="a Tagged, a subclass of",
    later=True,
)
hazard(
    "weight of a hooked submodule read outside of it",
    weight_outside,
    change=lambda child: setattr(child.layer, "weight", nn.Parameter(torch.arange(16.0).double().view(4, 4).T)),
)


# -- the test ---------------------------------------------------------------------------------------------------------


def spread(value: Any) -> Any:
    """Nested results with a dictionary in the place of each dataclass, as ``observe`` looks into no objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
        return {type(value).__name__: {name: spread(getattr(value, name)) for name in names}}
    if isinstance(value, dict):
        return type(value)(**{name: spread(item) for name, item in value.items()}) if value else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(spread, value))
    return type(value)(map(spread, value)) if type(value) in (list, tuple) else value


def call(row: Hazard, target: Any, child: Any, number: int) -> Any:
    torch.manual_seed(number)
    args = row.arguments()
    leaves: list[Any] = []
    flatten(args, leaves)
    wanted = {f"input {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_leaf}
    wanted |= dict(child.named_parameters()) if isinstance(child, nn.Module) else {}
    with row.context():
        found = observe(lambda *given: spread(target(*given)), args, module=child)
    assert found.error is None or target is not child, found.error
    with_gradients = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
    return found, with_gradients.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_hazard(row: Hazard) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        theirs = row.make()
        torch.manual_seed(0)
        child = row.make()
        ours = OptimizedModule(child)
        fallen: list[str] = []
        for number in range(4 if row.change else 2):
            if number == 2:
                assert row.change is not None
                row.change(theirs)
                row.change(child)
            expected, wanted = call(row, theirs, theirs, number)
            found, same = call(row, ours, child, number)
            assert differences(found, expected) == [], f"call {number}"
            assert wanted == same
            fallen += [str(w.message) for w in found.warned if issubclass(w.category, FallbackWarning)]
    info = ours.cache_info()
    if row.refused:
        assert len(fallen) == 1 and re.search(row.refused, fallen[0]), fallen
        assert (info.currsize > 0) == row.later
    else:
        assert fallen == [] and info.fallbacks == 0
        assert info.hits >= (2 if row.change else 1), info


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def table() -> str:
    """The table in words, as it stands in HAZARDS.md."""
    lines = [
        "# Hazards",
        "",
        "What user code does beside calling torch functions, and what users do to a model between calls. Each is a row",
        "of `test_hazards.py`, where all that can be seen of the calls has to be as without the wrapper:",
        "`python -m pytest 'tests/test_hazards.py::test_hazard[global tensors]'`.",
        "",
        "What is refused runs as it is, with one warning; its submodules are specialized where they can be.",
    ]
    for part in dict.fromkeys(row.part for row in ROWS):
        rows = [row for row in ROWS if row.part == part]
        lines += ["", f"## {part}", ""]
        for title, chosen in (
            ("specialized", [row.name for row in rows if not row.refused]),
            ("refused at the first call only, or in part", [row.name for row in rows if row.refused and row.later]),
            ("refused", [row.name for row in rows if row.refused and not row.later]),
        ):
            if chosen:
                lines += [f"- **{title}**: {'; '.join(chosen)}"]
    return "\n".join(lines) + "\n"


def test_the_table_in_words_is_true() -> None:
    """``python tests/test_hazards.py`` writes it anew."""
    assert _WORDS.read_text() == table()


_WORDS = Path(__file__).parent / "HAZARDS.md"

if __name__ == "__main__":
    _WORDS.write_text(table())
