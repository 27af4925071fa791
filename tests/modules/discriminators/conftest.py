"""Discriminators to be counted, as a fixture."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def meta(no_power_iterations: None) -> Iterator[None]:
    """Networks are built on the meta device."""
    with torch.device("meta"):
        yield
