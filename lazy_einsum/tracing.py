"""``trace``: run a module's ``forward`` on fake tensors and record every torch function it calls, as an ``fx.Graph``
with ``Facts`` on each node.

Three layers lie above each other while ``forward`` runs: the recorder (a ``TorchFunctionMode``) sees ``torch.einsum``
as one call with its text and appends it to the graph; the net (a ``TorchDispatchMode``) sees each operation that
really happens, refuses those outside of a recorded call and notes what is written; fake tensors compute shapes,
dtypes and strides, and allocate nothing. What can't be represented raises ``UntraceableError``; nothing is ever
guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import ambient as ambient_module
from .errors import UntraceableError
from .fakes import data_dependent_errors, quiet
from .live import Caller, direct_call
from .outside import Addition, made
from .record import Trace
from .recorder import Recorder
from .signature import Arguments
from .symbols import NotGenericError, Symbols
from .where import line_of


def trace(
    function: Any,
    arguments: Arguments,
    is_leaf: Callable[[nn.Module, str], bool] = lambda module, name: False,
    hooked: Callable[[str], Caller] = lambda name: direct_call,
) -> Trace:
    """Record what ``function`` does for arguments of the given types. No operation runs on real data, and
    ``function``'s own state is left as it was.

    Args:
        function: an ``nn.Module`` (its ``forward`` is recorded, not its hooks) or any callable.
        arguments: structure, types and constants of the call.
        is_leaf: which submodules stay live calls; called with the module and its qualified name.
        hooked: what calls a submodule that stays a live call because it has hooks, by its qualified name.

    Raises:
        UntraceableError: the call can't be represented; the message names the reason and, where known, the user's
            file and line.
        NotGenericError: it can, but not for all values of the symbols among the arguments.
    """
    try:
        found, additions = _trace(function, arguments, is_leaf, hooked)
        if additions:
            # A cache that the first call fills. Once more as later calls will find it: it must make no difference.
            with made(additions):
                again, more = _trace(function, arguments, is_leaf, hooked)
            if more or not again.equals(found):
                raise UntraceableError(f"forward changes {additions[0].name}")
        return found
    except NotGenericError:
        raise
    except UntraceableError as error:
        if not arguments.symbols:
            raise
        raise NotGenericError(str(error)) from error


def _trace(
    function: Any,
    arguments: Arguments,
    is_leaf: Callable[[nn.Module, str], bool],
    hooked: Callable[[str], Caller],
) -> tuple[Trace, list[Addition]]:
    """What ``trace`` gives, and what ``forward`` added to dictionaries of packages; all of that is undone."""
    symbols = Symbols(arguments.symbols) if arguments.symbols else None
    random_state = ambient_module.RandomState()
    grad = torch.is_grad_enabled()
    recorder = Recorder(is_leaf, random_state, symbols, hooked)
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
            changed = recorder.shadows.outside.restore()
        if recorder.failure is not None:  # raised inside, but swallowed by an ``except`` of the user's
            raise recorder.failure
        if reseeded is not None:
            raise UntraceableError(f"forward draws from or seeds {reseeded}")
        if changed is not None:
            raise UntraceableError(f"forward changes {changed}")
        additions = recorder.shadows.outside.additions
        found = recorder.finish(result)
        del result
        recorder.forget()
        if not recorder.are_gone():
            raise UntraceableError(
                "forward keeps a tensor where it outlives the call (a cache, a global, an attribute of an object)"
            )
        return found, additions
    except UntraceableError as error:
        if recorder.failure is not None and recorder.failure is not error:
            raise recorder.failure from None
        raise
    except Exception as error:
        failure = recorder.failure
        if failure is not None:
            raise failure from None
        side_effect = recorder.shadows.side_effect() if isinstance(error, (TypeError, KeyError)) else None
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
