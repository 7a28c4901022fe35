"""Contraction orders of a network: exact for few operands, good for many, bounded in steps and repeatable."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from .errors import MemoryLimitError
from .labelsets import LabelCount, Network, Path, SavedLimit, bits_of, union_of
from .progress import with_progress

_T = TypeVar("_T")

# Up to this many operands every pairwise order is tried, outer products included: 301 pairs of subsets at 6.
_EXHAUSTIVE = 6
# Operands of the subtrees that are optimized again after a greedy search.
_SUBTREE = 8
# Searches label by label, if the budget allows.
_TRIALS = 32
# The search for an order of more operands than this may take a second.
_LONG = 60
# An order is clearly better than another where it takes this part of its time.
_CLEARLY = 0.8
# Prices that are tried for what autograd saves.
_PRICES = 8


def search(network: Network, limit: float, quick: Callable[[Network], Path]) -> tuple[str, Path]:
    """The best order by the cost model, of those that a bounded search finds.

    Args:
        network: what to contract.
        limit: elements that no intermediate may exceed; the result may.
        quick: another search, whose order is considered where the network is too large for an exact one.

    Returns:
        What found the order, and its pairs.

    Raises:
        MemoryLimitError: no order was found that stays below the limit.
    """
    n = len(network.terms)
    if n == 2:
        return "exhaustive search", ((0, 1),)
    if n <= _EXHAUSTIVE:
        found = exhaustive(network, limit)
        return "exhaustive search", _required(found, limit)
    simple, prefix = _simplify(network)
    candidates: list[tuple[str, Path]] = []
    connected = _connected(simple, limit, _exact_steps(n))
    exact = None if connected is None else connected.order(network.price)
    if exact is not None:
        candidates.append(("dynamic programming", prefix + _shift(exact, prefix, n, len(simple.terms))))
    else:
        rest = Budget(_improving_steps(n))
        for name, path in _shown(_candidates(simple, n, quick), n, "searches to improve orders of {} operands"):
            better = _improve(simple, path, limit, rest)
            candidates.append((name, prefix + _shift(better, prefix, n, len(simple.terms))))
    fitting = [item for item in candidates if network.largest(item[1]) <= limit]
    if not fitting and len(network.terms) <= 12:
        return "exhaustive search", _required(exhaustive(network, limit), limit)
    if not fitting:
        least = min(network.largest(path) for _, path in candidates)
        raise MemoryLimitError(
            f"no order of {n} operands was found whose intermediates have at most {int(limit)} elements; the best has "
            f"one of {least}; raise memory_limit"
        )
    return min(fitting, key=lambda item: network.seconds(item[1]))


def search_saving(network: Network, limit: float, found: dict[Path, str], most: SavedLimit) -> tuple[str, Path]:
    """An order of which autograd saves at most so much; where none is found, one that saves little.

    What is saved gets a price per element, which is raised until the order with the least total saves little enough,
    then lowered as long as that holds. (All that the searches need is that the cost of an order is a sum over its
    steps.)

    Args:
        network: what to contract.
        limit: elements that no intermediate may exceed.
        found: orders from searches without this limit and their names, the best one forward first.
        most: what may be saved.
    """
    found = dict(found)
    forward = next(iter(found))
    path = best_of(network, found, forward)
    if most.saved(network, path) <= most.elements:
        return found[path], path
    if most.order:
        found[most.order] = "eager torch"
    low, high = 0.0, math.inf
    price = network.seconds(path) / max(most.elements, 1)
    search_at = _priced_search(network, path, limit)
    for _ in range(_PRICES):
        if low and high <= 3 * low:
            break
        better = search_at(price)
        if better is not None:
            found.setdefault(better, "search for few saved elements")
        if better is None or most.saved(network, better) > most.elements:
            low = price
            price = price * 8 if high == math.inf else math.sqrt(low * high)
        else:
            high = price
            price = math.sqrt(low * high) if low else price / 8
    allowed = [order for order in found if network.largest(order) <= limit]
    fitting = [order for order in allowed if most.saved(network, order) <= most.elements]
    if fitting:
        best = best_of(network, fitting, forward)
    else:
        best = min(allowed, key=lambda order: (most.saved(network, order), network.seconds(order)))
    return found[best], best


def best_of(network: Network, orders: Iterable[Path], forward: Path) -> Path:
    """The best of some orders by the cost model; ``forward``, if it is among them, unless another is clearly better.

    That is the best order forward. What the layouts of gradients will cost is not known yet, so that small differences
    mean nothing. (Without this, orders as good by the model took up to 1.5 times as long: bilinear_layer, ir_tw.)
    """
    seconds = {order: network.seconds(order) for order in orders}
    best = min(seconds, key=seconds.__getitem__)
    return forward if seconds[best] > _CLEARLY * seconds.get(forward, math.inf) else best


def _priced_search(network: Network, path: Path, limit: float) -> Callable[[float], Path | None]:
    """A function of a price: the best order by cost and price, or one better than ``path``; ``None`` where none keeps
    the limit.
    """
    n = len(network.terms)
    if n <= _EXHAUSTIVE:
        return _all_orders(network, limit).order
    simple, prefix = _simplify(network)
    connected = _connected(simple, limit, _exact_steps(n))

    def order(price: float) -> Path | None:
        exact = None if connected is None else connected.order(price)
        if exact is not None:
            return prefix + _shift(exact, prefix, n, len(simple.terms))
        return _improve(replace(network, price=price), path, limit, Budget(_improving_steps(n) // _PRICES))

    return order


def _required(path: Path | None, limit: float) -> Path:
    if path is None:
        raise MemoryLimitError(f"no order keeps all intermediates within {int(limit)} elements; raise memory_limit")
    return path


class Budget:
    """Steps that a search may still take."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class _Sets:
    """Sets of operands and the pairs that they are made of, to find the best order by dynamic programming.

    Args:
        network: whose operands; its price is not looked at.
        limit: elements that no intermediate may exceed.
        pairs: disjoint sets, as bits, each pair after those that its two are made of.
    """

    def __init__(self, network: Network, limit: float, pairs: Sequence[tuple[int, int]]) -> None:
        self._network, self._limit, self._pairs = network, limit, pairs
        self._holders: dict[int, int] = {}
        for number, term in enumerate(network.terms):
            for bit in bits_of(term):
                self._holders[bit] = self._holders.get(bit, 0) | 1 << number
        self._full = (1 << len(network.terms)) - 1
        self._kept = {1 << number: term for number, term in enumerate(network.terms)}
        self._costs: list[tuple[float, float] | None] = [None] * len(pairs)

    def order(self, price: float) -> Path | None:
        """The best order where so much is to be paid for each element that autograd keeps; ``None`` where none keeps
        the limit.
        """
        best = dict.fromkeys((1 << number for number in range(len(self._network.terms))), 0.0)
        split: dict[int, int] = {}
        costs = self._costs
        for place, (one, two) in enumerate(self._pairs):
            first, second = best.get(one), best.get(two)
            if first is None or second is None:
                continue
            seconds = first + second
            least = best.get(one | two, math.inf)
            if seconds >= least:
                continue
            cost = costs[place]
            if cost is None:
                cost = costs[place] = self._cost(one, two)
            seconds += cost[0] + price * cost[1]
            if seconds < least:
                best[one | two], split[one | two] = seconds, one
        return _path_of_splits(split, self._full, len(self._network.terms)) if self._full in best else None

    def _cost(self, one: int, two: int) -> tuple[float, float]:
        """Seconds of contracting the results of two sets, what autograd keeps; endless where the limit forbids it."""
        whole, network = one | two, self._network
        kept = self._kept.get(whole)
        a, b = self._kept[one], self._kept[two]
        if kept is None:
            summed = sum(bit for bit in bits_of(a & b & ~network.output) if not self._holders[bit] & ~whole)
            kept = self._kept[whole] = (a | b) ^ summed
        if whole != self._full and network.size(kept) > self._limit:
            return math.inf, 0.0
        return network.pair_cost(a, b, kept)


def _exact_steps(n: int) -> int:
    """How many steps an exact search of ``n`` operands may take: 0.6 us each to list the pairs of sets, and 1.3 more to
    choose from them.
    """
    return 25_000 if n <= 10 else 16_000


def _improving_steps(n: int) -> int:
    """How many steps of 1.3 to 3 us it may take to improve orders of ``n`` operands. (Once through all subtrees takes
    up to 1,400 for each operand; the third time changes little.)
    """
    return 6_000 + 800 * n if n <= 16 else 30_000 + 900 * min(n, 250)


def exhaustive(network: Network, limit: float) -> Path | None:
    """The best of all pairwise orders, outer products included; ``None`` where none keeps the limit."""
    return _all_orders(network, limit).order(network.price)


def _all_orders(network: Network, limit: float) -> _Sets:
    n = len(network.terms)
    return _Sets(network, limit, _all_pairs(n) if n <= _EXHAUSTIVE else tuple(_splits(n)))


def _splits(n: int) -> Iterator[tuple[int, int]]:
    """All pairs of disjoint sets, once each: the one with the lowest operand is the first."""
    for subset in range(1, 1 << n):
        rest = other = subset & (subset - 1)
        while other:
            yield subset ^ other, other
            other = (other - 1) & rest


@lru_cache
def _all_pairs(n: int) -> tuple[tuple[int, int], ...]:
    return tuple(_splits(n))


def _path_of_splits(split: dict[int, int], full: int, n: int) -> Path:
    """Steps of a tree given as: which part of a set of operands is its left child."""
    # Not recursive: the tree of a chain is as deep as it is long.
    path: list[tuple[int, ...]] = []
    number: dict[int, int] = {1 << operand: operand for operand in range(n)}
    stack = [full]
    while stack:
        subset = stack[-1]
        if subset in number:
            stack.pop()
            continue
        left = split[subset]
        missing = [part for part in (subset ^ left, left) if part not in number]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        path.append((number[left], number[subset ^ left]))
        number[subset] = n + len(path) - 1
    return tuple(path)


class Connected:
    """The orders of a network without outer products, except those that join its connected parts at the end.

    Args:
        network: the network; its price is not looked at.
        groups: the operands of each connected part.
        parts: for each of them the sets that are connected.
    """

    def __init__(self, network: Network, groups: Sequence[Sequence[int]], parts: Sequence[_Sets]) -> None:
        self._network, self._groups, self._parts = network, groups, parts

    @classmethod
    def of(cls, network: Network, limit: float, budget: Budget) -> Connected | None:
        """The orders of a network; ``None`` where the budget does not suffice for them."""
        groups = _components([term & ~network.marks for term in network.terms])
        parts = []
        for group in groups:
            terms = [network.terms[i] for i in group]
            pairs = _adjacent_pairs([term & ~network.marks for term in terms], budget)
            if pairs is None:
                return None
            part = network.with_terms(terms, network.output & union_of(network.terms, group))
            parts.append(_Sets(part, limit, pairs))
        return cls(network, groups, parts)

    def order(self, price: float) -> Path | None:
        """See ``_Sets.order``; the results of the parts are multiplied smallest first."""
        n = len(self._network.terms)
        path: list[tuple[int, ...]] = []
        roots: list[int] = []
        for group, part in zip(self._groups, self._parts, strict=True):
            inner = part.order(price)
            if inner is None:
                return None
            start = n + len(path)
            path += [tuple(group[i] if i < len(group) else start + i - len(group) for i in step) for step in inner]
            roots.append(n + len(path) - 1 if inner else group[0])
        return tuple(_join(self._network, path, roots))


@lru_cache(maxsize=2)
def _connected(network: Network, limit: float, steps: int) -> Connected | None:
    """``Connected.of``, kept for a moment: with limits on saved memory one network is searched several times."""
    return Connected.of(network, limit, Budget(steps))


def _adjacent_pairs(terms: Sequence[int], budget: Budget) -> list[tuple[int, int]] | None:
    """All pairs of disjoint, connected, adjacent sets of operands, those with small unions first; ``None`` where the
    budget does not suffice. The operands are connected.

    Moerkotte and Neumann, "Analysis of two existing and one new dynamic programming algorithm for the generation of
    optimal bushy join trees without cross products", 2006.
    """
    n = len(terms)
    near = [0] * n
    for i in range(n):
        for j in range(i):
            if terms[i] & terms[j]:
                near[i] |= 1 << j
                near[j] |= 1 << i
    pairs: list[tuple[int, int]] = []

    def around(subset: int, known: int) -> int:
        for bit in bits_of(subset):
            known |= near[bit.bit_length() - 1]
        return known

    def grow(subset: int, reach: int, banned: int) -> Iterator[tuple[int, int]]:
        """Connected sets that contain ``subset`` and nothing banned, with what they touch."""
        stack = [(subset, reach, banned)]
        while stack:
            subset, reach, banned = stack.pop()
            yield subset, reach
            fringe = reach & ~banned & ~subset
            more = fringe
            while more and budget.left > 0:
                stack.append((subset | more, around(more, reach), banned | fringe))
                more = (more - 1) & fringe
                budget.left -= 1

    for first in range(n):
        below = (2 << first) - 1
        for one, reach in grow(1 << first, near[first], below):
            fringe = reach & ~below & ~one
            done = below | one
            for bit in bits_of(fringe):
                start = bit.bit_length() - 1
                # Neighbours of ``one`` with a lower number were the start of their own complements.
                for two, _ in grow(bit, near[start], done | bit):
                    pairs.append((one, two))
                    budget.left -= 1
                    if budget.left < 0:
                        return None
                done |= bit
            if budget.left < 0:
                return None
    pairs.sort(key=lambda pair: (pair[0] | pair[1]).bit_count())
    return pairs


def _components(terms: Sequence[int]) -> list[list[int]]:
    groups: list[tuple[int, list[int]]] = []
    for number, term in enumerate(terms):
        touching = [group for group in groups if group[0] & term]
        mask, members = term, [number]
        for other in touching:
            mask |= other[0]
            members += other[1]
            groups.remove(other)
        groups.append((mask, sorted(members)))
    return sorted(members for _, members in groups)


def _join(network: Network, path: list[tuple[int, ...]], roots: Sequence[int]) -> list[tuple[int, ...]]:
    """Complete a path whose results ``roots`` share no label: the two smallest first."""
    values = list(network.terms) + [result for _, _, result in network.results(tuple(path))]
    heap = [(network.size(values[root]), root) for root in roots]
    heapq.heapify(heap)
    path = list(path)
    while len(heap) > 1:
        (_, one), (_, two) = heapq.heappop(heap), heapq.heappop(heap)
        values.append(values[one] | values[two])
        path.append((one, two))
        heapq.heappush(heap, (network.size(values[-1]), len(values) - 1))
    return path


def _simplify(network: Network) -> tuple[Network, Path]:
    """Multiply scalars onto the smallest operand, and merge operands that have the same labels: what is left to order.

    Returns:
        The smaller network, whose operands are those that the path leaves, in order of their numbers; and the path.
    """
    values: dict[int, int] = dict(enumerate(network.terms))
    path: list[tuple[int, ...]] = []
    count = LabelCount(network.terms, network.output)

    def merge(one: int, two: int) -> int:
        result = count.contract(values.pop(one), values.pop(two))
        path.append((one, two))
        number = len(network.terms) + len(path) - 1
        values[number] = result
        return number

    changed = True
    while changed and len(values) > 1:
        changed = False
        first: dict[int, int] = {}
        for number, followed in list(values.items()):
            term = followed & ~network.follow
            if term in first:
                merge(first.pop(term), number)
                changed = True
            else:
                first[term] = number
        scalar = next((number for number, term in values.items() if not term & ~network.marks), None)
        if scalar is not None and len(values) > 1:
            others = (number for number in values if number != scalar)
            merge(min(others, key=lambda number: network.size(values[number])), scalar)
            changed = True
    order = sorted(values)
    return network.with_terms([values[number] for number in order], network.output), tuple(path)


def _shift(path: Path, prefix: Path, n: int, left: int) -> Path:
    """Renumber a path of what ``prefix`` leaves of ``n`` operands."""
    used = {operand for step in prefix for operand in step}
    names = [number for number in range(n + len(prefix)) if number not in used]
    return tuple(tuple(names[i] if i < left else n + len(prefix) + i - left for i in step) for step in path)


def _candidates(network: Network, seed: int, quick: Callable[[Network], Path]) -> list[tuple[str, Path]]:
    """The best three of many quick searches."""
    ranked = sorted(_quick_orders(network.bare(), seed, quick), key=lambda item: network.seconds(item[1]))
    return ranked[:3]


@lru_cache(maxsize=4)
def _quick_orders(network: Network, seed: int, quick: Callable[[Network], Path]) -> list[tuple[str, Path]]:
    """Orders of many quick searches: the given one; ours, pair by pair with several scores; and ours, label by label
    with several scores, without noise and with some.

    (Kept for a moment, as orders with gradients and without are chosen from the same ones.)
    """
    found = {quick(network): "greedy (opt_einsum)"}
    budget = Budget(2_000 + 300 * min(len(network.terms), 250))
    for score in _SCORES:
        found.setdefault(_greedy(network, score, budget), "greedy")
    for trial in _shown(range(_TRIALS), len(network.terms), "searches for orders of {} operands"):
        if budget.left <= 0:
            break
        # Noise by powers of 2: how much of it helps differs between networks by an order of magnitude.
        noise = random.Random(seed * 1000 + trial) if trial >= len(_LABEL_SCORES) else None
        path = _eliminate(network, _LABEL_SCORES[trial % len(_LABEL_SCORES)], noise, 0.1 * 2 ** (trial % 4), budget)
        found.setdefault(path, "elimination")
    return [(name, path) for path, name in found.items()]


def _shown(items: Sequence[_T], n: int, what: str) -> Iterable[_T]:
    """The steps of a search, with a bar where it may take a second."""
    return with_progress(items, len(items), what.format(n)) if n > _LONG else items


def _log(size: float) -> float:
    return math.log(size) if size else 0.0


_Score = Callable[[float, float, float], float]

# Score of a pair from the sizes of its result and of its operands; the lowest is contracted first.
_SCORES: tuple[_Score, ...] = (
    lambda result, a, b: result - a - b,
    lambda result, a, b: _log(result) - _log(a + b),
    lambda result, a, b: _log(result) - 0.5 * _log(a * b),
)


def _greedy(network: Network, score: _Score, budget: Budget) -> Path:
    """Contract the pair with the lowest score until one tensor is left."""
    terms = dict(enumerate(network.terms))
    holders = _holders(terms)
    count = LabelCount(network.terms, network.output)
    size = network.size
    heap: list[tuple[float, int, int]] = []

    def push(one: int, two: int) -> None:
        a, b = terms[one], terms[two]
        heapq.heappush(heap, (score(size(count.peek(a, b)), size(a), size(b)), one, two))
        budget.left -= 1

    for number, term in terms.items():
        for other in {other: None for bit in bits_of(term) for other in holders[bit] if other > number}:
            push(number, other)
    path: list[tuple[int, ...]] = []
    while heap:
        _, one, two = heapq.heappop(heap)
        if one not in terms or two not in terms:
            continue
        result = count.contract(terms[one], terms[two])
        partners = {other: None for bit in bits_of(result) for other in holders[bit] if other not in (one, two)}
        new = len(network.terms) + len(path)
        path.append((one, two))
        _replace(terms, holders, (one, two), new, result)
        for other in partners:
            push(other, new)
    return tuple(_join(network, path, list(terms)))


def _holders(terms: dict[int, int]) -> dict[int, dict[int, None]]:
    """For each label the tensors that have it."""
    holders: dict[int, dict[int, None]] = {}
    for number, term in terms.items():
        for bit in bits_of(term):
            holders.setdefault(bit, {})[number] = None
    return holders


def _replace(
    terms: dict[int, int], holders: dict[int, dict[int, None]], pair: tuple[int, int], new: int, result: int
) -> None:
    """Put the result of a contraction in place of its operands."""
    for number in pair:
        for bit in bits_of(terms.pop(number)):
            del holders[bit][number]
    terms[new] = result
    for bit in bits_of(result):
        holders[bit][new] = None


_LabelScore = Callable[[float, float, float, float, int], float]

# Score of a label from sizes: of the union of the tensors that have it, of that without the label, of all of them
# together, of the label; and their number. The label with the lowest score is summed first.
_LABEL_SCORES: tuple[_LabelScore, ...] = (
    lambda union, result, parts, label, number: _log(result),
    lambda union, result, parts, label, number: _log(union) - _log(parts),
    lambda union, result, parts, label, number: _log(result) - 0.5 * number * _log(label),
    lambda union, result, parts, label, number: _log(union),
)


def _eliminate(network: Network, score: _LabelScore, noise: random.Random | None, scale: float, budget: Budget) -> Path:
    """Contract all tensors that have the label with the lowest score, the smallest ones first, until every label that
    is summed has been; then what is left. Much better than pair by pair where labels are in many tensors.
    """
    terms = dict(enumerate(network.terms))
    holders = _holders(terms)
    count = LabelCount(network.terms, network.output)
    size = network.size
    path: list[tuple[int, ...]] = []

    def rate(bit: int) -> float:
        budget.left -= 1
        union, parts = 0, 0
        for number in holders[bit]:
            union |= terms[number]
            parts += size(terms[number])
        value = score(size(union), size(union & ~bit), parts, size(bit), len(holders[bit]))
        # Gumbel noise: the chance of a label to come first falls exponentially with its score.
        return value if noise is None else value + scale * math.log(-math.log(noise.random() or 0.5))

    ratings = {bit: rate(bit) for bit in holders if not bit & network.output}
    while ratings:
        chosen = min(ratings, key=lambda bit: (ratings[bit], bit))
        heap = [(size(terms[number]), number) for number in holders[chosen]]
        heapq.heapify(heap)
        touched = 0
        while len(heap) > 1:
            (_, one), (_, two) = heapq.heappop(heap), heapq.heappop(heap)
            touched |= terms[one] | terms[two]
            result = count.contract(terms[one], terms[two])
            new = len(network.terms) + len(path)
            path.append((one, two))
            _replace(terms, holders, (one, two), new, result)
            heapq.heappush(heap, (size(result), new))
        del ratings[chosen]
        for bit in bits_of(touched):
            if bit in ratings:
                if holders[bit]:
                    ratings[bit] = rate(bit)
                else:
                    del ratings[bit]
    rest = network.with_terms(list(terms.values()), network.output)
    numbers = list(terms)
    for left, right in _greedy(rest, _SCORES[0], budget):
        path.append((numbers[left], numbers[right]))
        numbers.append(len(network.terms) + len(path) - 1)
    return tuple(path)


def _improve(network: Network, path: Path, limit: float, budget: Budget) -> Path:
    """Solve small subtrees of a contraction tree exactly, again and again, until nothing gets better."""
    n = len(network.terms)
    children = {n + number: step for number, step in enumerate(path)}
    labels = dict(enumerate(network.terms))
    labels |= {n + number: result for number, (_, _, result) in enumerate(network.results(path))}
    root, fresh = n + len(path) - 1, n + len(path)
    better = True
    while better and budget.left > 0:
        better = False
        for top in _postorder(children, root):
            if budget.left <= 0:
                break
            leaves: list[int] = [top]
            inside: list[int] = []
            while len(leaves) < _SUBTREE:
                open_ = [leaf for leaf in leaves if leaf in children]
                if not open_:
                    break
                widest = max(open_, key=lambda leaf: (network.size(labels[leaf]), leaf)) if inside else top
                inside.append(widest)
                leaves.remove(widest)
                leaves += children[widest]
            if len(leaves) < 3:
                continue
            before = 0.0
            for node in inside:
                left, right = children[node]
                before += network.pair(labels[left], labels[right], labels[node])
            part = network.with_terms([labels[leaf] for leaf in leaves], labels[top])
            if len(leaves) <= 5:
                budget.left -= 3 ** len(leaves) // 2
                inner = exhaustive(part, limit)
            else:
                exact = Budget(4_000)
                connected = Connected.of(part, limit, exact)
                inner = None if connected is None else connected.order(part.price)
                budget.left -= 4_000 - exact.left + 16 * len(leaves)
            if inner is None or part.seconds(inner) >= before * (1 - 1e-9):
                continue
            better = True
            for node in inside:
                del children[node]
            names = list(leaves)
            for number, (step, (_, _, result)) in enumerate(zip(inner, part.results(inner), strict=True)):
                last = number == len(inner) - 1
                node = top if last else fresh
                fresh += not last
                children[node] = tuple(names[i] for i in step)
                labels[node] = result
                names.append(node)
    numbers = {i: i for i in range(n)}
    final: list[tuple[int, ...]] = []
    for node in _postorder(children, root):
        final.append(tuple(numbers[child] for child in children[node]))
        numbers[node] = n + len(final) - 1
    return tuple(final)


def _postorder(children: dict[int, tuple[int, ...]], root: int) -> list[int]:
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        if node in children:
            order.append(node)
            stack += children[node]
    return order[::-1]
