"""Settings that all tests share."""

from __future__ import annotations

import torch

# Small tensors: a second thread costs more than it gives, and tests run side by side.
torch.set_num_threads(1)
