"""``networks_of``: what a specialization contracts, each network as the user wrote it and as it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

from .figures import (
    at_example,
    backward_seconds,
    blas_kind,
    eager_path,
    exact,
    naive_report,
    order_report,
    peak_of,
    scaling,
    step_seconds,
)
from .graph import NUMBER, call_of, facts, is_einsum, read_einsum, type_of
from .operand_names import Names, written_call
from .passes.choose_paths import PLAN
from .passes.lower import LOWERED, Lowered
from .plan import Plan, make_plan
from .products import is_permutation, read_product
from .report import NetworkReport, OrderReport, StepReport
from .running import Part, calls_of, counted, memory_of_part, steps_of_calls
from .saved import eager_saved, followed_types, memory_of, written_network
from .signature import TensorType
from .spec import EinsumSpec
from .specialize import Specialization
from .written import WrittenCalls

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


class _Reader:
    """Reads the networks of one specialization."""

    def __init__(self, entry: Specialization, graphs: Graphs) -> None:
        self._graphs = graphs
        self._names = Names(entry, graphs.traced)
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
        origin = self._graphs.traced.get(call_of(node))
        made_by = "" if origin is not None else self._maker(node)
        written = None if origin is None else self._written(node, operands, cone, leaves)
        optimized = self._optimized(node, operands, plan, types, parts, steps)
        calls = [self._graphs.traced[n.name] for n in cone if self._is_contraction(n)]
        report = NetworkReport(
            node.name,
            str(plan.spec),
            known.where if known else "",
            tuple(map(written_call, calls)),
            made_by,
            tuple(other.name for other, (_, used) in self._roots.items() if node in used and made_by == "share"),
            bool(node.users),
            sum(step is not None and step not in self._lowered and step not in self._graphs.final for step in steps),
            plan.optimizer if len(plan.steps) > 1 else "no search",
            plan.path,
            naive_report(plan, optimized.operands, types, str(plan.spec)),
            written,
            optimized,
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
            return at_example(plan)
        exactly = list(map(exact, types))
        return make_plan(spec, [known.shape for known in exactly], eager_path(spec, exactly))

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
                    own = tuple(owners[at] for at in steps_of_calls(lowered))
                    yield Part(lowered, tuple(map(exact, types)), memory_of(leaves), own)
                done.add(id(lowered))
            elif node is not None and is_einsum(node) and (found := read_einsum(node)) is not None:
                types = followed_types(root, found[1])
                if types is not None:
                    yield Part(None, tuple(map(exact, types)), memory_of(found[1]), (number,), str(found[0]))

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
            for number, text, kernel in calls_of(part):
                if number >= 0:
                    code[number].append(text)
                    kernels[number] += [kernel] if kernel else []
            most, kept = memory_of_part(part)
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
            seconds, _ = step_seconds(step.spec, step.shapes, followed)
            name = names[number]
            is_folded = bool(name) and name not in self._lowered and name not in self._graphs.final
            kernel = counted(kernels[number]) or ("computed once" if is_folded else "view" if code[number] else "-")
            steps.append(
                StepReport(
                    step.operands,
                    str(step.spec),
                    f"{','.join(terms.values())}->{plan.spec.output}",
                    tuple(map(int, step.shape)),
                    scaling(step.spec, step.shapes),
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
            peak = peak_of(plan, item)
        entering = [self._names.operand(operand) for operand in operands]
        kept_bytes = saved * item if complete and parts and any(follows) else None
        return order_report(entering, steps, peak, kept_bytes, backward_seconds(plan, follows[: len(types)]))

    # -- as it was written

    def _cone(self, node: fx.Node, operands: Sequence[fx.Node]) -> tuple[list[fx.Node], list[str]]:
        """The calls of the user's between what enters a network and its result, and the names of what enters."""
        graphs, name = self._graphs, call_of(node)
        if name not in graphs.written:
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
        waiting = [graphs.written[name]]
        while waiting:
            at = waiting.pop()
            if at in found or NUMBER in at.meta:
                continue
            if (at.name in ends and at.name != name) or at.op in ("placeholder", "get_attr"):
                ends[at.name] = None
                continue
            found.add(at)
            waiting += at.all_input_nodes
        return [at for at in graphs.written.values() if at in found], [
            name
            for name in ends
            if graphs.written[name].op in ("placeholder", "get_attr") or type_of(graphs.written[name])
        ]

    def _is_contraction(self, node: fx.Node) -> bool:
        return is_einsum(node) or (read_product(node, True) is not None and not is_permutation(node))

    def _written(
        self, node: fx.Node, operands: tuple[fx.Node, ...], cone: Sequence[fx.Node], leaves: Sequence[str]
    ) -> OrderReport | None:
        nodes = self._graphs.written
        writer = WrittenCalls(len(leaves))
        for number, name in enumerate(leaves):
            known, base = type_of(nodes[name]), facts(node)
            if known is None:
                return None
            writer.enter(
                name,
                number,
                exact(replace(known, requires_grad=known.requires_grad and base is not None and base.grad)),
            )
        for at in cone:
            if not writer.add(at, self._graphs.traced[at.name]):
                return None
        network = written_network(node, *self._roots[node])
        tape = None if network is None else eager_saved(network.at(int))
        followed = tape is not None and any(known.requires_grad for known in network.types) if network else False
        item = writer.item
        entering = [self._names.operand(nodes[name]) for name in leaves]
        saved = tape.saved * item if tape is not None and followed else None
        return order_report(entering, writer.steps, writer.peak(), saved, writer.backward_seconds if followed else None)
