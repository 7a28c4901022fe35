"""Times against torch, opt_einsum_fx, opt_einsum, cotengra: ``python tests/benchmark.py [--quick] [case ...]``.

All contestants of a case take turns in one process, on one thread unless ``--threads`` says otherwise; a figure is the
median of the rounds, so that a disturbance hits all alike. Ratios are times of eager divided by times of the
contestant: above 1 is faster than eager. (Those of networks are times of the others divided by ours.)
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import plot
import torch
from contestants import COMPILED, COMPILING_SECONDS, CONTESTANTS, prepare
from edge_counts import edge_counts
from epoch import epoch
from instances import Instance, load
from measure import Run, at_most, backward_run, forward_run, geometric_mean, medians, seconds
from model_times import e3nn_products, mace, models
from pairwise import pairwise
from plan_times import measured_plans, saved_plans
from planning import planning
from torch import Tensor, nn

from lazy_einsum import OptimizedModule

# -- contractions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A child, its arguments, and the equation for ``contract_expression`` if it is one einsum."""

    name: str
    child: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    equation: str | None = None


def _einsum_case(name: str, equation: str, *shapes: tuple[int, ...]) -> Case:
    return Case(name, lambda *operands: torch.einsum(equation, *operands), shapes, equation)


def chain(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Three chained einsums with scalars; ``x`` is thin."""
    h = 2.0 * torch.einsum("ij,jk->ik", a, b)
    h = torch.einsum("ij,jk->ik", h, c) / 3.0
    return 0.5 * torch.einsum("ij,jk->ik", h, x)


def matrix_chain(a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
    """A B C x, as written."""
    ab = torch.einsum("ij,jk->ik", a, b)
    return torch.einsum("ik,kl->il", torch.einsum("ij,jk->ik", ab, c), x)


def chained_products(a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
    """The same with products of matrices."""
    return a @ b @ c @ x


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A low-rank update beside the full weight."""
    low = torch.einsum("or,ri->oi", b, a) * 2.0
    return torch.einsum("bi,oi->bo", x, w) + torch.einsum("bi,oi->bo", x, low)


def twice(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The same product of ``a`` and ``b`` in two einsums."""
    return torch.einsum("ij,jk,kl->il", a, b, c) + torch.einsum("jk,ij,lk->il", b, a, d)


CASES = [
    _einsum_case("tutorial zij,zjk,zk->zi (1000)", "zij,zjk,zk->zi", (1000, 4, 5), (1000, 5, 8), (1000, 8)),
    _einsum_case("e3nn zui,zj,zuv,ijk->zvk", "zui,zj,zuv,ijk->zvk", (64, 32, 3), (64, 3), (64, 32, 32), (3, 3, 5)),
    _einsum_case(
        "MACE wxvik,ekc,bci,be->bcwxv", "wxvik,ekc,bci,be->bcwxv", (9, 9, 9, 9, 10), (5, 10, 32), (20, 32, 9), (20, 5)
    ),
    Case("chain of three with scalars (256)", chain, ((256, 2), (256, 256), (256, 256), (256, 256))),
    Case("matrix products by einsum (256)", matrix_chain, ((256, 256), (256, 256), (256, 256), (256, 1))),
    Case("matrix products by @ (256)", chained_products, ((256, 256), (256, 256), (256, 256), (256, 1))),
    Case("LoRA (64, 512, rank 8)", lora, ((64, 512), (512, 512), (8, 512), (512, 8))),
    Case("the same sub-contraction twice (256)", twice, ((256, 256),) * 4),
    _einsum_case("attention bthd,bshd->bhts", "bthd,bshd->bhts", (4, 64, 8, 32), (4, 64, 8, 32)),
    _einsum_case("one matrix product (64)", "ij,jk->ik", (64, 64), (64, 64)),
]


def _contestants(case: Case, operands: Sequence[Tensor], with_compile: bool) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"eager": case.child, "lazy_einsum": OptimizedModule(case.child)}
    if case.equation is not None:
        for column, name in (("opt_einsum_fx", "fx"), ("contract_expression", "expression")):
            target = prepare(name, case.equation, operands)
            if target is not None:
                found[column] = target
    else:
        try:
            import opt_einsum_fx

            found["opt_einsum_fx"] = opt_einsum_fx.optimize_einsums_full(case.child, tuple(operands))
        except ImportError:
            pass
    if with_compile:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(case.child, dynamic=False)
        found["with inductor"] = OptimizedModule(case.child, backend="inductor")
    return found


def contractions(rounds: int, round_seconds: float, with_compile: bool, only: Sequence[str]) -> None:
    """Forward, and forward with backward."""
    compilers = ["torch.compile", "with inductor"] if with_compile else []
    columns = ["lazy_einsum", "opt_einsum_fx", "contract_expression", *compilers]
    print(f"\n{'case':36} {'pass':9} {'eager us':>9} " + " ".join(f"{column:>20}" for column in columns))
    for case in CASES:
        if only and not any(word in case.name for word in only):
            continue
        generator = torch.Generator().manual_seed(0)
        operands = [torch.randn(shape, generator=generator) for shape in case.shapes]
        leaves = [x.clone().requires_grad_() for x in operands]
        for backward in (False, True):
            contestants = _contestants(case, operands, with_compile)
            expected = case.child(*operands)
            runs: dict[str, Run] = {}
            for name, target in contestants.items():
                assert torch.allclose(target(*operands), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()), name
                runs[name] = backward_run(target, leaves) if backward else forward_run(target, operands)
            took = medians(runs, rounds, round_seconds)
            row = f"{case.name:36} {'fwd+bwd' if backward else 'forward':9} {took['eager'] * 1e6:9.1f} "
            for column in columns:
                row += (
                    f"{took[column] * 1e6:12.1f} ({took['eager'] / took[column]:5.2f})" if column in took else " " * 20
                )
                row += " "
            print(row.rstrip(), flush=True)


# -- networks ---------------------------------------------------------------------------------------------------------


def networks(
    rounds: int, round_seconds: float, only: Sequence[str], backward: bool, with_compile: bool = False
) -> dict[str, dict[str, float]]:
    """Seconds for the networks of ``data/instances.json``; prints how many times as long as ours the others take, and
    the floor. ``with_compile``: ours with Inductor below, against torch.compile.
    """
    contestants = COMPILED if with_compile else CONTESTANTS
    peers = [name for name in contestants if name != "ours"]
    table: dict[str, dict[str, float]] = {}
    title = "forward+backward" if backward else "forward"
    print(f"\nnetworks, {title}: ours in us, times of others over ours (their best last), ours over the floor")
    print(f"{'case':36} {'ours':>9} " + " ".join(f"{name:>10}" for name in [*peers, "best"]) + f" {'floor':>7}")
    for instance in load():
        # Each of its calls takes seconds.
        if instance.name == "omeb_qc_qft_27" and instance.name not in only:
            continue
        if only and not any(word in instance.name for word in only):
            continue
        took = _network(instance, rounds, round_seconds, backward, contestants)
        if "ours" not in took:
            continue
        table[instance.name] = took
        row = [f"{instance.name:36} {took['ours'] * 1e6:9.1f}"]
        row += [f"{took[name] / took['ours']:10.2f}" if name in took else " " * 10 for name in peers]
        row.append(f"{_best(took) / took['ours']:10.2f} {took['ours'] / instance.floor:7.2f}")
        print(" ".join(row), flush=True)
    for name in [*peers, "best"]:
        ratios = {
            case: (_best(took) if name == "best" else took[name]) / took["ours"]
            for case, took in table.items()
            if name in took or (name == "best" and len(took) > 1)
        }
        if ratios:
            low = sorted(ratios, key=ratios.__getitem__)[:4]
            worst = ", ".join(f"{case} {ratios[case]:.2f}" for case in low)
            print(f"{title} {name:10} geometric mean {geometric_mean(ratios.values()):5.2f}x of {len(ratios)}; {worst}")
    floors = {item.name: item.floor for item in load()}
    far = [took["ours"] / floors[case] for case, took in table.items() if floors[case] > 1e-4]
    best = [_best(took) / floors[case] for case, took in table.items() if floors[case] > 1e-4 and len(took) > 1]
    if far and not backward:
        print(f"floor over 100 us: ours {geometric_mean(far):.2f}, the best of the others {geometric_mean(best):.2f}")
    return table


def _best(took: dict[str, float]) -> float:
    return min((value for name, value in took.items() if name != "ours"), default=float("nan"))


def _network(
    instance: Instance, rounds: int, round_seconds: float, backward: bool, contestants: Mapping[str, Any]
) -> dict[str, float]:
    operands = instance.operands()
    leaves = [x.clone().requires_grad_() for x in operands]
    runs: dict[str, Run] = {}
    expected = None
    for name in contestants:
        target = prepare(name, instance.letters, operands, contestants)
        if target is None:
            continue
        try:
            # The first calls compile, the backward pass too.
            with at_most(COMPILING_SECONDS if contestants is COMPILED else 10_000):
                run = backward_run(target, leaves) if backward else forward_run(target, operands)
                run()
                with torch.set_grad_enabled(backward):
                    result = target(*(leaves if backward else operands)).detach()
        except Exception as error:  # compilers wrap what is raised while they work
            if "TimeoutError" not in f"{type(error).__name__} {error}":
                raise
            print(f"{instance.name}: {name} took over {COMPILING_SECONDS} s to compile")
            continue
        expected = result if expected is None else expected
        error = (result - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        if not error < 1e-3:
            print(f"{instance.name}: {name} differs by {float(error):.1e}")
        runs[name] = run
    return medians(runs, rounds, round_seconds)


# -- dispatch ---------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """100 submodules with two parameters each, of which ``forward`` reads all or the first few."""

    def __init__(self, read: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LayerNorm(4) for _ in range(100)])
        self.read = read

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        out = x + 1
        if self.read == 100:
            for layer in self.layers:
                out = out + layer.weight + layer.bias
        else:
            for i in range(self.read):
                out = out + self.layers[i].weight
        return out


def add_one(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The cheapest child."""
    return x + 1


def dispatch(rounds: int, round_seconds: float) -> None:
    """Warm call minus the child itself."""
    args = (torch.rand(4, 4), torch.rand(4, 4), torch.rand(4, 4))

    class AddOne(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x + 1

    print("\ndispatch: warm call, us (and what it adds to its own code)")
    child = AddOne()
    wrapped, function = OptimizedModule(child), OptimizedModule(add_one)
    torch.compiler.reset()
    compiled = torch.compile(AddOne(), backend="eager", dynamic=False)
    runs: dict[str, Run] = {
        "child": lambda: child(*args),
        "wrapped": lambda: wrapped(*args),
        "function": lambda: add_one(*args),
        "wrapped function": lambda: function(*args),
        "torch.compile eager": lambda: compiled(*args),
    }
    with torch.no_grad():
        took = medians(runs, rounds, round_seconds)
    for name, base in (("wrapped", "child"), ("wrapped function", "function"), ("torch.compile eager", "child")):
        added = (took[name] - took[base]) * 1e6
        print(f"  {name:34} {took[name] * 1e6:8.2f}  adds {added:6.2f} to the child's {took[base] * 1e6:.2f}")
    for read in (100, 3):
        took = _deep(read, args, rounds, round_seconds)
        text = f"100 submodules, {'all' if read == 100 else read} read"
        added = (took["call"] - took["code"]) * 1e6
        print(f"  {text:34} {took['call'] * 1e6:8.2f}  adds {added:6.2f} to its code's {took['code'] * 1e6:.2f}")


def _deep(read: int, args: tuple[Tensor, ...], rounds: int, round_seconds: float) -> dict[str, float]:
    deep = Deep(read)
    wrapped = OptimizedModule(deep)
    with torch.no_grad():
        wrapped(*args)
        (entry,) = wrapped.specializations.values()
        values = entry.guard(deep, args, {})
        return medians({"call": lambda: wrapped(*args), "code": lambda: entry.run(*values)}, rounds, round_seconds)


def misses(rounds: int) -> None:
    """A new shape on the tutorial's einsum, once everything is warm."""

    def child(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("zij,zjk,zk->zi", a, b, v)

    def operands(n: int) -> tuple[Tensor, ...]:
        return torch.rand(n, 8, 4), torch.rand(n, 4, 5), torch.rand(n, 5)

    wrapped = OptimizedModule(child, maxsize=1000, dynamic=False)  # else code for all sizes ends the misses
    for n in range(1, 10):
        wrapped(*operands(n))
    ours = _misses(wrapped, [operands(20 + n) for n in range(max(rounds, 15))])
    torch.compiler.reset()
    # Its caches on disk would answer for what an earlier run has compiled.
    torch._inductor.config.force_disable_caches = True
    compiled = torch.compile(child, dynamic=False)
    compiled(*operands(2))
    theirs = _misses(compiled, [operands(20 + n) for n in range(3)])
    print(f"\nmiss on the tutorial's einsum: {ours * 1e3:.1f} ms")
    print(f"torch.compile (inductor) for a new shape: {theirs * 1e3:.0f} ms, {theirs / ours:.0f} times as long")


def _misses(target: Callable[..., Any], calls: list[tuple[Tensor, ...]]) -> float:
    return statistics.median([seconds(partial(target, *args), 1) for args in calls])


MEMORY_PROGRAM = """
import resource, torch
from lazy_einsum import OptimizedModule

m = OptimizedModule(lambda x, y, v: torch.einsum("ij,jk->ik", torch.einsum("ir,rj->ij", x, y), v))
x, y, v = torch.rand(160_000, 1), torch.rand(1, 160_000), torch.rand(160_000, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = m(x, y, v)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert torch.allclose(out, x * (y @ v), rtol=1e-3)
"""


def memory() -> None:
    """An einsum chain whose naive order holds 160,000 by 160,000 floats (102 GB)."""
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    before, after = (int(word) / 1024 for word in done.stdout.split())
    print(
        f"\nfirst call of a chain whose naive order needs 102 GB: peak {after:.0f} MiB, of which {before:.0f} before it"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("networks", "pairwise", "planning", "plans", "dispatch", "miss", "memory", "edges", "epoch", "models")
    parts += ("batches",)
    parser.add_argument("cases", nargs="*", help=f"words of the names of cases; also: {', '.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="7 short rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--forward", action="store_true", help="of networks and pairwise only the forward pass")
    parser.add_argument("--backward", action="store_true", help="of networks and pairwise only forward with backward")
    parser.add_argument("--stride", type=int, default=4, help="of pairwise each so-manieth contraction (4; 1: all)")
    parser.add_argument(
        "--save",
        help="write the seconds of models, of an epoch, or of networks (with --forward or --backward), to this file",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, and backend='inductor' (needs a C++ compiler)"
    )
    parser.add_argument("--plot", help="draw an epoch, or networks (with --forward or --backward), to this file")
    options = parser.parse_args()
    if options.plot:
        plot.pyplot()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rounds, round_seconds = (7, 0.01) if options.quick else (15, 0.05)
    only = [word for word in options.cases if word not in parts]
    wanted = [word for word in options.cases if word in parts]
    named = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = named[0] if named else platform.machine()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    machine = f"torch {torch.__version__}, {processor}, {_threads(options.threads)}"
    print(f"{machine}, {python}, {rounds} rounds")
    if "networks" in wanted or not options.cases:
        for backward in (False, True):
            if not (options.forward if backward else options.backward):
                table = networks(rounds, round_seconds, only, backward, options.compile)
                if options.save:
                    with open(options.save, "w") as file:
                        json.dump(table, file, indent=1)
                if options.plot:
                    title = "forward and backward" if backward else "forward"
                    plot.draw(table, options.plot, f"Networks from many fields, {title}, {machine}")
    elif only and "models" not in wanted:
        contractions(rounds, round_seconds, options.compile, only)
    if not options.cases:
        contractions(rounds, round_seconds, options.compile, only)
    if "pairwise" in wanted or not options.cases:
        for backward in (False, True):
            if not (options.forward if backward else options.backward):
                pairwise(backward, options.stride)
    if "planning" in wanted or not options.cases:
        planning()
    if "plans" in wanted or not options.cases:
        saved_plans()
        measured_plans(rounds, round_seconds)
    if "dispatch" in wanted or not options.cases:
        dispatch(rounds, round_seconds)
    if "miss" in wanted or not options.cases:
        misses(rounds)
    if "memory" in wanted or not options.cases:
        memory()
    if "edges" in wanted or not options.cases:
        edge_counts(500, options.compile)
    if "epoch" in wanted:  # minutes, for those that compile
        times = epoch(options.threads, options.save)
        if options.plot:
            plot.draw_epoch(times, options.plot, f"Training on batches of different sizes from a cold start, {machine}")
    if "models" in wanted or not options.cases:
        models(rounds, round_seconds, only, options.save)
    if "batches" in wanted or not options.cases:
        mace(rounds, round_seconds)
        e3nn_products(rounds, round_seconds)
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    main()
