"""Phase A's objective [P 4.3]: named terms, their weights, and their sum. Owns no network that learns."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from olvae.losses.perceptual import PERCEPTUAL, Perceptual
from olvae.losses.terms import RECONSTRUCTION, gaussian_loss, kl_loss, wavelet_loss
from olvae.modules.distributions import Posterior

IMAGE_TERMS = ("rec", *PERCEPTUAL, "wavelet", "gaussian")  # those that compare images; the other one is KL


class Objective(nn.Module):
    """The sum of weight * term; a term with weight 0 is not computed, logged, or loaded.

    Each term is a mean per value of the image, so that weights do not depend on its size. The defaults are the README's
    for A2 and B0 to B5 [R], except for the weights of L1 and LPIPS, which no source gives [D].

    Args:
        reconstruction: the pixel loss: l1, l2 or charbonnier.
        lpips_weight: of the perceptual loss, whichever it is. No weight may be negative.
        lpips_weights: the file of its network's weights; see :class:`~olvae.losses.perceptual.PerceptualLoss`.
        perceptual: ``lpips``, or ``esrgan``, which the paper recommends instead [P Table 14]; also the term's name.
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
    ) -> None:
        super().__init__()
        if reconstruction not in RECONSTRUCTION:
            raise ValueError(f"reconstruction must be one of {', '.join(RECONSTRUCTION)}, got {reconstruction!r}")
        if perceptual not in PERCEPTUAL:
            raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL)}, got {perceptual!r}")
        by_name = {"rec": rec_weight, perceptual: lpips_weight, "kl": kl_weight}
        by_name |= {"wavelet": wavelet_weight, "gaussian": gaussian_weight}
        if min(by_name.values()) < 0:
            raise ValueError(f"the weights of the objective must not be negative, got {by_name}")
        self.weights: dict[str, float] = {name: weight for name, weight in by_name.items() if weight > 0}
        if not self.weights:
            raise ValueError("every weight of the objective is 0: there is nothing to learn from")
        self.pixel_loss = RECONSTRUCTION[reconstruction]
        self.perceptual = PERCEPTUAL[perceptual](lpips_weights) if lpips_weight > 0 else None

    def forward(
        self, x: Tensor, reconstruction: Tensor, posterior: Posterior | None, encoded: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each unweighted term by its name; scalars in float32.

        Args:
            x, reconstruction: (B, C, H, W) in [-1, 1].
            posterior: the encoder's, for x; None if KL is off.
            encoded: the images of the posterior, if they are not x.
        """
        compare: dict[str, Any] = {"rec": self.pixel_loss, "wavelet": wavelet_loss, "gaussian": gaussian_loss}
        compare |= dict.fromkeys(PERCEPTUAL, self.perceptual)
        terms: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "kl":
                assert posterior is not None
                terms[name] = kl_loss(posterior, x if encoded is None else encoded)
            else:
                terms[name] = compare[name](x, reconstruction)
        return self.weighted(terms, *terms), terms

    def weighted(self, terms: Mapping[str, Tensor], *names: str) -> Tensor:
        """The weighted sum of those of the named terms that are on."""
        return torch.stack([self.weights[name] * terms[name] for name in names if name in self.weights]).sum()
