"""The recorder: runs ``forward`` under the layers that ``tracing`` describes, and writes its calls into a graph."""

from __future__ import annotations

import contextvars
import copy
import gc
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from . import ambient as ambient_module
from .calls import (
    ARITHMETIC,
    HOOKS,
    INFERRING,
    LAYOUT_QUERIES,
    OPERATORS,
    QUERIES,
    REFLECTED,
    REFUSED,
    call_name,
    undropped,
)
from .closures import Closures
from .data import Constant, Structure, containers_in, flatten, in_code, is_array, is_constant, unflatten
from .decompose import settings
from .distributed import call_in_precision, is_distributed, is_fully_sharded, precision_of
from .errors import UntraceableError
from .fakes import (
    EagerStrides,
    asked_through,
    disguise,
    empty_meta,
    fake_mode,
    grad_fn_of,
    is_fake,
    is_held,
    make_fake,
    multilinear,
    python_kernels,
    release,
    tensors_in,
    with_tensors,
)
from .graph import (
    CLOSED_DTYPES,
    COPIES_AT_NEED,
    EVERYTHING,
    NUMBER,
    Copies,
    Facts,
    Numbers,
    Writers,
    facts,
    is_einsum,
    is_order_free,
    read_einsum,
    stamp,
    tensor_nodes,
    type_of,
)
from .impure import Watch
from .live import HAS_HOOKS, Caller, LiveCall, direct_call, has_own_call, set_attribute
from .modes import FollowedModes
from .net import Net
from .record import Result, Trace
from .shadow import Shadows
from .signature import Alias, Arguments, Symbol, TensorType, contiguous_strides
from .sizes import is_symbolic
from .state import Path, path_name
from .surroundings import MISSING, Cell, ContextValue, Itself, Ran, read_by_called, read_by_function
from .symbols import NotGenericError, Symbols, is_symbol, plain, seen
from .where import asked_by_torch, user_line

_BESIDE = "a submodule that stays a live call may read that"
BASIC = (
    int,
    float,
    complex,
    bool,
    str,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Plain data that stands in a graph as it is."""
MAX_NODES = 50_000
"""A ``forward`` that calls more functions than this is not traced."""


@dataclass(slots=True)
class _Known:
    """A tracked tensor: the tensor (kept, so that its id stays its own), the node that gives it, and its place in
    autograd's graph when last seen.
    """

    tensor: torch.Tensor
    node: fx.Node
    grad_fn: object


class _Handle:
    """Stands in for what removes a hook: a trace does not follow it.

    Args:
        refuse: makes the error for a reason.
    """

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        self._refuse = refuse

    def __getattr__(self, name: str) -> Any:
        raise self._refuse(f"forward uses {name} of the handle of a hook")


def _numbers(value: Any) -> Iterator[Any]:
    """What is no tensor and no container in nested arguments."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif not isinstance(value, torch.Tensor):
        yield value


class Recorder(TorchFunctionMode):
    """Records one run of one function.

    Args:
        is_leaf: which submodules stay live calls.
        random_state: the generators as they were before.
        symbols: those among the arguments, ``None`` where there are none.
        hooked: what calls a submodule that stays a live call because it has hooks, by its qualified name.
    """

    def __init__(
        self,
        is_leaf: Callable[[nn.Module, str], bool],
        random_state: ambient_module.RandomState,
        symbols: Symbols | None = None,
        hooked: Callable[[str], Caller] = lambda name: direct_call,
    ) -> None:
        super().__init__()
        self._hooked = hooked
        self.graph = fx.Graph()
        self._numbers = Numbers(self.graph)
        self._symbols = symbols
        self.is_generic = symbols is not None
        self._guessed_layout = False
        self._copies = Copies()
        self._unsure_copies: set[int] = set()
        #: Results of einsums that are views in eager, where their fakes are none.
        self._views: set[int] = set()
        self.failure: UntraceableError | None = None
        self.shadows = Shadows(self._fake_state, self._live_call, is_leaf)
        self._closures = Closures(
            self._captured,
            self._itself,
            lambda cell, name: self.shadows.outside.knows(Cell(cell, name)),
            lambda function, args, kwargs: self._stamp_effect(self.graph.call_function(function, args, kwargs)),
            self.fail,
        )
        self._hooks = False
        self._hooked_memory: set[int] = set()
        self._net = Net(self.fail, self.paused)
        self._context = dict(contextvars.copy_context().items())
        self._variables: list[contextvars.ContextVar[Any]] = []
        self._watch = Watch(self.fail, self.shadows.is_shadow, self._use_variable, self.shadows.read_class)
        self._known: dict[int, _Known] = {}
        self._storages: dict[int, tuple[int, Any]] = {}
        self._weak: list[weakref.ref[torch.Tensor]] = []
        self._inputs: list[torch.Tensor] = []
        self._absent: set[tuple[int, str]] = set()
        self._calls_live = False
        self._state: dict[str, Path] = {}
        self._live_of: dict[int, torch.Tensor] = {}
        self._state_of: dict[int, tuple[torch.Tensor, TensorType, Path]] = {}
        self._modules: dict[str, fx.Node] = {}
        self._suspended = 0
        self._modes = FollowedModes(self._write_switch, self._closures.record, self.fail)
        # Under autocast an operation means other operations: nothing is rewritten there.
        self._may_move = not ambient_module.any_autocast()
        self._random_state = random_state
        self._fake_mode = fake_mode(shape_env=symbols.shape_env if symbols else None)

    # -- running

    def run(self, function: Any, arguments: Arguments) -> Any:
        """Run ``function`` on fakes of ``arguments`` under all three layers, in a context of its own; its result."""
        context = contextvars.copy_context()
        result = context.run(self._run, function, arguments)
        for variable in self._variables:
            if self._context.get(variable, MISSING) is not context.get(variable, MISSING):
                raise UntraceableError(f"forward sets {ContextValue(variable)}")
        return result

    def _run(self, function: Any, arguments: Arguments) -> Any:
        if ambient_module.keeps_parametrized():
            raise UntraceableError("torch.nn.utils.parametrize.cached() is active")
        fakes: list[Any] = []
        with self._fake_mode:
            for number, leaf in enumerate(arguments.leaves):
                if isinstance(leaf, Constant):
                    fakes.append(leaf.value)
                elif isinstance(leaf, Alias):
                    fakes.append(fakes[leaf.leaf])
                elif isinstance(leaf, Symbol):
                    assert self._symbols is not None
                    stamp(self.graph.placeholder(f"x{number}"), Facts()).meta[NUMBER] = leaf.name
                    fakes.append(seen(self._symbols.number(leaf.name)))
                else:
                    fake = make_fake(leaf, self._symbols.number) if self._symbols else make_fake(leaf)
                    node = self.graph.placeholder(f"x{number}")
                    self._track(fake, node, leaf)
                    self._inputs.append(fake)
                    fakes.append(fake)
        self._define_sizes()
        args, kwargs = unflatten(arguments.structure, fakes)
        with self._fake_mode:
            # The fakes of parameters are made on the way, below the net.
            if isinstance(function, nn.Module):
                shadow = self.shadows.module(function, ())
                callee: Callable[..., Any] = shadow if has_own_call(function) else shadow.forward
            else:
                callee = function
                if isinstance(function, types.FunctionType):
                    self.shadows.outside.read(read_by_function(function, self.shadows.outside.readers))
            kernels = python_kernels() if self.is_generic else nullcontext()
            answers = asked_through(self._read_attribute, self._set_attribute)
            with kernels, self._net, self, self._watch, answers:
                result = callee(*args, **kwargs)
            self._modes.follow()
        self._check_containers(arguments.structure, (args, kwargs), fakes, result)
        return result

    def _define_sizes(self) -> None:
        """A node for each size that varies and is not also an argument of its own."""
        self._numbers = Numbers(self.graph)
        for node in [node for node in self.graph.nodes if type_of(node)]:
            known = type_of(node)
            assert known is not None
            for dim, size in enumerate(known.shape):
                if is_symbolic(size):
                    self._numbers.define(str(size), node, dim)

    def _use_variable(self, variable: contextvars.ContextVar[Any], method: str) -> None:
        """Put the value of a context variable into the key, unless forward has set it itself."""
        self._variables.append(variable)
        if method == "get" and contextvars.copy_context().get(variable, MISSING) is self._context.get(
            variable, MISSING
        ):
            place = ContextValue(variable)
            if place.get() is MISSING:
                raise self.fail(f"forward asks for {place}, which has no value")
            self.shadows.lift(place.get(), (("outer", place),))

    def _check_containers(self, structure: Structure, given: Any, fakes: list[Any], result: Any) -> None:
        """The user's own lists and dictionaries must be as they were; ``forward`` ran on copies of them."""
        leaves: list[Any] = []
        if flatten(given, leaves) != structure or any(a is not b for a, b in zip(leaves, fakes, strict=True)):
            raise UntraceableError("forward changes a list, dictionary or object among its arguments")
        if not set(map(id, containers_in(given))).isdisjoint(map(id, containers_in(result))):
            raise UntraceableError("forward returns a list, dictionary or object that it was given")

    def finish(self, result: Any) -> Trace:
        """Write the graph's output, make the last checks."""
        if not self._modes.is_grad_left_as_it_was():
            raise UntraceableError("forward leaves the grad mode switched")
        side_effect = self.shadows.side_effect()
        if side_effect is not None:
            raise UntraceableError(side_effect)
        self._closures.check()
        if self._depends_on_order():
            self.shadows.outside.read(settings())
        outside = self.shadows.outside
        outside.read(read_by_called(self._watch.ran or {}, outside.readers))
        self.shadows.settle(Ran(self._watch.ran, outside.by_given_names))
        self._write_assignments()
        build = self._output(result)
        written = {number for node in self.graph.nodes if (known := facts(node)) for number in known.writes}
        given = [*self._inputs, *self._state_fakes()]
        if self.shadows.outside.filled and not written <= {self._storage(fake) for fake in given}:
            raise UntraceableError("forward calls a cached function, and writes to tensors that may be in its cache")
        writes = tuple(self._is_written(fake, written) for fake in given)
        self._erase_unused_reads()
        self._check_copies(written)
        conditions = self._resolve_sizes() if self._symbols else ()
        return Trace(
            self.graph,
            self.shadows.reads,
            self._state,
            build,
            writes,
            self._modes.switches_grad,
            conditions,
            self._modes.switches_others,
            tuple(sorted(self._absent)),
        )

    def _write_assignments(self) -> None:
        """Record what ``forward`` has made attributes and buffers of modules: they are set when all is computed."""
        for path, name, value in self.shadows.assigned():
            if self._calls_live:
                owner = f"{path_name(path)}." if path else ""
                raise UntraceableError(f"forward sets self.{owner}{name}, and {_BESIDE}")
            module = self._live_node(self._target(path), path)
            self._stamp_effect(self.graph.call_function(set_attribute, (module, name, self._node(value))))

    def _note_copy(self, memory: set[int]) -> None:
        """Note the memory of the operand and of the result of a call that copies at need."""
        self._copies.note(memory)
        if self._guessed_layout:
            own = {self._storage(tensor) for tensor in [*self._inputs, *self._state_fakes()]}
            self._unsure_copies |= memory - own

    def _check_copies(self, written: set[int]) -> None:
        """Where generic code makes a view and eager a copy, for some sizes, nothing may tell."""
        output = next(iter(reversed(self.graph.nodes)))
        results = [known.storage for node in tensor_nodes(output.args) if (known := facts(node))]
        if any(number in written or results.count(number) > 1 for number in self._unsure_copies):
            raise NotGenericError(
                "it depends on sizes whether a call behind an einsum copies, and forward writes or returns both values"
            )

    def _resolve_sizes(self) -> tuple[str, ...]:
        """Write the sizes in all facts in terms of as few symbols as forward allows; what it needs of the symbols."""
        assert self._symbols is not None
        size = self._symbols.size
        compound: dict[str, None] = {}
        for node in self.graph.nodes:
            known = facts(node)
            if known is None or known.type is None:
                continue
            shape = tuple(map(size, known.type.shape))
            stride = tuple(map(size, known.type.stride))
            stamp(node, replace(known, type=replace(known.type, shape=shape, stride=stride)))
            compound.update((f"{length.text} >= 2", None) for length in shape if is_symbolic(length))
        # Symbols are at least 2 by definition, and so are their products; passes rely on it for sums and quotients too.
        return (*self._symbols.conditions(), *(text for text in compound if "(" in text))

    def _depends_on_order(self) -> bool:
        """Whether the meaning of an einsum depends on the order in which torch contracts its operands."""
        writers = Writers(self.graph)
        for node in self.graph.nodes:
            found = read_einsum(node) if is_einsum(node) else None
            if found is not None and len(found[1]) > 2 and not is_order_free(node, found[1], writers):
                return True
        return False

    def _state_fakes(self) -> list[torch.Tensor]:
        """The fakes of what was read of the module (and not by a live call), in the order of reading."""
        return [fake for fake, _, path in self._state_of.values() if (path, "") in self.shadows.reads]

    def _is_written(self, fake: torch.Tensor, written: set[int]) -> bool:
        known = self._known.get(id(fake))
        inside = known is not None and (found := facts(known.node)) is not None and found.storage in written
        return inside or EVERYTHING in written

    def forget(self) -> None:
        """Drop all fakes."""
        self._known.clear()
        self._inputs.clear()
        self._state_of.clear()
        self._live_of.clear()
        self._storages.clear()
        self._net.written.clear()
        self._closures.forget()
        self.shadows.forget()

    def are_gone(self) -> bool:
        """Take fakes out of caches of user code; whether that is all. Any other that survives was put by user code
        where later calls may find it (a global).
        """
        given = [*self._weak, *(self._symbols.given if self._symbols is not None else ())]
        if all(reference() is None for reference in given):
            return True
        gc.collect()  # a cycle in user code may hold one until now; only paid in that case
        # x.mul_(x) ties a tensor to itself inside of autograd, where Python's collector does not see it; no code can
        # reach such a one.
        left = [reference for reference in given if is_held(reference)]
        return not left or (release(left) and not any(map(is_held, left)))

    # -- fakes and nodes

    def fail(self, reason: str) -> UntraceableError:
        """Make (and remember, should user code swallow it) the error for ``reason`` at the user's present line."""
        line = user_line()
        error = UntraceableError(f"{reason} at {line}" if line else reason)
        if self.failure is None:
            self.failure = error
        return error

    def _storage(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        return self._storages.setdefault(storage._cdata, (len(self._storages), storage))[0]

    def _facts(self, tensor: torch.Tensor, known: TensorType | None = None, written: tuple[int, ...] = ()) -> Facts:
        return Facts(
            known or TensorType.of(tensor),
            self._storage(tensor),
            written,
            torch.is_grad_enabled(),
            self._movable,
            user_line(),
            self._steady,
            tensor._is_view() or id(tensor) in self._views,
        )

    def _track(
        self, tensor: torch.Tensor, node: fx.Node, known: TensorType | None = None, written: tuple[int, ...] = ()
    ) -> None:
        disguise(tensor)
        self._known[id(tensor)] = _Known(tensor, node, grad_fn_of(tensor))
        self._weak.append(weakref.ref(tensor))
        stamp(node, self._facts(tensor, known, written))

    def _fake_state(self, live: torch.Tensor, known: TensorType, path: Path) -> torch.Tensor:
        with self.paused():
            fake = make_fake(known)
        disguise(fake)
        self._live_of[id(fake)] = live
        self._state_of[id(fake)] = (fake, known, path)
        return fake

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        """The node that gives ``tensor``."""
        found = self._known.get(id(tensor))
        if found is not None:
            now = grad_fn_of(tensor)
            if now is not found.grad_fn and not (isinstance(now, str) and now == found.grad_fn):
                raise self.fail(
                    "a tensor's place in autograd's graph changed outside of a recorded call (a custom "
                    "autograd.Function, ...)"
                )
            return found.node
        if id(tensor) in self._state_of:
            fake, known, path = self._state_of[id(tensor)]
            self._note_outside(tensor)
            node = self._read_node(self._target(path), path)
            self._track(fake, node, known)
            return node
        if not is_fake(tensor):
            return self._node(self._stand_in(tensor))
        raise self.fail(
            "forward uses a tensor made outside of recorded calls (a custom autograd.Function, torch.func, ...)"
        )

    def _note_outside(self, tensor: torch.Tensor) -> None:
        """Note that ``tensor`` is used here, outside of the live call that it may have been found in."""
        if id(tensor) in self._state_of:
            _, known, path = self._state_of[id(tensor)]
            if is_distributed(self._live_of[id(tensor)]):
                raise self.fail(f"forward reads self.{path_name(path)}, which is sharded, outside of its module's call")
            self.shadows.note_outside(path, known)

    def _read_attribute(self, tensor: torch.Tensor, name: str) -> Any:
        """An attribute that the user may have given to a tensor."""
        known = self._state_of.get(id(tensor))
        if known is not None:
            return self.shadows.attribute(self._live_of[id(tensor)], known[2], name)
        if self._calls_live and not any(own is tensor for own in self._inputs):
            raise self.fail(f"forward asks a tensor for {name}, which a hook of a submodule may have given it")
        # What is made inside has none, and that arguments have none is in the key.
        self._absent.update((number, name) for number, own in enumerate(self._inputs) if own is tensor)
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    def _set_attribute(self, tensor: torch.Tensor, name: str) -> UntraceableError:
        return self.fail(f"forward gives a tensor the attribute {name}")

    def _target(self, path: Path) -> str:
        """The name of what lies at ``path``, in code."""
        outer = bool(path) and path[0][0] == "outer"
        target = f"outer.{_identifier(path_name(path))}" if outer else path_name(path) or "module"
        while self._state.get(target, path) != path:
            target += "_"
        return target

    def _live_node(self, target: str, path: Path) -> fx.Node:
        """The node that gives a module, or another object that is no tensor."""
        if target not in self._modules:
            self._modules[target] = self._stamp_effect(self._read_node(target, path))
        return self._modules[target]

    def _read_node(self, target: str, path: Path) -> fx.Node:
        """A ``get_attr`` node, among the first of the graph: state is read when the specialized code is called."""
        self._state[target] = path
        leading = itertools.takewhile(lambda node: node.op in ("placeholder", "get_attr"), self.graph.nodes)
        last = next(reversed(list(leading)), None)
        with self.graph.inserting_after(last) if last is not None else nullcontext():
            return self.graph.create_node("get_attr", target, (), {}, name=_identifier(target))

    def _argument(self, value: Any) -> Any:
        """``value`` with nodes in the places of tensors and symbolic numbers, as ``fx`` takes it."""
        if isinstance(value, torch.Tensor):
            return self._node(value)
        if self._symbols is not None and is_symbol(value):
            return self._numbers.node(self._symbols.text(value))
        kind = type(value)
        if kind in (list, tuple):
            return kind(self._argument(item) for item in value)
        if kind is torch.Size:
            return tuple(self._argument(item) for item in value)
        if kind is dict:
            return {key: self._argument(item) for key, item in value.items()}
        if kind is slice:
            return slice(self._argument(value.start), self._argument(value.stop), self._argument(value.step))
        if kind is complex:
            return in_code(value)
        if kind in BASIC:
            return value
        if isinstance(value, range):
            return list(value)
        if kind is torch.Generator and (path := self.shadows.path_of(value)) is not None:
            return self._live_node(self._target(path), path)
        if is_constant(value) and hasattr(value, "item"):  # a scalar of NumPy's
            return value.item()
        raise self.fail(f"a torch function is given a {kind.__module__}.{kind.__qualname__}")

    # -- recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._net.open += 1
        self._watch.pause()
        try:
            if self._symbols is not None:
                args, kwargs = plain(args), plain(kwargs)
            if not (self._fake_mode.allow_non_fake_inputs or all(map(is_fake, tensors_in((args, kwargs))))):
                args, kwargs = self._with_stand_ins(args), self._with_stand_ins(kwargs)
            if self._suspended:
                return func(*args, **kwargs)
            return self._record(func, args, kwargs)
        finally:
            self._net.open -= 1
            self._watch.resume()

    def _with_stand_ins(self, value: Any) -> Any:
        """Nested arguments with fakes in the places of the user's own tensors."""
        if isinstance(value, torch.Tensor):
            return value if is_fake(value) else self._stand_in(value)
        if isinstance(value, dict):
            return {key: self._with_stand_ins(item) for key, item in value.items()}
        return type(value)(map(self._with_stand_ins, value)) if type(value) in (list, tuple) else value

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        fake = self.shadows.outer_tensor(tensor)
        if fake is None:
            self._modes.check()
            raise self.fail(
                "forward uses a tensor that is neither an argument nor reached from the module, nor lies in a variable "
                "that its code names"
            )
        return fake

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = call_name(func)
        sets = getattr(func, "__name__", "") in ("__set__", "__delete__")
        if self._symbols is not None and name in ARITHMETIC:
            return func(*args, **kwargs)
        if name == "_assert" and not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        if name in QUERIES and not sets and not (name == "type" and (len(args) > 1 or kwargs)):
            self._note_outside(args[0])
            if name in ("requires_grad", "is_leaf") and self._may_require_grad(args[0]):
                raise self.fail(f"forward asks for {name} of a view that it made while grad mode was off")
            return func(*args, **kwargs) if self._symbols is None else self._query(func, name, args, kwargs)
        if self.failure is not None:
            raise self.failure
        if name == "_set_grad_enabled":
            self._modes.follow()
            result = func(*args, **kwargs)
            self._modes.switch_grad(args[0] if args else kwargs["mode"])
            return result
        if name == "grad_fn" and asked_by_torch():
            return func(*args, **kwargs)  # whether there is one, for register_parameter
        if name == "requires_grad" and sets:
            self._record(torch.Tensor.requires_grad_, args, kwargs)
            return None
        if (name in REFUSED and func is not torch.autograd.grad) or sets:
            raise self.fail(f"forward {'sets' if sets else 'uses'} {name} of a tensor")
        self._modes.check()
        if name in HOOKS:
            return self._register_hook(func, name, *args, **kwargs)
        if self._hooks and func is torch.autograd.grad:
            raise self.fail("forward differentiates after it gave a tensor a hook, which may change the gradient")
        if getattr(func, "__module__", "") == "torch.distributed.distributed_c10d":
            raise self.fail(f"forward communicates with other processes ({name})")
        if len(self.graph.nodes) > MAX_NODES:
            raise self.fail(f"forward calls more than {MAX_NODES} torch functions")
        if name in INFERRING and any(is_array(item) or hasattr(item, "dtype") for item in _numbers([args, kwargs])):
            raise self.fail(f"{name} is given numbers of NumPy's, and takes their dtype; make them a buffer")
        taken = self._argument(list(args)), self._argument(dict(kwargs))
        self._net.written.clear()
        self._net.random = False
        result = self._shortcut(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if name == "requires_grad_":
            # As if it wrote: what reads the tensor before may not be done behind it.
            self._net.written.extend(tensors_in(args))
        if self._net.random and not self._random_state.same_torch():
            raise self.fail("torch's random generator is seeded inside of forward")
        if self._net.random and self._guessed_layout and any(map(self._is_made, tensors_in((args, kwargs)))):
            raise NotGenericError(f"{name} fills memory as it lies, behind an einsum whose layout depends on sizes")
        written = self._written()
        if not self._hooked_memory.isdisjoint(written):
            # Which hooks are left then depends on whether the tensor is a view, as the results of some einsums are.
            raise self.fail("forward writes to a tensor after it gave it a hook")
        tensors = list(tensors_in(result))
        if name in COPIES_AT_NEED:
            self._note_copy({self._storage(tensor) for tensor in (args[0], *tensors)})
        if not written:
            if not tensors:
                raise self.fail(f"the result of {name} can't be recorded ({type(result).__name__})")
            if isinstance(result, torch.Tensor) and (id(result) in self._known or id(result) in self._state_of):
                if name.endswith("_") and not name.endswith("__"):
                    raise self.fail(f"forward uses {name}")
                return result
        self._register(result, self._write_call(func, name, *taken), written)
        return result

    def _register_hook(
        self, func: Any, name: str, tensor: torch.Tensor, *hook: Callable[..., Any], **hooks: Callable[..., Any]
    ) -> _Handle | None:
        """Record that a tensor is given a hook; the hook itself is not called: there are no gradients yet."""
        if not tensor.requires_grad or (name == "register_post_accumulate_grad_hook" and not tensor.is_leaf):
            func(tensor, *hook, **hooks)  # torch raises its own error
        self._hooked_memory.add(self._storage(tensor))
        self._hooks = self._hooks or name != "retain_grad"
        node = self._node(tensor)
        if self._may_require_grad(tensor):
            raise self.fail("forward gives a hook to a view that it made while grad mode was off")
        given = [self._closures.record(item) for item in (*hook, *hooks.values())]
        self._stamp_effect(self.graph.call_method(name, (node, *given)), user_line())
        return None if name == "retain_grad" else _Handle(self.fail)

    def _may_require_grad(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that requires grad here need not do so at other calls: views made while grad mode is off do,
        unless what they are views of is a view itself, of a tensor that requires none. No key tells; no parameter is.
        """
        known = self._known.get(id(tensor))
        made = facts(known.node) if known is not None and known.node.op.startswith("call_") else None
        if made is None or made.grad or not tensor.requires_grad:
            return False
        given = [*self._inputs, *(fake for fake, _, _ in self._state_of.values())]
        return any(made.storage == self._storage(own) and not isinstance(own, nn.Parameter) for own in given)

    def _captured(self, value: Any) -> Any:
        """What stands in the graph for something that a hook closes over."""
        path = self.shadows.path_of(value)
        if path is not None and not isinstance(value, torch.Tensor):
            return self._live_node(self._target(path), path)
        if isinstance(value, (list, dict, set)) or callable(value):
            raise self.fail(f"forward makes a hook that uses a {type(value).__name__} which is not the module's")
        if is_constant(value) and type(value) not in BASIC:
            return self._itself(value, type(value).__name__)
        return self._argument(value)

    def _itself(self, value: Any, name: str) -> fx.Node:
        path: Path = (("outer", Itself(value, name)),)
        return self._live_node(self._target(path), path)

    def _query(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer to a question about a tensor, where sizes are symbolic."""
        if self._guessed_layout and name in LAYOUT_QUERIES and any(map(self._is_made, tensors_in(args))):
            raise NotGenericError(f"forward asks for {name} behind an einsum whose layout depends on sizes")
        return seen(func(*args, **kwargs))

    def _is_made(self, tensor: torch.Tensor) -> bool:
        """Whether ``forward`` computed a tensor."""
        return is_fake(tensor) and not any(tensor is own for own in self._inputs)

    def _shortcut(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The fake result of calls that need not or must not run on fakes: an einsum of several operands (its dozens of
        steps take 8 ms for three; so 0.6), and a dropout that drops nothing, which gives its operand (torch 2.13 makes
        a copy of a fake).
        """
        if func in (torch.dropout, torch.nn.functional.dropout) and (kept := undropped(*args, **kwargs)) is not None:
            return kept
        if func is not torch.functional.einsum or not self._movable or kwargs:
            return None
        operands = list(tensors_in(args))
        if len(operands) < 2 or not all(is_fake(operand) for operand in operands):
            return None
        if len({operand.device for operand in operands}) > 1:
            return None  # torch raises its own error
        if any(is_symbol(n) for operand in operands for n in (*operand.shape, *operand.stride())):
            return self._generic_einsum(args, operands)
        empty = {id(operand): empty_meta(operand) for operand in operands}
        layouts = EagerStrides() if any(1 in operand.shape for operand in operands) else nullcontext()  # type: ignore[no-untyped-call]
        with ambient_module.no_modes(), torch.no_grad(), layouts:
            example = torch.einsum(*with_tensors(args, empty))
        known = replace(TensorType.of(example), device=operands[0].device)
        return self._einsum_result(known, operands, example)

    def _einsum_result(self, known: TensorType, operands: list[torch.Tensor], example: torch.Tensor) -> torch.Tensor:
        """The fake result of an einsum, of which ``example`` is what torch made of tensors without data."""
        result = multilinear(known, operands)
        if example._is_view():
            self._views.add(id(result))
        return result

    def _generic_einsum(self, args: tuple[Any, ...], operands: list[torch.Tensor]) -> torch.Tensor | None:
        """The fake result of an einsum of symbolic sizes. (torch's own evaluation would compare sizes to plan, and that
        makes constants of all of them.)
        """
        assert self._symbols is not None
        found = read_einsum(self.graph.call_function(torch.einsum, tuple(self._argument(list(args)))))
        self.graph.erase_node(next(iter(reversed(self.graph.nodes))))
        if found is None:
            return None
        spec, _ = found
        dtypes = {operand.dtype for operand in operands}
        if len(operands) > 2 and not (len(dtypes) == 1 and dtypes <= CLOSED_DTYPES):
            raise NotGenericError("the dtype of an einsum depends on its order, and that on sizes")
        sizes: dict[str, Any] = {}
        for term, operand in zip(spec.inputs, operands, strict=True):
            for label, size in zip(term, operand.shape, strict=True):
                known = sizes.setdefault(label, size)
                if type(known) is int and known == 1:
                    sizes[label] = size
                elif not (type(size) is int and size == 1) and size != known:  # which becomes a condition
                    return None  # torch raises its own error
        examples = [empty_meta(operand, self._symbols.example) for operand in operands]
        with ambient_module.no_modes(), torch.no_grad():
            example = torch.einsum(str(spec.canonical()), *examples)
        shape = [sizes[label] for label in spec.output]
        known_type = TensorType.of(example)
        if len(operands) > 2:
            # The order of contraction that torch would take depends on sizes, and so does the layout of its result.
            # Contiguous is never worse.
            self._guessed_layout = True
            order = list(range(len(shape)))
        else:
            order = sorted(
                range(len(shape)), key=lambda dim: (-known_type.stride[dim], known_type.shape[dim] == 1, dim)
            )
        dense = contiguous_strides([shape[dim] for dim in order])
        stride = tuple(dense[order.index(dim)] for dim in range(len(shape)))
        known_type = replace(known_type, shape=tuple(shape), stride=stride, device=operands[0].device)
        return self._einsum_result(known_type, operands, example)

    def _write_switch(self, function: Callable[..., Any], *args: Any) -> None:
        self._stamp_effect(self.graph.call_function(function, args), user_line())

    def _stamp_effect(self, node: fx.Node, line: str = "") -> fx.Node:
        """Stamp what gives no tensor; it stays where it is."""
        return stamp(node, Facts(None, None, (), self._modes.grad, False, line))

    @property
    def _movable(self) -> bool:
        """Whether what is recorded now runs in the modes of the call, grad mode apart."""
        return self._may_move and self._modes.are_those_of_the_call

    @property
    def _steady(self) -> bool:
        return not self._net.random and self._modes.are_those_of_the_call

    def _written(self) -> tuple[int, ...]:
        numbers = self._copies.reached({self._storage(tensor) for tensor in self._net.written})
        # Memory that came into being inside the call (workspace) is nobody's business outside of it.
        known = {self._storage(entry.tensor) for entry in self._known.values()} if numbers else set()
        return tuple(sorted(numbers & known))

    def _write_call(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        if getattr(func, "__name__", "") == "__get__":
            return self.graph.call_function(getattr, (args[0], name))
        for key in (func, name) if getattr(torch.Tensor, name, None) is func else (func,):
            if key in OPERATORS and not kwargs:
                return self.graph.call_function(OPERATORS[key], tuple(args))
            if key in REFLECTED:
                return self.graph.call_function(REFLECTED[key], (args[1], args[0]))
        if getattr(torch.Tensor, name, None) is not func:
            return self.graph.call_function(func, tuple(args), kwargs)
        if name.startswith("__") and name.endswith("__"):
            raise self.fail(f"forward uses {name}")
        return self.graph.call_method(name, tuple(args), kwargs)

    def _register(self, result: Any, node: fx.Node, written: tuple[int, ...]) -> None:
        """Track the tensors in ``result``, which ``node`` gives."""
        if isinstance(result, torch.Tensor):
            known = self._known.get(id(result))
            if known is None:
                self._track(result, node, written=written)
            else:
                # In-place: the value is still the one of the first node, now with another place in autograd's graph.
                known.grad_fn = grad_fn_of(result)
                stamp(node, self._facts(result, written=written))
            self._refresh(written)
            return
        grad, movable, steady = torch.is_grad_enabled(), self._movable, self._steady
        stamp(node, Facts(None, None, written, grad, movable, user_line(), steady))
        self._refresh(written)
        self._register_items(result, node)

    def _register_items(self, result: Any, node: fx.Node) -> None:
        items: Sequence[tuple[Any, Any]]
        if isinstance(result, (tuple, list)):
            items = list(enumerate(result))
        elif isinstance(result, dict):
            items = list(result.items())
        else:
            return
        for key, item in items:
            if isinstance(item, torch.Tensor):
                if id(item) not in self._known:
                    taken = self.graph.call_function(operator.getitem, (node, key))
                    if node.target is torch.autograd.grad and item.is_contiguous():
                        # How a gradient lies depends on how the product was lowered; code behind it may rely on this.
                        stamp(taken, self._facts(item))
                        taken = self.graph.call_method("contiguous", (taken,))
                    self._track(item, taken)
            elif isinstance(item, (tuple, list, dict)):
                inner = self.graph.call_function(operator.getitem, (node, key))
                stamp(inner, Facts(None, None, (), torch.is_grad_enabled(), self._movable, ""))
                self._register_items(item, inner)

    def _refresh(self, written: tuple[int, ...]) -> None:
        """After a write, views of the written memory have a new ``grad_fn``, and may require grad: take that over."""
        if written:
            for known in self._known.values():
                if self._storage(known.tensor) in written:
                    known.grad_fn = grad_fn_of(known.tensor)
                    before = facts(known.node)
                    if before is not None and before.type is not None and known.tensor.requires_grad:
                        stamp(known.node, replace(before, type=replace(before.type, requires_grad=True, is_leaf=False)))

    # -- live calls

    def _live_call(self, live: nn.Module, shadow: nn.Module, path: Path, reason: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # The module's class decides what is called for a compiled module: the module inside it.
            if isinstance(live, torch.jit.ScriptModule):
                forward: Callable[..., Any] = partial(self._run_scripted, live)
            else:
                inner: Any = shadow._orig_mod if "_orig_mod" in live._modules else shadow
                forward = inner.forward
            if reason is HAS_HOOKS and is_fully_sharded(live):
                forward = partial(call_in_precision, precision_of(live), forward)
            if self._suspended:
                return forward(*args, **kwargs)
            with self.paused(), self.shadows.in_live_call(path):
                return record(forward, args, kwargs)

        def record(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._modes.check()
            taken = self._argument(list(args)), self._argument(dict(kwargs))
            # Side effects of a live call are the live module's business; those of this run are undone.
            self.shadows.outside.restore()
            result = forward(*args, **kwargs)
            self.shadows.outside.restore(report=False)
            found: list[Any] = []
            flatten(result, found)
            target = self._target(path)
            if not all(isinstance(value, torch.Tensor) or is_constant(value) for value in found):
                raise self.fail(
                    f"{target} stays a live call because {reason}, and gives more than tensors and plain data"
                )
            types = tuple(TensorType.of(value) for value in found if isinstance(value, torch.Tensor))
            module = self._live_node(target, path)
            caller = self._hooked(path_name(path)) if reason is HAS_HOOKS else direct_call
            node = self.graph.call_function(LiveCall(target, types, caller), (module, *taken[0]), taken[1])
            self._calls_live = True
            self._register(result, node, (EVERYTHING,))
            return result

        return call

    def _run_scripted(self, module: torch.jit.ScriptModule, *args: Any, **kwargs: Any) -> Any:
        """Run a TorchScript module on fakes: a copy, whose tensors become fakes as they are copied."""
        before = self._fake_mode.allow_non_fake_inputs
        self._fake_mode.allow_non_fake_inputs = True
        try:
            return copy.deepcopy(module)(*args, **kwargs)
        finally:
            self._fake_mode.allow_non_fake_inputs = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run operations that are nobody's record: unseen by the recorder, let through by the net."""
        self._suspended += 1
        self._net.open += 1
        self._watch.pause()
        try:
            yield
        finally:
            self._suspended -= 1
            self._net.open -= 1
            self._watch.resume()

    # -- output

    def _output(self, result: Any) -> Result | None:
        leaves: list[Any] = []
        structure = flatten(result, leaves)
        if any(map(self.shadows.owns, containers_in(result))):
            raise UntraceableError("forward returns a list, dictionary or object that belongs to the module")
        for leaf in leaves:
            if not (isinstance(leaf, torch.Tensor) or is_constant(leaf) or is_symbol(leaf)):
                kind = type(leaf)
                raise UntraceableError(
                    f"forward returns a {kind.__module__}.{kind.__qualname__}; expected tensors, plain data, tuples, "
                    "lists and dicts of them, dataclasses, and classes that torch.utils._pytree knows"
                )
        nodes = [self._argument(leaf) if isinstance(leaf, torch.Tensor) or is_symbol(leaf) else leaf for leaf in leaves]
        simple = all(isinstance(node, fx.Node) or type(node) in (int, bool, str, type(None)) for node in nodes)
        if simple and _only_basic(structure):
            output = self.graph.output(unflatten(structure, nodes))
            stamp(output, Facts())
            return None
        output = self.graph.output(tuple(node for node in nodes if isinstance(node, fx.Node)))
        stamp(output, Facts())
        numbers = itertools.count()
        return Result(
            structure, tuple(next(numbers) if isinstance(node, fx.Node) else Constant(node) for node in nodes)
        )

    def _erase_unused_reads(self) -> None:
        """Items of a result that nothing uses were recorded only to have a name."""
        for node in reversed(self.graph.nodes):
            source = (
                facts(node.args[0]) if node.target is operator.getitem and isinstance(node.args[0], fx.Node) else None
            )
            if source is not None and source.type is None and not node.users:
                self.graph.erase_node(node)


def _only_basic(structure: Structure | int) -> bool:
    """Whether a structure can stand in generated code as it is."""
    return isinstance(structure, int) or (
        structure.kind in (tuple, list, dict)
        and all(type(key) in (str, int) for key in structure.keys or ())
        and all(_only_basic(child) for child in structure.children)
    )


def _identifier(target: str) -> str:
    text = "".join(char if char.isalnum() else "_" for char in target)
    return text if text[:1].isalpha() or text[:1] == "_" else f"_{text}"
