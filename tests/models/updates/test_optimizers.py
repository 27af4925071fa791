"""Seeds, learning rates, gradients at the decoder's last layer."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from olvae.models.updates.gradients import grad_scaler, gradient_ratio
from olvae.models.updates.optimizers import lr_factor, make_optimizer, mix_seeds


def test_seeds_differ_with_every_number_and_with_their_order():
    grid = [
        (seed, step, micro, rank)
        for seed in (0, 1, 7)
        for step in range(9)
        for micro in (0, 1)
        for rank in (0, 1)
    ]
    seeds = [mix_seeds(*numbers) for numbers in grid]
    assert len(set(seeds)) == len(grid)
    assert seeds == [mix_seeds(*numbers) for numbers in grid]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch takes
    assert mix_seeds(1, 2) != mix_seeds(2, 1)


def test_rates():
    assert [lr_factor(s, "constant", 4, 100, 0.0) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    values = [lr_factor(s, "cosine", 10, 110, 0.1) for s in (10, 60, 110, 500)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def module(decoder: nn.Module, scaler=None) -> SimpleNamespace:
    """What gradient_ratio asks of a LightningModule in training."""
    return SimpleNamespace(
        decoder=decoder, trainer=SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    )


def two_losses(decoder: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Two losses of one image, and by hand the ratio of their gradients at the only convolution, a 1x1 one.

    The image is w_oc z_c at every pixel: d(sum of a * image)/dw_oc = a * sum of z_c.
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


def test_the_loss_scale_does_not_show(decoder):
    one, other, by_hand = two_losses(decoder)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert grad_scaler(module(decoder, scaler)) is scaler
    assert gradient_ratio(module(decoder, scaler), one, 0.0 * other).item() == pytest.approx(
        gradient_ratio(module(decoder), one, 0.0 * other).item(), rel=1e-5
    )
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(
        by_hand, rel=1e-5
    )


def test_the_loss_scale_saves_gradients_that_half_precision_would_lose(decoder):
    """1e-9 is under float16's smallest number, 6e-8; times 2^16 it is not."""
    weight = decoder[0].weight
    one, other = (1e-9 * factor * weight.half().float().sum() for factor in (3.0, 1.0))
    assert gradient_ratio(module(decoder), one, other).item() == 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(
        3.0, rel=1e-2
    )


def test_over_ranks_the_gradients_are_averaged_before_their_norm(decoder, monkeypatch):
    """Two ranks with opposite gradients of the second loss but for a tenth: its norm is that of the mean."""
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


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_loaded_moments_have_the_strides_of_their_parameters(name):
    """A run may change its memory layout when it is resumed; fused kernels read moments as their parameters lie."""
    torch.manual_seed(0)
    weights, gradients = torch.randn(8, 8, 3, 3), torch.randn(3, 8, 8, 3, 3)

    def trained(
        steps: range, layout: torch.memory_format, state: dict | None = None, start=weights
    ):
        parameter = nn.Parameter(start.clone(memory_format=layout))
        optimizer = make_optimizer(name, [parameter], 0.1, (0.5, 0.9))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            parameter.grad = gradients[step].clone(memory_format=layout)
            optimizer.step()
        return parameter.detach(), optimizer

    plain, lasting = torch.contiguous_format, torch.channels_last
    whole, _ = trained(range(3), plain)
    begun, optimizer = trained(range(2), plain)
    continued, other = trained(range(2, 3), lasting, optimizer.state_dict(), begun)
    assert torch.equal(whole, continued)
    (state,) = other.state.values()
    moments = [value for value in state.values() if value.ndim == 4]
    assert len(moments) == {"adam": 2, "muon": 1}[name]
    assert all(moment.stride() == continued.stride() != whole.stride() for moment in moments)


def test_a_loaded_optimizer_keeps_its_own_rate_and_betas():
    """The saved rate is scaled, as a schedule had lowered it; equal settings change no bit."""
    weights = [nn.Parameter(torch.ones(3))]
    before = make_optimizer("adam", weights, 0.3, (0.5, 0.9))
    before.param_groups[0] |= {"initial_lr": 0.3, "lr": 0.3 * 0.7}
    same, other = (
        make_optimizer("adam", weights, 0.3, (0.5, 0.9)),
        make_optimizer("adam", weights, 0.03, (0.0, 0.99)),
    )
    for optimizer in (same, other):
        optimizer.load_state_dict(before.state_dict())
    assert same.state_dict() == before.state_dict()
    (group,) = other.param_groups
    assert group["lr"] == pytest.approx(0.03 * 0.7, rel=1e-12)
    assert (group["initial_lr"], group["betas"]) == (0.03, (0.0, 0.99))
