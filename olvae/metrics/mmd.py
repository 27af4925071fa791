"""Maximum mean discrepancy of latents to N(0, I) (Gretton et al. 2012)."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SIGMAS", "mmd2_normal", "mmd2_null_std"]

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""The bandwidths of the paper's comparison [P Table 6]."""


def mmd2_normal(z: Tensor, sigmas: Sequence[float] = SIGMAS, chunk: int = 512) -> Tensor:
    """MMD^2 between the distribution that ``z`` was drawn from and N(0, I), for RBF kernels of several widths.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), over whole flattened latents, and the unbiased estimator [D: the paper
    says neither]. What the kernel expects under N(0, I) has a closed form, which takes the place of normal samples:

        MMD^2 = mean over i != j of k(z_i, z_j) - 2 mean over i of e(z_i) + c
        e(x) = E k(x, y) = (s / (s + 1))^(d/2) exp(-|x|^2 / (2 (s + 1))),   c = E k(y, y') = (s / (s + 2))^(d/2)

    with s = sigma^2 and d the number of values of a latent. So the value is deterministic given ``z``, and its only
    error is that of the latents; being unbiased, it can be a little below 0. At sigma = 500 the three terms are near
    1 and their sum near 1e-7, so all is float64.

    Args:
        z: (N, ...) of any floating type, one latent per row, N at least 2.
        sigmas: bandwidths, above 0.
        chunk: rows at a time; memory is that of ``z`` and of two chunks in float64.

    Returns:
        float64 (len(sigmas),), between 0 and 2 but for the sampling error of :func:`mmd2_null_std`.

    Raises:
        ValueError: fewer than two latents, values that are not finite, or a bandwidth that is not above 0.
    """
    z = z.flatten(1)  # (N, d)
    n, d = z.shape
    _check_sigmas(sigmas)
    if n < 2:
        raise ValueError(f"MMD needs at least two latents, got {n}")
    s = torch.tensor(sigmas, dtype=torch.float64, device=z.device).square()  # (S,)
    square = torch.cat([part.double().square().sum(1) for part in z.split(chunk)])  # (N,)
    if not square.isfinite().all():
        raise ValueError("MMD: some latents are not finite")
    pairs = torch.zeros_like(s)
    for start in range(0, n, chunk):
        rows = z[start : start + chunk].double()
        for other in range(0, start + 1, chunk):  # the matrix is symmetric: its lower triangle of blocks
            inner = rows @ z[other : other + chunk].double().T
            distance = square[start : start + chunk, None] + square[None, other : other + chunk] - 2.0 * inner
            distance = distance.clamp(min=0.0)  # (rows, columns)
            if other == start:
                distance.fill_diagonal_(torch.inf)  # leaves out i = j
            weight = 1.0 if other == start else 2.0
            pairs += torch.stack([weight * (distance / (-2.0 * v)).exp().sum() for v in s])
    log_e = -0.5 * d * torch.log1p(1.0 / s)[:, None] - square / (2.0 * (s[:, None] + 1.0))  # (S, N)
    c = (-0.5 * d * torch.log1p(2.0 / s)).exp()
    return pairs / (n * (n - 1)) - 2.0 * log_e.exp().mean(1) + c


def mmd2_null_std(n: int, d: int, sigmas: Sequence[float] = SIGMAS) -> Tensor:
    """Standard deviation of :func:`mmd2_normal` over sets of ``n`` latents of ``d`` values that are N(0, I) indeed.

    The estimator is the mean over pairs of h(x, x') = k(x, x') - e(x) - e(x') + c, whose expectation given either
    argument is 0 under N(0, I). So its variance is 2 E h^2 / (n (n - 1)), and E h^2 = E k^2 - 2 E e^2 + c^2 has a
    closed form. A measured value of a few of these is noise.

    Returns:
        float64 (len(sigmas),).

    Raises:
        ValueError: fewer than two latents, or a bandwidth that is not above 0.
    """
    _check_sigmas(sigmas)
    if n < 2:
        raise ValueError(f"MMD needs at least two latents, got {n}")
    s = torch.tensor(sigmas, dtype=torch.float64).square()
    k2 = -0.5 * d * torch.log1p(4.0 / s)  # log E k^2: the kernel of half the squared width
    e2 = -d * torch.log1p(1.0 / s) - 0.5 * d * torch.log1p(2.0 / (s + 1.0))
    c2 = -d * torch.log1p(2.0 / s)
    h2 = c2.exp() * (torch.expm1(k2 - c2) - 2.0 * torch.expm1(e2 - c2))
    return (2.0 * h2.clamp(min=0.0) / (n * (n - 1))).sqrt()


def _check_sigmas(sigmas: Sequence[float]) -> None:
    if not sigmas or min(sigmas) <= 0.0:
        raise ValueError(f"MMD: bandwidths must be above 0, got {list(sigmas)}")
