"""Measuring a machine, and the file that says what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lazy_einsum import MachineFileError, cost
from lazy_einsum.__main__ import main
from lazy_einsum.calibrate import GROUPS, Sample, fit, measure, misfit


def test_what_is_measured() -> None:
    before = torch.get_num_threads()
    threads = 2
    torch.set_num_threads(threads)
    samples = list(measure(10))
    assert {sample.group for sample in samples} == set(GROUPS)
    assert all(0 < sample.seconds < 1 and 0 < sample.model(cost.CPU) < 1 for sample in samples)
    assert [sample.name for sample in samples] == [sample.name for sample in measure(10)]
    assert [sample.name for sample in samples] != [sample.name for sample in measure(10, seed=1)]
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_the_fit_finds_the_machine_that_was_measured() -> None:
    truth = replace(cost.CPU, launch=3e-6, flop_rate=20e9, element=0.2e-9, narrow=(9e-9, 2e-9, 0.2e-9), sum_output=9e-9)
    truth = replace(truth, piece=40.0)
    samples = [Sample(name, group, model(truth), model) for name, group, _, model in measure(400)]
    assert misfit(cost.CPU, samples) > 1.8
    found = fit(samples)
    assert misfit(found, samples) < 1.1
    assert 2e-6 < found.launch < 4.5e-6
    assert 15e9 < found.flop_rate < 30e9
    assert 25 < found.piece < 60
    assert (found.columns, found.cache) == (cost.CPU.columns, cost.CPU.cache)


def test_one_wild_measurement_does_not_matter() -> None:
    samples = [Sample(name, group, model(cost.CPU), model) for name, group, _, model in measure(100)]
    wild = samples[0]._replace(seconds=1e3)
    assert misfit(cost.CPU, [wild, *samples[1:]]) == pytest.approx(
        misfit(cost.CPU, [samples[1]._replace(seconds=4 * samples[1].seconds), *samples[2:], samples[0]])
    )


def test_a_file_tells_another_process_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    assert main(["calibrate", str(file), "--samples", "25"]) == 0
    printed = capsys.readouterr().out
    assert "25 calls timed" in printed and f"export LAZY_EINSUM_MACHINE={file}" in printed
    found = cost.Machine.read(str(file))
    assert found != cost.Machine()
    told = _cost_of_another_process(file)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == repr(found)


def _cost_of_another_process(file: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LAZY_EINSUM_MACHINE": str(file)}
    code = "from lazy_einsum import cost; print(cost.CPU)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no machine can be read from"),
        ("[]", "has not the constants launch, "),
        ('{"launch": 1e-6}', "has not the constants launch, "),
        ({"launch": "fast"}, "launch is 'fast'"),
        ({"launch": -1}, "launch is -1"),
        ({"launch": True}, "launch is True"),
        ({"flop_rate": float("inf")}, "flop_rate is inf"),
        ({"narrow": [1e-9, 1e-9]}, r"narrow is \(1e-09, 1e-09\)"),
        ({"unknown": 1.0}, "has not the constants launch, "),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | dict[str, object], message: str) -> None:
    file = tmp_path / "machine.json"
    cost.Machine().write(str(file))
    if isinstance(content, str):
        file.write_text(content)
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    with pytest.raises(MachineFileError, match=message) as caught:
        cost.Machine.read(str(file))
    assert "python -m lazy_einsum calibrate" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    told = _cost_of_another_process(tmp_path / "none.json")
    assert told.returncode != 0
    assert "MachineFileError: no machine can be read from" in told.stderr


def test_errors_of_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before anything is measured.
    monkeypatch.setattr("lazy_einsum.__main__.measure", lambda count: pytest.fail("measured"))
    assert main(["calibrate", str(tmp_path / "no" / "folder.json"), "--samples", "5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in ("many", "4", "-5"):
        with pytest.raises(SystemExit) as caught:
            main(["calibrate", "--samples", wrong])
        assert caught.value.code == 2
    assert "at least 5" in capsys.readouterr().err
