import pytest
import torch


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 32, 40) * 2 - 1
