"""``run_exported``: what ``torch.export`` sees of a wrapped module: its optimized code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import ambient as ambient_module
from .data import Constant, flatten, is_constant
from .dispatch import HOOKS, Call, Dispatcher
from .distributed import wrapped_by
from .errors import UntraceableError
from .generic import generalize
from .live import LiveCall, is_compiled
from .signature import Alias, Arguments, Leaf, Symbol, TensorType
from .sizes import is_symbolic
from .specialize import Specialization

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def run_exported(dispatcher: Dispatcher, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``child`` by its optimized code, made for this call, while ``torch.export`` records operations.

    Sizes that the user declared to be dynamic are symbols in that code. What the code needs of them becomes a condition
    of the exported program, as what ``forward`` itself needs would. What can't be traced is exported as it is, with a
    ``FallbackWarning``.

    Args:
        dispatcher: of the wrapper; the code does not enter its cache.
        child: what is wrapped.
        args: positional arguments, of fake tensors.
        kwargs: keyword arguments.
    """
    call = Call(child, args, kwargs)
    has_hooks = isinstance(child, nn.Module) and (is_compiled(child) or any(child.__dict__[table] for table in HOOKS))
    if has_hooks or wrapped_by(child) is not None or ambient_module.global_module_hooks():
        return call.run_child()
    try:
        with ambient_module.apart_from_export():
            arguments, leaves = _arguments(args, kwargs)
            entry = dispatcher.make(child, arguments)
            run = entry.plain()
        _check(entry)
    except UntraceableError as error:
        if dispatcher.settings.on_untraceable == "raise":
            raise
        dispatcher.warn(call, str(error), False)
        return call.run_child()
    symbols = _symbols(arguments, leaves)
    for condition in entry.source.traced.conditions:
        if not eval(condition, {"math": math, **symbols}):
            raise AssertionError(f"{condition} does not hold for the call that it comes from")
    return run(*(leaves[number] for number, leaf in enumerate(arguments.leaves) if _is_taken(leaf)))


def _check(entry: Specialization) -> None:
    """Refuse what checks itself when it runs: there are no data yet."""
    for node in entry.source.graph.nodes:
        if isinstance(node.target, LiveCall):
            raise UntraceableError(f"{node.target.name} is called as it is (it has hooks, say)")


def _is_taken(leaf: Leaf) -> bool:
    return isinstance(leaf, (TensorType, Symbol))


def _symbols(arguments: Arguments, leaves: list[Any]) -> dict[str, Any]:
    """What torch has for each symbol among the arguments."""
    found: dict[str, Any] = {}
    for leaf, value in zip(arguments.leaves, leaves, strict=True):
        if isinstance(leaf, Symbol):
            found.setdefault(leaf.name, value)
        elif isinstance(leaf, TensorType):
            sizes = zip(leaf.shape, value.shape, strict=True)
            found.update({size.text: real for size, real in sizes if is_symbolic(size) and size.text not in found})
    return found


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Arguments, list[Any]]:
    """The types of the arguments, with symbols for sizes that vary, and the leaves themselves.

    Raises:
        UntraceableError: they are more than tensors and plain data, or vary in a way that code can't be generic in.
    """
    values: list[Any] = []
    structure = flatten((args, dict(kwargs)), values)
    assert not isinstance(structure, int)
    # A second call in which all that may vary does, each expression by a number of its own.
    steps: dict[str, int] = {}
    here: list[Leaf] = []
    there: list[Leaf] = []
    seen: dict[int, int] = {}
    for number, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            if id(value) in seen:
                here.append(Alias(seen[id(value)]))
                there.append(here[-1])
                continue
            seen[id(value)] = number
            known = TensorType.of(value)
            shape, stride = tuple(map(_hint, known.shape)), tuple(map(_hint, known.stride))
            other = tuple(_hint(size) + _step(size, steps) for size in known.shape)
            varies = any(isinstance(step, _SYMBOLS) for step in known.stride)
            here.append(replace(known, shape=shape, stride=stride))
            there.append(replace(known, shape=other, stride=() if varies else stride))
        elif isinstance(value, _SYMBOLS):
            here.append(Constant(_hint(value)))
            there.append(Constant(_hint(value) + _step(value, steps)))
        elif is_constant(value):
            here.append(Constant(value))
            there.append(here[-1])
        else:
            kind = type(value)
            raise UntraceableError(f"argument {number} is a {kind.__module__}.{kind.__qualname__}")
    exact = Arguments(structure, tuple(here))
    if not steps:
        return exact, values
    generic = generalize([Arguments(structure, tuple(there))], exact, {})
    if generic is None:
        raise UntraceableError(f"code can't be generic in the sizes {', '.join(steps)}, which are to be dynamic")
    return generic, values


def _step(size: Any, steps: dict[str, int]) -> int:
    return steps.setdefault(str(size), len(steps) + 1) if isinstance(size, _SYMBOLS) else 0


def _hint(size: Any) -> Any:
    """What a symbolic size is in this call. (Asking for its value, the public way, would make it a constant.)"""
    if not isinstance(size, _SYMBOLS):
        return size
    if not size.node.has_hint():
        raise UntraceableError(f"the size {size} depends on values of a tensor")
    return size.node.hint
