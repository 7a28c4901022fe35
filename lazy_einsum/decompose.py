"""What ``torch.einsum`` itself does with given operands, call by call, for einsums whose result depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import ambient as ambient_module
from .fakes import fake_mode, with_eager_strides
from .program import Call, Value
from .signature import TensorType
from .surroundings import USERS, Attribute, Reading


def settings() -> Iterator[Reading]:
    """What ``torch.einsum`` asks for the order in which it contracts three operands or more. Whoever records or
    decomposes such a call has to have these in its key.
    """
    for name in ("enabled", "strategy"):
        variable = Attribute(torch.backends.opt_einsum, name)
        yield Reading(variable, (), variable.get(), USERS, frozenset(), variable)


# Operations by name, and the methods that do the same. A reshape looks like a view here, or like a copy and a view; it
# is left to decide once more when it runs, on real strides.
_METHODS = {
    "aten::unsqueeze": "unsqueeze",
    "aten::permute": "permute",
    "aten::diagonal": "diagonal",
    "aten::sum": "sum",
    "aten::mul": "mul",
    "aten::bmm": "bmm",
    "aten::view": "reshape",
    "aten::_unsafe_view": "reshape",
    "aten::clone": "clone",
    "aten::_to_copy": "to",
}
VIEWS = frozenset({"unsqueeze", "permute", "diagonal", "reshape"})
"""Those whose result may lie in the memory of their operand."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations that happen as calls on numbered values."""

    def __init__(self, operands: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.known = True
        self._first = len(operands)
        self._numbers = {id(operand): number for number, operand in enumerate(operands)}
        self._kept = list(operands)  # so that no id is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = with_eager_strides(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        if not _is_tensor(result):  # asks for a device
            return result
        method = _METHODS.get(func._schema.name)
        self.known = self.known and method is not None and all(id(x) in self._numbers for x in args if _is_tensor(x))
        if not self.known or method is None:
            return result
        self._kept.append(result)
        if method == "clone":  # the first half of a reshape that copies
            self._numbers[id(result)] = self._numbers[id(args[0])]
            return result
        taken = tuple(Value(self._numbers[id(arg)]) if _is_tensor(arg) else arg for arg in args)
        named = tuple((name, value) for name, value in (kwargs or {}).items() if value is not None)
        self._numbers[id(result)] = self._first + len(self.calls)
        self.calls.append(Call(method, taken, named))
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def eager_calls(equation: str, types: Sequence[TensorType]) -> list[Call] | None:
    """The calls that ``torch.einsum`` makes for operands of these types, in the present ambient state.

    Done one after the other they give the same dtypes, strides and errors, and autograd keeps the same, on any operands
    of these types. The planner, which costs ``torch.einsum`` 100 us at each call of three operands, is asked once.

    They are found by watching it at work on tensors without data. (Pairwise einsums in the same order were rejected:
    the strides of a product follow from dimensions of size 1 too, which ``torch.einsum`` carries along to the end.)

    Args:
        equation: the text as it was given to ``torch.einsum``.
        types: of the operands.

    Returns:
        Calls on numbered values, operands first; ``None`` where that can't be told.

    >>> [call.target for call in eager_calls("i,i->", [TensorType.of(torch.ones(3))] * 2)]
    ['permute', 'permute', 'permute', 'reshape', 'permute', 'reshape', 'bmm', 'reshape', 'permute', 'reshape']
    """
    # Autocast goes by the device, which meta tensors have none of; they are ten times as fast as fakes.
    autocast = ambient_module.any_autocast()
    with ambient_module.no_modes(), fake_mode() if autocast else nullcontext(), torch.no_grad():
        operands = [
            torch.empty_strided(
                known.shape, known.stride, dtype=known.dtype, device=known.device if autocast else "meta"
            )
            for known in types
        ]
        try:
            with _Watch(operands) as watch:
                torch.einsum(equation, *operands)
        except RuntimeError:  # some dtypes are refused here that real tensors without elements get away with
            return None
    return watch.calls if watch.known else None
