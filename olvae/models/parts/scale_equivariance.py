"""Scale equivariance as a further loss: a shrunk latent decodes to the shrunk image."""

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.models.parts.part import Loss, Model, Part, Step, nothing_decoded
from olvae.modules.base import check_counts, check_not_negative
from olvae.modules.mixed_precision import upcast


class ScaleEquivariance(Part):
    """Add weight * L(down x, D(down z)): L are the weighted image terms, D is the decoder.

    Skorokhodov et al. 2025 (arXiv 2502.14831): it takes high frequencies out of the latent that the
    image does not have. The factor is the same in all processes and for the whole update. Every
    step trains on the whole latent too, unlike with
    :class:`~olvae.models.parts.equivariance.Equivariance`, and the adversary sees whole images. It
    costs a decoding of a quarter or a sixteenth of the positions.

    Args:
        weight: weight of this term, beside the objective's [D].
        factors: factors to shrink by, one drawn for each update; 2 and 4 are the paper's.
    """

    def __init__(self, weight: float = 0.25, factors: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        check_counts(2, factors=factors)
        self.weight = weight
        self.factors = list(factors)

    def conflicts(self, model: Model) -> Iterable[str]:
        yield from nothing_decoded(self, model)
        for part in model.each_part:
            if part.moves_latents:
                yield (
                    f"parts.{self.name}: parts.{part.name} shrinks latents as well: "
                    "leave one of them out"
                )

    def check(self, model: Model, source: Source) -> None:
        here = f"model.params.parts.{self.name}.params.factors"
        positions = source.size // model.autoencoder.upscale
        for factor in self.factors:
            if not positions.fits(factor):
                raise ConfigError(
                    f"{here}: {factor} does not divide {positions.short} latent positions: "
                    "change data.params.size"
                )

        # The perceptual network halves an image four times.
        most = max(self.factors)
        if model.objective.perceptual is not None and min(source.size) < 16 * most:
            raise ConfigError(
                f"{here}: {source.size.short} pixels divided by {most} are too few "
                "for the perceptual loss"
            )

    def on_latent(self, model: Model, step: Step) -> None:
        self._factor = self.factors[step.rng.integers(len(self.factors))]

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        if step.reconstruction is None:
            return {}
        image = shrink(step.target, self._factor)
        latent = shrink(step.latent, self._factor)
        terms = model.objective.compare(image, model.decode(latent))
        return {"scale_equivariance": (model.objective.weighted(terms, *terms), self.weight)}

    def describe(self) -> str:
        return f"weight {self.weight:g}, by {' or '.join(map(str, self.factors))}"


def shrink(x: Tensor, factor: int) -> Tensor:
    """Average blocks of factor x factor, in float32: (B, C, factor h, factor w) -> (B, C, h, w).

    For a factor of 2 that is bilinear scaling; for larger ones it is antialiased.
    """
    return F.avg_pool2d(upcast(x), factor)
