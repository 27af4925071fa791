"""Noise on the latent, so that the decoder learns to forgive a diffusion model's errors."""

from collections.abc import Iterable
from typing import Literal

import torch

from olvae.models.parts.equivariance import Equivariance
from olvae.models.parts.part import Model, Part, Step
from olvae.modules.base import check_choice, check_not_negative, upcast


class LatentNoise(Part):
    """Add Gaussian noise to what the decoder gets in training.

    Args:
        std: its standard deviation, not negative.
        relative_to: the unit of ``std``: the standard deviation of the ``posterior`` at each element, or of the
            ``data`` in each channel, measured on the batch.
    """

    def __init__(self, std: float, relative_to: Literal["posterior", "data"] = "posterior") -> None:
        super().__init__()
        check_not_negative(std=std)
        check_choice(("posterior", "data"), relative_to=relative_to)
        self.std, self.relative_to = std, relative_to

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.freeze_decoder:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder): leave it out"
        if self.relative_to == "posterior" and (model.stand_in or model.encoder).deterministic:
            yield f"parts.{self.name}.params.relative_to: the latents have no distribution: set it to data"
        before = model.each_part[: model.each_part.index(self)]
        if self.relative_to == "posterior" and (
            moved := [p.name for p in before if isinstance(p, Equivariance)]
        ):
            yield f"parts.{self.name}: its unit is the posterior's at each position: put it before parts.{moved[0]}"

    def on_latent(self, model: Model, step: Step) -> None:
        if self.relative_to == "data":
            unit = upcast(step.posterior.mean.detach()).std(
                (0, 2, 3), correction=0, keepdim=True
            )  # (1, n_z, 1, 1)
        else:
            unit = step.posterior.std.detach()
        step.latent = step.latent + self.std * unit * torch.randn_like(step.latent)

    def describe(self) -> str:
        return f"{self.std:g} standard deviations of the {self.relative_to}"
