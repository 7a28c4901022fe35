"""What was fused, in which order does it run, what does it cost? A report, as text, as data, and as a page."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from lazy_einsum import OptimizedModule


class LowRank(nn.Module):
    """A factored weight, written as people write it: first the weight, then the product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(512, 8))
        self.down = nn.Parameter(torch.randn(8, 512))
        self.mix = nn.Parameter(torch.randn(512, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 0.5 * torch.einsum("or,ri->oi", self.up, self.down)
        hidden = torch.einsum("bi,oi->bo", x, weight)
        return torch.einsum("bo,ok->bk", hidden, self.mix)


torch.set_num_threads(1)
model = OptimizedModule(LowRank())
report = model.explain(torch.empty(64, 512), measure=True)  # the model does not run; steps are timed on random tensors

print(report.fused)  # which calls became one network
print(report.orders)  # in what order it is contracted
print(report.largest_bytes)  # what the largest intermediate takes
print(report.last_miss)  # why the last call that missed did
print(report)

(network,) = report.networks
assert network.written is not None
assert len(network.calls) == 3 and network.optimized.flops < network.written.flops / 5
assert [operand.name for operand in network.optimized.operands] == ["x", "up", "down", "mix"]
assert network.eager_ratio is not None and network.eager_ratio > 1

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
(folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
report.save(folder / "report.html")
if len(sys.argv) > 1:
    report.plot().savefig(folder / "orders.png", dpi=90)  # pip install 'lazy_einsum[plot]'
print(f"a page: {folder / 'report.html'}")
