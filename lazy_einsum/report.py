"""``Report``: what was done for a module, as data. ``report_text``, ``report_page`` and ``report_figure`` show it,
``explain`` gathers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from .report_figure import draw_figure
from .report_page import write_page
from .report_text import network_text, write_text


@dataclass(frozen=True, slots=True)
class OperandReport:
    """A tensor that enters a network.

    Attributes:
        name: as the user knows it: ``"x"`` for an argument, ``"layers.0.weight"`` for a parameter; of what ``forward``
            computes, the function that gave it and what that was made of: ``"reshape of weight"``.
        kind: ``"argument"``, ``"parameter"``, ``"buffer"``, ``"attribute"`` or ``"computed"``.
        type: dtype, shape and what else the key has of it.
        shape: sizes.
        bytes: of its elements.
        where: ``file:line`` of the user's code that gave it; empty where unknown.
    """

    name: str
    kind: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    where: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """One contraction of an order.

    Attributes:
        operands: what it consumes: the operands of the order are numbered from 0, the results of its steps follow.
        equation: the einsum that it computes.
        remaining: what is left to contract after it, as an equation.
        shape: of its result.
        scaling: number of labels that it loops over, those of size 1 apart.
        blas: the kind of product that it is: ``"GEMM"``, ``"GEMV"``, ``"DOT"``, with ``"batched "`` before it;
            ``"-"`` where nothing is summed over two operands.
        kernel: the calls of torch that do the work, views apart.
        code: all calls, in order.
        flops: floating point operations, as opt_einsum counts them.
        backward_flops: those of the gradients that autograd asks for.
        bytes: of its operands and its result.
        result_bytes: of its result.
        seconds: what the cost model expects.
        measured_seconds: what it took, where that was measured.
    """

    operands: tuple[int, ...]
    equation: str
    remaining: str
    shape: tuple[int, ...]
    scaling: int
    blas: str
    kernel: str
    code: tuple[str, ...]
    flops: int
    backward_flops: int
    bytes: int
    result_bytes: int
    seconds: float
    measured_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class OrderReport:
    """An order in which a network is contracted.

    Attributes:
        operands: what is contracted.
        steps: in what order.
        flops: of all steps.
        backward_flops: of all gradients that autograd asks for.
        bytes: that all steps read and write.
        largest_bytes: of the largest result of a step, that of the network included.
        peak_bytes: of results (and copies) that are alive at once, the operands apart.
        saved_bytes: that autograd keeps for the backward pass; ``None`` where it follows nothing, or that is unknown.
        scaling: the most labels that a step loops over.
        seconds: what the cost model expects of the forward pass.
        backward_seconds: of the backward pass; ``None`` where autograd follows nothing, or that is unknown.
        measured_seconds: what the forward pass took, where that was measured.
    """

    operands: tuple[OperandReport, ...]
    steps: tuple[StepReport, ...]
    flops: int
    backward_flops: int
    bytes: int
    largest_bytes: int
    peak_bytes: int
    saved_bytes: int | None
    scaling: int
    seconds: float
    backward_seconds: float | None
    measured_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CallReport:
    """A call in the user's code.

    Attributes:
        text: the call.
        where: ``file:line``; empty where unknown.
    """

    text: str
    where: str

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """One network of einsums, which has one order. ``str`` of it is a table.

    Attributes:
        name: of its result in the code.
        equation: all of it as one einsum.
        where: ``file:line`` of the call that gives its result.
        calls: the user's calls that it was made of, contractions only.
        made_by: the pass that made it, where no call of the user's gives its result; else empty.
        shared_by: the networks that use its result, where it is a part that several have in common.
        is_used: whether anything uses its result.
        folded: steps that are computed once, as they have frozen operands only.
        optimizer: name of the strategy that found the order.
        path: the order as opt_einsum has it: positions in a list from which consumed operands are removed.
        naive: one loop over all labels, as an order of one step.
        written: the calls as they are in the user's code; ``None`` where ``made_by`` is a pass.
        optimized: what runs.
        unmeasured: why the calls as they are in the user's code were not timed, where times were asked for.
    """

    name: str
    equation: str
    where: str
    calls: tuple[CallReport, ...]
    made_by: str
    shared_by: tuple[str, ...]
    is_used: bool
    folded: int
    optimizer: str
    path: tuple[tuple[int, ...], ...]
    naive: OrderReport
    written: OrderReport | None
    optimized: OrderReport
    unmeasured: str = ""

    @property
    def is_fused(self) -> bool:
        """Whether it was made of several calls."""
        return len(self.calls) > 1

    @property
    def naive_flops(self) -> int:
        """Operations of one loop over all labels."""
        return self.naive.flops

    @property
    def naive_scaling(self) -> int:
        """Number of labels, those of size 1 apart."""
        return self.naive.scaling

    @property
    def order(self) -> str:
        """The order in words of the operands: ``"(x, weight), (#2, y)"`` where ``#2`` is the result of a step."""
        names = [operand.name for operand in self.optimized.operands]
        names += [f"#{len(names) + number}" for number in range(len(self.optimized.steps))]
        return ", ".join(f"({', '.join(names[place] for place in step.operands)})" for step in self.optimized.steps)

    @property
    def eager_ratio(self) -> float | None:
        """How many times as long the calls took as they were written, where that was measured."""
        written = self.written.measured_seconds if self.written is not None else None
        measured = self.optimized.measured_seconds
        return written / measured if written is not None and measured else None

    def __str__(self) -> str:
        return network_text(self)


@dataclass(frozen=True, slots=True)
class LeftReport:
    """A contraction that was left as it was.

    Attributes:
        call: the user's.
        reason: why.
    """

    call: CallReport
    reason: str


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What is computed once.

    Attributes:
        names: qualified names of the frozen tensors that it is computed of.
        bytes: of its value.
        code: the computation.
    """

    names: tuple[str, ...]
    bytes: int
    code: str


@dataclass(frozen=True, slots=True)
class SpecializationReport:
    """The code for one signature.

    Attributes:
        signature: the key, in words.
        hits: calls served, the first one not counted.
        is_generic: whether it serves other sizes too.
        tier: what runs it: ``"eager"``, or the name of a backend.
        reason: why no backend runs it, where one is to.
        build_seconds: time to make it.
        stage_seconds: of that, the trace and each pass; ``"code"`` is the rest: the code and its checks.
        networks: what it contracts.
        repeated: the user's einsums whose value another one gives.
        left: what was left as it was.
        folds: what it computes once.
        stages: code after each pass, the first is what was traced, the last is what runs.
    """

    signature: str
    hits: int
    is_generic: bool
    tier: str
    reason: str
    build_seconds: float
    stage_seconds: Mapping[str, float]
    networks: tuple[NetworkReport, ...]
    repeated: tuple[CallReport, ...]
    left: tuple[LeftReport, ...]
    folds: tuple[FoldReport, ...]
    stages: Mapping[str, str]

    @property
    def code(self) -> str:
        """What runs."""
        return list(self.stages.values())[-1]


@dataclass(frozen=True, slots=True)
class MissReport:
    """A call that no code was there for.

    Attributes:
        module: its class.
        signature: what was called, in words.
        reason: why there was no code.
        seconds: time spent building.
    """

    module: str
    signature: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What ``OptimizedModule.explain`` gives. ``str(report)`` is for reading, notebooks show a page, ``to_dict()`` is
    for programs, ``save("report.html")`` writes the page, ``plot()`` draws.

    Attributes:
        name: class of the child.
        cache: statistics of the cache, by name; see ``CacheInfo``.
        fold_bytes: what is kept of what was computed once.
        parts: where the child as a whole can't be traced, what became of its submodules.
        reasons: why calls ran as the child itself.
        misses: the last calls that no code was there for, the last one last.
        specializations: those reported on, least recently used first.
    """

    name: str
    cache: Mapping[str, Any]
    fold_bytes: int
    parts: Mapping[str, str]
    reasons: tuple[str, ...]
    misses: tuple[MissReport, ...]
    specializations: tuple[SpecializationReport, ...]

    @property
    def networks(self) -> tuple[NetworkReport, ...]:
        """Those of all specializations reported on."""
        return tuple(network for entry in self.specializations for network in entry.networks)

    @property
    def fused(self) -> tuple[str, ...]:
        """For each network that was made of several calls, one line: which, and what it is now."""
        return tuple(
            f"{' + '.join(map(str, network.calls))} -> {network.equation}"
            for network in self.networks
            if network.is_fused
        )

    @property
    def orders(self) -> tuple[str, ...]:
        """For each network one line: what is contracted, and in what order."""
        return tuple(f"{network.equation}: {network.order}" for network in self.networks)

    @property
    def largest_bytes(self) -> int:
        """Of the largest result of a contraction."""
        return max((network.optimized.largest_bytes for network in self.networks), default=0)

    @property
    def last_miss(self) -> str:
        """Why the last call that missed did; empty where none has."""
        return self.misses[-1].reason if self.misses else ""

    @property
    def eager_ratio(self) -> float | None:
        """How many times as long the networks took as they were written, all together, where that was measured."""
        measured = [
            (network.written.measured_seconds, network.optimized.measured_seconds)
            for network in self.networks
            if network.written is not None
        ]
        pairs = [(one, two) for one, two in measured if one is not None and two]
        return sum(one for one, _ in pairs) / sum(two for _, two in pairs) if pairs else None

    def __str__(self) -> str:
        return write_text(self)

    def _repr_html_(self) -> str:
        return write_page(self, whole=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data that ``json`` takes."""
        entries = [{**_plain(entry), "code": entry.code, "plans": _plans(entry)} for entry in self.specializations]
        return {
            "name": self.name,
            "cache": dict(self.cache),
            "fold_bytes": self.fold_bytes,
            "parts": dict(self.parts),
            "reasons": list(self.reasons),
            "misses": [asdict(miss) for miss in self.misses],
            "specializations": entries,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write all of it to one page of HTML, which needs nothing beside itself.

        Raises:
            OSError: the file can't be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(write_page(self))

    def plot(self) -> Any:
        """A figure of matplotlib: the steps of each network, as they were written and as they run.

        Raises:
            ImportError: matplotlib is not installed: ``pip install 'lazy_einsum[plot]'``.
        """
        return draw_figure(self)


def _plans(entry: SpecializationReport) -> list[dict[str, Any]]:
    """Of each network the least that programs ask for."""
    return [
        {
            "equation": network.equation,
            "flops": network.optimized.flops,
            "naive_flops": network.naive_flops,
            "optimizer": network.optimizer,
        }
        for network in entry.networks
    ]


def _plain(value: Any) -> Any:
    """Data classes as dictionaries, tuples as lists."""
    return _listed(asdict(value))


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value
