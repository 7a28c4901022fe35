"""What a contraction costs: numbers of operations, and seconds on one CPU thread from sizes alone. No tensors here.

The constants are fits to float32 measurements on one core (AMD Zen 5, MKL). They ship with the package so that every
process chooses the same plan; only ratios between alternatives matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Constants of the time model.

    Attributes:
        launch: seconds of a call of torch that does nothing, a view included.
        flop_rate: floating-point operations per second of a large matrix product.
        half_width: size of a matrix dimension at which a product runs at half its rate.
        small_products: a batched product of fewer multiply-adds per matrix runs in plain loops (``bmm`` in ATen).
        loop_output: seconds per output element of such a loop.
        loop_strided: seconds per multiply-add of such a loop.
        loop_contiguous: the same where the second operand is contiguous in the summed label.
        matrix: seconds per matrix of a batched product that is not small.
        vector: seconds per multiply-add of a batched product of matrices with vectors.
        pack: seconds per element of an operand that is packed across its memory order.
        cached_rate: bytes per second while all operands fit into ``cache``.
        memory_rate: bytes per second beyond.
        cache: bytes.
        copy_element: seconds per element of a copy whose innermost run is one element long.
        copy_distance: lines of the cache that a copy may touch before it comes back to the first.
        sum_output: seconds per output element of a sum over the innermost dimension.
    """

    launch: float = 0.8e-6
    flop_rate: float = 180e9
    half_width: float = 8.0
    small_products: int = 400
    loop_output: float = 2.0e-9
    loop_strided: float = 0.6e-9
    loop_contiguous: float = 0.25e-9
    matrix: float = 60e-9
    vector: float = 0.25e-9
    pack: float = 0.16e-9
    cached_rate: float = 100e9
    memory_rate: float = 25e9
    cache: int = 2**20
    copy_element: float = 0.9e-9
    copy_distance: int = 4096
    sum_output: float = 4.5e-9


CPU = Machine()
"""The machine that plans are made for."""

ITEM = 4
"""Bytes per element assumed where no dtype is known."""


def flop_count(elements: int, n_terms: int, sums: bool) -> int:
    """Operations of an einsum that visits ``elements`` index combinations, as opt_einsum counts them.

    >>> flop_count(1000, 2, True), flop_count(1000, 2, False)
    (2000, 1000)
    """
    return elements * (max(1, n_terms - 1) + sums)


def traffic_seconds(n_bytes: float, machine: Machine = CPU) -> float:
    """Seconds to read and write ``n_bytes`` in runs long enough."""
    if n_bytes <= machine.cache:
        return n_bytes / machine.cached_rate
    return machine.cache / machine.cached_rate + (n_bytes - machine.cache) / machine.memory_rate


def product_seconds(
    batch: int, m: int, n: int, k: int, first_along: bool = True, second_along: bool = False, machine: Machine = CPU
) -> float:
    """Seconds of ``batch`` products of matrices (m, k) and (k, n), launch included.

    Args:
        batch: number of matrices.
        m: rows of the first operand.
        n: columns of the second operand.
        k: summed size.
        first_along: the first operand is contiguous along ``k``.
        second_along: the second one is.
        machine: constants.
    """
    work = m * n * k
    traffic = traffic_seconds(ITEM * batch * (m * k + k * n + m * n), machine)
    if batch > 1 and work < machine.small_products:
        step = machine.loop_contiguous if first_along and second_along else machine.loop_strided
        return machine.launch + max(batch * m * n * (machine.loop_output + k * step), traffic)
    half = machine.half_width
    if n == 1:
        # A matrix times a vector; a vector times a matrix is bound by its traffic.
        busy = work * (machine.vector if batch > 1 else 0.0)
    elif m == 1:
        busy = 0.0
    else:
        slow = min(1 + (half / max(n, 1)) ** 2, 6.0) * (1 + half / max(k, 1))
        busy = 2 * work * slow / machine.flop_rate
        # The operands are packed before they are multiplied, across their memory order where that is not the kernel's.
        busy += (second_along * n * k * (1 if k < 1024 else 3) + (not first_along) * m * k * 0.6) * machine.pack
    return machine.launch + max(batch * (busy + (machine.matrix if batch > 1 else 0.0)), traffic)


def multiply_seconds(elements: int, operands: int, machine: Machine = CPU) -> float:
    """Seconds of an elementwise product with ``elements`` results, of operands with ``operands`` elements together."""
    return machine.launch + max(elements * 0.12e-9, traffic_seconds(ITEM * (elements + operands), machine))


def sum_seconds(elements: int, results: int, innermost: bool, machine: Machine = CPU) -> float:
    """Seconds of a sum of ``elements`` values to ``results``, along the innermost dimension or not."""
    busy = results * machine.sum_output if innermost else elements * 0.1e-9
    return 2 * machine.launch + max(busy, traffic_seconds(ITEM * (elements + results), machine))


def copy_seconds(elements: int, run: int, distance: int = 1, machine: Machine = CPU) -> float:
    """Seconds of a copy into another order of dimensions.

    Args:
        elements: how many are copied.
        run: how many lie together before and after.
        distance: how many are visited before the neighbour of the first one.
        machine: constants.
    """
    gather = elements * machine.copy_element * math.pow(max(1, min(run, 16)), -0.6)
    if run < 16 and distance > machine.copy_distance:
        gather *= 3
    return machine.launch + max(gather, traffic_seconds(2 * ITEM * elements, machine))


def pair_seconds(batch: int, m: int, n: int, k: int, machine: Machine = CPU) -> float:
    """Seconds of the contraction of two operands with these products of sizes, layouts unknown, launches included.

    Args:
        batch: size of the labels in both operands and in the result.
        m: size of those only in the first operand.
        n: size of those only in the second.
        k: size of the summed labels.
        machine: constants.
    """
    if k == 1:
        return multiply_seconds(batch * m * n, batch * (m + n), machine)
    if m > n:
        m, n = n, m
    # Small products like both operands contiguous along the summed label, large ones only the first.
    return product_seconds(batch, m, n, k, True, m * n * k < machine.small_products, machine)
