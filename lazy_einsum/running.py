"""``Part``: calls that run in the place of a network, what they are called, and what memory they take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .passes.lower import Lowered
from .program import ITEM, Program, Value
from .saved import Tape, plain_argument
from .signature import TensorType
from .spec import EinsumSpec


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the calls that run, on tensors that come from elsewhere.

    Attributes:
        lowered: a tree of einsums; ``None`` for an einsum that was left as it is.
        types: of the tensors that enter, as autograd follows them.
        memory: numbers of the memory that they lie in.
        steps: for each call the number of the step of the network that it belongs to.
        equation: of an einsum that was left.
    """

    lowered: Lowered | None
    types: tuple[TensorType, ...]
    memory: tuple[int, ...]
    steps: tuple[int, ...]
    equation: str = ""


def steps_of_calls(lowered: Lowered) -> tuple[int, ...]:
    """For each call of a program the step of its plan that it is a part of."""
    plan, program = lowered.plan, lowered.program
    n = program.n_operands
    sets: list[frozenset[int]] = [frozenset({number}) for number in range(n)]
    of_step: list[frozenset[int]] = list(sets)
    for step in plan.steps:
        of_step.append(frozenset().union(*(of_step[operand] for operand in step.operands)))
    found = []
    for call in program.calls:
        taken = [sets[argument.number] for argument in call.args if isinstance(argument, Value)]
        sets.append(frozenset().union(*taken))
        own = sets[-1]
        # Of the steps with just these leaves there is one; what prepares a leaf is part of the step that takes it.
        exact = [number for number, leaves in enumerate(of_step[n:]) if leaves == own]
        found.append(exact[0] if exact else next(i for i, leaves in enumerate(of_step[n:]) if own <= leaves))
    return tuple(found)


def calls_of(part: Part) -> Iterator[tuple[int, str, str]]:
    """The calls of a part: number of the step, text, and the kernel that it is, empty for views."""
    if part.lowered is None:
        yield part.steps[0], f"torch.einsum({part.equation!r})", "einsum"
        return
    program = part.lowered.program
    lines = program.source.splitlines()[1:]
    texts = iter([line.strip() for line in lines if not line.strip().startswith("del ")])
    for number, (call, is_view) in zip(part.steps, _runs_without_data(part), strict=True):
        yield number, next(texts), "" if is_view else "copy" if call in ("reshape", "contiguous", "clone") else call


def _run_without_data(part: Part) -> Tape:
    """The calls of a tree, run on tensors without data: the tape has all values, what enters first."""
    assert part.lowered is not None
    tape = Tape(part.types, part.memory)
    tape.run(part.lowered.program.calls, range(len(part.types)))
    return tape


def _storage(value: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.UntypedStorage:
    """The memory of a value. Tensors that a call gives together (``unbind``) are views of one."""
    return (value[0] if isinstance(value, tuple) else value).untyped_storage()


def plain_program(program: Program) -> Program:
    """A program with plain numbers for sizes that vary."""
    calls = tuple(call._replace(args=tuple(map(plain_argument, call.args))) for call in program.calls)
    return replace(program, calls=calls)


def _runs_without_data(part: Part) -> Iterator[tuple[str, bool]]:
    """The method that each call of a part calls, and whether its result is a view."""
    assert part.lowered is not None
    values = _run_without_data(part).values
    for number, call in enumerate(part.lowered.program.calls, len(part.types)):
        taken = [values[argument.number] for argument in call.args if isinstance(argument, Value)]
        memory = {_storage(value)._cdata for value in taken}
        is_in_place = call.target.endswith("_") and call.target != ITEM
        is_view = _storage(values[number])._cdata in memory and not is_in_place
        yield call.target, is_view


def memory_of_part(part: Part) -> tuple[int, int | None]:
    """Bytes that are alive at once at most, what enters apart, and the elements that autograd saves."""
    if part.lowered is None:
        shapes = [tuple(known.shape) for known in part.types]
        result = EinsumSpec.parse(part.equation, list(map(len, shapes))).output_shape(shapes)
        return part.types[0].dtype.itemsize * math.prod(result), None
    program = part.lowered.program
    tape = _run_without_data(part)
    values, n = tape.values, len(part.types)
    keys = [_storage(value)._cdata for value in values]
    last: dict[int, int] = {}
    for at, call in enumerate(program.calls):
        for argument in call.args:
            if isinstance(argument, Value):
                last[keys[argument.number]] = at
        last[keys[n + at]] = at
    given, alive, most = set(keys[:n]), {}, 0
    for at in range(len(program.calls)):
        key = keys[n + at]
        if key not in given:
            alive[key] = _storage(values[n + at]).nbytes()
        most = max(most, sum(alive.values()))
        alive = {key: size for key, size in alive.items() if last[key] > at}
    return most, tape.saved


def counted(kernels: Sequence[str]) -> str:
    """Names of kernels in order, those in a row counted.

    >>> counted(["mul", "addcmul_", "addcmul_", "sum"])
    'mul, 2 x addcmul_, sum'
    """
    groups: list[tuple[str, int]] = []
    for kernel in kernels:
        if groups and groups[-1][0] == kernel:
            groups[-1] = kernel, groups[-1][1] + 1
        else:
            groups.append((kernel, 1))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in groups)
