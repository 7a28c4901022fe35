"""``networks_of``: what a specialization contracts, each network as the user wrote it and as it runs. Only reads graphs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import ambient as ambient_module
from .cost import ITEM, sum_seconds, walk_seconds
from .data import Structure
from .graph import NUMBER, facts, is_einsum, read_einsum, type_of
from .labelsets import Network as PathNetwork
from .labelsets import Path
from .passes.choose_paths import PLAN
from .passes.lower import LOWERED, Lowered
from .plan import Plan, make_plan
from .products import is_permutation, read_product
from .program import Value, operate
from .report import CallReport, NetworkReport, OperandReport, OrderReport, StepReport
from .saved import Tape, Written, WrittenNetwork, eager_saved, followed_types, memory_of, written_network
from .signature import Alias, Arguments, TensorType
from .spec import EinsumSpec
from .specialize import Specialization

Nodes = Mapping[str, fx.Node]


class Graphs(NamedTuple):
    """The nodes of the stages of a specialization that are read here, by name.

    Attributes:
        traced: as recorded.
        written: every einsum in one form.
        networks: an einsum for each network.
        planned: einsums of two.
        final: what runs.
    """

    traced: Nodes
    written: Nodes
    networks: Nodes
    planned: Nodes
    final: Nodes

    @classmethod
    def of(cls, entry: Specialization) -> Graphs | None:
        """Those of ``entry``; ``None`` where no pass ran."""
        stages = {stage.name: {node.name: node for node in stage.graph.nodes} for stage in entry.stages.all}
        names = ("trace", "canonicalize", "share", "choose_paths", "lower")
        return cls(*(stages[name] for name in names)) if set(names) <= stages.keys() else None


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the calls that run, on tensors that come from elsewhere.

    Attributes:
        lowered: a tree of einsums; ``None`` for an einsum that was left as it is.
        types: of the tensors that enter, as autograd follows them.
        memory: numbers of the memory that they lie in.
        steps: for each call the number of the step of the network that it belongs to.
        equation: of an einsum that was left.
    """

    lowered: Lowered | None
    types: tuple[TensorType, ...]
    memory: tuple[int, ...]
    steps: tuple[int, ...]
    equation: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """A network, and what can be run of it.

    Attributes:
        report: all that is said of it.
        calls: the user's calls, in order, views among them; empty where a pass made the network.
        leaves: what enters these, by name.
        parts: what runs in their place.
        numbers: sizes that vary, by name.
    """

    report: NetworkReport
    calls: tuple[fx.Node, ...]
    leaves: Mapping[str, TensorType]
    parts: tuple[Part, ...]
    numbers: Mapping[str, int | float]


def networks_of(entry: Specialization) -> tuple[Network, ...]:
    """The networks of einsums that a specialization contracts, in the order of its code."""
    graphs = Graphs.of(entry)
    return tuple(_Reader(entry, graphs).networks()) if graphs is not None else ()


def call_text(node: fx.Node) -> str:
    """A call as a line of code, its operands by name."""
    if node.op == "call_method":
        receiver, *rest = node.args
        return f"{node.name} = {receiver}.{node.target}({_arguments(rest, node.kwargs)})"
    return f"{node.name} = {name_of(node)}({_arguments(node.args, node.kwargs)})"


def _arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items() if value is not None)])


def name_of(node: fx.Node) -> str:
    """Name of the function that a node calls."""
    return str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", str(node.target))


def written_call(node: fx.Node) -> CallReport:
    """A call of the user's, its equation where it has one."""
    known = facts(node)
    text = name_of(node)
    equation = next((argument for argument in node.args if isinstance(argument, str)), None)
    return CallReport(f"{text} {equation!r}" if equation else text, known.where if known else "")


# --- names ------------------------------------------------------------------------------------------------------------


def argument_names(child: Any, arguments: Arguments) -> list[str]:
    """What the user calls each leaf of the arguments: ``"x"``, ``"batch['edges']"``, ``"args[1]"``."""
    names = [f"argument {number}" for number in range(len(arguments.leaves))]
    args, kwargs = arguments.structure.children
    assert isinstance(args, Structure) and isinstance(kwargs, Structure)
    called = child.forward if isinstance(child, nn.Module) else child
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def name(child: Structure | int, text: str) -> None:
        if isinstance(child, int):
            names[child] = text
            return
        keys = child.keys if child.keys is not None and len(child.keys) == len(child.children) else None
        for number, item in enumerate(child.children):
            name(item, f"{text}[{number if keys is None else repr(keys[number])}]")

    for number, item in enumerate(args.children):
        after = number - len(positional)
        name(item, positional[number] if after < 0 else f"{rest}[{after}]")
    for key, item in zip(kwargs.keys or (), kwargs.children, strict=True):
        name(item, str(key))
    return names


class _Names:
    """Says what a node is to the user."""

    def __init__(self, entry: Specialization, graphs: Graphs) -> None:
        child = entry.module
        prefix = entry.signature.module
        self._prefix = f"{prefix}." if prefix else ""
        own = child.get_submodule(prefix) if isinstance(child, nn.Module) and prefix and _has(child, prefix) else child
        arguments = entry.signature.arguments
        names = argument_names(own, arguments)
        leaves = [number for number, leaf in enumerate(arguments.leaves) if _has_placeholder(leaf)]
        placeholders = [node.name for node in graphs.traced.values() if node.op == "placeholder"]
        self._arguments = {node: names[leaf] for node, leaf in zip(placeholders, leaves, strict=False)}
        self._kinds: dict[str, str] = {}
        if isinstance(own, nn.Module):
            self._kinds |= {name: "parameter" for name, _ in own.named_parameters(remove_duplicate=False)}
            self._kinds |= {name: "buffer" for name, _ in own.named_buffers(remove_duplicate=False)}
        self._traced = graphs.traced

    def operand(self, node: fx.Node) -> OperandReport:
        """A node that enters a network."""
        known = type_of(node)
        assert known is not None
        origin = self._traced.get(node.name)
        stamped = facts(origin if origin is not None else node)
        name, kind = self._describe(node)
        shape = tuple(map(int, known.shape))
        where = stamped.where if stamped is not None and kind != "argument" else ""
        return OperandReport(name, kind, str(known), shape, math.prod(shape) * known.dtype.itemsize, where)

    def _describe(self, node: fx.Node) -> tuple[str, str]:
        if node.op == "placeholder":
            return self._arguments.get(node.name, node.name), "argument"
        if node.op == "get_attr":
            name = str(node.target)
            return self._prefix + name, self._kinds.get(name, "attribute")
        source = node
        while len(inputs := [n for n in source.all_input_nodes if type_of(n) is not None]) == 1:
            (source,) = inputs
        origin = self._describe(source)[0] if source is not node and source.op in ("placeholder", "get_attr") else ""
        call = self._traced.get(node.name, node)
        return f"{name_of(call)} of {origin}" if origin else f"{name_of(call)} ({node.name})", "computed"


def _has(child: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in child.named_modules())


def _has_placeholder(leaf: object) -> bool:
    return not isinstance(leaf, Alias) and type(leaf).__name__ in ("TensorType", "Symbol")


# --- one specialization -----------------------------------------------------------------------------------------------


class _Reader:
    """Reads the networks of one specialization."""

    def __init__(self, entry: Specialization, graphs: Graphs) -> None:
        self._graphs = graphs
        self._names = _Names(entry, graphs)
        self._symbols = entry.signature.arguments.symbols
        self._before = {node.name: node for node in entry.stages.all[-2].graph.nodes}
        self._lowered: dict[str, tuple[Lowered, int]] = {}
        for node in graphs.final.values():
            lowered = node.meta.get(LOWERED)
            if lowered is not None:
                self._lowered.update((name, (lowered, number)) for number, name in enumerate(lowered.steps))
        self._roots = {
            node: found
            for node in graphs.networks.values()
            if is_einsum(node) and (found := read_einsum(node)) is not None and len(found[1]) > 1
        }

    def networks(self) -> Iterator[Network]:
        for node, (spec, operands) in self._roots.items():
            types = followed_types(node, operands)
            if types is not None:
                yield self._network(node, spec, operands, types)

    def _network(
        self, node: fx.Node, spec: EinsumSpec, operands: tuple[fx.Node, ...], types: tuple[TensorType, ...]
    ) -> Network:
        plan = self._plan(node, spec, types)
        steps = self._step_nodes(node, plan)
        parts = tuple(self._parts(node, steps))
        cone, leaves = self._cone(node, operands)
        known = facts(node)
        origin = self._graphs.traced.get(node.name)
        made_by = "" if origin is not None else self._maker(node)
        written = None if origin is None else self._written(node, operands, cone, leaves)
        calls = [self._graphs.traced[n.name] for n in cone if self._is_contraction(n)]
        report = NetworkReport(
            node.name,
            str(plan.spec),
            known.where if known else "",
            tuple(map(written_call, calls)),
            made_by,
            tuple(other.name for other, (_, used) in self._roots.items() if node in used and made_by == "share"),
            sum(step is not None and step not in self._lowered and step not in self._graphs.final for step in steps),
            plan.optimizer,
            plan.path,
            plan.naive_flops,
            _scaling(plan.spec, plan.shapes),
            written,
            self._optimized(node, operands, plan, types, parts, steps),
        )
        own = {leaf: entering for leaf in leaves if (entering := type_of(self._graphs.written[leaf])) is not None}
        return Network(report, tuple(self._graphs.written[n.name] for n in cone), own, parts, self._symbols)

    def _maker(self, node: fx.Node) -> str:
        """The pass that made a network: the only ones that add einsums of their own."""
        users = [other for other, (_, used) in self._roots.items() if node in used]
        return "share" if len(users) > 1 else "distribute"

    def _plan(self, node: fx.Node, spec: EinsumSpec, types: Sequence[TensorType]) -> Plan:
        planned = self._graphs.planned.get(node.name)
        plan = planned.meta.get(PLAN) if planned is not None else None
        if plan is not None:
            assert isinstance(plan, Plan)
            return _at_example(plan)
        return make_plan(spec, [tuple(map(int, known.shape)) for known in types], False)

    def _step_nodes(self, node: fx.Node, plan: Plan) -> list[str]:
        """Names of the einsums that are the steps of a plan."""
        n = len(plan.shapes)
        names = [""] * len(plan.steps)

        def visit(number: int, at: fx.Node) -> None:
            names[number - n] = at.name
            found = read_einsum(at) if is_einsum(at) else None
            step = plan.steps[number - n]
            for operand, inner in zip(step.operands, found[1] if found else (), strict=False):
                if operand >= n:
                    visit(operand, inner)

        if len(plan.steps) == 1 or PLAN in self._graphs.planned[node.name].meta:
            visit(n + len(plan.steps) - 1, self._graphs.planned[node.name])
        return names

    # -- as it runs

    def _parts(self, root: fx.Node, steps: Sequence[str]) -> Iterator[Part]:
        """What runs of a network, tree by tree."""
        done: set[int] = set()
        number_of = {name: number for number, name in enumerate(steps)}
        for number, name in enumerate(steps):
            node = self._graphs.final.get(name)
            if name in self._lowered:
                lowered, _ = self._lowered[name]
                leaves = [self._node(leaf) for leaf in lowered.leaves]
                types = followed_types(root, leaves)
                if id(lowered) not in done and types is not None:
                    owners = [number_of.get(step, -1) for step in lowered.steps]
                    own = tuple(owners[at] for at in _steps_of_calls(lowered))
                    yield Part(lowered, tuple(map(_exact, types)), memory_of(leaves), own)
                done.add(id(lowered))
            elif node is not None and is_einsum(node) and (found := read_einsum(node)) is not None:
                types = followed_types(root, found[1])
                if types is not None:
                    yield Part(None, tuple(map(_exact, types)), memory_of(found[1]), (number,), str(found[0]))

    def _node(self, name: str) -> fx.Node:
        """A node that enters a tree, as it was when that was lowered."""
        return self._graphs.final[name] if name in self._graphs.final else self._before[name]

    def _optimized(
        self,
        node: fx.Node,
        operands: tuple[fx.Node, ...],
        plan: Plan,
        types: tuple[TensorType, ...],
        parts: Sequence[Part],
        names: Sequence[str],
    ) -> OrderReport:
        item = types[0].dtype.itemsize
        follows = [known.requires_grad for known in types]
        code: list[list[str]] = [[] for _ in plan.steps]
        kernels: list[list[str]] = [[] for _ in plan.steps]
        peak, saved = 0, 0
        complete = True
        for part in parts:
            for number, text, kernel in _calls_of(part):
                if number >= 0:
                    code[number].append(text)
                    kernels[number] += [kernel] if kernel else []
            most, kept = _memory(part)
            peak = max(peak, most)
            saved += kept or 0
            complete = complete and kept is not None and all(number >= 0 for number in part.steps)
        steps = []
        terms = dict(enumerate(plan.spec.inputs))
        for number, step in enumerate(plan.steps):
            for operand in step.operands:
                terms.pop(operand)
            terms[len(plan.shapes) + number] = step.spec.output
            followed = [follows[operand] for operand in step.operands]
            follows.append(any(followed))
            seconds, _ = _step_seconds(step.spec, step.shapes, followed)
            name = names[number]
            is_folded = bool(name) and name not in self._lowered and name not in self._graphs.final
            kernel = _counted(kernels[number]) or ("computed once" if is_folded else "view" if code[number] else "-")
            steps.append(
                StepReport(
                    step.operands,
                    str(step.spec),
                    f"{','.join(terms.values())}->{plan.spec.output}",
                    tuple(map(int, step.shape)),
                    _scaling(step.spec, step.shapes),
                    blas_kind(step.spec, step.shapes),
                    kernel,
                    tuple(code[number]),
                    step.flops,
                    step.flops * sum(followed),
                    item * (sum(map(math.prod, step.shapes)) + math.prod(step.shape)),
                    item * step.size,
                    0.0 if is_folded else seconds,
                )
            )
        if not parts:
            peak = _peak(plan, item)
        entering = [self._names.operand(operand) for operand in operands]
        kept_bytes = saved * item if complete and parts and any(follows) else None
        return _order(entering, steps, peak, kept_bytes, _backward_seconds(plan, follows[: len(types)]))

    # -- as it was written

    def _cone(self, node: fx.Node, operands: Sequence[fx.Node]) -> tuple[list[fx.Node], list[str]]:
        """The calls of the user's between what enters a network and its result, and the names of what enters."""
        graphs = self._graphs
        if node.name not in graphs.written:
            return [], []
        ends: dict[str, None] = {}

        def end(operand: fx.Node) -> None:
            if operand.name in graphs.written:
                ends[operand.name] = None
            else:
                for inner in operand.all_input_nodes:
                    end(inner)

        for operand in operands:
            end(operand)
        found: set[fx.Node] = set()
        waiting = [graphs.written[node.name]]
        while waiting:
            at = waiting.pop()
            if at in found or NUMBER in at.meta:
                continue
            if (at.name in ends and at.name != node.name) or at.op in ("placeholder", "get_attr"):
                ends[at.name] = None
                continue
            found.add(at)
            waiting += at.all_input_nodes
        return [at for at in graphs.written.values() if at in found], [
            name for name in ends if graphs.written[name].op in ("placeholder", "get_attr") or type_of(graphs.written[name])
        ]

    def _is_contraction(self, node: fx.Node) -> bool:
        return is_einsum(node) or (read_product(node, True) is not None and not is_permutation(node))

    def _written(
        self, node: fx.Node, operands: tuple[fx.Node, ...], cone: Sequence[fx.Node], leaves: Sequence[str]
    ) -> OrderReport | None:
        nodes = self._graphs.written
        writer = _Written(len(leaves))
        for number, name in enumerate(leaves):
            known, base = type_of(nodes[name]), facts(node)
            if known is None:
                return None
            writer.enter(name, number, _exact(replace(known, requires_grad=known.requires_grad and base is not None and base.grad)))
        for at in cone:
            if not writer.add(at, self._graphs.traced[at.name]):
                return None
        network = written_network(node, *self._roots[node])
        tape = None if network is None else eager_saved(network.at(int))
        followed = tape is not None and any(known.requires_grad for known in network.types) if network else False
        item = writer.item
        entering = [self._names.operand(nodes[name]) for name in leaves]
        saved = tape.saved * item if tape is not None and followed else None
        return _order(entering, writer.steps, writer.peak(), saved, writer.backward_seconds if followed else None)


class _Written:
    """Collects the user's calls as steps."""

    def __init__(self, n_operands: int) -> None:
        self.steps: list[StepReport] = []
        self.item = ITEM
        self.backward_seconds = 0.0
        self._n = n_operands
        self._numbers: dict[str, int] = {}
        self._follows: list[bool] = []

    def enter(self, name: str, number: int, known: TensorType) -> None:
        """Note an operand."""
        self._numbers[name] = number
        self._follows.append(known.requires_grad)
        self.item = known.dtype.itemsize

    def add(self, node: fx.Node, call: fx.Node) -> bool:
        """Note a call; whether it could be read.

        Args:
            node: in one form.
            call: the same as it was recorded.
        """
        taken = [n for n in node.all_input_nodes if n.name in self._numbers]
        product = read_product(node, True)
        known = facts(node)
        if not taken or known is None or known.type is None:
            return False
        if product is not None and len(product.operands) > 1:
            operands = [self._numbers.get(operand.name) for operand in product.operands]
            types = [entering for operand in product.operands if (entering := type_of(operand)) is not None]
            if None in operands or len(types) < len(operands):
                return False
            self._contract(node, call, product.spec, [n for n in operands if n is not None], list(map(_exact, types)))
            return True
        entering = type_of(taken[0])
        views = facts(taken[0])
        if len(taken) == 1 and views is not None and known.storage == views.storage:
            self._numbers[node.name] = self._numbers[taken[0].name]
            return True
        assert entering is not None
        numbers = tuple(self._numbers[n.name] for n in taken)
        size, before = math.prod(map(int, known.type.shape)), math.prod(map(int, entering.shape))
        if product is not None and size < before:
            seconds = sum_seconds(before, max(size, 1), 1)
        else:
            seconds = walk_seconds(size, 1, 1, 1, 1, 2 * ITEM * size)
        shape = tuple(map(int, known.type.shape))
        equation = str(product.spec) if product is not None else ""
        self._note(call, numbers, equation, shape, "-", before, before + size, size, seconds, 0.0, len(shape))
        self._numbers[node.name] = self._n + len(self.steps) - 1
        return True

    def _contract(
        self, node: fx.Node, call: fx.Node, spec: EinsumSpec, operands: list[int], types: list[TensorType]
    ) -> None:
        shapes = [tuple(known.shape) for known in types]
        plan = make_plan(spec, shapes, _eager_path(spec, types) if len(types) > 2 else False)
        numbers = list(operands)
        for step in plan.steps:
            own = tuple(numbers[operand] for operand in step.operands)
            followed = [self._follows[number] for number in own]
            seconds, backward = _step_seconds(step.spec, step.shapes, followed)
            elements = sum(map(math.prod, step.shapes)) + step.size
            kind = blas_kind(step.spec, step.shapes)
            scaling = _scaling(step.spec, step.shapes)
            shape = tuple(map(int, step.shape))
            self._note(call, own, str(step.spec), shape, kind, step.flops, elements, step.size, seconds, backward, scaling)
            numbers.append(self._n + len(self.steps) - 1)
        self._numbers[node.name] = numbers[-1]

    def _note(
        self,
        call: fx.Node,
        operands: tuple[int, ...],
        equation: str,
        shape: tuple[int, ...],
        kind: str,
        flops: int,
        elements: int,
        size: int,
        seconds: float,
        backward: float,
        scaling: int,
    ) -> None:
        followed = sum(self._follows[number] for number in operands)
        self._follows.append(bool(followed))
        self.backward_seconds += backward
        known = facts(call)
        self.steps.append(
            StepReport(
                operands,
                equation,
                "",
                shape,
                scaling,
                kind,
                name_of(call),
                (call_text(call),),
                flops,
                flops * followed,
                self.item * elements,
                self.item * size,
                seconds,
                None,
                known.where if known is not None else "",
            )
        )

    def peak(self) -> int:
        """Bytes of results alive at once, each dropped after its last use."""
        last = {number: at for at, step in enumerate(self.steps) for number in step.operands}
        alive, most = 0, 0
        for at, step in enumerate(self.steps):
            alive += step.result_bytes
            most = max(most, alive)
            alive -= sum(
                self.steps[number - self._n].result_bytes
                for number in set(step.operands)
                if number >= self._n and last[number] == at
            )
        return most


# --- figures ----------------------------------------------------------------------------------------------------------


def blas_kind(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> str:
    """What kind of product a contraction of two is.

    >>> blas_kind(EinsumSpec(("zij", "zjk"), "zik"), [(5, 2, 3), (5, 3, 4)])
    'batched GEMM'
    """
    if len(spec.inputs) != 2:
        return "-"
    sizes = spec.sizes(shapes)
    a, b = ({label for label in term if sizes[label] != 1} for term in spec.inputs)
    output = set(spec.output)
    if not (a & b) - output:
        return "-"
    rows, columns = (a - b) & output, (b - a) & output
    kind = "GEMM" if rows and columns else "GEMV" if rows or columns else "DOT"
    return f"batched {kind}" if a & b & output else kind


def _scaling(spec: EinsumSpec, shapes: Sequence[Sequence[int]]) -> int:
    return sum(size != 1 for size in spec.sizes(shapes).values())


def _exact(known: TensorType) -> TensorType:
    return replace(known, shape=tuple(map(int, known.shape)), stride=tuple(map(int, known.stride)))


def _at_example(plan: Plan) -> Plan:
    """A plan with plain numbers for sizes."""
    steps = tuple(
        replace(
            step,
            shapes=tuple(tuple(map(int, shape)) for shape in step.shapes),
            shape=tuple(map(int, step.shape)),
            flops=int(step.flops),
        )
        for step in plan.steps
    )
    shapes = tuple(tuple(map(int, shape)) for shape in plan.shapes)
    return replace(plan, shapes=shapes, steps=steps, flops=int(plan.flops), naive_flops=int(plan.naive_flops))


def _step_seconds(
    spec: EinsumSpec, shapes: Sequence[tuple[int, ...]], follows: Sequence[bool]
) -> tuple[float, float]:
    """What the cost model expects of one contraction, forward and backward."""
    if len(shapes) != 2:
        elements = math.prod(spec.sizes(shapes).values())
        result = math.prod(spec.output_shape(shapes))
        return (sum_seconds(elements, max(result, 1), 1) if result < elements else 0.0), 0.0
    network = PathNetwork.of(spec, shapes, spec.sizes(shapes), False)
    forward = network.seconds(((0, 1),))
    return forward, network.following(list(follows)).seconds(((0, 1),)) - forward


def _backward_seconds(plan: Plan, follows: Sequence[bool]) -> float | None:
    if not any(follows) or len(plan.shapes) < 2:
        return None
    network = PathNetwork.of(plan.spec, plan.shapes, plan.spec.sizes(plan.shapes), False)
    return network.following(list(follows)).seconds(plan.ssa_path) - network.seconds(plan.ssa_path)


def _eager_path(spec: EinsumSpec, types: Sequence[TensorType]) -> Path | bool:
    """The order in which torch.einsum contracts such operands, as positions; ``False``, left to right, where that can't
    be told.
    """
    network = WrittenNetwork(Written.plain(spec), spec, tuple(types), tuple(range(len(types))))
    tape = eager_saved(network)
    pairs = tape.pairs if tape is not None else []
    if sorted(number for pair in pairs for number in pair) != list(range(2 * len(types) - 2)):
        return False
    alive, path = list(range(len(types))), []
    for number, pair in enumerate(pairs):
        path.append(tuple(sorted(alive.index(operand) for operand in pair)))
        alive = [operand for operand in alive if operand not in pair] + [len(types) + number]
    return tuple(path)


def _peak(plan: Plan, item: int) -> int:
    alive, most = 0, 0
    n = len(plan.shapes)
    for step in plan.steps:
        alive += item * step.size
        most = max(most, alive)
        alive -= sum(item * plan.steps[number - n].size for number in step.operands if number >= n)
    return most


def _order(
    operands: Sequence[OperandReport],
    steps: Sequence[StepReport],
    peak: int,
    saved: int | None,
    backward: float | None,
) -> OrderReport:
    return OrderReport(
        tuple(operands),
        tuple(steps),
        sum(step.flops for step in steps),
        sum(step.backward_flops for step in steps),
        sum(step.bytes for step in steps),
        max((step.result_bytes for step in steps), default=0),
        peak,
        saved,
        max((step.scaling for step in steps), default=0),
        sum(step.seconds for step in steps),
        backward,
    )


# --- the calls of a program -------------------------------------------------------------------------------------------


def _steps_of_calls(lowered: Lowered) -> tuple[int, ...]:
    """For each call of a program the step of its plan that it is a part of."""
    plan, program = lowered.plan, lowered.program
    n = program.n_operands
    sets: list[frozenset[int]] = [frozenset({number}) for number in range(n)]
    of_step: list[frozenset[int]] = list(sets)
    for step in plan.steps:
        of_step.append(frozenset().union(*(of_step[operand] for operand in step.operands)))
    found = []
    for call in program.calls:
        taken = [sets[argument.number] for argument in call.args if isinstance(argument, Value)]
        sets.append(frozenset().union(*taken))
        own = sets[-1]
        # Of the steps with just these leaves there is one; what prepares a leaf is part of the step that takes it.
        exact = [number for number, leaves in enumerate(of_step[n:]) if leaves == own]
        found.append(exact[0] if exact else next(i for i, leaves in enumerate(of_step[n:]) if own <= leaves))
    return tuple(found)


def _calls_of(part: Part) -> Iterator[tuple[int, str, str]]:
    """The calls of a part: number of the step, text, and the kernel that it is, empty for views."""
    if part.lowered is None:
        yield part.steps[0], f"torch.einsum({part.equation!r})", "einsum"
        return
    program = part.lowered.program
    lines = program.source.splitlines()[1:]
    texts = iter([line.strip() for line in lines if not line.strip().startswith("del ")])
    for number, (call, is_view) in zip(part.steps, _runs_without_data(part), strict=True):
        yield number, next(texts), "" if is_view else "copy" if call in ("reshape", "contiguous", "clone") else call


def _without_data(known: TensorType) -> torch.Tensor:
    return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")


def _values(part: Part) -> list[torch.Tensor]:
    """All values of a part: what enters it, and the result of each call, none with data."""
    assert part.lowered is not None
    with ambient_module.no_modes(), torch.no_grad():
        values = [_without_data(known) for known in part.types]
        for call in part.lowered.program.calls:
            values.append(operate(_plain_call(call), values))
    return values


def _plain_call(call: Any) -> Any:
    return call._replace(args=tuple(map(_plain, call.args)))


def _plain(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_plain, argument))
    return int(argument) if isinstance(argument, int) and type(argument) is not bool else argument


def _runs_without_data(part: Part) -> Iterator[tuple[str, bool]]:
    """The method that each call of a part calls, and whether its result is a view."""
    assert part.lowered is not None
    values = _values(part)
    for number, call in enumerate(part.lowered.program.calls, len(part.types)):
        taken = [values[argument.number] for argument in call.args if isinstance(argument, Value)]
        memory = {value.untyped_storage()._cdata for value in taken}
        is_view = values[number].untyped_storage()._cdata in memory and not call.target.endswith("_")
        yield call.target, is_view


def _memory(part: Part) -> tuple[int, int | None]:
    """Bytes that are alive at once at most, what enters apart, and the elements that autograd saves."""
    if part.lowered is None:
        return 0, None
    program = part.lowered.program
    values = _values(part)
    n = len(part.types)
    keys = [value.untyped_storage()._cdata for value in values]
    last: dict[int, int] = {}
    for at, call in enumerate(program.calls):
        for argument in call.args:
            if isinstance(argument, Value):
                last[keys[argument.number]] = at
        last[keys[n + at]] = at
    given, alive, most = set(keys[:n]), {}, 0
    for at in range(len(program.calls)):
        key = keys[n + at]
        if key not in given:
            alive[key] = values[n + at].untyped_storage().nbytes()
        most = max(most, sum(alive.values()))
        alive = {key: size for key, size in alive.items() if last[key] > at}
    if not any(known.requires_grad for known in part.types):
        return most, 0
    tape = Tape(part.types, part.memory)
    tape.run(program.calls, range(n))
    return most, tape.saved


def _counted(kernels: Sequence[str]) -> str:
    """Names of kernels in order, those in a row counted.

    >>> _counted(["mul", "addcmul_", "addcmul_", "sum"])
    'mul, 2 x addcmul_, sum'
    """
    groups: list[tuple[str, int]] = []
    for kernel in kernels:
        if groups and groups[-1][0] == kernel:
            groups[-1] = kernel, groups[-1][1] + 1
        else:
            groups.append((kernel, 1))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in groups)

