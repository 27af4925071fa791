import torch
from torch import nn

from olvae.modules.counting import count_macs, count_parameters


def test_count_parameters_and_macs_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))
    assert count_parameters(network) == 3 * 8 * 9 + 8 + 8 * 2 + 2
    assert count_macs(network, 2, 3, 10, 12) == 2 * 120 * (3 * 8 * 9 + 8 * 2)
    assert next(network.parameters()).device == torch.device("cpu")
