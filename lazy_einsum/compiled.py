"""Specialized code through a backend: what part of a graph a backend is given, and what is done around that part so
that all is as in eager mode.

Around it run, as they are: values that are kept of frozen tensors; and the views among the results that share memory
with others or with inputs, so that the backend sees no shared memory at all.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .ambient import generators, kept_random, own_saved_tensors, saved_tensor_hooks
from .backends import Backend, in_forward_mode, is_compiled_backward, keeps_graph, let_run_again
from .calls import HOOKS
from .cost import Machine
from .errors import LazyEinsumError
from .fakes import fake_mode, make_fake
from .folds import Kept
from .graph import EVERYTHING, facts, is_einsum, tensor_nodes, type_of
from .live import LiveCall, set_attribute
from .signature import TensorType
from .specialize import Specialization, as_function, lift

# They change what autograd knows of a tensor, or ask it; or call functions of the user's.
_EAGER_CALLS = {
    torch.autograd.grad: "forward differentiates, and compiled code can't be differentiated again",
    set_attribute: "forward sets an attribute of a module",
}


# With the option ``fallback_random``, Inductor draws for these what eager mode does (for bernoulli, say, it does not).
_DRAWN_AS_IN_EAGER = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rand rand_like randn
    randn_like randint randint_like randperm uniform_ normal normal_ exponential_ multinomial rrelu
    scaled_dot_product_attention
    """.split()
)


class NotCompilableError(LazyEinsumError):
    """A specialization can't run through a backend; the message says why.

    Args:
        reason: why.
        error: what was raised, where that is the reason.
    """

    def __init__(self, reason: str, error: Exception | None = None) -> None:
        super().__init__(reason if error is None else f"{reason}: {describe(error)}")
        self.reason = reason


_OTHER_MODE = "a result requires gradients, or is a view, in another grad mode than the call's"


def describe(error: Exception) -> str:
    """The class of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


OnFailure = Callable[[NotCompilableError], None]
"""Told why a compiled function is not to be called any more."""


@dataclass(frozen=True)
class Parts:
    """A graph in parts.

    Attributes:
        inner: what a backend is given: placeholders for tensors, and a flat output of tensors of which none shares
            memory with another or with an input.
        outer: the whole, with a call of ``place`` for the inner part.
        place: the target of that call.
        followed: for each result of the inner part whether autograd follows it.
        written: the placeholders of the inner part that it writes to, by number.
        draws: whether it draws random numbers.
        reach: for each placeholder the results that depend on it in a way that autograd follows.
    """

    inner: fx.Graph
    outer: fx.Graph
    place: fx.Node
    followed: tuple[bool, ...]
    written: tuple[int, ...]
    draws: bool
    reach: tuple[frozenset[int], ...]


def compile_entry(entry: Specialization, backend: Backend, on_failure: OnFailure) -> Callable[..., Any]:
    """What runs ``entry`` through ``backend``, in the place of ``entry.run``.

    Args:
        entry: stays as it is.
        backend: makes a function of its graph, or of the main part of it.
        on_failure: told where that function turns out not to do.

    Raises:
        NotCompilableError: it can't, or the backend fails.
    """
    given = given_to_backend(entry, backend)
    known = [known for node in given.parts.inner.nodes if (known := type_of(node)) is not None]
    others = {str(type_.device) for type_ in known if type_.device.type != "cuda"}
    if backend.name == "cudagraphs" and others:
        # It would say so in a log, and interpret the graph, which takes longer than eager code.
        raise NotCompilableError(f"CUDA graphs are for tensors on CUDA, and this call has some on {sorted(others)[0]}")
    try:
        function = compile_module(backend, given.module, given.types, given.grad)
    except Exception as error:
        raise NotCompilableError(f"the backend {backend.name!r} failed", error) from error
    parts = given.parts
    eager = as_function(parts.inner)
    autocast = dict(entry.signature.ambient)["autocast"]
    parts.place.target = Compiled(function, eager, parts, autocast, on_failure)
    return entry.source.finish(as_function(parts.outer, shared=False))


class Given(NamedTuple):
    """What a backend is given.

    Attributes:
        parts: of the graph.
        types: of the inputs of the inner part.
        grad: whether autograd follows.
    """

    parts: Parts
    types: tuple[TensorType, ...]
    grad: bool

    @property
    def module(self) -> fx.GraphModule:
        """The inner part, without notes on its nodes: a backend may change it, and keep it."""
        return fx.GraphModule(nn.Module(), _bare(self.parts.inner))


def given_to_backend(entry: Specialization, backend: Backend) -> Given:
    """What ``backend`` is given of ``entry``.

    Raises:
        NotCompilableError: no backend can be given it.
    """
    ambient = dict(entry.signature.ambient)
    grad = ambient["grad"] and not ambient["inference"]
    parts = split(entry, grad, backend.machine)
    types = tuple(known for node in parts.inner.nodes if node.op == "placeholder" and (known := type_of(node)))
    return Given(parts, types, grad)


def compile_module(
    backend: Backend, module: fx.GraphModule, types: Sequence[TensorType], grad: bool
) -> Callable[..., Any]:
    """What a backend makes of a graph; raises what it raises.

    Args:
        backend: what compiles.
        module: the graph, which it may change.
        types: of its inputs.
        grad: whether autograd follows.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        with fake_mode() if backend.takes_fakes else nullcontext(), own_saved_tensors():
            examples = list(map(_example, types))
        with kept_random():
            return backend.compile(module, examples)


def _example(known: TensorType) -> torch.Tensor:
    """A tensor of this type, of zeros where there is data; made outside of inference mode, in which backends do not
    run.
    """
    example = make_fake(replace(known, requires_grad=False, is_leaf=True, is_inference=False))
    with torch.no_grad():
        example.zero_()
    # A leaf in any case: that matters only to what is written, and that is nothing which autograd follows.
    return example.requires_grad_(known.requires_grad)


def _bare(graph: fx.Graph) -> fx.Graph:
    """A copy without notes on its nodes."""
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = new.node_copy(node, values.__getitem__)
        values[node].meta = {}
    return new


# -- the parts of a graph


def split(entry: Specialization, grad: bool, machine: Machine) -> Parts:
    """The graph of ``entry`` in parts.

    Args:
        entry: what to run.
        grad: whether autograd follows.
        machine: what its contractions are lowered for.

    Raises:
        NotCompilableError: it holds what no backend can be given.
    """
    if entry.is_generic:
        raise NotCompilableError("its code is generic in sizes")
    source = entry.source
    if source.overlapping:
        raise NotCompilableError("its inputs share memory that forward writes")
    if source.switches_modes:
        raise NotCompilableError("forward enters other modes than the grad mode")
    lifted = lift(source.lower_for(machine), source.state)
    _check(lifted)
    nodes = list(lifted.nodes)
    output = nodes[-1]
    outer = fx.Graph()
    around: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder" or isinstance(node.target, Kept):
            around[node] = outer.node_copy(node, around.__getitem__)
    main = [node for node in nodes[:-1] if node not in around]
    if not main:
        raise NotCompilableError("it computes nothing")
    given = [node for node in around if not set(node.users).isdisjoint(main)]
    results = list(_results(list(tensor_nodes(output.args)), around))
    inner, inside = fx.Graph(), {}
    for node in given:
        inside[node] = inner.placeholder(node.name)
        inside[node].meta = dict(node.meta)
    for node in main:
        inside[node] = inner.node_copy(node, inside.__getitem__)
    inner.output(tuple(inside[node] for node in results))
    place = outer.call_function(_unset, tuple(around[node] for node in given))
    for number, node in enumerate(results):
        around[node] = outer.call_function(operator.getitem, (place, number))
    for node in main:
        if node not in around and _is_view_of(node, around) and _leads_to(node, output):
            if _runs_with_grad(node) != grad:
                raise NotCompilableError(_OTHER_MODE)
            around[node] = outer.node_copy(node, around.__getitem__)
    outer.output(fx.map_arg(output.args[0], around.__getitem__))
    outer.lint()
    if any(_requires_grad(node) and not (grad and _runs_with_grad(node)) for node in results):
        raise NotCompilableError(_OTHER_MODE)
    followed = tuple(map(_requires_grad, results))
    written = tuple(number for number, node in enumerate(given) if _is_written(node, main))
    if any(followed) and any(_requires_grad(given[number]) for number in written):
        raise NotCompilableError("forward writes to a tensor that autograd follows")
    if any(followed) and _reads_written([given[number] for number in written], main):
        raise NotCompilableError("forward reads a tensor that it also writes, and autograd follows")
    draws = any(not known.steady for node in main if (known := facts(node)) is not None)
    reach = _reach(given, main, results) if any(followed) else ()
    if not _go_together(main, [node for node, follows in zip(results, followed, strict=True) if follows]):
        raise NotCompilableError("its results have backward passes that can run one by one, compiled code has one")
    return Parts(inner, outer, place, followed, written, draws, reach)


def _unset(*inputs: Any) -> Any:
    """Where the compiled function will be called."""
    raise AssertionError("nothing was compiled")


def _check(graph: fx.Graph) -> None:
    """Raise ``NotCompilableError`` where there is a call, or an input, that no backend can be given."""
    for node in graph.nodes:
        if node.op.startswith("call_"):
            reason = _reason(node)
            if reason is not None:
                raise NotCompilableError(reason)
    for node in graph.nodes:
        if node.op != "placeholder" or not node.users:
            continue
        known = type_of(node)
        if known is None:
            raise NotCompilableError("it takes more than tensors")
        if known.is_conj or known.is_neg:
            raise NotCompilableError("it takes a tensor that is conjugated, or negated, only when it is read")


def _reason(node: fx.Node) -> str | None:
    """Why no backend can be given a call; ``None`` where it can."""
    known, name = facts(node), str(getattr(node.target, "__name__", node.target))
    if isinstance(node.target, LiveCall):
        return f"it calls {node.target.name} as it is"
    if node.op == "call_function" and node.target in _EAGER_CALLS:
        return _EAGER_CALLS[node.target]
    if node.op == "call_method" and name in HOOKS:
        return "forward gives a hook to a tensor"
    if node.op == "call_method" and name == "requires_grad_":
        return "forward sets requires_grad of a tensor"
    if known is None:
        return None
    if is_einsum(node) and any(_is_narrow(operand) for operand in node.all_input_nodes):
        # Its dtype, and whether it raises, differ between kernels and what compilers take for them.
        return "it calls torch.einsum on bool, or on integers narrower than int64"
    if not known.steady and name not in _DRAWN_AS_IN_EAGER:
        return f"it draws random numbers by {name}, which may be others in compiled code"
    if not known.steady and not all(map(_is_contiguous, node.all_input_nodes)):
        # They are drawn in the order of memory, and compilers lay out values otherwise than eager mode does.
        return "it draws random numbers for a tensor that is not contiguous"
    if any(_repeats(operand, known.writes) for operand in node.all_input_nodes):
        return "forward writes to a tensor with elements in one place of memory, which eager mode may refuse"
    seen_with_grad = any(user.op == "output" or _runs_with_grad(user) for user in node.users)
    return _OTHER_MODE if _requires_grad(node) and not known.grad and seen_with_grad else None


def _is_narrow(node: fx.Node) -> bool:
    known = type_of(node)
    return known is not None and known.dtype in _NARROW


_NARROW = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32})


def _repeats(node: fx.Node, written: tuple[int, ...]) -> bool:
    """Whether ``node`` lies in memory that is written, and has several elements in one place."""
    known = facts(node)
    if known is None or known.type is None or not (known.storage in written or EVERYTHING in written):
        return False
    return any(size > 1 and step == 0 for size, step in zip(known.type.shape, known.type.stride, strict=True))


def _results(wanted: Sequence[fx.Node], around: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """What the inner part has to give for the results ``wanted``: those themselves, but what they are views of, where
    several share memory, or one does with an input.
    """
    wanted = list(dict.fromkeys(wanted))
    storages = [known.storage for node in (*around, *wanted) if (known := facts(node)) is not None]
    given: dict[fx.Node, None] = {}
    for node in wanted:
        known = facts(node)
        if known is None or known.storage is None or known.storage == EVERYTHING:
            raise NotCompilableError("it is not known which memory a result lies in")
        while storages.count(known.storage) > 1 and (source := _source(node)) is not None:
            node = source
        if node not in around:
            given[node] = None
    return iter(given)


def _source(node: fx.Node) -> fx.Node | None:
    """What ``node`` is a view of."""
    known = facts(node)
    todo = list(node.all_input_nodes)
    while todo:
        operand = todo.pop()
        found = facts(operand)
        if found is None or found.storage is None:  # several tensors, of which ``node`` is one
            todo.extend(operand.all_input_nodes)
        elif known is not None and found.storage == known.storage:
            return operand
    return None


def _is_view_of(node: fx.Node, around: Mapping[fx.Node, Any]) -> bool:
    """Whether ``node`` is a view, or gives several, of what is known in ``around``, and can be made from that."""
    known = facts(node)
    return known is not None and not known.writes and bool(node.args) and set(node.all_input_nodes) <= around.keys()


def _leads_to(node: fx.Node, output: fx.Node) -> bool:
    """Whether ``output`` is made of ``node`` by views alone."""
    known = facts(node)
    for user in node.users:
        if user is output:
            return True
        found = facts(user)
        same = known is not None and found is not None and (None in (known.storage, found.storage))
        same = same or (known is not None and found is not None and known.storage == found.storage)
        if same and _source(user) is not None and _leads_to(user, output):
            return True
    return False


def _runs_with_grad(node: fx.Node) -> bool:
    known = facts(node)
    return known is not None and known.grad


def _requires_grad(node: fx.Node) -> bool:
    known = type_of(node)
    return known is not None and known.requires_grad


def _is_contiguous(node: fx.Node) -> bool:
    known = type_of(node)
    return known is None or known.is_contiguous


def _is_written(node: fx.Node, main: Sequence[fx.Node]) -> bool:
    known = facts(node)
    assert known is not None
    found = {number for other in main if (effects := facts(other)) is not None for number in effects.writes}
    return known.storage in found or EVERYTHING in found


def _reads_written(written: Sequence[fx.Node], main: Sequence[fx.Node]) -> bool:
    """Whether inputs that are written are also read other than to be updated. (AOTAutograd may save such an input for
    the backward pass, which then finds the value after the write: a wrong gradient, and no error.)
    """
    storages = {known.storage for node in written if (known := facts(node)) is not None}
    for node in main:
        known = facts(node)
        taken = {found.storage for operand in node.all_input_nodes if (found := facts(operand)) is not None} & storages
        if not taken:
            continue
        if known is None or not taken <= set(known.writes):
            return True
        is_norm = getattr(node.target, "__name__", "") in ("batch_norm", "instance_norm")
        if known.storage is not None and known.storage not in taken and not is_norm:
            return True
    return False


def _reach(given: Sequence[fx.Node], main: Sequence[fx.Node], results: Sequence[fx.Node]) -> tuple[frozenset[int], ...]:
    """For each of ``given`` the numbers of the results that depend on it in a way that autograd follows."""
    sources: dict[fx.Node, set[int]] = {node: {number} for number, node in enumerate(given)}
    written: dict[int | None, set[int]] = {}
    for node in main:
        known, found = facts(node), set[int]()
        for operand in node.all_input_nodes:
            taken = facts(operand)
            if taken is not None and (taken.type is None or taken.type.requires_grad):
                found |= sources[operand] | written.get(taken.storage, set())
        sources[node] = found if known is not None and known.grad else set()
        for number in known.writes if known is not None else ():
            written.setdefault(number, set()).update(sources[node])
    reached: list[set[int]] = [set() for _ in given]
    for place, node in enumerate(results):
        known = facts(node)
        whole = sources[node] | (written.get(known.storage, set()) if known is not None else set())
        for number in whole if _requires_grad(node) else ():
            reached[number].add(place)
    return tuple(map(frozenset, reached))


def _go_together(main: Sequence[fx.Node], results: Sequence[fx.Node]) -> bool:
    """Whether no result can be differentiated apart from the others in eager mode, each time for good: all lead back to
    common calls.
    """
    writers: dict[int, list[fx.Node]] = {}
    for node in main:
        known = facts(node)
        for number in known.writes if known is not None else ():
            writers.setdefault(number, []).append(node)
    groups: list[set[fx.Node]] = []
    inside = set(main)
    for result in results:
        behind: set[fx.Node] = set()
        todo = [result]
        while todo:
            node = todo.pop()
            known = facts(node)
            if node in inside and node not in behind and (known is None or known.type is None or _requires_grad(node)):
                behind.add(node)
                todo += node.all_input_nodes
                todo += writers.get(known.storage, ()) if known is not None and known.storage is not None else ()
        apart = [group for group in groups if group.isdisjoint(behind)]
        groups = [*apart, behind.union(*(group for group in groups if not group.isdisjoint(behind)))]
    return len(groups) <= 1


# -- calls


class Compiled:
    """A compiled function, with what makes it as good as the code that it was made of.

    Where that code is needed again (for a second derivative, which compiled backward passes do not have; because the
    compiled function raised an error), it runs.

    Args:
        function: made by a backend.
        eager: what it was made of.
        parts: where that comes from.
        autocast: kinds of device with autocast on, each with its dtype.
        on_failure: told where ``eager`` had to run.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        eager: Callable[..., Sequence[Any]],
        parts: Parts,
        autocast: Sequence[tuple[str, str]],
        on_failure: OnFailure,
    ) -> None:
        self.__name__ = self.__qualname__ = "compiled"
        self.__module__ = __name__
        self.function = function
        self.eager = eager
        self.written = parts.written
        self.draws = parts.draws
        self.reach = parts.reach
        self.devices = {known.device for node in parts.inner.nodes if (known := type_of(node)) is not None}
        self.autocast = autocast
        self.on_failure = on_failure
        self.followed = [number for number, follows in enumerate(parts.followed) if follows]
        self._first = self.followed[0] if self.followed else None

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """The results."""
        if in_forward_mode():  # of which it knows nothing
            return self.eager(*inputs)
        first = self._first
        before = Before(self, inputs) if first is not None and (self.written or self.draws) else None
        try:
            results = self.function(*inputs)
        except Exception as error:
            return self._run_again(error, inputs)
        if first is not None and is_compiled_backward(node := results[first].grad_fn):
            places = [results[number].output_nr for number in self.followed]
            node.register_prehook(Backward(self, node, inputs, before, places))
        return results

    def _run_again(self, error: Exception, inputs: tuple[Any, ...]) -> Sequence[Any]:
        """The results by the code that was compiled; if that raises an error too, it is the user's."""
        if self.written or self.draws:
            raise error  # a second run would write, or draw, a second time
        results = self.eager(*inputs)
        self.on_failure(NotCompilableError("its compiled code failed", error))
        return results


class Before:
    """What a call of a compiled function will have changed: the random generators, and the tensors that it writes.

    Args:
        compiled: what is called.
        inputs: the tensors that it is called with.
    """

    def __init__(self, compiled: Compiled, inputs: Sequence[torch.Tensor]) -> None:
        self.values = {number: inputs[number].detach().clone() for number in compiled.written}
        drawn_from = generators(compiled.devices) if compiled.draws else ()
        self.states = [(generator, generator.get_state()) for generator in drawn_from]

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which random numbers come once more as they came then."""
        with kept_random(generator.device for generator, _ in self.states):
            for generator, state in self.states:
                generator.set_state(state)
            yield


class Backward:
    """A hook before the backward pass of one call of a compiled function.

    It gives the gradients that eager mode would give: none to inputs that no result with a gradient depends on (the
    compiled pass gives zeros), and where these are to be differentiated again, such as can be.

    Args:
        compiled: what was called.
        node: of the call, in autograd's graph.
        inputs: the tensors that it was called with.
        before: what the call has changed.
        places: of the results that autograd follows, in the backward pass.
    """

    __slots__ = ("_before", "_compiled", "_inputs", "_node", "_places", "_unpack", "_versions")

    def __init__(
        self,
        compiled: Compiled,
        node: Any,
        inputs: tuple[torch.Tensor, ...],
        before: Before | None,
        places: Sequence[int],
    ) -> None:
        self._compiled = compiled
        self._node = weakref.ref(node)
        self._before = before
        self._places = places
        self._versions = [0 if tensor.is_inference() else tensor._version for tensor in inputs]
        hooks = saved_tensor_hooks()
        self._unpack: Callable[[Any], torch.Tensor] | None = None
        self._inputs: Sequence[Any] = inputs
        if hooks is not None:  # those of a checkpoint, say: it is to drop tensors that are saved inside
            self._inputs, self._unpack = [hooks[0](tensor) for tensor in inputs], hooks[1]

    def __call__(self, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What the compiled pass takes; ``None`` where that is ``grad_outputs``."""
        given = [grad_outputs[place] for place in self._places]
        inputs, before = self._inputs, self._before
        if keeps_graph():
            let_run_again(self._running())
        else:
            self._inputs, self._before = (), None
        if torch.is_grad_enabled():
            self._replace(partial(self._differentiable, inputs, before, given))
            # Of tensors that require grad it makes a mess.
            return tuple(None if gradient is None else gradient.detach() for gradient in grad_outputs)
        if any(gradient is None for gradient in given):
            followed = zip(self._compiled.followed, given, strict=True)
            reached = frozenset(number for number, gradient in followed if gradient is not None)
            self._replace(partial(self._without, reached))
        return None

    def _replace(self, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        """Put what ``change`` makes of the gradients of the inputs in their place, this time."""

        def hook(grad_inputs: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...]:
            handle.remove()
            return change(grad_inputs)

        handle = self._running().register_hook(hook)

    def _running(self) -> Any:
        node = self._node()
        assert node is not None  # it is what runs
        return node

    def _without(self, reached: frozenset[int], grad_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients of those inputs that the results ``reached`` depend on."""
        pairs = zip(grad_inputs, self._compiled.reach, strict=True)
        return tuple(None if reach.isdisjoint(reached) else gradient for gradient, reach in pairs)

    def _differentiable(
        self, packed: Sequence[Any], before: Before | None, given: Sequence[Any], grad_inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """The gradients by way of the code that was compiled, run once more."""
        compiled = self._compiled
        compiled.on_failure(NotCompilableError("a second derivative is asked for, which compiled code does not have"))
        inputs = list(packed) if self._unpack is None else list(map(self._unpack, packed))
        for number, (tensor, version) in enumerate(zip(inputs, self._versions, strict=True)):
            if number not in compiled.written and not tensor.is_inference() and tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{type(tensor).__name__} of shape {list(tensor.shape)} is at version {tensor._version}; expected "
                    f"version {version} instead"
                )
        # Views of their own, lest gradients flow on from one input to another that it was made of.
        leaves = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in inputs]
        for number, value in before.values.items() if before is not None else ():
            leaves[number] = value.clone()
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(before.again())
            wanted = dict(compiled.autocast)
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                dtype = getattr(torch, wanted[kind].removeprefix("torch.")) if kind in wanted else None
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=kind in wanted, cache_enabled=False))
            results = compiled.eager(*leaves)
        pairs = [
            (results[number], gradient)
            for number, gradient in zip(compiled.followed, given, strict=True)
            if gradient is not None
        ]
        places = [number for number, leaf in enumerate(leaves) if leaf.requires_grad]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            [leaves[number] for number in places],
            [gradient for _, gradient in pairs],
            create_graph=True,
            allow_unused=True,
        )
        gradients: list[Any] = [None] * len(grad_inputs)
        for number, gradient in zip(places, found, strict=True):
            gradients[number] = gradient
        return tuple(gradients)
