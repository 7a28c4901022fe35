"""What the cost model has to know for the choices that measurements call for."""

from __future__ import annotations

import pytest
import torch

from lazy_einsum.backward import arrival_seconds
from lazy_einsum.cost import CPU, INDUCTOR, pair_seconds, product_seconds, sum_seconds, walk_seconds
from lazy_einsum.layout import Sizes, contiguous_layout, label_strides
from lazy_einsum.ways import Context, copy_seconds, ways


def test_few_columns_are_dear_and_few_rows_are_not() -> None:
    # (38,400 by 9 with 9 by 3: 360 us; 3 by 9 with 9 by 38,400: 57.)
    assert product_seconds(1, 38400, 3, 9) > 4 * product_seconds(1, 3, 38400, 9)
    # (20,000 rows over k = 9, of 11, 12, 16 columns: 290, 100, 80 us.)
    eleven, twelve, sixteen = (product_seconds(1, 20000, n, 9) for n in (11, 12, 16))
    assert eleven > 2 * twelve > 2 * sixteen


def test_columns_beyond_a_multiple_of_16_are_done_in_pieces() -> None:
    # (256 rows over k = 256, in units of the time for 16 of 128 columns: measured 20, 45, 33, 36, 101, 66, 162.)
    columns = (16, 28, 24, 32, 63, 64, 127)
    part = product_seconds(1, 256, 128, 256) / 8
    found = [16 * product_seconds(1, 256, n, 256) / part for n in columns]
    for seconds, measured in zip(found, (20, 45, 33, 36, 101, 66, 162), strict=True):
        assert 0.75 * measured < seconds < 1.25 * measured


def test_gradients_of_matrices_that_come_transposed_are_priced() -> None:
    sizes = Sizes(a=2000, b=70, c=300)
    one, two = contiguous_layout(("a", "b"), sizes), contiguous_layout(("b", "c"), sizes)
    (way, *_) = (way for way in ways(Context(sizes, torch.float32), one, two, "ac", "ac") if way.kind == "product")
    straight, turned = (contiguous_layout(order, sizes) for order in (way.result.dims, way.result.dims[::-1]))
    assert arrival_seconds(way, straight, sizes) == 0 < arrival_seconds(way, turned, sizes)


def test_outer_products_take_a_view() -> None:
    assert pair_seconds(1, 8, 8, 1) >= pair_seconds(1, 1, 64, 1) + 0.9 * CPU.launch


def test_sums_of_few_elements_each_are_dear() -> None:
    # (80,000 sums of 10 neighbours: 266 us; of 2, in runs of 128 results: 71 us for 128,000.)
    assert sum_seconds(800_000, 80_000, 1) > 2 * sum_seconds(800_000, 80_000, 80_000)
    assert sum_seconds(800_000, 80_000, 1) < 500e-6
    assert sum_seconds(256_000, 128_000, 64) > 1.5 * sum_seconds(256_000, 128_000, 128_000)


def test_strides_that_fall_on_the_same_places_of_the_cache() -> None:
    def copy(stride: int) -> float:
        return walk_seconds(1_000_000, 500, 1, stride, 2000, 8_000_000)

    assert copy(512) > 2 * copy(500) > copy(1)


def test_few_rows_are_dear_where_both_operands_lie_across() -> None:
    # (2,048 products of 3 by 7 and 7 by 32 on an Intel Xeon: 6,773 us, 305 to 759 where either lies along.)
    across, *others = (product_seconds(2048, 3, 32, 7, not x, y) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert across > 2 * max(others)
    assert product_seconds(2048, 8, 32, 7, False, True) < across


def test_generated_copies() -> None:
    sizes, turned = Sizes(a=500, b=500), {"a": 500, "b": 1}
    assert copy_seconds("ba", turned, sizes, INDUCTOR) < 0.5 * copy_seconds("ba", turned, sizes)
    # Short rows leave much of a square unused.
    wide = walk_seconds(10**6, 1, 1, 300, 1, 1, INDUCTOR, 300)
    for run, times in ((4, 4), (16, 1)):
        assert walk_seconds(10**6, 1, 1, 300, 1, 1, INDUCTOR, run) == pytest.approx(times * wide, rel=0.01)
    # As many lie together as the walk takes together.
    narrow = copy_seconds("ba", {"a": 50_000, "b": 1}, Sizes(a=3, b=50_000), INDUCTOR)
    assert narrow > 5 * copy_seconds("ba", {"a": 375, "b": 1}, Sizes(a=400, b=375), INDUCTOR)
    # Products go one by one, and not in vectors.
    assert walk_seconds(10**6, 1, 1, 300, 1, 1, INDUCTOR) > max(4 * wide, 2 * walk_seconds(10**6, 1, 1, 300, 1, 1, CPU))
    assert walk_seconds(10**6, 1, 1, 300, 1, 1, CPU, 4) == walk_seconds(10**6, 1, 1, 300, 1, 1, CPU)


def test_gradients_that_come_across_are_dear() -> None:
    sizes = Sizes(a=128, b=10, c=64, d=10)
    one, two = (contiguous_layout(tuple(term), sizes) for term in ("abc", "acd"))
    across = contiguous_layout(tuple("cbda"), sizes)
    once = copy_seconds("abcd", label_strides(across, sizes), sizes)
    for machine in (CPU, INDUCTOR):
        # Generated code reads them one by one, too, in the products that they go into.
        found = ways(Context(sizes, torch.float32, machine=machine), one, two, "abcd", "abcd")
        straight = [way for way in found if way.result == contiguous_layout(tuple("abcd"), sizes)]
        assert straight and all(arrival_seconds(way, across, sizes, machine) > 2 * once for way in straight)


def test_gradients_of_generated_sums_are_read_for_each_term() -> None:
    sizes = Sizes(a=512, b=30, c=16)
    one, two = (contiguous_layout(tuple(term), sizes) for term in ("abc", "abc"))
    across = contiguous_layout(tuple("ba"), sizes)
    once = copy_seconds("ab", label_strides(across, sizes), sizes)
    found = ways(Context(sizes, torch.float32, True, machine=INDUCTOR), one, two, "ab", "ab")
    sums = [way for way in found if way.kind == "multiply and sum" and way.result.dims == ("a", "b")]
    assert sums and all(arrival_seconds(way, across, sizes, INDUCTOR) > 16 * once for way in sums)
