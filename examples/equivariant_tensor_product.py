"""Does it help an equivariant tensor product, written as e3nn's users write it, and is it still equivariant?"""

import time

import torch
from torch import nn

from lazy_einsum import OptimizedModule


class TensorProduct(nn.Module):
    """Vectors times vectors to scalars, vectors and symmetric matrices, with weights for each sample."""

    def __init__(self) -> None:
        super().__init__()
        cross = torch.zeros(3, 3, 3)
        cross[0, 1, 2] = cross[1, 2, 0] = cross[2, 0, 1] = 1
        cross[0, 2, 1] = cross[2, 1, 0] = cross[1, 0, 2] = -1
        self.register_buffer("dot", torch.eye(3)[:, :, None] / 3**0.5)
        self.register_buffer("cross", cross / 2**0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outer = torch.einsum("zui,zj->zuij", x, y)
        scalars = torch.einsum("zuv,ijk,zuij->zvk", weight, self.dot, outer) / 32**0.5
        vectors = torch.einsum("zuv,ijk,zuij->zvk", weight, self.cross, outer) / 32**0.5
        return scalars, vectors


def seconds(call: object, *args: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(50):
        call(*args)
    return time.perf_counter() - start


torch.manual_seed(0)
torch.set_num_threads(1)
product = TensorProduct()
model = OptimizedModule(product)
x, y, weight = torch.randn(64, 32, 3), torch.randn(64, 3), torch.randn(64, 32, 32)

rotation = torch.linalg.qr(torch.randn(3, 3)).Q
rotation = rotation * torch.det(rotation)
scalars, vectors = model(x, y, weight)
turned_scalars, turned_vectors = model(x @ rotation.T, y @ rotation.T, weight)
assert torch.allclose(turned_scalars, scalars, atol=1e-4)
assert torch.allclose(turned_vectors, vectors @ rotation.T, atol=1e-4)

with torch.no_grad():
    product(x, y, weight), model(x, y, weight)
    eager, ours = (min(seconds(call, x, y, weight) for _ in range(5)) for call in (product, model))
print(model.code)
print(f"{ours / 50 * 1e6:.0f} us, eager {eager / 50 * 1e6:.0f} us: {eager / ours:.2f} times as fast")
assert ours < eager
