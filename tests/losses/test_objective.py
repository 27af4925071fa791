"""Terms by hand and against other libraries, and their weighted sum."""

import math

import numpy as np
import pytest
import pywt
import torch
from scipy.ndimage import gaussian_filter

from olvae.losses.objective import IMAGE_TERMS, AlphaObjective, Objective, over
from olvae.losses.perceptual import ESRGAN
from olvae.losses.terms import (
    RECONSTRUCTION,
    gaussian_loss,
    kl_loss,
    latent_loss,
    logvar_loss,
    marginal_cosine_loss,
    marginal_distance_loss,
    wavelet_loss,
)
from olvae.modules.distributions import DiagonalGaussian

X = torch.tensor([[[[0.5, -0.25], [1.0, 0.0]]]], dtype=torch.float64)

Y = torch.tensor(
    [[[[0.25, 0.25], [-1.0, 0.0]]]], dtype=torch.float64
)  # differences 0.25, -0.5, 2, 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (0.25 + 0.5 + 2.0) / 4),
        ("l2", (0.0625 + 0.25 + 4.0) / 4),
        (
            "charbonnier",
            ((0.0625 + 1e-6) ** 0.5 + (0.25 + 1e-6) ** 0.5 + (4 + 1e-6) ** 0.5 + 1e-3) / 4,
        ),
    ],
)
def test_pixel_losses_by_hand(name, expected):
    assert RECONSTRUCTION[name](X, Y).item() == pytest.approx(expected, rel=1e-12)
    assert RECONSTRUCTION[name](X.bfloat16(), Y.bfloat16()).dtype == torch.float32


def test_against_pywavelets_in_float64():
    x, y = (torch.rand(2, 3, 8, 10, dtype=torch.float64) for _ in range(2))
    _, details = pywt.dwt2((x - y).numpy(), "haar")
    expected = np.mean([np.sqrt(band**2 + 1e-6).mean() for band in details])
    assert wavelet_loss(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_that_of_the_residuals():
    x, y = (torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    residual_x, residual_y = (
        t
        - torch.from_numpy(
            gaussian_filter(t.numpy(), 1.0, mode="mirror", truncate=2.0, axes=(2, 3))
        )
        for t in (x, y)
    )
    expected = (residual_x - residual_y).abs().mean().item()
    assert gaussian_loss(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_kl_by_hand():
    """Of two images of 12 values: latent values of mean 1 and 0, variance 4 and 1; and of mean 3 and 0, variance 1."""
    moments = torch.tensor(
        [[1.0, 0.0, math.log(4.0), 0.0], [3.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    expected = 0.5 * ((1 + 4 - 1 - math.log(4.0)) + 9) / 2 / 12
    posterior = DiagonalGaussian(moments.view(2, 4, 1, 1))
    assert kl_loss(posterior, torch.zeros(2, 3, 2, 2)).item() == pytest.approx(expected, rel=1e-12)


def test_latents_by_hand():
    """Two channels of 1x2, whose deviations are 0.5 and 4."""
    mean = torch.tensor([[[[1.0, 2.0]], [[0.0, 8.0]]]], dtype=torch.float64)
    target = torch.tensor([[[[0.5, 2.0]], [[2.0, 0.0]]]], dtype=torch.float64)
    std = torch.tensor([0.5, 4.0], dtype=torch.float64)
    expected = (1.0**2 + 0.0 + 0.5**2 + 2.0**2) / 4
    assert latent_loss(mean, target, std).item() == pytest.approx(expected, rel=1e-12)
    assert latent_loss(mean.bfloat16(), target, std).dtype == torch.float64
    assert latent_loss(mean.bfloat16(), target.bfloat16(), std.float()).dtype == torch.float32


def test_log_variances_are_torchs_divergence_at_equal_means():
    """KL(target || ours), in nats per element."""
    logvar, target = (2 * torch.randn(3, 4, 2, 5, dtype=torch.float64) for _ in range(2))
    mean = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    ours, theirs = (
        torch.distributions.Normal(mean, (0.5 * value).exp()) for value in (logvar, target)
    )
    expected = torch.distributions.kl_divergence(theirs, ours).mean().item()
    assert logvar_loss(logvar, target).item() == pytest.approx(expected, rel=1e-10)
    assert logvar_loss(target, target).item() == 0.0
    assert logvar_loss(logvar.bfloat16(), target.bfloat16()).dtype == torch.float32


# VA-VAE's terms
def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_cosine_term_is_the_formula(margin):
    z, f = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    terms = [
        max(0.0, 1 - margin - cosine(z[b, :, i, j].numpy(), f[b, :, i, j].numpy()))
        for b in range(2)
        for i in range(3)
        for j in range(4)
    ]
    assert marginal_cosine_loss(z, f, margin).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert marginal_cosine_loss(f, f, margin).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_the_distance_term_is_the_formula(margin):
    z, f = (
        torch.randn(2, 3, 2, 3, dtype=torch.float64),
        torch.randn(2, 7, 2, 3, dtype=torch.float64),
    )
    terms = []
    for b in range(2):
        for i in range(6):
            for j in range(6):
                of_z, of_f = (
                    cosine(t[b, :, i // 3, i % 3].numpy(), t[b, :, j // 3, j % 3].numpy())
                    for t in (z, f)
                )
                terms.append(max(0.0, abs(of_z - of_f) - margin))
    assert marginal_distance_loss(z, f, margin).item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert marginal_distance_loss(f, 3 * f, margin).item() == pytest.approx(0.0, abs=1e-12)


LOSSES = [
    *RECONSTRUCTION.values(),
    wavelet_loss,
    gaussian_loss,
    logvar_loss,
    marginal_cosine_loss,
    marginal_distance_loss,
]
every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@every
def test_gradients(loss):
    x, y = torch.randn(2, 2, 2, 4, 4, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(loss, (x, y))


@every
def test_float32_under_autocast(loss):
    x, y = torch.randn(2, 2, 8, 4, 4)
    outside = loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), outside)
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.fixture
def pair():
    return (
        torch.rand(2, 3, 16, 16),
        torch.rand(2, 3, 16, 16, requires_grad=True),
        DiagonalGaussian(torch.randn(2, 8, 2, 2)),
    )


def test_the_weighted_sum_of_named_terms(pair):
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
        with pytest.raises(pytest.fail.Exception, match="looked for a file"):
            Objective(perceptual=name)


def test_esrgan_has_its_own_name(pair, vgg19):
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
        ({f"{n}_weight": 0 for n in ("rec", "lpips", "kl", "wavelet", "gaussian")}, "every weight"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"lpips_weight": 0, **arguments})


def rgba(seed: int) -> torch.Tensor:
    return torch.rand(6, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_compositing_by_hand():
    image, background = rgba(0).double(), torch.tensor([0.5, -1.0, 1.0])[None, :, None, None]
    alpha = (image[:, 3:] + 1) / 2
    levels = 255 * (
        (image[:, :3] + 1) / 2 * alpha + (background + 1) / 2 * (1 - alpha)
    )  # as everybody does, in 0..255
    np.testing.assert_allclose(over(image, background) * 127.5 + 127.5, levels, atol=1e-4)


def test_terms_and_their_sum():
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


def test_what_is_invisible_costs_nothing_and_backgrounds_change():
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    x = rgba(0)
    x[:, 3] = -1
    y = torch.cat((rgba(1)[:, :3], x[:, 3:]), dim=1)
    assert objective(x, y, None)[0].item() == 0
    y[:, 3] = 1  # opaque where it should be clear: how wrong that is depends on what is behind
    assert len({round(objective(x, y, None)[1]["rec"].item(), 4) for _ in range(5)}) == 5


def test_mistakes_of_transparency():
    with pytest.raises(ValueError, match="take Objective for opaque images"):
        AlphaObjective(alpha_weight=0, lpips_weight=0)
    with pytest.raises(ValueError, match=r"not 3: set data\.params\.channels=4"):
        AlphaObjective(lpips_weight=0)(
            rgba(0)[:, :3], rgba(0)[:, :3], DiagonalGaussian(torch.zeros(6, 4, 2, 2))
        )


def test_bands_that_lpips_sees_reach_it():
    assert Objective(perceptual="lite0", lpips_channels=[3, 2, 1]).perceptual.channels == [3, 2, 1]


def test_every_image_has_a_background_of_its_own():
    """A third of them black, a third white, the others each another one."""
    objective = AlphaObjective(lpips_weight=0, kl_weight=0, wavelet_weight=0, gaussian_weight=0)
    x, seen = torch.full((300, 4, 1, 1), -1.0), []
    objective.pixel_loss = lambda a, b: seen.append(a) or a.mean()
    objective.compare(x, x)
    plain = [int((seen[0] == value).all(1).sum()) for value in (-1.0, 1.0)]
    assert all(abs(count - 100) < 33 for count in plain)
    assert len(seen[0].flatten(1).unique(dim=0)) == 300 - sum(plain) + 2
