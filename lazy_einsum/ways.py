"""Ways to contract two tensors: by which kernel, in which order of labels, at what cost. Only labels and strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    label_strides,
    memory_order,
    merged_loops,
    product,
    reuse_distance,
    shape_of,
)

# Products of these are not rounded before the sum by a matrix product, whose accumulator is wider.
THIN = 16
"""Matrices of fewer rows are worth a copy that makes their product faster."""

NARROW = frozenset({torch.float16, torch.bfloat16})
# A matrix product of bool is refused by torch.einsum: no other kernel may make it work.
_SUMMABLE = frozenset(
    {
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    }
)


class Context(NamedTuple):
    """What all steps of a lowering share.

    Attributes:
        sizes: size of each label.
        dtype: of the operands.
    """

    sizes: Sizes
    dtype: torch.dtype


class Way(NamedTuple):
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
        strides: of both operands as the kernel takes them.
        calls: how many calls make each operand that.
        flips: which operands are copied with the last two groups exchanged, and viewed with them exchanged back.
        copy_first: the first operand is copied to be contiguous along the summed labels.
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
    copy_first: bool = False


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
            before = product(one.labels, sizes)
            split = split_for_sum(one.dims, lone)
            spent += cost.CPU.launch * (split != one.dims)
            innermost = bool(split[-1]) and split[-1][-1] in lone
            one = summed_layout(split, lone, sizes)
            spent += cost.sum_seconds(before, product(one.labels, sizes), innermost)
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


def ways(context: Context, a: Layout, b: Layout, output: str, hint: str) -> Iterator[Way]:
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
                        if not order and 1 < product(row, sizes) < THIN and sx[along[-1]] != 1:
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
) -> Way:
    sizes = context.sizes
    b, m, n, k = (product(group, sizes) for group in (batch + loop, rows, columns, summed))
    # torch.einsum makes all its matrix products by bmm, which refuses bool in another way than mm and dot.
    batched = bool(batch or loop) or context.dtype is torch.bool
    naive = batched and m * n * k < cost.CPU.small_products
    # Vectors stay vectors for mv and dot, except where those would accumulate in the narrow type.
    vector = not batched and context.dtype not in NARROW
    first = ((rows,) if rows or not vector else ()) + (summed,)
    second = (summed,) + ((columns,) if columns or not vector else ())
    dims = first[:-1] + second[1:]
    if batched:
        dims = (batch + loop, *dims)
        first = first if loop and expand_first else (batch + loop, *first)
        second = second if loop and not expand_first else (batch + loop, *second)
    left, right = matrix_view(x, first, sx, sizes, naive), matrix_view(y, second, sy, sizes, naive)
    if copy_first:
        # Few rows are cheap to bring into the order in which their product is fast.
        launches = cost.CPU.launch * (1 + count_calls(x, first))
        copied = copy_seconds("".join(first), sx, sizes)
        left = Matrix(launches + copied, contiguous_layout(first, sizes).strides, left.calls)
    along = right.strides[len(second) - 2] if len(second) > 1 else 1
    seconds = left.seconds + right.seconds + cost.CPU.launch * bool(loop)
    seconds += cost.product_seconds(b, m, n, k, left.strides[-1] == 1, along == 1)
    if not (context.dtype.is_floating_point or context.dtype.is_complex):
        # Products of integers run in plain loops of any size.
        seconds += b * m * n * k * 0.8e-9
    result = contiguous_layout(dims, sizes)
    strides, calls = (left.strides, right.strides), (left.calls, right.calls)
    return Way(
        "product", swap, first, second, loop, result, seconds, strides, calls, (left.flip, right.flip), copy_first
    )


class Matrix(NamedTuple):
    """An operand of a matrix product.

    Attributes:
        seconds: time to view it as a matrix or a batch of them, or to copy it.
        strides: its strides then.
        calls: how many calls that takes, copies apart.
        flip: it is copied with the last two dimensions exchanged, and viewed with them exchanged back.
    """

    seconds: float
    strides: tuple[int, ...]
    calls: int
    flip: bool = False


def matrix_view(
    layout: Layout, groups: tuple[str, ...], strides: dict[str, int], sizes: Sizes, naive: bool
) -> Matrix:
    """A view where one exists with a contiguous dimension in the matrix: else the product would copy it itself."""
    calls = count_calls(layout, groups)
    launches = cost.CPU.launch * calls
    found = group_strides(groups, strides, sizes)
    if found is not None:
        shape = shape_of(groups[-2:], sizes)
        inner = found[-2:]
        if naive or len(shape) < 2 or 1 in shape:
            return Matrix(launches, found, calls)
        if (inner[1] == 1 and inner[0] >= shape[1]) or (inner[0] == 1 and inner[1] >= shape[0]):
            return Matrix(launches, found, calls)
    straight = launches + copy_seconds("".join(groups), strides, sizes)
    if len(groups) > 1 and groups[-1] and groups[-2]:
        other = flipped(groups)
        crossed = launches + copy_seconds("".join(other), strides, sizes)
        # Also where a view exists, as the product's own copy is the straight one.
        if crossed + cost.CPU.launch < straight:
            *outer, row, column = contiguous_layout(other, sizes).strides
            return Matrix(crossed + cost.CPU.launch, (*outer, column, row), calls + 1, True)
    return Matrix(straight, found or contiguous_layout(groups, sizes).strides, calls)


def flipped(groups: tuple[str, ...]) -> tuple[str, ...]:
    """The groups, the last two exchanged."""
    return (*groups[:-2], groups[-1], groups[-2])


def walk_order_seconds(order: str, tensors: Sequence[Mapping[str, int]], sizes: Sizes) -> float:
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


def copy_seconds(order: str, strides: dict[str, int], sizes: Sizes) -> float:
    """Time to copy a tensor so that it is contiguous when its labels are walked in this order."""
    return walk_order_seconds(order, (strides,), sizes)


def _multiply_ways(
    context: Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], hint: str
) -> Iterator[Way]:
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
        seconds = cost.CPU.launch * sum(calls)
        strides = label_strides(result, sizes)
        yield Way(
            "multiply",
            swap,
            x,
            y,
            "",
            result,
            seconds + walk_order_seconds(memory_order(order, strides), (sa, sb, strides), sizes),
            (_group_strides(x, sx), _group_strides(y, sy)),
            calls,
        )
        wanted = contiguous_layout(tuple(order), sizes)
        if result != wanted and 4 * max(counts) <= elements:
            own = ["".join(label for label in order if label in strides) for strides in (sa, sb)]
            seconds += copy_seconds(own[0], sa, sizes) + copy_seconds(own[1], sb, sizes)
            copied = [label_strides(contiguous_layout(tuple(labels), sizes), sizes) for labels in own]
            seconds += walk_order_seconds(order, (*copied, label_strides(wanted, sizes)), sizes)
            cx, cy = reversed(copied) if swap else copied
            taken = _group_strides(x, cx), _group_strides(y, cy)
            yield Way("copy and multiply", swap, x, y, "", wanted, seconds, taken, calls)


def _group_strides(groups: tuple[str, ...], strides: dict[str, int]) -> tuple[int, ...]:
    return tuple(strides[group] if group else 1 for group in groups)


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
        described.append((shape_of(groups, sizes), _group_strides(groups, strides)))
    return Layout(tuple(order), elementwise_strides(shape, described))


def _multiply_sum_way(
    context: Context, a: Layout, b: Layout, sa: dict[str, int], sb: dict[str, int], groups: tuple[str, str, str, str]
) -> Way | None:
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
    seconds = walk_order_seconds(order, (sa, sb, whole), sizes)
    seconds += cost.sum_seconds(elements, elements // max(product(summed, sizes), 1), not inner)
    calls = count_calls(a, first), count_calls(b, second)
    seconds += cost.CPU.launch * sum(calls)
    dims = tuple(label for label in order if label not in summed)
    result = contiguous_layout(dims, sizes)
    strides = _group_strides(first, sa), _group_strides(second, sb)
    return Way("multiply and sum", False, first, second, summed, result, seconds, strides, calls)
