"""Live calls: submodules that specialized code calls as they are (leaves, modules with hooks, compiled modules); and
calls of submodules that are specialized where the whole is not.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .data import flatten
from .errors import UntraceableError
from .signature import TensorType

HAS_HOOKS = "it has hooks"
"""Why most live calls are live."""

Caller = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Calls a module with arguments and keyword arguments."""


def direct_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``module`` as it is."""
    return module(*args, **kwargs)


class LiveCall:
    """Calls a live submodule in the middle of specialized code, and checks that it gives what the code after it was
    made for.

    Args:
        name: qualified name of the submodule.
        types: expected types of the tensors in its result.
        caller: what calls it.
    """

    def __init__(self, name: str, types: tuple[TensorType, ...], caller: Caller = direct_call) -> None:
        self.__name__ = "live_call"
        self.__qualname__ = "live_call"
        self.__module__ = __name__
        self.name = name
        self._types = types
        self._caller = caller

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``module`` and check its result."""
        result = self._caller(module, args, kwargs)
        found: list[Any] = []
        flatten(result, found)
        for value in found:
            if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter):
                raise LiveCallChanged(f"{self.name} gave a {type(value).__name__}, a subclass of torch.Tensor")
        tensors = tuple(TensorType.of(value) for value in found if isinstance(value, torch.Tensor))
        if tuple(map(_comparable, tensors)) != tuple(map(_comparable, self._types)):
            raise LiveCallChanged(
                f"{self.name} gave {', '.join(map(str, tensors))}, expected {', '.join(map(str, self._types))} (a "
                "hook may have changed its result)"
            )
        return result


def set_attribute(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make ``value`` an attribute, or buffer, of ``module``, past a ``__setattr__`` of its class: that has run."""
    nn.Module.__setattr__(module, name, value)


class PartCall:
    """Stands in for the call of a submodule while the whole runs as it is.

    Args:
        call: what is called, with the submodule, arguments and keyword arguments.
        module: the submodule.
    """

    def __init__(self, call: Caller, module: nn.Module) -> None:
        self._call = call
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the submodule."""
        module = self._module()
        assert module is not None  # it is being called
        return self._call(module, args, kwargs)

    def install(self) -> None:
        """From now on torch calls this in the place of the submodule, hooks and all, as what ``Module.compile`` makes.
        (Replacing ``forward``, the public way, would show in the submodule, and put hooks around this.)
        """
        module = self._module()
        if module is not None:
            module.__dict__["_compiled_call_impl"] = self

    def remove(self) -> None:
        """Undo ``install``."""
        module = self._module()
        if module is not None and module._compiled_call_impl is self:
            del module.__dict__["_compiled_call_impl"]


def is_compiled(module: nn.Module) -> bool:
    """Whether the user called ``module.compile()``."""
    return module._compiled_call_impl is not None and not isinstance(module._compiled_call_impl, PartCall)


def has_own_call(module: nn.Module) -> bool:
    """Whether the class of ``module`` has a ``__call__`` of its own."""
    return type(module).__call__ is not nn.Module.__call__


def is_made_by_compile(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile(module)`` gives. (Its class has no public name, and lies in a module
    that takes seconds to import.)
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_part(module: nn.Module) -> bool:
    """Whether calls of ``module`` go through a ``PartCall``."""
    return isinstance(module._compiled_call_impl, PartCall)


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """What calls ``module`` with its hooks, compiled or not."""
    call: Callable[..., Any] = module._call_impl
    return call


class LiveCallChanged(UntraceableError):
    """A live call gave another type than the trace foresaw."""


def _comparable(known: TensorType) -> TensorType:
    return replace(known, is_leaf=True)
