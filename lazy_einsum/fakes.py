"""Fake tensors: types without data, on which ``forward`` runs while it is traced."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import ambient as ambient_module
from .errors import UntraceableError
from .layout import elementwise_strides
from .signature import TensorType, contiguous_strides
from .where import is_users


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing the errors of a program that fails on fakes: it will fail, and say so, on its own."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def fake_mode(allow_non_fake_inputs: bool = False, shape_env: Any = None) -> Any:
    """A mode in which tensors have types but no data, and symbolic sizes where ``shape_env`` is given. (Meta tensors,
    the public alternative, lose the device; this one has lain in torch._subclasses since 1.13.)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs, shape_env=shape_env)
    # Its cache of results is keyed by sizes, which are new at each trace: without it a trace takes 0.7 of the time.
    mode.cache_enabled = False
    return mode


def python_kernels() -> AbstractContextManager[Any]:
    """A context in which torch takes its kernels that are written in Python, where there are such: some operations
    (``pad``) need that to keep sizes symbolic. (torch.export, the public way to it, captures a whole module.)
    """
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """What an operation raises on fake tensors where its result depends on data."""
    from torch._subclasses import fake_tensor

    return (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    )


def is_fake(value: torch.Tensor) -> bool:
    """Whether ``value`` has no data."""
    return isinstance(value, _fake_class())


def stands_in_export(value: torch.Tensor) -> bool:
    """Whether ``value`` has no data because ``torch.export`` put it in the place of a tensor of the user's."""
    return torch.compiler.is_exporting() and is_fake(value)


def make_fake(known: TensorType, number: Callable[[Any], Any] = lambda size: size) -> torch.Tensor:
    """A tensor of type ``known``; called inside of ``fake_mode()``. ``number`` gives what stands for a symbolic
    size.
    """
    if known.is_inference and not torch.is_inference_mode_enabled():
        raise UntraceableError("a tensor made in inference mode is used outside of it")
    with torch.inference_mode(known.is_inference), torch.enable_grad():
        shape, stride = tuple(map(number, known.shape)), tuple(map(number, known.stride))
        fake = torch.empty_strided(shape, stride, dtype=known.dtype, device=known.device)
        if known.is_conj:
            fake = fake.conj()
        if known.is_neg:
            fake = torch._neg_view(fake)
        if known.is_parameter and not known.is_leaf:
            # A value that requires grad was written to it.
            return nn.Parameter(fake, requires_grad=False).add_(torch.zeros_like(fake, requires_grad=True))
        if known.is_parameter:
            return nn.Parameter(fake, requires_grad=known.requires_grad)
        if not known.requires_grad:
            return fake
        fake.requires_grad_()
        if known.is_leaf:
            return fake
        result = fake.clone()
        if result.stride() != fake.stride():
            result = result.as_strided(shape, stride) if known.numel <= result.numel() else result
        return result


_asked = threading.local()


@contextmanager
def asked_through(
    read: Callable[[torch.Tensor, str], Any], write: Callable[[torch.Tensor, str], Exception]
) -> Iterator[None]:
    """In this thread, until the end of the context, answer user code that looks up attributes which a disguised fake
    does not have (``weight.is_special``) through ``read``, which may raise ``AttributeError``; and raise what ``write``
    gives where it sets one.
    """
    before = getattr(_asked, "answers", None)
    _asked.answers = read, write
    try:
        yield
    finally:
        _asked.answers = before


def disguise(fake: torch.Tensor) -> None:
    """Let ``fake`` say that it is a ``Tensor``, or ``Parameter``, by class; and be asked as ``asked_through`` says."""
    if type(fake) is _fake_class():
        fake.__class__ = _disguised_class()


@functools.cache
def _fake_class() -> type:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


@functools.cache
def _disguised_class() -> Any:
    fake_class: Any = _fake_class()

    class Disguised(fake_class):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            answers = getattr(_asked, "answers", None)
            if answers is not None and not name.startswith("__") and is_users(sys._getframe(1)):
                return answers[0](self, name)
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            answers = getattr(_asked, "answers", None)
            if answers is not None and not hasattr(fake_class, name) and is_users(sys._getframe(1)):
                raise answers[1](self, name)
            super().__setattr__(name, value)

        __class__ = property(lambda self: nn.Parameter if "_is_param" in self.__dict__ else torch.Tensor)

    return Disguised


class _Multilinear(torch.autograd.Function):
    """A fake result, connected to tensors in each of which it is linear; so are its gradients."""

    @staticmethod
    def forward(ctx: Any, known: TensorType, *operands: torch.Tensor) -> torch.Tensor:
        """``known`` has sizes as torch takes them."""
        ctx.save_for_backward(*operands)
        return make_fake(known)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of each operand is linear in the given one and in all other operands."""
        operands = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None]
        for number, operand in enumerate(operands):
            if not ctx.needs_input_grad[number + 1]:
                found.append(None)
                continue
            shape = tuple(operand.shape)
            known = TensorType(shape, operand.dtype, operand.device, contiguous_strides(shape))
            found.append(multilinear(known, (*gradients, *operands[:number], *operands[number + 1 :])))
        return tuple(found)


def multilinear(known: TensorType, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """A fake of type ``known`` that stands for a sum of products of ``operands``: what ``forward`` differentiates is
    connected as it is in eager mode. Called inside of ``fake_mode()``.
    """
    known = replace(known, requires_grad=False, is_leaf=True)
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if not (records and any(operand.requires_grad for operand in operands)):
        return make_fake(known)
    result: torch.Tensor = _Multilinear.apply(known, *operands)  # type: ignore[no-untyped-call]
    return result


def empty_meta(fake: torch.Tensor, number: Callable[[Any], Any] = lambda size: size) -> torch.Tensor:
    """A meta tensor of the same shape, strides and dtype: operations on it are ten times as fast as on fakes.
    ``number`` gives what stands for a symbolic size.
    """
    shape, stride = tuple(map(number, fake.shape)), tuple(map(number, fake.stride()))
    with ambient_module.no_modes():
        empty = torch.empty_strided(shape, stride, dtype=fake.dtype, device="meta")
        return empty.conj() if fake.is_conj() else empty


class EagerStrides(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives results of operations on tensors without data the strides that eager gives them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return with_eager_strides(func, args, kwargs or {}, func(*args, **(kwargs or {})))


def with_eager_strides(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """``result`` of the operation ``func`` on tensors without data, with the strides that eager gives it.

    Torch computes these results in Python, by rules of its own: they ignore the strides of dimensions of size 1 (which
    decide how later results lie), and for rarer functions of operands that lie in different orders they are wrong
    altogether. Elementwise kernels follow one rule, in ``layout``. Views of fakes are laid out as those of meta
    tensors, which torch computes in C++.
    """
    if not isinstance(result, torch.Tensor) or result.layout is not torch.strided:
        return result
    if _is_iterated(func):
        operands = tuple(_operands(func, args, kwargs))
        if not all(map(_is_exact, operands)):
            # Of symbolic sizes the rule would ask which is larger.
            return result
        stride = elementwise_strides(tuple(result.shape), operands)
        return result if stride == result.stride() else result.new_empty_strided(result.shape, stride)
    if not func.is_view or func is torch.ops.aten.as_strided.default or not is_fake(result):
        return result
    if _is_exact((result.shape, result.stride())) and 1 in result.shape:
        tensors = {id(arg): empty_meta(arg) for arg in args if isinstance(arg, torch.Tensor)}
        with ambient_module.no_modes():
            stride = func(*with_tensors(args, tensors), **kwargs).stride()
        if stride != result.stride():
            return torch.as_strided(result, result.shape, stride, result.storage_offset())
    return result


def require_grad_as_views(func: Any, args: Any, result: Any) -> None:
    """Let what the operation ``func`` gave in inference mode require grad where it is a view of what does.

    Torch leaves operations composed of others (``reshape``, ``mT``) whole on their way to fakes in inference mode, and
    what they give is not known as a view.
    """
    given = {tensor.untyped_storage()._cdata for tensor in tensors_in(args) if tensor.requires_grad}
    views = [
        tensor
        for tensor in tensors_in(result)
        if tensor.untyped_storage()._cdata in given and not (tensor.requires_grad or tensor.is_inference())
    ]
    if views and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        for view in views:
            view.requires_grad_()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _is_exact(operand: tuple[Sequence[Any], Sequence[Any]]) -> bool:
    shape, stride = operand
    return all(type(number) is int for number in (*shape, *stride))


def _is_iterated(func: Any) -> bool:
    """Whether an operation makes its result by one elementwise kernel: torch tags it so, and it is not composed of
    others (as ``clone`` and ``masked_fill`` are) unless that is for taking a number as its second operand. Torch's
    tables of kernels are not public; the alternative is a list of some 200 names.
    """
    found = _ITERATED.get(func)
    if found is None:
        arguments = func._schema.arguments
        tensors = [argument for argument in arguments if "Tensor" in str(argument.type)]
        is_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
        found = (
            (torch.Tag.pointwise in func.tags or func.name() in _UNTAGGED)
            and (is_kernel or (func._overloadname == "Scalar" and len(tensors) == 1))
            and all(argument.alias_info is None for argument in arguments)
        )
        _ITERATED[func] = found
    return found


_ITERATED: dict[Any, bool] = {}
_UNTAGGED = frozenset({"aten::floor_divide"})


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Shape and strides of the operands of an elementwise operation."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if isinstance(value, torch.Tensor):
            yield tuple(value.shape), value.stride()
        elif isinstance(value, (int, float, complex)) and (
            "Tensor" in str(argument.type) or func._overloadname == "Scalar"
        ):
            yield (), ()


def with_tensors(args: Any, tensors: dict[int, torch.Tensor]) -> Any:
    """Nested arguments with ``tensors`` (by the id of the fake) in the places of fakes."""
    if isinstance(args, torch.Tensor):
        return tensors[id(args)]
    if isinstance(args, dict):
        return {key: with_tensors(item, tensors) for key, item in args.items()}
    return type(args)(with_tensors(item, tensors) for item in args) if isinstance(args, (list, tuple)) else args


def is_held(reference: weakref.ref[Any]) -> bool:
    """Whether any Python object but the frame asking this refers to what ``reference`` does."""
    value = reference()
    return value is not None and any(not isinstance(holder, types.FrameType) for holder in gc.get_referrers(value))


def release(references: Iterable[weakref.ref[Any]]) -> bool:
    """Take fakes out of where user code has put them: ``functools.lru_cache`` and plain dictionaries. The next call, of
    the module itself perhaps, would find them there.

    Returns:
        Whether none was in a dictionary: putting it there may be what the code is for.
    """
    clean = True
    values = [value for reference in references if (value := reference()) is not None]
    seen = {id(values)}
    holders: list[Any] = list(values)
    for _ in range(_DEPTH):
        found = [holder for holder in gc.get_referrers(*holders) if id(holder) not in seen and _may_be_cached(holder)]
        seen.update(map(id, (holders, found, *found)))
        for holder in found:
            if isinstance(holder, _CACHE):
                holder.cache_clear()
            elif type(holder) is dict:
                for key in [key for key, value in holder.items() if any(value is fake for fake in values)]:
                    del holder[key]
                    clean = False
        holders = [holder for holder in found if not isinstance(holder, _CACHE)]
        if not holders:
            break
    return clean


_CACHE = type(functools.lru_cache(lambda: None))
_DEPTH = 5  # of containers that a cached result may have around a tensor


def _may_be_cached(holder: object) -> bool:
    return not isinstance(holder, (types.FrameType, types.ModuleType, types.FunctionType, type, types.CellType))


def grad_fn_of(tensor: torch.Tensor) -> object:
    """The node of autograd's graph that gives ``tensor``, or what autograd says where it refuses to tell."""
    try:
        return tensor.grad_fn
    except RuntimeError as error:
        # A view made under no_grad whose base was written: eager raises this too, but only where the gradient is
        # asked for.
        return str(error)
