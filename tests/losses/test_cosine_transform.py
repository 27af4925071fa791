"""The cosine transform against scipy's, radial bins against a float64 radius, low-pass by hand."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from olvae.losses.cosine_transform import (
    RADIAL_BINS,
    cosines,
    inverse_cosines,
    low_pass,
    radial_bins,
    radial_sums,
    spectrum_divergence,
    tilted,
)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 12), (2, 1, 64, 33)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_transform_is_scipys_orthonormal_dct_and_is_inverted(shape, dtype, near):
    x = torch.randn(shape, dtype=dtype)
    wanted = dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    found = cosines(x)
    assert found.dtype == dtype
    assert found.numpy() == pytest.approx(wanted, abs=near)
    assert inverse_cosines(found).numpy() == pytest.approx(x.numpy(), abs=near)


def test_transform_is_not_in_half_precision_under_autocast():
    x = torch.randn(1, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = inverse_cosines(cosines(x))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sides", [(8, 8), (16, 32), (7, 5), (48, 48)])
def test_radial_bins_divide_the_way_to_the_corner(sides):
    height, width = sides
    u, v = np.mgrid[:height, :width].astype(np.longdouble)
    exact = RADIAL_BINS * np.sqrt(((u / height) ** 2 + (v / width) ** 2) / 2)
    wanted = np.floor(exact + 1e-12).astype(int)  # the diagonal of 48 hits edges of bins
    assert radial_bins(*sides).numpy().tolist() == wanted.tolist()


def test_radial_sums_and_counts_are_those_of_each_bin():
    power = torch.rand(2, 3, 9, 5, dtype=torch.float64)
    sums, counts = radial_sums(power)
    bins = radial_bins(9, 5)
    for number in range(RADIAL_BINS):
        inside = power[..., bins == number]
        assert counts[number] == inside.shape[-1]
        torch.testing.assert_close(sums[..., number], inside.sum(-1))
    torch.testing.assert_close(sums.sum(-1), power.sum((-2, -1)))


def test_a_tilted_spectrum_of_inverse_squares_falls_as_the_inverse():
    middles = (torch.arange(RADIAL_BINS, dtype=torch.float64) + 0.5) / RADIAL_BINS
    counts = torch.arange(1, 17, dtype=torch.float64)
    target = tilted(middles**-2, counts)
    torch.testing.assert_close(target * middles, (target * middles)[:1].expand(16))
    assert float((target * counts).sum() / counts.sum()) == pytest.approx(1.0)
    assert tilted(middles**-2, counts, delta=2.0).tolist() == pytest.approx([1.0] * 16)


def test_divergence_is_the_formula_over_the_bins_that_are_there():
    target = torch.rand(16, dtype=torch.float64) * 10
    found = torch.rand(16, dtype=torch.float64) * 10
    there = torch.rand(16) < 0.7
    p = np.log1p(target[there].numpy())
    q = np.log1p(found[there].numpy())
    p /= p.sum()
    q /= q.sum()
    by_hand = (p * np.log(p / q)).sum()
    holes = torch.where(there, found, torch.nan)
    assert spectrum_divergence(target, holes, there).item() == pytest.approx(by_hand, rel=1e-12)
    assert spectrum_divergence(target, target, there).item() == pytest.approx(0.0, abs=1e-12)


def test_divergence_of_a_blank_image_is_zero_with_a_finite_gradient():
    found = torch.ones(16, requires_grad=True)
    loss = spectrum_divergence(torch.zeros(16), found, torch.ones(16, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert (found.grad == 0).all()


@pytest.mark.parametrize(("keep", "block"), [(7, 8), (3, 8), (2, 4)])
def test_low_pass_is_scipys_of_each_block(keep, block):
    x = torch.randn(2, 3, 2 * block, 3 * block, dtype=torch.float64)
    u, v = np.mgrid[:block, :block]
    wanted = x.numpy().copy()
    for top in range(0, x.shape[-2], block):
        for left in range(0, x.shape[-1], block):
            place = np.s_[..., top : top + block, left : left + block]
            kept = dctn(wanted[place], axes=(-2, -1), norm="ortho") * (u + v < keep)
            wanted[place] = idctn(kept, axes=(-2, -1), norm="ortho")
    found = low_pass(x, keep, block)
    assert found.numpy() == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(low_pass(found, keep, block), found)
    torch.testing.assert_close(low_pass(x, 2 * block - 1, block), x)
