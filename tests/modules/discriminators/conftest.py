"""Discriminators to be counted, as a fixture."""

import pytest
import torch
from torch.nn.utils import parametrizations


@pytest.fixture
def meta(monkeypatch):
    """Networks are built on the meta device, without the power iterations, which take long there and change no count."""
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)
    with torch.device("meta"):
        yield
