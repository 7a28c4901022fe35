"""What a call depends on beside its arguments and its module: torch's modes. Every private function of torch that reads
such state is used here only.

``bypass`` says when a call belongs to somebody else's trace or mode and must run the module as it is; ``ambient`` is
the part of the key for all other calls.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler
from torch.utils._device import DeviceContext

from .signature import TensorType
from .sizes import is_symbolic

# There is no public way to ask how many modes are active (torch.overrides and torch.utils._python_dispatch keep their
# stacks in C++). These two cost 45 ns each.
_function_mode_stack: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack
function_modes: Callable[[], int] = torch._C._len_torch_function_stack
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
# torch.is_autocast_enabled(device_type) is public, but asks for one kind of device at a time (127 ns each); this one
# asks for all of them.
jit_tracing: Callable[[], object] = torch._C._get_tracing_state
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def bypass() -> str | None:
    """Why this call must not be specialized here, or ``None``: it is being traced, compiled or transformed by
    somebody else.
    """
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if jit_tracing() is not None:
        return "torch.jit.trace is tracing"
    if dispatch_modes():
        return "a TorchDispatchMode is active"
    if in_functorch():
        return "a torch.func transform is active"
    if function_modes() and not all(type(mode) is DeviceContext for mode in _function_mode_stack()):
        return "a TorchFunctionMode is active"
    return None


fx_tracing: Callable[[], bool] = torch.fx._symbolic_trace.is_fx_symbolic_tracing
# Whether a Tracer of torch.fx records, in any thread. There is no public query.


def tracer_of(arguments: Sequence[Any]) -> torch.fx.Tracer | None:
    """The tracer of ``torch.fx`` that records a call with these arguments."""
    proxies = (leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, torch.fx.Proxy))
    tracer = next((proxy.tracer for proxy in proxies), None)
    return tracer if isinstance(tracer, torch.fx.Tracer) else None


def is_exporting() -> bool:
    """Whether ``torch.export`` runs this code on fake tensors and records operations. (Where Dynamo reads the code
    first, it is not run. That export follows functions of torch has no public query.)
    """
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return False
    return any(type(mode).__name__ == "PreDispatchTorchFunctionMode" for mode in _function_mode_stack())


@contextmanager
def apart_from_export() -> Iterator[None]:
    """A context in which nothing is recorded, and tensors are real, while ``torch.export`` runs. (There is no public
    way.)
    """
    devices = [mode.device for mode in _function_mode_stack() if type(mode) is DeviceContext]
    with ExitStack() as stack:
        stack.enter_context(no_modes())
        while function_modes():
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        for device in devices:
            stack.enter_context(device)
        yield


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
# One of torch's dictionaries each, changed in place by torch.nn.modules.module.register_module_*_hook, which are
# public; that any are registered is not.


def global_module_hooks() -> bool:
    """Whether hooks are registered that fire at the call of any module."""
    return any(GLOBAL_HOOKS)


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform is running. (No public query exists.)"""
    return torch._C._functorch.peek_interpreter_stack() is not None


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost pair of saved-tensor hooks, or ``None``; ``torch.utils.checkpoint`` and ``save_on_cpu``
    install such. (No public query exists.)
    """
    found: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def replace_saved_tensor_hooks() -> tuple[tuple[Any, Any] | None, tuple[Any, Any] | None]:
    """Put hooks that do nothing in the place of the innermost pair; that pair, and the one around it. (Leaving the
    user's context by its ``__exit__``, the public way, would need that context at hand.)
    """
    replaced = saved_tensor_hooks()
    torch._C._autograd._pop_saved_tensors_default_hooks()
    around = saved_tensor_hooks()
    torch._C._autograd._push_saved_tensors_default_hooks(lambda tensor: tensor, lambda tensor: tensor)
    return replaced, around


def own_saved_tensors() -> AbstractContextManager[Any]:
    """A context in which operations save tensors past the user's saved-tensor hooks: a checkpoint would count fakes,
    and ``save_on_cpu`` copy them. (Of nested pairs of hooks only the innermost is called.)
    """
    if saved_tensor_hooks() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def autocast_state() -> tuple[tuple[str, str], ...]:
    """The kinds of device with autocast on, each with its dtype."""
    if not any_autocast():
        return ()
    kinds = ("cpu", "cuda", "xpu", "mps", "hpu")
    return tuple((kind, str(torch.get_autocast_dtype(kind))) for kind in kinds if _autocast_on(kind))


def _autocast_on(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # a build of torch without this kind of device
        return False


def ambient() -> tuple[tuple[str, Any], ...]:
    """The modes that a trace may depend on, by name. Everything in it is hashable and holds no tensor.

    >>> dict(ambient())["grad"]
    True
    """
    devices: tuple[str, ...] = ()
    if function_modes():
        devices = tuple(str(mode.device) for mode in _function_mode_stack() if type(mode) is DeviceContext)
    return (
        ("grad", torch.is_grad_enabled()),
        ("inference", torch.is_inference_mode_enabled()),
        ("autocast", autocast_state()),
        ("default_dtype", str(torch.get_default_dtype())),
        ("default_device", devices),
    )


# torch.backends.cuda.matmul.fp32_precision and the like are public, at three times the time; the older flags and
# torch.set_float32_matmul_precision show here too.
_float32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter

_FLOAT32 = frozenset({torch.float32, torch.complex64})
_LIBRARIES = {"cpu": "mkldnn", "cuda": "cuda"}
"""Kinds of device whose kernels may round the operands of float32 products to fewer bits, by torch's name for these."""
# Few processors do, and many users allow it for all devices at once. (There is no public query.)
_HAS_TF32 = {"cpu": getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)(), "cuda": True}


def product_bits(kind: str, dtype: torch.dtype) -> str:
    """What torch's flags let matrix products of this dtype round their operands to on a kind of device: ``"tf32"`` or
    ``"bf16"``, or an empty string for nothing less than the dtype.
    """
    if dtype not in _FLOAT32 or kind not in _LIBRARIES:
        return ""
    found = _float32_precision(_LIBRARIES[kind], "matmul")
    return found if found == "bf16" or (found == "tf32" and _HAS_TF32[kind]) else ""


def precisions(kinds: Iterable[tuple[str, torch.dtype]]) -> tuple[object, ...]:
    """All that torch's flags say of the precision in which functions compute in these dtypes on these kinds of device.

    >>> precisions([("cpu", torch.float64)])
    ()
    """
    found: list[object] = []
    for kind, dtype in kinds:
        if dtype in _FLOAT32 and kind in _LIBRARIES:
            found += [product_bits(kind, dtype), _float32_precision(_LIBRARIES[kind], "conv")]
        elif dtype in (torch.float16, torch.bfloat16) and kind == "cuda":
            flags = torch.backends.cuda.matmul
            found += [
                flags.allow_fp16_reduced_precision_reduction,
                flags.allow_bf16_reduced_precision_reduction,
                flags.allow_fp16_accumulation,
            ]
    return tuple(found)


class Modes(NamedTuple):
    """The modes that single operations run in, apart from the grad mode.

    Attributes:
        inference: whether in ``torch.inference_mode()``.
        default_dtype: what ``torch.set_default_dtype`` has set.
        saved_hooks: the innermost pair of saved-tensor hooks.
        others: those that ``forward`` may not change on the way.
    """

    inference: bool
    default_dtype: torch.dtype
    saved_hooks: tuple[Any, Any] | None
    others: tuple[object, ...]

    @classmethod
    def now(cls) -> Modes:
        """The present ones."""
        others = (
            any_autocast() and autocast_state(),
            in_functorch(),
            torch.autograd.forward_ad._current_level,  # what dual_level() opens; there is no public query
            keeps_parametrized(),
        )
        return cls(torch.is_inference_mode_enabled(), torch.get_default_dtype(), saved_tensor_hooks(), others)


def keeps_parametrized() -> bool:
    """Whether ``torch.nn.utils.parametrize.cached()`` is active, which keeps tensors. (No public query exists.)"""
    return bool(torch.nn.utils.parametrize._cache_enabled)


def profiling() -> bool:
    """Whether one of torch's profilers is active. (Its flag is a name of that module, read at each call: 40 ns.)"""
    return profiler._is_profiler_enabled


def enter_range(name: str) -> Any:
    """Let a profiler show what follows under a name, until ``leave_range``."""
    entered = profiler.record_function(name)
    entered.__enter__()  # type: ignore[no-untyped-call]
    return entered


def leave_range(entered: Any) -> None:
    """End a range that ``enter_range`` gave."""
    entered.__exit__(None, None, None)


def no_modes() -> AbstractContextManager[Any]:
    """A context in which no ``TorchDispatchMode`` is active. (Leaving each mode by hand, the public way, would
    have to know all that are active.)
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def no_function_modes() -> AbstractContextManager[Any]:
    """A context in which no ``TorchFunctionMode`` is active. (There is no public way.)"""
    disabled: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return disabled


def generators(devices: Iterable[torch.device] | None = None) -> tuple[torch.Generator, ...]:
    """Torch's own random generators: the CPU's, and those of these CUDA devices; of all, where none are named. (There
    are none of CUDA's before its first use.)
    """
    others = torch.cuda.default_generators
    if devices is None:
        return (torch.default_generator, *others)
    numbers = {device.index for device in devices if device.type == "cuda" and device.index is not None}
    return (torch.default_generator, *(others[number] for number in sorted(numbers) if number < len(others)))


@contextmanager
def kept_random(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """A context after which torch's generators (see ``generators``) go on as if nothing in it had drawn from them."""
    before = [(generator, generator.get_state()) for generator in generators(devices)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def is_capturing(devices: Iterable[torch.device]) -> bool:
    """Whether the calls of this thread on these devices go to a CUDA graph, and run when that is replayed."""
    return any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing()


class RandomState:
    """Keeps the random generators of torch (CPU), Python and NumPy, to find out whether code draws from them or seeds
    them.

    Until ``restore`` they hold states that no seed of the user's gives, so that seeding with the seed that is in
    force shows too.

    All threads share these generators. Where there are others, what they draw would be taken for what this one does,
    and what they seed would be undone; so those of torch and Python are left alone then: ``impure.Watch``, which sees
    this thread only, finds calls that draw from them or seed them.
    """

    def __init__(self) -> None:
        self._is_alone = not _others_run()
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None
        seed = int.from_bytes(os.urandom(7), "little")
        if self._is_alone:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        self._probe = self._now()

    def restore(self) -> str | None:
        """Put everything back; the name of a generator that was used in between, or ``None``."""
        changed = [
            name for name, before, now in zip(_GENERATORS, self._probe, self._now(), strict=True) if before != now
        ]
        if self._is_alone:
            torch.default_generator.set_state(self._torch)
            random.setstate(self._python)
        if not self._is_alone or _others_run():
            changed = [name for name in changed if name not in _WATCHED]
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        return changed[0] if changed else None

    def same_torch(self) -> bool:
        """Whether torch's generator was not used, as far as that can be told."""
        return not self._is_alone or _bytes(torch.default_generator.get_state()) == self._probe[0]

    def _now(self) -> tuple[object, ...]:
        numpy_state: object = None
        if self._numpy is not None:
            name, keys, *rest = sys.modules["numpy"].random.get_state()
            numpy_state = (name, keys.tobytes(), rest)
        return _bytes(torch.default_generator.get_state()), random.getstate(), numpy_state


_GENERATORS = ("torch's random generator", "Python's random generator", "NumPy's random generator")
_WATCHED = _GENERATORS[:2]


def _others_run() -> bool:
    """Whether other threads may use generators, while calls of this one are watched."""
    return threading.active_count() > 1 and sys.getprofile() is None


def _bytes(state: torch.Tensor) -> bytes:
    # Not torch.equal: this is asked below modes that would see the operation, or take the tensor for a fake.
    return ctypes.string_at(state.data_ptr(), state.numel())


def tensor_check(types: Sequence[TensorType]) -> Callable[..., bool]:
    """A function of ``len(types)`` objects that says whether each is a tensor of its type and no two are the same
    object. Symbolic sizes, and strides made of them, pass whatever they are.

    It uses torch's own C++ check (the one behind ``torch.compile``), which is private: 0.06 us a tensor, where
    comparing shape, dtype, device, strides and ``requires_grad`` from Python, the public way, takes 0.25 us. The
    check covers the dispatch keys too, so it fails under autocast, inference mode and ``torch.func`` where the types
    were made outside of them.
    """
    from torch._C._dynamo.guards import TensorGuards

    examples = [_example(known) for known in types]
    sizes, strides = [], []
    for known in types:
        varies = any(map(is_symbolic, known.shape))
        sizes.append([None if is_symbolic(size) else size for size in known.shape])
        strides.append([None if varies and is_symbolic(step) else step for step in known.stride])
    make: Any = TensorGuards  # its stub asks for other types than it takes
    check: Callable[..., bool] = make(*examples, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _example(known: TensorType) -> torch.Tensor:
    with torch.inference_mode(known.is_inference):
        example = torch.empty((), dtype=known.dtype, device=known.device)
        if known.is_conj:
            example = example.conj()
        if known.is_neg:
            example = torch._neg_view(example)
        if known.is_parameter:
            return torch.nn.Parameter(example, requires_grad=known.requires_grad)
        return example.requires_grad_(known.requires_grad)
