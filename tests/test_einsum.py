"""``lazy_einsum.einsum`` is ``torch.einsum``."""

from __future__ import annotations
