"""``Layout``: a tensor as labels and strides; what can be viewed, what is copied, what a result will look like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .signature import contiguous_strides


class Sizes(dict[str, int]):
    """Size of each label, and of labels merged into one dimension: the product of theirs, remembered once asked for.
    Dimensions of size 1 have no label.

    >>> sizes = Sizes(a=2, b=3)
    >>> sizes["ab"], sizes[""]
    (6, 1)
    """

    def __missing__(self, labels: str) -> int:
        if len(labels) == 1:
            raise KeyError(labels)
        size = self[labels] = math.prod([self[label] for label in labels])
        return size


class Layout(NamedTuple):
    """How a tensor lies in memory.

    Attributes:
        dims: the labels merged into each dimension, outermost first; ``""`` for a dimension of size 1.
        strides: its stride, in elements.

    >>> Layout(("ab", "c", ""), (3, 1, 1)).labels
    'abc'
    """

    dims: tuple[str, ...]
    strides: tuple[int, ...]

    @property
    def labels(self) -> str:
        """All labels, in order."""
        return "".join(self.dims)


def shape_of(dims: Sequence[str], sizes: Sizes) -> tuple[int, ...]:
    """Sizes of dimensions."""
    return tuple([sizes[dim] for dim in dims])


def contiguous_layout(dims: Sequence[str], sizes: Sizes) -> Layout:
    """The layout of a contiguous tensor with these dimensions."""
    return Layout(tuple(dims), contiguous_strides(shape_of(dims, sizes)))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor with this shape and these strides is contiguous, as ``Tensor.is_contiguous`` tells it."""
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


class Strides(NamedTuple):
    """What is asked of the strides of a result.

    Attributes:
        stride: strides of a dense tensor.
        exact: the result has these strides; else whatever view there is of a tensor with these, there is of the result:
            dimensions that lie together there do so here.
    """

    stride: tuple[int, ...]
    exact: bool = True

    @classmethod
    def contiguous(cls, shape: Sequence[int]) -> Strides:
        """Those of a contiguous result."""
        return cls(contiguous_strides(shape))

    def allow(self, shape: Sequence[int], stride: Sequence[int]) -> bool:
        """Whether a result with ``stride`` will do.

        >>> asked = Strides((2, 1, 8), exact=False)  # the first two dimensions of shape (4, 2, 3) can be merged
        >>> asked.allow((4, 2, 3), (6, 3, 1)), asked.allow((4, 2, 3), (1, 12, 4))
        (True, False)
        """
        if 0 in shape:
            return True
        dims = [dim for dim in zip(shape, stride, self.stride, strict=True) if dim[0] != 1]
        if self.exact:
            return all(own == asked for _, own, asked in dims)
        if dims and dims[-1][2] == 1 != dims[-1][1]:
            return False
        return not any(
            asked == size * inner_asked and own != size * inner_own
            for (_, own, asked), (size, inner_own, inner_asked) in itertools.pairwise(dims)
        )

    def order(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The dimensions, outermost in memory first; of two with one stride, that of size 1 is the inner one."""
        if 0 in shape or (not self.exact and is_contiguous(shape, self.stride)):
            return tuple(range(len(shape)))
        return tuple(sorted(range(len(shape)), key=lambda dim: (-self.stride[dim], shape[dim] == 1, dim)))


def label_strides(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """Stride of each label of a layout.

    >>> label_strides(Layout(("ab",), (1,)), {"a": 2, "b": 3})
    {'b': 1, 'a': 3}
    """
    strides: dict[str, int] = {}
    for dim, stride in zip(layout.dims, layout.strides, strict=True):
        for label in reversed(dim):
            strides[label] = stride
            stride *= sizes[label]
    return strides


def group_strides(groups: Sequence[str], strides: Mapping[str, int], sizes: Sizes) -> tuple[int, ...] | None:
    """Strides of the view whose dimensions are these groups of labels; ``None`` where only a copy has these dimensions.

    >>> strides, sizes = {"a": 3, "b": 1}, {"a": 2, "b": 3}
    >>> group_strides(["ab"], strides, sizes), group_strides(["ba"], strides, sizes)
    ((1,), None)
    """
    found = []
    for group in groups:
        for left, right in itertools.pairwise(group):
            if strides[left] != strides[right] * sizes[right]:
                return None
        found.append(strides[group[-1]] if group else 1)
    return tuple(found)


def view_of(layout: Layout, groups: tuple[str, ...], sizes: Sizes) -> Layout | None:
    """What ``reshape`` makes of a tensor where its result with these dimensions is a view; ``None`` where it is a copy.

    A new dimension of size 1 has the stride that its inner neighbour would have if that were one longer.

    >>> view_of(Layout(("ab",), (2,)), ("", "a", "", "b"), Sizes(a=3, b=4)).strides
    (24, 8, 8, 2)
    """
    found = group_strides(groups, label_strides(layout, sizes), sizes)
    if found is None:
        return None
    strides, step = list(found), layout.strides[-1] if layout.strides else 1
    for place in reversed(range(len(groups))):
        if not groups[place]:
            strides[place] = step
        step = strides[place] * sizes[groups[place]]
    return Layout(groups, tuple(strides))


def memory_order(labels: str, strides: Mapping[str, int]) -> str:
    """The labels, outermost in memory first; expanded ones (stride 0) before all others."""
    return "".join(sorted(labels, key=lambda label: -strides[label] or -math.inf))


def contiguous_run(order: str, strides: Mapping[str, int], sizes: Sizes) -> int:
    """How many elements lie together in memory when the labels are walked in this order.

    >>> contiguous_run("ba", {"a": 1, "b": 6}, {"a": 2, "b": 3})
    2
    """
    run = 1
    for label in reversed(order):
        if strides[label] != run:
            break
        run *= sizes[label]
    return run


def reuse_distance(order: str, strides: Mapping[str, int], sizes: Sizes) -> int:
    """How many elements are visited, walking the labels in this order, before one next to the first is: all that time
    the cache has to keep a line of which one element was used.

    >>> reuse_distance("ba", {"a": 3, "b": 1}, {"a": 2, "b": 3})
    2
    """
    distance = 1
    for label in reversed(order):
        stride = strides.get(label)
        if stride == 1:
            break
        if stride is not None:
            distance *= sizes[label]
    return distance


def inner_size(order: str, summed: str, sizes: Sizes) -> int:
    """How many elements lie inside of what is summed, where a tensor is walked in this order.

    >>> inner_size("abc", "a", {"a": 2, "b": 3, "c": 4}), inner_size("abc", "c", {"a": 2, "b": 3, "c": 4})
    (12, 1)
    """
    inner = 1
    for label in reversed(order):
        if label in summed:
            break
        inner *= sizes[label]
    return inner


def merged_loops(order: str, tensors: Sequence[Mapping[str, int]], sizes: Sizes) -> list[int]:
    """Sizes of the loops over these labels, outermost first, after merging those that lie together in all tensors.

    Args:
        order: the labels.
        tensors: strides of the labels of each tensor; labels that it lacks are repeated.
        sizes: sizes of the labels.

    >>> merged_loops("abc", [{"a": 12, "b": 4, "c": 1}, {"b": 4, "c": 1}], {"a": 2, "b": 3, "c": 4})
    [2, 12]
    """
    loops = [sizes[label] for label in order[:1]]
    for outer, inner in itertools.pairwise(order):
        size = sizes[inner]
        for strides in tensors:
            if strides.get(outer, 0) != strides.get(inner, 0) * size:
                loops.append(size)
                break
        else:
            loops[-1] *= size
    return loops


@lru_cache(maxsize=2**12)
def elementwise_strides(
    shape: tuple[int, ...], operands: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
) -> tuple[int, ...]:
    """Strides that torch gives the fresh result of an elementwise function.

    The rule is that of its TensorIterator: dimensions are sorted by the strides of the first operand that tells them
    apart, and the result is dense in that order.

    Args:
        shape: shape of the result.
        operands: shape and strides of each operand, in the order of the call; a number among them is one of shape ().

    >>> elementwise_strides((2, 3), (((2, 3), (1, 2)), ((2, 3), (3, 1))))
    (1, 2)
    """
    if all(op_shape == shape for op_shape, _ in operands):
        if all(is_contiguous(*operand) for operand in operands):
            return contiguous_strides(shape)
        if len(shape) == 4 and all(_is_channels_last(*operand) for operand in operands):
            _, c, h, w = shape
            return (h * w * c, 1, w * c, c)
        first = operands[0][1]
        if all(op_strides == first for _, op_strides in operands) and _is_dense(shape, first):
            return first
    rank = len(shape)
    aligned: list[list[int]] = []
    for op_shape, op_strides in operands:
        missing = rank - len(op_shape)
        own = zip(op_shape, op_strides, shape[missing:], strict=True)
        aligned.append([0] * missing + [0 if size == 1 and whole != 1 else stride for size, stride, whole in own])

    def compare(one: int, two: int) -> int:
        for strides in aligned:
            s, t = strides[one], strides[two]
            if s == 0 or t == 0:
                continue
            if s != t:
                return -1 if s < t else 1
            if shape[one] > shape[two]:
                return 1
        return 0

    # An insertion sort as torch has it: the comparison is not transitive, so another sort could end elsewhere.
    order = list(range(rank - 1, -1, -1))
    for start in range(1, rank):
        here = start
        for before in range(start - 1, -1, -1):
            result = compare(order[before], order[here])
            if result > 0:
                order[before], order[here] = order[here], order[before]
                here = before
            elif result < 0:
                break
    if order == list(range(rank - 1, -1, -1)):
        return contiguous_strides(shape)
    strides = [0] * rank
    step = 1
    for dim in order:
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def _is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    order = (0, 2, 3, 1)
    return is_contiguous([shape[dim] for dim in order], [strides[dim] for dim in order])


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


def count_calls(layout: Layout, groups: tuple[str, ...]) -> int:
    """How many calls it takes to make the dimensions these groups: a reshape, a permutation, a reshape, or fewer."""
    if layout.dims == groups:
        return 0
    if sorted(layout.dims) == sorted(groups) or layout.labels == "".join(groups):
        return 1
    middle = split_dims(layout.dims, groups)
    return (middle != layout.dims) + 1 + (reordered_dims(middle, groups) != groups)


def permutation_of(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[int, ...] | None:
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


def split_dims(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[str, ...]:
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


def reordered_dims(dims: tuple[str, ...], groups: tuple[str, ...]) -> tuple[str, ...]:
    """The dimensions in the order of the groups' labels, those of size 1 last."""
    order = "".join(groups)
    return (*sorted(filter(None, dims), key=order.find), *("",) * dims.count(""))
