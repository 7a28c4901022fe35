"""Calls that are einsums under another name: what is read of them, and what becomes of them in a network or alone."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from behaviour import clone_tree, differences, observe
from checks import traced
from fuzzer import every_network
from products import CASES, NEW_DIMS, OTHERS, PERMUTATIONS, Case
from torch import Tensor

from lazy_einsum import OptimizedModule
from lazy_einsum.products import is_permutation, read_product

pytestmark = pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:The use of `x.T`")


def tensors(case: Case, dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    real = [torch.rand(shape, generator=generator, dtype=torch.float64) + 1 for shape in case.shapes]
    if dtype.is_complex:
        real = [x + 1j * torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in real]
    differentiable = grad and (dtype.is_floating_point or dtype.is_complex)
    return tuple(x.to(dtype).requires_grad_(differentiable) for x in real)


def calls(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Any]:
    return [node for node in traced(function, inputs).graph.nodes if node.op.startswith("call_")]


DTYPES = (torch.float64, torch.float32, torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_einsum_that_is_read_gives_the_values_of_the_call(case: Case, dtype: torch.dtype) -> None:
    inputs = tensors(case, dtype, grad=case.complex or not dtype.is_complex)
    program = traced(case.call, inputs)
    (node,) = [node for node in program.graph.nodes if node.op.startswith("call_")]
    product = read_product(node)
    if dtype.is_complex and not case.complex:
        assert product is None
        return
    assert product is not None
    values = dict(zip([n for n in program.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    result = torch.einsum(str(product.spec.canonical()), *(values[operand] for operand in product.operands))
    if product.added is not None:
        result = result + values[product.added]
    torch.testing.assert_close(result, case.call(*inputs))


@pytest.mark.parametrize("name", NEW_DIMS)
def test_dimensions_that_are_added_for_a_product(name: str) -> None:
    inputs = tensors(Case("", NEW_DIMS[name], ((3, 3), (3, 3))))
    program = traced(NEW_DIMS[name], inputs)
    node = [node for node in program.graph.nodes if node.op.startswith("call_")][-1]
    product = read_product(node)
    assert product is not None and sum(map(len, product.spec.inputs)) == 4


def test_a_dimension_that_is_new_to_all_is_one_of_theirs() -> None:
    inputs = tensors(Case("", operator.mul, ((3, 3), (3, 3))))
    *_, node = calls(lambda x, y: x[:, None] * y[:, None], inputs)
    product = read_product(node)
    assert product is not None and [len(term) for term in product.spec.inputs] == [3, 3]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_what_is_no_plain_product_is_not_read(case: Case) -> None:
    inputs = tensors(case, torch.complex128, grad=False)
    *_, last = calls(case.call, inputs)
    assert read_product(last) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name == "@"], ids=str)
def test_coarse_types_and_integers_are_not_read(case: Case, dtype: torch.dtype) -> None:
    (node,) = calls(case.call, tensors(case, dtype))
    assert read_product(node) is None
    assert (read_product(node, reassociate=True) is not None) == dtype.is_floating_point


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations(name: str) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    node = calls(PERMUTATIONS[name], (x,))[-1]
    product = read_product(node)
    assert product is not None and is_permutation(node)
    entering = (
        x if "x[0" not in name and PERMUTATIONS[name](x).dim() == 3 else x[0] if "vector" not in name else x[0, 0]
    )
    assert torch.equal(torch.einsum(str(product.spec), entering), PERMUTATIONS[name](x))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.mH, lambda x: x.adjoint(), lambda x: x[0].H, lambda x: x.permute(dims=(0, 2, 1)), lambda x: x.real],
)
def test_what_is_no_plain_permutation(function: Callable[[Tensor], Tensor]) -> None:
    node = calls(function, (torch.ones(2, 3, 4, dtype=torch.complex64),))[-1]
    assert read_product(node) is None


# --- alone: the very call that the user wrote -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES + OTHERS, ids=str)
def test_alone_it_stays_the_call_that_the_user_wrote(case: Case) -> None:
    inputs = tensors(case, grad=case not in OTHERS)
    wrapped = OptimizedModule(case.call, on_untraceable="raise")
    with every_network():
        wrapped(*inputs)
    (entry,) = wrapped.specializations.values()
    if case.name.startswith(("bilinear", "multi_dot", "chain_matmul")):
        assert len(case.shapes) > 2 or entry.stages["lower"] == entry.stages["trace"]
    else:
        assert entry.stages["lower"] == entry.stages["trace"]


# --- in a network -----------------------------------------------------------------------------------------------------


def networks(case: Case) -> Iterator[tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]]:
    """Programs in which the call has a product for an operand, or is one of a product's."""
    for place, shape in enumerate(case.shapes):
        if shape:
            size = shape[max(len(shape) - 2, 0)]

            def inner(matrix: Tensor, *rest: Tensor, place: int = place) -> Tensor:
                changed = matrix @ rest[place]
                return case.call(*rest[:place], changed, *rest[place + 1 :])

            yield f"operand {place}", inner, ((size, size), *case.shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = case.call(*tensors(case)).shape
    if result:

        def outer(matrix: Tensor, *rest: Tensor) -> Tensor:
            return case.call(*rest).mT @ matrix if len(result) > 1 else case.call(*rest) @ matrix

        yield "result", outer, ((result[max(len(result) - 2, 0)], 3), *case.shapes)


NETWORKS = [(case, *network) for case in CASES for network in networks(case)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("case", "function", "shapes"),
    [(case, function, shapes) for case, _, function, shapes in NETWORKS],
    ids=[f"{case}, {place}" for case, place, _, _ in NETWORKS],
)
def test_in_a_network_it_does_what_eager_does(
    case: Case, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    if dtype.is_complex and not case.complex:
        pytest.skip("left alone")
    inputs = tensors(Case("", function, shapes), dtype)
    wrapped = OptimizedModule(function, on_untraceable="raise")
    with every_network(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = observe(wrapped, clone_tree(inputs), second=True)
    theirs = observe(function, clone_tree(inputs), second=True)
    assert differences(ours, theirs) == []


def test_the_networks_of_the_table_are_joined() -> None:
    """The control: what these tests compare is another program than the user's."""
    joined = 0
    for _, _, function, shapes in NETWORKS:
        wrapped = OptimizedModule(function, on_untraceable="raise")
        with every_network(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped(*tensors(Case("", function, shapes)))
        (entry,) = wrapped.specializations.values()
        joined += "einsum" in entry.stages["join_products"]
    assert joined > 0.8 * len(NETWORKS)


# --- sizes that vary --------------------------------------------------------------------------------------------------


def square_chain(a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
    return (a @ b @ c) @ x


def low_rank(x: Tensor, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w + 0.5 * (b @ a))


def turned(x: Tensor, w: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return x.mT @ (x @ (b @ a).T), (b @ a).T @ w


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (square_chain, lambda n: ((n, n), (n, n), (n, n), (n,))),
        (square_chain, lambda n: ((5, n), (n, 90), (90, n), (n, 4))),
        (low_rank, lambda n: ((n, 200), (180, 200), (180, 2), (2, 200))),
        (low_rank, lambda n: ((3, 4, 200), (n, 200), (n, 2), (2, 200))),
        (turned, lambda n: ((7, n), (n, 50), (n, 2), (2, n))),
        (turned, lambda n: ((4, 7, 90), (90, n), (90, 2), (2, 90))),
    ],
)
def test_code_for_all_sizes(function: Callable[..., Any], shapes: Callable[[int], tuple[tuple[int, ...], ...]]) -> None:
    wrapped = OptimizedModule(function, on_untraceable="raise")
    with every_network():
        for size in (90, 100, 110, 120, 95, 200):
            inputs = tensors(Case("", function, shapes(size)))
            ours, theirs = observe(wrapped, clone_tree(inputs)), observe(function, clone_tree(inputs))
            assert differences(ours, theirs) == [], size
    assert any(entry.is_generic for entry in wrapped.specializations.values())
    assert wrapped.cache_info().hits > 0
