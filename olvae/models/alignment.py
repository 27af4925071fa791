"""Alignment of the latent with a frozen vision encoder, as in VA-VAE (Yao et al. 2025)."""

import torch
from torch import Tensor, nn

from olvae.checkpoint import read_checkpoint, state_dict_of
from olvae.config import ConfigError
from olvae.losses.alignment import marginal_cosine_loss, marginal_distance_loss
from olvae.models.pretrained import locate_weights
from olvae.modules.frozen import VisionEncoder, published_weights
from olvae.modules.precision import island, no_autocast

__all__ = ["ADAPTIVE_MAX", "Alignment"]

ADAPTIVE_MAX = 1e4
"""Of the adaptive factor, where the margins leave almost nothing of the alignment's gradient [D]."""


class Alignment(nn.Module):
    """A vision encoder, which is constant, and a linear projection of the latent to its features, which learns.

    The loss is weight * factor * (marginal cosine loss + marginal distance loss). The cosine term takes the projected
    means of the posterior, the distance term the means themselves. The projection is part of a checkpoint's training
    state, and not of the autoencoder.

    Args:
        encoder: a timm model; the paper's is DINOv2, ViT-L.
        weights: a file of its weights, or an id of the hub; by default what timm has published, downloaded into the
            hub's cache.
        weight: w_hyper of the paper.
        adaptive_weight: let the factor be |gradient of the weighted image terms| / |gradient of the alignment| at the
            encoder's last convolution (quant_conv where there is one), in each step; else it is 1. It costs another
            backward pass through the decoder.
        cosine_margin, distance_margin: m1 and m2 of the paper.
        latent_channels: filled in by the model.

    Raises:
        ConfigError: timm is not installed.
        FileNotFoundError, OSError: the weights were not found, or not downloaded.
        ValueError: a number is out of range, timm has no such model, or the weights are others.
    """

    def __init__(
        self,
        encoder: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        weight: float = 0.1,
        adaptive_weight: bool = True,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
        latent_channels: int = 4,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("weight", weight, float("inf")),
            ("cosine_margin", cosine_margin, 2.0),
            ("distance_margin", distance_margin, 2.0),
        ):
            if not 0 <= value < most:
                raise ValueError(f"alignment_config.params.{name} must be in [0, {most:g}), got {value}")
        self.name = encoder
        self.weight = weight
        self.adaptive_weight = adaptive_weight
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin
        self.features = _encoder(encoder, weights)
        self.projection = nn.Conv2d(latent_channels, self.features.channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """The two terms by name, unweighted, in float32; gradients flow to z and to the projection.

        Args:
            x: images (B, 3, H, W) in [-1, 1].
            z: the means of their posteriors, (B, latent_channels, h, w).
        """
        features, z = self.features(x, z.shape[-2:]), island(z)  # (B, d, h, w)
        with no_autocast(z):
            projected = self.projection(z)  # (B, d, h, w)
        return {
            "align_cosine": marginal_cosine_loss(projected, features, self.cosine_margin),
            "align_distance": marginal_distance_loss(z, features, self.distance_margin),
        }

    def describe(self) -> str:
        """One line for the summary of a run."""
        return f"{self.name}, weight {self.weight:g}{', adaptive' if self.adaptive_weight else ''}"


def _encoder(name: str, weights: str | None) -> VisionEncoder:
    try:
        if torch.empty(0).device.type == "meta":
            return VisionEncoder(name, None)
        file = locate_weights(published_weights(name) if weights is None else weights)
        tensors = state_dict_of(read_checkpoint(file), file)
        try:
            return VisionEncoder(name, {n: t for n, t in tensors.items() if isinstance(t, Tensor)})
        except ValueError as error:
            raise ValueError(f"alignment_config.params: {file}: {error}") from error
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError("alignment_config: it needs timm: pip install 'open-litevae[align]'") from error
    except OSError as error:
        raise type(error)(
            f"alignment_config.params: {error}; set alignment_config.params.weights to a file of {name}'s weights"
        ) from error
