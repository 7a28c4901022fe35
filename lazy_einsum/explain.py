"""``explain``: gathers a ``Report`` of what an ``OptimizedModule`` holds. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from .anatomy import networks_of
from .cache import Cache
from .graph import Writers, facts, is_einsum, read_einsum, why_ordered
from .misses import Miss
from .networks import Networks
from .operand_names import written_call
from .passes import Options
from .passes.fuse_einsums import left_apart
from .passes.lower import why_not_lowered
from .products import why_unread
from .report import CallReport, FoldReport, LeftReport, MissReport, Report, SpecializationReport
from .specialize import Specialization
from .timing import measured


def explain(
    name: str,
    cache: Cache,
    entries: Sequence[Specialization],
    options: Options,
    reason: str = "",
    measure: bool = False,
) -> Report:
    """The report.

    Args:
        name: class of the child.
        cache: that of its wrapper.
        entries: the specializations to report on.
        options: how they were planned.
        reason: why the call that is asked for runs as the child itself.
        measure: whether the steps of their networks are timed, on random tensors.
    """
    with cache.lock:
        info, misses = cache.info, tuple(cache.last_misses)
        reasons = tuple(dict.fromkeys((*cache.reasons, *([reason] if reason else []))))
    return Report(
        name,
        {**info._asdict(), "tiers": dict(info.tiers), "backend_failures": info.backend_failures},
        info.fold_bytes,
        dict(info.parts),
        reasons,
        tuple(map(_miss, misses)),
        tuple(_specialization(entry, options, measure) for entry in entries),
    )


def _miss(miss: Miss) -> MissReport:
    return MissReport(miss.name, str(miss.signature), miss.reason, miss.seconds)


def _specialization(entry: Specialization, options: Options, measure: bool) -> SpecializationReport:
    networks = networks_of(entry)
    reports = tuple(measured(network) if measure else network.report for network in networks)
    seconds = {stage.name: stage.seconds for stage in entry.stages.all}
    seconds["code"] = max(0.0, entry.build_seconds - sum(seconds.values()))
    return SpecializationReport(
        str(entry.signature),
        entry.hits,
        entry.is_generic,
        entry.tier,
        entry.reason,
        entry.build_seconds,
        seconds,
        reports,
        tuple(_repeated(entry)),
        tuple(_left(entry, options)),
        tuple(FoldReport(kept.fold.names, kept.fold.nbytes, kept.fold.code) for kept in entry.folds),
        dict(entry.stages),
    )


def _repeated(entry: Specialization) -> Iterator[CallReport]:
    """The einsums whose value an earlier one gives."""
    stages = {stage.name: stage.graph for stage in entry.stages.all}
    if "share" in stages:
        kept = {node.name for node in stages["share"].nodes}
        gone = {node.name for node in stages["fuse_einsums"].nodes if is_einsum(node)} - kept
        yield from (written_call(node) for node in stages["trace"].nodes if node.name in gone)


def _left(entry: Specialization, options: Options) -> Iterator[LeftReport]:
    """The contractions that were left as they were: the passes say why."""
    stages = {stage.name: stage.graph for stage in entry.stages.all}
    traced = {node.name: node for node in stages["trace"].nodes}

    def left(node: fx.Node, reason: str) -> LeftReport:
        return LeftReport(written_call(traced.get(node.name, node)), reason)

    if "lower" not in stages:
        for node in stages["trace"].nodes:
            if is_einsum(node):
                yield left(node, "inputs share memory that forward writes: no pass ran")
        return
    kept = {node.name: node for node in stages["share"].nodes}
    for node in stages["recompute"].nodes:
        if reason := why_unread(node, options.reassociate):
            yield left(node, reason)
    joining = Networks(stages["join_reshaped"], options.optimize, options.reassociate)
    for root in joining.roots():
        reason = "reassociate=False" if options.reassociate is False else ""
        reason = reason or joining.why_as_written(root, options.memory_limit)
        for node in reversed(joining.parts[root]) if reason else ():
            now = kept.get(node.name)
            if now is not None and not is_einsum(now) and _is_product(joining, node):
                yield left(node, reason)
    for inner, outer, reason in left_apart(stages["join_products"], options.reassociate):
        if inner.name in kept and outer.name in kept:
            where = facts(outer)
            into = written_call(traced.get(outer.name, outer))
            yield left(inner, f"not fused into {into.text}{_at(where.where if where else '')}: {reason}")
    writers = Writers(stages["share"])
    for node in stages["share"].nodes:
        found = read_einsum(node) if is_einsum(node) else None
        if is_einsum(node) and found is None:
            yield left(node, "its arguments are of a form that is not read")
        elif found is not None and len(found[1]) > 2 and (reason := why_ordered(node, found[1], writers)):
            yield left(node, f"its order is torch.einsum's: {reason}")
    before = entry.stages.all[-2].graph
    writers = Writers(before)
    final = {node.name for node in stages["lower"].nodes}
    for node in before.nodes:
        found = read_einsum(node) if is_einsum(node) else None
        if found is not None and node.name in final and (reason := why_not_lowered(node, found[1], writers)):
            yield left(node, f"it stays a call of torch.einsum: {reason}")


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _is_product(networks: Networks, node: fx.Node) -> bool:
    """Whether a call multiplies tensors and sums: elementwise calls and sums are nobody's contractions."""
    spec, operands, _ = networks.own[node]
    return len(operands) > 1 and bool(spec.summed)
