"""FAE's first decoder: a transformer predicts the vision encoder's features from the latent."""

from collections.abc import Iterable, Mapping

from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import check_counts, check_not_negative
from olvae.modules.mixed_precision import upcast
from olvae.modules.others.representation import RepresentationEncoder
from olvae.modules.others.vit import HEAD_CHANNELS, ViTDecoder


class FeatureDecoder(Part):
    """Keep in reduced latents what a vision encoder's features had, as FAE does.

    A transformer predicts the features that
    :class:`~olvae.modules.others.representation.RepresentationEncoder` has reduced; the loss
    ``features`` is its mean squared error (FAE, Gao et al. 2025, arXiv 2512.07829). In FAE the
    image is then decoded of the predicted features; here it is decoded of the latent, and this
    transformer is in checkpoints, and in no export. The network runs once more in each step.

    Args:
        weight: of the loss [D].
        depth: the transformer's blocks; 6 [D].
    """

    def __init__(self, weight: float = 1.0, depth: int = 6) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        check_counts(1, depth=depth)
        self.weight = weight
        self.depth = depth

    def attach(self, model: Model) -> None:
        # Else `conflicts` says what it needs.
        if isinstance(model.encoder, RepresentationEncoder):
            width = model.encoder.width
            self.transformer = ViTDecoder(
                model.autoencoder.latent_channels,
                out_channels=width,
                upscale=1,
                width=width,
                depth=self.depth,
                heads=max(1, width // HEAD_CHANNELS),
            )

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        if not isinstance(model.encoder, RepresentationEncoder) or model.encoder.deterministic:
            yield (
                f"{here}: the encoder reduces no features: start from timm:NAME::CHANNELS, or "
                "leave it out"
            )
        elif model.freeze_encoder:
            yield f"{here}: the latents can't change (freeze_encoder): leave it out"

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert isinstance(model.encoder, RepresentationEncoder)
        features = model.encoder.features(step.images)  # (B, d, h, w)
        found = upcast(self.transformer(step.drawn))
        return {"features": ((found - features).square().mean(), self.weight)}

    def describe(self) -> str:
        return f"weight {self.weight:g}, {self.depth} blocks"
