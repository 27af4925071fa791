"""Turned latents: their angles and lengths, the cascade of images by hand, and its gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.features.continuity import Continuity, turned
from tests.models.steps import build, fit, metrics, objective, source

PIXELS = objective(wavelet_weight=0, gaussian_weight=0, rec_weight=2.0)


def continuous(**params) -> LiteAutoencoderKL:
    target = "olvae.models.parts.features.continuity.Continuity"
    node = {"target": target, "params": params}
    return build(parts={"continuity": node}, lossconfig=PIXELS, initial_logvar=-4.0)


@pytest.mark.parametrize("angle", [1.0, 42.5, 85.0, 180.0])
def test_each_position_is_turned_by_the_angle_and_keeps_its_length(angle):
    torch.manual_seed(0)
    z = 0.1 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    noise = 0.1 * torch.randn_like(z)
    found = turned(z, noise, angle)
    cosine = F.cosine_similarity(z, found, dim=1)
    wanted = torch.tensor(angle, dtype=torch.float64).deg2rad().cos().expand_as(cosine)
    torch.testing.assert_close(cosine, wanted)
    torch.testing.assert_close(found.norm(dim=1), z.norm(dim=1))
    if angle < 180:  # towards the noise
        assert ((found - cosine[:, None] * z) * noise).sum(1).min() > 0
    # Both angles turn in one direction.
    further = turned(z, noise, angle / 2)
    between = F.cosine_similarity(further, found, dim=1).acos().rad2deg()
    torch.testing.assert_close(between, torch.full_like(between, angle / 2), rtol=0, atol=1e-4)


def first_step(model, image_folder) -> SimpleNamespace:
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    latent = model.encode(x).mean
    return SimpleNamespace(images=x, latent=latent, reconstruction=model.decode(latent))


def test_each_image_is_compared_with_the_one_before_by_hand(image_folder):
    model = continuous(weight=0.7)
    step = first_step(model, image_folder)
    torch.manual_seed(5)
    ((loss, weight),) = model.parts["continuity"].losses(model, step).values()
    torch.manual_seed(5)
    noise = torch.randn_like(step.latent)
    one = model.decode(turned(step.latent, noise, 42.5))
    two = model.decode(turned(step.latent, noise, 85.0))
    by_hand = 2 * (one - step.reconstruction).abs().mean() + 2 * (two - one).abs().mean()
    torch.testing.assert_close(loss, by_hand)
    assert weight == 0.7


def test_images_before_get_no_gradient_and_both_halves_do(image_folder):
    model = continuous()
    step = first_step(model, image_folder)
    step.reconstruction = step.reconstruction.detach().requires_grad_()
    ((loss, _),) = model.parts["continuity"].losses(model, step).values()
    loss.backward()
    assert step.reconstruction.grad is None
    for half in ("encoder", "decoder"):
        assert any(
            p.grad is not None and p.grad.any() for p in getattr(model, half).parameters()
        ), half


def test_continuity_is_logged_and_trains(image_folder):
    model = fit(continuous(), image_folder, 2, precision="bf16-mixed")
    assert metrics(model)["train/continuity"] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"angles": [42.5]}, "angles must be two, 0 < first < second <= 180"),
        ({"angles": [85, 42.5]}, "angles must be two"),
        ({"angles": [1, 2, 3]}, "angles must be two"),
        ({"angles": [0, 85]}, "angles must be two"),
        ({"angles": [1, 180.5]}, "angles must be two"),
        ({"weight": -1}, "weight must not be negative"),
    ],
)
def test_continuity_refuses_wrong_arguments(params, message):
    with pytest.raises(ConfigError, match=message):
        continuous(**params)


def test_angles_are_up_to_a_half_turn():
    assert Continuity(angles=[0.5, 180]).angles == [0.5, 180.0]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_latent_of_one_channel_has_no_direction(channels):
    model = SimpleNamespace(
        freeze_decoder=False,
        loss_weights={"rec": 1.0},
        autoencoder=SimpleNamespace(latent_channels=channels),
    )
    assert len(list(Continuity().conflicts(model))) == (channels == 1)


def test_continuity_needs_a_loss_that_compares_images():
    node = {"target": "olvae.models.parts.features.continuity.Continuity"}
    alone = objective(rec_weight=0, wavelet_weight=0, gaussian_weight=0)
    with pytest.raises(ConfigError, match=r"parts\.continuity: no loss"):
        build(parts={"continuity": node}, lossconfig=alone)
