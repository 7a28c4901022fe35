"""Seconds of functions, measured in turns."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

Run = Callable[[], Any]


def seconds(run: Run, repeats: int) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def forward_run(target: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Run:
    """A call of ``target`` that autograd does not follow."""

    def run() -> Any:
        with torch.no_grad():
            return target(*operands)

    return run


def backward_run(target: Callable[..., Any], leaves: Sequence[torch.Tensor]) -> Run:
    """A call of ``target`` and the gradients of all ``leaves``."""
    cotangent = torch.randn_like(target(*leaves))

    def run() -> Any:
        return torch.autograd.grad(target(*leaves), leaves, cotangent)

    return run


def medians(runs: dict[str, Run], rounds: int, round_seconds: float) -> dict[str, float]:
    """Median seconds of each, all taking turns in each round, so that a disturbance hits all alike.

    One that takes over half a second and 20 times as long as the fastest is not measured more exactly than that.
    """
    repeats, known = {}, {}
    for name, run in runs.items():
        first = seconds(run, 1)
        if first < 0.2:
            seconds(run, 2)
        once = seconds(run, 1) if first < 5 else first
        known[name] = once
        repeats[name] = max(1, min(5000, round(round_seconds / max(once, 1e-7))))
    fastest = min(known.values())
    slow = {name for name, once in known.items() if once > max(0.5, 20 * fastest)}
    samples: dict[str, list[float]] = {name: [known[name]] if name in slow else [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                if name not in slow:
                    # Once unmeasured: the first call after another contestant, which may have freed much, would pay for
                    # getting memory back from the system. (The one that came first took up to 1.7 times as long.)
                    run()
                    samples[name].append(seconds(run, repeats[name]))
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; 1 of none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else 1.0


@contextlib.contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in what runs inside after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
