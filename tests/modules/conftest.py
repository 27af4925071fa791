"""Discriminators to be counted, as a fixture."""

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import skip_power_iterations


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks are built on the meta device."""
    skip_power_iterations(monkeypatch)
    with torch.device("meta"):
        yield
