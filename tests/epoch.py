"""An epoch of batches of different sizes, in a process that has compiled nothing: when is it at its end?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 50

Times = Mapping[str, Sequence[float]]
"""Seconds since the start at the end of each step, by contestant."""


class TensorProduct(nn.Module):
    """Features times a filter, with weights of their own for each edge, as equivariant networks have it; a readout."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("coupling", torch.randn(5, 3, 5, generator=generator))
        self.radial = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, channels * channels))
        self.mix = nn.Parameter(torch.randn(channels, channels, generator=generator) / channels**0.5)
        self.channels = channels

    def forward(self, x: Tensor, y: Tensor, basis: Tensor) -> Tensor:
        """``x`` (edges, channels, 5), ``y`` (edges, 3), ``basis`` (edges, 8) -> (edges, channels)."""
        weight = self.radial(basis).reshape(-1, self.channels, self.channels)
        message = torch.einsum("zui,zj,zuv,ijk->zvk", x, y, weight, self.coupling)
        return torch.einsum("zvk,vw,wq->zqk", message, self.mix, self.mix).square().mean(-1)


def _ours(model: nn.Module) -> Callable[..., Any]:
    from lazy_einsum import OptimizedModule

    return OptimizedModule(model)


def _ours_inductor(model: nn.Module) -> Callable[..., Any]:
    from lazy_einsum import OptimizedModule

    return OptimizedModule(model, backend="inductor", compile_after=3)


def _fx(model: nn.Module) -> Callable[..., Any]:
    import opt_einsum_fx

    return opt_einsum_fx.optimize_einsums_full(model, _batch(300, torch.Generator().manual_seed(2)))


CONTESTANTS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda model: model,
    "lazy_einsum": _ours,
    'lazy_einsum, backend="inductor", compile_after=3': _ours_inductor,
    "opt_einsum_fx": _fx,
    "torch.compile": torch.compile,
    "torch.compile, dynamic=True": lambda model: torch.compile(model, dynamic=True),
    'torch.compile, backend="lazy_einsum"': lambda model: torch.compile(model, backend="lazy_einsum"),
}


def _batch(edges: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(edges, *rest, generator=generator) for rest in ((24, 5), (3,), (8,)))


def _process(name: str, threads: int) -> None:
    """Trains with one contestant; prints seconds at the end of each step, the losses, and how often Dynamo compiled."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    sizes = (torch.randperm(1000, generator=generator)[:STEPS] + 100).tolist()
    batches = [_batch(size, generator) for size in sizes]
    torch.manual_seed(0)
    model = TensorProduct()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    times, losses = [], []
    start = time.perf_counter()
    call = CONTESTANTS[name](model)
    for batch in batches:
        optimizer.zero_grad()
        loss = call(*batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    compiled = 0
    if name.startswith("torch.compile"):
        from torch._dynamo.utils import counters

        compiled = counters["stats"]["unique_graphs"]
    print(json.dumps([times, losses, compiled]))


def epoch(threads: int, save: str | None = None) -> Times:
    """Each contestant's epoch, in a process of its own without caches on disk.

    Args:
        threads: of torch.
        save: a file for the seconds, or ``None``.
    """
    print(
        f"\nan epoch of {STEPS} training steps with {STEPS} batch sizes (100 to 1,100 edges), seconds from a cold start"
    )
    print(f"{'':50} {'1 step':>7} {'10':>7} {'25':>7} {'50':>7} {'last steps, ms':>15} {'compiled':>9}")
    found: dict[str, list[float]] = {}
    expected: list[float] | None = None
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, name, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            print(f"{name:50} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        times, losses, compiled = json.loads(done.stdout.splitlines()[-1])
        expected = expected or losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-5)
        found[name] = times
        late = (times[-1] - times[STEPS // 2 - 1]) / (STEPS - STEPS // 2)
        shown = " ".join(f"{times[number - 1]:7.2f}" for number in (1, 10, 25, STEPS))
        print(f"{name:50} {shown} {late * 1e3:15.1f} {compiled or '':>9}", flush=True)
    if save:
        Path(save).write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    _process(sys.argv[1], int(sys.argv[2]))
