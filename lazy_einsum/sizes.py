"""``SymbolicSize``: a size that is known for one call, with the expression that gives it for every call."""

from __future__ import annotations

from typing import Any, TypeGuard

Factors = tuple[tuple[str, int], ...]
"""Atoms and their powers, in alphabetical order. An atom is a symbol (``s0``) or an expression in brackets."""


class SymbolicSize(int):
    """A size, or a product of sizes, of which only an example is known: code made with it holds for other values too.

    It is an ``int``, the example, so that whatever compares, sorts or prices sizes goes on as it does with numbers. But
    it multiplies as an expression, and equals only what is equal for every value: what is decided by ``==`` is proved,
    what is decided by ``<`` is a guess. Sums and quotients are plain numbers, good for prices, and not for code.

    Args:
        example: the value in the call at hand.
        coefficient: a number that divides it.
        factors: see ``Factors``; not empty.

    >>> rows = SymbolicSize.symbol("s0", 50)
    >>> rows * 3, 3 * rows == rows * 3, rows * 3 == 150, rows * 3 < 151
    (3*s0, True, False, True)
    """

    coefficient: int
    factors: Factors

    def __new__(cls, example: int, coefficient: int, factors: Factors) -> SymbolicSize:
        """See the class."""
        size = super().__new__(cls, example)
        size.coefficient = coefficient
        size.factors = factors
        return size

    @classmethod
    def symbol(cls, name: str, example: int) -> SymbolicSize:
        """The symbol ``name``, or another atom."""
        return cls(example, 1, ((name, 1),))

    @property
    def text(self) -> str:
        """A Python expression in the symbols.

        >>> (SymbolicSize.symbol("s1", 2) * SymbolicSize.symbol("s0", 3) * 4).text
        '4*s0*s1'
        """
        parts = [atom if power == 1 else f"{atom}**{power}" for atom, power in self.factors]
        return "*".join([str(self.coefficient)] * (self.coefficient != 1) + parts)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, SymbolicSize):
            powers = dict(self.factors)
            for atom, power in other.factors:
                powers[atom] = powers.get(atom, 0) + power
            factors = tuple(sorted(powers.items()))
            return SymbolicSize(int(self) * int(other), self.coefficient * other.coefficient, factors)
        if type(other) is int:
            if other == 1:
                return self
            return SymbolicSize(int(self) * other, self.coefficient * other, self.factors) if other else 0
        return int(self) * other

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        # The example too, as equal things have to have one hash.
        return (
            isinstance(other, SymbolicSize)
            and int(self) == int(other)
            and self.coefficient == other.coefficient
            and self.factors == other.factors
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return SymbolicSize, (int(self), self.coefficient, self.factors)


def is_symbolic(size: object) -> TypeGuard[SymbolicSize]:
    """Whether a size is known for one call only.

    >>> is_symbolic(3), is_symbolic(SymbolicSize.symbol("s0", 3))
    (False, True)
    """
    return type(size) is SymbolicSize
