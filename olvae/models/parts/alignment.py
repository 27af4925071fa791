"""Alignment of the latent with a frozen vision encoder, as in VA-VAE and Send-VAE."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from olvae.config import import_extra
from olvae.losses.objective import IMAGE_TERMS
from olvae.losses.terms import marginal_cosine_loss, marginal_distance_loss
from olvae.models.parts.part import (
    Loss,
    Model,
    Part,
    Step,
    adaptive_factor,
    fixed_latents,
)
from olvae.models.parts.random_noise import mixed_with_noise
from olvae.modules.base import check_choice, check_not_negative
from olvae.modules.frozen import VisionEncoder, load_vision_encoder
from olvae.modules.mixed_precision import no_autocast, upcast
from olvae.modules.others.vit import HEAD_CHANNELS, ViTMapper


def load_features(encoder: str, weights: str | None, part: str) -> VisionEncoder:
    """Load a part's frozen vision encoder; on the meta device without weights, for shapes alone.

    ConfigError if timm is missing; FileNotFoundError and ValueError as
    :func:`~olvae.modules.frozen.load_vision_encoder`.
    """
    import_extra("timm", "timm", part)
    try:
        return load_vision_encoder(encoder, weights)
    except OSError as error:
        what = part.partition(" ")[2]
        raise type(error)(
            f"{error}; set params.weights of the {what} to a file of {encoder}'s weights"
        ) from error


def features_conflict(part: Part, model: Model) -> Iterator[str]:
    """Yield a part's conflicts with images that have no colours, and with fixed latents."""
    channels = model.encoder.in_channels
    if channels != 3:
        yield (
            f"parts.{part.name}: a vision encoder takes images of 3 channels, not {channels}: "
            "leave it out"
        )
    yield from fixed_latents(part, model)


class Alignment(Part):
    """Align the latent with a frozen vision encoder's features, by a projection that learns.

    The loss is weight * factor * (marginal cosine loss + marginal distance loss) (VA-VAE, Yao et
    al. 2025). The encoder sees images normalised as in its own training, and resized by antialiased
    bicubic interpolation. VA-VAE's published code does not normalise, and resizes bilinearly
    without antialiasing.

    Send-VAE (arXiv 2601.05823, Eq. 1 to 3) projects by a transformer, aligns a latent with as much
    noise as a diffusion model's training has, and has no distance term, margin or factor: set
    ``mapper`` to vit, ``noise`` to 1, ``weight`` to 1, ``cosine_margin`` to 0, ``distance_margin``
    to null, and ``adaptive_weight`` to false.

    Args:
        encoder: a timm model; the paper's is DINOv2, ViT-L.
        weights: a file of its weights, or an id of the hub; by default timm's published weights,
            downloaded into the hub's cache.
        weight: w_hyper of the paper.
        adaptive_weight: in each step, make the factor |gradient of the weighted image terms| /
            |gradient of the alignment| at the encoder's last convolution (quant_conv where there is
            one); else it is 1. At most the published code's 1e8 beside sums, here 1e8 / (C H W):
            509 at 256 pixels. It costs another backward pass through the decoder.
        cosine_margin, distance_margin: m1 and m2 of the paper; a ``distance_margin`` of null leaves
            the distance term out.
        of: the ``mean`` of the posterior [D], or the ``sample`` that is decoded, as in the
            published code.
        project_distance: let the distance term see the projected latent, as the published code
            does; by default it sees the latent itself, as in the paper's formula, without noise.
        mapper: the projection: ``linear``, VA-VAE's 1x1 convolution, or ``vit``, Send-VAE's
            transformer of one block.
        noise: the largest share of noise in the latent that is projected, from 0 to 1. A share t is
            drawn uniformly up to it for each image: (1 - t) z + t e, where e is noise with the
            latent's own mean and deviation in each channel [D].
    """

    def __init__(
        self,
        encoder: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        weight: float = 0.1,
        adaptive_weight: bool = True,
        cosine_margin: float = 0.5,
        distance_margin: float | None = 0.25,
        of: Literal["mean", "sample"] = "mean",
        project_distance: bool = False,
        mapper: Literal["linear", "vit"] = "linear",
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_not_negative(
            weight=weight,
            cosine_margin=cosine_margin,
            distance_margin=0.0 if distance_margin is None else distance_margin,
            noise=noise,
        )
        check_choice(("mean", "sample"), of=of)
        check_choice(("linear", "vit"), mapper=mapper)
        if noise > 1:
            raise ValueError(f"noise is a share of the latent, at most 1, got {noise}")
        if project_distance and distance_margin is None:
            raise ValueError("project_distance: there is no distance term (distance_margin)")
        self.encoder = encoder
        self.weight = weight
        self.adaptive_weight = adaptive_weight
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin
        self.of = of
        self.project_distance = project_distance
        self.mapper = mapper
        self.noise = noise

        self.features = load_features(encoder, weights, "an alignment")
        if mapper == "vit" and self.features.channels % HEAD_CHANNELS:
            raise ValueError(
                f"mapper: vit needs an encoder with a multiple of {HEAD_CHANNELS} channels, and "
                f"{encoder} has {self.features.channels}: set it to linear"
            )

    def attach(self, model: Model) -> None:
        channels = model.autoencoder.latent_channels
        width = self.features.channels
        self.projection: nn.Module
        if self.mapper == "vit":
            self.projection = ViTMapper(channels, width)
        else:
            self.projection = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        if model.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        yield from features_conflict(self, model)
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
            factor = adaptive_factor(model, step, torch.stack([*terms.values()]).sum())
            model.report({"health/alignment_weight": factor})
            weight = self.weight * factor
        return {name: (term, weight) for name, term in terms.items()}

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Return the terms without weights, for images (B, 3, H, W) and latents (B, n_z, h, w)."""
        features = self.features(x, z.shape[-2:])  # (B, d, h, w)
        z = upcast(z)
        seen = mixed_with_noise(z, z, self.noise) if self.noise else z
        with no_autocast(z):
            projected = self.projection(seen)  # (B, d, h, w)
        terms = {"align_cosine": marginal_cosine_loss(projected, features, self.cosine_margin)}
        if self.distance_margin is not None:
            compared = projected if self.project_distance else z
            terms["align_distance"] = marginal_distance_loss(
                compared, features, self.distance_margin
            )
        return terms

    def checksum(self) -> str:
        return self.features.checksum

    def describe(self) -> str:
        adaptive = ", adaptive" if self.adaptive_weight else ""
        mapper = ", by a transformer" if self.mapper == "vit" else ""
        noise = f", noise up to {self.noise:g}" if self.noise else ""
        return f"{self.encoder}, weight {self.weight:g}{adaptive}{mapper}{noise}"
