"""Which sizes and numbers vary between calls, and arguments in which symbols stand for them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .data import Constant
from .signature import Arguments, Leaf, Symbol, TensorType, contiguous_strides
from .sizes import SymbolicSize

MAX_SYMBOLS = 4
"""Code for more sizes that vary independently is not tried: conditions between them would be many."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a size or number stands among arguments.

    Attributes:
        leaf: number of the leaf.
        dim: dimension of the tensor, ``None`` for a Python number.
    """

    leaf: int
    dim: int | None = None


def family(arguments: Arguments) -> Hashable:
    """What calls have in common that differ in sizes and numbers only."""
    return arguments.structure, tuple(map(_without_numbers, arguments.leaves))


def _without_numbers(leaf: Leaf) -> Any:
    if isinstance(leaf, TensorType):
        return replace(leaf, shape=(0,) * len(leaf.shape), stride=())
    if isinstance(leaf, Symbol):
        return type(leaf.example)
    return type(leaf.value) if isinstance(leaf, Constant) and type(leaf.value) in (int, float) else leaf


def _numbers(arguments: Arguments) -> Iterator[tuple[Place, Any]]:
    """All sizes and numbers of arguments; a number that varies is the name of its symbol."""
    for number, leaf in enumerate(arguments.leaves):
        if isinstance(leaf, TensorType):
            yield from ((Place(number, dim), size) for dim, size in enumerate(leaf.shape))
        elif isinstance(leaf, Symbol):
            yield Place(number), leaf.name
        elif isinstance(leaf, Constant) and type(leaf.value) in (int, float):
            yield Place(number), leaf.value


def comparable(seen: Sequence[Arguments], new: Arguments) -> list[Arguments]:
    """Those of earlier arguments that differ from ``new`` in no size or number that is 0 or 1 there: such calls mean
    something else (broadcasting, nothing at all).
    """
    here = dict(_numbers(new))
    return [
        arguments
        for arguments in seen
        if all(value == here[place] or not (type(value) is int and value < 2) for place, value in _numbers(arguments))
    ]


def generalize(seen: Sequence[Arguments], new: Arguments, fixed: Mapping[Place, Any]) -> Arguments | None:
    """``new`` with a symbol for each size and number in which it and earlier arguments differ.

    Those that always changed together get one symbol. A size or number that becomes 0 or 1 is none that varies.

    Args:
        seen: earlier arguments of one family, with symbols or without, the newest last.
        new: those of the present call.
        fixed: places that code can't be generic in.

    Returns:
        ``None`` where nothing varies, too much does, or layouts differ in a way that sizes do not explain.
    """
    histories = [dict(_numbers(arguments)) for arguments in (*seen, new)]
    here = histories[-1]
    symbols: dict[tuple[Any, ...], str] = {}
    names: dict[Place, str] = {}
    for place, value in here.items():
        history = tuple(past[place] for past in histories)
        if place in fixed or all(type(past) is type(value) and past == value for past in history):
            continue
        if type(value) is int and value < 2:
            return None
        if type(value) is float and not math.isfinite(value):
            return None
        # Numbers and sizes that change together are one symbol; numbers of floating point each are their own.
        key = (place,) if type(value) is float else tuple(map(str, history))
        prefix = "f" if type(value) is float else "s"
        names[place] = symbols.setdefault(key, f"{prefix}{len(symbols)}")
    if not symbols or len(symbols) > MAX_SYMBOLS:
        return None
    leaves: list[Leaf] = []
    for number, leaf in enumerate(new.leaves):
        if isinstance(leaf, TensorType):
            past = [arguments.leaves[number] for arguments in seen]
            made = _generic_type(leaf, {p.dim: name for p, name in names.items() if p.leaf == number}, past)
            if made is None:
                return None
            leaves.append(made)
        elif Place(number) in names and isinstance(leaf, Constant):
            leaves.append(Symbol(names[Place(number)], leaf.value))
        else:
            leaves.append(leaf)
    return Arguments(new.structure, tuple(leaves))


def _generic_type(here: TensorType, names: Mapping[int | None, str], past: Sequence[Leaf]) -> TensorType | None:
    """``here`` with symbols for sizes, and strides made of them; ``None`` where the strides can't be told."""
    shape = tuple(
        SymbolicSize.symbol(names[dim], size) if dim in names else size for dim, size in enumerate(here.shape)
    )
    if all(isinstance(other, TensorType) and other.stride == here.stride for other in past):
        return replace(here, shape=shape)
    if not names:
        return None
    # Dense in some order of the dimensions: contiguous, or a permutation of that.
    order = sorted(range(len(shape)), key=lambda dim: (-here.stride[dim], here.shape[dim] == 1, dim))
    dense = contiguous_strides([shape[dim] for dim in order])
    stride = tuple(dense[order.index(dim)] for dim in range(len(shape)))
    return replace(here, shape=shape, stride=stride) if tuple(map(int, stride)) == here.stride else None


def places_of(arguments: Arguments, symbols: frozenset[str]) -> dict[Place, Any]:
    """Where these symbols stand, and their examples there."""
    exact = dict(_numbers(arguments.exact()))
    return {place: exact[place] for place, value in _numbers(arguments) if str(value) in symbols}


def values_of(generic: Arguments, exact: Arguments) -> tuple[Any, ...] | None:
    """The value of each symbol of ``generic`` in a call like ``exact``; ``None`` where the two differ elsewhere."""
    found: dict[str, Any] = {}
    there = dict(_numbers(exact))
    for place, value in _numbers(generic):
        if place not in there:
            return None
        if isinstance(value, (str, SymbolicSize)):
            if found.setdefault(str(value), there[place]) != there[place]:
                return None
        elif value != there[place]:
            return None
    return tuple(found[name] for name in generic.symbols)


def numbers_that_vary(seen: Sequence[Arguments], new: Arguments) -> list[int]:
    """The leaves of ``new`` that are Python numbers and differ among all these arguments."""
    histories = [dict(_numbers(arguments)) for arguments in (*seen, new)]
    return [
        place.leaf for place in histories[-1] if place.dim is None and len({str(past[place]) for past in histories}) > 1
    ]
