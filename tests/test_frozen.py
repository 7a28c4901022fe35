"""Frozen tensors: what depends on them alone is computed once, and nothing else about the module changes."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from behaviour import differences
from checks import shape_of_code
from programs import PROGRAMS, SIZES, Call, Program, names, on
from test_programs import _call, _copy, _observe
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.optim import SGD, Optimizer

from lazy_einsum import OptimizedModule
from lazy_einsum.cost import pair_seconds
from lazy_einsum.folds import Fold, Folds
from lazy_einsum.frozen import FROZEN
from lazy_einsum.graph import facts
from lazy_einsum.passes import Options
from lazy_einsum.passes.fold import fold
from lazy_einsum.plan import make_plan, order_seconds
from lazy_einsum.signature import Arguments
from lazy_einsum.spec import EinsumSpec
from lazy_einsum.specialize import run_passes
from lazy_einsum.tracing import trace

N = 6
NAMES = ("a", "b", "c")
SQUARE = N * N * 8
"""Bytes of a matrix."""


class Chain(nn.Module):
    """Three matrices behind one input; what it computes is an argument, so that a test shows all of its code."""

    def __init__(self, function: Callable[[Chain, Tensor], Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.rand(N, N, dtype=dtype) + 0.5))
        self.register_buffer("shift", torch.rand(N, dtype=dtype))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def product(self: Chain, x: Tensor) -> Tensor:
    return x @ (self.a @ self.b @ self.c)


def x_of(rows: int = 4) -> Tensor:
    return torch.rand(rows, N, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) + 0.5


def pair(
    function: Callable[[Chain, Tensor], Any] = product, frozen: Any = NAMES, **options: Any
) -> tuple[Chain, OptimizedModule]:
    """A module, and a wrapper around it."""
    child = Chain(function)
    return child, OptimizedModule(child, frozen=frozen, **options)


def folds_of(wrapper: OptimizedModule) -> Folds:
    return wrapper._dispatcher.cache.folds


def kept(wrapper: OptimizedModule) -> list[Tensor]:
    return [value.tensor for value in folds_of(wrapper).values.values()]


@contextmanager
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """The names of what each fold is computed of, as that happens."""
    seen: list[tuple[str, ...]] = []
    original = Fold.__call__

    def call(self: Fold, *tensors: Tensor) -> Tensor:
        seen.append(self.names)
        time.sleep(0.05)  # other threads may come now
        return original(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Fold, "__call__", call)
        yield seen


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# -- what is folded ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_chain_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    child, wrapper = pair()
    with computed(monkeypatch) as seen:
        assert wrapper.prepare(x_of()).folds and wrapper.cache_info().fold_bytes == 0 and not seen
        for _ in range(3):
            close(wrapper(x_of()), child(x_of()))
        assert seen == [NAMES]
    close(kept(wrapper), [child.a @ child.b @ child.c])
    assert wrapper.cache_info().fold_bytes == SQUARE
    assert wrapper.code.count(".matmul(") == 1 and "fold" in wrapper.code


@torch.no_grad()
def test_one_matrix_product_is_left() -> None:
    """Torch's own profiler counts."""
    _, wrapper = pair()
    wrapper.prepare(x_of())
    counts = []
    for _ in range(2):
        with torch.profiler.profile() as profile:
            wrapper(x_of())
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::mm"))
    assert counts == [3, 1]


@torch.no_grad()
def test_no_name_no_fold() -> None:
    child, wrapper = pair(frozen=())
    named = OptimizedModule(child)
    for module in (wrapper, named):
        close(module(x_of()), child(x_of()))
        assert not kept(module) and "fold" not in module.code
        assert "fold" not in next(iter(module.specializations.values())).stages
    assert wrapper.code == named.code
    _, half = pair(lambda self, x: x @ (self.a @ self.b) @ (self.b @ self.c), frozen=("a", "b"))
    half(x_of())
    assert [fold.fold.names for entry in half.specializations.values() for fold in entry.folds] == [("a", "b")]


FOLDED: dict[str, tuple[Callable[[Chain, Tensor], Any], list[Callable[[Chain], Tensor]]]] = {
    "chain": (product, [lambda m: m.a @ m.b @ m.c]),
    "einsum": (lambda m, x: torch.einsum("ij,jk,kl,lm->im", x, m.a, m.b, m.c), [lambda m: m.a @ m.b @ m.c]),
    "from the left": (lambda m, x: x.repeat(300, 1) @ m.a @ m.b @ m.c, [lambda m: m.a @ m.b @ m.c]),
    "permuted": (lambda m, x: x @ (m.a @ m.b).T, [lambda m: m.a @ m.b]),
    "permuted copy": (lambda m, x: x @ m.a.T.contiguous(), [lambda m: m.a.T]),
    "scaled": (lambda m, x: x.exp() @ (0.5 * (m.a @ m.b)), [lambda m: 0.5 * (m.a @ m.b)]),
    "other calls": (
        lambda m, x: x @ torch.softmax(m.a.exp() + m.b, dim=-1) + m.shift.sin(),
        [lambda m: torch.softmax(m.a.exp() + m.b, dim=-1)],
    ),
    "two uses": (lambda m, x: (x @ (m.a @ m.b)) * ((x + 1) @ (m.a @ m.b)), [lambda m: m.a @ m.b]),
    "several results": (lambda m, x: x @ torch.linalg.qr(m.a).Q, [lambda m: torch.linalg.qr(m.a).Q]),
    "low rank": (lambda m, x: x @ (m.a + m.b @ m.c), [lambda m: m.a + m.b @ m.c]),
    "cast": (lambda m, x: x.float() @ m.a.float(), [lambda m: m.a.float()]),
    "detached": (lambda m, x: x @ (m.a.detach() @ m.b.data), [lambda m: m.a @ m.b]),
    "no gradients inside": (lambda m, x: x @ inner_product(m), [lambda m: m.a @ m.b]),
    "einsum with its dimensions in another order": (
        lambda m, x: torch.einsum("ij,kj->ik", x, torch.einsum("ij,jk->ki", m.a, m.b).sin()),
        [lambda m: (m.a @ m.b).T.sin()],
    ),
}


@torch.no_grad()
def inner_product(self: Chain) -> Tensor:
    return self.a @ self.b


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_folded(name: str) -> None:
    function, expected = FOLDED[name]
    child, wrapper = pair(function)
    with torch.no_grad():
        for rows in (4, 4, 7, 9):
            close(wrapper(x_of(rows)), child(x_of(rows)))
        found = kept(wrapper)
        close(found, [each(child) for each in expected])
    assert wrapper.cache_info().fold_bytes == sum(value.numel() * value.itemsize for value in found)


LEFT: dict[str, Callable[[Chain, Tensor], Any]] = {
    "one product": lambda m, x: x @ m.a + m.shift,
    "a view": lambda m, x: x @ m.a.T,
    "random numbers": lambda m, x: x @ nn.functional.dropout(m.a, 0.5) + torch.rand_like(m.b).sum(),
    "memory as it comes": lambda m, x: x + (torch.empty_like(m.a) * 0).nan_to_num(0, 0, 0).sum(),
    "depends on the input": lambda m, x: x @ (m.a * x.sum()),
    "written before": lambda m, x: x @ (m.shift.add_(1) * m.a),
    "written later": lambda m, x: [x @ (m.shift * 2).diag(), m.shift.add_(1)][0],
    "written through a view": lambda m, x: [x @ (m.shift * 2).diag(), m.shift[1:].mul_(2)][0],
    "written itself": lambda m, x: x @ (m.a @ m.b).sin_(),
    "a view of it written": lambda m, x: x @ _fill_diagonal(m.a @ m.b),
}


def _fill_diagonal(x: Tensor) -> Tensor:
    x.diagonal().fill_(3)
    return x


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_folded(name: str) -> None:
    (child, wrapper), other = pair(LEFT[name], frozen=True), Chain(LEFT[name])
    for _ in range(3):
        with torch.no_grad():
            torch.manual_seed(5)
            found = wrapper(x_of())
            torch.manual_seed(5)
            close(found, other(x_of()))
    close(child.shift, other.shift)
    if name in ("written itself", "a view of it written"):
        return  # what is before the write may be folded
    assert not kept(wrapper), wrapper.explain()


def test_values_written_later_are_copies() -> None:
    for name in ("written itself", "a view of it written"):
        child, wrapper = pair(LEFT[name])
        with torch.no_grad():
            results = [wrapper(x_of()) for _ in range(3)]
            expected = child(x_of())
        for found in results:
            close(found, expected)


# -- planning ---------------------------------------------------------------------------------------------------------


def _orders(n: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """All pairwise orders, by brute force."""

    def go(alive: tuple[int, ...], fresh: int, path: tuple[tuple[int, int], ...]) -> Iterator[Any]:
        if len(alive) == 1:
            yield path
        for one, two in itertools.combinations(alive, 2):
            rest = tuple(number for number in alive if number not in (one, two))
            yield from go((*rest, fresh), fresh + 1, (*path, (one, two)))

    return go(tuple(range(n)), n, ())


def _seconds(spec: EinsumSpec, sizes: dict[str, int], path: tuple[tuple[int, int], ...], frozen: list[bool]) -> float:
    """What the steps take that are not of frozen operands only."""
    values = [(set(term), fixed) for term, fixed in zip(spec.inputs, frozen, strict=True)]
    alive = set(range(len(values)))
    total = 0.0

    def size(labels: set[str]) -> int:
        result = 1
        for label in labels:
            result *= sizes[label]
        return result

    for one, two in path:
        (a, first), (b, second) = values[one], values[two]
        alive -= {one, two}
        needed = set(spec.output).union(*(values[number][0] for number in alive))
        result = (a | b) & needed
        if not (first and second):
            total += pair_seconds(size(a & b & result), size(a - b), size(b - a), size((a & b) - result))
        alive.add(len(values))
        values.append((result, first and second))
    return total


NETWORKS = {
    "chain": ("ab,bc,cd,de->ae", {"a": 50, "b": 40, "c": 30, "d": 40, "e": 50}),
    "thin input": ("ab,bc,cd,de->ae", {"a": 1, "b": 200, "c": 8, "d": 200, "e": 100}),
    "star": ("ax,bx,cx,dx->abcd", {"a": 10, "b": 7, "c": 6, "d": 8, "x": 20}),
    "ring": ("ab,bc,cd,da->", {"a": 20, "b": 30, "c": 40, "d": 50}),
    "batch": ("zab,zbc,cd,d->za", {"z": 30, "a": 9, "b": 8, "c": 20, "d": 11}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_orders_are_the_best_where_frozen_steps_cost_nothing(name: str) -> None:
    text, sizes = NETWORKS[name]
    spec = EinsumSpec.parse(text, [len(term) for term in text.split("->")[0].split(",")])
    shapes = [tuple(sizes[label] for label in term) for term in spec.inputs]
    for frozen in itertools.product([False, True], repeat=len(shapes)):
        plan = make_plan(spec, shapes, frozen=frozen)
        best = min(_seconds(spec, sizes, path, list(frozen)) for path in _orders(len(shapes)))
        found = _seconds(spec, sizes, plan.ssa_path, list(frozen))
        assert found <= best * (1 + 1e-9) + 1e-7, (frozen, plan.ssa_path, found, best)
        assert plan.seconds == pytest.approx(order_seconds(spec, shapes, plan.ssa_path, frozen))


@pytest.mark.parametrize("n", [8, 12, 30])
def test_long_chains_with_frozen_matrices(n: int) -> None:
    """Beyond exhaustive search: nothing is worse than the plan that knows nothing of frozen operands."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    terms = [letters[i : i + 2] for i in range(n)]
    spec = EinsumSpec(tuple(terms), letters[0] + letters[n])
    shapes = [(20 + 7 * (i * 5 % 11), 20 + 7 * ((i + 1) * 5 % 11)) for i in range(n)]
    sizes = {label: size for term, shape in zip(terms, shapes, strict=True) for label, size in zip(term, shape)}
    frozen = tuple(i % 4 != 0 for i in range(n))
    cost = partial(_seconds, spec, sizes, frozen=list(frozen))
    assert cost(make_plan(spec, shapes, frozen=frozen).ssa_path) < 0.8 * cost(make_plan(spec, shapes).ssa_path)
    assert make_plan(spec, shapes, frozen=(False,) * n).ssa_path == make_plan(spec, shapes).ssa_path
    assert cost(make_plan(spec, shapes, frozen=(True,) * n).ssa_path) > 0


@torch.no_grad()
def test_a_frozen_sum_is_not_distributed_over() -> None:
    """A low-rank update of a weight, which is multiplied by itself where it is not frozen with the weight."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.up, self.down = (
                nn.Parameter(torch.rand(*shape, dtype=torch.float64)) for shape in ((512, 512), (512, 4), (4, 512))
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight + self.up @ self.down)

    child, x = Low(), torch.rand(8, 512, dtype=torch.float64)
    folds = []
    for frozen in (True, ("weight",), ("up", "down"), ("weight", "up")):
        wrapper = OptimizedModule(child, frozen=frozen)
        for _ in range(2):
            torch.testing.assert_close(wrapper(x), child(x))
        folds.append([found.names for found in _folds(wrapper)])
    assert folds == [[("up", "down", "weight")], [], [], []]


def test_orders_follow_the_sizes() -> None:
    """A large product of two thin matrices is not made for one vector, but is for many."""

    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.rand(512, 4, dtype=torch.float64), requires_grad=False)
            self.up = nn.Parameter(torch.rand(4, 512, dtype=torch.float64), requires_grad=False)
            self.square = nn.Parameter(torch.rand(512, 512, dtype=torch.float64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,ir,rj,jk->nk", x, self.down, self.up, self.square)

    child = Thin()
    wrapper = OptimizedModule(child, frozen=True)
    for rows in (1, 64):
        x = torch.rand(rows, 512, dtype=torch.float64)
        torch.testing.assert_close(wrapper(x), child(x))
    assert wrapper.cache_info().fold_bytes == 4 * 512 * 8  # up @ square, for both


# -- when it is computed anew -----------------------------------------------------------------------------------------


def load_in_vain(wrapper: OptimizedModule) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapper.load_state_dict({"a": wrapper.a})


DROPS: dict[str, Callable[[OptimizedModule], object]] = {
    "train": lambda w: w.train(),
    "eval": lambda w: w.eval(),
    "training set": lambda w: setattr(w, "training", False),
    "train of what holds it": lambda w: nn.Sequential(w).train(),
    "load_state_dict": lambda w: w.load_state_dict({}, strict=False),
    "load_state_dict that fails": lambda w: load_in_vain(w),
    "load_state_dict of what holds it": lambda w: nn.Sequential(w).load_state_dict({}, strict=False),
    "to": lambda w: w.to(torch.float64),
    "double": lambda w: w.double(),
    "to of what holds it": lambda w: nn.Sequential(w).to("cpu"),
    "drop_folds": lambda w: w.drop_folds(),
    "cache_clear": lambda w: w.cache_clear(),
}


@pytest.mark.parametrize("name", DROPS)
def test_values_are_dropped(name: str) -> None:
    """Changes that torch can't tell, and then what drops the values."""
    child, wrapper = pair()
    with torch.no_grad():
        before = wrapper(x_of()).clone()
        child.a.data.mul_(2)
        assert kept(wrapper)
        DROPS[name](wrapper)
        assert not kept(wrapper) and wrapper.cache_info().fold_bytes == 0
        after = wrapper(x_of())
    close(after, child(x_of()))
    assert (after - before).abs().max() > 1


def replaced(child: Chain) -> None:
    child.a = nn.Parameter(torch.rand(N, N, dtype=torch.float64))


def data_replaced(child: Chain) -> None:
    child.a.data = torch.rand(N, N, dtype=torch.float64)


def written(child: Chain) -> None:
    with torch.no_grad():
        child.b.add_(1)


def stepped(child: Chain) -> None:
    optimizer: Optimizer = SGD(child.parameters(), lr=0.1)
    child(x_of()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assigned(child: Chain) -> None:
    child.load_state_dict({name: tensor + 1 for name, tensor in child.state_dict().items()}, assign=True)


def rounded(child: Chain) -> None:
    """There and back: the tensors and their versions are as before, their values are not."""
    child.bfloat16().double()


def aliased(child: Chain) -> None:
    """Written, then in the place of its data under a new version counter: only the object tells."""
    with torch.no_grad():
        child.b.add_(1)
    child.b = nn.Parameter(child.b.data)


def moved(child: Chain) -> None:
    """To another place of the same memory: only the address tells."""
    child.b.data = child.memory[N:]


def swapped(child: Chain) -> None:
    torch.utils.swap_tensors(child.a, nn.Parameter(torch.rand(N, N, dtype=torch.float64)))


CHANGES = [
    replaced,
    data_replaced,
    written,
    stepped,
    assigned,
    rounded,
    aliased,
    moved,
    swapped,
    lambda child: child.load_state_dict({name: tensor + 1 for name, tensor in child.state_dict().items()}),
    lambda child: child.b.detach().mul_(3),
    lambda child: nn.init.normal_(child.c),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_torch_can_tell_are_seen(change: Callable[[Chain], None]) -> None:
    """The promise is broken, and by way of the child, past the wrapper."""
    child, wrapper = pair()
    child.memory = torch.rand(2 * N, N, dtype=torch.float64)
    child.b.data = child.memory[:N]
    with torch.no_grad():
        before = wrapper(x_of()).clone()
    change(child)
    with torch.no_grad():
        after = wrapper(x_of())
        close(after, child(x_of()))
        assert (after - before).abs().max() > 1e-3
        assert len(kept(wrapper)) == 1


@torch.no_grad()
def test_other_memory_at_the_same_address() -> None:
    """Only the storage tells. Memory of this size is mapped for each tensor, at the first place that is free."""
    size = 10_000_000
    child, wrapper = pair(lambda m, x: x + m.shift.sin().sum(), frozen=("shift",))
    child.shift = torch.zeros(size)
    close(wrapper(x_of()), x_of())
    address = child.shift.data_ptr()
    child.shift.data = torch.empty(0)
    child.shift.data = torch.ones(size)
    if child.shift.data_ptr() != address:
        pytest.skip("the allocator chose another place")
    close(wrapper(x_of()), child(x_of()))


@torch.no_grad()
def test_other_tensors_for_a_call() -> None:
    child, wrapper = pair()
    others = {name: torch.rand(N, N, dtype=torch.float64) for name in NAMES}
    for _ in range(2):
        close(functional_call(wrapper, others, x_of()), functional_call(child, others, x_of()))
        close(wrapper(x_of()), child(x_of()))


@torch.no_grad()
def test_a_value_does_not_keep_what_it_is_made_of() -> None:
    child, wrapper = pair()
    wrapper(x_of())
    old = weakref.ref(child.a)
    replaced(child)
    assert old() is None
    assert wrapper.cache_info().fold_bytes == SQUARE


# -- gradients and modes ----------------------------------------------------------------------------------------------


def test_gradients_are_not_lost() -> None:
    child, wrapper = pair()
    for _ in range(2):
        x = x_of().requires_grad_()
        found = torch.autograd.grad(wrapper(x).square().sum(), (x, *map(child.get_parameter, NAMES)))
        expected = torch.autograd.grad(child(x).square().sum(), (x, *map(child.get_parameter, NAMES)))
        close(found, expected)
        assert not kept(wrapper)
        with torch.no_grad():
            close(wrapper(x), child(x))
        assert kept(wrapper)
        wrapper.drop_folds()


def test_what_requires_no_gradient_is_folded_in_training() -> None:
    child, wrapper = pair(lambda m, x: (x @ (m.a @ m.b)).sin() @ (m.c @ m.c))
    child.a.requires_grad_(False)
    child.b.requires_grad_(False)
    optimizer = SGD([child.c], lr=0.01)
    other = copy.deepcopy(child)
    theirs = SGD([other.c], lr=0.01)
    for step in range(4):
        x = x_of(step + 3).requires_grad_()
        for module, stepper in ((wrapper, optimizer), (other, theirs)):
            stepper.zero_grad()
            module(x).square().mean().backward()
            stepper.step()
        close(child.c, other.c)
        assert child.a.grad is None
    close(kept(wrapper), [child.a @ child.b])
    x = x_of().requires_grad_()
    (first,) = torch.autograd.grad(wrapper(x).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(other(x).sum(), x, create_graph=True)
    close(first, again)
    close(torch.autograd.grad(first.square().sum(), x), torch.autograd.grad(again.square().sum(), x))


def test_requires_grad_switched() -> None:
    child, wrapper = pair()
    for requires_grad in (True, False, True, False):
        child.requires_grad_(requires_grad)
        wrapper.drop_folds()
        result = wrapper(x_of())
        close(result, child(x_of()))
        assert result.requires_grad == requires_grad
        assert bool(kept(wrapper)) != requires_grad


def test_inference_mode_then_training() -> None:
    child, wrapper = pair()
    child.requires_grad_(False)
    with torch.inference_mode():
        first = wrapper(x_of())
        assert first.is_inference()
        close(first, child(x_of()))
    (value,) = kept(wrapper)
    assert not value.is_inference() and not value.requires_grad
    x = x_of().requires_grad_()
    close(torch.autograd.grad(wrapper(x).sum(), x), torch.autograd.grad(child(x).sum(), x))
    (same,) = kept(wrapper)
    assert same is value  # shared between modes


def test_values_made_in_inference_mode_are_left_alone() -> None:
    child, wrapper = pair()
    with torch.inference_mode():
        for name in NAMES:
            setattr(child, name, nn.Parameter(torch.rand(N, N, dtype=torch.float64)))
        close(wrapper(x_of()), child(x_of()))
    assert not kept(wrapper)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_autocast(order: tuple[bool, bool]) -> None:
    def function(self: Chain, x: Tensor) -> Tensor:
        return x @ (self.a @ self.b).sin() + (self.b @ self.c).sum(0, dtype=torch.float32)

    child = Chain(function, dtype=torch.float32)
    wrapper = OptimizedModule(child, frozen=NAMES)
    x = x_of().float()
    for enabled in (*order, *order):
        with torch.autocast("cpu", enabled=enabled), torch.no_grad():
            found, expected = wrapper(x), child(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # One of each kind is of a type that does not tell in which mode it was computed.
    dtypes = [value.dtype for value in kept(wrapper)]
    assert (dtypes.count(torch.float32), dtypes.count(torch.bfloat16)) == (3, 1)


def test_autocast_and_gradients_of_what_is_folded() -> None:
    """What autocast caches of a weight while a value is computed must not serve a call that needs gradients."""
    child = Chain(lambda self, x: x @ self.a + no_gradients(self), dtype=torch.float32)

    @torch.no_grad()
    def no_gradients(self: Chain) -> Tensor:
        return (self.a @ self.b).sum()

    wrapper = OptimizedModule(child, frozen=("a", "b"))
    with torch.autocast("cpu"):
        result = wrapper(x_of().float()) + child.a.mm(child.b).sum()
    (gradient,) = torch.autograd.grad(result.float().sum(), child.b)
    assert gradient.abs().sum() > 0 and kept(wrapper)


def test_forward_mode() -> None:
    """A dual number's tangent is not kept for later."""
    child, wrapper = pair()
    child.requires_grad_(False)
    tangents = {name: torch.rand(N, N, dtype=torch.float64) for name in NAMES}
    for _ in range(2):
        found = []
        for module in (wrapper, child):
            with forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(getattr(child, name), tangents[name]) for name in NAMES}
                found.append(forward_ad.unpack_dual(functional_call(module, duals, x_of())))
        close(found[0].primal, found[1].primal)
        close(found[0].tangent, found[1].tangent)
        close(wrapper(x_of()), child(x_of()))


# -- memory -----------------------------------------------------------------------------------------------------------

ESCAPES: dict[str, Callable[[Chain, Tensor], Any]] = {
    "returned": lambda m, x: m.a @ m.b,
    "returned beside a use": lambda m, x: (x @ (y := m.a @ m.b), y),
    "in containers": lambda m, x: {"y": [(m.a @ m.b @ m.c,)], "x": x},
    "a view": lambda m, x: (m.a @ m.b)[1:].T,
    "a reshape": lambda m, x: (m.a @ m.b).reshape(-1),
    "contiguous": lambda m, x: (m.a @ m.b).contiguous(),
    "an item": lambda m, x: torch.linalg.qr(m.a @ m.b).Q,
    "chunks": lambda m, x: (m.a @ m.b).chunk(2),
    "to": lambda m, x: (m.a @ m.b).to(torch.float64),
    "einsum that views": lambda m, x: torch.einsum("ij->ji", torch.einsum("ij,jk->ik", m.a, m.b)),
    "twice": lambda m, x: ((m.a @ m.b), (m.a @ m.b)),
    "both": lambda m, x: (y := m.a @ m.b, y.T),
    "cheap": lambda m, x: m.a * 2,
    "parameter": lambda m, x: (m.a, m.b.T, m.c[0]),
    "no product": lambda m, x: (m.a * m.b).sin(),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ESCAPES)
def test_results_are_memory_of_their_own(name: str, grad: bool) -> None:
    """What is done to a result shows in no later one, nor is it visible in which memory it lies."""
    child, wrapper = pair(ESCAPES[name])
    other = copy.deepcopy(child)
    for module in (child, other):
        module.requires_grad_(not grad)
    row = Program(name, lambda: child, lambda n, generator: None)  # type: ignore[arg-type, return-value]
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            call = _calls(x_of())
            ours = _observe(row, wrapper, child, call, second=False)
            theirs = _observe(row, other, other, _calls(x_of()), second=False)
            assert differences(ours, theirs) == []
            if name != "parameter":
                for leaf in ours.leaves:
                    leaf.fill_(float("nan"))
        values = kept(wrapper)
    assert all(value.isfinite().all() for value in values)
    assert bool(values) == (name not in ("cheap", "parameter"))


def _calls(x: Tensor) -> Any:
    return Call((x,), {})


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_live_calls_get_copies() -> None:
    """A leaf module writes what it is given, and gives it back."""

    class Outer(Chain):
        def __init__(self) -> None:
            super().__init__(lambda m, x: x @ m.leaf(m.a @ m.b))
            self.leaf = Writing()

    wrapper, other = OptimizedModule(Outer(), frozen=True, leaf_modules=(Writing,)), Outer()
    with torch.no_grad():
        for _ in range(3):
            close(wrapper(x_of()), other(x_of()))
    assert len(kept(wrapper)) == 1


def test_attributes_get_copies() -> None:
    def function(self: Chain, x: Tensor) -> Tensor:
        self.shift = (self.a @ self.b).sum(0)
        return x + self.shift

    (child, wrapper), other = pair(function), Chain(function)
    with torch.no_grad():
        for _ in range(3):
            close(wrapper(x_of()), other(x_of()))
            close(child.shift, other.shift)
            child.shift.add_(1)
            other.shift.add_(1)


def test_strides_are_those_that_code_relies_on() -> None:
    """An einsum gives its result with other strides than the contiguous ones that ``view`` was traced with."""

    def function(self: Chain, x: Tensor) -> Tensor:
        weight = torch.einsum("ij,jk->ki", self.a, self.b)
        return x @ weight.view(-1).view(N, N) + weight.stride(0)

    child, wrapper = pair(function)
    with torch.no_grad():
        expected = child(x_of())
        for _ in range(2):
            close(wrapper(x_of()), expected)


@pytest.mark.parametrize("output", ["".join(order) for order in itertools.permutations("ikl")])
@torch.no_grad()
def test_values_have_the_strides_that_code_was_made_for(output: str) -> None:
    """Einsums of two, which compute one of three, give others."""

    def function(self: Chain, x: Tensor) -> Tensor:
        operands = self.a[:3, :5], self.b[:4, :5], self.c[:2, :5]
        return torch.einsum(f"ij,kj,lj->{output}", *operands).sin() * x.sum()

    child, wrapper = pair(function)
    close(wrapper(x_of()), child(x_of()))
    (entry,) = wrapper.specializations.values()
    ((folded,), (value,)) = entry.folds, kept(wrapper)
    assert value.stride() == folded.fold.type.stride


@torch.no_grad()
def test_values_go_with_the_wrapper() -> None:
    child, wrapper = pair(lambda m, x: x @ (m.a @ m.b) + (m.b @ m.c).sum())
    wrapper(x_of())
    values = [weakref.ref(value.untyped_storage()) for value in kept(wrapper)]
    tensors = [weakref.ref(value) for value in kept(wrapper)]
    assert len(tensors) == 2 and all(tensor() is not None for tensor in tensors)
    del wrapper
    gc.collect()
    assert all(tensor() is None for tensor in tensors) and values
    close(child(x_of()), child(x_of()))


@torch.no_grad()
def test_values_are_shared_between_sizes() -> None:
    child, wrapper = pair()
    for rows in (1, 2, 3, 4, 9, 17, 64, 300):
        close(wrapper(x_of(rows)), child(x_of(rows)))
        assert wrapper.cache_info().fold_bytes == SQUARE
    assert any(entry.is_generic and entry.folds for entry in wrapper.specializations.values())
    exact = OptimizedModule(child, frozen=NAMES, dynamic=False)
    for rows in (2, 3, 4, 9, 17, 64, 300):
        close(exact(x_of(rows)), child(x_of(rows)))
        assert exact.cache_info().fold_bytes == SQUARE
    assert exact.cache_info().currsize == 7


@pytest.mark.filterwarnings("ignore::lazy_einsum.CacheThrashWarning")
@torch.no_grad()
def test_values_that_no_specialization_uses_are_dropped() -> None:
    def function(self: Chain, x: Tensor) -> Tensor:
        return x @ (self.a @ self.b) if x.shape[0] > 4 else x @ (self.b @ self.c)

    child, wrapper = pair(function, maxsize=1)
    for rows in (3, 5, 3, 5):
        close(wrapper(x_of(rows)), child(x_of(rows)))
        (value,) = kept(wrapper)
        close(value, child.a @ child.b if rows > 4 else child.b @ child.c)
    assert wrapper.cache_info().evictions == 3
    shared = OptimizedModule(Chain(product), frozen=NAMES, maxsize=1, dynamic=False)
    for rows in (3, 5, 3):
        shared(x_of(rows))
    assert shared.cache_info().fold_bytes == SQUARE


@torch.no_grad()
def test_memory_limit() -> None:
    def function(self: Chain, x: Tensor) -> Tensor:
        return x @ self.a.sin()

    for limit in (SQUARE - 1, SQUARE):
        child, wrapper = pair(function, memory_limit=limit)
        close(wrapper(x_of()), child(x_of()))
        assert len(kept(wrapper)) == (limit == SQUARE)


# -- the wrapper ------------------------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    child = Chain(product)
    with pytest.raises(ValueError, match=r"'d', 'shape', which Chain does not have; .*: a, b, c, shift"):
        OptimizedModule(child, frozen=("a", "d", "shape"))
    with pytest.raises(ValueError, match=r"function does not have; .* none"):
        OptimizedModule(lambda x: x, frozen=("a",))
    with pytest.raises(TypeError, match=r"\('a',\)"):
        OptimizedModule(child, frozen="a")
    with pytest.raises(ValueError, match=r"0\.b"):
        OptimizedModule(nn.Sequential(child), frozen=("b",))
    for nothing in ((), [], False, None):
        if nothing is not None:
            assert OptimizedModule(child, frozen=nothing)._settings["frozen"] == ()
    assert OptimizedModule(lambda x: x + 1, frozen=True)(torch.zeros(2)).tolist() == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda wrapper: pickle.loads(pickle.dumps(wrapper))])
def test_copies_start_without_values(how: Callable[[Any], Any]) -> None:
    child, wrapper = pair()
    wrapper(x_of())
    other = how(wrapper)
    assert kept(wrapper) and not kept(other) and other._settings["frozen"] == NAMES
    other.module.a.mul_(2)
    close(other(x_of()), 2 * child(x_of()))
    close(wrapper(x_of()), child(x_of()))
    assert len(kept(other)) == 1


@torch.no_grad()
def test_a_copy_of_a_module_whose_names_changed() -> None:
    child, wrapper = pair()
    nn.utils.parametrize.register_parametrization(child, "a", nn.Tanh())
    other = copy.deepcopy(wrapper)
    close(other(x_of()), child(x_of()))
    assert other.__dict__["_settings"]["frozen"] == ("b", "c")


@torch.no_grad()
def test_a_parametrization_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    child = nn.utils.parametrizations.weight_norm(nn.Linear(N, N, dtype=torch.float64))
    wrapper = OptimizedModule(child, frozen=True)
    with computed(monkeypatch) as seen:
        for _ in range(2):
            close(wrapper(x_of()), child(x_of()))
    assert len(seen) == 1 and kept(wrapper)


@torch.no_grad()
def test_shared_tensors_are_known_by_each_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Chain(product), Chain(product)
            self.two.b = self.one.b

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.one.b @ self.one.c) + x @ (self.two.b @ self.two.a)

    child = Tied()
    wrapper = OptimizedModule(child, frozen=("one.c", "two.b"))
    close(wrapper(x_of()), child(x_of()))
    assert [value.names for value in _folds(wrapper)] == [("two.b", "one.c")]
    child.one.b = nn.Parameter(torch.rand(N, N, dtype=torch.float64))
    close(wrapper(x_of()), child(x_of()))


def _folds(wrapper: OptimizedModule) -> list[Fold]:
    return [each.fold for entry in wrapper.specializations.values() for each in entry.folds]


@torch.no_grad()
def test_two_layers_do_not_share() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Chain(product), Chain(product)
            self.two.a.mul_(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    child = Two()
    wrapper = OptimizedModule(child, frozen=True)
    for _ in range(2):
        close(wrapper(x_of()), child(x_of()))
    assert len(kept(wrapper)) == 2


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    child, wrapper = pair()
    with torch.no_grad():
        expected = child(x_of())
        wrapper.prepare(x_of())
    start, wrong = threading.Barrier(6), []

    @torch.no_grad()
    def work() -> None:
        start.wait()
        for _ in range(50):
            if not torch.allclose(wrapper(x_of()), expected, rtol=1e-10):
                wrong.append(1)

    with computed(monkeypatch) as seen:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and seen == [NAMES]

    def drop() -> None:
        for _ in range(200):
            wrapper.drop_folds()

    start = threading.Barrier(6)
    threads = [threading.Thread(target=work) for _ in range(6)] + [threading.Thread(target=drop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_verify() -> None:
    child, wrapper = pair(verify=True)
    close(wrapper(x_of()), child(x_of()))
    wrapper = OptimizedModule(Chain(FOLDED["several results"][0]), frozen=True, verify=True)
    for rows in (3, 4, 5):
        wrapper(x_of(rows))


@torch.no_grad()
def test_report() -> None:
    _, wrapper = pair()
    assert wrapper.explain(x_of()).to_dict()["fold_bytes"] == 0
    wrapper(x_of())
    report = wrapper.explain()
    text = str(report)
    assert f"computed once, of a, b, c ({SQUARE} bytes)" in text and f"{SQUARE} bytes are kept" in text
    (fold,) = report.to_dict()["specializations"][0]["folds"]
    assert fold["names"] == ["a", "b", "c"] and fold["bytes"] == SQUARE and fold["code"].count("matmul") == 2
    assert list(next(iter(wrapper.specializations.values())).stages)[-2:] == ["fold", "lower"]


@torch.no_grad()
def test_the_graph_module_computes_for_itself() -> None:
    child, wrapper = pair()
    entry = wrapper.prepare(x_of())
    module = entry.graph_module
    close(module(x_of()), child(x_of()))
    child.a.data.mul_(2)
    close(module(x_of()), child(x_of()))
    assert not kept(wrapper)


class Choosing(nn.Module):
    """Looks at values, so that only its parts are specialized."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Chain(product), Chain(product)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else layer(-x)
        return x


@pytest.mark.parametrize("frozen", [True, ("layers.0.a", "layers.0.b", "layers.0.c", "layers.1.a", "layers.1.b")])
@torch.no_grad()
def test_parts(frozen: Any) -> None:
    child = Choosing()
    wrapper = OptimizedModule(child, frozen=frozen, on_untraceable="ignore")
    for rows in (4, 4, 3):
        close(wrapper(x_of(rows)), child(x_of(rows)))
    assert len(kept(wrapper)) == 2 and wrapper.cache_info().parts["layers.0"] == "specialized"
    child.layers[1].b.data.mul_(2)
    wrapper.eval()
    close(wrapper(x_of()), child(x_of()))


@torch.no_grad()
def test_parts_with_hooks() -> None:
    child = nn.Sequential(Chain(product), Chain(product))
    child[0].register_forward_hook(lambda module, args, result: result + 1)
    wrapper = OptimizedModule(child, frozen=True)
    for _ in range(2):
        close(wrapper(x_of()), child(x_of()))
    assert len(kept(wrapper)) == 2
    names = [name for entry in wrapper.specializations.values() for each in entry.folds for name in each.fold.names]
    assert set(names) == {f"{number}.{name}" for number in (0, 1) for name in NAMES}


@torch.no_grad()
def test_a_wrapper_with_hooks_of_its_child() -> None:
    child, wrapper = pair()
    child.register_forward_hook(lambda module, args, result: result * 2)
    for _ in range(2):
        close(wrapper(x_of()), child(x_of()))
    assert len(kept(wrapper)) == 1


@torch.no_grad()
def test_under_compile() -> None:
    child, wrapper = pair()
    compiled = torch.compile(wrapper, backend="eager")
    close(compiled(x_of()), child(x_of()))


# -- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FOLDED, *LEFT, *ESCAPES])
@torch.no_grad()
def test_the_pass_keeps_its_promises(name: str) -> None:
    function = FOLDED[name][0] if name in FOLDED else LEFT.get(name) or ESCAPES[name]
    traced = trace(Chain(function), Arguments.of((x_of(),), {})[0])
    for node in traced.graph.nodes:
        if node.op == "get_attr" and facts(node).type is not None:
            node.meta[FROZEN] = str(node.target)
    *_, after, _ = [stage.graph for stage in run_passes(traced.graph, Options(folds=True))]
    assert shape_of_code(fold()(after)) == shape_of_code(after), "the second run changes something"
    memory: dict[int, str] = {}
    for node in after.nodes:
        known = facts(node)
        assert known is not None
        if isinstance(node.target, Fold):
            assert all(operand.op == "get_attr" for operand in node.all_input_nodes)
            assert memory.setdefault(known.storage, node.name) == node.name
    returned = {facts(node).storage for node in next(iter(reversed(after.nodes))).all_input_nodes}
    changed = {storage for node in after.nodes for storage in facts(node).writes}
    assert memory.keys().isdisjoint(returned | changed)


# -- programs ---------------------------------------------------------------------------------------------------------

MODULES = [row for row in PROGRAMS if isinstance(row.make(), nn.Module)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("row", MODULES, ids=names(MODULES))
def test_programs_with_all_tensors_frozen(row: Program, grad: bool, device: str) -> None:
    """The table of programs; with gradients, of inputs only."""
    row = on(row, device)
    child, wrapped_child = row.make(), row.make()
    for module in (child, wrapped_child):
        for parameter in module.parameters():
            parameter.requires_grad_(not grad)
    wrapped = OptimizedModule(wrapped_child, frozen=True, on_untraceable="ignore")
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        for number in range(len(SIZES)):
            if row.before is not None:
                row.before(number, child)
                row.before(number, wrapped_child)
            call = _call(row, number)
            theirs = _observe(row, child, child, _copy(call), second=row.second and grad)
            ours = _observe(row, wrapped, wrapped_child, _copy(call), second=row.second and grad)
            assert differences(ours, theirs, tolerance=row.tolerance) == [], f"call {number}\n{wrapped.explain()}"


def test_frozen_parts_are_folded_and_not_shared() -> None:
    """``x`` times ``a`` could be computed once for both; ``a`` times ``b`` and ``a`` times ``c`` need not be at all."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abc":
                setattr(self, name, nn.Parameter(torch.rand(128, 128)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(torch.einsum("ni,ij,jk->nk", x, self.a, other) for other in (self.b, self.c))

    model = OptimizedModule(Two(), frozen=True)
    x = torch.rand(64, 128)
    with torch.no_grad():
        for ours, theirs in zip(model(x), model.module(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert model.code.count("= lazy_einsum_folds_fold") == 2 and model.code.count("mm(") == 2
