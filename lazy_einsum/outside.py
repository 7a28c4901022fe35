"""``Outside``: what a trace takes from outside of the module, and what ``forward`` did there, to be undone."""

from __future__ import annotations

import inspect
import itertools
import operator
import random
import sys
import types
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .data import Constant, array_constant, is_array, is_constant
from .errors import UntraceableError
from .objects import attributes_of, where_lies
from .state import Container, Elements, Found, ModuleClass, Path, Reference, Without
from .surroundings import CACHED, MISSING, USERS, Outer, Reading, function_of, level_of, level_of_class, names_in

MAX_ITEMS = 64
"""What holds more plain data than this is taken for a registry, which changes without changing results."""

_MAX_WALKED = 100_000
_MAX_COPIED = 10_000
_MAX_WATCHED = 256

_GETTERS = (operator.attrgetter, operator.methodcaller)
_REFERENCES = (types.FunctionType, types.BuiltinFunctionType, type, property, staticmethod, *_GETTERS)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, tuple, deque)

Note = Callable[[Path, Found, str, Reading], None]


@dataclass(frozen=True, slots=True)
class Addition:
    """What ``forward`` added to a dictionary that lies outside of the module, in the variable ``name``."""

    container: dict[Any, Any]
    items: list[tuple[Any, Any]]
    name: str


@contextmanager
def made(additions: list[Addition]) -> Iterator[None]:
    """Make additions for a while."""
    before = [_items(addition.container) for addition in additions]
    try:
        for addition, items in zip(additions, before, strict=True):
            _refill(addition.container, [*items, *addition.items])
        yield
    finally:
        for addition, items in zip(additions, before, strict=True):
            _refill(addition.container, items)


class Outside:
    """What code may read from outside of its module, for one trace.

    Args:
        note: called with what may be read: path, what was found, the kind of question, and the reading.

    Attributes:
        readers: functions of which it is known what they may read.
        by_given_names: whether something was found that looks attributes up by names that it holds.
        filled: whether ``forward`` made a cached function work (found out by ``restore``).
        additions: what ``forward`` added to dictionaries of installed packages (found out by ``restore``): caches, as
            a rule.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._readings: list[tuple[Any, Path]] = []
        self.readers: set[types.FunctionType] = set()
        self.by_given_names = False
        self._tensors: dict[int, tuple[torch.Tensor, Path]] | None = None
        self._variables: dict[Outer, Any] = {}
        # id -> container, copy of it, where it was found, who reads it
        self._watched: dict[int, tuple[Any, Any, str, int]] = {}
        self._caches: dict[int, tuple[Any, Any]] = {}
        self.filled = False
        self.additions: list[Addition] = []
        self._changed: str | None = None

    def read(self, readings: Iterable[Reading]) -> None:
        """Put plain data into the key, and remember where tensors lie.

        Raises:
            UntraceableError: code may read something that changes when it is read.
        """
        for reading in readings:
            self._variables.setdefault(reading.variable, reading.variable.get())
            if reading.value is MISSING:
                continue
            if type(reading.value) is CACHED:
                self._caches.setdefault(id(reading.value), (reading.value, reading.value.cache_info()))
            path: Path = (("outer", reading.start), *reading.steps)
            _refuse_streams(reading)
            self._watch(reading.value, str(reading.variable), reading.level)
            self._readings.append((reading.value, path))
            self._tensors = None
            self.by_given_names |= isinstance(reading.value, _GETTERS)
            if reading.level == USERS or is_constant(reading.value):
                # Where attributes of classes are too much, those of the objects are still taken.
                for of_classes in (True, False):
                    found = _Walk(4 * MAX_ITEMS, of_classes).facts(reading.value, path, reading.names)
                    if found and sum(isinstance(fact, Constant) for _, fact, _ in found) <= MAX_ITEMS:
                        for item in found:
                            self._note(*item, reading)
                        break

    def knows(self, variable: Outer) -> bool:
        """Whether code may read ``variable``, which is there at all calls."""
        return variable in self._variables

    def find(self, tensor: torch.Tensor) -> Path | None:
        """Where ``tensor`` lies."""
        if self._tensors is None:  # few modules ask, and what can be reached may be large
            walk = _Walk(_MAX_WALKED)
            found = itertools.chain.from_iterable(walk.tensors(value, path) for value, path in self._readings)
            self._tensors = {}
            for place, known in found:
                self._tensors.setdefault(id(known), (known, place))
        place_of = self._tensors.get(id(tensor))
        return place_of[1] if place_of is not None else None

    def restore(self, report: bool = True) -> str | None:
        """Undo what ``forward`` did to variables, containers and objects; the name of one that it changed (now or,
        unless ``report`` was false, at an earlier call) other than by an addition, or ``None``.
        """
        changed = None
        for start, value in self._variables.items():
            if start.get() is not value:
                changed = str(start)
                start.set(value)
        for value, before, name, level in self._watched.values():
            if not _same_items(value, before):
                added = _added(value, before) if level < USERS else None
                if added is None:
                    changed = name
                elif report:
                    self.additions.append(Addition(value, added, name))
                _refill(value, before)
        for function, before in self._caches.values():
            if function.cache_info().misses != before.misses:
                function.cache_clear()  # of what it made of fakes; it makes everything anew when it is asked
                self.filled = True
        if report:
            self._changed = self._changed or changed
        return self._changed

    def forget(self) -> None:
        """Drop everything."""
        self._readings.clear()
        self._tensors = None
        self._variables.clear()
        self._watched.clear()
        self._caches.clear()
        self.readers.clear()
        self.additions = []

    def _watch(self, value: Any, name: str, level: int) -> None:
        """Remember what containers, and objects of the user's own classes, hold."""
        todo = [value]
        while todo and len(self._watched) < _MAX_WATCHED:
            item = todo.pop()
            if id(item) in self._watched:
                continue
            inside: Iterable[Any] = ()
            if isinstance(item, (dict, list, set, deque)):
                if len(item) > _MAX_COPIED:
                    continue
                self._watched[id(item)] = item, _copy(item), name, level
                inside = dict.values(item) if isinstance(item, dict) else item
            elif type(item) is tuple:
                inside = item
            elif (
                level_of_class(type(item)) == USERS
                and type(getattr(item, "__dict__", None)) is dict
                and _is_object(item)
            ):
                # (Not those of the standard library: other threads may be waiting for each other by them.)
                self._watched[id(item)] = item.__dict__, _copy(item.__dict__), name, level
                inside = item.__dict__.values()
            todo.extend(item for item in inside if not is_constant(item))


def _refuse_streams(reading: Reading) -> None:
    value, kind = reading.value, type(reading.value)
    if reading.level != USERS:
        return
    if hasattr(kind, "__next__") or isinstance(value, random.Random):
        raise UntraceableError(f"forward may draw from {reading.start}, a {kind.__name__}")
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        raise UntraceableError(f"forward may draw from {reading.start}, a random generator of NumPy's")


def _is_object(value: Any) -> bool:
    """Whether ``value`` is an instance of some class that holds data (and not a class, function, module, tensor)."""
    return (
        not isinstance(value, (type, types.ModuleType, nn.Module, torch.Tensor, torch.dtype))
        and not hasattr(type(value), "__get__")  # a descriptor gives something else to each that asks
    )


class _Walk:
    """Goes through nested values.

    Args:
        most: bound on the values looked at.
        of_classes: whether attributes that objects have of the user's classes are among them.
    """

    def __init__(self, most: int, of_classes: bool = False) -> None:
        self._left = most
        self._of_classes = of_classes
        self._entered: set[int] = set()

    def _enters(self, value: Any) -> bool:
        self._left -= 1
        return self._left > 0 and id(value) not in self._entered

    def facts(self, value: Any, path: Path, names: frozenset[str]) -> list[tuple[Path, Found, str]]:
        """What is found at ``path`` and below, of objects what has one of these names or their methods look up; nothing
        where that is too much.
        """
        found = list(self._facts(value, path, names))
        return found if self._left > 0 else []

    def _facts(self, value: Any, path: Path, names: frozenset[str]) -> Iterator[tuple[Path, Found, str]]:
        kind = type(value)
        if is_constant(value):
            yield path, Constant(value), ""
            return
        if isinstance(value, (torch.Tensor, nn.Module)):
            return  # a tensor is read where it is used, a module can't be
        if isinstance(value, _REFERENCES) or function_of(value) is not None:
            yield path, Reference(value), ""
            return
        if not self._enters(value):
            return
        self._entered.add(id(value))
        if kind in _SEQUENCES or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
            yield path, Container(kind, len(value)), ""
            for number, item in enumerate(value):
                yield from self._facts(item, (*path, ("item", number)), names)
        elif kind in _MAPPINGS:
            if all(map(is_constant, value)):
                yield path, Container(kind, tuple(value)), ""
                for key, item in value.items():
                    yield from self._facts(item, (*path, ("item", key)), names)
        elif kind is set:
            if all(map(is_constant, value)):
                yield path, Elements(kind, Constant(frozenset(value))), ""
        elif is_array(value):
            yield path, Elements(kind, array_constant(value, str(path[0][1]))), ""
        elif _is_object(value):
            yield from self._object(value, path, names)
        self._entered.discard(id(value))

    def _object(self, value: Any, path: Path, names: frozenset[str]) -> Iterator[tuple[Path, Found, str]]:
        kind = type(value)
        yield path, ModuleClass(kind), ""
        own = attributes_of(value)
        wanted = names | _names_of(kind)
        if type(getattr(value, "__dict__", None)) is dict:
            yield path, Without(wanted.difference(own)), " without"
        everything = kind is ChainMap or not wanted.isdisjoint(("__dict__", "vars", "getattr", "asdict"))
        for name, item in own.items():
            if everything or name in wanted:
                yield from self._facts(item, (*path, (where_lies(kind, name), name)), names)
        if self._of_classes and level_of_class(kind) == USERS:
            everywhere = {name for base in kind.__mro__ if level_of_class(base) == USERS for name in vars(base)}
            for name in sorted(everywhere if everything else everywhere & wanted):
                item = inspect.getattr_static(kind, name)
                if name not in own and not name.startswith("__") and not hasattr(type(item), "__get__"):
                    yield from self._facts(item, (*path, ("member", name)), names)

    def tensors(self, value: Any, path: Path) -> Iterator[tuple[Path, torch.Tensor]]:
        """All tensors and where they lie; of what can be reached in several ways, one."""
        if isinstance(value, torch.Tensor):
            yield path, value
            return
        if is_constant(value) or not self._enters(value):
            return
        self._entered.add(id(value))  # for good: nothing is entered twice
        steps: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, (list, tuple, deque)):
            steps = ((("item", number), item) for number, item in enumerate(value))
        elif isinstance(value, dict):
            steps = ((("item", key), item) for key, item in value.items() if is_constant(key))
        elif _is_object(value):
            kind = type(value)
            steps = (((where_lies(kind, name), name), item) for name, item in attributes_of(value).items())
        for step, item in steps:
            yield from self.tensors(item, (*path, step))


def _names_of(kind: type) -> frozenset[str]:
    """What the methods of ``kind`` look up."""
    functions = [function_of(member) for base in kind.__mro__ for member in vars(base).values()]
    return frozenset().union(*(names_in(f.__code__) for f in functions if f is not None and level_of(f)))


# By the methods of the built-in classes: what a class of its own makes of a look-up or an assignment (a registry that
# gives instances for the classes that it holds) is not to happen.
def _items(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    keys = OrderedDict.__iter__(value) if isinstance(value, OrderedDict) else dict.__iter__(value)
    return [(key, dict.__getitem__(value, key)) for key in keys]


def _copy(value: Any) -> Any:
    return _items(value) if isinstance(value, dict) else list(value)


def _same_items(value: Any, before: Any) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        pairs = zip(_items(value), before, strict=True)
        return all(a is b and mine is theirs for (a, mine), (b, theirs) in pairs)
    if isinstance(value, set):
        return {id(item) for item in value} == {id(item) for item in before}
    return all(a is b for a, b in zip(value, before, strict=True))


def _added(value: Any, before: list[Any]) -> list[tuple[Any, Any]] | None:
    """What a dictionary holds in addition to ``before``, where that is all that has changed, and no tensor is in it."""
    if not isinstance(value, dict):
        return None
    items = _items(value)
    kept, new = items[: len(before)], items[len(before) :]
    same = len(kept) == len(before) and all(a is b and x is y for (a, x), (b, y) in zip(kept, before, strict=True))
    return new if same and not any(_holds_tensor(item) for _, item in new) else None


def _holds_tensor(value: Any) -> bool:
    return next(iter(_Walk(_MAX_WALKED).tensors(value, ())), None) is not None


def _refill(value: Any, before: Any) -> None:
    kind: Any = next(kind for kind in (OrderedDict, dict, set, deque, list) if isinstance(value, kind))
    kind.clear(value)
    if isinstance(value, dict):
        for key, item in before:
            kind.__setitem__(value, key, item)
    else:
        (kind.update if kind is set else kind.extend)(value, before)
