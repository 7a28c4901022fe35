"""Backends: what turns a graph of torch calls into a faster function of the same tensors (Inductor and others)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import cost
from .cost import Machine

Compile = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Sequence[Any]]]
"""Makes a function of the graph's placeholders out of a graph, and tensors like those that will come."""

EAGER = "eager"
"""Generated Python code that calls torch: what runs where no backend does."""

INDUCTOR = "inductor"
"""Torch's own compiler."""

_compiling = threading.RLock()  # torch's compilers patch their configuration, which all threads see, while they run


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend with its options.

    Attributes:
        name: as the user has it.
        compile: what it does.
        takes_fakes: whether tensors without data do as examples. Others are given zeros, as they may run the graph.
        options: ``mode`` and ``options``, as the user gave them.
    """

    name: str
    compile: Compile
    takes_fakes: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """What the code is to be fast on that it is given."""
        return cost.INDUCTOR if self.is_inductor else cost.CPU

    @property
    def is_inductor(self) -> bool:
        """Whether it is torch's own compiler."""
        return self.compile.__class__ is _Compiler and self.name == INDUCTOR

    @property
    def has_disk_cache(self) -> bool:
        """Whether what it makes is found in caches on disk, by other processes too."""
        return self.is_inductor and _caches_on_disk()


def find_backend(backend: str | Callable[..., Any], options: Mapping[str, Any]) -> Backend | None:
    """The backend that is meant; ``None`` for ``"eager"``.

    Args:
        backend: a name that ``torch.compile(backend=...)`` takes, or a callable on a graph and example inputs.
        options: ``mode`` and ``options``, as ``torch.compile`` takes them.

    Raises:
        ValueError: there is no backend of this name, or it has no such mode or option.
        TypeError: it is no name and no callable, or an option has the wrong type.
    """
    unknown = set(options) - {"mode", "options"}
    if unknown:
        raise ValueError(f"backend_options has {sorted(unknown)}; expected 'mode' and 'options', as torch.compile has")
    if not isinstance(backend, str) and not callable(backend):
        raise TypeError(f"backend must be a name or a callable, got {type(backend).__name__}")
    if backend == EAGER:
        if options:
            raise ValueError("backend_options has no meaning for the backend 'eager'")
        return None
    if isinstance(backend, str):
        known = sorted({EAGER, *torch.compiler.list_backends(exclude_tags=())})
        if backend not in known:
            raise ValueError(f"backend {backend!r} is unknown; torch.compile knows {', '.join(known)}")
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    compiler = _Compiler(backend, options.get("mode"), dict(options.get("options") or {}))
    return Backend(name, compiler, takes_fakes=backend == INDUCTOR, options=dict(options))


class _Compiler:
    """Calls a backend as ``torch.compile`` does.

    Args:
        backend: its name, or itself.
        mode: as ``torch.compile`` takes it.
        options: as ``torch.compile`` takes them.
    """

    def __init__(self, backend: str | Callable[..., Any], mode: str | None, options: dict[str, Any]) -> None:
        self._is_inductor = backend == INDUCTOR
        if self._is_inductor:
            # Random numbers from torch's own generators, in eager's order.
            options = {"fallback_random": True, **options}
        try:
            self._call = as_torch_compile_does(backend, mode, options)
        except RuntimeError as error:  # an option, or a mode, that it does not have
            raise ValueError(str(error)) from error

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Sequence[Any]]:
        if self._is_inductor:
            spell_out_alpha(graph.graph)
            graph.recompile()
        with _compiling, _saved_are_kept():
            compiled: Callable[..., Sequence[Any]] = self._call(graph, list(inputs))
        return compiled


def spell_out_alpha(graph: fx.Graph) -> None:
    """Write ``x.add(y, alpha=a)`` as ``x.sub(y, alpha=-a)``, in place: the same to the last bit.

    Inductor of torch 2.13 and 2.14 makes one call of a product of matrices and a sum that it goes into, and forgets
    ``alpha``: ``torch.add(x, a @ b, alpha=0.5)`` gives ``x + a @ b``. Of differences it makes no such call. (A product
    ``y * a`` would be of the dtype of ``y``, not of that of the sum.)
    """
    for node in graph.nodes:
        alpha = node.kwargs.get("alpha", 1)
        if node.target in _DIFFERENCES and isinstance(alpha, (int, float, complex)) and alpha != 1:
            node.target, node.kwargs = _DIFFERENCES[node.target], {**node.kwargs, "alpha": -alpha}


_DIFFERENCES = {
    "add": "sub",
    "add_": "sub_",
    torch.add: torch.sub,
    torch.Tensor.add: torch.Tensor.sub,
    torch.Tensor.add_: torch.Tensor.sub_,
}


# All that is private to torch is below. Each is in torch 2.13.0 and 2.14.1, on which the tests run.


def as_torch_compile_does(
    backend: str | Callable[..., Any], mode: str | None, options: dict[str, Any]
) -> Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., Any]]:
    """What ``torch.compile`` makes of its arguments. (``torch.compile(graph_module, backend=...)``, the public way to a
    backend by its name, has Dynamo capture the graph once more and check at each call what our key has checked: 27 us
    instead of 19 for a call of the README's first benchmark.)
    """
    # (Some versions of torch have no types for these.)
    wrapper: Any = torch._TorchCompileInductorWrapper if backend == INDUCTOR else torch._TorchCompileWrapper
    given = (mode, options) if backend == INDUCTOR else (backend, mode, options)
    found: Callable[..., Any] = wrapper(*given, dynamic=False)
    return found


def _caches_on_disk() -> bool:
    """Whether Inductor looks for code on disk. (There is no public query.)"""
    import torch._inductor.config as config

    return bool(config.fx_graph_cache) and not config.force_disable_caches


def _saved_are_kept() -> Any:
    """A context in which what is compiled leaves what was saved for a backward pass as it is, so that the pass can run
    again (``retain_graph=True``), as in eager mode. (Without it, that is an error; there is no public option.)
    """
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


def let_run_again(node: Any) -> None:
    """Tell the backward pass of a function that was compiled as ``_saved_are_kept`` says that it is so. (It looks at
    the option once more when it runs, where setting that, the public way, would change it for all of the process.)
    """
    metadata = type(node)._forward_cls.metadata
    if metadata.bw_donated_idxs is None:
        metadata.bw_donated_idxs = []


def is_compiled_backward(node: Any) -> bool:
    """Whether a node of autograd's graph is the backward pass of a compiled function: one that can't be differentiated
    again. (It has no public mark but its name.)
    """
    return type(node).__name__ == "CompiledFunctionBackward"


def keeps_graph() -> bool:
    """Whether the backward pass that is running may run again. (There is no public query.)"""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. (There is no public query.)"""
    return torch.autograd.forward_ad._current_level >= 0
