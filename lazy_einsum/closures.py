"""Functions that ``forward`` gives to torch to be called later (hooks): specialized code makes them anew at each call,
around the values of that call.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Write = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Writes a call into a graph, and gives its node."""


def around(
    function: types.FunctionType, cells: Sequence[Any], defaults: Sequence[Any], keywords: Mapping[str, Any]
) -> types.FunctionType:
    """A function like ``function`` around other values.

    >>> def scaled(factor, *, bias=1):
    ...     return lambda x: x * factor + bias
    >>> around(scaled(2), (1, 3), (), {})(5)
    16

    Args:
        function: whose code and global variables to take.
        cells: what it closes over, in the order of ``__code__.co_freevars``; a cell is shared.
        defaults: of its last arguments.
        keywords: defaults of its keyword-only arguments.
    """
    closure = tuple(cell if isinstance(cell, types.CellType) else types.CellType(cell) for cell in cells)
    code, name = function.__code__, function.__name__
    made = types.FunctionType(code, function.__globals__, name, tuple(defaults) or None, closure)
    made.__kwdefaults__ = dict(keywords) or None
    made.__qualname__ = function.__qualname__
    return made


def bound(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """``function`` as a method of ``owner``."""
    return types.MethodType(function, owner)


class Closures:
    """Writes functions into the graph of one trace.

    Args:
        known: gives the node, or the constant, for a tensor, a module, what belongs to one, or plain data; refuses all
            else.
        itself: gives the node for an object that all calls share, of the given name.
        is_shared: whether all calls share a variable of this name, as it is one of a function around ``forward``.
        write: writes a call.
        refuse: makes the error for a reason.
    """

    def __init__(
        self,
        known: Callable[[Any], Any],
        itself: Callable[[Any, str], Any],
        is_shared: Callable[[types.CellType, str], bool],
        write: Write,
        refuse: Callable[[str], Exception],
    ) -> None:
        self._known = known
        self._itself = itself
        self._is_shared = is_shared
        self._write = write
        self._refuse = refuse
        self._taken: list[tuple[types.CellType, Any]] = []

    def record(self, value: Any) -> Any:
        """What stands in the graph for a function with what it holds at present, or for a value that it holds.

        Raises:
            UntraceableError: it holds what can't be told apart from call to call (a list made by ``forward``).
        """
        if type(value) is tuple:
            return tuple(map(self.record, value))
        if isinstance(value, types.MethodType):
            return self._write(bound, (self.record(value.__func__), self.record(value.__self__)), {})
        if isinstance(value, partial):
            args = (self.record(value.func), *map(self.record, value.args))
            return self._write(partial, args, {name: self.record(item) for name, item in value.keywords.items()})
        if isinstance(value, types.FunctionType):
            return self._function(value)
        owner = getattr(value, "__self__", None)
        if isinstance(value, types.BuiltinFunctionType) and not isinstance(owner, (types.ModuleType, type, type(None))):
            return self._write(getattr, (self.record(owner), value.__name__), {})
        if isinstance(value, (types.BuiltinFunctionType, types.ModuleType, type)):
            return self._itself(value, value.__name__)
        return self._known(value)

    def _function(self, function: types.FunctionType) -> Any:
        code, cells, name = function.__code__, function.__closure__ or (), function.__name__
        keywords = function.__kwdefaults__ or {}
        if not cells and not function.__defaults__ and not keywords:
            return self._itself(function, name)
        if set_outside := _sets(code):
            raise self._refuse(f"forward makes a hook, {name}, which sets {set_outside}, a variable outside of it")
        values = []
        for variable, cell in zip(code.co_freevars, cells, strict=True):
            if self._is_shared(cell, variable):
                values.append(self._itself(cell, variable))
            else:
                values.append(self.record(self._take(cell, variable, name)))
        defaults = tuple(map(self.record, function.__defaults__ or ()))
        named = {argument: self.record(value) for argument, value in keywords.items()}
        bare = around(function, [None] * len(cells), (), {})
        return self._write(around, (self._itself(bare, name), tuple(values), defaults, named), {})

    def _take(self, cell: types.CellType, variable: str, name: str) -> Any:
        try:
            value = cell.cell_contents
        except ValueError:
            raise self._refuse(f"forward makes a hook, {name}, before it sets {variable}, which that uses") from None
        self._taken.append((cell, value))
        return value

    def check(self) -> None:
        """Refuse where ``forward`` has meanwhile set a variable that was taken over."""
        for cell, value in self._taken:
            if cell.cell_contents is not value:
                raise self._refuse("forward makes a hook, and sets a variable that it uses afterwards")

    def forget(self) -> None:
        """Drop all values."""
        self._taken.clear()


def _sets(code: types.CodeType) -> str:
    """The name of a variable of an enclosing function that ``code`` sets, or an empty string."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "DELETE_DEREF")]
    names += (_sets(constant) for constant in code.co_consts if inspect.iscode(constant))
    return next((name for name in names if name in code.co_freevars), "")
