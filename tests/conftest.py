"""What every test relies on: no network, one thread a process, the same random numbers each time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the bare environment has pytest alone
    pass
else:
    settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, whoever does it first
if not torch.accelerator.is_available():  # torch.manual_seed would note its stack for devices that are not there: 1 ms
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
