import pytest
import torch
from torch import nn

from olvae.bench.limits import copy_of, heaviest_convolution, matrix_product


def test_the_heaviest_convolution_of_a_network():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Conv2d(8, 99, 1))
    heaviest = heaviest_convolution(network, (2, 3, 16, 16))
    assert (heaviest.shape, heaviest.weight) == ((2, 3, 16, 16), (8, 3, 3, 3))
    assert heaviest.macs() == 2 * 16 * 16 * 8 * 3 * 9
    grouped = heaviest_convolution(network[1], (2, 8, 16, 16))
    assert grouped.macs() == 2 * 7 * 7 * 8 * 4 * 9
    out = grouped.build("cpu", torch.bfloat16, torch.channels_last)()
    assert (tuple(out.shape), out.dtype) == ((2, 8, 7, 7), torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_network_without_one():
    with pytest.raises(ValueError, match="Linear has no 3x3 convolution"):
        heaviest_convolution(nn.Linear(3, 3), (1, 3))


def test_plain_operations(monkeypatch):
    monkeypatch.setitem(matrix_product.__globals__["SIDES"], "cpu", 4)
    product, macs = matrix_product("cpu", torch.float32)
    assert (tuple(product().shape), macs) == ((4, 4), 64)
    x = torch.randn(5)
    copied, moved = copy_of(x)
    assert torch.equal(copied(), x)
    assert moved == 2 * 5 * 4
