"""Libraries that contract the same networks, each with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import opt_einsum
import torch
from measure import at_most
from torch import Tensor

import lazy_einsum
from lazy_einsum import OptimizedModule

Target = Callable[..., Any]

PLANNING_SECONDS = 10
COMPILING_SECONDS = 60


def named(equation: str, n_operands: int) -> Target:
    """``torch.einsum`` of an equation as a function with a fixed number of arguments, as torch.fx needs."""
    names = ", ".join(f"x{number}" for number in range(n_operands))
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def child({names}):\n    return torch.einsum({equation!r}, {names})", scope)
    return scope["child"]


def _fits_torch(equation: str) -> bool:
    return equation.isascii()


def eager(equation: str, operands: Sequence[Tensor]) -> Target | None:
    return named(equation, len(operands)) if _fits_torch(equation) else None


def ours(equation: str, operands: Sequence[Tensor]) -> Target | None:
    if not _fits_torch(equation):
        return lambda *tensors: lazy_einsum.einsum(equation, *tensors)
    return OptimizedModule(named(equation, len(operands)))


def fx(equation: str, operands: Sequence[Tensor]) -> Target | None:
    if not _fits_torch(equation):
        return None
    import opt_einsum_fx

    return opt_einsum_fx.optimize_einsums_full(named(equation, len(operands)), tuple(operands))


def expression(equation: str, operands: Sequence[Tensor]) -> Target | None:
    return opt_einsum.contract_expression(equation, *(operand.shape for operand in operands))


def cotengra(equation: str, operands: Sequence[Tensor]) -> Target | None:
    import cotengra as ctg

    left, output = equation.split("->")
    inputs = [tuple(term) for term in left.split(",")]
    contract = ctg.array_contract_expression(inputs, tuple(output), shapes=[tuple(x.shape) for x in operands])
    return lambda *tensors: contract(*tensors)


CONTESTANTS: dict[str, Callable[[str, Sequence[Tensor]], Target | None]] = {
    "ours": ours,
    "eager": eager,
    "fx": fx,
    "expression": expression,
    "cotengra": cotengra,
}


def ours_through_inductor(equation: str, operands: Sequence[Tensor]) -> Target | None:
    if not _fits_torch(equation):
        return None
    return OptimizedModule(named(equation, len(operands)), backend="inductor")


def compiled(equation: str, operands: Sequence[Tensor]) -> Target | None:
    if not _fits_torch(equation):
        return None
    torch.compiler.reset()
    return torch.compile(named(equation, len(operands)), dynamic=False)


COMPILED: dict[str, Callable[[str, Sequence[Tensor]], Target | None]] = {
    "ours": ours_through_inductor,
    "ours, eager": ours,
    "eager": eager,
    "compile": compiled,
}
"""With ``--compile``: our passes with Inductor below them, and others that run the same."""


def prepare(
    name: str,
    equation: str,
    operands: Sequence[Tensor],
    contestants: Mapping[str, Callable[[str, Sequence[Tensor]], Target | None]] = CONTESTANTS,
) -> Target | None:
    """One contestant, ready to be called, or ``None`` where it can't take part or plans for too long."""
    try:
        with at_most(PLANNING_SECONDS):
            return contestants[name](equation, operands)
    except (TimeoutError, ImportError):
        return None
