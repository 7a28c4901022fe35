"""Symbolic numbers while ``forward`` is traced: sizes, and Python numbers among the arguments, that vary between calls.

User code sees ``int`` and ``float`` that compute as usual; each comparison, and each conversion to a number proper, is
noted as a condition, so that what was traced holds wherever the conditions do. torch's ``ShapeEnv`` does the algebra.
"""

from __future__ import annotations

import ast
import inspect
import operator
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from .errors import UntraceableError
from .sizes import SymbolicSize, is_symbolic
from .where import user_line


class NotGenericError(UntraceableError):
    """A call can be traced for its own sizes only.

    Args:
        reason: why.
        fixed: the symbols that have one value in the code, where it is that.
    """

    def __init__(self, reason: str, fixed: frozenset[str] = frozenset()) -> None:
        super().__init__(reason)
        self.fixed = fixed


class _Int(torch.SymInt):
    """What user code gets for a size: an ``int`` to ``isinstance``, which decides what code does with it."""

    __class__ = property(lambda self: int)

    def __index__(self) -> int:
        _note_use(self)
        return operator.index(plain(self))

    __int__ = __index__

    def __hash__(self) -> int:
        # A cache of the user's would keep what is made of this number, under a key that the number itself finds.
        raise TypeError("a size that varies has no hash")

    def __repr__(self) -> str:
        return repr(operator.index(self))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(operator.index(self), spec)

    def __bool__(self) -> bool:
        return bool(plain(self) != 0)


class _Float(torch.SymFloat):
    """The same for a ``float``."""

    __class__ = property(lambda self: float)

    def __float__(self) -> float:
        _note_use(self)
        return _float(plain(self))

    def __int__(self) -> int:
        return int(float(self))

    def __hash__(self) -> int:
        raise TypeError("a number that varies has no hash")

    def __repr__(self) -> str:
        return repr(float(self))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __bool__(self) -> bool:
        return bool(plain(self) != 0.0)


def _make(kind: Any, value: Any) -> Any:
    made = kind(value.node)
    given = _GIVEN.get(value.node.shape_env)
    if given is not None and kind in (_Int, _Float):
        given.append(weakref.ref(made))
    return made


_GIVEN: weakref.WeakKeyDictionary[Any, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()
"""What user code was given, by the environment of the trace."""


_USES: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
"""Where user code took a symbolic number for what it is in the present call, by the environment of the trace."""


def _note_use(value: Any) -> None:
    uses = _USES.get(value.node.shape_env)
    if uses is not None:
        uses.append(user_line())


def seen(value: Any) -> Any:
    """``value``, which torch gave, as user code is to see it: a comparison's result is decided, and noted."""
    kind = type(value)
    if kind is torch.SymInt:
        return _make(_Int, value)
    if kind is torch.SymFloat:
        return _make(_Float, value)
    if kind is torch.SymBool:
        return bool(value)
    if kind is torch.Size:
        return torch.Size([seen(item) for item in value])
    return tuple(seen(item) for item in value) if kind is tuple else value


def plain(value: Any) -> Any:
    """``value``, which user code gave, as torch takes it."""
    kind = type(value)
    if kind is _Int:
        return _make(torch.SymInt, value)
    if kind is _Float:
        return _make(torch.SymFloat, value)
    if kind in (tuple, list, torch.Size):
        return kind(plain(item) for item in value) if kind is not list else [plain(item) for item in value]
    if kind is dict:
        return {key: plain(item) for key, item in value.items()}
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def is_symbol(value: object) -> bool:
    """Whether ``value`` is a symbolic number."""
    return type(value) in (_Int, _Float, torch.SymInt, torch.SymFloat)


def _give_operators() -> None:
    def method(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *others: seen(function(plain(self), *map(plain, others)))

    def reflected(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: seen(function(plain(other), plain(self)))

    for kind in (_Int, _Float):
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
            setattr(kind, f"__{name}__", method(getattr(operator, name)))
            setattr(kind, f"__r{name}__", reflected(getattr(operator, name)))
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs"):
            setattr(kind, f"__{name}__", method(getattr(operator, name)))


_give_operators()


def _float(value: Any) -> float:
    return float(value.node.guard_float("", 0)) if isinstance(value, torch.SymFloat) else float(value)


@lru_cache(maxsize=1)
def _shape_env_class() -> Any:
    """``ShapeEnv`` that does not look for the user's frame, to name it in its own logs: finding out which files are the
    user's imports all of ``torch.export`` (130 ms).
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Quick(ShapeEnv):
        def _get_user_frame(self) -> Any:
            return inspect.currentframe()

    return Quick


class Symbols:
    """The symbols of one trace.

    Everything private of torch that symbolic shapes need (``ShapeEnv``, its symbols and the printer of its expressions)
    is used here only. The public ways to it, ``torch.export`` and ``mark_dynamic``, come with Dynamo's whole capture.

    Args:
        examples: the value of each symbol in the call at hand; integers are at least 2, here and wherever the trace
            holds, as torch treats 0 and 1 in their own way.

    Attributes:
        given: the numbers that user code was given, none of which may outlive the trace.
    """

    def __init__(self, examples: Mapping[str, int | float]) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        self.shape_env = _shape_env_class()(specialize_zero_one=True, duck_shape=False)
        self.given = _GIVEN.setdefault(self.shape_env, [])
        self._uses = _USES.setdefault(self.shape_env, [])
        self.examples = dict(examples)
        self._numbers: dict[str, Any] = {}
        self._names: dict[Any, str] = {}
        for name, example in examples.items():
            source = ConstantSource(name)
            if isinstance(example, int):
                made = self.shape_env.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC)
                number: Any = self.shape_env.create_symintnode(made, hint=example, source=source)
            else:
                made = self.shape_env.create_unspecified_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC)
                number = self.shape_env.create_symfloatnode(made, hint=example, source=source)
            self._numbers[name] = number
            self._names[number.node.expr] = name

    def number(self, size: Any) -> Any:
        """What torch takes for a symbol's name, or for a size in symbols."""
        if isinstance(size, str):
            return self._numbers[size]
        if not is_symbolic(size):
            return size
        value: Any = size.coefficient
        for atom, power in size.factors:
            for _ in range(power):
                value = value * self._numbers[atom]
        return value

    def text(self, value: Any) -> str:
        """The Python expression of a symbolic number."""
        return self._text(value.node.expr)

    def size(self, value: Any) -> int | SymbolicSize:
        """A size that torch gave, or one in symbols, in terms of as few symbols as the conditions allow."""
        value = self.number(value)
        if not isinstance(value, torch.SymInt):
            return int(value)
        import sympy

        expression = _exact(self.shape_env.simplify(value.node.expr))
        if expression.is_number:
            return int(expression)
        example = self.example(value)
        if example < 2:
            raise NotGenericError(f"a size of {example} is made of sizes that vary ({self._text(expression)})")
        coefficient, factors = 1, []
        for factor in sympy.Mul.make_args(expression):
            if factor.is_Integer:
                coefficient *= int(factor)
                continue
            base, power = factor.as_base_exp() if factor.is_Pow else (factor, 1)
            if not int(power) == power > 0:
                base, power = factor, 1
            text = self._text(base)
            factors.append((text if text.isidentifier() else f"({text})", int(power)))
        return SymbolicSize(example, coefficient, tuple(sorted(factors)))

    def example(self, value: Any) -> int:
        """The value of a size in the call at hand."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        return int(value.node.expr.subs({symbol: self.examples[name] for symbol, name in self._names.items()}))

    def conditions(self) -> tuple[str, ...]:
        """What must hold of the symbols for the trace to hold, as Python expressions.

        Raises:
            NotGenericError: a symbol must have the value that it has here.
        """
        fixed = frozenset(name for symbol, name in self._names.items() if self.shape_env.replace(symbol).is_number)
        if fixed:
            place = f" at {self._uses[0]}" if self._uses else ""
            raise NotGenericError(f"forward uses a size that varies for more than arithmetic{place}", fixed)
        found = [self._text(guard.expr) for guard in self.shape_env.guards]
        for symbol, name in self._names.items():
            replaced = self.shape_env.replace(symbol)
            if replaced != symbol:
                found.append(f"{name} == {self._text(replaced)}")
        return tuple(dict.fromkeys(found))

    def _text(self, expression: Any) -> str:
        from torch.utils._sympy.printers import PythonPrinter

        unknown = [str(symbol) for symbol in expression.free_symbols if symbol not in self._names]
        if unknown:
            raise NotGenericError(f"a size depends on values of a tensor ({unknown[0]})")
        named = expression.subs({symbol: _symbol(name) for symbol, name in self._names.items()})
        return _plain_python(PythonPrinter().doprint(named))


def _exact(expression: Any) -> Any:
    """``expression`` with quotients that have no remainder, as ``s0**2 // s0``, written as what they are."""
    import sympy
    from torch.utils._sympy.functions import FloorDiv

    def quotient(base: Any, divisor: Any) -> Any:
        ratio = sympy.cancel(base / divisor)
        whole = ratio.is_polynomial() and all(term.as_coeff_Mul()[0].is_integer for term in ratio.as_ordered_terms())
        return ratio if whole else FloorDiv(base, divisor)

    return expression.replace(FloorDiv, quotient)


def _symbol(name: str) -> Any:
    import sympy

    # As torch's own are: without this, expressions would simplify otherwise.
    return sympy.Symbol(name, integer=True, positive=True) if name[0] == "s" else sympy.Symbol(name, real=True)


_FUNCTIONS = {"torch.sym_float": "float", "torch._sym_sqrt": "math.sqrt"} | {
    name: name for name in ("math.sqrt", "math.ceil", "math.floor", "math.trunc")
}
_BUILTINS = frozenset({"max", "min", "float", "int", "abs"})
_ALLOWED = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Load, ast.Call),
    *(ast.Attribute, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def _plain_python(text: str) -> str:
    """What torch's printer gives, with plain functions; anything else is refused."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise NotGenericError(f"a size is an expression that code can't be made of ({text})")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name not in _FUNCTIONS and name not in _BUILTINS:
                raise NotGenericError(f"a size is an expression that code can't be made of ({text})")
            node.func = ast.parse(_FUNCTIONS.get(name, name), mode="eval").body
    return ast.unparse(tree)
