"""Variance expansion: its formula, its balance with the image terms, and what contradicts it."""

import numpy as np
import pytest
import torch

from olvae.config import ConfigError
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.statistics.variance_expansion import VarianceExpansion
from olvae.modules.base import last_convolution
from tests.conftest import parts
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, objective, snapshot, source

DETERMINISTIC = {
    "target": "olvae.modules.others.tiny.TinyEncoder",
    "params": {"latent_dim": 4},
}


def expanding(given: dict | None = None, **model) -> LiteAutoencoderKL:
    nodes = {**parts(variance_expansion=given or {}), **model.pop("parts", {})}
    return build(parts=nodes, **{"lossconfig": WITHOUT_KL, **model})


def test_loss_is_the_formula_in_float64():
    logvar = 3.0 * torch.randn(2, 4, 3, 3)
    by_hand = np.mean(1.0 / (np.exp(logvar.double().numpy()) + 0.02))
    assert VarianceExpansion(delta=0.02)(logvar).item() == pytest.approx(by_hand, rel=1e-6)
    assert VarianceExpansion(delta=0.02)(logvar.bfloat16()).dtype == torch.float32


def test_loss_balances_a_cost_of_the_variance_where_its_docstring_says():
    """Of a cost a v the minimum is at v + delta = sqrt(weight / a)."""
    part = VarianceExpansion(weight=1e-2, delta=0.01)
    balance = (1e-2 / 0.5) ** 0.5 - 0.01
    variance = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) * balance
    slopes = []
    for v in variance:
        logvar = v.log().requires_grad_()
        (0.5 * logvar.exp() + part.weight * part(logvar)).backward()
        slopes.append(logvar.grad.item())
    assert slopes[0] < -1e-3
    assert slopes[1] == pytest.approx(0.0, abs=1e-12)
    assert slopes[2] > 1e-3


def test_step_by_hand_trains_the_encoders_variances(image_folder):
    model = expanding({"weight": 0.3, "delta": 0.1})
    x = model.images(next(iter(source(image_folder).train_loader())))
    logvar = model.encode(x).logvar
    by_hand = (1.0 / (logvar.double().exp() + 0.1)).mean().item()

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/variance_expansion"] == pytest.approx(by_hand, rel=1e-5)
    total = values["train/rec"] + values["train/wavelet"] + 0.5 * values["train/gaussian"]
    assert values["train/loss"] == pytest.approx(total + 0.3 * by_hand, rel=1e-5)
    assert any(name.startswith("encoder.") for name in moved(before, snapshot(model)))


def test_gradient_reaches_the_encoders_variances_alone(image_folder):
    model = expanding()
    x = model.images(next(iter(source(image_folder).train_loader())))
    posterior = model.encode(x)
    step = type("Encoded", (), {"encoded": posterior})
    loss, _ = model.parts["variance_expansion"].losses(model, step)["variance_expansion"]
    loss.backward(inputs=[*model.parameters()])
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got
    assert not any(name.startswith("decoder.") for name in got)
    # The last convolution's first half of outputs are means.
    means, variances = last_convolution(model.encoder).weight.grad.chunk(2)
    assert not means.any()
    assert variances.any()


def test_variances_grow(image_folder):
    model = expanding({"weight": 1.0}, initial_logvar=-6.0, learning_rate=6e-2)
    x = model.images(next(iter(source(image_folder).train_loader())))
    before = model.encode(x).logvar.mean().item()
    fit(model, image_folder, 5)
    assert model.encode(x).logvar.mean().item() > before + 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossconfig": objective()}, r"kl_weight: parts.variance_expansion .*set it to 0"),
        ({"sample_posterior": False}, "sample_posterior: .*set it to true"),
        ({"freeze_encoder": True}, r"the latents can't change \(freeze_encoder\)"),
        ({"parts": parts(anchor={})}, r"the latents can't change \(parts.anchor\)"),
        ({"encoder_config": DETERMINISTIC}, "latents have no distribution: leave it out"),
        ({"given": {"weight": -1}}, "weight must not be negative, got -1"),
        ({"given": {"delta": 0}}, "delta must be above 0, got 0"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        expanding(**settings)
