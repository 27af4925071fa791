"""Anchor: the distance from the latents that training started from."""

import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.parts.anchor import Anchor
from olvae.models.parts.part import Step
from olvae.modules.distributions import DiagonalGaussian
from tests.conftest import parts, tiny
from tests.models.steps import (
    WITHOUT_KL,
    Each,
    against,
    assert_same,
    build,
    fit,
    metrics,
    moved,
    snapshot,
)


def anchor_of(vae: LiteVAE) -> Anchor:
    anchor = Anchor()
    anchor.attach(vae)  # which has what a model has here
    return anchor


def distance(anchor: Anchor, x: Tensor, posterior: DiagonalGaussian) -> Tensor:
    step = Step(x, None, None, warming_up=False, adversary_plays=False)
    step.encoded = posterior
    (loss, _), *_ = anchor.losses(None, step).values()
    return loss


def drift(vae: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("use_quant", [False, True])
def test_anchor_distance_is_zero_at_first_and_then_that_of_the_means(use_quant):
    vae = tiny(use_quant=use_quant).train()
    anchor, x = anchor_of(vae), torch.rand(3, 3, 16, 16)
    old = vae.encode(x).mean.detach()
    assert distance(anchor, x, vae.encode(x)).item() == 0.0
    drift(vae)
    posterior = vae.encode(x)
    by_hand = ((posterior.mean - old).double() ** 2).sum() / (3 * 4 * 2 * 2)  # (B, n_z, h, w)
    assert by_hand > 1e-4
    assert distance(anchor, x, posterior).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_anchor_gradients_reach_the_encoder_and_not_the_copy():
    vae = tiny(use_quant=True).train()
    anchor, x = anchor_of(vae), torch.rand(2, 3, 16, 16)
    drift(vae)
    distance(anchor, x, vae.encode(x)).backward()
    for name, p in [*vae.encoder.named_parameters(), *vae.quantizer.quant_conv.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in anchor.parameters())
    assert all(p.grad is None for p in vae.decoder.parameters())


def test_anchor_compares_bf16_means_in_float32():
    vae = tiny().train()
    anchor, x = anchor_of(vae), torch.rand(1, 3, 16, 16)
    drift(vae)
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(anchor, x, vae.encode(x))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(distance(anchor, x, vae.encode(x)).item(), rel=0.1)


def test_the_anchor_is_where_training_started(image_folder):
    """From whatever weights were loaded after the model was built."""
    model = build(
        against(), parts=parts(anchor={"weight": 1e-6}), use_quant=True, learning_rate=1e-3
    )
    anchors = []
    drift(model.encoder)
    start = snapshot(model.encoder)

    def look(m) -> None:
        assert_same(snapshot(m.parts["anchor"].moments[0]), start)
        anchors.append(metrics(m)["train/anchor"])

    fit(model, image_folder, 8, log_every_n_steps=1, callbacks=[Each(look)])
    assert anchors[0] == 0.0
    assert min(anchors[1:]) > 0
    assert sum(anchors[-4:]) / 4 > 1.5 * anchors[1]  # it grows, as much as batches differ
    assert len(moved(start, snapshot(model.encoder))) > 0.9 * len(start)
    assert not model.parts["anchor"].training


def test_anchor_refuses_a_negative_weight_and_a_frozen_encoder():
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        Anchor(-1.0)
    with pytest.raises(ConfigError, match=r"parts\.anchor: the encoder is frozen"):
        build(parts=parts(anchor={}), freeze_encoder=True, lossconfig=WITHOUT_KL)


def test_the_anchor_is_in_the_loss(image_folder):
    values = metrics(
        fit(build(parts=parts(anchor={"weight": 7.0}), learning_rate=1e-3), image_folder, 3)
    )
    weights = build().objective.weights
    expected = (
        sum(weight * values[f"train/{name}"] for name, weight in weights.items())
        + 7 * values["train/anchor"]
    )
    assert values["train/anchor"] > 0
    assert values["train/loss"] == pytest.approx(expected, rel=1e-5)
