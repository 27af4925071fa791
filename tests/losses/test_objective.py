import pytest
import torch

from olvae.losses.objective import IMAGE_TERMS, Objective
from olvae.losses.perceptual import ESRGAN
from olvae.losses.terms import gaussian_loss, kl_loss, wavelet_loss
from olvae.modules.distributions import DiagonalGaussian


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
    torch.testing.assert_close(total, sum(weights[name] * value for name, value in expected.items()))


@pytest.mark.parametrize("name", ["rec", "kl", "wavelet", "gaussian"])
def test_a_term_of_weight_0_is_not_computed(name, pair, monkeypatch):
    """Each of the functions is made to fail, then its weight is set to 0."""

    def fail(*args):
        raise AssertionError(f"{name} was computed")

    module = "olvae.losses.objective"
    if name == "rec":
        monkeypatch.setitem(__import__(module, fromlist=["RECONSTRUCTION"]).RECONSTRUCTION, "l1", fail)
    else:
        monkeypatch.setattr(f"{module}.{name}_loss", fail)
    with pytest.raises(AssertionError):
        Objective(lpips_weight=0)(*pair)
    _, terms = Objective(lpips_weight=0, **{f"{name}_weight": 0})(*pair)
    assert name not in terms
    assert len(terms) == 3


def test_lpips_of_weight_0_needs_no_file(monkeypatch):
    monkeypatch.setattr("olvae.losses.perceptual.find_weights", lambda *_, **__: pytest.fail("looked for a file"))
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
    torch.testing.assert_close(total, sum(objective.weights[name] * term for name, term in terms.items()))
    assert objective.weights["esrgan"] == 0.5
    pixels = objective.weighted(terms, *IMAGE_TERMS)
    torch.testing.assert_close(pixels, total - 0.01 * terms["kl"])
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, posterior), (total, terms), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reconstruction": "huber"}, "l1, l2, charbonnier"),
        ({"perceptual": "vgg"}, "lpips, esrgan, got 'vgg'"),
        ({"lpips_weight": -1.0, "perceptual": "esrgan"}, "must not be negative, got .*'esrgan': -1.0"),
        ({"kl_weight": -1.0}, "must not be negative, got .*'kl': -1.0"),
        ({f"{n}_weight": 0 for n in ("rec", "lpips", "kl", "wavelet", "gaussian")}, "every weight"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"lpips_weight": 0, **arguments})
