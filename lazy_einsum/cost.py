"""What a contraction costs: numbers of operations, and seconds on one CPU thread from sizes alone. No tensors here.

The constants are fits to float32 measurements on one core (AMD Zen 5, MKL). They ship with the package so that every
process chooses the same plan; only ratios between alternatives matter. ``python -m lazy_einsum calibrate`` measures
those of another machine; processes with ``LAZY_EINSUM_MACHINE`` set to the file that it writes use them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from .errors import MachineFileError
from .json_files import read_json, write_whole


@dataclass(frozen=True, slots=True)
class Machine:
    """Constants of the time model.

    Attributes:
        launch: seconds of a call of torch that does nothing, a view included.
        flop_rate: floating-point operations per second of a large matrix product.
        half_depth: of so large a summed size a product runs at half its rate.
        half_height: the same of rows.
        few_rows: how many times as long two or three rows take, where the first operand lies across.
        few_across: the same of less than 8 rows, where both operands lie across.
        columns: the kernels of the library's products are made for at least so many.
        narrow: of products with fewer columns: seconds per row, per element of the first operand, and per multiply-add.
        narrow_along: the same where both operands are contiguous along the summed label.
        narrow_across: the same where both lie across.
        piece: columns beyond a multiple of 16 are done in pieces of 8, 4, 2 and 1, each of which takes as long as so
            many columns.
        pack: seconds per element of the operands of a product, beyond the cache.
        pack_first: seconds per element of a first operand that lies across.
        pack_second: seconds per element of a second operand that is contiguous along the summed label.
        vector_row: seconds per element of the product of a matrix with a vector, where rows are contiguous.
        small_products: a batched product of fewer multiply-adds per matrix runs in plain loops (``bmm`` in ATen).
        loop_output: seconds per output element of such a loop.
        loop_strided: seconds per multiply-add of such a loop.
        loop_contiguous: the same where both operands are contiguous in the summed label.
        matrix: seconds per matrix of a batched product that is not small.
        item: the same where the matrices are contiguous along no dimension: they are multiplied one by one.
        vector: seconds per multiply-add of a batched product of vectors with matrices.
        column: the same of matrices with vectors.
        cached_rate: bytes per second while all operands fit into ``cache``.
        memory_rate: bytes per second beyond.
        cache: bytes.
        element: seconds per element of an elementwise call along the memory of all tensors.
        strided_element: the same across the memory of some.
        far_element: the same where the operands do not fit into the cache, and ``far`` lines of it are touched before
            the first is used again.
        far: lines.
        aliased_element: the same where these lines lie in the same few places of the cache, as with a stride that is a
            multiple of 512.
        row: seconds per innermost loop of such a call.
        tile: seconds per pair of innermost loops.
        square: across memory copies go in squares of so many elements a side, of which short rows leave much unused; 1
            where they go one by one.
        sum_element: seconds per element of a sum.
        sum_output: seconds per output element of a sum over the innermost dimension.
        sum_row: seconds per run of results that lie together, of other sums.
    """

    launch: float = 1e-6
    flop_rate: float = 110e9
    half_depth: float = 3.4
    half_height: float = 2.5
    few_rows: float = 1.8
    few_across: float = 4.0
    columns: int = 12
    narrow: tuple[float, float, float] = (2.7e-9, 0.63e-9, 0.044e-9)
    narrow_along: tuple[float, float, float] = (6.3e-9, 0.045e-9, 0.04e-9)
    narrow_across: tuple[float, float, float] = (1e-9, 0.82e-9, 0.098e-9)
    piece: float = 13.0
    pack: float = 0.031e-9
    pack_first: float = 0.16e-9
    pack_second: float = 0.052e-9
    vector_row: float = 0.6e-9
    small_products: int = 400
    loop_output: float = 1.8e-9
    loop_strided: float = 0.56e-9
    loop_contiguous: float = 0.17e-9
    matrix: float = 52e-9
    item: float = 4e-6
    vector: float = 0.064e-9
    column: float = 0.75e-9
    cached_rate: float = 170e9
    memory_rate: float = 70e9
    cache: int = 2**20
    element: float = 0.04e-9
    strided_element: float = 0.36e-9
    far_element: float = 0.49e-9
    far: int = 4096
    aliased_element: float = 2.1e-9
    row: float = 1.2e-9
    tile: float = 18e-9
    square: int = 1
    sum_element: float = 0.042e-9
    sum_output: float = 2.6e-9
    sum_row: float = 23e-9

    @property
    def generates(self) -> bool:
        """Whether code is generated for it: elementwise calls and sums that follow each other are then one loop."""
        return self.square > 1

    def write(self, path: str) -> None:
        """Write the constants to a file in JSON."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str) -> Machine:
        """The constants in a file that ``write`` wrote.

        Raises:
            MachineFileError: there is no such file, or something else in it.
        """
        remedy = "unset LAZY_EINSUM_MACHINE, then write the file anew with `python -m lazy_einsum calibrate`"
        given = read_json(path, MachineFileError, "machine", remedy)
        default = asdict(cls())
        if not isinstance(given, dict) or given.keys() != default.keys():
            raise MachineFileError(f"{path!r} has not the constants {', '.join(default)}; {remedy}")
        known: dict[str, Any] = {}
        for name, value in given.items():
            known[name] = value = tuple(value) if isinstance(value, list) else value
            if not _is_like(value, default[name]):
                raise MachineFileError(
                    f"{name} is {value!r} in {path!r}, expected numbers as in {default[name]!r}; {remedy}"
                )
        return cls(**known)


def _is_like(value: object, example: object) -> bool:
    """Whether a value from a file is a positive number, or as many of these as in the example."""
    if isinstance(example, tuple):
        return isinstance(value, tuple) and len(value) == len(example) and all(map(_is_like, value, example))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


_file = os.environ.get("LAZY_EINSUM_MACHINE")

CPU = Machine.read(_file) if _file else Machine()
"""The machine that plans are made for."""

INDUCTOR = replace(
    CPU,
    launch=0.3 * CPU.launch,
    strided_element=2.5 * CPU.strided_element,
    far_element=2.5 * CPU.far_element,
    aliased_element=2 * CPU.aliased_element,
    tile=CPU.element,
    square=16,
)
"""The same machine where Inductor generates the code: views cost nothing, and copies across memory are transposed in
registers. (48 copies of 2 to 6 dimensions and 24,000 to 4,600,000 elements, Intel Xeon: 0.6 to 1.0 ns per element where
torch takes 0.9 to 5.7; straight ones 0.4 to 0.5 with both; rows of 2 or 3 elements 1.8 to 2.3. Rows of 8 that lie apart
take as long as torch's: 240 us for 20,000.) Products and sums go one by one where an operand lies across: 0.9 to 1.5 ns
per element, 0.2 to 0.6 along the memory of both, 5.6 where the lines of an operand get into each other's place.
"""

# What an element of a copy across memory takes in squares, to one by one: 0.4 of what it takes torch.
_IN_SQUARES = 0.15

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
    if n == 1 or m == 1:
        # (128 matrices of 64 by 64 times vectors: 600 us, 80 where the vectors come first.)
        if batch > 1:
            busy = work * (machine.column if n == 1 else machine.vector)
        else:
            busy = m * n * machine.vector_row * (first_along if n == 1 else second_along)
    elif n < machine.columns <= m:
        # (A gradient of 11 columns and 3645 rows over k = 128: 4.9 ms where both operands lie across, 0.9 where
        # neither does; with the roles of the operands swapped, 0.3.)
        row, term, step = machine.narrow
        if second_along:
            row, term, step = machine.narrow_along if first_along else machine.narrow_across
        busy = m * (row + k * (term + n * step))
    else:
        slow = (1 + machine.half_height / max(m, 1)) * (1 + machine.half_depth / max(k, 1))
        # (Of 64 columns 66 us, of 63 98, of 28 45, of 24 33, of 16 20: within 5 % so for depths of 9 to 1,569.)
        slow *= 1 + (machine.piece * (n % 16).bit_count() - n % 16) / max(n, 1)
        busy = 2 * work * slow / machine.flop_rate
        if m < 4 and not first_along:
            busy *= machine.few_rows
        if m < 8 and second_along and not first_along:
            # (2,048 products of 3 by 7 and 7 by 32 on an Intel Xeon: 6.8 ms, 0.3 to 0.8 where either lies along.)
            busy *= machine.few_across
        # The operands are packed before they are multiplied, across their memory order where that is not the kernel's.
        beyond = ITEM * batch * k * (m + n) > machine.cache
        busy += beyond * k * (m + n) * machine.pack
        busy += (not first_along) * m * k * machine.pack_first + second_along * n * k * machine.pack_second
    return machine.launch + max(batch * (busy + (machine.matrix if batch > 1 else 0.0)), traffic)


def walk_seconds(
    elements: int,
    rows: int,
    tiles: int,
    stride: int,
    distance: int,
    n_bytes: int,
    machine: Machine = CPU,
    run: float | None = None,
) -> float:
    """Seconds of an elementwise call: a copy, or a product that broadcasts.

    Args:
        elements: of the result.
        rows: how many innermost loops it takes, once dimensions that lie together in all tensors are merged.
        tiles: how many pairs of innermost loops.
        stride: the largest stride of a tensor in the innermost loop.
        distance: how many elements are visited before the neighbour of the first one, in the worst tensor.
        n_bytes: read and written in all.
        machine: constants.
        run: of a copy: how many elements lie together in the tensor in which fewest do.
    """
    each = machine.strided_element if stride > 1 else machine.element
    if stride > 1 and n_bytes > machine.cache:
        if stride % 512 == 0 and elements > 32 * rows:
            each = machine.aliased_element
        elif distance > machine.far:
            each = machine.far_element
    if stride > 1 and run is not None and machine.generates:
        each *= _IN_SQUARES * max(machine.square / max(run, 1), 1)
    busy = elements * each + rows * machine.row + tiles * machine.tile
    return machine.launch + max(busy, traffic_seconds(n_bytes, machine))


def sum_seconds(elements: int, results: int, inner: int, machine: Machine = CPU) -> float:
    """Seconds of a sum of ``elements`` values to ``results``, of which so many lie side by side inside of what is
    summed: 1 for a sum over the innermost dimension.
    """
    each = machine.sum_output if inner == 1 else machine.sum_row / max(inner, 1)
    busy = elements * machine.sum_element + results * each
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
        seconds = walk_seconds(elements, tiles * rows, tiles, 1, 1, ITEM * (elements + batch * (m + n)), machine)
        # Labels on both sides: one operand is viewed with dimensions for those of the other.
        return seconds + machine.launch * (m > 1 < n)
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
        seconds = walk_seconds(elements, batch * m, batch, 1, 1, 3 * ITEM * elements, machine)
        return seconds + (sum_seconds(elements, batch * m, m, machine) if n > 1 else 0.0)
    return product_seconds(batch, min(m, k), max(m, k), n, True, False, machine)
