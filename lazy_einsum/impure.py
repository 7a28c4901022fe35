"""``Watch``: finds calls, while ``forward`` is traced, of functions whose effect or result no record of torch calls
has: ``print``, clocks, the environment, files, logging, modules from elsewhere.
"""

from __future__ import annotations

import builtins
import contextvars
import datetime
import gc
import io
import logging
import os
import queue
import random
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

_FUNCTIONS: dict[str, tuple[Any, ...]] = {}
for _module, _names in (
    (builtins, "print input open breakpoint"),
    (io, "open"),
    (os, "urandom system getpid"),
    (
        time,
        "time time_ns perf_counter perf_counter_ns monotonic monotonic_ns process_time process_time_ns thread_time "
        "thread_time_ns",
    ),
):
    for _name in _names.split():
        _FUNCTIONS[_name] = (*_FUNCTIONS.get(_name, ()), getattr(_module, _name))

# Methods of C classes, by name: what their object must be an instance of, or, if it is a class, derived from.
_METHODS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("write", "writelines"), io.IOBase),
    **dict.fromkeys(("now", "utcnow", "today"), datetime.date),
    **dict.fromkeys(("initial_seed", "get_state", "set_state", "seed", "manual_seed"), torch.Generator),
    **dict.fromkeys(("wait_stream", "wait_event", "record_event"), torch.Stream),
    **dict.fromkeys(("record", "wait", "synchronize", "query", "elapsed_time"), (torch.Stream, torch.Event)),
}

_CODE: dict[types.CodeType, str] = {
    logging.Logger._log.__code__: "logs",
    type(os.environ).__getitem__.__code__: "reads the environment",
    type(os.environ).__iter__.__code__: "reads the environment",
    type(os.environ).__setitem__.__code__: "changes the environment",
    **dict.fromkeys(
        (torch.random.manual_seed.__code__, torch.random.seed.__code__, torch.random.set_rng_state.__code__),
        "seeds torch's random generator",
    ),
    torch.random.initial_seed.__code__: "asks for the seed",
    torch.random.get_rng_state.__code__: "asks for the state of torch's random generator",
}
# What torch says and does of devices of their own: streams, and the one in use, are no part of the key.
for _module, _enters, _names in (
    (torch.cuda, "device StreamContext", "current_device set_device current_stream set_stream synchronize"),
    (torch.xpu, "device StreamContext", "current_device set_device current_stream set_stream synchronize"),
    (
        torch.accelerator,
        "device_index",
        "current_device_index set_device_index current_stream set_stream synchronize",
    ),
):
    for _name in _names.split():
        _CODE[getattr(_module, _name).__code__] = f"calls {_module.__name__}.{_name}()"
    for _name in _enters.split():
        _CODE[getattr(_module, _name).__enter__.__code__] = f"enters a {_name} of {_module.__name__}"
for _module in (torch.cuda.random, torch.xpu.random, torch.mps):
    for _name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all"):
        if hasattr(_module, _name):
            _CODE[getattr(_module, _name).__code__] = f"seeds torch's random generator of {_module.__name__}"
    for _name in ("initial_seed", "get_rng_state", "get_rng_state_all"):
        if hasattr(_module, _name):
            _CODE[getattr(_module, _name).__code__] = f"asks for the state of the generator of {_module.__name__}"
# (Where somebody has replaced the function, nothing is this object.)
_PYTHON_GENERATOR: Any = getattr(random.random, "__self__", object())
_TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")
_MODULES = os.path.join(_TORCH, "nn", "")  # which only call what is the user's
# Around functions that torch.compile is to leave alone.
_WRAPPERS = frozenset(os.path.join(_TORCH, *path) for path in (("_compile.py",), ("_dynamo", "eval_frame.py")))
_OTHERS = (*(os.path.join(sysconfig.get_paths()[name], "") for name in ("stdlib", "purelib", "platlib")), "<frozen ")
# Whatever lies in these files is for its effects.
_FILES = {
    module.__file__: f"uses {module.__name__}"
    for module in (threading, queue, subprocess, socket, torch.cuda.memory, torch.cuda.streams, torch.cuda.graphs)
}
_MODULE_CALL = nn.Module._wrapped_call_impl.__code__
_MODULE_INIT = nn.Module.__init__.__code__


class Called(NamedTuple):
    """A call of a Python function.

    Attributes:
        code: of the function.
        variables: its global variables.
        free: identities of what its variables of enclosing functions hold, 0 of those that hold nothing.
        owner: its first argument, if that is a class, else the class of that.
    """

    code: types.CodeType
    variables: dict[str, Any]
    free: tuple[int, ...]
    owner: type

    @classmethod
    def of(cls, frame: types.FrameType) -> Called:
        """The call that a frame has just begun."""
        code = frame.f_code
        values = frame.f_locals if code.co_argcount or code.co_freevars else {}
        first: Any = values.get(code.co_varnames[0]) if code.co_argcount else None
        kind: type = type(first)
        # (Not isinstance, which may run code of the object's.)
        owner: type = first if issubclass(kind, type) else kind
        free = tuple(id(values[name]) if name in values else 0 for name in code.co_freevars)
        return cls(code, frame.f_globals, free, owner)


class Watch:
    """A context in which such a call in this thread raises.

    It uses ``sys.setprofile``, which sees calls of C functions too, in one thread, and costs nothing while it is off.
    (Replacing the functions was rejected: other threads would see it. Reading the code was: a ``print`` under ``if
    verbose`` is no reason to refuse.) Where a profiler of somebody else's is at work, it stays off.

    Args:
        refuse: makes the error for a reason.
        is_own: whether a module is a stand-in of this trace, so that its calls are seen anyway.
        use: called with each context variable that is used, and the name of the method.
        made: called with the class of each module that is made.

    Attributes:
        ran: the code of the functions that were called, and of those that are not of installed packages a call of each
            function, by its variables; ``None`` where it stayed off.
    """

    def __init__(
        self,
        refuse: Callable[[str], Exception],
        is_own: Callable[[nn.Module], bool],
        use: Callable[[contextvars.ContextVar[Any], str], None],
        made: Callable[[type[nn.Module]], None],
    ) -> None:
        self._refuse = refuse
        self._is_own = is_own
        self._use = use
        self._tell_made = made
        self._running = False
        self._pauses = 0
        self._made: dict[int, nn.Module] = {}
        self.ran: dict[types.CodeType, dict[tuple[int, ...], Called]] | None = None

    def __enter__(self) -> None:
        self._running = sys.getprofile() is None
        self.ran = {} if self._running else None
        self._set()

    def __exit__(self, *error: object) -> None:
        if self._running:
            if sys.getprofile() != self._see:
                self.ran = None  # somebody else has come in between
            sys.setprofile(None)
        self._running = False
        self._made.clear()

    def pause(self) -> None:
        """Off, until ``resume`` is called as often as this."""
        self._pauses += 1
        if self._running and self._pauses == 1:
            sys.setprofile(None)

    def resume(self) -> None:
        """See ``pause``."""
        self._pauses -= 1
        self._set()

    def _tell(self, listener: Callable[..., None], *what: Any) -> None:
        self.pause()
        try:
            listener(*what)
        finally:
            self.resume()

    def _is_known(self, module: nn.Module) -> bool:
        """Whether what a module holds is seen: it is a stand-in, or was made inside of ``forward``."""
        return id(module) in self._made or self._is_own(module)

    def _set(self) -> None:
        if self._running and not self._pauses:
            sys.setprofile(self._see)

    def _see(self, frame: types.FrameType, event: str, argument: Any) -> None:
        reason = None
        if event == "c_call":
            reason = _reason(argument)
            if argument is sys.setprofile and frame.f_code.co_filename != __file__:
                reason = "sets a profiler"
            owner = getattr(argument, "__self__", None)
            if type(owner) is contextvars.ContextVar and not _is_internal(frame):
                self._tell(self._use, owner, argument.__name__)
        elif event == "call":
            code = frame.f_code
            if self.ran is not None:
                _note(self.ran, frame)
            reason = _CODE.get(code) or _FILES.get(code.co_filename)
            if code is _MODULE_INIT:
                module = frame.f_locals["self"]
                self._made[id(module)] = module
                self._tell(self._tell_made, type(module))
            if code is _MODULE_CALL and not self._is_known(frame.f_locals["self"]):
                kind = type(frame.f_locals["self"])
                reason = f"calls a {kind.__name__} that is not reached from the module (a global, a closure)"
        if reason is not None:
            caller = frame if event == "c_call" else frame.f_back
            if not _is_internal(caller) and not _is_collecting(caller):
                raise self._refuse(f"forward {reason}")


def _note(ran: dict[types.CodeType, dict[tuple[int, ...], Called]], frame: types.FrameType) -> None:
    """Note the call that a frame has just begun."""
    code = frame.f_code
    calls = ran.get(code)
    if calls is None:
        calls = ran[code] = {}
        if code.co_filename.startswith(_OTHERS):
            return
    elif not calls:
        return
    if not code.co_freevars and (id(frame.f_globals),) in calls:
        return
    call = Called.of(frame)
    calls.setdefault((id(call.variables), *call.free), call)


def _is_collecting(frame: types.FrameType | None) -> bool:
    """Whether Python's garbage collector, at work in between, called what called ``frame``."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _is_internal(frame: types.FrameType | None) -> bool:
    """Whether torch made a call for ends of its own (symbolic sizes, its logs), by way of other packages or not."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _WRAPPERS:
            if name.startswith(_TORCH) and not name.startswith(_MODULES):
                return True
            if not name.startswith(_OTHERS):
                return False
        frame = frame.f_back
    return False


def _reason(function: Any) -> str | None:
    """Why a C function may not be called, in words."""
    name = getattr(function, "__name__", None)
    if name in _FUNCTIONS and any(function is known for known in _FUNCTIONS[name]):
        return f"calls {name}()"
    if getattr(function, "__self__", None) is _PYTHON_GENERATOR:
        return "draws from or seeds Python's random generator"
    if name in _METHODS:
        owner = function.__self__
        if isinstance(owner, _METHODS[name]) or (isinstance(owner, type) and issubclass(owner, _METHODS[name])):
            kind = owner if isinstance(owner, type) else type(owner)
            return f"calls {kind.__name__}.{name}()"
    return None
