"""Compiling in another process: calls go on meanwhile, and what goes wrong there is said here."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, einsum, nn

from lazy_einsum import BackendWarning, OptimizedModule, ahead, dispatch
from lazy_einsum.ahead import Job, Request, Worker, serve
from lazy_einsum.backends import find_backend
from lazy_einsum.signature import TensorType

pytestmark = [pytest.mark.filterwarnings("default::DeprecationWarning")]

SECONDS = 900


class Net(nn.Module):
    """Contractions and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return einsum("ij,jk,kl->il", x, self.w, self.w).tanh()


def rows(n: int = 3) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.stop()


def request(**changes: object) -> Request:
    module = torch.fx.symbolic_trace(lambda x: (x.sin() + 1,))
    given = {"module": module, "types": (TensorType.of(rows()),), "grad": False, "options": {}}
    return Request(**{**given, **changes})


def test_calls_go_on_until_the_code_is_there() -> None:
    child = Net()
    wrapped = OptimizedModule(copy.deepcopy(child), backend="inductor", compile_after=1)
    x = rows()
    seen = []
    for _ in range(4):
        torch.testing.assert_close(wrapped(x), child(x))
        seen.append(dict(wrapped.cache_info().tiers))
    assert seen == [{"eager": 1}] * 4
    assert wrapped.cache_info().compile_seconds == 0
    (entry,) = wrapped.specializations.values()
    assert entry.job.wait(SECONDS)
    assert entry.job.error == ""
    ours, theirs = wrapped(x), child(x)
    torch.testing.assert_close(ours, theirs)
    assert dict(wrapped.cache_info().tiers) == {"inductor": 1}
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), list(wrapped.parameters())),
        torch.autograd.grad(theirs.sum(), list(child.parameters())),
    )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are asked for, which nobody does."""
    found: list[Job] = []

    def compile_ahead(entry: object, backend: object) -> Job:
        found.append(Job())
        return found[-1]

    monkeypatch.setattr(dispatch, "compile_ahead", compile_ahead)
    return found


def test_each_signature_is_sent_once(jobs: list[Job]) -> None:
    wrapped = OptimizedModule(Net(), backend="aot_eager", compile_after=2, dynamic=False)
    x = rows()
    for _ in range(2):
        wrapped(x)
    assert jobs == []
    for _ in range(5):
        wrapped(x)
    wrapped(rows(7))  # comes too rarely
    assert len(jobs) == 1 and dict(wrapped.cache_info().tiers) == {"eager": 2}
    jobs[0].finish()
    wrapped(x)
    assert dict(wrapped.cache_info().tiers) == {"aot_eager": 1, "eager": 1}
    wrapped(x)
    assert len(jobs) == 1


def test_calls_do_not_wait_for_what_other_threads_build(jobs: list[Job]) -> None:
    wrapped = OptimizedModule(Net(), backend="aot_eager", compile_after=1)
    x = rows()
    for _ in range(2):
        wrapped(x)
    assert len(jobs) == 1
    held, done = threading.Event(), threading.Event()

    def build() -> None:
        with wrapped._dispatcher.cache.building:
            held.set()
            done.wait(SECONDS)

    builder = threading.Thread(target=build)
    builder.start()
    held.wait(SECONDS)
    caller = threading.Thread(target=wrapped, args=(x,), daemon=True)
    caller.start()
    caller.join(20)
    waits = caller.is_alive()
    done.set()
    builder.join()
    caller.join()
    assert not waits


def test_what_fails_there_runs_as_eager(jobs: list[Job], caplog: pytest.LogCaptureFixture) -> None:
    child = Net()
    wrapped = OptimizedModule(child, backend="aot_eager", compile_after=1)
    x = rows()
    for _ in range(2):
        wrapped(x)
    jobs[0].finish("KeyError: a fault")
    match = "could not be compiled in the background: KeyError"
    with caplog.at_level("INFO", "lazy_einsum.cache"), pytest.warns(BackendWarning, match=match):
        torch.testing.assert_close(wrapped(x), child(x))
    assert "KeyError: a fault" in caplog.text
    info = wrapped.cache_info()
    assert info.backend_failures == 1 and dict(info.tiers) == {"eager": 1} and info.compile_seconds == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(x)
    assert len(jobs) == 1


def test_in_the_call(jobs: list[Job]) -> None:
    wrapped = OptimizedModule(Net(), backend="aot_eager", compile_after=1, background=False)
    x = rows()
    for _ in range(2):
        wrapped(x)
    assert jobs == [] and dict(wrapped.cache_info().tiers) == {"aot_eager": 1}
    with pytest.raises(ValueError, match="background must be True or False, got 'no'"):
        OptimizedModule(Net(), background="no")


def test_others_compile_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = OptimizedModule(Net(), backend="aot_eager", compile_after=1)
    for _ in range(2):
        wrapped(rows())
    assert dict(wrapped.cache_info().tiers) == {"aot_eager": 1}
    inductor = find_backend("inductor", {})
    assert inductor is not None and inductor.has_disk_cache
    import torch._inductor.config

    with torch._inductor.config.patch(force_disable_caches=True):
        assert not inductor.has_disk_cache
    (entry,) = wrapped.specializations.values()
    sent: list[Request] = []
    monkeypatch.setattr(ahead.worker, "submit", sent.append)
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert ahead.compile_ahead(entry, inductor) is None
    assert sent == []
    ahead.compile_ahead(entry, inductor)
    assert [len(request.types) for request in sent] == [2] and sent[0].grad


def test_a_wrapper_is_copied_with_its_choice() -> None:
    wrapped = OptimizedModule(Net(), backend="aot_eager", background=False)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert copied._dispatcher.settings.background is False


# -- the process


def test_faults_of_the_process(worker: Worker) -> None:
    modes = "no such mode", "nor this one"
    for job, mode in zip([worker.submit(request(options={"mode": mode})) for mode in modes], modes, strict=True):
        assert job is not None and job.wait(SECONDS)
        assert job.error.startswith("ValueError: Unrecognized mode") and mode in job.error
    process = worker._process
    assert process is not None and process.poll() is None
    worker.stop()
    process.wait()
    lost = worker.submit(request())
    assert lost is not None and lost.wait(SECONDS)
    assert lost.error == "the process that compiles ahead ended with status -9"
    again = worker.submit(request(options={"mode": "no such mode"}))
    assert again is not None and again.wait(SECONDS) and "Unrecognized mode" in again.error
    assert worker._process is not process


def test_an_end_while_somebody_waits(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.sys, "executable", "/bin/cat")  # which ends at once: there is no file of that name
    job = worker.submit(request())
    assert job is not None and job.wait(SECONDS)
    assert job.error == "the process that compiles ahead ended with status 1"


@pytest.mark.parametrize(("python", "error"), [("/no/such/python", "FileNotFoundError"), (None, "TypeError")])
def test_no_process(worker: Worker, monkeypatch: pytest.MonkeyPatch, python: str | None, error: str) -> None:
    monkeypatch.setattr(ahead.sys, "executable", python)  # none where Python is part of another program
    for _ in range(2):
        job = worker.submit(request())
        assert job is not None and job.wait(SECONDS) and f"can't be reached: {error}" in job.error


def test_graphs_that_can_not_be_sent(worker: Worker) -> None:
    module = torch.fx.symbolic_trace(lambda x: (x + 1,))
    module.register_buffer("open", None)
    module.file = open(__file__)  # noqa: SIM115
    with module.file:
        assert worker.submit(request(module=module)) is None


def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of this process are those of the other one: all, also those that others of them set."""
    seen = []
    name = "fp32_precision"

    def compile_module(backend: object, module: object, types: object, grad: bool) -> None:
        precision = torch.get_float32_matmul_precision(), getattr(torch.backends.cuda.matmul, name)
        seen.append((grad, torch.get_default_dtype(), *precision))
        if not grad:
            raise KeyError("a fault")

    monkeypatch.setattr(ahead, "compile_module", compile_module)
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    flags = request().flags
    try:
        sent, answers = io.BytesIO(), io.BytesIO()
        for grad, precision, flag in ((True, "high", "tf32"), (False, "highest", "none")):
            changed = {**flags, name: flag}
            given = request(grad=grad, dtype=torch.float64, precision=precision, flags=changed)
            ahead._write(sent, pickle.dumps(given))
        sent.write(b"\1")  # the other process went away
        sent.seek(0)
        serve(sent, answers)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision(before[1])
        setattr(torch.backends.cuda.matmul, name, flags[name])
    assert seen == [(True, torch.float64, "high", "tf32"), (False, torch.float64, "highest", "none")]
    answers.seek(0)
    assert [ahead._read(answers), ahead._read(answers), ahead._read(answers)] == [b"", b"KeyError: 'a fault'", None]


def test_requests_hold_the_settings_of_now() -> None:
    with_defaults = request()
    assert with_defaults.threads == torch.get_num_threads()
    assert (with_defaults.dtype, with_defaults.precision) == (torch.float32, torch.get_float32_matmul_precision())
    assert pickle.loads(pickle.dumps(with_defaults)).types == with_defaults.types
