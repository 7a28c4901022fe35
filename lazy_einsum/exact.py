"""Exact searches: the best order of all, or of those that multiply no operands without a common label."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

from .labelsets import Network, Path, bits_of, union_of

EXHAUSTIVE = 6
"""Up to this many operands every pairwise order is tried, outer products included: 301 pairs of subsets at 6."""


class Budget:
    """Steps that a search may still take."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Sets:
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


def exhaustive(network: Network, limit: float) -> Path | None:
    """The best of all pairwise orders, outer products included; ``None`` where none keeps the limit."""
    return all_orders(network, limit).order(network.price)


def all_orders(network: Network, limit: float) -> Sets:
    """All pairwise orders of a network, to choose from at any price."""
    n = len(network.terms)
    return Sets(network, limit, _all_pairs(n) if n <= EXHAUSTIVE else tuple(_splits(n)))


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

    def __init__(self, network: Network, groups: Sequence[Sequence[int]], parts: Sequence[Sets]) -> None:
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
            parts.append(Sets(part, limit, pairs))
        return cls(network, groups, parts)

    def order(self, price: float) -> Path | None:
        """See ``Sets.order``; the results of the parts are multiplied smallest first."""
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
        return tuple(join(self._network, path, roots))


@lru_cache(maxsize=2)
def connected(network: Network, limit: float, steps: int) -> Connected | None:
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


def join(network: Network, path: list[tuple[int, ...]], roots: Sequence[int]) -> list[tuple[int, ...]]:
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
