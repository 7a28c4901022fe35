"""What happens when shapes keep changing? Each gets its own code; the least recently used is dropped."""

import torch

from lazy_einsum import OptimizedModule


def similarity(query: torch.Tensor, key: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qd,kd,de->qke", query, key, mix) / query.shape[-1] ** 0.5


model = OptimizedModule(similarity, maxsize=4)
mix = torch.randn(16, 2)

for _ in range(5):
    for length in (8, 16, 32, 64):
        query, key = torch.randn(length, 16), torch.randn(2 * length, 16)
        assert torch.allclose(model(query, key, mix), similarity(query, key, mix), atol=1e-4)

info = model.cache_info()
print(info)
assert (info.hits, info.misses, info.evictions) == (16, 4, 0)

model(torch.randn(3, 16), torch.randn(5, 16), mix)  # a fifth shape: the one used longest ago goes
assert model.cache_info().evictions == 1
for signature, entry in model.specializations.items():
    print(f"{entry.hits} hits: {signature}")
assert len(model.specializations) == 4
