"""The weighted sum of terms, for opaque and for transparent images."""

import math

import numpy as np
import pytest
import torch

from olvae.losses.objective import IMAGE_TERMS, AlphaObjective, Objective, over
from olvae.losses.perceptual import ESRGAN
from olvae.losses.terms import (
    gaussian_loss,
    kl_loss,
    wavelet_loss,
)
from olvae.modules.distributions import DiagonalGaussian


@pytest.fixture
def pair():
    return (
        torch.rand(2, 3, 16, 16),
        torch.rand(2, 3, 16, 16, requires_grad=True),
        DiagonalGaussian(torch.randn(2, 8, 2, 2)),
    )


def test_objective_is_the_weighted_sum_of_named_terms(pair):
    x, y, posterior = pair
    objective = Objective("l2", 2.0, 0.0, 0.01, 0.3, 0.5)
    total, terms = objective(x, y, posterior)
    expected = {
        "rec": (x - y).square().mean(),
        "kl": kl_loss(posterior, x),
        "wavelet": wavelet_loss(x, y),
        "gaussian": gaussian_loss(x, y),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    weights = {"rec": 2.0, "kl": 0.01, "wavelet": 0.3, "gaussian": 0.5}
    torch.testing.assert_close(
        total, sum(weights[name] * value for name, value in expected.items())
    )


def test_a_pixel_loss_sees_the_image_first():
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    objective.pixel_loss = lambda a, b: (a - 2 * b).mean()
    # Opaque, so that no background shows.
    x, y = torch.full((2, 4, 4, 4), 0.5), torch.full((2, 4, 4, 4), 0.25)
    x[:, 3] = y[:, 3] = 1.0
    _, terms = objective(x, y, None)
    assert {name: term.item() for name, term in terms.items()} == {"rec": 0.0, "alpha": 0.0}
    _, terms = objective(y, x, None)
    assert terms["rec"].item() == -0.75


@pytest.mark.parametrize("name", ["rec", "kl", "wavelet", "gaussian"])
def test_a_term_of_weight_0_is_left_out(name, pair):
    _, terms = Objective(lpips_weight=0, **{f"{name}_weight": 0})(*pair)
    assert terms.keys() == {"rec", "kl", "wavelet", "gaussian"} - {name}


def test_lpips_of_weight_0_needs_no_file(monkeypatch):
    monkeypatch.setattr(
        "olvae.losses.perceptual.find_weights", lambda *_, **__: pytest.fail("looked for a file")
    )
    for name in ("lpips", "esrgan"):
        Objective(lpips_weight=0, perceptual=name)
        with pytest.raises(pytest.fail.Exception, match="looked for"):
            Objective(perceptual=name)


def test_esrgan_term_has_its_own_name_and_weight(pair, vgg19):
    x, y, posterior = pair
    objective = Objective(lpips_weight=0.5, lpips_weights=str(vgg19), perceptual="esrgan")
    total, terms = objective(x, y, posterior)
    assert list(terms) == list(objective.weights) == ["rec", "esrgan", "kl", "wavelet", "gaussian"]
    torch.testing.assert_close(terms["esrgan"], ESRGAN(str(vgg19))(x, y))
    torch.testing.assert_close(
        total, sum(objective.weights[name] * term for name, term in terms.items())
    )
    assert objective.weights["esrgan"] == 0.5
    pixels = objective.weighted(terms, *IMAGE_TERMS)
    torch.testing.assert_close(pixels, total - 0.01 * terms["kl"])
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, posterior), (total, terms), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reconstruction": "huber"}, "l1, l2, charbonnier"),
        ({"perceptual": "vgg"}, "lpips, esrgan, lite0, got 'vgg'"),
        (
            {"lpips_weight": -1.0, "perceptual": "esrgan"},
            "lpips_weight must not be negative, got -1.0",
        ),
        ({"kl_weight": -1.0}, "kl_weight must not be negative, got -1.0"),
        ({"rec_weight": math.nan}, "rec_weight must not be negative, got nan"),
        ({"wavelet_weight": -1.0}, "wavelet_weight must not be negative"),
        ({"gaussian_weight": -1.0}, "gaussian_weight must not be negative"),
        ({f"{n}_weight": 0 for n in ("rec", "lpips", "kl", "wavelet", "gaussian")}, "every weight"),
    ],
)
def test_objective_refuses_unknown_losses_and_negative_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"lpips_weight": 0, **arguments})


def rgba(seed: int) -> torch.Tensor:
    return torch.rand(6, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_compositing_over_a_background_by_hand():
    image, background = rgba(0).double(), torch.tensor([0.5, -1.0, 1.0])[None, :, None, None]
    alpha = (image[:, 3:] + 1) / 2
    # As everybody does, in 0..255.
    levels = 255 * ((image[:, :3] + 1) / 2 * alpha + (background + 1) / 2 * (1 - alpha))
    np.testing.assert_allclose(over(image, background) * 127.5 + 127.5, levels, atol=1e-4)


def test_alpha_objective_terms_and_their_sum():
    objective = AlphaObjective(
        alpha_weight=3, lpips_weight=0, kl_weight=0.5, wavelet_weight=0, gaussian_weight=0
    )
    x, y, posterior = rgba(0), rgba(1).requires_grad_(), DiagonalGaussian(torch.randn(6, 4, 2, 2))
    total, terms = objective(x, y, posterior)
    assert terms["alpha"].item() == pytest.approx((x - y)[:, 3].abs().mean().item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(
        posterior.kl().mean().item() / (4 * 16 * 16), rel=1e-5
    )
    assert total.item() == pytest.approx(
        sum(objective.weights[n] * terms[n].item() for n in terms), rel=1e-5
    )
    total.backward()
    assert y.grad.abs().amin((0, 2, 3)).min() >= 0
    assert (y.grad.abs().amax((0, 2, 3)) > 0).all()


def test_invisible_pixels_cost_nothing_and_backgrounds_change():
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    x = rgba(0)
    x[:, 3] = -1
    y = torch.cat((rgba(1)[:, :3], x[:, 3:]), dim=1)
    assert objective(x, y, None)[0].item() == 0
    y[:, 3] = 1  # opaque where it should be clear: how wrong that is depends on what is behind
    assert len({round(objective(x, y, None)[1]["rec"].item(), 4) for _ in range(5)}) == 5


def test_alpha_objective_refuses_opaque_images_and_weight_0():
    with pytest.raises(ValueError, match="take Objective"):
        AlphaObjective(alpha_weight=0, lpips_weight=0)
    with pytest.raises(ValueError, match=r"not 3: .*data\.params\.channels=4"):
        AlphaObjective(lpips_weight=0)(
            rgba(0)[:, :3], rgba(0)[:, :3], DiagonalGaussian(torch.zeros(6, 4, 2, 2))
        )


def test_lpips_channels_reach_the_perceptual_loss():
    assert Objective(perceptual="lite0", lpips_channels=[3, 2, 1]).perceptual.channels == [3, 2, 1]


def test_alpha_objective_gives_every_image_its_own_background():
    """A third of them black, a third white, the others each another one."""
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    x, seen = torch.full((3000, 4, 1, 1), -1.0), []
    objective.pixel_loss = lambda a, b: seen.append(a) or a.mean()
    objective.compare(x, x)
    plain = [int((seen[0] == value).all(1).sum()) for value in (-1.0, 1.0)]
    assert all(abs(count - 1000) < 120 for count in plain)
    colours = seen[0].flatten(1).unique(dim=0)
    assert len(colours) == 3000 - sum(plain) + 2
    assert -1.0 == colours.min() < colours.quantile(0.01) < -0.9
    assert 0.9 < colours.quantile(0.99) < colours.max() == 1.0
