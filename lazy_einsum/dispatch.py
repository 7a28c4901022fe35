"""``Dispatcher``: a call's way to its code.

The guard of the specialization used last -> the one used last for these shapes -> all that know this kind of call ->
a miss: build (generic code, once sizes are seen to vary), store, run. What can't be traced runs as it is.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import ambient as ambient_module
from . import logs
from .ahead import compile_ahead
from .ambient import profiling
from .backends import EAGER, Backend
from .cache import Cache, Family, Kind
from .compiled import NotCompilableError, compile_entry
from .errors import BackendWarning, CacheThrashWarning, FallbackWarning, UntraceableError
from .generic import comparable, generalize, numbers_that_vary, places_of, values_of
from .live import Caller, LiveCallChanged, direct_call, has_own_call, is_compiled, is_part, plain_call
from .misses import Miss
from .passes import Options
from .record import Trace
from .signature import Arguments, ForeignTraceError, Signature
from .specialize import Specialization, Stage, specialize
from .symbols import NotGenericError
from .verify import Verifier
from .where import users_stacklevel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

SEEN_BEFORE_GENERIC = 2
"""After so many misses that differ in sizes only, the next one makes code that is generic in these sizes."""

PROMOTION = 256
"""After about so many calls with the same sizes through generic code, they get code of their own."""

_SAMPLE = 16  # one of so many calls is looked at for that

_FILLING = 16
"""So many misses for the values of a number that code can't be generic in make a warning."""

OnStage = Callable[[Stage, Trace], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose; see ``OptimizedModule``."""

    options: Options
    is_leaf: Callable[[nn.Module, str], bool]
    on_untraceable: str
    verify: bool
    dynamic: bool | None
    is_frozen: Callable[[str], bool]
    backend: Backend | None = None
    compile_after: int = 0
    background: bool = True


class Call(NamedTuple):
    """A call on its way.

    Attributes:
        child: what is called.
        args: positional arguments.
        kwargs: keyword arguments.
        hooked: whether torch is running the child's own hooks around it.
    """

    child: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hooked: bool = False

    def fits(self, entry: Specialization) -> tuple[Any, ...] | None:
        """What the code of ``entry`` takes for this call; ``None`` where it can't serve it."""
        return entry.guard(*self)

    def run_child(self) -> Any:
        """Run the child as it is."""
        child = self.child
        if self.hooked:
            run = child.forward
        elif isinstance(child, nn.Module) and is_part(child):
            run = plain_call(child)
        else:
            run = child
        return run(*self.args, **self.kwargs)

    @property
    def mode(self) -> bool | None:
        """The child's mode of training."""
        return getattr(self.child, "training", None)

    @property
    def name(self) -> str:
        """What the child is called: see ``name_of``."""
        return name_of(self.child)


def name_of(child: Any) -> str:
    """The class of a module, the name of a function."""
    return type(child).__name__ if isinstance(child, nn.Module) else getattr(child, "__name__", type(child).__name__)


class Dispatcher:
    """Calls one module, or callable, through its specializations. It keeps no reference to the module.

    Args:
        name: of the submodule that it calls; empty for the child itself.
        settings: the user's.
        cache: where specializations are kept.
    """

    def __init__(self, name: str, settings: Settings, cache: Cache) -> None:
        self.name = name
        self.settings = settings
        self.cache = cache
        self.last: Specialization | None = None
        self._stand_in: tuple[type[nn.Module], type[nn.Module]] | None = None

    def __call__(self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``child`` through its specialization for these arguments."""
        last = self.last
        if last is not None:
            values = last.guard(child, args, kwargs)
            if values is not None:
                return self._run(last, values, child, args, kwargs)
        call = Call(child, args, kwargs)
        try:
            shapes = (self.name, *[value.shape if isinstance(value, torch.Tensor) else None for value in args])
        except RuntimeError:  # a nested tensor
            shapes = None
        recent = self.cache.recent.get(shapes)
        if recent is not None:
            values = call.fits(recent)
            if values is not None:
                self._use(recent)
                return self._run(recent, values, *call)
        if ambient_module.bypass() is not None:
            return call.run_child()
        if isinstance(child, nn.Module):
            if is_compiled(child):
                return self.fall_back(call, UntraceableError("the module is compiled (module.compile())"), None)
            if any(child.__dict__[hooks] for hooks in HOOKS) or ambient_module.global_module_hooks():
                return self._with_hooks(call)
        return self._look_up(call, shapes)

    def call_forward(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the ``forward`` of ``child`` through its specialization; torch runs the child's hooks around it."""
        call, last = Call(child, args, kwargs, hooked=True), self.last
        values = call.fits(last) if last is not None else None
        if last is not None and values is not None:
            return self._run(last, values, *call)
        return call.run_child() if ambient_module.bypass() is not None else self._look_up(call)

    def _run(self, entry: Specialization, values: tuple[Any, ...], *call: Any) -> Any:
        """Run ``entry``. The call comes in parts, as to make a ``Call`` of them takes 0.2 us."""
        count = entry.add_hit()
        if entry.compile_at >= 0:
            self._compile_hot(entry, count)
        if entry.is_generic and count % _SAMPLE == _SAMPLE - 1:
            self._notice(entry, Call(*call))
        try:
            return entry.run(*values) if not profiling() else self._run_named(entry, values, Call(*call))
        except LiveCallChanged as error:
            failure = error
        return self._changed(entry, failure, Call(*call))

    def _run_named(self, entry: Specialization, values: tuple[Any, ...], call: Call) -> Any:
        """Run code under a name that a profiler shows."""
        name = f"{self.name} {call.name}".strip()
        with torch.profiler.record_function(f"lazy_einsum: {name}{entry.signature.arguments}"):
            run = entry.run_named if entry.tier == EAGER else entry.run
            return run(*values)

    def _use(self, entry: Specialization, shapes: Hashable = None) -> None:
        """Let the next call try ``entry`` first, and the next one with these shapes."""
        with self.cache.lock:
            if entry.signature in self.cache:
                self.cache.touch(entry)
                self.last = entry
                if shapes is not None and not entry.is_generic:
                    self.cache.recent[shapes] = entry

    def _look_up(self, call: Call, shapes: Hashable = None) -> Any:
        """Find what serves the call by its signature; build on a miss."""
        try:
            arguments, _ = Arguments.of(call.args, call.kwargs)
        except ForeignTraceError:
            # fx knows the child's parameters and submodules by the names they have here, but not the child itself.
            return call._replace(hooked=isinstance(call.child, nn.Module)).run_child()
        except UntraceableError as error:
            return self.fall_back(call, error, None)
        kind = Kind(self.name, arguments, ambient_module.ambient())
        with self.cache.lock:
            refused = self.cache.is_refused(kind, call.mode)
        if refused:
            return self.fall_back(call, None, kind)
        found = self._find(call, kind)
        if found is not None:
            self._use(found[0], shapes)
            return self._run(*found, *call)
        tensors = chain(call.child.parameters(), call.child.buffers()) if isinstance(call.child, nn.Module) else ()
        if any(map(is_lazy, tensors)):
            return call.run_child()  # this call gives parameters their shapes; the next is the first to be looked at
        # A checkpoint counts what a call saves: the module itself may not run beside.
        verifies = self.settings.verify and ambient_module.saved_tensor_hooks() is None
        verifier = Verifier(call.child, call.args, call.kwargs) if verifies else None
        failure: UntraceableError
        try:
            with self.cache.building:
                # Another thread may have built it while this one waited.
                found = self._find(call, kind)
                entry, values = found or self.build(call, kind, verifier.add_stage if verifier else None)
            self._use(entry, shapes)
            if found is not None:
                return self._run(entry, values, *call)
            if verifier is not None:
                return verifier.run(entry, values)
            return entry.run(*values) if not profiling() else self._run_named(entry, values, call)
        except UntraceableError as error:
            # The child runs outside of this block, so that an error of its own does not show as one of tracing.
            failure = error
        if isinstance(failure, LiveCallChanged):
            return self._changed(entry, failure, call, kind)
        return self.fall_back(call, failure, kind)

    def _find(self, call: Call, kind: Kind) -> tuple[Specialization, tuple[Any, ...]] | None:
        with self.cache.lock:
            candidates = self.cache.candidates(kind)
        for entry in candidates:
            values = call.fits(entry)
            if values is not None:
                return entry, values
        return None

    # -- building

    def prepare(self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialization:
        """The specialization for a call, built where there is none, without calling anything."""
        arguments, _ = Arguments.of(args, kwargs)
        kind = Kind(self.name, arguments, ambient_module.ambient())
        call = Call(child, args, kwargs, hooked=True)
        with self.cache.building:
            entry, _ = self._find(call, kind) or self.build(call, kind)
        self._use(entry)
        return entry

    def build(self, call: Call, kind: Kind, on_stage: OnStage | None = None) -> tuple[Specialization, tuple[Any, ...]]:
        """Make code for a call: generic code, where sizes were seen to vary, else for the sizes that came."""
        cache, relatives = self.cache, self.cache.family(kind)
        with cache.lock:
            cache.misses += 1
            others = tuple(cache)
        try:
            entry, values = self._build(call, kind, on_stage)
        except UntraceableError as error:
            wanted = Signature(kind.arguments, kind.ambient, module=self.name)
            cache.last_misses.append(Miss(call.name, wanted, (), 0.0, str(error)))
            raise
        wanted = replace(entry.signature, arguments=kind.arguments)
        miss = Miss(call.name, wanted, others, entry.build_seconds)
        cache.last_misses.append(miss)
        logs.missed(miss)
        if kind.arguments not in relatives.seen:
            relatives.seen.append(kind.arguments)
        relatives.misses += 1
        self.store(entry)
        self._warn_of_numbers(call, kind.arguments, relatives)
        return entry, values

    def _build(self, call: Call, kind: Kind, on_stage: OnStage | None) -> tuple[Specialization, tuple[Any, ...]]:
        relatives = self.cache.family(kind)
        entry = self._build_generic(call.child, kind, relatives, on_stage)
        values = call.fits(entry) if entry is not None else None
        if entry is not None and values is None:
            relatives.reason = "inputs share memory that forward writes"
        if entry is None or values is None:
            entry = self.specialize(call.child, kind.arguments, on_stage)
            values = call.fits(entry)
        if values is None and entry.writes_inputs:
            entry = self.specialize(call.child, kind.arguments, on_stage, overlapping=True)
            values = call.fits(entry)
        if values is None:
            raise UntraceableError("what the trace read can't be checked at later calls")
        return entry, values

    def _build_generic(
        self, child: Any, kind: Kind, relatives: Family, on_stage: OnStage | None
    ) -> Specialization | None:
        arguments = kind.arguments
        if self.settings.dynamic is False or relatives.reason is not None:
            return None
        if relatives.generic:
            seen = [relatives.generic[0].signature.arguments]
        else:
            seen = comparable(relatives.seen, arguments)
            if arguments in seen or len(seen) < (1 if self.settings.dynamic else SEEN_BEFORE_GENERIC):
                return None
        with self.cache.lock:
            witnesses = self.cache.relatives(kind)
        while (wanted := generalize(seen, arguments, relatives.fixed)) is not None:
            try:
                return self.specialize(child, wanted, on_stage, witnesses=witnesses)
            except UntraceableError as error:
                # Also where the call can't be traced at all: that shows when code for its own sizes is made.
                places = places_of(wanted, error.fixed if isinstance(error, NotGenericError) else frozenset())
                logs.graph_breaks.info("%s: no generic code for %s: %s", name_of(child), wanted, error)
                if not places:
                    relatives.reason = str(error)
                    return None
                relatives.fixed.update(places)
        return None

    def make(
        self,
        child: Any,
        arguments: Arguments,
        on_stage: OnStage | None = None,
        overlapping: bool = False,
        witnesses: Sequence[Specialization] = (),
    ) -> Specialization:
        """Make code for these arguments, in the present ambient state, that calls torch."""
        options, is_leaf = self.settings.options, self._is_leaf
        with ambient_module.own_saved_tensors():
            return specialize(
                child,
                arguments,
                options,
                is_leaf,
                on_stage,
                overlapping,
                self.name,
                witnesses,
                self._hooked,
                self.settings.is_frozen,
                self.cache.folds,
            )

    def specialize(
        self,
        child: Any,
        arguments: Arguments,
        on_stage: OnStage | None = None,
        overlapping: bool = False,
        witnesses: Sequence[Specialization] = (),
    ) -> Specialization:
        """Make code for these arguments, in the present ambient state, and let the backend take it over."""
        entry = self.make(child, arguments, on_stage, overlapping, witnesses)
        self.cache.build_seconds += entry.build_seconds
        logs.built(name_of(child), entry)
        if self.settings.backend is not None and not entry.is_generic:
            if self.settings.compile_after:
                entry.compile_at = self.settings.compile_after - 1
            else:
                self._compile(entry, self.settings.backend)
        return entry

    def _compile_hot(self, entry: Specialization, count: int) -> None:
        """Let the backend take over an entry that was called often enough.

        In the thread of the call, once another process has done what takes long; see ``ahead``.
        """
        if ambient_module.saved_tensor_hooks() is not None:
            entry.compile_at = -1  # a checkpoint will run this call again, and compares what both runs save
        elif entry.job is not None and not entry.job.is_done:
            pass  # (The lock below may be held for as long as others build.)
        elif count >= entry.compile_at and self.settings.backend is not None:
            with self.cache.building:
                if entry.compile_at >= 0 and self._is_compiled_ahead(entry, self.settings.backend):
                    entry.compile_at = -1
                    if entry.job is not None and entry.job.error:
                        reason = "it could not be compiled in the background"
                        self.run_as_eager(entry, NotCompilableError(f"{reason}: {entry.job.error}"))
                    else:
                        self._compile(entry, self.settings.backend)

    def _is_compiled_ahead(self, entry: Specialization, backend: Backend) -> bool:
        """Whether nothing compiles ``entry`` ahead, or what does is done."""
        if self.settings.background and entry.job is None:
            entry.job = compile_ahead(entry, backend)
        return entry.job is None or entry.job.is_done

    def _compile(self, entry: Specialization, backend: Backend) -> None:
        """Let ``backend`` run ``entry``. (Not generic code: the sizes that it is for come rarely.)"""
        start = time.perf_counter()
        try:
            entry.run = compile_entry(entry, backend, partial(_give_up, weakref.ref(self), weakref.ref(entry)))
            entry.tier = backend.name
        except NotCompilableError as error:
            self.run_as_eager(entry, error)
        self.cache.compile_seconds += time.perf_counter() - start

    def run_as_eager(self, entry: Specialization, error: NotCompilableError) -> None:
        """From now on ``entry`` runs without a backend; say so once for each reason."""
        cache = self.cache
        with cache.lock:
            if entry.reason:
                return
            entry.run, entry.tier, entry.reason = entry.eager(), EAGER, str(error)
            cache.backend_failures += 1
            new = error.reason not in cache.backend_reasons
            cache.backend_reasons[error.reason] = None
        assert self.settings.backend is not None
        text = f"{entry.signature} runs as eager code, not through {self.settings.backend.name}: {error}"
        logs.cache.info("%s", text)
        if new:
            warnings.warn(text, BackendWarning, stacklevel=users_stacklevel())

    def _is_leaf(self, module: nn.Module, name: str) -> bool:
        return self.settings.is_leaf(module, self._qualified(name))

    def _qualified(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _hooked(self, name: str) -> Caller:
        """What calls a submodule that stays a live call because it has hooks."""
        return direct_call

    def store(self, entry: Specialization) -> None:
        """Keep ``entry``, and warn where entries go as fast as they come."""
        cache = self.cache
        with cache.lock:
            cache.add(entry)
            warn = not cache.warned and cache.evictions >= cache.maxsize and 2 * cache.evictions >= cache.misses
            cache.warned = cache.warned or warn
        if warn:
            warnings.warn(
                f"{cache.evictions} of {cache.misses} specializations were evicted before they could be used again; "
                f"raise maxsize (now {int(cache.maxsize)}), or have fewer different kinds of calls come",
                CacheThrashWarning,
                stacklevel=users_stacklevel(),
            )

    def _warn_of_numbers(self, call: Call, arguments: Arguments, relatives: Family) -> None:
        if relatives.warned or relatives.misses < _FILLING or self.settings.on_untraceable == "ignore":
            return
        places = numbers_that_vary(relatives.seen, arguments)
        if places:
            relatives.warned = True
            warnings.warn(
                f"{call.name} was specialized for {relatives.misses} calls that differ in a Python number "
                f"(argument {places[0]}, now {arguments.leaves[places[0]]}) which forward uses by its value"
                f"{': ' + relatives.reason if relatives.reason else ''}; pass it as a tensor to have one "
                "specialization for all",
                CacheThrashWarning,
                stacklevel=users_stacklevel(),
            )

    def _notice(self, entry: Specialization, call: Call) -> None:
        """Count the sizes of some calls of generic code; those that come often get code of their own."""
        if ambient_module.saved_tensor_hooks() is not None:
            return  # a checkpoint will run this call again, and compares what both runs save
        arguments, _ = Arguments.of(call.args, call.kwargs)
        values = values_of(entry.signature.arguments, arguments)
        cache = self.cache
        with cache.lock:
            relatives = cache.family(Kind.of(entry))
            often = relatives.count(values) * _SAMPLE >= PROMOTION
            room = 2 * sum(not other.is_generic for other in cache.values()) < cache.maxsize
        if often and room and self.settings.dynamic is None:
            with cache.building:
                try:
                    promoted = self.specialize(call.child, arguments)
                except UntraceableError:  # the child has changed in a way that only the next miss will find out
                    return
                self.store(promoted)

    # -- what can't be specialized

    def _changed(self, entry: Specialization, error: LiveCallChanged, call: Call, kind: Kind | None = None) -> Any:
        """A live call gave another type than the trace foresaw: drop the entry, run the child."""
        with self.cache.lock:
            self.cache.drop(entry)
            if self.last is entry:
                self.last = None
        return self.fall_back(call, error, kind)

    def fall_back(self, call: Call, error: UntraceableError | None, kind: Kind | None) -> Any:
        """Run the child itself. If that raises too, the error is the user's: it is no fall-back, and nothing is
        remembered.

        Args:
            call: what to run.
            error: why it can't be specialized; ``None`` where that is known already.
            kind: of the call, where the same will be true of others of that kind.
        """
        if error is not None and self.settings.on_untraceable == "raise":
            raise error
        result = self.run_as_it_is(call)
        self.cache.fallbacks.add()
        if error is None:
            return result
        reason = str(error)
        with self.cache.lock:
            again = kind is not None and self.cache.refuse(kind, call.mode)
        self.warn(call, reason, again)
        return result

    def warn(self, call: Call, reason: str, known: bool) -> None:
        """Say once why calls run as they are, unless this is ``known`` already."""
        with self.cache.lock:
            new = not known and reason not in self.cache.reasons
            self.cache.reasons[reason] = None
        if not new:
            return
        name = f"{self.name} ({call.name})" if self.name else call.name
        logs.graph_breaks.info("%s runs as it is: %s", name, reason)
        if self.settings.on_untraceable == "warn":
            warnings.warn(
                f"{name} runs as it is, not optimized: {reason}{self.describe_parts()}",
                FallbackWarning,
                stacklevel=users_stacklevel(),
            )

    def run_as_it_is(self, call: Call) -> Any:
        """Run what can't be specialized as a whole."""
        return call.run_child()

    def describe_parts(self) -> str:
        """What became of submodules, in words."""
        return ""

    def _with_hooks(self, call: Call) -> Any:
        """Call a child that has hooks of its own: torch runs them, around the specialized ``forward``.

        It runs them for a stand-in of the child's class with the child's own attributes, because ``forward`` can't be
        replaced in the child itself: other threads would see it. The hooks are given the child.
        """
        child = call.child
        reason = None
        if ambient_module.global_module_hooks():
            reason = "global module hooks are registered, which fire for each submodule"
        elif "forward" in child.__dict__ or has_own_call(child):
            reason = "the module has hooks, and a forward of its own instance or a __call__ of its own class"
        if reason is not None:
            return self.fall_back(call, UntraceableError(reason), None)
        return plain_call(self.stand_in(child, runs_hooks=True))(*call.args, **call.kwargs)

    def stand_in(self, child: nn.Module, runs_hooks: bool = False) -> nn.Module:
        """A module of the child's class with the child's own attributes, whose ``forward`` is specialized.

        Args:
            child: what it stands for.
            runs_hooks: whether it is for torch to run the child's hooks, rather than for the user.
        """
        if self._stand_in is None or self._stand_in[0].__base__ is not type(child):
            self._stand_in = _stand_in_class(type(child), False), _stand_in_class(type(child), True)
        stand_in: nn.Module = object.__new__(self._stand_in[runs_hooks])
        object.__setattr__(stand_in, "__dict__", child.__dict__)
        object.__setattr__(stand_in, "_lazy_einsum", (self, child))
        return stand_in


def _give_up(
    dispatcher: weakref.ref[Dispatcher], entry: weakref.ref[Specialization], error: NotCompilableError
) -> None:
    """Let an entry run without its backend. (Weakly: a compiled function may be kept for longer than its cache.)"""
    owner, given_up = dispatcher(), entry()
    if owner is not None and given_up is not None:
        owner.run_as_eager(given_up, error)


def _as_for(signature: Signature, other: Signature) -> Signature:
    """``other``; of generic code, with the arguments of ``signature`` where these are a case of its own."""
    if other.arguments.symbols and values_of(other.arguments, signature.arguments) is not None:
        return replace(other, arguments=signature.arguments)
    return other


def _stand_in_class(kind: type[nn.Module], runs_hooks: bool) -> type[nn.Module]:
    def forward(stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        dispatcher, child = stand_in._lazy_einsum
        return dispatcher.call_forward(child, args, kwargs)

    def set_class(stand_in: Any, value: type) -> None:
        stand_in._lazy_einsum[1].__class__ = value

    def reduce(stand_in: Any, protocol: Any) -> Any:
        return stand_in._lazy_einsum[1].__reduce_ex__(protocol)  # copies and pickles are of the child itself

    def equals(stand_in: Any, other: Any) -> bool:
        _, child = getattr(other, "_lazy_einsum", (None, other))
        return bool(stand_in._lazy_einsum[1] == child)

    def call(stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        dispatcher, child = stand_in._lazy_einsum
        return plain_call(dispatcher.stand_in(child, runs_hooks=True))(*args, **kwargs)

    # In a slot, because the dictionary of attributes is the child's own.
    names: dict[str, Any] = {
        "__slots__": ("_lazy_einsum",),
        "forward": forward,
        "__reduce_ex__": reduce,
        "__eq__": equals,  # methods may look themselves up where the child was put
        "__hash__": lambda stand_in: hash(stand_in._lazy_einsum[1]),
        "__class__": property(lambda stand_in: type(stand_in._lazy_einsum[1]), set_class),  # parametrizations set it
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if runs_hooks:
        names.update((table, property(partial(_hooks_of_child, table))) for table in HOOKS)
    else:
        names["_call_impl"] = call
    return type(kind.__name__, (kind,), names)


def _hooks_of_child(table: str, stand_in: Any) -> dict[int, Callable[..., Any]]:
    """The child's present hooks, as the stand-in calls them: each is given the child in the place of the stand-in.
    (Hooks compare it, and keep what they find under it.)
    """
    _, child = stand_in._lazy_einsum
    return {number: partial(_with_child, hook, child) for number, hook in child.__dict__[table].items()}


def _with_child(hook: Callable[..., Any], child: nn.Module, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return hook(child, *args, **kwargs)
