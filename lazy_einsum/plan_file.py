"""Files of contraction orders: ``write_plans``, and ``read_plans``, which believes nothing that it reads.

A file says which orders were chosen and what for, in JSON; no code. Any order of an einsum gives the same value up to
rounding, so all that a file must be checked for is that each order is one: each operand and each intermediate is
consumed once. A changed file can make calls slower, never wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from os import PathLike
from typing import Any

import torch

from . import cost
from .errors import EquationError, MemoryLimitError, PlanFileError, PlanFileWarning
from .json_files import read_json, write_whole
from .known import Answer, Calls, Question
from .labelsets import SavedLimit
from .plan import plan_along
from .spec import EinsumSpec
from .stopwatch import is_here
from .version import __version__
from .where import users_stacklevel

FORMAT = "lazy_einsum plans 1"
_REMEDY = "write the file anew with save_plans"


def _written_by() -> dict[str, str]:
    """What the choice of orders depends on beside what each entry says: the programs that choose, and their idea of the
    machine.
    """
    versions = f"lazy_einsum {__version__}, torch {torch.__version__}, opt_einsum {version('opt_einsum')}"
    machine = hashlib.sha256(repr(cost.CPU).encode()).hexdigest()[:16]
    return {"format": FORMAT, "version": versions, "machine": machine}


def write_plans(path: str | PathLike[str], orders: Mapping[Question, Answer]) -> None:
    """Write orders to a file, one in a line; whoever reads it meanwhile finds all of it, or what was there before.

    Raises:
        OSError: it can't be written.
    """
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in _written_by().items()]
    entries = ",\n".join(f"  {json.dumps(_plain(question, answer))}" for question, answer in orders.items())
    write_whole(path, "\n".join(("{", *lines, ' "plans": [', *([entries] if entries else []), " ]", "}", "")))


def _plain(question: Question, answer: Answer) -> dict[str, Any]:
    saved, calls = question.saved, question.calls
    return {
        **question._asdict(),
        "saved": saved and {name: getattr(saved, name) for name in _SAVED},
        "calls": calls and calls._asdict(),
        **answer._asdict(),
    }


def read_plans(path: str | PathLike[str]) -> dict[Question, Answer]:
    """The orders in a file; those of another version, and those measured on another kind of device, are left out, with
    a warning.

    Raises:
        PlanFileError: there is no such file, or something else in it.
    """
    name = os.fspath(path)
    given = read_json(path, PlanFileError, "plans", _REMEDY)
    header = _written_by()
    if not isinstance(given, dict) or not all(isinstance(given.get(field), str) for field in header):
        raise PlanFileError(f"{name!r} is no file of plans: expected the texts {', '.join(header)}; {_REMEDY}")
    for field, ours in header.items():
        if given[field] != ours:
            what = "the constants of another machine (LAZY_EINSUM_MACHINE)" if field == "machine" else given[field]
            _ignore(f"the plans in {name!r} are ignored: they are of {what!r}, this is {ours!r}; {_REMEDY}")
            return {}
    _check_object(f"{name!r}", given, (*header, "plans"))
    if not isinstance(given["plans"], list):
        raise PlanFileError(f"{name!r}: plans is {_shown(given['plans'])}, expected a list; {_REMEDY}")
    orders = dict(_read(f"{name!r}, plan {number}", entry) for number, entry in enumerate(given["plans"]))
    kinds = {question.calls.device for question in orders if question.calls and question.calls.device is not None}
    elsewhere = {kind for kind in kinds if not is_here(kind)}
    if elsewhere:
        _ignore(f"plans in {name!r} are ignored that were measured on what is not here: {'; '.join(sorted(elsewhere))}")
    return {one: orders[one] for one in orders if not (one.calls and one.calls.device in elsewhere)}


def _ignore(text: str) -> None:
    warnings.warn(text, PlanFileWarning, stacklevel=users_stacklevel())


# --- the schema -------------------------------------------------------------------------------------------------------

_Check = Callable[[Any, int], bool]  # of a value, and the number of operands


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10**6


def _list(of: Callable[[Any], bool]) -> _Check:
    return lambda value, n: isinstance(value, list) and all(map(of, value))


def _each(of: Callable[[Any], bool]) -> _Check:
    return lambda value, n: _list(of)(value, n) and len(value) == n


def _each_or_none(of: Callable[[Any], bool]) -> _Check:
    return lambda value, n: value == [] or _each(of)(value, n)


def _optional(check: _Check) -> _Check:
    return lambda value, n: value is None or check(value, n)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_sizes(value: Any) -> bool:
    return _list(_is_size)(value, 0)


def _is_einsum(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_text(value[0])
        and _list(lambda number: number is None or _is_size(number))(value[1], 0)
    )


def _is_pair(value: Any) -> bool:
    return _are_sizes(value) and len(value) == 2


def _is_path(value: Any, n: int) -> bool:
    """Whether these are steps that leave one value of ``n``: each consumes two that are there."""
    if not isinstance(value, list) or len(value) != n - 1 or not all(map(_is_pair, value)):
        return False
    alive = set(range(n))
    for number, (left, right) in enumerate(value):
        if left == right or not {left, right} <= alive:
            return False
        alive = alive - {left, right} | {n + number}
    return True


_FLAGS = "true or false for each operand"
_SAVED: dict[str, tuple[_Check, str]] = {
    "follows": (_each(_is_flag), _FLAGS),
    "sizes": (_each(_is_size), "a size for each operand"),
    "memory": (_each(_is_size), "a number for each operand"),
    "elements": (lambda value, n: _is_number(value), "a number"),
    "order": (_list(_is_pair), "pairs of numbers"),
}
_CALLS: dict[str, tuple[_Check, str]] = {
    "dtypes": (_each(_is_text), "a text for each operand"),
    "strides": (_each(_are_sizes), "strides for each operand"),
    "memory": (_each(_is_size), "a number for each operand"),
    "written": (_list(_is_einsum), "equations, each with numbers of others or null"),
    "ratio": (_optional(lambda value, n: _is_number(value)), "a number or null"),
    "stride": (_optional(_list(_is_size)), "strides or null"),
    "exact": (lambda value, n: _is_flag(value), "true or false"),
    "device": (_optional(lambda value, n: _is_text(value)), "a text or null"),
}
_ENTRY: dict[str, tuple[_Check, str]] = {
    "shapes": (_each(_are_sizes), "sizes for each operand"),
    "equation": (lambda value, n: _is_text(value), "a text"),
    "optimize": (lambda value, n: _is_text(value) or _is_flag(value), "the name of a search"),
    "memory_limit": (
        _optional(lambda value, n: type(value) is int or value in ("max_input", "max_output")),
        "a number of elements, 'max_input', 'max_output' or null",
    ),
    "generic": (lambda value, n: _is_flag(value), "true or false"),
    "follows": (_each_or_none(_is_flag), f"{_FLAGS}, or none"),
    "frozen": (_each_or_none(_is_flag), f"{_FLAGS}, or none"),
    "saved": (_optional(lambda value, n: isinstance(value, dict)), "an object or null"),
    "calls": (_optional(lambda value, n: isinstance(value, dict)), "an object or null"),
    "path": (_is_path, "pairs that consume each operand and each intermediate once"),
    "found_by": (lambda value, n: _is_text(value) and value.isprintable(), "printable text"),
    "elements": (_optional(lambda value, n: _is_number(value)), "a number or null"),
}


def _read(where: str, entry: Any) -> tuple[Question, Answer]:
    """One entry, checked."""
    _check_object(where, entry, _ENTRY)
    n = len(entry["shapes"]) if isinstance(entry["shapes"], list) else 0
    _check_fields(where, entry, _ENTRY, n)
    for part, fields in (("saved", _SAVED), ("calls", _CALLS)):
        if entry[part] is not None:
            _check_object(f"{where}, {part}", entry[part], fields)
            _check_fields(f"{where}, {part}", entry[part], fields, n)
    values = {name: _tuples(value) for name, value in entry.items()}
    saved, calls = entry["saved"], entry["calls"]
    values["saved"] = saved and SavedLimit(**{name: _tuples(value) for name, value in saved.items()})
    values["calls"] = calls and Calls(**{name: _tuples(value) for name, value in calls.items()})
    question = Question(**{name: values[name] for name in Question._fields})
    answer = Answer(**{name: values[name] for name in Answer._fields})
    _check_fits(where, question, answer)
    return question, answer


def _check_fits(where: str, question: Question, answer: Answer) -> None:
    """Whether the equation is one, and fits the shapes, and the order keeps the limit."""
    try:
        spec = EinsumSpec.parse(question.equation, list(map(len, question.shapes)))
        spec.sizes(question.shapes)
    except EquationError as error:
        raise PlanFileError(f"{where}: {error}; {_REMEDY}") from None
    if str(spec) != question.equation:
        raise PlanFileError(
            f"{where}: equation is {_shown(question.equation)}, expected it written out, as {str(spec)!r}; {_REMEDY}"
        )
    if question.memory_limit is None:
        return
    try:
        plan_along(spec, question.shapes, answer.path, answer.found_by, question.memory_limit, question.generic)
    except (MemoryLimitError, OverflowError) as error:
        raise PlanFileError(f"{where}: {error}; {_REMEDY}") from None


def _check_object(where: str, value: Any, fields: Mapping[str, Any] | tuple[str, ...]) -> None:
    if not isinstance(value, dict) or value.keys() != set(fields):
        raise PlanFileError(f"{where} is {_shown(value)}, expected an object with {', '.join(fields)}; {_REMEDY}")


def _check_fields(where: str, values: Mapping[str, Any], fields: Mapping[str, tuple[_Check, str]], n: int) -> None:
    for name, (is_right, expected) in fields.items():
        if not is_right(values[name], n):
            of = "" if name == "shapes" else f" ({n} operands)"
            raise PlanFileError(f"{where}: {name} is {_shown(values[name])}, expected {expected}{of}; {_REMEDY}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _tuples(value: Any) -> Any:
    """Lists as tuples, which can be keys."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
