"""What a module's code may read beside its arguments and ``self``: globals, variables of enclosing functions,
attributes of classes and of Python modules.

Nothing can watch such reads without slowing the user's code down, so they are found in the code itself: every name
that a function, or a function that it names, could look up. That is more than it will read, and errs to the safe
side: what is found enters the key by its value.
"""

from __future__ import annotations

import os
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .signature import is_constant

MAX_ITEMS = 64
"""Containers and objects outside of the module that hold more than this are taken for registries, which change
without changing results.
"""

_SKIPPED = tuple(
    os.path.join(os.path.abspath(path), "")
    for path in (os.path.dirname(torch.__file__), os.path.dirname(__file__), sysconfig.get_paths()["stdlib"])
)
_PACKAGES = tuple(os.path.join(sysconfig.get_paths()[name], "") for name in ("purelib", "platlib"))


@dataclass(frozen=True, slots=True, eq=False)
class GlobalName:
    """The global variable ``name`` of a Python module (``namespace`` is the module's dictionary)."""

    namespace: dict[str, Any]
    name: str

    def get(self) -> Any:
        """Its present value."""
        return self.namespace[self.name]

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
        """Its present value."""
        return self.cell.cell_contents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.cell is other.cell

    def __hash__(self) -> int:
        return hash(id(self.cell))

    def __str__(self) -> str:
        return f"{self.name} (of an enclosing function)"


@dataclass(frozen=True, slots=True)
class Attribute:
    """The attribute ``name`` of a class, as its instances find it, or of a Python module."""

    owner: type | types.ModuleType
    name: str

    def get(self) -> Any:
        """Its present value."""
        return getattr(self.owner, self.name)

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


Outer = GlobalName | Cell | Attribute
Steps = tuple[tuple[Literal["attribute", "item"], Any], ...]


def read_by_class(kind: type) -> Iterator[tuple[Outer, Steps]]:
    """What the methods of ``kind`` may read: where it starts, and steps to follow from there."""
    names: set[str] = set()
    functions: dict[int, types.FunctionType] = {}
    for base in kind.__mro__:
        for member in vars(base).values():
            if isinstance(member, property):
                member = member.fget
            function = getattr(member, "__func__", member)
            if isinstance(function, types.FunctionType) and _level(function):
                yield from _read_by(function, functions, names)
    for name in sorted(names):
        for base in kind.__mro__:
            if name in vars(base):
                if base.__module__.partition(".")[0] not in ("torch", "builtins", "lazy_einsum") and _is_plain(
                    vars(base)[name]
                ):
                    yield Attribute(kind, name), ()
                break


def read_by_function(function: types.FunctionType) -> Iterator[tuple[Outer, Steps]]:
    """What ``function`` may read, as ``read_by_class``."""
    if _level(function):
        yield from _read_by(function, {}, set())


def _level(function: types.FunctionType) -> int:
    """0 for code of torch, the standard library and this package, which is trusted; 1 for installed packages; 2
    for the user's own code.
    """
    name = function.__code__.co_filename
    if name.startswith(_PACKAGES):
        return 0 if name.startswith(_SKIPPED) else 1
    return 0 if name.startswith(_SKIPPED) else 2


def _read_by(
    function: types.FunctionType, seen: dict[int, types.FunctionType], names: set[str]
) -> Iterator[tuple[Outer, Steps]]:
    level = _level(function)
    if id(function) in seen or not level:
        return
    seen[id(function)] = function
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield from _follow(Cell(cell, name), value, level, frozenset(_names(function.__code__)), seen, names)
    own = list(dict.fromkeys(_names(function.__code__)))
    names.update(own)
    for name in own:
        if name in function.__globals__:
            yield from _follow(
                GlobalName(function.__globals__, name), function.__globals__[name], level, frozenset(own), seen, names
            )


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _follow(
    start: Outer, value: Any, level: int, own: frozenset[str], seen: dict[int, types.FunctionType], names: set[str]
) -> Iterator[tuple[Outer, Steps]]:
    if isinstance(value, types.FunctionType):
        yield from _read_by(value, seen, names)
    elif isinstance(value, (types.ModuleType, type)):
        origin = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        if origin.partition(".")[0] in ("torch", "builtins", "lazy_einsum", "numpy", "math", "operator"):
            return
        for name in sorted(own):
            if name in vars(value) and is_constant(vars(value)[name]):
                yield start, (("attribute", name),)
    elif is_constant(value) or (level == 2 and _is_plain(value)):
        yield start, ()
    elif level == 2 and type(value) in (list, tuple, dict) and len(value) <= MAX_ITEMS:
        # Tensors beside plain data: the plain data one by one. (A tensor from out here stops the trace where it is
        # used.)
        for key, item in value.items() if type(value) is dict else enumerate(value):
            if is_constant(key) and _is_plain(item):
                yield start, (("item", key),)


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is plain data: constants, or a small list, tuple, dict or object of them."""
    if is_constant(value):
        return True
    if type(value) in (list, tuple):
        return len(value) <= MAX_ITEMS and all(_is_plain(item) for item in value)
    if type(value) is dict:
        return len(value) <= MAX_ITEMS and all(is_constant(key) and _is_plain(item) for key, item in value.items())
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or isinstance(value, (type, types.ModuleType, torch.nn.Module, torch.Tensor)):
        return False
    if hasattr(type(value), "__get__"):  # a descriptor gives something else to each that asks
        return False
    return len(attributes) <= MAX_ITEMS and all(is_constant(item) for item in attributes.values())
