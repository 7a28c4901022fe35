"""Every program of the table through ``OptimizedModule`` and the one-shot functions, against the child in eager."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import Observation, clone_tree, differences, observe
from programs import PROGRAMS, SIZES, Call, Program, names, on
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lazy_einsum
from lazy_einsum import FallbackWarning, OptimizedModule


def _observe(row: Program, target: Callable[..., Any], child: Any, call: Call, *, second: bool) -> Observation:
    leaves = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    wanted = {f"input {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    args, kwargs = call.args, call.kwargs
    if row.copies:
        args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    if isinstance(child, nn.Module):
        wanted.update((name, p) for name, p in child.named_parameters() if p.requires_grad)
    return observe(target, args, kwargs, module=child, second=second, leaves=wanted)


def _call(row: Program, number: int) -> Call:
    return row.arguments(SIZES[number], torch.Generator().manual_seed(number))


def _copy(call: Call) -> Call:
    args, kwargs = clone_tree((call.args, call.kwargs))
    return Call(args, kwargs)


def _example(row: Program, call: Call) -> tuple[Any, ...]:
    # A leaf that requires gradients may not be written: such rows get copies in their calls too.
    examples = _copy(call).args
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, examples) if row.copies else examples


def _fallbacks(seen: Observation) -> list[str]:
    return [str(w.message) for w in seen.warned if issubclass(w.category, FallbackWarning)]


@pytest.mark.parametrize("row", PROGRAMS, ids=names())
def test_wrapped_does_what_eager_does(row: Program, device: str) -> None:
    row = on(row, device)
    child, wrapped_child = row.make(), row.make()
    wrapped = OptimizedModule(wrapped_child)
    fallen: list[str] = []
    for number in range(len(SIZES)):
        if row.before is not None:
            row.before(number, child)
            if wrapped_child is not child:
                row.before(number, wrapped_child)
        call = _call(row, number)
        theirs = _observe(row, child, child, _copy(call), second=row.second)
        ours = _observe(row, wrapped, wrapped_child, _copy(call), second=row.second)
        assert differences(ours, theirs, tolerance=row.tolerance) == [], f"call {number}"
        if theirs.error is None:  # (Tensors that a row makes itself lie on the processor: others fail with them.)
            fallen += _fallbacks(ours)
    assert not fallen or (row.may_fall_back and len(fallen) == 1)
    # Tracing must leave nothing behind in the child.
    call = _call(row, 0)
    theirs = _observe(row, child, child, _copy(call), second=False)
    ours = _observe(row, wrapped_child, wrapped_child, _copy(call), second=False)
    assert differences(ours, theirs, tolerance=row.tolerance) == []


@pytest.mark.parametrize("row", PROGRAMS, ids=names())
def test_wrapped_does_what_eager_does_without_gradients(row: Program, device: str) -> None:
    row = on(row, device)
    child, wrapped_child = row.make(), row.make()
    wrapped = OptimizedModule(wrapped_child, on_untraceable="ignore")
    with torch.no_grad():
        for number in range(len(SIZES)):
            if row.before is not None:
                row.before(number, child)
                if wrapped_child is not child:
                    row.before(number, wrapped_child)
            call = _call(row, number)
            theirs = _observe(row, child, child, _copy(call), second=False)
            ours = _observe(row, wrapped, wrapped_child, _copy(call), second=False)
            assert differences(ours, theirs, tolerance=row.tolerance) == [], f"call {number}"


FX_ROWS = [row for row in PROGRAMS if not row.not_for_fx]


@pytest.mark.parametrize("row", FX_ROWS, ids=names(FX_ROWS))
def test_one_shot_does_what_eager_does(row: Program, device: str) -> None:
    """The result is made for one set of sizes and must hold for the others."""
    row = on(row, device)
    child = row.make()
    if row.before is not None:
        row.before(0, child)
    example = _call(row, 0)
    if example.kwargs:
        pytest.skip("the one-shot functions take positional examples only")
    theirs = _observe(row, child, child, _copy(example), second=False)
    if theirs.error is not None:
        pytest.skip("eager refuses it")
    state_before = clone_tree(dict(child.state_dict())) if isinstance(child, nn.Module) else {}
    stream = torch.get_rng_state()
    graph_module = lazy_einsum.optimize_einsums_full(child, _example(row, example))
    assert torch.equal(torch.get_rng_state(), stream)
    for name, tensor in state_before.items():
        assert torch.equal(child.state_dict()[name], tensor), f"optimizing wrote {name}"
    for number in range(len(SIZES)):
        fresh, ours_child = row.make(), row.make()
        if isinstance(fresh, nn.Module):
            graph_module = lazy_einsum.optimize_einsums_full(ours_child, _example(row, example))
        call = _call(row, number)
        theirs = _observe(row, fresh, fresh, _copy(call), second=False)
        ours = _observe(row, graph_module, ours_child, _copy(call), second=False)
        assert differences(ours, theirs, tolerance=row.tolerance) == [], f"call {number}:\n{graph_module.code}"


def test_every_demonstrated_defect_is_in_the_table() -> None:
    present = {row.name.split()[0] for row in PROGRAMS}
    # S12 and S14 are about the code, not about a call: tests of their own below.
    wanted = {f"W{i}" for i in range(1, 15)} | {f"C{i}" for i in range(1, 11)}
    wanted |= {f"S{i}" for i in range(1, 16)} - {"S12", "S14"}
    assert wanted <= present
    assert len(names()) == len(set(names()))


CODE_OF_ONE_PROGRAM = """
    import torch
    from lazy_einsum import OptimizedModule

    def f(x, y, z):
        a = torch.einsum("ij,jk->ik", 2 * x, y)
        b = torch.einsum("ik,kl->il", a, z) / 3
        return torch.einsum("il,ij->lj", b, x), torch.einsum("ij,jk,kl->il", x, y, z)

    m = OptimizedModule(f)
    m(torch.ones(3, 4), torch.ones(4, 5), torch.ones(5, 6))
    print(m.code)
"""


def test_same_code_in_every_process() -> None:
    seen = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CODE_OF_ONE_PROGRAM)],
            env={"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert "def forward" in seen.pop()


def test_memory_limit_of_the_one_shot_functions_is_kept() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.einsum("ij,jk,kl->il", a, b, c)

    a, b, c = torch.rand(2, 30), torch.rand(30, 30), torch.rand(30, 2)
    graph_module = lazy_einsum.optimize_einsums_full(f, (a, b, c), {"memory_limit": 60})
    assert torch.allclose(graph_module(a, b, c), a @ b @ c)
    assert not [node for node in graph_module.graph.nodes if node.target is torch.einsum and len(node.args) > 3]
