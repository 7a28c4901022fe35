"""Logging: what a user can turn on to see what happens, by ``logging`` or by ``LAZY_EINSUM_LOGS``.

``LAZY_EINSUM_LOGS=cache,plans`` in the environment prints these to standard error::

    cache           misses, with the part of the key that differs
    graph_breaks    calls that run as the module itself, and calls without generic code, with the reason
    plans           the contraction orders of what is built
    passes          what each pass made of the graph, and the time it took
    code            the code that was generated

Each is a logger below ``lazy_einsum``: the first two speak at ``INFO``, the others at ``DEBUG``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from .misses import Miss
from .specialize import Specialization

VARIABLE = "LAZY_EINSUM_LOGS"

cache, graph_breaks, plans, passes, code = (
    logging.getLogger(f"lazy_einsum.{name}") for name in ("cache", "graph_breaks", "plans", "passes", "code")
)
NAMES = tuple(logger.name.rpartition(".")[2] for logger in (cache, graph_breaks, plans, passes, code))


def configure(environment: Mapping[str, str] = os.environ) -> None:
    """Turn on what ``LAZY_EINSUM_LOGS`` names.

    Raises:
        ValueError: it names something else.
    """
    names = [name.strip() for name in environment.get(VARIABLE, "").split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"{VARIABLE} names {', '.join(unknown)}; expected some of {','.join(NAMES)}")
    for name in names:
        logger = logging.getLogger(f"lazy_einsum.{name}")
        logger.setLevel(logging.DEBUG)
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            logger.addHandler(_Handler())


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """To standard error, with the name of the logger."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))


def missed(miss: Miss) -> None:
    """Say why a call missed."""
    if cache.isEnabledFor(logging.INFO):
        took = miss.seconds * 1e3
        cache.info("%s: miss for %s: %s; built in %.1f ms", miss.name, miss.signature, miss.reason, took)


def built(name: str, entry: Specialization) -> None:
    """Say what was built.

    Args:
        name: class of the module.
        entry: its new specialization.
    """
    if passes.isEnabledFor(logging.DEBUG):
        before = 0
        for stage in entry.stages.all:
            count = len(stage.graph.nodes)
            change = f"{before} to {count} nodes" if before else f"{count} nodes"
            took = stage.seconds * 1e3
            passes.debug("%s: %s for %s: %s, %.2f ms", name, stage.name, entry.signature, change, took)
            before = count
    if plans.isEnabledFor(logging.DEBUG):
        for plan in entry.plans:
            plans.debug("%s: order for %s:\n%s", name, entry.signature, plan)
    if code.isEnabledFor(logging.DEBUG):
        code.debug("%s: code for %s:\n%s", name, entry.signature, entry.code.strip())


configure()
