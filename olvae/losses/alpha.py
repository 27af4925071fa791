"""Objective for transparent images: colours over changing backgrounds, and alpha's own term."""

from typing import Literal

import torch
from torch import Tensor

from olvae.losses.objective import Objective, l1
from olvae.losses.perceptual import Perceptual
from olvae.modules.base import upcast


def over(image: Tensor, background: Tensor) -> Tensor:
    """Lay RGBA (B, 4, H, W) in [-1, 1] over a background (B or 1, 3, H or 1, W or 1): (B, 3, H, W), in float32."""
    image = upcast(image)
    alpha = (image[:, 3:] + 1.0) / 2.0
    return image[:, :3] * alpha + background * (1.0 - alpha)


class AlphaObjective(Objective):
    """The objective's image terms of RGBA images over plain backgrounds, and L1 of alpha.

    Each image of each step is laid over black, white or a random colour, one in three, as is its reconstruction: so
    what is invisible costs nothing, and what is transparent has to let the background through (as AlphaVAE, Wang et
    al. 2025). An adversary compares all four channels.

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
            raise ValueError(f"alpha_weight must be above 0, got {alpha_weight}: take Objective for opaque images")
        self.weights["alpha"] = alpha_weight

    def compare(self, x: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        if x.shape[1] != 4:
            raise ValueError(f"AlphaObjective takes images of 4 channels, not {x.shape[1]}: set data.params.channels=4")
        random = torch.rand(len(x), 3, 1, 1, device=x.device) * 2.0 - 1.0
        kind = torch.randint(3, (len(x), 1, 1, 1), device=x.device)
        background = torch.where(kind == 0, -1.0, torch.where(kind == 1, 1.0, random))  # (B, 3, 1, 1)
        colours = super().compare(over(x, background), over(reconstruction, background))
        return {**colours, "alpha": l1(x[:, 3:], reconstruction[:, 3:])}
