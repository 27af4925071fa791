"""Spectrum matching: the divergence by scipy's transform, whom it trains, and what contradicts."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from olvae.config import ConfigError
from olvae.models.parts.statistics.spectrum_matching import SpectrumMatching
from study.predictors import spectrum_divergence
from tests.conftest import parts
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, snapshot, source


def spectrum_by_hand(x: np.ndarray) -> np.ndarray:
    """Mean power in each of 16 rings, of (N, C, h, w) with mean 0 and variance 1."""
    x = (x - x.mean()) / x.std()
    power = (dctn(x, axes=(2, 3), norm="ortho") ** 2).mean((0, 1))
    height, width = power.shape
    u, v = np.mgrid[:height, :width]
    ring = (16 * np.hypot(u / height, v / width) / 2**0.5 + 1e-9).astype(int)
    return np.array([power[ring == i].mean() if (ring == i).any() else 0.0 for i in range(16)])


def divergence_by_hand(images: np.ndarray, z: np.ndarray, delta: float) -> float:
    height, width = z.shape[-2:]
    sides = images.shape[-2] // height, images.shape[-1] // width
    blocks = images.reshape(*images.shape[:2], height, sides[0], width, sides[1])
    small = blocks.mean((3, 5))
    target = spectrum_by_hand(small) * ((np.arange(16) + 0.5) / 16) ** delta
    u, v = np.mgrid[:height, :width]
    ring = (16 * np.hypot(u / height, v / width) / 2**0.5 + 1e-9).astype(int)
    target /= target[ring].mean()
    p, q = np.log1p(target), np.log1p(spectrum_by_hand(z))
    there = np.isin(np.arange(16), ring)
    p, q = p[there] / p.sum(), q[there] / q.sum()
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("delta", [0.0, 1.0, 0.7])
def test_loss_is_the_formula_in_float64(delta):
    images = torch.randn(4, 3, 40, 64, dtype=torch.float64)
    z = 3.0 + 2.0 * torch.randn(4, 5, 10, 16, dtype=torch.float64).cumsum(-1)
    wanted = divergence_by_hand(images.numpy(), z.numpy(), delta)
    part = SpectrumMatching(delta=delta)
    assert part(images, z).item() == pytest.approx(wanted, rel=1e-6)
    assert part(images.float(), z.float()).item() == pytest.approx(wanted, rel=1e-4)
    assert part(images, 0.01 * z - 7.0).item() == pytest.approx(wanted, rel=1e-6)


def test_loss_is_the_predictor_of_the_study():
    """But for the variance of a sample, with which the study scales."""
    images = torch.randn(50, 3, 64, 64)
    z = torch.randn(50, 4, 8, 8)
    study = spectrum_divergence(z, torch.nn.functional.avg_pool2d(images, 8))
    assert SpectrumMatching()(images, z).item() == pytest.approx(study, rel=1e-3)


def test_gradient_is_that_of_differences():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    z = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: SpectrumMatching()(images, z), z)


def test_step_by_hand_trains_the_encoder(image_folder):
    given = {"weight": 0.7, "delta": 0.5}
    model = build(parts=parts(spectrum_matching=given), lossconfig=WITHOUT_KL)
    x = model.images(next(iter(source(image_folder).train_loader())))
    z = model.encode(x).mean.detach()
    wanted = divergence_by_hand(x.double().numpy(), z.double().numpy(), 0.5)

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/spectrum"] == pytest.approx(wanted, rel=1e-4)
    total = values["train/rec"] + values["train/wavelet"] + 0.5 * values["train/gaussian"]
    assert values["train/loss"] == pytest.approx(total + 0.7 * wanted, rel=1e-5)
    assert any(name.startswith("encoder.") for name in moved(before, snapshot(model)))


def test_gradient_reaches_the_encoder_alone(image_folder):
    model = build(parts=parts(spectrum_matching={}), lossconfig=WITHOUT_KL)
    x = model.images(next(iter(source(image_folder).train_loader())))
    step = type("Encoded", (), {"encoded": model.encode(x), "images": x})
    loss, _ = model.parts["spectrum_matching"].losses(model, step)["spectrum"]
    loss.backward(inputs=[*model.parameters()])
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got
    assert all(name.startswith("encoder.") for name in got)


def test_a_latent_learns_the_target_spectrum():
    torch.manual_seed(0)
    part = SpectrumMatching()
    images = torch.randn(8, 3, 64, 64).cumsum(-1).cumsum(-2)
    z = torch.randn(8, 4, 16, 16, requires_grad=True)
    before = part(images, z).item()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = part(images, z)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * before


def test_blank_images_give_no_loss_and_no_gradient():
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    loss = SpectrumMatching()(torch.zeros(2, 3, 32, 32), z)
    loss.backward()
    assert loss.item() == 0.0
    assert not z.grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_encoder": True}, r"the latents can't change \(freeze_encoder\)"),
        (
            {"parts": parts(spectrum_matching={}, anchor={})},
            r"the latents can't change \(parts.anchor\)",
        ),
        ({"parts": parts(spectrum_matching={"weight": -1})}, "weight must not be negative"),
        ({"parts": parts(spectrum_matching={"delta": -1})}, "delta must not be negative"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**{"parts": parts(spectrum_matching={}), "lossconfig": WITHOUT_KL, **settings})
