"""Planning while torch has symbols for sizes: by what these are in the first call."""

from __future__ import annotations

import types
from typing import Any

import torch

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def plan_by_hints() -> None:
    """Have ``torch.einsum`` plan symbolic sizes by what they are in the first call. (In code that Dynamo captures, this
    runs during the capture.)

    Its planner, opt_einsum, compares sizes, and each comparison makes a constant of a symbol: Dynamo captures anew for
    each batch size. This is so before any backend is called, hence the change to torch's planner, which is for symbolic
    sizes only. (Switching ``torch.backends.opt_einsum`` off while Dynamo captures, the public way, would leave other
    threads, and other backends, without plans.)
    """
    planner = torch.backends.opt_einsum
    known = planner.get_opt_einsum()
    if known is not None and not isinstance(known, _Planner):
        # What stands in sys.modules has the module itself as ``m``.
        planner.m._opt_einsum = _Planner(known)  # type: ignore[attr-defined]


# torch.compiler.assume_constant_result, the public way to say so, imports Dynamo, which takes two seconds.
plan_by_hints._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Planner(types.ModuleType):
    """opt_einsum as torch uses it.

    Args:
        real: the module itself.
    """

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def contract_path(self, equation: str, *operands: Any, **options: Any) -> Any:
        """As opt_einsum's; symbolic sizes are taken for what they are in the first call."""
        if not any(isinstance(size, torch.SymInt) for operand in operands for size in operand.shape):
            return self._real.contract_path(equation, *operands, **options)
        shapes = [tuple(map(hint, operand.shape)) for operand in operands]
        return self._real.contract_path(equation, *shapes, shapes=True, **options)


_UNKNOWN_SIZE = 64  # stands for a size of which nothing is known


def hint(size: Any) -> Any:
    """What a symbolic size was in the first call. (Asking for its value, the public way, would make it a constant.)"""
    if not isinstance(size, SYMBOLS):
        return size
    return size.node.hint if size.node.has_hint() else _UNKNOWN_SIZE
