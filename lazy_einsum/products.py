"""Calls of torch that are einsums under another name: products of matrices and vectors, products element by element,
sums over dimensions, diagonals, and permutations.

To teach the passes another call, add a row to one of the tables at the end.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from .ambient import product_bits
from .graph import facts, given, is_einsum, read_einsum, same_mode, type_of, uses
from .spec import EinsumSpec, symbol

# In these a product means the same whatever kernel computes it. Integers have kernels of their own, and bool has none.
_EXACT = frozenset({torch.float64, torch.float32, torch.complex64, torch.complex128})
# Between two of these calls values are rounded coarsely, or leave the range: their order is the user's.
_COARSE = frozenset({torch.float16, torch.bfloat16})


class Product(NamedTuple):
    """What a call computes.

    Attributes:
        spec: the einsum.
        operands: one node for each of its terms.
        added: a tensor that is added to it (a bias), which broadcasts to its shape.
    """

    spec: EinsumSpec
    operands: tuple[fx.Node, ...]
    added: fx.Node | None = None


def read_product(node: fx.Node, reassociate: bool | None = None) -> Product | None:
    """What ``node`` computes, if it is an einsum under any name; ``None`` where that is not sure.

    It is not with ``out``, with operands of unknown, different, integer or coarse types, lazily conjugated or negated
    ones, on several devices, and in other ambient modes than the graph's own; nor are sums where torch's flags let
    matrix products round their operands (TF32), as a sum of products does not.

    Args:
        node: any node.
        reassociate: True reads float16 and bfloat16 too.
    """
    if is_einsum(node):
        found = read_einsum(node)
        return Product(*found) if found else None
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    known = facts(node)
    if reader is None or known is None or known.type is None or not known.movable or known.writes:
        return None
    product = reader(node)
    if product is None:
        return None
    types = [type_of(operand) for operand in (*product.operands, *(product.added,) * (product.added is not None))]
    entering = [entry for entry in types if entry is not None]
    if len(entering) < len(types) or {entry.dtype for entry in entering} != {known.type.dtype}:
        return None
    if not may_reorder(known.type.dtype, reassociate) or any(
        entry.is_conj or entry.is_neg for entry in (*entering, known.type)
    ):
        return None
    if {entry.device for entry in entering} != {known.type.device}:
        return None
    if node.target in _SUMS and product_bits(known.type.device.type, known.type.dtype):
        return None
    shape = product.spec.output_shape([entry.shape for entry in entering[: len(product.operands)]])
    return product if tuple(map(int, shape)) == tuple(map(int, known.type.shape)) else None


def why_unread(node: fx.Node, reassociate: bool | None = None) -> str:
    """Why a product of matrices or vectors under another name is not read; empty where it is, and of other nodes.

    Args:
        node: any node.
        reassociate: as for ``read_product``.
    """
    is_call = node.op in ("call_function", "call_method") and node.target in _MATRIX_PRODUCTS
    known = facts(node)
    if not is_call or read_product(node, reassociate) is not None or known is None:
        return ""
    if known.type is None or not known.movable:
        return "it runs in another mode than the rest (autocast, or a context of its own)"
    if known.type.dtype in _COARSE:
        return f"the order of products in {str(known.type.dtype).removeprefix('torch.')} is kept (reassociate=True)"
    if known.type.dtype not in _EXACT:
        return f"products in {str(known.type.dtype).removeprefix('torch.')} have kernels of their own"
    return "its arguments are of a form, or of types, that are not read"


def may_reorder(dtype: torch.dtype, reassociate: bool | None) -> bool:
    """Whether products and sums of this type may be done in another order than the user's."""
    return dtype in (_EXACT | _COARSE if reassociate else _EXACT)


def sums_elements(node: fx.Node) -> bool:
    """Whether ``node`` is a call that sums, but is no product of matrices or vectors to torch."""
    return node.op in ("call_function", "call_method") and node.target in _SUMS


def is_permutation(node: fx.Node) -> bool:
    """Whether ``node`` is a call that only permutes dimensions."""
    return node.op in ("call_function", "call_method") and _READERS.get(node.target) in _PERMUTATION_READERS


_Terms = tuple[tuple[str, ...], str]
_Reader = Callable[[fx.Node], Product | None]


@dataclass(frozen=True)
class _Row:
    """How a call of fixed parameters is read.

    Attributes:
        parameters: names of all parameters, in order.
        operands: those that are multiplied.
        terms: the labels of these and of the result, from the numbers of their dimensions.
        added: the one that is added.
        only: parameters that must have this value, or none.
        real: whether complex operands are another matter: conjugated, or refused.
    """

    parameters: tuple[str, ...]
    operands: tuple[str, ...]
    terms: Callable[..., _Terms | None]
    added: str | None = None
    only: Mapping[str, int] = field(default_factory=dict)
    real: bool = False

    def __call__(self, node: fx.Node) -> Product | None:
        arguments = dict(zip(self.parameters, node.args, strict=False))
        named = given(node.kwargs)
        if len(node.args) > len(self.parameters) or not set(named) <= set(self.parameters) - set(arguments):
            return None
        arguments |= named
        for name, value in self.only.items():
            if type(found := arguments.get(name, value)) not in (int, float) or found != value:
                return None
        operands = tuple(arguments.get(name) for name in self.operands)
        added = arguments.get(self.added) if self.added else None
        if any(type_of(operand) is None for operand in operands) or (added is not None and type_of(added) is None):
            return None
        types = [known for operand in operands if (known := type_of(operand))]
        terms = self.terms(*(len(known.shape) for known in types))
        if terms is None or (self.real and types[0].dtype.is_complex):
            return None
        return Product(EinsumSpec(*terms), operands, added)  # type: ignore[arg-type]


def _labels(count: int) -> str:
    # The first letters are those of the tables below.
    return "".join(symbol(number) for number in range(26, 26 + count))


def _matmul(left: int, right: int) -> _Terms | None:
    """Batches of matrices, a vector on either side."""
    if not left or not right:
        return None
    batch = _labels(max(left, right, 2) - 2)
    first = batch[len(batch) - (left - 2) :] + "ik" if left > 1 else "k"
    second = batch[len(batch) - (right - 2) :] + "kj" if right > 1 else "k"
    return (first, second), batch + "i" * (left > 1) + "j" * (right > 1)


def _linear(left: int, right: int) -> _Terms | None:
    if not left or right not in (1, 2):
        return None
    rows = _labels(left - 1)
    return (rows + "k", "jk" if right == 2 else "k"), rows + "j" * (right == 2)


def _inner(left: int, right: int) -> _Terms | None:
    if not left or not right:
        return None
    labels = _labels(left + right - 2)
    return (labels[: left - 1] + "k", labels[left - 1 :] + "k"), labels


def _vecdot(left: int, right: int) -> _Terms | None:
    if not left or not right:
        return None
    labels = _labels(max(left, right) - 1)
    return (labels[len(labels) - left + 1 :] + "k", labels[len(labels) - right + 1 :] + "k"), labels


def _bilinear(left: int, right: int, weight: int) -> _Terms | None:
    if not left or left != right or weight != 3:
        return None
    rows = _labels(left - 1)
    return (rows + "i", rows + "k", "jik"), rows + "j"


def _fixed(equation: str) -> Callable[..., _Terms | None]:
    """Terms of operands whose ranks the call itself demands."""
    left, _, output = equation.partition("->")
    inputs = tuple(left.split(","))

    def terms(*ranks: int) -> _Terms | None:
        return (inputs, output) if tuple(map(len, inputs)) == ranks else None

    return terms


def _read_chain(node: fx.Node) -> Product | None:
    """``multi_dot(tensors)``, ``chain_matmul(*tensors)``: the first and the last may be vectors."""
    if node.kwargs and (node.args or set(node.kwargs) != {"tensors"}):
        return None
    tensors: Any = node.args or tuple(node.kwargs.values())
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        (tensors,) = tensors
    types = [type_of(tensor) for tensor in tensors]
    ranks = [len(known.shape) for known in types if known is not None]
    if len(types) < 2 or len(ranks) < len(types) or not set(ranks) <= {1, 2} or 1 in ranks[1:-1]:
        return None
    labels = _labels(len(ranks) + 1)
    terms = [labels[number : number + 2] for number in range(len(ranks))]
    terms[0], terms[-1] = terms[0][-ranks[0] :], terms[-1][: ranks[-1]]
    output = labels[0] * (ranks[0] == 2) + labels[-1] * (ranks[-1] == 2)
    return Product(EinsumSpec(tuple(terms), output), tuple(tensors))


# --- element by element -----------------------------------------------------------------------------------------------


def _elementwise(left: int, right: int) -> _Terms:
    labels = _labels(max(left, right))
    return (labels[len(labels) - left :], labels[len(labels) - right :]), labels


def _read_multiply(node: fx.Node) -> Product | None:
    """A tensor times a tensor. Dimensions of size 1 that a call made for it (``x[:, None] * w``) are not looked at."""
    product = _MULTIPLY(node)
    if product is None:
        return None
    terms, output, operands = product.spec.inputs, product.spec.output, product.operands
    bare = [_without_new_dims(operand, term, node) for operand, term in zip(operands, terms, strict=True)]
    if set(output) != {label for _, term in bare for label in term}:
        return product
    return Product(EinsumSpec(tuple(term for _, term in bare), output), tuple(operand for operand, _ in bare))


def _without_new_dims(operand: fx.Node, term: str, user: fx.Node) -> tuple[fx.Node, str]:
    """What ``operand`` is a view of that only adds dimensions, and the labels that are left."""
    while uses(operand) == 1 and same_mode(operand, user) and (places := _new_dims(operand)) is not None:
        term = "".join(label for place, label in enumerate(term) if place not in places)
        (operand, *_) = operand.all_input_nodes
    return operand, term


def _new_dims(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions of size 1 that a call adds to its operand, where it does nothing else."""
    known = type_of(node)
    if known is None or node.kwargs or len(node.args) != 2 or type_of(node.args[0]) is None:
        return None
    argument = node.args[1]
    if node.target in _UNSQUEEZE and type(argument) is int:
        return (range(len(known.shape))[argument],)
    if node.target is not operator.getitem:
        return None
    items = argument if isinstance(argument, tuple) else (argument,)
    if not any(item is None for item in items) or not all(
        item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items
    ):
        return None
    after = len(items) - 1 - items.index(Ellipsis) if Ellipsis in items else 0
    places = [place for place, item in enumerate(items) if item is None]
    if Ellipsis not in items:
        return tuple(places)
    return tuple(p if p < len(items) - 1 - after else len(known.shape) - (len(items) - p) for p in places)


def _read_sum(node: fx.Node) -> Product | None:
    """``x.sum(dim)``, of all dimensions where none are named. (What keeps them has another shape, and is not read.)"""
    arguments = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | given(node.kwargs)
    known = type_of(arguments.get("input"))
    dims = arguments.get("dim")
    if known is None or len(node.args) > 3 or not set(arguments) <= {"input", "dim", "keepdim"}:
        return None
    dims = range(len(known.shape)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    if not dims or not all(type(dim) is int for dim in dims):
        return None
    labels = _labels(len(known.shape))
    summed = {labels[dim] for dim in dims}
    output = "".join(label for label in labels if label not in summed)
    return Product(EinsumSpec((labels,), output), (arguments["input"],))


def _read_diagonal(node: fx.Node) -> Product | None:
    """``x.diagonal(offset=0, dim1=0, dim2=1)`` of equal sizes."""
    arguments = {"offset": 0, "dim1": 0, "dim2": 1}
    arguments |= dict(zip(("input", *arguments), node.args, strict=False)) | given(node.kwargs)
    known = type_of(arguments.get("input"))
    offset, *dims = (arguments[name] for name in ("offset", "dim1", "dim2"))
    if known is None or len(arguments) > 4 or len(node.args) > 4 or offset != 0 or len(known.shape) < 2:
        return None
    if not all(type(dim) is int for dim in dims):
        return None
    first, second = (range(len(known.shape))[dim] for dim in dims)
    if known.shape[first] != known.shape[second]:
        return None
    labels = _labels(len(known.shape))
    rest = "".join(label for place, label in enumerate(labels) if place not in (first, second))
    term = "".join(labels[first] if place == second else label for place, label in enumerate(labels))
    return Product(EinsumSpec((term,), rest + labels[first]), (arguments["input"],))  # type: ignore[arg-type]


def _read_trace(node: fx.Node) -> Product | None:
    known = type_of(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
    if known is None or len(known.shape) != 2 or known.shape[0] != known.shape[1]:
        return None
    return Product(EinsumSpec(("ii",), ""), (node.args[0],))  # type: ignore[arg-type]


# --- permutations -----------------------------------------------------------------------------------------------------


def _permuted(node: fx.Node, order: Callable[..., list[int] | None], *arguments: Any) -> Product | None:
    (operand, *_), known = node.args, type_of(node.args[0])
    if known is None or not isinstance(operand, fx.Node):
        return None
    rank = len(known.shape)
    try:
        places = order(rank, *arguments)
    except (TypeError, IndexError, ValueError):  # an argument that is no number, a keyword, a name
        return None
    if places is None or sorted(places) != list(range(rank)):
        return None
    labels = _labels(rank)
    return Product(EinsumSpec((labels,), "".join(labels[place] for place in places)), (operand,))


def _read_permutation(node: fx.Node) -> Product | None:
    if not node.args or node.kwargs:
        return None
    return _permuted(node, _PERMUTATIONS[node.target], *node.args[1:])


def _read_attribute(node: fx.Node) -> Product | None:
    order = _ATTRIBUTES.get(str(node.args[1])) if len(node.args) == 2 else None
    return _permuted(node, order) if order else None


def _permute(rank: int, *dims: Any) -> list[int]:
    (dims,) = dims if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else (dims,)
    return [range(rank)[dim] for dim in dims]


def _transpose(rank: int, first: int, second: int) -> list[int]:
    places = list(range(rank))
    places[first], places[second] = places[second], places[first]
    return places


def _turn(rank: int) -> list[int] | None:
    return list(reversed(range(rank))) if rank < 3 else None


def _turn_matrices(rank: int) -> list[int] | None:
    return _transpose(rank, -2, -1) if rank > 1 else None


def _movedim(rank: int, source: Any, destination: Any) -> list[int] | None:
    sources, destinations = (
        [range(rank)[dim] for dim in ((dims,) if isinstance(dims, int) else dims)] for dims in (source, destination)
    )
    if len(set(sources)) < len(sources) or len(set(destinations)) < len(destinations):
        return None
    moved = dict(zip(destinations, sources, strict=True))
    rest = iter([dim for dim in range(rank) if dim not in sources])
    return [moved[dim] if dim in moved else next(rest) for dim in range(rank)]


def spellings(*names: str) -> frozenset[Any]:
    """All targets of calls with one of these names: of methods, of ``torch``, of ``torch.Tensor``."""
    found: list[Any] = list(names)
    for module in (torch, torch.Tensor):
        found += [getattr(module, name) for name in names if hasattr(module, name)]
    return frozenset(found)


# --- the tables -------------------------------------------------------------------------------------------------------

_PERMUTATIONS: dict[Any, Callable[..., list[int] | None]] = {
    target: order
    for names, order in (
        (("permute",), _permute),
        (("transpose", "swapaxes", "swapdims"), _transpose),
        (("t",), _turn),
        (("movedim", "moveaxis"), _movedim),
    )
    for target in spellings(*names)
}
_ATTRIBUTES = {"T": _turn, "mT": _turn_matrices}
_PERMUTATION_READERS = (_read_permutation, _read_attribute)

_MULTIPLY = _Row(("input", "other"), ("input", "other"), _elementwise)
_UNSQUEEZE = spellings("unsqueeze")
_SUMS = spellings("sum") | {torch.linalg.vecdot}

_ONE = {"beta": 1, "alpha": 1}
_ROWS: tuple[tuple[frozenset[Any], _Reader], ...] = (
    (
        spellings("matmul", "__matmul__") | {operator.matmul, torch.linalg.matmul},
        _Row(("input", "other"), ("input", "other"), _matmul),
    ),
    (spellings("mm"), _Row(("input", "mat2"), ("input", "mat2"), _fixed("ik,kj->ij"))),
    (spellings("bmm"), _Row(("input", "mat2"), ("input", "mat2"), _fixed("bik,bkj->bij"))),
    (spellings("mv"), _Row(("input", "vec"), ("input", "vec"), _fixed("ik,k->i"))),
    (spellings("dot"), _Row(("input", "tensor"), ("input", "tensor"), _fixed("k,k->"))),
    (spellings("vdot"), _Row(("input", "other"), ("input", "other"), _fixed("k,k->"), real=True)),
    (spellings("outer", "ger"), _Row(("input", "vec2"), ("input", "vec2"), _fixed("i,j->ij"))),
    (spellings("inner"), _Row(("input", "other"), ("input", "other"), _inner)),
    (frozenset({torch.linalg.vecdot}), _Row(("x", "y", "dim"), ("x", "y"), _vecdot, only={"dim": -1}, real=True)),
    (
        frozenset({torch.nn.functional.linear}),
        _Row(("input", "weight", "bias"), ("input", "weight"), _linear, "bias"),
    ),
    (
        frozenset({torch.nn.functional.bilinear}),
        # Autograd does not follow that of complex operands.
        _Row(("input1", "input2", "weight", "bias"), ("input1", "input2", "weight"), _bilinear, "bias", real=True),
    ),
    (
        spellings("addmm"),
        _Row(("input", "mat1", "mat2", *_ONE), ("mat1", "mat2"), _fixed("ik,kj->ij"), "input", _ONE),
    ),
    (
        spellings("baddbmm"),
        _Row(("input", "batch1", "batch2", *_ONE), ("batch1", "batch2"), _fixed("bik,bkj->bij"), "input", _ONE),
    ),
    (spellings("addmv"), _Row(("input", "mat", "vec", *_ONE), ("mat", "vec"), _fixed("ik,k->i"), "input", _ONE)),
    (frozenset({torch.linalg.multi_dot, torch.chain_matmul, torch.functional.chain_matmul}), _read_chain),
    (spellings("mul", "multiply", "__mul__") | {operator.mul}, _read_multiply),
    (spellings("sum"), _read_sum),
    (spellings("diagonal"), _read_diagonal),
    (spellings("trace"), _read_trace),
    (frozenset(_PERMUTATIONS), _read_permutation),
    (frozenset({builtins.getattr}), _read_attribute),
)
_MATRIX_PRODUCTS = frozenset(
    target for targets, reader in _ROWS if reader is _read_chain or isinstance(reader, _Row) for target in targets
)
_READERS: dict[Any, _Reader] = {target: reader for targets, reader in _ROWS for target in targets}
