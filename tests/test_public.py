"""The public names and their signatures, which code outside of this repository relies on."""

from __future__ import annotations

import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import lazy_einsum
from lazy_einsum import OptimizedModule

#: Name -> parameters with their defaults, in order ("..." for one without).
SIGNATURES = {
    "OptimizedModule": {
        "module": ...,
        "maxsize": 64,
        "optimize": "auto",
        "memory_limit": None,
        "backend": "eager",
        "on_untraceable": "warn",
        "leaf_modules": (),
        "reassociate": None,
        "frozen": (),
        "verify": False,
    },
    "optimize_einsums_full": {"model": ..., "example_inputs": ..., "contract_kwargs": {}, "tracer_class": fx.Tracer},
    "optimize_einsums": {"graph": ..., "contract_kwargs": {}},
    "fuse_einsums": {"graph": ..., "in_place": False},
    "fuse_scalars": {"graph": ..., "in_place": False},
    "jitable": {"obj": ...},
    "disabled": {},
}

ERRORS = {
    "LazyEinsumError": RuntimeError,
    "EquationError": (lazy_einsum.LazyEinsumError, ValueError),
    "UntraceableError": lazy_einsum.LazyEinsumError,
    "MemoryLimitError": lazy_einsum.LazyEinsumError,
    "PlanFileError": lazy_einsum.LazyEinsumError,
    "FallbackWarning": UserWarning,
    "CacheThrashWarning": UserWarning,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(lazy_einsum, name)).parameters
    found = {key: ... if p.default is inspect.Parameter.empty else p.default for key, p in parameters.items()}
    assert list(found.items())[: len(SIGNATURES[name])] == list(SIGNATURES[name].items())


def test_einsum_is_called_as_that_of_torch() -> None:
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (lazy_einsum.einsum, torch.einsum)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    bases = ERRORS[name]
    for base in bases if isinstance(bases, tuple) else (bases,):
        assert issubclass(getattr(lazy_einsum, name), base)


def test_all_names_are_there_and_documented() -> None:
    assert {*SIGNATURES, *ERRORS, "einsum", "EfficientShapeProp", "CacheInfo", "Signature", "Specialization"} <= set(
        lazy_einsum.__all__
    )
    assert len(lazy_einsum.__all__) == len(set(lazy_einsum.__all__))
    for name in lazy_einsum.__all__:
        value = getattr(lazy_einsum, name)
        assert inspect.getdoc(value), name
    assert lazy_einsum.__version__


def chain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return 2 * torch.einsum("ij,jk->ik", torch.einsum("ij,jk->ik", a, b), c)


def _operands(n: int = 3) -> tuple[torch.Tensor, ...]:
    return torch.rand(n, 4), torch.rand(4, 5), torch.rand(5, 2)


def test_cache_info_counts() -> None:
    m = OptimizedModule(chain, maxsize=3, dynamic=False)
    for n in (3, 3, 4, 5, 6):
        m(*_operands(n))
    info = m.cache_info()
    assert info._fields == ("hits", "misses", "maxsize", "currsize", "evictions", "fallbacks", "build_seconds")
    assert info[:6] == (1, 4, 3, 3, 1, 0)
    assert info.build_seconds > 0
    m.cache_clear()
    assert m.cache_info() == (0, 0, 3, 0, 0, 0, 0.0)


def test_specializations_are_shown_read_only_and_in_order_of_use() -> None:
    m = OptimizedModule(chain)
    for n in (3, 4, 3):
        m(*_operands(n))
    assert [entry.hits for entry in m.specializations.values()] == [0, 1]
    with pytest.raises(TypeError):
        m.specializations["x"] = None  # type: ignore[index]
    entry = list(m.specializations.values())[-1]
    assert entry.signature == list(m.specializations)[-1]
    assert entry.build_seconds > 0
    assert entry.plans
    assert isinstance(entry.graph_module, fx.GraphModule)
    assert entry.code == m.code
    assert "einsum" not in entry.code
    assert list(entry.stages)[0] != list(entry.stages)[-1]
    assert all(isinstance(text, str) for text in entry.stages.values())


def test_prepare_builds_without_running() -> None:
    ran = []

    def child(x: torch.Tensor) -> torch.Tensor:
        ran.append(type(x))
        return torch.einsum("ij->i", x)

    m = OptimizedModule(lambda x: torch.einsum("ij->i", x))
    entry = m.prepare(torch.rand(3, 4))
    assert entry.hits == 0
    assert m.cache_info().misses == 1
    m(torch.rand(3, 4))
    assert m.cache_info().misses == 1


def test_explain_is_text_and_data() -> None:
    m = OptimizedModule(chain)
    report = m.explain(*_operands())
    assert "def forward" in str(report)
    assert report.to_dict()["cache"]["misses"] == 1


def test_a_miss_says_why_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    m = OptimizedModule(chain)
    with caplog.at_level(logging.INFO, logger="lazy_einsum"):
        m(*_operands(3))
        m(*_operands(7))
    assert "first call" in caplog.messages[0]
    assert "7" in caplog.messages[-1]


def test_thrashing_warns_once() -> None:
    m = OptimizedModule(chain, maxsize=2)
    with pytest.warns(lazy_einsum.CacheThrashWarning) as seen:
        for n in range(1, 20):
            m(*_operands(n))
    assert len(seen) == 1


def test_disabled_runs_the_child() -> None:
    m = OptimizedModule(chain)
    with lazy_einsum.disabled():
        m(*_operands())
    assert m.cache_info().misses == 0
    m(*_operands())
    assert m.cache_info().misses == 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,j->i", self.layer(x), self.table)

    def some_method(self) -> str:
        return "child's"


def test_the_wrapper_stands_in_for_the_child() -> None:
    child = Net()
    m = OptimizedModule(child)
    assert m.module is child
    assert m.some_method() == "child's"
    assert m.layer is child.layer
    assert list(m.state_dict()) == list(child.state_dict())
    assert dict(m.named_parameters()).keys() == dict(child.named_parameters()).keys()
    assert dict(m.named_buffers()).keys() == dict(child.named_buffers()).keys()
    m.load_state_dict({key: torch.zeros_like(value) for key, value in child.state_dict().items()})
    assert not child.layer.weight.any()
    assert m.eval() is m
    assert not child.training
    m.double()
    assert child.layer.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "copy", [lambda m: pickle.loads(pickle.dumps(m)), __import__("copy").deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_keep_options_and_start_empty(copy: Callable[[Any], Any]) -> None:
    m = OptimizedModule(Net(), maxsize=5)
    x = torch.rand(3, 4)
    expected = m(x)
    other = copy(m)
    assert other.cache_info()[:4] == (0, 0, 5, 0)
    assert other.layer.weight is not m.layer.weight
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"maxsize": 0}, ValueError), ({"on_untraceable": "explode"}, ValueError), ({"leaf_modules": (3,)}, TypeError)],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        OptimizedModule(chain, **options)


def test_untraceable_calls_raise_or_are_quiet_on_request() -> None:
    def child(x: torch.Tensor) -> Any:
        return x * float(x.sum())

    with pytest.raises(lazy_einsum.UntraceableError, match=r"test_public\.py:\d+"):
        OptimizedModule(child, on_untraceable="raise")(torch.rand(3))
    quiet = OptimizedModule(child, on_untraceable="ignore")
    quiet(torch.rand(3))
    assert quiet.cache_info().fallbacks == 1
    with pytest.warns(lazy_einsum.FallbackWarning, match=r"test_public\.py:\d+"):
        OptimizedModule(child)(torch.rand(3))


def test_verify_passes_on_right_code() -> None:
    m = OptimizedModule(chain, verify=True)
    a, b, c = _operands()
    assert torch.allclose(m(a, b, c), chain(a, b, c))


def test_what_takes_long_to_import_is_left_alone() -> None:
    program = "import sys, lazy_einsum; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
