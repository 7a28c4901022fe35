"""What the backward pass of a way to contract two tensors costs, and in which layouts its gradients come.

Autograd differentiates the calls of a way one by one, each by a rule of its own, so what is cheap forward may be dear
backward: a gradient has narrow rows, or comes in an order that no view brings to that of the step before; a product
that broadcasts is summed back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from . import cost
from .layout import (
    Layout,
    Sizes,
    contiguous_layout,
    group_strides,
    inner_size,
    label_strides,
    memory_order,
    shape_of,
)
from .ways import Way, copy_seconds, is_matrix, matrix_view, walk_order_seconds


def call_seconds(machine: cost.Machine) -> float:
    """Seconds of one node of the backward pass: autograd's own work, and a call of torch."""
    return 2 * machine.launch


class Backward(NamedTuple):
    """The backward pass of one way.

    Attributes:
        seconds: modelled time, the gradient of the result coming as the result lies.
        gradients: how the gradients of the first and of the second operand of the step come; ``None`` where autograd
            does not follow one.
    """

    seconds: float
    gradients: tuple[Layout | None, Layout | None]


def backward(way: Way, follows: tuple[bool, bool], sizes: Sizes, machine: cost.Machine = cost.CPU) -> Backward:
    """The backward pass of a way.

    Args:
        way: how a step is done.
        follows: whether autograd follows its first and its second operand.
        sizes: size of each label.
        machine: what runs it.
    """
    x, y = (follows[1], follows[0]) if way.swap else follows
    if way.kind == "product":
        seconds, gradients = _of_product(way, (x, y), sizes, machine)
    elif way.kind == "loop":
        seconds, gradients = _of_loop(way, (x, y), sizes, machine)
    else:
        seconds, gradients = _of_multiply(way, (x, y), sizes, machine)
    for followed, calls in zip((x, y), way.calls, strict=True):
        seconds += followed * calls * call_seconds(machine)
    return Backward(seconds, (gradients[1], gradients[0]) if way.swap else gradients)


def arrival_seconds(way: Way, gradient: Layout, sizes: Sizes, machine: cost.Machine = cost.CPU) -> float:
    """Seconds to bring the gradient of a way's result from the layout that it comes in to one that can be used."""
    strides = label_strides(gradient, sizes)
    for label in way.result.labels:
        # The gradient of a sum is expanded.
        strides.setdefault(label, 0)
    if way.kind == "product":
        groups = way.result.dims
        found = group_strides(groups, strides, sizes)
        work = sizes["".join(dict.fromkeys("".join((*way.first, *way.second))))]
        batch = sizes[groups[0]] if len(groups) == 3 else 1
        small = batch > 1 and work < batch * machine.small_products
        if batch > 1 and not small and found is not None and not is_matrix(groups, found, sizes):
            return batch * machine.item
        view = matrix_view(gradient, groups, strides, sizes, small, machine=machine)
        seconds = view.seconds
        if len(groups) > 1 and view.strides[-1] != 1 == view.strides[-2]:
            # Both products then take it across.
            shape, seconds_of = _Shape.of(way, sizes), partial(cost.product_seconds, machine=machine)
            seconds += sum(
                seconds_of(*across) - seconds_of(*along)
                for across, along in zip(shape.products(True), shape.products(False), strict=True)
            )
        return seconds
    own = label_strides(way.result, sizes)
    order = memory_order(way.result.labels, own)
    if all(strides[label] == own[label] for label in order):
        return 0.0
    # Elementwise calls take any layout, only not as fast, and hand it on: the product for each operand is across the
    # memory of the other, and so are the sums of these. (128 x 10 x 64 x 10: 220 and 250 us, 900 and 1,100 across.)
    # (Generated code goes across for each term of a sum, too, and one by one, not in squares as its copies go.)
    terms = sizes[way.over] if machine.generates else 1
    return 3 * terms * walk_order_seconds(order, (strides, own), sizes, machine)


_Gradients = tuple[Layout | None, Layout | None]


class _Shape(NamedTuple):
    """A product of matrices.

    Attributes:
        groups: labels of the batch, rows, columns, and what is summed.
        sizes: theirs.
        x_across: the first operand is contiguous along its rows' label.
        y_across: the second one along the summed label.
    """

    groups: tuple[str, str, str, str]
    sizes: tuple[int, ...]
    x_across: bool
    y_across: bool

    @classmethod
    def of(cls, way: Way, sizes: Sizes) -> _Shape:
        """That of a way that is one."""
        batched = len(way.result.dims) == 3
        batch = way.result.dims[0] if batched else ""
        rows, summed = ("", *way.first)[-2:] if not batched and len(way.first) == 1 else way.first[-2:]
        columns = way.second[-1] if batched or len(way.second) == 2 else ""
        groups = batch, rows, columns, summed
        first, second = way.strides
        return cls(
            groups, shape_of(groups, sizes), len(first) > 1 and first[-2] == 1, len(second) > 1 and second[-1] == 1
        )

    def products(self, across: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What autograd multiplies for the gradient of each operand, that of the result lying ``across`` or not."""
        b, m, n, k = self.sizes
        return (b, m, k, n, not across, self.y_across), (b, k, n, m, self.x_across, across)


def _of_product(way: Way, follows: tuple[bool, bool], sizes: Sizes, machine: cost.Machine) -> tuple[float, _Gradients]:
    """Products with the transposed operands."""
    batched = len(way.result.dims) == 3
    # An operand that is expanded to be a batch has two groups only.
    expanded = tuple(batched and len(groups) == 2 for groups in (way.first, way.second))
    shape = _Shape.of(way, sizes)
    batch, rows, columns, summed = shape.groups
    b, m, n, k = shape.sizes
    first, second = way.strides
    # That of a matrix that lies column by column comes so too, but only of the product of two.
    matrices = not batched and len(first) == len(second) == 2
    turned = matrices and first == (1, m), matrices and second == (1, k)
    straight_products = shape.products()
    turned_products = (1, k, m, n, shape.y_across, True), (1, n, k, m, False, shape.x_across)
    seconds_of = partial(cost.product_seconds, machine=machine)
    seconds = 0.0
    gradients: list[Layout | None] = [None, None]
    for side, matrix in enumerate(((rows, summed), (summed, columns))):
        if not follows[side]:
            continue
        groups = tuple(reversed(matrix)) if turned[side] else (batch, *matrix)
        product = (turned_products if turned[side] else straight_products)[side]
        seconds += seconds_of(*product) + call_seconds(machine)
        if expanded[side]:
            groups, elements = matrix, sizes["".join(matrix)]
            seconds += cost.sum_seconds(b * elements, elements, elements, machine)
        gradients[side] = contiguous_layout(tuple(group for group in groups if group), sizes)
    return seconds, (gradients[0], gradients[1])


def _of_loop(way: Way, follows: tuple[bool, bool], sizes: Sizes, machine: cost.Machine) -> tuple[float, _Gradients]:
    """That of the product of two slices, and of a sum, as often as there are slices; their gradients are stacked."""
    inner = way.strides[0][1:], way.strides[1][1:]
    groups = way.first[1:], way.second[1:]
    slices = way._replace(kind="multiply", first=groups[0], second=groups[1], over="", strides=inner)
    once, gradients = _of_multiply(slices, follows, sizes, machine)
    terms = sizes[way.over]
    seconds = terms * (once + any(follows) * call_seconds(machine))
    stacked: list[Layout | None] = [None, None]
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            result = stacked[place] = contiguous_layout((way.over, *gradient.dims), sizes)
            own = label_strides(result, sizes)
            seconds += call_seconds(machine) + copy_seconds(way.over + gradient.labels, own, sizes, machine)
            elements = sizes[result.labels]
            if elements * cost.ITEM > machine.cache:
                # The first slices are out of the cache when they are stacked. (6 of 161,051: 1,290 us, 600 without.)
                seconds += elements * machine.far_element
    return seconds, (stacked[0], stacked[1])


def _of_multiply(way: Way, follows: tuple[bool, bool], sizes: Sizes, machine: cost.Machine) -> tuple[float, _Gradients]:
    """For each operand a product with the other of all elements, summed over the labels that the operand lacks."""
    rank = max(len(way.first), len(way.second))
    first, second = (("",) * (rank - len(groups)) + groups for groups in (way.first, way.second))
    walked = "".join(one or other for one, other in zip(first, second, strict=True))
    result = label_strides(way.result, sizes)
    # What was summed is expanded.
    arrives = {label: result.get(label, 0) for label in walked}
    own = label_strides(contiguous_layout(tuple(walked), sizes), sizes) if way.over else result
    order = memory_order(walked, own)
    operands = [
        {group: stride for group, stride in zip(groups, strides, strict=True) if group}
        for groups, strides in zip((way.first, way.second), way.strides, strict=True)
    ]
    elements = sizes[order]
    seconds = 0.0
    gradients: list[Layout | None] = [None, None]
    for place in (0, 1):
        if not follows[place]:
            continue
        labels = operands[place].keys()
        seconds += call_seconds(machine)
        seconds += walk_order_seconds(order, (arrives, operands[1 - place], own), sizes, machine)
        if len(labels) == len(order):
            gradients[place] = contiguous_layout(tuple(order), sizes)
            continue
        # A sum is contiguous, whatever the order of what is summed.
        kept = tuple(label for label in walked if label in labels)
        inner = inner_size(order, "".join(label for label in order if label not in labels), sizes)
        seconds += cost.sum_seconds(elements, sizes["".join(kept)], inner, machine)
        gradients[place] = contiguous_layout(kept, sizes)
    return seconds, (gradients[0], gradients[1])
