"""``einsum``: as ``torch.einsum``, with any number of labels, planned and lowered once for each equation and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

from .choice import choose_order
from .errors import EquationError
from .fakes import EagerStrides
from .layout import Strides
from .plan import make_plan
from .program import compile_program
from .saved import SAVED_LIMIT, Written, WrittenNetwork
from .signature import TensorType
from .spec import EinsumSpec

_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32})
# Where nothing is known of a size, all are taken as equal.
_UNKNOWN_SIZE = 64
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_F = TypeVar("_F", bound=Callable[..., Any])

Sublist = tuple[int | EllipsisType, ...]
# Sublists of an equation given by integers: one for each operand, and that of the output or None.
_Sublists = tuple[tuple[Sublist, ...], Sublist | None]
# Of each operand what a compiled contraction depends on: shape, strides, whether autograd follows it.
_Key = tuple[tuple[torch.Size, tuple[int, ...], bool], ...]


def einsum(*args: Any) -> torch.Tensor:
    """Sum of products of tensors by Einstein's convention: the same calls and results as ``torch.einsum``.

    The contraction order and the calls are chosen once for each equation and shapes, strides and dtypes of operands,
    and kept (the last 1024 of them); for the backward pass it saves at most 1.1 times what ``torch.einsum`` does.
    Any number of labels can be used, with letters of any alphabet or integers.

    Args:
        *args: ``equation, *operands``, or ``equation, [operands]``, or
            ``operand, sublist, operand, sublist, ..., [output sublist]`` with integers from 0 up and ``Ellipsis``.

    Returns:
        The result: a view of the operand where ``torch.einsum`` gives one, contiguous where that is.

    Raises:
        EquationError: the equation is malformed or does not fit the operands.

    >>> einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 4)).shape
    torch.Size([2, 4])
    >>> einsum(torch.ones(2, 3), [0, 100], torch.ones(3), [100], [0])
    tensor([3., 3.])
    """
    equation, operands = _arguments(args)
    if has_torch_function(operands):
        handled: torch.Tensor = handle_torch_function(einsum, operands, *args)
        return handled
    if torch.compiler.is_compiling():
        return _compiling(equation, operands)
    if not _is_ordinary(operands):
        return _pairwise(equation, operands)
    grad = torch.is_grad_enabled()
    needs_grad = False
    dtype, place = operands[0].dtype, operands[0].get_device()
    parts = []
    for operand in operands:
        if operand.dtype is not dtype or operand.layout is not torch.strided or operand.get_device() != place:
            return _plain(equation, operands)
        follows = grad and operand.requires_grad
        needs_grad = needs_grad or follows
        parts.append((operand.shape, operand.stride(), follows))
    shared = _shared_memory(operands) if needs_grad and len(operands) > 2 else ()
    function = _prepare(equation, tuple(parts), dtype, shared, "cpu" if place < 0 else operands[0].device.type)
    if function is None:
        return _plain(equation, operands)
    result = function(*operands)
    # ``dot`` of two lazily conjugated vectors gives a lazily conjugated result, torch.einsum does not.
    return result.resolve_conj() if dtype.is_complex and len(operands) > 1 else result


def _arguments(args: tuple[Any, ...]) -> tuple[str | _Sublists, tuple[torch.Tensor, ...]]:
    """The equation, hashable, and the operands."""
    if len(args) < 2:
        raise EquationError(
            "einsum: expected an equation and at least one operand, or at least one operand and its sublist, "
            f"got {len(args)} arguments"
        )
    first = args[0]
    if isinstance(first, str):
        operands = args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        equation: str | _Sublists = first
    else:
        operands = args[: len(args) - len(args) % 2 : 2]
        output = tuple(args[-1]) if len(args) % 2 else None
        equation = tuple(tuple(items) for items in args[1::2]), output
    for number, operand in enumerate(operands):
        if not isinstance(operand, torch.Tensor) and not has_torch_function((operand,)):
            raise TypeError(f"einsum: operand {number} is a {type(operand).__name__}, expected a tensor")
    return equation, operands


def _is_ordinary(operands: Sequence[torch.Tensor]) -> bool:
    """Whether nothing but eager execution of plain tensors goes on. Otherwise sizes may be symbols and strides may not
    be those of the data, or the calls are recorded for other sizes, so nothing may depend on them.
    """
    for operand in operands:
        if type(operand) not in _PLAIN:
            return False
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _shared_memory(operands: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """For each operand the first one that lies in the same memory; nothing where each has its own."""
    storages = [operand.untyped_storage()._cdata for operand in operands]
    return () if len(set(storages)) == len(storages) else tuple(map(storages.index, storages))


def _parse(equation: str | _Sublists, ranks: Sequence[int]) -> EinsumSpec:
    if isinstance(equation, str):
        return EinsumSpec.parse(equation, ranks)
    return EinsumSpec.from_sublists(*equation, ranks)


@lru_cache(maxsize=1024)
def _prepare(
    equation: str | _Sublists, parts: _Key, dtype: torch.dtype, shared: tuple[int, ...], kind: str
) -> Callable[..., torch.Tensor] | None:
    """The compiled contraction on a kind of device, or ``None`` where torch's own way through the equation can be seen
    in the result.
    """
    shapes = [tuple(shape) for shape, _, _ in parts]
    spec = _parse(equation, [len(shape) for shape in shapes])
    spec.sizes(shapes)
    if dtype in _INTEGERS and len(parts) > 1 and spec.lone(shapes):
        # torch.einsum sums labels of one operand to int64 first, and whether it then fails depends on its order.
        return None
    device = torch.device(kind)
    types = [
        TensorType(shape, dtype, device, tuple(stride), follows)
        for shape, (_, stride, follows) in zip(shapes, parts, strict=True)
    ]
    memory = shared or tuple(range(len(parts)))
    text = equation if isinstance(equation, str) and equation.isascii() else str(spec.canonical())
    strides = Strides.contiguous(spec.output_shape(shapes)) if _eager_is_contiguous(text, spec, types) else None
    network = WrittenNetwork(Written.plain(spec), spec, tuple(types), memory)
    return compile_program(choose_order(network, SAVED_LIMIT, strides=strides).lower(network, strides))


def _eager_is_contiguous(text: str, spec: EinsumSpec, types: Sequence[TensorType]) -> bool:
    """Whether ``torch.einsum`` would give a contiguous result: asked of it with tensors without data."""
    if len(types) == 1 and spec.is_view_only:
        return False
    if spec.n_labels > 52:
        return True
    operands = [torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device="meta") for type_ in types]
    try:
        with EagerStrides():  # type: ignore[no-untyped-call]
            return torch.einsum(text, *operands).is_contiguous()
    except RuntimeError:
        # An intermediate of its order, which ours does not have, may be too large even to describe.
        return True


def _plain(equation: str | _Sublists, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.einsum`` itself, where its own order decides on the type of the result or on an error."""
    spec = _parse(equation, [operand.dim() for operand in operands])
    return torch.einsum(str(spec.canonical()), *operands) if spec.n_labels <= 52 else _pairwise(equation, operands)


def _compiling(equation: str | _Sublists, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Under Dynamo, which can trace ``torch.einsum`` but no planner: the steps come in as constants, and hold for all
    sizes.
    """
    ranks = tuple(operand.dim() for operand in operands)
    steps = _constant_steps(equation, ranks)
    if len(steps) == 1 or _fits_torch(equation, ranks):
        return torch.einsum(_constant_text(equation, ranks), *operands)
    values = list(operands)
    for places, text in steps:
        values.append(torch.einsum(text, *[values[place] for place in places]))
    return values[-1]


def _constant(function: _F) -> _F:
    """Let Dynamo call a function while it traces, and take the result as a constant.

    The public way, ``torch.compiler.assume_constant_result``, sets the same mark, but imports all of Dynamo: that takes
    longer than all the rest.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _constant_steps(equation: str | _Sublists, ranks: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], str], ...]:
    spec = _parse(equation, ranks)
    plan = make_plan(spec, [(_UNKNOWN_SIZE,) * rank for rank in ranks], generic=True)
    return tuple((step.operands, str(step.spec.canonical())) for step in plan.steps)


@_constant
def _constant_text(equation: str | _Sublists, ranks: tuple[int, ...]) -> str:
    return str(_parse(equation, ranks).canonical())


@_constant
def _fits_torch(equation: str | _Sublists, ranks: tuple[int, ...]) -> bool:
    return _parse(equation, ranks).n_labels <= 52


def _pairwise(equation: str | _Sublists, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Plain ``torch.einsum`` along a plan that holds for all sizes, made without looking at data."""
    spec = _parse(equation, [operand.dim() for operand in operands])
    if len(operands) <= 2:
        return torch.einsum(str(spec.canonical()), *operands)
    shapes = [tuple(_hint(size) for size in operand.shape) for operand in operands]
    plan = make_plan(spec, shapes, generic=True)
    values: list[torch.Tensor | None] = list(operands)
    for step in plan.steps:
        pair = [values[number] for number in step.operands]
        for number in step.operands:
            values[number] = None
        values.append(torch.einsum(str(step.spec.canonical()), *pair))
    result = values[-1]
    assert result is not None
    return result


def _hint(size: Any) -> int:
    """A size to plan with. Converting a symbolic size would make it a constant of the surrounding graph."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else _UNKNOWN_SIZE
