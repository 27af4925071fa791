import hashlib
import math

import pytest
import torch

from olvae.modules.distributions import (
    Deterministic,
    DiagonalGaussian,
    deterministic_moments,
    draws_by_image,
    in_float32,
    keyed_generator,
    keyed_seed,
)


def test_kl_is_torchs():
    moments = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    posterior = DiagonalGaussian(moments)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = (
        torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
        .flatten(1)
        .sum(1)
    )
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=1e-12)


def test_posterior_samples_have_the_moments():
    moments = torch.cat(
        (torch.full((1, 1, 300, 300), 2.0), torch.full((1, 1, 300, 300), 0.5).square().log()), dim=1
    )
    sample = DiagonalGaussian(moments).sample(torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(2.0, abs=0.01)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


def test_log_variance_is_clamped():
    moments = torch.tensor([0.0, 0.0, 1000.0, -1000.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert torch.isfinite(posterior.kl()).all()
    assert torch.isfinite(posterior.sample()).all()


def test_kl_of_bf16_is_float32():
    assert DiagonalGaussian(torch.randn(1, 4, 2, 2).bfloat16()).kl().dtype == torch.float32


def test_the_sample_carries_gradients_to_both_moments():
    moments = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def sample(m):
        return DiagonalGaussian(m).sample(torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(sample, moments)


def test_posterior_of_odd_channels_is_refused():
    with pytest.raises(ValueError, match="even number"):
        DiagonalGaussian(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sample_has_the_dtype_of_the_moments(dtype):
    posterior = DiagonalGaussian(torch.randn(1, 8, 2, 2).to(dtype))
    assert posterior.sample().dtype == posterior.mode().dtype == dtype


def test_draws_of_an_image_are_its_pixels_in_any_batch():
    images = torch.rand(3, 3, 8, 8)
    uniform, normal = draws_by_image(images, (4, 2, 2))
    # by hand, of the last image
    digest = hashlib.sha256(images[2].numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    assert torch.equal(uniform[2], torch.rand((), generator=generator))
    assert torch.equal(normal[2], torch.randn(4, 2, 2, generator=generator))
    turned = draws_by_image(images.flip(0), (4, 2, 2))
    assert torch.equal(turned[0], uniform.flip(0))
    assert torch.equal(turned[1], normal.flip(0))
    assert len(uniform.unique()) == 3


def test_deviation_variance_and_sample_by_hand():
    moments = torch.tensor([1.0, 2.0, math.log(4.0), math.log(9.0)]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert posterior.mode().flatten().tolist() == posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.std.flatten().tolist() == pytest.approx([2.0, 3.0])
    assert posterior.var.flatten().tolist() == pytest.approx([4.0, 9.0])
    noise = torch.randn(1, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    sample = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, moments[:, :2] + posterior.std * noise)
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), sample)
    assert posterior.kl().tolist() == pytest.approx(
        [0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * (4 + 9 - 1 - math.log(9))]
    )


def test_a_deterministic_latent_is_a_point():
    latent = torch.randn(2, 3, 4, 4)
    point = Deterministic(latent)
    assert point.deterministic
    assert not DiagonalGaussian.deterministic
    assert all(torch.equal(z, latent) for z in (point.mean, point.mode(), point.sample()))
    assert torch.equal(point.std, torch.zeros_like(latent))
    assert torch.equal(point.var, torch.zeros_like(latent))
    with pytest.raises(ValueError, match="log-variance"):
        _ = point.logvar
    with pytest.raises(ValueError, match="KL"):
        point.kl()
    moments = deterministic_moments(latent)
    assert torch.equal(moments[:, :3], latent)
    assert (moments[:, 3:] == -30).all()
    assert moments.shape == (2, 6, 4, 4)


def test_posteriors_in_half_precision_become_float32():
    moments = torch.randn(2, 6, 4, 4).half()
    varied = in_float32(DiagonalGaussian(moments))
    assert isinstance(varied, DiagonalGaussian)
    assert torch.equal(torch.cat((varied.mean, varied.logvar), dim=1), moments.float())
    point = in_float32(Deterministic(moments))
    assert isinstance(point, Deterministic)
    assert torch.equal(point.mean, moments.float())


def test_keyed_seeds_are_63_bits_of_sha_256():
    """By hashlib's digest, of two contents whose first bits differ."""
    for content in (b"", b"a.png", b"3"):
        digest = hashlib.sha256(content).hexdigest()
        assert keyed_seed(content) == int(digest[:16], 16) // 2
    noise = torch.randn(3, generator=torch.Generator().manual_seed(keyed_seed("é".encode())))
    assert torch.equal(torch.randn(3, generator=keyed_generator("é")), noise)
