"""Live calls: submodules that specialized code calls as they are (leaves, modules with hooks, compiled modules)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import UntraceableError
from .signature import TensorType, flatten


class LiveCall:
    """Calls a live submodule in the middle of specialized code, and checks that it gives what the code after it was
    made for.

    Args:
        name: qualified name of the submodule.
        types: expected types of the tensors in its result.
    """

    def __init__(self, name: str, types: tuple[TensorType, ...]) -> None:
        self.__name__ = "live_call"
        self.__qualname__ = "live_call"
        self.__module__ = __name__
        self._name = name
        self._types = types

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``module`` and check its result."""
        result = module(*args, **kwargs)
        found: list[Any] = []
        flatten(result, found)
        tensors = tuple(TensorType.of(value) for value in found if isinstance(value, torch.Tensor))
        if tuple(map(_comparable, tensors)) != tuple(map(_comparable, self._types)):
            raise LiveCallChanged(
                f"{self._name} gave {', '.join(map(str, tensors))}, expected {', '.join(map(str, self._types))} (a "
                "hook may have changed its result)"
            )
        return result


class LiveCallChanged(UntraceableError):
    """A live call gave another type than the trace foresaw."""


def _comparable(known: TensorType) -> TensorType:
    return replace(known, is_leaf=True)
