"""``specialize``: trace, run the passes one by one, compile. ``stages`` shows every step; ``specialize`` is the
last of them.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from cachetools import LRUCache
from torch import fx, nn

from . import ambient as ambient_module
from .backends import EAGER
from .cost import Machine
from .counter import Counter
from .errors import LazyEinsumError, MemoryLimitError, UntraceableError
from .folds import Fold, Folds, Kept, written_out
from .frozen import frozen_values, mark_frozen
from .generic import values_of
from .graph import copy_graph, is_einsum, read_einsum, type_of
from .known import Answer, Question, noting
from .labelsets import Path as PlanPath
from .live import Caller, direct_call
from .passes import FOLD, PASSES, Options
from .passes.choose_paths import PLAN
from .passes.lower import LOWERED
from .plan import Plan, make_plan, order_seconds
from .products import sums_elements
from .record import Trace
from .regions import restored
from .saved import WrittenNetwork, is_within, plan_saving, written_network
from .signature import Arguments, Signature
from .sizes import is_symbolic
from .source_code import Program, module_source, refusal
from .state import Guard, Path, compile_guard, describe_reads
from .symbols import NotGenericError
from .tracing import trace
from .witness import difference


@dataclass(frozen=True, slots=True)
class Stage:
    """The program after one pass.

    Attributes:
        name: of the pass; the first stage is ``"trace"``.
        graph: runnable as it is.
        seconds: time the pass, or the trace, took.
    """

    name: str
    graph: fx.Graph
    seconds: float

    @property
    def code(self) -> str:
        """The graph as Python source."""
        return self.graph.python_code("self").src.strip("\n") + "\n"


class Stages(Mapping[str, str]):
    """Name of pass -> code after it, in order. The text is made when it is asked for: at a miss nobody may look."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}

    def add(self, stage: Stage) -> None:
        """Append the next stage."""
        self._stages[stage.name] = stage

    @property
    def all(self) -> tuple[Stage, ...]:
        """The stages themselves, in order."""
        return tuple(self._stages.values())

    def __getitem__(self, name: str) -> str:
        return self._stages[name].code

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


def run_passes(graph: fx.Graph, options: Options, seconds: float = 0.0) -> Iterator[Stage]:
    """The program after each pass, beginning with ``graph`` itself, which took so many seconds to trace.

    Raises:
        MemoryLimitError: no contraction order stays below the limit.
        UntraceableError: a pass fails, or its result is not a well-formed graph; the message names the pass.
    """
    yield Stage("trace", graph, seconds)
    for name, make_pass in (*PASSES[:-1], FOLD, PASSES[-1]) if options.folds else PASSES:
        start = time.perf_counter()
        try:
            graph = make_pass(options)(graph)
            graph.lint()
        except MemoryLimitError:
            raise
        except Exception as error:
            # Eager still gives the right answer, so a fault of ours is one more reason to fall back.
            raise UntraceableError(f"pass {name!r} failed: {type(error).__name__}: {error}") from error
        yield Stage(name, graph, time.perf_counter() - start)


WRITTEN = "written memory"
"""The part of a signature's state that says whether inputs share memory that is written."""

PRECISION = "precision"
"""The part of a signature's state that says what torch's flags allow (TF32), where that matters."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the code of a specialization is made of.

    Attributes:
        graph: what is computed; ``get_attr`` nodes for what is read of the module.
        state: the targets of these, in the order of the code's arguments.
        finish: gives the code what a graph can't say, see ``finish``.
        traced: the trace that it was made of.
        overlapping: whether it is for calls in which inputs share memory that is written.
        lower_for: gives the graph as it is best for another machine.
    """

    graph: fx.Graph
    state: tuple[str, ...]
    finish: Callable[[Callable[..., Any]], Callable[..., Any]]
    traced: Trace
    overlapping: bool
    lower_for: Callable[[Machine], fx.Graph]

    @property
    def switches_modes(self) -> bool:
        """Whether it enters other modes than the grad mode."""
        return self.traced.switches_modes


class Specialization:
    """The code for one signature.

    Attributes:
        signature: the key: all that the code depends on.
        stages: name of pass -> code after it, in order.
        plans: the contraction plans, one for each einsum that was planned, in the order of the code.
        build_seconds: how long it took to make, in seconds.
        is_generic: whether it serves calls of other sizes, or with other numbers, than the one it was made for.
        exceptions: values of its symbols that it leaves to others.
        guard: ``(module, args, kwargs) -> values``, or ``None`` for a call that it can't serve.
        run: what is called with these values.
        source: what that is made of.
        tier: what runs it: ``"eager"``, or the name of a backend.
        reason: why no backend runs it, where one is to; an empty string where that is not known.
        compile_at: number of the hit at which a backend is to take over.
        job: what compiles it ahead, where something does.
        run_named: the same, each contraction under a name that torch's profilers show.
        used: when it was used last, in calls of its cache.
        folds: what it computes once, of frozen tensors only.
        orders: the contraction orders that were asked for when it was made.
    """

    __slots__ = (
        "__weakref__",
        "_graph",
        "_module",
        "_record",
        "_state",
        "add_hit",
        "build_seconds",
        "compile_at",
        "counter",
        "exceptions",
        "folds",
        "guard",
        "is_generic",
        "job",
        "orders",
        "plans",
        "reason",
        "run",
        "run_named",
        "signature",
        "source",
        "stages",
        "tier",
        "used",
    )

    def __init__(
        self,
        signature: Signature,
        record: fx.Graph,
        graph: fx.Graph,
        stages: Stages,
        plans: tuple[Plan, ...],
        guard: Guard,
        source: Source,
        run_named: Callable[..., Any],
        state: Mapping[str, Path],
        module: Any,
        build_seconds: float,
        exceptions: set[Any],
        folds: tuple[Kept, ...] = (),
        orders: Mapping[Question, Answer] = MappingProxyType({}),
    ) -> None:
        self.signature = signature
        self.stages = stages
        self.plans = plans
        self.counter = Counter()
        self.add_hit = self.counter.add
        self.build_seconds = build_seconds
        self.is_generic = bool(signature.arguments.symbols)
        self.exceptions = exceptions
        self.guard = guard
        self.source = source
        self.tier, self.reason, self.compile_at = EAGER, "", -1
        self.job: Any = None
        self.run = self.eager()
        self.run_named = run_named
        self.used = 0
        self.folds = folds
        self.orders = orders
        self._record = record
        self._graph = graph
        self._state = state
        # Weakly: a specialization must not keep the child's tensors alive.
        self._module = weakref.ref(module) if isinstance(module, nn.Module) else lambda: module

    def eager(self) -> Callable[..., Any]:
        """The code as a function that calls torch."""
        return self.source.finish(compile_graph(self.source.graph, self.source.state))

    @property
    def hits(self) -> int:
        """Calls served so far, the first one not counted."""
        return self.counter.value

    @property
    def code(self) -> str:
        """The specialized program as Python source; ``self`` is the wrapped module."""
        return self.stages[list(self.stages)[-1]]

    @property
    def module(self) -> Any:
        """What it was made for; ``None`` where that is gone."""
        return self._module()

    @property
    def writes_inputs(self) -> bool:
        """Whether the code writes to memory of arguments or of the module."""
        return any(name == WRITTEN for name, _ in self.signature.state)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The specialized program as a ``GraphModule`` on the live tensors of the child (made anew at each request, so
        that nothing is kept alive).

        It takes the tensors among the arguments, in order, and has no checks of its own.
        """
        module = self._live()
        return fx.GraphModule(
            {target: read(module, path) for target, path in self._state.items()}, copy_graph(self._graph)
        )

    def to_source(self) -> str:
        """The specialized program as the source of a Python module that needs torch alone.

        The module has a class ``Specialized``, a ``torch.nn.Module``. It registers the parameters and buffers that the
        code reads, under the names that they have in the ``state_dict`` of the module that was specialized; they are
        zeros until ``load_state_dict(state_dict, strict=False)`` fills them. Its ``forward`` takes the tensors among
        the arguments, by the names that they have in the user's code, and gives what the module gives. It raises a
        ``ValueError`` where shapes, strides or dtypes are not those that the code was made for.

        Returns:
            The text of the module.

        Raises:
            LazyEinsumError: the code needs what can't be written down: live calls of submodules, hooks, tensors that
                are no parameters or buffers, classes of the user's. The message says what to change.

        >>> from lazy_einsum import OptimizedModule
        >>> m = torch.nn.Linear(3, 4)
        >>> source = OptimizedModule(m).prepare(torch.zeros(2, 3)).to_source()
        >>> scope = {}
        >>> exec(source, scope)
        >>> same = scope["Specialized"]()
        >>> same.load_state_dict(m.state_dict(), strict=False)
        <All keys matched successfully>
        >>> torch.equal(same(torch.ones(2, 3)), m(torch.ones(2, 3)))
        True
        """
        module, traced = self._live(), self.source.traced
        if self.source.overlapping:
            raise refusal("its inputs share memory that forward writes", "pass tensors that do not share memory")
        if traced.switches_modes:
            entered = "forward enters inference mode, saved-tensor hooks or another default dtype"
            raise refusal(entered, "enter them around the call")
        state = {target: read(module, path) for target, path in self._state.items()}
        graph, conditions = written_out(self._graph), traced.conditions
        return module_source(
            Program(module, self.signature, graph, state, traced.result, conditions, traced.switches_grad)
        )

    def plain(self) -> Callable[..., Any]:
        """The code as a function of what it takes of the arguments. It reads the module when it is called, and computes
        folds each time; it has no checks.
        """
        run = self.source.finish(compile_graph(written_out(self._graph), self.source.state))
        return lambda *values: run(*values, *(read(self._live(), path) for path in self._state.values()))

    def _live(self) -> Any:
        """What it was made for."""
        module = self._module()
        if module is None:
            raise LazyEinsumError("the module that this specialization was made for is gone")
        return module

    def record(
        self, generic: Arguments, reads: tuple[tuple[str, Any], ...], conditions: Sequence[str]
    ) -> tuple[fx.Graph, dict[str, int | float]] | None:
        """What was traced, and the values of the symbols of ``generic``, where this is for one of the calls that those
        stand for, under the same conditions and the same state of the module.
        """
        values = values_of(generic, self.signature.arguments)
        state = tuple(item for item in self.signature.state if item[0] not in (WRITTEN, PRECISION))
        if values is None or state != reads:
            return None
        symbols = dict(zip(generic.symbols, values, strict=True))
        if not all(_holds(text, symbols) for text in conditions):
            return None
        return self._record, symbols

    def __repr__(self) -> str:
        return f"<Specialization {self.signature}, {self.hits} hits, built in {self.build_seconds * 1e3:.1f} ms>"


def read(module: Any, path: Path) -> Any:
    """The live object at ``path``."""
    tables = {"module": "_modules", "parameter": "_parameters", "buffer": "_buffers"}
    for how, key in path:
        if how == "item":
            module = module[key]
        elif how == "call":
            module = module()
        elif how == "member":
            module = getattr(module, key)
        elif how == "outer":
            module = key.get()
        elif how == "attribute":
            module = module.__dict__[key]
        else:
            module = module.__dict__[tables[how]][key]
    return module


_functions: LRUCache[Any, Callable[..., Any]] = LRUCache(1024)
_functions_lock = threading.Lock()


def compile_graph(graph: fx.Graph, state: Sequence[str]) -> Callable[..., Any]:
    """A plain function of the graph's placeholders and then the state targets, in order. Equal code gives the same
    function.

    >>> compile_graph(fx.symbolic_trace(lambda x: x + 1).graph, ())(1)
    2
    """
    return as_function(lift(graph, state))


def lift(graph: fx.Graph, state: Sequence[str]) -> fx.Graph:
    """``graph`` with placeholders in the place of its ``get_attr`` nodes, behind its own, in the order of ``state``."""
    lifted = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            environment[node] = lifted.placeholder(node.name)
            environment[node].meta = dict(node.meta)
    names = {target: lifted.placeholder(f"state_{number}") for number, target in enumerate(state)}
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            environment[node] = names[str(node.target)]
            environment[node].meta = dict(node.meta)
        else:
            environment[node] = lifted.node_copy(node, environment.__getitem__)
    return lifted


def as_function(graph: fx.Graph, shared: bool = True) -> Callable[..., Any]:
    """A plain function of the placeholders of a graph that has no ``get_attr`` nodes.

    Args:
        graph: what to compute.
        shared: whether equal code gives the same function, which is then kept.
    """
    code = graph.python_code("self")
    if not shared:
        return _define(code.src, code.globals, "<lazy_einsum>")
    key = (code.src, tuple((name, id(value)) for name, value in sorted(code.globals.items())))
    with _functions_lock:
        found = _functions.get(key)
        if found is None:
            found = _functions[key] = _define(code.src, code.globals, f"<lazy_einsum {len(_functions)}>")
        return found


def _define(text: str, names: Mapping[str, Any], file: str) -> Callable[..., Any]:
    scope = dict(names)
    exec(compile(text, file, "exec"), scope)
    # The parameter ``self`` of fx's generated code is not used: state comes in as arguments.
    return partial(scope["forward"], None)


class _Named:
    """What ``compile_graph`` gives for a graph, each contraction under a name that torch's profilers show; made at the
    first call.
    """

    def __init__(self, graph: fx.Graph, state: Sequence[str]) -> None:
        self._graph = graph
        self._state = state
        self._function: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> Any:
        if self._function is None:
            self._function = compile_graph(with_names(self._graph), self._state)
        return self._function(*values)


def with_names(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` that tells torch's profilers of each tree of einsums that was lowered."""
    new = copy_graph(graph)
    nodes = {node.name: node for node in new.nodes}
    named: set[fx.Node] = set()
    for node in list(new.nodes):
        lowered = node.meta.get(LOWERED)
        # A view may have been another tree's before.
        calls = [nodes[name] for name in lowered.calls if nodes[name] not in named] if lowered is not None else []
        if calls:
            named.update(calls)
            with new.inserting_before(calls[0]):
                entered = new.call_function(ambient_module.enter_range, (f"einsum {lowered.plan.spec}",))
            with new.inserting_after(calls[-1]):
                new.call_function(ambient_module.leave_range, (entered,))
    return new


def specialize(
    module: Any,
    arguments: Arguments,
    options: Options,
    is_leaf: Callable[[nn.Module, str], bool] = lambda module, name: False,
    on_stage: Callable[[Stage, Trace], None] | None = None,
    overlapping: bool = False,
    name: str = "",
    witnesses: Sequence[Specialization] = (),
    hooked: Callable[[str], Caller] = lambda name: direct_call,
    is_frozen: Callable[[str], bool] = lambda name: False,
    folds: Folds | None = None,
) -> Specialization:
    """Make the specialization of ``module`` for the given arguments, in the present ambient state.

    Args:
        module: the child, or any callable.
        arguments: types and constants of the call; symbols among them make code that is generic in these.
        options: how to plan.
        is_leaf: see ``trace``.
        on_stage: called with each stage while it is at hand (``verify`` runs them).
        overlapping: whether this is for calls in which inputs share memory that the module writes to. A trace takes
            all inputs for separate; what it recorded is right for these too, what passes make of it may not be, so
            none is run.
        name: of the submodule that ``module`` is; empty for the child itself.
        witnesses: code for single calls of the kind that symbols among the arguments stand for: what was traced for
            them is compared.
        hooked: see ``trace``.
        is_frozen: whether the user promised not to change the parameter or buffer of this qualified name.
        folds: keeps what is computed of these alone.

    Raises:
        MemoryLimitError: no contraction order stays below the limit.
        UntraceableError: the call can't be represented.
        NotGenericError: it can, but not for all values of the symbols among the arguments.
    """
    start = time.perf_counter()
    ambient = ambient_module.ambient()
    traced = trace(module, arguments, is_leaf, hooked)
    reads: tuple[tuple[str, Any], ...] = describe_reads(traced.reads)
    if arguments.symbols:
        records = [record for entry in witnesses if (record := entry.record(arguments, reads, traced.conditions))]
        if not records:
            records = [(trace(module, arguments.exact(), is_leaf).graph, arguments.symbols)]
        for graph, symbols in records:
            found = difference(graph, traced.graph, symbols)
            if found is not None:
                raise NotGenericError(f"forward does something else for sizes that vary: {found}")
    trace_seconds = time.perf_counter() - start
    if options.folds:
        mark_frozen(traced.graph, traced.state, traced.reads, name, is_frozen)
    stages = Stages()
    plans: tuple[Plan, ...] = ()
    graph = fused = traced.graph
    stages_of = run_passes(traced.graph, options, trace_seconds)
    with noting() as orders:
        for stage in stages_of if not overlapping else (Stage("trace", graph, trace_seconds),):
            if stage.name == "choose_paths":
                fused = graph
                plans = tuple(find_plans(graph, stage.graph))
            graph = stage.graph
            stages.add(stage)
            if on_stage is not None:
                on_stage(stage, traced)
        ranges = tuple(plan_conditions(arguments, fused, options, traced.conditions))
    kinds = _precise_kinds(traced.graph, fused, graph)
    precision = ambient_module.precisions(kinds)
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    state = {target: traced.state[target] for target in dict.fromkeys(targets)}
    kept, code = keep_folds(graph, folds, (*ambient, (PRECISION, precision))) if folds is not None else ((), graph)
    complete = partial(finish, traced=traced, grad=dict(ambient)["grad"])
    lower_for = partial(_lower_for, code, () if overlapping else stages.all, kept, options)
    source = Source(code, tuple(state), complete, traced, overlapping, lower_for)
    run_named = finish(_Named(code, tuple(state)), traced, dict(ambient)["grad"])
    overlap = None
    if any(traced.writes):
        overlap = partial(shares_written if overlapping else shares_nothing_written, traced.writes)
        reads = (*reads, (WRITTEN, "shared by inputs" if overlapping else "of its own for each input"))
    if precision:
        reads = (*reads, (PRECISION, precision))
    conditions = (*traced.conditions, *ranges)
    exceptions: set[Any] = set()
    wanted = list(state.values())
    guard = compile_guard(
        arguments, ambient, traced.reads, wanted, overlap, conditions, exceptions, traced.absent, (kinds, precision)
    )
    signature = Signature(arguments, ambient, reads, name, conditions)
    seconds = time.perf_counter() - start
    return Specialization(
        signature,
        traced.graph,
        graph,
        stages,
        plans,
        guard,
        source,
        run_named,
        state,
        module,
        seconds,
        exceptions,
        kept,
        orders,
    )


def _precise_kinds(traced: fx.Graph, fused: fx.Graph, graph: fx.Graph) -> tuple[tuple[str, torch.dtype], ...]:
    """Kinds of device and dtypes for which it matters to a graph whether torch's flags let products of matrices round
    their operands: all, where something is computed once; and where sums of products became matrix products, or would
    have without these flags, those of the sums.

    Args:
        traced: as it was recorded.
        fused: with the networks that are planned.
        graph: as it runs.
    """
    computes_once = any(isinstance(node.target, Fold) for node in graph.nodes)
    known = [type_of(node) for node in traced.nodes] if computes_once else []
    sums = [type_of(node) for node in traced.nodes if sums_elements(node)]
    if len(sums) > sum(map(sums_elements, fused.nodes)) or any(
        one is not None and ambient_module.product_bits(one.device.type, one.dtype) for one in sums
    ):
        known += sums
    return tuple(sorted({(one.device.type, one.dtype) for one in known if one is not None}, key=str))


def keep_folds(
    graph: fx.Graph, folds: Folds, ambient: tuple[tuple[str, Any], ...]
) -> tuple[tuple[Kept, ...], fx.Graph]:
    """What ``graph`` computes once, and the graph that has it kept. Values are the same with and without gradients, and
    in inference mode, so they are shared between these.
    """
    if not any(isinstance(node.target, Fold) for node in graph.nodes):
        return (), graph
    modes = tuple(item for item in ambient if item[0] not in ("grad", "inference"))
    found: dict[Kept, None] = {}
    new = copy_graph(graph)
    for node in new.nodes:
        if isinstance(node.target, Fold):
            node.target = folds.keep(node.target, modes)
            found[node.target] = None
    return tuple(found), new


def _lower_for(
    graph: fx.Graph, stages: Sequence[Stage], kept: Sequence[Kept], options: Options, machine: Machine
) -> fx.Graph:
    """``graph``, the code of these stages, with the last of them, ``lower``, done for another machine.

    Args:
        graph: what comes out where there are no stages, or it is for that machine.
        stages: the trace, and what each pass made of it.
        kept: what keeps its folds.
        options: those of the passes.
        machine: what contractions are lowered for.
    """
    if not stages or machine == options.machine:
        return graph
    new = PASSES[-1][1](replace(options, machine=machine))(stages[-2].graph)
    keeps = {item.fold.key: item for item in kept}
    for node in new.nodes:
        if isinstance(node.target, Fold):
            node.target = keeps[node.target.key]
    return new


def finish(function: Callable[..., Any], traced: Trace, grad: bool) -> Callable[..., Any]:
    """``function`` with what a graph can't say: building the result in the user's own containers, and putting the
    grad mode back after an exception.
    """
    build = traced.result
    if build is None and not traced.switches_grad and not traced.switches_modes:
        return function

    def run(*values: Any) -> Any:
        if traced.switches_modes:
            with restored(grad):
                result = function(*values)
        elif traced.switches_grad:
            with torch.set_grad_enabled(grad):
                result = function(*values)
        else:
            result = function(*values)
        return result if build is None else build(result)

    return run


def shares_nothing_written(writes: Sequence[bool], *tensors: torch.Tensor) -> bool:
    """Whether no tensor that is written (``writes`` says which) shares memory with another: what a trace assumes."""
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    return all(storages.count(storage) == 1 for storage, written in zip(storages, writes, strict=True) if written)


def shares_written(writes: Sequence[bool], *tensors: torch.Tensor) -> bool:
    """The contrary of ``shares_nothing_written``."""
    return not shares_nothing_written(writes, *tensors)


def plan_conditions(
    arguments: Arguments, graph: fx.Graph, options: Options, conditions: Sequence[str]
) -> Iterator[str]:
    """Where the contraction orders chosen for the symbols' examples are good ones, as conditions on single symbols.

    Looked for in steps of a factor of 4 around the examples, five at most. Orders that are good after every other step
    and after the last are taken to be so after all. One symbol varies at a time, or all together where ``conditions``
    tie one to others.
    """
    networks = []
    frozen = frozen_values(graph)
    for node in graph.nodes if arguments.symbols else ():
        found = read_einsum(node) if is_einsum(node) else None
        network = written_network(node, *found, frozen) if found is not None and len(found[1]) > 2 else None
        if network is not None:
            networks.append((network, plan_saving(network, options.saved_limit, options.optimize)[0].ssa_path))
    examples = arguments.symbols
    sizes = [name for name, example in examples.items() if type(example) is int]
    groups = [[name] for name in sizes] + [sizes] * (len(sizes) > 1)
    for names in groups if networks else ():
        for factor, relation in ((4, "<"), (0.25, ">")):
            scopes = []
            for power in range(1, 6):
                scope = examples | {name: int(examples[name] * factor**power) for name in names}
                if any(scope[name] < 2 for name in names) or not all(_holds(text, scope) for text in conditions):
                    break
                scopes.append(scope)
            if all(_all_good(networks, scope, options) for scope in (*scopes[-1:], *scopes[1:-1:2])):
                continue
            end = next((scope for scope in scopes[:-1] if not _all_good(networks, scope, options)), scopes[-1])
            yield f"{names[0]} {relation} {end[names[0]]}"


def _holds(condition: str, scope: Mapping[str, int | float]) -> bool:
    return bool(_value(condition, scope))


def _value(text: str, scope: Mapping[str, int | float]) -> Any:
    """An expression in symbols (see ``symbols``) at these values of theirs."""
    return eval(text, {"math": math, **scope})


def _all_good(
    networks: Sequence[tuple[WrittenNetwork, PlanPath]], scope: Mapping[str, int | float], options: Options
) -> bool:
    return all(_is_good(network, path, scope, options) for network, path in networks)


def _is_good(network: WrittenNetwork, path: PlanPath, scope: Mapping[str, int | float], options: Options) -> bool:
    """Whether an order is not much worse than the best one at other values of the symbols: in time, and in what
    autograd saves.
    """
    there = network.at(lambda size: int(_value(size.text, scope)) if is_symbolic(size) else int(size))
    shapes = [known.shape for known in there.types]
    best = plan_saving(there, options.saved_limit, options.optimize)[0].ssa_path
    seconds = partial(order_seconds, there.spec, shapes, frozen=there.frozen)
    if seconds(path) > _GOOD * seconds(best):
        return False
    if path == best or options.saved_limit is None or options.optimize != "auto":
        return True
    return is_within(there, options.saved_limit, path)


_GOOD = 1.2


def find_plans(before: fx.Graph, after: fx.Graph) -> Iterator[Plan]:
    """The plans of the einsums of ``before``, as ``choose_paths`` left them in ``after``."""
    planned = {node.name: node.meta.get(PLAN) for node in after.nodes}
    for node in before.nodes:
        found = read_einsum(node)
        if found is None or len(found[1]) < 2:
            continue
        plan = planned.get(node.name)
        if plan is not None:
            yield plan
        elif len(found[1]) == 2:
            types = [known for operand in found[1] if (known := type_of(operand)) is not None]
            yield make_plan(found[0], [known.shape for known in types])
