"""``Cache``: the LRU of specializations of one ``OptimizedModule``, ways to find one, and statistics."""

from __future__ import annotations

import itertools
import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from cachetools import LRUCache

from .counter import Counter
from .folds import Folds
from .generic import Place, family, values_of
from .misses import Miss
from .signature import Arguments, Signature
from .specialize import Specialization

REFUSALS = 3
"""After so many calls of a family could not be traced, no other is tried; after two of one kind, not that kind. (A
first call often sets what later calls find: a cache, a lazy initialization.)
"""


class _Counts(NamedTuple):
    hits: int
    misses: int
    maxsize: int
    currsize: int
    evictions: int
    fallbacks: int
    build_seconds: float


class CacheInfo(_Counts):
    """Statistics of one ``OptimizedModule``: a named tuple, as that of ``functools.lru_cache``, with more to it.

    Attributes:
        hits: calls served by a specialization that was there.
        misses: calls that had to build one, or to find out that they can't.
        maxsize: bound on specializations.
        currsize: specializations held now.
        evictions: specializations dropped to stay within the bound.
        fallbacks: calls served by the child as it is, because they can't be traced.
        build_seconds: time spent building, in seconds.
        parts: (no item of the tuple) where the child as a whole can't be traced, what became of its submodules, by
            name: ``"specialized"``, ``"nothing to optimize"``, or why it runs as it is.
        fold_bytes: (no item of the tuple) bytes of memory that what was computed once of frozen tensors takes now.
        tiers: (no item of the tuple) how many of the specializations held now run through what: ``"eager"``, or the
            name of a backend.
        backend_failures: (no item of the tuple) specializations that a backend was to run and could not.
        compile_seconds: (no item of the tuple) time that backends took, in seconds.
    """

    parts: Mapping[str, str] = MappingProxyType({})
    fold_bytes: int = 0
    tiers: Mapping[str, int] = MappingProxyType({})
    backend_failures: int = 0
    compile_seconds: float = 0.0


class Kind(NamedTuple):
    """What can be told of a call before its module is read.

    Attributes:
        module: name of the submodule that is called; empty for the child itself.
        arguments: their types.
        ambient: torch's modes.
    """

    module: str
    arguments: Arguments
    ambient: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, entry: Specialization) -> Kind:
        """The kind of call that ``entry`` was built for."""
        signature = entry.signature
        return cls(signature.module, signature.arguments, signature.ambient)

    @property
    def family(self) -> Hashable:
        """The same for all calls that differ in sizes and numbers only."""
        return self.module, family(self.arguments), self.ambient


@dataclass(slots=True)
class Family:
    """Calls that differ in sizes and numbers only.

    Attributes:
        seen: arguments of the last calls that missed.
        misses: number of calls that missed.
        generic: code that is generic in some sizes, the newest first.
        fixed: sizes and numbers that code can't be generic in, each with an example.
        reason: why no code is generic here, where that is known.
        refusals: for each mode of training, arguments of calls that could not be traced.
        warned: whether the user was told of numbers that fill the cache.
        counts: how often some values of the symbols were noticed.
    """

    seen: deque[Arguments] = field(default_factory=lambda: deque(maxlen=4))
    misses: int = 0
    generic: list[Specialization] = field(default_factory=list)
    fixed: dict[Place, Any] = field(default_factory=dict)
    reason: str | None = None
    refusals: dict[Any, list[Arguments]] = field(default_factory=dict)
    warned: bool = False
    counts: LRUCache[Any, int] = field(default_factory=lambda: LRUCache(256))

    def count(self, values: Any) -> int:
        """Note ``values`` once more; how often they were."""
        self.counts[values] = self.counts.get(values, 0) + 1
        return self.counts[values]


class Cache(LRUCache[Signature, Specialization]):
    """The specializations of an ``OptimizedModule``, least recently used first to go. Not safe for threads by itself.

    Args:
        maxsize: bound on specializations.

    Attributes:
        lock: to be held while any method is called.
        building: to be held while code is made, so that none is made twice.
        exact: by kind of call, code for just these sizes.
        families: what is known of calls that differ in sizes only.
        recent: by shapes of the positional arguments, what served them last.
        reasons: why calls ran as they are, in the order in which that came up.
        backend_reasons: why specializations ran as eager where a backend was to run them.
        parts: what became of submodules, by name.
        folds: what its specializations computed once.
        last_misses: the last of the calls that missed.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.lock = threading.RLock()
        self.building = threading.RLock()
        self.exact: dict[Kind, list[Specialization]] = {}
        self.families: LRUCache[Hashable, Family] = LRUCache(1024)
        self.recent: dict[Hashable, Specialization] = {}
        self.reasons: dict[str, None] = {}
        self.backend_reasons: dict[str, None] = {}
        self.parts: dict[str, str] = {}
        self.folds = Folds()
        self.past_hits = 0
        self.misses = 0
        self.last_misses: deque[Miss] = deque(maxlen=32)
        self.evictions = 0
        self.fallbacks = Counter()
        self.build_seconds = 0.0
        self.backend_failures = 0
        self.compile_seconds = 0.0
        self.warned = False
        self._clock = itertools.count(1)

    def family(self, kind: Kind) -> Family:
        """The family of a kind of call, new where there was none."""
        known: Family = self.families.setdefault(kind.family, Family())
        return known

    def candidates(self, kind: Kind) -> list[Specialization]:
        """What may serve a call of this kind: code for its sizes first, then generic code."""
        known = self.families.get(kind.family)
        return [*self.exact.get(kind, ()), *(known.generic if known is not None else ())]

    def relatives(self, kind: Kind) -> list[Specialization]:
        """Code for single calls of the family of ``kind``."""
        wanted = kind.family
        return [entry for other in self.exact if other.family == wanted for entry in self.exact[other]]

    def is_refused(self, kind: Kind, mode: Any) -> bool:
        """Whether a call of this kind, in a mode of training, is known not to be traceable: it was tried twice, or
        several others of the family were.
        """
        known = self.families.get(kind.family)
        refusals = known.refusals.get(mode, []) if known is not None else []
        return len(refusals) >= REFUSALS or refusals.count(kind.arguments) >= 2

    def refuse(self, kind: Kind, mode: Any) -> bool:
        """Note that a call of this kind can't be traced; whether that was noted before."""
        refusals = self.family(kind).refusals.setdefault(mode, [])
        known = kind.arguments in refusals
        refusals.append(kind.arguments)
        return known

    def add(self, entry: Specialization) -> None:
        """Store ``entry``, in place of one with the same signature."""
        if entry.signature in self:
            self.drop(self[entry.signature])
        self[entry.signature] = entry
        self.folds.use(entry.folds)
        kind = Kind.of(entry)
        if entry.is_generic:
            relatives = self.family(kind)
            relatives.generic.insert(0, entry)
            for other in self.values():
                self._except(entry, other)
        else:
            self.exact.setdefault(kind, []).insert(0, entry)
            for generic in self.family(kind).generic:
                self._except(generic, entry)
        self.touch(entry)

    def _except(self, generic: Specialization, exact: Specialization) -> None:
        """Let ``generic`` leave the calls of ``exact`` to it."""
        values = _values(generic, exact)
        if values is not None:
            generic.exceptions.add(values)

    def drop(self, entry: Specialization) -> None:
        """Remove ``entry`` if it is there."""
        if self.pop(entry.signature, None) is not None:
            self._forget(entry)

    def popitem(self) -> tuple[Signature, Specialization]:
        """Remove the least recently used."""
        signature, entry = super().popitem()
        self.evictions += 1
        self._forget(entry)
        return signature, entry

    def _forget(self, entry: Specialization) -> None:
        self.past_hits += entry.hits
        self.folds.release(entry.folds)
        kind = Kind.of(entry)
        known = self.families.get(kind.family)
        if entry.is_generic:
            if known is not None and entry in known.generic:
                known.generic.remove(entry)
        else:
            self.exact[kind].remove(entry)
            if not self.exact[kind]:
                del self.exact[kind]
            for generic in known.generic if known is not None else ():
                values = _values(generic, entry)
                if values is not None:
                    generic.exceptions.discard(values)
        for key in [key for key, recent in self.recent.items() if recent is entry]:
            del self.recent[key]

    def touch(self, entry: Specialization) -> None:
        """Make ``entry`` the one used last."""
        entry.used = next(self._clock)
        self.get(entry.signature)

    def by_use(self) -> dict[Signature, Specialization]:
        """All specializations, least recently used first."""
        return {entry.signature: entry for entry in sorted(self.values(), key=lambda entry: entry.used)}

    @property
    def info(self) -> CacheInfo:
        """The statistics."""
        hits = self.past_hits + sum(entry.hits for entry in self.values())
        info = CacheInfo(
            hits,
            self.misses,
            int(self.maxsize),
            len(self),
            self.evictions,
            self.fallbacks.value,
            self.build_seconds,
        )
        info.parts = MappingProxyType(dict(self.parts))
        info.fold_bytes = self.folds.nbytes
        info.tiers = MappingProxyType(dict(Tally(entry.tier for entry in self.values())))
        info.backend_failures = self.backend_failures
        info.compile_seconds = self.compile_seconds
        return info


def _values(generic: Specialization, exact: Specialization) -> Any:
    """What the symbols of ``generic`` are in the calls of ``exact``; ``None`` where it could not serve them anyway."""
    mine, other = generic.signature, exact.signature
    if exact.is_generic or (mine.module, mine.ambient, mine.state) != (other.module, other.ambient, other.state):
        return None
    values = values_of(mine.arguments, other.arguments)
    return values[0] if values is not None and len(values) == 1 else values
