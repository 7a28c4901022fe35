"""The shadow: a stand-in for the user's module, whose tensors are fake and which notes everything that ``forward``
reads of it.

A shadow has the module's own class, so the user's ``forward`` runs on it as it is; nothing it does reaches the live
module. Reads are seen without touching the class: the instance dictionary is left without the plain attributes, so
Python falls back to ``nn.Module.__getattr__``, which looks into ``_parameters``; and that is a dictionary of ours. (A
subclass with ``__getattribute__`` was rejected: ``type(self) is Layer`` would change. A deep copy was rejected: it
fails on locks, generators and lazy modules, copies a trainer's whole state, and shows no reads.)
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from . import ambient as ambient_module
from .data import Constant, array_constant, is_array, is_constant, is_namedtuple
from .distributed import is_distributed, is_fully_sharded, is_gathered_whole, precision_of
from .errors import UntraceableError
from .fakes import stands_in_export
from .live import HAS_HOOKS, is_compiled, is_made_by_compile
from .objects import attributes_of, is_its_attributes, may_stand_in, slots_of, where_lies
from .objects import stand_in as make_stand_in
from .outside import Outside
from .signature import TensorType
from .state import (
    Absent,
    Container,
    Elements,
    Found,
    ModuleClass,
    Names,
    NoHooks,
    Path,
    Reference,
    SameAs,
    Without,
    path_name,
)
from .surroundings import CACHED, Attribute, Ran, Reading, class_names, function_of, read_by_class, read_by_function

MAX_ITEMS = 10_000
"""A container with more items than this is not read: checking it at every call would cost more than it can save."""

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_REFERENCES = (
    types.FunctionType,
    types.ModuleType,
    type,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)

Fake = Callable[[torch.Tensor, TensorType, Path], torch.Tensor]
LiveCall = Callable[[nn.Module, nn.Module, Path, str], Callable[..., Any]]


class Assigned(NamedTuple):
    """A tensor that ``forward`` made an attribute, or a buffer, of the module at ``path``."""

    path: Path
    name: str
    value: torch.Tensor


class _Inner(NamedTuple):
    """A shadow in a live call: its dictionary, the names that are always in it, what it stands in for, and where."""

    own: dict[str, Any]
    names: frozenset[str]
    live: nn.Module
    path: Path


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
        self.outside = Outside(self._note_possible)
        self._possible: list[tuple[tuple[Path, str], Found, Reading]] = []
        self._classes: dict[type, frozenset[str]] = {}
        self._live: list[Path] = []
        self._inner: list[_Inner] = []
        self._depth = 0  # of live calls that run now
        self._ran: set[Path] = set()
        self._gathering: dict[Path, nn.Module] = {}  # of those in self._live whose hooks make sharded parameters whole
        self._shadows: dict[int, nn.Module] = {}
        self._modules_at: dict[Path, tuple[nn.Module, nn.Module]] = {}  # live and shadow
        self._refused: str | None = None

    def note(self, path: Path, found: Found, question: str = "") -> None:
        """Record that ``found`` was read at ``path``."""
        if self._depth and self.is_live(path):
            return  # the live call checks what it gives when it is made
        if len(self.reads) > MAX_ITEMS:
            raise UntraceableError(f"forward reads more than {MAX_ITEMS} attributes and items of the module")
        self.reads.setdefault((path, question), found)

    def _note_possible(self, path: Path, found: Found, question: str, reading: Reading) -> None:
        if not (self._depth and self.is_live(path)):
            self._possible.append(((path, question), found, reading))

    def settle(self, ran: Ran) -> None:
        """Record what code may have read from outside, of the code that ran."""
        for (path, question), found, reading in self._possible:
            if ran.has_read(reading):
                self.note(path, found, question)

    def note_outside(self, path: Path, known: TensorType) -> None:
        """Record that a tensor was used outside of live calls, wherever it was found."""
        self.reads.setdefault((path, ""), known)

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
            return self._scripted(live, path)
        if kind.__getattribute__ is not object.__getattribute__:
            raise UntraceableError(f"{name} ({kind.__name__}) overrides __getattribute__")
        # Not ``kind.__new__``: that of a GraphModule makes another class.
        shadow: Any = object.__new__(kind)
        if not isinstance(shadow, nn.Module) or not hasattr(live, "_modules"):
            raise UntraceableError(f"{name} ({kind.__name__}) can't be stood in for: it is no initialized nn.Module")
        self._seen[id(live)] = (live, shadow, path)
        self._shadows[id(shadow)] = shadow
        self._modules_at[path] = live, shadow
        self.note(path, ModuleClass(kind))
        reason = self._why_live(live, path)
        if reason is not None:
            self._live.append(path)
            if reason is HAS_HOOKS and is_fully_sharded(live):
                self._gathering[path] = live
        if not self.is_live(path):
            self.read_class(kind)
        if not self.is_live(path):
            self.note(path, Without(self._classes[kind].difference(live.__dict__)), " of its own")
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
                own[key] = self._lift_unread(value, (*path, ("attribute", key)))
        for key in self._classes.get(kind, ()):
            if key not in live.__dict__ and isinstance(value := getattr(kind, key, None), nn.Module):
                own[key] = self.lift(value, (("outer", Attribute(kind, key)),))
        if reason is not None:
            own["_compiled_call_impl"] = self._live_call(live, shadow, path, reason)
        if self.is_live(path):
            self._inner.append(_Inner(own, frozenset(own), live, path))
            if self._depth:
                self._fill(self._inner[-1])
        if reason is None:
            for key in _HOOKS:
                own[key] = _Hooks(self, live, path, key)
        self._originals.append((own, dict(own), path))
        return shadow

    def read_class(self, kind: type) -> None:
        """Note what the methods of a class may read, once."""
        if kind not in self._classes:
            self._classes[kind] = class_names(kind)
            self.outside.read(read_by_class(kind, self.outside.readers))

    def _scripted(self, live: nn.Module, path: Path) -> nn.Module:
        """The stand-in for a TorchScript module, which is a live call."""
        if not path:
            raise UntraceableError("the module is a TorchScript module")
        reason = "it is a TorchScript module"
        shadow = Opaque(f"forward looks into self.{path_name(path)}, a TorchScript module")
        self._seen[id(live)] = (live, shadow, path)
        self._shadows[id(shadow)] = shadow
        self.note(path, ModuleClass(type(live)))
        self._live.append(path)
        shadow.__dict__["_compiled_call_impl"] = self._live_call(live, shadow, path, reason)
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
            return HAS_HOOKS
        if is_compiled(live) or is_made_by_compile(live):
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
        kind = type(value)
        if isinstance(value, torch.Tensor):
            stand_in = self._tensor(value, path)
        elif kind is types.MethodType:
            self.note(path, ModuleClass(kind))
            function = self.lift(value.__func__, (*path, ("member", "__func__")))
            stand_in = types.MethodType(function, self.lift(value.__self__, (*path, ("member", "__self__"))))
        elif kind is functools.partial:
            self.note(path, ModuleClass(kind))
            function = self.lift(value.func, (*path, ("member", "func")))
            arguments = self.lift(value.args, (*path, ("member", "args")))
            stand_in = functools.partial(
                function, *arguments, **self.lift(value.keywords, (*path, ("member", "keywords")))
            )
        elif _is_reference(value):
            self.note(path, Reference(value))
            found = function_of(value)
            if found is not None:
                self.outside.read(read_by_function(found, self.outside.readers))
            stand_in = value
        elif kind is weakref.ref:
            # nn.RNN holds its weights so. The stand-in's target lives as long as the shadow.
            self.note(path, ModuleClass(weakref.ref))
            target = self.lift(value(), (*path, ("call", None)))
            stand_in = weakref.ref(target) if target is not None else value
        elif kind is torch.Generator:
            self.note(path, ModuleClass(kind))
            stand_in = value.clone_state()
        elif may_stand_in(value):
            self.note(path, ModuleClass(kind))
            self.read_class(kind)
            read = functools.partial(self.attribute, value, path)
            stand_in = make_stand_in(value, read, functools.partial(self._refuse, path))
        elif kind.__dictoffset__ and is_its_attributes(kind) and not slots_of(kind):
            stand_in = self._object(value, path)
        else:
            stand_in = self._container(value, path)
        self._seen[id(value)] = (value, stand_in, path)
        return stand_in

    def _object(self, live: Any, path: Path) -> Any:
        """The stand-in for an object whose class has its own way with attributes (a configuration of transformers), so
        that none can be told to be read: all of them are.
        """
        own = attributes_of(live)
        self.note(path, Container(type(live), tuple(own)))
        self.read_class(type(live))
        stand_in = object.__new__(type(live))
        self._seen[id(live)] = (live, stand_in, path)
        attributes = {name: self._lift_unread(value, (*path, ("attribute", name))) for name, value in own.items()}
        inside = object.__getattribute__(stand_in, "__dict__")
        inside.update(attributes)
        self._originals.append((inside, attributes, path))
        return stand_in

    def _lift_unread(self, value: Any, path: Path) -> Any:
        """As ``lift``, for what has to be at hand whether it is read or not."""
        try:
            return self.lift(value, path)
        except UntraceableError as error:
            return value if self.is_live(path) else Unreadable(error)

    def attribute(self, live: Any, path: Path, name: str) -> Any:
        """The stand-in for an attribute that ``live``, an object found at ``path``, has of its own."""
        own = attributes_of(live)
        if name not in own:
            if not name.startswith("__"):
                self.note(path, Without(frozenset({name})), f" without {name}")
            raise AttributeError(f"{type(live).__name__!r} object has no attribute {name!r}")
        return self.lift(own[name], (*path, (where_lies(type(live), name), name)))

    def _refuse(self, path: Path, name: str | None) -> UntraceableError:
        where = f"self.{path_name(path)}"
        self._refused = self._refused or f"forward {f'sets {where}.{name}' if name else f'copies {where}'}"
        return UntraceableError(self._refused)

    def outer_tensor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The stand-in for a tensor of the user's own, where it lies outside of the module in a place that is known."""
        path = self.outside.find(tensor)
        fake = self.lift(tensor, path) if path is not None else None
        assert fake is None or isinstance(fake, torch.Tensor)
        return fake

    def _tensor(self, value: torch.Tensor, path: Path) -> torch.Tensor:
        gathering = self._gathered_by(path) if is_distributed(value) and is_gathered_whole(value) else None
        is_known = type(value) in (torch.Tensor, nn.Parameter) or gathering is not None or stands_in_export(value)
        if not is_known:
            raise UntraceableError(f"self.{path_name(path)} is a {type(value).__name__}, a subclass of torch.Tensor")
        with ambient_module.no_function_modes():  # the recorder is no party to this
            if value.layout is not torch.strided or value.is_quantized or value.is_nested:
                raise UntraceableError(f"self.{path_name(path)} is a tensor of layout {value.layout}")
            known = TensorType.of(value)
        if gathering is not None:
            # What hooks put in its place: the whole parameter, for which its shape and strides are known.
            known = replace(known, dtype=precision_of(gathering).parameters or known.dtype)
        self.note(path, known)
        return self._fake(value, known, path)

    def _container(self, value: Any, path: Path) -> Any:
        kind = type(value)
        name = f"self.{path_name(path)}"
        stand_in: Any
        if kind in (list, tuple, deque) or is_namedtuple(value):
            if len(value) > MAX_ITEMS:
                raise UntraceableError(f"{name} is a {kind.__name__} of {len(value)} items, more than {MAX_ITEMS}")
            self.note(path, Container(kind, len(value)))
            items = [self.lift(item, (*path, ("item", number))) for number, item in enumerate(value)]
            if kind is deque:
                stand_in = deque(items, value.maxlen)
            else:
                stand_in = items if kind is list else tuple(items) if kind is tuple else kind(*items)
            self._originals.append((stand_in, list(items), path))
        elif kind in (dict, OrderedDict, defaultdict):
            if len(value) > MAX_ITEMS or not all(is_constant(key) for key in value):
                raise UntraceableError(
                    f"{name} is a {kind.__name__} with keys that are not plain data, or more than {MAX_ITEMS}"
                )
            self.note(path, Container(kind, tuple(value)))
            stand_in = defaultdict(value.default_factory) if kind is defaultdict else kind()
            stand_in.update((key, self.lift(item, (*path, ("item", key)))) for key, item in value.items())
            self._originals.append((stand_in, dict(stand_in), path))
        elif kind is set:
            if len(value) > MAX_ITEMS or not all(map(is_constant, value)):
                raise UntraceableError(f"{name} is a set of other than plain data, or of more than {MAX_ITEMS} items")
            self.note(path, Elements(kind, Constant(frozenset(value))))
            stand_in = set(value)
            self._originals.append((stand_in, set(value), path))
        elif is_array(value) and kind.__module__ == "numpy":
            self.note(path, Elements(kind, array_constant(value, name)))
            stand_in = value.copy()
            stand_in.flags.writeable = False
        else:
            raise UntraceableError(
                f"forward reads {name}, a {kind.__module__}.{kind.__qualname__}; expected tensors, modules, plain "
                "data, functions, objects made of these, and lists, tuples, sets and dicts of them"
            )
        return stand_in

    def _gathered_by(self, path: Path) -> nn.Module | None:
        """The innermost submodule that ``path`` leads into whose hooks make sharded parameters whole."""
        found = [gathering for gathering in self._gathering if path[: len(gathering)] == gathering]
        return self._gathering[max(found, key=len)] if found else None

    @contextmanager
    def in_live_call(self, path: Path) -> Iterator[None]:
        """While the live submodule at ``path`` is called, let live submodules do as they like: their attributes lie in
        the instances, where they may be set. Outside of their calls they are asked for as those of all modules, and
        noted.
        """
        self._depth += 1
        if self._depth == 1:
            for inner in self._inner:
                self._fill(inner)
        try:
            yield
        finally:
            self._depth -= 1
            self._ran.add(path)
            if not self._depth:
                for inner in self._inner:
                    for name in inner.own.keys() - inner.names:
                        del inner.own[name]

    def _fill(self, inner: _Inner) -> None:
        for name, value in inner.live.__dict__.items():
            if name not in _INTERNAL and name not in inner.own and name != "_compiled_call_impl":
                inner.own[name] = self._lift_unread(value, (*inner.path, ("attribute", name)))

    def check_attribute(self, path: Path) -> None:
        """Refuse to read a plain attribute of a live submodule that was called before: it, or a hook, may have set
        that.
        """
        if not self._depth and any(path[: len(live)] == live for live in self._ran):
            raise UntraceableError(
                f"forward reads self.{path_name(path)} after the call of a submodule that stays a live call, which may "
                "have changed it"
            )

    def is_live(self, path: Path) -> bool:
        """Whether ``path`` leads into a submodule that stays a live call."""
        return any(path[: len(live)] == live for live in self._live)

    def assigned(self) -> list[Assigned]:
        """The tensors that ``forward`` made attributes and buffers of modules, as they are at its end."""
        found = []
        for own, original, path in self._originals:
            if path not in self._modules_at or self.is_live(path):
                continue
            live, shadow = self._modules_at[path]
            if shadow.__dict__ is not own:
                continue
            changed = {name: value for name, value in own.items() if value is not original.get(name, self)}
            changed |= {name: dict.get(own["_buffers"], name) for name in own["_buffers"].changed}
            for name, value in changed.items():
                if isinstance(value, torch.Tensor) and self._may_assign(live, path, name, value):
                    found.append(Assigned(path, name, value))
        return found

    def _may_assign(self, live: nn.Module, path: Path, name: str, value: torch.Tensor) -> bool:
        """Whether a tensor may become an attribute: not where the class has its own way with that name, and not where
        ``forward`` has read a tensor of another type there, as all later calls would be misses.
        """
        if hasattr(type(live), name):
            return False
        known = self.reads.get(((*path, ("buffer" if name in live.__dict__["_buffers"] else "attribute", name)), ""))
        if not isinstance(known, TensorType):
            return True
        return (known.dtype, known.device, known.shape) == (value.dtype, value.device, tuple(value.shape))

    def side_effect(self) -> str | None:
        """What ``forward`` changed in the shadow beside what is ``assigned``, in words, or ``None``. What happens
        inside of live calls is theirs.
        """
        if self._refused is not None:
            return self._refused
        assigned = {(item.path, item.name) for item in self.assigned()}
        for stand_in, original, path in self._originals:
            if self.is_live(path):
                continue
            name = f"self.{path_name(path)}" if path else "the module"
            if isinstance(stand_in, dict):
                changed = [
                    key
                    for key in {**original, **stand_in}
                    if stand_in.get(key, self) is not original.get(key, self) and (path, key) not in assigned
                ]
                if changed and isinstance(changed[0], str):
                    other = isinstance(stand_in.get(changed[0]), torch.Tensor) and path in self._modules_at
                    why = " to a tensor of another type than the one that it reads there" if other else ""
                    return f"forward sets self.{path_name((*path, ('attribute', changed[0])))}{why}"
                if changed:
                    return f"forward changes {name}"
                tables = [value for value in stand_in.values() if isinstance(value, _Table)]
                if any((path, key) not in assigned for table in tables for key in table.changed):
                    return f"forward sets a parameter, buffer or submodule of {name}"
            elif isinstance(stand_in, set):
                if stand_in != original:
                    return f"forward changes {name}"
            elif len(stand_in) != len(original) or any(a is not b for a, b in zip(stand_in, original, strict=True)):
                return f"forward changes {name}"
        return None

    def forget(self) -> None:
        """Drop all stand-ins; the reads stay."""
        self._seen.clear()
        self._shadows.clear()
        self._modules_at.clear()
        self._inner.clear()
        self._originals.clear()
        self.outside.forget()

    def path_of(self, stand_in: object) -> Path | None:
        """Where what it stands in for was found."""
        return next((path for _, known, path in self._seen.values() if known is stand_in), None)

    def is_shadow(self, module: nn.Module) -> bool:
        """Whether ``module`` is a stand-in."""
        return id(module) in self._shadows

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
        self.changed: set[str] = set()

    def _how(self, name: str) -> Path:
        how = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "module"}[self._table]
        if self._table == "_parameters" and name not in self._names:
            how = "attribute"
        return (*self._path, (how, name))  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        if name in self._names:
            return True
        if sys._getframe(1).f_code is nn.Module.__setattr__.__code__:
            return False  # asked where a plain attribute goes that is being set
        own = self._live.__dict__
        if self._table == "_parameters":
            return name in own and name not in _INTERNAL and name != "_compiled_call_impl"
        if self._table == "_modules" and isinstance(name, str) and name not in own["_buffers"]:
            self._shadows.check_attribute((*self._path, ("attribute", name)))
            self._shadows.note(self._path, Absent(name), f" without {name}")
        return False

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            self._shadows.check_attribute(self._how(name))
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
            self.changed.add(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.changed.add(name)
        super().pop(name, None)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UntraceableError(f"forward changes {path_name(self._path) or 'the module'}.{self._table}")

    pop = popitem = clear = update = setdefault = _refuse


class _Hooks(OrderedDict[int, Any]):
    """An empty table of hooks that notes that it was looked at: the module was called. (A module with hooks stays
    a live call.)
    """

    def __init__(self, shadows: Shadows, live: nn.Module, path: Path, table: str) -> None:
        super().__init__()
        self._note = functools.partial(shadows.note, path, NoHooks("forward" in live.__dict__), " hooks")
        self._live_table = live.__dict__.get(table, ())

    def __len__(self) -> int:
        self._note()
        return 0

    def __setitem__(self, key: int, value: Any) -> None:
        raise UntraceableError("forward registers a hook on a module")


def _is_reference(value: Any) -> bool:
    """Whether ``value`` is a function or the like, of which nothing but its identity can change."""
    if isinstance(value, types.BuiltinFunctionType):
        # A method of some object is as changeable as that.
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))
    return isinstance(value, _REFERENCES) or type(value) is CACHED


class Opaque(nn.Module):
    """Stands in for a module that can be called and nothing else."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        error = UntraceableError(reason)
        for table in ("_parameters", "_buffers", "_modules"):
            self.__dict__[table] = Unreadable(error)


class Unreadable:
    """Stands in for an attribute that can't be read, and may not have to be."""

    def __init__(self, error: UntraceableError) -> None:
        object.__setattr__(self, "_error", error)

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        raise object.__getattribute__(self, "_error")

    __getattribute__ = __setattr__ = __call__ = __bool__ = __iter__ = __len__ = __eq__ = __hash__ = _raise
    __enter__ = __exit__ = __getitem__ = __setitem__ = __contains__ = __repr__ = __str__ = _raise
