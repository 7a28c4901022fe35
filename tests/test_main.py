"""The command line: what it prints, and that what fails is one line and a status of 2."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lazy_einsum import bench, search
from lazy_einsum.__main__ import main
from lazy_einsum.plan import make_plan
from lazy_einsum.progress import with_progress
from lazy_einsum.spec import EinsumSpec, symbol

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


class Moving(nn.Module):
    """For ``bench``: draws random numbers, counts its calls in what it returns, and writes its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.steps += 1
        x += 1
        return {"y": nn.functional.dropout(x * self.weight, 0.5) * self.steps, "x": x}


def square() -> object:
    return lambda x: x * x


def detached() -> object:
    return lambda x: x.detach()


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
    assert capsys.readouterr().out == f"1 network of einsums, in {file}\n"


@pytest.mark.parametrize("name", ["Thin", "MADE"])
def test_a_model_is_explained(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["explain", f"test_main:{name}", "--input", "2x64:float32"]) == 0
    printed = capsys.readouterr().out
    assert "FLOPs backward" in printed
    assert main(["explain", f"test_main:{name}", "--input", "2x64:float32", "--no-grad"]) == 0
    assert "FLOPs backward" not in capsys.readouterr().out
    assert printed.startswith("Thin: 1 of at most 64") and f"{__file__}:" in printed and " a  f32[64, 64]" in printed


@pytest.mark.parametrize("arguments", [EINSUM, ["explain", "test_main:Thin", "--input", "2x64", "--no-grad"]])
def test_orders_can_be_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    optimizers = []
    for options in ([], ["--measure-orders"]):
        assert main([*arguments, "--json", *options]) == 0
        (entry,) = json.loads(capsys.readouterr().out)["specializations"]
        (network,) = entry["networks"]
        optimizers.append(network["optimizer"])
    assert "measurement" not in optimizers[0]
    assert re.fullmatch("measurement: .* us, of others .*", optimizers[1])


def test_orders_of_tensors_without_data_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    huge = "10000000x10000000"
    assert main(["ij,jk,k->i", huge, huge, "10000000", "--no-grad", "--measure-orders"]) == 0
    assert "order by measurement" not in capsys.readouterr().out


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
        (["bench"], "the following arguments are required"),
        (["bench", "ij,jk->ik", "2x3", "4x5"], "'j'"),
        (["bench", "ij->i", "2x3", "--input", "2x3"], "'ij->i' is an equation; expected its shapes as plain arguments"),
        (["bench", "test_main:Thin", "2x64"], "is a model; expected its shapes behind --input"),
        (["bench", "test_main:missing"], "has no 'missing'"),
        (["bench", "test_main:Thin", "--input", "2x65"], "65"),
        (["bench", "ij->i", "2x3", "--dtype", "float33"], "'float33' is no dtype"),
        (["bench", "ij->i", "2x3", "--rounds", "0"], "'0' is no number of at least 1"),
        (["bench", "ij->i", "2x3", "--threads", "-1"], "--threads"),
        (["bench", "ij->i", "2x3", "--dtype", "int64", "--backward"], "no tensor here has gradients"),
        (["bench", "test_main:detached", "--input", "2", "--backward"], "no result has gradients"),
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
    assert done.returncode == 0 and all(command in done.stdout for command in ("bench", "calibrate", "explain"))


# --- bench ------------------------------------------------------------------------------------------------------------

QUICK = ["--rounds", "1"]


def bench_data(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``bench`` prints as data; nothing goes to standard error, which is no terminal."""
    status = main(["bench", *arguments, *QUICK, "--json"])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    data: dict[str, Any] = json.loads(printed.out)
    return data


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *EINSUM, "--backward", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ij,jk,kl->il of f32[10, 20], f32[20, 30], f32[30, 40]"
    assert "as fast as torch.einsum" in lines[1] and "2 rounds" in lines[2] and "threads: 1" in lines[2]
    assert lines[4].split() == ["forward", "and", "backward"] and max(map(len, lines)) <= 100
    rows = {line.split()[0]: line for line in lines[5:]}
    libraries = ["opt_einsum.contract_expression", "opt_einsum_fx", "cotengra"]
    assert list(rows) == ["torch.einsum", "lazy_einsum.einsum", *libraries]
    assert rows["torch.einsum"].count("(1.00)") == 2
    for name in ("lazy_einsum.einsum", "opt_einsum.contract_expression"):
        assert re.fullmatch(r"\S+( +[\d,]+\.\d +\(\d+\.\d\d\)){2}", rows[name])


def test_bench_gives_data(capsys: pytest.CaptureFixture[str]) -> None:
    data = bench_data(capsys, "ij,jk->ik", "3x4", "4x5:float64", "--dtype", "float64")
    assert data["subject"] == "ij,jk->ik" and data["inputs"] == ["f64[3, 4]", "f64[4, 5]"]
    assert (data["rounds"], data["threads"], data["notes"]) == (1, 1, [])
    for row in data["timed"][:3]:
        assert row["forward"] > 0 and row["backward"] is None and row["remark"] == ""


@pytest.mark.parametrize("equation", ["i...,...j", "ii->i", "ij,jk->"])
def test_bench_takes_equations_as_torch_does(equation: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_data(capsys, equation, *["3x3"] * (1 + equation.count(",")))["timed"]
    assert all(row["forward"] or row["remark"] == "not installed" for row in rows)


def test_bench_says_which_libraries_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise TypeError("no such\nequation")

    monkeypatch.setitem(sys.modules, "cotengra", None)
    monkeypatch.setattr("opt_einsum.contract_expression", fail)
    assert main(["bench", *EINSUM, *QUICK]) == 0
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[5:]}
    assert rows["cotengra"] == "not installed"
    assert rows["opt_einsum.contract_expression"] == "TypeError: no such equation"


def test_bench_of_many_operands_ends(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("opt_einsum_fx")
    labels = "abcdefghijklmnop"
    chain = ",".join(map("".join, itertools.pairwise(labels)))
    rows = {row["name"]: row for row in bench_data(capsys, f"{chain}->ap", *["2x2"] * 15)["timed"]}
    assert rows["opt_einsum_fx"]["forward"] > 0


@pytest.mark.parametrize(("name", "shape"), [("Thin", "2x64"), ("Moving", "2x8"), ("square", "3")])
def test_bench_of_a_model(
    name: str, shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    data = bench_data(capsys, f"test_main:{name}", "--input", shape, "--backward")
    assert [row["name"] for row in data["timed"]] == ["the model as it is", "OptimizedModule"]
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in data["timed"]) and data["notes"] == []


def test_bench_says_what_runs_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["bench", "test_main:item", "--input", "3", *QUICK]) == 0
    assert "runs as it is" in capsys.readouterr().out.splitlines()[-1]


def test_bench_times_nothing_where_results_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(bench, "_medians", lambda *rest: pytest.fail("timed"))
    monkeypatch.setattr(bench, "einsum", lambda *rest: 1.01 * torch.einsum(*rest))
    assert main(["bench", *EINSUM]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: nothing was timed: lazy_einsum.einsum gives other results than torch.einsum")


def test_bench_compares_gradients_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(bench, "OptimizedModule", lambda model: lambda x: x * x.detach())
    assert main(["bench", "test_main:square", "--input", "3", *QUICK]) == 0
    assert main(["bench", "test_main:square", "--input", "3", *QUICK, "--backward"]) == 1
    assert "OptimizedModule gives other results than the model as it is" in capsys.readouterr().err


def test_bench_sets_threads_and_takes_turns() -> None:
    seen: list[int] = []

    def first(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return x

    torch.manual_seed(7)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    bench.bench_model(first, [torch.ones(2)], rounds=1, threads=before + 1)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)
    calls: list[str] = []
    slow = {name: partial(lambda name: (calls.append(name), time.sleep(0.02)), name) for name in "ab"}
    assert min(bench._medians(slow, range(3), lambda: None).values()) >= 0.02
    # One to see how long it takes, then in each turn one that is not timed and one that is.
    assert "".join(calls) == "ab" + "aabb" * 3


def test_bench_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[int, str]] = []

    def watched(items: range, total: int, what: str) -> range:
        bars.append((total, what))
        return items

    monkeypatch.setattr(bench, "with_progress", watched)
    bench.bench_einsum("ij,jk->ik", [torch.ones(2, 2)] * 2, backward=True, rounds=2)
    assert bars == [(2, "rounds, forward"), (2, "rounds, backward")]


# --- progress ---------------------------------------------------------------------------------------------------------


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


def test_the_search_for_orders_of_many_operands_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    def watched(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        seen.append((total, what))
        return items

    monkeypatch.setattr(search, "with_progress", watched)

    def ring(n: int) -> tuple[EinsumSpec, list[tuple[int, int]]]:
        labels = [symbol(number) for number in range(n)]
        terms = tuple(a + b for a, b in zip(labels, labels[1:] + labels[:1], strict=True))
        # Another size at each place: no plan of another test is this one.
        return EinsumSpec(terms, ""), [(2 + number % 5, 2 + (number + 1) % n % 5) for number in range(n)]

    make_plan(*ring(20))
    assert seen == []
    make_plan(*ring(70))
    assert {what for _, what in seen} == {
        "searches for orders of 70 operands",
        "searches to improve orders of 70 operands",
    }
    assert all(total > 0 for total, _ in seen)
