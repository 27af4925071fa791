"""Anchor: keep the latents close to the ones that training started from."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import check_not_negative
from olvae.modules.distributions import DiagonalGaussian
from olvae.modules.mixed_precision import upcast


class Anchor(Part):
    """Penalise the mean squared distance of the posterior's means from a frozen copy's.

    Encoder and decoder can be fine-tuned, and old latents stay usable. The frozen copy of the
    encoder is in checkpoints, so a resumed run keeps the latents that it started from.

    ``weight``: weight of the loss ``anchor``, not negative.
    """

    latents = "kept"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        self.weight = weight

    def attach(self, model: Model) -> None:
        self.moments = nn.Sequential(*copy.deepcopy(_networks(model)))
        self.requires_grad_(False).eval()

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.freeze_encoder:
            yield (
                f"parts.{self.name}: the encoder is frozen (freeze_encoder), and so are its "
                "latents: leave it out"
            )

    def start(self, model: Model, resumed: bool) -> None:
        # Not in `attach`: the starting weights are loaded after the model was built.
        if not resumed:
            for copied, network in zip(self.moments, _networks(model), strict=True):
                copied.load_state_dict(network.state_dict())

    def train(self, mode: bool = True) -> "Anchor":
        """Stay in evaluation mode."""
        return super().train(False)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        with torch.no_grad():
            old = DiagonalGaussian(self.moments(step.images))
        assert step.encoded is not None
        distance = upcast(step.encoded.mean) - upcast(old.mean)  # (B, n_z, h, w)
        return {"anchor": (distance.square().mean(), self.weight)}

    def describe(self) -> str:
        return f"weight {self.weight:g}"


def _networks(model: Model) -> list[nn.Module]:
    """List the encoder, and the 1x1 convolution after it where there is one."""
    if model.quantizer is None:
        return [model.encoder]
    return [model.encoder, model.quantizer.quant_conv]
