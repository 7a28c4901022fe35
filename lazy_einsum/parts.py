"""Parts: where a module can't be traced as a whole, its submodules are specialized, each on its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import ambient as ambient_module
from .cache import Cache, Kind
from .dispatch import Call, Dispatcher, OnStage, Settings
from .errors import UntraceableError
from .live import PartCall, has_own_call, is_compiled, is_made_by_compile, plain_call
from .specialize import Specialization

SPECIALIZED = "specialized"
IDLE = "nothing to optimize"


class WholeDispatcher(Dispatcher):
    """Calls the child of a wrapper; where that can't be traced, its submodules are specialized."""

    def __init__(self, settings: Settings, cache: Cache) -> None:
        super().__init__("", settings, cache)
        self._parts: dict[str, PartDispatcher] = {}
        self._installed: list[PartCall] = []
        self._users = 0
        self._active = threading.local()

    def run_as_it_is(self, call: Call) -> Any:
        """Run the child's own code, calls of its submodules each through a dispatcher."""
        if not isinstance(call.child, nn.Module):
            return call.run_child()
        with self._install(call.child), self._activate(True):
            return call.run_child()

    def describe_parts(self) -> str:
        """What became of submodules, in words."""
        done = [name for name, state in self.cache.parts.items() if state == SPECIALIZED]
        left = {name: state for name, state in self.cache.parts.items() if state not in (SPECIALIZED, IDLE)}
        text = f"; specialized on their own: {', '.join(done)}" if done else ""
        return text + "".join(f"; {name} runs as it is: {reason}" for name, reason in left.items())

    @contextmanager
    def _activate(self, active: bool) -> Iterator[None]:
        """Let calls of submodules in this thread go through dispatchers, or not."""
        before = getattr(self._active, "value", False)
        self._active.value = active
        try:
            yield
        finally:
            self._active.value = before

    @contextmanager
    def _install(self, child: nn.Module) -> Iterator[None]:
        # In the live modules, where other threads see it too: for those it does nothing (see _call_part). Only while
        # the child runs: afterwards it is as it was.
        with self.cache.lock:
            if not self._users:
                self._installed = [PartCall(self._part(name), module) for name, module in self._candidates(child)]
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

    def _candidates(self, child: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in child.named_modules():
            # torch's own layers hold no contraction beside the one that they are.
            origin = type(module).__module__
            plain = origin.startswith("torch.nn.modules.") and not module._modules
            other = isinstance(module, torch.jit.ScriptModule) or origin.startswith("lazy_einsum.")
            other = other or is_compiled(module) or is_made_by_compile(module) or has_own_call(module)
            if name and not (plain or other or self.settings.is_leaf(module, name)):
                yield name, module

    def _part(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        if name not in self._parts:
            self._parts[name] = PartDispatcher(name, self.settings, self.cache)
        part = self._parts[name]

        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not getattr(self._active, "value", False):
                return plain_call(module)(*args, **kwargs)
            if ambient_module.saved_tensor_hooks() is not None:
                # A checkpoint runs it a second time when nothing is installed, and compares what both runs save.
                with self.cache.lock:
                    self.cache.parts[name] = "called by a checkpoint, or under other saved-tensor hooks"
                return plain_call(module)(*args, **kwargs)
            if part.is_idle(module, args, kwargs):
                with self._activate(False):
                    return plain_call(module)(*args, **kwargs)
            return part(module, args, kwargs)

        return call


class PartDispatcher(Dispatcher):
    """Calls one submodule of a child that can't be traced as a whole."""

    def __init__(self, name: str, settings: Settings, cache: Cache) -> None:
        super().__init__(name, settings, cache)
        self._idle: set[Hashable] = set()

    def is_idle(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is nothing to optimize in calls like this one."""
        return bool(self._idle) and _likeness(module, args, kwargs) in self._idle

    def build(self, call: Call, kind: Kind, on_stage: OnStage | None = None) -> tuple[Specialization, tuple[Any, ...]]:
        """Make code for a call, and note where that is not worth it."""
        entry, values = super().build(call, kind, on_stage)
        if not _is_worth_it(entry):
            self._idle.add(_likeness(call.child, call.args, call.kwargs))
        return entry, values

    def store(self, entry: Specialization) -> None:
        """Keep ``entry`` where that is worth it."""
        with self.cache.lock:
            self.cache.parts[self.name] = SPECIALIZED if _is_worth_it(entry) else IDLE
        if _is_worth_it(entry):
            super().store(entry)

    def fall_back(self, call: Call, error: UntraceableError | None, kind: Kind | None) -> Any:
        """Run the submodule itself, without a warning: its own submodules may still be specialized."""
        if error is not None:
            with self.cache.lock:
                self.cache.parts[self.name] = str(error)
                if kind is not None:
                    self.cache.refuse(kind, call.mode)
        return call.run_child()


def _is_worth_it(entry: Specialization) -> bool:
    """Whether passes found anything to do."""
    return entry.stages["trace"] != entry.code


def _likeness(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What decides which way a submodule's code takes, as far as that can be told at once."""
    values = (*args, *kwargs.values())
    flags = tuple(value if isinstance(value, (bool, str, type(None))) else type(value) for value in values)
    return module.training, len(args), tuple(kwargs), flags
