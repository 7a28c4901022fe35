"""Times of models of other packages beside eager, and of plans that are made once beside plans for each shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from contestants import named
from measure import Run, geometric_mean, medians
from models import MODELS, Model, flops
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lazy_einsum import OptimizedModule, optimize_einsums_full

Target = Callable[..., Any]
BATCHES = (10, 64, 1000, 5000)
PLANNED = BATCHES[0]


def models(rounds: int, round_seconds: float, words: list[str], save: str | None) -> None:
    """Forward (evaluation, no gradients) and whole training steps of the models of ``models.py`` at their size for
    timing, in float32: how many times as fast as eager.

    Args:
        words: only models whose names hold one of these; all where there is none.
        save: a file for the seconds, or ``None``.
    """
    print(f"\n{'model':36} {'size':40} {'forward ms':>16} {'step ms':>16} {'FLOPs inside':>12} {'builds':>13}")
    table: dict[str, dict[str, float]] = {}
    for model in MODELS:
        if words and not any(word in model.name for word in words):
            continue
        try:
            row = table[model.name] = _model(model, rounds, round_seconds)
        except ImportError as error:
            print(f"{model.name:36} not installed: {error.name}")
            continue
        text = f"{model.name:36} {model.timed.text:40} "
        for name in ("forward", "step"):
            text += f"{row[f'{name} eager'] * 1e3:8.2f} ({row[name]:5.2f}) "
        text += f"{row['inside'] / max(1, row['flops']):12.0%} {row['builds']:4.0f} in {row['build seconds']:4.1f} s"
        print(text, flush=True)
    for name in ("forward", "step"):
        ratios = {case: row[name] for case, row in table.items()}
        low = sorted(ratios, key=ratios.__getitem__)[:4]
        worst = ", ".join(f"{case} {ratios[case]:.2f}" for case in low)
        print(f"{name:8} geometric mean {geometric_mean(ratios.values()):.2f} of {len(ratios)}; least: {worst}")
    inside, total = (sum(row[name] for row in table.values()) for name in ("inside", "flops"))
    print(f"FLOPs of matrix products inside specializations: {inside / max(1, total):.1%} of {total / 1e9:.2f} GFLOP")
    if save:
        with open(save, "w") as file:
            json.dump(table, file, indent=1)


def _model(model: Model, rounds: int, round_seconds: float) -> dict[str, float]:
    """The figures of one row: seconds, ratios, FLOPs and builds."""
    torch.manual_seed(0)
    # One module for both: where parameters lie in memory makes a difference of some percent.
    module = model.build(**model.timed.keywords)
    arguments = model.timed.arguments(model.timed.size)
    wrapped = OptimizedModule(module, on_untraceable="ignore")
    row: dict[str, float] = {}
    for name, train, make in (("forward", False, _forward), ("step", True, _step)):
        module.train(train)
        runs = {"eager": make(module, arguments), "ours": make(wrapped, arguments)}
        for _ in range(3):  # some set up things of their own at their first calls: one more specialization
            runs["ours"]()
        took = medians(runs, rounds, round_seconds)
        row |= {f"{name} {who}": seconds for who, seconds in took.items()}
        row[name] = took["eager"] / took["ours"]
    info = wrapped.cache_info()
    row |= {"builds": info.misses, "build seconds": info.build_seconds, "fallbacks": info.fallbacks}
    row["inside"], row["flops"] = flops(module, wrapped, arguments)
    return row


def _forward(target: Target, arguments: Sequence[Any]) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return target(*arguments)

    return run


def loss_of(result: Any) -> Tensor:
    """A number that depends on all that a model returns."""
    values = [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.stack([value.square().mean() for value in values]).sum()


def _step(target: nn.Module, arguments: tuple[Any, ...]) -> Run:
    optimizer = torch.optim.SGD([x for x in target.parameters() if x.requires_grad], 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        loss_of(target(*arguments)).backward()
        optimizer.step()

    return run


# -- one plan for all shapes, or one for each -------------------------------------------------------------------------

MACE = "wxvik,ekc,bci,be->bcwxv"
"""The main contraction of MACE's symmetric contraction, b atoms, e elements, c channels."""

_MACE_SIZES = {
    "l up to 2, 32 channels": {"w": 9, "x": 9, "v": 9, "i": 9, "k": 10, "e": 5, "c": 32},
    "l up to 3, 96 channels": {"w": 16, "x": 16, "v": 1, "i": 16, "k": 23, "e": 10, "c": 96},
}


def mace(rounds: int, round_seconds: float) -> None:
    """MACE's contraction: ``OptimizedModule`` beside a plan that is made once, at the batch that MACE makes it at."""
    print(f"\n{MACE}: plan made at b = {PLANNED} (ms), OptimizedModule (ms), and how many times as fast it is")
    for text, sizes in _MACE_SIZES.items():
        operands = partial(_operands, MACE, sizes)
        child = named(MACE, 4)
        frozen = optimize_einsums_full(child, tuple(operands(PLANNED)))
        _beside({"frozen": frozen, "ours": OptimizedModule(child)}, text, operands, rounds, round_seconds)


def _operands(equation: str, sizes: dict[str, int], b: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = sizes | {"b": b}
    terms = equation.split("->")[0].split(",")
    return [torch.randn([sizes[label] for label in term], generator=generator) for term in terms]


def e3nn_products(rounds: int, round_seconds: float) -> None:
    """e3nn's tensor product: its own code with plans made once by our functions in the place of opt_einsum_fx's, beside
    ``OptimizedModule`` around the code without plans.
    """
    import e3nn.o3
    import e3nn.o3._tensor_product._codegen as codegen

    print("\ne3nn FullyConnectedTensorProduct: one-shot plans (ms), OptimizedModule (ms), how many times as fast it is")
    irreps = "32x0e+16x1o+8x2e"
    theirs = codegen.optimize_einsums_full
    codegen.optimize_einsums_full = optimize_einsums_full
    products = []
    try:
        for optimized in (True, False):
            torch.manual_seed(0)
            e3nn.set_optimization_defaults(optimize_einsums=optimized, jit_mode="eager")
            products.append(e3nn.o3.FullyConnectedTensorProduct(irreps, "0e+1o+2e", irreps))
    finally:
        codegen.optimize_einsums_full = theirs
        e3nn.set_optimization_defaults(optimize_einsums=True, jit_mode="script")

    def operands(b: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(b, product.dim, generator=generator) for product in (products[0].irreps_in1, harmonics)]

    harmonics = products[0].irreps_in2
    one_shot, unoptimized = products
    _beside({"frozen": one_shot, "ours": OptimizedModule(unoptimized)}, irreps, operands, rounds, round_seconds)


def _beside(
    targets: dict[str, Target], text: str, operands: Callable[[int], list[Tensor]], rounds: int, round_seconds: float
) -> None:
    """Print the times of two at all batches, forward, and forward with backward to operands and parameters."""
    for backward in (False, True):
        for b in BATCHES:
            inputs = operands(b)
            with torch.no_grad():
                expected, found = (target(*inputs) for target in targets.values())
                assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
                del expected, found
            make = _gradients if backward else _forward
            runs = {name: make(target, inputs) for name, target in targets.items()}
            took = medians(runs, rounds, round_seconds)
            ratio = took["frozen"] / took["ours"]
            row = f"{text:24} {'and backward' if backward else 'forward':13} b = {b:5}"
            print(f"{row} {took['frozen'] * 1e3:10.3f} {took['ours'] * 1e3:10.3f} {ratio:6.2f}", flush=True)


def _gradients(target: Target, operands: list[Tensor]) -> Run:
    parameters = list(target.parameters()) if isinstance(target, nn.Module) else []
    leaves = [x.clone().requires_grad_() for x in operands]
    with torch.no_grad():
        cotangent = torch.randn_like(target(*operands))

    def run() -> Any:
        return torch.autograd.grad(target(*leaves), [*leaves, *parameters], cotangent)

    return run
