"""``lazy_einsum.einsum`` is ``torch.einsum``: same results, views, gradients and errors, in every form."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import ROWS, Row, equations, make_operands, row_id
from hypothesis import given
from hypothesis import strategies as st
from oracle import loops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from lazy_einsum import contract
from lazy_einsum.contract import einsum
from lazy_einsum.errors import EquationError
from lazy_einsum.spec import EinsumSpec, symbol

DTYPES = [torch.float64, torch.int64, torch.complex128, torch.int32, torch.bool, torch.float32]


def same_storage(result: torch.Tensor, operand: torch.Tensor) -> bool:
    return result.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()


def check(equation: str, operands: list[torch.Tensor]) -> None:
    """Everything that can be told of the two results is the same."""
    try:
        expected = torch.einsum(equation, *operands)
    except RuntimeError:
        if operands[0].dtype == torch.bool:
            # The matrix product of bool does not exist.
            with pytest.raises(RuntimeError):
                einsum(equation, *operands)
        return
    result = einsum(equation, *operands)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert result.is_contiguous() or not expected.is_contiguous()
    assert all(result is not operand for operand in operands)
    if result.numel():
        assert [same_storage(result, each) for each in operands] == [same_storage(expected, each) for each in operands]
    if len(operands) == 1 and EinsumSpec.parse(equation, [operands[0].dim()]).is_view_only:
        assert result.stride() == expected.stride()
    if operands[0].dtype not in (torch.float32, torch.bool):
        spec = EinsumSpec.parse(equation, [operand.dim() for operand in operands])
        exact = loops(spec, operands).to(result.dtype)
        torch.testing.assert_close(result, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_rows(item: tuple[str, Row], dtype: torch.dtype, device: str) -> None:
    row = item[1]
    check(row.equation, make_operands(row.shapes, dtype, device=device))
    for seed in range(2):
        check(row.equation, make_operands(row.shapes, dtype, seed, strided=True, device=device))


@given(equations(), st.sampled_from(DTYPES), st.integers(0, 9))
def test_random_equations(row: Row, dtype: torch.dtype, seed: int) -> None:
    check(row.equation, make_operands(row.shapes, dtype, seed, strided=True))


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_gradients(item: tuple[str, Row], device: str) -> None:
    row = item[1]

    def gradients(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        operands = make_operands(row.shapes, torch.complex128, strided=True, device=device)
        operands = [operand.requires_grad_() for operand in operands]
        result = function(row.equation, *operands)
        return torch.autograd.grad(result.abs().pow(2).sum(), operands)

    for gradient, expected in zip(gradients(einsum), gradients(torch.einsum), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


FORMS: list[Callable[[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda f, a, b: f("ij,jk->ik", a, b),
    lambda f, a, b: f("ij,jk->ik", [a, b]),
    lambda f, a, b: f("ij,jk->ik", (a, b)),
    lambda f, a, b: f(" i j , jk->k i", a, b),
    lambda f, a, b: f("ij,jk", a, b),
    lambda f, a, b: f(a, [0, 1], b, [1, 2], [0, 2]),
    lambda f, a, b: f(a, [0, 1], b, [1, 2]),
    lambda f, a, b: f(a, (30, 51), b, (51, 2)),
    lambda f, a, b: f(a, [0, 1], b, [1, 2], []),
    lambda f, a, b: f(a, [..., 1], b, [1, ...], [...]) if a.shape[0] == b.shape[1] else f(a, [..., 1]),
    lambda f, a, b: f(a, [0, 1]),
    lambda f, a, b: f(a, [1, 0]),
    lambda f, a, b: f("ij->j", [a]),
]


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_forms_of_calls(form: Callable[..., torch.Tensor], device: str) -> None:
    a, b = make_operands(((3, 4), (4, 5)), torch.float64, device=device)
    torch.testing.assert_close(form(einsum, a, b), form(torch.einsum, a, b))


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("ij",),
        ("ij->ik", torch.ones(2, 2)),
        ("ij,jk->ik", torch.ones(2, 3), torch.ones(4, 5)),
        ("ij", torch.ones(2)),
        ("ij,jk", torch.ones(2, 2)),
        ("ii", torch.ones(2, 3)),
        ("i!", torch.ones(2, 3)),
        (torch.ones(2), [-1]),
        (torch.ones(2), [0], [1]),
        ("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 4, dtype=torch.float64)),
        ("ij,jk,kl->il", torch.ones(2, 3), torch.ones(3, 4, dtype=torch.float64), torch.ones(4, 5)),
    ],
    ids=range(12),
)
def test_bad_calls_raise_as_in_torch(args: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.einsum(*args)
    with pytest.raises((RuntimeError, ValueError)):
        einsum(*args)


def test_errors_say_what_to_change() -> None:
    with pytest.raises(EquationError, match="label 'j' has size 4 in operand 1, but 3 in operand 0"):
        einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeError, match="operand 1 is a float, expected a tensor"):
        einsum("ij,->ij", torch.ones(2, 3), 2.0)
    with pytest.raises(EquationError, match="got 1 arguments"):
        einsum("ij")


def test_mixed_types_promote_where_torch_promotes() -> None:
    a, b = torch.randn(3), torch.randn(3, dtype=torch.float64)
    result = einsum("i,i->i", a, b)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.einsum("i,i->i", a, b))


def test_more_labels_than_letters() -> None:
    operands = [torch.randn(2, 3, dtype=torch.float64) for _ in range(40)]
    chain = [operand if number % 2 == 0 else operand.T for number, operand in enumerate(operands)]
    expected = torch.linalg.multi_dot(chain)
    text = ",".join(symbol(i) + symbol(i + 1) for i in range(40)) + "->" + symbol(0) + symbol(40)
    torch.testing.assert_close(einsum(text, *chain), expected)
    sixty = [chain[i % 2 if i < 58 else i - 20] for i in range(60)]
    arguments: list[Any] = []
    for number, operand in enumerate(sixty):
        arguments += [operand, [number, number + 1]]
    with pytest.raises((RuntimeError, ValueError)):
        torch.einsum(*arguments)
    torch.testing.assert_close(einsum(*arguments), torch.linalg.multi_dot(sixty))
    torch.testing.assert_close(einsum(*arguments, [60, 0]), torch.linalg.multi_dot(sixty).T)
    for tensor in sixty:
        tensor.requires_grad_()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert einsum(*arguments).shape == (2, 2)


def test_a_prepared_contraction_is_used_again() -> None:
    contract._prepare.cache_clear()
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for _ in range(3):
        einsum("ij,jk->ik", a, b)
    assert contract._prepare.cache_info()[:2] == (2, 1)
    einsum("ij,jk->ik", a.double(), b.double())
    einsum("ij,jk->ik", a.T.contiguous().T, b)
    einsum("ij,jk->ik", a[:2], b)
    einsum("ij,jk->ik", a.requires_grad_(), b)
    assert contract._prepare.cache_info()[:2] == (2, 5)
    assert contract._prepare.cache_info().maxsize == 1024


TEXT = "zij,zjk,zk->zi"


def three(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return make_operands(((6, 3, 4), (6, 4, 5), (6, 5)), dtype)


def test_under_vmap_and_grad() -> None:
    operands = three()
    batched = torch.vmap(lambda a, b, c: einsum("ij,jk,k->i", a, b, c))(*operands)
    torch.testing.assert_close(batched, torch.einsum(TEXT, *operands))
    mixed = torch.vmap(lambda a: einsum("ij,jk,k->i", a, operands[1][0], operands[2][0]))(operands[0])
    torch.testing.assert_close(mixed, torch.einsum("zij,jk,k->zi", operands[0], operands[1][0], operands[2][0]))

    def loss(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda a: function(TEXT, a, *operands[1:]).sin().sum()

    torch.testing.assert_close(
        torch.func.grad(loss(einsum))(operands[0]), torch.func.grad(loss(torch.einsum))(operands[0])
    )
    hessian = torch.func.hessian(loss(einsum))(operands[0])
    torch.testing.assert_close(hessian, torch.func.hessian(loss(torch.einsum))(operands[0]))
    jacobian = torch.func.jacfwd(lambda a: einsum(TEXT, a, *operands[1:]))(operands[0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda a: torch.einsum(TEXT, a, *operands[1:]))(operands[0]))


def test_forward_mode() -> None:
    operands = three()
    tangent = torch.randn_like(operands[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(operands[0], tangent)
        result = torch.autograd.forward_ad.unpack_dual(einsum(TEXT, dual, *operands[1:])).tangent
    torch.testing.assert_close(result, torch.einsum(TEXT, tangent, *operands[1:]))


def test_under_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        operands = [mode.from_tensor(operand) for operand in three()]
        result = einsum(TEXT, *operands)
    assert result.shape == (6, 3)


def test_under_make_fx_with_symbolic_sizes() -> None:
    graph = make_fx(lambda a, b, c: einsum("ij,jk,k->i", a, b, c), tracing_mode="symbolic")(
        torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    )
    operands = [torch.randn(7, 2), torch.randn(2, 9), torch.randn(9)]
    torch.testing.assert_close(graph(*operands), torch.einsum("ij,jk,k->i", *operands))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("equation", [TEXT, "...ij,...jk,...k", "zij,zjk->zik", "zij->zj"])
def test_under_dynamo(equation: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: einsum(equation, *args) * 2, backend="eager", fullgraph=True, dynamic=dynamic
    )
    operands = [operand.requires_grad_() for operand in three()][: equation.count(",") + 1]
    torch.testing.assert_close(compiled(*operands), torch.einsum(equation, *operands) * 2)
    if dynamic:
        fewer = [operand.detach()[:4].clone().requires_grad_() for operand in operands]
        torch.testing.assert_close(compiled(*fewer), torch.einsum(equation, *fewer) * 2)


def test_under_dynamo_with_many_labels() -> None:
    torch._dynamo.reset()
    operands = [torch.randn(2, 2, dtype=torch.float64) for _ in range(60)]

    def chain(*tensors: torch.Tensor) -> torch.Tensor:
        arguments: list[Any] = []
        for number, tensor in enumerate(tensors):
            arguments += [tensor, [number, number + 1]]
        return einsum(*arguments)

    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*operands), torch.linalg.multi_dot(operands))


def test_under_autocast() -> None:
    operands = three(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = einsum(TEXT, *operands), torch.einsum(TEXT, *operands)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(einsum(TEXT, *operands), torch.einsum(TEXT, *operands))


def test_under_jit_trace() -> None:
    traced = torch.jit.trace(lambda a, b: einsum("ij,jk->ik", a, b), (torch.ones(2, 3), torch.ones(3, 4)))
    operands = [torch.randn(5, 6), torch.randn(6, 7)]
    torch.testing.assert_close(traced(*operands), operands[0] @ operands[1])


def test_modes_and_subclasses_see_one_call() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        result = einsum(TEXT, *three())
    assert seen.count(einsum) == 1
    torch.testing.assert_close(result, torch.einsum(TEXT, *three()))

    class Marked(torch.Tensor):
        pass

    operands = three()
    marked = einsum(TEXT, operands[0].as_subclass(Marked), *operands[1:])
    assert type(marked) is Marked
    torch.testing.assert_close(marked.as_subclass(torch.Tensor), torch.einsum(TEXT, *operands))
    result = einsum(operands[0].as_subclass(Marked), [0, 1, 2], operands[1], [0, 2, 3], [0, 1, 3])
    assert type(result) is Marked


def test_conjugated_operands() -> None:
    a, b = make_operands(((3, 4), (4, 5)), torch.complex128)
    torch.testing.assert_close(einsum("ij,jk->ik", a.conj(), b), torch.einsum("ij,jk->ik", a.conj(), b))
    torch.testing.assert_close(einsum("ij,kj->ik", a, a.conj()), a @ a.mH)
    assert einsum("ij->ji", a.conj()).is_conj()


def test_parameters_keep_learning() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    einsum("ij->ji", weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones(4, 3))
    with torch.no_grad():
        assert not einsum("ij,jk->ik", weight, weight.T).requires_grad
    with torch.inference_mode():
        assert einsum("ij,jk->ik", weight, weight.T).is_inference()


def test_views_write_through() -> None:
    tensor = torch.zeros(3, 4)
    einsum("ij->ji", tensor)[1, 2] = 5
    assert tensor[2, 1] == 5
    einsum("ii->i", tensor[:, :3]).add_(1)
    assert tensor.sum() == 8


def test_threads() -> None:
    contract._prepare.cache_clear()
    operands = three()
    expected = torch.einsum(TEXT, *operands)
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.extend(einsum(TEXT, *operands) for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    for result in results:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("equation", ["a,a->", "aa,a->", "ab,bc->ac", "a,b->ab", "a->a"])
def test_results_of_lazily_conjugated_operands_are_conjugated_where_those_of_torch_are(equation: str) -> None:
    terms = equation.split("->")[0].split(",")
    operands = [torch.randn([3] * len(term), dtype=torch.complex128).conj() for term in terms]
    result, expected = einsum(equation, *operands), torch.einsum(equation, *operands)
    assert result.is_conj() == expected.is_conj()
    torch.testing.assert_close(result, expected)
