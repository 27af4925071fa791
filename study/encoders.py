"""Encoders of the study that differ from a published one in one place: last norm, path, wavelets,
log-variances; and linear layers without a network."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Encoder
from olvae.modules.litevae.encoder_model import GroupNorm, LiteVAE_Encoder
from olvae.modules.others.tiny import TinyEncoder
from olvae.modules.sdvae import SDEncoder
from olvae.modules.wavelet import dwt2

GROUPS = 8
LEVELS = 3


class UnnormalizedSDEncoder(SDEncoder):
    """Stable Diffusion's encoder without GroupNorm before its last convolution:
    a path on which no mean is removed."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.model.conv_norm_out = nn.Identity()


class ShortPathSDEncoder(SDEncoder):
    """Stable Diffusion's encoder and, added to its moments,
    a 1x1 convolution of the mean colours of 8x8 pixels."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.short = nn.Conv2d(self.in_channels, self.latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = super().forward(x)
        return moments + self.short(F.avg_pool2d(x, self.downscale))  # (B, 2 n_z, H/f, W/f)


class NormalizedLiteVAE(LiteVAE_Encoder):
    """LiteVAE's encoder with GroupNorm and SiLU before its last convolution,
    as Stable Diffusion's has them."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        last = self.aggregator.conv_out
        assert isinstance(last, nn.Conv2d)
        self.aggregator.conv_out = nn.Sequential(
            GroupNorm(GROUPS, last.in_channels), nn.SiLU(), last
        )


class TinyMoments(TinyEncoder):
    """TAESD's encoder, diffusers' AutoencoderTiny, with log-variances beside its means:
    twice as many at its end."""

    deterministic = False

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        self.layers[-1] = nn.Conv2d(last.in_channels, self.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = (x + 1) / 2
        for layer in self.layers:
            h = self.step(layer, h)
        return h


class ShuffledLiteVAE(LiteVAE_Encoder):
    """LiteVAE's encoder on pixels of 2x2, 4x4 and 8x8 patches as channels,
    in place of wavelet levels.

    Level l has 4^l in_channels channels where wavelets have 4 in_channels,
    so the extractors' first convolutions are wider; all else is LiteVAE's.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        for level, extractor in enumerate(self.extractors, start=1):
            first = extractor.init_conv
            assert isinstance(first, nn.Conv2d)
            extractor.init_conv = nn.Conv2d(
                self.in_channels * 4**level, first.out_channels, 3, padding=1
            )

    def seen(self, x: Tensor) -> list[Tensor]:
        return [F.pixel_unshuffle(x, 2**level) for level in range(1, self.levels + 1)]


class PatchedLiteVAE(ShuffledLiteVAE):
    """LiteVAE's encoder on the Haar packets of 2x2, 4x4 and 8x8 patches, in place of shuffled
    pixels: networks and first weights are the same as there, and each level is an orthogonal
    transform of the other's.

    So what sets the two apart is the wavelets, not the fan-in of the first convolutions.
    """

    def seen(self, x: Tensor) -> list[Tensor]:
        levels = []
        for _ in range(self.levels):
            x = dwt2(x, self.wavelet)  # (B, 4^l C, H/2^l, W/2^l)
            levels.append(x)
        return [level * scale for level, scale in zip(levels, self.band_scales, strict=True)]


class LinearMoments(Encoder):
    """Linear layers alone: the linear path, and a 1x1 convolution of the mean colours of 8x8
    pixels to the moments, which brings log-variances."""

    def __init__(self, latent_dim: int = 24, in_channels: int = 3, image_size: int = 64) -> None:
        super().__init__(latent_dim, in_channels, 2**LEVELS, image_size)
        self.colours = nn.Conv2d(in_channels, latent_dim, 1)
        self.add_linear_path()

    def forward(self, x: Tensor) -> Tensor:
        moments = self.colours(F.avg_pool2d(x, self.downscale))  # (B, 2 n_z, H/f, W/f)
        return self.with_linear_path(moments, x)
