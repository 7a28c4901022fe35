"""``with_progress``: a bar for work that takes long, where tqdm is installed and somebody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def with_progress(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """The items; a bar on standard error, if that is a terminal, counts them once it has taken a second. Without tqdm
    there is none.

    Args:
        items: one for each step of the work.
        total: how many there will be.
        what: is done.

    >>> list(with_progress([1, 2], 2, "numbers"))
    [1, 2]
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield from items
        return
    # ``None``: not where standard error is no terminal.
    yield from tqdm(items, desc=what, total=total, disable=None, leave=False, delay=1)
