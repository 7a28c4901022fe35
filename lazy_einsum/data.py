"""Plain data and containers: ``Constant``, a value in the key; ``Structure``, nested containers without leaves."""

from __future__ import annotations

import cmath
import dataclasses
import enum
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch

from .errors import UntraceableError
from .objects import attributes_of, is_its_attributes, set_attribute


class Constant:
    """A Python value in the key, compared by type and value, floats by their bits: ``1``, ``1.0`` and ``True`` differ,
    so do ``0.0`` and ``-0.0``.

    Attributes:
        value: the value itself.
    """

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = (type(value), _bits(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.value)


class ExactComplex(complex):
    """A complex number that is written as Python code that gives it: ``(inf+nanj)``, as Python writes it, is none, and
    ``(-0+1j)`` and ``-1j`` give a zero of the other sign.

    >>> ExactComplex(-0.0, float("inf"))
    complex(-0.0, inf)
    """

    def __repr__(self) -> str:
        return f"complex({self.real!r}, {self.imag!r})"


def in_code(value: complex) -> complex:
    """``value`` as it can stand in a graph."""
    signed_zero = "-0.0" in (repr(value.real), repr(value.imag)) or (value.real == 0 and value.imag < 0)
    return ExactComplex(value) if signed_zero or not cmath.isfinite(value) else value


def _bits(value: Any) -> Any:
    if type(value) is float:
        # NaN equals nothing, itself included: a call with NaN must not find the entry of another NaN that user code
        # may tell apart.
        return object() if value != value else value.hex()
    if type(value) is complex:
        return (_bits(value.real), _bits(value.imag))
    if isinstance(value, tuple):
        return tuple((type(item), _bits(item)) for item in value)
    if type(value) is slice:
        return tuple((type(item), _bits(item)) for item in (value.start, value.stop, value.step))
    if isinstance(value, frozenset):
        return frozenset((type(item), _bits(item)) for item in value)
    if type(value) is range:
        return (value.start, value.stop, value.step)
    return value.tobytes() if _is_numpy_scalar(value) else value


def _is_numpy_scalar(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.number, numpy.bool_))


_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def is_constant(value: object) -> bool:
    """Whether ``value`` is immutable plain data that may enter a key by value.

    >>> is_constant(3), is_constant((1, "a")), is_constant([1])
    (True, True, False)
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, enum.Enum) or kind is range or _is_numpy_scalar(value):
        return True
    if kind is tuple or kind is torch.Size or kind is frozenset:
        return all(is_constant(item) for item in value)  # type: ignore[attr-defined]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        # A class of its own that is its items and nothing else: e3nn's irreps.
        return not getattr(value, "__dict__", None) and all(map(is_constant, value))
    if kind is slice:
        return all(is_constant(item) for item in (value.start, value.stop, value.step))  # type: ignore[attr-defined]
    return False


MAX_ARRAY = 4096
"""NumPy arrays of more bytes than this are not compared at each call."""


def is_array(value: object) -> bool:
    """Whether ``value`` is a NumPy array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def array_constant(value: Any, name: str = "an array") -> Constant:
    """What a NumPy array holds.

    Args:
        value: the array.
        name: for the error.

    Raises:
        UntraceableError: it is too large to be compared at each call, or holds objects.
    """
    if value.nbytes > MAX_ARRAY or value.dtype.hasobject:
        raise UntraceableError(
            f"forward reads {name}, a NumPy array of {value.nbytes} bytes, which can't be compared at each call; make "
            "it a buffer"
        )
    return Constant((value.dtype.str, value.shape, value.tobytes()))


def is_namedtuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether ``value`` is an instance of a class made by ``namedtuple`` or ``NamedTuple``."""
    return isinstance(value, tuple) and type(value).__bases__ == (tuple,) and hasattr(type(value), "_fields")


@dataclass(frozen=True, slots=True)
class Structure:
    """A container among arguments or results, with leaves numbered in order.

    Attributes:
        kind: ``tuple``, ``list``, ``dict``, ``OrderedDict``, a named tuple class, a dataclass, or a class that is
            registered with torch's pytrees.
        keys: keys of a mapping in their order, names of the attributes of a dataclass; what a registered class holds
            beside its items; ``None`` for sequences.
        children: for each item a nested ``Structure``, or the number of a leaf.
        context: of a registered class, what ``keys`` says in the form that its own functions take.
    """

    kind: type
    keys: tuple[Any, ...] | None
    children: tuple[Structure | int, ...]
    context: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        parts = [f"#{child}" if isinstance(child, int) else str(child) for child in self.children]
        if self.keys is not None and len(self.keys) == len(parts):
            parts = [f"{key!r}: {part}" for key, part in zip(self.keys, parts, strict=True)]
        return f"{self.kind.__name__}({', '.join(parts)})"


def flatten(value: Any, leaves: list[Any]) -> Structure | int:
    """Append the leaves of nested containers to ``leaves``; return the structure that ``unflatten`` takes.

    Containers are ``tuple``, ``list``, ``dict``, ``OrderedDict``, named tuples, instances of dataclasses and of classes
    that are registered with torch's pytrees; everything else is a leaf. A container that holds itself raises
    ``UntraceableError``.

    >>> leaves = []
    >>> structure = flatten({"a": [1, 2], "b": 3}, leaves)
    >>> leaves, unflatten(structure, leaves)
    ([1, 2, 3], {'a': [1, 2], 'b': 3})
    """
    return _flatten(value, leaves, ())


def _flatten(value: Any, leaves: list[Any], parents: tuple[int, ...]) -> Structure | int:
    found = parts_of(value)
    if found is None:
        leaves.append(value)
        return len(leaves) - 1
    if id(value) in parents:
        raise UntraceableError("a container holds itself")
    children = tuple(_flatten(item, leaves, (*parents, id(value))) for item in found.items)
    return Structure(type(value), found.keys, children, found.context)


class Parts(NamedTuple):
    """What a container holds; see ``Structure``.

    Attributes:
        items: in order.
        keys: as in ``Structure``.
        context: as in ``Structure``.
    """

    items: Sequence[Any]
    keys: tuple[Any, ...] | None = None
    context: Any = None


def parts_of(value: Any) -> Parts | None:
    """What a container holds; ``None`` for anything else."""
    kind = type(value)
    if kind is tuple or kind is list or is_namedtuple(value):
        return Parts(value)
    if kind is dict or kind is OrderedDict:
        if not all(is_constant(key) for key in value):
            raise UntraceableError(f"a dictionary has a key that is not plain data: {list(value)!r}")
        return Parts(tuple(value.values()), tuple(value))
    if is_dataclass(kind):
        own = attributes_of(value)
        return Parts(tuple(own.values()), tuple(own))
    functions = None if isinstance(value, torch.Tensor) or is_constant(value) else registered(kind)
    return _registered_parts(value, functions[0]) if functions is not None else None


def is_dataclass(kind: type) -> bool:
    """Whether instances of ``kind`` are those of a dataclass, and nothing more than their attributes."""
    return hasattr(kind, "__dataclass_fields__") and is_its_attributes(kind) and not issubclass(kind, torch.nn.Module)


def take_apart(value: Any) -> Parts:
    """As ``parts_of``, for a container."""
    found = parts_of(value)
    if found is None:
        raise TypeError(f"{type(value).__name__} is no container")
    return found


def registered(kind: type) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]] | None:
    """How to take instances of ``kind`` apart and to make them, where it is registered with torch's pytrees (as the
    outputs of Hugging Face's models are). That a class is has no public query.
    """
    from torch.utils._pytree import SUPPORTED_NODES

    found = SUPPORTED_NODES.get(kind)
    return (found.flatten_fn, found.unflatten_fn) if found is not None else None


def _registered_parts(value: Any, flatten_one: Callable[[Any], Any]) -> Parts | None:
    items, context = flatten_one(value)
    items = list(items)
    rest = {name: item for name, item in attributes_of(value).items() if not any(item is other for other in items)}
    keys = (_frozen(context), *((name, _frozen(item)) for name, item in rest.items()))
    # What is neither an item nor plain data would be out of sight.
    return Parts(items, keys, context) if all(map(is_constant, keys)) else None


def _frozen(value: Any) -> Any:
    """``value`` with tuples in the places of lists and dictionaries, so that it is a constant if it is plain data."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def unflatten(structure: Structure | int, leaves: Sequence[Any]) -> Any:
    """Inverse of ``flatten``, with ``leaves`` in the places of the old ones."""
    if isinstance(structure, int):
        return leaves[structure]
    items = [unflatten(child, leaves) for child in structure.children]
    kind = structure.kind
    if kind is list or kind is tuple:
        return kind(items)
    if kind is dict or kind is OrderedDict:
        return kind(zip(structure.keys or (), items, strict=True))
    if is_dataclass(kind):
        # Not by calling the class: that may do more than to set attributes.
        new: Any = object.__new__(kind)
        for name, item in zip(structure.keys or (), items, strict=True):
            set_attribute(new, name, item)
        return new
    functions = registered(kind)
    return kind(*items) if functions is None else functions[1](items, structure.context)


def containers_in(value: Any) -> Iterator[Any]:
    """The containers in ``value`` whose identity can be told (tuples apart), itself among them."""
    found = parts_of(value)
    if found is not None:
        if not isinstance(value, tuple):
            yield value
        for item in found.items:
            yield from containers_in(item)
