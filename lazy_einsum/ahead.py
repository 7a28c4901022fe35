"""Compiling ahead, in a process of its own: what a backend makes there is in its caches on disk when a call needs it.

Why a process: AOTAutograd keeps the state of torch's random generator while it traces, and puts it back, so in a thread
it would undo what others draw meanwhile. And a thread holds the others up: it takes Python's lock, for a training step
0.24 s in one case. What is left for the call is to look the code up: of 6.1 s that a small network with gradients took
to compile, 0.8 s (both on a busy machine).
"""

from __future__ import annotations

import atexit
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .backends import INDUCTOR, Backend, find_backend
from .compiled import NotCompilableError, compile_module, describe, given_to_backend
from .signature import TensorType
from .specialize import Specialization

_LENGTH = struct.Struct("<Q")

# Inductor looks for code that was made under the same ones.
_FLAGS_OF = torch.backends.cuda.matmul
_FLAGS = (
    "fp32_precision",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def _precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@dataclass(frozen=True, slots=True)
class Request:
    """What Inductor is to compile.

    Attributes:
        module: a graph.
        types: of its inputs.
        grad: whether autograd follows.
        options: ``mode`` and ``options``, as ``OptimizedModule`` takes them.
        threads: of torch.
        dtype: the default one.
        precision: of float32 products, see ``torch.set_float32_matmul_precision``; ``None`` where it was set for each
            kind of device on its own, for which torch has no answer.
        flags: of ``torch.backends.cuda.matmul``.
        deterministic: see ``torch.use_deterministic_algorithms``.
    """

    module: fx.GraphModule
    types: tuple[TensorType, ...]
    grad: bool
    options: Mapping[str, Any]
    threads: int = field(default_factory=torch.get_num_threads)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    precision: str | None = field(default_factory=_precision)
    flags: Mapping[str, Any] = field(default_factory=lambda: {name: getattr(_FLAGS_OF, name) for name in _FLAGS})
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)


class Job:
    """A request under way.

    Attributes:
        error: what went wrong; empty where nothing did.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error = ""

    @property
    def is_done(self) -> bool:
        """Whether it came to an end."""
        return self._done.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most so long; whether it is."""
        return self._done.wait(seconds)

    def finish(self, error: str = "") -> None:
        """Note that it is done."""
        self.error = error
        self._done.set()


class Worker:
    """The other process, and the thread that waits for it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Job, bytes]] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def submit(self, request: Request) -> Job | None:
        """Have something compiled, after all that was submitted before; ``None`` where it can't be sent."""
        try:
            data = pickle.dumps(request)
        except Exception:  # a graph may call functions of the user's that have no name to import them by
            return None
        if self._owner != os.getpid():  # (A child of fork has no thread, and shares the process with its parent.)
            self._queue, self._process, self._owner = queue.SimpleQueue(), None, os.getpid()
            threading.Thread(target=self._work, args=(self._queue,), daemon=True).start()
        job = Job()
        self._queue.put((job, data))
        return job

    def stop(self) -> None:
        """End the process."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            process.kill()

    def _work(self, jobs: queue.SimpleQueue[tuple[Job, bytes]]) -> None:
        while True:
            job, data = jobs.get()
            try:
                job.finish(self._ask(data))
            except Exception as error:  # whoever waits has to hear of it: there is no Python to start, say
                job.finish(f"the process that compiles ahead can't be reached: {describe(error)}")

    def _ask(self, data: bytes) -> str:
        """The answer to a request."""
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, "-m", "lazy_einsum.ahead"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        process = self._process
        with suppress(BrokenPipeError):
            _write(process.stdin, data)
        answer = _read(process.stdout)
        if answer is not None:
            return answer.decode()
        self._process = None
        with suppress(BrokenPipeError), process:  # closes the pipes and waits
            pass
        return f"the process that compiles ahead ended with status {process.returncode}"


def _write(stream: Any, data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _read(stream: Any) -> bytes | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data: bytes = stream.read(length)
    return data if len(data) == length else None


worker = Worker()
"""That of this process."""

atexit.register(worker.stop)


def compile_ahead(entry: Specialization, backend: Backend) -> Job | None:
    """Have ``backend`` compile ``entry`` in the other process; ``None`` where that is of no use, or can't be done: the
    backend has no caches on disk, or its graph can't be sent.
    """
    if not backend.has_disk_cache:
        return None
    try:
        given = given_to_backend(entry, backend)
    except NotCompilableError:
        return None
    return worker.submit(Request(given.module, given.types, given.grad, backend.options))


def serve(requests: Any, answers: Any) -> None:
    """Compile what comes, and answer with an empty text, or with what went wrong, until nothing comes any more."""
    while (data := _read(requests)) is not None:
        try:
            _compile(pickle.loads(data))
            text = ""
        except Exception as error:
            text = describe(error)
        _write(answers, text.encode())


def _compile(request: Request) -> None:
    torch.set_num_threads(request.threads)
    torch.set_default_dtype(request.dtype)
    if request.precision is not None:  # first: it sets some of the others too
        torch.set_float32_matmul_precision(request.precision)
    for name, value in request.flags.items():
        setattr(_FLAGS_OF, name, value)
    torch.use_deterministic_algorithms(request.deterministic)
    backend = find_backend(INDUCTOR, request.options)
    assert backend is not None
    compile_module(backend, request.module, request.types, request.grad)


def main() -> None:
    """The process: requests on standard input, answers on standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    if hasattr(os, "nice"):
        os.nice(10)  # it has more time than the training beside it
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
