"""The tree of errors and warnings."""

from __future__ import annotations


class LazyEinsumError(RuntimeError):
    """Root of all errors raised by lazy_einsum (a ``RuntimeError``, as what ``torch.einsum`` raises)."""


class EquationError(LazyEinsumError, ValueError):
    """An einsum equation is malformed, or does not fit the shapes of its operands."""


class UntraceableError(LazyEinsumError):
    """A call of a module can't be represented as a graph; the message names the reason and the user's line."""


class NotSpecializedError(LazyEinsumError, AttributeError):
    """There is no code yet. (An ``AttributeError``, so that who lists attributes, as ``torch.jit`` does, passes by.)"""


class MemoryLimitError(LazyEinsumError):
    """No contraction order of an einsum stays below the memory limit."""


class PlanFileError(LazyEinsumError):
    """A file of saved plans is malformed or missing."""


class MachineFileError(LazyEinsumError):
    """A file of the constants of a machine is malformed or missing."""


class LazyEinsumWarning(UserWarning):
    """Root of all warnings of lazy_einsum."""


class FallbackWarning(LazyEinsumWarning):
    """A module, or a part of it, runs as it is because it could not be traced."""


class PlanFileWarning(LazyEinsumWarning):
    """Saved plans are ignored, because they were made by another version or measured on another kind of device."""


class BackendWarning(LazyEinsumWarning):
    """Specialized code runs as generated Python code that calls torch, because its backend can't run it."""


class CacheThrashWarning(LazyEinsumWarning):
    """Specializations are evicted as fast as they are built."""
