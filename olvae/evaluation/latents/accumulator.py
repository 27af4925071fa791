"""The distribution of a model's latents over images: what a diffusion model will have to learn."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.evaluation.latents.summary import EDGES, LatentSummary, Totals
from olvae.modules.distributions import Posterior, keyed_seed

__all__ = ["MMD_LATENTS", "LatentAccumulator", "image_key"]


MMD_LATENTS = 10_000
"""How many latents the MMD is computed over, at most."""


def image_key(image: Tensor) -> int:
    """A number below 2^63 that stands for the pixels of a uint8 (C, H, W) image."""
    array = image.cpu().contiguous().numpy()
    return keyed_seed(repr(array.shape).encode() + array.tobytes())


class _Kept(NamedTuple):
    """A latent kept for the MMD; a heap of them has the largest key on top."""

    minus_key: int
    z: Tensor


class LatentAccumulator:
    """Sums over batches of posteriors, in float64; neither order nor size of the batches matters.

    A latent is z = mean + std * noise. What can be said of it without drawing noise is computed so: the variance of
    z is the variance of the means plus the mean of the variances, its spectrum the means' spectrum plus a flat one,
    its histogram an average of normal distributions. The MMD alone needs draws. The noise of an image comes from a
    generator seeded with the image's key, and the latents kept are those of the smallest keys: a sample of the
    images that depends on nothing else. Equal images count once in the MMD. A deterministic latent is z itself.

    Args:
        mmd_latents: how many latents to keep for the MMD, in float32.
    """

    def __init__(self, mmd_latents: int = MMD_LATENTS) -> None:
        self.mmd_latents = mmd_latents
        self.totals: Totals | None = None
        self._kept: list[_Kept] = []
        self._keys: set[int] = set()

    @property
    def n(self) -> int:
        """Images seen."""
        return self.totals.n if self.totals else 0

    def update(self, posterior: Posterior, keys: Sequence[int]) -> None:
        """Add a batch.

        Args:
            posterior: over (B, n_z, h, w), on any device.
            keys: of the B images; see :func:`image_key`.

        Raises:
            ValueError: the posterior is not finite, or has another shape than those before.
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
                self._keep(_Kept(-key, (mean[i].cpu() + std[i].cpu() * noise).float()))

    def merge(self, other: "LatentAccumulator") -> None:
        """Add what another accumulator has seen, for example that of another process."""
        if other.totals is not None:
            self._add(other.totals)
        for kept in other._kept:
            if self._wants(-kept.minus_key):
                self._keep(kept)

    def compute(self) -> LatentSummary:
        """The numbers.

        Raises:
            ValueError: no images were seen.
        """
        if self.totals is None:
            raise ValueError("no images: there are no latents to describe")
        ordered = sorted(self._kept, key=lambda kept: -kept.minus_key)
        return self.totals.summary([kept.z for kept in ordered])

    def _add(self, totals: Totals) -> None:
        self.totals = totals if self.totals is None else self.totals + totals

    def _wants(self, key: int) -> bool:
        if key in self._keys or not self.mmd_latents:
            return False
        return len(self._kept) < self.mmd_latents or key < -self._kept[0].minus_key

    def _keep(self, kept: _Kept) -> None:
        self._keys.add(-kept.minus_key)
        if len(self._kept) < self.mmd_latents:
            heapq.heappush(self._kept, kept)
        else:
            self._keys.remove(-heapq.heappushpop(self._kept, kept).minus_key)


def _totals(mean: Tensor, logvar: Tensor | None) -> Totals:
    """Of one batch, (B, C, h, w) in float64; of deterministic latents the log-variance is None."""
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
    """Expected count of z in each bin of EDGES, with what lies below and above at the ends: (C, bins + 2)."""
    below = [torch.special.ndtr((edge - mean) / std).sum(1) for edge in EDGES.tolist()]
    count = torch.full_like(below[0], mean.shape[1])
    return torch.stack([torch.zeros_like(count), *below, count], dim=1).diff(dim=1)


def _point_mass(z: Tensor) -> Tensor:
    """Count of z in each bin of EDGES, with what lies below and above at the ends: (C, bins + 2)."""
    index = torch.bucketize(z, EDGES.to(z.device), right=True)  # (C, B h w), in 0..bins + 1
    return torch.stack([torch.bincount(row, minlength=len(EDGES) + 1) for row in index]).double()
