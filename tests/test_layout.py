"""What is asked of the strides of a result."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazy_einsum.layout import Layout, Sizes, Strides, contiguous_layout, view_of


@st.composite
def dense(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and strides of two dense tensors of it."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    found = []
    for _ in range(2):
        strides, step = [0] * len(shape), 1
        for dim in draw(st.permutations(range(len(shape)))):
            strides[dim] = step
            step *= shape[dim]
        found.append(tuple(strides))
    return shape, found[0], found[1]


def views(shape: tuple[int, ...], strides: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Which dimensions next to each other can be merged by a view, and whether the last one can be reinterpreted."""
    tensor = torch.empty_strided(shape, strides)
    found = set()
    for start, stop in itertools.combinations(range(len(shape) + 1), 2):
        merged = (*shape[:start], math.prod(shape[start:stop]), *shape[stop:])
        try:
            tensor.view(merged)
        except RuntimeError:
            continue
        found.add((start, stop))
    try:
        tensor.view(torch.uint8)
        found.add(())
    except RuntimeError:
        pass
    return found


@given(dense())
def test_each_view_of_the_one_is_a_view_of_the_other(case: tuple[tuple[int, ...], ...]) -> None:
    shape, own, asked = case
    if Strides(asked, exact=False).allow(shape, own):
        assert views(shape, own) >= {view for view in views(shape, asked) if view or shape[-1] != 1}
    assert Strides(asked, exact=False).allow(shape, asked)
    assert Strides(asked).allow(shape, own) == all(
        size == 1 or one == two for size, one, two in zip(shape, own, asked, strict=True)
    )


@given(dense())
def test_contiguous_is_always_allowed(case: tuple[tuple[int, ...], ...]) -> None:
    shape, _, asked = case
    contiguous = torch.empty(shape).stride()
    assert Strides(asked, exact=False).allow(shape, contiguous)
    # And what is asked for where eager is contiguous.
    assert Strides.contiguous(shape).allow(shape, asked) == torch.empty_strided(shape, asked).is_contiguous()
    assert Strides(contiguous, exact=False).allow(shape, asked) <= torch.empty_strided(shape, asked).is_contiguous()


def test_a_label_without_a_size() -> None:
    for labels in ("x", "ax", "xa"):
        with pytest.raises(KeyError, match="x"):
            Sizes(a=2)[labels]


@settings(deadline=None)
@given(st.data())
def test_strides_of_views_are_those_of_torch(data: st.DataObject) -> None:
    """Those of dimensions of size 1, too, which have any stride before."""
    sizes = Sizes(a=2, b=3, c=4)
    whole = contiguous_layout(data.draw(st.permutations("abc")), sizes)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(3)))))
    labels = [whole.dims[place] for place in kept]

    def with_ones(dims: list[str]) -> tuple[str, ...]:
        return tuple(part for dim in (*dims, None) for part in ("", dim) if part or (part == "" and draw_flag()))

    def draw_flag() -> bool:
        return data.draw(st.booleans())

    groups: list[str] = []
    for label in labels:
        if groups and draw_flag():
            groups[-1] += label
        else:
            groups.append(label)
    before, after = with_ones(labels), with_ones(groups)
    own = dict(zip(*whole, strict=True))
    strides = [own[dim] if dim else data.draw(st.sampled_from([1, 7, 24])) for dim in before]
    tensor = torch.empty(100).as_strided([sizes[dim] for dim in before], strides)
    result = tensor.reshape([sizes[group] for group in after])
    found = view_of(Layout(before, tuple(strides)), after, sizes)
    assert (found is None) == (result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr())
    assert found is None or found == Layout(after, result.stride())
