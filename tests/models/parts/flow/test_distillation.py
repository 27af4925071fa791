"""Distillation: its target in float64 by hand, the frozen copy, and what contradicts it."""

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.models.updates.optimizers import mix_seeds
from tests.models.parts.flow.generating import generates, nodes, one_step_config, vary
from tests.models.steps import WITHOUT_KL, assert_same, build, fit, metrics, moved, snapshot, source


def images(folder) -> torch.Tensor:
    return from_uint8(next(iter(source(folder).train_loader()))["image"])


def distils(params: dict | None = None, **model):
    """A model with random weights whose copy has been taken, as before a run's first step."""
    model = vary(generates(nodes(distillation=params or {}), **model))
    model.parts["distillation"].prepare(model, None, 0, torch.device("cpu"))
    return model


def test_distillation_step_by_hand_in_float64(image_folder):
    """Three Euler steps of the copy against one of the decoder, which has moved on."""
    model = distils({"steps": 3, "weight": 0.4}).double().eval()
    teacher = model.parts["distillation"].teacher
    vary(model, std=0.08)
    x = images(image_folder).double()
    z = model.encode(x).mean
    step = type("Decoded", (), {"latent": z, "target": x})
    torch.manual_seed(5)
    loss, weight = model.parts["distillation"].losses(model, step)["distil"]

    torch.manual_seed(5)
    noise = torch.randn_like(x)
    start = teacher.linear_path(z) + teacher.noise_std * noise
    picture = start
    for t, earlier in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        at = torch.full((4,), t, dtype=torch.float64)
        velocity = (picture - teacher(z, picture, at)) / t
        picture = picture + (earlier - t) * velocity
    first = model.decoder.linear_path(z) + model.decoder.noise_std * noise
    own = model.decoder(z, first, torch.ones(4, dtype=torch.float64))
    wanted = (((own - picture) / model.decoder.noise_std) ** 2).mean()
    assert weight == 0.4
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)


def test_copy_is_the_decoder_before_the_first_step_and_stays(image_folder):
    model = distils(freeze_encoder=True, lossconfig=WITHOUT_KL)
    decoder = snapshot(model.decoder)
    assert_same(snapshot(model.parts["distillation"].teacher), decoder)
    fit(model, image_folder, 3)
    assert_same(snapshot(model.parts["distillation"].teacher), decoder)
    changed = moved(decoder, snapshot(model.decoder))
    assert {f"injections.{i}.conv.weight" for i in range(len(model.decoder.injections))} <= changed
    # The copy trains nothing, is in no export, and is no parameter that an optimizer has.
    own = {id(p) for p in model.parts.parameters()}
    assert not own & {id(p) for p in model.autoencoder_parameters()}
    assert not any("teacher" in name for name in model.autoencoder.state_dict())


def test_gradient_of_distillation_reaches_the_decoder_and_the_latent_alone(image_folder):
    model = distils()
    x = images(image_folder)
    step = type("Decoded", (), {"latent": model.encode(x).mean, "target": x})
    loss, _ = model.parts["distillation"].losses(model, step)["distil"]
    loss.backward()
    for name, p in model.named_parameters():
        if name.startswith("decoder."):
            assert p.grad is not None, name
        elif name.startswith("parts."):
            assert p.grad is None, name
    assert model.encoder.extractors[0].init_conv.weight.grad.abs().max() > 0


def test_distillation_step_is_logged_beside_the_image_losses(image_folder):
    model = distils({"steps": 2, "weight": 0.7})
    x = images(image_folder)
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    posterior = model.encode(x)
    z = posterior.sample()
    total, _ = model.objective(x, model.decode(z), posterior)
    step = type("Decoded", (), {"latent": z, "target": x})
    loss, _ = model.parts["distillation"].losses(model, step)["distil"]
    values = metrics(fit(model, image_folder, 1))
    assert values["train/distil"] == pytest.approx(loss.item(), rel=1e-4)
    assert values["train/loss"] == pytest.approx((total + 0.7 * loss).item(), rel=1e-4)


def test_one_step_comes_nearer_to_several(image_folder):
    model = distils(
        {"steps": 2, "weight": 1.0}, freeze_encoder=True, lossconfig=WITHOUT_KL, learning_rate=2e-3
    )
    x = images(image_folder)
    z = model.encode(x).mean
    noise = torch.randn_like(x)

    def distance() -> float:
        with torch.no_grad():
            wanted = model.parts["distillation"].teacher.sample(z, noise, 2)
            return (model.decoder.sample(z, noise, 1) - wanted).square().mean().item()

    before = distance()
    fit(model, image_folder, 8)
    assert distance() < 0.9 * before


def test_copy_has_no_dropout(image_folder):
    model = distils(decoder_config=one_step_config(dropout=0.5)).train()
    part = model.parts["distillation"]
    assert model.decoder.training
    assert part.training
    assert not part.teacher.training
    z = model.encode(images(image_folder)).mean
    noise = torch.randn_like(images(image_folder))
    assert torch.equal(part.teacher.sample(z, noise, 2), part.teacher.sample(z, noise, 2))
    model.eval()
    assert not part.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"weight": -0.5}, "weight must not be negative, got -0.5"),
    ],
)
def test_distillation_refuses_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        generates(nodes(distillation=settings))


def test_distillation_needs_a_decoder_that_generates_and_learns():
    with pytest.raises(ConfigError, match=r"parts\.distillation: LiteVAE_Decoder .*noise"):
        build(parts=nodes(distillation={}))
    with pytest.raises(ConfigError, match=r"parts\.distillation: .*frozen"):
        generates(nodes(distillation={}), freeze_decoder=True)


def test_distillation_needs_a_decoder_that_has_learned_to_undo_noise():
    """Its several steps would be one, blurred by noise that nothing takes away."""
    model = generates(nodes(distillation={}))
    with pytest.raises(ConfigError, match="with FlowMatching"):
        model.parts["distillation"].prepare(model, None, 0, torch.device("cpu"))
