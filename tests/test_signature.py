"""Types, constants, structures and signatures: what makes two calls the same."""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazy_einsum import UntraceableError
from lazy_einsum.data import Constant, flatten, is_constant, unflatten
from lazy_einsum.signature import Arguments, Signature, TensorType, contiguous_strides


class Point(NamedTuple):
    x: Any
    y: Any


class Color(enum.Enum):
    RED = 1


@given(st.lists(st.integers(0, 4), max_size=5))
def test_contiguous_strides(shape: list[int]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros((), dtype=torch.int64), "i64[]"),
        (torch.zeros(2, 3).T, "f32[3, 2] strides (1, 3)"),
        (torch.zeros(2, requires_grad=True), "f32[2] requires_grad"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "c64[2] conj"),
        (torch.zeros(0, 3, device="meta"), "f32[0, 3] meta"),
    ],
)
def test_type_in_words(tensor: torch.Tensor, text: str) -> None:
    assert str(TensorType.of(tensor)) == text


def test_strides_of_dimensions_of_size_one_are_kept() -> None:
    """User code may read them, and the layout that eager gives to results depends on them."""
    base = torch.zeros(4, 6)
    assert TensorType.of(base[:, :1]) != TensorType.of(torch.zeros(4, 1))
    column = TensorType.of(torch.zeros(6, 1).T)
    assert column.stride == (1, 1) and column.is_contiguous and column != TensorType.of(torch.zeros(1, 6))


def test_type_of_a_view_that_autograd_refuses_to_place() -> None:
    """Views made under no_grad whose base was written raise when they are asked whether they are leaves."""
    base = torch.zeros(3, requires_grad=True) * 1
    with torch.no_grad():
        view = base[:2]
    base.add_(1)
    assert not TensorType.of(view).is_leaf


VALUES = [
    0,
    0.0,
    -0.0,
    False,
    None,
    "",
    b"",
    0j,
    (0,),
    (0.0,),
    (False,),
    (-0.0,),
    Color.RED,
    torch.float32,
    slice(0),
    slice(0.0),
    frozenset([1]),
]


def test_constants_are_told_apart() -> None:
    for i, a in enumerate(VALUES):
        for j, b in enumerate(VALUES):
            assert (Constant(a) == Constant(b)) == (i == j), (a, b)
    assert Constant(float("nan")) != Constant(float("nan"))
    assert not is_constant([1]) and not is_constant((1, [])) and not is_constant(object())


nested = st.recursive(
    st.integers() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Point, inner, inner)
        | st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


@given(nested)
def test_flatten_and_back(value: Any) -> None:
    leaves: list[Any] = []
    structure = flatten(value, leaves)
    again = unflatten(structure, leaves)
    assert again == value and type(again) is type(value)
    assert flatten(again, []) == structure


def test_flatten_refuses_a_cycle() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UntraceableError, match="holds itself"):
        flatten(cycle, [])


def test_arguments() -> None:
    x = torch.zeros(2)
    arguments, values = Arguments.of((x, [1, x]), {"k": {"a": 2.0}})
    assert str(arguments) == "(f32[2], [1, same as #0], k={'a': 2.0})"
    assert values == [x, 1, x, 2.0]
    assert arguments != Arguments.of((x, [1, torch.zeros(2)]), {"k": {"a": 2.0}})[0]
    for wrong, text in (
        (torch.zeros(2).to_sparse(), "layout"),
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
    ):
        with pytest.raises(UntraceableError, match=text):
            Arguments.of((wrong,), {})


def test_difference_in_words() -> None:
    def signature(*args: Any, grad: bool = True, state: tuple[tuple[str, Any], ...] = ()) -> Signature:
        return Signature(Arguments.of(args, {})[0], (("grad", grad),), state)

    x = torch.zeros(2)
    base = signature(x, 1)
    assert base.difference(signature(x, 1)) == ""
    assert base.difference(signature(x)).startswith("structure of the arguments")
    assert base.difference(signature(x, 2)) == "argument 1: 1 here, 2 there"
    assert base.difference(signature(torch.zeros(3), 1)) == "argument 0: f32[2] here, f32[3] there"
    assert base.difference(signature(x, 1, grad=False)) == "grad: True here, False there"
    first, second = (signature(x, 1, state=(("self.n", Constant(n)),)) for n in (3, 4))
    assert first.difference(second) == "self.n: 3 here, 4 there"
