"""Networks: what an einsum or a product becomes when those that it alone uses are inlined into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from .cost import sum_seconds
from .dimensions import Dimensions
from .errors import MemoryLimitError
from .frozen import frozen_values
from .graph import MAX_LABELS, Writers, is_einsum, same_mode, type_of, uses
from .layout import Sizes, inner_size
from .plan import Plan, make_plan, order_seconds
from .products import Product, is_permutation, read_product
from .spec import EinsumSpec

Read = tuple[EinsumSpec, tuple[fx.Node, ...]]
"""An einsum and its operands."""

# Narrower integers (and bool) are summed into int64 by some calls of torch.einsum and not by others, so that two calls
# in one may differ in dtype from one after the other.
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64})
_HALF = frozenset({torch.float16, torch.complex32})


def inline_operands(
    node: fx.Node,
    spec: EinsumSpec,
    operands: tuple[fx.Node, ...],
    read: Mapping[fx.Node, Read],
    writers: Writers,
    reassociate: bool | None,
) -> tuple[EinsumSpec, tuple[fx.Node, ...], dict[fx.Node, int]]:
    """The einsum ``node`` with all operands inlined that may be, and what was inlined, in turn: at which position.

    Args:
        node: the einsum, or a call that is one under another name.
        spec: what it computes.
        operands: of what.
        read: the same for the nodes before it, as they are once their operands are inlined; no other is inlined.
        writers: what writes in the graph.
        reassociate: True inlines in float16 as well.
    """
    consumed: dict[fx.Node, int] = {}
    # From the last operand to the first, so that positions to the left stay valid.
    for position in reversed(range(len(operands))):
        operand = operands[position]
        if operand not in read:
            continue
        fused = _inline(node, spec, position, operand, read[operand], writers, reassociate)
        if isinstance(fused, str):
            continue
        spec, operands = fused, (*operands[:position], *read[operand][1], *operands[position + 1 :])
        consumed[operand] = position
    return spec, operands, consumed


def why_apart(
    node: fx.Node, read: Mapping[fx.Node, Read], writers: Writers, reassociate: bool | None
) -> Iterator[tuple[fx.Node, str]]:
    """The operands of the einsum ``node`` that are einsums themselves and may not be inlined, each with the reason.

    Args:
        node: one of ``read``.
        read: see ``inline_operands``.
        writers: see ``inline_operands``.
        reassociate: see ``inline_operands``.
    """
    spec, operands = read[node]
    for position, operand in enumerate(operands):
        if operand in read:
            fused = _inline(node, spec, position, operand, read[operand], writers, reassociate)
            if isinstance(fused, str):
                yield operand, fused


def _inline(
    node: fx.Node,
    spec: EinsumSpec,
    position: int,
    operand: fx.Node,
    inner: Read,
    writers: Writers,
    reassociate: bool | None,
) -> EinsumSpec | str:
    """The einsum ``node`` with the operand at ``position`` inlined, or why it may not be."""
    if uses(operand) != 1:
        return "its value is used more than once"
    dtypes = {known.dtype for n in (*inner[1], operand, *node.all_input_nodes, node) if (known := type_of(n))}
    if len(dtypes) > 1:
        return "the dtypes differ"
    if not dtypes <= _DTYPES | (_HALF if reassociate else frozenset()):
        return f"the order of products in {str(*dtypes).removeprefix('torch.')} is kept"
    if not same_mode(operand, node):
        return "they run in different modes"
    if not writers.allow(inner[1], operand, node):
        return "what it reads is written later"
    fused = spec.inline(position, inner[0])
    if fused.n_labels > MAX_LABELS:
        return f"together they have more than {MAX_LABELS} labels"
    if merges_broadcasts(spec.inputs[position], inner[0]):
        return "a diagonal of its result is taken that its operands do not have"
    return fused


def merges_broadcasts(term: str, inner: EinsumSpec) -> bool:
    """Whether the outer einsum takes a diagonal of dimensions that one inner operand has and another may broadcast.

    (It takes one where ``term`` repeats a label.)
    ``einsum("ii->i", einsum("ij,ij->ij", x, y))`` with x of shape (3, 1) must not become ``einsum("ii,ii->i", x, y)``,
    as there is no diagonal of x.
    """
    for label in dict.fromkeys(term):
        merged = {name for name, place in zip(inner.output, term, strict=True) if place == label}
        if len(merged) == 1:
            continue
        holders = [labels for labels in inner.inputs if merged & set(labels)]
        if len(holders) > 1 and any(len(merged & set(labels)) > 1 for labels in holders):
            return True
    return False


def _single_seconds(spec: EinsumSpec, shape: Sequence[int]) -> float:
    """What the cost model expects of a call on one tensor: a view, or a sum."""
    (term,) = spec.inputs
    results = math.prod(spec.output_shape([shape]))
    elements = math.prod(spec.sizes([shape]).values())
    inner = inner_size(term, spec.summed, Sizes(spec.sizes([shape])))
    return 0.0 if elements == results else sum_seconds(elements, results, inner)


def einsum_seconds(
    spec: EinsumSpec,
    shapes: Sequence[tuple[int, ...]],
    optimize: object = "auto",
    limit: int | None = None,
    frozen: tuple[bool, ...] = (),
) -> float:
    """What the cost model expects of an einsum of operands of these shapes, ``frozen`` or not, in the best order.

    Raises:
        MemoryLimitError: no order was found of which no intermediate has more elements than ``limit``.
    """
    if len(shapes) == 1:
        return 0.0 if any(frozen) else _single_seconds(spec, shapes[0])
    if len(shapes) < 3:
        return order_seconds(spec, shapes, ((0, 1),), frozen)
    return make_plan(spec.canonical(), shapes, optimize, limit, frozen=frozen).seconds


# Where calls are rewritten: the part of their time, and the seconds, that it has to gain at least.
_GAIN, LEAST = 0.2, 5e-6


def pays(after: float, before: float, least: float = LEAST) -> bool:
    """Whether calls are to be rewritten that take ``before`` by the cost model, and then ``after``: only where that is
    clearly less, by so many seconds at ``least``. The model knows sizes alone, and not the views that direct calls
    need; what is left as it was written runs as it did.
    """
    return after < before * (1 - _GAIN) and after < before - least


def _is_matrix_product(spec: EinsumSpec) -> bool:
    return len(spec.inputs) == 2 and not set(spec.inputs[0] + spec.inputs[1]) <= set(spec.output)


class Networks:
    """The networks of a graph: products under any name, permutations and einsums that feed each other.

    Attributes:
        own: what each of these calls computes.
        whole: the same with all inlined that may be.
        parts: the calls that this replaces, users before what they use.
        inlined: the calls that are part of another's network.
        writers: what writes in the graph.
        frozen: what never changes.
    """

    def __init__(
        self, graph: fx.Graph, optimize: object, reassociate: bool | None, dimensions: Dimensions | None = None
    ) -> None:
        """Read them.

        Args:
            graph: with exact facts.
            optimize: the search that will choose orders, see ``make_plan``.
            reassociate: True takes float16 and bfloat16 as well.
            dimensions: where given, networks go on through calls that reshape, and are of operands in the shapes that
                it has for them.
        """
        self.optimize = optimize
        self.reassociate = reassociate
        self.writers = Writers(graph)
        self.frozen = frozen_values(graph)
        self.dimensions = dimensions
        self.own: dict[fx.Node, Product] = {}
        self.whole: dict[fx.Node, Read] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self.inlined: set[fx.Node] = set()
        usable: dict[fx.Node, Read] = {}
        for node in graph.nodes:
            product = None if self.writers.hold(node) else self._read(node)
            if product is None:
                continue
            spec, operands, taken = inline_operands(
                node, product.spec, product.operands, usable, self.writers, reassociate
            )
            self.own[node], self.whole[node] = product, (spec, operands)
            self.parts[node] = [node, *(part for inner in taken for part in self.parts[inner])]
            self.inlined.update(taken)
            if product.added is None:
                usable[node] = spec, operands

    def roots(self) -> Iterator[fx.Node]:
        """The calls whose values others than their network see."""
        for node in self.own:
            if node in self.inlined:
                continue
            # A permutation at the end stays a view of what it permutes.
            while self.is_view(node) and self.own[node].operands[0] in self.inlined:
                (node,) = self.own[node].operands
            if not self.is_view(node):
                yield node

    def is_view(self, node: fx.Node) -> bool:
        """Whether a call only gives its operand another shape, or its dimensions another order."""
        return is_permutation(node) or (self.dimensions is not None and node in self.dimensions.reshapes)

    def _read(self, node: fx.Node) -> Product | None:
        return read_product(node, self.reassociate) if self.dimensions is None else self.dimensions.product(node)

    def _shapes(self, operands: Sequence[fx.Node]) -> list[tuple[int, ...]]:
        """Shapes of those operands whose types are known."""
        known = [(operand, entering) for operand in operands if (entering := type_of(operand))]
        if self.dimensions is None:
            return [entering.shape for _, entering in known]
        return [self.dimensions.shape(operand) for operand, _ in known]

    def seconds(self, root: fx.Node) -> float:
        """What the cost model expects of the network as it is written, were only the einsums in it fused."""
        einsums: dict[fx.Node, Read] = {}
        total = 0.0
        for part in reversed(self.parts[root]):
            spec, operands, _ = self.own[part]
            if is_einsum(part):
                spec, operands, taken = inline_operands(part, spec, operands, einsums, self.writers, self.reassociate)
                for inner in taken:
                    del einsums[inner]
                einsums[part] = spec, operands
            else:
                total += self.plan_seconds(spec, operands)
        return total + sum(self.plan_seconds(*einsum) for einsum in einsums.values())

    def joins(self, root: fx.Node, memory_limit: int | None) -> bool:
        """Whether the calls of a network are to be one einsum: where that takes clearly less time than what is there,
        or where only that keeps the limit of bytes.
        """
        return not self.why_as_written(root, memory_limit)

    def why_as_written(self, root: fx.Node, memory_limit: int | None) -> str:
        """Why the calls of a network are not to be one einsum; empty where they are."""
        spec, operands = self.whole[root]
        parts = [part for part in self.parts[root] if not is_permutation(part)]
        if len(operands) < 2 or len(parts) < 2:
            return "it stands alone: there is no other order"
        if all(map(is_einsum, parts)):
            return "they are einsums"
        if len(operands) == 2 and not any(_is_matrix_product(self.own[part].spec) for part in parts):
            # What is multiplied element by element and summed gains where it is a product of matrices or vectors. As a
            # batch of dot products it is slower (20,000 of length 16: 256 us for 199, with gradients 6,061 for 582).
            first, second = spec.inputs
            if not any(label in spec.output for label in set(first) ^ set(second)):
                return "a batch of dot products is slower"
        results = [known for part in parts if (known := type_of(part))]
        plan = self.plan(spec, operands, memory_limit)
        if plan is None or len(results) < len(parts):
            return "no order of known types keeps the memory limit"
        if memory_limit is not None and any(known.numel * known.dtype.itemsize > memory_limit for known in results[1:]):
            return ""
        before = self.seconds(root)
        if pays(plan.seconds, before):
            return ""
        return f"as written {before * 1e6:.3g} us, in the best order {plan.seconds * 1e6:.3g} us by the cost model"

    def plan(self, spec: EinsumSpec, operands: Sequence[fx.Node], memory_limit: int | None) -> Plan | None:
        """The best order of an einsum; ``None`` where an operand is of unknown type, or no order keeps the limit of
        bytes.
        """
        types = [known for operand in operands if (known := type_of(operand))]
        if len(types) < len(operands):
            return None
        limit = None if memory_limit is None else memory_limit // types[0].dtype.itemsize
        try:
            frozen = self._frozen(operands)
            return make_plan(spec.canonical(), self._shapes(operands), self.optimize, limit, frozen=frozen)
        except MemoryLimitError:
            return None

    def plan_seconds(self, spec: EinsumSpec, operands: Sequence[fx.Node]) -> float:
        """What the cost model expects of one einsum of operands of known types."""
        return einsum_seconds(spec, self._shapes(operands), self.optimize, frozen=self._frozen(operands))

    def _frozen(self, operands: Sequence[fx.Node]) -> tuple[bool, ...]:
        return tuple(operand in self.frozen for operand in operands) if self.frozen else ()
