"""Optimized einsums for PyTorch modules: wrap a model in ``OptimizedModule`` and use it as before."""

from .cache import CacheInfo
from .contract import einsum
from .errors import (
    BackendWarning,
    CacheThrashWarning,
    EquationError,
    FallbackWarning,
    LazyEinsumError,
    LazyEinsumWarning,
    MachineFileError,
    MemoryLimitError,
    NotSpecializedError,
    PlanFileError,
    PlanFileWarning,
    UntraceableError,
)
from .functional import EfficientShapeProp, fuse_einsums, fuse_scalars, jitable, optimize_einsums, optimize_einsums_full
from .module import OptimizedModule, disabled
from .report import Report
from .signature import Signature, TensorType
from .specialize import Specialization
from .version import __version__

__all__ = [
    "BackendWarning",
    "CacheInfo",
    "CacheThrashWarning",
    "EfficientShapeProp",
    "EquationError",
    "FallbackWarning",
    "LazyEinsumError",
    "LazyEinsumWarning",
    "MachineFileError",
    "MemoryLimitError",
    "NotSpecializedError",
    "OptimizedModule",
    "PlanFileError",
    "PlanFileWarning",
    "Report",
    "Signature",
    "Specialization",
    "TensorType",
    "UntraceableError",
    "__version__",
    "disabled",
    "einsum",
    "fuse_einsums",
    "fuse_scalars",
    "jitable",
    "optimize_einsums",
    "optimize_einsums_full",
]
