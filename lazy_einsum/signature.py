"""What a call looks like: ``TensorType``, the leaves and structure of arguments, and ``Signature``, the cache key.

Nothing here keeps a tensor: a signature is made of shapes, dtypes, constants and names only, so the cached work can
see nothing of a call but its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .data import Constant, Structure, flatten, is_constant
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
        step *= size or 1
    return tuple(strides[::-1])


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
    def is_on_processor(self) -> bool:
        """Whether calls on it run on the processor, as the cost model takes them to; without data, they might."""
        return self.device.type in ("cpu", "meta")

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
                if value.layout is not torch.strided or value.is_quantized or value.is_nested:
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
