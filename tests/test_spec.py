"""Labels: reading equations as torch does, sizes, renaming and inlining."""

from __future__ import annotations

import pytest
import torch
from equations import ROWS, Row, equations, make_operands, row_id
from hypothesis import given
from hypothesis import strategies as st
from oracle import loops

from lazy_einsum.errors import EquationError
from lazy_einsum.spec import EinsumSpec, symbol


def parse(row: Row) -> EinsumSpec:
    return EinsumSpec.parse(row.equation, [len(shape) for shape in row.shapes])


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_a_parsed_equation_means_what_torch_reads(item: tuple[str, Row]) -> None:
    spec = parse(item[1])
    operands = make_operands(item[1].shapes, torch.float64)
    expected = torch.einsum(item[1].equation, *operands)
    assert spec.output_shape(item[1].shapes) == tuple(expected.shape)
    torch.testing.assert_close(loops(spec, operands), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_printing_is_the_inverse_of_parsing(item: tuple[str, Row]) -> None:
    spec = parse(item[1])
    assert EinsumSpec.parse(str(spec), spec.ranks) == spec
    canonical = spec.canonical()
    assert canonical.canonical() == canonical
    assert canonical.labels == "".join(symbol(number) for number in range(spec.n_labels))
    assert EinsumSpec.parse(str(canonical), canonical.ranks) == canonical


@pytest.mark.parametrize(
    ("equation", "ranks", "expected"),
    [
        ("bA", [2], "bA->Ab"),
        ("zB,By", [2, 2], "zB,By->yz"),
        ("ij,ji", [2, 2], "ij,ji->"),
        ("ba...", [4], "bacd->cdab"),
        ("...a,b...", [2, 3], "da,bcd->cdab"),
        ("...->", [2], "ab->"),
        ("i...->i", [3], "iab->i"),
        ("ij->...ij", [2], "ij->ij"),
        (" i j , ... ->  ... i", [2, 1], "ij,a->ai"),
        ("", [0], "->"),
        (",", [0, 0], ",->"),
        ("éa,aß->éß", [2, 2], "éa,aß->éß"),
    ],
)
def test_forms_of_equations(equation: str, ranks: list[int], expected: str) -> None:
    assert str(EinsumSpec.parse(equation, ranks)) == expected


@pytest.mark.parametrize(
    ("equation", "ranks", "message"),
    [
        ("i1->i", [2], "'1' in operand 0 is not a label"),
        ("i\tj->ij", [2], "is not a label"),
        ("i. ..", [2], "'.' in operand 0"),
        ("i..j", [3], "'.' in operand 0"),
        ("i->j->k", [1], "'-' in the output"),
        ("i - > i", [1], "'-' in operand 0"),
        ("ij,->ij", [2], "1 operands were given, expected 2"),
        ("ij", [2, 2], "2 operands were given, expected 1"),
        ("ij", [3], "operand 0 has 3 dimensions, expected 2"),
        ("ij,ij", [2, 1], "operand 1 has 1 dimensions, expected 2"),
        ("...ij", [1], "operand 0 has 1 dimensions, expected 2 or more"),
        ("...i...", [3], "2 ellipses"),
        ("i->......i", [1], "2 ellipses"),
        ("ij->ii", [2], "'i' appears more than once in the output"),
        ("ij->k", [2], "'k' is in no operand"),
        ("...b->ab", [2], "'a' is in no operand"),
    ],
)
def test_malformed_equations_name_the_place(equation: str, ranks: list[int], message: str) -> None:
    with pytest.raises(EquationError, match="einsum") as caught:
        EinsumSpec.parse(equation, ranks)
    assert message in str(caught.value)
    with pytest.raises((RuntimeError, ValueError)):
        torch.einsum(equation, *(torch.zeros((2,) * rank) for rank in ranks))


def test_sublists() -> None:
    read = EinsumSpec.from_sublists
    assert read([[0, 1], [1, 2]], [0, 2], [2, 2]).canonical() == EinsumSpec(("ab", "bc"), "ac")
    # The implicit output is in the order of the integers, whatever letters stand for them.
    for numbers in ([3, 1], [30, 20], [60, 51], [200, 70], [55200, 55000]):
        assert read([numbers], None, [2]).canonical() == EinsumSpec(("ab",), "ba")
    assert read([[..., 1], [1, ...]], [..., 1], [3, 2]).canonical() == EinsumSpec(("abc", "cb"), "abc")
    assert read([[True, torch.tensor(4).item()]], [4], [2]).canonical() == EinsumSpec(("ab",), "b")
    assert read([list(range(0, 400, 4)), range(1, 200, 2)], [4], [100, 100]).n_labels == 200


@pytest.mark.parametrize(
    ("sublists", "output", "ranks", "message"),
    [
        ([[0, -1]], None, [2], "-1 in the subscripts of operand 0"),
        ([[0], ["i"]], None, [1, 1], "'i' in the subscripts of operand 1"),
        ([[0.5]], None, [1], "0.5 in the subscripts of operand 0"),
        ([[..., ...]], None, [1], "two ellipses"),
        ([[0, 1]], [2], [2], "in no operand"),
        ([[0, 1]], [0, 0], [2], "more than once"),
        ([[0, 1]], None, [3], "3 dimensions, expected 2"),
    ],
)
def test_malformed_sublists(sublists: list[list[object]], output: list[object], ranks: list[int], message: str) -> None:
    with pytest.raises(EquationError) as caught:
        EinsumSpec.from_sublists(sublists, output, ranks)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("equation", "shapes", "message"),
    [
        ("ij,jk->ik", [(2, 3), (4, 5)], "label 'j' has size 4 in operand 1, but 3 in operand 0"),
        ("i,i,i->i", [(1,), (2,), (3,)], "label 'i' has size 3 in operand 2, but 2 in operand 1"),
        ("ii->i", [(2, 3)], "label 'i' is repeated in operand 0 with sizes 2 and 3"),
        ("ii->i", [(1, 3)], "label 'i' is repeated in operand 0 with sizes 1 and 3"),
        ("i,i->i", [(0,), (2,)], "label 'i' has size 2 in operand 1, but 0"),
        ("ij->i", [(2,)], "operand 0 has shape (2,), expected 2 dimensions"),
        ("i,i->i", [(2,)], "1 operands were given, expected 2"),
    ],
)
def test_sizes_that_do_not_fit_name_label_and_operands(
    equation: str, shapes: list[tuple[int, ...]], message: str
) -> None:
    spec = EinsumSpec.parse(equation, [len(term) for term in equation.split("->")[0].split(",")])
    with pytest.raises(EquationError) as caught:
        spec.sizes(shapes)
    assert message in str(caught.value)


def test_sizes_broadcast() -> None:
    spec = EinsumSpec(("ab", "bc"), "ac")
    assert spec.sizes([(1, 1), (3, 0)]) == {"a": 1, "b": 3, "c": 0}
    assert spec.sizes([(2, 1), (0, 1)]) == {"a": 2, "b": 0, "c": 1}


def test_symbols_are_all_different_and_can_be_encoded() -> None:
    symbols = [symbol(number) for number in range(60_000)]
    assert len(set(symbols)) == len(symbols)
    "".join(symbols).encode()
    assert not any(label.isspace() for label in symbols[:52])


def test_facts() -> None:
    spec = EinsumSpec(("aab", "bc"), "c")
    assert (spec.labels, spec.summed, spec.n_labels, spec.ranks) == ("abc", "ab", 3, (3, 2))
    assert spec.lone([(2, 2, 3), (3, 4)]) == "a"
    assert spec.lone([(2, 2, 1), (3, 4)]) == "ab"
    assert EinsumSpec(("aab",), "ba").is_view_only
    assert not EinsumSpec(("aab",), "b").is_view_only
    assert not EinsumSpec(("a", "a"), "a").is_view_only


@pytest.mark.parametrize(
    ("outer", "position", "inner", "expected"),
    [
        ("ab,bc->ac", 0, "xy,yz->xz", "ad,db,bc->ac"),
        ("ab,bc->ac", 1, "ab,ba->ba", "ab,cb,bc->ac"),
        ("ii->i", 0, "a,b->ab", "i,i->i"),
        ("ii,i->", 0, "ab,b->ab", "ii,i,i->"),
        ("ab->a", 0, "ba->ab", "ba->a"),
        (",a->a", 0, "ab->", "bc,a->a"),
    ],
)
def test_inline(outer: str, position: int, inner: str, expected: str) -> None:
    def spec(text: str) -> EinsumSpec:
        return EinsumSpec.parse(text, [len(term) for term in text.split("->")[0].split(",")])

    assert str(spec(outer).inline(position, spec(inner))) == expected


def test_inline_refuses_another_rank() -> None:
    with pytest.raises(EquationError, match="gives 1 dimensions; expected 2"):
        EinsumSpec(("ab",), "a").inline(0, EinsumSpec(("xy",), "x"))


@given(equations(max_operands=3), equations(max_operands=2), st.data())
def test_an_inlined_einsum_is_one_after_the_other(inner_row: Row, outer_row: Row, data: st.DataObject) -> None:
    inner = parse(inner_row)
    operands = make_operands(inner_row.shapes, torch.int64)
    middle = loops(inner, operands)
    # Any operand of the other equation takes the result, with labels that fit its sizes.
    labels = data.draw(st.text("abcd", min_size=middle.dim(), max_size=middle.dim()))
    terms = [labels, *outer_row.equation.split("->")[0].split(",")]
    outer = EinsumSpec(tuple(terms), "".join(sorted(set(labels)))[: data.draw(st.integers(0, 3))])
    values = [middle, *make_operands(outer_row.shapes, torch.int64, seed=1)]
    fused = outer.inline(0, inner)
    every = [*operands, *values[1:]]
    try:
        outer.sizes([value.shape for value in values])
        fused.sizes([value.shape for value in every])
    except EquationError:
        return
    torch.testing.assert_close(loops(fused, every), loops(outer, values))
