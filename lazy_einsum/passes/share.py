"""Compute once what several einsums contract alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import fx

from ..cost import ITEM, walk_seconds
from ..errors import MemoryLimitError
from ..frozen import frozen_values
from ..graph import (
    EVERYTHING,
    Writers,
    copy_graph,
    facts,
    fresh_storage,
    is_einsum,
    is_order_free,
    keepers,
    lead_to_one_end,
    may_require_grad,
    read_einsum,
    same_mode,
    stamp,
    type_of,
    write_einsum,
)
from ..networks import Read, einsum_seconds, pays
from ..plan import make_plan
from ..saved import WRITTEN, Step, save_more, written_einsums
from ..spec import EinsumSpec

# Seconds that it has to gain at least.
_LEAST = 2e-6
# In these a product is the same, up to rounding, in any order of its factors.
_ANY_ORDER = frozenset({torch.float64, torch.float32, torch.complex64, torch.complex128, torch.int64})
# Operands of an einsum of which a part is shared: the search for the orders of larger ones takes long.
_MOST = 24
# How many einsums before it one is compared with, and how many parts of two of them.
_BEFORE, _PARTS = 16, 64
# Orders of operands that are compared where one enters several times.
_ORDERS = 24


def share(
    optimize: object = "auto", memory_limit: int | None = None, saved_limit: float | None = None
) -> Callable[[fx.Graph], fx.Graph]:
    """The pass that computes once what several einsums contract alike.

    Before (all are matrices of one size)::

        einsum = torch.einsum("ab,bc,cd->ad", x, y, z)
        einsum_1 = torch.einsum("ab,ca,bd->cd", y, x, w)

    After::

        einsum_2 = torch.einsum("ab,bc->ac", x, y)
        einsum = torch.einsum("ab,bc->ac", einsum_2, z)
        einsum_1 = torch.einsum("ab,bc->ac", einsum_2, w)

    Einsums, or parts of them, are equal if they contract the same tensors along the same labels: in whatever order,
    under whatever names, and with the dimensions of the result in whatever order. They are computed once where that
    takes clearly less time, a copy of the value included, as another layout may be needed; but not

    - where something between the two writes what they read, gives a tensor a hook, or switches a mode, and where they
      run in different modes;
    - where one of them, whole, is written, has a hook, or is given to a call that may keep it;
    - where autograd follows, and one of them, whole, is a result of the graph: its gradient is the user's to ask for;
    - where autograd follows, and they lead to several results: these may be differentiated one after the other, and
      what the second needs would be gone after the first;
    - where autograd would save more than ``saved_limit`` allows.

    A result that equals another value, and that autograd does not follow, is a copy, as each result is memory of its
    own.

    Requires: exact facts (without them nothing is changed). Of float16 and bfloat16 no parts are shared, only wholes.
    Ensures: einsums that share nothing keep their text.

    Args:
        optimize: the search for contraction orders; with another one than ``"auto"`` only wholes are shared.
        memory_limit: bytes that no intermediate may exceed.
        saved_limit: what autograd may save, in parts of what it saves of the einsums as they were written.
    """

    def run(graph: fx.Graph) -> fx.Graph:
        new = copy_graph(graph)
        einsums = _Einsums(new, optimize in ("auto", True), memory_limit, saved_limit)
        for node in list(einsums.own):
            while (pair := einsums.best(node)) is not None:
                _Write(einsums, itertools.count(fresh_storage(new))).pair(pair)
        return new

    return run


@dataclass(frozen=True, slots=True)
class _Part:
    """Some operands of an einsum.

    Attributes:
        node: the einsum.
        own: what it computes.
        places: numbers of the operands.
        spec: what contracts them; equal parts have the same terms, and the same labels in the result.
    """

    node: fx.Node
    own: Read
    places: tuple[int, ...]
    spec: EinsumSpec

    @property
    def is_whole(self) -> bool:
        """Whether these are all operands."""
        return len(self.places) == len(self.own[1])

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The operands, in the order of ``spec``."""
        return tuple(self.own[1][place] for place in self.places)

    def names(self, output: str) -> str:
        """Labels of ``spec`` as the einsum has them."""
        terms = [self.own[0].inputs[place] for place in self.places]
        names = dict(zip("".join(self.spec.inputs), "".join(terms), strict=True))
        return "".join(names[label] for label in output)

    def rest(self, output: str) -> tuple[EinsumSpec, tuple[fx.Node | None, ...]]:
        """What is left of the einsum: ``None`` stands for the value of the part, whose dimensions are ``output``."""
        spec, operands = self.own
        at = min(self.places)
        left = [place for place in range(len(operands)) if place == at or place not in self.places]
        terms = [self.names(output) if place == at else spec.inputs[place] for place in left]
        return EinsumSpec(tuple(terms), spec.output), tuple(None if place == at else operands[place] for place in left)


class _Pair(NamedTuple):
    """Equal parts of two einsums, the earlier one first."""

    first: _Part
    second: _Part

    @property
    def wholes(self) -> list[_Part]:
        """Those that are whole einsums."""
        return [part for part in self if part.is_whole]

    @property
    def model(self) -> _Part | None:
        """The one whose dimensions and strides the value gets, as others than einsums see them; ``None`` where both
        would have to be that.
        """
        seen = [part for part in self.wholes if not _is_for_einsums(part.node)]
        if len(seen) < 2:
            return (seen or self.wholes or self)[0]
        types = [type_of(part.node) for part in seen]
        strides = {known.stride for known in types if known}
        return self.first if self.first.spec.output == self.second.spec.output and len(strides) == 1 else None


class _Einsums:
    """The einsums of a graph that may share something.

    Attributes:
        graph: whose they are.
        own: what each computes.
        changed: those of which a part is shared.
    """

    def __init__(self, graph: fx.Graph, with_parts: bool, memory_limit: int | None, saved_limit: float | None) -> None:
        self.graph = graph
        self.own: dict[fx.Node, Read] = {}
        self.changed: set[fx.Node] = set()
        self._with_parts = with_parts
        self._memory_limit = memory_limit
        self._saved_limit = saved_limit
        self._writers = Writers(graph)
        self._numbers: dict[fx.Node | str, int] = {}
        self._users: dict[int, dict[fx.Node, None]] = {}
        frozen = frozen_values(graph)
        for node in graph.nodes:
            found = read_einsum(node) if is_einsum(node) else None
            known = facts(node)
            if found is None or known is None or known.type is None or known.storage in (None, EVERYTHING):
                continue
            if found[0].is_view_only or any(type_of(operand) is None for operand in found[1]):
                continue
            if not frozen.isdisjoint(found[1]):
                continue  # what comes of frozen tensors is computed once anyway
            if is_order_free(node, found[1], self._writers) and not self._writers.spoil_any([node], node):
                self.add(node, found)

    def add(self, node: fx.Node, read: Read) -> None:
        """Note an einsum, or what it has become."""
        self.own[node] = read
        for operand in read[1]:
            self._users.setdefault(self._number(operand), {})[node] = None

    def _number(self, operand: fx.Node) -> int:
        # Plain fx reads one parameter by several nodes.
        key = str(operand.target) if operand.op == "get_attr" else operand
        return self._numbers.setdefault(key, len(self._numbers))

    # -- what is equal

    def best(self, node: fx.Node) -> _Pair | None:
        """What an einsum shares best with one before it."""
        if node not in self.own:
            return None
        # Parts are of two operands, or all of one.
        common: dict[fx.Node, int] = {}
        for operand in self.own[node][1]:
            for other in self._users[self._number(operand)]:
                common[other] = common.get(other, 0) + 1
        least = min(2, len(self.own[node][1]))
        others = [other for other, n in common.items() if n >= least and other in self.own and other < node]
        found = [
            (gain, pair)
            for other in sorted(others)[-_BEFORE:]
            if self._may_meet(other, node)
            for pair in self._pairs(other, node)
            if (gain := self._gain(pair)) is not None
        ]
        found.sort(key=lambda item: -item[0])
        return next((pair for _, pair in found if self._is_allowed(pair)), None)

    def _may_meet(self, first: fx.Node, second: fx.Node) -> bool:
        types = [type_of(node) for node in (first, second)]
        if len({(known.dtype, known.device) if known else None for known in types}) != 1:
            return False
        reads = [operand for operand in self.own[second][1] if first in self._users[self._number(operand)]]
        return same_mode(first, second) and not self._writers.part(reads, first, second)

    def _pairs(self, first: fx.Node, second: fx.Node) -> Iterator[_Pair]:
        places = itertools.islice(self._places(first, second), _PARTS)
        for here, there in dict.fromkeys(places):
            pair = _Pair(self._part(first, here), self._part(second, there))
            one, two = pair.first.spec, pair.second.spec
            if one.inputs == two.inputs and set(one.output) == set(two.output):
                yield pair

    def _places(self, first: fx.Node, second: fx.Node) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Places of the same tensors among the operands of two einsums: all, those that steps of a good order contract,
        pairs.
        """
        here, there = self._by_number(first), self._by_number(second)
        if {number: len(places) for number, places in here.items()} == {
            number: len(places) for number, places in there.items()
        }:
            yield tuple(range(len(self.own[first][1]))), tuple(range(len(self.own[second][1])))
        known = type_of(first)
        if not self._with_parts or known is None or known.dtype not in _ANY_ORDER:
            return
        if max(len(self.own[node][1]) for node in (first, second)) > _MOST:
            return
        common = [(place, n) for n, places in here.items() for place in places[: len(there.get(n, ()))]]
        if len(common) > 1:
            yield _matched([place for place, _ in common], [n for _, n in common], there)
        for node, other in ((first, there), (second, here)):
            for step in self._steps(node):
                numbers = [self._number(self.own[node][1][place]) for place in step]
                if all(numbers.count(number) <= len(other.get(number, ())) for number in numbers):
                    mine, theirs = _matched(step, numbers, other)
                    yield (mine, theirs) if node is first else (theirs, mine)
        for (one, n), (two, m) in itertools.combinations(common, 2):
            yield from (((one, two), places) for places in itertools.product(there[n], there[m]) if len({*places}) == 2)

    def _by_number(self, node: fx.Node) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for place, operand in enumerate(self.own[node][1]):
            found.setdefault(self._number(operand), []).append(place)
        return found

    def _steps(self, node: fx.Node) -> Iterator[list[int]]:
        """The operands that each step of the best order has contracted, where they are three or more but not all."""
        spec, operands = self.own[node]
        if len(operands) < 4:
            return
        made = [[place] for place in range(len(operands))]
        for step in make_plan(spec.canonical(), _shapes(operands)).ssa_path[:-1]:
            made.append(sorted(place for number in step for place in made[number]))
        yield from (step for step in reversed(made) if len(step) > 2)

    def _part(self, node: fx.Node, places: Sequence[int]) -> _Part:
        spec, operands = self.own[node]
        rest = spec.output + "".join(term for place, term in enumerate(spec.inputs) if place not in places)
        chosen = [spec.inputs[place] for place in places]
        labels = spec.output if len(places) == len(operands) else "".join(dict.fromkeys("".join(chosen)))
        part = EinsumSpec(tuple(chosen), "".join(label for label in labels if label in rest))
        order, normal = _normal(part, [self._number(operands[place]) for place in places])
        return _Part(node, self.own[node], tuple(places[number] for number in order), normal)

    # -- whether it pays, and may be

    def _gain(self, pair: _Pair) -> float | None:
        """Seconds that it gains to compute the parts once; ``None`` where that does not pay."""
        shapes = _shapes(pair.first.operands)
        shape = pair.first.spec.output_shape(shapes)
        known = type_of(pair.first.node)
        limit = None if self._memory_limit is None or known is None else self._memory_limit // known.dtype.itemsize
        if limit is not None and not pair.wholes and math.prod(shape) > limit:
            return None
        try:
            once = einsum_seconds(pair.first.spec, shapes, limit=limit)
            replaced = 0.0
            for part in pair:
                replaced += einsum_seconds(part.own[0], _shapes(part.own[1]), limit=limit)
                if not part.is_whole:
                    spec, operands = part.rest(pair.first.spec.output)
                    replaced -= einsum_seconds(spec, _shapes(operands, shape), limit=limit)
        except MemoryLimitError:
            return None
        n_copies = 2 if len(pair.wholes) == 2 and keepers(pair.second.node) else 1
        elements = math.prod(shape)
        once += n_copies * walk_seconds(elements, 1, 1, 1, 1, 2 * ITEM * elements)
        # The margin is one on the time that changes.
        return replaced - once if pays(once, replaced, _LEAST) else None

    def _is_allowed(self, pair: _Pair) -> bool:
        follows = may_require_grad(pair.first.node) and any(map(may_require_grad, pair.first.operands))
        for part in pair.wholes:
            kept = keepers(part.node)
            if (kept and follows) or any(keeper.op != "output" for keeper in kept):
                return False
        if pair.model is None or (follows and not lead_to_one_end(self.graph, pair.first.node, pair.second.node)):
            return False
        return not self._saves_more(pair)

    def _saves_more(self, pair: _Pair) -> bool:
        if self._saved_limit is None or not any(may_require_grad(part.node) for part in pair):
            return False
        operands, output = pair.first.operands, pair.first.spec.output
        shapes = _shapes(operands)
        shape = pair.first.spec.output_shape(shapes)
        before: list[Step] = []
        after: list[Step] = [(make_plan(pair.first.spec, shapes), operands, None)]
        for part in pair:
            before.append((written_einsums(part.node, part.own[0]), part.own[1], part.node))
            if not part.is_whole:
                spec, left = part.rest(output)
                after.append((make_plan(spec, _shapes(left, shape)), left, part.node))
        leaves = dict.fromkeys(operand for part in pair for operand in part.own[1])
        # Of what has changed the limit was used before.
        ratio = 1.0 if any(part.node in self.changed for part in pair) else self._saved_limit
        return save_more(ratio, before, after, list(leaves))


class _Write(NamedTuple):
    """Writes what is shared into the graph.

    Attributes:
        einsums: those of the graph.
        storages: numbers for new memory.
    """

    einsums: _Einsums
    storages: Iterator[int]

    def pair(self, pair: _Pair) -> None:
        """Compute two equal parts once."""
        first, second = pair
        model = pair.model
        assert model is not None
        output = model.spec.output
        value = self._value(pair, output)
        if first.is_whole and model is second:
            self._turn(first, second)
        for part in pair:
            if not part.is_whole:
                self._leave_rest(part, value, output)
        if second.is_whole:
            self._put(value, second, output)

    def _value(self, pair: _Pair, output: str) -> fx.Node:
        """The einsum that computes the value where the first of the pair stands."""
        first, second = pair
        if first.is_whole:
            return first.node
        graph = self.einsums.graph
        with graph.inserting_before(first.node):
            spec = EinsumSpec(first.spec.inputs, output)
            value = write_einsum(graph, spec, first.operands, like=first.node, storage=next(self.storages))
        if second.is_whole:
            # That one itself, earlier.
            operands = dict(zip(second.places, first.operands, strict=True))
            value.args = (second.node.args[0], *(operands[place] for place in sorted(operands)))
            value.meta = dict(second.node.meta)
        self._note(value, is_new=True)
        return value

    def _turn(self, part: _Part, model: _Part) -> None:
        """Let the result of a whole einsum, which only einsums see, have dimensions and strides of an equal one."""
        known, wanted = facts(part.node), type_of(model.node)
        assert known is not None and wanted is not None
        spec, operands = part.own
        self._rename(part.node, part.spec.output, model.spec.output)
        part.node.args = (str(EinsumSpec(spec.inputs, part.names(model.spec.output)).canonical()), *operands)
        stamp(part.node, replace(known, type=wanted))
        self._note(part.node)

    def _leave_rest(self, part: _Part, value: fx.Node, output: str) -> None:
        spec, operands = part.rest(output)
        part.node.args = (str(spec.canonical()), *(value if operand is None else operand for operand in operands))
        part.node.kwargs = {}
        part.node.meta.pop(WRITTEN, None)
        self.einsums.changed.add(part.node)
        self._note(part.node)

    def _put(self, value: fx.Node, part: _Part, output: str) -> None:
        """Put ``value``, whose dimensions are ``output``, in the place of a whole einsum."""
        known, given = facts(part.node), facts(value)
        assert known is not None and given is not None
        graph = self.einsums.graph
        if known.storage != given.storage and keepers(part.node):
            # Two results of the user's are never one tensor.
            with graph.inserting_before(part.node):
                value = stamp(graph.call_method("clone", (value,)), known)
        for view in graph.nodes if known.storage != given.storage and not keepers(part.node) else ():
            if (lies := facts(view)) is not None and lies.storage == known.storage:
                stamp(view, replace(lies, storage=given.storage))
        self._rename(part.node, part.spec.output, output)
        users = list(part.node.users)
        part.node.replace_all_uses_with(value)
        for user in users:
            self._note(user)
        del self.einsums.own[part.node]
        graph.erase_node(part.node)

    def _rename(self, node: fx.Node, before: str, after: str) -> None:
        """Let the einsums that use ``node`` find its dimensions, ``before``, in the order ``after``."""
        for user in list(node.users) if before != after else ():
            found = read_einsum(user)
            assert found is not None
            spec, operands = found
            terms = [
                "".join(term[before.index(label)] for label in after) if operand is node else term
                for term, operand in zip(spec.inputs, operands, strict=True)
            ]
            user.args, user.kwargs = (str(EinsumSpec(tuple(terms), spec.output).canonical()), *operands), {}
            self._note(user)

    def _note(self, node: fx.Node, is_new: bool = False) -> None:
        found = read_einsum(node) if is_new or node in self.einsums.own else None
        if found is not None:
            self.einsums.add(node, found)


def _shapes(operands: Sequence[fx.Node | None], value: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Shapes of operands of known types; ``None`` has the shape ``value``."""
    types = [None if operand is None else type_of(operand) for operand in operands]
    return [value if known is None else known.shape for known in types]


def _matched(
    places: Sequence[int], numbers: Sequence[int], other: Mapping[int, Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places, and where another einsum has the same tensors, each number as often as here."""
    found = [other[number][numbers[:count].count(number)] for count, number in enumerate(numbers)]
    return tuple(places), tuple(found)


def _normal(spec: EinsumSpec, numbers: Sequence[int]) -> tuple[tuple[int, ...], EinsumSpec]:
    """An einsum with its operands by number and its labels in order of appearance, the same for equal ones (unless one
    operand enters many times), and the order of the operands that gives it.
    """
    places = sorted(range(len(numbers)), key=numbers.__getitem__)
    groups = [tuple(group) for _, group in itertools.groupby(places, key=numbers.__getitem__)]
    several = math.prod(math.factorial(len(group)) for group in groups) <= _ORDERS
    orders = itertools.product(*map(itertools.permutations, groups)) if several else [tuple(groups)]
    found = []
    for order in orders:
        flat = tuple(place for group in order for place in group)
        normal = EinsumSpec(tuple(spec.inputs[place] for place in flat), spec.output).canonical()
        found.append((normal.inputs, sorted(normal.output), normal.output, flat))
    inputs, _, output, flat = min(found)
    return flat, EinsumSpec(inputs, output)


def _is_for_einsums(node: fx.Node) -> bool:
    """Whether only einsums see how the value lies in memory, and what its dimensions are."""
    found = [read_einsum(user) if is_einsum(user) else None for user in node.users]
    return all(read is not None and not read[0].is_view_only for read in found)
