"""The contract of decoders that generate: velocity and Euler steps, with numbers by hand."""

import pytest
import torch
from torch import Tensor

from olvae.modules.base import GeneratingDecoder

Z = torch.zeros(2, 1, 2, 2, dtype=torch.float64)


class Toy(GeneratingDecoder):
    """Estimates half of what it sees, plus its time."""

    noise_std = 0.5

    def __init__(self) -> None:
        super().__init__(z_channels=1, out_channels=1, upscale=1)

    def start(self, z: Tensor, noise: Tensor) -> Tensor:
        return 3.0 + self.noise_std * noise

    def forward(self, z: Tensor, noised: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        assert noised is not None
        assert t is not None
        return noised / 2 + t[:, None, None, None]


def test_velocity_by_hand():
    noised = torch.full_like(Z, 2.0)
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    velocity = Toy().velocity(Z, noised, t)
    # The estimates are 1.5 and 2.
    assert velocity[:, 0, 0, 0].tolist() == [1.0, 0.0]
    assert Toy().sees_noise


def test_euler_steps_by_hand():
    noise = torch.full_like(Z, 4.0)
    one = Toy().sample(Z, noise, 1)
    assert one.unique().tolist() == [3.5]  # 5 / 2 + 1: the estimate itself
    # Two steps: 5 - 0.5 (5 - 3.5) = 4.25, then the estimate at 0.5, 4.25 / 2 + 0.5
    assert Toy().sample(Z, noise, 2).unique().tolist() == pytest.approx([2.625])


def test_with_the_best_estimate_of_a_gaussian_many_steps_keep_its_deviation():
    """The velocity that flow matching learns carries noise to the images' distribution."""

    class Best(Toy):
        def forward(
            self, z: Tensor, noised: Tensor | None = None, t: Tensor | None = None
        ) -> Tensor:
            at = t[:, None, None, None]
            variance = ((1 - at) * 0.2) ** 2 + (at * self.noise_std) ** 2
            mean = (1 - at) * 1.0 + at * 3.0
            return 1.0 + (1 - at) * 0.2**2 / variance * (noised - mean)

    torch.manual_seed(0)
    noise = torch.randn(4, 1, 100, 100, dtype=torch.float64)
    images = Best().sample(noise, noise, 400)
    assert images.mean().item() == pytest.approx(1.0, abs=0.01)
    assert images.std().item() == pytest.approx(0.2, rel=0.03)
    # In one step there is the mean alone.
    assert Best().sample(noise, noise, 1).std().item() == pytest.approx(0.0, abs=1e-12)
