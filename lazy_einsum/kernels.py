"""Lowering: from a contraction, or a plan of them, to the fewest direct calls of torch: ``lower``, ``lower_plan``.

All decisions are made on labels, sizes and strides: first the ways to contract each pair and the layouts that they give
are compared by the cost model, then the calls of the best are written. ``torch.einsum`` is never called; every call is
a method of ``Tensor`` that autograd, functorch and ``torch.fx`` know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import cost
from .layout import (
    Layout,
    Sizes,
    contiguous_layout,
    contiguous_run,
    elementwise_strides,
    group_strides,
    is_contiguous,
    label_strides,
    memory_order,
    merged_loops,
    product,
    reuse_distance,
    shape_of,
)
from .plan import Contraction, Plan
from .program import Call, Program, Value
from .signature import TensorType
from .spec import EinsumSpec

# Up to so many steps, how many layouts of each intermediate are kept until its consumer chooses.
_LAYOUTS = ((4, 8), (24, 4), (math.inf, 2))

# Elements from which on multiplying them costs more than the empty tensor that a product with a factor needs (0.9 us).
_FREE_ALPHA = 4096

# Products of these are not rounded before the sum by a matrix product, whose accumulator is wider.
_NARROW = frozenset({torch.float16, torch.bfloat16})
# A matrix product of bool is refused by torch.einsum: no other kernel may make it work.
_SUMMABLE = frozenset(
    {
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    }
)


def lower(
    spec: EinsumSpec, types: Sequence[TensorType], contiguous: bool = False, scale: complex | None = None
) -> Program:
    """The calls for an einsum of one or two operands.

    The result is a view where that of ``torch.einsum`` is one, and fresh where that is. Integers come out exactly as
    there.

    Args:
        spec: the einsum.
        types: the operands' types; shape, strides, dtype and ``requires_grad`` are read.
        contiguous: the result must be contiguous.
        scale: factor of the result, applied where that takes the fewest elements.

    Raises:
        EquationError: the shapes do not fit.
        ValueError: there are more than two operands.
    """
    if len(spec.inputs) > 2:
        raise ValueError(f"lower takes an einsum of one or two operands, got {spec}; make a plan and use lower_plan")
    shapes = tuple(tuple(type_.shape) for type_ in types)
    step = Contraction(tuple(range(len(types))), spec, shapes, spec.output_shape(shapes), 0)
    return _lower(spec, (step,), types, contiguous, scale)


def lower_plan(
    plan: Plan, types: Sequence[TensorType], contiguous: bool = False, scale: complex | None = None
) -> Program:
    """The calls for a whole plan.

    The order of the labels of each intermediate is free. A few layouts of each are kept, and the cheapest way through
    all steps is taken: dynamic programming over the tree.

    Args:
        plan: the plan.
        types: types of the plan's operands, as for ``lower``.
        contiguous: the result must be contiguous.
        scale: factor of the result.
    """
    return _lower(plan.spec, plan.steps, types, contiguous, scale)


def _lower(
    spec: EinsumSpec, steps: Sequence[Contraction], types: Sequence[TensorType], contiguous: bool, scale: complex | None
) -> Program:
    sizes = spec.sizes([type_.shape for type_ in types])
    if len(types) == 1:
        return _lower_single(spec, types[0], sizes, contiguous, scale)
    wanted = tuple(label if sizes[label] != 1 else "" for label in spec.output)
    operands = []
    for term, type_ in zip(spec.inputs, types, strict=True):
        dims = [label if size != 1 else "" for label, size in zip(term, type_.shape, strict=True)]
        operands.append(_operand(dims, type_.stride))
    context = _Context(sizes, types[0].dtype, any(type_.requires_grad for type_ in types))
    choices = _choose(context, steps, [operand.layout for operand in operands], wanted, contiguous)
    return _write(context, steps, operands, choices, wanted, contiguous, scale)


class _Context(NamedTuple):
    """What all steps of a lowering share.

    Attributes:
        sizes: size of each label.
        dtype: of the operands.
        grad: whether gradients will be asked for.
    """

    sizes: Sizes
    dtype: torch.dtype
    grad: bool


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


# --- choosing ---------------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """One way to contract two tensors.

    Attributes:
        kind: ``product`` (mm, bmm, mv or dot), ``multiply``, ``copy and multiply``, or ``multiply and sum``.
        swap: the operands change places.
        first: groups of labels that the first operand is viewed as, or copied to.
        second: the same of the second operand.
        over: labels over which the operand that is a matrix is expanded to be a batch (``product``), or that are
            summed (``multiply and sum``).
        result: what comes out.
        seconds: modelled time of all of it.
        flips: which operands are copied with the last two groups exchanged, and viewed with them exchanged back.
    """

    kind: str
    swap: bool
    first: tuple[str, ...]
    second: tuple[str, ...]
    over: str
    result: Layout
    seconds: float
    flips: tuple[bool, bool] = (False, False)


class _Choice(NamedTuple):
    """A value of a plan in one of its layouts.

    Attributes:
        layout: the layout.
        seconds: modelled time to get there, children included.
        way: how; ``None`` for an operand.
        children: which choices of the step's operands it takes.
    """

    layout: Layout
    seconds: float
    way: _Way | None = None
    children: tuple[int, int] = (0, 0)


def _choose(
    context: _Context,
    steps: Sequence[Contraction],
    operands: Sequence[Layout],
    wanted: tuple[str, ...],
    contiguous: bool,
) -> list[list[_Choice]]:
    """For each value of the plan the layouts worth keeping, cheapest first."""
    choices = [[_Choice(layout, 0.0)] for layout in operands]
    keep = next(kept for limit, kept in _LAYOUTS if len(steps) <= limit)
    hints = _hints(steps, operands, wanted)
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        # Results that lie in memory alike are the same to the consumer, whatever the order of their dimensions.
        best: dict[tuple[tuple[str, int], ...], _Choice] = {}
        left, right = step.operands
        for i, a in enumerate(choices[left]):
            for j, b in enumerate(choices[right]):
                one, two, spent = _after_sums(context, a.layout, b.layout, step.spec.output)
                spent += a.seconds + b.seconds
                for way in _ways(context, one, two, step.spec.output, hints[number]):
                    total = spent + way.seconds
                    if last:
                        total += _finish_seconds(context, way.result, wanted, contiguous)
                    place = tuple(sorted(label_strides(way.result, context.sizes).items()))
                    known = best.get(place)
                    if known is None or total < known.seconds:
                        best[place] = _Choice(way.result, total, way, (i, j))
        ranked = sorted(best.values(), key=lambda choice: choice.seconds)
        choices.append(ranked[: 1 if last else keep])
    return choices


def _hints(steps: Sequence[Contraction], operands: Sequence[Layout], wanted: tuple[str, ...]) -> list[str]:
    """For each step an order of all labels that its consumers would like: first the labels that the next contraction
    sums, as its other operand has them, last those of the whole result.
    """
    final = "".join(wanted)
    n = len(operands)
    consumer = {operand: step for step in steps for operand in step.operands}
    hints = []
    for number in range(len(steps)):
        step = consumer.get(n + number)
        other = ""
        if step is not None:
            partner = step.operands[0] if step.operands[1] == n + number else step.operands[1]
            other = operands[partner].labels if partner < n else ""
        hints.append(final + "".join(label for label in other if label not in final))
    return hints


def _lone(one: Layout, two: Layout, output: str) -> str:
    """Labels of ``one`` that are in neither ``two`` nor the output."""
    others = two.labels + output
    return "".join(label for label in one.labels if label not in others)


def _after_sums(context: _Context, a: Layout, b: Layout, output: str) -> tuple[Layout, Layout, float]:
    """Both operands without the labels that only one of them has, and the time that takes."""
    spent = 0.0
    sizes = context.sizes
    results = []
    for one, two in ((a, b), (b, a)):
        lone = _lone(one, two, output)
        if lone:
            before = product(one.labels, sizes)
            split = _split_for_sum(one.dims, lone)
            spent += cost.CPU.launch * (split != one.dims)
            innermost = bool(split[-1]) and split[-1][-1] in lone
            one = _summed(split, lone, sizes)
            spent += cost.sum_seconds(before, product(one.labels, sizes), innermost)
        results.append(one)
    return results[0], results[1], spent


def _split_for_sum(dims: tuple[str, ...], lone: str) -> tuple[str, ...]:
    """The dimensions, those that only a part of is summed split into labels."""
    split: list[str] = []
    for dim in dims:
        there = sum(label in lone for label in dim)
        split.extend(dim if 0 < there < len(dim) else (dim,))
    return tuple(split)


def _summed(dims: tuple[str, ...], lone: str, sizes: Sizes) -> Layout:
    return contiguous_layout([dim for dim in dims if not dim or dim[0] not in lone], sizes)


def _finish_seconds(context: _Context, result: Layout, wanted: tuple[str, ...], contiguous: bool) -> float:
    """Time to bring the result into the order that was asked for."""
    sizes = context.sizes
    strides = label_strides(result, sizes)
    seconds = cost.CPU.launch * _arrange_calls(result, wanted)
    order = "".join(wanted)
    if contiguous and not is_contiguous(shape_of(order, sizes), [strides[label] for label in order]):
        seconds += _copy_seconds(order, strides, sizes)
    return seconds


def _ways(context: _Context, a: Layout, b: Layout, output: str, hint: str) -> Iterator[_Way]:
    """Ways to contract two tensors that share no lone label, the result being in any order."""
    sizes = context.sizes
    in_a, in_b = a.labels, b.labels
    common = [label for label in in_a if label in in_b]
    batch = "".join(label for label in common if label in output)
    summed = "".join(label for label in common if label not in output)
    rows = "".join(label for label in in_a if label not in in_b)
    columns = "".join(label for label in in_b if label not in in_a)
    sa, sb = label_strides(a, sizes), label_strides(b, sizes)
    if not summed:
        yield from _multiply_ways(context, a, b, sa, sb, hint)
        return
    if context.dtype in _SUMMABLE and (batch or (rows and columns)):
        way = _multiply_sum_way(context, a, b, sa, sb, (batch, rows, columns, summed))
        if way is not None:
            yield way
    batches = _distinct(memory_order(batch, sa), memory_order(batch, sb), _by_hint(batch, hint))
    sums = _distinct(memory_order(summed, sa), memory_order(summed, sb))
    for swap in (False, True):
        x, y, sx, sy, m, n = (b, a, sb, sa, columns, rows) if swap else (a, b, sa, sb, rows, columns)
        if not m and (swap if not n else not batch):
            # Without a batch a vector has no other side; without any rows and columns neither has one.
            continue
        row_orders = _distinct(memory_order(m, sx), _by_hint(m, hint))
        column_orders = _distinct(memory_order(n, sy), _by_hint(n, hint))
        for order in batches:
            for along in sums:
                for row in row_orders:
                    for column in column_orders:
                        yield _product_way(context, swap, x, y, sx, sy, order, row, column, along)
        if not batch and context.dtype is not torch.bool and not (context.grad and context.dtype.is_floating_point):
            yield from _loop_ways(context, swap, x, y, sx, sy, m, n, sums)


def _distinct(*orders: str) -> list[str]:
    return list(dict.fromkeys(orders))


def _by_hint(labels: str, hint: str) -> str:
    return "".join(sorted(labels, key=lambda label: hint.find(label)))


def _loop_ways(
    context: _Context,
    swap: bool,
    x: Layout,
    y: Layout,
    sx: dict[str, int],
    sy: dict[str, int],
    m: str,
    n: str,
    sums: list[str],
) -> Iterator[_Way]:
    """Labels of the first operand that lie outside the summed ones in memory become a batch over which the second
    operand is expanded: no copy where rows on both sides of the sum can't be merged.

    Not under autograd: the gradient of an expanded operand is first made for each of the batch, then summed.
    """
    for along in sums:
        limit = max(sx[label] for label in along)
        order = memory_order(m, sx)
        loop = "".join(label for label in order if sx[label] > limit)
        rest = "".join(label for label in order if label not in loop)
        if loop and rest:
            columns = memory_order(n, sy)
            yield _product_way(context, swap, x, y, sx, sy, "", rest, columns, along, loop)
            yield _product_way(context, not swap, y, x, sy, sx, "", columns, rest, along, loop, expand_first=True)


def _product_way(
    context: _Context,
    swap: bool,
    x: Layout,
    y: Layout,
    sx: dict[str, int],
    sy: dict[str, int],
    batch: str,
    rows: str,
    columns: str,
    summed: str,
    loop: str = "",
    expand_first: bool = False,
) -> _Way:
    sizes = context.sizes
    b, m, n, k = (product(group, sizes) for group in (batch + loop, rows, columns, summed))
    # torch.einsum makes all its matrix products by bmm, which refuses bool in another way than mm and dot.
    batched = bool(batch or loop) or context.dtype is torch.bool
    naive = batched and m * n * k < cost.CPU.small_products
    # Vectors stay vectors for mv and dot, except where those would accumulate in the narrow type.
    vector = not batched and context.dtype not in _NARROW
    first = ((rows,) if rows or not vector else ()) + (summed,)
    second = (summed,) + ((columns,) if columns or not vector else ())
    dims = first[:-1] + second[1:]
    if batched:
        dims = (batch + loop, *dims)
        first = first if loop and expand_first else (batch + loop, *first)
        second = second if loop and not expand_first else (batch + loop, *second)
    left, right = _matrix(x, first, sx, sizes, naive), _matrix(y, second, sy, sizes, naive)
    along = right.strides[len(second) - 2] if len(second) > 1 else 1
    seconds = left.seconds + right.seconds + cost.CPU.launch * bool(loop)
    seconds += cost.product_seconds(b, m, n, k, left.strides[-1] == 1, along == 1)
    if not (context.dtype.is_floating_point or context.dtype.is_complex):
        # Products of integers run in plain loops of any size.
        seconds += b * m * n * k * 0.8e-9
    result = contiguous_layout(dims, sizes)
    return _Way("product", swap, first, second, loop, result, seconds, (left.flip, right.flip))


class _Matrix(NamedTuple):
    """An operand of a matrix product.

    Attributes:
        seconds: time to view it as a matrix or a batch of them, or to copy it.
        strides: its strides then.
        flip: it is copied with the last two dimensions exchanged, and viewed with them exchanged back.
    """

    seconds: float
    strides: tuple[int, ...]
    flip: bool


def _matrix(layout: Layout, groups: tuple[str, ...], strides: dict[str, int], sizes: Sizes, naive: bool) -> _Matrix:
    """A view where one exists with a contiguous dimension in the matrix: else the product would copy it itself."""
    launches = cost.CPU.launch * _arrange_calls(layout, groups)
    found = group_strides(groups, strides, sizes)
    if found is not None:
        shape = shape_of(groups[-2:], sizes)
        inner = found[-2:]
        if naive or len(shape) < 2 or 1 in shape:
            return _Matrix(launches, found, False)
        if (inner[1] == 1 and inner[0] >= shape[1]) or (inner[0] == 1 and inner[1] >= shape[0]):
            return _Matrix(launches, found, False)
    straight = launches + _copy_seconds("".join(groups), strides, sizes)
    if len(groups) > 1 and groups[-1] and groups[-2]:
        other = _flipped(groups)
        crossed = launches + _copy_seconds("".join(other), strides, sizes)
        # Also where a view exists, as the product's own copy is the straight one.
        if crossed + cost.CPU.launch < straight:
            *outer, row, column = contiguous_layout(other, sizes).strides
            return _Matrix(crossed + cost.CPU.launch, (*outer, column, row), True)
    return _Matrix(straight, found or contiguous_layout(groups, sizes).strides, False)


def _flipped(groups: tuple[str, ...]) -> tuple[str, ...]:
    return (*groups[:-2], groups[-1], groups[-2])


def _walk_seconds(order: str, tensors: Sequence[dict[str, int]], sizes: Sizes) -> float:
    """Time of an elementwise call that walks the labels in this order."""
    loops = merged_loops(order, tensors, sizes) or [1]
    elements = math.prod(loops)
    tile = max(math.prod(loops[-2:]), 1)
    strided, distance, n_elements = False, 1, elements
    for strides in tensors:
        own = "".join(label for label in order if label in strides)
        n_elements += product(own, sizes)
        distance = max(distance, reuse_distance(own, strides, sizes))
        strided = strided or bool(own and order[-1] in strides and strides[order[-1]] > 1)
    rows = elements // max(loops[-1], 1)
    return cost.walk_seconds(elements, rows, elements // tile, strided, distance, cost.ITEM * n_elements)


def _copy_seconds(order: str, strides: dict[str, int], sizes: Sizes) -> float:
    """Time to copy a tensor so that it is contiguous when its labels are walked in this order."""
    return _walk_seconds(order, (strides,), sizes)


def _multiply_ways(
    context: _Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], hint: str
) -> Iterator[_Way]:
    """Elementwise products. The order of the result is that of one of the operands, or the hint, or one in which labels
    of both operands come first or last, as the next matrix product may want; operands that are small next to the result
    may be copied to get it.
    """
    sizes = context.sizes
    in_a, in_b = memory_order(a.labels, sa), memory_order(b.labels, sb)
    rows = "".join(label for label in in_a if label not in in_b)
    columns = "".join(label for label in in_b if label not in in_a)
    common = "".join(label for label in in_a if label in in_b)
    orders = _distinct(
        in_a + columns,
        in_b + rows,
        _by_hint(in_a + columns, hint),
        common + rows + columns,
        common + columns + rows,
        rows + columns + common,
        columns + rows + common,
    )
    counts = product(a.labels, sizes), product(b.labels, sizes)
    elements = product(orders[0], sizes)
    for order in orders:
        first, second = _aligned(order, a), _aligned(order, b)
        runs = [
            contiguous_run("".join(label for label in order if label in strides), strides, sizes)
            for strides in (sa, sb)
        ]
        # The operand that lies in memory as the result is read decides how the result lies.
        swap = counts[1] * min(runs[1], 16) > counts[0] * min(runs[0], 16)
        x, y = (second, first) if swap else (first, second)
        sx, sy = (sb, sa) if swap else (sa, sb)
        result = _broadcast(order, [(x, sx), (y, sy)], sizes)
        seconds = cost.CPU.launch * (_arrange_calls(a, first) + _arrange_calls(b, second))
        strides = label_strides(result, sizes)
        yield _Way(
            "multiply",
            swap,
            x,
            y,
            "",
            result,
            seconds + _walk_seconds(memory_order(order, strides), (sa, sb, strides), sizes),
        )
        wanted = contiguous_layout(tuple(order), sizes)
        if result != wanted and 4 * max(counts) <= elements:
            own = ["".join(label for label in order if label in strides) for strides in (sa, sb)]
            seconds += _copy_seconds(own[0], sa, sizes) + _copy_seconds(own[1], sb, sizes)
            copied = [label_strides(contiguous_layout(tuple(labels), sizes), sizes) for labels in own]
            seconds += _walk_seconds(order, (*copied, label_strides(wanted, sizes)), sizes)
            yield _Way("copy and multiply", swap, x, y, "", wanted, seconds)


def _aligned(order: str, layout: Layout) -> tuple[str, ...]:
    """Dimensions of an operand that broadcast to ``order``: one for each label, none before the first it has."""
    groups = [label if label in layout.labels else "" for label in order]
    while groups and not groups[0]:
        del groups[0]
    if not groups:
        # A scalar broadcasts from any number of dimensions of size 1 that the other operand has too.
        return layout.dims if len(layout.dims) <= len(order) else ()
    return tuple(groups)


def _broadcast(order: str, operands: Sequence[tuple[tuple[str, ...], dict[str, int]]], sizes: Sizes) -> Layout:
    shape = shape_of(order, sizes)
    described = []
    for groups, strides in operands:
        described.append((shape_of(groups, sizes), tuple(strides[group] if group else 1 for group in groups)))
    return Layout(tuple(order), elementwise_strides(shape, described))


def _multiply_sum_way(
    context: _Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], groups: tuple[str, str, str, str]
) -> _Way | None:
    """The product of all elements, then a sum. Only while what lies between them stays in the cache."""
    sizes = context.sizes
    batch, rows, columns, summed = groups
    elements = product(batch + rows + columns + summed, sizes)
    if elements * cost.ITEM > cost.CPU.cache:
        return None
    rows, columns = memory_order(rows, sa), memory_order(columns, sb)
    batch, summed = memory_order(batch, sa), memory_order(summed, sa)
    # A sum over a dimension that is not the innermost adds whole vectors.
    inner, outer = (columns, rows) if columns else (rows, columns)
    order = batch + outer + summed + inner
    first, second = _aligned(order, a), _aligned(order, b)
    whole = label_strides(contiguous_layout(tuple(order), sizes), sizes)
    seconds = _walk_seconds(order, (sa, sb, whole), sizes)
    seconds += cost.sum_seconds(elements, elements // max(product(summed, sizes), 1), not inner)
    seconds += cost.CPU.launch * (_arrange_calls(a, first) + _arrange_calls(b, second))
    dims = tuple(label for label in order if label not in summed)
    return _Way("multiply and sum", False, first, second, summed, contiguous_layout(dims, sizes), seconds)


def _arrange_calls(layout: Layout, groups: tuple[str, ...]) -> int:
    """How many calls ``_Writer.arrange`` will write."""
    if layout.dims == groups:
        return 0
    if _moves(layout.dims, groups) is not None or layout.labels == "".join(groups):
        return 1
    middle = _coarsest(layout.dims, groups)
    return (middle != layout.dims) + 1 + (tuple(group for group in _reordered(middle, groups)) != groups)


def _moves(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[int, ...] | None:
    """The permutation of ``dims`` that gives ``groups``, if there is one."""
    if len(dims) != len(groups):
        return None
    places: list[int] = []
    for group in groups:
        place = next((i for i, dim in enumerate(dims) if dim == group and i not in places), None)
        if place is None:
            return None
        places.append(place)
    return tuple(places)


def _coarsest(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[str, ...]:
    """The dimensions, split as far as needed for a permutation to bring the labels into the order of the groups."""
    order = "".join(groups)
    if all(dim in order for dim in dims):
        return dims
    split: list[str] = []
    for dim in dims:
        if dim in order:
            split.append(dim)
        else:
            split.extend(dim)
    return tuple(split)


def _reordered(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[str, ...]:
    order = "".join(groups)
    return tuple(sorted((dim for dim in dims if dim), key=order.find)) + tuple(dim for dim in dims if not dim)


# --- writing ----------------------------------------------------------------------------------------------------------


class _Writer:
    """Collects calls, and knows the layout of every value."""

    def __init__(self, sizes: Sizes, n_operands: int) -> None:
        self.sizes = sizes
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
        dims = _split_for_sum(self.layouts[value].dims, lone)
        if dims != self.layouts[value].dims:
            value = self.reshape(value, dims)
        places = tuple(place for place, dim in enumerate(dims) if dim and dim[0] in lone)
        return self.call("sum", value, places, layout=_summed(dims, lone, self.sizes))

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
        layout = self.layouts[value]
        strides = group_strides(groups, label_strides(layout, self.sizes), self.sizes)
        result = contiguous_layout(groups, self.sizes) if strides is None else Layout(groups, strides)
        return self.call("reshape", value, shape_of(groups, self.sizes), layout=result)

    def arrange(self, value: int, groups: tuple[str, ...]) -> int:
        """Make the dimensions those groups of labels: views where possible."""
        layout = self.layouts[value]
        if layout.dims == groups:
            return value
        places = _moves(layout.dims, groups)
        if places is not None:
            return self.permute(value, places)
        if layout.labels == "".join(groups):
            return self.reshape(value, groups)
        middle = _coarsest(layout.dims, groups)
        if middle != layout.dims:
            value = self.reshape(value, middle)
        reordered = _reordered(middle, groups)
        places = _moves(middle, reordered)
        assert places is not None
        value = self.permute(value, places)
        return value if reordered == groups else self.reshape(value, groups)

    def matrix(self, value: int, groups: tuple[str, ...]) -> int:
        """Arrange with the last two groups exchanged, and view them in their order: the copy on the way, for there is
        one, is then along another dimension.
        """
        value = self.contiguous(self.arrange(value, _flipped(groups)))
        last = len(groups) - 1
        return self.permute(value, (*range(last - 1), last, last - 1))

    def scaled(self, value: int, scale: complex | None) -> int:
        """Multiply by a number."""
        layout = self.layouts[value]
        shape = shape_of(layout.dims, self.sizes)
        strides = elementwise_strides(shape, [(shape, layout.strides)])
        return self.call("mul", value, scale, layout=Layout(layout.dims, strides))

    def contiguous(self, value: int) -> int:
        """Copy a value unless it is contiguous."""
        layout = self.layouts[value]
        if is_contiguous(shape_of(layout.dims, self.sizes), layout.strides):
            return value
        return self.call("contiguous", value, layout=contiguous_layout(layout.dims, self.sizes))

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
    spec: EinsumSpec, type_: TensorType, sizes: Sizes, contiguous: bool, scale: complex | None
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
    value = writer.arrange(value, tuple(spec.output))
    if scale is not None:
        value = writer.scaled(value, scale)
    if contiguous:
        value = writer.contiguous(value)
    before, after = math.prod(type_.shape), product(spec.output, sizes)
    return writer.program(value, cost.sum_seconds(before, after, False) if spec.summed else cost.CPU.launch)


def _write(
    context: _Context,
    steps: Sequence[Contraction],
    operands: Sequence[_Operand],
    choices: Sequence[Sequence[_Choice]],
    wanted: tuple[str, ...],
    contiguous: bool,
    scale: complex | None,
) -> Program:
    n = len(operands)
    picked = {n + len(steps) - 1: 0}
    for number in reversed(range(len(steps))):
        children = choices[n + number][picked[n + number]].children
        picked.update(zip(steps[number].operands, children, strict=True))
    ways = [choices[n + number][picked[n + number]].way for number in range(len(steps))]
    place = None if scale is None else _place_of_factor(context, steps, operands, ways, scale)
    writer = _Writer(context.sizes, n)
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
            pair.append(writer.scaled(value, scale) if place == _Place("value", operand_number) else value)
        a, b = pair
        lone_a = _lone(writer.layouts[a], writer.layouts[b], step.spec.output)
        lone_b = _lone(writer.layouts[b], writer.layouts[a], step.spec.output)
        a = writer.sum(a, lone_a) if lone_a else a
        b = writer.sum(b, lone_b) if lone_b else b
        way = ways[number]
        assert way is not None
        alpha = scale if place == _Place("product", number) else None
        values.append(_write_way(writer, context, way, *((b, a) if way.swap else (a, b)), alpha))
    result = values[-1]
    if place == _Place("value", len(values) - 1):
        result = writer.scaled(result, scale)
    result = writer.arrange(result, wanted)
    if contiguous:
        result = writer.contiguous(result)
    return writer.program(result, choices[-1][0].seconds)


def _write_way(writer: _Writer, context: _Context, way: _Way, x: int, y: int, alpha: complex | None) -> int:
    sizes = writer.sizes
    x = writer.matrix(x, way.first) if way.flips[0] else writer.arrange(x, way.first)
    y = writer.matrix(y, way.second) if way.flips[1] else writer.arrange(y, way.second)
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
    if way.kind == "copy and multiply":
        x, y = writer.contiguous(x), writer.contiguous(y)
    result = _product_layout(writer.layouts[x], writer.layouts[y], sizes)
    value = writer.call("mul", x, Value(y), layout=result)
    if way.kind != "multiply and sum":
        return value
    places = tuple(place for place, dim in enumerate(result.dims) if dim and dim in way.over)
    # torch sums small integers to int64, but a contraction keeps their type.
    keep = {} if context.dtype.is_floating_point or context.dtype.is_complex else {"dtype": context.dtype}
    return writer.call("sum", value, places, layout=_summed(result.dims, way.over, sizes), **keep)


def _product_layout(x: Layout, y: Layout, sizes: Sizes) -> Layout:
    rank = max(len(x.dims), len(y.dims))
    dims = tuple(
        one or two
        for one, two in zip(("",) * (rank - len(x.dims)) + x.dims, ("",) * (rank - len(y.dims)) + y.dims, strict=True)
    )
    described = [(shape_of(layout.dims, sizes), layout.strides) for layout in (x, y)]
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
    context: _Context,
    steps: Sequence[Contraction],
    operands: Sequence[_Operand],
    ways: Sequence[_Way | None],
    scale: complex,
) -> _Place:
    """The value of a plan with the fewest elements, the last of those, if they are few, else a matrix product: its
    ``alpha`` is free. The result, where the factor's type or the range of a narrow type forbids another place.
    """
    counts = [product(operand.layout.labels, context.sizes) for operand in operands] + [step.size for step in steps]
    integer = not (context.dtype.is_floating_point or context.dtype.is_complex)
    promotes = (isinstance(scale, complex) and not context.dtype.is_complex) or (isinstance(scale, float) and integer)
    if promotes or context.dtype in _NARROW or context.dtype is torch.bool:
        return _Place("value", len(counts) - 1)
    smallest = min(reversed(range(len(counts))), key=counts.__getitem__)
    if counts[smallest] >= _FREE_ALPHA:
        for number, way in reversed(list(enumerate(ways))):
            if way is not None and way.kind == "product" and len(way.result.dims) >= 2:
                return _Place("product", number)
    return _Place("value", smallest)
