"""The shadow: a stand-in for the user's module, whose tensors are fake and which notes everything that ``forward``
reads of it.

A shadow has the module's own class, so the user's ``forward`` runs on it as it is; nothing it does reaches the live
module. Reads are seen without touching the class: the instance dictionary is left without the plain attributes, so
Python falls back to ``nn.Module.__getattr__``, which looks into ``_parameters``; and that is a dictionary of ours. (A
subclass with ``__getattribute__`` was rejected: ``type(self) is Layer`` would change. A deep copy was rejected: it
fails on locks, generators and lazy modules, copies a trainer's whole state, and shows no reads.)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import UntraceableError
from .live import is_compiled
from .signature import Constant, TensorType, is_constant, is_namedtuple
from .state import Absent, Container, Found, ModuleClass, Names, NoHooks, Path, Reference, SameAs, path_name
from .surroundings import Cell, GlobalName, Outer, Steps, read_by_class, read_by_function

MAX_ITEMS = 10_000
"""A container with more items than this is not read: checking it at every call would cost more than it can save."""

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_REFERENCES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)

Fake = Callable[[torch.Tensor, TensorType, Path], torch.Tensor]
LiveCall = Callable[[nn.Module, nn.Module, Path, str], Callable[..., Any]]


class Shadows:
    """Makes shadows of one child for one trace, and holds what was read.

    Args:
        fake: makes the fake for a live tensor that is read at a path.
        live_call: makes the stand-in for calling a submodule that stays a live call: ``(live module, its shadow,
            path, reason) -> callable``.
        is_leaf: whether the user asked for the submodule (given with its qualified name) to stay a live call.
    """

    def __init__(self, fake: Fake, live_call: LiveCall, is_leaf: Callable[[nn.Module, str], bool]) -> None:
        self.reads: dict[tuple[Path, str], Found] = {}
        self._fake = fake
        self._live_call = live_call
        self._is_leaf = is_leaf
        self._seen: dict[
            int, tuple[Any, Any, Path]
        ] = {}  # id -> (live object, its stand-in, path); keeps both alive, so that no id is used again
        self._originals: list[
            tuple[Any, Any, Path]
        ] = []  # (stand-in, what it held when it was made, path), to find side effects
        self._outer: dict[Outer, Any] = {}
        self._classes: set[type] = set()
        self._changed: str | None = None
        self._live: list[Path] = []

    def note(self, path: Path, found: Found, question: str = "") -> None:
        """Record that ``found`` was read at ``path``."""
        if self.is_live(path):
            return  # the live call checks what it gives when it is made
        if len(self.reads) > MAX_ITEMS:
            raise UntraceableError(f"forward reads more than {MAX_ITEMS} attributes and items of the module")
        self.reads.setdefault((path, question), found)

    def module(self, live: nn.Module, path: Path) -> nn.Module:
        """The shadow of the submodule ``live`` at ``path``."""
        if id(live) in self._seen:
            _, known, first = self._seen[id(live)]
            if first != path:
                self.note(path, SameAs(first))
            return known  # type: ignore[no-any-return]
        kind = type(live)
        name = path_name(path) or "the module"
        if isinstance(live, torch.jit.ScriptModule):
            raise UntraceableError(f"{name} is a TorchScript module")
        if kind.__getattribute__ is not object.__getattribute__:
            raise UntraceableError(f"{name} ({kind.__name__}) overrides __getattribute__")
        # Not ``kind.__new__``: that of a GraphModule makes another class.
        shadow: Any = object.__new__(kind)
        if not isinstance(shadow, nn.Module) or not hasattr(live, "_modules"):
            raise UntraceableError(f"{name} ({kind.__name__}) can't be stood in for: it is no initialized nn.Module")
        self._seen[id(live)] = (live, shadow, path)
        self.note(path, ModuleClass(kind))
        reason = self._why_live(live, path)
        if reason is not None:
            self._live.append(path)
        if kind not in self._classes and not self.is_live(path):
            self._classes.add(kind)
            self.read_outer(read_by_class(kind))
        own = shadow.__dict__
        for key in _INTERNAL:
            if key in live.__dict__:
                own[key] = (
                    type(live.__dict__[key])() if isinstance(live.__dict__[key], (dict, set)) else live.__dict__[key]
                )
        tables = ("_parameters", "_buffers", "_modules")
        for table in tables:
            own[table] = _Table(self, live, path, table)
        for key, value in live.__dict__.items():
            if key not in _INTERNAL and key != "_compiled_call_impl" and hasattr(kind, key):
                # A class attribute of this name would be found before __getattr__ is asked: so it has to lie in the
                # instance, read or not.
                own[key] = self.lift(value, (*path, ("attribute", key)))
        if reason is not None:
            own["_compiled_call_impl"] = self._live_call(live, shadow, path, reason)
        if self.is_live(path):
            # Free to do as it likes: its attributes lie in the instance, where they may be set.
            for key, value in live.__dict__.items():
                if key not in _INTERNAL and key not in own and key != "_compiled_call_impl":
                    try:
                        own[key] = self.lift(value, (*path, ("attribute", key)))
                    except UntraceableError:
                        own[key] = value
        if reason is None:
            for key in _HOOKS:
                own[key] = _Hooks(self, live, path, key)
        self._originals.append((own, dict(own), path))
        return shadow

    def _why_live(self, live: nn.Module, path: Path) -> str | None:
        """Why the submodule stays a live call, or ``None`` where it is traced through. The child itself is always
        traced.
        """
        if not path:
            return None
        if self._is_leaf(live, path_name(path)):
            return "it is a leaf module"
        if any(live.__dict__.get(key) for key in _HOOKS):
            return "it has hooks"
        if is_compiled(live) or isinstance(live, _compiled_class()):
            return "it is compiled"
        return None

    def lift(self, value: Any, path: Path) -> Any:
        """The stand-in for whatever was found at ``path``; notes what it was.

        Raises:
            UntraceableError: reading it can't be checked at later calls.
        """
        if is_constant(value):
            self.note(path, Constant(value))
            return value
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if id(value) in self._seen:
            _, stand_in, first = self._seen[id(value)]
            self.note(path, SameAs(first))
            return stand_in
        if isinstance(value, torch.Tensor):
            stand_in = self._tensor(value, path)
        elif isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            raise UntraceableError(f"self.{path_name(path)} is a method bound to a module")
        elif isinstance(value, _REFERENCES):
            self.note(path, Reference(value))
            if isinstance(value, types.FunctionType):
                self.read_outer(read_by_function(value))
            stand_in = value
        elif type(value) is weakref.ref:
            # nn.RNN holds its weights so. The stand-in's target lives as long as the shadow.
            self.note(path, ModuleClass(weakref.ref))
            target = self.lift(value(), (*path, ("call", None)))
            stand_in = weakref.ref(target) if target is not None else value
        elif isinstance(value, functools.partial):
            raise UntraceableError(f"self.{path_name(path)} is a functools.partial")
        else:
            return self._container(value, path)
        self._seen[id(value)] = (value, stand_in, path)
        return stand_in

    def read_outer(self, found: Iterable[tuple[Outer, Steps]]) -> None:
        """Put what code may read from outside of the module into the key, by value."""
        for start, steps in found:
            path: Path = (("outer", start), *steps)
            value = start.get()
            if start not in self._outer:
                self._outer[start] = (value, copy.copy(value) if isinstance(value, (list, dict)) else None)
            for how, key in steps:
                value = value[key] if how == "item" else vars(value)[key]
            with contextlib.suppress(UntraceableError):  # nothing that forward could make a baked-in constant of
                self.lift(value, path)

    def restore_outer(self, report: bool = True) -> str | None:
        """Undo what ``forward`` did to globals, enclosing variables and class attributes; the name of one that it
        changed (now or, unless ``report`` was false, at an earlier call), or ``None``.
        """
        changed = None
        for start, (value, before) in self._outer.items():
            if start.get() is not value:
                changed = str(start)
                if isinstance(start, GlobalName):
                    start.namespace[start.name] = value
                elif isinstance(start, Cell):
                    start.cell.cell_contents = value
                else:
                    setattr(start.owner, start.name, value)
            if before is not None and not _same_items(value, before):
                changed = str(start)
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        if report:
            self._changed = self._changed or changed
        return self._changed

    def _tensor(self, value: torch.Tensor, path: Path) -> torch.Tensor:
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise UntraceableError(f"self.{path_name(path)} is a {type(value).__name__}, a subclass of torch.Tensor")
        if value.layout is not torch.strided or value.is_quantized:
            raise UntraceableError(f"self.{path_name(path)} is a tensor of layout {value.layout}")
        known = TensorType.of(value)
        self.note(path, known)
        return self._fake(value, known, path)

    def _container(self, value: Any, path: Path) -> Any:
        kind = type(value)
        name = f"self.{path_name(path)}"
        stand_in: Any
        if kind in (list, tuple) or is_namedtuple(value):
            if len(value) > MAX_ITEMS:
                raise UntraceableError(f"{name} is a {kind.__name__} of {len(value)} items, more than {MAX_ITEMS}")
            self.note(path, Container(kind, len(value)))
            items = [self.lift(item, (*path, ("item", number))) for number, item in enumerate(value)]
            stand_in = items if kind is list else tuple(items) if kind is tuple else kind(*items)
            self._originals.append((stand_in, list(items), path))
        elif kind in (dict, OrderedDict):
            if len(value) > MAX_ITEMS or not all(is_constant(key) for key in value):
                raise UntraceableError(
                    f"{name} is a {kind.__name__} with keys that are not plain data, or more than {MAX_ITEMS}"
                )
            self.note(path, Container(kind, tuple(value)))
            stand_in = kind((key, self.lift(item, (*path, ("item", key)))) for key, item in value.items())
            self._originals.append((stand_in, dict(stand_in), path))
        elif _is_plain_object(value):
            self.note(path, Container(kind, tuple(value.__dict__)))
            stand_in = object.__new__(kind)
            stand_in.__dict__.update(
                (key, self.lift(item, (*path, ("attribute", key)))) for key, item in value.__dict__.items()
            )
            self._originals.append((stand_in.__dict__, dict(stand_in.__dict__), path))
        else:
            raise UntraceableError(
                f"forward reads {name}, a {kind.__module__}.{kind.__qualname__}; expected tensors, modules, plain "
                "data, functions, and lists, tuples and dicts of them"
            )
        self._seen[id(value)] = (value, stand_in, path)
        return stand_in

    def is_live(self, path: Path) -> bool:
        """Whether ``path`` leads into a submodule that stays a live call."""
        return any(path[: len(live)] == live for live in self._live)

    def side_effect(self) -> str | None:
        """What ``forward`` changed in the shadow, in words, or ``None``. What happens inside of live calls is
        theirs.
        """
        for stand_in, original, path in self._originals:
            if self.is_live(path):
                continue
            name = f"self.{path_name(path)}" if path else "the module"
            if isinstance(stand_in, dict):
                changed = [
                    key for key in {**original, **stand_in} if stand_in.get(key, self) is not original.get(key, self)
                ]
                if changed:
                    return (
                        f"forward sets {name}.{changed[0]}"
                        if isinstance(changed[0], str)
                        else f"forward changes {name}"
                    )
                tables = [value for value in stand_in.values() if isinstance(value, _Table)]
                if any(table.changed for table in tables):
                    return f"forward sets a parameter, buffer or submodule of {name}"
            elif len(stand_in) != len(original) or any(a is not b for a, b in zip(stand_in, original, strict=True)):
                return f"forward changes {name}"
        return None

    def forget(self) -> None:
        """Drop all stand-ins; the reads stay."""
        self._seen.clear()
        self._originals.clear()
        self._outer.clear()

    def owns(self, value: object) -> bool:
        """Whether ``value`` is a stand-in for a container or object of the module (and not made by ``forward``)."""
        return any(value is stand_in for _, stand_in, _ in self._seen.values())


class _Table(dict[str, Any]):
    """``_parameters``, ``_buffers`` or ``_modules`` of a shadow; stand-ins are made when they are asked for.

    The one in the place of ``_parameters`` also serves the module's plain attributes, to ``nn.Module.__getattr__``
    only (iteration does not show them).
    """

    def __init__(self, shadows: Shadows, live: nn.Module, path: Path, table: str) -> None:
        super().__init__()
        self._shadows = shadows
        self._live = live
        self._path = path
        self._table = table
        self._names = tuple(live.__dict__[table])
        self.changed = False

    def _how(self, name: str) -> Path:
        how = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "module"}[self._table]
        if self._table == "_parameters" and name not in self._names:
            how = "attribute"
        return (*self._path, (how, name))  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        if name in self._names:
            return True
        own = self._live.__dict__
        if self._table == "_parameters" and not self._shadows.is_live(self._path):
            return name in own and name not in _INTERNAL and name != "_compiled_call_impl"
        if self._table == "_modules" and isinstance(name, str) and name not in own["_buffers"]:
            self._shadows.note(self._path, Absent(name), f" without {name}")
        return False

    def __getitem__(self, name: str) -> Any:
        if not dict.__contains__(self, name):
            if name not in self:
                raise KeyError(name)
            live = self._live.__dict__[self._table] if name in self._names else self._live.__dict__
            super().__setitem__(name, self._shadows.lift(live[name], self._how(name)))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def _all(self) -> tuple[str, ...]:
        self._shadows.note(self._path, Names(self._table, self._names), f" {self._table}")
        return self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._all())

    def keys(self) -> Any:
        return dict.fromkeys(self._all()).keys()

    def values(self) -> Any:
        return {name: self[name] for name in self._all()}.values()

    def items(self) -> Any:
        return {name: self[name] for name in self._all()}.items()

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in self._all()}

    def __setitem__(self, name: str, value: Any) -> None:
        # Setting the very tensor that is there, as spectral_norm does after writing to it in place, changes nothing.
        if dict.get(self, name, self) is not value:
            self.changed = True
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.changed = True

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UntraceableError(f"forward changes {path_name(self._path) or 'the module'}.{self._table}")

    pop = popitem = clear = update = setdefault = _refuse


class _Hooks(OrderedDict[int, Any]):
    """An empty table of hooks that notes that it was looked at: the module was called. (A module with hooks stays
    a live call.)
    """

    def __init__(self, shadows: Shadows, live: nn.Module, path: Path, table: str) -> None:
        super().__init__()
        self._note = functools.partial(shadows.note, path, NoHooks(), " hooks")
        self._live_table = live.__dict__.get(table, ())

    def __len__(self) -> int:
        self._note()
        return 0

    def __setitem__(self, key: int, value: Any) -> None:
        raise UntraceableError("forward registers a hook on a module")


def _same_items(first: list[Any] | dict[Any, Any], second: list[Any] | dict[Any, Any]) -> bool:
    """Whether two lists, or dictionaries, hold the very same objects."""
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(first[key] is second[key] for key in first)
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _compiled_class() -> type:
    """The class of what ``torch.compile(module)`` gives. (It has no public name.)"""
    return torch._dynamo.eval_frame.OptimizedModule


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object of a Python class whose whole state lies in its ``__dict__``: a configuration."""
    kind = type(value)
    if not hasattr(value, "__dict__") or isinstance(
        value, (type, types.ModuleType, types.FunctionType, types.MethodType)
    ):
        return False
    if any(
        name in vars(base)
        for base in kind.__mro__[:-1]
        for name in ("__getattribute__", "__getattr__", "__slots__", "__reduce_ex__", "__setattr__")
    ):
        frozen = getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
        if not frozen or "__slots__" in vars(kind):
            return False
    if any(base.__module__ == "builtins" and base is not object for base in kind.__mro__):
        return False
    if inspect.isgenerator(value) or inspect.iscoroutine(value):
        return False
    # A class with its own way of making instances (a tensor, a named tuple) is more than its attributes.
    return kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
