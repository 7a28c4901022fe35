"""What a contraction costs: numbers of operations, and seconds on one CPU thread from sizes alone. No tensors here.

The constants are fits to float32 measurements on one core (AMD Zen 5, MKL). They ship with the package so that every
process chooses the same plan; only ratios between alternatives matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


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
        vector: seconds per multiply-add of a batched product of vectors with matrices.
        column: the same of matrices with vectors.
        thin: seconds, at most, per product with few rows whose operands both are contiguous along the summed label.
        crossed: seconds per multiply-add of a product with few rows whose operands both lie across.
        narrow: seconds per multiply-add of a product with fewer columns than ``columns``, by whether the first operand
            is contiguous along the summed label, then whether the second one is.
        columns: the kernels of the library's products are made for at least so many.
        pack: seconds per element of an operand that is packed across its memory order.
        cached_rate: bytes per second while all operands fit into ``cache``.
        memory_rate: bytes per second beyond.
        cache: bytes.
        element: seconds per element of an elementwise call along the memory of all tensors.
        strided_element: the same across the memory of some.
        row: seconds per innermost loop of such a call.
        tile: seconds per pair of innermost loops.
        far: lines of the cache that such a call may touch before it comes back to the first.
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
    vector: float = 0.1e-9
    column: float = 0.5e-9
    thin: float = 1e-6
    crossed: float = 0.5e-9
    narrow: tuple[tuple[float, float], tuple[float, float]] = ((0.15e-9, 0.35e-9), (0.1e-9, 0.02e-9))
    columns: int = 12
    pack: float = 0.16e-9
    cached_rate: float = 100e9
    memory_rate: float = 25e9
    cache: int = 2**20
    element: float = 0.08e-9
    strided_element: float = 0.7e-9
    row: float = 2.5e-9
    tile: float = 10e-9
    far: int = 4096
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
    if n == 1 or m == 1:
        # (128 matrices of 64 by 64 times vectors: 600 us, 80 where the vectors come first. Without a batch these are
        # bound by their traffic.)
        busy = work * (machine.column if n == 1 else machine.vector) * (batch > 1)
    else:
        slow = min(1 + (half / max(n, 1)) ** 2, 6.0) * (1 + half / max(k, 1))
        busy = 2 * work * slow / machine.flop_rate
        if first_along and second_along and m < 16:
            # Few rows, both contiguous along k: dot products without packing, at half the rate of a large product
            # (m = 4, n = k = 256: 6.7 us; with the roles of the operands swapped, 15.4).
            return machine.launch + max(batch * (2 * busy + min(machine.thin, work * machine.crossed / 8)), traffic)
        # The operands are packed before they are multiplied, across their memory order where that is not the kernel's.
        if second_along and not first_along and m < 16:
            busy += work * machine.crossed
        if n < machine.columns:
            # (A gradient of 11 columns and 3645 rows over k = 128: 4.9 ms where both operands lie across, 0.9 where
            # neither does; with the roles of the operands swapped, 0.3.)
            busy += work * machine.narrow[first_along][second_along]
        busy += (second_along * n * k * (1 if k < 2048 else 3) + (not first_along) * m * k * 0.6) * machine.pack
    return machine.launch + max(batch * (busy + (machine.matrix if batch > 1 else 0.0)), traffic)


def walk_seconds(
    elements: int, rows: int, tiles: int, strided: bool, distance: int, n_bytes: int, machine: Machine = CPU
) -> float:
    """Seconds of an elementwise call: a copy, or a product that broadcasts.

    Args:
        elements: of the result.
        rows: how many innermost loops it takes, once dimensions that lie together in all tensors are merged.
        tiles: how many pairs of innermost loops.
        strided: some tensor is not contiguous in the innermost loop.
        distance: how many elements are visited before the neighbour of the first one, in the worst tensor.
        n_bytes: read and written in all.
        machine: constants.
    """
    each = machine.strided_element if strided else machine.element
    if distance > machine.far:
        each *= 4
    busy = elements * each + rows * machine.row + tiles * machine.tile
    return machine.launch + max(busy, traffic_seconds(n_bytes, machine))


def sum_seconds(elements: int, results: int, innermost: bool, machine: Machine = CPU) -> float:
    """Seconds of a sum of ``elements`` values to ``results``, along the innermost dimension or not."""
    busy = results * machine.sum_output if innermost else elements * 0.1e-9
    return 2 * machine.launch + max(busy, traffic_seconds(ITEM * (elements + results), machine))


@lru_cache(maxsize=2**15)
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
        # The best order of loops is assumed: the longest is the innermost.
        tiles, rows, inner = sorted((batch, m, n))
        elements = tiles * rows * inner
        return walk_seconds(elements, tiles * rows, tiles, False, 1, ITEM * (elements + batch * (m + n)))
    if m > n:
        m, n = n, m
    # Small products like both operands contiguous along the summed label, large ones only the first.
    seconds = product_seconds(batch, m, n, k, True, m * n * k < machine.small_products, machine)
    elements = batch * m * n
    if ITEM * elements > machine.cache:
        # Every other consumer of a result that falls out of the cache needs it in another order. (Without this the
        # main contraction of MACE takes the order with fewer FLOPs, which is 1.6 times slower.)
        seconds += elements * machine.strided_element / 2
    return seconds


@lru_cache(maxsize=2**15)
def gradient_seconds(batch: int, m: int, n: int, k: int, machine: Machine = CPU) -> float:
    """Seconds of the gradient of the first operand of such a contraction: autograd has one rule for each kernel, so it
    is a product of matrices where the contraction is one, whatever else would be faster.
    """
    if k == 1:
        # Of a product that broadcasts: one of all elements, then a sum.
        elements = batch * m * n
        seconds = walk_seconds(elements, batch * m, batch, False, 1, 3 * ITEM * elements, machine)
        return seconds + (sum_seconds(elements, batch * m, False, machine) if n > 1 else 0.0)
    return product_seconds(batch, min(m, k), max(m, k), n, True, False, machine)
