"""The net below the recorder: what really happens while ``forward`` is traced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import HIDDEN_WRITES
from .fakes import require_grad_as_views, tensors_in, with_eager_strides


class Net(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations that really happen: refuses those outside of recorded calls, collects the storages they
    write.

    Args:
        fail: notes why the trace fails.
        paused: a context in which operations are let through.

    Attributes:
        open: how many recorded calls, or pauses, are under way.
        written: tensors that the recorded call has written.
        random: whether it has drawn random numbers.
    """

    def __init__(self, fail: Callable[[str], object], paused: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fail = fail
        self._paused = paused
        self.open = 0
        self.written: list[torch.Tensor] = []
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if not self.open:
            if any("Tensor" in str(result.type) for result in schema.returns):
                # Noted, not raised: this may run inside of C++ that an exception would abort (autograd.Function.apply
                # does). The next recorded call raises it.
                self._fail(
                    f"{func} runs outside of a torch function that can be recorded (a custom autograd.Function, "
                    "torch.func, a C++ extension, ...)"
                )
            with self._paused():
                return func(*args, **(kwargs or {}))
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
                self.written.extend(tensors_in(value))
        for number in HIDDEN_WRITES.get(schema.name, ()):
            if number < len(args):
                self.written.extend(tensors_in(args[number]))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        result = func(*args, **(kwargs or {}))
        if torch.is_inference_mode_enabled():
            require_grad_as_views(func, args, result)
        return with_eager_strides(func, args, kwargs or {}, result)
