"""What autograd saves for the backward pass: of calls on given operands, of einsums as eager torch runs them; and the
contraction orders of which it saves little more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from . import ambient as ambient_module
from .cost import CPU, Machine
from .decompose import eager_calls
from .graph import EVERYTHING, facts, type_of
from .kernels import lower_plan
from .labelsets import Path, SavedLimit
from .layout import Strides
from .plan import Optimize, Plan, make_plan, saved_elements
from .program import Call, Program, Value, operate
from .signature import TensorType
from .sizes import is_symbolic
from .spec import EinsumSpec

SAVED_LIMIT = 1.1
"""What may be saved where nobody said otherwise, in parts of what eager torch saves."""

WRITTEN = "lazy_einsum_written"
"""Under this name an einsum made of several has them, as they were written, in its ``meta``."""


SAVED = "lazy_einsum_saved"
"""Under this name the last step of a planned einsum has in its ``meta`` how many operands the einsum has and how many
elements autograd may save of it.
"""


class Written(NamedTuple):
    """An einsum as the user wrote it, before others were inlined into it.

    Attributes:
        spec: the einsum.
        operands: the einsum that gives each operand; ``None`` for an operand of the whole. Those of the whole are in
            the order of this tree.
        n_operands: number of operands of the whole.
    """

    spec: EinsumSpec
    operands: tuple[Written | None, ...]
    n_operands: int

    @classmethod
    def plain(cls, spec: EinsumSpec) -> Written:
        """An einsum that nothing was inlined into."""
        return cls(spec, (None,) * len(spec.inputs), len(spec.inputs))

    def inline(self, position: int, inner: Written) -> Written:
        """The operand of the whole at ``position`` given by another einsum, as ``EinsumSpec.inline`` has it."""
        operands = list(self.operands)
        for place, operand in enumerate(operands):
            count = 1 if operand is None else operand.n_operands
            if position < count:
                operands[place] = inner if operand is None else operand.inline(position, inner)
                break
            position -= count
        return Written(self.spec, tuple(operands), self.n_operands - 1 + inner.n_operands)


class WrittenNetwork(NamedTuple):
    """An einsum with all that limits on saved memory depend on.

    Attributes:
        written: what the user wrote.
        spec: the same as one einsum.
        types: of its operands; ``requires_grad`` says which autograd follows.
        memory: numbers of the memory that each operand lies in.
        frozen: for each operand whether it never changes; empty where none is.
    """

    written: Written
    spec: EinsumSpec
    types: tuple[TensorType, ...]
    memory: tuple[int, ...]
    frozen: tuple[bool, ...] = ()

    def at(self, value: Callable[[int], int]) -> WrittenNetwork:
        """The same for other sizes and strides: ``value`` gives each."""
        return self._replace(types=tuple(_at(known, value) for known in self.types))


def written_einsums(node: fx.Node, spec: EinsumSpec) -> Written:
    """The einsums that were written where ``node`` is, which computes ``spec``."""
    written = node.meta.get(WRITTEN)
    return written if isinstance(written, Written) else Written.plain(spec)


def written_network(
    node: fx.Node, spec: EinsumSpec, operands: Sequence[fx.Node], frozen: Collection[fx.Node] = ()
) -> WrittenNetwork | None:
    """The einsum ``node`` with what limits on saved memory, and its order, depend on; ``None`` where an operand is of
    unknown type.
    """
    types = followed_types(node, operands)
    if types is None:
        return None
    fixed = tuple(operand in frozen for operand in operands) if frozen else ()
    return WrittenNetwork(written_einsums(node, spec), spec, types, memory_of(operands), fixed)


def followed_types(node: fx.Node, operands: Sequence[fx.Node]) -> tuple[TensorType, ...] | None:
    """Types of operands as autograd follows them where ``node`` runs; ``None`` where one is unknown."""
    known, types = facts(node), [entering for operand in operands if (entering := type_of(operand))]
    if known is None or len(types) != len(operands):
        return None
    return tuple(replace(entering, requires_grad=known.grad and entering.requires_grad) for entering in types)


def memory_of(operands: Sequence[fx.Node]) -> tuple[int, ...]:
    """Numbers of the memory of operands; what may lie in any memory is taken to have its own."""
    numbers = []
    for operand in operands:
        known = facts(operand)
        storage = EVERYTHING if known is None or known.storage is None else known.storage
        numbers.append(-2 - operands.index(operand) if storage == EVERYTHING else storage)
    return tuple(numbers)


# Where the operands of a call are of which autograd saves each for the gradient of the other.
_PRODUCTS = {**dict.fromkeys(("mul", "bmm", "mm", "mv", "dot"), (0, 1)), **dict.fromkeys(("addmm", "baddbmm"), (1, 2))}


class Tape:
    """Runs calls on tensors without data and counts what autograd would save.

    (Autograd itself is not asked, as there may be hooks of the user's own on all that it saves.)

    Args:
        types: of the operands; ``requires_grad`` says which autograd follows.
        memory: numbers of their memory.
    """

    def __init__(self, types: Sequence[TensorType], memory: Sequence[int]) -> None:
        with ambient_module.no_modes():
            self.values = [
                torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta") for known in types
            ]
        #: What was multiplied by what, as an order has it: operands are numbered from 0, products follow.
        self.pairs: list[tuple[int, int]] = []
        self._follows = [known.requires_grad for known in types]
        self._origin = list(range(len(types)))
        self._n_operands = len(types)
        self._memory = {_storage(value): number for value, number in zip(self.values, memory, strict=True)}
        self._saved: dict[tuple[bool, int], int] = {}

    def type_of(self, value: int) -> TensorType:
        """The type of a value."""
        return TensorType.of(self.values[value])

    def followed_type_of(self, value: int) -> TensorType:
        """The type of a value; ``requires_grad`` says whether autograd follows it."""
        return replace(self.type_of(value), requires_grad=self._follows[value])

    def run(self, calls: Sequence[Call], operands: Sequence[int]) -> int:
        """Run calls whose operands are these values; the number of the result."""
        numbers = list(operands)
        values = [self.values[number] for number in operands]
        with ambient_module.no_modes(), torch.no_grad():
            for call in calls:
                target, args, kwargs = call
                own = [numbers[arg.number] if isinstance(arg, Value) else None for arg in args]
                values.append(operate(Call(target, tuple(map(plain_argument, args)), kwargs), values))
                self.values.append(values[-1])
                numbers.append(len(self.values) - 1)
                self._note(target, own)
        return numbers[-1]

    @property
    def saved(self) -> int:
        """Elements saved so far."""
        return sum(self._saved.values())

    def _note(self, target: str, operands: Sequence[int | None]) -> None:
        taken = [number for number in operands if number is not None]
        self._follows.append(any(self._follows[number] for number in taken))
        places = _PRODUCTS.get(target, ())
        pair = [number for place in places if (number := operands[place]) is not None]
        if len(pair) != 2:
            self._origin.append(self._origin[taken[0]])
            return
        left, right = pair
        self.pairs.append((self._origin[left], self._origin[right]))
        self._origin.append(self._n_operands + len(self.pairs) - 1)
        for one, other in ((left, right), (right, left)):
            if self._follows[other]:
                value = self.values[one]
                key = _storage(value)
                memory = (True, self._memory[key]) if key in self._memory else (False, key)
                size = value.untyped_storage().nbytes() // value.element_size()
                self._saved[memory] = max(self._saved.get(memory, 0), size)


def plain_argument(argument: Any) -> Any:
    """An argument with examples in the places of symbolic sizes."""
    if isinstance(argument, tuple):
        return tuple(map(plain_argument, argument))
    return int(argument) if is_symbolic(argument) else argument


def _storage(value: torch.Tensor) -> int:
    key: int = value.untyped_storage()._cdata
    return key


def eager_saved(network: WrittenNetwork) -> Tape | None:
    """What eager torch does for the einsums as they were written; ``None`` where that can't be told."""
    tape = Tape(network.types, network.memory)
    return None if _run_written(tape, network.written, range(len(network.types))) is None else tape


def _run_written(tape: Tape, written: Written, values: Sequence[int]) -> int | None:
    """What eager torch does for einsums whose operands are these values; the number of the result."""
    operands = iter(values)
    results: dict[int, int] = {}
    leaves: dict[int, list[int]] = {}
    # Operands of the whole come in the order of the tree, which is another one than that in which its einsums run.
    stack = [written]
    while stack:
        node = stack[-1]
        own = leaves.setdefault(id(node), [])
        if len(own) == len(node.operands):
            stack.pop()
            # (torch.einsum goes by the order of the letters, and copies in the one what it views in the other.)
            spec = node.spec if str(node.spec).isascii() else node.spec.canonical()
            calls = eager_calls(str(spec), [tape.type_of(value) for value in own])
            if calls is None:
                return None
            results[id(node)] = tape.run(calls, own)
            continue
        inner = node.operands[len(own)]
        if inner is None:
            own.append(next(operands))
        elif id(inner) in results:
            own.append(results[id(inner)])
        else:
            stack.append(inner)
    return results[id(written)]


Step = tuple[Written | Plan, Sequence[Hashable], Hashable]
"""Einsums as they were written, or as they are planned, names of their operands, and a name for the result."""


def save_more(ratio: float, before: Sequence[Step], after: Sequence[Step], leaves: Sequence[fx.Node]) -> bool:
    """Whether autograd saves more than ``ratio`` times as much of the calls ``after`` as of those ``before``, or that
    can't be told.

    Args:
        ratio: the limit.
        before: einsums in an order in which they may run.
        after: others, of the same operands.
        leaves: these operands, as autograd follows them, by which both name them.
    """
    least, most = _saved_of(before, leaves), _saved_of(after, leaves)
    return least is None or most is None or most > ratio * least


def _saved_of(steps: Sequence[Step], leaves: Sequence[fx.Node]) -> int | None:
    types = [_at(known, int) for leaf in leaves if (known := type_of(leaf))]
    if len(types) < len(leaves):
        return None
    tape = Tape(types, memory_of(leaves))
    numbers: dict[Hashable, int] = {leaf: number for number, leaf in enumerate(leaves)}
    for what, names, name in steps:
        own = [numbers[operand] for operand in names]
        result: int | None
        if isinstance(what, Plan):
            result = tape.run(lower_plan(what, [tape.followed_type_of(value) for value in own]).calls, own)
        else:
            result = _run_written(tape, what, own)
        if result is None:
            return None
        numbers[name] = result
    return tape.saved


def plan_saving(
    network: WrittenNetwork,
    ratio: float | None,
    optimize: Optimize = "auto",
    memory_limit: int | str | None = None,
) -> tuple[Plan, SavedLimit | None]:
    """A plan of which autograd saves at most ``ratio`` times as much as of the einsums as they were written, and the
    limit that follows from that for its lowering. Where no such order is found, it is one of which it saves little.

    Args:
        network: what is contracted.
        ratio: ``None`` for no limit.
        optimize: see ``make_plan``; only ``"auto"`` is limited.
        memory_limit: see ``make_plan``.

    Raises:
        MemoryLimitError: see ``make_plan``.
    """
    shapes = [known.shape for known in network.types]
    follows = [known.requires_grad for known in network.types]
    plan_within = partial(
        make_plan, network.spec, shapes, optimize, memory_limit, follows=follows, frozen=network.frozen
    )
    plan = plan_within()
    if ratio is None or optimize not in ("auto", True):
        return plan, None
    limit = saved_limit(network, ratio, plan.ssa_path)
    if limit is not None:
        plan = plan_within(saved_limit=limit)
    return plan, limit


def saved_limit(network: WrittenNetwork, ratio: float, path: Path) -> SavedLimit | None:
    """The limit; ``None`` where the order ``path`` keeps it for sure, or where there is none."""
    network = network.at(int)
    spec, types = network.spec, network.types
    if len(types) < 3 or not any(known.requires_grad for known in types):
        return None
    shapes = [known.shape for known in types]
    lone = spec.lone(shapes)
    sizes, most = [], []
    memory: list[object] = []
    least: dict[object, int] = {}
    for number, (term, known) in enumerate(zip(spec.inputs, types, strict=True)):
        own = {label: size for label, size in zip(term, known.shape, strict=True) if label not in lone}
        elements = math.prod(own.values())
        # A sum over labels that nothing else has comes first, and is what is saved then.
        summed = len(own) < len(set(term))
        memory.append((number,) if summed else network.memory[number])
        # Else it is what lies in the operand's memory, or a copy of the operand.
        sizes.append(elements if summed else min(elements, _span(known)))
        most.append(elements if summed else max(elements, _span(known)))
        least[memory[-1]] = max(least.get(memory[-1], 0), sizes[-1])
    limit = SavedLimit(tuple(known.requires_grad for known in types), tuple(sizes), tuple(memory))
    # Each operand is saved in any order where autograd follows all. To ask eager torch costs more than all else here.
    if all(limit.follows):
        upper = replace(limit, sizes=tuple(most), memory=tuple(range(len(types))))
        if saved_elements(spec, shapes, path, upper) <= ratio * sum(least.values()):
            return None
    eager = eager_saved(network)
    return None if eager is None else replace(limit, elements=ratio * eager.saved, order=tuple(eager.pairs))


def is_within(network: WrittenNetwork, ratio: float, path: Path) -> bool:
    """Whether autograd saves at most ``ratio`` times as much of an order as of the einsums as they were written."""
    limit = saved_limit(network, ratio, path)
    shapes = [tuple(map(int, known.shape)) for known in network.types]
    return limit is None or saved_elements(network.spec, shapes, path, limit) <= limit.elements


def lower_saving(
    plan: Plan,
    types: Sequence[TensorType],
    memory: Sequence[int],
    elements: float,
    strides: Strides | None = None,
    scale: complex | None = None,
    machine: Machine = CPU,
) -> Program:
    """``lower_plan``: calls of which autograd saves at most so many elements; if none do, of which it saves least.

    Args:
        plan: see ``lower_plan``.
        types: of the operands; ``requires_grad`` says which autograd follows.
        memory: numbers of the memory that each lies in.
        elements: the limit.
        strides: see ``lower_plan``.
        scale: see ``lower_plan``.
        machine: see ``lower_plan``.
    """
    program = lower_plan(plan, types, strides, scale, machine=machine)
    best, least = program, _saved(program, types, memory)
    for factor in _PRICES:
        if least <= elements:
            break
        price = factor * program.seconds / max(elements, 1)
        other = lower_plan(plan, types, strides, scale, price, machine)
        saved = _saved(other, types, memory)
        if saved < least:
            best, least = other, saved
    return best


# In parts of what a program takes, what saving as much as is allowed costs; in turn.
_PRICES = (1.0, 30.0)


def _saved(program: Program, types: Sequence[TensorType], memory: Sequence[int]) -> int:
    tape = Tape([_at(known, int) for known in types], memory)
    tape.run(program.calls, range(len(types)))
    return tape.saved


def _at(known: TensorType, value: Callable[[int], int]) -> TensorType:
    return replace(known, shape=tuple(map(value, known.shape)), stride=tuple(map(value, known.stride)))


def _span(known: TensorType) -> int:
    """Elements of the memory that a tensor lies in, as far as its strides tell."""
    if 0 in known.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(known.shape, known.stride, strict=True))
