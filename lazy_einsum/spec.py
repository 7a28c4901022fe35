"""``EinsumSpec``: what an einsum computes, as algebra on labels: parse, print, rename, inline, sizes. No tensors."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .errors import EquationError

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_RESERVED = frozenset(" ,.->")


def symbol(index: int) -> str:
    """Label number ``index``: a to z, A to Z, then from code point 192 on, as ``opt_einsum.get_symbol`` has them.

    >>> symbol(0), symbol(51), symbol(52)
    ('a', 'Z', 'À')
    """
    if index < 52:
        return _LETTERS[index]
    # Code points 0xD800 to 0xDFFF are surrogates, which no text can hold alone.
    return chr(index + 140) if index + 140 < 0xD800 else chr(index + 140 + 0x800)


def fresh_symbols(used: Iterable[str]) -> Iterator[str]:
    """Labels that are not in ``used``, lowest number first."""
    taken = set(used)
    return (label for label in map(symbol, itertools.count()) if label not in taken)


@dataclass(frozen=True, slots=True)
class EinsumSpec:
    """The labels of an einsum's operands and of its result. Each character is one label; equal characters are the same.

    A label of size 1 broadcasts against a larger size of the same label in another operand, as in ``torch.einsum``.

    Attributes:
        inputs: labels of each operand.
        output: labels of the result, each at most once, each in some operand.

    >>> str(EinsumSpec(("ij", "jk"), "ik"))
    'ij,jk->ik'
    """

    inputs: tuple[str, ...]
    output: str

    @classmethod
    def parse(cls, equation: str, ranks: Sequence[int]) -> EinsumSpec:
        """Read an equation in any form that ``torch.einsum`` takes, and with any number of labels.

        Spaces are ignored. Without ``->`` the output is the ellipsis and the labels that appear once, in the order of
        their code points (capitals first). ``...`` becomes labels of its own, aligned from the right over the operands;
        without ``...`` in the output its dimensions are summed.

        Args:
            equation: the text.
            ranks: number of dimensions of each operand.

        Raises:
            EquationError: the text is malformed or does not fit the ranks.

        >>> str(EinsumSpec.parse("...ij, ...jk", [3, 2]))
        'aij,jk->aik'
        """
        return _parse(equation, tuple(ranks))

    @classmethod
    def from_sublists(
        cls, sublists: Sequence[Sequence[object]], output: Sequence[object] | None, ranks: Sequence[int]
    ) -> EinsumSpec:
        """Read the form with lists of integers: ``einsum(a, [0, 1], b, [1, 2], [0, 2])``.

        Args:
            sublists: for each operand its labels, integers from 0 up or ``Ellipsis``.
            output: labels of the result, ``None`` for the implicit output.
            ranks: number of dimensions of each operand.

        Raises:
            EquationError: an item is neither, or the lists do not fit the ranks.

        >>> str(EinsumSpec.from_sublists([[0, 1], [1, 2]], None, [2, 2]))
        'AB,BC->AC'
        """
        terms = [_sublist_term(items, f"the subscripts of operand {number}") for number, items in enumerate(sublists)]
        target = None if output is None else _sublist_term(output, "the output subscripts")
        shown = ", ".join(map(_shown, sublists)) + ("" if output is None else f" -> {_shown(output)}")
        return _resolve(terms, target, tuple(ranks), shown)

    def __str__(self) -> str:
        return f"{','.join(self.inputs)}->{self.output}"

    @property
    def labels(self) -> str:
        """All labels, in order of first appearance in the operands."""
        return "".join(dict.fromkeys("".join(self.inputs)))

    @property
    def n_labels(self) -> int:
        """Number of different labels."""
        return len(set("".join(self.inputs)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Number of dimensions of each operand."""
        return tuple(map(len, self.inputs))

    @property
    def summed(self) -> str:
        """Labels that are summed, in order of first appearance."""
        return "".join(label for label in self.labels if label not in self.output)

    def lone(self, shapes: Sequence[Sequence[int]]) -> str:
        """Summed labels that a single operand has with another size than 1, in order of first appearance.

        They can be summed before anything else, and ``torch.einsum`` does so, which makes small integers to int64.

        >>> EinsumSpec(("ab", "bc"), "c").lone([(2, 3), (3, 4)])
        'a'
        """
        holders = [
            {label for label, size in zip(term, shape, strict=True) if size != 1}
            for term, shape in zip(self.inputs, shapes, strict=True)
        ]
        return "".join(label for label in self.summed if sum(label in own for own in holders) == 1)

    @property
    def is_view_only(self) -> bool:
        """Whether the result is a view of the operand: one operand, of which nothing is summed."""
        return len(self.inputs) == 1 and set(self.inputs[0]) == set(self.output)

    @property
    def is_permutation(self) -> bool:
        """Whether the result is the one operand with its dimensions in some order."""
        return self.is_view_only and len(self.inputs[0]) == len(self.output)

    def rename(self, change: Callable[[str], str]) -> EinsumSpec:
        """The same einsum with each label replaced by ``change(label)``, one character that is different for each.

        >>> str(EinsumSpec(("ij",), "ji").rename(str.upper))
        'IJ->JI'
        """
        return EinsumSpec(tuple("".join(map(change, term)) for term in self.inputs), "".join(map(change, self.output)))

    def canonical(self) -> EinsumSpec:
        """The same einsum with the labels a, b, c, ... in order of first appearance.

        Specs that differ in the names of labels only become equal.

        >>> str(EinsumSpec(("zij", "zjk", "zk"), "zi").canonical())
        'abc,acd,ad->ab'
        """
        names = {label: symbol(number) for number, label in enumerate(self.labels)}
        return self.rename(names.__getitem__)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Size of each label, in order of first appearance; 1 only where all operands have 1.

        Args:
            shapes: shape of each operand.

        Raises:
            EquationError: the number of operands or dimensions differs, two sizes of a label do not broadcast, or a
                label that is repeated in one operand has two sizes there.

        >>> EinsumSpec(("ij", "jk"), "ik").sizes([(2, 3), (1, 4)])
        {'i': 2, 'j': 3, 'k': 4}
        """
        if len(shapes) != len(self.inputs):
            raise EquationError(
                f"einsum {self}: {len(shapes)} operands were given, expected {len(self.inputs)}; pass one operand for "
                "each term of the equation"
            )
        sizes: dict[str, int] = {}
        origin: dict[str, int] = {}
        for number, (term, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
            if len(term) != len(shape):
                raise EquationError(
                    f"einsum {self}: operand {number} has shape {tuple(shape)}, expected {len(term)} dimensions for "
                    f"its labels {term!r}"
                )
            own: dict[str, int] = {}
            for label, size in zip(term, shape, strict=True):
                # By value: of two symbolic sizes the trace has made a condition that they are equal.
                if int(own.setdefault(label, size)) != int(size):
                    raise EquationError(
                        f"einsum {self}: label {label!r} is repeated in operand {number} with sizes {own[label]} "
                        f"and {size}; expected equal sizes, as only a diagonal can be taken"
                    )
                if sizes.get(label, 1) == 1:
                    sizes[label], origin[label] = size, number
                elif size != 1 and int(size) != int(sizes[label]):
                    raise EquationError(
                        f"einsum {self}: label {label!r} has size {size} in operand {number}, but {sizes[label]} in "
                        f"operand {origin[label]}; expected equal sizes, or 1 to broadcast"
                    )
        return sizes

    def output_shape(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Shape of the result for operands of these shapes; raises as ``sizes`` does.

        >>> EinsumSpec(("ij", "jk"), "ki").output_shape([(2, 3), (3, 4)])
        (4, 2)
        """
        sizes = self.sizes(shapes)
        return tuple(sizes[label] for label in self.output)

    def inline(self, position: int, inner: EinsumSpec) -> EinsumSpec:
        """The einsum in which operand ``position`` is replaced by the operands of ``inner``, of which it is the result.

        Labels that ``inner`` sums get new names. Where this einsum repeats a label in that operand (takes a diagonal),
        the inner labels at those places become one. Then, and only then, the operands of ``inner`` must not broadcast
        in those labels, else the fused einsum has a label with two sizes in one operand: ``sizes`` of the result
        raises, and the einsums can't be fused.

        Raises:
            EquationError: the operand and the result of ``inner`` have different numbers of dimensions.

        >>> str(EinsumSpec(("ab", "bc"), "ac").inline(0, EinsumSpec(("xy", "yz"), "xz")))
        'ad,db,bc->ac'
        """
        term = self.inputs[position]
        if len(term) != len(inner.output):
            raise EquationError(
                f"einsum {self}: operand {position} has labels {term!r}, but the inner einsum {inner} gives "
                f"{len(inner.output)} dimensions; expected {len(term)}"
            )
        names = dict(zip(inner.output, term, strict=True))
        free = fresh_symbols("".join(self.inputs))
        for label in inner.labels:
            if label not in names:
                names[label] = next(free)
        renamed = inner.rename(names.__getitem__).inputs
        return EinsumSpec((*self.inputs[:position], *renamed, *self.inputs[position + 1 :]), self.output)


@lru_cache(maxsize=4096)
def _parse(equation: str, ranks: tuple[int, ...]) -> EinsumSpec:
    left, arrow, right = equation.partition("->")
    terms = [_text_term(text, equation, f"operand {number}") for number, text in enumerate(left.split(","))]
    target = _text_term(right, equation, "the output") if arrow else None
    return _resolve(terms, target, ranks, repr(equation))


# A term between reading and resolving: labels before the ellipsis, labels after it (None without an ellipsis).
_Term = tuple[str, str | None]


def _text_term(text: str, equation: str, where: str) -> _Term:
    # Spaces go first, except that torch does not take an ellipsis with spaces inside.
    parts = [part.replace(" ", "") for part in text.split("...")]
    if len(parts) > 2:
        raise EquationError(f"einsum {equation!r}: {where} has {len(parts) - 1} ellipses; expected at most one")
    for label in "".join(parts):
        if label in _RESERVED or label.isspace() or (label.isascii() and not label.isalpha()):
            raise EquationError(
                f"einsum {equation!r}: {label!r} in {where} is not a label; expected letters, ',' between operands, at "
                "most one '...' per operand and at most one '->' before the output"
            )
    return parts[0], parts[1] if len(parts) == 2 else None


def _sublist_term(items: Sequence[object], where: str) -> _Term:
    before, after = "", None
    for item in items:
        if item is Ellipsis:
            if after is not None:
                raise EquationError(f"einsum: {where} have two ellipses; expected at most one")
            after = ""
            continue
        try:
            number = operator.index(item)  # type: ignore[arg-type]
        except TypeError:
            number = -1
        if number < 0:
            raise EquationError(f"einsum: {item!r} in {where} is not a label; expected integers from 0 up, or Ellipsis")
        if after is None:
            before += _sublist_label(number)
        else:
            after += _sublist_label(number)
    return before, after


def _sublist_label(number: int) -> str:
    # The order of the code points must be that of the integers, because an implicit output sorts its labels.
    return chr(ord("A") + number) if number < 26 else symbol(number - 26) if number < 52 else symbol(number)


def _shown(items: Sequence[object]) -> str:
    return f"[{', '.join('...' if item is Ellipsis else str(item) for item in items)}]"


def _resolve(terms: Sequence[_Term], target: _Term | None, ranks: tuple[int, ...], shown: str) -> EinsumSpec:
    """Replace ellipses by labels and find the output."""
    if len(terms) != len(ranks):
        raise EquationError(
            f"einsum {shown}: {len(ranks)} operands were given, expected {len(terms)}; pass one operand for each term "
            "of the equation"
        )
    width = 0
    for number, ((before, after), rank) in enumerate(zip(terms, ranks, strict=True)):
        named = len(before) + len(after or "")
        if rank < named or (after is None and rank > named):
            raise EquationError(
                f"einsum {shown}: operand {number} has {rank} dimensions, expected {named}"
                f"{'' if after is None else ' or more'} for its labels "
                f"{before + ('' if after is None else '...' + after)!r}"
            )
        if after is not None:
            width = max(width, rank - named)
    everything = [before + (after or "") for before, after in terms]
    # The output's labels are taken too: one of them that no operand has must not become a label of the ellipsis.
    taken = "".join(everything) + ("" if target is None else target[0] + (target[1] or ""))
    dots = "".join(itertools.islice(fresh_symbols(taken), width))
    inputs = tuple(
        before if after is None else before + dots[width - (rank - len(before) - len(after)) :] + after
        for (before, after), rank in zip(terms, ranks, strict=True)
    )
    if target is None:
        text = "".join(everything)
        return EinsumSpec(inputs, dots + "".join(sorted(label for label in set(text) if text.count(label) == 1)))
    output = target[0] if target[1] is None else target[0] + dots + target[1]
    known = set("".join(inputs))
    for label in output:
        if label not in known:
            raise EquationError(
                f"einsum {shown}: output label {label!r} is in no operand; expected only labels of the operands"
            )
        if output.count(label) > 1:
            raise EquationError(
                f"einsum {shown}: output label {label!r} appears more than once in the output; expected at most once"
            )
    return EinsumSpec(inputs, output)
