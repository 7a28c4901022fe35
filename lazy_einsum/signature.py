"""What a call looks like: ``TensorType``, the leaves and structure of arguments, and ``Signature``, the cache key.

Nothing here keeps a tensor: a signature is made of shapes, dtypes, constants and names only, so the cached work can
see nothing of a call but its key.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from .errors import UntraceableError
from .sizes import is_symbolic

_DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, as ``torch.empty(shape).stride()`` gives them.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class TensorType:
    """All that a trace and a plan may know of a tensor; a leaf of the cache key and the note on every graph node.

    Attributes:
        shape: sizes.
        dtype: element type.
        device: where it lives.
        stride: strides in elements, those of dimensions of size 1 too: eager's layouts depend on them.
        requires_grad: whether autograd follows it.
        is_leaf: whether it is a leaf of autograd (an in-place write to a leaf that requires grad is an error).
        is_parameter: whether it is an ``nn.Parameter``.
        is_conj: whether its values are stored conjugated (lazy conjugation).
        is_neg: whether its values are stored negated.
        is_inference: whether it was made in ``torch.inference_mode()``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    requires_grad: bool = False
    is_leaf: bool = True
    is_parameter: bool = False
    is_conj: bool = False
    is_neg: bool = False
    is_inference: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorType:
        """The type of ``tensor``.

        >>> str(TensorType.of(torch.zeros(2, 3)))
        'f32[2, 3]'
        """
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            tensor.device,
            tuple(tensor.stride()),
            tensor.requires_grad,
            _is_leaf(tensor),
            isinstance(tensor, torch.nn.Parameter),
            tensor.is_conj(),
            tensor.is_neg(),
            tensor.is_inference(),
        )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in memory in the order of the indices."""
        expected = contiguous_strides(self.shape)
        return self.numel == 0 or all(
            size == 1 or mine == wanted for size, mine, wanted in zip(self.shape, self.stride, expected, strict=True)
        )

    def __str__(self) -> str:
        text = f"{_DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(map(str, self.shape))}]"
        notes = []
        if self.device.type != "cpu":
            notes.append(str(self.device))
        if not self.is_contiguous:
            notes.append(f"strides {self.stride}")
        for name in ("requires_grad", "is_conj", "is_neg", "is_inference"):
            if getattr(self, name):
                notes.append(name.removeprefix("is_"))
        return f"{text} {' '.join(notes)}".rstrip()


def _is_leaf(tensor: torch.Tensor) -> bool:
    try:
        return tensor.is_leaf
    except RuntimeError:
        # A view made under no_grad whose base was written since: autograd refuses to say where it stands. It is no
        # leaf.
        return False


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
    return value


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
    if kind in _PLAIN or isinstance(value, enum.Enum):
        return True
    if kind is tuple or kind is torch.Size or kind is frozenset:
        return all(is_constant(item) for item in value)  # type: ignore[attr-defined]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        # A class of its own that is its items and nothing else: e3nn's irreps.
        return not getattr(value, "__dict__", None) and all(map(is_constant, value))
    if kind is slice:
        return all(is_constant(item) for item in (value.start, value.stop, value.step))  # type: ignore[attr-defined]
    return False


def is_namedtuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether ``value`` is an instance of a class made by ``namedtuple`` or ``NamedTuple``."""
    return isinstance(value, tuple) and type(value).__bases__ == (tuple,) and hasattr(type(value), "_fields")


@dataclass(frozen=True, slots=True)
class Structure:
    """A container among arguments or results, with leaves numbered in order.

    Attributes:
        kind: ``tuple``, ``list``, ``dict``, ``OrderedDict`` or a named tuple class.
        keys: keys of a mapping in their order, ``None`` for sequences.
        children: for each item a nested ``Structure``, or the number of a leaf.
    """

    kind: type
    keys: tuple[Any, ...] | None
    children: tuple[Structure | int, ...]

    def __str__(self) -> str:
        parts = [f"#{child}" if isinstance(child, int) else str(child) for child in self.children]
        if self.keys is not None:
            parts = [f"{key!r}: {part}" for key, part in zip(self.keys, parts, strict=True)]
        return f"{self.kind.__name__}({', '.join(parts)})"


def flatten(value: Any, leaves: list[Any]) -> Structure | int:
    """Append the leaves of nested containers to ``leaves``; return the structure that ``unflatten`` takes.

    Containers are exactly ``tuple``, ``list``, ``dict``, ``OrderedDict`` and named tuples; everything else is a leaf.
    A container that holds itself raises ``UntraceableError``.

    >>> leaves = []
    >>> structure = flatten({"a": [1, 2], "b": 3}, leaves)
    >>> leaves, unflatten(structure, leaves)
    ([1, 2, 3], {'a': [1, 2], 'b': 3})
    """
    return _flatten(value, leaves, ())


def _flatten(value: Any, leaves: list[Any], parents: tuple[int, ...]) -> Structure | int:
    kind = type(value)
    keys: tuple[Any, ...] | None = None
    if kind is tuple or kind is list or is_namedtuple(value):
        items: Sequence[Any] = value
    elif kind is dict or kind is OrderedDict:
        if not all(is_constant(key) for key in value):
            raise UntraceableError(f"a dictionary has a key that is not plain data: {list(value)!r}")
        keys, items = tuple(value), tuple(value.values())
    else:
        leaves.append(value)
        return len(leaves) - 1
    if id(value) in parents:
        raise UntraceableError("a container holds itself")
    return Structure(kind, keys, tuple(_flatten(item, leaves, (*parents, id(value))) for item in items))


def unflatten(structure: Structure | int, leaves: Sequence[Any]) -> Any:
    """Inverse of ``flatten``, with ``leaves`` in the places of the old ones."""
    if isinstance(structure, int):
        return leaves[structure]
    items = [unflatten(child, leaves) for child in structure.children]
    if structure.keys is not None:
        return structure.kind(zip(structure.keys, items, strict=True))
    if structure.kind is list:
        return items
    return tuple(items) if structure.kind is tuple else structure.kind(*items)


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor argument that is the same object as the one of an earlier leaf.

    Attributes:
        leaf: number of that earlier leaf.
    """

    leaf: int

    def __str__(self) -> str:
        return f"same as #{self.leaf}"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A Python number among the arguments that the code takes as it comes.

    Attributes:
        name: of the symbol that stands for it.
        example: its value in the call that the code was made for.
    """

    name: str
    example: int | float

    def __str__(self) -> str:
        return f"{type(self.example).__name__} {self.name}"


class ForeignTraceError(UntraceableError):
    """An argument stands for a tensor in somebody else's trace (an ``fx.Proxy``)."""


Leaf = TensorType | Constant | Alias | Symbol


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a call: structure of ``(args, kwargs)`` and the type, constant or alias at every leaf.

    Sizes that vary between calls are ``SymbolicSize`` in the types, numbers that do are ``Symbol``.
    """

    structure: Structure
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Arguments, list[Any]]:
        """The arguments' types and, beside them, the leaves themselves.

        Raises:
            UntraceableError: a leaf is neither a plain ``torch.Tensor`` nor plain data.
        """
        values: list[Any] = []
        structure = flatten((args, dict(kwargs)), values)
        assert isinstance(structure, Structure)
        seen: dict[int, int] = {}
        leaves: list[Leaf] = []
        for number, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                if type(value) not in (torch.Tensor, torch.nn.Parameter):
                    raise UntraceableError(f"argument {number} is a {type(value).__name__}, a subclass of torch.Tensor")
                if value.layout is not torch.strided or value.is_quantized:
                    raise UntraceableError(
                        f"argument {number} is a tensor of layout {value.layout}, expected torch.strided"
                    )
                if id(value) in seen:
                    leaves.append(Alias(seen[id(value)]))
                    continue
                seen[id(value)] = number
                leaves.append(TensorType.of(value))
            elif is_constant(value):
                leaves.append(Constant(value))
            elif hasattr(type(value), "__torch_function__"):
                raise ForeignTraceError(f"argument {number} is a {type(value).__name__}")
            else:
                raise UntraceableError(
                    f"argument {number} is a {type(value).__module__}.{type(value).__qualname__}; expected tensors, "
                    "plain data, and tuples, lists and dicts of them"
                )
        return cls(structure, tuple(leaves)), values

    @property
    def symbols(self) -> dict[str, int | float]:
        """The example of each symbol, in order of appearance."""
        found: dict[str, int | float] = {}
        for leaf in self.leaves:
            if isinstance(leaf, Symbol):
                found[leaf.name] = leaf.example
            elif isinstance(leaf, TensorType):
                found.update((str(size), int(size)) for size in leaf.shape if is_symbolic(size))
        return found

    def exact(self) -> Arguments:
        """The arguments of the call that the symbols' examples are of."""
        leaves: list[Leaf] = []
        for leaf in self.leaves:
            if isinstance(leaf, Symbol):
                leaf = Constant(leaf.example)
            elif isinstance(leaf, TensorType):
                leaf = replace(leaf, shape=tuple(map(int, leaf.shape)), stride=tuple(map(int, leaf.stride)))
            leaves.append(leaf)
        return Arguments(self.structure, tuple(leaves))

    def __str__(self) -> str:
        args, kwargs = self.structure.children
        assert isinstance(args, Structure) and isinstance(kwargs, Structure) and kwargs.keys is not None
        parts = [self._text(child) for child in args.children]
        parts += [f"{key}={self._text(child)}" for key, child in zip(kwargs.keys, kwargs.children, strict=True)]
        return f"({', '.join(parts)})"

    def _text(self, child: Structure | int) -> str:
        if isinstance(child, int):
            return str(self.leaves[child])
        parts = [self._text(item) for item in child.children]
        if child.keys is not None:
            return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(child.keys, parts, strict=True)) + "}"
        return f"[{', '.join(parts)}]" if child.kind is list else f"({', '.join(parts)})"


@dataclass(frozen=True, slots=True)
class Identity:
    """A function or class in the key: equal only to itself. Holds its ``id`` and name, so that no closure is kept
    alive by a key.
    """

    ident: int
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Signature:
    """The whole input of a specialization: arguments, ambient state of torch, and what the trace read of the child.

    Attributes:
        arguments: the call's arguments.
        ambient: grad mode, autocast, default dtype and so on, by name.
        state: what the trace read of the child, by path, in the order of reading: types of parameters, values of
            attributes.
        module: name of the submodule that is called; empty for the child itself.
        conditions: on sizes and numbers that vary, as Python expressions in their symbols.
    """

    arguments: Arguments
    ambient: tuple[tuple[str, Any], ...]
    state: tuple[tuple[str, Any], ...] = ()
    module: str = ""
    conditions: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = [f"{name}={value}" for name, value in self.ambient if value not in (None, False, ())]
        if self.conditions:
            notes.append(f"where {' and '.join(self.conditions)}")
        return f"{self.module}{self.arguments} {' '.join(notes)}".rstrip()

    def difference(self, other: Signature) -> str:
        """In words, the first part in which ``other`` (an entry of the cache) differs from this signature; empty
        where they are equal.
        """
        if self.arguments.structure != other.arguments.structure:
            return f"structure of the arguments: {self.arguments} here, {other.arguments} there"
        for number, (mine, theirs) in enumerate(zip(self.arguments.leaves, other.arguments.leaves, strict=True)):
            if mine != theirs:
                return f"argument {number}: {mine} here, {theirs} there"
        for (name, mine), (_, theirs) in zip(self.ambient, other.ambient, strict=True):
            if mine != theirs:
                return f"{name}: {mine} here, {theirs} there"
        here = dict(self.state)
        for name, theirs in other.state:
            if name in here and here[name] != theirs:
                return f"{name}: {here[name]} here, {theirs} there"
        return "" if self.state == other.state else "what the trace read of the module"
