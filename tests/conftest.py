"""Settings that all tests share."""

from __future__ import annotations

import pytest
import torch

# Small tensors: a second thread costs more than it gives, and tests run side by side.
torch.set_num_threads(1)

# Where there is no CUDA its cases are not collected: a thousand skipped ones would hide what is skipped for another
# reason. ``test_devices.py`` has the one that is skipped, and says why.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes a ``device`` on all devices that are there."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_report_header() -> str:
    """Say on which devices."""
    return f"devices: {', '.join(DEVICES)}{'' if len(DEVICES) > 1 else ' (there is no CUDA)'}"
