"""The ratio of two losses' gradients at the decoder's last layer."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from olvae.models.updates.gradients import (
    grad_scaler,
    gradient_norm,
    gradient_ratio,
    parameters_of,
)


def module(decoder: nn.Module, scaler=None) -> SimpleNamespace:
    """What gradient_ratio asks of a LightningModule in training."""
    return SimpleNamespace(
        decoder=decoder, trainer=SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    )


def two_losses(decoder: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Two losses of one image, and by hand the ratio of their gradients.

    At the only convolution, a 1x1 one. The image is w_oc z_c at every pixel:
    d(sum of a * image)/dw_oc = a * sum of z_c.
    """
    z = torch.randn(2, 3, 4, 4)
    image = decoder(z)
    (conv,) = decoder
    sums = z.sum(dim=(0, 2, 3))  # (3,)
    one, other = (2.0 * image).sum(), (0.5 * image[:, :1]).sum()
    assert conv.weight.shape[:2] == (2, 3)
    by_hand = (2.0 * 2**0.5 * sums.norm()) / (0.5 * sums.norm())  # two output channels, and one
    return one, other, by_hand.item()


@pytest.fixture
def decoder() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, kernel_size=1))


def test_gradient_ratio_by_hand(decoder):
    one, other, by_hand = two_losses(decoder)
    ratio = gradient_ratio(module(decoder), one, other)
    assert ratio.item() == pytest.approx(by_hand, rel=1e-5)
    assert ratio.item() == pytest.approx(4 * 2**0.5, rel=1e-5)
    assert (ratio.dtype, ratio.requires_grad) == (torch.float32, False)
    assert gradient_ratio(module(decoder), other, one).item() == pytest.approx(
        1 / by_hand, rel=1e-5
    )
    assert 1e9 < gradient_ratio(module(decoder), one, 0.0 * other).item() < float("inf")
    assert decoder[0].weight.grad is None
    (one + other).backward()  # what follows in a step
    assert decoder[0].weight.grad.abs().max() > 0


def test_gradient_ratio_does_not_depend_on_the_loss_scale(decoder):
    one, other, by_hand = two_losses(decoder)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert grad_scaler(module(decoder, scaler)) is scaler
    assert gradient_ratio(module(decoder, scaler), one, 0.0 * other).item() == pytest.approx(
        gradient_ratio(module(decoder), one, 0.0 * other).item(), rel=1e-5
    )
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(
        by_hand, rel=1e-5
    )


def test_gradient_ratio_under_a_loss_scale_keeps_gradients_that_fp16_would_lose(decoder):
    """1e-9 is under float16's smallest number, 6e-8; times 2^16 it is not."""
    weight = decoder[0].weight
    one, other = (1e-9 * factor * weight.half().float().sum() for factor in (3.0, 1.0))
    assert gradient_ratio(module(decoder), one, other).item() == 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(
        3.0, rel=1e-2
    )


@pytest.mark.parametrize("scale", [None, 8.0])
def test_gradient_norm_is_of_all_parameters_that_have_gradients_without_a_scale(scale):
    """3-4-12-13, in two groups."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    weights = [nn.Parameter(torch.zeros(size)) for size in (2, 1, 5)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
    if scaler is not None:
        scaler.scale(torch.zeros(()))
    weights[0].grad = torch.tensor([3.0, 4.0]) * (scale or 1.0)
    weights[1].grad = torch.tensor([12.0]) * (scale or 1.0)
    found = gradient_norm(module(nn.Identity(), scaler), optimizer)
    assert found.item() == pytest.approx(13.0)
    assert weights[0].grad.tolist() == [3.0, 4.0]
    assert parameters_of(optimizer) == weights


def test_gradient_ratio_averages_gradients_over_ranks_before_their_norm(decoder, monkeypatch):
    """Two ranks with opposite gradients of the second loss but for a tenth:
    its norm is that of the mean.
    """
    weight = decoder[0].weight
    one, other = weight.sum(), weight[0].sum()
    calls = []

    def mean(gradient):
        calls.append(gradient.clone())
        theirs = gradient if len(calls) == 1 else -0.8 * gradient
        return (gradient + theirs) / 2

    monkeypatch.setattr("olvae.models.updates.gradients.mean_over_processes", mean)
    ratio = gradient_ratio(module(decoder), one, other)
    assert len(calls) == 2
    assert ratio.item() == pytest.approx(2**0.5 / 0.1, rel=1e-5)
