"""Regions of other modes in generated code: functions that it calls where ``forward`` entered and left them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_open = threading.local()


def _stack() -> list[torch.inference_mode]:
    if not hasattr(_open, "stack"):
        _open.stack = []
    found: list[torch.inference_mode] = _open.stack
    return found


def enter_inference(enabled: bool) -> None:
    """Enter ``torch.inference_mode(enabled)``."""
    context = torch.inference_mode(enabled)
    context.__enter__()
    _stack().append(context)


def leave_inference() -> None:
    """Leave the inference mode entered last."""
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
                leave_inference()
            if torch.get_default_dtype() is not dtype:
                torch.set_default_dtype(dtype)
