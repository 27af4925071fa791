"""From sums over latents to the numbers of the report, and the MMD to N(0, I)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ACTIVE_VARIANCE", "EDGES", "SIGMAS", "LatentSummary", "Mmd", "Totals", "mmd2_normal", "mmd2_null_std"]


ACTIVE_VARIANCE = 0.01
"""A channel is active if its posterior mean varies by more than this over the data (Burda et al. 2016, section 5.1)."""

NO_DISTRIBUTION = "a deterministic autoencoder: its latents have no distribution of their own"
"""Why KL and active channels are skipped."""

BINS = 200

EDGES = 0.5 * torch.linspace(-5.0, 5.0, BINS + 1, dtype=torch.float64).sinh()
"""Edges of the histogram's bins: from -37 to 37, 0.025 wide at 0, 0.05 at 1 and 0.5 at 10 [D]."""


@dataclass(frozen=True)
class Mmd:
    """MMD^2 to N(0, I) for each of SIGMAS: of raw latents, of shifted and scaled ones, and its standard error."""

    n: int
    raw: list[float]
    scaled: list[float]
    null_std: list[float]


@dataclass(frozen=True)
class LatentSummary:
    """The distribution of the latents z of ``n`` images. z is a sampled latent; values are expectations over the noise.

    Deterministic latents are both z and the posterior means; they have no ``kl`` and no ``active``.

    Args:
        shape: of a latent, (C, h, w).
        mean, std: of z, per channel (C,).
        mean_std: of the posterior means alone (C,).
        minimum, maximum: of the posterior means (C,).
        kl: nats per position (C,).
        active: whether a channel's posterior mean varies over the data (C,).
        correlation: of z between channels (C, C).
        frequency: in cycles per latent position (F,).
        spectrum: mean power of the orthonormal Fourier transform of z on the ring of a frequency, after subtracting
            the channel's mean (C, F); it is 1 everywhere for N(0, 1).
        mass: share of z in each bin of EDGES, and at the ends below and above them (C, bins + 2).
        shift_factor, scaling_factor: (z - shift) * scaling has mean 0 and variance 1.
        mmd: None for fewer than two images.
    """

    n: int
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    mean_std: Tensor
    minimum: Tensor
    maximum: Tensor
    kl: Tensor | None
    active: Tensor | None
    correlation: Tensor
    frequency: Tensor
    spectrum: Tensor
    mass: Tensor
    shift_factor: float
    scaling_factor: float
    mmd: Mmd | None

    @property
    def deterministic(self) -> bool:
        """Whether the latents have no distribution of their own."""
        return self.kl is None

    @property
    def kl_per_image(self) -> float | None:
        """Nats; None for a deterministic autoencoder."""
        return None if self.kl is None else float(self.kl.sum()) * self.shape[1] * self.shape[2]

    @property
    def kl_per_position(self) -> float | None:
        """Nats, over all channels; None for a deterministic autoencoder."""
        return None if self.kl is None else float(self.kl.sum())

    @property
    def posterior_std(self) -> Tensor:
        """The root of the posterior's mean variance, per channel (C,)."""
        return (self.std.square() - self.mean_std.square()).clamp(min=0.0).sqrt()

    @property
    def sigma(self) -> float | None:
        """:attr:`posterior_std` of all channels together; None for a deterministic autoencoder."""
        return None if self.kl is None else float(self.posterior_std.square().mean().sqrt())

    @property
    def skipped(self) -> dict[str, str]:
        """By number, why it is missing."""
        skipped = {"kl": NO_DISTRIBUTION, "active": NO_DISTRIBUTION} if self.deterministic else {}
        return skipped if self.mmd is not None else skipped | {"mmd": "needs at least two different images"}

    def as_dict(self) -> dict[str, Any]:
        """A row of latents.json: plain numbers and lists."""
        posterior: dict[str, Any] = {}
        channels: dict[str, Any] = {"min": self.minimum.tolist(), "max": self.maximum.tolist()}
        if self.kl is not None and self.active is not None:
            posterior = {
                "posterior_std": self.sigma,
                "kl_per_position": self.kl_per_position,
                "kl_per_image": self.kl_per_image,
                "active_channels": int(self.active.sum()),
            }
            channels = {
                "std_of_posterior_means": self.mean_std.tolist(),
                "min_of_posterior_means": self.minimum.tolist(),
                "max_of_posterior_means": self.maximum.tolist(),
                "posterior_std": self.posterior_std.tolist(),
                "kl_per_position": self.kl.tolist(),
                "kl_per_image": (self.kl * self.shape[1] * self.shape[2]).tolist(),
                "active": self.active.tolist(),
            }
        mmd: dict[str, Any] = {}
        if self.mmd is not None:
            mmd = {
                "latents": self.mmd.n,
                "sigmas": list(SIGMAS),
                "mmd2": self.mmd.raw,
                "mmd2_scaled": self.mmd.scaled,
                "standard_error_under_normal": self.mmd.null_std,
            }
        return {
            "n": self.n,
            "latent_shape": list(self.shape),
            "deterministic": self.deterministic,
            "mean": self.shift_factor,
            "std": 1.0 / self.scaling_factor,
            **posterior,
            "diffusion": {
                "shift_factor": self.shift_factor,
                "scaling_factor": self.scaling_factor,
                "latents_mean": self.mean.tolist(),
                "latents_std": self.std.tolist(),
            },
            "channels": {"mean": self.mean.tolist(), "std": self.std.tolist(), **channels},
            "correlation": self.correlation.tolist(),
            "spectrum": {
                "cycles_per_position": self.frequency.tolist(),
                "mean": self.spectrum.mean(0).tolist(),
                "channels": self.spectrum.tolist(),
            },
            "histogram": {
                "edges": EDGES.tolist(),
                "normal": torch.special.ndtr(EDGES).diff().tolist(),
                **_shares(self.mass.mean(0)),
                "channels": [_shares(row) for row in self.mass],
            },
            **({"mmd": mmd} if mmd else {}),
            **({"skipped": self.skipped} if self.skipped else {}),
        }


@dataclass(frozen=True)
class Totals:
    """Sums over images and positions.

    Args:
        n: images.
        mean: of the posterior means (C,).
        cross: of products of two channels' posterior means (C, C).
        var: of the posterior variances (C,).
        kl: nats (C,); None for deterministic latents.
        minimum, maximum: of the posterior means (C,).
        power: of the posterior means' Fourier transform (C, h, w).
        mass: of z in each bin of EDGES, and at the ends below and above them (C, bins + 2).
    """

    n: int
    mean: Tensor
    cross: Tensor
    var: Tensor
    kl: Tensor | None
    minimum: Tensor
    maximum: Tensor
    power: Tensor
    mass: Tensor

    def __add__(self, other: "Totals") -> "Totals":
        if self.power.shape != other.power.shape:
            raise ValueError(
                f"latents of different shapes, {tuple(self.power.shape)} and {tuple(other.power.shape)}: "
                "the images must have one size"
            )
        return Totals(
            self.n + other.n,
            self.mean + other.mean,
            self.cross + other.cross,
            self.var + other.var,
            None if self.kl is None or other.kl is None else self.kl + other.kl,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.power + other.power,
            self.mass + other.mass,
        )

    def summary(self, latents: list[Tensor]) -> LatentSummary:
        """The report's numbers; ``latents`` are samples for the MMD, each (C, h, w)."""
        channels, h, w = self.power.shape
        count = self.n * h * w
        mean, noise = self.mean / count, self.var / count
        covariance = self.cross / count - torch.outer(mean, mean)
        mean_var = covariance.diagonal().clamp(min=0.0)
        var = mean_var + noise
        scales = torch.outer(var, var).sqrt()
        correlation = torch.where(scales > 0.0, covariance / scales, 0.0)  # a constant channel correlates with none
        correlation.fill_diagonal_(1.0)
        frequency, spectrum = self._spectrum(mean, noise)
        shift = float(mean.mean())
        scale = float((var + mean.square()).mean() - shift**2) ** -0.5
        return LatentSummary(
            n=self.n,
            shape=(channels, h, w),
            mean=mean,
            std=var.sqrt(),
            mean_std=mean_var.sqrt(),
            minimum=self.minimum,
            maximum=self.maximum,
            kl=None if self.kl is None else self.kl / count,
            active=None if self.kl is None else mean_var > ACTIVE_VARIANCE,
            correlation=correlation,
            frequency=frequency,
            spectrum=spectrum,
            mass=self.mass / count,
            shift_factor=shift,
            scaling_factor=scale,
            mmd=_mmd(latents, shift, scale),
        )

    def _spectrum(self, mean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies (F,) up to Nyquist's, one ring per cycle over the shorter side, and their power (C, F)."""
        _, h, w = self.power.shape
        power = self.power / self.n + noise[:, None, None]  # the noise is white
        power[:, 0, 0] -= h * w * mean.square()  # the channel's mean over the data is not structure
        y, x = torch.fft.fftfreq(h, dtype=torch.float64), torch.fft.fftfreq(w, dtype=torch.float64)
        side = min(h, w)
        ring = (torch.hypot(y[:, None], x[None, :]) * side).round().long().flatten()  # (h w,)
        rings = side // 2 + 1
        inside = ring < rings  # without the corners, which are beyond the axes' Nyquist frequency
        total = torch.zeros(len(mean), rings, dtype=torch.float64)
        total.index_add_(1, ring[inside], power.flatten(1)[:, inside])
        size = torch.bincount(ring[inside], minlength=rings)
        return torch.arange(rings, dtype=torch.float64) / side, total / size


def _mmd(latents: list[Tensor], shift: float, scale: float) -> Mmd | None:
    if len(latents) < 2:
        return None
    z = torch.stack(latents).flatten(1)  # (N, C h w)
    raw = mmd2_normal(z)
    scaled = mmd2_normal(z.sub_(shift).mul_(scale))
    return Mmd(len(z), raw.tolist(), scaled.tolist(), mmd2_null_std(*z.shape).tolist())


def _shares(mass: Tensor) -> dict[str, Any]:
    return {"below": float(mass[0]), "share": mass[1:-1].tolist(), "above": float(mass[-1])}


SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""The bandwidths of the paper's comparison [P Table 6]."""


def mmd2_normal(z: Tensor, sigmas: Sequence[float] = SIGMAS, chunk: int = 512) -> Tensor:
    """MMD^2 between the distribution that ``z`` was drawn from and N(0, I), for RBF kernels of several widths.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), over whole flattened latents, and the unbiased estimator [D: the paper
    specifies neither]. The kernel's expectation under N(0, I) has a closed form, so no normal samples are drawn:

        MMD^2 = mean over i != j of k(z_i, z_j) - 2 mean over i of e(z_i) + c
        e(x) = E k(x, y) = (s / (s + 1))^(d/2) exp(-|x|^2 / (2 (s + 1))),   c = E k(y, y') = (s / (s + 2))^(d/2)

    with s = sigma^2 and d the number of values of a latent. So the value is deterministic given ``z``; its only error
    is the sampling error of the latents, and being unbiased, it can be slightly below 0. At sigma = 500 the three terms
    are near 1 and their sum near 1e-7, so everything is in float64.

    Args:
        z: (N, ...) of any floating type, one latent per row, N at least 2.
        sigmas: bandwidths, above 0.
        chunk: rows at a time; memory is ``z`` and two chunks in float64.

    Returns:
        float64 (len(sigmas),), between 0 and 2 up to the sampling error: :func:`mmd2_null_std`.
    """
    z = z.flatten(1)  # (N, d)
    n, d = z.shape
    s = torch.tensor(sigmas, dtype=torch.float64, device=z.device).square()  # (S,)
    square = torch.cat([part.double().square().sum(1) for part in z.split(chunk)])  # (N,)
    pairs = torch.zeros_like(s)
    for start in range(0, n, chunk):
        rows = z[start : start + chunk].double()
        for other in range(0, start + 1, chunk):  # the matrix is symmetric: its lower triangle of blocks
            inner = rows @ z[other : other + chunk].double().T
            distance = square[start : start + chunk, None] + square[None, other : other + chunk] - 2.0 * inner
            distance = distance.clamp(min=0.0)  # (rows, columns)
            if other == start:
                distance.fill_diagonal_(torch.inf)  # excludes i = j
            weight = 1.0 if other == start else 2.0
            pairs += torch.stack([weight * (distance / (-2.0 * v)).exp().sum() for v in s])
    log_e = -0.5 * d * torch.log1p(1.0 / s)[:, None] - square / (2.0 * (s[:, None] + 1.0))  # (S, N)
    c = (-0.5 * d * torch.log1p(2.0 / s)).exp()
    return pairs / (n * (n - 1)) - 2.0 * log_e.exp().mean(1) + c


def mmd2_null_std(n: int, d: int, sigmas: Sequence[float] = SIGMAS) -> Tensor:
    """Standard deviation of :func:`mmd2_normal` over sets of ``n`` latents of ``d`` values drawn from N(0, I).

    The estimator is the mean over pairs of h(x, x') = k(x, x') - e(x) - e(x') + c, whose expectation given either
    argument is 0 under N(0, I). So its variance is 2 E h^2 / (n (n - 1)), and E h^2 = E k^2 - 2 E e^2 + c^2 has a
    closed form. A measured value of a few standard deviations is noise.

    Returns:
        float64 (len(sigmas),).
    """
    s = torch.tensor(sigmas, dtype=torch.float64).square()
    k2 = -0.5 * d * torch.log1p(4.0 / s)  # log E k^2: the kernel of half the squared width
    e2 = -d * torch.log1p(1.0 / s) - 0.5 * d * torch.log1p(2.0 / (s + 1.0))
    c2 = -d * torch.log1p(2.0 / s)
    h2 = c2.exp() * (torch.expm1(k2 - c2) - 2.0 * torch.expm1(e2 - c2))
    return (2.0 * h2.clamp(min=0.0) / (n * (n - 1))).sqrt()
