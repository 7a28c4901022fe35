"""``Program``: calls on tensors as data; run call by call, or compiled to a Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

ITEM = "__getitem__"
"""The call that takes one of several tensors, which another call gives."""

CAT = "cat"
"""The call that joins tensors: its arguments are these, then the dimension. Not a method of any of them."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in a program: operands are numbered from 0, the results of calls follow."""

    number: int


class Call(NamedTuple):
    """A call of a method of ``Tensor``, or one of those above.

    Attributes:
        target: name of the method, or ``ITEM`` or ``CAT``.
        args: its arguments, the tensor itself first; a ``Value`` stands for a tensor.
        kwargs: keyword arguments.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Calls that compute a contraction; the last one gives the result. There is at least one.

    Attributes:
        n_operands: number of operands.
        calls: the calls in order. Call number ``i`` defines the value ``n_operands + i``.
        shape: shape of the result.
        stride: strides of the result, as far as they can be told from the operands' strides.
        seconds: what the cost model expects.
    """

    n_operands: int
    calls: tuple[Call, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    seconds: float

    @property
    def source(self) -> str:
        """The program as the text of a Python function ``contract``.

        >>> print(Program(2, (Call("mul", (Value(0), Value(1))),), (3,), (1,), 1e-6).source)
        def contract(v0, v1):
            return v0.mul(v1)
        <BLANKLINE>
        """
        last_use: dict[int, int] = {}
        for place, call in enumerate(self.calls):
            last_use |= {arg.number: place for arg in call.args if isinstance(arg, Value)}
        lines = [f"def contract({', '.join(f'v{i}' for i in range(self.n_operands))}):"]
        for place, call in enumerate(self.calls):
            final = place == len(self.calls) - 1
            receiver, *args = [f"v{arg.number}" if isinstance(arg, Value) else repr(arg) for arg in call.args]
            args += [f"{name}={value!r}" for name, value in call.kwargs]
            result = "return" if final else f"v{self.n_operands + place} ="
            if call.target == ITEM:
                taken = f"{receiver}[{args[0]}]"
            elif call.target == CAT:
                taken = f"torch.cat([{', '.join((receiver, *args[:-1]))}], {args[-1]})"
            else:
                taken = f"{receiver}.{call.target}({', '.join(args)})"
            lines.append(f"    {result} {taken}")
            # An intermediate that lives until the function returns would add to its peak of memory.
            dead = [f"v{number}" for number, last in last_use.items() if last == place and number >= self.n_operands]
            if dead and not final:
                lines.append(f"    del {', '.join(dead)}")
        return "\n".join(lines) + "\n"


def run(program: Program, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run a program call by call.

    >>> run(Program(2, (Call("mul", (Value(0), Value(1))),), (), (), 1e-6), [torch.tensor(2), torch.tensor(3)])
    tensor(6)
    """
    values = list(operands)
    for call in program.calls:
        values.append(operate(call, values))
    return values[-1]


def operate(call: Call, values: Sequence[torch.Tensor]) -> Any:
    """The result of one call, the values before it given."""
    target, args, kwargs = call
    given: list[Any] = [values[arg.number] if isinstance(arg, Value) else arg for arg in args]
    if target == CAT:
        return torch.cat(given[:-1], given[-1])
    return getattr(given[0], target)(*given[1:], **dict(kwargs))


def compile_program(program: Program) -> Callable[..., torch.Tensor]:
    """The program as a function of its operands, which costs next to nothing over its calls. Equal programs share one.

    >>> multiply = compile_program(Program(2, (Call("mul", (Value(0), Value(1))),), (), (), 1e-6))
    >>> multiply(torch.tensor(2), torch.tensor(3))
    tensor(6)
    """
    return _compile(program.source)


@lru_cache(maxsize=1024)
def _compile(source: str) -> Callable[..., torch.Tensor]:
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(source, "<lazy_einsum contraction>", "exec"), namespace)
    function: Callable[..., torch.Tensor] = namespace["contract"]
    return function
