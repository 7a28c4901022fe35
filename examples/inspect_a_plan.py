"""What was done to my einsum? Shows the contraction order, its cost and the code after each pass; runs nothing."""

import torch

from lazy_einsum import OptimizedModule


def transform(w: torch.Tensor, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.einsum("pi,qj,ijc,bc->bpq", left, right, w, x)


model = OptimizedModule(transform)
sizes = {"w": (30, 30, 40), "x": (5, 40), "left": (10, 30), "right": (10, 30)}
entry = model.prepare(*(torch.empty(shape) for shape in sizes.values()))

(plan,) = entry.plans
print(plan)
for name, code in entry.stages.items():
    print(f"--- after {name}\n{code}")
print(model.explain())

assert plan.flops < plan.naive_flops / 50
assert "einsum" in entry.stages["trace"]
assert "einsum" not in entry.code
assert entry.hits == 0
