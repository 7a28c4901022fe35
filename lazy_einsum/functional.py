"""The one-shot functions: optimize a traced graph once, ahead of time; names and signatures are opt_einsum_fx's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn

from .errors import MemoryLimitError
from .fakes import EagerStrides, data_dependent_errors, fake_mode, is_fake
from .graph import (
    COPIES_AT_NEED,
    EVERYTHING,
    Copies,
    Facts,
    copy_graph,
    facts,
    is_einsum,
    read_einsum,
    stamp,
    tensor_nodes,
    type_of,
    writes,
)
from .passes.canonicalize import canonicalize
from .passes.choose_paths import choose_paths
from .passes.fuse_einsums import fuse_einsums as fuse_einsums_pass
from .passes.fuse_scalars import fuse_scalars as fuse_scalars_pass
from .passes.place_scalars import place_scalars
from .passes.share import share
from .plan import make_plan
from .signature import TensorType, contiguous_strides

_Obj = TypeVar("_Obj", fx.GraphModule, fx.Graph)


def optimize_einsums_full(
    model: nn.Module | Callable[..., Any] | fx.Graph,
    example_inputs: Sequence[Any],
    contract_kwargs: Mapping[str, Any] = {},
    tracer_class: type[fx.Tracer] = fx.Tracer,
) -> Any:
    """Optimize the einsums of ``model`` once, for the shapes of ``example_inputs``.

    The result is right for other sizes of the same ranks too; the contraction orders are those chosen for these. What
    ``torch.fx`` symbolic tracing can't see is not seen: control flow on values raises its ``TraceError``; grad mode,
    autocast, mutation of attributes and Python values are frozen as they are while tracing. ``OptimizedModule`` has
    none of these limits.

    Args:
        model: a module, a function, a ``GraphModule`` or a ``Graph``.
        example_inputs: positional arguments of ``model``; only shapes, dtypes and strides matter, no computation is
            done on them.
        contract_kwargs: ``optimize`` and ``memory_limit`` as ``opt_einsum.contract_path`` has them.
        tracer_class: traces what is no graph yet.

    Returns:
        A ``GraphModule``; for a ``Graph`` a ``Graph``.

    >>> def f(x, y, z):
    ...     return 0.5 * torch.einsum("ij,jk,kl->il", x, y, z)
    >>> print(optimize_einsums_full(f, (torch.rand(2, 100), torch.rand(100, 2), torch.rand(2, 100))).code.strip())
    def forward(self, x, y, z):
        einsum_1 = torch.functional.einsum('ab,bc->ac', x, y);  x = y = None
        mul_1 = 0.5 * einsum_1;  einsum_1 = None
        einsum = torch.functional.einsum('ab,bc->ac', mul_1, z);  mul_1 = z = None
        return einsum
    """
    if isinstance(model, fx.Graph):
        root, graph = model.owning_module or nn.Module(), model
    elif isinstance(model, fx.GraphModule):
        root, graph = model, model.graph
    else:
        tracer = tracer_class()
        graph = tracer.trace(model)
        root = tracer.root
    graph = copy_graph(graph)
    EfficientShapeProp(root, graph=graph).run(*example_inputs)
    for run in (
        canonicalize(),
        fuse_scalars_pass(),
        fuse_einsums_pass(),
        # A limit in elements, or an order of the user's own, is one for einsums as they are written.
        share("auto" if not contract_kwargs else None),
        _choose_paths(contract_kwargs),
        place_scalars(),
    ):
        graph = run(graph)
    graph = keep_layouts(root, graph, example_inputs)
    _show_types(graph)
    graph.lint()
    if isinstance(model, fx.Graph):
        return graph
    return fx.GraphModule(root, graph, type(root).__name__ if isinstance(model, fx.GraphModule) else "GraphModule")


def optimize_einsums(graph: fx.Graph, contract_kwargs: Mapping[str, Any] = {}) -> fx.Graph:
    """Choose a contraction order for each einsum of a graph that ``EfficientShapeProp``, or torch's, has gone through.

    Args:
        graph: stays as it is.
        contract_kwargs: ``optimize`` and ``memory_limit`` as ``opt_einsum.contract_path`` has them.

    Returns:
        A graph with einsums of one or two operands. An einsum of operands of unknown shape is left alone, with a
        ``RuntimeWarning``.

    >>> module = fx.symbolic_trace(lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z))
    >>> _ = EfficientShapeProp(module).run(torch.rand(2, 100), torch.rand(100, 2), torch.rand(2, 100))
    >>> [node.args[0] for node in optimize_einsums(module.graph).nodes if node.target is torch.einsum]
    ['ab,bc->ac', 'ab,bc->ac']
    """
    graph = copy_graph(graph)
    _stamp_from_tensor_meta(graph)
    new = _choose_paths(contract_kwargs)(graph)
    _show_types(new)
    new.lint()
    return new


def fuse_einsums(graph: fx.Graph, in_place: bool = False) -> fx.Graph:
    """Make one einsum of those that feed each other and nothing else, so that one order can be chosen for all.

    Args:
        graph: with facts or without.
        in_place: change ``graph`` itself.

    Raises:
        EquationError: the result of an einsum has another number of dimensions than the equation that uses it says.

    >>> def f(x, y):
    ...     z = torch.einsum("ij,jk->ik", x, y)
    ...     return torch.einsum("ik,ij->i", z, x)
    >>> print(fuse_einsums(fx.symbolic_trace(f).graph).python_code("self").src.strip())
    def forward(self, x, y):
        einsum_1 = torch.functional.einsum('ab,bc,ad->a', x, y, x);  x = y = None
        return einsum_1
    """
    new = fuse_einsums_pass()(graph)
    return put_back(graph, new) if in_place else new


def fuse_scalars(graph: fx.Graph, in_place: bool = False) -> fx.Graph:
    """Make one factor of the numbers that multiply and divide along each chain of multilinear calls.

    It ends on the smallest tensor of its chain where shapes are known, else at the end of the chain.

    Args:
        graph: with facts or without; without them tensors are taken to be real floating point.
        in_place: change ``graph`` itself.

    >>> def f(x, y):
    ...     return 7.0 * torch.einsum("ij,jk->ik", x, y / 4) / 2
    >>> print(fuse_scalars(fx.symbolic_trace(f).graph).python_code("self").src.strip())
    def forward(self, x, y):
        einsum = torch.functional.einsum('ij,jk->ik', x, y);  x = y = None
        mul = einsum * 0.875;  einsum = None
        return mul
    """
    new = place_scalars()(fuse_scalars_pass()(graph))
    return put_back(graph, new) if in_place else new


def jitable(obj: _Obj) -> _Obj:
    """Write calls (``tensordot``, ``permute``) the way TorchScript takes them, in place.

    Args:
        obj: a ``GraphModule`` or ``Graph``.

    Returns:
        ``obj``.
    """
    graph = obj.graph if isinstance(obj, fx.GraphModule) else obj
    node: fx.Node
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.tensordot and "dims" in node.kwargs:
            kwargs = dict(node.kwargs)
            dims = kwargs.pop("dims")
            lists = (
                tuple([side] if isinstance(side, int) else list(side) for side in dims)
                if isinstance(dims, (tuple, list))
                else dims
            )
            node.args, node.kwargs = (*node.args, lists), kwargs
        elif (
            node.op == "call_method"
            and node.target == "permute"
            and len(node.args) > 1
            and not isinstance(node.args[1], (tuple, list))
        ):
            node.args = (node.args[0], list(node.args[1:]))
    graph.lint()
    if isinstance(obj, fx.GraphModule):
        obj.recompile()
    return obj


class TensorMeta(NamedTuple):
    """What ``node.meta["tensor_meta"]`` holds after ``EfficientShapeProp``.

    Attributes:
        shape: of the value.
        dtype: of the value.
    """

    shape: torch.Size
    dtype: torch.dtype


class _Unknown:
    """Stands for the value of a node that can't be told without data."""


_UNKNOWN = _Unknown()


class EfficientShapeProp(fx.Interpreter):
    """Find shape, dtype and memory of every value of a graph without computing anything: it runs on fake tensors.

    After ``run``, each node has ``meta["tensor_meta"]`` (with ``.shape`` and ``.dtype``; ``None`` where the value is no
    tensor), ``meta["type"]``, and the facts that the passes read. No buffer
    changes, no random number is drawn, and the order in which an einsum is written costs nothing. Values that depend on
    data (``nonzero``, ``item``), and what is made of them, stay unknown.

    Args:
        module: the graph's module.
        garbage_collect_values: forget each value after its last use.
        graph: to interpret instead of ``module.graph``.

    >>> module = fx.symbolic_trace(lambda x: torch.einsum("ij,kj->ik", x, x))
    >>> _ = EfficientShapeProp(module).run(torch.rand(1000000, 3))
    >>> [node.meta["tensor_meta"].shape for node in module.graph.nodes if node.op == "call_function"]
    [torch.Size([1000000, 1000000])]
    """

    def __init__(self, module: nn.Module, garbage_collect_values: bool = True, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values, graph)
        self._storages: dict[int, tuple[int, Any]] = {}
        self._copies = Copies()
        self._fake_mode = _mode_of()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Go through the graph for arguments like ``args``; the result consists of fake tensors."""
        self._storages.clear()
        self._copies = Copies()
        self._fake_mode = _mode_of(args)
        fakes = torch.utils._pytree.tree_map(self._fake, tuple(args))
        # Without autograd, as example inputs may be leaves, which must not be written in place.
        with self._fake_mode, EagerStrides(), torch.no_grad():  # type: ignore[no-untyped-call]
            return super().run(*fakes, **kwargs)

    def propagate(self, *args: Any) -> Any:
        """The same as ``run``."""
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on fakes and stamp it."""
        taken = [self.env[node] for node in tensor_nodes((n.args, n.kwargs))]
        if n.op != "output" and any(value is _UNKNOWN for value in taken):
            return self._stamp(n, _UNKNOWN, writes(n))
        tensors = [value for value in torch.utils._pytree.tree_leaves(taken) if isinstance(value, torch.Tensor)]
        versions = [_version(tensor) for tensor in tensors]
        try:
            result = self._run(n)
        except data_dependent_errors():
            return self._stamp(n, _UNKNOWN, writes(n))
        written = {
            self._storage(tensor)
            for tensor, version in zip(tensors, versions, strict=True)
            if _version(tensor) != version
        }
        if self._called(n) in COPIES_AT_NEED and isinstance(result, torch.Tensor):
            self._copies.note({self._storage(tensor) for tensor in (*tensors[:1], result)})
        written = self._copies.reached(written)
        if n.op == "call_module" and _has_state_of_its_own(self.fetch_attr(str(n.target))):
            written = {EVERYTHING}
        return self._stamp(n, result, tuple(sorted(written)))

    def _called(self, n: fx.Node) -> str:
        """The name of what a node calls; that of ``nn.Flatten`` is ``"flatten"``."""
        if n.op == "call_module":
            return type(self.fetch_attr(str(n.target))).__name__.lower()
        return str(getattr(n.target, "__name__", n.target))

    def _run(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return torch.utils._pytree.tree_map(self._fake, super().run_node(n))
        if n.op == "call_module":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._call_module(self.fetch_attr(str(n.target)), args, kwargs)
        try:
            return super().run_node(n)
        except RuntimeError:
            found = read_einsum(n) if is_einsum(n) else None
            if found is None or len(found[1]) < 3:
                raise
        # In the order that torch takes, an intermediate may have more elements than an integer can count. Ours is no
        # worse, and says what is wrong if shapes don't fit.
        spec, operands = found
        values = [self.env[operand] for operand in operands]
        for step in make_plan(spec, [value.shape for value in values], generic=True).steps:
            values.append(torch.einsum(str(step.spec.canonical()), *(values[number] for number in step.operands)))
        return values[-1]

    def _call_module(self, module: Any, args: Any, kwargs: Any) -> Any:
        state = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        if isinstance(module, torch.jit.ScriptModule) or not state:
            return module(*args, **kwargs)
        # On fakes of its own tensors, lest a module that updates its buffers (BatchNorm) updates the real ones.
        return torch.func.functional_call(
            module, {name: self._fake(value) for name, value in state.items()}, args, kwargs
        )

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not is_fake(value):
            # Detached, as torch looks for the gradient of what it fakes, and warns where there can be none.
            return self._fake_mode.from_tensor(value if value.is_leaf else value.detach(), static_shapes=True)
        return value

    def _storage(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        return self._storages.setdefault(storage._cdata, (len(self._storages), storage))[0]

    def _stamp(self, n: fx.Node, result: Any, written: tuple[int, ...]) -> Any:
        if result is _UNKNOWN:
            # A type of None keeps scalars and einsums away from it; its memory may be any.
            stamp(n, Facts(None, EVERYTHING, written))
            n.meta["tensor_meta"], n.meta["type"] = None, None
        elif isinstance(result, torch.Tensor):
            # Later calls may come with inputs that require grad, so that is what the passes have to reckon with.
            follows = result.is_floating_point() or result.is_complex()
            stamp(n, Facts(replace(TensorType.of(result), requires_grad=follows), self._storage(result), written))
            n.meta["tensor_meta"] = TensorMeta(result.shape, result.dtype)
            n.meta["type"] = nn.Parameter if isinstance(result, nn.Parameter) else torch.Tensor
        else:
            stamp(n, Facts(None, None, written))
            n.meta["tensor_meta"], n.meta["type"] = None, type(result)
        return result


def _mode_of(args: Any = ()) -> Any:
    """The fake mode that ``args`` are under, or a new one that takes the module's own tensors too."""
    for value in torch.utils._pytree.tree_leaves(args):
        if isinstance(value, torch.Tensor) and is_fake(value):
            return value.fake_mode  # type: ignore[attr-defined]
    return fake_mode(allow_non_fake_inputs=True)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _has_state_of_its_own(module: Any) -> bool:
    """Whether a call of ``module`` may write memory that is none of its arguments'."""
    return not type(module).__module__.startswith("torch.nn.modules.") or any(True for _ in module.buffers())


def _choose_paths(contract_kwargs: Mapping[str, Any]) -> Callable[[fx.Graph], fx.Graph]:
    """The pass ``choose_paths`` with opt_einsum's options, size-generic.

    A limit that no order keeps is dropped, with a warning; opt_einsum would then contract all the rest in one step.
    """
    unknown = set(contract_kwargs) - {"optimize", "memory_limit", "use_blas"}
    if unknown:
        raise TypeError(
            f"contract_kwargs has {sorted(unknown)}, expected only 'optimize' and 'memory_limit' "
            "(and 'use_blas', which changes nothing here)"
        )
    optimize, limit = contract_kwargs.get("optimize", "auto"), contract_kwargs.get("memory_limit")

    def run(graph: fx.Graph) -> fx.Graph:
        try:
            return choose_paths(optimize, element_limit=limit, generic=True)(graph)
        except MemoryLimitError as error:
            warnings.warn(f"memory_limit is ignored: {error}", RuntimeWarning, stacklevel=4)
            return choose_paths(optimize, generic=True)(graph)

    return run


def keep_layouts(root: nn.Module, graph: fx.Graph, example_inputs: Sequence[Any]) -> fx.Graph:
    """``graph`` with the strides put right where something other than an einsum may notice (``view``).

    After fusing and planning, ``torch.einsum`` may lay out a result otherwise than before.
    """
    actual = copy_graph(graph)
    EfficientShapeProp(root, graph=actual).run(*example_inputs)
    new = copy_graph(graph)
    names = {getattr(node.target, "__name__", node.target) for node in new.nodes if node.op.startswith("call_")}
    looks = not names.isdisjoint(_LAYOUT_CALLS)
    for node, other in zip(list(new.nodes), list(actual.nodes), strict=True):
        wanted, found = type_of(node), type_of(other)
        if (
            not is_einsum(node)
            or wanted is None
            or found is None
            or wanted.stride == found.stride
            or all(is_einsum(user) for user in node.users)
        ):
            continue
        if not wanted.is_contiguous and not looks:
            continue
        users = list(node.users)
        order = sorted(range(len(wanted.shape)), key=lambda dim: (-wanted.stride[dim], dim))
        in_order = order == sorted(order)
        value = node
        with new.inserting_after(value):
            value = value if in_order else new.call_method("permute", (value, order))
        with new.inserting_after(value):
            value = new.call_method("contiguous", (value,))
        with new.inserting_after(value):
            value = (
                value
                if in_order
                else new.call_method("permute", (value, [order.index(dim) for dim in range(len(order))]))
            )
        stamp(value, facts(node) or Facts())
        for user in users:
            user.replace_input_with(node, value)
    return new


# Calls whose result, or whether that is a view, depends on strides.
_LAYOUT_CALLS = COPIES_AT_NEED | frozenset(
    {"view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "untyped_storage", "storage_offset"}
)


def put_back(graph: fx.Graph, new: fx.Graph) -> fx.Graph:
    """``graph`` with the contents of ``new``, which is a copy of it that was changed; its placeholders stay."""
    kept = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    values: dict[fx.Node, fx.Node] = {}
    placeholders = iter(kept)
    for node in new.nodes:
        # Placeholders stay, as a new one could not have the name of an old one, and that is the argument's name.
        values[node] = next(placeholders) if node.op == "placeholder" else graph.node_copy(node, values.__getitem__)
    return graph


def _show_types(graph: fx.Graph) -> None:
    """``meta["tensor_meta"]`` for nodes that passes made."""
    for node in graph.nodes:
        known = type_of(node)
        if known is not None:
            node.meta["tensor_meta"] = TensorMeta(torch.Size(known.shape), known.dtype)
            node.meta.setdefault("type", torch.Tensor)


def _stamp_from_tensor_meta(graph: fx.Graph) -> None:
    """Facts for a graph that torch's ``ShapeProp`` went through: shapes are known, memory is not."""
    if any(facts(node) for node in graph.nodes):
        return
    for node in graph.nodes:
        meta = node.meta.get("tensor_meta")
        if isinstance(meta, tuple) and hasattr(meta, "shape") and hasattr(meta, "dtype"):
            shape = tuple(meta.shape)
            known = TensorType(shape, meta.dtype, torch.device("cpu"), contiguous_strides(shape), requires_grad=True)
            stamp(node, Facts(known, EVERYTHING, writes(node)))
