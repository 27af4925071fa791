"""The distribution of a model's latents over images, accumulated: what a diffusion model will have to learn."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from olvae.evaluation.latents.summary import EDGES, LatentSummary, Totals
from olvae.modules.distributions import Posterior, keyed_seed

__all__ = ["MMD_LATENTS", "LatentAccumulator", "image_key"]


MMD_LATENTS = 10_000
"""The most latents that the MMD is computed over."""


def image_key(image: Tensor) -> int:
    """A number below 2^63 that identifies the pixels of a uint8 (C, H, W) image."""
    array = image.cpu().contiguous().numpy()
    return keyed_seed(repr(array.shape).encode() + array.tobytes())


class LatentAccumulator:
    """Sums over batches of posteriors, in float64; the order and the size of batches make no difference.

    A latent is z = mean + std * noise. Whatever can be computed without drawing noise is: the variance of z is the
    variance of the means plus the mean of the variances, its spectrum the means' spectrum plus a flat one, its
    histogram an average of normal distributions. Only the MMD needs samples. An image's noise comes from a generator
    seeded with the image's key, and the samples kept are those of the smallest keys: an arbitrary choice of images
    that depends on nothing else. Equal images count once in the MMD. A deterministic latent is z itself.

    Args:
        mmd_latents: how many samples to keep for the MMD, in float32.
    """

    def __init__(self, mmd_latents: int = MMD_LATENTS) -> None:
        self.mmd_latents = mmd_latents
        self._totals: Totals | None = None
        self._samples: dict[int, Tensor] = {}
        self._minus_keys: list[int] = []  # a heap with the largest key on top

    def update(self, posterior: Posterior, keys: Sequence[int]) -> None:
        """Add a batch.

        Args:
            posterior: over (B, n_z, h, w), on any device.
            keys: of the B images; see :func:`image_key`.

        Raises:
            ValueError: the posterior is not finite, or its shape differs from the ones before.
        """
        assert len(keys) == posterior.mean.shape[0]
        device = "cpu" if posterior.mean.device.type == "mps" else posterior.mean.device  # mps has no float64
        mean = posterior.mean.to(device).double()  # (B, C, h, w)
        logvar = None if posterior.deterministic else posterior.logvar.to(device).double()
        if not (mean.isfinite().all() and (logvar is None or logvar.isfinite().all())):
            raise ValueError("the latents are not finite: the weights may be of a run that diverged")
        self._add(_totals(mean, logvar))
        std = torch.zeros_like(mean) if logvar is None else (0.5 * logvar).exp()
        for i, key in enumerate(keys):
            if self._wants(key):
                noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(key), dtype=torch.float64)
                self._keep(key, (mean[i].cpu() + std[i].cpu() * noise).float())

    def merge(self, other: "LatentAccumulator") -> None:
        """Add what another accumulator has seen, for example in another process."""
        if other._totals is not None:
            self._add(other._totals)
        for key, z in other._samples.items():
            if self._wants(key):
                self._keep(key, z)

    def compute(self) -> LatentSummary:
        """The numbers of the report.

        Raises:
            ValueError: no images were seen.
        """
        if self._totals is None:
            raise ValueError("no images: there are no latents to describe")
        return self._totals.summary([self._samples[key] for key in sorted(self._samples)])

    def _add(self, totals: Totals) -> None:
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


def _totals(mean: Tensor, logvar: Tensor | None) -> Totals:
    """The sums of one batch, (B, C, h, w) in float64; deterministic latents have no log-variance."""
    flat = mean.transpose(0, 1).flatten(1)  # (C, B h w)
    if logvar is None:
        var, kl, mass = torch.zeros_like(mean), None, _point_mass(flat)
    else:
        var = logvar.exp()
        kl = (0.5 * (mean.square() + var - 1.0 - logvar)).sum((0, 2, 3)).cpu()
        mass = _mass(flat, (0.5 * logvar).exp().transpose(0, 1).flatten(1))
    power = torch.fft.fft2(mean, norm="ortho").abs().square().sum(0)  # (C, h, w)
    return Totals(
        n=mean.shape[0],
        mean=flat.sum(1).cpu(),
        cross=(flat @ flat.T).cpu(),
        var=var.sum((0, 2, 3)).cpu(),
        kl=kl,
        minimum=flat.amin(1).cpu(),
        maximum=flat.amax(1).cpu(),
        power=power.cpu(),
        mass=mass.cpu(),
    )


def _mass(mean: Tensor, std: Tensor) -> Tensor:
    """Expected count of z in each bin of EDGES, and at the ends below and above them: (C, bins + 2)."""
    below = [torch.special.ndtr((edge - mean) / std).sum(1) for edge in EDGES.tolist()]
    count = torch.full_like(below[0], mean.shape[1])
    return torch.stack([torch.zeros_like(count), *below, count], dim=1).diff(dim=1)


def _point_mass(z: Tensor) -> Tensor:
    """Count of z in each bin of EDGES, and at the ends below and above them: (C, bins + 2)."""
    index = torch.bucketize(z, EDGES.to(z.device), right=True)  # (C, B h w), in 0..bins + 1
    return torch.stack([torch.bincount(row, minlength=len(EDGES) + 1) for row in index]).double()
