"""Times against eager torch, opt_einsum_fx and opt_einsum: ``python tests/benchmark.py [--quick] [case ...]``.

All contestants of a case take turns in one process on one thread; a figure is the median of the rounds, so that a
disturbance hits all alike. Ratios are times of eager divided by times of the contestant: above 1 is faster than eager.
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import opt_einsum
import torch
from edge_counts import edge_counts
from torch import Tensor, nn

from lazy_einsum import OptimizedModule

Run = Callable[[], Any]


def _seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def medians(runs: dict[str, Run], rounds: int, round_seconds: float) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        once = _seconds(run, 1)
        repeats[name] = max(1, min(5000, round(round_seconds / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(_seconds(run, repeats[name]))
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


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


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A low-rank update beside the full weight."""
    low = torch.einsum("or,ri->oi", b, a) * 2.0
    return torch.einsum("bi,oi->bo", x, w) + torch.einsum("bi,oi->bo", x, low)


CASES = [
    _einsum_case("tutorial zij,zjk,zk->zi (1000)", "zij,zjk,zk->zi", (1000, 4, 5), (1000, 5, 8), (1000, 8)),
    _einsum_case("e3nn zui,zj,zuv,ijk->zvk", "zui,zj,zuv,ijk->zvk", (64, 32, 3), (64, 3), (64, 32, 32), (3, 3, 5)),
    _einsum_case(
        "MACE wxvik,ekc,bci,be->bcwxv", "wxvik,ekc,bci,be->bcwxv", (9, 9, 9, 9, 10), (5, 10, 32), (20, 32, 9), (20, 5)
    ),
    Case("chain of three with scalars (256)", chain, ((256, 2), (256, 256), (256, 256), (256, 256))),
    Case("matrix products by einsum (256)", matrix_chain, ((256, 256), (256, 256), (256, 256), (256, 1))),
    Case("LoRA (64, 512, rank 8)", lora, ((64, 512), (512, 512), (8, 512), (512, 8))),
    _einsum_case("attention bthd,bshd->bhts", "bthd,bshd->bhts", (4, 64, 8, 32), (4, 64, 8, 32)),
    _einsum_case("one matrix product (64)", "ij,jk->ik", (64, 64), (64, 64)),
]


def _contestants(case: Case, operands: Sequence[Tensor], with_compile: bool) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"eager": case.child, "lazy_einsum": OptimizedModule(case.child)}
    try:
        import opt_einsum_fx

        child = case.child
        if case.equation is not None:
            # A fixed number of arguments, as its tracer needs.
            names = [f"x{i}" for i in range(len(operands))]
            scope: dict[str, Any] = {"torch": torch}
            exec(
                f"def child({', '.join(names)}):\n    return torch.einsum({case.equation!r}, {', '.join(names)})", scope
            )
            child = scope["child"]
        found["opt_einsum_fx"] = opt_einsum_fx.optimize_einsums_full(child, tuple(operands))
    except ImportError:
        pass
    if case.equation is not None:
        found["contract_expression"] = opt_einsum.contract_expression(case.equation, *(x.shape for x in operands))
    if with_compile:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(case.child, dynamic=False)
    return found


def contractions(rounds: int, round_seconds: float, with_compile: bool, only: Sequence[str]) -> None:
    """Forward, and forward with backward."""
    columns = ["lazy_einsum", "opt_einsum_fx", "contract_expression", *(["torch.compile"] if with_compile else [])]
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
                runs[name] = _backward(target, leaves) if backward else _forward(target, operands)
            took = medians(runs, rounds, round_seconds)
            row = f"{case.name:36} {'fwd+bwd' if backward else 'forward':9} {took['eager'] * 1e6:9.1f} "
            for column in columns:
                row += (
                    f"{took[column] * 1e6:12.1f} ({took['eager'] / took[column]:5.2f})" if column in took else " " * 20
                )
                row += " "
            print(row.rstrip(), flush=True)


def _forward(target: Callable[..., Any], operands: Sequence[Tensor]) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return target(*operands)

    return run


def _backward(target: Callable[..., Any], leaves: Sequence[Tensor]) -> Run:
    cotangent = torch.randn_like(target(*leaves))

    def run() -> Any:
        return torch.autograd.grad(target(*leaves), leaves, cotangent)

    return run


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
    return statistics.median([_seconds(partial(target, *args), 1) for args in calls])


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
    parser.add_argument("cases", nargs="*", help="words of the names of cases; also: dispatch, miss, memory, edges")
    parser.add_argument("--quick", action="store_true", help="7 short rounds")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile with its default backend (needs a C++ compiler)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds, round_seconds = (7, 0.01) if options.quick else (15, 0.05)
    parts = ("dispatch", "miss", "memory", "edges")
    only = [word for word in options.cases if word not in parts]
    wanted = [word for word in options.cases if word in parts]
    named = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = named[0] if named else platform.machine()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"torch {torch.__version__}, {python}, {processor}, 1 thread, {rounds} rounds")
    if only or not wanted:
        contractions(rounds, round_seconds, options.compile, only)
    if "dispatch" in wanted or not options.cases:
        dispatch(rounds, round_seconds)
    if "miss" in wanted or not options.cases:
        misses(rounds)
    if "memory" in wanted or not options.cases:
        memory()
    if "edges" in wanted or not options.cases:
        edge_counts(500, options.compile)
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    main()
