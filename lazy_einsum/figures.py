"""Figures of contractions, for reports: what kind of product, how many labels, how long by the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .cost import sum_seconds, walk_seconds
from .labelsets import Network, Path
from .plan import Plan, positions
from .report import OperandReport, OrderReport, StepReport
from .saved import Written, WrittenNetwork, eager_saved
from .signature import TensorType
from .spec import EinsumSpec


def blas_kind(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> str:
    """What kind of product a contraction of two is.

    >>> blas_kind(EinsumSpec(("zij", "zjk"), "zik"), [(5, 2, 3), (5, 3, 4)])
    'batched GEMM'
    """
    if len(spec.inputs) != 2:
        return "-"
    sizes = spec.sizes(shapes)
    a, b = ({label for label in term if sizes[label] != 1} for term in spec.inputs)
    output = set(spec.output)
    if not (a & b) - output:
        return "-"
    rows, columns = (a - b) & output, (b - a) & output
    kind = "GEMM" if rows and columns else "GEMV" if rows or columns else "DOT"
    return f"batched {kind}" if a & b & output else kind


def scaling(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> int:
    """Number of labels that a contraction loops over, those of size 1 apart."""
    return sum(size != 1 for size in spec.sizes(shapes).values())


def exact(known: TensorType) -> TensorType:
    """A type with plain numbers for sizes and strides."""
    return replace(known, shape=tuple(map(int, known.shape)), stride=tuple(map(int, known.stride)))


def at_example(plan: Plan) -> Plan:
    """A plan with plain numbers for sizes."""
    steps = tuple(
        replace(
            step,
            shapes=tuple(tuple(map(int, shape)) for shape in step.shapes),
            shape=tuple(map(int, step.shape)),
            flops=int(step.flops),
        )
        for step in plan.steps
    )
    shapes = tuple(tuple(map(int, shape)) for shape in plan.shapes)
    return replace(plan, shapes=shapes, steps=steps, flops=int(plan.flops), naive_flops=int(plan.naive_flops))


def step_seconds(spec: EinsumSpec, shapes: Sequence[tuple[int, ...]], follows: Sequence[bool]) -> tuple[float, float]:
    """What the cost model expects of one contraction, forward and backward."""
    if len(shapes) != 2:
        elements = math.prod(spec.sizes(shapes).values())
        result = math.prod(spec.output_shape(shapes))
        return (sum_seconds(elements, max(result, 1), 1) if result < elements else 0.0), 0.0
    network = Network.of(spec, shapes, spec.sizes(shapes), False)
    forward = network.seconds(((0, 1),))
    return forward, network.following(list(follows)).seconds(((0, 1),)) - forward


def backward_seconds(plan: Plan, follows: Sequence[bool]) -> float | None:
    """What the cost model expects of the backward pass of a plan; ``None`` where autograd follows nothing."""
    if not any(follows) or len(plan.shapes) < 2:
        return None
    network = Network.of(plan.spec, plan.shapes, plan.spec.sizes(plan.shapes), False)
    return network.following(list(follows)).seconds(plan.ssa_path) - network.seconds(plan.ssa_path)


def eager_path(spec: EinsumSpec, types: Sequence[TensorType]) -> Path | bool:
    """The order in which torch.einsum contracts such operands, as positions; ``False``, left to right, where that can't
    be told.
    """
    network = WrittenNetwork(Written.plain(spec), spec, tuple(types), tuple(range(len(types))))
    tape = eager_saved(network)
    pairs = tape.pairs if tape is not None else []
    if sorted(number for pair in pairs for number in pair) != list(range(2 * len(types) - 2)):
        return False
    return positions(tuple(pairs), len(types))


def naive_report(
    plan: Plan, operands: Sequence[OperandReport], types: Sequence[TensorType], equation: str
) -> OrderReport:
    """One loop over all labels, which reads each operand and writes the result, and one more for each gradient.

    There is nothing between operands and result, so that neither a copy nor another result takes memory.
    """
    item = types[0].dtype.itemsize
    shape = plan.spec.output_shape(plan.shapes)
    result = math.prod(shape)
    # The gradient of an operand is the same loop, with the operand and the result in each other's place.
    n_followed = sum(known.requires_grad for known in types)
    moved = item * (sum(map(math.prod, plan.shapes)) + result)
    took = walk_seconds(plan.naive_flops, 1, 1, 1, 1, moved)
    step = StepReport(
        tuple(range(len(operands))),
        equation,
        "",
        shape,
        scaling(plan.spec, plan.shapes),
        "-",
        "loop",
        (),
        plan.naive_flops,
        plan.naive_flops * n_followed,
        moved,
        item * result,
        took,
    )
    saved = item * sum(map(math.prod, plan.shapes)) if n_followed else None
    return order_report(operands, [step], item * result, saved, n_followed * took if n_followed else None)


def peak_of(plan: Plan, item: int) -> int:
    """Bytes of results alive at once at most, of ``item`` bytes each element."""
    alive, most = 0, 0
    n = len(plan.shapes)
    for step in plan.steps:
        alive += item * step.size
        most = max(most, alive)
        alive -= sum(item * plan.steps[number - n].size for number in step.operands if number >= n)
    return most


def order_report(
    operands: Sequence[OperandReport],
    steps: Sequence[StepReport],
    peak: int,
    saved: int | None,
    backward: float | None,
) -> OrderReport:
    """The report of an order, its sums made."""
    return OrderReport(
        tuple(operands),
        tuple(steps),
        sum(step.flops for step in steps),
        sum(step.backward_flops for step in steps),
        sum(step.bytes for step in steps),
        max((step.result_bytes for step in steps), default=0),
        peak,
        saved,
        max((step.scaling for step in steps), default=0),
        sum(step.seconds for step in steps),
        backward,
    )
