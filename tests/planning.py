"""How long planning takes: ``make_plan`` and ``lower_plan``, for networks of few and many operands."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from instances import load, random_network
from pairwise import random_pairs

from lazy_einsum import cost, known, plan
from lazy_einsum.kernels import lower_plan
from lazy_einsum.plan import make_plan
from lazy_einsum.saved import Written, WrittenNetwork, lower_saving, plan_saving
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec

GROUPS = ((2, 2), (3, 8), (9, 16), (17, 64), (65, 200))
"""Fewest and most operands."""

SAVED_LIMIT = 1.1
"""What autograd may save, as ``OptimizedModule`` has it."""

Network = tuple[str, EinsumSpec, Sequence[tuple[int, ...]]]


def _networks(fewest: int, most: int) -> Iterator[Network]:
    """Those of the benchmark, and random ones, of which each operand shares up to one, two or three labels with earlier
    ones.
    """
    for instance in load():
        if fewest <= len(instance.shapes) <= most:
            terms, output = instance.equation.split("->")
            yield instance.name, EinsumSpec(tuple(terms.split(",")), output), instance.shapes
    if most == 2:
        for number, pair in enumerate(random_pairs()[::40]):
            yield f"pair {40 * number}", EinsumSpec.parse(pair.equation, [len(x) for x in pair.shapes]), pair.shapes
        return
    counts = range(fewest, most + 1) if most <= 16 else (fewest, (fewest + most) // 2, most)
    for count in counts:
        for degree, largest in ((1, 30), (2, 6), (3, 4)):
            yield f"random {count}, up to {degree} each", *random_network(count, degree, count, largest)


def planning() -> None:
    """Milliseconds of planning and of lowering, forward and where autograd follows all operands: median and worst."""
    print("\nplanning, ms: median of the networks, and the worst one")
    print(f"{'operands':>9} {'networks':>8} {'stage':15} {'median':>8} {'worst':>8}")
    # The first time also imports what it needs.
    list(_planned(*random_network(4, 2, 0)))
    for fewest, most in GROUPS:
        found = [(name, list(_planned(spec, shapes))) for name, spec, shapes in _networks(fewest, most)]
        for place, stage in enumerate(("plan", "plan, followed", "lower", "lower, followed")):
            took = [seconds[place] * 1e3 for _, seconds in found]
            worst, _ = max(found, key=lambda item, place=place: item[1][place])
            row = f"{fewest:>4} to {most:<3} {len(found):7} {stage:15} {statistics.median(took):8.2f} {max(took):8.2f}"
            print(f"{row}  {worst}", flush=True)


def _planned(spec: EinsumSpec, shapes: Sequence[tuple[int, ...]]) -> Iterator[float]:
    """Seconds of: a plan, one with gradients, calls for the first, calls for the second."""
    operands = [torch.empty(shape, device="meta") for shape in shapes]
    types = tuple(TensorType.of(x) for x in operands)
    followed = tuple(TensorType.of(x.requires_grad_()) for x in operands)
    memory = tuple(range(len(shapes)))
    network = WrittenNetwork(Written.plain(spec), spec, followed, memory)
    yield _median(lambda: make_plan(spec, shapes))
    yield _median(lambda: plan_saving(network, SAVED_LIMIT))
    yield _median(lambda: lower_plan(make_plan(spec, shapes), types), warm=True)
    found, limit = plan_saving(network, SAVED_LIMIT)

    def lower() -> Any:
        return lower_plan(found, followed) if limit is None else lower_saving(found, followed, memory, limit.elements)

    yield _median(lower, warm=True)


def _median(run: Callable[[], Any], warm: bool = False, times: int = 3) -> float:
    """Median seconds of a call; unless ``warm`` nothing is known of earlier ones."""
    if warm:
        run()
    samples = []
    for _ in range(times):
        if not warm:
            plan._cached_plan.cache_clear()
            known._answers.clear()
            cost.pair_seconds.cache_clear()
            cost.gradient_seconds.cache_clear()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
        if samples[-1] > 0.3:
            break
    return statistics.median(samples)
