"""Local correlation: Pearson's by numpy, the adaptive weight, and what contradicts it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from olvae.config import ConfigError
from olvae.losses.objective import IMAGE_TERMS
from olvae.models.parts.statistics.local_correlation import LocalCorrelation
from olvae.modules.base import last_convolution
from tests.conftest import parts
from tests.models.steps import build, fit, metrics, moved, objective, snapshot, source


def correlation_by_hand(z: np.ndarray, window: int) -> float:
    z = (z - z.mean((0, 2, 3), keepdims=True)) / z.std((0, 2, 3), keepdims=True)
    found = []
    for latent in z:
        for top in range(0, z.shape[2] - window + 1, window):
            for left in range(0, z.shape[3] - window + 1, window):
                inside = latent[:, top : top + window, left : left + window]
                matrix = np.corrcoef(inside.reshape(len(latent), -1).T)
                found.append(matrix[np.triu_indices(window**2, 1)].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("window", [2, 3])
def test_correlation_is_numpys_of_scaled_channels(window):
    scale = torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0])[:, None, None]
    z = 2.0 + scale * torch.randn(3, 5, 6, 9).cumsum(-1)
    wanted = correlation_by_hand(z.double().numpy(), window)
    part = LocalCorrelation(window=window)
    assert part(z.double()).item() == pytest.approx(wanted, rel=1e-9)
    assert part(z).item() == pytest.approx(wanted, rel=1e-4)


def batch(model, folder):
    x = model.images(next(iter(source(folder).train_loader())))
    return type("Encoded", (), {"encoded": model.encode(x), "images": x, "target": x})


def test_loss_is_what_is_left_to_the_threshold(image_folder):
    for threshold in (1.0, -0.99):
        given = {"threshold": threshold, "adaptive_weight": False, "weight": 0.3}
        model = build(parts=parts(local_correlation=given))
        step = batch(model, image_folder)
        found = correlation_by_hand(step.encoded.mean.detach().double().numpy(), 2)
        assert -0.9 < found < 0.99
        loss, weight = model.parts["local_correlation"].losses(model, step)["local_correlation"]
        assert weight == 0.3
        assert loss.item() == pytest.approx(max(0.0, threshold - found), abs=1e-5)


def test_gradient_reaches_the_encoder_alone(image_folder):
    given = {"threshold": 1.0, "adaptive_weight": False}
    model = build(parts=parts(local_correlation=given))
    step = batch(model, image_folder)
    loss, _ = model.parts["local_correlation"].losses(model, step)["local_correlation"]
    loss.backward(inputs=[*model.parameters()])
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got
    assert all(name.startswith("encoder.") for name in got)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_encoders_last_layer(image_folder):
    model = build(parts=parts(local_correlation={"threshold": 1.0}), sample_posterior=False)
    x = model.images(next(iter(source(image_folder).train_loader())))
    posterior = model.encode(x)
    _, terms = model.objective(x, model.decode(posterior.mean), posterior)
    loss = torch.relu(1.0 - model.parts["local_correlation"](posterior.mean))
    last = last_convolution(model.encoder).weight
    image_terms = model.objective.weighted(terms, *IMAGE_TERMS)
    (one,) = torch.autograd.grad(image_terms, last, retain_graph=True)
    (other,) = torch.autograd.grad(loss, last)
    factor = (one.double().norm() / other.double().norm()).item()

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/local_correlation"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["health/local_correlation"] == pytest.approx(1.0 - loss.item(), rel=1e-4)
    total = sum(model.loss_weights[name] * values[f"train/{name}"] for name in model.loss_weights)
    wanted = total + 0.002 * factor * loss.item()
    assert values["train/loss"] == pytest.approx(wanted, rel=1e-5)
    assert any(name.startswith("encoder.") for name in moved(before, snapshot(model)))


def test_correlation_grows(image_folder):
    given = {"threshold": 1.0, "weight": 1.0, "adaptive_weight": False}
    model = build(parts=parts(local_correlation=given), learning_rate=2e-2)
    before = model.parts["local_correlation"](batch(model, image_folder).encoded.mean).item()
    fit(model, image_folder, 10)
    after = model.parts["local_correlation"](batch(model, image_folder).encoded.mean).item()
    assert after > before + 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_encoder": True}, r"the latents can't change \(freeze_encoder"),
        (
            {"parts": parts(local_correlation={}, anchor={})},
            r"the latents can't change \(parts.anchor\)",
        ),
        (
            {"lossconfig": objective(rec_weight=0, wavelet_weight=0, gaussian_weight=0)},
            "adaptive_weight: no loss compares images: set it to false",
        ),
        ({"parts": parts(local_correlation={"weight": -1})}, "weight must not be negative"),
        ({"parts": parts(local_correlation={"threshold": 2})}, "threshold must be a correlation"),
        ({"parts": parts(local_correlation={"window": 1})}, "window must be at least 2"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**{"parts": parts(local_correlation={}), **settings})


def test_sizes_without_a_window_are_refused(image_folder):
    model = build(parts=parts(local_correlation={"window": 4}))
    with pytest.raises(ConfigError, match=r"2 .*window of 4"):
        model.check(source(image_folder))
    model.check(source(image_folder, size=32))


@pytest.mark.parametrize("channels", [1, 2])
def test_one_channel_has_no_correlation(channels):
    model = SimpleNamespace(
        freeze_encoder=False,
        each_part=[],
        loss_weights={"rec": 1.0},
        autoencoder=SimpleNamespace(latent_channels=channels),
    )
    assert len(list(LocalCorrelation().conflicts(model))) == (channels == 1)
    assert LocalCorrelation().describe() == "up to 0.75, weight 0.002, adaptive"
    plain = LocalCorrelation(weight=0.5, adaptive_weight=False)
    assert plain.describe() == "up to 0.75, weight 0.5"


def test_sizes_that_equivariance_shrinks_below_a_window_are_refused(image_folder):
    """16 pixels are 2 positions, and a quarter of them is 1; of 64 pixels it is a window of 2."""
    model = build(parts=parts(local_correlation={}, equivariance={}))
    with pytest.raises(ConfigError, match=r"parts\.equivariance .*2 "):
        model.check(source(image_folder))
    for size in (40, 64):
        model.check(source(image_folder, size=size))


def test_a_threshold_is_a_correlation():
    for threshold in (-0.99, 0.0, 1.0):
        assert LocalCorrelation(threshold=threshold).threshold == threshold
    for threshold in (-1.0, -2.0, 1.01):
        with pytest.raises(ValueError, match=rf"threshold .*{threshold}"):
            LocalCorrelation(threshold=threshold)
