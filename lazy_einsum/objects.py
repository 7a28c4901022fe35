"""What instances of Python classes hold, in their dictionaries and slots; and objects that pass for them."""

from __future__ import annotations

import abc
import types
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


def slots_of(kind: type) -> tuple[str, ...]:
    """Names of the slots of ``kind``, those of its bases first.

    >>> class Point:
    ...     __slots__ = ("x", "__y")
    >>> slots_of(Point)
    ('x', '_Point__y')
    """
    found: dict[str, None] = {}
    for base in reversed(kind.__mro__):
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            if name not in ("__dict__", "__weakref__"):
                found[f"_{base.__name__.lstrip('_')}{name}" if private else name] = None
    return tuple(found)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that ``value`` itself has, in slots first, by name.

    >>> attributes_of(type("Point", (), {"z": 0})())
    {}
    """
    kind = type(value)
    found = {name: getattr(value, name) for name in slots_of(kind) if hasattr(value, name)}
    own = getattr(value, "__dict__", None)
    return found | own if type(own) is dict else found


def set_attribute(value: Any, name: str, item: Any) -> None:
    """Set an attribute past everything that a class has to say about that."""
    if where_lies(type(value), name) == "member":
        object.__setattr__(value, name, item)
    else:
        value.__dict__[name] = item


def is_its_attributes(kind: type) -> bool:
    """Whether instances of ``kind`` are their attributes and nothing more: it is made by Python code, of such classes,
    and says nothing about how instances are made or dropped.
    """
    bases = kind.__mro__[:-1]
    new: Any = kind.__new__
    return (
        all(base.__flags__ & _HEAP for base in bases)
        and new is object.__new__
        and not any("__del__" in vars(base) for base in bases)
    )


def where_lies(kind: type, name: str) -> Literal["attribute", "member"]:
    """How to get an attribute of an instance: from its dictionary, or by its name as from a slot."""
    return "member" if name in slots_of(kind) else "attribute"


_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def stand_in(value: Any, read: Callable[[str], Any], refuse: Callable[[str | None], Exception]) -> Any:
    """An instance that passes for ``value``, and asks for each attribute when it is looked up.

    It is of a subclass of the class of ``value``, but says that it is of that class (to ``isinstance`` and
    ``__class__``; not to ``type``).

    Args:
        value: an object for which ``may_stand_in`` holds.
        read: called with a name; gives what to find, or raises ``AttributeError``.
        refuse: called with the name of an attribute that is set, or ``None`` where a copy is made; the error to raise.
    """
    kind = type(value)
    made = _classes.get(kind)
    if made is None:
        made = _classes[kind] = _stand_in_class(kind)
    new: Any = kind.__new__(made)  # type: ignore[call-overload]
    object.__setattr__(new, _LINK, _Link(read, refuse, tuple(attributes_of(value))))
    slots = slots_of(kind)
    for name in attributes_of(value):
        if name not in slots and hasattr(kind, name):
            # What the class has under this name would be found first.
            object.__setattr__(new, name, read(name))
    return new


def may_stand_in(value: Any) -> bool:
    """Whether ``value`` is its attributes and nothing more, so that another object can pass for it."""
    kind = type(value)
    bases = [base for base in kind.__mro__[:-1] if base not in _PLAIN]
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType)):
        return False
    if type(getattr(value, "__dict__", None)) is not dict and not slots_of(kind):
        return False
    if type(kind) not in (type, abc.ABCMeta) or any("__init_subclass__" in vars(base) for base in bases):
        return False
    if not all(base.__flags__ & _HEAP for base in bases):
        return False
    hooks = ("__getattribute__", "__getattr__", "__reduce_ex__", "__del__", "__dict__")
    if any(name in vars(base) and not _is_own_dict(vars(base)[name]) for base in bases for name in hooks):
        return False
    frozen = getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    if not frozen and any("__setattr__" in vars(base) for base in bases):
        return False
    new: Any = kind.__new__
    return new in (object.__new__, types.SimpleNamespace.__new__)


_PLAIN = (types.SimpleNamespace,)
_HEAP = 1 << 9  # of classes made by Python code
_LINK = "_lazy_einsum"


class _Link(NamedTuple):
    read: Callable[[str], Any]
    refuse: Callable[[str | None], Exception]
    names: tuple[str, ...]


def _is_own_dict(member: Any) -> bool:
    return isinstance(member, types.GetSetDescriptorType)


def _stand_in_class(kind: type) -> type:
    def link(self: Any) -> _Link:
        found: _Link = object.__getattribute__(self, _LINK)
        return found

    def get(self: Any, name: str) -> Any:
        value = link(self).read(name)
        object.__setattr__(self, name, value)
        return value

    def refuse(self: Any, *args: Any) -> Any:
        raise link(self).refuse(args[0] if args and type(args[0]) is str else None)

    names = {
        "__getattr__": get,
        "__setattr__": refuse,
        "__delattr__": refuse,
        "__reduce_ex__": refuse,
        "__class__": property(lambda self: kind),
        "__dict__": property(lambda self: {name: getattr(self, name) for name in link(self).names}),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if kind.__hash__ is not None and "__eq__" in vars(kind):
        names["__hash__"] = kind.__hash__
    return type(kind)(kind.__name__, (kind,), names)
