"""Flow matching: its target in float64 by hand, whom it trains, and what contradicts it."""

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.models.parts.flow.flow_matching import FIRST_T, TIMES, flow_error
from olvae.models.updates.optimizers import mix_seeds
from olvae.modules.distributions import draws_by_image
from tests.models.parts.flow.generating import generates, nodes, vary
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, snapshot, source


def images(folder) -> torch.Tensor:
    return from_uint8(next(iter(source(folder).train_loader()))["image"])


# The error


def test_flow_error_by_hand_in_float64(image_folder):
    """The velocity from the decoder's estimate, against the straight line's, in units."""
    model = vary(generates()).double().eval()
    decoder = model.decoder
    x = images(image_folder).double()
    z = model.encode(x).mean.detach()
    noise = torch.randn_like(x)
    t = torch.tensor([0.02, 0.3, 0.8, 1.0], dtype=torch.float64)

    start = decoder.linear_path(z) + decoder.noise_std * noise
    wanted = []
    for i, at in enumerate(t.tolist()):
        noised = (1 - at) * x[i] + at * start[i]
        estimate = decoder(z[i : i + 1], noised[None], t[i : i + 1])[0]
        velocity = (noised - estimate) / at
        error = (velocity - (start[i] - x[i])) / decoder.noise_std
        wanted.append((error**2).mean())
    found = flow_error(decoder, z, x, noise, t)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=1e-12)

    # Equally: the error of the estimate, over the time.
    at = t[:, None, None, None]
    estimate = decoder(z, (1 - at) * x + at * start, t)
    other = ((estimate - x) / at / decoder.noise_std).square().mean((1, 2, 3))
    torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-12)


def test_flow_error_of_the_image_itself_is_zero(image_folder):
    model = generates()
    x = images(image_folder)
    z = model.encode(x).mean
    perfect = type(
        "Perfect",
        (),
        {
            "noise_std": 0.1,
            "start": lambda self, z, noise: 0.1 * noise,
            "velocity": lambda self, z, noised, t: (noised - x) / t[:, None, None, None],
        },
    )()
    error = flow_error(perfect, z, x, torch.randn_like(x), torch.full((4,), 0.5))
    assert error.max() < 1e-9


def test_line_is_a_constant_for_the_gradient(image_folder):
    """The latent learns by what the network sees of it, and the first picture's path as well."""
    model = vary(generates()).double()
    decoder = model.decoder.eval()
    x = images(image_folder).double()
    noise = torch.randn_like(x)
    t = torch.full((4,), 0.4, dtype=torch.float64)
    z = model.encode(x).mean.detach().requires_grad_()
    flow_error(decoder, z, x, noise, t).sum().backward()

    start = decoder.start(z.detach(), noise)
    noised = 0.6 * x + 0.4 * start
    other = z.detach().requires_grad_()
    velocity = (noised - decoder(other, noised, t)) / 0.4
    (((velocity - start + x) / decoder.noise_std) ** 2).mean((1, 2, 3)).sum().backward()
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-8, atol=1e-12)


# A step


def test_flow_matching_step_by_hand(image_folder):
    """The image losses see one step from the decoder's noise, the flow its own noise and times."""
    model = vary(generates(nodes(flow={"weight": 0.3})))
    x = images(image_folder)
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    posterior = model.encode(x)
    z = posterior.sample()
    total, _ = model.objective(x, model.decode(z), posterior)
    t = 1 - (1 - FIRST_T) * torch.rand(len(z))
    flow = flow_error(model.decoder, z, x, torch.randn_like(x), t).mean()

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/flow"] == pytest.approx(flow.item(), rel=1e-5)
    assert values["train/loss"] == pytest.approx((total + 0.3 * flow).item(), rel=1e-5)
    changed = moved(before, snapshot(model))
    assert any(name.startswith("encoder.") for name in changed)
    for index in range(len(model.decoder.injections)):
        assert f"decoder.injections.{index}.conv.weight" in changed
        assert f"decoder.injections.{index}.time.weight" in changed


def test_decoder_learns_to_undo_noise(image_folder):
    """Also with a frozen encoder, which stays as it was."""
    model = generates(
        nodes(flow={"weight": 1.0}), freeze_encoder=True, lossconfig=WITHOUT_KL, learning_rate=6e-3
    )
    x = images(image_folder)

    def error() -> float:
        with torch.no_grad():
            return model.parts["flow"].validate(model, x, None)["flow"].item()

    before = snapshot(model)
    first = error()
    fit(model, image_folder, 10)
    assert error() < 0.9 * first
    assert all(name.startswith("decoder.") for name in moved(before, snapshot(model)))


def test_validated_flow_does_not_depend_on_the_batch(image_folder):
    model = vary(generates()).eval()
    x = images(image_folder)
    part = model.parts["flow"]
    with torch.no_grad():
        whole = part.validate(model, x, None)["flow"]
        torch.rand(7)
        each = [part.validate(model, x[i : i + 1], None)["flow"] for i in (2, 0, 3, 1)]
    torch.testing.assert_close(torch.stack(each).mean(), whole, rtol=1e-5, atol=0.0)

    # By hand, at even times from each image's own.
    with torch.no_grad():
        z, (start, noise) = model.encode(x).mean, draws_by_image(x, x.shape[1:])
        errors = []
        for level in range(TIMES):
            t = FIRST_T + (1 - FIRST_T) * (1 - (start + level / TIMES).frac())
            errors.append(flow_error(model.decoder, z, x, noise, t).mean())
    torch.testing.assert_close(whole, torch.stack(errors).mean(), rtol=1e-5, atol=0.0)

    # The mean over times and noise, by others.
    with torch.no_grad():
        z = model.encode(x).mean.repeat(200, 1, 1, 1)
        x = x.repeat(200, 1, 1, 1)
        t = 1 - (1 - FIRST_T) * torch.rand(len(z))
        mean = flow_error(model.decoder, z, x, torch.randn_like(x), t).mean()
    assert whole.item() == pytest.approx(mean.item(), rel=0.15)


# What contradicts it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_decoder": True}, r"parts.flow: the decoder is frozen \(freeze_decoder\)"),
        ({"parts": nodes(flow={"weight": -1.0})}, "weight must not be negative, got -1.0"),
    ],
)
def test_flow_matching_refuses_settings_that_contradict_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        generates(settings.pop("parts", None), **settings)


def test_flow_matching_needs_a_decoder_that_generates():
    with pytest.raises(ConfigError, match=r"LiteVAE_Decoder .*one_step\.OneStepDec"):
        build(parts=nodes(flow={}))
