"""Folds: values of frozen tensors that are computed once and kept: ``Fold`` is what is computed, ``Folds`` keeps the
values of one ``OptimizedModule``.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .graph import empty_like
from .signature import TensorType


@dataclass(frozen=True, eq=False)
class Fold:
    """A computation of frozen tensors only, as a call in a graph. It computes anew at each call; for one that does not
    see ``Folds.keep``.

    Attributes:
        names: qualified names of the tensors that it takes, in order.
        graph: the computation; a placeholder for each of them.
        type: of the value; it lies in memory of its own.
    """

    names: tuple[str, ...]
    graph: fx.Graph
    type: TensorType

    def __post_init__(self) -> None:
        _name(self)

    @property
    def code(self) -> str:
        """The computation as Python source."""
        return self.graph.python_code("self").src.strip("\n") + "\n"

    @property
    def key(self) -> Hashable:
        """Equal for two that compute the same of the same."""
        targets = [id(node.target) for node in self.graph.nodes if node.op == "call_function"]
        return self.names, self.code, tuple(targets), self.type

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.type.numel * self.type.dtype.itemsize

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Compute the value."""
        value: torch.Tensor = fx.Interpreter(nn.Module(), graph=self.graph).run(*tensors)
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        if value.stride() == self.type.stride and value.untyped_storage()._cdata not in own:
            return value
        # Code behind it was made for these strides, and einsums give others.
        laid_out = torch.empty_strided(self.type.shape, self.type.stride, dtype=value.dtype, device=value.device)
        return laid_out.copy_(value)


def _name(function: Any) -> None:
    """Give a callable object what ``fx`` needs to name it in code."""
    for name, value in (("__name__", "fold"), ("__qualname__", "fold"), ("__module__", __name__)):
        object.__setattr__(function, name, value)


def written_out(graph: fx.Graph) -> fx.Graph:
    """``graph`` with what each ``Fold`` computes in the place of its call. Values lie in memory as those of folds do:
    code behind them was made for that.
    """
    new = empty_like(graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if isinstance(node.target, Fold):
            values[node] = _write_out(new, node.target, [values[operand] for operand in node.all_input_nodes])
        else:
            values[node] = new.node_copy(node, values.__getitem__)
    return new


def _write_out(graph: fx.Graph, fold: Fold, operands: Sequence[fx.Node]) -> fx.Node:
    values: dict[fx.Node, fx.Node] = {}
    left = iter(operands)
    for node in fold.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "output":
            (result,) = node.all_input_nodes
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    value, dims = values[result], range(len(fold.type.shape))
    order = sorted(dims, key=lambda dim: (-fold.type.stride[dim], dim))
    if order == list(dims):
        return graph.call_method("contiguous", (value,))
    dense = graph.call_method("contiguous", (graph.call_method("permute", (value, order)),))
    return graph.call_method("permute", (dense, [order.index(dim) for dim in dims]))


class Kept:
    """A fold as generated code calls it: gives the value that is kept for the very tensors that it is called with, as
    they are; computes it where there is none.

    Args:
        fold: what is computed.
        folds: what keeps the value; not kept alive from here, as generated code lives longer than the module.
    """

    def __init__(self, fold: Fold, folds: Folds) -> None:
        _name(self)
        self.fold = fold
        self._folds = weakref.ref(folds)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The value."""
        folds = self._folds()
        if folds is None:
            return self.fold(*tensors)
        value = folds.values.get(self)
        if value is not None and value.is_of(tensors):
            return value.tensor
        return folds.compute(self, tensors)


class _State(NamedTuple):
    """A tensor, and its data, as they were at some time.

    The address of its data tells what the version does not: ``p.data = other`` and ``module.to(...)`` leave the object
    and its version as they are. As long as the storage is there, neither the address nor the object is that of another
    tensor with other data. (A weak reference to the tensor itself was rejected: ``torch.utils.swap_tensors``, which
    ``module.to(...)`` may use, refuses tensors that have any. There is no public weak reference to a storage.)
    """

    tensor: int
    version: int
    address: int
    storage: StorageWeakRef

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _State:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(id(tensor), tensor._version, tensor.data_ptr(), storage)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the one, as it was."""
        return (
            self.tensor == id(tensor)
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and not self.storage.expired()  # type: ignore[no-untyped-call]
        )


class _Value(NamedTuple):
    """What is kept of a fold.

    Attributes:
        tensor: the value.
        states: of the tensors that it was computed of.
        stream: that it was computed on; ``None`` for the CPU.
    """

    tensor: torch.Tensor
    states: tuple[_State, ...]
    stream: object

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is the value for these tensors, here and now."""
        for state, tensor in zip(self.states, tensors, strict=True):
            if not state.is_of(tensor):
                return False
        # A graph of CUDA's own keeps addresses, and drops of folds are not seen by it: there it is computed anew.
        return self.stream is None or (self.stream == _stream(tensors) and not torch.cuda.is_current_stream_capturing())


def _stream(tensors: Sequence[torch.Tensor]) -> object:
    """The stream that work on these tensors is queued on. A value is used on its own stream only: there it is computed
    before, and its memory is given away behind what uses it.
    """
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    return tuple(torch.cuda.current_stream(device) for device in devices) or None


class Folds:
    """The values of folds of one ``OptimizedModule``: one for each that is used by a specialization in its cache.

    Attributes:
        values: those that are kept now.
    """

    def __init__(self) -> None:
        self.values: dict[Kept, _Value] = {}
        self._lock = threading.RLock()
        self._users: Counter[Kept] = Counter()
        self._known: weakref.WeakValueDictionary[Hashable, Kept] = weakref.WeakValueDictionary()

    def keep(self, fold: Fold, ambient: Hashable) -> Kept:
        """What computes ``fold`` once in the modes ``ambient``: the same object for equal ones."""
        with self._lock:
            return self._known.setdefault((fold.key, ambient), Kept(fold, self))

    def use(self, kept: Iterable[Kept]) -> None:
        """Note one more specialization that uses these."""
        with self._lock:
            self._users.update(kept)

    def release(self, kept: Iterable[Kept]) -> None:
        """Note one less; values that none uses are dropped."""
        with self._lock:
            self._users.subtract(kept)
            for item in [item for item, count in self._users.items() if not count]:
                del self._users[item]
                self.values.pop(item, None)

    def clear(self) -> None:
        """Drop all values. They are computed again at their next use."""
        with self._lock:
            self.values.clear()

    def compute(self, kept: Kept, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the value of a fold, and keep it as long as a specialization uses it."""
        stream = _stream(tensors)
        if stream is not None and torch.cuda.is_current_stream_capturing():
            return kept.fold(*tensors)
        with self._lock:
            value = self.values.get(kept)
            if value is not None and value.is_of(tensors):
                return value.tensor  # another thread was faster
            states = tuple(map(_State.of, tensors))
            # An inference tensor can't be used under autograd later.
            with torch.inference_mode(False), torch.no_grad():
                tensor = kept.fold(*tensors)
            if kept in self._users:
                self.values[kept] = _Value(tensor, states, stream)
            return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all values that are kept now."""
        return sum(value.tensor.untyped_storage().nbytes() for value in list(self.values.values()))
