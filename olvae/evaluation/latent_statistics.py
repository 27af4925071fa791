"""Accumulate the distribution of a model's latents over images: moments, KL, spectrum, histogram, MMD to N(0, I)."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olvae.modules.distributions import Posterior, keyed_seed
from olvae.modules.scaling_factors import Moments

ACTIVE_VARIANCE = 0.01
"""A channel is active if its posterior mean varies by more than this over the data (Burda et al. 2016, section 5.1)."""

NO_DISTRIBUTION = "a deterministic autoencoder: its latents have no distribution of their own"
"""Why KL and active channels are skipped."""

EDGES = 0.5 * torch.linspace(-5.0, 5.0, 201, dtype=torch.float64).sinh()
"""Edges of the histogram's bins: from -37 to 37, 0.025 wide at 0, 0.05 at 1 and 0.5 at 10 [D]."""

MMD_LATENTS = 10_000
"""The most latents that the MMD is computed over."""

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""The bandwidths of the paper's comparison [P Table 6]."""


def image_key(image: Tensor) -> int:
    """A number below 2^63 that identifies the pixels of a uint8 (C, H, W) image."""
    array = image.cpu().contiguous().numpy()
    return keyed_seed(repr(array.shape).encode() + array.tobytes())


@dataclass(frozen=True)
class _Totals:
    """Sums over images and positions."""

    n: int
    moments: Moments
    cross: Tensor  # products of two channels' posterior means (C, C)
    kl: Tensor | None  # nats (C,); None for deterministic latents
    minimum: Tensor  # of the posterior means (C,)
    maximum: Tensor
    power: Tensor  # of the posterior means' Fourier transform (C, h, w)
    mass: Tensor  # of z in each bin of EDGES and beyond both ends (C, bins + 2)

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor | None) -> "_Totals":
        """The sums of one batch, (B, C, h, w) in float64; deterministic latents have no log-variance."""
        flat = mean.transpose(0, 1).flatten(1)  # (C, B h w)
        if logvar is None:
            var, kl, mass = None, None, _point_mass(flat)
        else:
            var = logvar.exp()
            kl = (0.5 * (mean.square() + var - 1.0 - logvar)).sum((0, 2, 3)).cpu()
            mass = _mass(flat, (0.5 * logvar).exp().transpose(0, 1).flatten(1))
        return cls(
            n=mean.shape[0],
            moments=Moments.of(mean, var),
            cross=(flat @ flat.T).cpu(),
            kl=kl,
            minimum=flat.amin(1).cpu(),
            maximum=flat.amax(1).cpu(),
            power=torch.fft.fft2(mean, norm="ortho").abs().square().sum(0).cpu(),
            mass=mass.cpu(),
        )

    def __add__(self, other: "_Totals") -> "_Totals":
        if self.power.shape != other.power.shape:
            raise ValueError(
                f"latents of different shapes, {tuple(self.power.shape)} and {tuple(other.power.shape)}: "
                "the images must have one size"
            )
        return _Totals(
            self.n + other.n,
            self.moments + other.moments,
            self.cross + other.cross,
            None if self.kl is None or other.kl is None else self.kl + other.kl,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.power + other.power,
            self.mass + other.mass,
        )

    def as_dict(self) -> dict[str, Any]:
        """A row of latents.json but for the MMD: plain numbers and lists, and why some are missing."""
        moments = self.moments
        scale, shift = moments.factors()
        mean, std = moments.mean.tolist(), moments.std.tolist()
        mass = self.mass / moments.positions
        overall, channels, skipped = self._posterior()
        return {
            "n": self.n,
            "latent_shape": list(self.power.shape),
            "deterministic": self.kl is None,
            "mean": shift,
            "std": 1.0 / scale,
            **overall,
            "diffusion": {"shift_factor": shift, "scaling_factor": scale, "latents_mean": mean, "latents_std": std},
            "channels": {"mean": mean, "std": std, **channels},
            "correlation": self._correlation().tolist(),
            "spectrum": self._spectrum(),
            "histogram": {
                "edges": EDGES.tolist(),
                "normal": torch.special.ndtr(EDGES).diff().tolist(),
                **_shares(mass.mean(0)),
                "channels": [_shares(row) for row in mass],
            },
            "skipped": skipped,
        }

    def _posterior(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """What deterministic latents lack, over all channels and per channel, and why."""
        low, high = self.minimum.tolist(), self.maximum.tolist()
        if self.kl is None:
            return {}, {"min": low, "max": high}, dict.fromkeys(("kl", "active"), NO_DISTRIBUTION)
        variances = self.moments.variances / self.moments.positions
        kl, positions = self.kl / self.moments.positions, self.power[0].numel()
        active = self.moments.std_of_means.square() > ACTIVE_VARIANCE
        overall = {
            "posterior_std": float(variances.mean().sqrt()),
            "kl_per_position": float(kl.sum()),
            "kl_per_image": float(kl.sum()) * positions,
            "active_channels": int(active.sum()),
        }
        channels = {
            "std_of_posterior_means": self.moments.std_of_means.tolist(),
            "min_of_posterior_means": low,
            "max_of_posterior_means": high,
            "posterior_std": variances.sqrt().tolist(),
            "kl_per_position": kl.tolist(),
            "kl_per_image": (kl * positions).tolist(),
            "active": active.tolist(),
        }
        return overall, channels, {}

    def _correlation(self) -> Tensor:
        """Of z between channels (C, C); a constant channel correlates with none."""
        moments = self.moments
        covariance = self.cross / moments.positions - torch.outer(moments.mean, moments.mean)
        scales = torch.outer(moments.std, moments.std)
        return torch.where(scales > 0.0, covariance / scales, 0.0).fill_diagonal_(1.0)

    def _spectrum(self) -> dict[str, Any]:
        """Mean power of the orthonormal Fourier transform of z, minus the channel's mean, by cycles per position.

        There is one ring per cycle over the shorter side, up to Nyquist's; N(0, 1) has 1 everywhere.
        """
        _, h, w = self.power.shape
        noise = self.moments.variances / self.moments.positions
        power = self.power / self.n + noise[:, None, None]  # the noise is white
        power[:, 0, 0] -= h * w * self.moments.mean.square()  # the channel's mean over the data is not structure
        y, x = torch.fft.fftfreq(h, dtype=torch.float64), torch.fft.fftfreq(w, dtype=torch.float64)
        side = min(h, w)
        ring = (torch.hypot(y[:, None], x[None, :]) * side).round().long().flatten()  # (h w,)
        rings = side // 2 + 1
        inside = ring < rings  # without the corners, which are beyond the axes' Nyquist frequency
        total = torch.zeros(len(power), rings, dtype=torch.float64)
        total.index_add_(1, ring[inside], power.flatten(1)[:, inside])
        spectrum = total / torch.bincount(ring[inside], minlength=rings)
        return {
            "cycles_per_position": (torch.arange(rings, dtype=torch.float64) / side).tolist(),
            "mean": spectrum.mean(0).tolist(),
            "channels": spectrum.tolist(),
        }


class LatentAccumulator:
    """Sum over batches of posteriors, in float64; the order and the size of batches make no difference.

    A latent is z = mean + std * noise; a deterministic one is z itself. Expectations over the noise are closed: the
    spectrum is the means' plus a flat one, the histogram an average of normal distributions. Only the MMD needs
    samples: of the images with the smallest keys, at most ``mmd_latents``, with noise seeded by the key. Equal images
    count once in it.
    """

    def __init__(self, mmd_latents: int = MMD_LATENTS) -> None:
        self.mmd_latents = mmd_latents
        self._totals: _Totals | None = None
        self._samples: dict[int, Tensor] = {}
        self._minus_keys: list[int] = []  # a heap with the largest key on top

    def update(self, posterior: Posterior, keys: Sequence[int]) -> None:
        """Add a posterior over (B, n_z, h, w), on any device, with its images' keys: :func:`image_key`.

        Raises:
            ValueError: it is not finite, or its shape differs from the ones before.
        """
        assert len(keys) == posterior.mean.shape[0]
        device = "cpu" if posterior.mean.device.type == "mps" else posterior.mean.device  # mps has no float64
        mean = posterior.mean.to(device).double()  # (B, C, h, w)
        logvar = None if posterior.deterministic else posterior.logvar.to(device).double()
        if not (mean.isfinite().all() and (logvar is None or logvar.isfinite().all())):
            raise ValueError("the latents are not finite: the weights may be of a run that diverged")
        self._add(_Totals.of(mean, logvar))
        std = torch.zeros_like(mean) if logvar is None else (0.5 * logvar).exp()
        for i, key in enumerate(keys):
            if self._wants(key):
                noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(key), dtype=torch.float64)
                self._keep(key, (mean[i].cpu() + std[i].cpu() * noise).float())

    def merge(self, other: "LatentAccumulator") -> None:
        """Add all batches of another accumulator, for example of another process."""
        if other._totals is not None:
            self._add(other._totals)
        for key, z in other._samples.items():
            if self._wants(key):
                self._keep(key, z)

    def compute(self) -> dict[str, Any]:
        """Compute a row of latents.json: numbers and lists, and reasons under ``skipped`` for those missing.

        Raises:
            ValueError: there were no images, or all latents are equal.
        """
        if self._totals is None:
            raise ValueError("no images: there are no latents to describe")
        row = self._totals.as_dict()
        skipped = row.pop("skipped")
        if len(self._samples) < 2:
            skipped["mmd"] = "needs at least two different images"
        else:
            z = torch.stack([self._samples[key] for key in sorted(self._samples)]).flatten(1)  # (N, C h w)
            row["mmd"] = {"latents": len(z), "sigmas": list(SIGMAS), "mmd2": mmd2_normal(z).tolist()}
            z.sub_(row["mean"]).mul_(row["diffusion"]["scaling_factor"])
            row["mmd"]["mmd2_scaled"] = mmd2_normal(z).tolist()
            row["mmd"]["standard_error_under_normal"] = mmd2_null_std(*z.shape).tolist()
        return row | ({"skipped": skipped} if skipped else {})

    def _add(self, totals: _Totals) -> None:
        self._totals = totals if self._totals is None else self._totals + totals

    def _wants(self, key: int) -> bool:
        if key in self._samples or not self.mmd_latents:
            return False
        return len(self._samples) < self.mmd_latents or key < -self._minus_keys[0]

    def _keep(self, key: int, z: Tensor) -> None:
        heapq.heappush(self._minus_keys, -key)
        self._samples[key] = z
        if len(self._samples) > self.mmd_latents:
            del self._samples[-heapq.heappop(self._minus_keys)]


def _mass(mean: Tensor, std: Tensor) -> Tensor:
    """Expected count of z in each bin of EDGES, and at the ends below and above them: (C, bins + 2)."""
    below = [torch.special.ndtr((edge - mean) / std).sum(1) for edge in EDGES.tolist()]
    count = torch.full_like(below[0], mean.shape[1])
    return torch.stack([torch.zeros_like(count), *below, count], dim=1).diff(dim=1)


def _point_mass(z: Tensor) -> Tensor:
    """Count of z in each bin of EDGES, and at the ends below and above them: (C, bins + 2)."""
    index = torch.bucketize(z, EDGES.to(z.device), right=True)  # (C, B h w), in 0..bins + 1
    return torch.stack([torch.bincount(row, minlength=len(EDGES) + 1) for row in index]).double()


def _shares(mass: Tensor) -> dict[str, Any]:
    return {"below": float(mass[0]), "share": mass[1:-1].tolist(), "above": float(mass[-1])}


def mmd2_normal(z: Tensor, sigmas: Sequence[float] = SIGMAS, chunk: int = 512) -> Tensor:
    """Estimate MMD^2 between latents ``z`` (N, ...) and N(0, I), for RBF kernels of several widths, in float64.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), over whole flattened latents, and the unbiased estimator [D: the paper
    specifies neither]. The kernel's expectation under N(0, I) has a closed form, so no normal samples are drawn:

        MMD^2 = mean over i != j of k(z_i, z_j) - 2 mean over i of e(z_i) + c
        e(x) = E k(x, y) = (s / (s + 1))^(d/2) exp(-|x|^2 / (2 (s + 1))),   c = E k(y, y') = (s / (s + 2))^(d/2)

    with s = sigma^2 and d the number of values of a latent. Being unbiased, it can be slightly below 0: its error is
    :func:`mmd2_null_std`. Memory is ``z`` and two chunks of rows in float64.
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
    argument is 0 under N(0, I). So its variance is 2 E h^2 / (n (n - 1)), with E h^2 = E k^2 - 2 E e^2 + c^2.
    """
    s = torch.tensor(sigmas, dtype=torch.float64).square()
    k2 = -0.5 * d * torch.log1p(4.0 / s)  # log E k^2: the kernel of half the squared width
    e2 = -d * torch.log1p(1.0 / s) - 0.5 * d * torch.log1p(2.0 / (s + 1.0))
    c2 = -d * torch.log1p(2.0 / s)
    h2 = c2.exp() * (torch.expm1(k2 - c2) - 2.0 * torch.expm1(e2 - c2))
    return (2.0 * h2.clamp(min=0.0) / (n * (n - 1))).sqrt()
