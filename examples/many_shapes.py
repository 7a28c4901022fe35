"""What happens when shapes keep changing? A size that was seen to vary gets code that serves all its values; with
``dynamic=False`` each shape gets its own, and the least recently used is dropped.
"""

import torch

from lazy_einsum import OptimizedModule


def similarity(query: torch.Tensor, key: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qd,kd,de->qke", query, key, mix) / query.shape[-1] ** 0.5


mix = torch.randn(16, 2)


def call(model: OptimizedModule, length: int) -> None:
    query, key = torch.randn(length, 16), torch.randn(2 * length, 16)
    assert torch.allclose(model(query, key, mix), similarity(query, key, mix), atol=1e-4)


model = OptimizedModule(similarity)
for length in range(8, 108):
    call(model, length)
info = model.cache_info()
print(info)
# Two lengths got their own code, the third showed that they vary.
assert (info.hits, info.misses, info.currsize) == (97, 3, 3)
for signature, entry in model.specializations.items():
    print(f"{entry.hits} hits{', any length' if entry.is_generic else ''}: {signature}")

model = OptimizedModule(similarity, maxsize=4, dynamic=False)
for _ in range(5):
    for length in (8, 16, 32, 64):
        call(model, length)
info = model.cache_info()
print(info)
assert (info.hits, info.misses, info.evictions) == (16, 4, 0)
call(model, 3)  # a fifth shape: the one used longest ago goes
assert model.cache_info().evictions == 1 and len(model.specializations) == 4
