"""The diffusion prior: its bound, whom its loss trains, and what contradicts it."""

import math

import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.losses.terms import logvar_loss
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.prior import LOGVAR_WEIGHT, Prior
from olvae.models.updates.optimizers import mix_seeds
from tests.conftest import parts
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, objective, snapshot, source


def with_prior(prior: dict | None = None, **model) -> LiteAutoencoderKL:
    given = {"width": 32, "depth": 1, "patch": 1, **(prior or {})}
    nodes = {**parts(prior=given), **model.pop("parts", {})}
    settings = {"sample_posterior": False, "lossconfig": WITHOUT_KL, "initial_logvar": -5.0}
    model = build(parts=nodes, **{**settings, **model})
    torch.nn.init.normal_(model.parts["prior"].denoiser.network.proj_out_2.weight, std=0.1)
    return model


# The bound


def best_velocity(deviation: float):
    """The velocity that predicts best for a Gaussian latent of this standard deviation."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return x * (t - (1 - t) * deviation**2) / variance

    return velocity


def mean_rate(prior: Prior, deviation: float) -> float:
    """In nats for each element, over 512 even noise levels."""
    count = 512
    z = deviation * torch.randn(count, 2, 16, 16, dtype=torch.float64)
    where = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return prior(z, where, torch.randn_like(z)).mean().item() / z[0].numel()


@pytest.mark.parametrize(("deviation", "log_snr"), [(1.0, 5.0), (0.3, 5.0), (2.0, 7.0)])
def test_rate_of_a_gaussian_latent_is_the_information_of_its_channel(deviation, log_snr):
    """With the best denoiser the bound is tight: log(1 + SNR) / 2 for each element."""
    prior = Prior(log_snr=log_snr)
    prior.denoiser = best_velocity(deviation)
    exact = 0.5 * math.log(1 + math.exp(log_snr) * deviation**2)
    assert mean_rate(prior, deviation) == pytest.approx(exact, rel=0.01)

    # The variational bound as published, over the log-SNR l, by the error of the predicted latent.
    levels = torch.linspace(-30, log_snr, 20_001, dtype=torch.float64)
    error = deviation**2 / (1 + levels.exp() * deviation**2)
    assert torch.trapezoid(0.5 * levels.exp() * error, levels).item() == pytest.approx(exact)


def test_a_worse_denoiser_makes_the_bound_looser():
    prior = Prior()
    exact = 0.5 * math.log(1 + math.exp(5.0))
    prior.denoiser = best_velocity(1.5)
    assert exact * 1.02 < mean_rate(prior, 1.0)


# A step


def test_prior_step_by_hand(image_folder):
    """What is decoded has the fixed noise; the weights of the losses; the denoiser's learning."""
    model = with_prior({"weight": 0.3})
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    posterior = model.encode(x)
    z = posterior.mean
    reconstruction = model.decode(z + math.exp(-2.5) * torch.randn_like(z))
    total, _ = model.objective(x, reconstruction, posterior)
    where = torch.rand(len(z))
    rate = model.parts["prior"](z, where, torch.randn_like(z)).mean() / x[0].numel()
    logvar = logvar_loss(posterior.logvar, torch.full_like(z, -5.0))
    wanted = total + 0.3 * rate + LOGVAR_WEIGHT * logvar

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/rate"] == pytest.approx(rate.item(), rel=1e-5)
    assert values["train/logvar"] == pytest.approx(logvar.item(), rel=1e-5)
    assert values["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    changed = moved(before, snapshot(model))
    assert "parts.prior.denoiser.network.proj_out_2.weight" in changed
    assert any(name.startswith("encoder.") for name in changed)


def test_rate_weights_the_encoders_gradient_and_not_the_denoisers(image_folder):
    weight = 1e-3
    model = with_prior({"weight": weight}).train()
    prior = model.parts["prior"]
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])[:1]
    step = type("Encoded", (), {"encoded": model.encode(x), "images": x})

    torch.manual_seed(1)
    loss, factor = prior.losses(model, step)["rate"]
    (factor * loss).backward(retain_graph=True)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(1)
    z = step.encoded.mean
    plain = prior(z, torch.rand(len(z)), torch.randn_like(z)).mean() / x[0].numel()
    assert loss.item() == plain.item()
    model.zero_grad()
    plain.backward()
    for name, p in model.named_parameters():
        if name not in got:
            assert name.startswith("decoder."), name
            continue
        by = 1.0 if name.startswith("parts.prior.") else weight
        torch.testing.assert_close(got[name], by * p.grad, rtol=1e-4, atol=1e-9)
    assert not any(name.startswith("decoder.") for name in got)


def test_prior_teaches_the_noise_to_the_encoders_distribution(image_folder):
    """So that an export draws latents like those of training."""
    model = with_prior(initial_logvar=-3.0, learning_rate=3e-2)
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])

    def distance() -> float:
        return (model.encode(x).logvar + 5.0).abs().mean().item()

    before = distance()
    fit(model, image_folder, 20)
    assert distance() < before / 2


def test_bits_of_an_image_do_not_depend_on_its_batch(image_folder):
    model = with_prior().eval()
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    with torch.no_grad():
        whole = model.parts["prior"].validate(model, x, None)["bits_per_image"]
        torch.rand(7)
        each = [model.parts["prior"].validate(model, x[i : i + 1], None) for i in (2, 0, 3, 1)]
    mean = torch.stack([values["bits_per_image"] for values in each]).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-5, atol=0.0)

    # The integral by other noise, at many levels; of mirrored images too, whose noise is another.
    x = torch.cat([x, x.flip(2), x.flip(3), x.flip(2, 3), x.mT, x.mT.flip(2), x.mT.flip(3)])
    z = model.encode(x).mean.detach().repeat(100, 1, 1, 1)
    with torch.no_grad():
        whole = model.parts["prior"].validate(model, x, None)["bits_per_image"]
        nats = model.parts["prior"](z, torch.rand(len(z)), torch.randn_like(z)).mean()
    assert whole.item() * math.log(2) == pytest.approx(nats.item(), rel=0.15)


# What contradicts it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossconfig": objective()}, r"kl_weight: .*set it to 0"),
        ({"sample_posterior": True}, "sample_posterior: .*set it to false"),
        ({"freeze_encoder": True}, r"the latents can't change \(freeze_encoder\)"),
        ({"parts": parts(anchor={})}, r"the latents can't change \(parts.anchor\)"),
        (
            {"parts": parts(equivariance={}), "prior": {"patch": 2}},
            "params.patch: parts.equivariance makes latents of other sides.*set it to 1",
        ),
        ({"prior": {"width": 40}}, "width must be a multiple of 32, got 40"),
        ({"prior": {"weight": 0}}, "weight must be above 0, got 0"),
        ({"prior": {"depth": 0}}, "depth must be at least 1, got 0"),
    ],
)
def test_prior_refuses_settings_that_contradict_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        with_prior(**settings)


def test_prior_of_single_positions_is_for_latents_of_any_sides():
    assert with_prior({"patch": 1}, parts=parts(equivariance={})).parts["prior"].patch == 1
    # Positions are embedded as of 16x16 tokens, whatever their size.
    for patch in (1, 2):
        network = with_prior({"patch": patch}).parts["prior"].denoiser.network
        assert network.config.sample_size == 16 * patch


@pytest.mark.parametrize("size", [[16, 32], 24])
def test_prior_refuses_images_whose_latents_are_not_divided(size, image_folder):
    model = with_prior({"patch": 2})
    with pytest.raises(ConfigError, match=r"prior.params.patch: latents of .* data.params.size"):
        model.check(source(image_folder, size=size))
