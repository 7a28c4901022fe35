"""Parts: submodules that are specialized on their own: those with hooks, which specialized code calls; where a module
can't be traced as a whole, all of its submodules; and what ``DistributedDataParallel`` wraps.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import ambient as ambient_module
from .cache import Cache, Kind
from .dispatch import Call, Dispatcher, OnStage, Settings
from .distributed import wrapped_by
from .errors import UntraceableError
from .live import Caller, PartCall, has_own_call, is_compiled, is_made_by_compile, is_part, plain_call
from .specialize import Specialization

SPECIALIZED = "specialized"
IDLE = "nothing to optimize"

PATIENCE = 8
"""So many calls of a kind in a row without specialized code in any part, and others of the kind run without dispatchers
of parts, which take some 10 us a part, but for one in ``_TRIAL``: which parts are called may depend on values.
"""
_TRIAL = 64
_MAX_FRUITLESS = 1024


class WholeDispatcher(Dispatcher):
    """Calls the child of a wrapper; where that can't be traced, its submodules are specialized."""

    def __init__(self, name: str, settings: Settings, cache: Cache) -> None:
        super().__init__(name, settings, cache)
        self._parts: dict[str, PartDispatcher] = {}
        self._inner: WholeDispatcher | None = None
        self._installed: list[PartCall] = []
        self._users = 0
        self._active = threading.local()
        self._fruitless: dict[Hashable, int] = {}  # calls by kind
        self.served = 0
        """Calls of parts that ran specialized code."""

    # -- the whole

    def prepare(self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialization:
        """The specialization for a call, built where there is none, without calling anything."""
        wrapped = wrapped_by(child)
        if wrapped is not None:
            name, module = wrapped
            return self._dispatcher_inside(name).prepare(module, args, kwargs)
        return super().prepare(child, args, kwargs)

    def _look_up(self, call: Call, shapes: Hashable = None) -> Any:
        wrapped = wrapped_by(call.child)
        if wrapped is None:
            return super()._look_up(call, shapes)
        # What it does around the call of its module is communication, which is never recorded.
        name, module = wrapped
        with self._install([(self._dispatcher_inside(name), module)]), self._activate(True):
            return call.run_child()

    def _dispatcher_inside(self, name: str) -> WholeDispatcher:
        with self.cache.lock:
            if self._inner is None:
                self._inner = WholeDispatcher(self._qualified(name), self.settings, self.cache)
            return self._inner

    def run_as_it_is(self, call: Call) -> Any:
        """Run the child's own code, calls of its submodules each through a dispatcher, where that is of use."""
        if not isinstance(call.child, nn.Module):
            return call.run_child()
        values = (*call.args, *call.kwargs.values())
        shapes = tuple(value.shape for value in values if isinstance(value, torch.Tensor) and not value.is_nested)
        kind = _likeness(call.child, call.args, call.kwargs), torch.is_grad_enabled(), shapes
        count = self._fruitless.get(kind, 0)
        if count >= PATIENCE and count % _TRIAL:
            result = call.run_child()
        else:
            served = self.served
            result = self.run_in_parts(call, self.name)
            if self.served != served:
                count = -1
        with self.cache.lock:
            if len(self._fruitless) >= _MAX_FRUITLESS:
                self._fruitless.clear()
            self._fruitless[kind] = count + 1
        return result

    def describe_parts(self) -> str:
        """What became of submodules, in words."""
        done = [name for name, state in self.cache.parts.items() if state == SPECIALIZED]
        left = {name: state for name, state in self.cache.parts.items() if state not in (SPECIALIZED, IDLE)}
        text = f"; specialized on their own: {', '.join(done)}" if done else ""
        return text + "".join(f"; {name} runs as it is: {reason}" for name, reason in left.items())

    # -- its parts

    @property
    def is_active(self) -> bool:
        """Whether calls of submodules in this thread go through dispatchers."""
        return getattr(self._active, "value", False)

    @contextmanager
    def _activate(self, active: bool) -> Iterator[None]:
        """Let calls of submodules in this thread go through dispatchers, or not."""
        before = self.is_active
        self._active.value = active
        try:
            yield
        finally:
            self._active.value = before

    def run_in_parts(self, call: Call, name: str) -> Any:
        """Run the own code of the child, or of its submodule ``name``, calls of submodules each through a
        dispatcher.
        """
        with self._install(self._candidates(call.child, name)), self._activate(True):
            return call.run_child()

    @contextmanager
    def _install(self, parts: Iterable[tuple[Dispatcher, nn.Module]]) -> Iterator[None]:
        # In the live modules, where other threads see it too: for those it does nothing (see _caller). Only while
        # the child runs: afterwards it is as it was.
        with self.cache.lock:
            if not self._users:
                self._installed = [PartCall(self._caller(part), module) for part, module in parts]
                for call in self._installed:
                    call.install()
            self._users += 1
        try:
            yield
        finally:
            with self.cache.lock:
                self._users -= 1
                if not self._users:
                    for call in self._installed:
                        call.remove()
                    self._installed = []

    def _candidates(self, child: nn.Module, prefix: str) -> Iterator[tuple[Dispatcher, nn.Module]]:
        for name, module in child.named_modules(prefix=prefix):
            if module is not child and not self._is_plain(module) and not self.settings.is_leaf(module, name):
                yield self._part(name), module

    @staticmethod
    def _is_plain(module: nn.Module) -> bool:
        """Whether ``module`` has no dispatcher of its own in any case."""
        # torch's own layers hold no contraction beside the one that they are.
        origin = type(module).__module__
        plain = origin.startswith("torch.nn.modules.") and not module._modules
        other = isinstance(module, torch.jit.ScriptModule) or origin.startswith("lazy_einsum.")
        return plain or other or is_compiled(module) or is_made_by_compile(module) or has_own_call(module)

    def _part(self, name: str) -> PartDispatcher:
        with self.cache.lock:
            if name not in self._parts:
                self._parts[name] = PartDispatcher(name, self)
            return self._parts[name]

    def _caller(self, part: Dispatcher) -> Caller:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.is_active:
                return plain_call(module)(*args, **kwargs)
            if not isinstance(part, PartDispatcher):
                with self._activate(False):
                    return part(module, args, kwargs)
            if ambient_module.saved_tensor_hooks() is not None:
                # A checkpoint runs it a second time when nothing is installed, and compares what both runs save.
                with self.cache.lock:
                    self.cache.parts[part.name] = "called by a checkpoint, or under other saved-tensor hooks"
                return plain_call(module)(*args, **kwargs)
            if part.is_idle(module, args, kwargs):
                with self._activate(False):
                    return plain_call(module)(*args, **kwargs)
            return part(module, args, kwargs)

        return call

    def _hooked(self, name: str) -> Caller:
        return self.hooked_part(self._qualified(name))

    def hooked_part(self, name: str) -> Caller:
        """What calls the submodule ``name`` from specialized code, which has it as a live call because it has hooks:
        these run as ever, around the specialized ``forward``.
        """
        # Generated code is kept for longer than the cache that it was made for.
        whole = weakref.ref(self)

        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            dispatcher = whole()
            if dispatcher is None or dispatcher._is_plain(module):
                return module(*args, **kwargs)
            part = dispatcher._part(name)
            if part.is_idle(module, args, kwargs):
                return (plain_call(module) if is_part(module) else module)(*args, **kwargs)
            return part(module, args, kwargs)

        return call


class PartDispatcher(Dispatcher):
    """Calls one submodule of a child: one that has hooks, or one of a child that can't be traced as a whole.

    Args:
        name: of the submodule.
        whole: what calls the child.
    """

    def __init__(self, name: str, whole: WholeDispatcher) -> None:
        # What calls a live module was traced with the strides that eager gives.
        options = replace(whole.settings.options, exact=True)
        super().__init__(name, replace(whole.settings, options=options), whole.cache)
        self._whole = weakref.ref(whole)
        self._idle: set[Hashable] = set()

    def is_idle(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is nothing to optimize in calls like this one."""
        return bool(self._idle) and _likeness(module, args, kwargs) in self._idle

    def build(self, call: Call, kind: Kind, on_stage: OnStage | None = None) -> tuple[Specialization, tuple[Any, ...]]:
        """Make code for a call, and note where that is not worth it."""
        entry, values = super().build(call, kind, on_stage)
        if not self._is_worth_it(entry):
            self._idle.add(_likeness(call.child, call.args, call.kwargs))
        else:
            self._note_served()
        return entry, values

    def _run(self, entry: Specialization, values: tuple[Any, ...], *call: Any) -> Any:
        self._note_served()
        return super()._run(entry, values, *call)

    def _note_served(self) -> None:
        whole = self._whole()
        if whole is not None:
            whole.served += 1

    def store(self, entry: Specialization) -> None:
        """Keep ``entry`` where that is worth it."""
        with self.cache.lock:
            self.cache.parts[self.name] = SPECIALIZED if self._is_worth_it(entry) else IDLE
        if self._is_worth_it(entry):
            super().store(entry)

    def _is_worth_it(self, entry: Specialization) -> bool:
        """Whether passes found anything to do, or a backend may."""
        return self.settings.backend is not None or entry.stages["trace"] != entry.code

    def fall_back(self, call: Call, error: UntraceableError | None, kind: Kind | None) -> Any:
        """Run the submodule itself: its own submodules may still be specialized. Where the whole runs in parts too,
        the warning is the whole's.
        """
        whole = self._whole()
        assert whole is not None  # it is being called
        in_parts = whole.is_active
        result = call.run_child() if in_parts else whole.run_in_parts(call, self.name)
        if error is not None:
            with self.cache.lock:
                self.cache.parts[self.name] = str(error)
                again = kind is not None and self.cache.refuse(kind, call.mode)
            if not in_parts:
                self.warn(call, str(error), again)
        return result

    def _hooked(self, name: str) -> Caller:
        whole = self._whole()
        assert whole is not None  # it is being called
        return whole.hooked_part(self._qualified(name))


def _likeness(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What decides which way a submodule's code takes, as far as that can be told at once."""
    values = (*args, *kwargs.values())
    flags = tuple(value if isinstance(value, (bool, str, type(None))) else type(value) for value in values)
    return module.training, len(args), tuple(kwargs), flags
