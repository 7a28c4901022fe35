"""``Dimensions``: the sizes that the dimensions of values fall into, where calls of a graph reshape them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from .graph import facts, type_of
from .products import Product, read_product, spellings
from .sizes import SymbolicSize, is_symbolic
from .spec import EinsumSpec, fresh_symbols, symbol

_RESHAPES = spellings(
    "reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"
)
_Dim = tuple[fx.Node, int]


Blocks = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Dimensions of two shapes that hold the same elements, without those of size 1, in order."""


class Reshape(NamedTuple):
    """A call that gives the elements of its operand, in the same order, another shape.

    Attributes:
        operand: of what.
        blocks: dimensions of the operand and of the result that hold the same.
    """

    operand: fx.Node
    blocks: Blocks


def read_reshape(node: fx.Node) -> Reshape | None:
    """What ``node`` reshapes; ``None`` where it does something else, or its sizes are not known well enough."""
    known = facts(node)
    if node.op not in ("call_function", "call_method") or known is None or known.type is None:
        return None
    operand = node.args[0] if node.args else None
    entering = type_of(operand)
    if not isinstance(operand, fx.Node) or entering is None:
        return None
    if node.target not in _RESHAPES and not _adds_dims(node):
        return None
    if entering.dtype != known.type.dtype:  # x.view(torch.int32)
        return None
    found = blocks(entering.shape, known.type.shape)
    return None if found is None else Reshape(operand, found)


def _adds_dims(node: fx.Node) -> bool:
    """Whether a call is ``x[:, None]``, of whole dimensions and new ones."""
    if node.target is not operator.getitem or len(node.args) != 2:
        return False
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


def blocks(shape: Sequence[int], result: Sequence[int]) -> Blocks | None:
    """The fewest dimensions at a time of two shapes that have as many elements; ``None`` where that is not sure for
    all values of symbolic sizes.

    >>> blocks((2, 3, 1, 4), (6, 4))
    (((0, 1), (0,)), ((3,), (1,)))
    """
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    left = [dim for dim, size in enumerate(shape) if size != 1]
    right = [dim for dim, size in enumerate(result) if size != 1]
    while left or right:
        if not left or not right:
            return None
        first, second = [left.pop()], [right.pop()]
        a, b = shape[first[0]], result[second[0]]
        while a != b:
            if int(a) == int(b):
                return None  # equal in this call, which is no proof
            if int(a) < int(b) and left:
                first.append(left.pop())
                a = a * shape[first[-1]]
            elif int(b) < int(a) and right:
                second.append(right.pop())
                b = b * result[second[-1]]
            else:
                return None
        found.append((tuple(reversed(first)), tuple(reversed(second))))
    return tuple(reversed(found))


def quotient(whole: int, part: int) -> int | None:
    """``whole`` / ``part`` where that is a whole number for every value of their symbols, else ``None``.

    >>> quotient(12, 4), quotient(12, 5), quotient(SymbolicSize.symbol("s0", 5) * 6, 3)
    (3, None, 2*s0)
    """
    powers = dict(whole.factors) if is_symbolic(whole) else {}
    for atom, power in part.factors if is_symbolic(part) else ():
        powers[atom] = powers.get(atom, 0) - power
    number = whole.coefficient if is_symbolic(whole) else int(whole)
    divisor = part.coefficient if is_symbolic(part) else int(part)
    if number % divisor or min(powers.values(), default=0) < 0:
        return None
    left = tuple(sorted((atom, power) for atom, power in powers.items() if power))
    return SymbolicSize(int(whole) // int(part), number // divisor, left) if left else number // divisor


class _ConflictError(Exception):
    """Sizes that can't all be made of the same parts, and the reshape that says so."""

    def __init__(self, reshape: fx.Node) -> None:
        super().__init__(reshape)
        self.reshape = reshape


class Dimensions:
    """The sizes that dimensions fall into so that each reshape only takes these together in another way, and each label
    of a product is the same ones everywhere.

    In ``(x[:, None] * y).reshape(12).dot(z)``, where the product has shape (3, 4), the dimension of ``z`` falls into 3
    and 4. Dimensions of size 1 fall into nothing.

    Args:
        graph: with exact facts.
        reassociate: see ``read_product``.

    Attributes:
        reshapes: the calls that only take dimensions together, or apart.
        passed: those that only add dimensions for a product, which reads what they view.
    """

    def __init__(self, graph: fx.Graph, reassociate: bool | None) -> None:
        self._products: dict[fx.Node, Product] = {}
        self.reshapes: dict[fx.Node, Reshape] = {}
        self.passed: set[fx.Node] = set()
        for node in graph.nodes:
            if (reshape := read_reshape(node)) is not None:
                self.reshapes[node] = reshape
            elif (product := read_product(node, reassociate)) is not None:
                self._products[node] = product
                self._pass_by(node, product)
        while True:
            self._same: dict[_Dim, _Dim] = {}
            self._cuts: dict[_Dim, dict[int, None]] = {}
            try:
                self._settle()
                return
            except _ConflictError as error:
                del self.reshapes[error.reshape]

    def _pass_by(self, node: fx.Node, product: Product) -> None:
        """Leave out calls that only add dimensions for a product, which is one of what they view."""
        for view in node.all_input_nodes:
            while view not in product.operands and view in self.reshapes:
                self.passed.add(view)
                view = self.reshapes.pop(view).operand

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes that the dimensions of a value of known type fall into, in order."""
        known = type_of(node)
        assert known is not None
        return tuple(size for dim in range(len(known.shape)) for size in self._sizes((node, dim)))

    def strides(self, node: fx.Node, stride: Sequence[int]) -> tuple[int, ...]:
        """Strides of a view of this shape of a tensor that lies as the value of ``node`` does."""
        found: list[int] = []
        for dim, step in enumerate(stride):
            own: list[int] = []
            for size in reversed(self._sizes((node, dim))):
                own.insert(0, step)
                step = step * size
            found += own
        return tuple(found)

    def product(self, node: fx.Node) -> Product | None:
        """What a product or a reshape computes of values in these shapes."""
        if node in self.reshapes:
            operand = self.reshapes[node].operand
            labels = "".join(map(symbol, range(len(self.shape(node)))))
            return Product(EinsumSpec((labels,), labels), (operand,))
        product = self._products.get(node)
        if product is None:
            return None
        spec, operands, added = product
        free = fresh_symbols(spec.labels)
        names = {
            label: label + "".join(next(free) for _ in self._sizes(dim)[1:])
            for label, dim in self._label_dims(product).items()
        }
        # Dimensions of size 1 are left out, those that broadcast and those of a label that is nowhere larger.
        terms = [
            "".join(names[label] for dim, label in enumerate(term) if known.shape[dim] != 1)
            for term, operand in zip(spec.inputs, operands, strict=True)
            if (known := type_of(operand)) is not None
        ]
        return Product(
            EinsumSpec(tuple(terms), "".join(names.get(label, "") for label in spec.output)), operands, added
        )

    def _sizes(self, dim: _Dim) -> tuple[int, ...]:
        """What one dimension falls into, outermost first."""
        known = type_of(dim[0])
        assert known is not None
        rest = known.shape[dim[1]]
        if rest == 1:
            return ()
        found: list[int] = []
        for cut in sorted(self._cuts.get(self._find(dim), ()), key=int, reverse=True):
            size = quotient(rest, cut)
            assert size is not None
            found.append(size)
            rest = cut
        return (*found, rest)

    def _label_dims(self, product: Product) -> dict[str, _Dim]:
        """For each label a dimension of an operand that has its size; none for labels of size 1."""
        found: dict[str, _Dim] = {}
        for term, operand in zip(product.spec.inputs, product.operands, strict=True):
            known = type_of(operand)
            assert known is not None
            for dim, label in enumerate(term):
                if known.shape[dim] != 1:
                    found.setdefault(label, (operand, dim))
        return found

    def _settle(self) -> None:
        """Find at which places dimensions are cut: at those of all that are the same, and at the ends of those that
        they are taken together from.

        Raises:
            _ConflictError: there are no such places.
        """
        for node, product in self._products.items():
            self._unite(node, product)
        changed = True
        while changed:
            changed = False
            for node, reshape in self.reshapes.items():
                for block in reshape.blocks:
                    changed |= self._carry(node, reshape.operand, block)

    def _find(self, dim: _Dim) -> _Dim:
        """The one that stands for all dimensions that are the same as ``dim``."""
        while (above := self._same.get(dim)) is not None:
            dim = above
        return dim

    def _unite(self, node: fx.Node, product: Product) -> None:
        """Note that dimensions with one label are the same."""
        dims = self._label_dims(product)
        for term, value in zip((*product.spec.inputs, product.spec.output), (*product.operands, node), strict=True):
            known = type_of(value)
            assert known is not None
            for dim, label in enumerate(term):
                if known.shape[dim] != 1:
                    first, own = self._find(dims[label]), self._find((value, dim))
                    if own != first:
                        self._same[own] = first

    def _carry(self, node: fx.Node, operand: fx.Node, block: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        """Have both sides of a block cut at the same places; whether that is news."""
        inside: list[tuple[_Dim, int, int]] = []
        places: dict[int, None] = {}
        for value, dims in zip((operand, node), block, strict=True):
            known = type_of(value)
            assert known is not None
            step: int = 1
            for dim in reversed(dims):
                own, size = self._find((value, dim)), known.shape[dim]
                inside.append((own, step, size))
                places |= {step: None} | {step * cut: None for cut in self._cuts.get(own, ())}
                step = step * size
        changed = False
        for own, step, size in inside:
            for place in places:
                if int(step) < int(place) < int(step) * int(size):
                    cut = quotient(place, step)
                    if cut is None:
                        raise _ConflictError(node)
                    cuts = self._cuts.setdefault(own, {})
                    if cut in cuts:
                        continue
                    if any(quotient(max(cut, other), min(cut, other)) is None for other in (*cuts, size)):
                        raise _ConflictError(node)
                    cuts[cut] = None
                    changed = True
        return changed
