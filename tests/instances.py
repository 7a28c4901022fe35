"""Networks from many fields with their shapes and best known orders: ``data/instances.json``."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lazy_einsum.spec import EinsumSpec, symbol

MOST_MACS = 4e9
MOST_ELEMENTS = 2**27

# Rates that a good kernel reaches on one core: multiply-adds of a large matrix product, and copied bytes by footprint.
_MACS_PER_SECOND = 52e9
_BANDWIDTH = ((2**19, 181e9), (2**21, 106e9), (2**23, 102e9), (2**25, 64e9), (math.inf, 36e9))


@dataclass(frozen=True)
class Instance:
    """One network: ``log10_macs`` is that of ``path``, the best known order in opt_einsum's form."""

    name: str
    kind: str
    equation: str
    shapes: tuple[tuple[int, ...], ...]
    log10_macs: float
    log2_size: float
    path: tuple[tuple[int, ...], ...]

    def operands(self, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Random operands, scaled so that results of long products stay in range: a sum over a label of size n grows
        with the root of n, of which each tensor that has it takes its share.
        """
        generator = torch.Generator().manual_seed(0)
        terms = self.equation.split("->")[0].split(",")
        found = []
        for term, shape in zip(terms, self.shapes):
            scale = math.prod(
                size ** (0.5 / self.equation.count(label))
                for label, size in zip(term, shape)
                if self.equation.count(label) > 1
            )
            found.append(torch.randn(shape, generator=generator, dtype=dtype) / scale)
        return found

    @property
    def letters(self) -> str:
        """The equation in letters: those that torch takes where they suffice."""
        labels = dict.fromkeys(label for label in self.equation if label not in ",->")
        names = dict(zip(labels, map(symbol, range(len(labels)))))
        return "".join(names.get(label, label) for label in self.equation)

    @property
    def floor(self) -> float:
        """Seconds of the best known order if each step ran at the rate of a large product or of a copy."""
        terms = self.equation.split("->")[0].split(",")
        output = self.equation.split("->")[1]
        sizes = {label: size for term, shape in zip(terms, self.shapes) for label, size in zip(term, shape)}
        values = [frozenset(term) for term in terms]
        seconds = 0.0
        for step in self.path:
            taken = [values[place] for place in step]
            for place in sorted(step, reverse=True):
                del values[place]
            union = frozenset().union(*taken)
            rest = frozenset(output).union(*values)
            values.append(union & rest)
            n_bytes = 4 * sum(_size(term, sizes) for term in (*taken, values[-1]))
            rate = next(rate for limit, rate in _BANDWIDTH if n_bytes <= limit)
            seconds += max(_size(union, sizes) / _MACS_PER_SECOND, n_bytes / rate)
        return seconds


def _size(labels: Sequence[str] | frozenset[str], sizes: dict[str, int]) -> int:
    return math.prod(sizes[label] for label in labels)


def load() -> list[Instance]:
    """All of them, those too large for one core and 16 GB left out."""
    rows = json.loads((Path(__file__).parent / "data" / "instances.json").read_text())
    found = [
        Instance(
            row["name"],
            row["kind"],
            row["equation"],
            tuple(map(tuple, row["shapes"])),
            row["log10_macs"],
            row["log2_size"],
            tuple(map(tuple, row["path"])),
        )
        for row in rows
    ]
    return [item for item in found if 10**item.log10_macs <= MOST_MACS and 2**item.log2_size <= MOST_ELEMENTS]


def random_network(n: int, degree: int, seed: int, largest: int = 4) -> tuple[EinsumSpec, list[tuple[int, ...]]]:
    """Operands joined at random, a few labels in three of them or in the result, as text with letters beyond z."""
    generator = random.Random(seed)
    terms: list[list[str]] = [[] for _ in range(n)]
    count = 0
    for number in range(1, n):
        for _ in range(generator.randint(1, degree)):
            label = symbol(count)
            count += 1
            terms[number].append(label)
            for other in generator.sample(range(number), min(number, generator.choice([1, 1, 1, 2]))):
                terms[other].append(label)
    sizes = {symbol(number): generator.randint(2, largest) for number in range(count)}
    output = "".join(generator.sample(sorted(sizes), 2))
    spec = EinsumSpec(tuple(map("".join, terms)), output)
    return spec, [tuple(sizes[label] for label in term) for term in terms]
