"""``lower_in_blocks``: a plan of which intermediates are large, run for one part of a label's values after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import cost
from .kernels import lower_plan
from .layout import Strides
from .plan import Contraction, Plan
from .program import CAT, Call, Program, Value
from .signature import TensorType, contiguous_strides
from .sizes import is_symbolic
from .spec import EinsumSpec

# Smaller intermediates, in bytes, are kept by the allocator, and mostly stay in the last cache.
LARGE = 6 * 2**20
# What an intermediate of a block is to be.
SMALL = 2 * 2**20
# More blocks would make long code.
_MOST = 32
# Large ones cost so many seconds per byte, as their memory is got from the system at each call: 0.1 ns where the
# allocator keeps some of it, 0.5 above 32 MB. (``ir_fctn``, two of 49 MB: 83 ms, in 20 blocks 36. ``ir_tw``, two of
# 9 MB: 5.1 and 4.4.)
_FRESH = 0.2e-9
# What part of the time a clearly better way takes at most.
_CLEARLY = 0.85


def lower_in_blocks(
    plan: Plan,
    types: Sequence[TensorType],
    strides: Strides | None = None,
    scale: complex | None = None,
    machine: cost.Machine = cost.CPU,
) -> Program:
    """``lower_plan``, in blocks of a label of the result where that clearly takes less time.

    What does not depend on the label is computed once, all else once for each block of the label's values; the blocks
    of the result are joined. No sum is split. Where autograd follows an operand, all intermediates are kept anyway, and
    there are no blocks; nor are there on devices such as CUDA, whose memory is kept by torch.

    Args:
        plan: see ``lower_plan``.
        types: see ``lower_plan``.
        strides: see ``lower_plan``.
        scale: see ``lower_plan``.
        machine: see ``lower_plan``.
    """
    whole = lower_plan(plan, types, strides, scale, machine=machine)
    sizes = [size for shape in plan.shapes for size in shape]
    if any(type_.requires_grad for type_ in types) or not types[0].is_on_processor or any(map(is_symbolic, sizes)):
        return whole
    itemsize = types[0].dtype.itemsize
    largest = itemsize * max((step.size for step in plan.steps[:-1]), default=0)
    # (All blocks of the result lie beside it while they are joined.)
    if largest <= max(LARGE, itemsize * plan.steps[-1].size):
        return whole
    order = tuple(range(len(whole.shape))) if strides is None else strides.order(whole.shape)
    if strides is not None and strides.exact and _strides_in(order, whole.shape) != strides.stride:
        # Strides of dimensions of size 1 that no dense tensor has: a view of the whole may have them.
        return whole
    fewest = math.ceil(largest / SMALL)
    best, least = whole, _CLEARLY * (whole.seconds + _fresh_seconds(plan.steps[:-1], itemsize))
    for label, size in zip(plan.spec.output, whole.shape, strict=True):
        for n_blocks in sorted({min(n, size, _MOST) for n in (fewest, 2 * fewest)} - {0, 1}):
            program, fresh = _in_blocks(plan, types, label, math.ceil(size / n_blocks), order, scale, machine)
            if program.seconds + fresh < least:
                best, least = program, program.seconds + fresh
    return best


def _fresh_seconds(intermediates: Sequence[Contraction], itemsize: int) -> float:
    """What it costs to get the memory of large intermediates, the results of these steps, from the system."""
    n_bytes = [itemsize * step.size for step in intermediates]
    return _FRESH * sum(n for n in n_bytes if n > LARGE)


def _in_blocks(
    plan: Plan,
    types: Sequence[TensorType],
    label: str,
    length: int,
    order: Sequence[int],
    scale: complex | None,
    machine: cost.Machine,
) -> tuple[Program, float]:
    """The plan in blocks of ``length`` values of ``label``, and the time for the memory of what stays large.

    Args:
        plan: the plan.
        types: of its operands.
        label: one of the result's.
        length: values in each block but the last, which may have fewer.
        order: dimensions of the result, outermost in memory first.
        scale: factor of the result.
        machine: what the calls are to be fast on.
    """
    n, itemsize = len(types), types[0].dtype.itemsize
    depends = [label in term for term in plan.spec.inputs]
    for step in plan.steps:
        depends.append(any(depends[operand] for operand in step.operands))
    inner = [number for number, step in enumerate(plan.steps) if depends[n + number]]
    taken = dict.fromkeys(operand for number in inner for operand in plan.steps[number].operands)
    entering = [operand for operand in taken if operand < n or not depends[operand]]
    calls = _Calls(n, machine)
    fresh = 0.0
    values: list[int] = []
    known: list[TensorType] = []
    for operand in entering:
        if operand < n:
            values.append(operand)
            known.append(types[operand])
            continue
        once = _below(plan, operand)
        leaves = [leaf for number in once for leaf in plan.steps[number].operands if leaf < n]
        part = _part(plan, once, leaves, [plan.shapes[leaf] for leaf in leaves])
        program = lower_plan(part, [types[leaf] for leaf in leaves], machine=machine)
        fresh += _fresh_seconds(part.steps, itemsize)
        values.append(calls.include(program, leaves))
        known.append(replace(types[0], shape=program.shape, stride=program.stride))
    terms = [_term(plan, operand) for operand in entering]
    shape = plan.spec.output_shape(plan.shapes)
    size = shape[plan.spec.output.index(label)]
    programs: dict[int, Program] = {}
    blocks = []
    for start in range(0, size, length):
        count = min(length, size - start)
        narrowed = [_narrowed(type_, term, label, size, count) for type_, term in zip(known, terms, strict=True)]
        if count not in programs:
            part = _part(plan, inner, entering, [type_.shape for type_ in narrowed])
            strides = Strides(_strides_in(order, part.spec.output_shape(part.shapes)))
            programs[count] = lower_plan(part, narrowed, strides, scale, machine=machine)
            fresh += _fresh_seconds(part.steps[:-1], itemsize) * (size // count)
        parts = [
            calls.narrow(value, type_.shape, block.shape, start)
            for value, type_, block in zip(values, known, narrowed, strict=True)
        ]
        blocks.append(calls.permute(calls.include(programs[count], parts), order))
    place = order.index(plan.spec.output.index(label))
    joined = calls.add(CAT, *map(Value, blocks), place)
    calls.permute(joined, tuple(map(order.index, range(len(order)))))
    elements = math.prod(shape)
    calls.seconds += cost.walk_seconds(elements, 1, 1, 1, 1, 2 * itemsize * elements, machine)
    return Program(n, tuple(calls.calls), shape, _strides_in(order, shape), calls.seconds), fresh


def _term(plan: Plan, value: int) -> str:
    """Labels of a value of the plan."""
    n = len(plan.spec.inputs)
    return plan.spec.inputs[value] if value < n else plan.steps[value - n].spec.output


def _below(plan: Plan, value: int) -> list[int]:
    """The steps that a step's result comes from, that one last."""
    n = len(plan.spec.inputs)
    needed = {value}
    for number in reversed(range(value - n + 1)):
        if n + number in needed:
            needed.update(plan.steps[number].operands)
    return [number for number in range(value - n + 1) if n + number in needed]


def _part(plan: Plan, numbers: Sequence[int], leaves: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Plan:
    """Some steps of a plan as one of their own, of other sizes.

    Args:
        plan: the whole.
        numbers: of the steps, in order.
        leaves: values of the whole that enter.
        shapes: theirs.
    """
    n = len(plan.spec.inputs)
    places = {leaf: place for place, leaf in enumerate(leaves)}
    sizes = list(shapes)
    steps = []
    for number in numbers:
        step = plan.steps[number]
        operands = tuple(places[operand] for operand in step.operands)
        taken = tuple(sizes[operand] for operand in operands)
        steps.append(Contraction(operands, step.spec, taken, step.spec.output_shape(taken), step.flops))
        places[n + number] = len(sizes)
        sizes.append(steps[-1].shape)
    spec = EinsumSpec(tuple(_term(plan, leaf) for leaf in leaves), steps[-1].spec.output)
    largest = max(step.size for step in steps)
    return Plan(spec, tuple(shapes), tuple(steps), 0, 0, 0.0, largest, plan.optimizer)


def _narrowed(known: TensorType, term: str, label: str, size: int, count: int) -> TensorType:
    """A tensor with so many values of a label. (Where it is broadcast, that is the one it has.)"""
    shape = tuple(count if own == label and n == size else n for own, n in zip(term, known.shape, strict=True))
    return replace(known, shape=shape)


def _strides_in(order: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in this order, outermost first."""
    dense = contiguous_strides([shape[dim] for dim in order])
    return tuple(dense[order.index(dim)] for dim in range(len(shape)))


class _Calls:
    """Collects calls on values, of which the operands come first."""

    def __init__(self, n_operands: int, machine: cost.Machine) -> None:
        self.n_operands = n_operands
        self.launch = machine.launch
        self.calls: list[Call] = []
        self.seconds = 0.0

    def add(self, target: str, *args: Any) -> int:
        """Add a call; the number of its result."""
        self.calls.append(Call(target, args))
        return self.n_operands + len(self.calls) - 1

    def include(self, program: Program, values: Sequence[int]) -> int:
        """Add the calls of a program on these values; the number of its result."""
        numbers = list(values)
        for target, args, kwargs in program.calls:
            own = tuple(Value(numbers[arg.number]) if isinstance(arg, Value) else arg for arg in args)
            self.calls.append(Call(target, own, kwargs))
            numbers.append(self.n_operands + len(self.calls) - 1)
        self.seconds += program.seconds
        return numbers[-1]

    def narrow(self, value: int, shape: Sequence[int], wanted: Sequence[int], start: int) -> int:
        """Take the part of a tensor from ``start`` on that has the wanted shape."""
        for dim, (size, count) in enumerate(zip(shape, wanted, strict=True)):
            if size != count:
                value = self.add("narrow", Value(value), dim, start, count)
                self.seconds += self.launch
        return value

    def permute(self, value: int, order: Sequence[int]) -> int:
        """Permute dimensions, if need be."""
        if tuple(order) == tuple(range(len(order))):
            return value
        self.seconds += self.launch
        return self.add("permute", Value(value), tuple(order))
