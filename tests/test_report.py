"""Reports: what they say of small models is so, in each form in which they say it."""

from __future__ import annotations

import builtins
import inspect
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lazy_einsum import OptimizedModule, Report, logs, timing
from lazy_einsum.figures import blas_kind, scaling
from lazy_einsum.passes import PASSES
from lazy_einsum.report import FoldReport, LeftReport, NetworkReport, OrderReport
from lazy_einsum.report_drawing import draw
from lazy_einsum.report_page import write_page
from lazy_einsum.report_text import n_bytes, seconds
from lazy_einsum.spec import EinsumSpec

WIDTH = 100


class Layers(nn.Module):
    """Two einsums that become one, scaled, a product that stands alone, and a part of a network that is a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.rand(64, 2))
        self.high = nn.Parameter(torch.rand(2, 64))
        self.register_buffer("basis", torch.rand(64, 64))

    def forward(self, x: Tensor, *, bias: Tensor) -> Tensor:
        weight = torch.einsum("or,ri->oi", self.low, self.high) * 0.5
        y = torch.einsum("ni,oi->no", x, weight)
        return torch.relu(y) @ self.basis + bias


LINES, FIRST = inspect.getsourcelines(Layers.forward)


def line(text: str) -> str:
    """``file:line`` of a line of ``Layers.forward``."""
    return f"{__file__}:{FIRST + next(number for number, code in enumerate(LINES) if text in code)}"


def layers_report(**options: Any) -> Report:
    return OptimizedModule(Layers()).explain(torch.rand(8, 64), bias=torch.rand(64), **options)


def chain(*operands: Tensor) -> Tensor:
    return torch.einsum("ij,jk,kl,l->i", *operands)


def chain_operands(n: int = 64) -> list[Tensor]:
    return [torch.rand(n, n), torch.rand(n, n), torch.rand(n, n), torch.rand(n)]


def network_of(report: Report) -> NetworkReport:
    (network,) = report.networks
    return network


# -- facts -----------------------------------------------------------------------------------------------------------


def test_what_was_fused_is_named_with_the_users_lines() -> None:
    report = layers_report()
    network = network_of(report)
    assert network.is_fused and report.specializations[0].repeated == ()
    assert [call.text for call in network.calls] == ["einsum 'or,ri->oi'", "einsum 'ni,oi->no'"]
    assert [call.where for call in network.calls] == [line("or,ri->oi"), line("ni,oi->no")]
    assert network.where == line("ni,oi->no")


def test_operands_have_the_users_names() -> None:
    operands = {operand.name: operand for operand in network_of(layers_report()).optimized.operands}
    assert {name: operand.kind for name, operand in operands.items()} == {
        "x": "argument",
        "low": "parameter",
        "high": "parameter",
    }
    assert operands["low"].where == line("or,ri->oi")
    assert operands["low"].bytes == 64 * 2 * 4


def test_names_of_nested_arguments_buffers_and_computed_values() -> None:
    def f(batch: dict[str, Tensor], *rest: Tensor) -> Tensor:
        return torch.einsum("ij,jk,kl->il", batch["x"].relu(), rest[0].reshape(8, 8), batch["y"])

    report = OptimizedModule(f).explain({"x": torch.rand(8, 8), "y": torch.rand(8, 8)}, torch.rand(64))
    names = [operand.name for operand in network_of(report).optimized.operands]
    assert names == ["relu of batch['x']", "reshape of rest[0]", "batch['y']"]

    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_buffer("table", torch.rand(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,jk,kl->il", x, self.inner.table, x)

    first, table, _ = network_of(OptimizedModule(Buffered()).explain(torch.rand(8, 8))).optimized.operands
    assert (first.name, table.name, table.kind) == ("x", "inner.table", "buffer")
    assert first.where == "" and table.where.startswith(__file__)


def test_names_of_what_is_held_twice_and_of_arguments_after_a_number() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.register_buffer("one", torch.rand(8, 8))
            self.register_buffer("two", self.one)

        def forward(self, n: int, x: Tensor) -> Tensor:
            return torch.einsum("ij,jk,kl->il", x, self.second.weight, self.two) * n

    model = OptimizedModule(Tied())
    for n in (2, 3, 4, 5):  # generic in the number, at last
        report = model.explain(n, torch.rand(8, 8))
        operands = network_of(report).optimized.operands
        assert [operand.kind for operand in operands] == ["argument", "parameter", "buffer"]
        assert operands[0].name == "x"
    assert report.specializations[0].is_generic


@torch.no_grad()
def test_figures_of_a_chain() -> None:
    n = 64
    network = network_of(OptimizedModule(chain).explain(*chain_operands(n)))
    optimized, written = network.optimized, network.written
    assert written is not None
    assert (network.naive_scaling, optimized.scaling) == (4, 2)
    assert network.naive_flops == 4 * n**4  # three products and a sum
    assert optimized.flops == 3 * 2 * n**2
    assert optimized.largest_bytes == 4 * n
    assert optimized.peak_bytes == 2 * 4 * n  # a vector and the next
    assert optimized.bytes == 3 * 4 * (n**2 + 2 * n)
    assert (optimized.saved_bytes, optimized.backward_seconds, optimized.backward_flops) == (None, None, 0)
    assert [step.kernel for step in optimized.steps] == ["mv"] * 3
    assert [step.blas for step in optimized.steps] == ["GEMV"] * 3
    assert optimized.steps[-1].remaining.startswith("a->")
    assert network.path == ((2, 3), (1, 2), (0, 1))
    assert network.order == "(operands[2], operands[3]), (operands[1], #4), (operands[0], #5)"
    assert optimized.seconds == pytest.approx(sum(step.seconds for step in optimized.steps))


def test_as_written_is_what_eager_does() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
        ab = torch.einsum("ij,jk->ik", a, b)
        return torch.einsum("ik,kl->il", ab, c) @ x

    n = 64
    network = network_of(OptimizedModule(f).explain(*chain_operands(n)))
    written = network.written
    assert written is not None
    assert written.flops == 2 * 2 * n**3 + 2 * n**2
    assert written.largest_bytes == 4 * n**2
    assert written.peak_bytes == 2 * 4 * n**2
    assert [step.kernel for step in written.steps] == ["einsum", "einsum", "matmul"]
    assert network.optimized.flops == 3 * 2 * n**2


def test_views_are_no_steps_and_values_live_until_their_last_use() -> None:
    n, x = 8, torch.rand(8, 64)

    def f(c: Tensor, d: Tensor) -> Tensor:
        half = c.permute(1, 0) * 0.5
        return torch.einsum("ij,jk,kl->il", half, d, half)

    written = network_of(OptimizedModule(f).explain(torch.rand(n, n), torch.rand(n, n))).written
    assert written is not None and [step.kernel for step in written.steps] == ["mul", "einsum", "einsum"]
    assert written.peak_bytes == 3 * 4 * n**2

    def g(c: Tensor, x: Tensor) -> Tensor:
        half = c * 0.5
        return torch.einsum("ik,kl->il", torch.einsum("ij,jk->ik", half, half), x)

    written = network_of(OptimizedModule(g).explain(torch.rand(n, n), x)).written
    assert written is not None and written.peak_bytes == 4 * (n**2 + n * 64)


def test_as_written_an_einsum_of_many_has_the_order_of_torch() -> None:
    n = 64
    operands = torch.rand(n, n).double(), torch.rand(n, n).double(), torch.rand(n).double().requires_grad_()
    network = network_of(OptimizedModule(lambda *abc: torch.einsum("ij,jk,k->i", *abc)).explain(*operands))
    written, optimized = network.written, network.optimized
    assert written is not None and [step.operands for step in written.steps] == [(1, 2), (0, 3)]
    assert written.largest_bytes == 8 * n
    assert written.backward_flops == written.flops == optimized.backward_flops
    assert written.backward_seconds == pytest.approx(optimized.backward_seconds)


def test_an_einsum_that_is_left_has_its_figures() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = torch.einsum("ij,jk->ik", x, w)
        w.mul_(2)
        return y

    network = network_of(OptimizedModule(f).explain(torch.rand(8, 8).requires_grad_(), torch.rand(8, 8), measure=True))
    optimized = network.optimized
    assert [step.kernel for step in optimized.steps] == ["einsum"] and network.optimizer == "no search"
    assert optimized.peak_bytes == 4 * 8**2 and optimized.saved_bytes is None
    assert optimized.measured_seconds is not None


@torch.no_grad()
def test_kernels_are_calls_that_do_work_and_memory_is_of_what_they_write() -> None:
    def report(equation: str, *shapes: tuple[int, ...]) -> OrderReport:
        child = lambda *operands: torch.einsum(equation, *operands)  # noqa: E731
        return network_of(OptimizedModule(child).explain(*map(torch.rand, shapes), measure=True)).optimized

    copied = report("jik,jkl->il", (8, 8, 8), (8, 8, 8))
    assert [step.kernel for step in copied.steps] == ["copy, mm"]
    assert copied.peak_bytes == 4 * (8**3 + 8**2)
    viewed = report("ji,jk,k->i", (8, 8), (8, 8), (8,))
    assert [step.kernel for step in viewed.steps] == ["mv", "mv"] and viewed.peak_bytes == 2 * 4 * 8
    # Products too small for a kernel of their own are written out: ``unbind`` gives several tensors.
    n = 20_000
    small = report("zij,zjk->zik", (n, 2, 2), (n, 2, 2))
    assert [step.kernel for step in small.steps] == ["2 x copy, mul, addcmul_, copy"]
    assert any("unbind" in text for text in small.steps[0].code)
    assert small.peak_bytes == 3 * 4 * 4 * n and small.measured_seconds is not None


@pytest.mark.parametrize(
    ("equation", "shapes", "kind", "n_labels"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], "GEMM", 3),
        ("ij,jk->ik", [(1, 3), (3, 4)], "GEMV", 2),
        ("ij,j->i", [(2, 3), (3,)], "GEMV", 2),
        ("i,i->", [(3,), (3,)], "DOT", 1),
        ("zij,zjk->zik", [(5, 2, 3), (5, 3, 4)], "batched GEMM", 4),
        ("zij,zjk->zik", [(1, 2, 3), (1, 3, 4)], "GEMM", 3),
        ("zi,zi->z", [(5, 3), (5, 3)], "batched DOT", 2),
        ("ij,ij->ij", [(2, 3), (2, 3)], "-", 2),
        ("ij,jk->ik", [(2, 1), (1, 4)], "-", 2),
        ("ij->i", [(2, 3)], "-", 2),
    ],
)
def test_kinds_of_products(equation: str, shapes: list[tuple[int, ...]], kind: str, n_labels: int) -> None:
    spec = EinsumSpec.parse(equation, list(map(len, shapes)))
    assert (blas_kind(spec, shapes), scaling(spec, shapes)) == (kind, n_labels)


def test_networks_that_a_pass_made_or_that_others_use_say_so() -> None:
    def update(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (w + a @ b)

    network = network_of(
        OptimizedModule(update).explain(
            torch.rand(8, 512), torch.rand(512, 512), torch.rand(512, 4), torch.rand(4, 512), measure=True
        )
    )
    assert network.made_by == "distribute" and network.written is None and network.unmeasured == ""

    def f(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        ab = torch.einsum("ij,jk->ik", a, b)
        return torch.einsum("ij,jk->ik", ab, x) + ab

    report = OptimizedModule(f).explain(*[torch.rand(8, 8) for _ in range(3)])
    assert [(network.made_by, network.shared_by) for network in report.networks] == [("", ()), ("", ())]


def test_backward_is_counted_where_autograd_follows() -> None:
    operands = [x.requires_grad_() for x in chain_operands()]
    model = OptimizedModule(chain)
    optimized = network_of(model.explain(*operands)).optimized
    assert optimized.backward_flops == 2 * optimized.flops
    assert optimized.saved_bytes == sum(4 * x.numel() for x in operands) + 2 * 4 * 64
    assert optimized.backward_seconds is not None and optimized.backward_seconds > 0
    with torch.no_grad():
        assert network_of(model.explain(*operands)).optimized.backward_seconds is None


def test_a_matrix_used_twice_gives_each_step_its_own_calls() -> None:
    network = network_of(
        OptimizedModule(lambda a, x: torch.einsum("ij,jk,kl,l->i", a, a, a, x)).explain(
            torch.rand(64, 64), torch.rand(64)
        )
    )
    assert [step.code for step in network.optimized.steps] == [
        ("v4 = v2.mv(v3)",),
        ("v5 = v1.mv(v4)",),
        ("return v0.mv(v5)",),
    ]


def test_what_is_shared() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("ij,jk,kl->il", a, b, c), torch.einsum("jk,ij,lk->il", b, a, d)

    report = OptimizedModule(f).explain(*[torch.rand(200, 200) for _ in range(4)])
    shared = [network for network in report.networks if network.made_by == "share"]
    assert len(report.networks) == 3 and len(shared) == 1
    assert set(shared[0].shared_by) == {network.name for network in report.networks if network is not shared[0]}
    assert shared[0].written is None


def test_equal_einsums_are_computed_once() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ij,jk->ik", a, b).relu() + torch.einsum("jk,ij->ik", b, a).tanh()

    report = OptimizedModule(f).explain(torch.rand(200, 200), torch.rand(200, 200))
    (entry,) = report.specializations
    assert len(entry.networks) == 1
    assert [call.text for call in entry.repeated] == ["einsum 'jk,ij->ik'"]
    assert "computed once, as another einsum gives the same: einsum 'jk,ij->ik'" in str(report)


@torch.no_grad()
def test_what_is_folded() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.rand(64, 64))
            self.b = nn.Parameter(torch.rand(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,ij,jk->nk", x, self.a, self.b)

    model = OptimizedModule(Factored(), frozen=True)
    model(torch.rand(300, 64))
    report = model.explain()
    assert network_of(report).folded == 1
    assert [step.kernel for step in network_of(report).optimized.steps] == ["computed once", "mm"]
    assert [step.seconds > 0 for step in network_of(report).optimized.steps] == [False, True]
    (fold,) = report.specializations[0].folds
    assert fold.names == ("a", "b") and fold.bytes == report.fold_bytes == 64 * 64 * 4


def reasons(f: Any, *args: Tensor, **options: Any) -> list[tuple[str, str]]:
    (entry,) = OptimizedModule(f, **options).explain(*args).specializations
    return [(left.call.text, left.reason) for left in entry.left]


def test_what_was_left_alone_has_the_reason_of_the_pass() -> None:
    a, b, x = torch.rand(8, 8), torch.rand(8, 8), torch.rand(8, 8)
    assert reasons(lambda a, b: a @ b, a, b) == [("matmul", "it stands alone: there is no other order")]
    ((_, reason), _) = reasons(lambda a, b, x: (a @ b) @ x, a, b, x)
    assert reason.startswith("as written ") and "by the cost model" in reason
    ((text, reason),) = reasons(
        lambda a, b, x: torch.einsum("ij,jk->ik", ab := torch.einsum("ij,jk->ik", a, b), x) + ab, a, b, x
    )
    assert text == "einsum 'ij,jk->ik'" and reason.endswith("its value is used more than once")
    half = [t.half() for t in (a, b)]
    ((_, reason),) = reasons(lambda a, b: a @ b, *half)
    assert reason == "the order of products in float16 is kept (reassociate=True)"
    ((_, reason),) = reasons(
        lambda a, b, x: torch.einsum("ij,jk->ik", torch.einsum("ij,jk->ik", a, b), x), a, b, x, reassociate=False
    )
    assert "reassociate=False" in reason
    bytes_ = torch.ones(8, 8, dtype=torch.uint8)
    ((_, reason),) = reasons(lambda a: torch.einsum("ij,jk->ik", a, a), bytes_)
    assert reason.startswith("it stays a call of torch.einsum: ")
    whole = torch.ones(8, 8, dtype=torch.int32)
    ((_, reason),) = reasons(lambda a: torch.einsum("ij,jk,kl->il", a, a, a), whole)
    assert reason == "its order is torch.einsum's: its result in int32 depends on the order"
    # Of a network that is left only the contractions are named, not the product by element or the sum.
    ((text, _),) = reasons(lambda a, b, x: ((a @ b) * x).sum(), a, b, x)
    assert text == "matmul"


def test_where_no_pass_ran_that_is_said() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return torch.einsum("ij,jk->ik", x, y)

    x = torch.rand(4, 4)
    assert reasons(f, x, x[:]) == [("einsum 'ij,jk->ik'", "inputs share memory that forward writes: no pass ran")]


def test_explain_does_not_run_the_model_and_leaves_the_cache() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return torch.einsum("ij,jk,kl->il", x, x, x)

    model = OptimizedModule(Counting())
    model.explain(torch.rand(4, 4))
    info, keys = model.cache_info(), list(model.specializations)
    assert info[:2] == (0, 1) and len(keys) == 1
    model.explain()
    model.explain(torch.rand(4, 4), measure=True)
    assert (model.cache_info(), list(model.specializations)) == (info, keys)
    assert model.module.calls == 0


def test_a_call_that_cannot_be_traced_is_explained_too() -> None:
    model = OptimizedModule(lambda x: x.sum().item())
    report = model.explain(torch.rand(3))
    assert not report.specializations and len(report.reasons) == 1 and __file__ in report.reasons[0]
    assert report.last_miss.startswith("can't be traced: ")
    with pytest.warns(match="runs as it is"):  # explaining has not used the warning up
        model(torch.rand(3))


def test_calls_as_written_are_timed_only_where_they_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 40_000  # the product of the two matrices takes 6.4 GB
    operands = torch.rand(n, 2), torch.rand(2, n), torch.rand(n, 2)

    def f(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a @ b) @ c

    def never(*_: Any) -> Any:
        raise AssertionError("the calls as written must not run")

    model = OptimizedModule(f)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_calls", never)
        report = model.explain(*operands, measure=True)
    network = network_of(report)
    assert network.written is not None and network.written.peak_bytes > 4 * n**2 and timing.MOST_BYTES == 2**30
    assert network.written.measured_seconds is None and network.eager_ratio is None is report.eager_ratio
    assert network.optimized.measured_seconds is not None
    assert network.unmeasured == "it takes 5.961 GiB of memory"
    assert (
        f"not timed: {network.unmeasured}" in str(report) and f"not timed: {network.unmeasured}" in report._repr_html_()
    )
    assert report.to_dict()["specializations"][0]["networks"][0]["unmeasured"] == network.unmeasured
    # No limit is lower than what runs in their place.
    monkeypatch.setattr(timing, "MOST_BYTES", 0)
    small = network_of(
        OptimizedModule(lambda a, b: torch.einsum("ij,jk->ik", a, b)).explain(*operands[1::-1], measure=True)
    )
    assert small.eager_ratio is not None and small.unmeasured == ""


def test_what_cannot_be_timed_says_why() -> None:
    def f(*operands: Tensor) -> Tensor:
        return torch.einsum("ij,jk,kl,lm,mn->in", *operands)

    empty = network_of(OptimizedModule(f).explain(*[torch.empty(8, 8, device="meta")] * 5, measure=True))
    assert empty.unmeasured == "its tensors have no data" and empty.optimized.measured_seconds is None
    bits = network_of(OptimizedModule(f).explain(*[torch.ones(4, 4, dtype=torch.bool)] * 5, measure=True))
    assert bits.unmeasured.startswith("it raises NotImplementedError: ") and bits.eager_ratio is None
    # In the order of torch.einsum.
    assert bits.written is not None and bits.optimized.flops == bits.written.flops == 4 * 2 * 4**3
    assert bits.optimized.peak_bytes == bits.written.peak_bytes == 3 * 4**2


@pytest.mark.parametrize("follows", [False, True])
def test_the_naive_loop_has_each_figure(follows: bool) -> None:
    n = 64
    report = OptimizedModule(chain).explain(*[x.requires_grad_(follows) for x in chain_operands(n)])
    naive = network_of(report).naive
    assert naive.bytes == 4 * (3 * n**2 + 2 * n) and naive.largest_bytes == naive.peak_bytes == 4 * n
    assert naive.seconds > 100 * network_of(report).optimized.seconds
    assert naive.backward_flops == 4 * naive.flops * follows
    assert naive.backward_seconds == (pytest.approx(4 * naive.seconds) if follows else None)
    assert naive.saved_bytes == (4 * (3 * n**2 + n) if follows else None)
    rows = {text[:24].strip(): text[24:].split() for text in str(network_of(report)).splitlines()}
    backward = ["FLOPs backward", "saved for backward", "predicted backward"] if follows else []
    for name in ["scaling", "FLOPs", "bytes moved", "largest intermediate", "peak memory", "predicted time", *backward]:
        assert len(rows[name]) in (3, 6), name  # a value for each, some with units
    assert ("FLOPs backward" in rows) == follows
    page = report._repr_html_()
    assert f'<td class="n">{n_bytes(naive.bytes)}</td>' in page and "ab,bc,c-&gt;a" in page  # what is left after a step


def test_misses_have_reasons() -> None:
    model = OptimizedModule(chain)
    assert model.explain().last_miss == ""
    model(*chain_operands(3))
    assert model.explain().last_miss == "first call"
    model(*chain_operands(3))
    model(*chain_operands(5))
    report = model.explain()
    assert report.last_miss == "argument 0: f32[5, 5] here, f32[3, 3] there"
    assert [miss.module for miss in report.misses] == ["chain", "chain"]
    assert (report.cache["hits"], [entry.hits for entry in report.specializations]) == (1, [1, 0])
    page = report._repr_html_()
    assert 0 < page.index(f'<td class="e">{report.last_miss}') < page.index('<td class="e">first call')


def test_a_miss_is_told_from_the_nearest_entry() -> None:
    model = OptimizedModule(lambda x, y: torch.einsum("ij,jk->ik", x, y), dynamic=False)
    for rows, dtype in ((3, torch.float64), (4, torch.float32), (5, torch.float64)):
        model(torch.rand(rows, 3, dtype=dtype), torch.rand(3, 3, dtype=dtype))
    assert model.explain().last_miss == "argument 0: f64[5, 3] here, f64[3, 3] there"

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.n_calls = Layers(), Layers(), 0

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            self.n_calls += 1
            return self.two(self.one(x, bias=bias), bias=bias)

    parts = OptimizedModule(Two(), on_untraceable="ignore")
    parts(torch.rand(8, 64), torch.rand(64))
    assert [miss.reason for miss in parts.explain().misses if miss.module == "Layers"] == ["first call"] * 2


def test_sizes_that_generic_code_serves_are_no_reason_for_a_miss() -> None:
    model, a, b = (
        OptimizedModule(lambda x, a, b: torch.einsum("ni,ij,jk->nk", x, a, b)),
        torch.rand(8, 8),
        torch.rand(8, 2),
    )
    for n in (30, 40, 50):
        model(torch.rand(n, 8), a, b)
    with torch.no_grad():
        model(torch.rand(60, 8), a, b)
    assert model.explain().last_miss == "grad: False here, True there"


def test_generic_code_is_reported_at_its_example() -> None:
    model = OptimizedModule(lambda x, a, b: torch.einsum("ni,ij,jk->nk", x, a, b))
    a, b = torch.rand(8, 8), torch.rand(8, 2)
    for n in (30, 40, 50):
        model(torch.rand(n, 8), a, b)
    report = model.explain(measure=True)
    generic = report.specializations[-1]
    assert generic.is_generic
    (network,) = generic.networks
    assert network.optimized.operands[0].shape == (50, 8) and network.eager_ratio is not None
    step = network.optimized.steps[-1]
    assert step.shape == (50, 2) and {type(number) for number in (*step.shape, step.flops, step.bytes)} == {int}
    json.dumps(report.to_dict(), allow_nan=False)


def test_stages_have_their_seconds() -> None:
    (entry,) = layers_report().specializations
    assert list(entry.stage_seconds) == [*entry.stages, "code"]
    assert sum(entry.stage_seconds.values()) == pytest.approx(entry.build_seconds)
    assert entry.stage_seconds["trace"] > 0


def test_einsums_whose_result_nobody_uses_are_marked() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        torch.einsum("ij,jk->ik", x, y)
        return torch.einsum("ij,kj->ik", x, y)

    used = [network.is_used for network in OptimizedModule(f).explain(torch.rand(4, 4), torch.rand(4, 4)).networks]
    assert used == [False, True]


class Counted(nn.Module):
    """Can't be traced as a whole: it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.n_calls = 0

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        self.n_calls += 1
        return self.layers(x, bias=bias)


def test_a_model_that_runs_in_parts_is_explained_by_its_parts() -> None:
    model, call = OptimizedModule(Counted(), on_untraceable="ignore"), (torch.rand(8, 64), torch.rand(64))
    before = model.explain(*call)
    assert before.reasons == ("forward sets self.n_calls",) and not before.specializations and not before.parts
    model(*call)
    report = model.explain(*call, measure=True)
    assert report.reasons == before.reasons and report.parts == {"layers": "specialized"}
    network = network_of(report)
    assert [operand.name for operand in network.optimized.operands] == ["x", "layers.low", "layers.high"]
    assert [operand.kind for operand in network.optimized.operands] == ["argument", "parameter", "parameter"]
    assert network.where == line("ni,oi->no") and network.eager_ratio is not None
    assert "\nruns as it is: forward sets self.n_calls\nlayers: specialized\n" in str(report)
    page = report._repr_html_()
    assert "Runs as it is: forward sets self.n_calls" in page
    assert '<td class="e">layers</td><td class="e">specialized</td>' in page
    assert model.module.n_calls == 1 and model.cache_info().fallbacks == 1
    assert model.explain().reasons == report.reasons  # asked for no call, it knows of the one that ran


def test_code_of_a_backend_is_explained_as_other_code_is() -> None:
    x, bias = torch.rand(8, 64), torch.rand(64)
    model = OptimizedModule(Layers(), backend="aot_eager")
    reports = [model.explain(x, bias=bias)]
    model(x, bias=bias)
    reports += [model.explain(x, bias=bias), model.explain(measure=True)]
    assert [report.specializations[0].tier for report in reports] == ["aot_eager"] * 3
    assert [report.specializations[0].hits for report in reports] == [0, 1, 1]
    assert reports[-1].cache["tiers"] == {"aot_eager": 1} and "runs through aot_eager;" in reports[-1]._repr_html_()
    assert network_of(reports[0]) == network_of(reports[1]) == network_of(layers_report())
    assert network_of(reports[-1]).eager_ratio is not None


def test_four_threads_explain_at_once() -> None:
    model, bias = OptimizedModule(Layers(), dynamic=False), torch.rand(64)
    sizes, start, found = (3, 8, 20, 50), threading.Barrier(4), []

    def work(number: int) -> None:
        start.wait()
        for n in sizes[number:] + sizes[:number]:
            x = torch.rand(n, 64)
            report = model.explain(x, bias=bias, measure=number == 0)
            str(report), json.dumps(report.to_dict(), allow_nan=False)
            model(x, bias=bias)
            found.append((n, network_of(report).optimized.flops))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {
        n: network_of(OptimizedModule(Layers()).explain(torch.rand(n, 64), bias=bias)).optimized.flops for n in sizes
    }
    assert sorted(found) == sorted(list(alone.items()) * 4)
    assert model.cache_info()[:2] == (16, 4)  # each explained and called by each thread, and built once
    assert [miss.reason for miss in model.explain().misses].count("first call") == 1


def test_a_call_that_fell_back_has_its_reason_once() -> None:
    def f(x: Tensor) -> Tensor:
        return x * x.sum().item()

    model = OptimizedModule(f)
    with pytest.warns(match="runs as it is"):
        model(torch.rand(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, known = model.explain(torch.rand(3)), model.explain()
    assert report.reasons == known.reasons and len(report.reasons) == 1
    assert report.reasons[0].endswith(f"{__file__}:{f.__code__.co_firstlineno + 1}")
    assert report.cache["fallbacks"] == known.cache["fallbacks"] == 1
    assert "Runs as it is: " in report._repr_html_() and report.eager_ratio is None and report.largest_bytes == 0


# -- measured --------------------------------------------------------------------------------------------------------


def test_measured_steps_stand_beside_the_predictions() -> None:
    report = layers_report(measure=True)
    network = network_of(report)
    assert all(step.measured_seconds > 0 for step in network.optimized.steps)  # type: ignore[operator]
    assert network.written is not None and network.written.measured_seconds is not None
    assert network.eager_ratio == pytest.approx(
        network.written.measured_seconds / network.optimized.measured_seconds  # type: ignore[operator]
    )
    assert report.eager_ratio == network.eager_ratio
    assert "measured" in str(report) and "measured" in report._repr_html_()
    assert layers_report().eager_ratio is None
    rows = str(network).splitlines()[-len(network.optimized.steps) :]
    for row, step in zip(rows, network.optimized.steps, strict=True):
        assert row.endswith(f" {seconds(step.measured_seconds)}")  # type: ignore[arg-type]


def test_all_networks_together_take_as_long_as_each_of_them() -> None:
    (entry,) = (report := layers_report(measure=True)).specializations

    def timed(written_seconds: float, seconds: float) -> NetworkReport:
        (network,) = entry.networks
        assert network.written is not None
        written = replace(network.written, measured_seconds=written_seconds)
        return replace(network, written=written, optimized=replace(network.optimized, measured_seconds=seconds))

    apart = replace(timed(8, 1), written=None)  # made by a pass: there is nothing to compare it with
    entry = replace(entry, networks=(timed(4, 1), apart, timed(1, 1)))
    assert replace(report, specializations=(entry,)).eager_ratio == 2.5


def once(call: Callable[[], Any], _: Any) -> float:
    """In the place of what takes the time: a second for each call."""
    call()
    return 1.0


def test_the_time_of_a_step_is_that_of_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_time", once)
    steps = network_of(layers_report(measure=True)).optimized.steps
    assert [step.measured_seconds for step in steps] == [len(step.code) for step in steps]
    assert sum(len(step.code) for step in steps) > len(steps)


def test_no_more_is_alive_while_steps_are_timed_than_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, list[weakref.ref[Tensor]]] = {"operate": [], "_call": []}
    most = dict.fromkeys(results, 0)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(timing, name)

        def watch(*args: Any) -> Any:
            result = real(*args)
            results[name].append(weakref.ref(result))
            most[name] = max(most[name], sum(found() is not None for found in results[name]))
            return result

        return watch

    def products(x: Tensor, *matrices: Tensor) -> Tensor:
        for matrix in matrices:
            x = torch.einsum("ij,jk->ik", x, matrix)
        return x

    for name in results:
        monkeypatch.setattr(timing, name, watched(name))
    monkeypatch.setattr(timing, "_time", once)
    network = network_of(OptimizedModule(products).explain(*[torch.rand(8, 8) for _ in range(9)], measure=True))
    assert network.eager_ratio == 1 and len(network.optimized.steps) == 8
    assert len(results["_call"]) == 8 and len(results["operate"]) >= 16  # each is timed, and gives the next its operand
    assert most["_call"] == 2 and most["operate"] <= 3


def test_measuring_draws_no_random_numbers_and_is_seen_by_no_mode() -> None:
    model = OptimizedModule(Layers())
    model.prepare(torch.rand(8, 64), bias=torch.rand(64))
    before = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        assert model.explain(measure=True).eager_ratio is not None
    assert torch.equal(torch.get_rng_state(), before) and counter.get_total_flops() == 0


def test_tensors_that_repeat_their_memory_are_timed() -> None:
    a, b = torch.rand(64, 1).expand(64, 64), torch.empty(64, 0)
    for operands in ((a, a, a), (a, b, b.mT)):
        report = OptimizedModule(lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c)).explain(*operands, measure=True)
        assert network_of(report).optimized.measured_seconds is not None


# -- forms -----------------------------------------------------------------------------------------------------------


def forty_operands() -> tuple[Any, list[Tensor]]:
    """A chain of forty with a few labels across."""
    terms = [[f"i{n}", f"i{n + 1}"] for n in range(40)]
    for one, two in ((0, 20), (5, 30), (12, 25)):
        terms[one].append(f"x{one}")
        terms[two].append(f"x{one}")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(itertools.chain(*terms)))}
    sublists = [[numbers[label] for label in term] for term in terms]

    def f(*operands: Tensor) -> Tensor:
        return torch.einsum(
            *[item for pair in zip(operands, sublists, strict=True) for item in pair], [0, numbers["i40"]]
        )

    return f, [torch.rand([2] * len(term)) for term in terms]


def e3nn_report() -> Report:
    o3 = pytest.importorskip("e3nn.o3")
    product = o3.FullyConnectedTensorProduct("4x0e+4x1o", "1x0e+1x1o", "4x0e+4x1o")
    return OptimizedModule(product).explain(torch.rand(16, 16), torch.rand(16, 4))


@pytest.fixture(params=["layers", "measured", "forty", "e3nn"], scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    if request.param == "e3nn":
        return e3nn_report()
    if request.param == "forty":
        child, operands = forty_operands()
        return OptimizedModule(child).explain(*operands)
    return layers_report(measure=request.param == "measured")


def test_text_fits_a_hundred_columns(report: Report) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(max(map(len, str(network).splitlines())) <= WIDTH for network in report.networks)
    assert "def forward" in text and "last miss: first call" in text


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A report with other texts where they are the user's, keys of mappings included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): with_texts(item, change) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(with_texts(item, change) for item in value)
    if not is_dataclass(value):
        return value
    kept = {"made_by", "optimizer", "blas", "cache"}
    texts = {f.name: with_texts(getattr(value, f.name), change) for f in fields(value) if f.name not in kept}
    return replace(value, **texts)  # type: ignore[type-var]


def report_with_all() -> Report:
    """A report that has something of each kind."""
    (entry,) = layers_report(measure=True).specializations
    network = replace(entry.networks[0], unmeasured="it raises", folded=1, is_used=False)
    networks = network, replace(network, made_by="share", shared_by=("a", "b")), replace(network, made_by="distribute")
    call, fold = network.calls[0], FoldReport(("a", "b"), 4, "a + b")
    entry = replace(entry, reason="none", networks=networks, repeated=(call,), folds=(fold,))
    entry = replace(entry, left=(LeftReport(call, "it stands alone"),))
    return replace(layers_report(), specializations=(entry,), reasons=("it counts",), parts={"part": "specialized"})


def test_all_texts_of_the_user_are_escaped_in_the_page(tmp_path: Path) -> None:
    page = read_page(write_page(with_texts(report_with_all(), lambda text: f"<b>{text}")))
    assert "b" not in page.counts
    named = replace(report_with_all(), name="Größe")
    named.save(tmp_path / "named.html")
    assert "<h1>Größe</h1>" in (tmp_path / "named.html").read_text(encoding="utf-8")


def test_all_texts_of_the_user_are_wrapped_or_shortened() -> None:
    for long in ("x" * 150, "word " * 30):
        lines = str(with_texts(report_with_all(), lambda text, long=long: f"{text} {long}")).splitlines()  # type: ignore[misc]
        assert max(map(len, lines)) <= WIDTH


def test_times_of_years_have_their_unit() -> None:
    n = 10**7
    report = OptimizedModule(lambda a, b: torch.einsum("ij,jk->ik", a, b)).explain(
        *[torch.empty(n, n, device="meta")] * 2
    )
    rows = str(report).splitlines()
    (row,) = [text for text in rows if "2.00e21" in text and "GEMM" in text]
    assert row.endswith(" s") and len(row) <= WIDTH


def test_a_long_name_of_a_class_is_wrapped() -> None:
    kind = type("Long" * 40, (nn.Module,), {"forward": lambda self, x: torch.einsum("ij,jk,kl->il", x, x, x)})
    report = OptimizedModule(kind()).explain(torch.rand(4, 4))
    words = [text for text in str(report).splitlines() if "Long" not in text]
    assert max(map(len, str(report).splitlines())) <= WIDTH and "Long" in str(report) and words


def test_data_goes_through_json(report: Report) -> None:
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [entry["code"] for entry in data["specializations"]] == [entry.code for entry in report.specializations]


class Page(HTMLParser):
    """Checks that what is opened is closed, and counts."""

    VOID = frozenset({"meta", "circle", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_one_well_formed_file_without_scripts(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    report.save(file)
    text = file.read_text(encoding="utf-8")
    page = read_page(text)
    assert text.startswith("<!doctype html>") and page.counts["html"] == page.counts["main"] == page.counts["h1"] == 1
    trees = sum(1 + (network.written is not None) for network in report.networks)
    assert page.counts["svg"] == trees and page.counts["table"] > 3 and page.counts["details"] > 1
    assert not {"script", "link", "img", "iframe"} & page.counts.keys()
    assert not [item for item in page.attributes if item[1] in ("src", "href", "onclick")] and "http" not in text
    assert "prefers-color-scheme: dark" in text
    steps = sum(len(network.optimized.steps) + len(network.optimized.operands) for network in report.networks)
    assert page.counts["circle"] > steps
    assert len(text.encode()) < 2_000_000


def test_a_notebook_gets_the_page_without_its_frame(report: Report) -> None:
    page = read_page(report._repr_html_())
    assert "html" not in page.counts and page.counts["main"] == 1
    assert report._repr_html_().count("<summary>network 1: ") == len(report.specializations)


def test_what_scrolls_and_what_opens_can_be_reached_by_keyboard(report: Report) -> None:
    page = read_page(report._repr_html_())
    assert page.counts["summary"] == page.counts["details"]
    regions = [item for item in page.attributes if item[1:] == ("role", "region")]
    assert len(regions) == len(report.specializations) and ("div", "tabindex", "0") in page.attributes
    svgs = [item for item in page.attributes if item[0] == "svg" and item[1] == "aria-label"]
    assert len(svgs) == page.counts["svg"]


def test_names_of_the_user_are_escaped() -> None:
    child = nn.Module()
    child.forward = lambda x: torch.einsum("ij,jk->ik", x["<b>"], x["<b>"])  # type: ignore[method-assign, assignment]
    text = OptimizedModule(child).explain({"<b>": torch.rand(3, 3)})._repr_html_()
    assert "&lt;b&gt;" in text and "<b>" not in text


def test_a_page_of_forty_operands_draws_them_all() -> None:
    child, operands = forty_operands()
    network = network_of(OptimizedModule(child).explain(*operands))
    drawing = draw(network.optimized, max(step.flops for step in network.optimized.steps))
    assert ".." in str(network).splitlines()[0]  # the equation is shown in short
    assert len(drawing.spots) == 79 and len(drawing.lines) == 78
    assert sorted(spot.x for spot in drawing.spots if spot.level < 0) == list(range(40))
    assert all(drawing.spots[line.start].y < drawing.spots[line.end].y for line in drawing.lines)
    widths = {line.width for line in drawing.lines}
    assert min(widths) >= 1 and all(math.isfinite(width) for width in widths)


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = layers_report().plot()
    assert len(figure.axes) == 2
    assert [len(axes.lines) for axes in figure.axes] == [5, 4]  # with the scaling as a step of its own
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    report = layers_report()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'lazy_einsum\[plot\]'"):
        report.plot()


def test_a_newcomer_finds_out_in_one_line_each() -> None:
    report = e3nn_report()
    fused = [network for network in report.networks if network.is_fused]
    assert len(report.fused) == len(fused) == 4
    assert all("tensordot" in text and "->" in text for text in report.fused)
    assert len(report.orders) == len(report.networks)
    assert any("reshape of weight" in order for order in report.orders)
    assert report.largest_bytes == 16 * 4 * 3 * 3 * 4
    assert report.last_miss == "first call"


# -- logs and profiles -----------------------------------------------------------------------------------------------


@pytest.fixture
def loggers() -> Iterator[None]:
    """Takes back what ``configure`` does."""
    yield
    for name in logs.NAMES:
        logger = logging.getLogger(f"lazy_einsum.{name}")
        logger.setLevel(logging.NOTSET)
        logger.handlers.clear()


@pytest.mark.parametrize("reshapes", [True, False])
def test_what_adds_a_bias_or_reshapes_is_made_of_calls(reshapes: bool) -> None:
    """The last call of a network lives on under its own name; the report has it among what the network is made of."""

    def khatri_rao(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        k = (a[:, None] * b).reshape(-1, 100) if reshapes else a @ b.mT @ a
        return torch.nn.functional.linear(x, k, bias[: k.shape[0]])

    def regrouped(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return ((a[:, None] * b).reshape(-1, 100) @ x.mT).reshape(80, 80 * len(x)) @ bias[: 80 * len(x)]

    operands = torch.rand(7, 100), torch.rand(80, 100), torch.rand(80, 100), torch.rand(6400)
    for child in (khatri_rao, regrouped) if reshapes else (khatri_rao,):
        report = OptimizedModule(child).explain(*operands)
        (network,) = report.networks
        last = "linear" if child is khatri_rao else "matmul"
        assert network.made_by == "" and network.calls[-1].text.split(" ")[0] == last
        assert network.written is not None
        assert network.written.seconds > network.optimized.seconds


def test_passes_plans_and_code_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = OptimizedModule(chain)
    with caplog.at_level(logging.DEBUG, "lazy_einsum"):
        model(*chain_operands())
    texts: dict[str, list[str]] = {}
    for record in caplog.records:
        texts.setdefault(record.name.removeprefix("lazy_einsum."), []).append(record.getMessage())
    assert len(texts["passes"]) == 1 + len(PASSES) and "fuse_einsums" in " ".join(texts["passes"])
    assert " nodes, " in texts["passes"][0] and all(" to " in text for text in texts["passes"][1:])
    assert "def forward" in texts["code"][0] and "ab,bc,cd,d->a" in texts["plans"][0]
    assert all("chain" in text and "f32[64, 64]" in text for found in texts.values() for text in found)
    assert texts["cache"][0].endswith(f": first call; built in {model.explain().misses[0].seconds * 1e3:.1f} ms")


def test_a_variable_turns_logs_on(loggers: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({logs.VARIABLE: "cache, graph_breaks"})
    logs.configure({logs.VARIABLE: "cache"})  # a second time adds no second handler
    OptimizedModule(chain)(*chain_operands())
    OptimizedModule(lambda x: x.sum().item(), on_untraceable="ignore")(torch.rand(3))
    lines = capsys.readouterr().err.splitlines()
    assert [text.split(":")[0] for text in lines] == ["lazy_einsum.cache", "lazy_einsum.graph_breaks"]
    assert "chain: miss for (f32[64, 64]" in lines[0] and "runs as it is" in lines[1]


def test_an_unknown_log_is_refused() -> None:
    with pytest.raises(ValueError, match="names plan; expected some of cache,graph_breaks,plans,passes,code"):
        logs.configure({logs.VARIABLE: "cache,plan"})


def test_the_variable_is_read_in_a_new_process() -> None:
    program = "import torch, lazy_einsum; lazy_einsum.OptimizedModule(lambda x: x + 1)(torch.rand(3))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, logs.VARIABLE: "cache"}
    )
    assert done.returncode == 0 and "lazy_einsum.cache: <lambda>: miss for (f32[3])" in done.stderr


def test_a_profile_shows_specializations_and_contractions_by_name() -> None:
    model, operands = OptimizedModule(chain), chain_operands()
    expected = model(*operands)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        first = OptimizedModule(chain)(*operands)
        found = model(*operands)
        model(*operands)
    assert torch.equal(found, expected) and torch.equal(first, expected)
    counts = {event.key: event.count for event in profile.key_averages()}
    whole = "lazy_einsum: chain(f32[64, 64], f32[64, 64], f32[64, 64], f32[64])"
    assert counts[whole] == 3 and counts["einsum ab,bc,cd,d->a"] == 3
    assert counts["aten::mv"] == 9


def test_without_a_profiler_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, operands = OptimizedModule(chain), chain_operands()
    (entry,) = [model.prepare(*operands)]
    monkeypatch.setattr(entry, "run_named", None)
    model(*operands)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), pytest.raises(TypeError):
        model(*operands)


def test_a_profile_keeps_gradients_and_results_in_containers() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": torch.einsum("ij,jk,kl->il", x, x, x)}

    model, x = OptimizedModule(Pair()), torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        (found,) = torch.autograd.grad(model(x)["y"].sum(), x)
    (expected,) = torch.autograd.grad((x @ x @ x).sum(), x)
    torch.testing.assert_close(found, expected)
