"""Lowering: from a contraction, or a plan of them, to the fewest direct calls of torch: ``lower``, ``lower_plan``.

All decisions are made on labels, sizes and strides: ``best_ways`` compares the ways to contract each pair and the
layouts that they give, here the calls of the best are written. ``torch.einsum`` is never called; every call is a method
of ``Tensor`` that autograd, functorch and ``torch.fx`` know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import cost
from .best_ways import Choice, Saving, choose, is_finished, order_asked_for
from .layout import (
    Layout,
    Sizes,
    Strides,
    contiguous_layout,
    elementwise_strides,
    is_contiguous,
    label_strides,
    memory_order,
    permutation_of,
    reordered_dims,
    shape_of,
    split_dims,
    view_of,
)
from .plan import Contraction, Plan
from .program import ITEM, Call, Program, Value
from .signature import TensorType
from .spec import EinsumSpec
from .ways import (
    NARROW,
    Context,
    Way,
    flipped,
    lone_labels,
    split_for_sum,
    summed_layout,
)

# From so many elements on torch copies a transposed matrix block by block, which is slow for narrow ones, but not if it
# is a batch of one (20,000 by 2: 77 us, 13 as a batch; by 8: 123 and 45).
_BLOCKED, _NARROW = 3600, 16

# Elements from which on multiplying them costs more than the empty tensor that a product with a factor needs (0.9 us).
_FREE_ALPHA = 4096


def lower(
    spec: EinsumSpec,
    types: Sequence[TensorType],
    strides: Strides | None = None,
    scale: complex | None = None,
    machine: cost.Machine = cost.CPU,
) -> Program:
    """The calls for an einsum of one or two operands.

    The result is a view where that of ``torch.einsum`` is one, and fresh where that is. Integers come out exactly as
    there.

    Args:
        spec: the einsum.
        types: the operands' types; shape, strides, dtype and ``requires_grad`` are read.
        strides: what is asked of the result's strides, if anything is.
        scale: factor of the result, applied where that takes the fewest elements.
        machine: what the calls are to be fast on.

    Raises:
        EquationError: the shapes do not fit.
        ValueError: there are more than two operands.
    """
    if len(spec.inputs) > 2:
        raise ValueError(f"lower takes an einsum of one or two operands, got {spec}; make a plan and use lower_plan")
    shapes = tuple(tuple(type_.shape) for type_ in types)
    step = Contraction(tuple(range(len(types))), spec, shapes, spec.output_shape(shapes), 0)
    return _lower(spec, (step,), types, strides, scale, machine=machine)


def lower_plan(
    plan: Plan,
    types: Sequence[TensorType],
    strides: Strides | None = None,
    scale: complex | None = None,
    saved_price: float = 0.0,
    machine: cost.Machine = cost.CPU,
) -> Program:
    """The calls for a whole plan.

    The order of the labels of each intermediate is free. A few layouts of each are kept, and the cheapest way through
    all steps is taken: dynamic programming over the tree.

    Args:
        plan: the plan.
        types: types of the plan's operands, as for ``lower``.
        strides: what is asked of the result's strides, if anything is.
        scale: factor of the result.
        saved_price: seconds that each element costs that autograd saves for the backward pass.
        machine: what the calls are to be fast on.
    """
    return _lower(plan.spec, plan.steps, types, strides, scale, saved_price, machine)


def _lower(
    spec: EinsumSpec,
    steps: Sequence[Contraction],
    types: Sequence[TensorType],
    strides: Strides | None,
    scale: complex | None,
    saved_price: float = 0.0,
    machine: cost.Machine = cost.CPU,
) -> Program:
    sizes = Sizes(spec.sizes([type_.shape for type_ in types]))
    if len(types) == 1:
        return _lower_single(spec, types[0], sizes, strides, scale)
    wanted = tuple(label if sizes[label] != 1 else "" for label in spec.output)
    operands = []
    for term, type_ in zip(spec.inputs, types, strict=True):
        dims = [label if size != 1 else "" for label, size in zip(term, type_.shape, strict=True)]
        operands.append(_operand(dims, type_.stride))
    follows = [type_.requires_grad for type_ in types]
    context = Context(sizes, types[0].dtype, any(follows), not types[0].is_on_processor, machine)
    layouts = [operand.layout for operand in operands]
    saving = Saving(saved_price) if saved_price else None
    choices = choose(context, steps, layouts, wanted, strides, follows, saving)
    return _write(context, steps, operands, choices, wanted, strides, scale)


class _Operand(NamedTuple):
    """An operand once its diagonals are taken.

    Attributes:
        diagonals: pairs of dimensions, each to be replaced by their diagonal, which comes last.
        layout: what that gives.
    """

    diagonals: tuple[tuple[int, int], ...]
    layout: Layout


def _operand(labels: Sequence[str], stride: Sequence[int]) -> _Operand:
    dims, strides = list(labels), list(stride)
    diagonals = []
    while repeated := next((label for label in dims if label and dims.count(label) > 1), None):
        first = dims.index(repeated)
        second = dims.index(repeated, first + 1)
        diagonals.append((first, second))
        dims.append(repeated)
        strides.append(strides[first] + strides[second])
        del dims[second], dims[first], strides[second], strides[first]
    return _Operand(tuple(diagonals), Layout(tuple(dims), tuple(strides)))


class _Writer:
    """Collects calls, and knows the layout of every value.

    Args:
        sizes: size of each label.
        n_operands: how many values there are before the first call.
        machine: what runs the calls.
    """

    def __init__(self, sizes: Sizes, n_operands: int, machine: cost.Machine = cost.CPU) -> None:
        self.sizes = sizes
        self.machine = machine
        self.n_operands = n_operands
        self.calls: list[Call] = []
        self.layouts: dict[int, Layout] = {}

    def call(self, target: str, value: int, *args: Any, layout: Layout, **kwargs: Any) -> int:
        """Write a call on ``value`` and note the layout of its result."""
        self.calls.append(Call(target, (Value(value), *args), tuple(kwargs.items())))
        number = self.n_operands + len(self.calls) - 1
        self.layouts[number] = layout
        return number

    def diagonals(self, value: int, operand: _Operand) -> int:
        """Take the diagonals of an operand."""
        for first, second in operand.diagonals:
            value = self.call("diagonal", value, 0, first, second, layout=operand.layout)
        self.layouts[value] = operand.layout
        return value

    def sum(self, value: int, lone: str) -> int:
        """Sum over labels."""
        dims = split_for_sum(self.layouts[value].dims, lone)
        if dims != self.layouts[value].dims:
            value = self.reshape(value, dims)
        places = tuple(place for place, dim in enumerate(dims) if dim and dim[0] in lone)
        return self.call("sum", value, places, layout=summed_layout(dims, lone, self.sizes))

    def permute(self, value: int, places: tuple[int, ...]) -> int:
        """Permute dimensions."""
        layout = self.layouts[value]
        moved = Layout(tuple(layout.dims[i] for i in places), tuple(layout.strides[i] for i in places))
        return self.call("permute", value, places, layout=moved)

    def expand(self, value: int, over: str) -> int:
        """Repeat a matrix over labels, as the first dimension of a batch."""
        layout = self.layouts[value]
        expanded = Layout((over, *layout.dims), (0, *layout.strides))
        return self.call("expand", value, shape_of(expanded.dims, self.sizes), layout=expanded)

    def reshape(self, value: int, groups: tuple[str, ...]) -> int:
        """Merge and split dimensions, the order of the labels staying as it is."""
        result = view_of(self.layouts[value], groups, self.sizes)
        if result is None:
            # Generated code copies in loops over the dimensions before they are merged, or divides the number of each
            # element by the sizes of those that are. (``ccsd_t1_wmnij`` with gradients: 780 us, 610 without these.)
            value = self.contiguous(value) if self.machine.generates else value
            result = contiguous_layout(groups, self.sizes)
        return self.call("reshape", value, shape_of(groups, self.sizes), layout=result)

    def arrange(self, value: int, groups: tuple[str, ...]) -> int:
        """Make the dimensions those groups of labels: views where possible."""
        layout = self.layouts[value]
        if layout.dims == groups:
            return value
        places = permutation_of(layout.dims, groups)
        if places is not None:
            return self.permute(value, places)
        if layout.labels == "".join(groups):
            return self.reshape(value, groups)
        middle = split_dims(layout.dims, groups)
        if middle != layout.dims:
            value = self.reshape(value, middle)
        reordered = reordered_dims(middle, groups)
        places = permutation_of(middle, reordered)
        assert places is not None
        value = self.permute(value, places)
        return value if reordered == groups else self.reshape(value, groups)

    def matrix(self, value: int, groups: tuple[str, ...]) -> int:
        """Arrange with the last two groups exchanged, and view them in their order: the copy on the way, for there is
        one, is then along another dimension.
        """
        value = self.contiguous(self.arrange(value, flipped(groups)))
        last = len(groups) - 1
        return self.permute(value, (*range(last - 1), last, last - 1))

    def slices(self, value: int, count: int) -> list[int]:
        """The slices along the first dimension."""
        layout = self.layouts[value]
        inner = Layout(layout.dims[1:], layout.strides[1:])
        together = self.call("unbind", value, 0, layout=layout)
        return [self.call(ITEM, together, place, layout=inner) for place in range(count)]

    def scaled(self, value: int, scale: complex | None) -> int:
        """Multiply by a number."""
        layout = self.layouts[value]
        shape = shape_of(layout.dims, self.sizes)
        strides = elementwise_strides(shape, ((shape, layout.strides), ((), ())))
        return self.call("mul", value, scale, layout=Layout(layout.dims, strides))

    def contiguous(self, value: int) -> int:
        """Copy a value unless it is contiguous."""
        layout = self.layouts[value]
        shape = shape_of(layout.dims, self.sizes)
        if is_contiguous(shape, layout.strides):
            return value
        blocked = len(shape) == 2 and min(shape) < _NARROW and math.prod(shape) >= _BLOCKED
        # Inductor lays out a copy as the original, whatever it is called, unless a view is taken of it.
        as_one = blocked or self.machine.generates
        value = self.reshape(value, ("", *layout.dims)) if as_one else value
        value = self.call("contiguous", value, layout=contiguous_layout(self.layouts[value].dims, self.sizes))
        return self.reshape(value, layout.dims) if as_one else value

    def finish(self, value: int, wanted: tuple[str, ...], strides: Strides | None) -> int:
        """Arrange the result, and copy it where its strides will not do."""
        if not is_finished(self.layouts[value], wanted, strides, self.sizes):
            value = self.contiguous(self.arrange(value, order_asked_for(wanted, strides, self.sizes)))
        if strides is None or not strides.exact:
            return self.arrange(value, wanted)
        return self.arrange_exactly(value, wanted, strides.stride)

    def arrange_exactly(self, value: int, wanted: tuple[str, ...], stride: tuple[int, ...]) -> int:
        """Make the dimensions those that are wanted, those of size 1 with the strides asked for where a view has them:
        in which order torch.einsum lays out its result depends on these.
        """
        layout, sizes = self.layouts[value], self.sizes
        if layout == Layout(wanted, stride) or all(wanted) or 0 in shape_of(wanted, sizes):
            return self.arrange(value, wanted)
        own = label_strides(layout, sizes)
        labels = memory_order(layout.labels, own)
        # See ``view_of``: the strides that a dimension of size 1 can have before each label, and behind the last.
        steps = [own[label] * sizes[label] for label in labels] + [own[labels[-1]] if labels else 1]
        before: list[list[int]] = [[] for _ in steps]
        for number in (number for number, dim in enumerate(wanted) if not dim):
            place = next((place for place, step in enumerate(steps) if step == stride[number]), None)
            if place is None:
                return self.arrange(value, wanted)
            before[place].append(number)
        order = [number for label, new in zip(labels, before) for number in (*new, wanted.index(label))] + before[-1]
        split = Layout(tuple(wanted[number] for number in order), tuple(stride[number] for number in order))
        if labels != layout.labels or split not in (layout, view_of(layout, split.dims, sizes)):
            value = self.arrange(value, tuple(labels))
        if split != self.layouts[value]:
            value = self.reshape(value, split.dims)
        places = tuple(map(order.index, range(len(wanted))))
        return value if places == tuple(range(len(wanted))) else self.permute(value, places)

    def program(self, value: int, seconds: float) -> Program:
        """The program whose result is ``value``, the last one."""
        layout = self.layouts[value]
        if value < self.n_operands:
            # The result must be another tensor than the operand, as every result of torch.einsum is.
            value = self.permute(value, tuple(range(len(layout.dims))))
        assert value == self.n_operands + len(self.calls) - 1
        shape = shape_of(layout.dims, self.sizes)
        return Program(self.n_operands, tuple(self.calls), shape, layout.strides, seconds)


def _lower_single(
    spec: EinsumSpec, type_: TensorType, sizes: Sizes, strides: Strides | None, scale: complex | None
) -> Program:
    """A single operand: diagonals, a sum, a permutation.

    Here dimensions of size 1 keep their labels, as a sum over one is a sum for torch.einsum too: its result is fresh,
    and of int64 where the operand has small integers.
    """
    operand = _operand(spec.inputs[0], type_.stride)
    writer = _Writer(sizes, 1)
    value = writer.diagonals(0, operand)
    if spec.summed:
        value = writer.sum(value, spec.summed)
    wanted = tuple(spec.output)
    if scale is not None:
        value = writer.scaled(writer.arrange(value, wanted), scale)
    if strides is not None:
        # Nothing is summed any more: now they may be moved on their own.
        layout = writer.layouts[value]
        dims, wanted = (tuple(label if sizes[label] != 1 else "" for label in each) for each in (layout.dims, wanted))
        writer.layouts[value] = Layout(dims, layout.strides)
    value = writer.finish(value, wanted, strides)
    before, after = math.prod(type_.shape), sizes[spec.output]
    return writer.program(value, cost.sum_seconds(before, after, after) if spec.summed else cost.CPU.launch)


def _write(
    context: Context,
    steps: Sequence[Contraction],
    operands: Sequence[_Operand],
    choices: Sequence[Sequence[Choice]],
    wanted: tuple[str, ...],
    strides: Strides | None,
    scale: complex | None,
) -> Program:
    n = len(operands)
    picked = {n + len(steps) - 1: 0}
    for number in reversed(range(len(steps))):
        children = choices[n + number][picked[n + number]].children
        picked.update(zip(steps[number].operands, children, strict=True))
    ways = [choices[n + number][picked[n + number]].way for number in range(len(steps))]
    place = None if scale is None else _place_of_factor(context, steps, operands, ways, scale)
    writer = _Writer(context.sizes, n, context.machine)
    values: list[int] = []
    for number, operand in enumerate(operands):
        # Calls on an operand are written just before its step, so that what they make lives no longer than needed.
        values.append(number)
        writer.layouts[number] = operand.layout
    for number, step in enumerate(steps):
        pair = []
        for operand_number in step.operands:
            value = values[operand_number]
            if operand_number < n:
                value = writer.diagonals(value, operands[operand_number])
                value = writer.contiguous(value) if picked[operand_number] else value
            pair.append(writer.scaled(value, scale) if place == _Place("value", operand_number) else value)
        a, b = pair
        lone_a = lone_labels(writer.layouts[a], writer.layouts[b], step.spec.output)
        lone_b = lone_labels(writer.layouts[b], writer.layouts[a], step.spec.output)
        a = writer.sum(a, lone_a) if lone_a else a
        b = writer.sum(b, lone_b) if lone_b else b
        way = ways[number]
        assert way is not None
        alpha = scale if place == _Place("product", number) else None
        values.append(_write_way(writer, context, way, *((b, a) if way.swap else (a, b)), alpha))
    result = values[-1]
    if place == _Place("value", len(values) - 1):
        result = writer.scaled(result, scale)
    result = writer.finish(result, wanted, strides)
    return writer.program(result, choices[-1][0].seconds)


def _write_way(writer: _Writer, context: Context, way: Way, x: int, y: int, alpha: complex | None) -> int:
    sizes = writer.sizes
    x = writer.matrix(x, way.first) if way.flips[0] else writer.arrange(x, way.first)
    x = writer.contiguous(x) if way.copies[0] else x
    y = writer.matrix(y, way.second) if way.flips[1] else writer.arrange(y, way.second)
    y = writer.contiguous(y) if way.copies[1] else y
    if way.kind == "product":
        if way.over:
            x, y = (
                writer.expand(value, way.over) if len(writer.layouts[value].dims) == 2 else value for value in (x, y)
            )
        name = {(3, 3): "bmm", (2, 2): "mm", (2, 1): "mv", (1, 1): "dot"}[
            len(writer.layouts[x].dims), len(writer.layouts[y].dims)
        ]
        if alpha is None:
            return writer.call(name, x, Value(y), layout=way.result)
        # With beta=0 what is added is not even read.
        nothing = writer.call("new_empty", x, (), layout=Layout((), ()))
        added = {"mm": "addmm", "bmm": "baddbmm"}[name]
        return writer.call(added, nothing, Value(x), Value(y), layout=way.result, beta=0, alpha=alpha)
    if way.kind == "loop":
        return _write_loop(writer, way, x, y, context.follows)
    result = _product_layout(writer.layouts[x], writer.layouts[y], sizes)
    value = writer.call("mul", x, Value(y), layout=result)
    if way.kind != "multiply and sum":
        return writer.contiguous(value) if way.copied else value
    places = tuple(place for place, dim in enumerate(result.dims) if dim and dim in way.over)
    # torch sums small integers to int64, but a contraction keeps their type.
    keep = {} if context.dtype.is_floating_point or context.dtype.is_complex else {"dtype": context.dtype}
    return writer.call("sum", value, places, layout=summed_layout(result.dims, way.over, sizes), **keep)


def _write_loop(writer: _Writer, way: Way, x: int, y: int, follows: bool) -> int:
    terms = writer.sizes[way.over]
    (first, *others) = zip(writer.slices(x, terms), writer.slices(y, terms), strict=True)
    value = writer.call("mul", first[0], Value(first[1]), layout=way.result)
    for left, right in others:
        # Autograd keeps none of the sums, so they may be written over.
        if follows:
            # (The gradients of ``addcmul`` take twice the calls of those of ``mul``.)
            term = writer.call("mul", left, Value(right), layout=way.result)
            value = writer.call("add_", value, Value(term), layout=way.result)
        else:
            value = writer.call("addcmul_", value, Value(left), Value(right), layout=way.result)
    return value


def _product_layout(x: Layout, y: Layout, sizes: Sizes) -> Layout:
    rank = max(len(x.dims), len(y.dims))
    dims = tuple(
        one or two
        for one, two in zip(("",) * (rank - len(x.dims)) + x.dims, ("",) * (rank - len(y.dims)) + y.dims, strict=True)
    )
    described = tuple((shape_of(layout.dims, sizes), layout.strides) for layout in (x, y))
    return Layout(dims, elementwise_strides(shape_of(dims, sizes), described))


class _Place(NamedTuple):
    """Where a factor is applied.

    Attributes:
        kind: to a ``value``, or in the ``product`` of a step.
        number: of the value or step.
    """

    kind: str
    number: int


def _place_of_factor(
    context: Context,
    steps: Sequence[Contraction],
    operands: Sequence[_Operand],
    ways: Sequence[Way | None],
    scale: complex,
) -> _Place:
    """The value of a plan with the fewest elements, the last of those, if they are few, else a matrix product: its
    ``alpha`` is free. The result, where the factor's type or the range of a narrow type forbids another place.
    """
    counts = [context.sizes[operand.layout.labels] for operand in operands] + [step.size for step in steps]
    integer = not (context.dtype.is_floating_point or context.dtype.is_complex)
    promotes = (isinstance(scale, complex) and not context.dtype.is_complex) or (isinstance(scale, float) and integer)
    if promotes or context.dtype in NARROW or context.dtype is torch.bool:
        return _Place("value", len(counts) - 1)
    smallest = min(reversed(range(len(counts))), key=counts.__getitem__)
    if counts[smallest] >= _FREE_ALPHA:
        for number, way in reversed(list(enumerate(ways))):
            if way is not None and way.kind == "product" and len(way.result.dims) >= 2:
                return _Place("product", number)
    return _Place("value", smallest)
