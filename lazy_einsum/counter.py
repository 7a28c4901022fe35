"""``Counter``: counts calls of many threads."""

from __future__ import annotations

import itertools


class Counter:
    """Counts without a lock: ``next`` of an ``itertools.count`` is one step to all threads, ``+= 1`` is several.

    >>> counter = Counter()
    >>> counter.add(), counter.add(), counter.value
    (0, 1, 2)
    """

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        self._count = itertools.count()
        self.add = self._count.__next__

    @property
    def value(self) -> int:
        """How often ``add`` was called."""
        return int(repr(self._count)[len("count(") : -1])
