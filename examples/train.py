"""Does all around a model still work: train and eval, optimizer, state_dict, loading into a plain model?"""

import copy

import torch
from torch import nn

from lazy_einsum import OptimizedModule


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.1)
        self.core = nn.Parameter(torch.randn(12, 12, 6) / 12)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.head(self.drop(torch.einsum("bi,bj,ijk->bk", x, x, self.core) / 2.0))


torch.manual_seed(0)
model = OptimizedModule(Classifier())
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
inputs = torch.randn(300, 12)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 1).long()

for epoch in range(30):
    model.train()
    for start in range(0, 300, 64):  # the last batch is smaller
        loss = nn.functional.cross_entropy(model(inputs[start : start + 64]), labels[start : start + 64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    if epoch % 10 == 9:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")

plain = Classifier().eval()
plain.load_state_dict(model.state_dict())  # the wrapper adds no prefix
with torch.no_grad():
    assert torch.allclose(plain(inputs), model(inputs), atol=1e-5)
assert copy.deepcopy(model).cache_info().currsize == 0
print(model.cache_info())
assert model.cache_info().misses == 3  # training at two batch sizes, evaluation at one
assert accuracy > 0.8
