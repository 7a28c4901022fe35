"""Devices other than the processor, and torch's flags of precision. What needs CUDA itself is in the tests that take a
``device``, all over the suites; here is what can be told without one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from equations import ROWS, Row, make_operands, row_id
from oracle import loops
from pairwise import model_contractions
from programs import PROGRAMS, SIZES, names, on
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_einsum import OptimizedModule, UntraceableError, ambient, bench, choice, contract, einsum, folds, known
from lazy_einsum.backends import Backend
from lazy_einsum.blocks import lower_in_blocks
from lazy_einsum.compiled import Before, compile_module
from lazy_einsum.kernels import lower_plan
from lazy_einsum.plan import make_plan
from lazy_einsum.program import CAT, Program, compile_program
from lazy_einsum.saved import Written, WrittenNetwork
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec
from lazy_einsum.stopwatch import is_here, mean_seconds
from lazy_einsum.verify import difference

CUDA = torch.device("cuda", 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA: what takes a device ran on the processor")
def test_cuda_is_among_the_devices(device: str) -> None:
    """The one test that is skipped without CUDA: the others are not collected for it then, see ``conftest.py``."""
    assert torch.ones(2, device=device).sum().item() == 2


# -- no tensor is made on the processor -------------------------------------------------------------------------------


def test_programs_on_another_device_stay_there() -> None:
    """Traced, lowered and run on fakes of a device that is not the processor, which refuse to be mixed with others."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "other_device.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr[-2000:]


def types_of(tree: Any) -> list[Any]:
    return [
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in pytree.tree_leaves(tree)
    ]


@pytest.mark.parametrize("row", PROGRAMS, ids=names())
@pytest.mark.filterwarnings("ignore::lazy_einsum.FallbackWarning")
def test_programs_on_meta_stay_there(row: Any) -> None:
    """The whole way, checks at the second call included, on the one other device that each build of torch has."""
    row = on(row, "meta")
    child, wrapped = row.make(), OptimizedModule(row.make())
    for number in range(2):
        call, again = (row.arguments(SIZES[number], torch.Generator().manual_seed(0)) for _ in range(2))
        if row.before is not None:
            row.before(number, child)
            row.before(number, wrapped.module)
        with torch.no_grad():
            try:
                expected = types_of(child(*call.args, **call.kwargs))
            except Exception:  # it looks at data, or mixes devices
                return
            if any(torch.device("cpu") in kind for kind in expected if isinstance(kind, tuple)):
                return  # it makes tensors on the processor itself
            if row.name not in ("plain tensor attribute that is replaced", "global tensor"):  # which are there, too
                assert types_of(wrapped(*again.args, **again.kwargs)) == expected


# -- what is written for CUDA ------------------------------------------------------------------------------------------


def on_cuda(operands: list[Tensor]) -> list[TensorType]:
    """Types of tensors like these on CUDA."""
    return [replace(TensorType.of(operand), device=CUDA) for operand in operands]


def targets(program: Program) -> set[str]:
    return {call.target for call in program.calls}


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_lowered_for_cuda(item: tuple[str, Row]) -> None:
    """The values are right, and no sum is more than one call, whatever the sizes."""
    row = item[1]
    operands = make_operands(row.shapes, torch.float64, strided=True)
    spec = EinsumSpec.parse(row.equation, [len(shape) for shape in row.shapes])
    program = lower_plan(make_plan(spec, row.shapes), on_cuda(operands))
    torch.testing.assert_close(compile_program(program)(*operands), loops(spec, operands), rtol=1e-10, atol=1e-10)
    assert not targets(program) & {"addcmul_", "unbind"}


@pytest.mark.parametrize("case", model_contractions(), ids=str)
def test_each_step_is_one_kernel_on_cuda(case: Any) -> None:
    operands = case.operands()
    spec = EinsumSpec.parse(case.equation, [operand.dim() for operand in operands])
    plan = make_plan(spec, case.shapes)
    for follows in (False, True):
        types = [replace(known, requires_grad=follows) for known in on_cuda(operands)]
        found = [call.target for call in lower_plan(plan, types).calls]
        assert sum(name in ("mm", "bmm", "mv", "dot", "mul", "addmm", "baddbmm") for name in found) == len(plan.steps)
        assert not {"addcmul_", "add_"} & set(found)


def test_the_processor_has_sums_of_few_terms_written_out() -> None:
    """What the two tests above are about: the same contraction, there."""
    operands = [torch.rand(3, 100_000), torch.rand(3, 4, 100_000)]
    plan = make_plan(EinsumSpec.parse("ab,acb->bc", (2, 3)), [operand.shape for operand in operands])
    assert "addcmul_" in targets(lower_plan(plan, list(map(TensorType.of, operands))))
    assert "addcmul_" not in targets(lower_plan(plan, on_cuda(operands)))


def test_blocks_are_for_the_processor() -> None:
    """It is there that memory is slow to get."""
    shapes = ((32, 256, 8), (32, 512, 8), (256, 512, 2))
    plan = make_plan(EinsumSpec.parse("abc,adc,bde->ae", (3, 3, 3)), shapes, optimize=((0, 1), (0, 1)))
    operands = [torch.empty(shape) for shape in shapes]
    assert CAT in targets(lower_in_blocks(plan, list(map(TensorType.of, operands))))
    assert CAT not in targets(lower_in_blocks(plan, on_cuda(operands)))


def test_einsum_has_code_for_each_kind_of_device() -> None:
    shapes = (torch.Size((3, 100_000)), torch.Size((3, 4, 100_000)))
    parts = tuple((shape, torch.empty(shape, device="meta").stride(), False) for shape in shapes)
    found = {}
    for kind in ("cpu", "cuda"):
        function = contract._prepare("ab,acb->bc", parts, torch.float32, (), kind)
        found[kind] = function.__code__.co_names
    assert "addcmul_" in found["cpu"] and "addcmul_" not in found["cuda"]


def test_orders_are_known_for_each_kind_of_device() -> None:
    """Those that the model chose hold for all devices of the kind."""
    types = on_cuda([torch.empty(2, 3), torch.empty(3, 4), torch.empty(4, 5)])
    spec = EinsumSpec.parse("ab,bc,cd->ad", (2, 2, 2))
    devices = []
    for own in (types, [replace(one, device=torch.device("cpu")) for one in types]):
        network = WrittenNetwork(Written.plain(spec), spec, tuple(own), (0, 1, 2))
        with known.noting() as noted:
            choice.choose_order(network, None)
        devices += [question.calls.device for question in noted if question.calls]
    assert devices == ["cuda", None]
    assert is_here("cpu") and is_here("cuda") == torch.cuda.is_available()


def test_what_was_started_before_is_not_counted() -> None:
    """Calls come back before the device has done them: 5 s of another's, and 1 s of each."""
    pending, now = [5.0], [0.0]

    def wait() -> None:
        now[0] += sum(pending)
        pending.clear()

    assert mean_seconds(lambda: pending.append(1.0), 3, wait, lambda: now[0]) == 1.0


# -- torch's flags of precision ----------------------------------------------------------------------------------------


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets how float32 products are computed; as before in the end."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def summed(x: Tensor, w: Tensor) -> Tensor:
    return (x[:, :, None] * w).sum(1)


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ij,jk->ik", x, w)


def test_a_sum_of_products_is_no_matrix_product_where_that_would_round(precision: Callable[[str], None]) -> None:
    """TF32 and the like are for what torch itself computes by a matrix product."""
    model = OptimizedModule(summed)
    x, w = torch.rand(300, 200), torch.rand(200, 100)
    for value, kernel in (("highest", ".mm("), ("medium", ".sum("), ("medium", ".sum("), ("highest", ".mm(")):
        precision(value)
        torch.testing.assert_close(model(x, w).double(), summed(x.double(), w.double()), rtol=1e-5, atol=0)
        assert kernel in model.code, value
    info = model.cache_info()
    assert info.misses == info.hits == 2
    first, second = model.specializations
    assert first.difference(second).startswith("precision: ")


@pytest.mark.parametrize(("function", "dtype"), [(product, torch.float32), (summed, torch.float64)])
def test_flags_make_no_other_code_where_they_do_not_matter(
    function: Callable[..., Tensor], dtype: torch.dtype, precision: Callable[[str], None]
) -> None:
    """A matrix product stays one, and torch looks at the flags when it runs."""
    model = OptimizedModule(function)
    operands = torch.rand(300, 200, dtype=dtype), torch.rand(200, 100, dtype=dtype)
    for value in ("highest", "medium", "highest", "medium"):
        precision(value)
        model(*operands)
    assert model.cache_info().misses == 1 and ".mm(" in model.code


class Frozen(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.rand(8, 8, dtype=dtype)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a @ self.b)


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 2), (torch.float64, 1)])
def test_folds_are_served_under_the_flags_that_they_were_computed_under(
    dtype: torch.dtype, times: int, precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = folds.Fold.__call__
    monkeypatch.setattr(folds.Fold, "__call__", lambda self, *tensors: seen.append(self) or plain(self, *tensors))
    model = OptimizedModule(Frozen(dtype), frozen=True)
    with torch.no_grad():
        for value in ("highest", "medium", "medium", "highest"):
            precision(value)
            model(torch.rand(4, 8, dtype=dtype))
    assert len(seen) == times


def test_flags_of_narrow_types_are_those_of_cuda() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert ambient.precisions([("cpu", dtype)]) == ()
        before = ambient.precisions([("cuda", dtype)])
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
            was = getattr(torch.backends.cuda.matmul, name)
            setattr(torch.backends.cuda.matmul, name, not was)
            after = ambient.precisions([("cuda", dtype)])
            setattr(torch.backends.cuda.matmul, name, was)
            assert after != before == ambient.precisions([("cuda", dtype)])


def test_each_way_to_ask_for_tf32_is_seen() -> None:
    """In a process of its own: torch keeps to the way that was used first."""
    ways = [
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ]
    for way in ways:
        code = "import torch\nfrom lazy_einsum.ahead import Request\nfrom lazy_einsum.ambient import product_bits\n"
        code += f"{way}\nrequest = Request(None, (), False, dict())\n"  # torch refuses to say for two of them
        code += "print(product_bits('cuda', torch.float32), request.flags['fp32_precision'], request.precision)"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert done.stdout.split()[:2] == ["tf32", "tf32"], done.stdout + done.stderr
        assert done.stdout.split()[2] == ("None" if "fp32" in way else "high")


def test_verify_allows_what_flags_allow(precision: Callable[[str], None]) -> None:
    exact = torch.rand(9, dtype=torch.float64) + 1
    one, other, wide = exact.float(), exact.float() * (1 + 4e-3), exact * (1 + 4e-3)
    assert difference([one], [other]) is not None
    precision("medium")
    assert difference([one], [other]) is None
    assert difference([exact], [wide]) is not None


def test_a_result_elsewhere_is_another() -> None:
    found = difference([torch.zeros(2)], [torch.zeros(2, device="meta")])
    assert found == "value 0 is a torch.float32 of shape (2,) on meta, expected torch.float32 of shape (2,) on cpu"


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """What stands for the generator of a device of CUDA's."""
    found = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.cuda, "default_generators", (found,))
    return found


class Draws(nn.Module):
    """Draws from a generator that is part of it."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(4, generator=self.generator)


def test_verify_runs_both_on_the_same_random_numbers_of_cuda(generator: torch.Generator) -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(OptimizedModule(Draws(generator), verify=True)(torch.ones(4)), expected)


def test_random_numbers_of_cuda_go_on_as_if_nothing_was_timed(generator: torch.Generator) -> None:
    state = generator.get_state()
    bench.bench_einsum("ij,jk->ik", [torch.rand(2, 3), torch.rand(3, 4)], rounds=1)
    assert torch.equal(generator.get_state(), state)

    def seeds(x: Tensor) -> Tensor:
        return x * torch.rand(2, generator=generator.manual_seed(8))

    bench.bench_model(seeds, [torch.ones(2)], rounds=1)
    assert torch.equal(generator.get_state(), state)


def test_a_backend_that_draws_when_it_compiles_takes_no_random_numbers(generator: torch.Generator) -> None:
    state = generator.get_state()

    def draw(module: Any, examples: Any) -> Any:
        torch.rand(2, generator=generator)
        return module

    backend = Backend("draws", draw, takes_fakes=False)
    compile_module(backend, torch.fx.symbolic_trace(lambda x: (x,)), (TensorType.of(torch.ones(2)),), False)
    assert torch.equal(generator.get_state(), state)


def test_a_second_run_draws_the_same_on_each_device_of_the_code(generator: torch.Generator) -> None:
    compiled: Any = SimpleNamespace(written=(), draws=True, devices={CUDA, torch.device("cpu")})
    before = Before(compiled, [])
    first = torch.rand(3, generator=generator), torch.rand(3)
    after = generator.get_state(), torch.get_rng_state()
    with before.again():
        assert torch.equal(torch.rand(3, generator=generator), first[0]) and torch.equal(torch.rand(3), first[1])
    assert torch.equal(generator.get_state(), after[0]) and torch.equal(torch.get_rng_state(), after[1])


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether a graph is captured."""

    def set_it(is_so: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_so)

    set_it(False)
    return set_it


def test_a_graph_that_is_captured_keeps_no_address_of_a_fold(
    capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later drop of the fold would give its memory away under the graph."""
    monkeypatch.setattr(folds, "_stream", lambda tensors: "the same stream")
    model = OptimizedModule(Frozen(torch.float64), frozen=True)
    seen = []
    plain = folds.Fold.__call__
    monkeypatch.setattr(folds.Fold, "__call__", lambda self, *tensors: seen.append(self) or plain(self, *tensors))
    x = torch.rand(4, 8, dtype=torch.float64)
    with torch.no_grad():
        for number, is_so in enumerate((False, True, True, False)):
            capturing(is_so)
            torch.testing.assert_close(model(x), model.module(x))
            assert len(seen) == (1, 2, 3, 3)[number]


def test_nothing_is_measured_while_a_graph_is_captured(
    capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(choice, "fastest_order", lambda network, *rest: asked.append(1) or plain(network, *rest[:1]))
    monkeypatch.setattr(choice, "device_kind", lambda device: "cuda: a test")
    plain = choice.plan_by_calls
    spec = EinsumSpec.parse("ab,bc,cd->ad", (2, 2, 2))
    types = tuple(on_cuda([torch.empty(2, 30), torch.empty(30, 4), torch.empty(4, 5)]))
    network = WrittenNetwork(Written.plain(spec), spec, types, (0, 1, 2))
    for is_so in (True, False):
        capturing(is_so)
        choice.choose_order(network, None, measure=True)
        assert bool(asked) is not is_so


# -- several devices at once -------------------------------------------------------------------------------------------


def test_a_number_on_the_processor_beside_tensors_elsewhere(device: str) -> None:
    """Torch allows it for elementwise functions, but not for einsums."""
    scalar, x = torch.tensor(2.0), torch.rand(3, 4, device=device)
    model = OptimizedModule(lambda s, x: s * torch.einsum("ij,kj->ik", x, x))
    torch.testing.assert_close(model(scalar, x), 2 * x @ x.T)
    if device != "cpu":
        for function in (einsum, OptimizedModule(lambda *args: torch.einsum(*args))):
            with pytest.raises(RuntimeError, match="same device"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(",ij->ij", scalar, x)


def test_an_einsum_of_several_devices_is_refused_while_it_is_traced() -> None:
    """There, the shape of its result would be known without running it; eager raises an error."""
    model = OptimizedModule(lambda x, y: torch.einsum("ij,jk->ik", x, y))
    with pytest.raises(UntraceableError, match="same device"):
        model.prepare(torch.empty(2, 3), torch.empty(3, 4, device="meta"))
