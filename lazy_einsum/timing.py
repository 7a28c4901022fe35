"""``measured``: a network with the time that each of its steps takes, on random tensors of its shapes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from . import ambient as ambient_module
from .anatomy import Network
from .graph import NUMBER
from .program import Value, compile_program, operate
from .report import NetworkReport, OrderReport
from .report_text import n_bytes
from .running import Part, plain_program
from .stopwatch import mean_seconds, random_tensor, synchronize

_SECONDS = 0.05
"""A network is run for so long, in each of its orders."""

MOST_BYTES = 2**30
"""Calls as they were written are timed where they take no more memory than this, or than what runs in their place."""


def measured(network: Network) -> NetworkReport:
    """The report of a network with the time of each step, and of the calls as they were written.

    Both run on random tensors of the shapes, strides and dtypes of the call, which autograd does not follow. Nothing of
    the module runs but these calls, and not the user's where they take much memory.
    """
    report = network.report
    devices = _devices(network)
    if any(device.type == "meta" for device in devices):
        return replace(report, unmeasured="its tensors have no data")
    reason = _why_not_timed(report)
    with ambient_module.no_modes():
        steps = _step_seconds(network) if network.parts else None
        whole = _time(_runs(network.parts), devices) if network.parts else None
        eager = None
        if report.written is not None and not reason:
            try:
                eager = _time(_calls(network), devices)
            except RuntimeError as error:  # torch has no kernel for it, say: the call itself raises the same
                reason = f"it raises {type(error).__name__}: {error}"
    optimized = report.optimized
    if steps is not None:
        timed = tuple(replace(step, measured_seconds=took) for step, took in zip(optimized.steps, steps, strict=True))
        optimized = replace(optimized, steps=timed, measured_seconds=whole)
    written: OrderReport | None = report.written
    if written is not None and eager is not None:
        written = replace(written, measured_seconds=eager)
    return replace(report, optimized=optimized, written=written, unmeasured=reason)


def _why_not_timed(report: NetworkReport) -> str:
    """Why the calls as they were written are not to be run; empty where they are."""
    if report.written is None:
        return "" if report.made_by else "its calls are of a form that is not read"
    peak, most = report.written.peak_bytes, max(MOST_BYTES, report.optimized.peak_bytes)
    return f"it takes {n_bytes(peak)} of memory" if peak > most else ""


def _devices(network: Network) -> list[torch.device]:
    types = [known for part in network.parts for known in part.types]
    return list({known.device: None for known in (*types, *network.leaves.values())})


def _time(call: Callable[[], Any], devices: Sequence[torch.device]) -> float:
    """Median seconds of a call, of as many as fit into the time."""
    seconds = partial(mean_seconds, call, wait=partial(synchronize, devices))
    seconds(1)  # the first run is slower
    once = max(seconds(1), 1e-7)
    rounds = max(1, min(9, int(_SECONDS / once)))
    times = max(1, min(1000, int(_SECONDS / rounds / once)))
    return statistics.median(seconds(times) for _ in range(rounds))


def _step_seconds(network: Network) -> list[float]:
    """Seconds of each step: of its calls, timed one by one."""
    devices = _devices(network)
    dropped = torch.empty(0)
    steps = [0.0] * len(network.report.optimized.steps)
    for part in network.parts:
        values = [random_tensor(known) for known in part.types]
        if part.lowered is None:
            steps[part.steps[0]] += _time(partial(torch.einsum, part.equation, values), devices)
            continue
        calls = plain_program(part.lowered.program).calls
        last = {arg.number: at for at, call in enumerate(calls) for arg in call.args if isinstance(arg, Value)}
        for at, (number, call) in enumerate(zip(part.steps, calls, strict=True)):
            # What is written in place is so at each of the rounds; nobody reads the values.
            if number >= 0:
                steps[number] += _time(partial(operate, call, values), devices)
            values.append(operate(call, values))
            for used in (arg.number for arg in call.args if isinstance(arg, Value)):
                if last[used] == at:
                    values[used] = dropped  # as in the code that runs: at no time more is alive
    return steps


def _runs(parts: Sequence[Part]) -> Callable[[], Any]:
    """What runs all parts."""
    ready = []
    for part in parts:
        values = [random_tensor(known) for known in part.types]
        if part.lowered is None:
            ready.append(partial(torch.einsum, part.equation, values))
        else:
            ready.append(partial(compile_program(plain_program(part.lowered.program)), *values))

    def run() -> None:
        for function in ready:
            function()

    return run


def _calls(network: Network) -> Callable[[], Any]:
    """What runs the user's calls."""
    leaves = {name: random_tensor(known) for name, known in network.leaves.items()}
    order = [(node, _last_uses(network.calls, node)) for node in network.calls]

    def run() -> None:
        values: dict[str, Any] = dict(leaves)
        for node, done in order:
            values[node.name] = _call(node, values, network.numbers)
            for name in done:
                del values[name]

    return run


def _last_uses(nodes: Sequence[fx.Node], node: fx.Node) -> list[str]:
    """The values of calls that nothing uses after ``node``."""
    own = {other.name for other in nodes}
    later = {used.name for other in nodes[nodes.index(node) + 1 :] for used in other.all_input_nodes}
    return [used.name for used in node.all_input_nodes if used.name in own and used.name not in later]


def _call(node: fx.Node, values: Mapping[str, Any], numbers: Mapping[str, int | float]) -> Any:
    def value(argument: fx.Node) -> Any:
        if NUMBER in argument.meta and argument.name not in values:
            return eval(argument.meta[NUMBER], {"math": math, **numbers})
        return values[argument.name]

    args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
