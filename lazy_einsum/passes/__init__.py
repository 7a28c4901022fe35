"""The passes in order. Each is ``(graph) -> graph``: a new graph, the argument untouched, and idempotent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..cost import CPU, Machine
from .canonicalize import canonicalize
from .choose_paths import choose_paths
from .distribute import distribute
from .fold import fold
from .fuse_einsums import fuse_einsums
from .fuse_scalars import fuse_scalars
from .join_products import join_products
from .join_reshaped import join_reshaped
from .lower import lower
from .place_scalars import place_scalars
from .recompute import recompute
from .share import share
from .split_slices import split_slices

Pass = Callable[[fx.Graph], fx.Graph]


@dataclass(frozen=True, slots=True)
class Options:
    """What the passes may be told.

    Attributes:
        optimize: the search for contraction orders, see ``make_plan``.
        memory_limit: bytes that no intermediate of a contraction may exceed.
        reassociate: ``None`` changes the order of operations where range and exactness allow it, ``True`` in float16 as
            well, ``False`` only within one einsum.
        saved_limit: what autograd may save of contractions for the backward pass, in parts of what it saves in eager
            torch.
        folds: whether what depends on frozen tensors only is computed once.
        measure: a few orders of each network are timed, and the fastest is taken.
        exact: results that leave the graph have each stride of eager's: other specialized code takes them.
        machine: what contractions are lowered for.
    """

    optimize: object = "auto"
    memory_limit: int | None = None
    reassociate: bool | None = None
    saved_limit: float | None = None
    folds: bool = False
    measure: bool = False
    exact: bool = False
    machine: Machine = CPU


PASSES: tuple[tuple[str, Callable[[Options], Pass]], ...] = (
    ("canonicalize", lambda options: canonicalize()),
    ("fuse_scalars", lambda options: fuse_scalars(options.reassociate)),
    ("distribute", lambda options: distribute(options.optimize, options.memory_limit, options.reassociate)),
    (
        "recompute",
        lambda options: recompute(options.optimize, options.memory_limit, options.reassociate, options.saved_limit),
    ),
    (
        "join_reshaped",
        lambda options: join_reshaped(options.optimize, options.memory_limit, options.reassociate),
    ),
    (
        "join_products",
        lambda options: join_products(options.optimize, options.memory_limit, options.reassociate),
    ),
    ("fuse_einsums", lambda options: fuse_einsums(options.reassociate)),
    ("share", lambda options: share(options.optimize, options.memory_limit, options.saved_limit)),
    (
        "choose_paths",
        lambda options: choose_paths(
            options.optimize, options.memory_limit, saved_limit=options.saved_limit, measure=options.measure
        ),
    ),
    ("place_scalars", lambda options: place_scalars(options.reassociate)),
    ("split_slices", lambda options: split_slices()),
    ("lower", lambda options: lower(options.reassociate, options.exact, options.machine)),
)

OF_SIZES = frozenset({"join_reshaped", "split_slices", "lower"})
"""Passes that write sizes into the code, as numbers or as the expressions of ``sizes``. What they make of sizes of
which only an example is known does not hold for others.
"""

FOLD: tuple[str, Callable[[Options], Pass]] = ("fold", lambda options: fold(options.memory_limit))
"""The pass that comes before the last, where tensors are frozen."""

__all__ = ["FOLD", "OF_SIZES", "PASSES", "Options", "Pass"]
