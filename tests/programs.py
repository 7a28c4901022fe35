"""The one table of programs: functions and modules that, optimized, must do what they do in eager torch."""

from __future__ import annotations

import math
import random
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from behaviour import clone_tree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

einsum = torch.einsum

#: A shape may hold "n": these are its values in the calls of a row, the first twice (a cache hit).
SIZES = (3, 3, 5, 1)


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """One row."""

    name: str
    #: Makes the child: a function, or a module built under a fixed seed.
    make: Callable[[], Callable[..., Any]]
    #: Makes the arguments for a value of "n".
    arguments: Callable[[int, torch.Generator], Call]
    #: May the call fall back to the child, with one warning? Only where refusing is the only sound answer.
    may_fall_back: bool = False
    #: Why plain ``fx.symbolic_trace`` cannot represent it ("" if it can).
    not_for_fx: str = ""
    #: Compare second gradients too.
    second: bool = True
    #: Pass copies of the leaves: for programs that write into their arguments.
    copies: bool = False
    #: Done to the child before each call: (number of the call, child).
    before: Callable[[int, Any], None] | None = None
    #: Tolerance relative to the largest magnitude; by dtype if None.
    tolerance: float | None = None


PROGRAMS: list[Program] = []


class Shape(tuple[Any, ...]):
    """A tensor argument: its dimensions ("n" varies) and how it is filled."""

    def __new__(cls, *dims: Any, **options: Any) -> Shape:
        shape = super().__new__(cls, dims)
        shape.options = options
        return shape

    options: dict[str, Any]

    def build(self, n: int, generator: torch.Generator) -> Tensor:
        size = [n if d == "n" else d for d in self]
        dtype = self.options.get("dtype", torch.float64)
        if "fill" in self.options:
            return torch.full(size, self.options["fill"], dtype=dtype)
        if dtype.is_floating_point or dtype.is_complex:
            # In [1, 2): nothing cancels, and nothing is near zero.
            tensor = torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) + 1
            if dtype.is_complex:
                tensor = tensor + 1j * torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)
            return tensor.requires_grad_(self.options.get("grad", True))
        return torch.randint(-9, 10, size, generator=generator, dtype=dtype)


def t(*dims: Any, **options: Any) -> Shape:
    """A tensor argument."""
    return Shape(*dims, **options)


def _build(tree: Any, n: int, generator: torch.Generator) -> Any:
    if isinstance(tree, Shape):
        return tree.build(n, generator)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_build(item, n, generator) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_build(item, n, generator) for item in tree)
    if isinstance(tree, dict):
        return {key: _build(item, n, generator) for key, item in tree.items()}
    return tree


def program(
    name: str, *args: Any, kwargs: dict[str, Any] | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function, or a module class, to the table."""

    def add(child: Any) -> Any:
        def arguments(n: int, generator: torch.Generator) -> Call:
            return Call(_build(tuple(args), n, generator), _build(kwargs or {}, n, generator))

        def make() -> Callable[..., Any]:
            if not isinstance(child, type):
                return child
            torch.manual_seed(3)
            return child().double()

        PROGRAMS.append(Program(name, make, arguments, **options))
        return child

    return add


# -- equal contractions: large enough to be computed once, where that may be -------------------------------------------


_LARGE = t(72, 72), t(72, 72), t("n", 72)


@program("equal contractions, in another order", *_LARGE, second=False)
def _(a, b, x):
    return einsum("ij,jk,nk->ni", a.tanh(), b, einsum("ij,jk,nk->ni", a, b, x)) + x @ einsum("yz,xy->zx", b, a).sin()


@program("equal parts of large contractions", *_LARGE, second=False)
def _(a, b, x):
    y = einsum("ij,jk,kl->il", a, b, a.sin())
    return x @ (y + einsum("kl,ij,jk->il", b.sin(), a, b))


@program("equal results", *_LARGE, second=False)
def _(a, b, x):
    return einsum("ij,jk->ik", a, b), einsum("xy,yz->xz", a, b), x * 2


@program("equal results without gradients", t(72, 72, grad=False), t(72, 72, grad=False), t("n", 72))
def _(a, b, x):
    y = einsum("xy,yz->xz", a, b)
    return einsum("ij,jk->ik", a, b), y.T, y[0], x * y[0]


@program("a result equal to a value", *_LARGE, second=False)
def _(a, b, x):
    return einsum("ij,jk->ik", a, b), x @ einsum("xy,yz->xz", a, b).sin()


@program("equal contractions, a write between", *_LARGE, copies=True, second=False)
def _(a, b, x):
    y = einsum("ij,jk->ik", a.detach(), b.detach()).sin()
    a.detach().mul_(2)
    return x @ (y + einsum("ij,jk->ik", a.detach(), b.detach()))


@program("equal contractions, one written", *_LARGE, second=False)
def _(a, b, x):
    y, z = einsum("ij,jk->ik", a, b), einsum("ij,jk->ik", a, b)
    y.view(-1)[:9].add_(1)
    return x @ (y.sin() + z)


@program("equal contractions, one without gradients", *_LARGE, not_for_fx="grad mode", second=False)
def _(a, b, x):
    with torch.no_grad():
        y = einsum("ij,jk->ik", a, b)
    return x @ (y.sin() + einsum("ij,jk->ik", a, b))


@program("equal contractions, one with a hook", *_LARGE, not_for_fx="hooks", second=False)
def _(a, b, x):
    y = einsum("ij,jk->ik", a, b)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return x @ (y.sin() + einsum("ij,jk->ik", a, b))


@program("equal contractions of random numbers", *_LARGE, second=False)
def _(a, b, x):
    y = einsum("ij,jk->ik", F.dropout(a), b)
    return x @ (y.sin() + einsum("ij,jk->ik", F.dropout(a), b))


# -- scalars: where a factor may go (denominators, both operands, several uses) ---------------------------------------


@program("W1 denominator with a factor", t(3, "n"), t(3, "n"))
def _(x, y):
    return x / (2.0 * y)


@program("W2 number over a scaled tensor", t(3, "n"))
def _(x):
    return 5.0 / (2.0 * x)


@program("W3 einsum over a scaled einsum", t(3, "n"), t("n", 5))
def _(x, y):
    return einsum("ij,jk->ik", x, y) / (2.0 * einsum("ij,jk->ik", x, y + 0))


@program("W4 product of a scaled value with itself", t(3, "n"))
def _(x):
    z = 2.0 * x
    return z * z


@program("W5 einsum of a scaled value with itself", t(3, "n"))
def _(x):
    z = 2.0 * x
    return einsum("ij,ik->jk", z, z)


@program("W6 scaled square over a number", t(3, "n"))
def _(x):
    z = 2.0 * x
    return (z * z) / 4.0


@program("W7 chain past a value used elsewhere", t(3, "n"), t("n", 5), t(3, 5))
def _(a, b, c):
    p = 3.0 * c
    w = 2.0 * a
    z = einsum("ij,jk->ik", w, b)
    q = p * z
    return q + z


@program("W8 in-place factor on an argument", t(3, "n"), copies=True, not_for_fx="a Proxy takes *= for *")
def _(x):
    x *= 3.0
    return einsum("ij,ij->i", x, x)


@program("W8 in-place method on an argument", t(3, "n"), copies=True)
def _(x):
    x.mul_(3.0)
    return 2 * einsum("ij,ij->i", x, x)


@program("W9 write between two einsums", t(3, "n"), t("n", 5), copies=True)
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    x.add_(1.0)
    return einsum("ik,ij->i", z, x)


@program("W9 write between two einsums, no gradients", t(3, "n", grad=False), t("n", 5, grad=False))
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    x.add_(1.0)
    return einsum("ik,ij->i", z, x)


@program("W10 write between a factor and its use", t(3, "n"), t("n", 5), copies=True)
def _(x, y):
    z = 2.0 * x
    x.add_(1.0)
    return einsum("ij,jk->ik", z, y)


@program("W11 rounding division", t(3, "n"))
def _(x):
    return (x * 7).div(2.0, rounding_mode="floor") * 3.0


@program(
    "W12 float16 kept in range by its author",
    t(2, 64, dtype=torch.float16, fill=200.0),
    t(64, 2, dtype=torch.float16, fill=200.0),
)
def _(a, b):
    return einsum("ij,jk->ik", a / 1000.0, b) * 2.0


@program("W13 integers stay integers", t(3, "n", dtype=torch.int64), t("n", 5, dtype=torch.int64))
def _(x, y):
    return 2 * (3 * (einsum("ij,jk->ik", x, y) + 0))


@program("W13 integers keep their low bits", t("n", dtype=torch.int64))
def _(x):
    return (x + 2**55 + 1) * 3


@program(
    "W14 autocast inside",
    t(3, "n", dtype=torch.float32),
    may_fall_back=True,
    second=False,
    tolerance=0.06,
    not_for_fx="context managers are not recorded",
)
def _(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return einsum("ij,kj->ik", x, x)


@program("chain of factors", t("n", 4), t(4, 5))
def _(x, y):
    return 7.0 * einsum("ij,jk->ik", x / 3, 2 * y / 1.7) / 2 * math.pi


@program("factors through permute and reshape", t("n", 4, 2), t(4, 5))
def _(x, y):
    return (0.5 * (3 * x).permute(2, 0, 1) @ (y / 4)).permute(1, 0, 2) * 2


@program("negated operands", t("n", 4), t(4, 5))
def _(x, y):
    return -einsum("ij,jk->ik", -x, torch.neg(y)) * -1


@program("factor zero keeps NaN", t("n", 4))
def _(x):
    return (x / 0.0 - x / 0.0) * 0.0


@program("factor that is not finite", t("n", 4))
def _(x):
    return 2.0 * (math.inf * x) * 0.5


@program("factor cancels to one but the result is fresh", t("n", 4))
def _(x):
    return (x * 2) * 0.5


@program("factor one is fresh", t("n", 4))
def _(x):
    return x * 1


@program("bool and integer factors", t("n", 4, dtype=torch.int32))
def _(x):
    return True * x, x * 3, x / 2, x // 2, 2 * x * True


@program("integer times float changes dtype", t("n", 4, dtype=torch.int64))
def _(x):
    return einsum("ij,ij->i", x, x) * 0.5


@program("int8 wraps around", t("n", 40, dtype=torch.int8), t(40, 5, dtype=torch.int8))
def _(x, y):
    return einsum("ij,jk->ik", 5 * x, 3 * y) * 7


@program("complex factor on real operands", t("n", 4), t(4, 5))
def _(x, y):
    return (2j * einsum("ij,jk->ik", x, y)) * 3.0 / 1j


@program("factor is a shape", t("n", 4), t(4, 5))
def _(x, y):
    return einsum("ij,jk->ik", x, y) / x.shape[0] ** 0.5 * y.size(1)


@program("alpha and beta of addmm and baddbmm", t(5), t("n", 4), t(4, 5), t(2, "n", 4), t(2, 4, 5))
def _(b, x, y, p, q):
    return torch.addmm(b, 2 * x, y, beta=0.5, alpha=3) * 2, torch.baddbmm(b, p, q / 2, beta=2, alpha=-1)


@program("alpha of add and sub", t("n", 4), t("n", 4))
def _(x, y):
    return torch.add(2 * x, 3 * y, alpha=4) * 0.5, torch.sub(x, y, alpha=2), x.add(y, alpha=-1)


@program("zero-dimensional tensor as coefficient", t(), t("n", 4), t(4, 5))
def _(c, x, y):
    return c * einsum("ij,jk->ik", x, y) / c.detach()


@program("scaled value used by a nonlinear function too", t("n", 4), t(4, 5))
def _(x, y):
    z = 2.0 * einsum("ij,jk->ik", x, y)
    return einsum("ik,ij->j", z, x) + torch.tanh(z).sum()


@program("power of a scaled value", t("n", 4))
def _(x):
    z = 3 * x
    return z**2 / 9, torch.square(2 * z), (z**0.5) * 2


@program("where, maximum and clamp end a network", t("n", 4), t("n", 4))
def _(x, y):
    return torch.where(x > 1.5, 2 * x, 3 * y) * 2, torch.maximum(2 * x, y) / 2, (2 * x).clamp(max=3) * 2


# -- what used to crash: forms of einsum, integers, complex, shapes as numbers ----------------------------------------


@program("C1 integer factor on integer einsum", t(3, "n", dtype=torch.int64), t("n", 5, dtype=torch.int64))
def _(x, y):
    return 2 * einsum("ij,jk->ik", x, y)


@program("C2 complex factor", t(3, "n"), t("n", 5))
def _(x, y):
    return 2j * einsum("ij,jk->ik", x, y) * 3.0


@program("C3 ellipsis", t(2, 3, "n"), t("n", 5))
def _(x, y):
    return einsum("...j,jk->...k", x, y)


@program("C3 ellipsis in all operands", t(2, 3, "n"), t(3, "n", 5))
def _(x, y):
    return einsum("...ij,...jk->...ik", x[:, None], y), einsum("...j,...jk", x, y)


@program("C4 sublists", t(3, "n"), t("n", 5))
def _(x, y):
    return einsum(x, [0, 1], y, [1, 2], [0, 2])


@program("C4 sublists with implicit output and ellipsis", t(2, 3, "n"), t("n", 5))
def _(x, y):
    return einsum(x, [..., 7], y, [7, 4]), einsum(x, [..., 1], y, [1, 2], [2, ...])


@program("C5 spaces", t(3, "n"), t("n", 5))
def _(x, y):
    return einsum("ik, ij -> i", einsum("ij, jk -> ik", x, y), x)


@program("C6 arithmetic on sizes", t("n", 4))
def _(x):
    return x.reshape(x.shape[0] * 2 * 2, -1), x.reshape(-1, x.shape[0] * 2) * 2


@program("C7 division by zero", t(3, "n"))
def _(x):
    return (x / 0.0) * 2.0


@program("C8 tensordot with a number", t(3, "n"), t("n", 5))
def _(x, y):
    return torch.tensordot(x, y, 1), torch.tensordot(x, y, dims=1), torch.tensordot(x, y, dims=([1], [0]))


_C9_LETTERS = "cdefghijklmnopqrstuvwxyz"


@program("C9 more operands than letters", t(2, "n"), t("n", 2), t(1))
def _(a, b, c):
    return einsum("ab," + ",".join(_C9_LETTERS) + "->a", einsum("ax,xb->ab", a, b), *[c] * len(_C9_LETTERS))


@program("C10 control flow on shapes", t("n", 4), not_for_fx="Python control flow on a shape")
def _(x):
    return einsum("ij->i", x) if x.shape[0] > 3 else x * 2


@program("C10 iterating over a list argument", [t("n", 4), t("n", 4), t("n", 4)], not_for_fx="iterates over a Proxy")
def _(items):
    total = items[0]
    for item in items[1:]:
        total = einsum("ij,ij->ij", total, 2 * item)
    return total


# -- state, side effects, modes ---------------------------------------------------------------------------------------


@program("S1 batch norm", t("n", 4, 6), before=lambda i, m: m.train(i != 2), second=False, tolerance=1e-9)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return einsum("bci,ij->bcj", 2 * self.norm(x), self.w)


@program(
    "S2 dropout follows train and eval",
    t("n", 40),
    before=lambda i, m: m.train(i % 2 == 0),
    not_for_fx="self.training is read once, while tracing",
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(40, 5))

    def forward(self, x):
        h = einsum("bi,ij->bj", x, self.w)
        return F.dropout(h, 0.5, self.training) * 2


@program("S2 dropout module", t("n", 40), before=lambda i, m: m.train(i % 2 == 0))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.w = nn.Parameter(torch.randn(40, 5))

    def forward(self, x):
        return einsum("bi,ij->bj", self.drop(x), self.w)


@program("S3 no_grad inside", t("n", 4), t(4, 4), not_for_fx="context managers are not recorded")
def _(x, y):
    with torch.no_grad():
        w = einsum("ij,jk->ik", y, y)
    return einsum("ij,jk->ik", x, w)


@program("S3 enable_grad inside no_grad", t("n", 4), t(4, 4), not_for_fx="context managers are not recorded")
def _(x, y):
    with torch.no_grad():
        a = einsum("ij,jk->ik", x, y)
        with torch.enable_grad():
            b = einsum("ij,jk->ik", 2 * x, y)
    return a, b


@program("S3 no_grad as a decorator", t("n", 4), t(4, 4), not_for_fx="context managers are not recorded")
@torch.no_grad()
def _(x, y):
    return einsum("ij,jk->ik", 2 * x, y)


@program("S4 checkpoint", t("n", 4), t(4, 4), may_fall_back=True, second=False, not_for_fx="checkpoint is inlined")
def _(x, y):
    return checkpoint(lambda z: torch.tanh(einsum("ij,jk->ik", z, y)), x, use_reentrant=False) * 2


@program("S5 random tensor in forward", t("n", 4), not_for_fx="torch.rand runs once, while tracing")
def _(x):
    return einsum("ij,jk->ik", x, torch.rand(4, 4, dtype=x.dtype)), torch.randn_like(x) * 2


@program(
    "S6 attribute counted in forward",
    t("n", 4),
    may_fall_back=True,
    not_for_fx="Python side effects run once, while tracing",
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return einsum("ij,ij->i", x, x), self.n


def _replace_weight(i: int, module: Any) -> None:
    if i == 1:
        module.w = nn.Parameter(torch.full((4, 5), 0.25, dtype=torch.float64))
    if i == 2:
        module.w.data = torch.full((4, 5), 0.75, dtype=torch.float64)
    if i == 3:
        module.load_state_dict({"w": torch.full((4, 5), 1.75, dtype=torch.float64)}, assign=True)


@program("S7 parameter replaced", t("n", 4), before=_replace_weight, not_for_fx="the graph holds the old parameter")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return einsum("ij,jk->ik", x, 2 * self.w)


def _add_hooks(i: int, module: Any) -> None:
    if i == 0:
        module.register_forward_hook(lambda m, a, out: out * 2)
        module.inner.register_forward_pre_hook(lambda m, a: (a[0] + 1,))


@program(
    "S8 hooks on the child and inside",
    t("n", 4),
    before=_add_hooks,
    may_fall_back=False,
    not_for_fx="hooks of the root are not recorded",
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return einsum("ij,jk->ik", self.inner(x), self.w)


class _Square(nn.Module):
    def forward(self, x):
        return einsum("ij,ij->i", x, x)


@program(
    "S9 compiled submodule", t("n", 4), may_fall_back=True, second=False, not_for_fx="a compiled module can't be traced"
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.compile(_Square(), backend="eager", dynamic=False)

    def forward(self, x):
        return self.inner(x) * 2


@program("S10 keyword-only tensor argument", t("n", 4), kwargs={"y": t(4, 5)})
def _(x, *, y):
    return einsum("ij,jk->ik", x, y)


@program("S10 default None", t("n", 4), kwargs={"scale": 2}, not_for_fx="the traced branch is fixed")
def _(x, y=None, scale=1):
    return einsum("ij,ij->i", x, x if y is None else y) * scale


@program("S11 both operands are one value", t("n", 4), t(4, 5))
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    return einsum("ik,ik->i", z, z)


@program(
    "S13 long chain of matrix products", t("n", 3), [t(3, 3)] * 11, second=False, not_for_fx="iterates over a Proxy"
)
def _(x, matrices):
    for matrix in matrices:
        x = einsum("ij,jk->ik", x, matrix)
    return x


@program("S15 mixed dtypes raise", t("n", 4), t(4, 5, dtype=torch.float32))
def _(x, y):
    return einsum("ij,jk->ik", x, y)


@program("a wrong equation raises", t("n", 4), t(4, 5), not_for_fx="tracing does not run it")
def _(x, y):
    return einsum("ij,ik->jk", x, y[: x.shape[0] + 1])


# -- parity: what works with plain fx tracing must go on working ------------------------------------------------------


@program("implicit output", t("n", 4), t(4, 5))
def _(x, y):
    return einsum("ij,jk", x, y), einsum("bA,Ac", x, y), einsum("ij", x), einsum("ji", x)


@program("traces and diagonals", t(4, 4), t(4, "n"))
def _(x, y):
    return (
        einsum("ii", x),
        einsum("ii->i", x),
        einsum("ii,ij->j", 2 * x, y),
        einsum("ij,jk->ik", einsum("ii->i", x)[None], y),
    )


@program("fused diagonal", t(4, "n"), t("n", 4))
def _(x, y):
    return einsum("ii->i", einsum("ij,jk->ik", x, y)), einsum("ii", einsum("ij,jk->ik", x, y))


@program("size one broadcasts", t("n", 4), t(1, 5), t(1, 1))
def _(x, y, z):
    return (
        einsum("ij,jk->ik", x, y),
        einsum("ij,ij->ij", x, z),
        einsum("ij,ij->", z, x),
        einsum("ij,ik,jk->ijk", x, z, y),
    )


@program("an output used twice and returned", t("n", 4), t(4, 5))
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    return z, einsum("ik,ij->i", z, x), z.sum()


@program("operands in a list", t("n", 4), t(4, 5))
def _(x, y):
    return einsum("ij,jk->ik", [x, y])


@program("upper-case letters", t("n", 4), t(4, 5))
def _(x, y):
    return einsum("Ij,jK->KI", x, y)


@program(
    "dtype change between einsums",
    t("n", 4, dtype=torch.float32),
    t(4, 5, dtype=torch.float32),
    second=False,
    tolerance=2e-4,
)
def _(x, y):
    z = einsum("ij,jk->ik", x, y).double()
    return einsum("ik,ij->kj", z, x.double())


@program("detach between einsums", t("n", 4), t(4, 5))
def _(x, y):
    z = einsum("ij,jk->ik", x, y).detach()
    return einsum("ik,ij->kj", z, x)


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4))
        self.b = self.a
        self.register_buffer("c", torch.randn(4, 4))


@program("tied parameters and buffers", t("n", 4))
class _(_Shared):
    def forward(self, x):
        return einsum("ij,jk,kl,lm->im", x, self.a, self.b, self.c)


@program("nested containers in and out", {"a": t("n", 4), "b": [t(4, 5), (t(5, 2),)]})
def _(batch):
    z = einsum("ij,jk,kl->il", batch["a"], batch["b"][0], batch["b"][1][0])
    return {"z": z, "more": [z * 2, (batch["a"], None, 3)]}


class _Doubled(nn.Module):
    def forward(self, w):
        return 2 * w.tril()


def _update_original(i: int, module: Any) -> None:
    with torch.no_grad():
        module.parametrizations.w.original.add_(i)


@program(
    "parametrization", t("n", 4), before=_update_original, not_for_fx="the graph is compared on the wrapped module only"
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        nn.utils.parametrize.register_parametrization(self, "w", _Doubled())

    def forward(self, x):
        return einsum("ij,jk->ik", x, self.w)


@program("complex operands", t("n", 4, dtype=torch.complex128), t(4, 5, dtype=torch.complex128))
def _(x, y):
    return einsum("ij,jk->ik", 2j * x, y.conj()) / 3


@program("lazy conjugation comes back lazy or resolved alike", t("n", 4, dtype=torch.complex128))
def _(x):
    return x.conj(), einsum("ij->ji", x.conj()), einsum("ij,ij->i", x.conj(), x), x.mH, x.conj() * 2


@program("batched triple product", t("n", 8, 4), t("n", 4, 5), t("n", 5))
def _(a, b, v):
    return einsum("zij,zjk,zk->zi", a, b, v)


@program("three chained einsums with scalars", t("n", 6), t(6, 6), t(6, 6), t(6, 2))
def _(x, a, b, c):
    h = 2.0 * einsum("ij,jk->ik", x, a)
    h = einsum("ij,jk->ik", h, b) / 3
    return 0.5 * einsum("ij,jk->ik", h, c)


# -- other linear algebra ---------------------------------------------------------------------------------------------


@program("matrix products by operator and function", t("n", 4), t(4, 5), t(5))
def _(x, y, v):
    return (x @ y) @ v, torch.mm(x, y), torch.mv(y, v), x.matmul(y), torch.matmul(v, v), torch.dot(v, v * 2)


@program("thin right-hand side", t(6, 6), t(6, 6), t(6, "n"))
def _(a, b, x):
    return (a @ b @ a) @ x


@program("batched matmul with broadcasting", t(2, 1, "n", 4), t(3, 4, 5), t(4))
def _(x, y, v):
    return x @ y, torch.matmul(y.mT, v), v @ y, torch.bmm(y, y.mT)


@program("linear, bilinear and friends", t("n", 4), t("n", 5), t(6, 4), t(6), t(6, 4, 5))
def _(x, y, w, b, q):
    return F.linear(x, w, b), F.linear(x, w), F.bilinear(x, y, q, b), torch.outer(b, b), torch.inner(x, x[:1])


@program("multi_dot and chain_matmul", t(2, "n"), t("n", 4), t(4, 5))
def _(x, y, z):
    return torch.linalg.multi_dot([x, y, z]), torch.linalg.multi_dot([x, y, 2 * z]) / 2


@program("sums, traces, kron", t("n", 4), t(4, 4))
def _(x, y):
    return (x @ y).sum(1), (x @ y).sum(), torch.trace(y @ y), torch.kron(x, y), x.sum((0, 1), keepdim=True)


# -- views and aliasing -----------------------------------------------------------------------------------------------


@program("einsum that is a view", t("n", 4, 5))
def _(x):
    return einsum("abc->cab", x), einsum("abc->abc", x), einsum("aab->ab", x[:, : x.shape[0], :][: x.shape[1]][:1, :1])


@program("write through a view that einsum returned", t("n", 4), copies=True)
def _(x):
    view = einsum("ij->ji", x)
    view.mul_(2)
    return x.sum(), view


@program("view methods after an einsum", t("n", 4), t(4, 6))
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    return z.view(-1), z.view(z.shape[0], 2, 3), z.t(), z.reshape(-1, 2)[0], z[..., 1:]


@program("sum over a size-one dimension is fresh", t("n", 1), t(1, "n"))
def _(x, y):
    return einsum("ij->i", x), x.sum(1), x.squeeze(1), einsum("ij->j", y), y[0]


@program("expanded and strided operands", t(4), t("n", 8))
def _(v, x):
    return einsum("ij,ij->i", v.expand(x.shape[0], 4), x[:, ::2]), v.expand(x.shape[0], 4)


@program("identity returns the argument", t("n", 4))
def _(x):
    return x, x.view_as(x), x.contiguous(), x.to(torch.float64), x.clone(), +x


@program("returns the same value twice", t("n", 4), t(4, 5))
def _(x, y):
    z = 2 * (x @ y)
    return z, z, z[0]


@program("in-place on an intermediate", t("n", 4), t(4, 5), not_for_fx="a Proxy takes no item assignment")
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    z.mul_(2)
    z += 1
    z[0] = 3
    return einsum("ik->ki", z) * 2


@program("in-place through a view of an intermediate", t("n", 4), t(4, 5))
def _(x, y):
    z = einsum("ij,jk->ik", x, y)
    z[:, 0].mul_(5)
    return einsum("ik,ij->kj", z, x)


@program("overlapping arguments are no problem without writes", t("n", 4))
def _(x):
    return einsum("ij,kj->ik", x, x[:1]), x


@program("write into a scaled copy leaves the original", t("n", 4), t(4, 5))
def _(x, y):
    z = 2 * x
    w = einsum("ij,jk->ik", z, y)
    z.zero_()
    return w, z


@program("factors that cancel in two regions without gradients", t("n", 4), not_for_fx="plain fx sees no grad modes")
def _(x):
    with torch.no_grad():
        quarter = x / 4
        same = 4 * quarter
    total = einsum("ad->d", same)
    with torch.no_grad():
        quarter = total / 4
        again = 4 * quarter
    return x + again


# Torch is wrong about the strides of these results on tensors without data: they are contiguous, so that the reshape is
# a view.


@program("write through a reshaped result of batch_norm", t(3, "n", 2, grad=False), t("n", 5))
def _(x, y):
    z = F.batch_norm(x.transpose(1, 2), None, None, training=True)
    scaled = z * 2
    z.reshape(-1).add_(1)
    return einsum("ijk,kl->ijl", scaled, y)


@program("write through a reshaped quotient of integers", t("n", 4), t(4, "n"), t("n", 5), second=False)
def _(x, y, w):
    z = torch.floor_divide(9 * y.detach(), x.t())
    scaled = z * 2
    z.reshape(-1).add_(1)
    return einsum("ij,jk->ik", scaled, w)


# -- modules as people write them -------------------------------------------------------------------------------------


@program("multi-layer perceptron", t("n", 6))
class _(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


@program("low-rank adapter", t("n", 6))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))
        self.a = nn.Parameter(torch.randn(2, 6))
        self.b = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        delta = einsum("or,ri->oi", self.b, self.a) * (16 / 2)
        return F.linear(x, self.w + delta)


# -- linear algebra in sizes for which another order of products pays --------------------------------------------------


@program("chain of matrices", t("n", 90), t(90, 90), t(90, 90), t(90, "n"), second=False)
def _(x, a, b, y):
    return 0.01 * (a @ b @ y), x @ (a @ b).T * 0.01


@program("matrices times a vector", t(90, 90), t(90, 90), t(90), second=False)
def _(a, b, x):
    return (a @ b) @ x / 90


@program("low-rank update of a weight", t("n", 300))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(300, 320)
        self.a = nn.Parameter(torch.randn(2, 300))
        self.b = nn.Parameter(torch.randn(320, 2))

    def forward(self, x):
        return F.linear(x, self.linear.weight + 0.5 * self.b @ self.a, self.linear.bias)


@program("frozen weight with a low-rank update", t("n", 300))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(320, 300), requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, 300))
        self.b = nn.Parameter(torch.randn(320, 2))

    def forward(self, x):
        return x @ (self.w + self.b @ self.a).T


@program("attention with factorized weights", t("n", 6, 160))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, 160, 4) / 12)
        self.up = nn.Parameter(torch.randn(3, 4, 160) / 2)

    def forward(self, x):
        q, k, v = (x @ (self.down[i] @ self.up[i]) for i in range(3))
        return torch.softmax(q @ k.mT / 9, dim=-1) @ v


@program("attention without a softmax", t("n", 200, 4), t("n", 200, 4), t("n", 200, 4), second=False)
def _(q, k, v):
    return q @ k.transpose(-1, -2) @ v


@program("bilinear layer of a product", t("n", 120), t("n", 50))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(120, 120))
        self.v = nn.Parameter(torch.randn(120, 120))
        self.bilinear = nn.Bilinear(120, 50, 3)

    def forward(self, x, y):
        return self.bilinear(x @ (self.w @ self.v) / 120, y)


@program("stack of linear layers", t("n", 100))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(100, 120, bias=False), nn.Linear(120, 110, bias=False), nn.Linear(110, 3, bias=True)
        )

    def forward(self, x):
        return self.layers(x.repeat(300, 1))


@program("attention by einsum", t("n", 7, 8))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, 8, 2, 4))

    def forward(self, x):
        q, k, v = einsum("btd,sdhe->sbhte", x, self.qkv).unbind(0)
        weights = torch.softmax(einsum("bhte,bhse->bhts", q, k) / q.shape[-1] ** 0.5, dim=-1)
        return einsum("bhts,bhse->bthe", weights, v).flatten(2)


@program("equivariant tensor product", t("n", 3, 3), t("n", 5), t("n", 3, 3), second=False)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w3j", torch.randn(3, 5, 7))

    def forward(self, x1, x2, w):
        outer = einsum("zui,zj->zuij", x1, x2)
        return einsum("zuv,ijk,zuij->zvk", w, self.w3j, outer) * (0.5 / 3**0.5)


@program("symmetric contraction", t("n", 4, 3), t("n", 5), second=False)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("u", torch.randn(3, 3, 3, 2))
        self.w = nn.Parameter(torch.randn(5, 2, 4))

    def forward(self, x, y):
        out = einsum("wxik,ekc,bci,be->bcwx", self.u, self.w, x, y)
        out = einsum("bcwx,bcx->bcw", out, x)
        return einsum("bcw,bcw->bc", out, x)


@program("buffer updated in place", t("n", 4), second=False, not_for_fx="runs once, while tracing")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return einsum("ij,j->i", x, self.mean)


@program("recurrent cell", t("n", 4), t("n", 4), second=False)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x, h):
        return self.cell(2 * x, h)


@program("module list and parameter list", t("n", 4), second=False)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(3)])

    def forward(self, x):
        for layer, weight in zip(self.layers, self.weights):
            x = einsum("ij,jk->ik", layer(x), weight)
        return x


@program("weight norm", t("n", 4), second=False, not_for_fx="the graph is compared on the wrapped module only")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.inner(x) * 2


@program("frozen parameter", t("n", 4))
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.b = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return einsum("ij,jk,kl->il", x, self.a, self.b), einsum("ij,jk->ik", self.a, self.a)


@program("argument without gradient", t("n", 4, grad=False), t(4, 5))
def _(x, y):
    return einsum("ij,jk->ik", x, y), einsum("ij,ij->i", x, x)


@program("bfloat16", t("n", 32, dtype=torch.bfloat16), t(32, 8, dtype=torch.bfloat16), second=False)
def _(x, y):
    return einsum("ij,jk->ik", x / 4, y) * 2


@program("empty dimensions", t("n", 0), t(0, 5))
def _(x, y):
    return einsum("ij,jk->ik", 2 * x, y), einsum("ij->i", x), einsum("ij,ij->j", x, x)


@program("bool operands raise or not, alike", t("n", 4, dtype=torch.int64))
def _(x):
    return einsum("ij,ij->i", x > 0, x > 1)


Point = namedtuple("Point", "x y")


@program("named tuples", Point(t("n", 4), t("n", 4)))
def _(p):
    return Point(einsum("ij,ij->i", p.x, p.y), 2 * p.x)


@program(
    "keyword and default numbers",
    t("n", 4),
    kwargs={"scale": 2.5, "flag": True, "name": "a"},
    not_for_fx="the traced branch is fixed",
)
def _(x, scale=1.0, flag=False, name="b"):
    z = einsum("ij,ij->i", x, x) * scale
    return z + 1 if flag and name == "a" else z


@program(
    "numbers of equal value and other type", t("n", 4, dtype=torch.int64), kwargs={"k": 1}, not_for_fx="number is baked"
)
def _(x, k):
    return x * k


# -- what must never be baked in: falling back with one warning is fine, a wrong answer is not ------------------------


@program("item", t("n", 4), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    return einsum("ij,ij->i", x, x) * x.sum().item()


@program("branch on data", t("n", 4), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    return einsum("ij,ij->i", x, x) if x.sum() > x.shape[0] * 6 else x.sum(1)


@program("to a list and back", t("n", 4), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    return einsum("ij->j", x) * len([v for v in x.detach().flatten().tolist() if v > 1.5])


@program("numpy inside", t("n", 4, grad=False), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    return torch.from_numpy(np.sin(x.numpy())) * 2


@program("Python's random numbers", t("n", 4), may_fall_back=True, not_for_fx="baked")
def _(x):
    return x * random.random()


@program("numpy's random numbers", t("n", 4), may_fall_back=True, not_for_fx="baked")
def _(x):
    return x * float(np.random.rand())


@program("reseeding inside", t("n", 4), may_fall_back=True, not_for_fx="not recorded")
def _(x):
    torch.manual_seed(5)
    return x * torch.rand(4, dtype=x.dtype)


@program("dropout consumes the stream as eager", t("n", 40), not_for_fx="training flag is fixed")
def _(x):
    return F.dropout(x, 0.3) * 2, torch.bernoulli(torch.full((3,), 0.5, dtype=x.dtype))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 100 * x


@program("custom backward", t("n", 4), may_fall_back=True, second=False, not_for_fx="not recorded")
def _(x):
    return einsum("ij,ij->i", _Cube.apply(x), x)


@program("vmap inside", t("n", 4), t(4, 5), may_fall_back=True, second=False, not_for_fx="not recorded")
def _(x, y):
    return torch.vmap(lambda row: einsum("j,jk->k", row, y))(x)


@program("gradient inside forward", t("n", 4), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    with torch.enable_grad():
        position = x.detach().requires_grad_()
        energy = einsum("ij,ij->", position, position)
        (force,) = torch.autograd.grad(energy, position, create_graph=True)
    return force + x


@program("hook on a value", t("n", 4), may_fall_back=True, not_for_fx="not recorded")
def _(x):
    z = 2 * x
    if z.requires_grad:
        z.register_hook(lambda g: g * 10)
    return einsum("ij,ij->i", z, x)


@program("requires_grad set inside", t("n", 4, grad=False), may_fall_back=True, not_for_fx="not recorded")
def _(x):
    z = 2 * x
    z.requires_grad = True
    return einsum("ij,ij->i", z, x)


@program(
    "result written to out",
    t("n", 4),
    t(4, 5, grad=False),
    may_fall_back=True,
    second=False,
    not_for_fx="torch.empty takes no Proxy",
)
def _(x, y):
    out = torch.empty(x.shape[0], 5, dtype=x.dtype)
    torch.mm(x.detach(), y, out=out)
    return out * 2


@program("state kept between calls", t("n", 4), may_fall_back=True, not_for_fx="side effect")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = x if self.last is None else x * self.last.sum()
        self.last = (2 * x).detach()
        return y


@program("list that grows", t("n", 4), may_fall_back=True, not_for_fx="side effect")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[0])
        return x * len(self.seen)


class _Config:
    def __init__(self):
        self.factor = 2.0


def _change_config(i: int, module: Any) -> None:
    module.config.factor = 2.0 + i


@program("attribute of a plain object", t("n", 4), before=_change_config, may_fall_back=True, not_for_fx="baked")
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = _Config()

    def forward(self, x):
        return einsum("ij,ij->i", x, x) * self.config.factor


def _change_scale(i: int, module: Any) -> None:
    module.scale = 2.0 + i


@program("plain attribute that changes", t("n", 4), before=_change_scale, not_for_fx="baked")
class _(nn.Module):
    scale = 1.0

    def forward(self, x):
        return einsum("ij,ij->i", x, x) * self.scale


def _change_tensor(i: int, module: Any) -> None:
    module.table = torch.full((4,), 1.0 + i, dtype=torch.float64)


@program(
    "plain tensor attribute that is replaced", t("n", 4), before=_change_tensor, may_fall_back=True, not_for_fx="baked"
)
class _(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.zeros(4, dtype=torch.float64)

    def forward(self, x):
        return einsum("ij,j->i", x, self.table)


_GLOBAL = {"factor": 2.0, "table": torch.ones(4, dtype=torch.float64)}


def _change_global(i: int, module: Any) -> None:
    _GLOBAL["factor"] = 3.0 + i
    _GLOBAL["table"] = torch.full((4,), 1.0 + i, dtype=torch.float64)


@program("global number", t("n", 4), before=_change_global, may_fall_back=True, not_for_fx="baked")
def _(x):
    return einsum("ij,ij->i", x, x) * _GLOBAL["factor"]


@program("global tensor", t("n", 4), before=_change_global, may_fall_back=True, not_for_fx="baked")
def _(x):
    return einsum("ij,j->i", x, _GLOBAL["table"])


@dataclass
class _Result:
    total: Any
    scaled: Any


@program("result in an unknown class", t("n", 4), may_fall_back=True, second=False)
def _(x):
    result = _Result(einsum("ij,ij->i", x, x), 2 * x)
    return result.total, result.scaled


@program("deterministic function of strides", t("n", 4), may_fall_back=True, not_for_fx="baked")
def _(x):
    return x * x.stride(0) + x.is_contiguous() * 1


@program("exception caught inside", t("n", 4), may_fall_back=True, not_for_fx="data-dependent")
def _(x):
    try:
        return einsum("ij,jk->ik", x, x)
    except RuntimeError:
        return einsum("ij,kj->ik", x, x)


def by_name(name: str) -> Program:
    """The row with a name."""
    (row,) = [row for row in PROGRAMS if row.name == name]
    return row


def on(row: Program, device: str) -> Program:
    """A row with its module and its arguments on a device."""
    if device == "cpu":
        return row

    def moved(child: Any) -> Any:
        return child.to(device) if isinstance(child, nn.Module) else child

    def arguments(n: int, generator: torch.Generator) -> Call:
        call = row.arguments(n, generator)
        return Call(*clone_tree((call.args, call.kwargs), device))

    def before(number: int, child: Any) -> None:
        if row.before is not None:
            row.before(number, child)
        moved(child)

    return replace(row, make=lambda: moved(row.make()), arguments=arguments, before=before)


def names(rows: Sequence[Program] = ()) -> list[str]:
    """Names for the ids of parametrized tests."""
    return [row.name for row in rows or PROGRAMS]
