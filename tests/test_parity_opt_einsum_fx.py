"""Code written for opt_einsum_fx works after a change of the package name: same functions, defaults and effects."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lazy_einsum
from lazy_einsum import (
    EfficientShapeProp,
    fuse_einsums,
    fuse_scalars,
    jitable,
    optimize_einsums,
    optimize_einsums_full,
)

# TorchScript warns about itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The TorchScript type system:UserWarning")

einsum = torch.einsum

# The programs have no annotations: those of a module with postponed ones are strings, which TorchScript can't read.


def _inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return (
        torch.rand(n, 4, generator=generator, dtype=torch.float64) + 1,
        torch.rand(4, 5, generator=generator, dtype=torch.float64) + 1,
    )


def _after(function: Callable[..., Any], pass_: Callable[[fx.Graph], fx.Graph]) -> fx.GraphModule:
    traced = fx.symbolic_trace(function)
    return fx.GraphModule(traced, pass_(traced.graph))


def _einsums(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in (torch.einsum, torch.functional.einsum)]


def test_names_signatures_and_defaults() -> None:
    theirs = pytest.importorskip("opt_einsum_fx")
    for name in theirs.__all__:
        expected = inspect.signature(getattr(theirs, name)).parameters
        found = inspect.signature(getattr(lazy_einsum, name)).parameters
        assert list(found)[: len(expected)] == list(expected), name
        for key, parameter in expected.items():
            assert found[key].default == parameter.default, (name, key)


# -- fusing einsums ---------------------------------------------------------------------------------------------------


def chain_of_three(a, b):
    z = einsum("xy,yz->xz", a, b)
    z = einsum("ab,cb->ac", z, b)
    return einsum("pq,pr->qr", z, a)


def used_once(x, y):
    return einsum("ac,ab->b", einsum("ab,bc->ac", x, y), x)


def used_elsewhere(x, y):
    z = einsum("ab,bc->ac", x, y)
    return einsum("ac,ab->a", z, x) - z[:, 1]


def used_twice_by_one(x, y):
    z = einsum("ab,bc->ac", x, y)
    return einsum("ac,ac->a", z, z)


@pytest.mark.parametrize(
    ("function", "left"), [(chain_of_three, 1), (used_once, 1), (used_elsewhere, 2), (used_twice_by_one, 2)]
)
def test_fuse_einsums(function: Callable[..., Any], left: int) -> None:
    module = _after(function, fuse_einsums)
    assert len(_einsums(module.graph)) == left
    for n in (3, 7):
        assert torch.allclose(module(*_inputs(n)), function(*_inputs(n)), rtol=1e-10)


def test_fuse_einsums_leaves_what_it_cannot_fuse_as_it_was() -> None:
    traced = fx.symbolic_trace(used_elsewhere)
    assert fx.GraphModule(traced, fuse_einsums(traced.graph)).code == traced.code


def test_fusing_an_inner_result_of_the_wrong_rank_raises() -> None:
    def wrong(x, y):
        return einsum("a,ab->a", einsum("ab,bc->ac", x, y), x)

    with pytest.raises(RuntimeError):
        fuse_einsums(fx.symbolic_trace(wrong).graph)


# -- scalars ----------------------------------------------------------------------------------------------------------


def one_factor(x, y):
    return 6.0 * einsum("ab,bc->ac", x, y / 5) / 4


def factors_on_both(x, y):
    return 4.0 * einsum("ab,bc->ac", x / 1.5, 1.2 * 2.0 * y / 7) / 2


def irrational(x, y):
    return math.e * einsum("ab,bc->ac", x, math.pi * y / 3) / 2


def only_factor(x, y):
    return 3.5 * y


def many_factors(x, y):
    return 2.0 / 3.5 * x / 4.0


def with_dead_code(x, y):
    _ = 2.5 * x / 4.5
    return 4.5 * einsum("ab,bc->ac", x, y)


def in_place(x, y):
    return 3.0 * x.clone().mul_(4.0)


@pytest.mark.parametrize(
    ("function", "nodes"),
    [
        (one_factor, 5),  # x, y, einsum, mul, output
        (factors_on_both, 5),
        (irrational, 5),
        (only_factor, 4),
        (many_factors, 4),
        (with_dead_code, 6),
        (in_place, 6),
    ],
)
def test_fuse_scalars_leaves_as_many_nodes(function: Callable[..., Any], nodes: int) -> None:
    module = _after(function, fuse_scalars)
    assert len(module.graph.nodes) == nodes
    for n in (3, 6):
        assert torch.allclose(module(*_inputs(n)), function(*_inputs(n)), rtol=1e-12)


def test_the_factor_ends_on_the_smallest_intermediate() -> None:
    def f(x, y, z):
        return 0.7 * einsum("ab,bc,cd->ad", x, y, z)

    x, y, z = torch.rand(2, 90), torch.rand(90, 2), torch.rand(2, 90)
    module = optimize_einsums_full(f, (x, y, z))
    (mul,) = [node for node in module.graph.nodes if node.target is operator.mul]
    # x y is 2 by 2; both the operands and the result are larger.
    shape = next(arg for arg in mul.args if isinstance(arg, fx.Node)).meta.get("tensor_meta")
    assert list(module.graph.nodes).index(mul) == 4
    assert shape is None or tuple(shape.shape) == (2, 2)
    assert torch.allclose(module(x, y, z), f(x, y, z), rtol=1e-4)


@pytest.mark.parametrize("pass_", [fuse_einsums, fuse_scalars])
def test_in_place_says_whether_the_graph_is_changed(pass_: Callable[..., fx.Graph]) -> None:
    graph = fx.symbolic_trace(one_factor).graph
    before = str(graph)
    other = pass_(graph)
    assert other is not graph
    assert str(graph) == before
    assert pass_(graph, in_place=True) is graph


# -- contraction orders -----------------------------------------------------------------------------------------------


def three_operands(x, y):
    return einsum("ab,bc,dc->ad", x, y, y)


def no_einsum(x, y):
    return 2.0 * 1.5 * x.tanh().sum() - 4.5 / y.relu().sum()


ALL = [chain_of_three, used_once, used_elsewhere, used_twice_by_one, one_factor, three_operands, no_einsum]


@pytest.mark.parametrize("function", ALL)
def test_full_optimization_holds_for_other_sizes(function: Callable[..., Any]) -> None:
    module = optimize_einsums_full(function, _inputs(3))
    assert isinstance(module, fx.GraphModule)
    for n in (3, 1, 8):
        assert torch.allclose(module(*_inputs(n)), function(*_inputs(n)), rtol=1e-10)
    assert all(len(node.args) <= 3 for node in _einsums(module.graph))


@pytest.mark.parametrize("function", ALL)
def test_shapes_then_orders(function: Callable[..., Any]) -> None:
    module = fx.symbolic_trace(function)
    EfficientShapeProp(module).run(*_inputs())
    module.graph = optimize_einsums(module.graph)
    module.recompile()
    assert torch.allclose(module(*_inputs(5)), function(*_inputs(5)), rtol=1e-10)


@pytest.mark.parametrize("function", [three_operands, lambda x, y: torch.einsum("ij,jk->ik", x, y)])
def test_without_shapes_it_warns_and_leaves_the_einsum(function: Callable[..., Any]) -> None:
    traced = fx.symbolic_trace(function)
    with pytest.warns(RuntimeWarning):
        graph = optimize_einsums(traced.graph)
    assert fx.GraphModule(traced, graph).code == traced.code


def test_a_graph_gives_a_graph() -> None:
    graph = fx.symbolic_trace(three_operands).graph
    assert isinstance(optimize_einsums_full(graph, _inputs()), fx.Graph)


@pytest.mark.parametrize(
    "kwargs", [{"optimize": "greedy"}, {"optimize": "optimal"}, {"optimize": "dp", "memory_limit": 1000}]
)
def test_contract_kwargs(kwargs: dict[str, Any]) -> None:
    module = optimize_einsums_full(three_operands, _inputs(), kwargs)
    assert torch.allclose(module(*_inputs()), three_operands(*_inputs()), rtol=1e-10)


def test_a_tracer_of_ones_own() -> None:
    class Leaf(nn.Module):
        def forward(self, x):
            # Control flow that symbolic tracing can't follow: why people make such a module a leaf.
            return -x if x.shape[0] > 2 else x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x, y):
            return einsum("ab,bc->ac", self.leaf(x), y) * 2

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)

    module = optimize_einsums_full(Model(), _inputs(), tracer_class=Tracer)
    x, y = _inputs()
    assert torch.allclose(module(x, y), Model()(x, y))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(5, 2, dtype=torch.float64))
        self.register_buffer("scale", torch.rand(2, dtype=torch.float64))

    def forward(self, x, y):
        return einsum("ac,cd,d->ad", einsum("ab,bc->ac", x, y), self.w, self.scale) / 3


def test_modules_share_parameters_and_keep_their_names() -> None:
    model = Weighted()
    module = optimize_einsums_full(model, _inputs())
    assert module.w is model.w
    assert module.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        model.w.mul_(2)
    assert torch.allclose(module(*_inputs(4)), model(*_inputs(4)))
    module(*_inputs()).sum().backward()
    assert model.w.grad is not None


# -- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ALL)
def test_scripting(function: Callable[..., Any]) -> None:
    scripted = torch.jit.script(jitable(optimize_einsums_full(function, _inputs())))
    for n in (3, 6):
        assert torch.allclose(scripted(*_inputs(n)), function(*_inputs(n)), rtol=1e-10)


def test_scripting_a_module_and_a_graph() -> None:
    model = Weighted()
    optimized = optimize_einsums_full(model, _inputs())
    assert isinstance(jitable(optimized.graph), fx.Graph)
    scripted = torch.jit.script(jitable(optimized))
    assert torch.allclose(scripted(*_inputs(4)), model(*_inputs(4)))


def test_jitable_spells_permute_and_tensordot_for_torchscript() -> None:
    def f(x, y):
        return torch.tensordot(x, y, dims=([1], [0])).permute(1, 0)

    module = jitable(fx.symbolic_trace(f))
    scripted = torch.jit.script(module)
    assert torch.allclose(scripted(*_inputs()), f(*_inputs()))
