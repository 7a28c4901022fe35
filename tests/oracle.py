"""Einsum by plain loops, from its definition: the reference for everything that computes one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from lazy_einsum.spec import EinsumSpec


def loops(spec: EinsumSpec, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, over all labels that are not in the output, of the products of the operands' elements."""
    sizes = spec.sizes([tuple(operand.shape) for operand in operands])
    shape = tuple(sizes[label] for label in spec.output)
    data = [operand.flatten().tolist() for operand in operands]
    result = [0] * math.prod(shape)
    for values in itertools.product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, values, strict=True))
        term = 1
        for labels, operand, items in zip(spec.inputs, operands, data, strict=True):
            place = 0
            for label, size in zip(labels, operand.shape, strict=True):
                place = place * size + (at[label] if size > 1 else 0)
            term = term * items[place]
        place = 0
        for label in spec.output:
            place = place * sizes[label] + at[label]
        result[place] += term
    return torch.tensor(result, dtype=operands[0].dtype, device=operands[0].device).reshape(shape)
