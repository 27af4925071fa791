"""RandomNoise: its strength's distribution over samples, its units, and what it leaves alone."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.parts.part import Step
from olvae.models.parts.random_noise import RandomNoise
from olvae.modules.distributions import DiagonalGaussian
from tests.conftest import parts
from tests.models.steps import build, fit, metrics

UNIT, SHIFT = torch.tensor([0.5, 4.0]).view(1, 2, 1, 1), torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)


def noisy(z: Tensor, means: Tensor | None = None, **params) -> Tensor:
    step = Step(torch.zeros(1), None, None, warming_up=False, adversary_plays=False)
    means = z if means is None else means
    step.posterior = DiagonalGaussian(torch.cat((means, torch.zeros_like(means)), dim=1))
    step.latent = z
    RandomNoise(**params).on_latent(None, step)
    return step.latent


def latents(batch: int = 400, side: int = 24) -> Tensor:
    return SHIFT + UNIT * torch.randn(batch, 2, side, side)


def test_random_noise_added_is_of_uniform_strength_over_samples():
    """In each channel's unit, alike for all channels of a sample,
    as in RAE's code and diffusers' AutoencoderRAE.
    """
    z = latents()
    noise = ((noisy(z, how="add", strength=0.8) - z) / UNIT).double()
    assert noise.mean().abs() < 0.01
    sigma = noise.std((1, 2, 3)).numpy()  # one a sample, to 2 %
    assert stats.kstest(sigma, stats.uniform(0, 0.8).cdf).pvalue > 0.01
    one, other = noise.std((2, 3)).unbind(1)
    torch.testing.assert_close(one, other, rtol=0.3, atol=0.01)


@pytest.mark.parametrize("how", ["add", "interpolate"])
def test_random_noise_by_hand(how):
    z, means = torch.randn(3, 2, 5, 5), latents(3, 5)
    scale = 2.0 if how == "interpolate" else 1.0
    torch.manual_seed(4)
    found = noisy(z, means, how=how, strength=0.6, scale=scale)
    torch.manual_seed(4)
    share = 0.6 * torch.rand(3, 1, 1, 1)
    mean = means.mean((0, 2, 3), keepdim=True)
    unit = means.std((0, 2, 3), correction=0, keepdim=True)
    noise = scale * unit * torch.randn_like(z)
    added, mixed = z + share * noise, (1 - share) * z + share * (mean + noise)
    torch.testing.assert_close(found, added if how == "add" else mixed, rtol=1e-5, atol=1e-5)


def test_random_noise_says_how():
    assert RandomNoise(how="add", strength=0.5).describe() == "add, strength 0.5"
    mixes = RandomNoise(strength=0.5, scale=2.0).describe()
    assert mixes == "interpolate, strength 0.5, scale 2"


def test_random_noise_on_a_single_position_has_no_deviation():
    assert torch.equal(noisy(z := torch.randn(1, 2, 1, 1), how="add", strength=1.0), z)


def test_random_noise_interpolated_is_of_uniform_strength_over_samples():
    """(1 - t) z + t scale e in units of mean 0 and variance 1:
    t is where the regression on z says.
    """
    z = latents(300, 64)
    out = (
        ((noisy(z, how="interpolate", strength=0.6, scale=2.0) - SHIFT) / UNIT).double().flatten(1)
    )
    normal = ((z - SHIFT) / UNIT).double().flatten(1)
    t = 1 - (out * normal).mean(1) / normal.square().mean(1)
    assert stats.kstest(t.numpy(), stats.uniform(0, 0.6).cdf).pvalue > 0.01
    residual = (out - (1 - t)[:, None] * normal).std(1)
    torch.testing.assert_close(residual, 2.0 * t.abs(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("how", ["add", "interpolate"])
def test_random_noise_gradient_is_the_share_of_the_latent_that_is_left(how):
    z = latents(4, 3).requires_grad_()
    assert torch.equal(noisy(z, how=how, strength=0.0), z)
    out = noisy(z, how=how, strength=0.5)
    (gradient,) = torch.autograd.grad(out.sum(), z)
    share = gradient[:, :1, :1, :1]
    assert torch.equal(gradient, share.expand_as(gradient))  # the units are constants
    assert (share == 1).all() if how == "add" else ((share > 0.5) & (share < 1)).all()


@pytest.mark.parametrize("how", ["add", "interpolate"])
def test_random_noise_in_training_steps_alone(image_folder, how):
    model = build(parts=parts(random_noise={"how": how, "strength": 0.5}), sample_posterior=False)
    seen = []
    hook = model.decoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    fit(model, image_folder, 2)
    hook.remove()
    assert metrics(model)["train/loss"] > 0
    assert not torch.equal(*seen)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model.decode(model.encode(x).mean))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"how": "replace"}, "how must be one of add, interpolate"),
        ({"strength": -1.0}, "strength must not be negative, got -1"),
        ({"strength": 1.5}, "strength must be at most 1 .*got 1.5"),
        ({"how": "add", "scale": 2.0}, "scale is of the noise to interpolate with"),
    ],
)
def test_random_noise_refuses_wrong_parameters_and_a_frozen_decoder(params, message):
    with pytest.raises(ValueError, match=message):
        RandomNoise(**params)
    with pytest.raises(ConfigError, match=r"parts\.random_noise: .*frozen"):
        build(parts=parts(random_noise={}), freeze_decoder=True)
