"""Sizes and numbers that vary between calls: one specialization serves them, under its own conditions."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from behaviour import clone_tree, differences, observe
from equations import ROWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lazy_einsum import CacheThrashWarning, OptimizedModule
from lazy_einsum.generic import comparable, generalize, values_of
from lazy_einsum.signature import Arguments, Symbol
from lazy_einsum.sizes import SymbolicSize

einsum = torch.einsum


def x_of(rows: int, columns: int = 6, *, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).requires_grad_(grad)


class Layer(nn.Module):
    """Has weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        self.u = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
        self.register_buffer("b", torch.randn(5, dtype=torch.float64))


class Case(NamedTuple):
    """A program, and arguments for a size.

    ``misses`` is how many specializations serve all of ``sizes``.
    """

    name: str
    forward: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]] = lambda n: (x_of(n, grad=True),)
    sizes: tuple[int, ...] = (4, 7, 9, 12, 5, 30, 4)
    misses: int = 3


def _scatter(self: Any, x: Tensor, index: Tensor, count: int) -> Tensor:
    messages = einsum("ei,ij,jk->ek", x, self.w, self.u)
    return torch.zeros(count, 5, dtype=x.dtype).index_add(0, index, messages)


def _branch(self: Any, x: Tensor) -> Tensor:
    h = einsum("bi,ij->bj", x, self.w)
    return h * 2 if x.shape[0] > 8 else h.relu()


def _heads(self: Any, x: Tensor) -> Tensor:
    b, _ = x.shape
    q = x.reshape(b, 2, 3)
    scores = einsum("bhd,chd->hbc", q, q) * (q.shape[-1] ** -0.5)
    return einsum("hbc,chd->bhd", scores.softmax(-1), q).reshape(b, -1)


def _mean(self: Any, x: Tensor) -> Tensor:
    return einsum("bi,ij->j", x, self.w) / x.shape[0] + 1.0 / len(self.b)


def _isinstance(self: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    if isinstance(n, int) and n > 8:
        return einsum("bi,ij->bj", x, self.w) * 3
    return einsum("bi,ij->bj", x, self.w)


def _grad(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    energy = einsum("bi,ij,jk->bk", x, self.w, self.u).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return energy, force


def _write(self: Any, x: Tensor) -> Tensor:
    h = einsum("bi,ij->bj", x, self.w)
    h[: h.shape[0] // 2].mul_(2.0)
    with torch.no_grad():
        self.b.add_(1)
    return einsum("bj,jk->bk", h, self.u) + self.b


def _regions(self: Any, x: Tensor) -> tuple[Tensor, Tensor, int]:
    with torch.no_grad():
        weight = einsum("ij,jk->ik", self.w, self.u)
    h = einsum("bi,ik->bk", x, weight)
    return h, h.t(), x.shape[0] * 2 + 1


def _slices(self: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    first, second = torch.split(x, [n - 2, 2])
    return torch.cat([einsum("bi,ij->bj", second, self.w), einsum("bi,ij->bj", first, self.w)])[1:]


def _pairs(self: Any, x: Tensor) -> Tensor:
    distance = x[:, None] - x[None]
    return einsum("abi,ij,abj->ab", distance, self.w, einsum("abi,ij->abj", distance, self.w) * 0.5)


CASES = [
    Case("einsum", lambda self, x: einsum("bi,ij,jk->bk", x, self.w, self.u) * 2.0),
    Case("elementwise", lambda self, x: (x * 2 + x.sum(0)).tanh()),
    Case("matmul", lambda self, x: (x @ self.w @ self.u).relu() + self.b),
    Case("a branch on the size", _branch, misses=4),
    Case("isinstance(n, int)", _isinstance, misses=4),
    Case("heads", _heads),
    Case("mean over the size", _mean),
    Case(
        "two arguments of one size",
        lambda self, x, y: einsum("bi,bj,ij->b", x, y, self.w),
        lambda n: (x_of(n), x_of(n, 5)),
    ),
    Case(
        "two sizes",
        lambda self, x, y: einsum("ai,ci,ij->acj", x, y, self.w),
        lambda n: (x_of(n, grad=True), x_of(3 * n % 11 + 2)),
    ),
    Case(
        "one size a multiple of the other",
        lambda self, x, y: einsum("bi,bcj,ij->bc", x, y.view(-1, 3, 5), self.w),
        lambda n: (x_of(n), x_of(3 * n, 5)),
    ),
    Case("inner size, strided", lambda self, x: einsum("ib,ij->bj", x, self.w), lambda n: (x_of(n).t(),)),
    Case("inner size", lambda self, x: einsum("ib,ij->bj", x, self.w), lambda n: (x_of(6, n, grad=True),)),
    Case(
        "messages on edges",
        _scatter,
        lambda n: (x_of(n, grad=True), torch.arange(n) % 5, 5 + n % 3),
        sizes=(4, 7, 11, 12, 20, 30, 4),
    ),
    Case("forces", _grad),
    Case("writes", _write),
    Case("regions, sizes returned", _regions),
    Case("slices", _slices, sizes=(4, 7, 9, 12, 5, 30, 4)),
    Case("pairs", _pairs),
    Case("nested", lambda self, x: {"a": einsum("bi,ij->bj", x["k"][0], self.w)}, lambda n: ({"k": [x_of(n)]},)),
    Case("dropout", lambda self, x: nn.functional.dropout(einsum("bi,ij->bj", x, self.w), 0.5, True)),
    Case("layer norm", lambda self, x: nn.functional.layer_norm(einsum("bi,ij->bj", x, self.w), (5,))),
    Case("integers", lambda self, x: einsum("bi,bj->ij", x, x) * 3, lambda n: (torch.arange(n * 6).view(n, 6),)),
    Case(
        "a factor that varies", lambda self, x, s: einsum("bi,ij->bj", x * s, self.w) / s, lambda n: (x_of(4), 0.5 + n)
    ),
    Case("a factor compared", lambda self, x, s: x * s if s > 8 else -x, lambda n: (x_of(4), 0.5 + n), misses=4),
]


def _module(case: Case) -> nn.Module:
    return type("Program", (Layer,), {"forward": case.forward})()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_that_vary(case: Case) -> None:
    expected, module = _module(case), _module(case)
    wrapped = OptimizedModule(module)
    for size in case.sizes:
        arguments = case.arguments(size)
        theirs = observe(expected, clone_tree(arguments), second=True)
        ours = observe(wrapped, clone_tree(arguments), second=True, module=module)
        problems = differences(ours, theirs)
        assert theirs.error is None
        assert not problems, (size, problems, wrapped.specializations.keys())
    info = wrapped.cache_info()
    assert (info.misses, info.fallbacks) == (case.misses, 0), list(wrapped.specializations)
    assert any(entry.is_generic for entry in wrapped.specializations.values())


def test_zero_and_one_have_their_own() -> None:
    wrapped = OptimizedModule(_module(CASES[0]))
    for size in (5, 6, 7, 1, 0, 8, 1, 0, 2):
        x = x_of(size)
        torch.testing.assert_close(wrapped(x), wrapped.module(x))
    assert wrapped.cache_info()[:2] == (4, 5)
    sizes = [key.arguments.leaves[0].shape[0] for key in wrapped.specializations]
    assert sizes == [5, 6, 1, 0, SymbolicSize.symbol("s0", 7)]


def test_what_is_known_stays() -> None:
    """Code for sizes that came first is kept and used; generic code leaves these to it."""
    wrapped = OptimizedModule(_module(CASES[0]))
    for size in (5, 6, 7, 8):
        wrapped(x_of(size))
    exact, other, generic = wrapped.specializations.values()
    for size in (5, 5, 6, 9):
        wrapped(x_of(size))
    assert (exact.hits, other.hits, generic.hits) == (2, 1, 2)
    assert str(generic.signature).startswith("(f64[s0, 6])")


def test_sizes_that_come_often_get_code_of_their_own() -> None:
    wrapped = OptimizedModule(_module(CASES[0]))
    for size in (5, 6, 7):
        wrapped(x_of(size))
    x = x_of(50)
    for _ in range(300):
        wrapped(x)
    assert len(wrapped.specializations) == 4 and wrapped.cache_info().misses == 3
    *_, last = wrapped.specializations.values()
    assert last.signature.arguments.leaves[0].shape == (50, 6) and last.hits > 10
    assert "size" not in last.code


def _written_copy(x: Tensor, y: Tensor, z: Tensor) -> Any:
    product = einsum("ab,bc,cd->da", x, y, z)  # not contiguous in eager mode
    flat = product.reshape(-1)
    flat.add_(1)
    return product, flat


def _written_product(x: Tensor, y: Tensor, z: Tensor) -> Any:
    product = einsum("ab,bc,cd->da", x, y, z)
    flat = product.contiguous()
    product.mul_(2)
    return flat


def _two_results(x: Tensor, y: Tensor, z: Tensor) -> Any:
    product = einsum("ab,bc,cd->da", x, y, z)
    return product, product.contiguous()


def _noise(x: Tensor, y: Tensor, z: Tensor) -> Any:
    return torch.nn.functional.dropout(einsum("ab,bc,cd->da", x, y, z))


def _one_result(x: Tensor, y: Tensor, z: Tensor) -> Any:
    return einsum("ab,bc,cd->da", x, y, z).reshape(-1) * 2


@pytest.mark.parametrize(
    ("function", "misses"),
    [(_written_copy, 5), (_written_product, 5), (_two_results, 5), (_noise, 5), (_one_result, 3)],
)
def test_layouts_that_depend_on_sizes(function: Callable[..., Any], misses: int) -> None:
    """How an einsum of three lies depends on sizes; whether a later call copies, and where it puts which random number,
    must be as in eager mode.
    """
    wrapped = OptimizedModule(function)
    for n in (3, 4, 5, 6, 7):
        args = (x_of(n, 3), x_of(3, 5), x_of(5, 4))
        assert differences(observe(wrapped, args), observe(function, args)) == []
    assert wrapped.cache_info().misses == misses


def test_a_copy_that_no_earlier_call_made() -> None:
    def function(x: Tensor, y: Tensor, z: Tensor) -> Any:
        product = einsum("ab,bc,cd->ad", x, y, z)  # contiguous or not: in the order that torch takes for these sizes
        flat = product.reshape(-1)
        flat.add_(1)
        return product

    wrapped, layouts = OptimizedModule(function), set()
    for b, c in ((8, 30), (9, 31), (10, 32), (11, 33), (30, 2)):
        args = (x_of(30, b), x_of(b, c), x_of(c, 8))
        layouts.add(einsum("ab,bc,cd->ad", *args).is_contiguous())
        assert differences(observe(wrapped, args), observe(function, args)) == []
    assert layouts == {True, False}


def test_layouts_that_depend_on_no_size_that_varies() -> None:
    """The result of an einsum of three lies as in eager, so autograd keeps copies or views as in eager."""
    w = x_of(5, 5, grad=True)

    def function(x: Tensor) -> Tensor:
        cube = einsum("ab,ba,cb->abc", w, w, w)
        turned = einsum("abc->bca", cube) * 2
        product = einsum("yfk,kyf,g->fg", cube, turned, x[0])
        turned.mul_(3)
        return product

    wrapped = OptimizedModule(function, dynamic=True)
    for n in (4, 6, 7):
        args = (x_of(n, 5),)
        leaves = {"w": w}
        ours, theirs = observe(wrapped, args, leaves=leaves), observe(function, args, leaves=leaves)
        assert theirs.gradient_error is None and differences(ours, theirs) == []
    assert wrapped.cache_info()[:2] == (1, 2)


def test_operands_written_later() -> None:
    """An einsum of three that has to stay as it is stays so for all sizes."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        square = x * x
        product = einsum("bgv,bgv,qgv,btv->vtgq", square, square, square, square)
        square.mul_(2)
        return product + y

    wrapped = OptimizedModule(function)
    for n in (3, 4, 5, 6, 7):
        args = (x_of(n * 6, 2).view(n, 6, 2).requires_grad_(), torch.zeros(n, dtype=torch.float64))
        assert differences(observe(wrapped, args), observe(function, args)) == []
    assert wrapped.cache_info().misses == 3


@pytest.mark.parametrize(("dynamic", "misses"), [(None, 3), (True, 2), (False, 5)])
def test_dynamic(dynamic: bool | None, misses: int) -> None:
    wrapped = OptimizedModule(_module(CASES[0]), dynamic=dynamic)
    for size in (5, 6, 7, 8, 9, 5):
        wrapped(x_of(size))
    assert wrapped.cache_info().misses == misses


def test_modes_have_their_own_generic_code() -> None:
    module = _module(Case("", lambda self, x: einsum("bi,ij->bj", x, self.w) * (2 if self.training else 3)))
    wrapped = OptimizedModule(module)
    for size in (5, 6, 7, 8, 9):
        for training in (True, False):
            wrapped.train(training)
            torch.testing.assert_close(wrapped(x_of(size)), module(x_of(size)))
    # Two sizes in two modes, and generic code for each mode.
    assert wrapped.cache_info().misses == 6


def test_an_order_is_used_where_it_is_good() -> None:
    """With few rows the product goes from the left, with many the weights are multiplied first."""
    a, b = torch.randn(64, 64, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)
    wrapped = OptimizedModule(lambda x, a, b: einsum("ni,ij,jk->nk", x, a, b))
    for size in (2, 3, 4, 5, 6, 2000, 3000, 7, 2500):
        x = x_of(size, 64)
        torch.testing.assert_close(wrapped(x, a, b), x @ a @ b)
    generic = [entry for entry in wrapped.specializations.values() if entry.is_generic]
    assert len(generic) == 2 and wrapped.cache_info().misses == 4
    assert {entry.plans[0].path for entry in generic} == {((0, 1), (0, 1)), ((1, 2), (0, 1))}
    assert all(entry.signature.conditions for entry in generic)


def test_sizes_that_are_rounded_have_ranges_too() -> None:
    """``arange(n, -n, -1.0)`` has ``ceil(2 * n)`` elements: orders with such a size are tried at others as well."""

    def child(x: Tensor, w: Tensor) -> Tensor:
        places = torch.arange(x.shape[0], -x.shape[0], -1.0, dtype=x.dtype)
        return torch.einsum("p,ni,ij->pnj", places, x, w)

    wrapped = OptimizedModule(child)
    for size in (4, 6, 7, 9, 300):
        x, w = x_of(size), x_of(6, 3)
        torch.testing.assert_close(wrapped(x, w), child(x, w))
    assert any(entry.is_generic for entry in wrapped.specializations.values())
    assert wrapped.cache_info().fallbacks == 0


def test_numbers_that_fill_the_cache_are_warned_of() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return x * math.sqrt(scale)

    wrapped = OptimizedModule(Scale())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(40):
            torch.testing.assert_close(wrapped(x_of(3), 1.5 + step), wrapped.module(x_of(3), 1.5 + step))
    messages = [str(w.message) for w in caught if w.category is CacheThrashWarning]
    assert len(messages) == 1 and "argument 1" in messages[0] and "pass it as a tensor" in messages[0]


def test_numbers_keep_their_kind() -> None:
    """A float that varies is served by generic code; an int or a bool in its place is another call."""
    wrapped = OptimizedModule(lambda x, s: (x * s, type(s).__name__))
    for value in (0.5, 0.75, 2.5, 3, True, 3.5, float("inf"), 4.5, -1.5):
        ours, theirs = wrapped(x_of(3), value), wrapped.module(x_of(3), value)
        torch.testing.assert_close(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def test_a_size_used_as_a_number_is_not_generic() -> None:
    """``range(n)``, a key of a dictionary, text: the code is for one size."""
    cases: list[Callable[[Tensor], Any]] = [
        lambda x: sum((x[i] * i for i in range(x.shape[0])), x[0]),
        lambda x: x * {n: n + 1 for n in range(40)}[x.shape[0]],
        lambda x: (x + 1, f"{x.shape[0]}"),
        lambda x: x * math.sqrt(x.shape[0]),
        lambda x: torch.stack(list(x)),
        lambda x: x * len(x),
        lambda x: x * int(x.shape[0]),
    ]
    for function in cases:
        wrapped = OptimizedModule(function)
        for size in (4, 5, 6, 7, 8):
            ours, theirs = wrapped(x_of(size)), function(x_of(size))
            torch.testing.assert_close(ours[0], theirs[0])
            assert not isinstance(ours, tuple) or ours[1] == theirs[1]
        assert wrapped.cache_info()[:2] == (0, 5) and wrapped.cache_info().fallbacks == 0


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_equations(data: st.DataObject) -> None:
    """Any einsum, lowered for symbols, is right for other sizes; and contiguous where eager's is."""
    equation, shapes = data.draw(st.sampled_from([row for _, row in ROWS]))
    sizes = sorted({size for shape in shapes for size in shape if size > 1})
    if not sizes:
        return
    varying = data.draw(st.sets(st.sampled_from(sizes), min_size=1, max_size=2))
    wrapped = OptimizedModule(lambda *operands: einsum(equation, *operands), dynamic=True)
    for step in range(3):
        change = {size: size + 1 + step * (2 + size) for size in varying} if step else {}
        generator = torch.Generator().manual_seed(step)
        operands = [
            torch.randn([change.get(n, n) for n in shape], dtype=torch.float64, generator=generator) for shape in shapes
        ]
        try:
            expected = einsum(equation, *operands)
        except RuntimeError:
            return  # the other sizes do not fit
        found = wrapped(*operands)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.is_contiguous() or not expected.is_contiguous()
    assert wrapped.cache_info().fallbacks == 0


# -- the pieces -------------------------------------------------------------------------------------------------------


def _arguments(*values: Any) -> Arguments:
    return Arguments.of(values, {})[0]


def test_generalize() -> None:
    seen = [_arguments(x_of(4), x_of(4, 5), 3, 0.5), _arguments(x_of(7), x_of(7, 5), 5, 0.5)]
    new = _arguments(x_of(9), x_of(9, 5), 9, 0.25)
    found = generalize(seen, new, {})
    assert found is not None
    first, second, number, factor = found.leaves
    s0 = SymbolicSize.symbol("s0", 9)
    assert first.shape == (s0, 6) and second.shape == (s0, 5) and first.stride == (6, 1)
    # Equal now, but not before.
    assert number == Symbol("s1", 9) and factor == Symbol("f2", 0.25)
    assert found.symbols == {"s0": 9, "s1": 9, "f2": 0.25} and found.exact() == new
    assert (
        values_of(found, seen[0]) == (4, 3, 0.5) and values_of(found, _arguments(x_of(4), x_of(5, 5), 3, 0.5)) is None
    )
    assert generalize(seen, seen[1], {}) is not None and generalize([new], new, {}) is None
    assert generalize(seen, _arguments(x_of(1), x_of(1, 5), 3, 0.5), {}) is None
    assert comparable([_arguments(x_of(1)), _arguments(x_of(3))], _arguments(x_of(4))) == [_arguments(x_of(3))]


def test_strides_of_sizes() -> None:
    def made(*tensors: Tensor) -> Any:
        found = generalize([_arguments(tensor) for tensor in tensors[:-1]], _arguments(tensors[-1]), {})
        return None if found is None else found.leaves[0].stride

    s0 = SymbolicSize.symbol("s0", 5)
    assert made(x_of(6, 4), x_of(6, 5)) == (s0, 1)
    assert made(x_of(6, 4).t(), x_of(6, 5).t()) == (1, s0)
    assert made(x_of(4, 9)[:, :3], x_of(5, 9)[:, :3]) == (9, 1)
    assert made(x_of(6, 8)[:, ::2], x_of(6, 10)[:, ::2]) is None
    assert made(x_of(6, 4), x_of(4, 6).t()) is None


def test_symbolic_sizes_multiply_and_compare_as_expressions() -> None:
    a, b = SymbolicSize.symbol("a", 6), SymbolicSize.symbol("b", 6)
    assert a != b and a != 6 and a == SymbolicSize.symbol("a", 6)
    assert a * b == b * a and 2 * a == a * 2 != a * 3 and a * 1 is a and a * 0 == 0
    assert str(math.prod([2, a, b, a])) == "2*a**2*b" and int(math.prod([2, a, b, a])) == 432
    assert hash(a) == hash(6) and len({a, b, 6}) == 3
    assert a < 7 and max(a, 1) is a and type(a // 2) is int and type(a + 1) is int


@pytest.mark.parametrize("bad", [7 * 4**2, 7 * 4**4, 7 * 4**5])
def test_orders_are_looked_at_within_their_range_too(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazy_einsum.specialize._is_good", lambda network, path, scope, options: scope["s0"] != bad)
    model = OptimizedModule(lambda x, y: torch.einsum("ij,jk,kl->il", x, y, y))
    y = torch.rand(4, 4)
    for size in (5, 6, 7):
        model(torch.rand(size, 4), y)
    misses = model.cache_info().misses
    model(torch.rand(bad - 1, 4), y)
    assert model.cache_info().misses == misses
    model(torch.rand(bad, 4), y)
    assert model.cache_info().misses == misses + 1


def test_torch_export_is_not_imported() -> None:
    # It takes 130 ms; torch looks in it for files that are not the user's.
    program = """
import sys, torch
from lazy_einsum import OptimizedModule

model = OptimizedModule(lambda x, y: torch.einsum("ij,jk,kl->il", x, y, y))
for size in (5, 7, 9):
    model(torch.rand(size, 4), torch.rand(4, 4))
assert any(entry.is_generic for entry in model.specializations.values())
print("torch.export._trace" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
