"""``make_plan``: in which order an einsum contracts its operands, pair by pair. The only user of opt_einsum."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from opt_einsum.path_random import RandomOptimizer
from opt_einsum.paths import get_path_fn

from . import known
from .cost import flop_count
from .errors import LazyEinsumError, MemoryLimitError
from .known import Answer, Question
from .labelsets import LabelCount, Network, Path, SavedLimit, bits_of, union_of
from .search import best_of, search, search_saving
from .spec import EinsumSpec

Optimize = Any
"""A strategy's name, a ``PathOptimizer``, a callable ``(inputs, output, sizes, memory_limit) -> path``, or a path."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """One step of a plan: an einsum of one or two operands.

    Attributes:
        operands: which values it consumes: the plan's operands are numbered from 0, the results of its steps follow.
        spec: what it computes.
        shapes: shapes of what it consumes.
        shape: shape of its result.
        flops: its operations, as opt_einsum counts them.
    """

    operands: tuple[int, ...]
    spec: EinsumSpec
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    flops: int

    @property
    def size(self) -> int:
        """Number of elements of the result."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pairwise order for an einsum of given shapes. ``str(plan)`` is a table.

    Attributes:
        spec: the whole einsum.
        shapes: shapes of its operands.
        steps: contractions in order; the last one gives the result. None has more than two operands.
        flops: operations of all steps.
        naive_flops: operations of one loop over all labels.
        seconds: what the cost model expects.
        largest_intermediate: elements of the largest result of a step, the last one included.
        optimizer: name of the strategy that found the order.
    """

    spec: EinsumSpec
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Contraction, ...]
    flops: int
    naive_flops: int
    seconds: float
    largest_intermediate: int
    optimizer: str

    @property
    def ssa_path(self) -> Path:
        """What each step consumes, every value keeping its number."""
        return tuple(step.operands for step in self.steps)

    @property
    def path(self) -> Path:
        """The same as opt_einsum has it: positions in a list from which consumed operands are removed."""
        return positions(self.ssa_path, len(self.shapes))

    def __str__(self) -> str:
        gain = self.naive_flops / max(self.flops, 1)
        lines = [
            _shorten(f"einsum {self.spec}", 100),
            f"{len(self.shapes)} operands, order by {self.optimizer}: {_si(self.flops)} flops, "
            f"naive {_si(self.naive_flops)} ({gain:.3g}x), largest intermediate {_si(self.largest_intermediate)}",
            f"{'step':>4}  {'operands':<11} {'einsum':<48} {'result':<22} {'flops':>8}",
        ]
        for number, step in enumerate(self.steps):
            shape = _shorten("x".join(map(str, step.shape)) or "scalar", 22)
            operands = ", ".join(f"{operand}" for operand in step.operands)
            text = _shorten(str(step.spec), 48)
            lines.append(f"{number + len(self.shapes):>4}  {operands:<11} {text:<48} {shape:<22} {_si(step.flops):>8}")
        return "\n".join(lines)


def positions(order: Path, n_operands: int) -> Path:
    """Steps of numbered values as positions in a list from which consumed ones are removed, results being appended.

    >>> positions(((1, 2), (0, 3)), 3)
    ((1, 2), (0, 1))
    """
    alive = list(range(n_operands))
    path = []
    for number, step in enumerate(order):
        places = tuple(sorted(alive.index(value) for value in step))
        for place in reversed(places):
            del alive[place]
        alive.append(n_operands + number)
        path.append(places)
    return tuple(path)


def make_plan(
    spec: EinsumSpec,
    shapes: Sequence[Sequence[int]],
    optimize: Optimize = "auto",
    memory_limit: int | str | None = None,
    generic: bool = False,
    saved_limit: SavedLimit | None = None,
    follows: Sequence[bool] = (),
    frozen: tuple[bool, ...] = (),
) -> Plan:
    """Choose the order of an einsum for these shapes.

    Args:
        spec: the einsum.
        shapes: shape of each operand.
        optimize: ``"auto"`` is ours: the best by the cost model of several searches, exhaustive for few operands, and
            bounded in steps, never in seconds, so that each process finds the same. Anything that
            ``opt_einsum.contract_path`` takes is used as given, on the normalised network (without labels of size 1
            and labels that only one operand has); steps of more than two operands are split.
        memory_limit: elements that no intermediate (the result apart) may exceed; ``"max_input"`` and
            ``"max_output"`` stand for the largest operand and for the result.
        generic: the steps hold for any sizes that the einsum takes, not only for ``shapes``: no label is dropped for
            having size 1.
        saved_limit: what autograd may save for the backward pass, if anything is to limit that; only ``"auto"`` looks
            at it.
        follows: for each operand whether autograd follows it; for ``"auto"`` the backward pass costs time too then.
        frozen: for each operand whether it never changes; empty where none is. What comes of such operands alone is
            computed once, so it counts next to nothing; only ``"auto"`` looks at it.

    Raises:
        EquationError: the shapes do not fit.
        MemoryLimitError: no order was found that stays below the limit.
        LazyEinsumError: ``optimize`` is unknown, or what it gave is not a path.

    >>> spec = EinsumSpec(("zij", "zjk", "zk"), "zi")
    >>> make_plan(spec, [(1000, 8, 4), (1000, 4, 5), (1000, 5)]).ssa_path
    ((1, 2), (0, 3))
    """
    fixed = tuple(tuple(map(int, shape)) for shape in shapes)
    if optimize == "auto" or optimize is True:
        followed = tuple(follows) if any(follows) else ()
        found = _cached_plan(spec, fixed, optimize, memory_limit, generic, saved_limit, followed, tuple(frozen))
    elif isinstance(optimize, (str, bool)):
        found = _cached_plan(spec, fixed, optimize, memory_limit, generic)
    elif not callable(optimize):
        given = tuple(tuple(map(int, step)) for step in optimize)
        found = _cached_plan(spec, fixed, given, memory_limit, generic)
    else:
        # A callable may read anything, and an optimizer may learn between calls: what they return is not kept.
        return _plan(spec, fixed, optimize, memory_limit, generic)
    plan, question = found
    if question is not None:
        known.note(question, Answer(plan.ssa_path, plan.optimizer))
    return plan


@lru_cache(maxsize=1024)
def _cached_plan(
    spec: EinsumSpec,
    shapes: tuple[tuple[int, ...], ...],
    optimize: str | bool | Path,
    limit: int | str | None,
    generic: bool,
    saved_limit: SavedLimit | None = None,
    follows: tuple[bool, ...] = (),
    frozen: tuple[bool, ...] = (),
) -> tuple[Plan, Question | None]:
    """The plan, and what its order is kept under, where there was anything to choose."""
    if len(shapes) < 3 or isinstance(optimize, tuple):
        return _plan(spec, shapes, optimize, limit, generic, saved_limit, follows, frozen), None
    saved = saved_limit and replace(saved_limit, memory=known.first_in(saved_limit.memory))
    question = Question(str(spec), shapes, optimize, limit, generic, follows, frozen, saved)
    answer = known.find(question)
    if answer is None:
        plan = _plan(spec, shapes, optimize, limit, generic, saved_limit, follows, frozen)
        known.keep(question, Answer(plan.ssa_path, plan.optimizer))
    else:
        plan = plan_along(spec, shapes, answer.path, answer.found_by, limit, generic, follows, frozen)
    return plan, question


def _plan(
    spec: EinsumSpec,
    shapes: tuple[tuple[int, ...], ...],
    optimize: Optimize,
    memory_limit: int | str | None,
    generic: bool,
    saved_limit: SavedLimit | None = None,
    follows: tuple[bool, ...] = (),
    frozen: tuple[bool, ...] = (),
) -> Plan:
    sizes = spec.sizes(shapes)
    plain = Network.of(spec, shapes, sizes, generic)
    network = plain.folding(frozen).following(follows)
    limit = _limit(memory_limit, spec, shapes, sizes)
    name = "no search"
    path: Path = ()
    if len(shapes) == 1:
        pass
    elif optimize == "auto" or optimize is True:
        found: dict[Path, str] = {}
        if follows:
            forward, _ = _cached_plan(spec, shapes, optimize, memory_limit, generic, frozen=frozen)
            found[forward.ssa_path] = forward.optimizer
        if saved_limit is not None:
            free, _ = _cached_plan(spec, shapes, optimize, memory_limit, generic, None, follows, frozen)
            found[free.ssa_path] = free.optimizer
            name, path = search_saving(network, limit, found, saved_limit)
        else:
            name, path = search(network, limit, _quick)
            found.setdefault(path, name)
            path = best_of(network, found, next(iter(found)))
            name = found[path]
    else:
        name, path = _foreign(plain, optimize, limit)
    return plan_along(spec, shapes, path, name, memory_limit, generic, follows, frozen)


def plan_along(
    spec: EinsumSpec,
    shapes: tuple[tuple[int, ...], ...],
    path: Path,
    found_by: str,
    memory_limit: int | str | None = None,
    generic: bool = False,
    follows: tuple[bool, ...] = (),
    frozen: tuple[bool, ...] = (),
) -> Plan:
    """The plan of an order that is known.

    Args:
        spec: see ``make_plan``.
        shapes: see ``make_plan``.
        path: the order, see ``Plan.ssa_path``.
        found_by: how it was found, in words.
        memory_limit: see ``make_plan``.
        generic: see ``make_plan``.
        follows: see ``make_plan``.
        frozen: see ``make_plan``.

    Raises:
        MemoryLimitError: it does not stay below the limit.
    """
    sizes = spec.sizes(shapes)
    limit = _limit(memory_limit, spec, shapes, sizes)
    steps = _steps(spec, shapes, sizes, path, generic)
    largest = max((step.size for step in steps[:-1]), default=0)
    if largest > limit:
        raise MemoryLimitError(
            f"einsum {spec}: the order by {found_by} has an intermediate of {largest} elements, expected at most "
            f"{int(limit)}; raise memory_limit or use optimize='auto'"
        )
    return Plan(
        spec,
        shapes,
        steps,
        sum(step.flops for step in steps),
        flop_count(math.prod(sizes.values()), len(shapes), bool(spec.summed)),
        Network.of(spec, shapes, sizes, generic).folding(frozen).following(follows).seconds(path),
        max(step.size for step in steps),
        found_by,
    )


def learn(orders: Mapping[Question, Answer]) -> None:
    """From now on these orders are taken, whatever was found before."""
    for question, answer in orders.items():
        known.keep(question, answer)
    _cached_plan.cache_clear()


def _limit(
    memory_limit: int | str | None, spec: EinsumSpec, shapes: Sequence[Sequence[int]], sizes: dict[str, int]
) -> float:
    if memory_limit is None or memory_limit == -1:
        return math.inf
    if memory_limit == "max_input":
        return max(map(math.prod, shapes))
    if memory_limit == "max_output":
        return math.prod(sizes[label] for label in spec.output)
    if isinstance(memory_limit, str):
        raise LazyEinsumError(
            f"memory_limit {memory_limit!r}; expected a number of elements, 'max_input', 'max_output' or None"
        )
    return memory_limit


# --- from a path to steps ---------------------------------------------------------------------------------------------


def _steps(
    spec: EinsumSpec, shapes: tuple[tuple[int, ...], ...], sizes: dict[str, int], path: Path, generic: bool
) -> tuple[Contraction, ...]:
    """The contractions of a path of pairs.

    An intermediate has the labels that are needed later; but one of size 1 is kept (except in generic mode) only where
    the result has it and no operand has more of it.
    """
    if not path:
        return (_contraction((0,), spec, shapes, generic),)
    values = list(zip(spec.inputs, shapes, strict=True))
    users: dict[str, int] = dict.fromkeys(spec.labels, 0) | dict.fromkeys(spec.output, 1)

    def count(term: str, shape: tuple[int, ...], change: int) -> None:
        for label, size in dict(zip(term, shape, strict=True)).items():
            if generic or size != 1:
                users[label] += change

    for term, shape in values:
        count(term, shape, 1)
    steps = []
    for number, (left, right) in enumerate(path):
        (a, a_shape), (b, b_shape) = values[left], values[right]
        count(a, a_shape, -1)
        count(b, b_shape, -1)
        if number == len(path) - 1:
            output = spec.output
        else:
            here = dict(zip(a, a_shape, strict=True))
            for label, size in zip(b, b_shape, strict=True):
                here[label] = size if here.get(label, 1) == 1 else here[label]
            kept = [
                label
                for label in dict.fromkeys(a + b)
                if users[label] and (generic or here[label] != 1 or (sizes[label] == 1 and label in spec.output))
            ]
            # The order that a batched matrix product gives, so that plain torch.einsum does not have to permute either.
            kept.sort(key=lambda label: 0 if label in a and label in b else 1 if label in a else 2)
            output = "".join(kept)
        step = _contraction((left, right), EinsumSpec((a, b), output), (a_shape, b_shape), generic)
        count(output, step.shape, 1)
        values.append((output, step.shape))
        steps.append(step)
    return tuple(steps)


def _contraction(
    operands: tuple[int, ...], spec: EinsumSpec, shapes: tuple[tuple[int, ...], ...], generic: bool
) -> Contraction:
    sizes = spec.sizes(shapes)
    flops = 0
    terms = []
    for term, shape in zip(spec.inputs, shapes, strict=True):
        own = {label: size for label, size in zip(term, shape, strict=True) if size != 1}
        others = spec.output + "".join(other for other in spec.inputs if other is not term)
        alone = [label for label in own if label not in others]
        if alone:
            flops += math.prod(own.values())
        terms.append(set(own) - set(alone))
    if len(terms) == 2:
        elements = math.prod(sizes[label] for label in terms[0] | terms[1])
        flops += flop_count(elements, 2, bool((terms[0] & terms[1]) - set(spec.output)))
    return Contraction(operands, spec, shapes, tuple(sizes[label] for label in spec.output), flops)


# --- strategies of others ---------------------------------------------------------------------------------------------


def order_seconds(
    spec: EinsumSpec, shapes: Sequence[tuple[int, ...]], path: Path, frozen: tuple[bool, ...] = ()
) -> float:
    """What the cost model expects of an order (steps as in ``Plan.ssa_path``) for operands of these shapes; for
    ``frozen`` see ``make_plan``.
    """
    if len(shapes) < 2:
        return 0.0
    sizes = spec.sizes(shapes)
    return Network.of(spec, shapes, sizes, False).folding(frozen).seconds(path)


def saved_elements(spec: EinsumSpec, shapes: Sequence[tuple[int, ...]], path: Path, saved: SavedLimit) -> int:
    """What autograd saves of an order, in elements: see ``SavedLimit``."""
    return saved.saved(Network.of(spec, shapes, spec.sizes(shapes), False), path)


def check_optimize(optimize: object) -> None:
    """Raise ``ValueError`` where ``optimize`` is the name of no strategy."""
    if not isinstance(optimize, str) or optimize == "auto":
        return
    try:
        get_path_fn(optimize)
    except KeyError:
        hint = " ('measure' is for OptimizedModule, which knows the sizes of a call)" if optimize == "measure" else ""
        raise ValueError(
            f"optimize={optimize!r} is not a strategy here; expected 'auto' or a name that "
            f"opt_einsum.contract_path takes{hint}"
        ) from None


def _foreign(network: Network, optimize: Optimize, limit: float) -> tuple[str, Path]:
    if optimize is False:
        return "left to right", _to_pairs(network, tuple((0, 1) for _ in network.terms[1:]))
    if isinstance(optimize, str):
        try:
            function = get_path_fn(optimize)
        except KeyError as error:
            raise LazyEinsumError(f"optimize={optimize!r} is not a strategy: {error.args[0]}") from None
        return optimize, _to_pairs(network, _call_foreign(network, function, limit, own=True))
    if not callable(optimize):
        return "the given path", _to_pairs(network, optimize)
    name = getattr(optimize, "__name__", type(optimize).__name__)
    if isinstance(optimize, RandomOptimizer):
        # One that has searched refuses every other contraction; a fresh copy for each also makes them independent.
        optimize = copy.deepcopy(optimize)
    package = str(getattr(optimize, "__module__", "")).partition(".")[0]
    kind = tuple if package == "cotengra" else frozenset
    return name, _to_pairs(network, _call_foreign(network, optimize, limit, package == "opt_einsum", kind))


def _call_foreign(
    network: Network, function: Callable[..., Any], limit: float, own: bool, kind: Callable[..., Any] = frozenset
) -> Path:
    """The path that a strategy finds.

    Args:
        network: the network.
        function: the strategy.
        limit: elements that no intermediate may exceed.
        own: it is one of opt_einsum's. Those walk over sets of labels, and a set of strings has another order in each
            process, so they get integers. (Others may insist on strings: cotengrust does.)
        kind: of the terms: opt_einsum's interface asks for sets; cotengra also takes tuples, whose order is the same
            in each process.
    """
    labels: Sequence[Any] = range(len(network.labels)) if own else network.labels
    inputs = [kind(labels[bit.bit_length() - 1] for bit in bits_of(term)) for term in network.terms]
    output = kind(labels[bit.bit_length() - 1] for bit in bits_of(network.output))
    most = None if limit == math.inf else int(limit)
    # opt_einsum's random searches seed Python's global generator; the caller's numbers must not depend on planning.
    state = random.getstate()
    arguments = [inputs, output, dict(zip(labels, network.sizes, strict=True))]
    try:
        path = function(*arguments, most) if _takes_limit(function) else function(*arguments)
    finally:
        random.setstate(state)
    return tuple(tuple(map(int, step)) for step in path)


def _quick(network: Network) -> Path:
    """opt_einsum's greedy order."""
    return _to_pairs(network, _call_foreign(network, get_path_fn("greedy"), math.inf, own=True))


def _takes_limit(function: Callable[..., Any]) -> bool:
    """Whether a strategy has a fourth parameter: some of cotengra's have none."""
    try:
        inspect.signature(function).bind((), (), {}, None)
    except TypeError:
        return False
    except ValueError:
        # A function of C may have no signature that Python can read.
        return True
    return True


def _to_pairs(network: Network, path: Path) -> Path:
    """A path of positions as pairs of numbers, steps of three and more operands split by our own search."""
    n = len(network.terms)
    alive = list(range(n))
    values = list(network.terms)
    count = LabelCount(network.terms, network.output)
    pairs: list[tuple[int, ...]] = []
    steps = list(path)
    while steps or len(alive) > 1:
        step = steps.pop(0) if steps else tuple(range(len(alive)))
        if not step or len(set(step)) != len(step) or not all(0 <= place < len(alive) for place in step):
            raise LazyEinsumError(
                f"the path {list(path)} has the step {step} where {len(alive)} operands remain; expected different "
                f"positions from 0 to {len(alive) - 1}"
            )
        group = [alive[place] for place in sorted(step)]
        alive = [number for number in alive if number not in group]
        if len(group) == 1:
            alive += group
            continue
        if len(group) == 2:
            inner: Path = ((0, 1),)
        else:
            rest = network.output | union_of(values, alive)
            part = network.with_terms([values[number] for number in group], rest & union_of(values, group))
            _, inner = search(part, math.inf, _quick)
        names = list(group)
        for left, right in inner:
            pairs.append((names[left], names[right]))
            values.append(count.contract(values[names[left]], values[names[right]]))
            names.append(len(values) - 1)
        alive.append(names[-1])
    return tuple(pairs)


# --- printing ---------------------------------------------------------------------------------------------------------


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return text[: width // 2 - 2] + "..." + text[len(text) - (width - width // 2 - 1) :]


def _si(value: int) -> str:
    if value < 10_000:
        return str(value)
    return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
