"""What saved plans save, and what measuring gains: ``saved_plans`` and ``measured_plans``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from instances import Instance, load
from measure import backward_run, forward_run, geometric_mean, medians

from lazy_einsum import OptimizedModule

NETWORKS = 20


def _networks(count: int) -> list[Instance]:
    """Some of the benchmark's, which torch.einsum takes and one core runs in a second."""
    found = [
        instance
        for instance in load()
        if 3 <= len(instance.shapes) <= 40 and instance.log10_macs < 8.5 and len(set(instance.letters) - {*",->"}) <= 52
    ]
    return found[:: max(1, len(found) // count)][:count]


def _function(equation: str) -> Callable[..., Any]:
    return lambda *operands: torch.einsum(equation, *operands)


def saved_plans() -> None:
    """Seconds that two processes take to build code for the same signatures; the second one loads what the first one
    saved.
    """
    print(f"\nbuilding code for {NETWORKS} signatures, ms; the second process loads the orders of the first")
    print(f"{'':36} {'building':>9} {'of this, orders':>16} {'loading':>8}")
    for grad in (False, True):
        for optimize in ("auto", "measure"):
            with tempfile.TemporaryDirectory() as folder:
                for number in ("first", "second"):
                    arguments = [f"{folder}/plans.json", number, optimize, "grad" if grad else ""]
                    done = subprocess.run(
                        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
                    )
                    built, ordered, loaded = json.loads(done.stdout)
                    name = f"{optimize}{', with gradients' if grad else ''}, {number} process"
                    print(f"{name:36} {built * 1e3:9.0f} {ordered * 1e3:16.1f} {loaded * 1e3:8.1f}", flush=True)


def _process(file: str, number: str, optimize: str, grad: str) -> None:
    """One of the processes: prints seconds of building, of the search for orders in that, and of loading."""
    torch.set_num_threads(1)
    model = OptimizedModule(torch.einsum, maxsize=100, optimize=optimize, dynamic=False)
    # The first call also imports what it needs.
    OptimizedModule(torch.einsum).prepare("ab,bc,cd->ad", *(torch.empty(3, 3, requires_grad=bool(grad)),) * 3)
    start = time.perf_counter()
    if number == "second":
        model.load_plans(file)
    loaded = time.perf_counter() - start
    built = ordered = 0.0
    for instance in _networks(NETWORKS):
        operands = [torch.empty(shape, requires_grad=bool(grad)) for shape in instance.shapes]
        entry = model.prepare(instance.letters, *operands)
        built += entry.build_seconds
        ordered += sum(stage.seconds for stage in entry.stages.all if stage.name == "choose_paths")
    if number == "first":
        model.save_plans(file)
    print(json.dumps([built, ordered, loaded]))


def measured_plans(rounds: int, round_seconds: float) -> None:
    """How many times as fast calls are with ``optimize="measure"`` as with ``"auto"``."""
    print('\noptimize="measure" beside "auto": microseconds, and how many times as fast')
    for backward in (False, True):
        ratios = []
        for instance in _networks(10):
            operands = [x.requires_grad_(backward) for x in instance.operands()]
            make = {name: OptimizedModule(_function(instance.letters), optimize=name) for name in ("auto", "measure")}
            run = backward_run if backward else forward_run
            took = medians({name: run(model, operands) for name, model in make.items()}, rounds, round_seconds)
            name = f"{instance.name}{', and backward' if backward else ''}"
            ratio = took["auto"] / took["measure"]
            is_other = make["auto"].code != make["measure"].code
            print(
                f"{name:46} {took['auto'] * 1e6:9.1f} {took['measure'] * 1e6:9.1f} {ratio:6.2f}"
                + ("" if is_other else "  the same code"),
                flush=True,
            )
            ratios += [ratio] * is_other
        if ratios:
            print(f"{len(ratios)} other orders: geometric mean {geometric_mean(ratios):.3f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    _process(*sys.argv[1:])
