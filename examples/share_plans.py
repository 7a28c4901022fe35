"""How do processes share what was measured? One of them times a few contraction orders and saves what it chose; the
others load the file: they search for nothing, measure nothing, and run the same code.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lazy_einsum import OptimizedModule


def attend(query: torch.Tensor, mix: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qd,de,ke,kv->qv", query, mix, key, value)


def worker(file: str, number: int) -> str:
    """What each process does: the order that it runs, and its code."""
    model = OptimizedModule(attend, optimize="measure")
    if number > 0:
        model.load_plans(file)
    torch.manual_seed(0)
    args = torch.randn(64, 16), torch.randn(16, 16), torch.randn(128, 16), torch.randn(128, 32)
    assert torch.allclose(model(*args), attend(*args), rtol=1e-3, atol=1e-2)
    if number == 0:
        model.save_plans(file)
    (specialization,) = model.specializations.values()
    (plan,) = specialization.plans
    return f"order {plan.path} by {plan.optimizer}\n{specialization.code}"


def start(file: str, number: int) -> str:
    command = [sys.executable, __file__, file, str(number)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if len(sys.argv) > 1:
    print(worker(sys.argv[1], int(sys.argv[2])))
    sys.exit()

with tempfile.TemporaryDirectory() as folder:
    outputs = [start(str(Path(folder) / "plans.json"), number) for number in range(3)]
print(outputs[0])
assert "measurement" in outputs[0]
assert outputs[1] == outputs[2] == outputs[0]  # with the times that the first one measured
