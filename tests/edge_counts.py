"""A training loop whose sizes never repeat: messages along the edges of graphs, as equivariant networks send them."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lazy_einsum import OptimizedModule


class Messages(nn.Module):
    """A convolution over edges: a tensor product of the sender's features with a filter, weighted by a small network of
    the edge's length, summed at the receiver, and mixed over channels.
    """

    PATHS = ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2))

    def __init__(self, channels: int, nodes: int) -> None:
        super().__init__()
        self.channels, self.nodes = channels, nodes
        generator = torch.Generator().manual_seed(0)
        for a, b, c in self.PATHS:
            shape = (2 * a + 1, 2 * b + 1, 2 * c + 1)
            self.register_buffer(f"coupling{a}{b}{c}", torch.randn(shape, generator=generator))
        self.radial = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, len(self.PATHS) * channels))
        self.mix = nn.ParameterList(
            [nn.Parameter(torch.randn(channels, channels, generator=generator)) for _ in range(3)]
        )

    def forward(self, x0: Tensor, x1: Tensor, basis: Tensor, y1: Tensor, send: Tensor, receive: Tensor) -> Tensor:
        """``x0`` (nodes, channels, 1), ``x1`` (nodes, channels, 3), ``basis`` (edges, 8), ``y1`` (edges, 3), indices
        (edges,) -> (nodes, channels, 9).
        """
        weight = self.radial(basis).reshape(basis.shape[0], len(self.PATHS), self.channels)
        features = x0[send], x1[send]
        filters = torch.ones_like(y1[:, :1]), y1
        sums: list[Any] = [0.0, 0.0, 0.0]
        for number, (a, b, c) in enumerate(self.PATHS):
            coupling = getattr(self, f"coupling{a}{b}{c}")
            message = torch.einsum("eui,ej,ijk,eu->euk", features[a], filters[b], coupling, weight[:, number])
            sums[c] = sums[c] + message / (2 * c + 1) ** 0.5
        out = []
        for mix, message in zip(self.mix, sums, strict=True):
            received = torch.zeros(self.nodes, self.channels, message.shape[-1])
            received = received.index_add(0, receive, message)
            out.append(torch.einsum("nui,uv->nvi", received, mix) / self.channels**0.5)
        return torch.cat(out, -1)


def _own_class() -> type[Messages]:
    """A copy of the class with code of its own: torch.compile counts its attempts for each code object."""
    forward = Messages.forward
    copied = types.FunctionType(forward.__code__.replace(), forward.__globals__)
    return type("Messages", (Messages,), {"forward": copied})


def _batch(nodes: int, channels: int, edges: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ends = [torch.randint(nodes, (edges,), generator=generator) for _ in range(2)]
    return (normal(nodes, channels, 1), normal(nodes, channels, 3), normal(edges, 8), normal(edges, 3), *ends)


def edge_counts(steps: int, with_compile: bool, channels: int = 16, nodes: int = 100) -> None:
    """Total seconds of ``steps`` training steps with as many distinct numbers of edges, builds included.

    All train the same model from the same start on the same batches, and take turns at each step.
    """
    eager = Messages(channels, nodes)
    generator = torch.Generator().manual_seed(1)
    counts = (torch.randperm(4 * steps, generator=generator)[:steps] + 500).tolist()
    models: dict[str, tuple[nn.Module, Callable[..., Any]]] = {"eager": (eager, eager)}

    def add(name: str, wrap: Callable[[nn.Module], Callable[..., Any]]) -> None:
        model = _own_class()(channels, nodes)
        model.load_state_dict(eager.state_dict())
        models[name] = (model, wrap(model))

    wrapped: list[OptimizedModule] = []

    def wrap(model: nn.Module) -> OptimizedModule:
        wrapped.append(OptimizedModule(model))
        return wrapped[0]

    add("lazy_einsum", wrap)
    start = time.perf_counter()
    try:
        import opt_einsum_fx

        example = _batch(nodes, channels, 1000, generator)
        add("opt_einsum_fx", lambda model: opt_einsum_fx.optimize_einsums_full(model, example))
    except ImportError:
        pass
    totals = dict.fromkeys(models, 0.0)
    if "opt_einsum_fx" in totals:
        totals["opt_einsum_fx"] = time.perf_counter() - start
    if with_compile:
        torch.compiler.reset()
        torch._inductor.config.force_disable_caches = True
        add("torch.compile", torch.compile)
        add("torch.compile dynamic=True", lambda model: torch.compile(model, dynamic=True))
    optimizers = {name: torch.optim.SGD(model.parameters(), 1e-4) for name, (model, _) in models.items()}
    late = dict.fromkeys(models, 0.0)
    for number, count in enumerate(counts):
        args = _batch(nodes, channels, count, generator)
        losses = {}
        for name, (_, call) in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = call(*args).square().mean()
            loss.backward()
            optimizers[name].step()
            took = time.perf_counter() - start
            totals[name] = totals.get(name, 0.0) + took
            late[name] += took if number >= steps // 2 else 0.0
            losses[name] = loss.item()
        for name, value in losses.items():
            assert abs(value - losses["eager"]) < 1e-3 * abs(losses["eager"]), (name, value, losses["eager"])
    print(f"\n{steps} training steps with {steps} distinct numbers of edges ({min(counts)} to {max(counts)})")
    for name, seconds in totals.items():
        step = late[name] / (steps - steps // 2) * 1e3
        print(f"  {name:27} {seconds:7.2f} s in all, builds included; {step:6.2f} ms a step in the second half")
    print(f"  builds of lazy_einsum: {wrapped[0].cache_info().misses}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    edge_counts(500, with_compile=True)
