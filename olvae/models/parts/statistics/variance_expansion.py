"""Variance expansion: the encoder's variances are pushed up, in place of KL."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from olvae.models.parts.part import Loss, Model, Part, Step, fixed_latents
from olvae.modules.base import check_not_negative
from olvae.modules.mixed_precision import upcast


class VarianceExpansion(Part):
    """Penalise small variances of the posterior, so that the decoder learns to forgive noise.

    Li et al. 2026 (arXiv 2603.21085): the loss ``variance_expansion`` is the mean over the latent's
    elements of 1 / (variance + delta), in place of KL. The means are free. The image terms push
    the variances down where a detail needs it, and this loss pushes them up elsewhere.

    The formula is the paper's. Its weight and its delta were not at hand, and the paper's image
    terms may be sums, so both defaults are ours [D]: where a variance v costs a v in the image
    terms, the two balance at v + delta = sqrt(weight / a). ``delta`` bounds the loss by 1 / delta,
    and a variance far below it gets almost no gradient.

    Args:
        weight: weight of the loss, not negative.
        delta: above 0, in the unit of variances.
    """

    def __init__(self, weight: float = 1e-4, delta: float = 1e-3) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        if not delta > 0:
            raise ValueError(f"delta must be above 0, got {delta}")
        self.weight = weight
        self.delta = delta

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        yield from fixed_latents(self, model)
        if "kl" in model.loss_weights:
            yield f"lossconfig.params.kl_weight: {here} is in place of KL: set it to 0"
        if model.encoder.deterministic:
            yield f"{here}: the encoder's latents have no distribution: leave it out"
        if not model.sample_posterior:
            yield (
                f"sample_posterior: the decoder sees no variance, so nothing limits what {here} "
                "expands: set it to true"
            )

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        return {"variance_expansion": (self(step.encoded.logvar), self.weight)}

    def forward(self, logvar: Tensor) -> Tensor:
        """Return the loss, a scalar, of log-variances of any shape."""
        variance = upcast(logvar).exp()
        return (1.0 / (variance + self.delta)).mean()

    def describe(self) -> str:
        return f"weight {self.weight:g}, delta {self.delta:g}"
