"""What autograd really saves for the backward pass: at most 1.1 times what it saves of the module as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from equations import Row, equations, make_operands
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from instances import load
from torch import Tensor, einsum

import lazy_einsum
from lazy_einsum import OptimizedModule, orders
from lazy_einsum.saved import Written, WrittenNetwork, eager_saved
from lazy_einsum.signature import TensorType
from lazy_einsum.spec import EinsumSpec

#: Bytes: a factor may be saved as a tensor, and sizes as small as this do not matter.
SLACK = 256

INSTANCES = {item.name: item for item in load()}


def saved_bytes(result: Tensor) -> int:
    """Bytes of all memory that the graph behind ``result`` holds for the backward pass, inputs too, each once."""
    storages: dict[int, Any] = {}
    seen, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage._cdata] = storage
        stack += [other for other, _ in node.next_functions]
    return sum(storage.nbytes() for storage in storages.values())


def follow(operands: Sequence[Tensor], who: str) -> list[Tensor]:
    """Leaves, of which autograd follows all, the first or the last."""
    chosen = {"all": range(len(operands)), "first": [0], "last": [len(operands) - 1]}[who]
    return [x.detach().requires_grad_(number in chosen) for number, x in enumerate(operands)]


def check(child: Callable[..., Tensor], leaves: Sequence[Tensor], *others: Callable[..., Tensor]) -> None:
    """The wrapped child, and others that do the same, save little and give the same gradients."""
    expected = child(*leaves)
    allowed = 1.1 * saved_bytes(expected) + SLACK
    needed = [x for x in dict.fromkeys(leaves) if x.requires_grad]
    wanted = torch.autograd.grad(expected.sum(), needed)
    for ours in (OptimizedModule(child, on_untraceable="raise"), *others):
        result = ours(*leaves)
        assert saved_bytes(result) <= allowed
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(torch.autograd.grad(result.sum(), needed), wanted)


def chain(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h = 2.0 * einsum("ij,jk->ik", a, b)
    h = einsum("ij,jk->ik", h, c) / 3.0
    return 0.5 * einsum("ij,jk->ik", h, x)


def chain_from_the_left(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h = einsum("ij,jk->ik", x, a) * 0.5
    h = einsum("ij,jk->ik", h, b) / 7
    return einsum("ij,jk->ik", -h, c)


def gradient(x: Tensor, d: Tensor, u: Tensor) -> Tensor:
    """As "xre,rij,ej->xei" is contracted with few saved elements."""
    return einsum("xre,rei->xei", x, einsum("rij,ej->rei", d, u))


def outer(x: Tensor, d: Tensor, u: Tensor) -> Tensor:
    """The same with many."""
    return einsum("xeij,ej->xei", einsum("xre,rij->xeij", x, d), u)


def twice(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return einsum("ab,ac,cd,ad->bd", x, y, z, y @ z)


def alike(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """A product in three einsums, of operands that are wide and thin."""
    one = einsum("ij,jk,kl->il", a, b, c).sin() + einsum("jk,ij,lk->il", b, a, d)
    return one + einsum("ij,jk,kl,lm->im", a, b, c, d)


#: name -> child, shapes of its operands.
CHILDREN: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]]]] = {
    "tutorial": (lambda a, b, c: einsum("zij,zjk,zk->zi", a, b, c), [(100, 4, 5), (100, 5, 8), (100, 8)]),
    "MACE": (
        lambda *xs: einsum("wxvik,ekc,bci,be->bcwxv", *xs),
        [(5, 5, 5, 5, 7), (5, 7, 16), (20, 16, 5), (20, 5)],
    ),
    "MTTKRP": (lambda *xs: einsum("ijk,jr,kr->ir", *xs), [(40, 30, 20), (30, 8), (20, 8)]),
    "Tucker": (lambda *xs: einsum("abc,ia,jb,kc->ijk", *xs), [(4, 5, 6), (20, 4), (20, 5), (20, 6)]),
    "chain": (chain, [(64, 2), (64, 64), (64, 64), (64, 64)]),
    "chain from the left": (chain_from_the_left, [(2, 64), (64, 64), (64, 64), (64, 64)]),
    "gradient": (gradient, [(3, 3, 400), (3, 35, 35), (400, 35)]),
    "outer product first": (outer, [(3, 3, 40), (3, 15, 15), (40, 15)]),
    "a value used twice": (twice, [(30, 20), (30, 10), (10, 40)]),
    "the same product in several": (alike, [(80, 80), (80, 80), (80, 80), (80, 80)]),
    "the same product, the rest thin": (alike, [(600, 60), (60, 70), (70, 70), (70, 70)]),
    "one tensor twice": (lambda x, y: einsum("ab,bc,ac,cd->ad", x, y, x, y.mT), [(30, 20), (20, 20)]),
    "a diagonal": (lambda x, y, z: einsum("a,aba,b->b", x, y, z), [(20,), (20, 5, 20), (5,)]),
}


@pytest.mark.parametrize("who", ["all", "first", "last"])
@pytest.mark.parametrize("name", CHILDREN)
def test_children(name: str, who: str) -> None:
    child, shapes = CHILDREN[name]
    check(child, follow(make_operands(tuple(shapes), torch.float64), who))


@pytest.mark.parametrize("who", ["all", "first", "last"])
@pytest.mark.parametrize(
    "name",
    ["dg_grad", "ir_tw", "clique_9769", "ir_trn_layer", "mace_symcontract_main", "trilinear_form", "mps_batched_132"],
)
def test_instances(name: str, who: str) -> None:
    item = INSTANCES[name]
    check(
        lambda *operands: einsum(item.letters, *operands),
        follow(item.operands(torch.float64), who),
        lambda *operands: lazy_einsum.einsum(item.letters, *operands),
    )


@pytest.fixture
def by_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are chosen by sizes alone; by their calls those of ``dg_grad`` that save little are the best anyway."""
    monkeypatch.setattr(orders, "_LEAST", math.inf)


@pytest.mark.parametrize("name", ["dg_grad", "ir_tw"])
def test_without_the_limit_more_is_saved(by_sizes: None, name: str) -> None:
    item = INSTANCES[name]
    leaves = follow(item.operands(), "all")

    def child(*operands: Tensor) -> Tensor:
        return einsum(item.letters, *operands)

    eager = saved_bytes(child(*leaves))
    free = saved_bytes(OptimizedModule(child, saved_limit=None)(*leaves))
    assert free > 1.2 * eager
    assert saved_bytes(OptimizedModule(child, saved_limit=free / eager + 0.01)(*leaves)) == free
    assert saved_bytes(OptimizedModule(child, saved_limit=1)(*leaves)) <= eager


def test_the_limit_is_that_of_the_einsums_as_they_were_written(by_sizes: None) -> None:
    leaves = follow(make_operands(((3, 3, 400), (3, 35, 35), (400, 35)), torch.float32), "all")
    few, many = saved_bytes(gradient(*leaves)), saved_bytes(outer(*leaves))
    assert many > 2 * few
    assert few <= saved_bytes(OptimizedModule(gradient)(*leaves)) <= 1.1 * few
    module, free = OptimizedModule(outer), OptimizedModule(outer, saved_limit=None)
    assert saved_bytes(module(*leaves)) == saved_bytes(free(*leaves)) > 1.1 * few
    assert module.code == free.code


def test_where_nothing_is_saved_nothing_is_limited(by_sizes: None) -> None:
    item = INSTANCES["dg_grad"]
    operands = item.operands()
    module, free = (OptimizedModule(lambda *xs: einsum(item.letters, *xs), saved_limit=limit) for limit in (1.1, None))
    for who in ("first", "all"):
        with torch.no_grad():
            module(*follow(operands, who)), free(*follow(operands, who))
        assert module.code == free.code
    module(*operands), free(*operands)
    assert module.code == free.code
    module(*follow(operands, "all")), free(*follow(operands, "all"))
    assert module.code != free.code


def test_an_order_that_was_asked_for_is_taken() -> None:
    leaves = follow(INSTANCES["dg_grad"].operands(), "all")
    module = OptimizedModule(lambda *xs: einsum("xre,rij,ej->xei", *xs), optimize=[(0, 1), (0, 1)])
    assert module.prepare(*leaves).plans[0].path == ((0, 1), (0, 1))


def test_sizes_that_vary() -> None:
    def child(x: Tensor, d: Tensor, u: Tensor) -> Tensor:
        return einsum("xre,rij,ej->xei", x, d, u)

    module = OptimizedModule(child, dynamic=True)
    for size in (400, 401, 402, 450, 700, 2000, 5, 40, 9000):
        leaves = follow(make_operands(((3, 3, size), (3, 35, 35), (size, 35)), torch.float32), "all")
        assert saved_bytes(module(*leaves)) <= 1.1 * saved_bytes(child(*leaves)) + SLACK, size
    assert any(entry.is_generic and entry.hits for entry in module.specializations.values())


@pytest.mark.parametrize("wrong", [0.5, 0, -1, True, "1.1", math.nan])
def test_bad_limits(wrong: Any) -> None:
    with pytest.raises(ValueError, match="saved_limit must be a number of at least 1"):
        OptimizedModule(torch.nn.Identity(), saved_limit=wrong)


def test_copies_keep_the_limit(by_sizes: None) -> None:
    item = INSTANCES["dg_grad"]
    leaves = follow(item.operands(), "all")
    module = OptimizedModule(torch.nn.Identity(), saved_limit=None)
    assert copy.deepcopy(module)._settings["saved_limit"] is None
    assert saved_bytes(OptimizedModule(lambda *xs: einsum(item.letters, *xs), saved_limit=3)(*leaves)) > 5e6


def test_hooks_on_saved_tensors_see_no_tensor_of_the_planner() -> None:
    item = INSTANCES["dg_grad"]
    leaves = follow(item.operands(), "all")
    seen: list[str] = []

    def pack(value: Tensor) -> Tensor:
        seen.append(value.device.type)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        OptimizedModule(lambda *xs: einsum(item.letters, *xs))(*leaves)
    assert set(seen) == {"cpu"}


@st.composite
def networks(draw: st.DrawFn) -> tuple[Row, list[bool]]:
    """Equations of three to five operands that are worth ordering, and which of them autograd follows."""
    labels = "abcdefg"[: draw(st.integers(2, 7))]
    sizes = {label: draw(st.sampled_from([1, 2, 3, 5, 8, 13, 20])) for label in labels}
    terms = draw(st.lists(st.text(labels, max_size=3), min_size=3, max_size=5))
    used = sorted(set("".join(terms)))
    output = "".join(draw(st.permutations(used)))[: draw(st.integers(0, 3))]
    follows = draw(st.lists(st.booleans(), min_size=len(terms), max_size=len(terms)))
    assume(any(follows))
    return Row(f"{','.join(terms)}->{output}", tuple(tuple(sizes[label] for label in term) for term in terms)), follows


@given(networks())
@settings(deadline=None)
def test_random_networks(drawn: tuple[Row, list[bool]]) -> None:
    row, follows = drawn
    operands = make_operands(row.shapes, torch.float64)
    leaves = [x.requires_grad_(follow) for x, follow in zip(operands, follows, strict=True)]
    check(
        lambda *operands: einsum(row.equation, *operands),
        leaves,
        lambda *operands: lazy_einsum.einsum(row.equation, *operands),
    )


@given(equations(max_operands=5), st.booleans(), st.integers(1, 31))
@example(Row("cdb,bcdd,d->", ((2, 1, 2), (2, 2, 2, 2), (2,))), False, 1)
@settings(deadline=None)
def test_what_eager_saves_is_known(row: Row, strided: bool, follows: int) -> None:
    """The count is exact, also for diagonals, broadcasting and operands without elements."""
    operands = make_operands(row.shapes, torch.float64, strided=strided)
    leaves = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_().requires_grad_(bool(follows >> number & 1))
        if 0 not in x.stride()
        else x.clone().requires_grad_(bool(follows >> number & 1))
        for number, x in enumerate(operands)
    ]
    assume(any(x.requires_grad for x in leaves))
    spec = EinsumSpec.parse(row.equation, [x.dim() for x in leaves])
    types = tuple(TensorType.of(x) for x in leaves)
    tape = eager_saved(WrittenNetwork(Written.plain(spec), spec, types, tuple(range(len(types)))))
    assert tape is not None
    assert 8 * tape.saved == saved_bytes(einsum(row.equation, *leaves))
    assert len(tape.pairs) == len(leaves) - 1
