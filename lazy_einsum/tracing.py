"""``trace``: run a module's ``forward`` on fake tensors and record every torch function it calls, as an ``fx.Graph``
with ``Facts`` on each node.

Three layers lie above each other while ``forward`` runs: the recorder (a ``TorchFunctionMode``) sees ``torch.einsum``
as one call with its text and appends it to the graph; the net (a ``TorchDispatchMode``) sees each operation that
really happens, refuses those outside of a recorded call and notes what is written; fake tensors compute shapes,
dtypes and strides, and allocate nothing. What can't be represented raises ``UntraceableError``; nothing is ever
guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from . import ambient as ambient_module
from .errors import UntraceableError
from .fakes import data_dependent_errors, quiet
from .graph import NUMBER, type_of
from .recorder import Recorder, Trace
from .signature import Arguments
from .symbols import NotGenericError, Symbols
from .where import line_of


def trace(
    function: Any,
    arguments: Arguments,
    is_leaf: Callable[[nn.Module, str], bool] = lambda module, name: False,
) -> Trace:
    """Record what ``function`` does for arguments of the given types. No operation runs on real data, and
    ``function``'s own state is left as it was.

    Args:
        function: an ``nn.Module`` (its ``forward`` is recorded, not its hooks) or any callable.
        arguments: structure, types and constants of the call.
        is_leaf: which submodules stay live calls; called with the module and its qualified name.

    Raises:
        UntraceableError: the call can't be represented; the message names the reason and, where known, the user's
            file and line.
        NotGenericError: it can, but not for all values of the symbols among the arguments.
    """
    symbols = arguments.symbols
    if not symbols:
        return _trace(function, arguments, is_leaf)
    exact = _trace(function, arguments.exact(), is_leaf)
    try:
        found = _trace(function, arguments, is_leaf, Symbols(symbols))
    except NotGenericError:
        raise
    except UntraceableError as error:
        raise NotGenericError(str(error)) from error
    difference = _difference(exact.graph, found.graph, symbols)
    if difference is not None:
        # What user code did with a symbolic number was not what it does with a plain one.
        raise NotGenericError(f"forward does something else for sizes that vary: {difference}")
    return found


def _trace(
    function: Any,
    arguments: Arguments,
    is_leaf: Callable[[nn.Module, str], bool],
    symbols: Symbols | None = None,
) -> Trace:
    random_state = ambient_module.RandomState()
    grad = torch.is_grad_enabled()
    recorder = Recorder(is_leaf, random_state, symbols)
    # Autocast keeps casts of weights until it ends; it must not keep casts of fakes.
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        try:
            with quiet():
                result = recorder.run(function, arguments)
        finally:
            torch.set_grad_enabled(grad)
            torch.set_autocast_cache_enabled(cache)
            reseeded = random_state.restore()
            changed = recorder.shadows.restore_outer()
        if recorder.failure is not None:  # raised inside, but swallowed by an ``except`` of the user's
            raise recorder.failure
        if reseeded is not None:
            raise UntraceableError(f"forward draws from or seeds {reseeded}")
        if changed is not None:
            raise UntraceableError(f"forward changes {changed}")
        found = recorder.finish(result)
        del result
        if not recorder.forget():
            raise UntraceableError(
                "forward keeps a tensor where it outlives the call (a cache, a global, an attribute of an object)"
            )
        return found
    except UntraceableError as error:
        if recorder.failure is not None and recorder.failure is not error:
            raise recorder.failure from None
        raise
    except Exception as error:
        failure = recorder.failure
        if failure is not None:
            raise failure from None
        side_effect = recorder.shadows.side_effect() if isinstance(error, (TypeError, KeyError)) else None
        if side_effect is None and isinstance(error, (TypeError, KeyError)) and "assign" in str(error):
            side_effect = f"forward sets an attribute ({error})"
        reason = side_effect or _reason(error)
        place = line_of(error)
        raise UntraceableError(f"{reason} at {place}" if place else reason) from error
    finally:
        recorder.forget()


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if isinstance(error, data_dependent_errors()):
        return f"forward depends on the values of a tensor ({error})"
    return f"forward raised {name} while it ran on fake tensors: {str(error).splitlines()[0] if str(error) else ''}"


def _difference(exact: fx.Graph, generic: fx.Graph, symbols: Mapping[str, int | float]) -> str | None:
    """How two records of one call differ, numbers apart that the generic one computes; ``None`` where they agree."""
    scope = {"math": math, **symbols}
    ours = [node for node in exact.nodes if node.op != "placeholder"]
    theirs = [node for node in generic.nodes if node.op != "placeholder" and NUMBER not in node.meta]
    if len(ours) != len(theirs):
        return f"{len(theirs)} calls instead of {len(ours)}"
    inputs = [node for node in exact.nodes if node.op == "placeholder"]
    partner = dict(
        zip(inputs, [node for node in generic.nodes if node.op == "placeholder" and type_of(node)], strict=True)
    )

    def same(mine: Any, other: Any) -> bool:
        if isinstance(other, fx.Node) and not isinstance(mine, fx.Node):
            text = other.meta.get(NUMBER)
            return text is not None and bool(eval(text, scope) == mine)
        if isinstance(mine, fx.Node):
            return partner.get(mine) is other
        if type(mine) is not type(other):
            return False
        if isinstance(mine, (tuple, list)):
            return len(mine) == len(other) and all(map(same, mine, other))
        if isinstance(mine, dict):
            return list(mine) == list(other) and all(map(same, mine.values(), other.values()))
        if isinstance(mine, slice):
            return all(map(same, (mine.start, mine.stop, mine.step), (other.start, other.stop, other.step)))
        return bool(mine == other or (mine != mine and other != other))

    for mine, other in zip(ours, theirs, strict=True):
        partner[mine] = other
        known, found = type_of(mine), type_of(other)
        if mine.op != other.op or mine.target != other.target or not same(tuple(mine.args), tuple(other.args)):
            return f"{other.format_node()} instead of {mine.format_node()}"
        if not same(dict(mine.kwargs), dict(other.kwargs)):
            return f"{other.format_node()} instead of {mine.format_node()}"
        if (known is None) != (found is None):
            return f"{found} instead of {known} at {mine.format_node()}"
        if known is not None and found is not None:
            if known.dtype != found.dtype or known.shape != tuple(map(int, found.shape)):
                return f"{found} instead of {known} at {mine.format_node()}"
            if known.is_contiguous and not found.is_contiguous:
                return f"{found} instead of {known} at {mine.format_node()}"
    return None
