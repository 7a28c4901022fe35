"""``OptimizedModule``: stands in for a module, and calls it through its specializations (see ``dispatch``)."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn

from . import ambient as ambient_module
from .backends import find_backend
from .cache import Cache, CacheInfo
from .dispatch import Settings, name_of
from .distributed import holds_sharded
from .errors import NotSpecializedError, UntraceableError
from .explain import explain
from .exporting import run_exported
from .hints import plan_by_hints
from .parts import WholeDispatcher
from .passes import Options
from .plan import check_optimize, learn
from .plan_file import read_plans, write_plans
from .report import Report
from .saved import SAVED_LIMIT
from .signature import Signature
from .specialize import Specialization

_disabled = os.environ.get("LAZY_EINSUM_DISABLE", "") not in ("", "0")
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_function_modes = ambient_module.function_modes
_jit_tracing = ambient_module.jit_tracing
_fx_tracing = ambient_module.fx_tracing

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


_showing: weakref.WeakKeyDictionary[Any, dict[Any, type]] = weakref.WeakKeyDictionary()
"""For functions: the classes of wrappers that show their arguments."""


def _shows_arguments(kind: type[OptimizedModule], child: Any) -> type[OptimizedModule]:
    """``kind``, with a ``forward`` that shows the arguments of the child's to those who ask, as trainers do for their
    names. (Of a method Python shows the signature of the function, which lies in the class. A descriptor in the place
    of ``forward`` was rejected: it takes 0.7 us a call.)
    """
    called = child.forward if isinstance(child, nn.Module) else child
    function = getattr(called, "__func__", called)
    if kind.forward is not OptimizedModule.forward or not isinstance(function, FunctionType):
        return kind
    known = _showing.setdefault(function, {})
    key = kind, called is function
    if key not in known:
        method: Any = kind.forward
        own, *_ = inspect.signature(method).parameters.values()
        first = own.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
        try:
            shown = inspect.signature(called)
            shown = shown.replace(parameters=[first, *shown.parameters.values()])
        except (TypeError, ValueError):  # none is known (it wraps something of C's), or it has a ``self`` of its own
            return kind
        made = FunctionType(method.__code__, method.__globals__, method.__name__)
        made.__doc__, made.__qualname__, made.__module__ = method.__doc__, method.__qualname__, method.__module__
        made.__dict__["__signature__"] = shown
        inner = inspect.unwrap(function)
        if called is not function and isinstance(inner, FunctionType):
            # torch.fx looks at the arguments in its code, to trace the wrapper itself. (Not the function: it would be
            # kept, and so would all that it closes over.)
            empty = tuple(CellType() for _ in inner.__code__.co_freevars)
            made.__dict__["__wrapped__"] = FunctionType(inner.__code__, {}, inner.__name__, None, empty)
            made.__dict__["__wrapped__"].__dict__["__signature__"] = shown
        members = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        known[key] = type(kind.__name__, (kind,), {**members, "forward": made})
    return known[key]


_MEASURE = "measure"  # as ``optimize``
_OWN = frozenset({"module", "_dispatcher", "_settings"})


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
            ``PathOptimizer``, a callable); or ``"measure"``: as ``"auto"``, but where code is made for the sizes of one
            call, up to four orders of each network are timed on random tensors of these sizes, with the backward pass
            where autograd follows, and another one is taken where it is clearly faster. That takes up to a second for
            each network, and the memory of another set of its operands. What was fastest may differ between
            processes: ranks that are to agree call ``load_plans`` with one file.
        memory_limit: no intermediate of a contraction is larger: bytes, or text as ``"512MiB"``.
        backend: what runs the optimized code: ``"eager"`` (generated Python code that calls torch), ``"inductor"`` or
            any other name that ``torch.compile`` takes, or a callable ``(graph_module, example_inputs) -> callable``.
            What it can't run, runs as ``"eager"``, with one ``BackendWarning``.
        backend_options: ``mode`` and ``options`` of the backend, as ``torch.compile`` takes them.
        compile_after: so many calls of each signature run as ``"eager"`` before the backend is asked: what comes rarely
            never waits for a compiler.
        background: whether Inductor, after these calls, compiles in a process of its own (of less priority than this
            one) while calls go on as ``"eager"``. What is left for a call then is to look the code up in the caches on
            disk. Other backends compile in the call.
        on_untraceable: what to do with a call that can't be traced, after which the child runs as it is: ``"warn"``
            (once for each reason), ``"ignore"``, or ``"raise"``.
        leaf_modules: types or qualified names of submodules that stay live calls and are not traced through.
        reassociate: ``None``: products are reordered except in float16; ``True``: float16 too; ``False``: only within
            one einsum call.
        frozen: qualified names of parameters and buffers that you promise not to change (``True``: of all). What
            depends on these only is computed once and kept, where none of it requires a gradient or grad mode is off:
            ``cache_info().fold_bytes`` counts the bytes. It is computed anew after ``train()``, ``eval()``,
            ``load_state_dict()`` and ``to()`` of the wrapper, and where torch can tell that one of them is another
            tensor, or was written. Fused optimizers and writes to ``.data`` can't be told: hence the promise.
            ``drop_folds()`` ends it until the next call.
        verify: whether the first call of each signature also runs the module itself and compares.
        dynamic: when code is made that is generic in sizes (and Python numbers) that vary: ``None``: at the third
            value, and values that come often get code of their own; ``True``: at the second; ``False``: never.
        saved_limit: what autograd may save of contractions for the backward pass, in parts of what it saves when the
            module runs as it is: the fastest orders within 1.1 times that are taken. A larger number or ``None`` (no
            limit) allows faster orders that save more. Other orders than those of ``optimize="auto"`` are not limited.

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
        frozen: Iterable[str] | bool = (),
        verify: bool = False,
        dynamic: bool | None = None,
        saved_limit: float | None = SAVED_LIMIT,
        backend_options: Mapping[str, Any] | None = None,
        compile_after: int = 0,
        background: bool = True,
    ) -> None:
        if not callable(module):
            raise TypeError(f"OptimizedModule wraps an nn.Module or a callable, got {type(module).__name__}")
        if isinstance(maxsize, bool) or not isinstance(maxsize, int) or maxsize < 1:
            raise ValueError(f"maxsize must be an integer of at least 1, got {maxsize!r}")
        if on_untraceable not in _ON_UNTRACEABLE:
            raise ValueError(f"on_untraceable must be one of {_ON_UNTRACEABLE}, got {on_untraceable!r}")
        if isinstance(compile_after, bool) or not isinstance(compile_after, int) or compile_after < 0:
            raise ValueError(f"compile_after must be an integer of at least 0, got {compile_after!r}")
        if not isinstance(background, bool):
            raise ValueError(f"background must be True or False, got {background!r}")
        for name, value in (("reassociate", reassociate), ("dynamic", dynamic)):
            if value not in (None, True, False):
                raise ValueError(f"{name} must be None, True or False, got {value!r}")
        if optimize != _MEASURE:
            check_optimize(optimize)
        _check_saved_limit(saved_limit)
        leaf_modules, frozen = tuple(leaf_modules), _check_frozen(module, frozen)
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
            "dynamic": dynamic,
            "saved_limit": saved_limit,
            "backend_options": dict(backend_options or {}),
            "compile_after": compile_after,
            "background": background,
        }
        own: dict[str, Any] = {"module": module, "_settings": settings, "_dispatcher": _dispatcher(module, settings)}
        # Not in __new__, which would hide the options from those who ask for the signature of the class.
        object.__setattr__(self, "__class__", _shows_arguments(type(self), module))
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
        if _is_compiling() or _function_modes() or _disabled or _jit_tracing() is not None or _fx_tracing():
            reason = "disabled" if _disabled else ambient_module.bypass()
            if reason is not None:
                if not _disabled and ambient_module.is_exporting():
                    return run_exported(self._dispatcher, self.module, args, kwargs)
                if _is_dynamo_compiling():
                    plan_by_hints()
                return self.module(*args, **kwargs)
            tracer = ambient_module.tracer_of((*args, *kwargs.values()))
            if tracer is not None and tracer.root is not self:
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return self._dispatcher(self.module, args, kwargs)

    # -- inspection

    def prepare(self, *args: Any, **kwargs: Any) -> Specialization:
        """Build the specialization for these arguments without running it. Only the types of the arguments are looked
        at, so tensors on ``device="meta"`` do for shapes, but stand for the device ``meta``; ``torch.empty`` of the
        right device costs no time either.

        Raises:
            UntraceableError: the call can't be traced.
        """
        entry: Specialization = self._dispatcher.prepare(self.module, args, kwargs)
        return entry

    def explain(self, *args: Any, measure: bool = False, **kwargs: Any) -> Report:
        """What is done for a call with these arguments (as ``prepare``, which it calls; the module does not run), or,
        without arguments, for all specializations so far.

        Args:
            *args: arguments of the call.
            measure: also time each step, and the same calls as they were written, on random tensors.
            **kwargs: keyword arguments of the call.
        """
        entries, reason = list(self.specializations.values()), ""
        if args or kwargs:
            try:
                entries = [self.prepare(*args, **kwargs)]
            except UntraceableError as error:  # its parts may be specialized
                reason = str(error)
        dispatcher = self._dispatcher
        options = dispatcher.settings.options
        return explain(name_of(self.module), dispatcher.cache, entries, options, reason, measure)

    def cache_info(self) -> CacheInfo:
        """Hits, misses and so on."""
        cache: Cache = self._dispatcher.cache
        with cache.lock:
            return cache.info

    def save_plans(self, path: str | os.PathLike[str]) -> int:
        """Write the contraction orders of all specializations to a file of JSON, for ``load_plans`` of other processes.
        Whoever reads the file meanwhile finds all of it, or what was there before.

        Args:
            path: of the file, which is replaced.

        Returns:
            How many orders were written.

        Raises:
            OSError: the file can't be written.
        """
        orders = {key: order for entry in self.specializations.values() for key, order in entry.orders.items()}
        write_plans(path, orders)
        return len(orders)

    def load_plans(self, path: str | os.PathLike[str]) -> int:
        """Take contraction orders from a file that ``save_plans`` wrote: what is built from now on, here or by another
        wrapper of this process, does not search for these, nor measure. Each is taken only for the very einsum, sizes
        and options that it was chosen for. Those of another version of the packages, and those measured on another kind
        of device (or with another number of threads), are left out, with a ``PlanFileWarning``. Several files can be
        loaded; of two orders for the same, the later one counts.

        Args:
            path: of the file.

        Returns:
            How many orders were read.

        Raises:
            PlanFileError: there is no such file, or something else in it. Nothing is taken from it then.

        >>> import tempfile
        >>> m = OptimizedModule(lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z))
        >>> shapes = torch.rand(2, 9), torch.rand(9, 9), torch.rand(9, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     specialization = m.prepare(*shapes)
        ...     m.save_plans(f"{folder}/plans.json") == m.load_plans(f"{folder}/plans.json") > 0
        True
        """
        orders = read_plans(path)
        learn(orders)
        return len(orders)

    def cache_clear(self) -> None:
        """Drop all specializations and set the statistics to zero."""
        self.__dict__["_dispatcher"] = _dispatcher(self.module, self._settings)

    def drop_folds(self) -> None:
        """Drop all that was computed once of ``frozen`` tensors: the next call computes it anew."""
        self._dispatcher.cache.folds.clear()

    @property
    def specializations(self) -> Mapping[Signature, Specialization]:
        """Read-only: signature -> specialization, least recently used first."""
        cache: Cache = self._dispatcher.cache
        with cache.lock:
            return MappingProxyType(cache.by_use())

    @property
    def code(self) -> str:
        """Generated code of the specialization used last.

        Raises:
            NotSpecializedError: nothing was specialized yet.
        """
        entries = list(self.specializations.values())
        if not entries:
            raise AttributeError  # Python asks __getattr__ then
        return entries[-1].code

    # -- in the child's place

    @property
    def training(self) -> bool:
        """The child's mode."""
        return bool(getattr(self.module, "training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        if isinstance(self.module, nn.Module):
            self.module.training = mode
            self.drop_folds()

    def train(self, mode: bool = True) -> OptimizedModule:
        """As ``nn.Module.train``, by the child's own method."""
        if isinstance(self.module, nn.Module):
            self.module.train(mode)
            self.drop_folds()
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> OptimizedModule:
        """As ``nn.Module.apply``; ``fn`` sees the child, not this wrapper."""
        if isinstance(self.module, nn.Module):
            self.module.apply(fn)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        if isinstance(self.module, nn.Module):
            self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.drop_folds()
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
        try:
            return self.module.load_state_dict(state_dict, strict=strict, assign=assign)
        finally:
            self.drop_folds()  # in part it is loaded where it raises

    def _load_from_state_dict(self, *args: Any) -> None:
        if isinstance(self.module, nn.Module):
            self.module._load_from_state_dict(*args)
            self.drop_folds()

    def __getattr__(self, name: str) -> Any:
        try:
            # First as any module: the tables are shared with the child (and a trace's stand-in of this wrapper finds
            # all of its attributes there).
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            if name == "code":
                text = "nothing is specialized yet: call the module, or prepare(...), first"
                raise NotSpecializedError(text) from None
        child = self.module
        value = getattr(child, name)
        is_method = type(value) is MethodType and value.__self__ is child and isinstance(child, nn.Module)
        if is_method and ambient_module.bypass() is None:
            # So that ``self(x)`` in a method (as in ``generate``) is optimized too.
            return MethodType(value.__func__, self._dispatcher.stand_in(child))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError(
                f"the class of {type(self).__name__} can't be changed to {value.__name__} (as parametrizations do); "
                "change, or parametrize, its .module"
            )
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

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` compiles: the child, as this wrapper takes any arguments, which TorchScript has no
        types for.
        """
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        # Some children have one of their own (parametrized ones do), which would be found in its place.
        rebuild, arguments = self.__reduce_ex__(4)
        wrapper = memo[id(self)] = rebuild(*copy.deepcopy(arguments, memo))
        return wrapper  # type: ignore[no-any-return]

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
    names = settings["frozen"]
    if names is not True:
        # The module may have other parameters by now (parametrizations do that).
        settings = settings | {"frozen": tuple(name for name in names if name in _tensor_names(module))}
    wrapper = OptimizedModule(module, **settings)
    wrapper.__dict__.update(hooks)
    return wrapper


def _dispatcher(module: Any, settings: Mapping[str, Any]) -> WholeDispatcher:
    """What calls the child of a wrapper with these settings; its cache is empty."""
    measure = settings["optimize"] == _MEASURE
    options = Options(
        "auto" if measure else settings["optimize"],
        _bytes(settings["memory_limit"]),
        settings["reassociate"],
        settings["saved_limit"],
        bool(settings["frozen"]),
        measure,
    )
    chosen = Settings(
        options,
        _leaf_test(settings["leaf_modules"]),
        settings["on_untraceable"],
        settings["verify"],
        settings["dynamic"],
        _frozen_test(module, settings["frozen"]),
        find_backend(settings["backend"], settings["backend_options"]),
        settings["compile_after"],
        settings["background"],
    )
    return WholeDispatcher("", chosen, Cache(settings["maxsize"]))


def _leaf_test(leaf_modules: tuple[type | str, ...]) -> Callable[[nn.Module, str], bool]:
    names = frozenset(leaf for leaf in leaf_modules if isinstance(leaf, str))
    types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
    return lambda module, name: name in names or isinstance(module, types)


def _tensor_names(module: Any) -> list[str]:
    """The qualified names of all parameters and buffers, those that are shared by each."""
    if not isinstance(module, nn.Module):
        return []
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [name for name, _ in named]


def _check_frozen(module: Any, frozen: Iterable[str] | bool) -> tuple[str, ...] | bool:
    """``frozen`` as a tuple of names, or ``True``."""
    if isinstance(frozen, str):
        raise TypeError(f"frozen takes a sequence of names, got the text {frozen!r}; write ({frozen!r},)")
    if isinstance(frozen, bool):
        return frozen or ()
    names, known = tuple(frozen), _tensor_names(module)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"frozen names {', '.join(map(repr, unknown))}, which {type(module).__name__} does not have; expected "
            f"names of its parameters and buffers: {', '.join(known) or 'it has none'}"
        )
    return names


def _frozen_test(module: Any, frozen: tuple[str, ...] | bool) -> Callable[[str], bool]:
    """Whether a name is that of a frozen tensor which stays in one place: sharded ones come and go."""
    if frozen is False or not frozen or not isinstance(module, nn.Module):
        return lambda name: False
    root = weakref.ref(module)
    names = None if frozen is True else frozenset(frozen)

    def is_frozen(name: str) -> bool:
        holder = root()
        if names is not None and name not in names:
            return False
        for step in name.split(".")[:-1]:
            if holder is None or holds_sharded(holder):
                return False
            holder = holder._modules.get(step)
        return holder is not None and not holds_sharded(holder)

    return is_frozen


def _check_saved_limit(limit: float | None) -> None:
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if limit is not None and not (number and limit >= 1):
        raise ValueError(
            f"saved_limit must be a number of at least 1 (saved for the backward pass, in parts of what the module "
            f"itself saves) or None (no limit), got {limit!r}"
        )


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
