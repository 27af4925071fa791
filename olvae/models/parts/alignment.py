"""Alignment of the latent with a frozen vision encoder, as in VA-VAE (Yao et al. 2025)."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from olvae.checkpoint import read_checkpoint, state_dict_of
from olvae.config import import_extra
from olvae.losses.objective import IMAGE_TERMS
from olvae.losses.terms import marginal_cosine_loss, marginal_distance_loss
from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.models.weight_files import locate_weights
from olvae.modules.base import check_choice, check_not_negative
from olvae.modules.frozen import VisionEncoder, published_weights
from olvae.modules.mixed_precision import no_autocast, upcast

# The largest adaptive factor of the published code, whose image terms are sums over an image: the
# margins may leave almost nothing of the alignment's gradient. Here they are means.
ADAPTIVE_MAX = 1e8


class Alignment(Part):
    """Align the latent with a frozen vision encoder's features, by a projection that learns.

    The loss is weight * factor * (marginal cosine loss + marginal distance loss). The encoder sees
    images normalised as in its own training, and resized by antialiased bicubic interpolation.
    VA-VAE's published code does not normalise, and resizes bilinearly without antialiasing.

    Args:
        encoder: a timm model; the paper's is DINOv2, ViT-L.
        weights: a file of its weights, or an id of the hub; by default timm's published weights,
            downloaded into the hub's cache.
        weight: w_hyper of the paper.
        adaptive_weight: in each step, make the factor |gradient of the weighted image terms| /
            |gradient of the alignment| at the encoder's last convolution (quant_conv where there is
            one); else it is 1. At most the published code's 1e8 beside sums, here 1e8 / (C H W):
            509 at 256 pixels. It costs another backward pass through the decoder.
        cosine_margin, distance_margin: m1 and m2 of the paper.
        of: the ``mean`` of the posterior [D], or the ``sample`` that is decoded, as in the
            published code.
        project_distance: let the distance term see the projected latent, as the published code
            does; by default it sees the latent itself, as in the paper's formula.
    """

    def __init__(
        self,
        encoder: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        weight: float = 0.1,
        adaptive_weight: bool = True,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
        of: Literal["mean", "sample"] = "mean",
        project_distance: bool = False,
    ) -> None:
        super().__init__()
        check_not_negative(
            weight=weight, cosine_margin=cosine_margin, distance_margin=distance_margin
        )
        check_choice(("mean", "sample"), of=of)
        self.encoder = encoder
        self.weight = weight
        self.adaptive_weight = adaptive_weight
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin
        self.of = of
        self.project_distance = project_distance

        # The encoder with its weights; without them on the meta device, for shapes alone.
        import_extra("timm", "timm", "an alignment")
        try:
            if torch.empty(0).device.type == "meta":
                self.features = VisionEncoder(encoder, None)
            else:
                file = locate_weights(published_weights(encoder) if weights is None else weights)
                self.features = VisionEncoder(encoder, state_dict_of(read_checkpoint(file), file))
        except OSError as error:
            raise type(error)(
                f"{error}; set params.weights of the alignment to a file of {encoder}'s weights"
            ) from error

    def attach(self, model: Model) -> None:
        channels = model.autoencoder.latent_channels
        self.projection = nn.Conv2d(channels, self.features.channels, kernel_size=1, bias=False)
        if model.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        channels = model.encoder.in_channels
        if channels != 3:
            yield (
                f"{here}: a vision encoder takes images of 3 channels, not {channels}: leave it out"
            )
        fixed = ["freeze_encoder"] if model.freeze_encoder else []
        fixed += [f"parts.{part.name}" for part in model.each_part if part.latents != "free"]
        if fixed:
            yield f"{here}: the latents can't change ({', '.join(fixed)}): leave it out"
        if self.of == "sample" and not model.sample_posterior:
            yield f"{here}.params.of: no sample is drawn (sample_posterior): set it to mean"
        if self.adaptive_weight and not set(IMAGE_TERMS) & set(model.loss_weights):
            yield f"{here}.params.adaptive_weight: no loss compares images: set it to false"

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        z = step.encoded.mean if self.of == "mean" else step.drawn
        terms = self(step.images, z)
        weight: Tensor | float = self.weight
        if self.adaptive_weight:
            # The last convolution that both the image terms and the alignment depend on.
            last = model.encoder if model.quantizer is None else model.quantizer.quant_conv
            both = terms["align_cosine"] + terms["align_distance"]
            most = ADAPTIVE_MAX / step.target[0].numel()
            factor = model.ratio_of_gradients(step, both, last).clamp(max=most)
            model.report({"health/alignment_weight": factor})
            weight = self.weight * factor
        return {name: (term, weight) for name, term in terms.items()}

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Return both terms without weights, for images (B, 3, H, W) and latents (B, n_z, h, w)."""
        features = self.features(x, z.shape[-2:])  # (B, d, h, w)
        z = upcast(z)
        with no_autocast(z):
            projected = self.projection(z)  # (B, d, h, w)
        compared = projected if self.project_distance else z
        return {
            "align_cosine": marginal_cosine_loss(projected, features, self.cosine_margin),
            "align_distance": marginal_distance_loss(compared, features, self.distance_margin),
        }

    def describe(self) -> str:
        adaptive = ", adaptive" if self.adaptive_weight else ""
        return f"{self.encoder}, weight {self.weight:g}{adaptive}"
