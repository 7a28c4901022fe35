"""The backend ``lazy_einsum`` of ``torch.compile``: Dynamo captures graphs and checks that they hold, the passes
rewrite them, Inductor or another backend generates code.

No pass sees a symbol of Dynamo's: they run on the sizes of the first call, and where Dynamo has symbols, what they
write holds for all sizes of the same ranks. So a plan forces no new capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import cost
from .backends import INDUCTOR, as_torch_compile_does, spell_out_alpha
from .errors import BackendWarning, LazyEinsumError
from .fakes import fake_mode
from .functional import EfficientShapeProp, keep_layouts, put_back
from .graph import EVERYTHING, Facts, copy_graph, facts, stamp, writes
from .hints import SYMBOLS, hint, plan_by_hints
from .passes import OF_SIZES, PASSES, Options
from .passes.choose_paths import choose_paths
from .plan import check_optimize

_OWN = ("backend", "optimize", "memory_limit", "reassociate")
_MODES = frozenset({"_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"})


def compile_captured(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="lazy_einsum")`` calls with each graph that it captures.

    Args:
        module: the graph.
        example_inputs: its inputs in the call that is being captured.
        mode: goes to the backend that generates code.
        options: ``backend`` (what generates code: ``"inductor"``, or what ``torch.compile`` takes), ``optimize``,
            ``memory_limit`` in bytes and ``reassociate`` as ``OptimizedModule`` has them; all others go to the backend
            that generates code.

    Returns:
        A function of the graph's inputs.

    Raises:
        ValueError: an option is none of these.
    """
    given = dict(options or {})
    backend, optimize, limit, reassociate = (given.pop(name, default) for name, default in zip(_OWN, _DEFAULTS))
    check_optimize(optimize)
    generate = as_torch_compile_does(backend, mode, given)
    machine = cost.INDUCTOR if backend == INDUCTOR else cost.CPU
    planning = Options(optimize, limit, reassociate, machine=machine)
    try:
        put_back(module.graph, rewrite(module, example_inputs, planning))
        module.recompile()
    except LazyEinsumError:
        raise
    except Exception as error:  # the graph as it was captured is right too
        warnings.warn(
            f"a graph that torch.compile captured is compiled as it is: {type(error).__name__}: {error}",
            BackendWarning,
            stacklevel=2,
        )
    if backend == INDUCTOR:
        spell_out_alpha(module.graph)
        module.recompile()
    return generate(module, list(example_inputs))


_DEFAULTS = ("inductor", "auto", None, None)


def rewrite(module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> fx.Graph:
    """The graph of ``module`` after all passes; ``module`` stays as it is. Where sizes are symbolic, what the passes
    write holds for all sizes of the same ranks: those that write sizes into the code are left out.

    Args:
        module: captured by Dynamo, which notes on each placeholder what is known of its values.
        example_inputs: those of the first call.
        options: how to plan.
    """
    graph = copy_graph(module.graph)
    places = [node for node in graph.nodes if node.op == "placeholder"]
    given = [node.meta.get("example_value", value) for node, value in zip(places, example_inputs, strict=True)]
    is_generic = any(map(_is_symbolic, given))
    with fake_mode(allow_non_fake_inputs=True):
        examples = list(map(_example, given))
    EfficientShapeProp(module, graph=graph).run(*examples)
    if _writes_shared(graph, places, example_inputs):
        return graph
    _follow_modes(graph)
    for name, make_pass in PASSES:
        if not is_generic:
            graph = make_pass(replace(options, exact=True))(graph)
        elif name == "choose_paths":
            graph = choose_paths(options.optimize, options.memory_limit, generic=True)(graph)
        elif name not in OF_SIZES:
            graph = make_pass(options)(graph)
    graph = keep_layouts(module, graph, examples) if is_generic else graph
    for node in graph.nodes:
        node.meta.pop("lazy_einsum", None)
    graph.lint()
    return graph


def _is_symbolic(value: Any) -> bool:
    """Whether ``value`` is a symbol, or a tensor of symbolic sizes."""
    numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(number, SYMBOLS) for number in numbers)


def _writes_shared(graph: fx.Graph, places: Sequence[fx.Node], example_inputs: Sequence[Any]) -> bool:
    """Whether the graph writes to an input that shares memory with another: passes take these for separate. (Whether it
    is so at later calls too, nobody checks: torch.compile has that limit with any backend.)
    """
    written = {number for node in graph.nodes for number in writes(node)}
    storages = [value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None for value in example_inputs]
    return any(
        known is not None
        and (known.storage in written or EVERYTHING in written)
        and storage is not None
        and storages.count(storage) > 1
        for known, storage in zip(map(facts, places), storages, strict=True)
    )


def _example(known: Any) -> Any:
    """An input like ``known``, of plain sizes and without data."""
    if isinstance(known, SYMBOLS):
        return hint(known)
    if not isinstance(known, torch.Tensor):
        return known
    shape, stride = tuple(map(hint, known.shape)), tuple(map(hint, known.stride()))
    example = torch.empty_strided(shape, stride, dtype=known.dtype, device=known.device)
    return torch.nn.Parameter(example, known.requires_grad) if isinstance(known, torch.nn.Parameter) else example


def _follow_modes(graph: fx.Graph) -> None:
    """Note on each node the grad mode that it runs in, and whether other modes are switched around it."""
    grad, depth = torch.is_grad_enabled(), 0
    movable = not torch._C._is_any_autocast_enabled()
    for node in graph.nodes:
        known, name = facts(node) or Facts(), getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        depth += (name.startswith("_enter_")) - (name.startswith("_exit_")) if name in _MODES else 0
        is_switch = name == "_set_grad_enabled" or name in _MODES
        follows = known.type is not None and grad
        kept = replace(known.type, requires_grad=known.type.requires_grad and follows) if known.type else None
        stamp(node, replace(known, type=kept, grad=grad, movable=movable and not depth and not is_switch))


plan_by_hints()
