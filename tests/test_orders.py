"""Orders that are compared by the calls that they are lowered to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from equations import make_operands
from oracle import loops

from lazy_einsum import OptimizedModule, contract, known, orders
from lazy_einsum.errors import MemoryLimitError
from lazy_einsum.kernels import lower_plan
from lazy_einsum.labelsets import SavedLimit
from lazy_einsum.layout import Strides
from lazy_einsum.orders import _order_of, _trees, plan_by_calls
from lazy_einsum.plan import Plan, positions, saved_elements
from lazy_einsum.program import Program, run
from lazy_einsum.saved import Written, WrittenNetwork, plan_saving
from lazy_einsum.signature import TensorType
from lazy_einsum.sizes import SymbolicSize
from lazy_einsum.spec import EinsumSpec

# By its sizes the order with the products of 1.26 million elements is the better one: that the other needs no copy, and
# sums three terms only, is in the calls.
GRADIENTS = "abc,bde,ce->acd", ((3, 3, 4000), (3, 35, 35), (4000, 35))


def network_of(equation: str, operands: list[torch.Tensor]) -> WrittenNetwork:
    spec = EinsumSpec.parse(equation, [x.dim() for x in operands])
    types = tuple(TensorType.of(x) for x in operands)
    return WrittenNetwork(Written.plain(spec), spec, types, tuple(range(len(operands))))


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 3), (4, 15), (5, 105)])
def test_each_tree_once(n: int, count: int) -> None:
    found = [_order_of(tree, n) for tree in _trees(tuple(range(n)))]
    assert len(found) == count
    results = set()
    for order in found:
        below = [frozenset([leaf]) for leaf in range(n)]
        for left, right in order:
            assert not below[left] & below[right]
            below.append(below[left] | below[right])
        assert below[-1] == frozenset(range(n))
        results.add(frozenset(below))
    assert len(results) == count


def test_the_order_whose_calls_take_less_time() -> None:
    operands = make_operands(GRADIENTS[1], torch.float32)
    network = network_of(GRADIENTS[0], operands)
    by_sizes, _ = plan_saving(network, None)
    by_calls, _ = plan_by_calls(network, None)
    assert by_calls.ssa_path != by_sizes.ssa_path
    assert by_calls.seconds > by_sizes.seconds
    types = network.types
    assert lower_plan(by_calls, types).seconds < 0.6 * lower_plan(by_sizes, types).seconds
    expected = torch.einsum(GRADIENTS[0], *(x.double() for x in operands))
    with torch.no_grad():
        found = OptimizedModule(lambda x, y, z: torch.einsum(GRADIENTS[0], x, y, z))(*operands)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def _noted(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Plan], float] | None = None) -> list[tuple[Plan, Any]]:
    """Which plans are lowered to compare them, and what is asked of their strides; if given, what they seem to take."""
    noted: list[tuple[Plan, Any]] = []

    def lowered(plan: Plan, types: Sequence[TensorType], strides: Strides | None = None) -> Program:
        noted.append((plan, strides))
        return lower_plan(plan, types, strides) if seconds is None else Program(4, (), (), (), seconds(plan))

    monkeypatch.setattr(orders, "lower_plan", lowered)
    # What was chosen before is not compared again.
    known._answers.clear()
    return noted


def test_einsums_and_modules_take_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(GRADIENTS[1], torch.float32)
    network = network_of(GRADIENTS[0], operands)
    asked = torch.einsum(GRADIENTS[0], *operands).stride()
    by_calls = plan_by_calls(network, None)[0].ssa_path
    assert by_calls != plan_saving(network, None)[0].ssa_path
    noted = _noted(monkeypatch)
    taken: list[Plan] = []
    monkeypatch.setattr(orders, "lower_in_blocks", lambda plan, *rest: taken.append(plan) or lower_plan(plan, *rest))
    contract._prepare.cache_clear()
    contract.einsum(GRADIENTS[0], *operands)
    assert [plan.ssa_path for plan in taken] == [by_calls]
    noted.clear()
    contract.einsum("ab,bc,acd->d", *make_operands(((200, 300), (300, 40), (200, 40, 30)), torch.float64))
    assert noted and all(strides == Strides((1,)) for _, strides in noted)
    noted.clear()
    wrapped = OptimizedModule(lambda x, y, z: torch.einsum(GRADIENTS[0], x, y, z))
    wrapped(*operands)
    (specialization,) = wrapped.specializations.values()
    assert [plan.ssa_path for plan in specialization.plans] == [by_calls]
    assert noted and all(strides == Strides(asked, exact=False) for _, strides in noted)


def test_orders_that_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small contractions take as long to lower as they gain; code for many sizes is planned for one of them only."""
    noted = _noted(monkeypatch)
    network = network_of(GRADIENTS[0], make_operands(GRADIENTS[1], torch.float32))
    plan_by_calls(network, None)
    assert noted
    noted.clear()
    plan_by_calls(network_of(GRADIENTS[0], make_operands(((3, 3, 8), (3, 5, 5), (8, 5)), torch.float32)), None)
    assert not noted
    size = SymbolicSize.symbol("s0", 4000)
    first, second, third = network.types
    types = replace(first, shape=(3, 3, size)), second, replace(third, shape=(size, 35))
    assert plan_by_calls(network._replace(types=types), None)[0].seconds > orders._LEAST
    assert not noted


@pytest.mark.parametrize("swapped", [False, True])
def test_of_equal_orders_that_which_copies_less(swapped: bool) -> None:
    """Two factors of one size: that of the outermost label goes first, that of a label in the middle later."""
    equation = "eg,ab,acef->bcgf" if swapped else "ab,eg,acef->bcgf"
    operands = [x.requires_grad_() for x in make_operands(((32, 6), (32, 6), (32,) * 4), torch.float64)]
    # (Of three operands all orders are compared by their calls.)
    equation, operands = f"{equation[:-6]},fh->bcgh", [*operands, torch.randn(32, 26, dtype=torch.float64)]
    network = network_of(equation, operands)
    choice = plan_by_calls(network, None)
    first = choice.plan.steps[0]
    assert sorted(first.operands) == [swapped, 2]
    assert choice.plan.seconds == pytest.approx(plan_saving(network, None)[0].seconds)
    with pytest.raises(MemoryLimitError):
        plan_by_calls(network, None, memory_limit=8)
    result = run(lower_plan(choice.plan, network.types), operands)
    torch.testing.assert_close(result, torch.einsum(equation, *operands), rtol=1e-10, atol=1e-10)


def test_an_order_that_takes_longer_is_not_taken_for_fewer_copies() -> None:
    # The factor of the outermost label is larger here, so it comes later, whatever has to be copied.
    operands = make_operands(((32, 24), (32, 6), (32,) * 4, (32, 26)), torch.float64)
    network = network_of("ab,eg,acef,fh->bcgh", [x.requires_grad_() for x in operands])
    choice = plan_by_calls(network, None)
    assert choice.plan.ssa_path == plan_saving(network, None)[0].ssa_path
    assert orders._scattered(choice.plan) > 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_that_which_copies_least_of_all_equal_orders(order: Sequence[int]) -> None:
    terms, shapes = ("ab", "eg", "acef", "fh"), ((32, 6), (32, 6), (32,) * 4, (32, 6))
    operands = [x.requires_grad_() for x in make_operands([shapes[number] for number in order], torch.float64)]
    network = network_of(",".join(terms[number] for number in order) + "->bcgh", operands)
    assert orders._scattered(plan_by_calls(network, None).plan) == 0


def test_the_best_of_all_orders_within_the_limit_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((20, 300), (300, 40), (40, 200), (200, 5))
    network = network_of("ab,bc,cd,de->ae", make_operands(shapes, torch.float64))
    # The more an order holds, the better it seems.
    noted = _noted(monkeypatch, lambda plan: 1 / plan.largest_intermediate)
    monkeypatch.setattr(orders, "_LEAST", 0.0)
    monkeypatch.setattr(orders, "_FAR", 1e6)
    monkeypatch.setattr(orders, "_COMPARED", {4: 15})
    sizes = sorted({plan_by_calls(network, None)[0].largest_intermediate, *_largest(noted)})
    assert len(sizes) > 2
    assert plan_by_calls(network, None)[0].largest_intermediate == sizes[-1]
    assert plan_by_calls(network, None, memory_limit=sizes[-2])[0].largest_intermediate == sizes[-2]


def _largest(noted: Sequence[tuple[Plan, Any]]) -> list[int]:
    return [plan.largest_intermediate for plan, _ in noted]


def test_each_order_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = _noted(monkeypatch)
    monkeypatch.setattr(orders, "_LEAST", 0.0)
    for equation, shapes in (GRADIENTS, ("ab,bc,cd,de->ae", ((20, 30), (30, 40), (40, 20), (20, 5)))):
        noted.clear()
        plan_by_calls(network_of(equation, make_operands(shapes, torch.float32)), None)
        lowered = []
        for plan, _ in noted:
            below = [frozenset([number]) for number in range(len(shapes))]
            for step in plan.steps:
                below.append(frozenset().union(*(below[operand] for operand in step.operands)))
            lowered.append(frozenset(below))
        assert len(lowered) > 1
        assert len(set(lowered)) == len(lowered)


def test_what_was_asked_for_stays() -> None:
    operands = make_operands(GRADIENTS[1], torch.float32)
    network = network_of(GRADIENTS[0], operands)
    by_sizes, _ = plan_saving(network, None)
    assert plan_by_calls(network, None, by_sizes.path)[0].path == by_sizes.path
    frozen = network._replace(frozen=(True, False, False))
    assert plan_by_calls(frozen, None) == plan_saving(frozen, None)


def test_a_limit_on_saved_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((20, 300), (300, 40), (40, 200), (200, 5))
    operands = [x.requires_grad_() for x in make_operands(shapes, torch.float64)]
    network = network_of("ab,bc,cd,de->ae", operands)
    limit = SavedLimit((True,) * 4, tuple(x.numel() for x in operands), (0, 1, 2, 3))

    def saved(plan: Plan) -> int:
        return saved_elements(network.spec, shapes, plan.ssa_path, limit)

    def lower_plan(plan: Plan, *_: object) -> Program:
        return Program(4, (), (), (), 1 / saved(plan))  # the more an order saves, the better it seems

    monkeypatch.setattr(orders, "_LEAST", 0.0)
    monkeypatch.setattr(orders, "_FAR", 1e6)
    monkeypatch.setattr(orders, "_COMPARED_FOLLOWED", {4: 4})
    monkeypatch.setattr(orders, "lower_plan", lower_plan)
    most = saved(plan_saving(network, 1.0)[0])
    assert saved(plan_by_calls(network, 1.0)[0]) <= most
    assert saved(plan_by_calls(network, None)[0]) > 1.1 * most


def test_all_orders_compute_the_same() -> None:
    equation, shapes = "ab,bcd,da,c->bd", ((2, 3), (3, 2, 4), (4, 2), (2,))
    operands = make_operands(shapes, torch.int64)
    network = network_of(equation, operands)
    expected = loops(network.spec, operands)
    for tree in _trees((0, 1, 2, 3)):
        path = positions(_order_of(tree, 4), 4)
        plan, _ = plan_by_calls(network, None, path)
        torch.testing.assert_close(run(lower_plan(plan, network.types), operands), expected, rtol=0, atol=0)
