"""``Report``: what was done for a module, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .backends import EAGER

if TYPE_CHECKING:
    from .cache import CacheInfo
    from .specialize import Specialization


@dataclass(frozen=True)
class Report:
    """What ``OptimizedModule.explain`` gives; ``str(report)`` is for reading, ``to_dict()`` for programs.

    Attributes:
        name: class of the child.
        cache: statistics of the cache.
        specializations: those reported on, least recently used first.
        reasons: why calls ran as the child itself.
    """

    name: str
    cache: CacheInfo
    specializations: Sequence[Specialization]
    reasons: Sequence[str] = ()

    def __str__(self) -> str:
        cache = self.cache
        lines = [
            f"{self.name}: {cache.currsize} of at most {cache.maxsize} specializations; {cache.hits} hits, "
            f"{cache.misses} misses, "
            f"{cache.evictions} evictions, {cache.fallbacks} fall-backs; {cache.build_seconds:.3f} s building"
        ]
        if cache.fold_bytes:
            lines.append(f"{cache.fold_bytes} bytes are kept of what was computed once")
        lines += [f"runs as it is: {reason}" for reason in self.reasons]
        lines += [f"{name}: {state}" for name, state in cache.parts.items()]
        for entry in self.specializations:
            lines += ["", f"{entry.signature}", f"  {entry.hits} hits, built in {entry.build_seconds * 1e3:.1f} ms"]
            if entry.tier != EAGER or entry.reason:
                lines.append(f"  runs through {entry.tier}" + (f": {entry.reason}" if entry.reason else ""))
            for plan in entry.plans:
                lines += ["  " + line for line in str(plan).splitlines()]
            for kept in entry.folds:
                lines.append(f"  computed once, of {', '.join(kept.fold.names)} ({kept.fold.nbytes} bytes):")
                lines += ["    " + line for line in kept.fold.code.strip().splitlines()]
            lines += ["  code:"] + ["    " + line for line in entry.code.strip().splitlines()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data that ``json`` takes."""
        return {
            "name": self.name,
            "cache": self.cache._asdict(),
            "parts": dict(self.cache.parts),
            "fold_bytes": self.cache.fold_bytes,
            "tiers": dict(self.cache.tiers),
            "backend_failures": self.cache.backend_failures,
            "reasons": list(self.reasons),
            "specializations": [
                {
                    "signature": str(entry.signature),
                    "hits": entry.hits,
                    "build_seconds": entry.build_seconds,
                    "tier": entry.tier,
                    "reason": entry.reason,
                    "plans": [
                        {
                            "equation": str(plan.spec),
                            "flops": int(plan.flops),
                            "naive_flops": int(plan.naive_flops),
                            "optimizer": str(plan.optimizer),
                        }
                        for plan in entry.plans
                    ],
                    "folds": [
                        {"names": list(kept.fold.names), "bytes": kept.fold.nbytes, "code": kept.fold.code}
                        for kept in entry.folds
                    ],
                    "stages": dict(entry.stages),
                }
                for entry in self.specializations
            ],
        }
