"""What the user calls the arguments of a call."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .data import Structure
from .signature import Arguments


def argument_names(child: Any, arguments: Arguments) -> list[str]:
    """What the user calls each leaf of the arguments: ``"x"``, ``"batch['edges']"``, ``"args[1]"``."""
    names = [f"argument {number}" for number in range(len(arguments.leaves))]
    args, kwargs = arguments.structure.children
    assert isinstance(args, Structure) and isinstance(kwargs, Structure)
    called = child.forward if isinstance(child, nn.Module) else child
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def name(child: Structure | int, text: str) -> None:
        if isinstance(child, int):
            names[child] = text
            return
        keys = child.keys if child.keys is not None and len(child.keys) == len(child.children) else None
        for number, item in enumerate(child.children):
            name(item, f"{text}[{number if keys is None else repr(keys[number])}]")

    for number, item in enumerate(args.children):
        after = number - len(positional)
        name(item, positional[number] if after < 0 else f"{rest}[{after}]")
    for key, item in zip(kwargs.keys or (), kwargs.children, strict=True):
        name(item, str(key))
    return names
