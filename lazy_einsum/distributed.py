"""What torch.distributed makes of modules and tensors. Its classes are public, but take a second to import: so they are
looked up only where somebody else has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .data import flatten, unflatten


def _class(module: str, name: str) -> Any:
    """A class of torch's where its module is imported, else none that has instances."""
    return getattr(sys.modules.get(module), name, _Nothing)


class _Nothing:
    pass


def wrapped_by(module: Any) -> tuple[str, nn.Module] | None:
    """Name and module of what ``module`` runs between the communication that it is there for, where it is
    ``DistributedDataParallel``.
    """
    if isinstance(module, _class("torch.nn.parallel.distributed", "DistributedDataParallel")):
        return "module", module.module
    return None


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether hooks of ``module`` put whole parameters into the place of sharded ones (``fully_shard``)."""
    return isinstance(module, _class("torch.distributed.fsdp", "FSDPModule"))


def holds_sharded(module: nn.Module) -> bool:
    """Whether ``module`` puts whole parameters into the place of sharded ones, as long as it is called: in its own
    memory, of which it says nothing to autograd.
    """
    wrapper = _class("torch.distributed.fsdp", "FullyShardedDataParallel")
    return is_fully_sharded(module) or isinstance(module, wrapper)


def is_gathered_whole(tensor: torch.Tensor) -> bool:
    """Whether a parameter of a fully sharded module is a plain tensor where it is whole: it is sharded by that alone
    (and replicated by several groups, perhaps), and no part of a tensor-parallel module.
    """
    *others, last = tensor.placements  # type: ignore[attr-defined]
    return last.is_shard() and all(placement.is_replicate() for placement in others)


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    return isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))


class Precision(NamedTuple):
    """The dtypes in which a fully sharded module runs; ``None`` where they are left as they are.

    Attributes:
        parameters: of its whole parameters.
        inputs: of what it is given.
        outputs: of what it gives.
    """

    parameters: torch.dtype | None = None
    inputs: torch.dtype | None = None
    outputs: torch.dtype | None = None


def precision_of(module: nn.Module) -> Precision:
    """The ``MixedPrecisionPolicy`` that ``module`` was fully sharded with. (There is no public way to ask for it. Where
    it is not found, none is assumed: what is foretold from it is compared with what comes.)
    """
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
    policy = getattr(state, "_mp_policy", None)
    if policy is None:
        return Precision()
    return Precision(
        policy.param_dtype, policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype
    )


def call_in_precision(precision: Precision, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` with its inputs and outputs cast as hooks of a fully sharded module cast them."""
    args, kwargs = _cast((args, kwargs), precision.inputs)
    return _cast(function(*args, **kwargs), precision.outputs)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    leaves: list[Any] = []
    structure = flatten(value, leaves)
    cast = [leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    return unflatten(structure, cast)
