"""The one table of calls that are einsums under another name, in all ranks that torch takes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A call, and the shapes of its tensors."""

    name: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    #: Does it take complex numbers, and conjugate none?
    complex: bool = True

    def __str__(self) -> str:
        return f"{self.name} {' '.join('x'.join(map(str, shape)) or 'scalar' for shape in self.shapes)}"


#: Pairs of shapes that matmul takes: vectors, matrices, batches that broadcast, sizes of 1 and 0.
MATMUL = (
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((2, 3), (3, 4)),
    ((3,), (5, 3, 4)),
    ((5, 2, 3), (3,)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((1, 2, 3), (5, 3, 4)),
    ((5, 2, 3), (1, 3, 4)),
    ((6, 1, 2, 3), (5, 3, 4)),
    ((6, 5, 2, 3), (3,)),
    ((3,), (6, 5, 3, 4)),
    ((2, 3), (6, 5, 3, 4)),
    ((6, 1, 2, 3), (1, 5, 3, 4)),
    ((1, 3), (3, 1)),
    ((2, 1), (1, 4)),
    ((2, 0), (0, 4)),
    ((0, 3), (3, 4)),
    ((5, 2, 3), (5, 3, 1)),
)
CASES: list[Case] = []


def _add(name: str, call: Callable[..., Any], *shapes: tuple[tuple[int, ...], ...], **options: Any) -> None:
    CASES.extend(Case(name, call, group, **options) for group in shapes)


_add("@", operator.matmul, *MATMUL)
_add("torch.matmul", torch.matmul, *MATMUL[:4])
_add("Tensor.matmul", Tensor.matmul, *MATMUL[:4])
_add("Tensor.__matmul__", lambda x, y: x.__matmul__(y), MATMUL[3])
_add("Tensor.__rmatmul__", lambda x, y: y.__rmatmul__(x), MATMUL[3])
_add("linalg.matmul", torch.linalg.matmul, MATMUL[1], MATMUL[6])
_add("matmul by name", lambda x, y: torch.matmul(input=x, other=y), MATMUL[3])
_add("mm", torch.mm, MATMUL[3])
_add("Tensor.mm", Tensor.mm, MATMUL[3])
_add("mm by name", lambda x, y: torch.mm(x, mat2=y), MATMUL[3])
_add("bmm", torch.bmm, MATMUL[8], MATMUL[20])
_add("Tensor.bmm", Tensor.bmm, MATMUL[8])
_add("mv", torch.mv, MATMUL[2])
_add("Tensor.mv", Tensor.mv, MATMUL[2])
_add("dot", torch.dot, MATMUL[0])
_add("Tensor.dot", Tensor.dot, MATMUL[0])
_add("vdot", torch.vdot, MATMUL[0], complex=False)
_add("outer", torch.outer, ((3,), (4,)), ((1,), (4,)))
_add("Tensor.outer", Tensor.outer, ((3,), (4,)))
_add("ger", torch.ger, ((3,), (4,)))
_INNER = ((3,), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 3), (4, 3)), ((5, 2, 3), (4, 3)), ((2, 1, 3), (4, 5, 3))
_add("inner", torch.inner, *_INNER)
_add("Tensor.inner", Tensor.inner, _INNER[3])
_VECDOT = ((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((5, 1, 3), (4, 3)), ((4, 3), (5, 1, 3)), ((4, 1), (3,))
_add("linalg.vecdot", torch.linalg.vecdot, *_VECDOT, complex=False)
_LINEAR = ((3,), (4, 3)), ((2, 3), (4, 3)), ((5, 2, 3), (4, 3)), ((6, 5, 2, 3), (4, 3)), ((3,), (3,)), ((5, 2, 3), (3,))
_add("linear", F.linear, *_LINEAR)
_add("linear with bias", F.linear, *((x, w, w[:1]) for x, w in _LINEAR[:4]))
_add("linear with a wide bias", F.linear, ((2, 3), (4, 3), (2, 4)), ((2, 3), (4, 3), (1,)))
_add("linear by name", lambda x, w, b: F.linear(x, bias=b, weight=w), ((2, 3), (4, 3), (4,)))
_BILINEAR = ((2, 3), (2, 4), (5, 3, 4)), ((3,), (4,), (5, 3, 4)), ((6, 2, 3), (6, 2, 4), (5, 3, 4))
_add("bilinear", F.bilinear, *_BILINEAR, complex=False)
_add("bilinear with bias", F.bilinear, *((*shapes, (5,)) for shapes in _BILINEAR), complex=False)
_CHAIN = (
    ((2, 3), (3, 4), (4, 5)),
    ((3,), (3, 4), (4, 5)),
    ((2, 3), (3, 4), (4,)),
    ((3,), (3, 4), (4,)),
    ((2, 3), (3, 4)),
)
_add("multi_dot", lambda *tensors: torch.linalg.multi_dot(tensors), *_CHAIN)
_add("multi_dot by name", lambda *tensors: torch.linalg.multi_dot(tensors=list(tensors)), _CHAIN[0])
_add("chain_matmul", torch.chain_matmul, _CHAIN[0], _CHAIN[4])
_ADDED = ((4,), (2, 3), (3, 4)), ((2, 4), (2, 3), (3, 4)), ((), (2, 3), (3, 4)), ((2, 1), (2, 3), (3, 4))
_add("addmm", torch.addmm, *_ADDED)
_add("Tensor.addmm", Tensor.addmm, _ADDED[0])
_add("addmm with its scalars", lambda b, x, y: torch.addmm(b, x, y, beta=1, alpha=1.0), _ADDED[0])
_add("baddbmm", torch.baddbmm, ((5, 2, 4), (5, 2, 3), (5, 3, 4)), ((4,), (5, 2, 3), (5, 3, 4)))
_add("addmv", torch.addmv, ((2,), (2, 3), (3,)), ((), (2, 3), (3,)))

_PAIRS = ((3,), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 3), (2, 3)), ((5, 1, 3), (2, 3)), ((2, 1), (1, 3))
_PAIRS += ((2, 3), ()), ((), ()), ((1, 3), (2, 3)), ((0, 3), (3,)), ((1, 1), (1, 1))
_add("*", operator.mul, *_PAIRS)
_add("torch.mul", torch.mul, *_PAIRS[:3])
_add("Tensor.mul", Tensor.mul, _PAIRS[1])
_add("multiply", torch.multiply, _PAIRS[1])
_add("mul by name", lambda x, y: torch.mul(x, other=y), _PAIRS[1])
_WHOLE = ((2, 3),), ((5, 2, 3),), ((1, 3),), ((2, 0),), ((3,),)
_add("sum", lambda x: x.sum(), *_WHOLE)
_add("torch.sum", torch.sum, _WHOLE[0])
_add("sum over one", lambda x: x.sum(0), *_WHOLE)
_add("sum over the last", lambda x: x.sum(dim=-1), *_WHOLE)
_add("torch.sum over two", lambda x: torch.sum(x, (0, -1)), *_WHOLE[:4])
_add("sum over a list", lambda x: x.sum([-2], keepdim=False), *_WHOLE[:4])
_SQUARE = ((3, 3),), ((1, 1),), ((0, 0),)
_add("trace", torch.trace, *_SQUARE)
_add("Tensor.trace", Tensor.trace, _SQUARE[0])
_add("diagonal", torch.diagonal, *_SQUARE, ((3, 3, 2),))
_add("Tensor.diagonal", lambda x: x.diagonal(dim1=-2, dim2=-1), _SQUARE[0], ((2, 3, 3),), ((5, 2, 1, 1),))
_add("diagonal of others", lambda x: x.diagonal(0, 2, 0), ((3, 2, 3),))

#: Calls that look like those, and are left alone.
OTHERS: list[Case] = []


def _other(name: str, call: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
    OTHERS.append(Case(name, call, shapes))


_other("addmm with alpha", lambda b, x, y: torch.addmm(b, x, y, alpha=2), *_ADDED[0])
_other("addmm with beta", lambda b, x, y: torch.addmm(b, x, y, beta=0), *_ADDED[0])
_other("baddbmm with beta", lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5), (4,), (5, 2, 3), (5, 3, 4))
_other("vecdot along another dimension", lambda x, y: torch.linalg.vecdot(x, y, dim=0), (2, 3), (2, 3))
_other("inner of a scalar", torch.inner, (), (2, 3))
_other("conjugated", lambda x, y: x @ y.conj(), (2, 3), (3, 4))
_other("adjoint", lambda x, y: x @ y.mH, (2, 3), (4, 3))
_other("matmul into memory", lambda x, y: torch.matmul(x, y, out=torch.zeros(2, 4, dtype=x.dtype)), (2, 3), (3, 4))
_other("sum that keeps its dimension", lambda x: x.sum(0, keepdim=True), (2, 3))
_other("sum in another type", lambda x: x.sum(0, dtype=torch.complex64), (2, 3))
_other("diagonal beside the first", lambda x: x.diagonal(1), (3, 3))
_other("diagonal of a long matrix", lambda x: x.diagonal(), (3, 4))
_other("trace of a long matrix", torch.trace, (3, 4))
_other("times a number", lambda x: x * 2, (2, 3))

#: Ways to add dimensions before a product.
NEW_DIMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x[:, None] * y": lambda x, y: x[:, None] * y,
    "x[None] * y[:, None]": lambda x, y: x[None] * y[:, None],
    "x[..., None] * y[:, None, :]": lambda x, y: x[..., None] * y[:, None, :],
    "x[None, ..., None] * y[:, None, None, :]": lambda x, y: x[None, ..., None] * y[:, None, None, :],
    "x.unsqueeze(-1) * y": lambda x, y: x.unsqueeze(-1) * y,
    "x.unsqueeze(2).unsqueeze(0) * y[:, None, None]": lambda x, y: x.unsqueeze(2).unsqueeze(0) * y[:, None, None],
    "torch.unsqueeze(x, 2) * y": lambda x, y: torch.unsqueeze(x, 2) * y,
    "(x * y)[:, None] * y": lambda x, y: (x * y)[:, None] * y,
}

#: Permutations of three dimensions, or two.
PERMUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "permute": lambda x: x.permute(2, 0, 1),
    "permute to a tuple": lambda x: x.permute((0, -1, 1)),
    "torch.permute": lambda x: torch.permute(x, (1, 2, 0)),
    "transpose": lambda x: x.transpose(-1, 0),
    "torch.transpose": lambda x: torch.transpose(x, 1, 2),
    "swapaxes": lambda x: torch.swapaxes(x, 0, 1),
    "swapdims": lambda x: x.swapdims(-2, 0),
    "movedim": lambda x: x.movedim(0, -1),
    "movedim of several": lambda x: torch.movedim(x, (0, 1), (2, 0)),
    "moveaxis": lambda x: torch.moveaxis(x, 2, 0),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0].T,
    "t": lambda x: x[0].t(),
    "torch.t": lambda x: torch.t(x[0]),
    "t of a vector": lambda x: x[0, 0].t(),
    "T of a vector": lambda x: x[0, 0].T,
}
