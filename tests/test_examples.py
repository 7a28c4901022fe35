"""The examples run, and what they assert holds; none is too long to be read in one go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=path.parent.parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_asserts(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert "\nassert " in text
    assert "?" in text.splitlines()[0]


def test_there_are_examples() -> None:
    assert {"quickstart", "many_shapes", "inspect_a_plan", "train", "equivariant_tensor_product", "lora"} <= {
        path.stem for path in EXAMPLES
    }
