"""``OptimizedModule``: the LRU of specializations and the dispatch to them; the only mutable state of the library.

A call's way: ``forward`` -> the guard of the specialization used last -> the one used last for these shapes -> all
that know this kind of call -> a miss: ``specialize``, store, run. What can't be traced runs as the child itself.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache
from torch import nn

from . import ambient as ambient_module
from .errors import CacheThrashWarning, FallbackWarning, LazyEinsumError, UntraceableError
from .live import LiveCallChanged
from .passes import Options
from .plan import check_optimize
from .recorder import Trace
from .report import Report
from .signature import Arguments, ForeignTraceError, Signature
from .specialize import Specialization, Stage, specialize
from .verify import Verifier

logger = logging.getLogger("lazy_einsum")

_disabled = os.environ.get("LAZY_EINSUM_DISABLE", "") not in ("", "0")
_is_compiling = torch.compiler.is_compiling
_function_modes = ambient_module.function_modes
_jit_tracing = ambient_module.jit_tracing

_LIBRARIES = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
)
_ON_UNTRACEABLE = ("warn", "raise", "ignore")


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run children as they are, in all threads, until the end of the ``with`` block. (``LAZY_EINSUM_DISABLE=1`` does so
    for a whole process.)

    >>> with disabled():
    ...     OptimizedModule(torch.nn.Identity())(3)
    3
    """
    global _disabled
    before = _disabled
    _disabled = True
    try:
        yield
    finally:
        _disabled = before


class CacheInfo(NamedTuple):
    """Statistics of one ``OptimizedModule``.

    Attributes:
        hits: calls served by a specialization that was there.
        misses: calls that had to build one, or to find out that they can't.
        maxsize: bound on specializations.
        currsize: specializations held now.
        evictions: specializations dropped to stay within the bound.
        fallbacks: calls served by the child as it is, because they can't be traced.
        build_seconds: time spent building, in seconds.
    """

    hits: int
    misses: int
    maxsize: int
    currsize: int
    evictions: int
    fallbacks: int
    build_seconds: float


Kind = tuple[Arguments, tuple[tuple[str, Any], ...]]
"""What can be told of a call before its module is read: arguments and ambient state."""


class _Specializations(LRUCache[Signature, Specialization]):
    """The LRU, with an index from kinds of calls to their specializations (several, where the module's own state
    differs), and its statistics.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.kinds: dict[Kind, list[Specialization]] = {}
        self.refused: LRUCache[Any, str] = LRUCache(1024)
        self.recent: dict[Any, Specialization] = {}
        self.past_hits = 0
        self.misses = 0
        self.evictions = 0
        self.fallbacks = 0
        self.build_seconds = 0.0
        self.warned = False

    def add(self, kind: Kind, entry: Specialization) -> None:
        if entry.signature in self:
            self.drop(self[entry.signature])
        self[entry.signature] = entry
        self.kinds.setdefault(kind, []).insert(0, entry)

    def drop(self, entry: Specialization) -> None:
        if self.pop(entry.signature, None) is not None:
            self._forget(entry)

    def popitem(self) -> tuple[Signature, Specialization]:
        signature, entry = super().popitem()
        self.evictions += 1
        self._forget(entry)
        return signature, entry

    def _forget(self, entry: Specialization) -> None:
        self.past_hits += entry.hits
        kind = (entry.signature.arguments, entry.signature.ambient)
        self.kinds[kind].remove(entry)
        if not self.kinds[kind]:
            del self.kinds[kind]
        for shapes in [shapes for shapes, recent in self.recent.items() if recent is entry]:
            del self.recent[shapes]


_OWN = frozenset(
    "module _options _is_leaf _cache _lock _last _clock _on_untraceable _verify _settings _warned _stand_in".split()
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class OptimizedModule(nn.Module):
    """Wraps a module; traces it at the first call, optimizes all its einsums for the shapes that come, caches the
    result by signature.

    Outputs, gradients, side effects on inputs and buffers, random numbers and errors are those of the module itself,
    up to rounding of reordered sums. It can be used in the module's place: same ``state_dict``, same parameters, same
    attributes.

    Args:
        module: an ``nn.Module``, or any callable on tensors.
        maxsize: bound on the number of specializations; the least recently used is dropped.
        optimize: how to find contraction orders: ``"auto"``, or what ``opt_einsum.contract_path`` takes (a name, a
            ``PathOptimizer``, a callable).
        memory_limit: no intermediate of a contraction is larger: bytes, or text as ``"512MiB"``.
        backend: what runs the optimized code; ``"eager"``.
        on_untraceable: what to do with a call that can't be traced, after which the child runs as it is: ``"warn"``
            (once for each reason), ``"ignore"``, or ``"raise"``.
        leaf_modules: types or qualified names of submodules that stay live calls and are not traced through.
        reassociate: ``None``: products are reordered except in float16; ``True``: float16 too; ``False``: only within
            one einsum call.
        frozen: names of parameters and buffers that will not change (not supported yet).
        verify: whether the first call of each signature also runs the module itself and compares.

    Raises:
        TypeError, ValueError: an argument is none of the above.

    >>> m = OptimizedModule(torch.nn.Linear(3, 4))
    >>> m(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    >>> m.cache_info().misses
    1
    """

    module: Any

    def __init__(
        self,
        module: nn.Module | Callable[..., Any],
        maxsize: int = 64,
        optimize: Any = "auto",
        memory_limit: int | str | None = None,
        backend: Any = "eager",
        on_untraceable: str = "warn",
        leaf_modules: Iterable[type | str] = (),
        reassociate: bool | None = None,
        frozen: Iterable[str] = (),
        verify: bool = False,
    ) -> None:
        if not callable(module):
            raise TypeError(f"OptimizedModule wraps an nn.Module or a callable, got {type(module).__name__}")
        if isinstance(maxsize, bool) or not isinstance(maxsize, int) or maxsize < 1:
            raise ValueError(f"maxsize must be an integer of at least 1, got {maxsize!r}")
        if on_untraceable not in _ON_UNTRACEABLE:
            raise ValueError(f"on_untraceable must be one of {_ON_UNTRACEABLE}, got {on_untraceable!r}")
        if backend != "eager":
            raise ValueError(f"backend must be 'eager', got {backend!r}; other backends are not supported yet")
        if reassociate not in (None, True, False):
            raise ValueError(f"reassociate must be None, True or False, got {reassociate!r}")
        check_optimize(optimize)
        frozen, leaf_modules = tuple(frozen), tuple(leaf_modules)
        if frozen:
            raise ValueError("frozen is not supported yet; leave it empty")
        for leaf in leaf_modules:
            if not isinstance(leaf, (str, type)):
                raise TypeError(f"leaf_modules takes types and qualified names, got {leaf!r}")
        settings = {
            "maxsize": maxsize,
            "optimize": optimize,
            "memory_limit": memory_limit,
            "backend": backend,
            "on_untraceable": on_untraceable,
            "leaf_modules": leaf_modules,
            "reassociate": reassociate,
            "frozen": frozen,
            "verify": verify,
        }
        own: dict[str, Any] = {
            "module": module,
            "_settings": settings,
            "_options": Options(optimize=optimize, memory_limit=_bytes(memory_limit), reassociate=reassociate),
            "_is_leaf": _leaf_test(leaf_modules),
            "_on_untraceable": on_untraceable,
            "_verify": verify,
            "_cache": _Specializations(maxsize),
            "_lock": threading.RLock(),
            "_last": None,
            "_clock": itertools.count(1),
            "_warned": set(),
            "_stand_in": None,
        }
        # In place of nn.Module.__init__, which would set the child's mode to training through the property below.
        self.__dict__.update((name, value) for name, value in nn.Module().__dict__.items() if name != "training")
        self.__dict__.update(own)
        if isinstance(module, nn.Module):
            # The child's own tables: the same state_dict, parameters and submodules under the same names, also after
            # something is assigned.
            for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                self.__dict__[table] = module.__dict__[table]

    # -- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the child through its specialization for these arguments."""
        if _is_compiling() or _function_modes() or _disabled or _jit_tracing() is not None:
            reason = "disabled" if _disabled else ambient_module.bypass()
            if reason is not None:
                return self.module(*args, **kwargs)
        child = self.module
        last = self._last
        if last is not None:
            values = last.guard(child, args, kwargs)
            if values is not None:
                last.hits += 1
                try:
                    return last.run(*values)
                except LiveCallChanged as error:
                    return self._changed(last, error, args, kwargs)
        return self._dispatch(child, args, kwargs)

    def _dispatch(self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All but the shortest way: another specialization than last time, hooks of the child, somebody else's
        trace, a miss.
        """
        shapes = tuple([value.shape if isinstance(value, torch.Tensor) else None for value in args])
        recent = self._cache.recent.get(shapes)
        if recent is not None:
            values = recent.guard(child, args, kwargs)
            if values is not None:
                return self._hit(recent, values, args, kwargs)
        if ambient_module.bypass() is not None:
            return child(*args, **kwargs)
        if isinstance(child, nn.Module):
            if child._compiled_call_impl is not None:
                return self._fall_back(
                    child, args, kwargs, UntraceableError("the module is compiled (module.compile())"), None
                )
            if any(child.__dict__[hooks] for hooks in _HOOKS) or ambient_module.global_module_hooks():
                return self._with_hooks(child, args, kwargs)
        return self._call(child, args, kwargs, shapes)

    def _call(
        self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any = None, hooked: bool = False
    ) -> Any:
        """Look the call up by its signature; build on a miss. (``hooked``: the child's own hooks are being run
        around this call.)
        """
        eager = child.forward if hooked else child
        try:
            arguments, _ = Arguments.of(args, kwargs)
        except ForeignTraceError:
            # fx knows the child's parameters and submodules by the names they have here, but not the child itself.
            return (child.forward if isinstance(child, nn.Module) else child)(*args, **kwargs)
        except UntraceableError as error:
            return self._fall_back(eager, args, kwargs, error, None)
        kind = (arguments, ambient_module.ambient())
        refused_key = (kind, getattr(child, "training", None))
        if refused_key in self._cache.refused:
            return self._fall_back(eager, args, kwargs, None, refused_key)
        entry, values = self._find(child, kind, args, kwargs, hooked)
        if entry is not None:
            self._remember(shapes, entry)
            return self._hit(entry, values, args, kwargs)
        verifier = Verifier(child, args, kwargs) if self._verify else None
        try:
            with self._lock:
                # Another thread may have built it while this one waited.
                entry, values = self._find(child, kind, args, kwargs, hooked)
                if entry is not None:
                    return self._hit(entry, values, args, kwargs)
                entry = self._build(child, arguments, verifier.add_stage if verifier else None)
                values = entry.guard(child, args, kwargs, hooked)
                if values is None and entry.writes_inputs:
                    entry = self._build(child, arguments, verifier.add_stage if verifier else None, overlapping=True)
                    values = entry.guard(child, args, kwargs, hooked)
                if values is None:
                    raise UntraceableError("what the trace read can't be checked at later calls")
                self._store(kind, entry)
            self._remember(shapes, entry)
            return verifier.run(entry, values) if verifier is not None else entry.run(*values)
        except UntraceableError as error:
            # The child runs outside of this block, so that an error of its own does not show as one of tracing.
            failure = error
        if isinstance(failure, LiveCallChanged) and entry is not None:
            return self._changed(entry, failure, args, kwargs, refused_key)
        return self._fall_back(eager, args, kwargs, failure, refused_key)

    def _find(
        self, child: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], hooked: bool
    ) -> tuple[Specialization | None, Any]:
        for entry in tuple(self._cache.kinds.get(kind, ())):
            values = entry.guard(child, args, kwargs, hooked)
            if values is not None:
                return entry, values
        return None, None

    def _hit(
        self, entry: Specialization, values: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self._lock:
            entry.hits += 1
            self._touch(entry)
        try:
            return entry.run(*values)
        except LiveCallChanged as error:
            return self._changed(entry, error, args, kwargs)

    def _touch(self, entry: Specialization) -> None:
        entry.used = next(self._clock)
        self._cache.get(entry.signature)
        self.__dict__["_last"] = entry

    def _remember(self, shapes: Any, entry: Specialization) -> None:
        """Let the next call with these shapes try ``entry`` first."""
        with self._lock:
            if shapes is not None and entry.signature in self._cache:
                self._cache.recent[shapes] = entry

    def _changed(
        self,
        entry: Specialization,
        error: LiveCallChanged,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: Any = None,
    ) -> Any:
        """A live call gave another type than the trace foresaw: drop the entry, run the child."""
        with self._lock:
            self._cache.drop(entry)
            if self._last is entry:
                self.__dict__["_last"] = None
        return self._fall_back(self.module, args, kwargs, error, key)

    def _build(
        self,
        child: Any,
        arguments: Arguments,
        on_stage: Callable[[Stage, Trace], None] | None = None,
        overlapping: bool = False,
    ) -> Specialization:
        cache = self._cache
        cache.misses += not overlapping  # for these it is the second attempt of one call
        entry = specialize(child, arguments, self._options, self._is_leaf, on_stage, overlapping)
        cache.build_seconds += entry.build_seconds
        if logger.isEnabledFor(logging.INFO):
            logger.info(
                "%s: miss for %s: %s; built in %.1f ms",
                type(child).__name__,
                entry.signature,
                self._reason(entry.signature),
                entry.build_seconds * 1e3,
            )
        return entry

    def _reason(self, signature: Signature) -> str:
        """Which part of the key differs from the nearest entry: the one that agrees longest."""
        if not self._cache:
            return "first call"

        def agreement(other: Signature) -> tuple[int, int]:
            same = sum(a == b for a, b in zip(signature.arguments.leaves, other.arguments.leaves, strict=False))
            same += sum(a == b for a, b in zip(signature.ambient, other.ambient, strict=True))
            return same, sum(a == b for a, b in zip(signature.state, other.state, strict=False))

        return signature.difference(max(self._cache, key=agreement)) or "the same signature (an entry was dropped)"

    def _store(self, kind: Kind, entry: Specialization) -> None:
        cache = self._cache
        cache.add(kind, entry)
        self._touch(entry)
        if not cache.warned and cache.evictions >= cache.maxsize and 2 * cache.evictions >= cache.misses:
            cache.warned = True
            warnings.warn(
                f"{cache.evictions} of {cache.misses} specializations of {type(self.module).__name__} were evicted "
                "before they could be used again; "
                f"raise maxsize (now {int(cache.maxsize)}), or have fewer different shapes come",
                CacheThrashWarning,
                stacklevel=_users_stacklevel(),
            )

    def _fall_back(
        self, child: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: UntraceableError | None, key: Any
    ) -> Any:
        """Run the child itself. If that raises too, the error is the user's: it is no fall-back, and nothing is
        remembered.
        """
        if error is not None and self._on_untraceable == "raise":
            raise error
        result = child(*args, **kwargs)
        with self._lock:
            self._cache.fallbacks += 1
            if error is None:
                return result
            reason = str(error)
            if key is not None:
                self._cache.refused[key] = reason
            new = reason not in self._warned
            self._warned.add(reason)
        if new:
            logger.info("%s runs as it is: %s", type(child).__name__, reason)
            if self._on_untraceable == "warn":
                warnings.warn(
                    f"{type(child).__name__} runs as it is, not optimized: {reason}",
                    FallbackWarning,
                    stacklevel=_users_stacklevel(),
                )
        return result

    def _with_hooks(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a child that has hooks of its own: torch runs them, around the specialized ``forward``.

        They see a stand-in of the child's class with the child's own attributes, because ``forward`` can't be
        replaced in the child itself: other threads would see it.
        """
        if ambient_module.global_module_hooks():
            return self._fall_back(
                child,
                args,
                kwargs,
                UntraceableError("global module hooks are registered, which fire for each submodule"),
                None,
            )
        if "forward" in child.__dict__:
            return self._fall_back(
                child, args, kwargs, UntraceableError("the module has hooks, and a forward of its own instance"), None
            )
        if self._stand_in is None or self._stand_in.__base__ is not type(child):
            self.__dict__["_stand_in"] = _stand_in_class(type(child), weakref.ref(self))
        stand_in: nn.Module = type(child).__new__(self._stand_in)
        object.__setattr__(stand_in, "__dict__", child.__dict__)
        return nn.Module.__call__(stand_in, *args, **kwargs)

    # -- inspection

    def prepare(self, *args: Any, **kwargs: Any) -> Specialization:
        """Build the specialization for these arguments without running it. Only the types of the arguments are looked
        at, so tensors on ``device="meta"`` do for shapes, but stand for the device ``meta``; ``torch.empty`` of the
        right device costs no time either.

        Raises:
            UntraceableError: the call can't be traced.
        """
        arguments, _ = Arguments.of(args, kwargs)
        kind = (arguments, ambient_module.ambient())
        with self._lock:
            entry, _ = self._find(self.module, kind, args, kwargs, True)
            if entry is None:
                entry = self._build(self.module, arguments)
                self._store(kind, entry)
        return entry

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """What is done for a call with these arguments (as ``prepare``, which it calls), or, without arguments,
        for all specializations so far.
        """
        entries = [self.prepare(*args, **kwargs)] if args or kwargs else list(self.specializations.values())
        return Report(type(self.module).__name__, self.cache_info(), entries, tuple(self._warned))

    def cache_info(self) -> CacheInfo:
        """Hits, misses and so on."""
        cache = self._cache
        with self._lock:
            hits = cache.past_hits + sum(entry.hits for entry in cache.values())
            return CacheInfo(
                hits,
                cache.misses,
                int(cache.maxsize),
                len(cache),
                cache.evictions,
                cache.fallbacks,
                cache.build_seconds,
            )

    def cache_clear(self) -> None:
        """Drop all specializations and set the statistics to zero."""
        with self._lock:
            self.__dict__["_cache"] = _Specializations(int(self._cache.maxsize))
            self.__dict__["_last"] = None
            self._warned.clear()

    @property
    def specializations(self) -> Mapping[Signature, Specialization]:
        """Read-only: signature -> specialization, least recently used first."""
        with self._lock:
            return MappingProxyType(
                {entry.signature: entry for entry in sorted(self._cache.values(), key=lambda entry: entry.used)}
            )

    @property
    def code(self) -> str:
        """Generated code of the specialization used last.

        Raises:
            LazyEinsumError: nothing was specialized yet.
        """
        if self._last is None:
            raise LazyEinsumError("nothing is specialized yet: call the module, or prepare(...), first")
        return str(self._last.code)

    # -- in the child's place

    @property
    def training(self) -> bool:
        """The child's mode."""
        return bool(getattr(self.module, "training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        if isinstance(self.module, nn.Module):
            self.module.training = mode

    def train(self, mode: bool = True) -> OptimizedModule:
        """As ``nn.Module.train``, by the child's own method."""
        if isinstance(self.module, nn.Module):
            self.module.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> OptimizedModule:
        """As ``nn.Module.apply``; ``fn`` sees the child, not this wrapper."""
        if isinstance(self.module, nn.Module):
            self.module.apply(fn)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        if isinstance(self.module, nn.Module):
            self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The child's."""
        return (
            self.module.state_dict(*args, **kwargs)
            if isinstance(self.module, nn.Module)
            else super().state_dict(*args, **kwargs)
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As the child's; prefixes ``module.`` and ``_orig_mod.`` of other wrappers, where all keys have them, are
        taken off.
        """
        for prefix in ("module.", "_orig_mod."):
            if state_dict and all(key.startswith(prefix) for key in state_dict):
                own = self.module.state_dict() if isinstance(self.module, nn.Module) else {}
                if not all(key.startswith(prefix) for key in own):
                    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        if not isinstance(self.module, nn.Module):
            return super().load_state_dict(state_dict, strict, assign)
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any) -> None:
        if isinstance(self.module, nn.Module):
            self.module._load_from_state_dict(*args)

    def __getattr__(self, name: str) -> Any:
        try:
            # First as any module: the tables are shared with the child (and a trace's stand-in of this wrapper finds
            # all of its attributes there).
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__["module"]
        if name == "training" or name in _INTERNALS or not isinstance(module, nn.Module):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__, *dir(self.module)})

    def __len__(self) -> int:
        return len(self.module)

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module)

    def __contains__(self, item: Any) -> bool:
        return item in self.module

    def __bool__(self) -> bool:
        return bool(self.module)

    def __repr__(self) -> str:
        inner = repr(self.module).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {inner}\n)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        hooks = {
            table: self.__dict__[table]
            for table in _INTERNALS
            if isinstance(self.__dict__.get(table), dict) and self.__dict__[table]
        }
        return _rebuild, (
            self.module,
            self._settings,
            {table: value for table, value in hooks.items() if table.endswith("hooks")},
        )


_INTERNALS = frozenset(nn.Module().__dict__) | {"training", "_compiled_call_impl"}


def _rebuild(module: Any, settings: dict[str, Any], hooks: dict[str, Any]) -> OptimizedModule:
    """Used by pickle and deepcopy: same module and options, empty cache."""
    wrapper = OptimizedModule(module, **settings)
    wrapper.__dict__.update(hooks)
    return wrapper


def _stand_in_class(kind: type[nn.Module], wrapper: weakref.ref[OptimizedModule]) -> type[nn.Module]:
    def forward(stand_in: Any, *args: Any, **kwargs: Any) -> Any:
        owner = wrapper()
        assert owner is not None  # it is calling
        return owner._call(owner.module, args, kwargs, hooked=True)

    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


def _users_stacklevel() -> int:
    """For a warning raised in the calling function: where the user called the module."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        level += 1
    return level


def _leaf_test(leaf_modules: tuple[type | str, ...]) -> Callable[[nn.Module, str], bool]:
    names = frozenset(leaf for leaf in leaf_modules if isinstance(leaf, str))
    types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
    return lambda module, name: name in names or isinstance(module, types)


def _bytes(limit: int | str | None) -> int | None:
    """``"512MiB"`` in bytes."""
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        return limit
    units = {
        "B": 1,
        "kB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
    }
    if isinstance(limit, str):
        for unit in sorted(units, key=len, reverse=True):
            number = limit.strip().removesuffix(unit).strip()
            if limit.strip().endswith(unit) and number.replace(".", "", 1).isdigit():
                return int(float(number) * units[unit])
    raise ValueError(f"memory_limit must be a positive number of bytes or text like '512MiB', got {limit!r}")
