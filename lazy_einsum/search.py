"""Contraction orders of a network: exact for few operands, good for many, bounded in steps and repeatable."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from .errors import MemoryLimitError
from .exact import EXHAUSTIVE, Budget, Connected, all_orders, connected, exhaustive, join
from .labelsets import LabelCount, Network, Path, SavedLimit, bits_of
from .progress import with_progress

_T = TypeVar("_T")

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
    if n <= EXHAUSTIVE:
        found = exhaustive(network, limit)
        return "exhaustive search", _required(found, limit)
    simple, prefix = _simplify(network)
    candidates: list[tuple[str, Path]] = []
    exactly = connected(simple, limit, _exact_steps(n))
    exact = None if exactly is None else exactly.order(network.price)
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
    if n <= EXHAUSTIVE:
        return all_orders(network, limit).order
    simple, prefix = _simplify(network)
    exactly = connected(simple, limit, _exact_steps(n))

    def order(price: float) -> Path | None:
        exact = None if exactly is None else exactly.order(price)
        if exact is not None:
            return prefix + _shift(exact, prefix, n, len(simple.terms))
        return _improve(replace(network, price=price), path, limit, Budget(_improving_steps(n) // _PRICES))

    return order


def _required(path: Path | None, limit: float) -> Path:
    if path is None:
        raise MemoryLimitError(f"no order keeps all intermediates within {int(limit)} elements; raise memory_limit")
    return path


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
    return tuple(join(network, path, list(terms)))


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
                orders = Connected.of(part, limit, exact)
                inner = None if orders is None else orders.order(part.price)
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
