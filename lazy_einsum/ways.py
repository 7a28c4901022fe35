"""Ways to contract two tensors: by which kernel, in which order of labels, at what cost. Only labels and strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import cost
from .layout import (
    Layout,
    Sizes,
    contiguous_layout,
    contiguous_run,
    count_calls,
    elementwise_strides,
    group_strides,
    inner_size,
    label_strides,
    memory_order,
    merged_loops,
    reuse_distance,
    shape_of,
)
from .sizes import is_symbolic

THIN = 16
"""Matrices of fewer rows are worth a copy that makes their product faster."""

_MANY = 2**12
"""With more elements the layout of a gradient makes more of a difference than looking for a better one costs."""

SHORT = 9
"""Sums of at most so many terms may be written out."""

# How many times as large as the largest of both operands and the result a product may be that generated code sums.
_MOST_TIMES = 4

# Products of these are not rounded before the sum by a matrix product, whose accumulator is wider.
NARROW = frozenset({torch.float16, torch.bfloat16})
_ADDABLE = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})

# A matrix product of bool is refused by torch.einsum: no other kernel may make it work.
_SUMMABLE = frozenset(
    {
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    }
)


@dataclass(frozen=True, slots=True)
class Context:
    """What all steps of a lowering share.

    Attributes:
        sizes: size of each label.
        dtype: of the operands.
        follows: autograd follows an operand.
        few_calls: each call has its price on a device of its own (5 us on CUDA), where a whole product may take no
            longer: no sum is written out in several calls, and nothing is copied for the processor's kernels.
        machine: what runs the calls.
        views: what ``matrix_view`` gave for operands so far: most are seen again, beside other layouts of the other
            operand or of the result.
    """

    sizes: Sizes
    dtype: torch.dtype
    follows: bool = False
    few_calls: bool = False
    machine: cost.Machine = cost.CPU
    views: dict[tuple[Layout, tuple[str, ...], bool, bool], Matrix] = field(default_factory=dict)


class Way(NamedTuple):
    """One way to contract two tensors.

    Attributes:
        kind: ``product`` (mm, bmm, mv or dot), ``multiply``, ``multiply and sum``, or ``loop`` (one elementwise product
            for each value of the summed labels, added up in place).
        swap: the operands change places.
        first: groups of labels that the first operand is viewed as, or copied to.
        second: the same of the second operand.
        over: labels over which the operand that is a matrix is expanded to be a batch (``product``), or that are
            summed (``multiply and sum``, and ``loop``, whose operands have them first).
        result: what comes out.
        seconds: modelled time of all of it.
        strides: of both operands as the kernel takes them.
        calls: how many calls make each operand that, copies apart.
        flips: which operands are copied with the last two groups exchanged, and viewed with them exchanged back.
        copies: which operands are copied to be contiguous in the dimensions that they are viewed as.
        copied: the result is copied to be contiguous.
    """

    kind: str
    swap: bool
    first: tuple[str, ...]
    second: tuple[str, ...]
    over: str
    result: Layout
    seconds: float
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    calls: tuple[int, int]
    flips: tuple[bool, bool] = (False, False)
    copies: tuple[bool, bool] = (False, False)
    copied: bool = False


def lone_labels(one: Layout, two: Layout, output: str) -> str:
    """Labels of ``one`` that are in neither ``two`` nor the output."""
    others = two.labels + output
    return "".join(label for label in one.labels if label not in others)


def after_sums(context: Context, a: Layout, b: Layout, output: str) -> tuple[Layout, Layout, float]:
    """Both operands without the labels that only one of them has, and the time that takes."""
    spent = 0.0
    sizes = context.sizes
    results = []
    for one, two in ((a, b), (b, a)):
        lone = lone_labels(one, two, output)
        if lone:
            before = sizes[one.labels]
            split = split_for_sum(one.dims, lone)
            spent += context.machine.launch * (split != one.dims)
            inner = inner_size("".join(split), lone, sizes)
            one = summed_layout(split, lone, sizes)
            spent += cost.sum_seconds(before, sizes[one.labels], inner, context.machine)
        results.append(one)
    return results[0], results[1], spent


def split_for_sum(dims: tuple[str, ...], lone: str) -> tuple[str, ...]:
    """The dimensions, those that only a part of is summed split into labels."""
    split: list[str] = []
    for dim in dims:
        there = sum(label in lone for label in dim)
        split.extend(dim if 0 < there < len(dim) else (dim,))
    return tuple(split)


def summed_layout(dims: tuple[str, ...], lone: str, sizes: Sizes) -> Layout:
    """What is left after summing these labels, whose dimensions hold no others."""
    return contiguous_layout([dim for dim in dims if not dim or dim[0] not in lone], sizes)


def ways(context: Context, a: Layout, b: Layout, output: str, hint: str, ahead: str = "") -> Iterator[Way]:
    """Ways to contract two tensors that share no lone label, the result being in any order.

    Args:
        context: shared by all steps.
        a: the first operand.
        b: the second operand.
        output: labels of the result.
        hint: an order of labels that the rest of the plan would like.
        ahead: labels that the next contraction sums.
    """
    sizes = context.sizes
    in_a, in_b = a.labels, b.labels
    common = [label for label in in_a if label in in_b]
    batch = "".join(label for label in common if label in output)
    summed = "".join(label for label in common if label not in output)
    rows = "".join(label for label in in_a if label not in in_b)
    columns = "".join(label for label in in_b if label not in in_a)
    sa, sb = label_strides(a, sizes), label_strides(b, sizes)
    if not summed:
        yield from _multiply_ways(context, a, b, sa, sb, hint, ahead)
        return
    if context.dtype in _SUMMABLE and (batch or (rows and columns)) and not context.few_calls:
        yield from _multiply_sum_ways(context, a, b, sa, sb, (batch, rows, columns, summed))
    # Generated code stacks the gradients of slices in calls of their own. (``bcwi,bci->bcw``, 50 x 64 x 9 x 9, forward
    # and backward, Intel Xeon: 1,250 us, 540 as a product of matrices.)
    written_out = _is_short(summed, sizes) and not (context.machine.generates and context.follows)
    if context.dtype in _ADDABLE and (batch or rows or columns) and written_out and not context.few_calls:
        yield from _loop_sum_ways(context, a, b, sa, sb, (batch, rows, columns, summed), hint, ahead)
    batches = _distinct(memory_order(batch, sa), memory_order(batch, sb), _by_hint(batch, hint))
    sums = _distinct(memory_order(summed, sa), memory_order(summed, sb))
    # Gradients of these may have short rows, which takes long if there are many.
    k, lengths = sizes[summed], (sizes[rows], sizes[columns])
    narrow = context.follows and k * max(lengths) > _MANY and min(k, *lengths) < THIN
    for swap in (False, True):
        x, y, sx, sy, m, n = (b, a, sb, sa, columns, rows) if swap else (a, b, sa, sb, rows, columns)
        if not m and (swap if not n else not batch):
            # Without a batch a vector has no other side; without any rows and columns neither has one.
            if n and context.follows and sizes[summed] < context.machine.columns:
                # With gradients one row is faster than a vector where few are summed: the gradient of the matrix has
                # short rows else. (3 by 160,000: 330 us, 1,080 with a vector; 512 by 512: 136 and 109.)
                for along in sums:
                    for column in _distinct(memory_order(n, sy), _by_hint(n, hint)):
                        way = _product_way(context, swap, x, y, sx, sy, "", "", column, along, as_row=True)
                        yield way
                        if narrow and _is_turned(way):
                            yield _product_way(context, swap, x, y, sx, sy, "", "", column, along, batched=True)
            continue
        row_orders = _distinct(memory_order(m, sx), _by_hint(m, hint))
        column_orders = _distinct(memory_order(n, sy), _by_hint(n, hint))
        for order in batches:
            for along in sums:
                for row in row_orders:
                    for column in column_orders:
                        way = _product_way(context, swap, x, y, sx, sy, order, row, column, along)
                        yield way
                        if narrow and any(way.flips):
                            # A copy that is faster the other way round may give slower gradients.
                            yield _product_way(context, swap, x, y, sx, sy, order, row, column, along, straight=True)
                        if narrow and not order and _is_turned(way):
                            yield _product_way(context, swap, x, y, sx, sy, "", row, column, along, batched=True)
                        if not order and 1 < sizes[row] < THIN and sx[along[-1]] != 1 and not context.few_calls:
                            yield _product_way(context, swap, x, y, sx, sy, "", row, column, along, copy_first=True)
        if not batch and context.dtype is not torch.bool:
            yield from _loop_ways(context, swap, x, y, sx, sy, m, n, sums)


def _distinct(*orders: str) -> list[str]:
    return list(dict.fromkeys(orders))


def _by_hint(labels: str, hint: str) -> str:
    return "".join(sorted(labels, key=lambda label: hint.find(label)))


def _loop_ways(
    context: Context,
    swap: bool,
    x: Layout,
    y: Layout,
    sx: dict[str, int],
    sy: dict[str, int],
    m: str,
    n: str,
    sums: list[str],
) -> Iterator[Way]:
    """Labels of the first operand that lie outside the summed ones in memory become a batch over which the second
    operand is expanded: no copy where rows on both sides of the sum can't be merged.
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
    context: Context,
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
    copy_first: bool = False,
    as_row: bool = False,
    batched: bool = False,
    straight: bool = False,
) -> Way:
    sizes, machine = context.sizes, context.machine
    b, m, n, k = (sizes[group] for group in (batch + loop, rows, columns, summed))
    # torch.einsum makes all its matrix products by bmm, which refuses bool in another way than mm and dot.
    batched = batched or bool(batch or loop) or context.dtype is torch.bool
    # Vectors stay vectors for mv and dot, except where those would accumulate in the narrow type.
    vector = not batched and context.dtype not in NARROW and not as_row
    if machine.generates and (not vector or (rows and columns)):
        # Inductor copies what mm and another call take, views of copies above all, as a matrix: it divides the number
        # of each element by the sizes of the merged dimensions. What bmm takes it copies in loops over them.
        # (``ir_fctn`` with gradients, Intel Xeon: 190 ms, 420 by mm; ``tt_layer``: 2.4 and 3.4.)
        batched = True
    naive = batched and m * n * k < machine.small_products
    first = ((rows,) if rows or not vector else ()) + (summed,)
    second = (summed,) + ((columns,) if columns or not vector else ())
    dims = first[:-1] + second[1:]
    if batched:
        dims = (batch + loop, *dims)
        first = first if loop and expand_first else (batch + loop, *first)
        second = second if loop and not expand_first else (batch + loop, *second)
    left = _matrix(context, x, first, sx, naive, straight)
    right = _matrix(context, y, second, sy, naive, straight)
    if copy_first:
        # Few rows are cheap to bring into the order in which their product is fast.
        launches = machine.launch * (1 + count_calls(x, first))
        copied = copy_seconds("".join(first), sx, sizes, machine)
        left = Matrix(launches + copied, contiguous_layout(first, sizes).strides, left.calls, copy=True)
    along = right.strides[len(second) - 2] if len(second) > 1 else 1
    seconds = left.seconds + right.seconds + machine.launch * bool(loop)
    seconds += cost.product_seconds(b, m, n, k, left.strides[-1] == 1, along == 1, machine)
    if not (context.dtype.is_floating_point or context.dtype.is_complex):
        # Products of integers run in plain loops of any size.
        seconds += b * m * n * k * 0.8e-9
    result = contiguous_layout(dims, sizes)
    strides, calls = (left.strides, right.strides), (left.calls, right.calls)
    flips, copies = (left.flip, right.flip), (left.copy, right.copy)
    return Way("product", swap, first, second, loop, result, seconds, strides, calls, flips, copies)


def _is_turned(way: Way) -> bool:
    """Whether a matrix of a product lies column by column. Its gradient then comes so too, by a product whose rows may
    be short; that of a batch of one matrix does not. (26,312 by 3, times a vector: 82 us, 15 as a batch.)
    """
    pairs = zip((way.first, way.second), way.strides, strict=True)
    return any(len(groups) == 2 and strides[0] == 1 != strides[1] and "" not in groups for groups, strides in pairs)


class Matrix(NamedTuple):
    """An operand of a matrix product.

    Attributes:
        seconds: time to view it as a matrix or a batch of them, or to copy it.
        strides: its strides then.
        calls: how many calls that takes, copies apart.
        flip: it is copied with the last two dimensions exchanged, and viewed with them exchanged back.
        copy: it is copied as it is viewed.
    """

    seconds: float
    strides: tuple[int, ...]
    calls: int
    flip: bool = False
    copy: bool = False


def _matrix(
    context: Context, layout: Layout, groups: tuple[str, ...], strides: dict[str, int], naive: bool, straight: bool
) -> Matrix:
    """``matrix_view``, once for each."""
    key = layout, groups, naive, straight
    found = context.views.get(key)
    if found is None:
        found = context.views[key] = matrix_view(
            layout, groups, strides, context.sizes, naive, straight, context.machine
        )
    return found


def matrix_view(
    layout: Layout,
    groups: tuple[str, ...],
    strides: dict[str, int],
    sizes: Sizes,
    naive: bool,
    only_straight: bool = False,
    machine: cost.Machine = cost.CPU,
) -> Matrix:
    """A view where one exists with a contiguous dimension in the matrix: else the product would copy it itself; a copy
    is made with the last two groups exchanged where that is faster, unless it has to be straight.
    """
    calls = count_calls(layout, groups)
    launches = machine.launch * calls
    found = group_strides(groups, strides, sizes)
    if found is not None and (naive or is_matrix(groups, found, sizes)):
        return Matrix(launches, found, calls)
    straight = launches + copy_seconds("".join(groups), strides, sizes, machine)
    if len(groups) > 1 and groups[-1] and groups[-2] and not only_straight:
        other = flipped(groups)
        crossed = launches + copy_seconds("".join(other), strides, sizes, machine)
        # Also where a view exists, as the product's own copy is the straight one.
        if crossed + machine.launch < straight:
            *outer, row, column = contiguous_layout(other, sizes).strides
            return Matrix(crossed + machine.launch, (*outer, column, row), calls + 1, True)
    if found is not None and len(groups) < 3:
        return Matrix(straight, found, calls)
    # A batch that is no view is copied by ``reshape``, one that is a bad view is copied here.
    return Matrix(straight, contiguous_layout(groups, sizes).strides, calls, copy=found is not None)


def is_matrix(groups: tuple[str, ...], strides: tuple[int, ...], sizes: Sizes) -> bool:
    """Whether a view with these groups of labels as dimensions is a matrix, or a batch of them, to the library: one of
    its last two dimensions is contiguous. (A batch of others is multiplied matrix by matrix, at 4 us each.)
    """
    shape = shape_of(groups[-2:], sizes)
    inner = strides[-2:]
    if len(shape) < 2:
        return True
    if 1 in shape:
        # A dimension of size 1 gets the stride of its neighbour.
        return len(groups) < 3 or inner[shape[0] == 1] == 1 or shape == (1, 1)
    return (inner[1] == 1 and inner[0] >= shape[1]) or (inner[0] == 1 and inner[1] >= shape[0])


def flipped(groups: tuple[str, ...]) -> tuple[str, ...]:
    """The groups, the last two exchanged."""
    return (*groups[:-2], groups[-1], groups[-2])


def walk_order_seconds(
    order: str, tensors: Sequence[Mapping[str, int]], sizes: Sizes, machine: cost.Machine = cost.CPU
) -> float:
    """Time of an elementwise call that walks the labels of these tensors, the result among them, in this order."""
    loops = merged_loops(order, tensors, sizes)
    stride, distance, n_elements = 1, 1, 0
    for strides in tensors:
        n_elements += sizes["".join(strides)]
        distance = max(distance, reuse_distance(order, strides, sizes))
        stride = max(stride, strides.get(order[-1], 1)) if order else 1
    return _loops_seconds(loops, stride, distance, n_elements, machine)


def copy_seconds(order: str, strides: Mapping[str, int], sizes: Sizes, machine: cost.Machine = cost.CPU) -> float:
    """Time to copy a tensor so that it is contiguous when its labels are walked in this order."""
    # What is written lies in the order of the walk, and stands in the way of no merging.
    loops = merged_loops(order, (strides,), sizes)
    stride = max(strides[order[-1]], 1) if order else 1
    distance = reuse_distance(order, strides, sizes)
    run = min(loops[-1], _shortest_run(order, strides, sizes)) if loops and machine.generates else math.inf
    return _loops_seconds(loops, stride, distance, 2 * math.prod(loops), machine, run)


def _shortest_run(order: str, strides: Mapping[str, int], sizes: Sizes) -> float:
    """How many elements of a tensor lie together, as far as the walk takes them together."""
    unit = next((place for place, label in enumerate(order) if strides[label] == 1 < sizes[label]), None)
    return math.inf if unit is None else contiguous_run(order[: unit + 1], strides, sizes)


def _loops_seconds(
    loops: Sequence[int],
    stride: int,
    distance: int,
    n_elements: int,
    machine: cost.Machine,
    run: float | None = None,
) -> float:
    elements = math.prod(loops)
    tile = math.prod(loops[-2:])
    rows = elements // (loops[-1] or 1) if loops else 1
    tiles, n_bytes = elements // (tile or 1), cost.ITEM * n_elements
    return cost.walk_seconds(elements, rows, tiles, stride, distance, n_bytes, machine, run)


def _multiply_ways(
    context: Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], hint: str, ahead: str
) -> Iterator[Way]:
    """Elementwise products. The order of the result is that of one of the operands, or the hint, or one in which labels
    of both operands come first or last, or those that are summed next, as the next matrix product may want; operands
    that are small next to the result may be copied to get it.
    """
    sizes, machine = context.sizes, context.machine
    in_a, in_b = memory_order(a.labels, sa), memory_order(b.labels, sb)
    rows = "".join(label for label in in_a if label not in in_b)
    columns = "".join(label for label in in_b if label not in in_a)
    common = "".join(label for label in in_a if label in in_b)
    orders = _distinct(
        *_orders_of_both(in_a, in_b, common, rows, columns, hint),
        *_summed_first(in_a + columns, ahead),
        *_summed_first(in_b + rows, ahead),
    )
    counts = sizes[a.labels], sizes[b.labels]
    elements = sizes[orders[0]]
    for order in orders:
        first, second = _aligned(order, a), _aligned(order, b)
        calls = count_calls(a, first), count_calls(b, second)
        runs = [
            contiguous_run("".join(label for label in order if label in strides), strides, sizes)
            for strides in (sa, sb)
        ]
        # The operand that lies in memory as the result is read decides how the result lies.
        swap = counts[1] * min(runs[1], 16) > counts[0] * min(runs[0], 16)
        x, y = (second, first) if swap else (first, second)
        sx, sy = (sb, sa) if swap else (sa, sb)
        calls = (calls[1], calls[0]) if swap else calls
        result = _broadcast(order, [(x, sx), (y, sy)], sizes)
        seconds = machine.launch * sum(calls)
        strides = label_strides(result, sizes)
        yield Way(
            "multiply",
            swap,
            x,
            y,
            "",
            result,
            seconds + walk_order_seconds(memory_order(order, strides), (sa, sb, strides), sizes, machine),
            (_group_strides(x, sx), _group_strides(y, sy)),
            calls,
        )
        wanted = contiguous_layout(tuple(order), sizes)
        if result == wanted:
            continue
        if machine.generates:
            # Its code writes the product in any order, and reads the operands as they lie: copies are part of it.
            seconds += walk_order_seconds(order, (sa, sb, label_strides(wanted, sizes)), sizes, machine)
            taken = _group_strides(x, sx), _group_strides(y, sy)
            yield Way("multiply", swap, x, y, "", wanted, seconds, taken, calls, copied=True)
        elif max(counts) < elements:
            own = ["".join(label for label in order if label in strides) for strides in (sa, sb)]
            seconds += copy_seconds(own[0], sa, sizes, machine) + copy_seconds(own[1], sb, sizes, machine)
            copied = [label_strides(contiguous_layout(tuple(labels), sizes), sizes) for labels in own]
            seconds += walk_order_seconds(order, (*copied, label_strides(wanted, sizes)), sizes, machine)
            cx, cy = reversed(copied) if swap else copied
            taken = _group_strides(x, cx), _group_strides(y, cy)
            yield Way("multiply", swap, x, y, "", wanted, seconds, taken, calls, copies=(True, True))


def _orders_of_both(in_a: str, in_b: str, common: str, rows: str, columns: str, hint: str) -> tuple[str, ...]:
    """Orders of the labels of a product: those of its operands, the hint, and labels of both first or last."""
    return (
        in_a + columns,
        in_b + rows,
        _by_hint(in_a + columns, hint),
        common + rows + columns,
        common + columns + rows,
        rows + columns + common,
        columns + rows + common,
    )


def _summed_first(order: str, ahead: str) -> tuple[str, ...]:
    """The order with the labels that are summed next before all others: where few are summed and kept, a product over
    long rows is much faster than one with narrow columns (3 of 38,400: 57 us, 357 the other way round).
    """
    summed = "".join(label for label in order if label in ahead)
    return (summed + "".join(label for label in order if label not in ahead),) if summed else ()


def _group_strides(groups: tuple[str, ...], strides: dict[str, int]) -> tuple[int, ...]:
    return tuple([strides[group] if group else 1 for group in groups])


def _is_short(summed: str, sizes: Sizes) -> bool:
    """Whether a sum is written out term by term: the code holds for these sizes only."""
    return 1 < sizes[summed] <= SHORT and not any(is_symbolic(sizes[label]) for label in summed)


def _loop_sum_ways(
    context: Context,
    a: Layout,
    b: Layout,
    sa: dict[str, int],
    sb: dict[str, int],
    groups: tuple[str, str, str, str],
    hint: str,
    ahead: str,
) -> Iterator[Way]:
    """A product of all elements for each value of the summed labels, added up in place: for few terms and long rows."""
    sizes, machine = context.sizes, context.machine
    batch, rows, columns, summed = groups
    in_a, in_b = memory_order(batch + rows, sa), memory_order(batch + columns, sb)
    common = "".join(label for label in in_a if label in batch)
    rows, columns = memory_order(rows, sa), memory_order(columns, sb)
    orders = _distinct(
        *_orders_of_both(in_a, in_b, common, rows, columns, hint),
        rows + common + columns,
        columns + common + rows,
        *_summed_first(in_a + columns, ahead),
    )
    terms = sizes[summed]
    whole = sizes[orders[0]]
    for order in orders:
        sides = [_slices(order, summed, *operand, sizes, machine) for operand in ((a, sa), (b, sb))]
        # The operand that has more of the result's labels decides how the result lies.
        swap = sizes[columns] > sizes[rows]
        first, second = reversed(sides) if swap else sides
        result = _broadcast(order, [(side.groups[1:], side.own) for side in (first, second)], sizes)
        strides = label_strides(result, sizes)
        walked = memory_order(order, strides)
        each = walk_order_seconds(walked, (first.own, second.own, strides), sizes, machine)
        seconds = first.seconds + second.seconds + terms * each
        # What is added to is read, too. Autograd takes a product and a sum faster than both at once.
        added = whole * machine.element
        if context.follows:
            added = walk_order_seconds(walked, (strides, strides), sizes, machine)
        seconds += (terms - 1) * added
        taken = first.strides, second.strides
        calls, copies = (first.calls, second.calls), (first.copied, second.copied)
        yield Way("loop", swap, first.groups, second.groups, summed, result, seconds, taken, calls, copies=copies)


class Slices(NamedTuple):
    """An operand of a product that is added up term by term.

    Attributes:
        groups: its dimensions, the summed labels first.
        strides: their strides.
        own: strides of the labels of each slice.
        copied: whether it is copied.
        calls: how many calls it takes, a copy apart; two slices count as one.
        seconds: what it takes.
    """

    groups: tuple[str, ...]
    strides: tuple[int, ...]
    own: dict[str, int]
    copied: bool
    calls: int
    seconds: float


def _slices(
    order: str, summed: str, layout: Layout, strides: dict[str, int], sizes: Sizes, machine: cost.Machine
) -> Slices:
    own = "".join(label for label in order if label in strides)
    groups = (summed, *(_aligned(order, Layout(tuple(own), ())) if own else ()))
    # Two slices take as long as one call.
    calls = count_calls(layout, groups) + 1 + sizes[summed] // 2
    launches = machine.launch * calls
    there = group_strides(groups, strides, sizes)
    # All slices together are read across memory as often as there are terms, a copy only once.
    copied = contiguous_layout(groups, sizes)
    copy = there is None or (bool(own) and strides[own[-1]] != 1 and sizes[own] > 1)
    if copy:
        fresh = label_strides(copied, sizes)
        seconds = launches + copy_seconds(summed + own, strides, sizes, machine)
        return Slices(groups, copied.strides, {label: fresh[label] for label in own}, True, calls, seconds)
    assert there is not None
    return Slices(groups, there, {label: strides[label] for label in own}, False, calls, launches)


def _aligned(order: str, layout: Layout) -> tuple[str, ...]:
    """Dimensions of an operand that broadcast to ``order``: one for each label, none before the first it has."""
    labels = layout.labels
    groups = [label if label in labels else "" for label in order]
    while groups and not groups[0]:
        del groups[0]
    if not groups:
        # A scalar broadcasts from any number of dimensions of size 1 that the other operand has too.
        return layout.dims if len(layout.dims) <= len(order) else ()
    return tuple(groups)


def _broadcast(order: str, operands: Sequence[tuple[tuple[str, ...], dict[str, int]]], sizes: Sizes) -> Layout:
    described = tuple([(shape_of(groups, sizes), _group_strides(groups, strides)) for groups, strides in operands])
    return Layout(tuple(order), elementwise_strides(shape_of(order, sizes), described))


def _multiply_sum_ways(
    context: Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], groups: tuple[str, str, str, str]
) -> Iterator[Way]:
    """The product of all elements, then a sum: only while what lies between them stays in the cache. Generated code
    keeps nothing between them; but what runs in its place, for a second derivative, does, so there are bounds, too.
    """
    sizes, machine = context.sizes, context.machine
    batch, rows, columns, summed = groups
    elements = sizes[batch + rows + columns + summed]
    largest = max(sizes[a.labels], sizes[b.labels], sizes[batch + rows + columns])
    if elements * cost.ITEM > machine.cache and not (machine.generates and elements <= _MOST_TIMES * largest):
        return
    rows, columns = memory_order(rows, sa), memory_order(columns, sb)
    batch, summed = memory_order(batch, sa), memory_order(summed, sa)
    # A sum over a dimension that is not the innermost adds whole vectors.
    inner, outer = (columns, rows) if columns else (rows, columns)
    in_a, in_b = memory_order(a.labels, sa), memory_order(b.labels, sb)
    for order in _distinct(batch + outer + summed + inner, in_a + columns, in_b + rows):
        first, second = _aligned(order, a), _aligned(order, b)
        between = () if machine.generates else (label_strides(contiguous_layout(tuple(order), sizes), sizes),)
        seconds = walk_order_seconds(order, (sa, sb, *between), sizes, machine)
        results = elements // max(sizes[summed], 1)
        seconds += cost.sum_seconds(elements, results, inner_size(order, summed, sizes), machine)
        calls = count_calls(a, first), count_calls(b, second)
        seconds += machine.launch * sum(calls)
        result = contiguous_layout(tuple(label for label in order if label not in summed), sizes)
        strides = _group_strides(first, sa), _group_strides(second, sb)
        yield Way("multiply and sum", False, first, second, summed, result, seconds, strides, calls)
