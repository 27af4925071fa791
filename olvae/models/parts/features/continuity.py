"""PAE's prior on continuity: neighbours of a latent decode to nearly the same image."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from olvae.losses.objective import IMAGE_TERMS
from olvae.models.parts.part import Loss, Model, Part, Step, nothing_decoded
from olvae.modules.base import check_not_negative
from olvae.modules.mixed_precision import upcast


class Continuity(Part):
    """Penalize how much the image changes when the latent is turned by a random direction.

    As PAE's MCR (Yue et al. 2026, arXiv 2605.07915, Eq. 4): the latent is turned by two angles in
    one direction, and each image has to be like the one before, which gets no gradient:

        weight * (L(x_r, D(z_1)) + L(x_1, D(z_2)))

    L are the weighted image terms, x_r is the reconstruction, x_1 is D(z_1). Each position's vector
    is turned by itself, in a direction at right angles to it, and keeps its length [D]. It costs
    two decodings.

    Args:
        weight: of the loss; PAE's.
        angles: both angles in degrees, the smaller one first; PAE's.
    """

    def __init__(self, weight: float = 0.5, angles: Sequence[float] = (42.5, 85.0)) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        given = [float(angle) for angle in angles]
        if len(given) != 2 or not 0 < given[0] < given[1] <= 180:
            raise ValueError(f"angles must be two, 0 < first < second <= 180, got {given}")
        self.weight = weight
        self.angles = given

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        yield from nothing_decoded(self, model)
        if not set(IMAGE_TERMS) & set(model.loss_weights):
            yield f"{here}: no loss compares images: leave it out"
        if model.autoencoder.latent_channels < 2:
            yield f"{here}: a latent of one channel has no direction: leave it out"

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        if step.reconstruction is None:
            return {}
        noise = torch.randn_like(upcast(step.latent))
        before = step.reconstruction.detach()
        total = before.new_zeros((), dtype=torch.float32)
        for angle in self.angles:
            image = model.decode(turned(step.latent, noise, angle))
            terms = model.objective.compare(before, image)
            total = total + model.objective.weighted(terms, *terms)
            before = image.detach()
        return {"continuity": (total, self.weight)}

    def describe(self) -> str:
        return f"weight {self.weight:g}, angles {self.angles[0]:g} and {self.angles[1]:g}"


def turned(z: Tensor, noise: Tensor, angle: float) -> Tensor:
    """Turn the vector at each position of a latent (B, n_z, h, w) by an angle in degrees.

    The direction is the noise's part at right angles to it, (B, n_z, h, w); lengths are kept.
    """
    z = upcast(z)
    length = z.norm(dim=1, keepdim=True)  # (B, 1, h, w)
    unit = z / length.clamp_min(1e-12)
    across = noise - (noise * unit).sum(1, keepdim=True) * unit
    across = across / across.norm(dim=1, keepdim=True).clamp_min(1e-12)
    radians = math.radians(angle)
    there: Tensor = math.cos(radians) * z + math.sin(radians) * length * across
    return there
