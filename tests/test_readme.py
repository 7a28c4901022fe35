"""The README's code runs as it stands there, and its commands and file names are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def printed_by(code: str, folder: Path) -> str:
    """What code prints as ``model.py`` in a folder of its own, with the package beside the README."""
    program = f"exec(compile({code!r}, 'model.py', 'exec'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_block_runs(number: int, tmp_path: Path) -> None:
    printed_by(BLOCKS[number], tmp_path)


def test_there_are_code_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_set_up_is_one_command_each(name: str) -> None:
    """Continuous integration takes the commands from the README by this very form."""
    (command,) = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*)\n```$", README, flags=re.MULTILINE)
    assert "pip install" in command


def test_files_named_in_the_table_of_passes_exist() -> None:
    files = re.findall(r"^\| \w[\w ]* \| `(\w+\.py)` \|", README, flags=re.MULTILINE)
    assert files
    for file in files:
        assert (ROOT / "lazy_einsum" / "passes" / file).exists(), file


def test_examples_named_exist() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README.split("`examples/`")[1].split("\n\n")[0]))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_the_first_example_shows_what_its_comments_say() -> None:
    scope: dict[str, object] = {}
    exec(BLOCKS[0], scope)
    model = scope["model"]
    code = model.code  # type: ignore[attr-defined]
    assert code.count(".mv(") == 3
    assert "mm(" not in code
    assert code.count(".mul(") == 1


def test_the_report_shown_is_the_one_that_its_example_gives(tmp_path: Path) -> None:
    shown = README.split("`print(report.networks[0])`:\n\n```\n")[1].split("\n```\n")[0]
    (block,) = [block for block in BLOCKS if "class LowRank" in block]
    printed = printed_by(block + 'print("network:")\nprint(report.networks[0])\n', tmp_path)
    assert shown.split() == printed.split("network:\n")[-1].split()
