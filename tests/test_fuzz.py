"""Random programs through ``OptimizedModule``, and proof that the generator of those programs finds faults."""

from __future__ import annotations

import pytest
import torch
from behaviour import Rounding, value_difference
from fuzzer import (
    EFFECTS,
    EVERYTHING,
    FIRST,
    HOOKS,
    KEYS,
    PREDECESSOR,
    PRODUCTS,
    PROFILES,
    PURE,
    RESHAPED,
    SHARING,
    Failure,
    Profile,
    check_against,
    generate,
)

#: (profile, number of programs, first seed, programs in a chunk): chunks spread over processes.
_QUICK = [(EVERYTHING, 400, 0, 50), (PURE, 300, 0, 50), (EFFECTS, 200, 0, 50), (KEYS, 100, 0, 50)]
_QUICK += [(PRODUCTS, 100, 0, 50), (HOOKS, 100, 0, 50), (SHARING, 100, 0, 50), (RESHAPED, 100, 0, 50)]
_LONG = [(EVERYTHING, 5000, 10_000, 250), (PURE, 2000, 10_000, 250), (EFFECTS, 2000, 10_000, 250)]
_LONG += [(KEYS, 1000, 10_000, 250), (PRODUCTS, 1000, 10_000, 250), (HOOKS, 1000, 10_000, 250)]
_LONG += [(SHARING, 1000, 10_000, 250), (RESHAPED, 1000, 10_000, 250)]


def _chunks(table: list[tuple[Profile, int, int, int]]) -> list[tuple[Profile, int, int]]:
    return [(profile, start, size) for profile, n, first, size in table for start in range(first, first + n, size)]


QUICK, LONG = _chunks(_QUICK), _chunks(_LONG)


def _label(chunk: tuple[Profile, int, int]) -> str:
    return f"{chunk[0].name}-{chunk[1]}"


def _check_all(chunk: tuple[Profile, int, int]) -> None:
    profile, start, count = chunk
    failures = [check_against("lazy_einsum", generate(seed, profile)) for seed in range(start, start + count)]
    found = [failure for failure in failures if failure is not None]
    wrong = [failure for failure in found if not failure.only_fell_back]
    assert not wrong, f"{len(wrong)} of {count} programs differ from eager; the first:\n{wrong[0]}"
    # What may be refused is rare in them.
    assert len(found) <= 0.02 * count, f"{len(found)} of {count} programs fall back; the first:\n{found[0]}"


@pytest.mark.parametrize("chunk", QUICK, ids=_label)
def test_random_programs(chunk: tuple[Profile, int, int]) -> None:
    _check_all(chunk)


@pytest.mark.parametrize(
    ("profile", "seed"), [(SHARING, 40547), (EVERYTHING, 10111)], ids=lambda value: getattr(value, "name", value)
)
def test_programs_that_once_went_wrong(profile: Profile, seed: int) -> None:
    assert (failure := check_against("lazy_einsum", generate(seed, profile))) is None, str(failure)


def test_what_fell_back_is_told_from_what_is_wrong() -> None:
    fell = "warned: Program runs as it is, not optimized: forward prints"
    wrong = "result 0 differs"
    for problems, expected in (((fell,), True), ((wrong,), False), ((fell, wrong), False), (("warned: other",), False)):
        assert Failure(generate(0), FIRST, problems).only_fell_back == expected


@pytest.mark.slow
@pytest.mark.parametrize("chunk", LONG, ids=_label)
def test_many_random_programs(chunk: tuple[Profile, int, int]) -> None:
    _check_all(chunk)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_eager_agrees_with_itself(name: str) -> None:
    """The oracle has no opinion of its own: a module that is not rewritten passes."""
    for seed in range(60):
        failure = check_against("eager", generate(seed, PROFILES[name]))
        assert failure is None, str(failure)


def test_a_seed_is_a_program() -> None:
    for seed in range(20):
        assert generate(seed) == generate(seed)
        assert generate(seed).body != generate(seed + 1).body


def test_a_bound_grows_only_where_eager_moves() -> None:
    """What rounding does to a program by itself widens the bound on it, and on nothing else."""
    x = torch.linspace(0.5, 1.5, 7, dtype=torch.float64)
    with Rounding(0):
        steady, wild = x * 1e6, (x * 1e6).sin()
    assert value_difference(x * 1e6 * (1 + 1e-9), x * 1e6, 1e-10, [steady]) is not None
    moved = (wild - (x * 1e6).sin()).abs().max().item()
    assert 1e-11 < moved < 1e-8
    assert value_difference(wild + moved, wild, 1e-11, [(x * 1e6).sin()]) is None
    assert value_difference(wild + 20 * moved, wild, 1e-11, [(x * 1e6).sin()]) is not None


def test_values_that_rounding_decides_are_not_compared() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert value_difference(x, -x, 1e-10, [-x * (1 + 1e-3)]) is None
    assert value_difference(x.float(), -x, 1e-10, [x]) is not None
    whole = torch.ones(3, dtype=torch.int64)
    assert value_difference(whole + 1, whole, 1e-10, [whole]) is not None


def test_other_rounding_keeps_what_shares_memory() -> None:
    base = torch.ones(4, 3, dtype=torch.float64)
    with Rounding(1):
        product = base * 1.5
        view = product.t()
        kept = product.clone()
        view.add_(0)
    assert view.untyped_storage().data_ptr() == product.untyped_storage().data_ptr()
    assert not torch.equal(product, base * 1.5) and torch.allclose(product, base * 1.5, rtol=1e-15)
    assert not torch.equal(kept, product)


def test_the_fuzzer_finds_the_predecessor_wrong() -> None:
    """A library known to be wrong on such programs is the control experiment."""
    pytest.importorskip("opt_einsum_fx")
    wrong = sum(check_against("opt_einsum_fx", generate(seed, PREDECESSOR)) is not None for seed in range(100))
    assert wrong > 5
