"""Networks as path finders see them: labels are bits, an operand is an integer, and an order is a list of pairs.

A network is normalised, as no path finder does it itself: diagonals are taken, labels of size 1 and labels that only
one operand has are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .cost import gradient_seconds, pair_seconds
from .spec import EinsumSpec

Path = tuple[tuple[int, ...], ...]
"""Steps of a contraction: what each consumes. Operands are numbered from 0, results of steps follow."""

# In parts of what it takes, what a contraction of frozen operands counts: it is computed once. Not nothing, so that of
# two orders that are as fast from then on the one is taken that starts faster.
_FOLDED = 1e-4


@dataclass(frozen=True, slots=True)
class Network:
    """An einsum as path finders see it: labels are bits; each term is a set of them.

    Attributes:
        terms: labels of each operand, without those of size 1 there and those that neither another operand nor the
            result has.
        output: labels of the result.
        labels: the label of each bit.
        sizes: its size.
        tables: for each 8 bits the product of sizes of each set of them.
        memo: product of sizes of sets that were asked for.
        follow: a bit beside those of the labels, of size 1, that the result has and the terms that autograd follows,
            whose gradients cost time too; 0 where it follows none.
        price: seconds that a contraction costs for each element that autograd keeps of it.
        live: another such bit, which the result has and the terms that are not frozen; 0 where none is frozen.
    """

    terms: tuple[int, ...]
    output: int
    labels: str
    sizes: tuple[int, ...]
    tables: tuple[list[int], ...] = field(repr=False, compare=False)
    memo: dict[int, int] = field(repr=False, compare=False)
    follow: int = 0
    price: float = 0.0
    live: int = 0

    @classmethod
    def of(cls, spec: EinsumSpec, shapes: Sequence[Sequence[int]], sizes: dict[str, int], generic: bool) -> Network:
        """The network of an einsum.

        Args:
            spec: the einsum.
            shapes: shape of each operand.
            sizes: size of each label.
            generic: labels of size 1 count too, as the sizes stand for others.
        """
        labels = "".join(label for label, size in sizes.items() if size != 1 or generic)
        bits = {label: 1 << number for number, label in enumerate(labels)}
        output = sum(bits.get(label, 0) for label in spec.output)
        once, more, raw = 0, output, []
        for term, shape in zip(spec.inputs, shapes, strict=True):
            mask = 0
            for label, size in zip(term, shape, strict=True):
                if size != 1 or generic:
                    mask |= bits[label]
            raw.append(mask)
            more |= once & mask
            once |= mask
        sizes_of = tuple(sizes[label] for label in labels)
        return cls(tuple(mask & more for mask in raw), output & once, labels, sizes_of, _tables(sizes_of), {})

    def size(self, mask: int) -> int:
        """Number of elements of a tensor with these labels."""
        known = self.memo.get(mask)
        if known is None:
            # (Label by label it took most of the time of planning 200 operands.)
            places = mask.to_bytes(len(self.tables), "little")
            known = self.memo[mask] = math.prod(map(list.__getitem__, self.tables, places))
        return known

    def pair(self, a: int, b: int, result: int) -> float:
        """Seconds of a contraction of the terms ``a`` and ``b`` to ``result``, with the price of what is kept of it."""
        seconds, kept = self.pair_cost(a, b, result)
        return seconds + self.price * kept

    def pair_cost(self, a: int, b: int, result: int) -> tuple[float, float]:
        """Seconds of such a contraction, and how many elements autograd keeps of it."""
        size, common = self.size, a & b
        batch, m, n, k = size(common & result), size(a & ~common), size(b & ~common), size(common & ~result)
        seconds = pair_seconds(batch, m, n, k)
        if a & self.follow:
            seconds += gradient_seconds(batch, m, n, k)
        if b & self.follow:
            seconds += gradient_seconds(batch, n, m, k)
        # Each operand is kept for the gradient of the other.
        kept: float = (size(a) if b & self.follow else 0) + (size(b) if a & self.follow else 0)
        if self.live and not (a | b) & self.live:
            return seconds * _FOLDED, kept * _FOLDED
        return seconds, kept

    def results(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """For each step of a path of pairs: its two terms and its result."""
        values = list(self.terms)
        seen = LabelCount(self.terms, self.output)
        for left, right in path:
            a, b = values[left], values[right]
            result = seen.contract(a, b)
            values.append(result)
            yield a, b, result

    def seconds(self, path: Path) -> float:
        """What the cost model expects of a path of pairs."""
        return sum(self.pair(*step) for step in self.results(path))

    def largest(self, path: Path) -> int:
        """Elements of the largest intermediate, the result apart."""
        return max((self.size(result) for _, _, result in list(self.results(path))[:-1]), default=0)

    def with_terms(self, terms: Sequence[int], output: int) -> Network:
        """Another network of the same labels."""
        return replace(self, terms=tuple(terms), output=output)

    def folding(self, frozen: Sequence[bool]) -> Network:
        """The same network, the pairs of what comes from frozen terms only costing next to nothing.

        Args:
            frozen: for each term whether it is frozen.
        """
        return self._marked("live", 1 << len(self.labels), [not fixed for fixed in frozen]) if any(frozen) else self

    @property
    def marks(self) -> int:
        """The bits that stand for no label."""
        return self.follow | self.live

    def following(self, follows: Sequence[bool]) -> Network:
        """The same network with the backward pass.

        Args:
            follows: for each term whether autograd follows it.
        """
        return self._marked("follow", 2 << len(self.labels), follows) if any(follows) else self

    def _marked(self, mark: str, bit: int, chosen: Sequence[bool]) -> Network:
        terms = tuple(term | bit * has for term, has in zip(self.terms, chosen, strict=True))
        return replace(self, terms=terms, output=self.output | bit, **{mark: bit})  # type: ignore[arg-type]

    def bare(self) -> Network:
        """The network of the labels alone: without the backward pass, and with nothing frozen."""
        if not self.marks:
            return self
        terms = tuple(term & ~self.marks for term in self.terms)
        return replace(self, terms=terms, output=self.output & ~self.marks, follow=0, live=0, price=0.0)


def _tables(sizes: Sequence[int]) -> tuple[list[int], ...]:
    """Products of sizes for ``Network.size``; two more bits are marks, of size 1."""
    padded = (*sizes, 1, 1)
    tables = []
    for start in range(0, len(padded), 8):
        table = [1]
        for size in padded[start : start + 8]:
            table += [size * known for known in table]
        tables.append(table)
    return tuple(tables)


class LabelCount:
    """How many of the remaining tensors, the result among them, have each label: it tells what may be summed."""

    __slots__ = ("count", "last")

    def __init__(self, terms: Sequence[int], output: int) -> None:
        count: dict[int, int] = {}
        for mask in (*terms, output):
            for bit in bits_of(mask):
                count[bit] = count.get(bit, 0) + 1
        self.count = count
        #: Labels that exactly two tensors have: contracting those two sums them.
        self.last = sum(bit for bit, number in count.items() if number == 2)

    def peek(self, a: int, b: int) -> int:
        """Labels of the contraction of ``a`` and ``b``."""
        return (a | b) & ~(a & b & self.last)

    def contract(self, a: int, b: int) -> int:
        """The same, and count the result in place of ``a`` and ``b``."""
        result = self.peek(a, b)
        for bit in bits_of(a & b & result):
            self.count[bit] -= 1
            if self.count[bit] == 2:
                self.last |= bit
        return result


def bits_of(mask: int) -> Iterator[int]:
    """The labels of a set, one by one."""
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


@dataclass(frozen=True, slots=True)
class SavedLimit:
    """How much of a network autograd may save for the backward pass.

    Attributes:
        follows: for each operand whether autograd follows it.
        sizes: how many elements are saved where an operand is.
        memory: names of the memory of operands: what is in one memory is saved once.
        elements: at most so many may be saved.
        order: pairs of an order that is known to save few: that of eager torch.
    """

    follows: tuple[bool, ...]
    sizes: tuple[int, ...]
    memory: tuple[object, ...]
    elements: float = math.inf
    order: Path = ()

    def saved(self, network: Network, path: Path) -> int:
        """Elements that autograd saves of a path of pairs: each operand of a step whose other operand it follows, and
        all that is used later is an operand of one step.
        """
        n = len(self.sizes)
        sizes, follows = list(self.sizes), list(self.follows)
        operands: dict[object, int] = {}
        total = 0
        for (left, right), (_, _, result) in zip(path, network.results(path), strict=True):
            for one, other in ((left, right), (right, left)):
                if not follows[other]:
                    continue
                if one < n:
                    memory = self.memory[one]
                    operands[memory] = max(operands.get(memory, 0), sizes[one])
                else:
                    total += sizes[one]
            sizes.append(network.size(result))
            follows.append(follows[left] or follows[right])
        return total + sum(operands.values())


def union_of(terms: Sequence[int], group: Sequence[int]) -> int:
    """All labels of the members of a group."""
    mask = 0
    for member in group:
        mask |= terms[member]
    return mask
