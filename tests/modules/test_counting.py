import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from olvae.modules.counting import count_macs, count_parameters, watch_outputs


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_count_parameters_and_macs_by_hand():
    network = nn.Sequential(Shift(), nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))
    assert count_parameters(network) == 3 * 8 * 9 + 8 + 8 * 2 + 2
    assert count_macs(network, 2, 3, 10, 12) == 2 * 120 * (3 * 8 * 9 + 8 * 2)
    assert next(network.parameters()).device == torch.device("cpu")


def test_power_iterations_and_prints_are_no_products(capsys):
    """Of a matrix with one column, too."""
    network = spectral_norm(nn.Conv2d(1, 8, 1))
    assert count_macs(network, 2, 1, 3, 5) == 2 * 15 * 8
    assert capsys.readouterr().out == ""


class Broken(nn.Module):
    def forward(self, x: object) -> None:
        raise KeyError


def test_outputs_that_are_tensors_are_watched_within_the_context():
    network, twice = nn.Sequential(nn.ReLU(), nn.Tanh()), nn.LSTM(2, 2)
    seen: list[tuple[str, Tensor]] = []
    x = torch.randn(3, 2)
    with (
        pytest.raises(KeyError),
        watch_outputs(
            {"first": network[0], "twice": twice, "second": network[1]},
            lambda *given: seen.append(given),
        ),
    ):
        nn.Sequential(network, twice, Broken())(x)
    network(x)
    assert [name for name, _ in seen] == ["first", "second"]
    torch.testing.assert_close(seen[0][1], x.relu())
    torch.testing.assert_close(seen[1][1], x.relu().tanh())
