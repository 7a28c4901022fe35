"""Contraction orders that are known, each with all that it was chosen for. A search looks here first; ``plan_file``
reads and writes them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from cachetools import LRUCache

from .labelsets import Path, SavedLimit

MOST = 4096
"""So many orders are kept; those used longest ago go first."""


class Calls(NamedTuple):
    """What the choice of an order by its calls depends on, beside what that by the sizes does.

    Attributes:
        dtypes: of the operands.
        strides: of the operands.
        memory: for each operand the first one that lies in the same memory.
        written: the einsums as the user wrote them, inner ones first: the equation of each, and for each operand the
            number of the einsum that gives it, ``None`` for an operand of the whole.
        ratio: the limit on what autograd saves, in parts of what it saves of these.
        stride: strides of the result that is asked for; ``None`` where any will do.
        exact: whether the result has just these.
        device: where it was measured; where the cost model chose, the kind of device, ``None`` for the processor.
    """

    dtypes: tuple[str, ...]
    strides: tuple[tuple[int, ...], ...]
    memory: tuple[int, ...]
    written: tuple[tuple[str, tuple[int | None, ...]], ...]
    ratio: float | None
    stride: tuple[int, ...] | None
    exact: bool
    device: str | None


class Question(NamedTuple):
    """What an order was chosen for: two searches with equal ones find the same.

    Attributes:
        equation: the einsum, as text.
        shapes: of its operands.
        optimize: name of the search.
        memory_limit: elements that no intermediate may exceed, as ``make_plan`` takes it.
        generic: whether its steps hold for other sizes too.
        follows: for each operand whether autograd follows it; empty where it follows none, or nobody asks.
        frozen: for each operand whether it never changes; empty where none is.
        saved: what autograd may save.
        calls: ``None`` where the order was chosen by the sizes alone.
    """

    equation: str
    shapes: tuple[tuple[int, ...], ...]
    optimize: str | bool
    memory_limit: int | str | None = None
    generic: bool = False
    follows: tuple[bool, ...] = ()
    frozen: tuple[bool, ...] = ()
    saved: SavedLimit | None = None
    calls: Calls | None = None


class Answer(NamedTuple):
    """An order.

    Attributes:
        path: pairs of numbers, see ``Plan.ssa_path``.
        found_by: how it was found, in words.
        elements: what autograd may save of the calls that it is lowered to; ``None`` for no limit.
    """

    path: Path
    found_by: str
    elements: float | None = None


_answers: LRUCache[Question, Answer] = LRUCache(MOST)
_lock = threading.Lock()
_noted: ContextVar[dict[Question, Answer] | None] = ContextVar("noted", default=None)


def find(question: Question) -> Answer | None:
    """The order that is known for this, if one is."""
    with _lock:
        return _answers.get(question)


def keep(question: Question, answer: Answer) -> None:
    """From now on ``answer`` is the order for this."""
    with _lock:
        _answers[question] = answer


def note(question: Question, answer: Answer) -> None:
    """Tell those who want to know (see ``noting``) that this was asked for."""
    noted = _noted.get()
    if noted is not None:
        noted[question] = answer


@contextlib.contextmanager
def noting() -> Iterator[dict[Question, Answer]]:
    """Collect the orders that are asked for inside of the block, in this thread."""
    noted: dict[Question, Answer] = {}
    before = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(before)


def first_in(names: tuple[object, ...]) -> tuple[int, ...]:
    """For each name the place of the first equal one: all that matters of names of memory.

    >>> first_in(("x", "y", "x"))
    (0, 1, 0)
    """
    places: dict[object, int] = {}
    return tuple(places.setdefault(name, place) for place, name in enumerate(names))
