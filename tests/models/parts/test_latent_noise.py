"""LatentNoise: its size in the two units, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.parts.latent_noise import LatentNoise
from olvae.models.parts.part import Step
from olvae.modules.distributions import DiagonalGaussian
from tests.conftest import parts
from tests.models.steps import WITHOUT_KL, assert_same, build, fit, snapshot


def noisy(
    posterior: DiagonalGaussian, std: float, unit: str = "posterior", sample: bool = False
) -> Tensor:
    """What the decoder gets."""
    step = Step(torch.zeros(1), None, None, warming_up=False, adversary_plays=False)
    step.posterior, step.latent = posterior, posterior.sample() if sample else posterior.mode()
    LatentNoise(std, unit).on_latent(None, step)
    return step.latent


def latents(model, root, steps=1, **settings) -> list[torch.Tensor]:
    """What the decoder gets in training."""
    seen = []
    hook = model.decoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().clone())
    )
    fit(model, root, steps, **settings)
    hook.remove()
    return seen


def test_latent_noise_in_units_of_the_posteriors_deviation():
    """Statistics over a grid of latents whose means and deviations are known, against numbers;
    on a sample too.
    """
    mean = torch.linspace(-3, 3, 4).view(1, 4, 1, 1).expand(8, 4, 100, 100)
    std = torch.tensor([0.1, 0.5, 1.0, 2.0]).view(1, 4, 1, 1).expand_as(mean)
    posterior = DiagonalGaussian(torch.cat([mean, 2 * std.log()], 1))
    for unit, sample, expected in (
        ("posterior", False, [0.03, 0.15, 0.3, 0.6]),
        ("data", False, [0.0] * 4),  # the means of a channel are all the same
        ("posterior", True, [1.09**0.5 * s for s in (0.1, 0.5, 1.0, 2.0)]),  # variances add up
    ):
        noise = (noisy(posterior, 0.3, unit, sample) - mean).double()
        # 1 / sqrt(2 * 80000) is 0.0025.
        assert noise.std((0, 2, 3)).tolist() == pytest.approx(expected, rel=0.02)
        assert noise.mean((0, 2, 3)).abs().max() < 0.03


def test_latent_noise_in_units_of_the_datas_deviation():
    """Per channel, over batch and positions; not the posterior's."""
    torch.manual_seed(3)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    mean = scale * torch.randn(8, 4, 100, 100) + 5
    posterior = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -20.0)], 1))
    z = noisy(posterior, 0.5, "data")
    noise = (z - mean).double()
    assert noise.std((0, 2, 3)).tolist() == pytest.approx([0.25, 0.5, 1.0, 2.0], rel=0.02)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), (mean - 5).flatten().double()]))[
        0, 1
    ]
    assert abs(correlation) < 0.02


def test_latent_noise_by_hand():
    posterior = DiagonalGaussian(torch.randn(2, 8, 3, 5))
    for unit in ("posterior", "data"):
        torch.manual_seed(4)
        found = noisy(posterior, 0.3, unit)
        torch.manual_seed(4)
        noise, mean = torch.randn_like(posterior.mean), posterior.mean
        std = mean.std((0, 2, 3), correction=0, keepdim=True)
        std = posterior.std if unit == "posterior" else std
        torch.testing.assert_close(found, mean + 0.3 * std * noise)


def test_latent_noise_refuses_wrong_parameters_and_a_frozen_decoder():
    with pytest.raises(ValueError, match="std must not be negative, got -0"):
        LatentNoise(-0.1)
    with pytest.raises(ValueError, match="relative_to must be one of posterior, data"):
        LatentNoise(0.1, "mean")
    with pytest.raises(ConfigError, match=r"parts\.latent_noise: .*frozen"):
        build(parts=parts(latent_noise={"std": 0.1}), freeze_decoder=True)


def test_latent_noise_on_a_single_position_has_no_deviation():
    posterior = DiagonalGaussian(torch.full((1, 8, 1, 1), -20.0))
    assert torch.equal(noisy(posterior, 0.5, "data"), posterior.mean)


def test_latent_noise_has_no_gradient_for_the_encoder_to_hide_from_it():
    """Its size is a constant: the gradient of a latent is that of its mean."""
    moments = torch.randn(2, 8, 3, 3, requires_grad=True)
    for unit in ("posterior", "data"):
        (gradient,) = torch.autograd.grad(
            noisy(DiagonalGaussian(moments), 0.7, unit).sum(), moments
        )
        assert torch.equal(gradient[:, :4], torch.ones(2, 4, 3, 3))
        assert gradient[:, 4:].abs().max() == 0


def test_latent_noise_of_zero_leaves_a_step_as_it_was(image_folder):
    """Bit for bit; and with noise the decoder gets other latents, in training alone."""
    plain, zero, other = (
        build(),
        *(build(parts=parts(latent_noise={"std": std})) for std in (0.0, 0.5)),
    )
    (first,), (second,), (third,) = (latents(model, image_folder) for model in (plain, zero, other))
    assert torch.equal(first, second)
    assert_same(snapshot(plain), snapshot(zero))
    assert not torch.equal(first, third)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other(x)[0], other.decode(other.encode(x).mean))


def test_latent_noise_needs_the_posteriors_deviation_in_its_place():
    """Not of an encoder without a distribution; nor where another part has turned the latent, but
    not the posterior.
    """
    build(parts=parts(latent_noise={"std": 0.1}, equivariance={}))
    build(parts=parts(equivariance={}, latent_noise={"std": 0.1, "relative_to": "data"}))
    with pytest.raises(ConfigError, match=r"parts\.latent_noise: .*before parts\.equivariance$"):
        build(parts=parts(equivariance={}, latent_noise={"std": 0.1}))
    shape = {"latent_dim": 8, "image_size": 16, "channels": 8, "blocks": [0, 0, 0, 0]}
    points = {"target": "olvae.modules.others.tiny.TinyEncoder", "params": shape}
    with pytest.raises(ConfigError, match=r"relative_to: .* no distribution"):
        build(parts=parts(latent_noise={"std": 0.1}), encoder_config=points, lossconfig=WITHOUT_KL)
