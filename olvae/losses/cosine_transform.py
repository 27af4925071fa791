"""Cosine transform (DCT-II) of images and latents: radial spectra, their divergence, low-pass.

The transform is orthonormal, over the last two axes.
"""

import math

import torch
from torch import Tensor

from olvae.modules.mixed_precision import no_autocast

RADIAL_BINS = 16

# So that neither an empty bin nor a blank image divides by zero.
TINY_POWER = 1e-12


def cosines(x: Tensor) -> Tensor:
    """Transform (..., h, w) to coefficients (..., h, w), frequency 0 first."""
    rows, columns = (_basis(side, x) for side in x.shape[-2:])
    with no_autocast(x):
        return rows @ x @ columns.T


def inverse_cosines(coefficients: Tensor) -> Tensor:
    """Transform coefficients (..., h, w) back."""
    rows, columns = (_basis(side, coefficients) for side in coefficients.shape[-2:])
    with no_autocast(coefficients):
        return rows.T @ coefficients @ columns


def _basis(side: int, like: Tensor) -> Tensor:
    """Frequencies by positions, (side, side), of a tensor's dtype and device."""
    i = torch.arange(side, device=like.device)
    # Angles in units of pi / (2 side), whole numbers below a turn: so float32 is exact enough.
    angles = (i[:, None] * (2 * i + 1)) % (4 * side)
    basis: Tensor = (angles.to(like.dtype) * (math.pi / (2 * side))).cos()
    basis *= (2.0 / side) ** 0.5
    basis[0] *= 0.5**0.5
    return basis


def radial_bins(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The bin of each coefficient, (h, w): its distance from frequency 0 on a grid of side 1."""
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    # The radius is the root of this fraction, and 1 in the corner; in whole numbers it is exact.
    numerator = (rows[:, None] * width).square() + (columns * height).square()
    squared_bins = RADIAL_BINS**2 * numerator // (2 * (height * width) ** 2)
    return squared_bins.float().sqrt().long()


def radial_sums(power: Tensor) -> tuple[Tensor, Tensor]:
    """Sum powers (..., h, w) in each radial bin, (..., RADIAL_BINS); and count coefficients.

    The counts are (RADIAL_BINS,); some are 0 if a side has less than about 16 positions.
    """
    height, width = power.shape[-2:]
    bins = radial_bins(height, width, power.device).flatten()
    flat = power.flatten(-2)  # (..., h w)
    zeros = flat.new_zeros(*flat.shape[:-1], RADIAL_BINS)
    # Not by bincount, for which a GPU would be waited for.
    counts = flat.new_zeros(RADIAL_BINS).index_add(0, bins, flat.new_ones(len(bins)))
    return zeros.index_add(-1, bins, flat), counts


def tilted(spectrum: Tensor, counts: Tensor, delta: float = 1.0) -> Tensor:
    """Spectrum matching's target: mean power by radial bin, (RADIAL_BINS,), times frequency^delta.

    The frequency is the middle of a bin. The mean power of all coefficients becomes 1; ``counts``
    are how many are in each bin.
    """
    bins = torch.arange(RADIAL_BINS, dtype=spectrum.dtype, device=spectrum.device)
    target = spectrum * ((bins + 0.5) / RADIAL_BINS) ** delta
    total = (target.nan_to_num(0.0) * counts).sum().clamp(min=TINY_POWER)
    return target * counts.sum() / total


def spectrum_divergence(target: Tensor, found: Tensor, there: Tensor) -> Tensor:
    """Spectrum matching's loss (Ning et al. 2026): KL(target || found) of log(1 + power).

    Both are mean powers by radial bin, (RADIAL_BINS,), of latents and images of deviation 1; they
    are normalised to sum 1 over the bins that are ``there``, which is boolean.
    """
    p = torch.where(there, target, 0.0).log1p()
    q = torch.where(there, found, 0.0).log1p()
    p = p / p.sum().clamp(min=TINY_POWER)
    q = q / q.sum().clamp(min=TINY_POWER)
    return (p * (p.clamp(min=TINY_POWER) / q.clamp(min=TINY_POWER)).log()).sum()


def low_pass(x: Tensor, keep: int, block: int = 8) -> Tensor:
    """Remove the high frequencies of each block: (..., h, w) to the same.

    Of a block's coefficients at rows u and columns v those with u + v < ``keep`` stay. Sides have
    to be multiples of ``block``.
    """
    i = torch.arange(block, device=x.device)
    kept = i[:, None] + i < keep
    blocks = x.unflatten(-2, (-1, block)).unflatten(-1, (-1, block))  # (..., h/8, 8, w/8, 8)
    blocks = blocks.transpose(-3, -2)  # (..., h/8, w/8, 8, 8)
    filtered = inverse_cosines(cosines(blocks) * kept)
    return filtered.transpose(-3, -2).flatten(-2).flatten(-3, -2)  # (..., h, w)
