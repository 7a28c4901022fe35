"""Contraction orders: right for every strategy, the best for few operands, bounded and repeatable for many."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import opt_einsum
import pytest
import torch
from equations import ROWS, Row, equations, make_operands, row_id
from hypothesis import given
from instances import load, random_network
from oracle import loops

from lazy_einsum import exact
from lazy_einsum import plan as planning
from lazy_einsum.cost import gradient_seconds, pair_seconds
from lazy_einsum.errors import EquationError, LazyEinsumError, MemoryLimitError
from lazy_einsum.labelsets import Network, SavedLimit
from lazy_einsum.plan import Plan, make_plan
from lazy_einsum.spec import EinsumSpec, symbol


def parse(row: Row) -> EinsumSpec:
    return EinsumSpec.parse(row.equation, [len(shape) for shape in row.shapes])


def follow(plan: Plan, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run the steps of a plan, each by plain loops."""
    values = list(operands)
    for step in plan.steps:
        taken = [values[number] for number in step.operands]
        assert tuple(tuple(value.shape) for value in taken) == step.shapes
        values.append(loops(step.spec, taken))
        assert tuple(values[-1].shape) == step.shape
    return values[-1]


def check(plan: Plan, row: Row) -> None:
    operands = make_operands(row.shapes, torch.int64)
    torch.testing.assert_close(follow(plan, operands), loops(parse(row), operands))
    assert all(len(step.operands) == len(step.spec.inputs) <= 2 for step in plan.steps)
    consumed = [number for step in plan.steps for number in step.operands]
    assert sorted(consumed) == list(range(len(row.shapes) + len(plan.steps) - 1))
    assert plan.flops == sum(step.flops for step in plan.steps)


@pytest.mark.parametrize("item", ROWS, ids=row_id)
def test_the_steps_of_a_plan_give_the_einsum(item: tuple[str, Row]) -> None:
    row = item[1]
    plan = make_plan(parse(row), row.shapes)
    check(plan, row)
    assert all(len(line) <= 100 for line in str(plan).splitlines())


def strategies() -> list[Any]:
    def last_first(inputs: Sequence[frozenset[str]], output: frozenset[str], sizes: Any, limit: Any) -> Any:
        return [(len(inputs) - step - 2, len(inputs) - step - 1) for step in range(len(inputs) - 1)]

    def all_at_once(inputs: Sequence[frozenset[str]], output: frozenset[str], sizes: Any, limit: Any) -> Any:
        return [tuple(range(len(inputs)))]

    names = [
        "optimal",
        "dp",
        "greedy",
        "branch-all",
        "branch-2",
        "eager",
        "random-greedy",
        "auto-hq",
        "dynamic-programming",
    ]
    return [*names, False, True, last_first, all_at_once, opt_einsum.RandomGreedy(max_repeats=4)]


def strategy_name(optimize: Any) -> str:
    return str(getattr(optimize, "__name__", type(optimize).__name__)) if callable(optimize) else str(optimize)


MANY = [item for item in ROWS if 3 <= len(item[1].shapes) <= 8]


@pytest.mark.parametrize("optimize", strategies(), ids=strategy_name)
def test_every_strategy_gives_the_einsum(optimize: Any) -> None:
    for _, row in MANY:
        check(make_plan(parse(row), row.shapes, optimize), row)


@pytest.mark.parametrize("item", [item for item in ROWS if len(item[1].shapes) <= 8], ids=row_id)
def test_generic_plans_hold_for_other_sizes(item: tuple[str, Row]) -> None:
    row = item[1]
    spec = parse(row)
    plan = make_plan(spec, row.shapes, generic=True)
    for sizes in ({}, dict.fromkeys(spec.labels, 1), dict.fromkeys(spec.labels, 2)):
        shapes = tuple(
            tuple(sizes.get(label, size) for label, size in zip(term, shape, strict=True))
            for term, shape in zip(spec.inputs, row.shapes, strict=True)
        )
        operands = make_operands(shapes, torch.int64)
        values = list(operands)
        for step in plan.steps:
            values.append(loops(step.spec, [values[number] for number in step.operands]))
        torch.testing.assert_close(values[-1], loops(spec, operands))


@given(equations(max_operands=5))
def test_random_equations(row: Row) -> None:
    check(make_plan(parse(row), row.shapes), row)
    check(make_plan(parse(row), row.shapes, "greedy"), row)
    check(make_plan(parse(row), row.shapes, generic=True), row)


def every_order(n: int) -> Iterator[tuple[tuple[int, int], ...]]:
    def extend(alive: tuple[int, ...], path: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
        if len(alive) == 1:
            yield path
        for one, two in itertools.combinations(alive, 2):
            yield from extend(
                (*(number for number in alive if number not in (one, two)), n + len(path)), (*path, (one, two))
            )

    return extend(tuple(range(n)), ())


@pytest.mark.parametrize(
    ("equation", "sizes"),
    [
        ("ab,bc,cd,de->ae", "a20 b3 c30 d2 e25"),
        ("ab,bc,cd,da->", "a9 b8 c7 d6"),
        ("iP,aP,PQ,jQ,bQ->iajb", "i4 j5 a6 b7 P30 Q20"),
        ("bgk,bqk,bk->bgq", "b8 g16 k32 q64"),
        ("a,b,ab,c->c", "a100 b200 c3"),
        ("zui,zj,zuv,ijk->zvk", "z64 u32 v32 i3 j3 k5"),
        ("ab,cd,ac,->bd", "a2 b30 c3 d40"),
    ],
)
@pytest.mark.parametrize("who", ["none", "first", "last", "all"])
def test_few_operands_are_ordered_best(equation: str, sizes: str, who: str) -> None:
    size = {item[0]: int(item[1:]) for item in sizes.split()}
    terms = equation.split("->")[0].split(",")
    shapes = [tuple(size[label] for label in term) for term in terms]
    spec = EinsumSpec.parse(equation, [len(term) for term in terms])
    follows = [who == "all" or (who, n) in (("first", 0), ("last", len(terms) - 1)) for n in range(len(terms))]

    def seconds(path: Sequence[tuple[int, int]]) -> float:
        values, total = [set(term) for term in terms], 0.0
        followed = list(follows)
        alive = set(range(len(terms)))
        for one, two in path:
            a, b = values[one], values[two]
            alive -= {one, two}
            needed = set(spec.output).union(*(values[other] for other in alive))
            result = (a | b) & needed
            groups = (a & b & result, a - b, b - a, (a & b) - result)
            batch, m, n, k = (math.prod(size[label] for label in group) for group in groups)
            total += pair_seconds(batch, m, n, k)
            total += followed[one] * gradient_seconds(batch, m, n, k)
            total += followed[two] * gradient_seconds(batch, n, m, k)
            alive.add(len(values))
            values.append(result)
            followed.append(followed[one] or followed[two])
        return total

    best = min(map(seconds, every_order(len(terms))))
    forward = seconds(make_plan(spec, shapes).ssa_path)
    found = make_plan(spec, shapes, follows=follows)
    assert found.seconds == pytest.approx(seconds(found.ssa_path))
    # The best order forward stays unless another is clearly better.
    assert found.seconds == pytest.approx(forward if best > 0.8 * forward else best)


@pytest.mark.parametrize("name", ["optimal", "greedy", "dp"])
def test_a_name_is_exactly_that_strategy(name: str) -> None:
    equation = "ab,bc,cd,de,ef->af"
    shapes = [(9, 2), (2, 8), (8, 3), (3, 7), (7, 5)]
    spec = EinsumSpec.parse(equation, [2] * 5)
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=name)
    plan = make_plan(spec, shapes, name)
    assert plan.path == tuple(tuple(sorted(step)) for step in path)
    assert plan.flops == int(info.opt_cost)
    assert plan.naive_flops == int(info.naive_cost)
    assert plan.largest_intermediate == int(info.largest_intermediate)
    assert plan.optimizer == name


def test_a_given_path_is_followed() -> None:
    shapes = [(2, 3), (3, 4), (4, 5), (5, 6)]
    spec = EinsumSpec.parse("ab,bc,cd,de->ae", [2] * 4)
    for path in (((2, 3), (1, 2), (0, 1)), ((0, 1), (0, 1), (0, 1)), ((1, 3), (0, 2), (0, 1))):
        assert make_plan(spec, shapes, path).path == path
    assert make_plan(spec, shapes, [[0], [2, 1, 0], [0, 1]]).steps[-1].spec.output == "ae"
    # What the path leaves over is ordered by our own search.
    assert len(make_plan(spec, shapes, [(0, 1)]).steps) == 3


@pytest.mark.parametrize(
    ("optimize", "message"),
    [
        ("fastest", "optimize='fastest' is not a strategy"),
        ([(0, 7)], "expected different positions from 0 to 2"),
        ([(1, 1)], "expected different positions"),
        ([()], "expected different positions"),
    ],
)
def test_bad_strategies(optimize: Any, message: str) -> None:
    with pytest.raises((LazyEinsumError, ValueError)) as caught:
        make_plan(EinsumSpec.parse("ab,bc,cd->ad", [2] * 3), [(2, 3), (3, 4), (4, 5)], optimize)
    assert message in str(caught.value)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(EquationError, match="label 'b'"):
        make_plan(EinsumSpec.parse("ab,bc->ac", [2, 2]), [(2, 3), (4, 5)])


def test_a_callable_sees_the_normalised_network() -> None:
    seen = []

    def look(inputs: Any, output: Any, sizes: Any, limit: Any) -> Any:
        seen.append((inputs, output, sizes, limit))
        return [(0, 1), (0, 1)]

    spec = EinsumSpec.parse("aab,bcx,dc->ad", [3, 3, 2])
    make_plan(spec, [(2, 2, 3), (3, 4, 5), (1, 4)], look, memory_limit=100)
    assert seen == [
        ([frozenset("ab"), frozenset("bc"), frozenset("c")], frozenset("a"), {"a": 2, "b": 3, "c": 4, "x": 5}, 100)
    ]
    make_plan(spec, [(2, 2, 3), (3, 4, 5), (1, 4)], look, memory_limit=100)
    assert len(seen) == 2, "what a callable returned may not be kept"


def test_a_callable_need_not_take_a_limit() -> None:
    row = Row("ab,bc,cd->ad", ((2, 3), (3, 4), (4, 5)))
    check(make_plan(parse(row), row.shapes, lambda inputs, output, sizes: [(1, 2), (0, 1)]), row)


def test_cotengra() -> None:
    cotengra = pytest.importorskip("cotengra")
    row = Row("ab,bc,cd,de->ae", ((2, 3), (3, 4), (4, 2), (2, 3)))
    for optimizer in (cotengra.GreedyOptimizer(), cotengra.OptimalOptimizer(), cotengra.RandomGreedyOptimizer()):
        check(make_plan(parse(row), row.shapes, optimizer), row)


def test_terms_that_foreign_strategies_get() -> None:
    """Sets as opt_einsum has them; where tuples do, tuples, whose order is the same in each process."""
    given: dict[str, Any] = {}

    class Strategy:
        def __call__(self, inputs: Any, output: Any, sizes: Any) -> Any:
            given[self.__module__] = [*inputs, output]
            return [(0, 1), (0, 1)]

    spec = EinsumSpec.parse("ab,bc,cd->ad", [2] * 3)
    for package, kind in (("cotengra.pathfinders", tuple), ("somebody", frozenset)):
        make_plan(spec, [(2, 3), (3, 4), (4, 2)], type("Foreign", (Strategy,), {"__module__": package})())
        assert {type(term) for term in given[package]} == {kind}
        assert {type(label) for term in given[package] for label in term} == {str}


def test_memory_limit() -> None:
    # Best is the outer product of the vectors; within 50 elements only the other orders remain.
    equation, shapes = "a,b,abc->c", [(64,), (64,), (64, 64, 1000)]
    spec = EinsumSpec.parse(equation, [1, 1, 3])
    free = make_plan(spec, shapes)
    assert max(step.size for step in free.steps[:-1]) == 64 * 64
    with pytest.raises(MemoryLimitError, match="raise memory_limit"):
        make_plan(spec, shapes, memory_limit=50)
    chain = EinsumSpec.parse("ab,bc,cd->ad", [2] * 3)
    chain_shapes = [(30, 2), (2, 40), (40, 3)]
    for limit in (80, 90, "max_output", "max_input"):
        plan = make_plan(chain, chain_shapes, memory_limit=limit)
        assert plan.steps[0].size == 6
    with pytest.raises(MemoryLimitError):
        make_plan(chain, chain_shapes, [(0, 1), (0, 1)], memory_limit=100)
    with pytest.raises(LazyEinsumError, match="expected a number of elements"):
        make_plan(chain, chain_shapes, memory_limit="512MiB")


CASES: dict[str, Callable[[], tuple[EinsumSpec, list[tuple[int, ...]]]]] = {
    "chain of 150": lambda: (
        EinsumSpec(tuple(symbol(i) + symbol(i + 1) for i in range(150)), symbol(0) + symbol(150)),
        [(2 + i % 5, 2 + (i + 1) % 5) for i in range(150)],
    ),
    "ring of 60": lambda: (EinsumSpec(tuple(symbol(i) + symbol((i + 1) % 60) for i in range(60)), ""), [(3, 3)] * 60),
    "star of 40": lambda: (EinsumSpec(tuple("a" + symbol(i + 1) for i in range(40)), "a"), [(3, 2)] * 40),
    "disconnected 120": lambda: (EinsumSpec(tuple(symbol(i) for i in range(120)), symbol(7)), [(2,)] * 120),
    "scalars 300": lambda: (EinsumSpec(("",) * 299 + ("a",), "a"), [()] * 299 + [(3,)]),
    "same labels 200": lambda: (EinsumSpec(("ab",) * 200, "b"), [(3, 2)] * 200),
    "clique of 9": lambda: (
        EinsumSpec(tuple("".join(symbol(min(i, j) * 9 + max(i, j)) for j in range(9) if j != i) for i in range(9)), ""),
        [(2,) * 8] * 9,
    ),
    "random 40": lambda: random_network(40, 2, seed=1, largest=2),
    "random 100": lambda: random_network(100, 1, seed=2, largest=3),
}


@pytest.mark.parametrize("name", CASES)
def test_large_networks(name: str) -> None:
    spec, shapes = CASES[name]()
    start = time.perf_counter()
    plan = make_plan(spec, shapes)
    assert time.perf_counter() - start < 20, "the search is not bounded"
    values = [_ones(shape) for shape in shapes]
    for step in plan.steps:
        values.append(torch.einsum(str(step.spec.canonical()), *(values[number] for number in step.operands)))
    summed = [size for label, size in spec.sizes(shapes).items() if label not in spec.output]
    expected = math.prod(summed) * 0.5 ** len(shapes)
    torch.testing.assert_close(values[-1], torch.full(spec.output_shape(shapes), expected, dtype=torch.float64))
    greedy = make_plan(spec, shapes, "greedy")
    assert plan.seconds <= greedy.seconds * (1 + 1e-9)


def _ones(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, 0.5, dtype=torch.float64)


def test_planning_is_repeatable_and_leaves_random_numbers_alone() -> None:
    spec, shapes = random_network(30, 2, seed=5)
    random.seed(11)
    state = random.getstate()
    first = planning._plan(spec, tuple(shapes), "auto", None, False)
    assert planning._plan(spec, tuple(shapes), "auto", None, False) == first
    make_plan(spec, shapes, "random-greedy")
    assert random.getstate() == state


def test_plans_are_the_same_in_every_process() -> None:
    # Sets of strings are walked in an order that differs between processes.
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from test_plan import CASES, make_plan, random_network
        networks = [random_network(n, 2, seed) for n in (5, 9, 14, 25) for seed in range(3)]
        for spec, shapes in [*networks, CASES["star of 40"](), CASES["random 40"]()]:
            for optimize in ("auto", "greedy", "random-greedy", *(["dp", "branch-2"] if len(shapes) < 10 else [])):
                print(make_plan(spec, shapes, optimize).ssa_path)
        """
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0].count("\n") > 40
    assert outputs[0] == outputs[1]


def test_plans_are_kept() -> None:
    spec, shapes = random_network(9, 2, seed=6)
    assert make_plan(spec, shapes) is make_plan(spec, [list(shape) for shape in shapes])
    assert make_plan(spec, shapes) is not make_plan(spec, shapes, generic=True)


def test_dynamic_programming_is_exact_without_outer_products() -> None:
    for seed in range(12):
        spec, shapes = random_network(7, 1, seed=seed, largest=9)
        network = Network.of(spec, shapes, spec.sizes(shapes), False)
        orders = exact.Connected.of(network, math.inf, exact.Budget(10**6))
        assert orders is not None
        connected = orders.order(0.0)
        every = exact.exhaustive(network, math.inf)
        assert connected is not None
        assert every is not None
        assert network.seconds(every) <= network.seconds(connected) * (1 + 1e-9)
        if all(a & b for a, b, _ in network.results(every)):
            assert network.seconds(connected) == pytest.approx(network.seconds(every))


def test_exact_searches_are_exact_at_any_price() -> None:
    # Each order of five operands, by hand.
    for seed in range(8):
        spec, shapes = random_network(5, 2, seed=seed, largest=9)
        bare = Network.of(spec, shapes, spec.sizes(shapes), False).following([seed % 2 == 0, True, False, True, True])
        connected = exact.Connected.of(bare, math.inf, exact.Budget(10**6))
        assert connected is not None
        for price in (0.0, 1e-9, 1e-6, 1e-3, 0.0):
            network = replace(bare, price=price)
            seconds = [network.seconds(path) for path in _orders(5)]
            best = exact.exhaustive(network, math.inf)
            assert best is not None
            assert network.seconds(best) == pytest.approx(min(seconds))
            joined = [
                network.seconds(path)
                for path in _orders(5)
                if all(a & b & ~network.marks for a, b, _ in network.results(path))
            ]
            found = connected.order(price)
            assert found is not None
            if joined:
                assert network.seconds(found) == pytest.approx(min(joined))


def _orders(n: int) -> Iterator[tuple[tuple[int, int], ...]]:
    def finish(alive: tuple[int, ...], new: int) -> Iterator[tuple[tuple[int, int], ...]]:
        if len(alive) == 1:
            yield ()
        for one, two in itertools.combinations(alive, 2):
            rest = tuple(operand for operand in alive if operand not in (one, two))
            for path in finish((*rest, new), new + 1):
                yield ((one, two), *path)

    return finish(tuple(range(n)), n)


@pytest.mark.parametrize("n", [9, 12, 16, 40])
def test_the_exact_search_keeps_its_budget(n: int) -> None:
    # Every pair of operands shares a label: all 3**n / 2 pairs of sets are connected.
    terms = tuple(sum(1 << min(i, j) * n + max(i, j) for j in range(n) if j != i) for i in range(n))
    spec = EinsumSpec(tuple("".join(symbol(bit) for bit in range(n**2) if term >> bit & 1) for term in terms), "")
    network = Network.of(spec, [(2,) * (n - 1)] * n, spec.sizes([(2,) * (n - 1)] * n), False)
    budget = exact.Budget(3**9)
    found = exact.Connected.of(network, math.inf, budget)
    assert (found is not None) == (n == 9)
    assert budget.left >= -n if found is None else budget.left > 0


def test_one_network_is_searched_once_at_all_prices() -> None:
    # The order that is the fastest with gradients saves more than the limit, so that orders at several prices follow.
    row = next(item for item in load() if item.name == "clique_243")
    spec = EinsumSpec.parse(row.letters, [len(shape) for shape in row.shapes])
    n = len(row.shapes)
    planning._cached_plan.cache_clear()
    exact.connected.cache_clear()
    most = SavedLimit((True,) * n, tuple(map(math.prod, row.shapes)), tuple(range(n)), 9_408)
    plan = make_plan(spec, row.shapes, saved_limit=most, follows=(True,) * n)
    assert plan.optimizer == "search for few saved elements"
    # Forward and with gradients.
    assert exact.connected.cache_info()[:2] == (1, 2)


def test_sizes_of_sets_of_labels() -> None:
    spec, shapes = random_network(30, 3, seed=1, largest=7)
    sizes = spec.sizes(shapes)
    network = Network.of(spec, shapes, sizes, False).following([True] * 30)
    for term in (*network.terms, network.output, 0):
        labels = [label for bit, label in enumerate(network.labels) if term >> bit & 1]
        assert network.size(term) == math.prod(sizes[label] for label in labels)


def test_the_table_names_every_step() -> None:
    spec = EinsumSpec.parse("zij,zjk,zk->zi", [3, 3, 2])
    plan = make_plan(spec, [(1000, 8, 4), (1000, 4, 5), (1000, 5)])
    text = str(plan)
    assert "zjk,zk->zj" in text
    assert "zij,zj->zi" in text
    assert "1000x8" in text
    assert plan.ssa_path == ((1, 2), (0, 3))
    assert plan.path == ((1, 2), (0, 1))


def test_the_backward_pass_counts_where_autograd_follows_some() -> None:
    row = next(item for item in load() if item.name == "mttkrp")
    spec = EinsumSpec.parse(row.letters, [len(shape) for shape in row.shapes])
    forward = make_plan(spec, row.shapes)
    last = [False] * (len(row.shapes) - 1) + [True]
    found = make_plan(spec, row.shapes, follows=last)
    assert found.ssa_path != forward.ssa_path
    assert make_plan(spec, row.shapes, follows=[False] * len(row.shapes)) is forward
    assert make_plan(spec, row.shapes, follows=[True] * len(row.shapes)).ssa_path == forward.ssa_path
