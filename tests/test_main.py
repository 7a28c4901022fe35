"""The command line: what it prints, and that what fails is one line and a status of 2."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lazy_einsum.__main__ import main
from lazy_einsum.progress import with_progress

EINSUM = ["ij,jk,kl->il", "10x20", "20x30", "30x40"]


class Thin(nn.Module):
    """For ``explain``: two matrices and a thin input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(64, 64))
        self.b = nn.Parameter(torch.rand(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,ij,jk->nk", x, self.a, self.b)


MADE = Thin()


def broken() -> nn.Module:
    raise RuntimeError("no such\nmodel")


def item() -> object:
    return lambda x: x.sum().item()


def test_an_einsum_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(EINSUM) == 0
    printed = capsys.readouterr().out
    assert "ab,bc,cd->ad" in printed and "x0.mm(x1)" in printed and "FLOPs" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_data_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "einsum.html"
    assert main([*EINSUM, "--json", "--html", str(file), "--no-grad", "--measure"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["specializations"]
    (network,) = entry["networks"]
    assert network["equation"] == "ab,bc,cd->ad"
    assert network["optimized"]["flops"] == 2 * 10 * 20 * 30 + 2 * 10 * 30 * 40
    assert network["optimized"]["measured_seconds"] > 0
    assert file.read_text().startswith("<!doctype html>")
    assert main([*EINSUM, "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"1 networks of einsums, in {file}\n"


@pytest.mark.parametrize("name", ["Thin", "MADE"])
def test_a_model_is_explained(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["explain", f"test_main:{name}", "--input", "2x64:float32"]) == 0
    printed = capsys.readouterr().out
    assert "FLOPs backward" in printed
    assert main(["explain", f"test_main:{name}", "--input", "2x64:float32", "--no-grad"]) == 0
    assert "FLOPs backward" not in capsys.readouterr().out
    assert printed.startswith("Thin: 1 of at most 64") and f"{__file__}:" in printed and " a  f32[64, 64]" in printed


def test_shapes_larger_than_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ij,jk,k->i", "10000000x10000000", "10000000x10000000", "10000000", "--no-grad"]) == 0
    assert "mv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required"),
        (["ij,jk->il", "2x3", "3x4"], "output label 'l' is in no operand"),
        (["ij,jk->ik", "2x3"], "1 operands were given, expected 2"),
        (["ij,jk->ik", "2x3", "4x5"], "'j'"),
        (["ij->i", "2x"], "'2x' is no shape"),
        (["ij->i", "2x3:float33"], "'float33' is no dtype"),
        (["ij->i", "2x3", "--nonsense"], "--nonsense"),
        ([*EINSUM, "--html", "/nowhere/at/all.html"], "No such file or directory"),
        (["explain", "nosuchmodule:x"], "No module named 'nosuchmodule'"),
        (["explain", "test_main"], "expected package.module:name"),
        (["explain", "test_main:missing"], "has no 'missing'"),
        (["explain", "test_main:broken"], "RuntimeError: no such model\n"),
        (["explain", "test_main:item", "--input", "3"], "item"),
        (["explain", "test_main:Thin", "--input", "2x65"], "65"),
        (["calibrate", "/nowhere/at/all.json"], "there is no folder"),
        (["calibrate", "--samples", "4"], "'4' is no number of at least 5"),
    ],
)
def test_what_fails_is_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and text in printed.err


def test_the_package_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazy_einsum", "ij,jk->ik", "2x3", "3x4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "mm" in done.stdout
    done = subprocess.run([sys.executable, "-m", "lazy_einsum", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "calibrate" in done.stdout and "explain" in done.stdout


def test_progress_needs_no_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(range(3), 3, "numbers")) == [0, 1, 2]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(with_progress(range(3), 3, "numbers")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # no terminal, no bar


def test_progress_is_shown_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def tqdm(items: object, **options: object) -> object:
        given.update(options)
        return items

    fake = types.ModuleType("tqdm.auto")
    fake.tqdm = tqdm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    assert list(with_progress(range(3), 3, "numbers")) == [0, 1, 2]
    # With ``None`` tqdm looks for itself whether standard error is a terminal.
    assert given["disable"] is None and (given["total"], given["desc"]) == (3, "numbers")
