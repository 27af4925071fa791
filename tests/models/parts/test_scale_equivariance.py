"""ScaleEquivariance: a step by hand, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from skimage.measure import block_reduce

from olvae.config import ConfigError
from olvae.models.parts.scale_equivariance import ScaleEquivariance, shrink
from olvae.models.updates.optimizers import mix_seeds
from tests.conftest import parts
from tests.models.steps import build, fit, metrics, source


@pytest.mark.parametrize("factor", [2, 4])
def test_scale_equivariance_shrinks_to_the_means_of_blocks(factor):
    x = torch.rand(2, 3, 16, 8, dtype=torch.float64)
    expected = block_reduce(
        x.numpy(), (1, 1, factor, factor), lambda blocks, axis: blocks.mean(axis)
    )
    torch.testing.assert_close(shrink(x, factor), torch.from_numpy(expected))
    bilinear = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    assert factor != 2 or torch.allclose(shrink(x, 2), bilinear)


def test_scale_equivariance_step_by_hand(image_folder):
    """The objective's image terms of the shrunk latent and image, weighted,
    beside the normal ones.
    """
    settings = {"scale_equivariance": {"weight": 0.3, "factors": [2]}}
    model = build(parts=parts(**settings))
    x = model.images(next(iter(source(image_folder, size=32).train_loader())))
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    posterior = model.encode(x)
    z = posterior.sample()
    total, _ = model.objective(x, model.decode(z), posterior)
    halved = [t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) for t in (x, z)]
    _, terms = model.objective(halved[0], model.decode(halved[1]), posterior)
    weights = model.objective.weights
    further = sum(weights[name] * term for name, term in terms.items() if name != "kl")
    gradient = torch.autograd.grad(further, model.encoder.aggregator.conv_out.weight)[0]
    assert gradient.abs().max() > 0
    values = metrics(fit(build(parts=parts(**settings)), image_folder, 1, size=32))
    assert values["train/scale_equivariance"] == pytest.approx(further.item(), rel=1e-5)
    assert values["train/loss"] == pytest.approx((total + 0.3 * further).item(), rel=1e-5)


def test_scale_equivariance_factor_is_drawn_once_an_update(image_folder):
    model, seen = build(parts=parts(scale_equivariance={}), accumulate_grad_batches=2), []
    model.decoder.register_forward_hook(lambda _, inputs, y: seen.append(inputs[0].shape[-1]))
    fit(model, image_folder, 8, batch_size=1, size=32)
    assert seen[::2] == [4] * 16
    further = seen[1::2]
    assert further[::2] == further[1::2]
    assert set(further) == {1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parts": parts(equivariance={}, scale_equivariance={})},
            "parts.equivariance shrinks latents as well",
        ),
        ({"parts": parts(scale_equivariance={"weight": -1.0})}, "weight must not be negative"),
        ({"parts": parts(scale_equivariance={"factors": [1]})}, "factors must be at least 2"),
    ],
)
def test_scale_equivariance_refuses_settings_that_contradict_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_scale_equivariance_refuses_sizes_that_do_not_divide(image_folder):
    model = build(parts=parts(scale_equivariance={}))
    with pytest.raises(ConfigError, match=r"params\.factors: 4 .*6"):
        model.check(source(image_folder, size=48))
    model.check(source(image_folder, size=32))


def test_scale_equivariance_leaves_the_perceptual_loss_16_pixels(image_folder):
    """Of the shorter side, divided by the largest factor."""
    model = build(parts=parts(scale_equivariance={"factors": [2, 4]}))
    model.check(source(image_folder, size=[32, 96]))
    model.loss.perceptual = torch.nn.Identity()
    model.check(source(image_folder, size=64))
    for size in ([32, 96], [96, 32]):
        with pytest.raises(ConfigError, match=r"params\.factors: .* 4 "):
            model.check(source(image_folder, size=size))


@pytest.mark.parametrize("frozen", [True, False])
def test_scale_equivariance_needs_a_decoder_of_its_own(frozen):
    model = SimpleNamespace(freeze_decoder=frozen, stand_in=object(), each_part=[])
    assert len(list(ScaleEquivariance().conflicts(model))) == frozen
