"""Measure this machine: the constants of the cost model that fit it, for ``LAZY_EINSUM_MACHINE``.

python -m lazy_einsum calibrate machine.json
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cost
from .cost import Machine
from .layout import Sizes, memory_order
from .ways import walk_order_seconds

GROUPS = ("product", "walk", "sum")
"""What samples tell of: products of matrices, elementwise calls and copies, sums."""

_SIZES = (2, 3, 5, 8, 9, 12, 16, 32, 64, 100, 256, 1000, 4000, 20000)
_MOST_ELEMENTS, _MOST_MACS = 4_000_000, 200_000_000


class Sample(NamedTuple):
    """A call of torch that was timed.

    Attributes:
        name: what was called, with its sizes.
        group: one of ``GROUPS``.
        seconds: what it took.
        model: what the cost model says for a machine.
    """

    name: str
    group: str
    seconds: float
    model: Callable[[Machine], float]

    def error(self, machine: Machine) -> float:
        """The logarithm of the time taken over the time modelled."""
        return math.log(self.seconds / self.model(machine))


def measure(count: int = 2000, seed: int = 0) -> Iterator[Sample]:
    """Time calls of random sizes on one thread, one by one.

    Args:
        count: how many.
        seed: of the sizes.
    """
    draw = random.Random(seed)
    makers = itertools.cycle((_product, _walk, _product, _walk, _sum))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for maker in itertools.islice(makers, count):
                yield maker(draw)
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], Tensor]) -> float:
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    times = max(1, min(300, int(0.004 / once)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


def _matrices(batch: int, rows: int, columns: int, along: bool) -> Tensor:
    """Contiguous along the columns, or along the rows."""
    shape = (batch, rows, columns) if along else (batch, columns, rows)
    matrices = torch.randn(shape if batch > 1 else shape[1:])
    return matrices if along else matrices.transpose(-1, -2)


def _product(draw: random.Random) -> Sample:
    while True:
        batch = draw.choice((1, 1, 1, 16, 64, 256, 1000, 4000))
        m, n, k = (draw.choice(_SIZES) for _ in range(3))
        if batch > 1:
            m, n, k = (draw.choice((1, *_SIZES)) if draw.random() < 0.9 else 1 for _ in range(3))
        most = batch * max(m * n, n * k, m * k)
        if k > 1 and (m > 1 or n > 1) and most < _MOST_ELEMENTS and 5000 < batch * m * n * k < _MOST_MACS:
            break
    first, second = draw.random() < 0.5, draw.random() < 0.5
    # What a vector lies along is the summed label.
    x, y = _matrices(batch, m, k, first or m == 1), _matrices(batch, k, n, not (second or n == 1))
    if batch > 1 and n == 1:
        y = torch.randn(batch, k, 1)
    return Sample(
        f"product {batch} x ({m}, {k}) ({k}, {n}), along: {first}, {second}",
        "product",
        _seconds(lambda: x @ y if batch == 1 else x.bmm(y)),
        lambda machine: cost.product_seconds(batch, m, n, k, first or m == 1, second or n == 1, machine),
    )


def _shuffled(draw: random.Random, labels: str, sizes: dict[str, int]) -> Tensor:
    """A tensor whose dimensions are the labels, and that lies in memory in another order."""
    order = draw.sample(labels, len(labels))
    return torch.randn([sizes[label] for label in order]).permute([order.index(label) for label in labels])


def _walk(draw: random.Random) -> Sample:
    while True:
        labels = "abcd"[: draw.choice((2, 3, 3, 4))]
        sizes = {label: draw.choice((2, 3, 5, 9, 16, 32, 64, 100, 500, 2000, 20000)) for label in labels}
        if 2000 < math.prod(sizes.values()) < _MOST_ELEMENTS:
            break
    if draw.random() < 0.4:
        terms = [labels]
    else:
        first = "".join(label for label in labels if draw.random() < 0.7) or labels[0]
        second = "".join(label for label in labels if label not in first or draw.random() < 0.5) or labels[-1]
        terms = [first, second]
    tensors = [_shuffled(draw, term, sizes) for term in terms]
    one, *rest = (
        tensor[tuple(slice(None) if label in term else None for label in labels)]
        for term, tensor in zip(terms, tensors, strict=True)
    )

    def call() -> Tensor:
        return one * rest[0] if rest else one.clone(memory_format=torch.contiguous_format)

    result = call()
    strides = [
        dict(zip(term, tensor.stride(), strict=True))
        for term, tensor in zip((*terms, labels), (*tensors, result), strict=True)
    ]
    order = memory_order(labels, strides[-1])
    return Sample(
        f"{'copy' if len(terms) == 1 else 'multiply'} {sizes} strides {strides}",
        "walk",
        _seconds(call),
        lambda machine: walk_order_seconds(order, strides, Sizes(sizes), machine),
    )


def _sum(draw: random.Random) -> Sample:
    while True:
        shape = tuple(draw.choice((2, 3, 5, 9, 16, 32, 64, 100, 500, 2000)) for _ in range(3))
        if 2000 < math.prod(shape) < _MOST_ELEMENTS:
            break
    dim = draw.choice((0, 1, 2))
    x = torch.randn(shape)
    elements = x.numel()
    return Sample(
        f"sum of {shape} over {dim}",
        "sum",
        _seconds(lambda: x.sum(dim)),
        lambda machine: cost.sum_seconds(elements, elements // shape[dim], math.prod(shape[dim + 1 :]), machine),
    )


_KEPT = frozenset({"columns", "small_products", "item", "cache", "far", "square"})
"""What is known of the libraries and the processor, and not fitted."""


def misfit(machine: Machine, samples: Sequence[Sample]) -> float:
    """By which factor the model is off, as a root mean square of logarithms; none counts as more than four times."""
    most = math.log(4)
    errors = [min(abs(sample.error(machine)), most) ** 2 for sample in samples]
    return math.exp(math.sqrt(statistics.fmean(errors)))


def fit(samples: Sequence[Sample], machine: Machine = cost.CPU, rounds: int = 6) -> Machine:
    """The machine whose modelled times are nearest to those measured: each constant in turn is changed by a factor for
    as long as that helps.

    Args:
        samples: what was measured.
        machine: where the search starts.
        rounds: how often the steps are made smaller.
    """
    best, least = machine, misfit(machine, samples)
    step = 1.6
    for _ in range(rounds):
        improved = True
        while improved:
            improved = False
            for field in fields(Machine):
                if field.name in _KEPT:
                    continue
                for other in _changed(best, field.name, step):
                    misses = misfit(other, samples)
                    if misses < least - 1e-5:
                        best, least, improved = other, misses, True
        step **= 0.6
    return best


def _changed(machine: Machine, name: str, step: float) -> Iterator[Machine]:
    value: Any = getattr(machine, name)
    parts = value if isinstance(value, tuple) else (value,)
    for place, factor in itertools.product(range(len(parts)), (step, 1 / step)):
        changed: Any = tuple(part * factor if at == place else part for at, part in enumerate(parts))
        yield replace(machine, **{name: changed if isinstance(value, tuple) else changed[0]})
