"""Contraction orders that are measured, saved to files and loaded by other processes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import random_network
from ranks import Ranks
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from lazy_einsum import (
    OptimizedModule,
    PlanFileError,
    PlanFileWarning,
    fastest,
    known,
    optimize_einsums_full,
    plan,
    plan_file,
    stopwatch,
)
from lazy_einsum.choice import _question
from lazy_einsum.labelsets import SavedLimit
from lazy_einsum.orders import _neighbours, along, other_orders, plan_by_calls
from lazy_einsum.plan import make_plan, positions
from lazy_einsum.program import Program
from lazy_einsum.saved import Written, WrittenNetwork
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec

einsum = torch.einsum

# Of each some orders are about as good.
CHAIN = "ab,bc,cd,de->ae", ((20, 300), (300, 40), (40, 200), (200, 5))
EVEN = "ab,bc,cd,de->ae", ((30, 31), (31, 29), (29, 33), (33, 28))
RING = "ab,bc,cd,da->", ((7, 8), (8, 9), (9, 6), (6, 7))
GRADIENTS = "abc,bde,ce->acd", ((3, 3, 400), (3, 35, 35), (400, 35))
LONE = "abz,bc,cd->ad", ((20, 30, 5), (30, 25), (25, 40))  # what is saved of the first operand is a sum
EIGHT = "ab,bc,cd,de,ef,fg,gh,hi->ai", ((3, 9), (9, 4), (4, 8), (8, 5), (5, 9), (9, 3), (3, 6), (6, 4))


def forget() -> None:
    """As in a new process."""
    plan._cached_plan.cache_clear()
    known._answers.clear()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


def contract(equation: str, *operands: Tensor) -> Tensor:
    return einsum(equation, *operands)


def inputs(shapes: Sequence[Sequence[int]], requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in operands]


def network_of(equation: str, operands: Sequence[Tensor]) -> WrittenNetwork:
    spec = EinsumSpec.parse(equation, [x.dim() for x in operands])
    types = tuple(TensorType.of(x) for x in operands)
    return WrittenNetwork(Written.plain(spec), spec, types, tuple(range(len(operands))))


def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a search, a comparison of calls and a measurement fail."""
    for module, name in ((plan, "search"), (plan, "search_saving"), (plan, "_foreign")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("searched"))
    monkeypatch.setattr("lazy_einsum.orders.lower_plan", lambda *_: pytest.fail("compared"))
    monkeypatch.setattr(fastest, "time_programs", lambda *_: pytest.fail("measured"))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, Program], float]) -> list[int]:
    """Let each program that is timed take so many seconds, by its place; how many there were each time."""
    counts = []

    def time_programs(programs: Sequence[Program], types: Sequence[TensorType]) -> list[list[float]]:
        counts.append(len(programs))
        return [[seconds(place, program) for place, program in enumerate(programs)] for _ in range(3)]

    monkeypatch.setattr(fastest, "time_programs", time_programs)
    return counts


def backwards(place: int, program: Program) -> float:
    """The one that is taken for the slowest is the fastest."""
    return 1.0 / (1 + place)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("optimize", ["auto", "greedy", "measure"])
@pytest.mark.parametrize("network", [CHAIN, RING, GRADIENTS, EIGHT, LONE])
def test_what_was_saved_is_not_searched_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: Any, optimize: str, grad: bool
) -> None:
    equation, shapes = network
    operands = inputs(shapes, requires_grad=grad)
    first = OptimizedModule(contract, optimize=optimize)
    entry = first.prepare(equation, *operands)
    count = first.save_plans(tmp_path / "plans.json")
    assert count > 0
    forget()
    no_search(monkeypatch)
    second = OptimizedModule(contract, optimize=optimize)
    assert second.load_plans(str(tmp_path / "plans.json")) == count
    again = second.prepare(equation, *operands)
    assert again.plans == entry.plans
    assert again.code == entry.code
    expected = einsum(equation, *operands)
    torch.testing.assert_close(second(equation, *operands), expected, rtol=1e-10, atol=1e-10)
    # What this process needed is enough for the next one.
    assert second.save_plans(tmp_path / "plans.json") > 0
    forget()
    third = OptimizedModule(contract, optimize=optimize)
    third.load_plans(tmp_path / "plans.json")
    assert third.prepare(equation, *operands).plans == entry.plans


@st.composite
def networks(draw: st.DrawFn) -> tuple[EinsumSpec, list[tuple[int, ...]], list[bool]]:
    n = draw(st.integers(3, 12))
    spec, shapes = random_network(n, draw(st.integers(1, 3)), draw(st.integers(0, 10**6)), draw(st.integers(2, 9)))
    return spec, shapes, draw(st.lists(st.booleans(), min_size=n, max_size=n))


@given(networks(), st.sampled_from([None, 2**50]), st.sampled_from([None, 1.0, 1.5]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_networks(tmp_path: Path, drawn: Any, limit: int | None, ratio: float | None) -> None:
    spec, shapes, follows = drawn
    forget()
    operands = [torch.empty(shape, requires_grad=follow) for shape, follow in zip(shapes, follows, strict=True)]
    options: dict[str, Any] = {"memory_limit": limit, "saved_limit": ratio}
    first = OptimizedModule(contract, **options)
    entry = first.prepare(str(spec), *operands)
    count = first.save_plans(tmp_path / "plans.json")
    saved = dict(entry.orders)
    assert len(saved) == count
    assert plan_file.read_plans(tmp_path / "plans.json") == saved
    forget()
    second = OptimizedModule(contract, **options)
    second.load_plans(tmp_path / "plans.json")
    assert second.prepare(str(spec), *operands).plans == entry.plans


def test_code_for_sizes_that_vary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its orders are those of examples, and so are those that say how far it is good."""

    def build() -> OptimizedModule:
        model = OptimizedModule(contract)
        for size in (20, 30, 50):
            x, *rest = inputs(CHAIN[1])
            model(CHAIN[0], torch.randn(size, x.shape[1], dtype=x.dtype), *rest)
        assert any(entry.is_generic for entry in model.specializations.values())
        return model

    first = build()
    first.save_plans(tmp_path / "plans.json")
    forget()
    first.load_plans(tmp_path / "plans.json")
    for name in ("search", "search_saving"):
        monkeypatch.setattr(plan, name, lambda *_: pytest.fail("searched"))
    again = build()
    assert [entry.code for entry in again.specializations.values()] == [
        entry.code for entry in first.specializations.values()
    ]


def test_each_plan_is_for_its_own_options(tmp_path: Path) -> None:
    operands = inputs(CHAIN[1])
    first = OptimizedModule(contract)
    first.prepare(CHAIN[0], *operands)
    first.save_plans(tmp_path / "plans.json")
    questions = set(plan_file.read_plans(tmp_path / "plans.json"))
    for other in (
        OptimizedModule(contract, memory_limit="1MiB"),
        OptimizedModule(contract, optimize="greedy"),
        OptimizedModule(contract, saved_limit=3.0),
    ):
        for grad in (False, True):
            entry = other.prepare(CHAIN[0], *(x.detach().requires_grad_(grad) for x in operands))
            chosen = {question for question in entry.orders if question.calls or question.optimize == "greedy"}
            assert chosen and not chosen & questions
    x, *rest = operands
    for changed in (inputs((*CHAIN[1][:3], (200, 6))), [y.float() for y in operands], [x.T.contiguous().T, *rest]):
        entry = OptimizedModule(contract).prepare(CHAIN[0], *changed)
        assert not {question for question in entry.orders if question.calls} & questions


def test_what_others_wrote_counts(tmp_path: Path) -> None:
    """What eager saves, and so the limit, depends on how the einsum was written."""

    def two(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return einsum("ac,cd->ad", einsum("ab,bc->ac", x, y), z)

    def one(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return einsum("ab,bc,cd->ad", x, y, z)

    operands = inputs(((5, 6), (6, 7), (7, 8)), requires_grad=True)
    found = [set(OptimizedModule(function).prepare(*operands).orders) for function in (one, two)]
    chosen = [{question for question in questions if question.calls} for questions in found]
    assert all(chosen) and not chosen[0] & chosen[1]
    plain = network_of("ab,bc,cd->ad", operands)
    outer, inner = (
        Written.plain(EinsumSpec(terms, output)) for terms, output in ((("ac", "cd"), "ad"), (("ab", "bc"), "ac"))
    )
    nested = plain._replace(written=outer.inline(0, inner))
    first, second = (_question(network, 1.1, None, None, False) for network in (plain, nested))
    assert first.calls and second.calls and first != second
    assert first._replace(calls=second.calls) == second
    assert second.calls.written == (("ab,bc->ac", (None, None)), ("ac,cd->ad", (0, None)))
    x, y, _ = operands
    (twice,) = [q for q in OptimizedModule(lambda x, y: one(x, y, y.mT)).prepare(x, y).orders if q.calls]
    assert twice.calls.memory == (0, 1, 1)


def test_each_search_has_a_question_of_its_own() -> None:
    spec = EinsumSpec(("ab", "bc", "cd", "de"), "ae")
    shapes = ((7, 6), (6, 9), (9, 8), (8, 4))
    limit = SavedLimit((True, False, True, False), (42, 54, 72, 32), ((0,), 1, 2, 3), 300.0)
    options: list[dict[str, Any]] = [
        {},
        {"optimize": "greedy"},
        {"optimize": False},
        {"memory_limit": 100},
        {"memory_limit": "max_input"},
        {"generic": True},
        {"follows": (True, False, True, False)},
        {"follows": (True, True, True, True)},
        {"follows": (True, False, True, False), "saved_limit": limit},
        {"follows": (True, False, True, False), "saved_limit": replace(limit, elements=301.0)},
        {"frozen": (True, True, False, False)},
    ]
    found = []
    with known.noting() as noted:
        for option in options:
            found.append(make_plan(spec, shapes, **option))
            make_plan(spec, shapes, **option)
    assert len(noted) == len(options)
    forget()
    plan.learn(noted)
    assert [make_plan(spec, shapes, **option) for option in options] == found
    for question in noted:  # what is loaded counts, not what was found before
        plan.learn({question: known.Answer(((2, 3), (1, 4), (0, 5)), "another taste")})
    for option in options:
        if "memory_limit" not in option:
            assert make_plan(spec, shapes, **option).optimizer == "another taste"


def test_another_process_starts_warm(tmp_path: Path) -> None:
    code = """
import sys
import torch
from lazy_einsum import OptimizedModule, choice, plan, search
searches = []
for module, name in ((plan, "search"), (plan, "search_saving"), (choice, "plan_by_calls"), (choice, "fastest_order")):
    def count(*args, found=getattr(module, name), name=name):
        searches.append(name)
        return found(*args)
    setattr(module, name, count)
file, first, optimize = sys.argv[1], sys.argv[2] == "first", sys.argv[3]
model = OptimizedModule(lambda equation, *x: torch.einsum(equation, *x), optimize=optimize, dynamic=False)
if not first:
    model.load_plans(file)
for size in range(3, 3 + int(sys.argv[4])):
    shapes = (size, 30), (30, 20), (20, 9), (9, 3)
    entry = model.prepare("ab,bc,cd,de->ae", *(torch.empty(shape, requires_grad=size % 2 == 0) for shape in shapes))
    print(entry.plans[0].path, entry.plans[0].optimizer)
if first:
    model.save_plans(file)
print(len(searches))
"""

    def run(*arguments: str) -> list[str]:
        file = str(tmp_path / f"{arguments[1]}.json")
        done = subprocess.run([sys.executable, "-c", code, file, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    for optimize, count in (("auto", 20), ("measure", 3)):
        *orders, searched = run("first", optimize, str(count))
        *again, searched_again = run("second", optimize, str(count))
        assert len(orders) == count and again == orders
        assert int(searched) >= count
        assert searched_again == "0"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with orders of all kinds."""
    for optimize in ("auto", "measure"):
        model = OptimizedModule(contract, optimize=optimize, memory_limit="1MiB", saved_limit=1.0)
        model.prepare(CHAIN[0], *inputs(CHAIN[1], requires_grad=True))
        model.save_plans(tmp_path / f"{optimize}.json")
    data = json.loads((tmp_path / "auto.json").read_text())
    data["plans"] += json.loads((tmp_path / "measure.json").read_text())["plans"]
    (tmp_path / "plans.json").write_text(json.dumps(data))
    forget()
    return tmp_path / "plans.json"


def test_a_good_file_is_read(file: Path) -> None:
    orders = plan_file.read_plans(file)
    assert any(question.saved for question in orders)
    assert any(question.calls and question.calls.device for question in orders)
    assert any(question.calls and not question.calls.device for question in orders)


Change = Callable[[dict[str, Any]], Any]


def _set(*path: Any, value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


def _first_with(part: str, *path: Any, value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        entry = next(entry for entry in data["plans"] if entry[part])
        _set(part, *path, value=value)(entry)

    return change


MALFORMED: dict[str, tuple[Change, str]] = {
    "list": (lambda data: data.clear(), "is no file of plans: expected the texts format, version, machine"),
    "no version": (lambda data: data.pop("version"), "is no file of plans"),
    "version a number": (_set("version", value=1), "is no file of plans"),
    "no plans": (lambda data: data.pop("plans"), "expected an object with format, version, machine, plans"),
    "more than plans": (_set("code", value="import os"), "expected an object with format, version, machine, plans"),
    "plans an object": (_set("plans", value={}), "plans is {}, expected a list"),
    "entry a list": (_set("plans", 1, value=[]), r"plan 1 is \[\], expected an object with shapes"),
    "entry without path": (lambda data: data["plans"][1].pop("path"), "plan 1 is .*, expected an object with shapes"),
    "entry with more": (_set("plans", 1, "code", value="x"), "plan 1 is .*, expected an object with shapes"),
    "shapes null": (_set("plans", 0, "shapes", value=None), "plan 0: shapes is None, expected sizes for each operand"),
    "negative size": (_set("plans", 0, "shapes", 0, 0, value=-1), "plan 0: shapes is .*, expected sizes"),
    "size true": (_set("plans", 0, "shapes", 0, 0, value=True), "plan 0: shapes is .*, expected sizes"),
    "size 2.0": (_set("plans", 0, "shapes", 0, 0, value=2.0), "plan 0: shapes is .*, expected sizes"),
    "huge size": (_set("plans", 0, "shapes", 0, 0, value=2**63), "plan 0: shapes is .*, expected sizes"),
    "equation a number": (_set("plans", 0, "equation", value=3), "plan 0: equation is 3, expected a text"),
    "equation malformed": (_set("plans", 0, "equation", value="ab,b-c"), "plan 0: einsum 'ab,b-c'"),
    "equation short": (_set("plans", 0, "equation", value="ab, bc, cd, de"), "equation is .*, expected it written out"),
    "equation of others": (_set("plans", 0, "equation", value="ab,bc,cd->ad"), "plan 0: einsum"),
    "sizes that differ": (_set("plans", 0, "shapes", 0, 1, value=299), "plan 0: einsum"),
    "optimize a list": (_set("plans", 0, "optimize", value=[]), r"optimize is \[\], expected the name of a search"),
    "memory_limit text": (_set("plans", 0, "memory_limit", value="1MiB"), "memory_limit is '1MiB', expected a number"),
    "over the limit": (_set("plans", 0, "memory_limit", value=1), "plan 0: .*has an intermediate of"),
    "generic a number": (_set("plans", 0, "generic", value=0), "generic is 0, expected true or false"),
    "follows short": (_set("plans", 0, "follows", value=[True]), r"follows is \[True\], expected .*\(4 operands\)"),
    "frozen numbers": (_set("plans", 0, "frozen", value=[1, 0, 0, 0]), "frozen is .*, expected true or false"),
    "saved a text": (_set("plans", 0, "saved", value="all"), "saved is 'all', expected an object or null"),
    "saved less": (_first_with("saved", value={"sizes": []}), "saved is .*, expected an object with follows, sizes"),
    "saved endless": (_first_with("saved", "elements", value=float("inf")), "saved: elements is inf, expected a num"),
    "saved NaN": (_first_with("saved", "elements", value=float("nan")), "saved: elements is nan, expected a number"),
    "calls a list": (_set("plans", 0, "calls", value=[]), r"calls is \[\], expected an object or null"),
    "calls more": (_first_with("calls", "code", value=""), "calls is .*, expected an object with dtypes"),
    "strides flat": (_first_with("calls", "strides", value=[1, 2, 3, 4]), "calls: strides is .*, expected strides"),
    "written code": (_first_with("calls", "written", value=["x"]), r"calls: written is \['x'\], expected equations"),
    "device a number": (_first_with("calls", "device", value=0), "calls: device is 0, expected a text or null"),
    "path text": (_set("plans", 0, "path", value="[(0, 1)]"), "plan 0: path is .*, expected pairs that consume each"),
    "path short": (_set("plans", 0, "path", value=[[0, 1], [2, 3]]), "path is .*, expected pairs that consume each"),
    "path long": (_set("plans", 0, "path", value=[[0, 1], [2, 3], [4, 5], [6, 7]]), "path is .*, expected pairs"),
    "path of three": (_set("plans", 0, "path", value=[[0, 1, 2], [3, 4], [4, 5]]), "path is .*, expected pairs"),
    "path twice": (_set("plans", 0, "path", value=[[0, 1], [0, 2], [4, 5]]), "path is .*, expected pairs"),
    "path with itself": (_set("plans", 0, "path", value=[[0, 0], [1, 2], [3, 4]]), "path is .*, expected pairs"),
    "path ahead": (_set("plans", 0, "path", value=[[0, 5], [1, 2], [3, 4]]), "path is .*, expected pairs"),
    "path negative": (_set("plans", 0, "path", value=[[0, -1], [1, 2], [4, 5]]), "path is .*, expected pairs"),
    "found_by escape": (_set("plans", 0, "found_by", value="\x1b[31m"), "found_by is .*, expected printable text"),
    "elements negative": (_set("plans", 0, "elements", value=-1), "elements is -1, expected a number or null"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused(file: Path, name: str) -> None:
    change, message = MALFORMED[name]
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=f"(?s)plans.json'.*{message}") as caught:
        OptimizedModule(contract).load_plans(file)
    assert "write the file anew with save_plans" in str(caught.value)
    assert not known._answers  # nothing was taken from it


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\x80\x04N."],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plans.json").write_bytes(content)
    with pytest.raises(PlanFileError, match=r"plans.json'.*; write the file anew with save_plans"):
        OptimizedModule(contract).load_plans(tmp_path / "plans.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"no plans can be read from '.*none.json' \(.*No such file"):
        OptimizedModule(contract).load_plans(tmp_path / "none.json")
    with pytest.raises(OSError, match="no folder"):
        OptimizedModule(contract).save_plans(tmp_path / "no folder" / "plans.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "lazy_einsum plans 2", "they are of 'lazy_einsum plans 2', this is 'lazy_einsum plans 1'"),
        ("version", "lazy_einsum 0.0.1", "they are of 'lazy_einsum 0.0.1', this is 'lazy_einsum 0.1.0, torch"),
        ("machine", "0", "constants of another machine"),
    ],
)
def test_plans_of_others_are_ignored(file: Path, field: str, value: str, message: str) -> None:
    data = json.loads(file.read_text())
    data[field] = value
    file.write_text(json.dumps(data))
    with pytest.warns(PlanFileWarning, match=message) as seen:
        assert OptimizedModule(contract).load_plans(file) == 0
    assert seen[0].filename == __file__
    assert not known._answers


@pytest.mark.parametrize("kind", ["cuda: NVIDIA H100 of another planet", "cpu: x86_64 AVX1024, threads: 1", "quantum"])
def test_plans_measured_elsewhere_are_ignored(file: Path, kind: str) -> None:
    data = json.loads(file.read_text())
    measured = [entry for entry in data["plans"] if entry["optimize"] == "measure"]
    assert measured
    for entry in measured:
        entry["calls"]["device"] = kind
    file.write_text(json.dumps(data))
    with pytest.warns(PlanFileWarning, match=kind):
        taken = OptimizedModule(contract).load_plans(file)
    others = {json.dumps(entry) for entry in data["plans"] if entry not in measured}
    assert taken == len(others) == len(known._answers)


def test_another_number_of_threads_is_another_device(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(PlanFileWarning, match="threads: 1"):
        OptimizedModule(contract).load_plans(file)


def test_files_add_up_and_the_last_one_counts(tmp_path: Path) -> None:
    networks, paths = (CHAIN, RING), {}
    for number, (equation, shapes) in enumerate(networks):
        model = OptimizedModule(contract)
        paths[equation] = model.prepare(equation, *inputs(shapes)).plans
        model.save_plans(tmp_path / f"{number}.json")
    forget()
    model = OptimizedModule(contract)
    counts = [model.load_plans(tmp_path / f"{number}.json") for number in (0, 1, 0, 1)]
    assert counts[:2] == counts[2:] and len(known._answers) == sum(counts[:2])
    assert all(model.prepare(equation, *inputs(shapes)).plans == paths[equation] for equation, shapes in networks)
    data = json.loads((tmp_path / "0.json").read_text())
    for entry in data["plans"]:
        entry["path"], entry["found_by"] = [[2, 3], [1, 4], [0, 5]], "my own taste"
    (tmp_path / "2.json").write_text(json.dumps(data))
    model = OptimizedModule(contract)
    model.load_plans(tmp_path / "2.json")  # what this process has found counts no more
    (chosen,) = model.prepare(CHAIN[0], *inputs(CHAIN[1])).plans
    assert (chosen.ssa_path, chosen.optimizer) == (((2, 3), (1, 4), (0, 5)), "my own taste")
    operands = inputs(CHAIN[1])
    torch.testing.assert_close(model(CHAIN[0], *operands), einsum(CHAIN[0], *operands), rtol=1e-10, atol=1e-10)


def test_any_order_in_a_file_gives_the_same_value(tmp_path: Path) -> None:
    """All that correctness needs of a path is that it is one."""
    equation, shapes = RING
    operands = [torch.randint(-9, 9, shape) for shape in shapes]
    network = network_of(equation, operands)
    first = OptimizedModule(contract)
    first.prepare(equation, *operands)
    first.save_plans(tmp_path / "plans.json")
    data = json.loads((tmp_path / "plans.json").read_text())
    start = plan_by_calls(network, None)[0].ssa_path
    orders = [start, *other_orders(network, start)]
    assert len(orders) > 5
    for order in orders:
        for entry in data["plans"]:
            entry["path"] = order
        (tmp_path / "plans.json").write_text(json.dumps(data))
        model = OptimizedModule(contract)
        model.load_plans(tmp_path / "plans.json")
        assert torch.equal(model(equation, *operands), einsum(equation, *operands))
        (chosen,) = next(iter(model.specializations.values())).plans
        assert chosen.ssa_path == order


def test_a_file_is_written_as_a_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    model = OptimizedModule(contract)
    model.prepare(CHAIN[0], *inputs(CHAIN[1]))
    model.save_plans(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        model.save_plans(path)
    monkeypatch.undo()
    assert path.read_text() == before and os.listdir(tmp_path) == ["plans.json"]

    failures: list[Exception] = []

    def write_and_read() -> None:
        try:
            for _ in range(20):
                model.save_plans(path)
                plan_file.read_plans(path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["plans.json"]


def test_a_wrapper_without_plans(tmp_path: Path) -> None:
    model = OptimizedModule(contract)
    assert model.save_plans(tmp_path / "plans.json") == 0
    model.prepare("ab,bc->ac", torch.rand(2, 3), torch.rand(3, 4))  # nothing to choose
    assert model.save_plans(tmp_path / "plans.json") == 0
    assert model.load_plans(tmp_path / "plans.json") == 0


def test_bounded() -> None:
    for size in range(3, 20):
        make_plan(EinsumSpec(("ab", "bc", "cd"), "ad"), [(size, 2), (2, 3), (3, 4)])
    assert 17 <= len(known._answers) <= known._answers.maxsize == known.MOST


# --- measured choice --------------------------------------------------------------------------------------------------


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, backwards)
    operands = inputs(EVEN[1])
    first = plan_by_calls(network_of(EVEN[0], operands), None)[0]
    model = OptimizedModule(contract, optimize="measure")
    entry = model.prepare(EVEN[0], *operands)
    assert counts == [fastest.MOST_TIMED]
    assert entry.plans[0].ssa_path != first.ssa_path
    assert entry.plans[0].optimizer.startswith("measurement: 250,000 us, of others 1,000,000 us")
    torch.testing.assert_close(model(EVEN[0], *operands), einsum(EVEN[0], *operands), rtol=1e-10, atol=1e-10)
    OptimizedModule(contract, optimize="measure").prepare(EVEN[0], *operands)
    assert len(counts) == 1  # once for each network
    OptimizedModule(contract).prepare(EVEN[0], *operands)
    assert len(counts) == 1


@pytest.mark.parametrize("others", [0.92, 1.0, 1.1, float("inf")])
def test_the_first_stays_unless_another_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, others: float) -> None:
    timed(monkeypatch, lambda place, program: others if place else 1.0)
    operands = inputs(EVEN[1])
    entry = OptimizedModule(contract, optimize="measure").prepare(EVEN[0], *operands)
    modelled = OptimizedModule(contract).prepare(EVEN[0], *operands)
    assert entry.plans[0].ssa_path == modelled.plans[0].ssa_path
    assert entry.code == modelled.code
    assert "measurement: 1,000,000 us" in entry.plans[0].optimizer


def test_what_slows_all_down_for_a_while_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # In two rounds of three the first one is a tenth slower than the last; as medians the last one is slower.
    rounds = [[1.0, 5.0, 5.0, 0.88], [9.0, 50.0, 50.0, 7.9], [1.0, 5.0, 5.0, 1.1]]
    monkeypatch.setattr(fastest, "time_programs", lambda programs, types: [took[: len(programs)] for took in rounds])
    operands = inputs(EVEN[1])
    entry = OptimizedModule(contract, optimize="measure").prepare(EVEN[0], *operands)
    assert entry.plans[0].optimizer.startswith("measurement: 1,100,000 us")


def test_nothing_could_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "time_programs", lambda programs, types: [])
    operands = inputs(EVEN[1])
    entry = OptimizedModule(contract, optimize="measure").prepare(EVEN[0], *operands)
    assert entry.plans == OptimizedModule(contract).prepare(EVEN[0], *operands).plans


@pytest.mark.parametrize("network", [CHAIN, RING, GRADIENTS, EIGHT])
@pytest.mark.parametrize("place", range(fastest.MOST_TIMED))
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, network: Any, place: int) -> None:
    timed(monkeypatch, lambda other, program: 0.1 if other == place else 1.0)
    equation, shapes = network
    operands = inputs(shapes, requires_grad=True)
    found = OptimizedModule(contract, optimize="measure", saved_limit=None)(equation, *operands)
    expected = einsum(equation, *operands)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    seed = torch.ones_like(expected)
    for mine, theirs in zip(torch.autograd.grad(found, operands, seed), torch.autograd.grad(expected, operands, seed)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_programs_are_timed_with_what_autograd_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward where the call has both, in the thread's own modes."""
    ran: list[tuple[bool, bool]] = []
    run = stopwatch._run

    def watched(function: Any, operands: Sequence[Tensor]) -> None:
        ran.append((torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), operands[0].requires_grad))
        assert [x.shape for x in operands] == list(EVEN[1]) and operands[1].stride() == (1, 31)
        run(function, operands)

    monkeypatch.setattr(stopwatch, "_run", watched)
    x, y, *rest = inputs(EVEN[1])
    for grad in (True, False):
        forget()
        ran.clear()
        operands = x.detach().requires_grad_(), y.T.contiguous().T, *rest
        with torch.set_grad_enabled(grad):
            OptimizedModule(contract, optimize="measure", saved_limit=None).prepare(EVEN[0], *operands)
        assert ran and set(ran) == {(True, grad)}


def test_orders_that_need_more_memory_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order as written has an intermediate of 250 million elements."""
    sizes = []

    def time_programs(programs: Sequence[Program], types: Sequence[TensorType]) -> list[list[float]]:
        sizes.extend(program.seconds for program in programs)
        return [[1.0 / (1 + place) for place in range(len(programs))]]

    monkeypatch.setattr(fastest, "time_programs", time_programs)
    monkeypatch.setattr("lazy_einsum.orders._FAR", 1e9)
    shapes = (500, 3), (3, 500), (500, 3)
    operands = inputs(shapes)
    entry = OptimizedModule(contract, optimize="measure").prepare("ab,cd,ef->", *operands)
    network = network_of("ab,cd,ef->", operands)
    assert len(other_orders(network, entry.plans[0].ssa_path)) == 2
    equation, shapes = "ab,bc,cd->ad", ((500, 2), (2, 500), (500, 2))
    entry = OptimizedModule(contract, optimize="measure").prepare(equation, *inputs(shapes))
    assert entry.plans[0].largest_intermediate <= 2 * 1000


def test_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, backwards)
    operands = inputs(CHAIN[1], requires_grad=True)
    network = network_of(CHAIN[0], operands)
    limit = SavedLimit((True,) * 4, tuple(x.numel() for x in operands), (0, 1, 2, 3))
    for ratio in (1.0, None):
        forget()
        model = OptimizedModule(contract, optimize="measure", saved_limit=ratio)
        (chosen,) = model.prepare(CHAIN[0], *operands).plans
        saved = plan.saved_elements(network.spec, chosen.shapes, chosen.ssa_path, limit)
        least = plan.saved_elements(network.spec, chosen.shapes, plan_by_calls(network, 1.0)[0].ssa_path, limit)
        assert (saved <= least) == (ratio is not None)
    forget()
    model = OptimizedModule(contract, optimize="measure", memory_limit=8 * 4000)
    (chosen,) = model.prepare(CHAIN[0], *operands).plans
    assert max(step.size for step in chosen.steps[:-1]) <= 4000
    forget()
    network = network_of(EIGHT[0], operands := inputs(EIGHT[1]))
    first = plan_by_calls(network, None)[0]
    sizes = [
        max(step.size for step in along(network, order, "", None).steps[:-1])
        for order in other_orders(network, first.ssa_path)
    ]
    most = max(step.size for step in first.steps[:-1])
    assert max(sizes[:5]) > most
    OptimizedModule(contract, optimize="measure", memory_limit=8 * most).prepare(EIGHT[0], *operands)


@pytest.mark.parametrize("n", [3, 4, 7, 12])
def test_neighbours_are_orders(n: int) -> None:
    spec, shapes = random_network(n, 2, n)
    network = network_of(str(spec), [torch.empty(shape) for shape in shapes])
    start = plan_by_calls(network, None)[0].ssa_path
    found = other_orders(network, start)
    assert start not in found and len(set(found)) == len(found)
    assert len(set(_neighbours(start))) == 2 * (n - 2)  # two for each value that is consumed
    for order in found:
        assert plan_file._is_path([list(step) for step in order], n)
        assert make_plan(spec, shapes, positions(order, n)).ssa_path == order


class Clock:
    """A clock that only its calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[int] = []

    def call(self, number: int, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.ran.append(number)

        return run


def test_rounds() -> None:
    clock = Clock()
    rounds = stopwatch.time_in_turns([clock.call(0, 2**-11), clock.call(1, 2**-8)], clock=lambda: clock.now)
    assert rounds == [[2**-11, 2**-8]] * stopwatch.ROUNDS
    # Each twice to begin with, then in turns, as many times as fill a round.
    assert clock.ran == [0, 0, 1, 1] + [0, 0, 0, 0, 1] * stopwatch.ROUNDS


@pytest.mark.parametrize(("seconds", "rounds"), [(0.6, 0), (0.1, 1), (0.05, 4), (30.0, 0)])
def test_the_budget(seconds: float, rounds: int) -> None:
    clock = Clock()
    calls = [clock.call(number, seconds) for number in range(3)]
    found = stopwatch.time_in_turns(calls, clock=lambda: clock.now)
    assert len(found) == rounds
    assert clock.now <= stopwatch.MOST_SECONDS + 2 * seconds


def test_what_fails_is_left_out() -> None:
    clock = Clock()

    def fail() -> None:
        raise torch.OutOfMemoryError("no memory")

    (took, *_) = stopwatch.time_in_turns([clock.call(0, 1e-3), fail], clock=lambda: clock.now)
    assert took == [pytest.approx(1e-3), float("inf")]
    huge = TensorType((2**60,), torch.float64, torch.device("cpu"), (1,))
    assert stopwatch.time_programs([Program(1, (), (), (), 0.0)], [huge]) == []


def test_nobody_notices() -> None:
    """Random numbers, modes, hooks, autocast's cache and profilers are as they were."""
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    operands = inputs(CHAIN[1], requires_grad=True)
    network = network_of(CHAIN[0], operands)
    program = plan_by_calls(network, None).lower(network, None)
    before = torch.get_rng_state()
    threads = threading.active_count()
    with (
        Mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append("packed") or x, lambda x: x),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.profiler.profile() as profile,
    ):
        rounds = stopwatch.time_programs([program], network.types)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert rounds and rounds[0][0] > 0
    assert not [name for name in seen if "autocast" not in name and "inference" not in name and "profiler" not in name]
    assert not [event.key for event in profile.key_averages() if "mm" in event.key or "mul" in event.key]
    assert torch.equal(torch.get_rng_state(), before)
    assert threading.active_count() == threads
    assert all(x.grad is None for x in operands)


def test_under_the_users_modes() -> None:
    operands = inputs(EVEN[1])
    expected = einsum(EVEN[0], *operands)
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu")):
        forget()
        with context:
            model = OptimizedModule(contract, optimize="measure")
            torch.testing.assert_close(model(EVEN[0], *operands), expected, rtol=1e-10, atol=1e-10)
        (entry,) = model.specializations.values()
        assert "measurement" in entry.plans[0].optimizer


# --- where there is nothing to measure --------------------------------------------------------------------------------


def test_only_for_sizes_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, backwards)
    model = OptimizedModule(contract, optimize="measure")
    model.prepare(CHAIN[0], *(torch.empty(shape, device="meta") for shape in CHAIN[1]))
    assert counts == []
    model = OptimizedModule(contract, optimize="measure", dynamic=True)
    for size in (20, 30):
        model.prepare(CHAIN[0], *inputs(((size, 300), *CHAIN[1][1:])))
    assert [entry.is_generic for entry in model.specializations.values()] == [False, True]
    assert len(counts) == 1


def test_frozen_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    class Factored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Parameter(torch.rand(6, 6)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return einsum("ni,ij,jk,kl->nl", x, self.a, self.b, self.c)

    counts = timed(monkeypatch, backwards)
    model = OptimizedModule(Factored(), optimize="measure", frozen=("a", "b"))
    with torch.no_grad():
        x = torch.rand(5, 6)
        torch.testing.assert_close(model(x), model.module(x))
    assert counts == [] and model.cache_info().fold_bytes


def test_parts_are_measured_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Part(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return einsum(CHAIN[0], *x)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, *x: Tensor) -> Tensor:
            return self.part(*x) * float(x[0].sum().item() > 0)

    counts = timed(monkeypatch, backwards)
    model = OptimizedModule(Whole(), optimize="measure", on_untraceable="ignore")
    model(*inputs(CHAIN[1]))
    model(*inputs(CHAIN[1]))
    assert len(counts) == 1
    assert model.save_plans(tmp_path / "plans.json") > 0


def test_copies_keep_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, backwards)
    operands = inputs(EVEN[1])
    model = OptimizedModule(contract, optimize="measure")
    first = model.prepare(EVEN[0], *operands)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.specializations
        assert other.prepare(EVEN[0], *operands).plans == first.plans
    assert len(counts) == 1  # in one process all know it


def test_only_wrappers_measure() -> None:
    x, y, z = (torch.rand(3, 3) for _ in range(3))

    def chain(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return einsum("ab,bc,cd->ad", x, y, z)

    with pytest.raises(RuntimeError, match="optimize='measure' is not a strategy"):
        optimize_einsums_full(chain, (x, y, z), {"optimize": "measure"})
    with pytest.raises(Exception, match="'measure' is for OptimizedModule"):
        torch.compile(chain, backend="lazy_einsum", options={"optimize": "measure"})(x, y, z)
    with pytest.raises(ValueError, match="optimize='measured' is not a strategy"):
        OptimizedModule(chain, optimize="measured")


def test_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    timed(monkeypatch, backwards)
    operands = inputs(EVEN[1])
    model = OptimizedModule(contract, optimize="measure")
    with caplog.at_level(logging.DEBUG, logger="lazy_einsum.plans"):
        report = model.explain(EVEN[0], *operands)
    said = "measurement: 250,000 us, of others 1,000,000 us, 500,000 us, 333,333 us"
    assert said in caplog.text
    assert f"order by {said}" in str(report)
    assert report.to_dict()["specializations"][0]["plans"][0]["optimizer"] == said
    assert said in report._repr_html_()


def test_logged_warnings_point_to_the_user(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OptimizedModule(contract, optimize="measure").prepare(CHAIN[0], *inputs(CHAIN[1]))


# --- ranks ------------------------------------------------------------------------------------------------------------


def _agree(folder: str, rank: int) -> None:
    """Each rank would find another order the fastest; the file of the first decides."""
    fastest.time_programs = lambda programs, types: [[1.0 - (place == rank + 1) / 2 for place in range(len(programs))]]
    operands = inputs(EVEN[1], requires_grad=True)
    try:
        alone = OptimizedModule(contract, optimize="measure", saved_limit=None)
        chosen = alone.prepare(EVEN[0], *operands).plans[0].ssa_path
        assert len(set(_gathered(chosen))) == 2
        path = f"{folder}/plans.json"
        if rank == 0:
            alone.save_plans(path)
        dist.barrier()
        model = OptimizedModule(contract, optimize="measure", saved_limit=None)
        model.load_plans(path)
        found = model(EVEN[0], *operands)
        (entry,) = model.specializations.values()
        assert len(set(_gathered((entry.plans[0].ssa_path, entry.code, str(found.tolist()))))) == 1
    finally:
        fastest.time_programs = stopwatch.time_programs
        forget()


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_that_load_one_file_agree(tmp_path: Path) -> None:
    from functools import partial

    ranks = Ranks(tmp_path)
    try:
        ranks.run(partial(_agree, str(tmp_path)))
    finally:
        ranks.stop()
