"""Each planted fault is found within 2,000 random programs; without one, the same programs find nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant, hunt, plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_random_programs_find_the_fault(mutant: Mutant, tmp_path: Path) -> None:
    done = hunt(mutant, tmp_path)
    assert "--- call" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
    assert done.returncode == 1


@pytest.mark.slow
def test_without_a_fault_nothing_is_found(tmp_path: Path) -> None:
    done = hunt(Mutant("none", ()), tmp_path, count=300)
    assert done.returncode == 0, done.stdout[-3000:]


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 15
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
