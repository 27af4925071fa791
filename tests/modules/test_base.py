import pytest
import torch
from torch import nn

from olvae.modules.base import check_counts, count_macs, count_parameters


def test_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))
    assert count_parameters(network) == 3 * 8 * 9 + 8 + 8 * 2 + 2
    assert count_macs(network, 2, 3, 10, 12) == 2 * 120 * (3 * 8 * 9 + 8 * 2)
    assert next(network.parameters()).device == torch.device("cpu")


def test_counts_that_no_network_has():
    check_counts(1, channels=8, channel_mult=[1, 2], other=(3,))
    check_counts(0, num_res_blocks=0)
    for counts, message in (
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"channels": 8, "channel_mult": (1, -1)}, r"channel_mult must be at least 1, got \[1, -1\]"),
        ({"channel_mult": []}, r"channel_mult must be at least 1, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_counts(1, **counts)
