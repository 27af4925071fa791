"""Loss terms: pixel, wavelet, Gaussian and KL; of one or two latents; of a latent and features.

Each is a mean over elements, in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.modules.distributions import Posterior
from olvae.modules.mixed_precision import no_autocast, upcast, without_tf32
from olvae.modules.wavelet import dwt2


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (upcast(x) - upcast(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (upcast(x) - upcast(y)).square().mean()


def charbonnier(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """mean sqrt(d^2 + eps^2): an L1 that is smooth at 0; eps for equal inputs [P 4.3]."""
    return ((upcast(x) - upcast(y)).square() + eps**2).sqrt().mean()


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
}


def wavelet_loss(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """Charbonnier between the three level-1 detail bands of the orthonormal Haar transform [P 4.3].

    Images (B, C, H, W). The paper's encoder divides its bands by 2 [P App. G]; this loss does not.
    Nor do users' adaptations of the loss that open-LiteVAE's author posted (issue 1 of its
    repository), second hand [R].
    """
    channels = x.shape[1]
    return charbonnier(dwt2(x)[:, channels:], dwt2(y)[:, channels:], eps)  # (B, 3C, H/2, W/2)


def gaussian_blur(x: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """Separable Gaussian filter with reflected borders, in float32; (B, C, H, W) to the same.

    Never in TF32: on CUDA it is computed in float64.
    """
    # The kernel of one axis.
    x = upcast(x)
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = without_tf32(kernel / kernel.sum())

    # Along the width, then along the height, each channel by itself.
    channels = x.shape[1]
    dtype = x.dtype
    x = without_tf32(F.pad(x, (radius, radius, radius, radius), mode="reflect"))
    with no_autocast(x):
        x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return x.to(dtype)


def gaussian_loss(x: Tensor, y: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """L1 between x - blur(x) and y - blur(y), images (B, C, H, W); 5x5, sigma 1 [D]."""
    # The filter is linear: the difference of the residuals is the residual of the difference.
    difference = upcast(x) - upcast(y)
    return l1(difference, gaussian_blur(difference, kernel_size, sigma))


def kl_loss(posterior: Posterior, x: Tensor) -> Tensor:
    """Mean over the batch of KL(posterior || N(0, I)) in nats, per value of the image.

    The sum over a sample's latent is divided by its image's number of values, C H W [D], because
    the other terms are means per value: so weights mean the same as in the latent-diffusion code,
    where all terms are sums.
    """
    return posterior.kl().mean() / x[0].numel()


def latent_loss(mean: Tensor, target: Tensor, std: Tensor) -> Tensor:
    """Mean squared distance of latents (B, n_z, h, w), in deviations per channel, (n_z)."""
    return ((upcast(mean) - upcast(target)) / upcast(std)[:, None, None]).square().mean()


def logvar_loss(logvar: Tensor, target: Tensor) -> Tensor:
    """Mean KL(target || ours) per latent element in nats, by log-variances; the means are equal.

    In this direction it is steep where ours is too narrow and grows linearly where it is too wide.
    """
    difference = upcast(target) - upcast(logvar)
    return 0.5 * (difference.exp() - 1.0 - difference).mean()


def marginal_cosine_loss(projected: Tensor, features: Tensor, margin: float = 0.5) -> Tensor:
    """VA-VAE's first term (Yao et al. 2025): relu(1 - margin - cos(projected, features)).

    The mean over positions. Both are (B, d, h, w): the latent by a linear projection, and features.
    """
    cosine = F.cosine_similarity(upcast(projected), upcast(features), dim=1)  # (B, h, w)
    return F.relu(1.0 - margin - cosine).mean()


def marginal_distance_loss(z: Tensor, features: Tensor, margin: float = 0.25) -> Tensor:
    """VA-VAE's second term: relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    The mean over pairs of positions. The latent is (B, n_z, h, w), the features (B, d, h, w);
    memory grows with (h w)^2.
    """
    return F.relu((_cosines(z) - _cosines(features)).abs() - margin).mean()


def structure_loss(z: Tensor, features: Tensor) -> Tensor:
    """PAE's first term (Yue et al. 2026): (cos(z_i, z_j) - cos(f_i, f_j))^2.

    The mean over pairs of positions of (B, n_z, h, w) and (B, d, h, w), as
    :func:`marginal_distance_loss`.
    """
    return (_cosines(z) - _cosines(features)).square().mean()


def semantics_loss(projected: Tensor, features: Tensor) -> Tensor:
    """PAE's third term: 1 - cosine of the means over positions, plus the mean of 1 - cosine.

    Both are (B, d, h, w): the latent by a linear projection, and features.
    """
    projected = upcast(projected)
    features = upcast(features)
    whole = F.cosine_similarity(projected.mean((2, 3)), features.mean((2, 3)), dim=1)  # (B)
    each = F.cosine_similarity(projected, features, dim=1)  # (B, h, w)
    return (1.0 - whole).mean() + (1.0 - each).mean()


def local_correlation(z: Tensor, window: int) -> Tensor:
    """Mean Pearson correlation of all pairs of positions in a window, as SSVAE (Liu et al. 2025).

    Between the channels of two positions, of latents (B, n_z, h, w) whose channels have mean 0 and
    deviation 1. Windows of ``window`` x ``window`` positions do not overlap; positions that fill no
    window do not count.
    """
    count = window**2
    windows = F.unfold(upcast(z), window, stride=window)
    windows = windows.unflatten(1, (z.shape[1], count))  # (B, n_z, window^2, windows)
    unit = F.normalize(windows - windows.mean(1, keepdim=True), dim=1)

    # The square of a window's sum has each pair twice, and each position with itself.
    together = unit.sum(2).square().sum(1)  # (B, windows)
    own = unit.square().sum((1, 2))
    return ((together - own) / (count * (count - 1))).mean()


def _cosines(x: Tensor) -> Tensor:
    """Cosines of all pairs of positions of each sample: (B, C, h, w) -> (B, h w, h w)."""
    unit = F.normalize(upcast(x).flatten(2), dim=1)  # (B, C, h w)
    with no_autocast(unit):
        return unit.transpose(1, 2) @ unit
