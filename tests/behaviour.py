"""Observe all that a call does (results, gradients, aliasing, writes, random numbers, warnings) and compare records."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lazy_einsum.ambient import generators

# Relative to the largest magnitude of the tensor (at least 1): results are sums in another order, so each
# element is known only up to the size of the terms that were added.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 2e-4,
    torch.complex64: 2e-4,
    torch.bfloat16: 6e-2,
    torch.float16: 2e-2,
}

# Where eager's own values move by more than the tolerance when every operation rounds in another way, that movement
# bounds the difference. The factor: each of two computations may be as far from the exact one as the largest of a few
# samples says; and a sum in another order may round some ten times where a sample does once.
MOVEMENTS = 10.0
# In float64, values that move this far (relative to the largest) amplify rounding by 1e11: they say nothing.
LOST = 1e-4


@dataclass(frozen=True)
class Observation:
    """What can be seen of one call from outside."""

    error: Exception | None
    structure: str = ""
    leaves: tuple[Any, ...] = ()
    #: For each output tensor, what else it shares memory with, and how it lies in that memory.
    aliasing: tuple[tuple[Any, ...], ...] = ()
    #: Inputs and state after the call, by name.
    after: Mapping[str, Any] = field(default_factory=dict)
    #: Names of inputs and state that were written in place.
    written: tuple[str, ...] = ()
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    gradient_error: Exception | None = None
    random_state: Tensor | None = None
    python_random_state: Any = None
    warned: tuple[warnings.WarningMessage, ...] = ()


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def clone_tree(tree: Any, device: str | torch.device | None = None) -> Any:
    """Copy nested containers of tensors, to a device, so that strides, shared memory and ``requires_grad`` stay as they
    are.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Tensor] = {}

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in copies:
            return copies[id(leaf)]
        source = leaf.detach()
        key = source.untyped_storage()._cdata
        if key not in storages:
            memory = source.untyped_storage()
            storages[key] = torch.UntypedStorage(memory.nbytes(), device=device or memory.device)
            storages[key].copy_(memory)
        copy = torch.empty(0, dtype=leaf.dtype, device=storages[key].device)
        copy.set_(storages[key], source.storage_offset(), source.shape, source.stride())
        if source.is_conj():
            copy = copy.conj()
        if isinstance(leaf, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=leaf.requires_grad)
        else:
            copy.requires_grad_(leaf.requires_grad)
        copies[id(leaf)] = copy
        return copy

    return pytree.tree_map(clone, tree)


def _state(module: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, nn.Module):
        yield from module.named_parameters()
        yield from module.named_buffers()


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten((args, dict(kwargs)))
    named = {f"input {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    named.update((f"state {name}", tensor) for name, tensor in _state(module))
    return named


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _memory(tensor: Tensor) -> int | None:
    storage = tensor.untyped_storage()
    return storage.data_ptr() if storage.nbytes() else None


def _place(tensor: Tensor) -> str:
    """Where autograd sees a tensor; it refuses to tell of views made under ``no_grad`` whose base was written."""
    try:
        return f"requires_grad={tensor.requires_grad}, is_leaf={tensor.is_leaf}"
    except RuntimeError:
        return "no place in autograd's graph"


def _aliasing(outputs: list[Tensor], named: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], ...]:
    rows: list[tuple[Any, ...]] = []
    for i, out in enumerate(outputs):
        others = [*named.items(), *((f"output {j}", outputs[j]) for j in range(i))]
        row: list[Any] = []
        for name, other in others:
            if out is other:
                row.append(("is", name))
            elif _memory(out) is not None and _memory(out) == _memory(other):
                row.append(("shares memory with", name, _shared(out, other)))
        rows.append(tuple(row))
    return tuple(rows)


def _shared(tensor: Tensor, other: Tensor) -> tuple[int, ...]:
    """For each element of ``tensor`` the number of the first in ``other`` at the same place in memory, or -1: how both
    lie is their own affair.
    """
    places, others = _places(tensor), _places(other)
    ordered, numbers = torch.sort(others, stable=True)
    if not others.numel():
        return (-1,) * places.numel()
    found = torch.searchsorted(ordered, places).clamp(max=others.numel() - 1)
    return tuple(torch.where(ordered[found] == places, numbers[found], -1).tolist())


def _places(tensor: Tensor) -> Tensor:
    """The offset in memory of each element, in bytes."""
    numbers = torch.full(tensor.shape, tensor.storage_offset() * tensor.element_size())
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride())):
        along = torch.arange(size) * (step * tensor.element_size())
        numbers += along.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    return numbers.flatten()


def _gradients(
    outputs: list[Tensor], leaves: Mapping[str, Tensor], second: bool, in_turn: bool
) -> tuple[dict[str, Tensor | None], Exception | None]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    differentiable = [out for out in outputs if "requires_grad=True" in _place(out)]
    if not wanted or not differentiable:
        return {}, None
    generator = torch.Generator().manual_seed(7)
    totals = []
    for out in differentiable:
        cotangent = torch.rand(out.shape, generator=generator, dtype=torch.float64) + 0.5
        product = out * cotangent.to(out.device, out.dtype)
        total = (product.real + product.imag if product.is_complex() else product).sum()
        totals.append(total.to("cpu", torch.float64))
    found: dict[str, Tensor | None] = {}
    try:
        if in_turn:
            for number, total in enumerate(totals):
                parts = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
                found.update((f"{name} of result {number}", g) for name, g in zip(wanted, parts))
            return {name: None if g is None else _snapshot(g) for name, g in found.items()}, None
        total = torch.stack(totals).sum()
        first = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, create_graph=second)
        found.update(zip(wanted, first))
        if second:
            again = [g for g in first if g is not None and g.requires_grad]
            if again:
                energy = sum((g.abs() ** 2).sum().to("cpu", torch.float64) for g in again)
                seconds = torch.autograd.grad(energy, list(wanted.values()), allow_unused=True)
                found.update((f"second {name}", g) for name, g in zip(wanted, seconds))
    except Exception as error:
        return found, error
    return {name: None if g is None else _snapshot(g) for name, g in found.items()}, None


def observe(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    module: Any = None,
    seed: int = 0,
    gradients: bool = True,
    second: bool = False,
    in_turn: bool = False,
    leaves: Mapping[str, Tensor] | None = None,
) -> Observation:
    """Run ``call(*args, **kwargs)`` and write down everything that it did.

    ``module`` is where state is read from (``call`` itself if left out); ``leaves`` are what gradients are taken for
    (by default those inputs and parameters that are leaves and require gradients), ``second`` ones too, or of one
    result after the other (``in_turn``), as separate losses do.
    """
    kwargs = dict(kwargs or {})
    module = call if module is None else module
    named = _named(args, kwargs, module)
    before = {name: tensor._version for name, tensor in named.items()}
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            output = call(*args, **kwargs)
        except Exception as error:
            return Observation(error=error, warned=tuple(warned))
    # That of the processor, and those of CUDA's devices.
    random_state = torch.cat([generator.get_state() for generator in generators()])
    python_random_state = random.getstate()
    flat, spec = pytree.tree_flatten(output)
    outputs = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    named = {**named, **_named((), {}, module)}
    after = {name: _snapshot(tensor) for name, tensor in named.items()}
    written = tuple(name for name, tensor in named.items() if name in before and tensor._version != before[name])
    aliasing = _aliasing(outputs, named)
    found: dict[str, Tensor | None] = {}
    failed: Exception | None = None
    if gradients:
        if leaves is None:
            leaves = {name: t for name, t in named.items() if t.is_leaf and t.requires_grad}
        with torch.inference_mode(False), torch.enable_grad():
            found, failed = _gradients(outputs, leaves, second, in_turn)
    return Observation(
        error=None,
        structure=str(spec),
        leaves=tuple(flat),
        aliasing=aliasing,
        after=after,
        written=written,
        gradients=found,
        gradient_error=failed,
        random_state=random_state,
        python_random_state=python_random_state,
        warned=tuple(warned),
    )


class Rounding(TorchFunctionMode):
    """Rounds the result of every torch function in another way: by up to two units in the last place.

    Only results in memory of their own: views and what is written in place keep sharing it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {_memory(tensor) for tensor in tensors_in((args, kwargs))}
        self.perturb([tensor for tensor in tensors_in(result) if _memory(tensor) not in taken])
        return result

    def perturb(self, tensors: list[Tensor]) -> None:
        """Move all elements of tensors, those that share memory together."""
        for tensor in {_memory(tensor): tensor for tensor in tensors}.values():
            if tensor.is_floating_point() or tensor.is_complex():
                flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                flat.set_(tensor.untyped_storage())
                units = torch.randint(-2, 3, flat.shape, generator=self.generator).to(flat.device)
                flat.mul_(1 + units.to(flat.real.dtype) * torch.finfo(tensor.dtype).eps)


def _gap(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference where ``theirs`` is finite, and the largest value there, at least 1."""
    wide = torch.complex128 if ours.is_complex() else torch.float64
    a, b = ours.detach().resolve_conj().resolve_neg().to(wide), theirs.detach().resolve_conj().resolve_neg().to(wide)
    finite = b.isfinite()
    if not finite.any():
        return 0.0, 1.0
    return (a[finite] - b[finite]).abs().max().item(), max(1.0, b[finite].abs().max().item())


def _bound(theirs: Tensor, moved: Sequence[Any], tolerance: float) -> float:
    """How far values may be from those of eager, relative to the largest; infinity where that can't be told.

    Args:
        theirs: eager's values.
        moved: the same, computed with other rounding.
        tolerance: the bound where rounding does not grow.
    """
    bound = tolerance
    for other in moved:
        if not isinstance(other, Tensor) or other.shape != theirs.shape:
            return float("inf")
        gap, scale = _gap(other, theirs)
        lost = theirs.dtype in (torch.float64, torch.complex128) and not gap <= LOST * scale
        bound = float("inf") if lost else max(bound, MOVEMENTS * gap / scale)
    return bound


def value_difference(
    ours: Tensor, theirs: Tensor, tolerance: float | None = None, moved: Sequence[Any] = ()
) -> str | None:
    """How ``ours`` differs from ``theirs``, in words, or None.

    ``moved``: the same values of eager, computed with other rounding (see ``Rounding``).
    """
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype}, expected {theirs.dtype}"
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    if ours.device != theirs.device:
        return f"device {ours.device}, expected {theirs.device}"
    ours, theirs = ours.detach().resolve_conj().resolve_neg(), theirs.detach().resolve_conj().resolve_neg()
    if not ours.numel() or tolerance == float("inf"):
        return None
    if not (ours.is_floating_point() or ours.is_complex()):
        # Exact; but floating point numbers that were truncated on the way are as exact as those are.
        steps = any(not isinstance(other, Tensor) or not torch.equal(other, theirs) for other in moved)
        same = steps or torch.equal(ours, theirs)
        return None if same else f"values {ours.flatten()[:4]}, expected {theirs.flatten()[:4]}"
    relative = _bound(theirs, moved, TOLERANCE[ours.dtype] if tolerance is None else tolerance)
    if relative == float("inf"):
        return None
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return f"{int((~ours.isfinite()).sum())} values are not finite, expected {int((~finite).sum())}"
    if not finite.all():
        same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | finite
        if not same.all():
            return "infinities or NaNs differ"
    gap, scale = _gap(ours, theirs)
    if gap > relative * scale:
        values = f"{ours.flatten()[:4]}, expected {theirs.flatten()[:4]}"
        return f"values differ by {gap:.3g} (largest {scale:.3g}): {values}"
    return None


def differences(
    ours: Observation,
    theirs: Observation,
    *,
    tolerance: float | None = None,
    moved: Sequence[Observation] = (),
    ignore: frozenset[str] = frozenset(),
) -> list[str]:
    """Every way in which ``ours`` differs from ``theirs``; the empty list says that no user could tell them apart.

    Args:
        ours: what is in question.
        theirs: what eager does.
        tolerance: bound on differences of values relative to the largest; by dtype where not given. Infinity: values
            are not compared.
        moved: what eager does with other rounding, where that is to widen the bound.
        ignore: aspects that are not compared, ``"aliasing"`` or ``"conj"``.
    """
    if theirs.error is not None:
        if ours.error is None:
            return [f"no error, expected {type(theirs.error).__name__}: {theirs.error}"]
        if not isinstance(ours.error, type(theirs.error)):
            raised, expected = (f"{type(run.error).__name__}: {run.error}" for run in (ours, theirs))
            return [f"{raised}; expected {expected}"]
        return []
    if ours.error is not None:
        return [f"raised {type(ours.error).__name__}: {ours.error}"]
    found: list[str] = []
    if ours.structure != theirs.structure:
        return [f"structure {ours.structure}, expected {theirs.structure}"]
    number = -1
    for i, (a, b) in enumerate(zip(ours.leaves, theirs.leaves)):
        number += isinstance(b, Tensor)
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return [f"result {i} is a {type(a).__name__}, expected a {type(b).__name__}"]
        if not isinstance(b, Tensor):
            same = type(a) is type(b) and (a == b or (a != a and b != b))
            if not same:
                found.append(f"result {i} is {a!r}, expected {b!r}")
            continue
        difference = value_difference(a, b, tolerance, [_item(other.leaves, i) for other in moved])
        if difference:
            found.append(f"result {i}: {difference}")
            continue
        if type(a) is not type(b):
            found.append(f"result {i} is a {type(a).__name__}, expected a {type(b).__name__}")
        if b.is_contiguous() and not a.is_contiguous():
            found.append(f"result {i} has strides {a.stride()}, expected contiguous {b.stride()}")
        if _place(a) != _place(b):
            found.append(f"result {i} has {_place(a)}, expected {_place(b)}")
        if a.is_conj() != b.is_conj() and "conj" not in ignore:
            found.append(f"result {i} has is_conj={a.is_conj()}, expected {b.is_conj()}")
        if "aliasing" not in ignore and ours.aliasing[number] != theirs.aliasing[number]:
            found.append(f"result {i} aliases {ours.aliasing[number]}, expected {theirs.aliasing[number]}")
    if ours.written != theirs.written:
        found.append(f"wrote {ours.written}, expected {theirs.written}")
    if ours.after.keys() != theirs.after.keys():
        found.append(f"state is {sorted(ours.after)}, expected {sorted(theirs.after)}")
    for name in theirs.after:
        if name in ours.after:
            others = [other.after.get(name) for other in moved]
            difference = value_difference(ours.after[name], theirs.after[name], tolerance, others)
            if difference:
                found.append(f"{name} after the call: {difference}")
    if theirs.random_state is not None and not torch.equal(ours.random_state, theirs.random_state):
        found.append("torch's random stream is at another place")
    if ours.python_random_state != theirs.python_random_state:
        found.append("Python's random stream is at another place")
    # Where eager's own backward fails (a saved tensor was overwritten), an optimized one need not.
    if theirs.gradient_error is None:
        if ours.gradient_error is not None:
            found.append(f"backward raised {type(ours.gradient_error).__name__}: {ours.gradient_error}")
        else:
            found.extend(_gradient_differences(ours, theirs, tolerance, moved))
    return found


def _item(leaves: tuple[Any, ...], number: int) -> Any:
    return leaves[number] if number < len(leaves) else None


def _gradient_differences(
    ours: Observation, theirs: Observation, tolerance: float | None, moved: Sequence[Observation]
) -> Iterator[str]:
    for name, expected in theirs.gradients.items():
        got = ours.gradients.get(name)
        if expected is None or got is None:
            # A zero gradient and none are told apart by optimizers with weight decay, so both count. But a second one
            # that is zero for sure is zeros behind bmm and none behind mul, which is nothing that eager promises.
            known = expected if got is None else got
            unused = name.startswith("second ") and known is not None and not known.count_nonzero()
            if (expected is None) != (got is None) and not unused:
                yield f"gradient of {name} is {got}, expected {expected}"
            continue
        difference = value_difference(got, expected, tolerance, [other.gradients.get(name) for other in moved])
        if difference:
            yield f"gradient of {name}: {difference}"
