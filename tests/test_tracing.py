"""The hazards of tracing, one row each: code that a trace can represent, and code that it must refuse, with the
reason and the user's line.
"""

from __future__ import annotations

import copy
import functools
import random
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from behaviour import differences, observe
from checks import traced
from torch import Tensor, nn

from lazy_einsum import FallbackWarning, OptimizedModule, UntraceableError
from lazy_einsum.graph import type_of

einsum = torch.einsum


class Program(nn.Module):
    """Runs ``function(self, *args)`` with the given attributes on itself."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Double(torch.autograd.Function):
    """Has a backward that is not the derivative, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class Configuration:
    def __init__(self) -> None:
        self.use = True
        self.sizes = [2, 2]


@dataclass(frozen=True)
class FrozenConfiguration:
    scale: float = 3.0


class Pair(NamedTuple):
    first: Any
    second: Any


GLOBAL = torch.randn(4, dtype=torch.float64)
KEPT: dict[str, Tensor] = {}
OTHER = nn.Linear(4, 1).double()


def x34() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def program(function: Callable[..., Any], **attributes: Any) -> Callable[[], nn.Module]:
    return lambda: Program(function, **{name: make() if callable(make) else make for name, make in attributes.items()})


def autocast_inside(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return einsum("ij,kj->ik", x, x)


def inference_inside(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


def checkpointed(x: Tensor, reentrant: bool) -> Any:
    return torch.utils.checkpoint.checkpoint(lambda z: (z * 2).sin(), x, use_reentrant=reentrant)


def seeded(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return x + torch.rand(4, dtype=x.dtype)


def forked(self: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return x + torch.rand(4, dtype=x.dtype)


def sets_requires_grad(self: Any, x: Tensor) -> Tensor:
    z = x.detach()
    z.requires_grad = True
    return z * 2


def counts(self: Any, x: Tensor) -> Tensor:
    self.n += 1
    return x * self.n


def remembers(self: Any, x: Tensor) -> Tensor:
    self.h = x.detach() * 2
    return self.h + 1


def appends(self: Any, x: Tensor) -> Tensor:
    self.log.append(1)
    return x * len(self.log)


def keeps(self: Any, x: Tensor) -> Tensor:
    KEPT["x"] = x.detach() * 2
    return KEPT["x"] + 1


class Keeper:
    """Holds tensors where no code names them."""

    def __call__(self, x: Tensor) -> None:
        hold = functools.partial(getattr, self.__class__)
        hold("kept")["x"] = x

    kept: ClassVar[dict[str, Tensor]] = {}


def keeps_elsewhere(self: Any, x: Tensor) -> Tensor:
    getattr(__import__("sys").modules[__name__], "Kee" + "per")()(x.detach() * 2)
    return x + 1


def locks(self: Any, x: Tensor) -> Tensor:
    with self.lock:
        return x * 2


def swallows(self: Any, x: Tensor) -> Tensor:
    try:
        return x * x.sum().item()
    except RuntimeError:
        return x


def changes_configuration(self: Any, x: Tensor) -> Tensor:
    self.configuration.use = not self.configuration.use
    return x * 2


def backward_inside(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (z * z).sum().backward()
    assert z.grad is not None
    return z.grad


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "autograd.Function": (program(lambda self, x: Double.apply(x).sin()), "autograd.Function"),
    "vmap inside": (program(lambda self, x: torch.vmap(lambda row: row * 2)(x)), "torch.func"),
    "torch.func.grad inside": (
        program(lambda self, x: torch.func.grad(lambda z: (z * z).sum())(x)),
        "torch.func|requires_grad_",
    ),
    "autocast inside": (program(autocast_inside), "autocast"),
    "checkpoint": (program(lambda self, x: checkpointed(x, False)), "checkpointing"),
    "reentrant checkpoint": (program(lambda self, x: checkpointed(x, True)), "grad mode|autograd.Function"),
    "manual_seed": (program(seeded), "seeds torch's random generator"),
    "fork_rng": (program(forked), "seeds torch's random generator"),
    "Python's random": (program(lambda self, x: x * random.random()), "Python's random generator"),
    "NumPy's random": (program(lambda self, x: x * float(np.random.rand())), "NumPy's random generator"),
    "backward": (program(backward_inside), "requires_grad_|backward"),
    "item": (program(lambda self, x: x * x.sum().item()), "item"),
    "item, error swallowed": (program(swallows), "item"),
    "branch on a value": (program(lambda self, x: x * 2 if x.sum() > 0 else x), "values of a tensor"),
    "boolean mask": (program(lambda self, x: x[x > 0]), "values of a tensor"),
    "numpy": (program(lambda self, x: torch.from_numpy(x.detach().numpy() * 2)), "numpy"),
    "counter": (program(counts, n=0), "sets self.n"),
    "list appended": (program(appends, log=lambda: []), "changes self.log"),
    "object changed": (program(changes_configuration, configuration=Configuration), "sets self.configuration.use"),
    "parameter of another module": (program(lambda self, x: x * OTHER.weight[0]), "neither an argument nor reached"),
    "kept in a global": (program(keeps), "changes test_tracing.KEPT"),
    "kept by an object": (program(keeps_elsewhere), "outlives the call"),
    "lock used": (program(locks, lock=threading.Lock), "self.lock, a _thread.lock"),
    "submodule copied": (
        program(lambda self, x: copy.deepcopy(self.layer)(x), layer=lambda: nn.Linear(4, 4).double()),
        "copy.py",
    ),
    "own list returned": (program(lambda self, x: (x, self.log), log=lambda: [1, 2]), "belongs to the module"),
}


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def in_two_modes(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    with torch.no_grad():
        z = y * 3
        z += 1
    return y, z


def writes(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[0] = 1.0
    y[:, 1].mul_(3)
    y.add_(1).clamp_(max=2)
    return y


def writes_what_no_grad_made(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = einsum("ab,c->abc", x, x[0])
    y[..., 0] += x
    return y


def writes_what_cancels_without_grad(self: Any, x: Tensor) -> Tensor:
    y = x @ x.T
    with torch.no_grad():
        z = 2.0 * (y * 0.5)
    einsum("ij->ji", z)[0] *= x.sum()
    return z


def views_a_product(self: Any, x: Tensor) -> Tensor:
    y = einsum("abc->ca", x[:, None, :] * -0.3) / 3
    einsum("dm,zq->dzqm", y, y)
    return einsum("ab->ab", y)


def differentiates(self: Any, x: Tensor) -> Tensor:
    y = (x * self.w).pow(3).sum()
    (gradient,) = torch.autograd.grad(y, self.w, create_graph=True)
    return gradient * x


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    module[0].register_forward_hook(lambda module, args, output: output * 2)
    module[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    module[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    module.register_forward_hook(lambda module, args, output: output + 1)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return module


def compiled_in_place() -> nn.Module:
    layer = nn.Linear(4, 3).double()
    layer.compile(backend="eager")
    return nn.Sequential(layer, nn.Tanh())


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, first)


TRACED: dict[str, Callable[[], nn.Module]] = {
    "attribute set": program(remembers),
    "configuration object": program(lambda self, x: x * self.c.sizes[0] if self.c.use else x, c=Configuration),
    "frozen dataclass": program(lambda self, x: x * self.c.scale, c=FrozenConfiguration),
    "lock not used": program(lambda self, x: x * 2, lock=threading.Lock),
    "generator not used": program(lambda self, x: x * 2, g=lambda: (i for i in range(3))),
    "tensor attribute": program(lambda self, x: x * self.t, t=lambda: torch.tensor(3.0, dtype=torch.float64)),
    "tensors in containers": program(
        lambda self, x: x * self.t[0] + self.t[1]["a"], t=lambda: [torch.tensor(3.0), {"a": torch.ones(4)}]
    ),
    "inference mode inside": program(inference_inside),
    "requires_grad set": program(sets_requires_grad),
    "TorchScript submodule": lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3).double())),
    "global tensor": program(lambda self, x: x * GLOBAL),
    "tensor written": program(lambda self, x: x * self.t.add_(1), t=lambda: torch.zeros(4)),
    "function attribute": program(lambda self, x: self.act(x), act=lambda: F.silu),
    "absent attribute": program(lambda self, x: x * 2 if hasattr(self, "missing") else x * 3),
    "modules listed": program(
        lambda self, x: functools.reduce(lambda y, m: m(y), self.ms, x),
        ms=lambda: nn.ModuleList([nn.Tanh(), nn.ReLU()]),
    ),
    "parameters listed": program(
        lambda self, x: sum(p.sum() for p in self.parameters()) + x, l=lambda: nn.Linear(2, 2).double()
    ),
    "named tuple result": program(lambda self, x: Pair(x * 2, [x + 1, None])),
    "OrderedDict result": program(lambda self, x: OrderedDict(a=x * 2, b=(x.shape, x.dtype, 1.5))),
    "dropout": program(lambda self, x: self.d(x), d=lambda: nn.Dropout(0.5)),
    "random numbers": program(lambda self, x: x + torch.rand(3, 4) + torch.randn_like(x) + torch.randperm(4)),
    "BatchNorm": program(lambda self, x: self.n(x), n=lambda: nn.BatchNorm1d(4).double()),
    "InstanceNorm": program(
        lambda self, x: self.n(x[None]), n=lambda: nn.InstanceNorm1d(3, track_running_stats=True).double()
    ),
    "LSTM": program(lambda self, x: self.r(x[None])[0], r=lambda: nn.LSTM(4, 3, 2, batch_first=True).double()),
    "GRU": program(
        lambda self, x: self.r(x[None])[1], r=lambda: nn.GRU(4, 3, batch_first=True, bidirectional=True).double()
    ),
    "attention": program(
        lambda self, x: self.a(x[None], x[None], x[None]),
        a=lambda: nn.MultiheadAttention(4, 2, batch_first=True).double(),
    ),
    "transformer": program(
        lambda self, x: self.t(x[None], x[None]), t=lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True).double()
    ),
    "parametrized weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double()),
    "parametrized orthogonal": lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4).double()),
    "parametrized spectral_norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double()),
    "tied weights": tied,
    "hooks": hooked,
    "compiled submodule": lambda: nn.Sequential(torch.compile(nn.Linear(4, 3).double(), backend="eager"), nn.Tanh()),
    "submodule compiled in place": compiled_in_place,
    "nested wrapper": lambda: nn.Sequential(OptimizedModule(nn.Linear(4, 3).double()), nn.Tanh()),
    "views returned": program(lambda self, x: (x, x.T, x[0], einsum("ij->ji", x), x)),
    "grad modes": program(in_two_modes),
    "no_grad decorator": program(torch.no_grad()(lambda self, x: x * 2)),
    "writes": program(writes),
    "written after no_grad": program(writes_what_no_grad_made),
    "factors cancel without grad, then written": program(writes_what_cancels_without_grad),
    "view of a tensor times 1": program(lambda self, x: einsum("ab->ba", x.mul(1))),
    "view of a product": program(views_a_product),
    "autograd.grad inside": program(differentiates, w=lambda: nn.Parameter(torch.ones(4, dtype=torch.float64))),
    "reflected operators": program(
        lambda self, x: 1 / x + (2 - x) + 2**x + x**2 + x ** x.abs() + -x + +x + (True + x) + (3.0 - x) * (2 * x)
    ),
    "indexing": program(lambda self, x: x[None, ..., 1:] + x[torch.tensor([0, 1, 2]), :][:, [0, 1, 2]]),
    "several results": program(
        lambda self, x: (x.max(-1).values, x.topk(2).indices, x.sort(-1)[0], *x.unbind(0), *torch.std_mean(x))
    ),
    "iteration": program(lambda self, x: sum(row.sum() for row in x)),
    "shapes": program(lambda self, x: x.reshape(x.shape[0] * 2 * 2, -1) if len(x) > 2 else x),
    "module made inside": program(lambda self, x: nn.Softplus(2.0)(x) + Scaled(x.sum())(x)),
    "another type": program(
        lambda self, x: x.type(torch.half) * 2 + x.type(dtype="torch.LongTensor") + x.type(x.dtype)
    ),
    "type asked": program(lambda self, x: x * 2 if x.type() == "torch.DoubleTensor" else x),
    "strides asked": program(lambda self, x: x.as_strided((2, 2), (x.stride(0), x.stride(1)))),
    "constants made": program(
        lambda self, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4) + torch.full((4,), 2)
    ),
    "complex": program(lambda self, x: torch.fft.fft(x).conj() * 2j),
    "masks": program(lambda self, x: torch.where(x > 0, x, -x).masked_fill(x > 1, 0.0)),
    "scaled_dot_product_attention": program(lambda self, x: F.scaled_dot_product_attention(x[None], x[None], x[None])),
    "convolutions": program(
        lambda self, x: self.c(x[None, None]),
        c=lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)).double(),
    ),
}


def observe_twice(make: Callable[[], nn.Module], requires_grad: bool) -> tuple[list[str], OptimizedModule, list[str]]:
    """Three calls wrapped and unwrapped; the differences, the wrapper, the fall-backs."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    child = make()
    wrapped = OptimizedModule(child)
    found: list[str] = []
    fallen: list[str] = []
    for number in range(3):
        torch.manual_seed(number)
        x = x34()
        inputs = [x.clone().requires_grad_(requires_grad) for _ in range(2)]
        theirs = observe(plain, (inputs[0],), module=plain)
        assert theirs.error is None, theirs.error
        ours = observe(wrapped, (inputs[1],), module=child)
        found += differences(ours, theirs)
        fallen += [str(w.message) for w in ours.warned if issubclass(w.category, FallbackWarning)]
    return found, wrapped, fallen


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_traced(name: str, requires_grad: bool) -> None:
    found, wrapped, fallen = observe_twice(TRACED[name], requires_grad)
    assert found == [] and fallen == []
    info = wrapped.cache_info()
    assert (info.hits, info.misses, info.fallbacks) == (2, 1, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, reason = REFUSED[name]
    # Python's and NumPy's generators are seeded by observe(), so results can be compared.
    found, wrapped, fallen = observe_twice(make, True)
    assert found == []
    assert len(fallen) == 1 and re.search(reason, fallen[0]), fallen
    assert wrapped.cache_info().fallbacks == 3 and wrapped.cache_info().currsize == 0
    with pytest.raises(UntraceableError, match=reason):
        OptimizedModule(make(), on_untraceable="raise")(x34().requires_grad_())


@pytest.mark.parametrize("name", ["manual_seed", "fork_rng", "Python's random", "NumPy's random"])
def test_refused_beside_other_threads(name: str) -> None:
    """Whose threads draw from generators can't be told by the generators' state."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        test_refused(name)
    finally:
        done.set()
        thread.join()


def test_other_threads_draw_and_seed_meanwhile() -> None:
    """They are not taken for ``forward``, and what they seed is not undone."""

    def numbers() -> tuple[Any, ...]:
        torch.manual_seed(5)
        random.seed(5)
        return *torch.rand(3).tolist(), random.random(), *torch.rand(2).tolist(), random.randint(0, 10**9)

    expected, found = numbers(), set()
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            found.add(numbers())

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for number in range(30):
            model = OptimizedModule(Program(lambda self, x, number=number: (x * number).sin()), on_untraceable="raise")
            model(torch.ones(3, 4))
    finally:
        done.set()
        thread.join()
    assert found == {expected}


def test_reason_names_the_users_line() -> None:
    with pytest.raises(UntraceableError, match=rf"{re.escape(__file__)}:\d+"):
        OptimizedModule(Program(lambda self, x: x * x.sum().item()), on_untraceable="raise")(x34())


def test_nothing_is_computed_and_nothing_kept() -> None:
    """A trace sees types only: an operand of a terabyte is as good as any."""
    module = Program(lambda self, x: einsum("ij,jk->ik", x, x).sum())
    huge = torch.empty(1).expand(500_000, 500_000)
    entry = OptimizedModule(module).prepare(huge)
    assert entry.signature.arguments.leaves[0].shape == (500_000, 500_000)
    wrapped = OptimizedModule(nn.Linear(4, 3).double())
    x = x34()
    weak = weakref.ref(x), weakref.ref(wrapped.module.weight)
    wrapped(x)
    wrapped.module.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    del x
    assert weak[0]() is None and weak[1]() is None


def test_grad_mode_switched_on_in_inference_mode() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = einsum("ij,kj->ik", x, x)
            return einsum("ik,kj->ij", y, x)

    for x in (x34(), x34().requires_grad_()):
        wrapped = OptimizedModule(function, on_untraceable="raise")
        with torch.inference_mode():
            assert differences(observe(wrapped, (x,)), observe(function, (x,))) == []


def laid_out(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.ones(1000, dtype=torch.float64).as_strided(shape, strides)


# What torch says of tensors without data is wrong here: for dimensions of size 1, whose strides decide how later
# results lie, and for rarer functions of operands that lie in different orders.
STRIDES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "number": (lambda x: x * 2, [laid_out((1, 3), (1, 1))]),
    "number first": (lambda x: 7 - x, [laid_out((2, 1), (1, 2))]),
    "function": (torch.sigmoid, [laid_out((3, 1, 1, 1), (1, 3, 1, 3))]),
    "comparison": (lambda x: x > 0, [laid_out((1, 3), (1, 1))]),
    "no elements": (lambda x: x * 2, [laid_out((0, 5, 5), (1, 5, 1))]),
    "channels last": (
        lambda x, y: x * y,
        [laid_out((2, 3, 1, 2), (6, 1, 6, 3)), laid_out((2, 3, 1, 2), (6, 1, 1, 3))],
    ),
    "two orders": (torch.copysign, [laid_out((5, 10, 5), (1, 25, 5)), laid_out((5, 10, 5), (50, 1, 10))]),
    "rounded quotient": (
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        [laid_out((5, 10, 5), (5, 25, 1)), laid_out((10, 5), (5, 1))],
    ),
    "view": (lambda x: x.view_as(x), [laid_out((3, 1, 3, 1), (3, 9, 1, 9))]),
    "view that merges": (lambda x: x.view(2, 1, -1), [laid_out((2, 1, 2, 3), (6, 12, 3, 1))]),
    "filled": (lambda x, y: x.masked_fill(y > 0, 0.0), [laid_out((5, 5), (1, 5)), laid_out((5,), (1,))]),
    "copy": (lambda x: x.clone(), [laid_out((2, 1, 2, 1, 2), (2, 4, 4, 4, 1))]),
    "matrix product": (torch.matmul, [laid_out((2, 3), (3, 1)), laid_out((1, 3, 1), (1, 1, 1))]),
    "einsum": (
        lambda x, y, z: einsum("abc,db,aec,fc->fc", x, y, x, z),
        [laid_out((2, 4, 1), (4, 1, 1)), laid_out((3, 4), (4, 1)), laid_out((3, 1), (2, 6))],
    ),
    "einsum of what a number gave": (
        lambda x, y: einsum("id,kx->idkx", x, 7 - y),
        [laid_out((1, 2), (2, 1)), laid_out((2, 1), (1, 2))],
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", STRIDES)
def test_strides_are_those_of_eager(name: str, requires_grad: bool) -> None:
    function, operands = STRIDES[name]
    operands = [operand.detach().requires_grad_(requires_grad) for operand in operands]
    graph = traced(function, operands).graph
    (result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    known = type_of(result)
    assert known is not None and known.stride == function(*operands).stride()


def test_user_sees_no_fake_in_the_child() -> None:
    """The shadow takes all side effects, also where the trace is refused."""
    module = Program(remembers)
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    x = x34()
    wrapped(x)
    assert type(module.h) is Tensor and torch.equal(module.h, x * 2)


def test_hook_that_changes_the_type_of_a_result() -> None:
    """A live call that gives another type than foreseen is no crash: the child runs instead."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    module[0].register_forward_hook(lambda module, args, output: output.float())
    wrapped = OptimizedModule(module)
    x = x34()
    with pytest.warns(FallbackWarning, match="hook"):
        result = wrapped(x)
    assert torch.equal(result, module(x))
    flag = []
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    module[0].register_forward_hook(lambda module, args, output: output[:1] if flag else None)
    wrapped = OptimizedModule(module)
    assert torch.equal(wrapped(x), module(x))
    flag.append(1)
    with pytest.warns(FallbackWarning, match="hook"):
        assert torch.equal(wrapped(x), module(x))


def test_containers_among_the_arguments() -> None:
    def fills(x: Tensor, found: dict[str, Tensor]) -> Tensor:
        found["double"] = x * 2
        return x

    def returns(x: Tensor, items: list[Tensor]) -> list[Tensor]:
        return items

    found: dict[str, Tensor] = {}
    with pytest.warns(FallbackWarning, match="changes a list, dictionary or object among its arguments"):
        OptimizedModule(fills)(x := x34(), found)
    assert torch.equal(found["double"], x * 2)
    items = [x]
    with pytest.warns(FallbackWarning, match="returns a list, dictionary or object that it was given"):
        assert OptimizedModule(returns)(x, items) is items


def test_only_written_memory_has_to_be_separate() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(8, dtype=torch.float64)
            self.register_buffer("first", both[:4])
            self.register_buffer("second", both[4:])
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return einsum("ij,j->i", x, self.first) * 2.0 + einsum("ij,j->i", x, self.second) * 3.0

    wrapped = OptimizedModule(Shared())
    for _ in range(3):
        torch.testing.assert_close(wrapped(x := x34()), wrapped.module(x))
    assert wrapped.cache_info()[:2] == (2, 1) and "einsum" not in wrapped.code


@functools.lru_cache
def _table(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


@functools.lru_cache
def _nested(n: int) -> dict[str, list[Tensor]]:
    return {"table": [torch.ones(n, dtype=torch.float64)]}


_MEMO: dict[str, dict[int, Tensor]] = {"tables": {}}


def _memo(n: int) -> Tensor:
    if n not in _MEMO["tables"]:
        _MEMO["tables"][n] = torch.arange(n, dtype=torch.float64)
    return _MEMO["tables"][n]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * _table(4),
        lambda x: x * _table(x.shape[1]),
        lambda x: x * _nested(4)["table"][0],
        lambda x: x * _memo(4),
    ],
    ids=["cached", "cached by size", "cached in containers", "memo"],
)
def test_caches_of_user_code_keep_no_fakes(function: Callable[[Tensor], Tensor]) -> None:
    """What ``forward`` puts in a cache while it is traced must not be found there by the module itself."""
    for _ in range(2):
        _table.cache_clear()
        _nested.cache_clear()
        _MEMO["tables"].clear()
        wrapped = OptimizedModule(function, on_untraceable="ignore")
        for rows in (2, 3, 4, 5):
            x = torch.ones(rows, 4, dtype=torch.float64)
            ours, theirs = wrapped(x), function(x)
            assert type(ours) is type(theirs) is Tensor
            torch.testing.assert_close(ours, theirs)


def test_caches_by_symbolic_size() -> None:
    """einops keeps recipes by shape where shapes have a hash, and does without where not."""

    @functools.lru_cache
    def half(n: int) -> int:
        return n // 2

    def forward(x: Tensor) -> Tensor:
        try:
            return x[: half(x.shape[0])]
        except TypeError:
            return x[: half.__wrapped__(x.shape[0])]

    wrapped = OptimizedModule(forward)
    for rows in (4, 5, 6, 7, 8):
        x = torch.ones(rows, 4)
        assert wrapped(x).shape == forward(x).shape == (rows // 2, 4)
        assert type(half(rows)) is int
    assert wrapped.cache_info().misses == 3
