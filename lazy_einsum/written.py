"""``WrittenCalls``: the calls of a network as the user wrote them, as steps of an order."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import fx

from .cost import ITEM, sum_seconds, walk_seconds
from .figures import blas_kind, eager_path, exact, scaling, step_seconds
from .graph import facts, type_of
from .operand_names import call_text, name_of
from .plan import make_plan
from .products import read_product
from .report import StepReport
from .signature import TensorType
from .spec import EinsumSpec


class StepFigures(NamedTuple):
    """Figures of a step.

    Attributes:
        shape: of the result.
        flops: floating point operations.
        elements: read and written.
        seconds: expected.
        backward_seconds: expected of the backward pass.
    """

    shape: tuple[int, ...]
    flops: int
    elements: int
    seconds: float
    backward_seconds: float = 0.0


class WrittenCalls:
    """Collects the user's calls as steps."""

    def __init__(self, n_operands: int) -> None:
        self.steps: list[StepReport] = []
        self.item = ITEM
        self.backward_seconds = 0.0
        self._n = n_operands
        self._numbers: dict[str, int] = {}
        self._follows: list[bool] = []

    def enter(self, name: str, number: int, known: TensorType) -> None:
        """Note an operand."""
        self._numbers[name] = number
        self._follows.append(known.requires_grad)
        self.item = known.dtype.itemsize

    def add(self, node: fx.Node, call: fx.Node) -> bool:
        """Note a call; whether it could be read.

        Args:
            node: in one form.
            call: the same as it was recorded.
        """
        taken = [n for n in node.all_input_nodes if n.name in self._numbers]
        product = read_product(node, True)
        known = facts(node)
        if not taken or known is None or known.type is None:
            return False
        if product is not None and len(product.operands) > 1:
            operands = [self._numbers.get(operand.name) for operand in product.operands]
            types = [entering for operand in product.operands if (entering := type_of(operand)) is not None]
            if None in operands or len(types) < len(operands):
                return False
            self._contract(node, call, product.spec, [n for n in operands if n is not None], list(map(exact, types)))
            return True
        entering = type_of(taken[0])
        views = facts(taken[0])
        if len(taken) == 1 and views is not None and known.storage == views.storage:
            self._numbers[node.name] = self._numbers[taken[0].name]
            return True
        assert entering is not None
        numbers = tuple(self._numbers[n.name] for n in taken)
        size, before = math.prod(map(int, known.type.shape)), math.prod(map(int, entering.shape))
        if product is not None and size < before:
            seconds = sum_seconds(before, max(size, 1), 1)
        else:
            seconds = walk_seconds(size, 1, 1, 1, 1, 2 * ITEM * size)
        shape = tuple(map(int, known.type.shape))
        self._note(call, numbers, StepFigures(shape, before, before + size, seconds), product and product.spec)
        self._numbers[node.name] = self._n + len(self.steps) - 1
        return True

    def _contract(
        self, node: fx.Node, call: fx.Node, spec: EinsumSpec, operands: list[int], types: list[TensorType]
    ) -> None:
        shapes = [tuple(known.shape) for known in types]
        plan = make_plan(spec, shapes, eager_path(spec, types) if len(types) > 2 else False)
        numbers = list(operands)
        for step in plan.steps:
            own = tuple(numbers[operand] for operand in step.operands)
            seconds, backward = step_seconds(step.spec, step.shapes, [self._follows[number] for number in own])
            elements = sum(map(math.prod, step.shapes)) + step.size
            found = StepFigures(tuple(step.shape), step.flops, elements, seconds, backward)
            self._note(call, own, found, step.spec, blas_kind(step.spec, step.shapes), scaling(step.spec, step.shapes))
            numbers.append(self._n + len(self.steps) - 1)
        self._numbers[node.name] = numbers[-1]

    def _note(
        self,
        call: fx.Node,
        operands: tuple[int, ...],
        figures: StepFigures,
        spec: EinsumSpec | None = None,
        blas: str = "-",
        dims: int | None = None,
    ) -> None:
        followed = sum(self._follows[number] for number in operands)
        self._follows.append(bool(followed))
        self.backward_seconds += figures.backward_seconds
        self.steps.append(
            StepReport(
                operands,
                str(spec) if spec is not None else "",
                "",
                figures.shape,
                len(figures.shape) if dims is None else dims,
                blas,
                name_of(call),
                (call_text(call),),
                figures.flops,
                figures.flops * followed,
                self.item * figures.elements,
                self.item * math.prod(figures.shape),
                figures.seconds,
            )
        )

    def peak(self) -> int:
        """Bytes of results alive at once, each dropped after its last use."""
        last = {number: at for at, step in enumerate(self.steps) for number in step.operands}
        alive, most = 0, 0
        for at, step in enumerate(self.steps):
            alive += step.result_bytes
            most = max(most, alive)
            alive -= sum(
                self.steps[number - self._n].result_bytes
                for number in set(step.operands)
                if number >= self._n and last[number] == at
            )
        return most
