"""PAE's priors on structure and semantics: the latent takes after a vision encoder's features."""

from collections.abc import Iterable, Mapping

from torch import nn

from olvae.losses.terms import semantics_loss, structure_loss
from olvae.models.parts.alignment import features_conflict, load_features
from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import check_not_negative
from olvae.modules.mixed_precision import no_autocast, upcast


class PriorAlignment(Part):
    """Give the latent the spatial structure and the semantics of a frozen vision encoder.

    As PAE's SSR and SCR (Yue et al. 2026, arXiv 2605.07915, 4.2), with f the features at the
    latent's positions, z the posterior's mean and W a linear layer that learns:

        structure   mean over i, j of (cos(z_i, z_j) - cos(f_i, f_j))^2
        semantics   1 - cos(W mean z, mean f), plus mean over i of 1 - cos(W z_i, f_i)

    PAE's targets are features that a network trained before has reduced to the latent's channels;
    these are the features themselves, which its Table 2b finds nearly as good, and W is in place of
    that network [D]. PAE's latents have one length; here cosines are compared, by their mean over
    pairs [D]. Its third prior is :class:`~olvae.models.parts.features.continuity.Continuity`.

    Args:
        encoder: a timm model; PAE's is DINOv2, ViT-L.
        weights: a file of its weights, or an id of the hub; by default timm's published weights,
            downloaded into the hub's cache.
        structure_weight, semantics_weight: of the two losses; PAE's.
    """

    def __init__(
        self,
        encoder: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        structure_weight: float = 0.2,
        semantics_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_not_negative(structure_weight=structure_weight, semantics_weight=semantics_weight)
        self.encoder = encoder
        self.structure_weight = structure_weight
        self.semantics_weight = semantics_weight
        self.features = load_features(encoder, weights, "a prior alignment")

    def attach(self, model: Model) -> None:
        channels = model.autoencoder.latent_channels
        self.projection = nn.Conv2d(channels, self.features.channels, kernel_size=1, bias=False)

    def conflicts(self, model: Model) -> Iterable[str]:
        yield from features_conflict(self, model)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        z = upcast(step.encoded.mean)  # (B, n_z, h, w)
        features = self.features(step.images, z.shape[-2:])  # (B, d, h, w)
        with no_autocast(z):
            projected = self.projection(z)  # (B, d, h, w)
        return {
            "structure": (structure_loss(z, features), self.structure_weight),
            "semantics": (semantics_loss(projected, features), self.semantics_weight),
        }

    def checksum(self) -> str:
        return self.features.checksum

    def describe(self) -> str:
        return (
            f"{self.encoder}, weights {self.structure_weight:g} of structure and "
            f"{self.semantics_weight:g} of semantics"
        )
