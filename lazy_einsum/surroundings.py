"""What a module's code may read beside its arguments and ``self``: globals, variables of enclosing functions, defaults,
attributes of classes and of Python modules.

Nothing can watch such reads without slowing the user's code down, so they are found in the code itself: every name
that a function, or a function that it names, could look up. That is more than it will read, and errs to the safe
side: plain data that is found enters the key by its value, a tensor where it is used. Which functions ran is known
when the trace has ended (see ``Ran``), and what only others read is left out again: as long as what those that ran have
read is as it was, they call no others.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import gc
import inspect
import itertools
import os
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .data import is_constant
from .errors import UntraceableError
from .impure import Called

_SKIPPED = (
    *(
        os.path.join(os.path.abspath(path), "")
        for path in (os.path.dirname(torch.__file__), os.path.dirname(__file__), sysconfig.get_paths()["stdlib"])
    ),
    "<frozen ",
)
_PACKAGES = tuple(os.path.join(sysconfig.get_paths()[name], "") for name in ("purelib", "platlib"))
# What lies in these is taken not to change.
_FIXED_MODULES = frozenset({"torch", "lazy_einsum", "numpy", *sys.stdlib_module_names}) - {"__main__"}


class _Missing:
    """Stands for the value of a variable that has none."""


MISSING = _Missing()


@dataclass(frozen=True, slots=True, eq=False)
class GlobalName:
    """The global variable ``name`` of a Python module (``namespace`` is the module's dictionary)."""

    namespace: dict[str, Any]
    name: str

    def get(self) -> Any:
        """Its present value; ``MISSING`` where it has none."""
        return self.namespace.get(self.name, MISSING)

    def set(self, value: Any) -> None:
        """Give it a value, or none."""
        if value is MISSING:
            self.namespace.pop(self.name, None)
        else:
            self.namespace[self.name] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GlobalName) and self.namespace is other.namespace and self.name == other.name

    def __hash__(self) -> int:
        return hash((id(self.namespace), self.name))

    def __str__(self) -> str:
        return f"{self.namespace.get('__name__', '?')}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """The variable ``name`` of an enclosing function."""

    cell: types.CellType
    name: str

    def get(self) -> Any:
        """Its present value; ``MISSING`` where it has none."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return MISSING

    def set(self, value: Any) -> None:
        """Give it a value, or none."""
        if value is not MISSING:
            self.cell.cell_contents = value
        elif self.get() is not MISSING:
            del self.cell.cell_contents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.cell is other.cell

    def __hash__(self) -> int:
        return hash(id(self.cell))

    def __str__(self) -> str:
        return f"{self.name} (of an enclosing function)"


@dataclass(frozen=True, slots=True)
class Attribute:
    """The attribute ``name`` of a class, as its instances find it, of a function, or of a Python module."""

    owner: type | types.ModuleType | types.FunctionType
    name: str

    def get(self) -> Any:
        """Its present value, of a class as it lies there (a class method gives a new object at each look-up);
        ``MISSING`` where it has none.
        """
        if isinstance(self.owner, type):
            return next((vars(base)[self.name] for base in self.owner.__mro__ if self.name in vars(base)), MISSING)
        return getattr(self.owner, self.name, MISSING)

    def set(self, value: Any) -> None:
        """Give it a value, or none."""
        if value is not MISSING:
            setattr(self.owner, self.name, value)
        elif self.get() is not MISSING:
            delattr(self.owner, self.name)

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


@dataclass(frozen=True, slots=True)
class ContextValue:
    """The value of a context variable."""

    variable: contextvars.ContextVar[Any]

    def get(self) -> Any:
        """Its present value; ``MISSING`` where it has none, and no default."""
        try:
            return self.variable.get()
        except LookupError:
            return MISSING

    def set(self, value: Any) -> None:
        """Nothing: a trace runs in a context of its own."""

    def __str__(self) -> str:
        return f"the context variable {self.variable.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Itself:
    """An object that code holds, whatever becomes of the place where it was found. Of functions the code counts."""

    value: Any
    name: str

    def get(self) -> Any:
        """The object."""
        return self.value

    def set(self, value: Any) -> None:
        """Nothing: there is no place."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Itself):
            return False
        mine, theirs = self.value, other.value
        if isinstance(mine, types.FunctionType) and isinstance(theirs, types.FunctionType):
            return mine.__code__ is theirs.__code__ and mine.__globals__ is theirs.__globals__
        return mine is theirs

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


Outer = GlobalName | Cell | Attribute | ContextValue | Itself
Steps = tuple[tuple[Literal["member", "item"], Any], ...]

USERS, INSTALLED, TRUSTED = 2, 1, 0
"""Whose code it is: the user's own, that of an installed package, that of torch, the standard library or this package.
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """Something that code may read from outside of its module.

    Attributes:
        start: where.
        steps: to follow from there.
        value: what is there now, or ``MISSING``.
        level: whose code reads it.
        names: all names that this code looks up, of attributes too.
        variable: what code would set to change it.
        by: the code that reads it; its name, where all that looks up an attribute of this name does; or ``None``, where
            nobody can tell.
    """

    start: Outer
    steps: Steps
    value: Any
    level: int
    names: frozenset[str]
    variable: Outer
    by: types.CodeType | str | None = None


def _unwrapped(value: Any) -> Iterator[types.FunctionType]:
    """The function inside of a value, and those that it was made of by decorators."""
    function, known = function_of(value), set[int]()
    while function is not None and id(function) not in known:
        known.add(id(function))
        yield function
        function = function_of(getattr(function, "__wrapped__", None))


def read_by_called(
    ran: Mapping[types.CodeType, Mapping[tuple[int, ...], Called]], readers: set[types.FunctionType]
) -> Iterator[Reading]:
    """What the user's functions that were called may read, of those that nobody has found by reading code: Python
    calls them by itself (properties, ``__len__``), or a library does (a key for sorting, a decorated function).

    Args:
        ran: what was called.
        readers: functions of which it is known what they read; more are added.
    """
    inner = {code for parent in ran for code in _inner(parent)}
    known = {(function.__code__, id(function.__globals__), *_free(function)) for function in readers}
    seen = _Seen(set(), readers)
    for code, calls in ran.items():
        if code not in inner and _level_of_file(code.co_filename) == USERS:
            for key, called in calls.items():
                for function in _functions_of(called) if (code, *key) not in known else ():
                    yield from _read_by(function, seen, set())


def _free(function: types.FunctionType) -> tuple[int, ...]:
    """See ``Called.free``."""
    found = (Cell(cell, "").get() for cell in function.__closure__ or ())
    return tuple(0 if value is MISSING else id(value) for value in found)


def _functions_of(called: Called) -> list[types.FunctionType]:
    """The functions that may have been called."""
    code = called.code

    def fits(function: types.FunctionType) -> bool:
        same = function.__code__ == code and function.__globals__ is called.variables
        return same and _free(function) == called.free

    members = [vars(base).values() for kind in (called.owner, type(called.owner)) for base in kind.__mro__]
    places = itertools.chain((called.variables.get(code.co_name),), *members)
    found = [function for value in places for function in _unwrapped(value) if fits(function)]
    # A function that lies nowhere one would look (a closure, in a list) is asked of the garbage collector, which looks
    # at all objects there are: some 100 ms.
    return found or [one for one in gc.get_referrers(code) if isinstance(one, types.FunctionType) and fits(one)]


class Ran:
    """The code that ran during a trace.

    Args:
        codes: of all Python functions that were called; ``None``: nobody watched.
        by_given_names: whether something else looks attributes up by names that it holds.
    """

    def __init__(self, codes: Collection[types.CodeType] | None, by_given_names: bool) -> None:
        self._codes = codes
        self._names = frozenset().union(*map(_names_and_texts, codes or ()))
        # Code that looks up attributes by names that it is given may look up any.
        self._any = by_given_names or any(
            not _TAKE_TEXTS.isdisjoint(code.co_names) and _level_of_file(code.co_filename) for code in codes or ()
        )

    def has_read(self, reading: Reading) -> bool:
        """Whether code that ran may have read this."""
        if self._codes is None or reading.by is None:
            return True
        if isinstance(reading.by, types.CodeType):
            return reading.by in self._codes
        function = function_of(reading.value)
        ran = self._any if function is None else function.__code__ in self._codes
        return ran or reading.by in self._names


def read_by_class(kind: type, readers: set[types.FunctionType]) -> Iterator[Reading]:
    """What the methods of ``kind`` may read; they are added to ``readers``."""
    names: set[str] = set()
    seen = _Seen(set(), readers)
    for base in kind.__mro__:
        for member in vars(base).values():
            function = function_of(member)
            if function is not None and level_of(function):
                yield from _read_by(function, seen, names)
    for name in sorted(class_names(kind)):
        base = next(base for base in kind.__mro__ if name in vars(base))
        if name == "forward" or _level_of_module(base):
            steps, value = _as_found(kind, name)
            if value is not MISSING:
                by = None if name == "forward" else name
                yield Reading(Attribute(kind, name), steps, value, USERS, frozenset(names), Attribute(base, name), by)


def _as_found(owner: Any, name: str) -> tuple[Steps, Any]:
    """An attribute of a class or Python module, ``MISSING`` where looking it up would run code; and the steps from what
    is looked up to it.
    """
    raw = inspect.getattr_static(owner, name, MISSING)
    if isinstance(raw, classmethod):  # a new object each time
        return (("member", "__func__"),), raw.__func__
    value = raw.__func__ if isinstance(raw, staticmethod) else raw
    if hasattr(type(value), "__get__") and function_of(value) is None:
        return (), MISSING
    return (), value


def class_names(kind: type) -> frozenset[str]:
    """The attributes of ``kind`` itself that its methods may look up, ``forward`` always among them. An attribute of an
    instance with one of these names comes before them.
    """
    names = {"forward"}
    for base in kind.__mro__:
        for member in vars(base).values():
            function = function_of(member)
            if function is not None and level_of(function):
                names.update(names_in(function.__code__))
        if level_of_class(base) == USERS:
            # Other classes may call them.
            names.update(name for name, member in vars(base).items() if function_of(member) is not None)
    if not _TAKE_TEXTS.isdisjoint(names):
        names.update(name for base in kind.__mro__ if level_of_class(base) == USERS for name in vars(base))
    return frozenset(
        name for name in names if not name.startswith("__") and any(name in vars(base) for base in kind.__mro__)
    )


def read_by_function(function: types.FunctionType, readers: set[types.FunctionType]) -> Iterator[Reading]:
    """What ``function`` may read; it, and functions that it names, are added to ``readers``."""
    yield from _read_by(function, _Seen(set(), readers), set())


CACHED = type(functools.cache(lambda: None))
"""What ``functools.cache`` and ``lru_cache`` make of a function."""

_FUNCTION_IN = {
    property: "fget",
    staticmethod: "__func__",
    classmethod: "__func__",
    types.MethodType: "__func__",
    functools.partial: "func",
    functools.partialmethod: "func",
    functools.cached_property: "func",
    CACHED: "__wrapped__",
}


def function_of(value: Any) -> types.FunctionType | None:
    """The Python function inside of a property, a class method, a cache, a bound method or the like."""
    while type(value) in _FUNCTION_IN:
        value = getattr(value, _FUNCTION_IN[type(value)])
    return value if isinstance(value, types.FunctionType) else None


def level_of(function: types.FunctionType) -> int:
    """Whose code a function is."""
    return _level_of_file(function.__code__.co_filename)


def level_of_class(kind: type) -> int:
    """Whose code a class is."""
    name = getattr(sys.modules.get(kind.__module__), "__file__", None)
    built_in = kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind.__module__ != "__main__"
    return TRUSTED if built_in else _level_of_file(name or "")


def _level_of_file(name: str) -> int:
    if name.startswith(_PACKAGES):
        return TRUSTED if name.startswith(_SKIPPED) else INSTALLED
    return TRUSTED if name.startswith(_SKIPPED) else USERS


def _level_of_module(owner: Any) -> int:
    """Whose a class or Python module is."""
    name = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    return TRUSTED if name.partition(".")[0] in _FIXED_MODULES else USERS


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """All names that code looks up: globals and attributes."""
    return frozenset(code.co_names).union(*map(names_in, _inner(code)))


@functools.lru_cache(maxsize=4096)
def _names_and_texts(code: types.CodeType) -> frozenset[str]:
    """All names that code looks up, those that it may give to ``getattr`` among them."""
    texts = (text for text in code.co_consts if isinstance(text, str))
    return frozenset(code.co_names).union(texts, *map(_names_and_texts, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


_TAKE_TEXTS = frozenset({"getattr", "hasattr", "attrgetter", "methodcaller", "vars", "__dict__", "__getattribute__"})
"""These look up attributes whose names are given as texts."""


class _Scan(NamedTuple):
    """What code does with variables outside of it.

    Attributes:
        read: global variables that it reads.
        written: global variables that it sets.
        attributes: names of attributes that it sets.
        imported: names of Python modules that it imports.
    """

    read: frozenset[str]
    written: frozenset[str]
    attributes: frozenset[str]
    imported: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _scan(code: types.CodeType) -> _Scan:
    found = [(instruction.opname, instruction.argval) for instruction in dis.get_instructions(code)]
    inner = [_scan(constant) for constant in _inner(code)]
    return _Scan(
        frozenset(name for op, name in found if op in ("LOAD_GLOBAL", "LOAD_NAME")).union(*(i.read for i in inner)),
        frozenset(name for op, name in found if op in ("STORE_GLOBAL", "DELETE_GLOBAL")).union(
            *(i.written for i in inner)
        ),
        frozenset(name for op, name in found if op in ("STORE_ATTR", "DELETE_ATTR")).union(
            *(i.attributes for i in inner)
        ),
        frozenset(name for op, name in found if op == "IMPORT_NAME").union(*(i.imported for i in inner)),
    )


@functools.lru_cache(maxsize=4096)
def _compares_types(code: types.CodeType) -> bool:
    """Whether code has a comparison like ``type(x) is Tensor`` in it."""
    segment: set[str] = set()
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name.startswith(("STORE_", "POP_JUMP", "JUMP_", "RETURN_", "POP_TOP")):
            segment.clear()
        elif name.startswith("LOAD_"):
            segment.add(str(instruction.argval))
        elif (
            name in ("IS_OP", "COMPARE_OP", "CONTAINS_OP")
            and "type" in segment
            and not segment.isdisjoint(("Tensor", "Parameter"))
        ):
            return True
    return any(map(_compares_types, _inner(code)))


def _read_by(function: types.FunctionType, seen: _Seen, names: set[str], cached: bool = False) -> Iterator[Reading]:
    """What ``function`` may read, and what it calls; where it is ``cached``, when nobody saw it."""
    level = level_of(function)
    if (id(function), cached) in seen.functions or not level:
        return
    seen.functions.add((id(function), cached))
    seen.readers.add(function)
    if _compares_types(function.__code__):
        raise UntraceableError(
            f"{function.__qualname__} compares the type of a value with a class of tensors, and a trace runs on "
            "stand-ins of another class; use isinstance"
        )
    own = names_in(function.__code__)
    if not own.isdisjoint(_TAKE_TEXTS):
        texts = _names_and_texts(function.__code__) - own
        own = own.union(*(text.split(".") for text in texts))
    names.update(own)
    scan = _scan(function.__code__)
    reader = _Reader(level, own, scan.attributes, None if cached else function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        start = Cell(cell, name)
        yield from _follow(start, start.get(), reader, seen, names)
    for name in sorted(scan.read | scan.written):
        if name in function.__globals__ or name in scan.written:
            outer = GlobalName(function.__globals__, name)
            yield from _follow(outer, outer.get(), reader, seen, names)
    for name in sorted(scan.imported & sys.modules.keys()) if level == USERS else ():
        outer = GlobalName(sys.modules, name)
        yield from _follow(outer, outer.get(), reader, seen, names)
    for attribute in ("__defaults__", "__kwdefaults__"):
        defaults = getattr(function, attribute) or ()
        for key, value in defaults.items() if isinstance(defaults, dict) else enumerate(defaults):
            if not is_constant(value):
                yield reader.reading(Attribute(function, attribute), (("item", key),), value)


class _Seen(NamedTuple):
    """What is known already.

    Attributes:
        functions: identities of functions, and whether a cache was around them.
        readers: all functions of the trace.
    """

    functions: set[tuple[int, bool]]
    readers: set[types.FunctionType]


class _Reader(NamedTuple):
    """Code that reads.

    Attributes:
        level: whose it is.
        names: all names that it looks up.
        written: names of attributes that it sets.
        code: itself; ``None`` where nobody can tell whether it ran.
    """

    level: int
    names: frozenset[str]
    written: frozenset[str]
    code: types.CodeType | None

    def reading(self, start: Outer, steps: Steps, value: Any, variable: Outer | None = None) -> Reading:
        """What it reads at ``start`` and the steps from there."""
        return Reading(start, steps, value, self.level, self.names, variable or start, self.code)


def _follow(start: Outer, value: Any, reader: _Reader, seen: _Seen, names: set[str]) -> Iterator[Reading]:
    if not isinstance(value, (types.ModuleType, type)):
        yield from _follow_value(reader.reading(start, (), value), seen, names)
        return
    if isinstance(value, type) and reader.level == USERS:
        yield reader.reading(start, (), value)  # the variable may become another class
    if not _level_of_module(value):
        return
    present = set(dir(value) if isinstance(value, type) else vars(value))
    plain = {name for name in reader.names if not name.startswith("__")}
    # Methods that Python calls by itself are named nowhere.
    called = plain | {"__init__", "__call__", "__post_init__"} if isinstance(value, type) else plain
    for name in sorted(called & present):
        bases = value.__mro__ if isinstance(value, type) else ()
        owner = next((base for base in bases if name in vars(base)), value)
        if not _level_of_module(owner):
            continue
        steps, found = _as_found(value, name)
        reading = reader.reading(start, (("member", name), *steps), found, Attribute(owner, name))
        yield from _follow_value(reading, seen, names)
    for name in sorted((plain & reader.written) - present):
        yield reader.reading(start, (("member", name),), MISSING, Attribute(value, name))


def _follow_value(reading: Reading, seen: _Seen, names: set[str]) -> Iterator[Reading]:
    function = function_of(reading.value)
    if function is None:
        yield reading
        return
    is_cached = type(reading.value) is CACHED
    # A variable of the user's may become another function; what a package defines is taken to stay, but for caches.
    if is_cached or (reading.level == USERS and (not reading.steps or level_of(function))):
        yield reading
    yield from _read_by(function, seen, names, is_cached or reading.by is None)
