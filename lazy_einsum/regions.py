"""Regions of other modes in generated code: functions that it calls where ``forward`` entered and left them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_open = threading.local()


def _stack() -> list[Any]:
    if not hasattr(_open, "stack"):
        _open.stack = []
    found: list[Any] = _open.stack
    return found


def _enter(context: Any) -> None:
    context.__enter__()
    _stack().append(context)


def enter_inference(enabled: bool) -> None:
    """Enter ``torch.inference_mode(enabled)``."""
    _enter(torch.inference_mode(enabled))


def enter_saved_tensors_hooks(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
    """Enter ``torch.autograd.graph.saved_tensors_hooks(pack, unpack)``."""
    _enter(torch.autograd.graph.saved_tensors_hooks(pack, unpack))


def leave() -> None:
    """Leave what was entered last."""
    _stack().pop().__exit__(None, None, None)


@contextmanager
def restored(grad: bool) -> Iterator[None]:
    """Leave all that was entered inside, also after an exception, and put grad mode and default dtype back."""
    stack, dtype = _stack(), torch.get_default_dtype()
    depth = len(stack)
    with torch.set_grad_enabled(grad):
        try:
            yield
        finally:
            while len(stack) > depth:
                leave()
            if torch.get_default_dtype() is not dtype:
                torch.set_default_dtype(dtype)
