"""Random noise on the latent: a strength drawn anew for each sample, added or interpolated."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from olvae.models.parts.part import Model, Part, Step
from olvae.modules.base import check_choice, check_not_negative
from olvae.modules.mixed_precision import upcast


def units(means: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the deviation and the mean of each channel of a batch, (1, n_z, 1, 1) each.

    They put noise into units of mean 0 and variance 1; no gradient flows into them.
    """
    return torch.std_mean(upcast(means.detach()), (0, 2, 3), correction=0, keepdim=True)


def mixed_with_noise(z: Tensor, means: Tensor, most: float, scale: float = 1.0) -> Tensor:
    """Interpolate latents (B, n_z, h, w) with noise: each gets a share of it, of at most ``most``.

    The noise has the mean of each channel of ``means``, and ``scale`` times its deviation.
    """
    unit, mean = units(means)
    share = most * torch.rand(len(z), 1, 1, 1, device=z.device).to(unit.dtype)
    return torch.lerp(upcast(z), mean + scale * unit * torch.randn_like(z), share)


class RandomNoise(Part):
    """Add noise to the latents, with a strength drawn uniformly for each sample.

    With e from N(0, I), and the latent z scaled so that each channel of the batch has mean 0 and
    variance 1, as a diffusion model sees it:

    | ``how``       | the decoder gets          | drawn from             | published with       |
    |---------------|---------------------------|------------------------|----------------------|
    | `add`         | z + s e                   | s in (0, ``strength``) | ``strength`` .8: RAE |
    | `interpolate` | (1 - t) z + t ``scale`` e | t in (0, ``strength``) | 1, 3: l-DeTok        |

    RAE is arXiv 2510.11690; l-DeTok, with ``strength`` 1 and ``scale`` 3, is arXiv 2507.15856.

    Formulas and figures are from the papers' code. There noise is in the latent's own units: RAE's
    features have a variance near 1, and l-DeTok's ``scale`` is beside what its encoder learns, so
    our default of 1 is [D], as are the units. They are constants: no gradient tells the encoder to
    change them. l-DeTok also masks patches of the image; this part does not.

    Args:
        how: add or interpolate.
        strength: not negative, for ``interpolate`` at most 1.
        scale: scale of the noise to interpolate with; not negative.
    """

    adds_noise = True

    def __init__(
        self,
        how: Literal["add", "interpolate"] = "interpolate",
        strength: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_not_negative(strength=strength, scale=scale)
        check_choice(("add", "interpolate"), how=how)
        if how == "interpolate" and strength > 1:
            raise ValueError(f"strength must be at most 1 to interpolate, got {strength}")
        if how == "add" and scale != 1:
            raise ValueError(
                "scale is of the noise to interpolate with: to add, set strength alone"
            )
        self.how = how
        self.strength = strength
        self.scale = scale

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.freeze_decoder:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder): leave it out"

    def on_latent(self, model: Model, step: Step) -> None:
        z = step.latent
        means = step.posterior.mean
        if self.how == "interpolate":
            step.latent = mixed_with_noise(z, means, self.strength, self.scale)
            return
        unit, _ = units(means)
        strength = self.strength * torch.rand(len(z), 1, 1, 1, device=z.device)
        step.latent = z + strength * unit * torch.randn_like(z)

    def describe(self) -> str:
        scale = f", scale {self.scale:g}" if self.how == "interpolate" else ""
        return f"{self.how}, strength {self.strength:g}{scale}"
