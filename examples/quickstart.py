"""Is a wrapped model faster, and still the same model? Trains both with changing batch sizes."""

import copy
import math
import time

import torch
from torch import nn

from lazy_einsum import OptimizedModule


class Net(nn.Module):
    def __init__(self, width: int = 256, rank: int = 8) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, rank))
        self.b = nn.Parameter(torch.randn(rank, width))
        self.c = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.out = nn.Parameter(torch.randn(width, 1) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.einsum("ir,rj->ij", self.a, self.b) / math.sqrt(8)
        h = torch.tanh(0.5 * torch.einsum("bi,ij->bj", x, weight) / 16)
        return torch.einsum("bj,jk,ko->bo", h, 2.0 * self.c, self.out)


def train(model: nn.Module) -> tuple[list[float], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(60):
        if step == 10:
            start = time.perf_counter()
        x = torch.randn((16, 24, 32)[step % 3], 256, generator=generator)
        loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


torch.set_num_threads(1)
torch.manual_seed(0)
eager = Net()
model = OptimizedModule(copy.deepcopy(eager))
eager_losses, eager_seconds = train(eager)
losses, seconds = train(model)
print("code before:", next(iter(model.specializations.values())).stages["trace"], sep="\n")
print("code after:", model.code, sep="\n")
print(model.cache_info())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; eager {eager_losses[-1]:.4f}")
ratio = eager_seconds / seconds
print(f"50 steps: {seconds * 1e3:.0f} ms, eager {eager_seconds * 1e3:.0f} ms: {ratio:.2f} times as fast")

assert all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(losses, eager_losses, strict=True))
assert model.cache_info().misses == 3
assert losses[-1] < losses[0]
