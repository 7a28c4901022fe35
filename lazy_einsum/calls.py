"""Which torch functions a trace may answer, must refuse or can record, and the names of calls in a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

# Asked of tensors, these answer from the tensors' types alone (shape, dtype, strides, device, requires_grad ...), all
# of which are in the key.
QUERIES = frozenset(
    """
    shape size dim ndim ndimension numel nelement dtype device layout itemsize element_size nbytes get_device is_cuda
    is_cpu is_meta is_mps is_xpu is_hpu is_xla is_ipu is_maia is_mtia is_vulkan is_sparse is_sparse_csr is_mkldnn
    is_quantized is_nested is_floating_point is_complex is_signed is_inference is_conj is_neg requires_grad is_leaf
    is_contiguous stride type __len__ names has_names is_same_size result_type promote_types can_cast
    is_tensor dim_order output_nr
    """.split()
)
# Arithmetic on symbolic numbers, which torch sends the same way as calls on tensors.
ARITHMETIC = frozenset(name for name in dir(torch) if name.startswith(("sym_", "_sym_")))
# Of those, the ones whose answer depends on more than shapes and dtypes.
LAYOUT_QUERIES = frozenset({"is_contiguous", "stride", "dim_order"})
# These change the autograd state of a tensor, its identity or its storage, in ways that a graph of calls would not
# repeat for the user.
REFUSED = frozenset(
    """
    backward detach_ set_ resize_
    resize_as_ share_memory_ rename_ data_ptr untyped_storage storage _typed_storage numpy tolist item __array__
    __reduce_ex__ __deepcopy__ pin_memory is_shared is_pinned grad grad_fn _version _base _make_subclass as_subclass
    _make_wrapper_subclass to_sparse manual_seed set_state
    """.split()
)
# These register what autograd is to do with a gradient.
HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
# Operations that write arguments which their schemas do not show as written: positions of the arguments.
HIDDEN_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::_batch_norm_impl_index": (3, 4),
    "aten::batch_norm": (3, 4),
    "aten::instance_norm": (3, 4),
}
# These take a dtype from the type of the numbers that they are given.
INFERRING = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "scalar_tensor"})
_NAMES = """
    add sub mul truediv floordiv mod pow matmul neg pos invert abs and or xor lshift rshift lt le eq ne gt ge getitem
    setitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift
""".split()
# By identity as well as by name: Tensor.__pow__ calls itself "pow".
OPERATORS: dict[Any, Callable[..., Any]] = {}
REFLECTED: dict[Any, Callable[..., Any]] = {"__rdiv__": operator.truediv}
for _word in _NAMES:
    _operator = getattr(operator, _word, None) or getattr(operator, _word + "_")
    for _table, _method in ((OPERATORS, f"__{_word}__"), (REFLECTED, f"__r{_word}__")):
        if hasattr(torch.Tensor, _method):
            _table[_method] = _table[getattr(torch.Tensor, _method)] = _operator


def call_name(func: Any) -> str:
    """The name of a torch function; of a property, for its getter and setter."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return str(
            getattr(func.__self__, "__name__", None) or getattr(getattr(func.__self__, "fget", None), "__name__", name)
        )
    return str(name)


def undropped(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None
) -> torch.Tensor | None:
    """What a call of ``torch.nn.functional.dropout``, or of ``torch.dropout``, with these arguments gives if it drops
    nothing: its operand.
    """
    drops = training if train is None else train
    return input if (p == 0 or not drops) and 0 <= p <= 1 and not inplace else None
