"""Why was this call slow? Misses with their reasons, a log of them, and a profile that names each contraction."""

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from lazy_einsum import OptimizedModule


def bilinear(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ni,ijk,nj->nk", x, w, y)


# The same as LAZY_EINSUM_LOGS=cache in the environment.
logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lazy_einsum.cache").setLevel(logging.INFO)

model = OptimizedModule(bilinear)
w = torch.rand(32, 32, 16)
for n, dtype in ((100, torch.float32), (100, torch.float32), (100, torch.float64)):
    model(torch.rand(n, 32, dtype=dtype), w.to(dtype), torch.rand(n, 32, dtype=dtype))

report = model.explain()
for miss in report.misses:
    print(f"{miss.seconds * 1e3:.1f} ms building for {miss.signature}: {miss.reason}")
print([f"{entry.hits} hits" for entry in report.specializations])
print({name: f"{took * 1e3:.2f} ms" for name, took in report.specializations[-1].stage_seconds.items()})
assert report.last_miss == "argument 0: f64[100, 32] here, f32[100, 32] there"
assert [entry.hits for entry in report.specializations] == [1, 0]

with profile(activities=[ProfilerActivity.CPU]) as seen:
    model(torch.rand(100, 32), w, torch.rand(100, 32))
names = [event.key for event in seen.key_averages()]
print([name for name in names if "einsum" in name])
assert "lazy_einsum: bilinear(f32[100, 32], f32[32, 32, 16], f32[100, 32])" in names
