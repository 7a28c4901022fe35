"""Backends: what runs specialized code, and that nobody can tell but by the clock."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from behaviour import differences
from programs import PROGRAMS, SIZES, Program, names, on
from test_programs import _call, _copy, _observe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lazy_einsum import BackendWarning, LazyEinsumError, OptimizedModule, dynamo
from lazy_einsum.backends import find_backend
from lazy_einsum.compiled import given_to_backend
from lazy_einsum.folds import Fold, Kept

einsum = torch.einsum
F = nn.functional

pytestmark = [
    pytest.mark.filterwarnings("default:.*CUDA.*:UserWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


class Layer(nn.Module):
    """Contractions, a norm with buffers, dropout, several results."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(6).double()
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = self.norm((einsum("ij,jk->ik", x, self.w) @ y).tanh())
        h = self.drop(h.contiguous())
        return h, h.t(), x, h.relu()


def double(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def tiers(wrapped: OptimizedModule) -> dict[str, int]:
    return dict(wrapped.cache_info().tiers)


def reasons(wrapped: OptimizedModule) -> list[str]:
    return [entry.reason for entry in wrapped.specializations.values()]


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def _check_rows(row: Program, backend: str, grad: bool) -> None:
    child, wrapped_child = row.make(), row.make()
    wrapped = OptimizedModule(wrapped_child, on_untraceable="ignore", backend=backend)
    with torch.set_grad_enabled(grad):
        for number in range(len(SIZES)):
            if row.before is not None:
                row.before(number, child)
                if wrapped_child is not child:
                    row.before(number, wrapped_child)
            call = _call(row, number)
            theirs = _observe(row, child, child, _copy(call), second=row.second and grad)
            ours = _observe(row, wrapped, wrapped_child, _copy(call), second=row.second and grad)
            found = differences(ours, theirs, tolerance=row.tolerance)
            # Compiled code counts one write of running statistics more than eager's does.
            assert [text for text in found if "running_mean" not in text] == [], f"call {number}"


QUICK = [row for number, row in enumerate(PROGRAMS) if number % 4 == 0]


@pytest.mark.parametrize("row", QUICK, ids=names(QUICK))
def test_programs_do_what_eager_does(row: Program, device: str) -> None:
    _check_rows(on(row, device), "aot_eager", grad=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a second derivative is asked for:lazy_einsum.BackendWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("row", PROGRAMS, ids=names())
def test_all_programs_do_what_eager_does(row: Program, grad: bool, backend: str, device: str) -> None:
    _check_rows(on(row, device), backend, grad)


@pytest.mark.parametrize("backend", ["aot_eager", "eager", "inductor"])
def test_training_steps(backend: str, device: str) -> None:
    """Results, aliasing, gradients, buffers, random numbers; a parameter that is reassigned is seen."""
    torch.manual_seed(0)
    theirs = Layer().to(device)
    child = copy.deepcopy(theirs)
    wrapped = OptimizedModule(child, backend=backend)
    for step in range(3):
        x, y = double(4, 5).to(device).requires_grad_(), double(6, 6).to(device)
        found = []
        for module, target in ((theirs, theirs), (child, wrapped)):
            torch.manual_seed(step)
            results = target(x, y)
            gradients = torch.autograd.grad(results[0].square().sum(), [x, *module.parameters()])
            found.append([*results, *gradients, *module.buffers(), torch.rand(1, device=device)])
            assert results[2] is x and results[1].data_ptr() == results[0].data_ptr()
        same(found[1], found[0])
        if step == 1:
            theirs.w = nn.Parameter(theirs.w.detach() * 2)
            child.w = nn.Parameter(child.w.detach() * 2)
    assert tiers(wrapped) == {backend: 1} and wrapped.cache_info().misses == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_second_derivatives_come_from_eager_code(backend: str) -> None:
    torch.manual_seed(0)
    theirs = Layer()
    child = copy.deepcopy(theirs)
    wrapped = OptimizedModule(child, backend=backend)
    x, y = double(4, 5, grad=True), double(6, 6)

    def penalty(module: Any) -> list[Any]:
        torch.manual_seed(1)
        h, _, _, r = module(x, y)
        (gradient,) = torch.autograd.grad(h.square().sum() + r.sum(), x, create_graph=True)
        return [gradient, *torch.autograd.grad(gradient.square().sum() + h.sum(), [x, module.w]), torch.rand(1)]

    same(penalty(wrapped.module) and list(child.buffers()), [*(penalty(theirs) and theirs.buffers())])
    child.load_state_dict(theirs.state_dict())
    with pytest.warns(BackendWarning, match="second derivative") as warned:
        ours = penalty(wrapped)
    assert len(warned) == 1
    same(ours, penalty(theirs))
    assert tiers(wrapped) == {"eager": 1} and wrapped.cache_info().backend_failures == 1
    same(penalty(wrapped), penalty(theirs))  # no second warning
    same(list(child.buffers()), list(theirs.buffers()))


def test_second_derivatives_under_autocast() -> None:
    w = torch.randn(5, 5, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return (x @ w).float().tanh().sum()

    wrapped = OptimizedModule(f, backend="aot_eager")
    x = torch.randn(3, 5, requires_grad=True)

    def second(target: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = target(x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), w)[0]

    with pytest.warns(BackendWarning, match="second derivative"):
        ours = second(wrapped)
    torch.testing.assert_close(ours, second(f), rtol=1e-6, atol=1e-6)


def test_second_derivatives_of_inputs_that_depend_on_each_other() -> None:
    """A gradient must not flow from one input of the compiled code to another outside of it."""
    wrapped = OptimizedModule(lambda x, h: einsum("i,i,i->i", x, h, h), backend="aot_eager")
    x = double(4, grad=True)

    def second(target: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        h = x.sin()
        out = target(x, h).sum()
        first = torch.autograd.grad(out, [x, h], create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum() + first[1].sum(), x)]

    with pytest.warns(BackendWarning):
        ours = second(wrapped)
    same(ours, second(lambda x, h: einsum("i,i,i->i", x, h, h)))


def test_second_derivative_after_an_input_was_written_is_an_error() -> None:
    wrapped = OptimizedModule(lambda x, y: x * y.exp().sum(), backend="aot_eager")
    x, y = double(3, grad=True), double(3)
    out = wrapped(x, y).sum()
    y.add_(1)
    with pytest.warns(BackendWarning), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x, create_graph=True)


def test_backward_can_run_again() -> None:
    wrapped = OptimizedModule(lambda x, w: (x @ w).tanh() @ w, backend="aot_eager")
    x, w = double(3, 4, grad=True), double(4, 4, grad=True)
    loss = wrapped(x, w).square().sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    first = x.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    same(x.grad, 3 * first)


def test_no_gradient_where_eager_gives_none() -> None:
    """A compiled backward pass gives zeros for what the differentiated result does not depend on."""

    def f(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = x.tanh()
        return h @ a, h @ b

    wrapped = OptimizedModule(f, backend="aot_eager")
    x, a, b = (double(3, 3, grad=True) for _ in range(3))
    wrapped(x, a, b)[0].sum().backward()
    assert a.grad is not None and x.grad is not None and b.grad is None
    assert tiers(wrapped) == {"aot_eager": 1}


def test_inputs_are_freed_with_the_backward_pass() -> None:
    wrapped = OptimizedModule(lambda x, w: (x @ w).tanh(), backend="aot_eager")
    w = double(4, 4, grad=True)
    x = double(3, 4).clone()
    loss = wrapped(x, w).sum()
    reference = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
    loss.backward()
    del x
    assert reference.expired() and loss is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    wrapped = OptimizedModule(lambda x, w: F.dropout((x @ w).tanh() @ w, 0.3), backend="aot_eager", compile_after=1)
    at_once = OptimizedModule(lambda x, w: F.dropout((x @ w).tanh() @ w, 0.3), backend="aot_eager")
    x, w = double(3, 4, grad=True), double(4, 4, grad=True)
    for target in (wrapped, at_once):
        for step in range(4):
            torch.manual_seed(step)
            ours = checkpoint(target, x, w, use_reentrant=reentrant).sum()
            torch.manual_seed(step)
            theirs = target.module(x, w).sum()
            same(torch.autograd.grad(ours, [x, w]) if not reentrant else ours, torch.autograd.grad(theirs, [x, w])) if (
                not reentrant
            ) else same(ours, theirs)


def test_forward_mode_derivatives() -> None:
    wrapped = OptimizedModule(lambda x, y: einsum("ij,jk->ik", x, y), backend="aot_eager")
    x, y, tangent = double(2, 3), double(3, 2), double(2, 3)
    with torch.no_grad():
        wrapped(x, y)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            found = torch.autograd.forward_ad.unpack_dual(wrapped(dual, y)).tangent
    same(found, tangent @ y)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    wrapped = OptimizedModule(lambda x: (einsum("ij,jk->ik", x, x), x.T), backend="aot_eager")
    for _ in range(2):
        with mode():
            x = double(3, 3)
            product, view = wrapped(x)
            same(product, x @ x)
            assert product.is_inference() == torch.is_inference_mode_enabled() and view.data_ptr() == x.data_ptr()
    assert tiers(wrapped) == {"aot_eager": 1}


def test_any_callable_is_a_backend() -> None:
    given: list[Any] = []

    def mine(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        given.append(([tuple(example.shape) for example in examples], graph.code))
        assert all(bool((example == 0).all()) for example in examples)  # with data, as torch.compile gives them
        return graph.forward

    wrapped = OptimizedModule(Layer().eval(), backend=mine)
    x, y = double(4, 5), double(6, 6)
    same(wrapped(x, y), wrapped.module(x, y))
    assert given[0][0] == [(4, 5), (6, 6), (5, 6), (6,), (6,), (6,), (6,)] and tiers(wrapped) == {"mine": 1}
    same(wrapped(x, y), wrapped.module(x, y))
    assert len(given) == 1


def test_a_backend_that_fails_warns_once() -> None:
    def broken(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        raise ValueError(f"not for {len(examples)}")

    wrapped = OptimizedModule(lambda x: einsum("ij,jk->ik", x, x), backend=broken)
    with pytest.warns(BackendWarning, match="the backend 'broken' failed: ValueError: not for 1") as warned:
        for size in (2, 3):
            x = double(size, size)
            same(wrapped(x), x @ x)
    info = wrapped.cache_info()
    assert len(warned) == 1 and info.backend_failures == 2 and dict(info.tiers) == {"eager": 2}
    assert "runs through eager: the backend 'broken' failed" in str(wrapped.explain())
    assert wrapped.explain().to_dict()["cache"]["backend_failures"] == 2


def test_code_that_fails_when_it_runs_is_replaced() -> None:
    def broken(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            raise ValueError("a fault")

        return run

    wrapped = OptimizedModule(lambda x: einsum("ij,jk->ik", x, x), backend=broken)
    x = double(3, 3)
    with pytest.warns(BackendWarning, match="its compiled code failed: ValueError: a fault"):
        same(wrapped(x), x @ x)
    same(wrapped(x), x @ x)
    assert wrapped.cache_info().backend_failures == 1


def test_errors_are_the_users() -> None:
    def f(x: Tensor, i: Tensor) -> Tensor:
        return (x @ x)[i]

    wrapped = OptimizedModule(f, backend="aot_eager")
    x = double(3, 3)
    wrapped(x, torch.tensor([0, 1]))
    with pytest.raises(IndexError):
        wrapped(x, torch.tensor([0, 7]))
    assert tiers(wrapped) == {"aot_eager": 1}


def test_options() -> None:
    seen: list[Any] = []

    def mine(graph: Any, examples: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return graph

    wrapped = OptimizedModule(lambda x: x @ x, backend=mine, backend_options={"mode": "fast", "options": {"a": 1}})
    wrapped(double(2, 2))
    assert seen == [{"mode": "fast", "options": {"a": 1}}]
    for options, message in (
        ({"optins": {}}, "expected 'mode' and 'options'"),
        ({"options": {"no_such": 1}}, "Unexpected optimization option no_such"),
        ({"mode": "fastest"}, "fastest"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimizedModule(lambda x: x, backend="inductor", backend_options=options)
    with pytest.raises(ValueError, match="no meaning for the backend 'eager'"):
        OptimizedModule(lambda x: x, backend_options={"mode": "default"})
    with pytest.raises(ValueError, match=r"'nothing' is unknown; torch.compile knows .*inductor"):
        OptimizedModule(lambda x: x, backend="nothing")
    with pytest.raises(TypeError, match="a name or a callable, got int"):
        OptimizedModule(lambda x: x, backend=3)
    with pytest.raises(ValueError, match="compile_after"):
        OptimizedModule(lambda x: x, backend="aot_eager", compile_after=-1)


def test_copies_and_pickles_keep_the_backend() -> None:
    wrapped = OptimizedModule(Layer().eval(), backend="aot_eager", compile_after=0)
    x, y = double(4, 5), double(6, 6)
    expected = wrapped(x, y)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert tiers(other) == {}
        same(other(x, y), expected)
        assert tiers(other) == {"aot_eager": 1}


def test_frozen_tensors_are_folded_outside_of_the_compiled_code() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(double(5, 40))
            self.b = nn.Parameter(double(40, 5))

        def forward(self, x: Tensor) -> Tensor:
            return einsum("ni,ij,jk->nk", x, self.a, self.b).tanh()

    wrapped = OptimizedModule(Factored(), frozen=True, backend="aot_eager")
    x = double(100, 5)
    with torch.no_grad():
        same(wrapped(x), wrapped.module(x))
        assert wrapped.cache_info().fold_bytes == 5 * 5 * 8 and tiers(wrapped) == {"aot_eager": 1}
        wrapped.load_state_dict({name: value * 2 for name, value in wrapped.state_dict().items()})
        same(wrapped(x), wrapped.module(x))


def test_inductor_is_given_calls_that_suit_it() -> None:
    wrapped = OptimizedModule(lambda x, y: einsum("ab,ab->a", x, y))
    entry = wrapped.prepare(torch.randn(30, 50000), torch.randn(30, 50000))
    called = {}
    for name in ("inductor", "aot_eager"):
        backend = find_backend(name, {})
        assert backend is not None
        graph = given_to_backend(entry, backend).parts.inner
        called[name] = [node.target for node in graph.nodes if node.op == "call_method"]
    # One loop in generated code; with calls one by one, what lies between them would be 6 MB.
    assert called["inductor"] == ["mul", "sum"]
    assert "bmm" in called["aot_eager"] and called["aot_eager"] == [
        node.target for node in entry.source.graph.nodes if node.op == "call_method"
    ]


@pytest.mark.slow
def test_inductor_copies_in_loops_over_the_dimensions() -> None:
    """A layer in the tensor-train format, whose matrices are copies with merged dimensions in both directions."""
    shapes = [(128, 8, 8, 8), (8, 8, 16), (16, 8, 8, 16), (16, 8, 8)]
    operands = [torch.randn(shape).requires_grad_() for shape in shapes]
    layer = OptimizedModule(lambda *operands: einsum("abcd,bef,fcgh,hdi->aegi", *operands), backend="inductor")
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = torch._inductor.utils.run_and_get_code(lambda: layer(*operands).sum().backward())
    assert len(codes) == 2 and all("for(" in code for code in codes)
    # Otherwise each element's place is divided by the sizes of the dimensions.
    assert not any("div_floor" in code for code in codes)


def test_folds_stay_outside_of_what_inductor_is_given() -> None:
    a, b = nn.Parameter(torch.randn(5, 40)), nn.Parameter(torch.randn(40, 5))

    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x: Tensor) -> Tensor:
            return einsum("ni,ij,jk->nk", x, self.a, self.b)

    wrapped = OptimizedModule(Factored(), frozen=True)
    with torch.no_grad():
        entry = wrapped.prepare(torch.randn(100, 5))
    backend = find_backend("inductor", {})
    assert backend is not None
    parts = given_to_backend(entry, backend).parts
    assert [node.target for node in parts.outer.nodes if isinstance(node.target, Kept)] == list(entry.folds)
    assert not any(isinstance(node.target, (Fold, Kept)) for node in parts.inner.nodes)


def test_verify_names_the_backend() -> None:
    def wrong(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        return lambda *inputs: [result + 1 for result in graph(*inputs)]

    right = OptimizedModule(lambda x: x @ x, backend="aot_eager", verify=True)
    x = double(3, 3)
    same(right(x), x @ x)
    with pytest.raises(LazyEinsumError, match="the first stage that does is \"backend 'wrong'\""):
        OptimizedModule(lambda x: x @ x, backend=wrong, verify=True)(x)


class Force(nn.Module):
    """Differentiates in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        (force,) = torch.autograd.grad(einsum("i,i,i->", x, x, x), x, create_graph=True)
        return force


class Hooked(nn.Module):
    """Gives a hook to a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda gradient: gradient * 3)
        return y @ y


class Keeps(nn.Module):
    """Sets an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.h = x @ x
        return self.h * 2


class Writes(nn.Module):
    """Writes to memory that it shares with a result that autograd follows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.zeros(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.b.copy_(x)
        return x @ x


class Overwrites(nn.Module):
    """Reads a buffer, and then writes it: a backward pass may need what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = (-self.b) @ x
        self.b.mul_(2)
        return y.sin()


class Chooses(nn.Module):
    """Draws in a way that compilers replace."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x.detach().sigmoid()) * x


class Draws(nn.Module):
    """Draws for a tensor that lies in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.t().sin(), 0.5)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Force(), "forward differentiates"),
        (Hooked(), "gives a hook"),
        (Keeps(), "sets an attribute"),
        (Writes(), "writes to a tensor that autograd follows"),
        (Overwrites(), "reads a tensor that it also writes"),
        (Chooses(), "random numbers by bernoulli"),
        (Draws(), "random numbers for a tensor that is not contiguous"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_no_backend_is_given(module: nn.Module, reason: str) -> None:
    wrapped = OptimizedModule(copy.deepcopy(module), backend="aot_eager")
    x = double(3, 3, grad=True) if not isinstance(module, Force) else double(3, grad=True)
    torch.manual_seed(0)
    theirs = module(x)
    torch.manual_seed(0)
    with pytest.warns(BackendWarning, match=reason):
        ours = wrapped(x)
    same(ours, theirs)
    same(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))
    assert tiers(wrapped) == {"eager": 1} and reasons(wrapped)[0]


def test_errors_of_writes_are_eagers() -> None:
    def f(x: Tensor, n: int) -> Tensor:
        return x.sum(0).expand(n, 3).mul_(2)

    wrapped = OptimizedModule(f, backend="aot_eager", dynamic=False)
    x = double(3, 3)
    same(wrapped(x, 1), f(x, 1))
    for target in (f, wrapped):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="single memory location"):
            warnings.simplefilter("ignore", BackendWarning)
            target(x, 2)


def test_inputs_that_are_views_with_gaps() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return einsum("ij,jk->ik", x, y)

    wrapped = OptimizedModule(f, backend="aot_eager")
    x, y = double(4, 8, grad=True)[:, ::2], double(4, 3, grad=True)
    same(torch.autograd.grad(wrapped(x, y).sum(), [x, y]), torch.autograd.grad(f(x, y).sum(), [x, y]))
    assert tiers(wrapped) == {"aot_eager": 1}


def test_views_of_other_grad_modes() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.sin()
        with torch.no_grad():
            view = h.view(-1)
        return h, view

    wrapped = OptimizedModule(f, backend="aot_eager")
    x = double(3, 3, grad=True)
    with pytest.warns(BackendWarning, match="another grad mode"):
        ours = wrapped(x)
    for one, other in zip(ours, f(x), strict=True):
        assert (one.requires_grad, one.is_leaf) == (other.requires_grad, other.is_leaf)


def test_results_with_backward_passes_of_their_own() -> None:
    wrapped = OptimizedModule(lambda x, y: (x @ x, y @ y), backend="aot_eager")
    x, y = double(3, 3, grad=True), double(3, 3, grad=True)
    with pytest.warns(BackendWarning, match="one by one"):
        one, other = wrapped(x, y)
    one.sum().backward()
    other.sum().backward()
    assert x.grad is not None and y.grad is not None


def test_a_module_with_hooks_is_compiled_around_them() -> None:
    """It stays a live call; its own forward is compiled, what calls it is not."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5).double()
            self.inner.register_forward_hook(lambda module, args, result: result * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(einsum("ij,jk->ik", x, x))

    wrapped = OptimizedModule(Outer(), backend="aot_eager")
    x = double(5, 5)
    with pytest.warns(BackendWarning, match="it calls inner as it is"):
        ours = wrapped(x)
    same(ours, wrapped.module(x))


def test_code_for_all_sizes_runs_as_eager_until_sizes_come_often() -> None:
    wrapped = OptimizedModule(lambda x, y: einsum("ij,jk->ik", x, y), backend="aot_eager")
    for size in range(2, 8):
        x, y = double(size, 4), double(4, 4)
        same(wrapped(x, y), x @ y)
    assert tiers(wrapped) == {"aot_eager": 2, "eager": 1}
    x, y = double(50, 4), double(4, 4)
    for _ in range(300):
        wrapped(x, y)
    assert tiers(wrapped) == {"aot_eager": 3, "eager": 1}
    assert wrapped.cache_info().backend_failures == 0


def test_rare_signatures_never_wait_for_a_backend() -> None:
    wrapped = OptimizedModule(lambda x: einsum("ij,jk->ik", x, x), backend="aot_eager", compile_after=3, dynamic=False)
    x = double(3, 3)
    seen = []
    for _ in range(5):
        same(wrapped(x), x @ x)
        seen.append(tiers(wrapped))
    assert seen == [{"eager": 1}] * 3 + [{"aot_eager": 1}] * 2
    wrapped(double(4, 4))
    assert tiers(wrapped) == {"aot_eager": 1, "eager": 1}
    assert wrapped.cache_info().compile_seconds > 0


def test_threads_compile_once() -> None:
    compiled: list[int] = []

    def mine(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    wrapped = OptimizedModule(lambda x: x @ x, backend=mine, compile_after=2)
    x = double(3, 3)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(wrapped(x) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(results) == 200
    for result in results:
        same(result, x @ x)


def test_random_streams_through_inductor() -> None:
    def f(x: Tensor) -> Tensor:
        y = F.dropout(x.sin(), 0.5) + torch.randn_like(x) + F.dropout(x.cos(), 0.5)
        return y + torch.rand(x.shape[1], dtype=x.dtype) + torch.empty_like(x).uniform_()

    wrapped = OptimizedModule(f, backend="inductor")
    x = double(4, 5)
    for step in range(2):
        torch.manual_seed(step)
        theirs = f(x), torch.rand(1)
        torch.manual_seed(step)
        same((wrapped(x), torch.rand(1)), theirs)
    assert tiers(wrapped) == {"inductor": 1}


@pytest.mark.parametrize("grad", [True, False])
def test_inductor_forgets_no_factor_of_a_sum(grad: bool) -> None:
    """Of a product of matrices that goes into a sum with ``alpha`` Inductor would make a call without it."""

    def updated(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w + 0.5 * b @ a)

    def written(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = torch.add(x @ w.T, x @ a.T @ b.T, alpha=0.5)
        y = torch.add(torch.add(y, 3, alpha=2), x.int(), alpha=0.1).add(x @ w, alpha=-2)
        y = torch.add(x @ w, y, alpha=1.5) + torch.add(x.long(), (100 * x).to(torch.uint8), alpha=3)
        return y.relu().add_((x @ w.T) @ w[:, :320], alpha=3) if not grad else y

    args = [double(3, 320).abs().requires_grad_(grad), double(320, 320), double(2, 320), double(320, 2)]
    for function in (updated, written):
        wrapped = OptimizedModule(function, backend="inductor")
        same(wrapped(*args), function(*args))
        assert tiers(wrapped) == {"inductor": 1}
    from lazy_einsum.dynamo import compile_captured

    torch._dynamo.reset()
    same(torch.compile(written, backend=compile_captured)(*args), written(*args))
    same(torch.compile(updated, backend=compile_captured)(*args), updated(*args))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int32])
def test_einsums_of_narrow_integers_are_not_compiled(dtype: torch.dtype) -> None:
    wrapped = OptimizedModule(lambda x, y, z: einsum("ij,jk->ik", x, y) + z, backend="aot_eager")
    x = torch.randint(0, 2, (3, 3)).to(dtype)
    theirs = None
    try:
        theirs = wrapped.module(x, x, x)
    except (RuntimeError, NotImplementedError):
        with pytest.raises((RuntimeError, NotImplementedError)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped(x, x, x)
        return
    with pytest.warns(BackendWarning, match="narrower than int64"):
        ours = wrapped(x, x, x)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert tiers(wrapped) == {"eager": 1}


# -- torch.compile(backend="lazy_einsum")


@pytest.fixture
def compiles() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that are given to the backend behind ``lazy_einsum``."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    yield graphs
    torch._dynamo.reset()


def _compiled(model: Any, graphs: list[torch.fx.GraphModule], **options: Any) -> Any:
    from lazy_einsum.dynamo import compile_captured

    def collect(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    return torch.compile(model, backend=compile_captured, options={"backend": collect, **options})


def _equations(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.args[0]) for node in graph.graph.nodes if node.target is torch.functional.einsum]


class Normed(nn.Module):
    """Norm, einsums of several operands, a size, a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 7).double()
        self.norm = nn.BatchNorm1d(7).double()
        self.w = nn.Parameter(double(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        h = einsum("ni,ij,jk->nk", self.norm(self.linear(x)), self.w, self.w)
        with torch.no_grad():
            scale = einsum("ni,ij->nj", h, self.w).abs().max()
        return 2.0 * h / scale * x.shape[0]


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    scores = einsum("bhqd,kd->bhqk", q, k) / q.shape[-1] ** 0.5
    mixed = (scores @ k) @ v.unsqueeze(-1)
    return mixed.squeeze(-1).reshape(q.shape[0], -1), q * v[:, :, None] * 2.0, (q * k).sum(-1) * v


CAPTURED: dict[str, tuple[Any, Callable[[int], tuple[Tensor, ...]]]] = {
    "three operands": (
        lambda x, y, z: einsum("bij,bjk,bk->bi", x, y, z),
        lambda n: (double(n, 4, 5, grad=True), double(n, 5, 8), double(n, 8)),
    ),
    "chain": (
        lambda x, a, b, c: 2.0 * einsum("nk,kl->nl", einsum("nj,jk->nk", einsum("ni,ij->nj", x, a), b), c) / 3,
        lambda n: (double(n, 20), double(20, 20, grad=True), double(20, 20), double(20, 3)),
    ),
    "products": (
        lambda x, a, b: ((((x @ a) @ b) @ a).relu(), x @ a @ b @ a[:, 0]),
        lambda n: (double(n, 20, grad=True), double(20, 20), double(20, 20)),
    ),
    "heads": (_heads, lambda n: (double(n, 4, 20, 20, grad=True), double(20, 20), double(n, 4, 20))),
    "module": (Normed(), lambda n: (double(n, 6, grad=True),)),
    # Passes that would write sizes into the code.
    "slices": (
        lambda x, a: (lambda y: (y[:1] @ a, y[1:] @ a))(x * 3),
        lambda n: (double(n, 20, grad=True), double(20, 20)),
    ),
    "reshaped": (
        lambda w, a, b: w @ (a[:, None] * b).reshape(-1, 300),
        lambda n: (double(2, n * 400, grad=True), double(n, 300), double(400, 300)),
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_batch_sizes_are_captured_twice(name: str, compiles: list[torch.fx.GraphModule]) -> None:
    model, arguments = CAPTURED[name]
    theirs = copy.deepcopy(model)
    compiled = _compiled(model, compiles)
    for size in (2, 3, 5, 9, 17, 33, 4, 100):
        args = arguments(size)
        leaves = [arg for arg in args if arg.requires_grad]
        leaves_and = [*leaves, *(model.parameters() if isinstance(model, nn.Module) else ())]
        theirs_and = [*leaves, *(theirs.parameters() if isinstance(theirs, nn.Module) else ())]
        ours, expected = compiled(*args), theirs(*args)
        same(ours, expected)
        sums = [sum(out.square().sum() for out in (r if isinstance(r, tuple) else (r,))) for r in (ours, expected)]
        torch.testing.assert_close(
            torch.autograd.grad(sums[0], leaves_and), torch.autograd.grad(sums[1], theirs_and), rtol=1e-7, atol=1e-7
        )
    assert len(compiles) == 2
    assert _equations(compiles[0]) == [] and all(text.count(",") <= 1 for text in _equations(compiles[1]))


def test_the_order_of_products_is_chosen(compiles: list[torch.fx.GraphModule]) -> None:
    compiled = _compiled(lambda a, b, v: einsum("ij,j->i", einsum("ij,jk->ik", a, b), v), compiles)
    a, b, v = double(30, 30), double(30, 30), double(30)
    same(compiled(a, b, v), a @ (b @ v))
    assert [node.target for node in compiles[0].graph.nodes if node.op == "call_method"] == ["mv", "mv"]


def test_captured_writes_to_shared_memory(compiles: list[torch.fx.GraphModule]) -> None:
    def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        h = einsum("i,i->i", x, z) * 2.0
        y.add_(1)
        return einsum("i,i,i->i", h, x, z)

    compiled = _compiled(f, compiles)
    found = []
    for target in (f, compiled):
        base = torch.arange(6, dtype=torch.float64)
        z = torch.ones(4, dtype=torch.float64)
        found.append((target(base[:4], base[2:], z), base))
    same(found[1], found[0])


def test_a_graph_that_passes_fail_on_is_compiled_as_it_is(
    compiles: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazy_einsum import dynamo

    def fail(*args: Any) -> Any:
        raise KeyError("a fault")

    monkeypatch.setattr(dynamo, "rewrite", fail)
    compiled = _compiled(lambda a, b, v: einsum("ij,jk,k->i", a, b, v), compiles)
    a, b, v = double(3, 3), double(3, 3), double(3)
    with pytest.warns(BackendWarning, match="compiled as it is: KeyError"):
        ours = compiled(a, b, v)
    same(ours, a @ b @ v)


def test_torchs_planner_is_as_before_for_plain_sizes() -> None:
    import opt_einsum

    import lazy_einsum.dynamo  # noqa: F401

    planner = torch.backends.opt_einsum.get_opt_einsum()
    a, b, v = torch.rand(3, 4), torch.rand(4, 5), torch.rand(5)
    assert planner.contract_path("ij,jk,k->i", a, b, v)[0] == opt_einsum.contract_path("ij,jk,k->i", a, b, v)[0]
    assert planner.contract is opt_einsum.contract


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_what_is_behind_is_given_calls_that_suit_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.fx.GraphModule] = []

    def generate(*arguments: Any) -> Callable[..., Any]:
        return lambda graph, inputs: given.append(graph) or graph.forward

    monkeypatch.setattr(dynamo, "as_torch_compile_does", generate)
    torch._dynamo.reset()
    x, y = torch.randn(30, 50000), torch.randn(30, 50000)
    dotted = torch.compile(lambda x, y: einsum("ab,ab->a", x, y), backend="lazy_einsum", options={"backend": backend})
    torch.testing.assert_close(dotted(x, y), (x * y).sum(1), rtol=1e-4, atol=1e-2)
    called = [node.target for node in given[0].graph.nodes if node.op == "call_method"]
    assert called == ["mul", "sum"] if backend == "inductor" else "bmm" in called


def test_the_name_is_registered() -> None:
    import configparser
    import importlib
    from pathlib import Path

    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    name, _, target = config["options.entry_points"]["torch_dynamo_backends"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "lazy_einsum" and callable(getattr(importlib.import_module(module), function))


def test_through_torch_compile_and_inductor() -> None:
    from lazy_einsum.dynamo import compile_captured

    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, v: einsum("ij,jk,k->i", a, b, v), backend=compile_captured)
    a, b, v = double(6, 6), double(6, 6), double(6)
    same(compiled(a, b, v), a @ b @ v)
    torch._dynamo.reset()
