"""Maps of latents: each is undone exactly, and does what its name says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from olvae.losses.cosine_transform import RADIAL_BINS
from olvae.models.loading.targets import find_target
from study.latent_maps import (
    MAPS,
    cosines,
    fit,
    radial_bins,
    radial_spectrum,
    target_spectrum,
)


@pytest.fixture(scope="module")
def latents():
    """Correlated channels and positions, of mean 0 and deviation 1, float32 (64, 12, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(64, 12, 10, 10, generator=generator)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(12, 12, generator=generator), white)
    z = F.avg_pool2d(mixed, 3, stride=1)
    return (z - z.mean()) / z.std()


@pytest.fixture(scope="module")
def images():
    return F.avg_pool2d(torch.rand(64, 3, 14, 14, generator=torch.Generator().manual_seed(1)), 7, 1)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_undone_to_the_bit_of_float32(name, latents, images):
    latent_map = fit(name, latents, images)
    mapped = latent_map.apply(latents)
    assert torch.equal(latent_map.undo(mapped).float(), latents)
    # and from the float32 that a diffusion model sees, to its rounding
    again = latent_map.undo(mapped.float()).float()
    torch.testing.assert_close(again, latents, rtol=0, atol=3e-6)
    assert mapped.std().item() == pytest.approx(1.0, abs=1e-3)
    if name != "plain":
        assert mapped.shape != latents.shape or not torch.allclose(
            mapped.float(), latents, atol=0.1
        )


@pytest.mark.parametrize("name", MAPS)
def test_pictures_are_the_same_to_the_bit(name, images):
    model = find_target("olvae:photos-f8c12").load()
    x = F.interpolate(images[:4] * 2 - 1, scale_factor=8)
    with torch.no_grad():
        z = model.encode(x).mode()
        latent_map = fit(name, z, images[:4])
        y = model.decode(latent_map.undo(latent_map.apply(z)).float())
        assert torch.equal(y, model.decode(z))


def test_channels_are_whitened_and_turned(latents, images):
    covariances = {
        name: torch.cov(fit(name, latents, images).apply(latents).transpose(0, 1).flatten(1))
        for name in ("plain", "W", "U", "R")
    }
    torch.testing.assert_close(covariances["W"].diag(), torch.ones(12).double(), atol=1e-3, rtol=0)
    # principal axes: no covariance, and the variances of the whole in falling order
    variances = torch.linalg.eigvalsh(covariances["plain"]).flip(0)
    expected = variances.diag() / variances.mean()
    torch.testing.assert_close(covariances["U"], expected, atol=1e-2, rtol=0)
    # a rotation keeps the eigenvalues
    torch.testing.assert_close(
        torch.linalg.eigvalsh(covariances["R"]), torch.linalg.eigvalsh(covariances["W"])
    )


def test_frequencies_are_scipys(latents, images):
    expected = dctn(latents.double().numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(cosines(latents.double()).numpy(), expected, atol=1e-12)
    for name, factor in (("T+", 2.0), ("T-", 0.5)):
        found = dctn(fit(name, latents, images).apply(latents).numpy(), axes=(2, 3), norm="ortho")
        ratio = found / expected
        ratio /= ratio[:, :, 1:2, 1:2]
        np.testing.assert_allclose(ratio[:, :, 1:4, 1:4], 1.0, rtol=1e-6)
        np.testing.assert_allclose(ratio[:, :, 4:, :], factor, rtol=1e-6)
        np.testing.assert_allclose(ratio[:, :, :, 4:], factor, rtol=1e-6)


def test_the_spectrum_becomes_the_target(latents, images):
    found = radial_spectrum(fit("E", latents, images).apply(latents))
    torch.testing.assert_close(found, target_spectrum(images), rtol=1e-3, atol=0, equal_nan=True)
    # the target rises by frequency beside the images' own power
    own = radial_spectrum(images)
    ratio = (target_spectrum(images) / own)[own.isfinite()]
    middles = ((torch.arange(RADIAL_BINS) + 0.5) / RADIAL_BINS)[own.isfinite()].double()
    torch.testing.assert_close(ratio / ratio[0], middles / middles[0])


def test_bins_of_frequencies_are_rings():
    bins = radial_bins(8, 8)
    assert bins[0, 0] == 0
    assert bins[7, 7] == 14  # 7 / 8 of the way to the corner
    assert bins[4, 0] == bins[0, 4] == 5  # 4 / 8 / sqrt 2 of 16


def test_a_map_of_another_name_is_refused(latents, images):
    with pytest.raises(ValueError, match=r"Y: .*plain, W"):
        fit("Y", latents, images)
