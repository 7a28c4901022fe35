"""Numbers as factors of tensors: which calls multiply by one, or are multilinear, and how far a factor may move.

A call is *linear of degree d* in an operand when scaling the operand by ``c`` scales the result by ``c ** d``. Tables
below say which calls are; a call that no table
names, or that is written in a form that its rule does not read, stops every factor.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import fx

from .errors import EquationError
from .graph import EINSUM_TARGETS, facts, given, read_einsum, tensor_nodes, type_of
from .products import spellings

_EXACT_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_HALF = frozenset({torch.float16, torch.complex32})

# A factor of this size, moved past a product, makes nothing infinite or subnormal that was well inside the range of
# normal numbers before.
_SMALL_RANGE = (Fraction(1, 10**10), Fraction(10**10))
_LARGE_RANGE = (Fraction(1, 10**100), Fraction(10**100))
_RANGES = {
    torch.float32: _SMALL_RANGE,
    torch.bfloat16: _SMALL_RANGE,
    torch.complex64: _SMALL_RANGE,
    torch.float64: _LARGE_RANGE,
    torch.complex128: _LARGE_RANGE,
}
_HALF_RANGE = (Fraction(1, 100), Fraction(100))


@dataclass(frozen=True, slots=True)
class Factor:
    """An exact product and quotient of Python numbers.

    Attributes:
        value: the number; a ``Fraction`` unless a complex number took part.
        kind: the type that Python gives the same product: ``int`` as long as only integers were multiplied, else
            ``float`` or ``complex``.
    """

    value: Fraction | complex
    kind: type

    @classmethod
    def of(cls, number: object) -> Factor | None:
        """The factor for a Python number; ``None`` where it is zero, infinite, NaN, a ``bool`` or no number at all."""
        if type(number) is int and number != 0:
            return cls(Fraction(number), int)
        if type(number) is float and math.isfinite(number) and number != 0.0:
            return cls(Fraction(number), float)
        if type(number) is complex and math.isfinite(number.real) and math.isfinite(number.imag) and number != 0:
            return cls(number, complex)
        return None

    @property
    def number(self) -> int | float | complex:
        """The Python number to write into code."""
        if isinstance(self.value, complex):
            return self.value
        return int(self.value) if self.kind is int else float(self.value)

    def times(self, other: Factor) -> Factor:
        """Their product."""
        kind = max(self.kind, other.kind, key=(int, float, complex).index)
        if isinstance(self.value, Fraction) and isinstance(other.value, Fraction):
            return Factor(self.value * other.value, kind)
        return Factor(_complex(self.value) * _complex(other.value), kind)

    def power(self, degree: int) -> Factor:
        """``self ** degree``; a negative degree is a division."""
        kind = float if self.kind is int and degree < 0 else self.kind
        return Factor(self.value**degree, kind)

    def fits(self, dtype: torch.dtype | None, reassociate: bool | None = None) -> bool:
        """Whether tensors of ``dtype`` may be multiplied by it early or late, with no harm to range or type.

        Args:
            dtype: of the tensors; ``None`` is unknown, and taken to be real floating point.
            reassociate: True lets factors move in float16 too.
        """
        if dtype is None:
            return self.kind is not complex and self._within(*_SMALL_RANGE)
        if dtype in _EXACT_INTEGERS:
            limits = torch.iinfo(dtype)
            return self.kind is int and isinstance(self.value, Fraction) and limits.min <= self.value <= limits.max
        if self.kind is complex and not dtype.is_complex:
            return False
        if dtype in _HALF:
            return reassociate is True and self._within(*_HALF_RANGE)
        return dtype in _RANGES and self._within(*_RANGES[dtype])

    def _within(self, low: Fraction, high: Fraction) -> bool:
        size = float(abs(self.value)) if isinstance(self.value, complex) else abs(self.value)
        return low <= size <= high


ONE = Factor(Fraction(1), int)


def _complex(value: Fraction | complex) -> complex:
    return value if isinstance(value, complex) else complex(float(value))


class Linear(NamedTuple):
    """What a call computes, seen from its factors: ``factor`` times something of some degree in each operand.

    Attributes:
        factor: the Python numbers in the call itself.
        operands: each place where a tensor enters, with the degree of the result in it.
        only_scales: whether the call does nothing but multiply its one operand by ``factor``.
        layout: what the operands' strides mean for it: "any" nothing, "kept" the result's follow them, "needed" it
            refuses some (``view``).
    """

    factor: Factor
    operands: tuple[tuple[fx.Node, int], ...]
    only_scales: bool = False
    layout: str = "kept"


_MUL = spellings("mul", "multiply", "__mul__", "__rmul__") | {operator.mul}
_DIV = spellings("div", "divide", "true_divide", "__truediv__", "__div__") | {operator.truediv}
_REVERSED_DIV = spellings("__rtruediv__", "__rdiv__")
_NEG = spellings("neg", "negative", "__neg__") | {operator.neg}
_PRODUCTS = spellings(
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "outer", "ger", "inner", "tensordot"
) | {operator.matmul, torch.functional.tensordot}
_UNARY = spellings(
    *(
        "permute",
        "transpose",
        "t",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "unsqueeze",
        "squeeze",
        "reshape",
        "flatten",
        "diagonal",
        "trace",
        "sum",
        "mean",
    )
)
_VIEW = spellings("view")
_LINEAR_ATTRIBUTES = frozenset({"T", "mT"})
_CHANGES_TYPE = frozenset({"dtype", "out"})


Tensors = Set[fx.Node]


def tensors(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of ``graph`` whose values are tensors.

    Without facts: those that aren't plainly numbers or sizes, which is read off the calls that lead to them.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        known = facts(node)
        if (known.type is not None) if known else not _is_number(node, found):
            found.add(node)
    return frozenset(found)


def read_linear(node: fx.Node, among: Tensors) -> Linear | None:
    """How ``node`` depends on the scale of its tensor operands; ``None`` where no table says that it is linear.

    Numbers that are zero, infinite or NaN, ``rounding_mode``, ``dtype`` and ``out`` make a call opaque, and so does
    arithmetic on sizes.

    Args:
        node: the call.
        among: the ``tensors`` of its graph.
    """
    if node.op not in ("call_function", "call_method") or node not in among:
        return None
    rule = _RULES.get(node.target)
    return rule(node, among) if rule else None


def _read_mul(node: fx.Node, among: Tensors) -> Linear | None:
    if given(node.kwargs) or len(node.args) != 2:
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        tensors = tuple((side, 1) for side in (left, right) if side in among)
        return Linear(ONE, tensors) if tensors else None
    tensor, number = (left, right) if isinstance(left, fx.Node) else (right, left)
    return _scaling(tensor, Factor.of(number), among)


def _read_div(node: fx.Node, among: Tensors) -> Linear | None:
    if given(node.kwargs) or len(node.args) != 2:
        return None
    top, bottom = node.args
    if node.target in _REVERSED_DIV:
        top, bottom = bottom, top
    if isinstance(top, fx.Node) and isinstance(bottom, fx.Node):
        tensors = tuple((side, degree) for side, degree in ((top, 1), (bottom, -1)) if side in among)
        return Linear(ONE, tensors) if tensors else None
    if isinstance(bottom, fx.Node):
        factor = Factor.of(top)
        return Linear(factor, ((bottom, -1),)) if factor and bottom in among else None
    factor = Factor.of(bottom)
    return _scaling(top, factor.power(-1) if factor else None, among)


def _read_neg(node: fx.Node, among: Tensors) -> Linear | None:
    if given(node.kwargs) or len(node.args) != 1:
        return None
    return _scaling(node.args[0], Factor(Fraction(-1), int), among)


def _scaling(tensor: object, factor: Factor | None, among: Tensors) -> Linear | None:
    if factor is None or not isinstance(tensor, fx.Node) or tensor not in among:
        return None
    return Linear(factor, ((tensor, 1),), only_scales=True)


def _read_einsum(node: fx.Node, among: Tensors) -> Linear | None:
    try:
        found = read_einsum(node)
    except EquationError:
        return None
    if found is None:
        return None
    spec, operands = found
    return Linear(ONE, tuple((operand, 1) for operand in operands), layout="kept" if spec.is_view_only else "any")


def _read_product(node: fx.Node, among: Tensors) -> Linear | None:
    if len(node.args) < 2 or not set(given(node.kwargs)) <= {"dims"}:
        return None
    left, right, *rest = node.args
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or list(tensor_nodes((rest, node.kwargs))):
        return None
    return Linear(ONE, ((left, 1), (right, 1)), layout="any")


def _read_linear(node: fx.Node, among: Tensors) -> Linear | None:
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | given(node.kwargs)
    left, right = arguments.get("input"), arguments.get("weight")
    if arguments.get("bias") is not None or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    return Linear(ONE, ((left, 1), (right, 1)), layout="any")


def _read_unary(node: fx.Node, among: Tensors) -> Linear | None:
    if not node.args or not isinstance(node.args[0], fx.Node) or _CHANGES_TYPE & set(given(node.kwargs)):
        return None
    if any(other in among for other in tensor_nodes((node.args[1:], node.kwargs))):
        return None
    if any(isinstance(argument, torch.dtype) for argument in node.args[1:]):
        return None
    return Linear(ONE, ((node.args[0], 1),), layout="needed" if node.target in _VIEW else "kept")


def _read_attribute(node: fx.Node, among: Tensors) -> Linear | None:
    tensor, name = node.args[:2]
    if name not in _LINEAR_ATTRIBUTES or not isinstance(tensor, fx.Node):
        return None
    return Linear(ONE, ((tensor, 1),))


_Rule = Callable[[fx.Node, Tensors], Linear | None]
_RULES: dict[Any, _Rule] = {
    target: rule
    for targets, rule in (
        (_MUL, _read_mul),
        (_DIV | _REVERSED_DIV, _read_div),
        (_NEG, _read_neg),
        (EINSUM_TARGETS, _read_einsum),
        (_PRODUCTS, _read_product),
        ({torch.nn.functional.linear}, _read_linear),
        (_UNARY | _VIEW, _read_unary),
        ({builtins.getattr}, _read_attribute),
    )
    for target in targets
}

_NUMBER_METHODS = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "item",
        "tolist",
        "storage_offset",
        "__len__",
        "element_size",
    }
)
_NUMBER_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "requires_grad", "itemsize", "nbytes", "layout"})
_NUMBER_FUNCTIONS = frozenset(
    {
        len,
        int,
        float,
        bool,
        round,
        math.sqrt,
        math.prod,
        math.ceil,
        math.floor,
        math.log,
        math.exp,
        math.log2,
        torch.numel,
    }
)
_NUMBER_IF_OPERANDS_ARE = frozenset(
    {max, min, abs, sum, operator.getitem}
    | {
        getattr(operator, name)
        for name in [
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "neg",
            "pos",
            "abs",
            "and_",
            "or_",
            "lt",
            "le",
            "gt",
            "ge",
            "eq",
            "ne",
        ]
    }
)


def _is_number(node: fx.Node, found: set[fx.Node]) -> bool:
    if node.op == "call_method":
        return node.target in _NUMBER_METHODS
    if node.op != "call_function":
        return False
    if node.target is builtins.getattr:
        return node.args[1] in _NUMBER_ATTRIBUTES
    if node.target in _NUMBER_FUNCTIONS:
        return True
    operands = list(tensor_nodes((node.args, node.kwargs)))
    return node.target in _NUMBER_IF_OPERANDS_ARE and bool(operands) and found.isdisjoint(operands)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the tensor that ``node`` gives, ``None`` where unknown."""
    known = type_of(node)
    return known.dtype if known else None
