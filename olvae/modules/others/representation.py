"""A frozen vision encoder as the encoder of an autoencoder, as in RAE and FAE."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Encoder
from olvae.modules.distributions import deterministic_moments
from olvae.modules.frozen import PIXELS_PER_FEATURE, after_blocks, vision_network
from olvae.modules.others.vit import HEAD_CHANNELS, Attention, start_as_in_mae, to_map, to_tokens

# Of the reduced latents, whose means have deviations near 1 [D].
FIRST_LOGVAR = -4.0


class RepresentationEncoder(Encoder):
    """A timm network's features as latents; the network is frozen, and belongs to the weights.

    Without ``attention`` the latents are the features of its last block, normalised over the
    channels of each position, without a distribution (RAE, Zheng et al. 2025, arXiv 2510.11690).
    With it, one attention layer and a linear layer, which are trained, reduce them to means and
    log-variances of fewer channels (FAE, Gao et al. 2025, arXiv 2512.07829).

    The network sees 16 pixels of the image per feature: of 256 pixels DINOv2, whose patches have
    14, sees 224. Its weights are fresh here: the TARGET ``timm:NAME`` has the published ones.

    Args:
        encoder: a timm model, such as vit_base_patch14_reg4_dinov2.lvd142m.
        latent_dim: twice the latent's channels; without ``attention`` these are the network's.
        attention: reduce the features.
        in_channels: of the images: 3.
        image_size: the intended size, in pixels.

    Shapes: (B, 3, H, W) in [-1, 1] -> (B, latent_dim, H/16, W/16).
    """

    def __init__(
        self,
        encoder: str,
        latent_dim: int,
        attention: bool = False,
        in_channels: int = 3,
        image_size: int = 256,
    ) -> None:
        super().__init__(latent_dim, in_channels, PIXELS_PER_FEATURE, image_size)
        if in_channels != 3:
            raise ValueError(f"a vision encoder takes images of 3 channels, got {in_channels}")
        try:
            network = vision_network(encoder, None)
        except ModuleNotFoundError as error:
            raise ValueError(f"{encoder} needs timm: pip install timm") from error
        self.network = network.requires_grad_(False).eval()
        inner: Any = network[1]
        last = inner.feature_info[-1]
        width = int(last["num_chs"])
        self.width = width  # of the network's features
        self.stride = int(last["reduction"])
        self.depth = len(inner.feature_info)

        # The layers that reduce, or none.
        self.deterministic = not attention
        if not attention and latent_dim != 2 * width:
            raise ValueError(
                f"{encoder} has {width} channels: set embed_dim and z_channels to {width}, or "
                "attention to true for fewer"
            )
        if attention:
            if width % HEAD_CHANNELS:
                raise ValueError(
                    f"attention: its heads have {HEAD_CHANNELS} channels, which {width}, those "
                    f"{encoder} has, are no multiple of"
                )
            self.attention = Attention(width, width // HEAD_CHANNELS)
            self.conv_out = nn.Conv2d(width, latent_dim, kernel_size=1)
            start_as_in_mae(self.attention)
            # The latent is not mostly noise at first.
            assert self.conv_out.bias is not None
            nn.init.constant_(self.conv_out.bias[latent_dim // 2 :], FIRST_LOGVAR)

    @property
    def output_layer(self) -> nn.Conv2d | None:
        """The last trained layer, for :func:`~olvae.modules.base.last_convolution`."""
        return None if self.deterministic else self.conv_out

    def train(self, mode: bool = True) -> "RepresentationEncoder":
        """Set the trained layers' mode; the network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """Return the normalised features, (B, C, H/16, W/16), of images (B, 3, H, W)."""
        height, width = x.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"image size {height}x{width} is not a multiple of {self.downscale}")
        grid = (height // self.downscale, width // self.downscale)
        with torch.no_grad():
            (found,) = after_blocks(self.network, self.stride, x, grid, [self.depth - 1])
            tokens = to_tokens(found)  # (B, h w, C)
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return to_map(tokens, *grid)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.deterministic:
            return deterministic_moments(features)
        tokens = self.step(self.attention, to_tokens(features))
        moments: Tensor = self.conv_out(to_map(tokens, *features.shape[-2:]))
        return moments
