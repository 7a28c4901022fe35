"""``module_source``: a specialized program as the source of a Python module that needs torch alone."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from .argument_names import argument_names
from .calls import HOOKS
from .data import Structure, in_code
from .errors import LazyEinsumError
from .graph import empty_like, type_of
from .live import LiveCall, set_attribute
from .record import Result
from .signature import Alias, Arguments, Signature, Symbol, TensorType
from .sizes import is_symbolic
from .version import __version__


@dataclass(frozen=True, slots=True)
class Program:
    """What is written down.

    Attributes:
        owner: what was specialized, a module or another callable.
        signature: what the code is for.
        graph: the code; ``get_attr`` nodes for what it reads of the module.
        state: the live object for each of their targets.
        result: what the call gives, of the graph's flat output; ``None`` where that is the result itself.
        conditions: on the symbols among the arguments, as Python expressions, for which the code is right.
        switches_grad: whether it switches the grad mode on the way.
    """

    owner: Any
    signature: Signature
    graph: fx.Graph
    state: Mapping[str, Any]
    result: Result | None
    conditions: Sequence[str]
    switches_grad: bool


def module_source(program: Program) -> str:
    """The source of a module with a class ``Specialized``.

    Raises:
        LazyEinsumError: the program holds what can't be written down; the message says what, and what to change.
    """
    for node in program.graph.nodes:
        _check_call(node)
    name = getattr(program.owner, "__qualname__", type(program.owner).__qualname__)
    names = _parameter_names(program.owner, program.signature.arguments)
    registered = _registered(program)
    code = _write(program, names.values(), registered)
    parts = [
        f'"""{_quotable(_description(program, name, names, registered))}\n"""',
        "\n".join(_imports(code, program.conditions)),
        _check_function(program, names),
        _class(program, name, registered, code.src),
    ]
    return "\n\n\n".join(parts).replace('"""\n\n\n', '"""\n\n', 1) + "\n"


def refusal(what: str, instead: str) -> LazyEinsumError:
    """The error for what can't be written down.

    Args:
        what: is in the way.
        instead: what to do.
    """
    return LazyEinsumError(f"this code can't be written down as a module of its own: {what}; {instead}")


# -- names


_TAKEN = frozenset(
    {*dir(builtins), *"self torch inf nan NoneType device fx_pytree pytree check math OrderedDict".split()}
    | set("name tensor expected shape strides dtype follows found steps".split())  # variables of ``check``
)


def _parameter_names(owner: Any, arguments: Arguments) -> dict[int, str]:
    """A Python name for each leaf of the arguments that the code takes."""
    found: dict[int, str] = {}
    for number, text in enumerate(argument_names(owner, arguments)):
        if isinstance(arguments.leaves[number], (TensorType, Symbol)):
            name = re.sub(r"\W+", "_", text).strip("_") or "x"
            name = f"x{name}" if name[0].isdigit() else name
            while name in _TAKEN or keyword.iskeyword(name) or name in found.values() or name in arguments.symbols:
                name += "_"
            found[number] = name
    return found


@dataclass(frozen=True, slots=True)
class _Registered:
    """A parameter or buffer that the code reads.

    Attributes:
        name: in the state dict of the module.
        is_parameter: whether it is a parameter.
        type: that it had when the code was made.
    """

    name: str
    is_parameter: bool
    type: TensorType

    @property
    def statement(self) -> str:
        """The call that registers one like it."""
        known = self.type
        holder, _, last = self.name.rpartition(".")
        target = f'self.get_submodule("{holder}")' if holder else "self"
        if known.is_contiguous:
            made = f"torch.zeros({tuple(known.shape)}, dtype={known.dtype})"
        else:
            made = f"torch.empty_strided({tuple(known.shape)}, {tuple(known.stride)}, dtype={known.dtype}).zero_()"
        if not self.is_parameter:
            return f'{target}.register_buffer("{last}", {made})'
        option = "" if known.requires_grad else ", requires_grad=False"
        return f'{target}.register_parameter("{last}", torch.nn.Parameter({made}{option}))'


def _registered(program: Program) -> dict[str, _Registered]:
    """What the ``get_attr`` nodes of the program give, by their targets."""
    owner = program.owner
    tensors: dict[int, list[str]] = {}
    saved: Collection[str] = ()
    if isinstance(owner, nn.Module):
        for name, tensor in (*owner.named_parameters(remove_duplicate=False), *owner.named_buffers("", True, False)):
            tensors.setdefault(id(tensor), []).append(name)
        saved = owner.state_dict().keys()
    found: dict[str, _Registered] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr" or not node.users or node.target in found:
            continue
        live, target = program.state[node.target], str(node.target)
        known = type_of(node)
        if known is None or not isinstance(live, torch.Tensor):
            kind = type(live).__name__
            raise refusal(f"it uses {target}, a {kind}", "let forward use tensors and plain data only")
        names = tensors.get(id(live), [])
        if not names:
            raise refusal(
                f"it reads the tensor {target}, which is no parameter or buffer of the module",
                "make it an argument, or register it with register_buffer",
            )
        stored = [name for name in names if name in saved]
        if not stored:
            raise refusal(
                f"it reads the buffer {names[0]}, which is not in the state_dict",
                "register it with persistent=True",
            )
        if (known.shape, known.dtype) != (live.shape, live.dtype) or type(live) not in (torch.Tensor, nn.Parameter):
            raise refusal(
                f"{names[0]} is {TensorType.of(live)} ({type(live).__name__}) now, the code was made for {known}",
                "call prepare() again, and write down what that gives",
            )
        if any(step == 0 and size > 1 for size, step in zip(known.shape, known.stride, strict=True)):
            raise refusal(f"{names[0]} is expanded (strides {known.stride})", "make it contiguous() in the module")
        name = target if target in stored else stored[0]
        found[target] = _Registered(name, isinstance(live, nn.Parameter), known)
    return found


# -- the code


def _write(program: Program, names: Collection[str], registered: Mapping[str, _Registered]) -> fx.graph.PythonCode:
    """The program as the source of a function ``forward``, with its own names for what it takes and reads."""
    new = empty_like(program.graph)
    values: dict[fx.Node, Any] = {}
    left = iter(names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = new.placeholder(next(left))
        elif node.op == "get_attr":
            if node.users:
                name = f"{node.name}_" if node.name == "check" else node.name  # which is the function beside the class
                values[node] = new.create_node("get_attr", _Path(registered[node.target].name), name=name)
        elif node.op == "output":
            new.output(_result(new, program.result, fx.map_arg(node.args[0], values.__getitem__)))
        else:
            values[node] = new.node_copy(node, values.__getitem__)
    return new.python_code("self")


class _Path(str):
    """A qualified name that ``fx`` writes as Python code, by ``getattr`` where a step is no name in Python. (It asks
    ``isidentifier`` of each, which is true of ``class``.)
    """

    def split(self, *args: Any) -> Any:
        return [_Step(step) for step in super().split(*args)]


class _Step(str):
    def isidentifier(self) -> bool:
        return super().isidentifier() and not keyword.iskeyword(self)


def _check_call(node: fx.Node) -> None:
    """Refuse calls that mean something in the process only in which they were recorded."""
    if isinstance(node.target, LiveCall):
        raise refusal(
            f"it calls the submodule {node.target.name} as it is (that has hooks, is compiled, or one of leaf_modules)",
            "remove its hooks, or leave it out of leaf_modules",
        )
    if node.target is set_attribute:
        raise refusal(f"forward sets the attribute {node.args[1]}", "write into a buffer in place (copy_, add_)")
    if node.op == "call_method" and node.target in HOOKS:
        raise refusal(f"forward calls {node.target}", "give hooks to the results, outside of forward")
    module = getattr(node.target, "__module__", None) or ""
    if module.startswith("torch._ops.") and module.split(".")[2] not in ("aten", "prim", "prims"):
        raise refusal(f"it calls {node.target}, an operation that torch itself does not have", "call torch's own")


def _result(graph: fx.Graph, result: Result | None, outputs: Any) -> Any:
    """What ``forward`` returns, with the graph's nodes at its leaves."""
    if result is None:
        return outputs

    def build(part: Structure | int) -> Any:
        if isinstance(part, int):
            leaf = result.leaves[part]
            return outputs[leaf] if isinstance(leaf, int) else _written(graph, leaf.value)
        items = [build(child) for child in part.children]
        if part.kind in (list, tuple):
            return part.kind(items)
        if part.kind in (dict, OrderedDict):
            keys = [_written(graph, key) for key in part.keys or ()]
            if part.kind is dict:
                return dict(zip(keys, items, strict=True))
            return graph.call_function(OrderedDict, (list(zip(keys, items, strict=True)),))
        if part.kind.__module__ == "torch.return_types":
            return graph.call_function(part.kind, (tuple(items),))
        raise refusal(f"forward returns a {part.kind.__qualname__}", "return a tuple, a list or a dictionary")

    return build(result.structure)


_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def _written(graph: fx.Graph, value: Any) -> Any:
    """A Python value among the results, where code can give it."""
    if type(value) in (tuple, torch.Size):
        items = tuple(_written(graph, item) for item in value)
        return items if type(value) is tuple else graph.call_function(torch.Size, (items,))
    if type(value) not in _PLAIN:
        raise refusal(f"forward returns {value!r}, a {type(value).__qualname__}", "return a number or text")
    return in_code(value) if type(value) is complex else value


_LIBRARY = ("torch", "operator", "_operator", "math", "collections", "builtins")


_NUMBERS = {"inf": "from math import inf", "nan": "from math import nan"}


def _imports(code: fx.graph.PythonCode, conditions: Sequence[str]) -> Iterator[str]:
    """The imports that code of ``fx`` needs. (It names some things whether it uses them or not.)"""
    if any("math." in text for text in conditions):
        yield "import math"
    yield "import torch"
    for name, value in sorted(code.globals.items()):
        if not isinstance(value, ModuleType) and re.search(rf"\b{name}\b", code.src):
            yield _NUMBERS.get(name) or _import(name, value)


def _import(name: str, value: Any) -> str:
    module, word = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if module.split(".")[0] not in _LIBRARY or getattr(sys.modules.get(module), word, None) is not value:
        raise refusal(f"it calls {word or value!r} of {module or 'an unknown module'}", "call functions of torch")
    return f"from {module} import {word}" + (f" as {name}" if name != word else "")


def _class(program: Program, name: str, registered: Mapping[str, _Registered], source: str) -> str:
    """The class ``Specialized``."""
    statements = ["super().__init__()"]
    known: set[str] = set()
    found = {item.name: item for item in registered.values()}
    for item in found.values():
        steps = item.name.split(".")[:-1]
        for depth, step in enumerate(steps):
            path = ".".join(steps[: depth + 1])
            if path not in known:
                known.add(path)
                holder = ".".join(steps[:depth])
                target = f'self.get_submodule("{holder}")' if holder else "self"
                statements.append(f'{target}.register_module("{step}", torch.nn.Module())')
        statements.append(item.statement)
    head, *body = source.strip("\n").split("\n")
    taken = [argument.arg for argument in ast.parse(f"{head}\n    pass").body[0].args.args[1:]]  # type: ignore[attr-defined]
    lines = [
        "class Specialized(torch.nn.Module):",
        f'    """``{name}`` for the arguments that the module\'s docstring names."""',
        "",
        "    def __init__(self):",
        *(f"        {statement}" for statement in statements),
        "",
        *(f"    @{decorator}" for decorator in _decorators(program)),
        f"    def forward({', '.join(['self', *taken])}):",
        f"        check({', '.join(taken)})",
        *(f"    {line}".rstrip() for line in body),
    ]
    return "\n".join(lines)


def _decorators(program: Program) -> Iterator[str]:
    """The modes that the code was made for, as decorators of a function."""
    modes = dict(program.signature.ambient)
    if modes["default_device"]:
        raise refusal(f"it was made with the default device {modes['default_device'][-1]}", "leave torch.device(...)")
    for kind, dtype in modes["autocast"]:
        yield f'torch.autocast("{kind}", dtype={dtype})'
    if modes["inference"]:
        yield "torch.inference_mode()"
    elif not modes["grad"]:
        yield "torch.no_grad()"
    elif program.switches_grad:
        yield "torch.enable_grad()"  # puts the mode back at the end, after an exception too


# -- what it is for


_LOOP = """\
    for name, tensor, expected, shape, strides, dtype, follows in (
{rows}
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{{tensor.dtype}} of shape {{tuple(tensor.shape)}}"
            raise ValueError(f"{{name}} is {{found}}; this code is for {{expected}}")
        steps = zip(shape, tensor.stride(), strides)
        if tensor.numel() and any(size != 1 and step != wanted for size, step, wanted in steps):
            found = f"strides {{tensor.stride()}}"
            raise ValueError(f"{{name}} has {{found}}; this code is for {{expected}}, strides {{strides}}")
        if tensor.requires_grad and not follows and torch.is_grad_enabled():
            raise ValueError(f"{{name}} requires a gradient; this code is for {{expected}}")"""


def _check_function(program: Program, names: Mapping[int, str]) -> str:
    """A function ``check`` of what ``forward`` takes."""
    leaves = program.signature.arguments.leaves
    sizes, rows, checks = [], [], []
    known: set[str] = set()
    for number, name in names.items():
        leaf = leaves[number]
        if isinstance(leaf, Symbol):
            kind = type(leaf.example).__name__
            checks.append((f"type({name}) is {kind}", f"{name} is to be of type {kind}"))
            if leaf.name in known:
                checks.append((f"{name} == {leaf.name}", f"{name} is to be {leaf.name}"))
            else:
                sizes.append(f"    {leaf.name} = {name}")
            known.add(leaf.name)
            continue
        assert isinstance(leaf, TensorType)
        for dim, size in enumerate(leaf.shape):
            if is_symbolic(size) and size.text not in known:
                known.add(size.text)
                sizes.append(f"    {size.text} = {name}.shape[{dim}] if {name}.dim() == {len(leaf.shape)} else -1")
        follows = leaf.requires_grad and not leaf.is_inference
        row = f"{name!r}, {name}, {str(leaf)!r}, {leaf.shape}, {leaf.stride}, {leaf.dtype}, {follows}"
        rows.append(f"        ({row}),")
    least = [f"{name} >= 2" for name, example in program.signature.arguments.symbols.items() if type(example) is int]
    places = _places(names, leaves)
    checks += [(text, f"this code is for {places} where {text}") for text in (*least, *program.conditions)]
    dtype = dict(program.signature.ambient)["default_dtype"]
    if dtype != "torch.float32":
        checks.append((f"torch.get_default_dtype() is {dtype}", f"this code is for the default dtype {dtype}"))
    lines = [
        f"def check({', '.join(names.values())}):",
        '    """Raise a ``ValueError`` where these are not what the code is for."""',
        *sizes,
        *([_LOOP.format(rows="\n".join(rows))] if rows else []),
        *(f"    if not ({text}):\n        raise ValueError({message!r})" for text, message in checks),
    ]
    return "\n".join(lines)


def _places(names: Mapping[int, str], leaves: Sequence[Any]) -> str:
    """The arguments with symbols in them, as text."""
    found = [
        f"{name}: {leaves[number]}"
        for number, name in names.items()
        if isinstance(leaves[number], Symbol) or any(map(is_symbolic, leaves[number].shape))
    ]
    return ", ".join(found)


def _description(program: Program, name: str, names: Mapping[int, str], registered: Mapping[str, _Registered]) -> str:
    """What the code is for, in words."""
    arguments = program.signature.arguments
    lines = [f"``{name}`` as lazy_einsum {__version__} specialized it. Needs torch alone.", ""]
    lines += ["It is for these arguments:", ""]
    for number, (text, leaf) in enumerate(zip(argument_names(program.owner, arguments), arguments.leaves, strict=True)):
        if number in names:
            as_called = "" if text == names[number] else f" (here {names[number]})"
            device = f", on {leaf.device}" if isinstance(leaf, TensorType) else ""
            lines.append(f"    {text}{as_called}: {leaf}{device}")
        elif isinstance(leaf, Alias):
            lines.append(f"    {text}: the same tensor as {names[leaf.leaf]}")
        else:
            lines.append(f"    {text} = {leaf}")
    found = sorted({f"    {item.name}: {item.type}" for item in registered.values()})
    if found:
        lines += [
            "",
            "and these parameters and buffers, which ``load_state_dict(..., strict=False)`` fills:",
            "",
            *found,
        ]
    modes = [f"{mode}={value}" for mode, value in program.signature.ambient if value not in (None, False, ())]
    lines += ["", f"Modes: {', '.join(modes)}."]
    if program.conditions:
        lines += [f"Sizes and numbers: {' and '.join(program.conditions)}."]
    return "\n".join(lines)


def _quotable(text: str) -> str:
    """``text`` as it stands in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
