"""How an einsum sits in an ``fx.Graph``: reading and writing it, and the facts on every node that passes rely on.

A graph between passes is ordinary runnable torch code. What a pass must know beside the code is in one immutable
``Facts`` per node: the value's type, the
memory it lies in, the memory the node writes, and the mode it runs in. Graphs that nobody stamped (plain
``fx.symbolic_trace``) have no facts; ``writes`` then
answers from the names of the operations, and assumes that a write reaches everything.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .errors import EquationError
from .layout import elementwise_strides
from .signature import TensorType, contiguous_strides
from .sizes import is_symbolic
from .spec import EinsumSpec

EINSUM_TARGETS = frozenset({torch.einsum, torch.functional.einsum})
"""What a plain einsum call has as its target."""

MAX_LABELS = 52
"""``torch.einsum`` takes the letters a-z and A-Z only."""

EVERYTHING = -1
"""As a storage number: this may be any memory."""

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in [
        "iadd",
        "isub",
        "imul",
        "imatmul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "ilshift",
        "irshift",
        "setitem",
        "delitem",
    ]
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a node beside its code.

    Attributes:
        type: the value's type; ``None`` where the value is not one tensor.
        storage: number of the memory that the value lies in, ``None`` where the value is not one tensor. Values with
            different numbers do not overlap.
        writes: storages that running the node writes.
        grad: whether it runs with grad mode on.
        movable: whether it runs in the graph's own ambient state apart from the grad mode, so that it may be computed
            elsewhere in the graph.
        where: ``file:line`` of the user's code that it comes from, where known.
        steady: whether it gives the same at each call for the same operands: it draws no random numbers, and runs in
            the modes of the whole, autocast among them.
        is_view: whether the value is a view of another tensor to autograd, where that was asked.
    """

    type: TensorType | None = None
    storage: int | None = None
    writes: tuple[int, ...] = ()
    grad: bool = True
    movable: bool = True
    where: str = ""
    steady: bool = True
    is_view: bool = True


def facts(node: fx.Node) -> Facts | None:
    """The facts stamped on ``node``, or ``None``."""
    found = node.meta.get("lazy_einsum")
    assert found is None or isinstance(found, Facts)
    return found


def stamp(node: fx.Node, known: Facts) -> fx.Node:
    """Put ``known`` on ``node``; return the node."""
    node.meta["lazy_einsum"] = known
    return node


def type_of(node: Any) -> TensorType | None:
    """The type of the tensor that ``node`` gives, or ``None`` where it is unknown or not one tensor."""
    known = facts(node) if isinstance(node, fx.Node) else None
    return known.type if known else None


def empty_like(graph: fx.Graph) -> fx.Graph:
    """A graph without nodes that is otherwise made as ``graph`` is."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    new.set_codegen(graph._codegen)
    return new


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with its facts, so that a pass can leave its argument untouched."""
    new = empty_like(graph)
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = new.node_copy(node, values.__getitem__)
    return new


def fresh_storage(graph: fx.Graph) -> int:
    """A storage number that no node of ``graph`` has."""
    return 1 + max(
        (known.storage for node in graph.nodes if (known := facts(node)) and known.storage is not None), default=-1
    )


def fresh_type(operand: TensorType) -> TensorType:
    """The type of a new tensor that an elementwise call makes of ``operand``."""
    stride = elementwise_strides(operand.shape, ((operand.shape, operand.stride),))
    return TensorType(
        operand.shape, operand.dtype, operand.device, stride, operand.requires_grad, is_leaf=not operand.requires_grad
    )


def is_dense(node: fx.Node) -> bool:
    """Whether an elementwise call on the value of ``node`` gives a result with the same strides."""
    known = type_of(node)
    return known is not None and fresh_type(known).stride == known.stride


def writes(node: fx.Node) -> tuple[int, ...]:
    """Storages that running ``node`` may write; ``(EVERYTHING,)`` where that is unknown. Empty for a pure operation."""
    known = facts(node)
    if known is not None:
        return known.writes
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        inplace = (
            node.target in _INPLACE_OPERATORS
            or node.kwargs.get("out") is not None
            or node.kwargs.get("inplace") is True
        )
        inplace = inplace or (name.endswith("_") and not name.endswith("__"))
    elif node.op == "call_method":
        name = str(node.target)
        inplace = (
            (name.endswith("_") and not name.endswith("__"))
            or name in ("__setitem__", "__delitem__")
            or name.startswith("__i")
        )
    else:
        inplace = node.op == "call_module"
    return (EVERYTHING,) if inplace else ()


COPIES_AT_NEED = frozenset({"reshape", "reshape_as", "flatten", "ravel", "contiguous"})
"""Calls that give a view of their operand, or the operand itself, or a copy: as it lies in memory."""


class Copies:
    """Memory of values and of what calls that copy at need made of them.

    Torch may be wrong about how a value without data lies (it is for the result of ``batch_norm``), and it may lie
    otherwise for other sizes, so a write to the one is taken to be a write to the other.
    """

    def __init__(self) -> None:
        self._linked: list[set[int]] = []

    def note(self, memory: set[int]) -> None:
        """Note the storages of the operand and of the result of one call."""
        if len(memory) > 1:
            self._linked.append(memory)

    def reached(self, written: set[int]) -> set[int]:
        """All that a write to these storages may write."""
        while more := {number for memory in self._linked if memory & written for number in memory} - written:
            written = written | more
        return written


class Writers:
    """The nodes of a graph that write memory, to ask what may be read, or kept for the backward pass, elsewhere.

    Right as long as the writing nodes stay and nothing else starts to write.

    Args:
        graph: all of it is read once.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._writes = [(node, written) for node in graph.nodes if (written := writes(node))]
        self._effects = [node for node in graph.nodes if _is_effect(node)]

    @property
    def none(self) -> bool:
        """Whether nothing in the graph writes."""
        return not self._writes

    def write_any(self, reads: Iterable[fx.Node], after: fx.Node, before: fx.Node) -> bool:
        """Whether a node between ``after`` and ``before`` writes memory of the values ``reads``."""
        if not self._writes:
            return False
        storages = _storages(reads)
        return any(after < node < before and _overlap(written, storages) for node, written in self._writes)

    def part(self, reads: Iterable[fx.Node], after: fx.Node, before: fx.Node) -> bool:
        """Whether what is computed of the values ``reads`` at ``after`` may not serve at ``before``: something between
        the two writes them, or has an effect that no value shows (gives a tensor a hook, switches a mode).
        """
        return self.write_any(reads, after, before) or any(after < node < before for node in self._effects)

    def spoil_any(self, reads: Iterable[fx.Node], after: fx.Node) -> bool:
        """Whether a node behind ``after`` writes memory of the values ``reads``, so that autograd must not keep them.

        A call that may write anything (a live submodule) is taken to write what it is given: were all that comes before
        such a call held back, little would be left to optimize, and what slips through is refused by autograd, loudly.
        """
        if not self._writes:
            return False
        storages = _storages(reads)
        for node, written in self._writes:
            reached = _storages(node.all_input_nodes) if EVERYTHING in written and facts(node) else set(written)
            if after < node and _overlap(reached, storages):
                return True
        return False

    def allow(self, reads: Sequence[fx.Node], start: fx.Node, end: fx.Node) -> bool:
        """Whether what ``start`` computes from ``reads`` may be computed at ``end``, a later node that needs it.

        Not if a node between the two writes what it reads. Not if any later node does, where autograd keeps operands of
        ``end``: the backward pass would refuse.
        """
        return not self.write_any(reads, start, end) and not (may_require_grad(end) and self.spoil_any(reads, start))

    def hold(self, node: fx.Node) -> bool:
        """Whether ``node`` has to stay just as it is, as it runs under autograd and its operands are written later.

        Eager code of this kind works by what the operations happen to keep: a copy of the operand, or nothing at all.
        """
        return may_require_grad(node) and self.spoil_any(node.all_input_nodes, node)


def _is_effect(node: fx.Node) -> bool:
    known = facts(node)
    return node.op.startswith("call_") and known is not None and known.type is None and not known.movable


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    known = [facts(node) for node in nodes]
    return {EVERYTHING if k is None or k.storage is None else k.storage for k in known}


def _overlap(written: Collection[int], read: Set[int]) -> bool:
    return EVERYTHING in written or EVERYTHING in read or not read.isdisjoint(written)


def may_require_grad(node: fx.Node) -> bool:
    """Whether autograd may follow the value of ``node``."""
    known = facts(node)
    return known is None or known.type is None or known.type.requires_grad


def same_mode(first: fx.Node, second: fx.Node) -> bool:
    """Whether both nodes run in one ambient state, so that the work of one may be done at the other."""
    a, b = facts(first), facts(second)
    if a is None or b is None:
        # Unstamped graphs: a switch of grad mode leaves no trace in plain fx, so there is nothing to tell regions apart
        # by.
        return True
    return a.movable and b.movable and a.grad == b.grad


def must_be_no_view(node: fx.Node, writers: Writers) -> bool:
    """Whether ``node`` runs without grad mode and its value is written later, or may be as it leaves the graph: in grad
    mode autograd refuses such a write to a view, and direct calls may end in one where the user's code does not.
    """
    known = facts(node)
    if known is None or known.type is None or known.grad or known.type.is_inference:
        return False
    leaves = not known.is_view and any(user.op == "output" for user in node.users)
    return leaves or writers.spoil_any([node], node)


def keepers(node: fx.Node) -> set[fx.Node]:
    """The nodes that do more with the value of ``node``, or with a view of it, than to compute other values: the
    output, writes, hooks, and calls that may do anything with what they are given.
    """
    found: set[fx.Node] = set()
    values = [node]
    for value in values:
        lies = facts(value)
        for user in value.users:
            known, name = facts(user), getattr(user.target, "__name__", user.target)
            if known is None or known.writes or lies is None or lies.storage in (None, EVERYTHING):
                found.add(user)
            elif known.type is not None:
                if (known.storage in (lies.storage, EVERYTHING) or name in COPIES_AT_NEED) and user not in values:
                    values.append(user)
            elif known.movable and name != "grad" and user.users and all(_is_item(item) for item in user.users):
                # Several tensors, of which some may be views (``split``).
                values += [item for item in user.users if item not in values]
            else:
                found.add(user)
    return found


def lead_to_one_end(graph: fx.Graph, *nodes: fx.Node) -> bool:
    """Whether all gradients of these values come from one place: a result of the graph, a write, a call that may start
    a backward pass. Then one backward pass needs them all, and no other needs any.
    """
    followed = {known.storage for node in graph.nodes if (known := facts(node)) and may_require_grad(node)}
    ends: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(graph.nodes):
        found: set[fx.Node] = set()
        known = facts(node)
        if node.op != "output" and (known is None or known.type is None or known.type.requires_grad):
            found = found.union(*(ends[user] for user in node.users))
            starts = known is None or (known.type is None and not known.movable) or node.target is torch.autograd.grad
            carries = any(storage == EVERYTHING or storage in followed for storage in writes(node))
            if starts or carries or any(user.op == "output" for user in node.users):
                found.add(node)
        ends[node] = found
    return len(set[fx.Node]().union(*(ends[node] for node in nodes))) <= 1


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and type_of(node) is not None


def uses(node: fx.Node) -> int:
    """How often ``node`` is used: twice in ``einsum(z, z)``, which ``node.users`` counts once."""
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), visit)
    return count


def erase_if_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase those of ``nodes`` (last first) that nothing uses.

    Only for nodes that the caller has consumed: a node without users may be there for its writes.
    """
    for node in nodes:
        if not node.users and not writes(node):
            node.graph.erase_node(node)


CLOSED_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.complex32,
        torch.int64,
    }
)
"""The dtypes in which a product of any operands has that dtype. (Narrower integers are summed into int64 by some calls
of torch.einsum and not by others.)
"""


def is_order_free(node: fx.Node, operands: Iterable[fx.Node], writers: Writers) -> bool:
    """Whether the einsum ``node`` means the same in any order of contraction: dtypes, errors and what autograd keeps.

    It does not with operands of mixed or narrow integer dtypes, under autocast, and where autograd follows it and an
    operand is written later. Operands of unknown type are taken to be of one floating point dtype.
    """
    return not why_ordered(node, operands, writers)


def why_ordered(node: fx.Node, operands: Iterable[fx.Node], writers: Writers) -> str:
    """Why the einsum ``node`` does not mean the same in any order of contraction; empty where it does."""
    known = facts(node)
    dtypes = {entering.dtype for operand in operands if (entering := type_of(operand))}
    if known is not None and not known.movable:
        return "it runs in another mode than the rest (autocast, or a context of its own)"
    if len(dtypes) > 1:
        return "the dtypes of its operands differ"
    if not dtypes <= CLOSED_DTYPES:
        return f"its result in {str(*dtypes).removeprefix('torch.')} depends on the order"
    return "autograd follows it, and an operand is written later" if writers.hold(node) else ""


def is_einsum(node: Any) -> bool:
    """Whether ``node`` is a call of ``torch.einsum``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in EINSUM_TARGETS


def read_einsum(node: fx.Node) -> tuple[EinsumSpec, tuple[fx.Node, ...]] | None:
    """The spec and operands of an einsum node, however it was written; ``None`` where it can't be read.

    It can't be read where an operand is no node, or an ellipsis meets an operand of unknown rank.

    Raises:
        EquationError: the equation is malformed or does not fit its operands.
    """
    if not is_einsum(node) or node.kwargs:
        return None
    first, *rest = node.args
    if isinstance(first, str):
        operands: Sequence[Any] = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        if not all(isinstance(operand, fx.Node) for operand in operands):
            return None
        types = [type_of(operand) for operand in operands]
        if "..." in first and None in types:
            return None
        terms = first.replace(" ", "").split("->")[0].split(",")
        if len(terms) != len(operands):
            raise EquationError(
                f"einsum {first!r} has {len(terms)} terms, but {len(operands)} operands are given; "
                "give one operand for each term"
            )
        ranks = [len(known.shape) if known else len(term) for known, term in zip(types, terms, strict=True)]
        return EinsumSpec.parse(first, ranks), tuple(operands)
    operands, sublists = node.args[0::2], node.args[1::2]
    output = None
    if len(node.args) % 2:
        operands, output = operands[:-1], node.args[-1]
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    types = [type_of(operand) for operand in operands]
    if any(known is None and Ellipsis in sublist for known, sublist in zip(types, sublists, strict=True)):  # type: ignore[operator]
        return None
    ranks = [len(known.shape) if known else len(sublist) for known, sublist in zip(types, sublists, strict=True)]  # type: ignore[arg-type]
    return EinsumSpec.from_sublists(sublists, output, ranks), tuple(operands)  # type: ignore[arg-type]


def write_einsum(
    graph: fx.Graph,
    spec: EinsumSpec,
    operands: Sequence[fx.Node],
    like: fx.Node | None = None,
    storage: int | None = None,
) -> fx.Node:
    """Insert a canonical einsum at the graph's insertion point, stamped with the facts that follow from its operands'.

    Args:
        graph: where to write.
        spec: at most 52 labels.
        operands: one node for each term, all of one dtype.
        like: the node whose work this does (in whole or in part); ``grad``, ``movable`` and ``where`` are taken from
            it.
        storage: number for the memory of the result, if that is not a view; one that no node of the graph has where not
            given.
    """
    spec = spec.canonical()
    node = graph.call_function(torch.einsum, (str(spec), *operands))
    known = [facts(operand) for operand in operands]
    base = facts(like) if like is not None else None
    types = [k.type for k in known if k is not None and k.type is not None]
    if len(types) != len(operands):
        # Where the graph has facts, a node without a type may be any tensor.
        return stamp(node, replace(base, type=None, storage=EVERYTHING, writes=())) if base else node
    base = base or Facts()
    shape = spec.output_shape([t.shape for t in types])
    requires_grad = base.grad and any(t.requires_grad for t in types)
    result = TensorType(
        tuple(shape),
        types[0].dtype,
        types[0].device,
        contiguous_strides(shape),
        requires_grad,
        is_leaf=not requires_grad,
    )
    if spec.is_view_only:
        assert known[0] is not None
        (term,) = spec.inputs
        step = dict.fromkeys(term, 0)
        for label, stride in zip(term, types[0].stride, strict=True):
            step[label] += stride
        strides = tuple(step[label] for label in spec.output)
        view = replace(result, stride=strides, is_conj=types[0].is_conj, is_neg=types[0].is_neg)
        return stamp(node, replace(base, type=view, storage=known[0].storage, writes=()))
    return stamp(
        node, replace(base, type=result, storage=fresh_storage(graph) if storage is None else storage, writes=())
    )


GIVES = "lazy_einsum_gives"
"""Under this name an einsum has in its ``meta`` the name of the call that it was made of, where that is still there for
what is left of it: to add a bias, to give the result its shape.
"""


def call_of(node: fx.Node) -> str:
    """The name of the call that an einsum was made of; its own, where none is left."""
    return str(node.meta.get(GIVES, node.name))


NUMBER = "lazy_einsum_number"
"""Under this name a node that gives a number made of symbols (sizes that vary) has its expression in its ``meta``."""

_NUMBER_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_NUMBER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "float": float,
    "int": int,
    "math.sqrt": math.sqrt,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}


class Numbers:
    """Writes numbers made of symbols into a graph: ordinary arithmetic on ``x.size(0)``, next to the placeholders, each
    expression once.

    Args:
        graph: which has a node for each symbol.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._known: dict[str, fx.Node] = {}
        self._last: fx.Node | None = None
        for node in graph.nodes:
            if NUMBER in node.meta:
                self._known[node.meta[NUMBER]] = self._last = node
            elif node.op == "placeholder":
                self._last = node

    def define(self, name: str, tensor: fx.Node, dim: int) -> None:
        """Let the symbol ``name`` be the size of a dimension of a placeholder, unless there is a node for it."""
        if name not in self._known:
            self._insert(name, tensor.graph.call_method, "size", (tensor, dim))

    def node(self, text: str) -> Any:
        """The node that gives a Python expression in the symbols; a number where it has none."""
        return self._write(ast.parse(text, mode="eval").body)

    def argument(self, value: Any) -> Any:
        """``value`` with nodes in the places of symbolic sizes."""
        if is_symbolic(value):
            return self.node(value.text)
        return tuple(map(self.argument, value)) if isinstance(value, tuple) else value

    def _write(self, tree: ast.expr) -> Any:
        text = ast.unparse(tree)
        if text in self._known:
            return self._known[text]
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.BinOp):
            function = _NUMBER_OPERATORS[type(tree.op)]
            args = [self._write(tree.left), self._write(tree.right)]
        elif isinstance(tree, ast.UnaryOp):
            function = _NUMBER_OPERATORS[type(tree.op)]
            args = [self._write(tree.operand)]
        else:
            assert isinstance(tree, ast.Call), text
            function = _NUMBER_FUNCTIONS[ast.unparse(tree.func)]
            args = [self._write(argument) for argument in tree.args]
        if not any(isinstance(argument, fx.Node) for argument in args):
            return function(*args)
        return self._insert(text, self._graph.call_function, function, tuple(args))

    def _insert(self, text: str, make: Callable[..., fx.Node], target: Any, args: tuple[Any, ...]) -> fx.Node:
        assert self._last is not None
        with self._graph.inserting_after(self._last):
            node = stamp(make(target, args), Facts())
        node.meta[NUMBER] = text
        self._known[text] = self._last = node
        return node


def erase_unused_numbers(graph: fx.Graph) -> None:
    """Erase arithmetic on sizes that nothing uses."""
    for node in reversed(graph.nodes):
        if NUMBER in node.meta and node.op != "placeholder" and not node.users:
            graph.erase_node(node)


def given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without those that say nothing (``out=None``)."""
    return {name: value for name, value in kwargs.items() if value is not None}


def tensor_nodes(value: Any) -> Iterator[fx.Node]:
    """The nodes in nested arguments, in order, with repetitions."""
    found: list[fx.Node] = []

    def visit(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, visit)
    yield from found
