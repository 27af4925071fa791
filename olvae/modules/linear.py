"""The linear code: principal components of patches, decoded by least squares from 3x3 positions, in closed form."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Decoder, Encoder, Stage, check_counts
from olvae.modules.distributions import LOGVAR_RANGE

LEAST_VARIANCE = (2 / 255) ** 2 / 12
"""Of rounding to 8 bits, for values in [-1, 1]: components with less than that are not enlarged to unit variance."""


class LinearEncoder(Encoder):
    """An encoder that is a linear path alone, with the smallest log-variances there are.

    Args:
        latent_dim: twice the channels of the latent.
        in_channels: channels of the image.
        downscale: side of a patch in pixels.
        image_size: the intended size in pixels, at which summaries count operations.

    Shapes: (B, in_channels, H, W) in [-1, 1] -> (B, latent_dim, H/downscale, W/downscale).
    """

    def __init__(self, latent_dim: int = 24, in_channels: int = 3, downscale: int = 8, image_size: int = 256) -> None:
        super().__init__()
        check_counts(1, latent_dim=latent_dim, in_channels=in_channels, downscale=downscale)
        self.latent_dim, self.in_channels = latent_dim, in_channels
        self.downscale, self.image_size = downscale, image_size
        self.add_linear_path()

    def forward(self, x: Tensor) -> Tensor:
        assert self.linear is not None
        mean = self.linear(x)  # (B, latent_dim / 2, H/f, W/f)
        return torch.cat((mean, torch.full_like(mean, LOGVAR_RANGE[0])), dim=1)


class LinearDecoder(Decoder):
    """A decoder that is a linear path alone: a convolution of 3x3 latent positions, rearranged to pixels.

    Args:
        z_channels: channels of the latent.
        out_channels: channels of the image.
        upscale: side of a patch in pixels.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, upscale h, upscale w).
    """

    def __init__(self, z_channels: int = 12, out_channels: int = 3, upscale: int = 8) -> None:
        super().__init__()
        check_counts(1, z_channels=z_channels, out_channels=out_channels, upscale=upscale)
        self.z_channels, self.out_channels, self.upscale = z_channels, out_channels, upscale
        self.add_linear_path()

    def forward(self, z: Tensor) -> Tensor:
        return self.linear_path(z)

    def paths(self) -> list[list[Stage]]:
        return [[Stage(self.linear_path, 1, self.upscale)]]


@dataclass(frozen=True)
class LinearMap:
    """y = weight x + bias in float64: (q, p), (q)."""

    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def copy_to(self, conv: nn.Conv2d) -> None:
        """Set a convolution to this function of its inputs, in the order (channel, row, column), or of the middle."""
        assert conv.bias is not None
        weight = self.weight.unflatten(1, (conv.in_channels, -1))
        side = math.isqrt(weight.shape[2])
        more = (conv.kernel_size[0] - side) // 2
        conv.weight.copy_(F.pad(weight.unflatten(2, (side, side)), (more,) * 4))
        conv.bias.copy_(self.bias)


class JointMoments:
    """Means and covariances of two vectors, summed over samples in float64 on the CPU.

    Args:
        p, q: the lengths of the vectors x and y.
    """

    def __init__(self, p: int, q: int) -> None:
        self.p, self.count = p, 0
        self._sum = torch.zeros(p + q, dtype=torch.float64)
        self._products = torch.zeros(p + q, p + q, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add samples, (n, p) and (n, q)."""
        both = torch.cat((x, y), dim=1).detach().cpu().double()
        self.count += len(both)
        self._sum += both.sum(0)
        self._products += both.T @ both

    @property
    def mean(self) -> Tensor:
        """(p + q)."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(p + q, p + q)."""
        return self._products / self.count - self.mean.outer(self.mean)

    def least_squares(self) -> LinearMap:
        """The map from x to y of least squares; the smallest one where several are."""
        covariance, mean, p = self.covariance, self.mean, self.p
        weight = covariance[p:, :p] @ torch.linalg.pinv(covariance[:p, :p], rtol=1e-12, hermitian=True)
        return LinearMap(weight, mean[p:] - weight @ mean[:p])

    def principal_components(self, count: int) -> LinearMap:
        """The map from x to its ``count`` first principal components, whitened: mean 0 and variance 1 each.

        The largest weight of each is positive, so that its sign is defined. Beyond p they are 0.
        """
        variances, axes = torch.linalg.eigh(self.covariance[: self.p, : self.p])  # ascending; axes in columns
        axes = axes.flip(1)[:, :count].T  # (count, p)
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
        weight = axes / variances.flip(0)[:count, None].clamp(min=LEAST_VARIANCE).sqrt()
        weight = F.pad(weight, (0, 0, 0, count - len(weight)))
        return LinearMap(weight, -weight @ self.mean[: self.p])
