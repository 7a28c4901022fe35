"""Can weights be low-rank updates that keep learning? The update is never multiplied out when that costs more."""

import torch
from torch import nn

from lazy_einsum import OptimizedModule


class LoraLinear(nn.Module):
    """A frozen weight and a learned update of rank 8, written as the definition says."""

    def __init__(self, size: int = 512, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5, requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.b = nn.Parameter(torch.zeros(size, rank))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.scale * torch.einsum("or,ri->oi", self.b, self.a)
        return torch.einsum("bi,oi->bo", x, self.weight) + torch.einsum("bi,oi->bo", x, update)


torch.manual_seed(0)
layer = LoraLinear()
model = OptimizedModule(layer)
target = layer.weight + 0.2 * torch.randn(512, 1) @ torch.randn(1, 512) / 512**0.5
optimizer = torch.optim.Adam([layer.a, layer.b], lr=0.01)

losses = []
for _ in range(150):
    x = torch.randn(64, 512)
    loss = (model(x) - x @ target.T).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(model.code)
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0] / 5
assert layer.weight.grad is None

for plan in next(iter(model.specializations.values())).plans:
    print(plan)
largest = max(plan.largest_intermediate for plan in next(iter(model.specializations.values())).plans)
assert largest < 512 * 512, "the 512 by 512 update was multiplied out"
