"""The one-shot functions give what the traced program gives, for these sizes and for others."""

from __future__ import annotations

import doctest

import pytest
import torch
from behaviour import clone_tree, differences, observe
from checks import specs
from torch import einsum, fx, nn, rand
from torch.fx.passes.shape_prop import ShapeProp

from lazy_einsum import functional
from lazy_einsum.functional import (
    EfficientShapeProp,
    fuse_einsums,
    fuse_scalars,
    jitable,
    optimize_einsums,
    optimize_einsums_full,
)
from lazy_einsum.graph import facts

X = rand(3, 4, dtype=torch.float64) + 1
Y = rand(4, 5, dtype=torch.float64) + 1


def twice(operation):
    def program(x, y):
        z = 2.0 * x
        return operation(z)

    return program


def past_a_write(x, y):
    z = einsum("ij,jk->ik", x, y)
    x.add_(1.0)
    return einsum("ik,ij->i", z, x)


def scaled_before_a_write(x, y):
    z = 2.0 * x
    x.add_(1.0)
    return einsum("ij,jk->ik", z, y)


def chains_meet(x, y):
    p = 3.0 * (x @ y)
    z = einsum("ij,jk->ik", 2.0 * x, y)
    q = p * z
    return q + z


PROGRAMS = {
    "denominator": lambda x, y: x / (2.0 * (x + 1)),
    "number over tensor": lambda x, y: 5.0 / (2.0 * x),
    "quotient of einsums": lambda x, y: einsum("ij,jk->ik", x, y) / (2.0 * einsum("ij,jk->ik", x, y + 0)),
    "square": twice(lambda z: z * z),
    "einsum of one value twice": twice(lambda z: einsum("ij,ik->jk", z, z)),
    "square over four": twice(lambda z: (z * z) / 4.0),
    "chains meet": chains_meet,
    "fusing past a write": past_a_write,
    "scaling past a write": scaled_before_a_write,
    "rounding mode": lambda x, y: (x * 7).div(2.0, rounding_mode="floor") * 3.0,
    "complex number": lambda x, y: 2j * einsum("ij,jk->ik", x, y) * 3.0,
    "ellipsis": lambda x, y: einsum("...j,jk->...k", x, y),
    "sublists": lambda x, y: einsum(x, [0, 1], y, [1, 2], [0, 2]),
    "spaces": lambda x, y: einsum("ik, ij -> i", einsum("ij, jk -> ik", x, y), x),
    "sizes": lambda x, y: x.reshape(x.shape[0] * 2 * 2, -1),
    "division by zero": lambda x, y: (x / 0.0) * 2.0,
    "tensordot by number": lambda x, y: torch.tensordot(x, y, 1),
    "tensordot by keyword": lambda x, y: torch.tensordot(x, y, dims=1) * 2,
    "used twice by one call": lambda x, y: (lambda z: einsum("ik,ik->i", z, z))(einsum("ij,jk->ik", x, y)),
    "list of operands": lambda x, y: einsum("ij,jk->ik", [x, y]),
    "nested result": lambda x, y: {"a": [einsum("ij,jk->ik", x, y) * 2], "b": (x, None, 3)},
    "view of the result": lambda x, y: einsum("ij,jk->ki", einsum("ij,kj->ik", x, x), x).view(-1),
    "detached between": lambda x, y: einsum("ik,ij->kj", einsum("ij,jk->ik", x, y).detach(), x),
    "other dtype between": lambda x, y: einsum("ik->i", einsum("ij,jk->ik", 2 * x, y).float() * 3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, device):
    function = PROGRAMS[name]
    optimized = optimize_einsums_full(function, clone_tree((X, Y), device))
    for x in (X, rand(7, 4, dtype=torch.float64) + 1, rand(1, 4, dtype=torch.float64) + 1):
        ours, theirs = [clone_tree((x.clone().requires_grad_(name[-5:] != "write"), Y), device) for _ in range(2)]
        problems = differences(observe(optimized, ours), observe(function, theirs))
        assert not [problem for problem in problems if "forward pass of" not in problem]


def test_integers_and_float16():
    n, m = torch.arange(12).reshape(3, 4) * 2**50, torch.arange(20).reshape(4, 5)
    function = lambda x, y: 2 * (3 * (einsum("ij,jk->ik", x, y) + 0))  # noqa: E731
    assert torch.equal(optimize_einsums_full(function, (n, m))(n, m), function(n, m))
    half = torch.full((2, 64), 200.0).half(), torch.full((64, 2), 200.0).half()
    function = lambda a, b: einsum("ij,jk->ik", a / 1000.0, b) * 2.0  # noqa: E731
    assert torch.equal(optimize_einsums_full(function, half)(*half), function(*half))


@pytest.mark.parametrize("traced_at", [1, 3])
def test_other_sizes_of_the_same_ranks(traced_at):
    def program(x, y, z):
        return einsum("zi,zj,zk->zijk", einsum("zij,zjk->zik", x, y)[:, 0], z, z) / 3 + einsum("zij->ij", x).sum()

    optimized = optimize_einsums_full(program, (rand(traced_at, 2, 4), rand(traced_at, 4, 3), rand(1, 2)))
    for x, y, z in ((1, 1, 1), (3, 1, 3), (1, 3, 1), (3, 3, 3)):
        inputs = rand(x, 2, 4), rand(y, 4, 3), rand(z, 2)
        torch.testing.assert_close(optimized(*inputs), program(*inputs))


def test_two_and_fifty_labels_are_not_exceeded():
    letters = "cdefghijklmnopqrstuvwxyz"

    def program(a, b, c):
        return einsum("ab," + ",".join(letters) + "->a", einsum("ax,xb->ab", a, b), *[c] * 24)

    inputs = rand(2, 3), rand(3, 2), torch.ones(1)
    torch.testing.assert_close(optimize_einsums_full(program, inputs)(*inputs), program(*inputs))


def test_example_inputs_may_be_results():
    x = X.clone().requires_grad_() * 2
    both = x, x.t()
    module = fx.symbolic_trace(lambda x, y: (x.relu_(), y))
    EfficientShapeProp(module).run(*both)
    assert len({facts(node).storage for node in list(module.graph.nodes)[:3]}) == 1


def test_leaf_modules_that_branch_on_data():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Branch)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = Branch()

        def forward(self, x, y):
            return einsum("ij,jk,kl->il", self.branch(x), y, y.t()) + einsum("ij,jk,kl->il", x, y, y.t())

    model = Model()
    with pytest.warns(RuntimeWarning, match="unknown shape"):
        optimized = optimize_einsums_full(model, (X, Y), tracer_class=Tracer)
    assert len(specs(optimized.graph)) == 3
    torch.testing.assert_close(optimized(X, Y), model(X, Y))


def test_nothing_runs_on_real_data():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Flatten())
    state, random = clone_tree(module.state_dict()), torch.get_rng_state()
    optimized = optimize_einsums_full(module, (X.float(),))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert set(optimized.state_dict()) == set(state)
    assert optimized.training

    def program(x, y):
        return x.add_(1.0) @ y + torch.rand(3, 5)

    x = X.clone()
    traced = fx.symbolic_trace(program)
    random = torch.get_rng_state()
    EfficientShapeProp(traced).run(x, Y)
    assert torch.equal(x, X)
    assert torch.equal(random, torch.get_rng_state())


def test_a_naive_order_that_no_machine_can_run():
    n = 100000

    def program(a, b, c):
        return einsum("ij,kl,mn->", a, b, c)

    # The shapes are all that is looked at.
    inputs = [torch.empty(1).expand(n, n) for _ in range(3)]
    assert len(specs(optimize_einsums_full(program, inputs).graph)) == 2


def test_shapes_are_noted_on_every_node():
    module = fx.symbolic_trace(lambda x, y: (einsum("ij,jk->ik", x, y).t(), x.shape[0] * 2))
    result = EfficientShapeProp(module).propagate(X, Y)
    assert result[0].shape == (5, 3)
    found = [(node.meta["tensor_meta"], node.meta["type"]) for node in module.graph.nodes]
    assert found[0][0].shape == torch.Size([3, 4])
    assert found[0][0].dtype is torch.float64
    assert [meta and tuple(meta.shape) for meta, _ in found] == [
        *((3, 4), (4, 5), (3, 5), (5, 3)),
        *(None, None, None, None),
    ]
    assert found[2][1] is torch.Tensor
    assert [facts(node).storage for node in list(module.graph.nodes)[:4]] == [0, 1, 2, 2]


def test_shape_propagation_sees_what_is_written():
    def program(x, y):
        view = x[0]
        view.mul_(2.0)
        y.add_(1.0)
        return x.exp(), y

    module = fx.symbolic_trace(program)
    EfficientShapeProp(module).run(X, Y)
    nodes = {node.name: facts(node) for node in module.graph.nodes}
    assert nodes["mul_"].writes == (nodes["x"].storage,) == (nodes["getitem"].storage,)
    assert nodes["add_"].writes == (nodes["y"].storage,)
    assert nodes["exp"].writes == ()


def test_what_depends_on_data_stays_unknown_and_works():
    def program(x, y):
        chosen = x[x > 1.5]
        return 2.0 * (3.0 * chosen).sum() * einsum("ij,jk,lk->il", x, y, y) * chosen.sum().item()

    optimized = optimize_einsums_full(program, (X, Y))
    torch.testing.assert_close(optimized(X, Y), program(X, Y))
    assert len(specs(optimized.graph)) == 2


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(RuntimeError):
        optimize_einsums_full(lambda x, y: einsum("ij,jk->ik", x, y), (X, Y.t()))
    with pytest.raises(ValueError, match="label 'j'"):
        optimize_einsums_full(lambda x, y: einsum("ij,jk,jl->ik", x, y, x), (X, Y))


def test_graphs_of_torchs_own_shape_propagation():
    module = fx.symbolic_trace(lambda x, y: einsum("ij,jk,lk->il", x, y, y))
    ShapeProp(module).propagate(X, Y)
    assert len(specs(optimize_einsums(module.graph))) == 2
    assert len(specs(module.graph)) == 1


def test_a_graph_gives_a_graph_and_keeps_its_module():
    module = nn.Module()
    module.w = nn.Parameter(rand(4, 5))
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    graph.output(graph.call_function(torch.einsum, ("ij,jk,lk->il", x, w, w)))
    root = fx.GraphModule(module, graph)
    new = optimize_einsums_full(root.graph, (rand(3, 4),))
    assert isinstance(new, fx.Graph)
    assert len(specs(new)) == 2
    x = rand(2, 4)
    optimized = optimize_einsums_full(root, [x])
    torch.testing.assert_close(optimized(x), root(x))
    assert optimized.w is module.w


@pytest.mark.parametrize("function", [fuse_einsums, fuse_scalars])
def test_in_place_changes_the_graph_itself(function):
    def program(x, y):
        z = einsum("ij,jk->ik", 2.0 * x, y) / 4
        return einsum("ik,ij->i", einsum("ik->ik", z), x)

    module = fx.symbolic_trace(program)
    graph, before = module.graph, len(module.graph.nodes)
    new = function(graph)
    assert new is not graph
    assert len(graph.nodes) == before
    assert function(graph, in_place=True) is graph
    assert len(graph.nodes) == len(new.nodes) < before
    module.recompile()
    assert [node.name for node in graph.nodes][:2] == ["x", "y"]
    torch.testing.assert_close(module(x=X, y=Y), program(X, Y))


def test_options():
    function = lambda a, b, c, d: einsum("ij,jk,kl,lm->im", a, b, c, d)  # noqa: E731
    inputs = rand(2, 8), rand(8, 8), rand(8, 8), rand(8, 2)
    for kwargs in (
        {"optimize": "greedy"},
        {"optimize": "dp", "memory_limit": 64},
        {"optimize": [(0, 1), (0, 1), (0, 1)]},
    ):
        optimized = optimize_einsums_full(function, inputs, kwargs)
        assert len(specs(optimized.graph)) == 3
        torch.testing.assert_close(optimized(*inputs), function(*inputs))
    with pytest.raises(TypeError, match="'speed'"):
        optimize_einsums_full(function, inputs, {"speed": 11})


def test_a_limit_that_cannot_be_kept_is_dropped_with_a_warning():
    function = lambda x, y, z: einsum("ij,jk,kl->il", x, y, z)  # noqa: E731
    inputs = rand(2, 3), rand(3, 3), rand(3, 2)
    with pytest.warns(RuntimeWarning, match="memory_limit"):
        optimized = optimize_einsums_full(function, inputs, {"memory_limit": 3})
    assert len(specs(optimized.graph)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The TorchScript type system:UserWarning")
def test_scripting():
    def program(x, y):
        z = torch.tensordot(x, y, dims=([1], [0])).permute(1, 0)
        return einsum("ki,ij,kl->lj", z, x, y.t()) / 3 + torch.tensordot(x, y, dims=1).permute(0, 1).sum()

    program.__annotations__.clear()
    scripted = torch.jit.script(jitable(optimize_einsums_full(program, (X, Y))))
    torch.testing.assert_close(scripted(X, Y), program(X, Y))
    kept = jitable(fx.symbolic_trace(program))
    torch.testing.assert_close(torch.jit.script(kept)(X, Y), program(X, Y))
    graph = fx.symbolic_trace(program).graph
    assert jitable(graph) is graph


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(functional)
    assert (failed, tried > 5) == (0, True)


def test_a_copy_stays_a_copy():
    def program(x, y):
        z = einsum("ij,jk,kl->li", x, y, y.t())
        flat = z.reshape(-1)
        flat.add_(1.0)
        return z, flat

    z, _ = optimize_einsums_full(program, (X, Y))(X, Y)
    torch.testing.assert_close(z, program(X, Y)[0])
