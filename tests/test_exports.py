"""Optimized code that leaves the process: as source, through torch.export and AOTInductor, as ONNX."""

from __future__ import annotations

import copy
import enum
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten

import lazy_einsum
from lazy_einsum import LazyEinsumError, OptimizedModule, TensorType
from lazy_einsum.folds import Fold, written_out

Tensor = torch.Tensor

_ALONE = "import sys\nsys.modules['lazy_einsum'] = sys.modules['opt_einsum'] = None\n"


def run_alone(program: str, folder: Path) -> None:
    """Run Python code in a process of its own, in which neither lazy_einsum nor opt_einsum can be imported."""
    done = subprocess.run([sys.executable, "-c", _ALONE + program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_process_alone_has_no_lazy_einsum(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run_alone("import lazy_einsum", tmp_path)


# -- models


class Chain(nn.Module):
    def __init__(self, n: int = 40) -> None:
        super().__init__()
        for name in "abc":
            setattr(self, name, nn.Parameter(torch.rand(n, n) / n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,jk,kl,nl->ni", self.a, self.b, self.c, x) / 3.0


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))])
        self.register_buffer("table", torch.rand(4))
        self.register_buffer("unused", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.layers[0](x))
        return torch.einsum("bi,i->bi", self.layers[1](hidden), self.table)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.4)
        self.weight = nn.Parameter(torch.rand(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x @ self.weight))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(6))
        self.listed = [self.scale]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) * self.listed[0])


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4).t())  # not contiguous

    def forward(self, x: Tensor, *, batch: dict[str, Any], scale: float = 2.0, flag: bool = False) -> Any:
        y = torch.einsum("bi,ij->bj", x, self.weight) * scale
        top = y.max(1)
        return {
            "y": y,
            2: [y.sum(), (None, True, 1.5, float("inf"), "text", (1, 2))],
            "meta": (x.shape, y.dtype, y.device),
            "ordered": OrderedDict(first=batch["edges"][0] * 2, second=-batch["edges"][0]),
            "top": top,
            "flag": flag,
        }


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.einsum("i,ij,j->", x, self.weight, x.sin())
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        with torch.no_grad():
            size = force.norm()
        return energy, -force / size


class Factored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(30, 30)), nn.Parameter(torch.rand(30, 20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij,jk->nk", x, self.a, self.b)


def plain(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    mask = torch.arange(x.shape[1], device=x.device) < 3
    z = x.masked_fill(mask, float("-inf")).softmax(-1) * 1.5
    z[:, 1:3] += y[0, 0]
    z[..., -1].mul_(2)
    w = torch.where(y > 0.5, y, torch.zeros_like(y)).to(torch.float64)
    return z, torch.einsum("ij,ij,ij->i", w, w, w), (y.abs() ** 2 % 0.3).clamp(min=0.1), x.T[1]


def sizes(x: Tensor, y: Tensor, factor: float) -> Tensor:
    z = torch.einsum("abi,ij,jk->abk", x, y, y).reshape(x.shape[0] * x.shape[1], -1)
    return torch.cat([z, z.new_ones(len(z), 1) * (factor * x.shape[0])], 1).flatten()[: x.shape[0] // 2 + 1]


def twice(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("ij,jk,kl->il", x, y, x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.5
    mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return functional.scaled_dot_product_attention(mixed, k, v) + functional.pad(q, (1, -1)).half().float()


def leaf(*shape: int, **options: Any) -> Tensor:
    return torch.rand(*shape, **options).requires_grad_()


@dataclass
class Case:
    """A call that is written down.

    Attributes:
        model: what is wrapped.
        args: of the call.
        kwargs: of the call.
        options: of the wrapper.
        before: arguments of earlier calls, so that code becomes generic.
        context: modes of the call.
        train: mode of the module.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = None  # type: ignore[assignment]
    options: dict[str, Any] = None  # type: ignore[assignment]
    before: tuple[tuple[Any, ...], ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    train: bool = True


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    shared = leaf(4, 4)
    edges = {"edges": [leaf(3)], "name": "e"}
    return {
        "chain": Case(Chain(), (leaf(3, 40),)),
        "one tensor, no gradient": Case(Chain(), (torch.rand(3, 40),), context=torch.no_grad),
        "inference": Case(Chain(), (torch.rand(3, 40),), context=torch.inference_mode),
        "nested": Case(Nested(), (leaf(5, 8),)),
        "training": Case(Norm(), (leaf(5, 6),)),
        "evaluation": Case(Norm(), (leaf(5, 6),), train=False),
        "tied": Case(Tied(), (torch.arange(8).reshape(2, 4),)),
        "outputs": Case(Outputs(), (leaf(5, 4),), {"batch": edges, "scale": 0.5}),
        "forces": Case(Forces(), (torch.rand(5),)),
        "forces without gradients": Case(Forces(), (torch.rand(5),), context=torch.no_grad),
        "function": Case(plain, (leaf(4, 6), leaf(4, 6))),
        "generic": Case(
            sizes,
            (leaf(4, 6, 5), leaf(5, 5), 1.5),
            options={"dynamic": True},
            before=((leaf(2, 6, 5), leaf(5, 5), 0.5), (leaf(3, 7, 5), leaf(5, 5), 0.7)),
        ),
        "same tensor": Case(twice, (shared, shared)),
        "attention": Case(attention, (leaf(2, 5, 3, 4), leaf(2, 5, 3, 4), leaf(2, 5, 3, 4))),
        "autocast": Case(Chain(), (leaf(3, 40),), context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        "folds": Case(Factored(), (torch.rand(3, 30),), options={"frozen": True}, context=torch.no_grad),
        "double": Case(Chain().double(), (leaf(3, 40, dtype=torch.float64),)),
    }


CASES = cases()

_RUN = """
import importlib, torch
from torch.utils._pytree import tree_flatten
found = {}
for number, (state, given) in enumerate(torch.load("given.pt")):
    module = importlib.import_module(f"case{number}")
    model = module.Specialized()
    missing = model.load_state_dict(state, strict=False).missing_keys
    torch.manual_seed(1)
    outputs = model(*given)
    leaves = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if leaves:
        sum(leaf.double().square().sum() for leaf in leaves).backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters()}
    inputs = [tensor.grad if isinstance(tensor, torch.Tensor) else None for tensor in given]
    found[number] = missing, outputs, gradients, inputs, dict(model.named_buffers())
torch.save(found, "found.pt")
"""


def taken(case: Case) -> list[Any]:
    """What the code takes of the arguments of a case."""
    leaves = tree_flatten((case.args, case.kwargs or {}))[0]
    kinds = (Tensor, float) if case.before else (Tensor,)
    return [value for value in dict.fromkeys(leaves) if isinstance(value, kinds)]


class Alone(NamedTuple):
    """What came of a case in a process of its own."""

    source: str
    missing: list[str]
    outputs: Any
    gradients: dict[str, Tensor | None]
    inputs: list[Tensor | None]
    buffers: dict[str, Tensor]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Alone]:
    """All cases, written down, and run in one process without lazy_einsum."""
    folder = tmp_path_factory.mktemp("alone")
    sources, given = [], []
    for number, case in enumerate(CASES.values()):
        model = case.model.train(case.train) if isinstance(case.model, nn.Module) else case.model
        wrapper = OptimizedModule(model, **(case.options or {}))
        with case.context():
            for args in case.before:
                wrapper.prepare(*args)
            sources.append(wrapper.prepare(*case.args, **(case.kwargs or {})).to_source())
        (folder / f"case{number}.py").write_text(sources[-1])
        given.append((model.state_dict() if isinstance(model, nn.Module) else {}, taken(case)))
    torch.save(given, folder / "given.pt")
    run_alone(_RUN, folder)
    found = torch.load(folder / "found.pt", weights_only=False)
    return {name: Alone(sources[number], *found[number]) for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_source_gives_what_the_module_gives(name: str, alone: dict[str, Alone]) -> None:
    case, found = CASES[name], alone[name]
    model, args, kwargs = copy.deepcopy((case.model, case.args, case.kwargs or {}))
    torch.manual_seed(1)
    with case.context():
        expected = model(*args, **kwargs)
    leaves, structure = tree_flatten(expected)
    results, others = tree_flatten(found.outputs)
    assert others == structure
    tolerance = 2e-2 if name == "autocast" else 1e-4
    for result, value in zip(results, leaves, strict=True):
        assert type(result) is type(value)
        if isinstance(value, Tensor):
            assert (result.dtype, result.shape) == (value.dtype, value.shape)
            assert result.requires_grad == value.requires_grad
            assert torch.allclose(result, value, rtol=tolerance, atol=tolerance)
        else:
            assert result == value
    assert found.missing == []
    followed = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
    if followed:
        sum(value.double().square().sum() for value in followed).backward()  # type: ignore[union-attr]
    own = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    pairs = [(gradient, own[name].grad) for name, gradient in found.gradients.items()]
    inputs = taken(Case(model, args, kwargs, before=case.before))
    pairs += [(one, other.grad) for one, other in zip(found.inputs, inputs, strict=True) if isinstance(other, Tensor)]
    for gradient, value in pairs:
        assert (gradient is None) == (value is None)
        assert value is None or torch.allclose(gradient, value, rtol=tolerance, atol=tolerance)
    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    assert found.buffers.keys() <= buffers.keys()
    assert all(torch.allclose(value, buffers[name]) for name, value in found.buffers.items())


def test_source_says_what_it_is_for(alone: dict[str, Alone]) -> None:
    text = alone["outputs"].source
    docstring = text.split('"""')[1]
    parts = ("``Outputs``", lazy_einsum.__version__, "x: f32[5, 4] requires_grad", "scale = 0.5", "weight: f32[4, 3]")
    for part in parts:
        assert part in docstring
    assert "batch['edges'][0] (here batch_edges_0): f32[3]" in docstring
    assert "def forward(self, x, batch_edges_0):" in text
    assert "y: the same tensor as x" in alone["same tensor"].source
    assert "where f0" not in alone["generic"].source
    assert alone["chain"].source.count(".mm(") == 3


def test_only_what_is_read_is_registered(alone: dict[str, Alone]) -> None:
    assert alone["nested"].buffers.keys() == {"table"}
    assert alone["tied"].gradients.keys() == {"embed.weight", "scale"}


def load(source: str) -> Any:
    """The class in a source."""
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope["Specialized"]()


def written(model: Any, *args: Any, **options: Any) -> Any:
    return load(OptimizedModule(model, **options).prepare(*args).to_source())


def add(x: Tensor) -> Tensor:
    return torch.einsum("ij->i", x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: torch.rand(3, 5), r"x is torch.float32 of shape \(3, 5\); this code is for f32\[3, 4\]"),
        (lambda: torch.rand(3), r"of shape \(3,\)"),
        (lambda: torch.rand(3, 4).double(), "x is torch.float64"),
        (lambda: torch.rand(4, 3).t(), r"strides \(1, 3\); this code is for f32\[3, 4\], strides \(4, 1\)"),
        (lambda: leaf(3, 4), "x requires a gradient"),
    ],
)
def test_source_refuses_other_arguments(given: Callable[[], Tensor], message: str) -> None:
    model = written(add, torch.rand(3, 4))
    model(torch.rand(3, 4))
    with pytest.raises(ValueError, match=message):
        model(given())


def test_source_takes_what_makes_no_difference() -> None:
    model = written(add, torch.rand(1, 4))
    model(torch.rand(4, 1).t())  # the stride of a dimension of size 1
    with torch.no_grad():
        model(leaf(1, 4))


def test_generic_source_refuses_sizes_that_it_is_not_for() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sum(0) * 2 if x.shape[0] > 10 else x.sum(0)

    wrapper = OptimizedModule(f, dynamic=True)
    wrapper.prepare(torch.rand(20, 3))
    model = load(wrapper.prepare(torch.rand(30, 3)).to_source())
    x = torch.rand(50, 3)
    assert torch.equal(model(x), f(x))
    for n in (10, 1):
        with pytest.raises(ValueError, match=r"this code is for x: f32\[s0, 3\] where"):
            model(torch.rand(n, 3))


def test_default_dtype_is_checked() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = written(lambda x: x + torch.ones(3), torch.rand(3))
        assert model(torch.rand(3)).dtype == torch.float64
        x = torch.rand(3)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match=r"default dtype torch.float64"):
        model(x)


def test_sizes_of_one_are_not_among_those_of_generic_source() -> None:
    wrapper = OptimizedModule(add, dynamic=True)
    wrapper.prepare(torch.rand(3, 4))
    model = load(wrapper.prepare(torch.rand(5, 4)).to_source())
    model(torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"where s0 >= 2"):
        model(torch.rand(1, 4))


def test_names_are_those_of_arguments_as_far_as_python_has_them() -> None:
    def f(torch: Tensor, a_b: Tensor, a: dict[str, Tensor], *rest: Tensor) -> Tensor:
        return torch - a_b + 2 * a["b"] * rest[0] / a["class"]

    given = torch.rand(3), torch.rand(3), {"b": torch.rand(3), "class": torch.rand(3) + 1}, torch.rand(3)
    source = OptimizedModule(f).prepare(*given).to_source()
    assert "def forward(self, torch_, a_b, a_b_, a_class, rest_0):" in source
    flat = given[0], given[1], given[2]["b"], given[2]["class"], given[3]
    assert torch.allclose(load(source)(*flat), f(*given))


def test_names_that_mean_something_in_python() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("class", "1", "a-b", "check", "math", "inf"):
                self.register_parameter(name, nn.Parameter(torch.rand(3, 3)))
            self.inner = nn.ModuleDict({"def": nn.Linear(3, 3)})

        def forward(self, check: Tensor, shape: Tensor, math: Tensor) -> Any:
            y = check
            for weight in self.parameters(recurse=False):
                y = y @ weight
            return self.inner["def"](y) + shape, math

    model, args = Named(), (torch.rand(3, 3), torch.rand(3), torch.rand(2))
    specialized = load(OptimizedModule(model).prepare(*args).to_source())
    specialized.load_state_dict(model.state_dict())
    assert same(specialized(*args), model(*args))


def test_numbers_that_python_writes_otherwise_than_it_reads() -> None:
    inf, nan = float("inf"), float("nan")

    def f(x: Tensor) -> Any:
        numbers = complex(nan, -inf), complex(0.0, -1.0), -1j, complex(1.0, -0.0), -0.05 + 1j
        return x * complex(inf, nan), x + complex(-0.0, inf), x * complex(-0.0, 1.0), x * 2j, numbers

    x = torch.zeros(2, dtype=torch.complex128)
    wrapped = OptimizedModule(f, on_untraceable="raise")
    for run in (wrapped, load(wrapped.prepare(x).to_source())):
        assert str(run(x)) == str(f(x))
        # (As text ``complex(0.0, -1.0)`` is ``-1j``, which Python reads as ``complex(-0.0, -1.0)``.)
        assert [str(n.real) for n in run(x)[-1]] == [str(n.real) for n in f(x)[-1]]


def test_parameters_are_made_as_they_were() -> None:
    child = Outputs()
    made = load(OptimizedModule(child).prepare(torch.rand(5, 4), batch={"edges": [torch.rand(3)]}).to_source())
    assert made.weight.stride() == child.weight.stride() == (1, 4)
    child = Chain()
    child.b.requires_grad_(False)
    made = written(child, torch.rand(3, 40))
    assert [tensor.requires_grad for tensor in (made.a, made.b, made.c)] == [True, False, True]


def test_inference_mode_and_autocast_are_those_of_the_code() -> None:
    x = torch.rand(3, 40)
    with torch.inference_mode():
        model = written(Chain(), x)
    assert model(x).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = written(lambda x: x @ x.T, x)
    assert model(x).dtype == torch.bfloat16


def test_the_grad_mode_is_put_back_after_an_error() -> None:
    def f(x: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            y = x[index]
        return x * y.sum()

    model = written(f, torch.rand(4), torch.tensor([1]))
    with pytest.raises(IndexError):
        model(torch.rand(4), torch.tensor([9]))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("stride", [(3, 1), (1, 2)])
def test_folds_written_out_lie_in_memory_as_folds_do(stride: tuple[int, int]) -> None:
    inner = torch.fx.symbolic_trace(lambda v: v * 2).graph
    fold = Fold(("w",), inner, TensorType((2, 3), torch.float32, torch.device("cpu"), stride))
    graph = torch.fx.Graph()
    graph.output(graph.call_function(fold, (graph.placeholder("w"),)))
    run = torch.fx.GraphModule(nn.Module(), written_out(graph))
    for w in (torch.rand(2, 3), torch.rand(3, 2).t()):
        assert torch.equal(run(w), w * 2)
        assert run(w).stride() == fold(w).stride() == stride


# -- what can't be written down


class Mode(enum.Enum):
    FAST = 1


@dataclass
class Result:
    y: Tensor


class Reads(nn.Module):
    """Reads something in the way that ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tensor = torch.rand(3)
        self.inner = nn.Linear(3, 3)
        self.register_buffer("hidden", torch.rand(3), persistent=False)
        self.register_buffer("expanded", torch.rand(1).expand(3))
        self.register_buffer("count", torch.zeros(3))
        if how == "hook":
            self.inner.register_forward_hook(lambda module, args, result: None)

    def forward(self, x: Tensor) -> Any:
        if self.how in ("hook", "leaf"):
            return self.inner(x)
        if self.how == "hook on a tensor":
            y = x * 2
            y.register_hook(lambda gradient: gradient * x.detach())
            return y
        if self.how == "set":
            self.count = self.count + 1
            return x + self.count
        if self.how == "inference":
            with torch.inference_mode():
                return x + 1
        if self.how == "dataclass":
            return Result(x + 1)
        if self.how == "enum":
            return x + 1, Mode.FAST
        if self.how == "custom":
            return torch.ops.lazy_einsum_test.double(x)
        return x + getattr(self, self.how)


@pytest.fixture
def custom_operation() -> Iterator[None]:
    with torch.library._scoped_library("lazy_einsum_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        yield


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hook", "the submodule inner as it is .*; remove its hooks"),
        ("leaf", "the submodule inner as it is .* leave it out of leaf_modules"),
        ("hook on a tensor", "outside of forward"),
        ("tensor", "the tensor tensor, which is no parameter or buffer .*register_buffer"),
        ("hidden", "the buffer hidden, which is not in the state_dict; register it with persistent=True"),
        ("expanded", r"expanded is expanded .* contiguous"),
        ("set", "forward sets the attribute count"),
        ("inference", "forward enters inference mode"),
        ("dataclass", "forward returns a Result; return a tuple"),
        ("enum", "forward returns <Mode.FAST: 1>, a Mode"),
        ("custom", "an operation that torch itself does not have"),
    ],
)
def test_what_can_not_be_written_down_is_refused(how: str, message: str, custom_operation: None) -> None:
    model = OptimizedModule(Reads(how), leaf_modules=("inner",) if how == "leaf" else ())
    entry = model.prepare(leaf(3) if how == "hook on a tensor" else torch.rand(3))
    with pytest.raises(LazyEinsumError, match=f"(?s)can't be written down.*{message}"):
        entry.to_source()


def test_tensors_of_enclosing_functions_are_refused() -> None:
    w = torch.rand(3)
    with pytest.raises(LazyEinsumError, match="no parameter or buffer of the module; make it an argument"):
        written(lambda x: x + w, torch.rand(3))


def test_writes_to_shared_memory_are_refused() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x + y

    x = torch.rand(4)
    wrapper = OptimizedModule(f)
    wrapper(x, x[1:3].sum() + torch.rand(4))
    wrapper(x, x.view(4))
    *_, entry = wrapper.specializations.values()
    with pytest.raises(LazyEinsumError, match="share memory that forward writes"):
        entry.to_source()


def test_a_default_device_is_refused() -> None:
    with torch.device("cpu"):
        entry = OptimizedModule(lambda x: x + torch.ones(3)).prepare(torch.rand(3))
    with pytest.raises(LazyEinsumError, match="default device cpu"):
        entry.to_source()


def test_a_module_that_has_changed_is_refused() -> None:
    model = nn.Linear(3, 3)
    entry = OptimizedModule(model).prepare(torch.rand(2, 3))
    model.double()
    with pytest.raises(LazyEinsumError, match=r"weight is f64\[3, 3\].*call prepare\(\) again"):
        entry.to_source()


def test_a_module_that_is_gone_is_refused() -> None:
    entry = OptimizedModule(nn.Linear(3, 3)).prepare(torch.rand(2, 3))
    with pytest.raises(LazyEinsumError, match="is gone"):
        entry.to_source()


# -- torch.export


def exported(model: nn.Module, *args: Any, dynamic: Any = None, **options: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(OptimizedModule(model.eval(), **options), args, dynamic_shapes=dynamic)


def calls(program: torch.export.ExportedProgram) -> list[str]:
    """The names of the operations that a program calls."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def same(found: Any, expected: Any) -> bool:
    pairs = zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True)
    return all(
        torch.allclose(one, other, atol=1e-5) if isinstance(other, Tensor) else one == other for one, other in pairs
    )


class Products(Chain):
    """In our order no product of two matrices is left."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a @ self.b @ self.c @ x


def test_an_exported_program_has_our_order() -> None:
    model, x = Products(256), torch.rand(256)
    with torch.no_grad():
        plain_program = torch.export.export(model, (x,))
    assert calls(plain_program).count("aten.matmul.default") == 3
    program = exported(model, x)
    assert calls(program) == ["aten.mv.default"] * 3
    assert same(program.module()(x), model(x))
    assert list(program.state_dict) == ["a", "b", "c"]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(24)
        self.chain = Chain(24)

    def forward(self, x: Tensor, pair: dict[str, Tensor], scale: float = 2.0) -> Any:
        y = self.norm(self.chain(x)) * scale
        together = torch.cat([y, pair["other"].reshape(x.shape[0] * 2, 24)[: x.shape[0]]])
        return {"y": y, "both": [together, (None,)]}


def batched(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.rand(n, 24), {"other": torch.rand(n, 48)}


DYNAMIC = {"x": {0: torch.export.Dim("n", max=4096)}, "pair": {"other": {0: torch.export.Dim("n", max=4096)}}}


def test_an_exported_program_may_have_a_dynamic_batch() -> None:
    model = Batched()
    program = exported(model, *batched(5), dynamic=DYNAMIC)
    assert calls(program).count("aten.mm.default") == 3
    assert "aten.einsum.default" not in calls(program)
    for n in (2, 5, 9, 1):
        args = batched(n)
        assert same(program.module()(*args), model(*args))


def test_conditions_of_generic_code_become_those_of_the_program() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0) * 2 if x.shape[0] > 10 else x.sum(0)

    with pytest.raises(torch._dynamo.exc.UserError, match=r"(?s)Constraints violated.*11"):
        exported(Branch(), torch.rand(20, 3), dynamic={"x": {0: torch.export.Dim("n", min=2, max=30)}})
    program = exported(Branch(), torch.rand(20, 3), dynamic={"x": {0: torch.export.Dim("n", min=11, max=30)}})
    x = torch.rand(13, 3)
    assert same(program.module()(x), 2 * x.sum(0))


def test_a_program_exported_in_training_has_gradients_and_writes_buffers() -> None:
    model = Norm().train()
    model.drop.p = 0.0
    other, x = copy.deepcopy(model), torch.rand(5, 6)
    program = torch.export.export(OptimizedModule(model), (x,)).module()
    program(x).square().sum().backward()
    other(x).square().sum().backward()
    assert torch.allclose(program.weight.grad, other.weight.grad, atol=1e-5)
    assert torch.allclose(program.norm.running_mean, other.norm.running_mean)


def test_folds_are_exported_as_what_they_compute() -> None:
    model, x = Factored(), torch.rand(300, 30)
    program = exported(model, x, frozen=True)
    assert same(program.module()(x), model(x))
    with torch.no_grad():
        model.a.mul_(2)
    assert same(exported(model, x, frozen=True).module()(x), model(x))


def test_export_leaves_the_wrapper_as_it_was() -> None:
    model = OptimizedModule(Chain())
    x = torch.rand(3, 40)
    expected = model(x)
    torch.export.export(model, (x,))
    assert model.cache_info()[:4] == (0, 1, 64, 1)
    assert torch.equal(model(x), expected)
    assert type(model.a) is nn.Parameter


def test_a_wrapper_inside_of_what_is_exported_is_optimized() -> None:
    inner, x = Products(256), torch.rand(256)
    outer = nn.Sequential(OptimizedModule(inner), nn.ReLU())
    assert calls(exported(outer, x)) == [*["aten.mv.default"] * 3, "aten.relu.default"]


def test_what_can_not_be_traced_is_exported_as_it_is() -> None:
    class Hooked(Products):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(40, 40)
            self.inner.register_forward_hook(lambda module, args, result: result * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x))

    model, x = Hooked(), torch.rand(40)
    with pytest.warns(lazy_einsum.FallbackWarning, match="inner is called as it is") as seen:
        program = exported(model, x)
    assert len(seen) == 1
    assert same(program.module()(x), model(x))
    with pytest.raises(lazy_einsum.UntraceableError, match="inner is called as it is"):
        exported(model, x, on_untraceable="raise")


def test_hooks_of_the_module_itself_are_exported() -> None:
    model, x = Products(), torch.rand(40)
    model.register_forward_hook(lambda module, args, result: result * 2)
    assert same(exported(model, x).module()(x), model(x))


def test_export_asks_no_backend() -> None:
    asked = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        asked.append(graph)
        return graph

    exported(Chain(), torch.rand(3, 40), backend=backend)
    assert asked == []


def test_the_inner_size_may_be_dynamic() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,kj->ik", x, x) + x.view(-1).sum()

    program = exported(Flat(), torch.rand(3, 5), dynamic={"x": {1: torch.export.Dim("n", max=99)}})
    for n in (5, 8):
        x = torch.rand(3, n)
        assert same(program.module()(x), Flat()(x))


def test_disabled_and_strict_export_are_of_the_module_itself() -> None:
    model, x = Products(256), torch.rand(256)
    with lazy_einsum.disabled():
        assert calls(exported(model, x)).count("aten.matmul.default") == 3
    with torch.no_grad():
        program = torch.export.export(OptimizedModule(model), (x,), strict=True)
    assert calls(program).count("aten.matmul.default") == 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_strict_export_may_have_a_dynamic_batch() -> None:
    class Three(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,ij,jk->nk", x, self.a, self.b)

    model, dim = Three(8), torch.export.Dim("n", max=99)
    program = torch.export.export(OptimizedModule(model), (torch.rand(5, 8),), dynamic_shapes=({0: dim},), strict=True)
    for n in (2, 9):
        x = torch.rand(n, 8)
        assert same(program.module()(x), model(x))


def test_aot_inductor_gives_a_library_that_needs_torch_alone(tmp_path: Path) -> None:
    model, given = Batched(), [batched(n) for n in (5, 2, 7)]
    program = exported(model, *given[0], dynamic=DYNAMIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save(given, tmp_path / "given.pt")
    run = """
import torch
model = torch._inductor.aoti_load_package("model.pt2")
torch.save([model(*args) for args in torch.load("given.pt")], "found.pt")
"""
    run_alone(run, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 3
    assert all(same(result, model(*args)) for result, args in zip(found, given, strict=True))


def test_onnx_has_our_order(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Batched()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own
        x, pair = batched(5)
        kwargs = {"pair": pair}  # a dictionary at the end of args would be taken for keyword arguments
        wrapper = OptimizedModule(model.eval())
        program = torch.onnx.export(wrapper, (x,), kwargs=kwargs, dynamo=True, dynamic_shapes=DYNAMIC)
    assert program is not None
    operations = [node.op_type for node in program.model.graph]
    assert operations.count("MatMul") == 3
    assert "Einsum" not in operations
    program.save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [given.name for given in session.get_inputs()]
    for n in (5, 2, 7):
        x, pair = batched(n)
        found = session.run(None, dict(zip(names, (x.numpy(), pair["other"].numpy()), strict=True)))
        expected = [value for value in tree_flatten(model(x, pair))[0] if isinstance(value, Tensor)]
        assert same([torch.from_numpy(value) for value in found[: len(expected)]], expected)


# -- CUDA graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_graphs_without_cuda_are_eager_code_with_one_warning() -> None:
    model = OptimizedModule(Chain(), backend="cudagraphs")
    with pytest.warns(lazy_einsum.BackendWarning, match="CUDA graphs are for tensors on CUDA.*cpu") as seen:
        for n in (3, 4):
            x = leaf(n, 40)
            assert same(model(x), model.module(x))
    assert len(seen) == 1
    assert model.cache_info().tiers == {"eager": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("grad", [False, True])
def test_cuda_graphs_give_what_the_module_gives(grad: bool) -> None:
    child = Chain().cuda()
    model = OptimizedModule(child, backend="cudagraphs")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.rand(3, 40, device="cuda")
        with torch.set_grad_enabled(grad):
            found, expected = model(x), child(x)
        assert torch.allclose(found, expected, atol=1e-5)
        if grad:
            gradients = [torch.autograd.grad(y.square().sum(), list(child.parameters())) for y in (found, expected)]
            assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))
    assert model.cache_info().tiers == {"cudagraphs": 1}
