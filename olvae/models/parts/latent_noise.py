"""Noise on the latent, so that the decoder learns to forgive a diffusion model's errors."""

from collections.abc import Iterable
from typing import Literal

import torch

from olvae.models.parts.part import Model, Part, Step
from olvae.modules.base import check_choice, check_not_negative
from olvae.modules.mixed_precision import upcast


class LatentNoise(Part):
    """Add Gaussian noise to what the decoder gets in training.

    Args:
        std: standard deviation of the noise, not negative.
        relative_to: the unit of ``std``: the standard deviation of the ``posterior`` at each
            element, or of the ``data`` in each channel, measured on the batch.
    """

    adds_noise = True

    def __init__(self, std: float, relative_to: Literal["posterior", "data"] = "posterior") -> None:
        super().__init__()
        check_not_negative(std=std)
        check_choice(("posterior", "data"), relative_to=relative_to)
        self.std = std
        self.relative_to = relative_to

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.freeze_decoder:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder): leave it out"
        if self.relative_to == "posterior":
            if (model.stand_in or model.encoder).deterministic:
                yield (
                    f"parts.{self.name}.params.relative_to: the latents have no distribution: "
                    "set it to data"
                )
            # A part that moves latents leaves the posterior where it is.
            before = model.each_part[: model.each_part.index(self)]
            moved = [part.name for part in before if part.moves_latents]
            if moved:
                yield (
                    f"parts.{self.name}: its unit is the posterior's at each position: "
                    f"put it before parts.{moved[0]}"
                )

    def on_latent(self, model: Model, step: Step) -> None:
        if self.relative_to == "data":
            means = upcast(step.posterior.mean.detach())
            unit = means.std((0, 2, 3), correction=0, keepdim=True)  # (1, n_z, 1, 1)
        else:
            unit = step.posterior.std.detach()  # (B, n_z, h, w)
        step.latent = step.latent + self.std * unit * torch.randn_like(step.latent)

    def describe(self) -> str:
        return f"{self.std:g} standard deviations of the {self.relative_to}"
