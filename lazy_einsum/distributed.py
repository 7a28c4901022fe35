"""What torch.distributed makes of modules and tensors. Its classes are public, but take a second to import: so they are
looked up only where somebody else has imported them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


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


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    return isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))
