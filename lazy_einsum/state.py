"""What a trace read of its module, as data, and the generated function that checks all of it (and the arguments) at a
warm call.

A read is a path from the child (``child.layers[0].weight``) and what was found at its end. ``compile_guard`` turns
the reads of one specialization into one Python function that walks to each of them and fails at the first difference:
nothing that was not read is checked.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch

from . import ambient as ambient_module
from .data import Constant, Structure, array_constant, take_apart
from .signature import Alias, Arguments, Symbol, TensorType
from .sizes import is_symbolic
from .surroundings import Cell, ContextValue, GlobalName, Itself

How = Literal["module", "parameter", "buffer", "attribute", "member", "item", "call", "outer"]
Path = tuple[tuple[How, Any], ...]
"""Steps from the child: a submodule, a parameter, a buffer, any other attribute in an instance's dictionary, one that
lies elsewhere (in a slot), an item of a container, what a weak reference gives when called; or, as first step,
something outside of the child: a global, a variable of an enclosing function, a class attribute.
"""


def path_name(path: Path) -> str:
    """The path as the user would write it after ``child.``, usable as an ``fx`` target where it has no odd item keys.

    >>> path_name((("module", "layers"), ("module", "0"), ("parameter", "weight")))
    'layers.0.weight'
    """
    return ".".join(str(key) for _, key in path)


@dataclass(frozen=True, slots=True)
class ModuleClass:
    """An instance of class ``kind`` was found: a submodule, the child itself, another object."""

    kind: type

    def __str__(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True, slots=True)
class NoHooks:
    """The module at the path was called, and had no hooks.

    Attributes:
        own_forward: whether it has a ``forward`` of its own instance.
    """

    own_forward: bool = False

    def __str__(self) -> str:
        return "no hooks"


@dataclass(frozen=True, slots=True)
class Absent:
    """The module at the path was asked for the attribute ``name`` and had none."""

    name: str

    def __str__(self) -> str:
        return f"no attribute {self.name}"


@dataclass(frozen=True, slots=True)
class Without:
    """The instance at the path has no attributes of these names in its dictionary: they are looked up in its class."""

    names: frozenset[str]

    def __str__(self) -> str:
        return f"without {', '.join(sorted(self.names))}"


@dataclass(frozen=True, slots=True)
class Elements:
    """A set, or a small NumPy array, was found, and with it all that it holds.

    Attributes:
        kind: its class.
        value: a frozen set; or dtype, shape and bytes of an array.
    """

    kind: type
    value: Constant

    def __str__(self) -> str:
        return f"{self.kind.__name__} {self.value!r}"


@dataclass(frozen=True, slots=True)
class Names:
    """All names of one kind (``_modules``, ``_parameters``, ``_buffers``) of the module at the path were listed."""

    table: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.table} {self.names}"


@dataclass(frozen=True, slots=True)
class Container:
    """A list, tuple, dict, set or plain object was found; its items are read one by one.

    Attributes:
        kind: its class.
        keys: keys of a mapping or names of the attributes of an object, in order; else the length.
    """

    kind: type
    keys: tuple[Any, ...] | int

    def __str__(self) -> str:
        return f"{self.kind.__name__} of {self.keys}"


@dataclass(frozen=True, slots=True)
class SameAs:
    """The very object at ``path`` was found (shared weights, a module used twice)."""

    path: Path

    def __str__(self) -> str:
        return f"same as {path_name(self.path)}"


class Reference:
    """A function, class or Python module found; equal to itself only. Held weakly, so that no closure is kept
    alive by a key.
    """

    __slots__ = ("ident", "name", "ref")

    def __init__(self, value: Any) -> None:
        self.ident = id(value)
        self.name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__name__)
        try:
            self.ref: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.ref = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and self.ident == other.ident and self.ref() is other.ref()

    def __hash__(self) -> int:
        return hash(self.ident)

    def __str__(self) -> str:
        return str(self.name)


Guard = Callable[..., "tuple[Any, ...] | None"]
Found = (
    TensorType | Constant | Reference | ModuleClass | NoHooks | Absent | Without | Names | Container | Elements | SameAs
)
Reads = Mapping[tuple[Path, str], Found]
"""What was found, by path and kind of question (one object may be asked for its class, its hooks, an absent
attribute ...), in the order of reading.
"""


def describe_reads(reads: Reads) -> tuple[tuple[str, Found], ...]:
    """The reads as the hashable part ``state`` of a ``Signature``."""
    return tuple(
        (path_name(path) if path and path[0][0] == "outer" else f"self.{path_name(path)}{question}".rstrip("."), found)
        for (path, question), found in reads.items()
    )


_TABLES = {"module": "_modules", "parameter": "_parameters", "buffer": "_buffers"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Writer:
    """Collects the source of one guard function: numbered locals, conditions in order, and the values that the
    source refers to by name.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}
        self._locals: dict[Any, str] = {}

    def name(self, value: Any, prefix: str = "c") -> str:
        name = f"{prefix}{len(self.values)}"
        self.values[name] = value
        return name

    def local(self, key: Any, expression: str) -> str:
        """The local variable that holds ``expression``, assigned at the first request for ``key``."""
        if key not in self._locals:
            self._locals[key] = f"v{len(self._locals)}"
            self.lines.append(f"{self._locals[key]} = {expression}")
        return self._locals[key]

    def locals(self, keys: Sequence[Any], expression: str) -> None:
        """Local variables that hold the items of ``expression``, for keys that have none."""
        names = []
        for key in keys:
            names.append("_" if key in self._locals else f"v{len(self._locals)}")
            self._locals.setdefault(key, names[-1])
        if any(name != "_" for name in names):
            self.lines.append(f"{', '.join(names)}, = {expression}")

    def require(self, condition: str) -> None:
        self.lines.append(f"if not ({condition}): return None")

    def constant(self, variable: str, constant: Constant) -> None:
        value = constant.value
        if value is None or value is True or value is False or value is Ellipsis:
            self.require(f"{variable} is {value}")
        elif type(value) is float and (value != value or value == 0.0):
            # NaN equals nothing and 0.0 == -0.0: the same object passes, else the bits decide.
            sign = math.copysign(1.0, value)
            copysign = self.name(math.copysign)
            same_bits = (
                "False"
                if value != value
                else f"type({variable}) is float and {variable} == 0.0 and {copysign}(1.0, {variable}) == {sign!r}"
            )
            self.require(f"{variable} is {self.name(value)} or ({same_bits})")
        elif type(value) in (int, float, str, bytes):
            self.require(f"{variable} == {self.name(value)} and type({variable}) is {type(value).__name__}")
        elif isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            self.require(f"{variable} is {self.name(value)}")
        else:
            self.require(f"{self.name(Constant)}({variable}) == {self.name(constant)}")


def _write_arguments(writer: _Writer, arguments: Arguments) -> dict[int, str]:
    """Conditions on the structure and constants; the variables of the tensors and of the numbers that are taken as they
    come, in the order of the leaves.
    """
    tensors: dict[int, str] = {}
    args, kwargs = arguments.structure.children
    assert isinstance(args, Structure) and isinstance(kwargs, Structure) and kwargs.keys is not None

    def visit(child: Structure | int, variable: str) -> None:
        if isinstance(child, int):
            leaf = arguments.leaves[child]
            if isinstance(leaf, Constant):
                writer.constant(variable, leaf)
            elif isinstance(leaf, Alias):
                writer.require(f"{variable} is {tensors[leaf.leaf]}")
            elif isinstance(leaf, Symbol):
                writer.require(f"type({variable}) is {type(leaf.example).__name__}")
                tensors[child] = variable
            else:
                tensors[child] = variable
            return
        writer.require(f"type({variable}) is {writer.name(child.kind)}")
        if child.kind in (tuple, list, dict, OrderedDict) or issubclass(child.kind, tuple):
            writer.require(f"len({variable}) == {len(child.children)}")
            visit_items(child, variable)
            return
        # Dataclasses, and classes that torch's pytrees know.
        parts = writer.local((variable, "parts"), f"{writer.name(take_apart)}({variable})")
        writer.require(f"{writer.name(Constant)}({parts}.keys) == {writer.name(Constant(child.keys))}")
        for number, item in enumerate(child.children):
            visit(item, writer.local((variable, number), f"{parts}.items[{number}]"))

    def visit_items(child: Structure, variable: str) -> None:
        if child.keys is not None:
            # In order: user code may iterate over the mapping.
            writer.require(f"tuple({variable}) == {writer.name(child.keys)}")
        for number, item in enumerate(child.children):
            key = number if child.keys is None else writer.name(child.keys[number])
            visit(item, writer.local((variable, number), f"{variable}[{key}]"))

    if args.children and kwargs.keys == () and all(isinstance(child, int) for child in args.children):
        # The usual call, positional leaves only, unpacked at once.
        names = [f"x{number}" for number in range(len(args.children))]
        writer.require(f"len(args) == {len(names)} and not kwargs")
        writer.lines.append(f"{', '.join(names)}, = args")
        for child, name in zip(args.children, names, strict=True):
            visit(child, name)
    else:
        writer.require(f"len(args) == {len(args.children)} and len(kwargs) == {len(kwargs.children)}")
        visit_items(args, "args")
        # Keyword arguments are compared in any order: only **kwargs could tell it, and then its keys are read from
        # here.
        for number, item in enumerate(kwargs.children):
            visit(item, writer.local(("kwargs", number), f"kwargs[{writer.name(kwargs.keys[number])}]"))
        writer.require(f"tuple(kwargs) == {writer.name(kwargs.keys)}" if len(kwargs.keys) > 1 else "True")
    return dict(sorted(tensors.items()))


def _write_symbols(
    writer: _Writer, arguments: Arguments, variables: Mapping[int, str], conditions: Sequence[str]
) -> None:
    """Conditions on the sizes and numbers that vary: equal where they were, and what the trace asked for."""
    known: set[str] = set()
    checks: list[str] = []
    for number, leaf in enumerate(arguments.leaves):
        if isinstance(leaf, Symbol):
            if leaf.name in known:
                checks.append(f"{variables[number]} == {leaf.name}")
            else:
                known.add(leaf.name)
                writer.lines.append(f"{leaf.name} = {variables[number]}")
        elif isinstance(leaf, TensorType):
            for dim, size in enumerate(leaf.shape):
                if not is_symbolic(size):
                    continue
                if str(size) in known:
                    checks.append(f"{variables[number]}.shape[{dim}] == {size}")
                else:
                    known.add(str(size))
                    writer.lines.append(f"{size} = {variables[number]}.shape[{dim}]")
    for number, leaf in enumerate(arguments.leaves):
        if isinstance(leaf, TensorType):
            checks += _stride_checks(variables[number], leaf)
    least = [f"{name} >= 2" for name, example in arguments.symbols.items() if type(example) is int]
    writer.values["math"] = math
    writer.require(" and ".join([*least, *checks, *conditions]))


def _stride_checks(variable: str, known: TensorType) -> Iterator[str]:
    """Conditions on the strides that are made of sizes; and their order, where it depends on those."""
    if not any(map(is_symbolic, known.shape)):
        return
    if known.is_contiguous:
        if any(map(is_symbolic, known.stride)):
            yield f"{variable}.is_contiguous()"
        return
    yield from (f"{variable}.stride({dim}) == {step}" for dim, step in enumerate(known.stride) if is_symbolic(step))
    for one, two in itertools.combinations(known.stride, 2):
        if is_symbolic(one) != is_symbolic(two) and min(int(one), int(two)) > 1:
            yield f"{one} < {two}" if one < two else f"{one} >= {two}"


def _object(writer: _Writer, path: Path) -> str:
    """The local variable that holds the live object at ``path``."""
    if not path:
        return "module"
    *rest, (how, key) = path
    parent = tuple(rest)
    if how == "item":
        holder = _object(writer, parent)
        return writer.local(path, f"{holder}[{writer.name(key)}]")
    if how == "call":
        return writer.local(path, f"{_object(writer, parent)}()")
    if how == "member":
        return writer.local(path, f"{_object(writer, parent)}.{key}")
    if how == "outer":
        if isinstance(key, GlobalName):
            return writer.local(path, f"{writer.name(key.namespace)}[{key.name!r}]")
        if isinstance(key, Cell):
            return writer.local(path, f"{writer.name(key.cell)}.cell_contents")
        if isinstance(key, ContextValue):
            return writer.local(path, f"{writer.name(key.get)}()")
        if isinstance(key, Itself):
            return writer.name(key.value)
        return writer.local(path, f"{writer.name(key.owner)}.{key.name}")
    holder = _dict(writer, parent) if how == "attribute" else _table(writer, parent, _TABLES[how])
    return writer.local(path, f"{holder}[{key!r}]")


def _dict(writer: _Writer, path: Path) -> str:
    return writer.local((path, "__dict__"), f"{_object(writer, path)}.__dict__")


def _table(writer: _Writer, path: Path, table: str) -> str:
    return writer.local((path, table), f"{_dict(writer, path)}[{table!r}]")


def _write_read(writer: _Writer, path: Path, found: Found, tensors: dict[Path, str]) -> None:
    if isinstance(found, Absent):
        attributes = _dict(writer, path)
        name = repr(found.name)
        tables = " and ".join(
            f"{name} not in {attributes}[{table!r}]" for table in ("_parameters", "_buffers", "_modules")
        )
        writer.require(f"{name} not in {attributes} and {tables}")
        return
    if isinstance(found, Names):
        table = _table(writer, path, found.table)
        writer.require(f"tuple({table}) == {writer.name(found.names)}")
        kind = next(how for how, name in _TABLES.items() if name == found.table)
        # 0.01 us an item in place of 0.03 one by one; whoever lists them is going to read them.
        writer.locals([(*path, (kind, name)) for name in found.names], f"{table}.values()")
        return
    if isinstance(found, NoHooks):
        attributes = _dict(writer, path)
        own = "" if found.own_forward else f" or 'forward' in {attributes}"
        writer.require("not (" + " or ".join(f"{attributes}[{hooks!r}]" for hooks in _HOOKS) + own + ")")
        return
    if isinstance(found, Without):
        attributes = _dict(writer, path)
        if len(found.names) <= 2:  # most modules: 0.03 us a name in place of 0.12 for the set
            writer.require(" and ".join(f"{name!r} not in {attributes}" for name in sorted(found.names)) or "True")
        else:
            writer.require(f"{attributes}.keys().isdisjoint({writer.name(found.names)})")
        return
    variable = _object(writer, path)
    if isinstance(found, TensorType):
        tensors[path] = variable
    elif isinstance(found, Constant):
        writer.constant(variable, found)
    elif isinstance(found, Reference):
        writer.require(f"{variable} is {writer.name(found.ref)}()")
    elif isinstance(found, ModuleClass):
        writer.require(f"type({variable}) is {writer.name(found.kind)}")
    elif isinstance(found, SameAs):
        writer.require(f"{variable} is {_object(writer, found.path)}")
    elif isinstance(found, Elements):
        read = writer.name(Constant if found.kind is set else array_constant)
        inside = f"frozenset({variable})" if found.kind is set else variable
        writer.require(
            f"type({variable}) is {writer.name(found.kind)} and {read}({inside}) == {writer.name(found.value)}"
        )
    elif isinstance(found.keys, int):
        writer.require(f"type({variable}) is {writer.name(found.kind)} and len({variable}) == {found.keys}")
    else:
        mapping = variable if issubclass(found.kind, dict) else f"{variable}.__dict__"
        writer.require(
            f"type({variable}) is {writer.name(found.kind)} and tuple({mapping}) == {writer.name(found.keys)}"
        )


def compile_guard(
    arguments: Arguments,
    ambient: tuple[tuple[str, Any], ...],
    reads: Reads,
    wanted: Sequence[Path],
    overlap: Callable[..., bool] | None = None,
    conditions: Sequence[str] = (),
    exceptions: set[Any] | None = None,
    absent: Sequence[tuple[int, str]] = (),
    precision: tuple[Sequence[tuple[str, torch.dtype]], tuple[object, ...]] = ((), ()),
) -> Guard:
    """A function ``(module, args, kwargs)`` that gives what the specialized code takes, or ``None`` where anything that
    was read has changed.

    Hooks of the module itself make it fail too, unless a fourth argument says that they are being run around this call.

    Args:
        arguments: types and constants of the call.
        ambient: the modes of the call, as ``ambient.ambient()`` gives them.
        reads: what the trace read of the module.
        wanted: paths of the state that the code takes, after the tensors among the arguments.
        overlap: where given, called with all tensors (arguments, then state); the guard fails where it returns false.
        conditions: on the symbols among the arguments, as Python expressions.
        exceptions: values of the symbols (a tuple, where there are several) for which the guard fails; it may change.
        absent: attributes that tensors among the arguments (by number) must not have.
        precision: kinds of device and dtypes, and what ``ambient.precisions`` must give for them.
    """
    writer = _Writer()
    modes = dict(ambient)
    # The rest of the ambient state is covered by the tensors' dispatch keys, where there is a tensor.
    writer.require(f"{writer.name(ambient_module.function_modes)}() == {len(modes['default_device'])}")
    writer.require(f"not {writer.name(ambient_module.dispatch_modes)}()")
    writer.require("not (" + " or ".join(writer.name(hooks) for hooks in ambient_module.GLOBAL_HOOKS) + ")")
    writer.require(f"{writer.name(torch.is_grad_enabled)}() is {modes['grad']}")
    if ((), "") in reads:
        attributes = _dict(writer, ())
        writer.require("hooked or not (" + " or ".join(f"{attributes}[{hooks!r}]" for hooks in _HOOKS) + ")")
    variables = _write_arguments(writer, arguments)
    types = [leaf for leaf in arguments.leaves if isinstance(leaf, TensorType)]
    inputs = [variables[number] for number, leaf in enumerate(arguments.leaves) if isinstance(leaf, TensorType)]
    if types:
        writer.require(f"{writer.name(ambient_module.tensor_check(types))}({', '.join(inputs)})")
        writer.require(f"{writer.name(torch.get_default_dtype)}() is {writer.name(torch.get_default_dtype())}")
    if not types or modes["autocast"] or modes["default_device"] or modes["inference"]:
        writer.require(
            f"{writer.name(ambient_module.bypass)}() is None and {writer.name(ambient_module.ambient)}() == "
            f"{writer.name(ambient)}"
        )
    kinds, allowed = precision
    if allowed:
        writer.require(f"{writer.name(ambient_module.precisions)}({writer.name(kinds)}) == {writer.name(allowed)}")
    for number, name in absent:
        writer.require(f"not hasattr({inputs[number]}, {name!r})")
    if arguments.symbols:
        names = ", ".join(arguments.symbols)
        but = f"({names}) not in {writer.name(exceptions)}" if exceptions is not None else "True"
        _write_symbols(writer, arguments, variables, [*conditions, but])
    for variable, known in zip(inputs, types, strict=True):
        if known.requires_grad:
            writer.require(f"{variable}.is_leaf is {known.is_leaf}")
    tensors: dict[Path, str] = {}
    for (path, _), found in reads.items():
        hooks = reads.get((path, " hooks"))
        if isinstance(found, Without) and found.names == {"forward"} and isinstance(hooks, NoHooks):
            continue  # the check of its hooks covers that
        _write_read(writer, path, found, tensors)
    state_types = [found for found in reads.values() if isinstance(found, TensorType)]
    if state_types:
        writer.require(f"{writer.name(ambient_module.tensor_check(state_types))}({', '.join(tensors.values())})")
    if overlap is not None:
        writer.require(f"{writer.name(overlap)}({', '.join([*inputs, *tensors.values()])})")
    values = [*variables.values(), *(_object(writer, path) for path in wanted)]
    body = "\n        ".join(writer.lines)
    source = f"""
def guard(module, args, kwargs, hooked=False):
    try:
        {body}
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        return None
    return ({"".join(f"{value}, " for value in values)})
"""
    scope: dict[str, Any] = dict(writer.values)
    exec(compile(source, "<lazy_einsum guard>", "exec"), scope)
    guard = scope["guard"]
    assert isinstance(guard, FunctionType)
    return guard
