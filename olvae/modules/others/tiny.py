"""Tiny autoencoders, TAESD's, TAEF2's and TAESANA's networks: 3x3 convolutions and ReLU.

Their layers work on latents in a diffusion model's units, and on images in [0, 1]. Both are
converted from and to ours here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Decoder, Encoder, Enlarge, Stage, Steps, check_counts
from olvae.modules.distributions import deterministic_moments

SOFT_BOUND = 3.0  # of the decoder's input, in standard deviations


POOL_GROUPS = 4  # of the norm in a block that sees the whole image
POOL_WIDTH = 4  # times as many channels inside


class Residual(nn.Module):
    """Three 3x3 convolutions beside the identity; with ``pool`` after norms of the whole image."""

    def __init__(self, channels: int, pool: bool = False) -> None:
        super().__init__()
        self.pool = None
        if pool:
            inside = POOL_WIDTH * channels
            self.pool = nn.Sequential(
                nn.Conv2d(channels, inside, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, inside),
                nn.ReLU(),
                nn.Conv2d(inside, channels, 1, bias=False),
            )
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class _Tiny(Steps):
    """Layers under TAESD's numbers, and the latents' mean and deviation."""

    # Each (n_z, 1, 1); 0 and 1 without a teacher.
    latents_mean: Tensor
    latents_std: Tensor
    layers: nn.Sequential

    def _note(self, n_z: int) -> None:
        self.register_buffer("latents_mean", torch.zeros(n_z, 1, 1))
        self.register_buffer("latents_std", torch.ones(n_z, 1, 1))

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        self.latents_mean.copy_(mean[:, None, None])
        self.latents_std.copy_(std[:, None, None])


class TinyEncoder(_Tiny, Encoder):
    """TAESD's encoder; TAEF2's or TAESANA's by its arguments. Its latents have no distribution.

    Args:
        latent_dim, in_channels, image_size: as LiteVAE_Encoder's; the log-variances are the
            smallest there are.
        channels: of every layer.
        blocks: residual blocks of each level, from the image's resolution to the latent's.
        pool: the latent's level sees the whole image through norms, as TAEF2's.
        stem: widths of strided convolutions in place of the first one, as TAESANA's 32 and 64;
            ``blocks`` then begins after them.

    Shapes: (B, in_channels, H, W) -> (B, latent_dim, H/f, W/f),
    f = 2^(len(blocks) - 1 + len(stem)).
    """

    deterministic = True

    def __init__(
        self,
        latent_dim: int = 8,
        in_channels: int = 3,
        image_size: int = 256,
        channels: int = 64,
        blocks: Sequence[int] = (1, 3, 3, 3),
        pool: bool = False,
        stem: Sequence[int] = (),
    ) -> None:
        check_counts(1, channels=channels)
        check_counts(0, blocks=blocks)
        downscale = 2 ** (len(blocks) - 1 + len(stem))
        super().__init__(latent_dim, in_channels, downscale, image_size)

        # To the width of the blocks, at the image's resolution or by the stem.
        layers: list[nn.Module] = []
        width = in_channels
        for wider in stem:
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.ReLU()]
            width = wider
        if not stem:
            layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
        elif width != channels:
            raise ValueError(f"stem: the last width, {width}, is not `channels`, {channels}")

        last = len(blocks) - 1
        for level, count in enumerate(blocks):
            if level:
                layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False))
            layers += [Residual(channels, pool and level == last) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, latent_dim // 2, 3, padding=1))
        self._note(latent_dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = (x + 1) / 2  # from [-1, 1] to [0, 1]
        for layer in self.layers:
            h = self.step(layer, h)
        return deterministic_moments(h * self.latents_std + self.latents_mean)


class TinyDecoder(_Tiny, Decoder):
    """TAESD's decoder, whose tiles equal the whole image; TAEF2's or TAESANA's by its arguments.

    Args:
        channels, z_channels, out_channels: as LiteVAE_Decoder's.
        blocks: residual blocks of each level, from the latent's resolution to the image's.
        pool: the latent's level sees the whole image through norms, as TAEF2's: no tiles.
        channel_mult: multiples of ``channels`` by level, from the image's to the latent's; by
            default 1. TAESANA has 1, 1, 1, 1, 2, 4.
        enlarge: as LiteVAE_Decoder's.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w), f = enlarge 2^(len(blocks) - 1).
    """

    def __init__(
        self,
        channels: int = 64,
        z_channels: int = 4,
        out_channels: int = 3,
        blocks: Sequence[int] = (3, 3, 3, 1),
        pool: bool = False,
        channel_mult: Sequence[int] | None = None,
        enlarge: Enlarge = 1,
    ) -> None:
        multiples = channel_mult or [1] * len(blocks)
        check_counts(0, blocks=blocks)
        check_counts(1, channels=channels, channel_mult=multiples)
        if len(multiples) != len(blocks):
            raise ValueError(
                f"channel_mult: {len(multiples)} levels, but `blocks` has {len(blocks)}"
            )
        super().__init__(z_channels, out_channels, 2 ** (len(blocks) - 1), enlarge)
        self.pool = pool

        widths = [channels * multiple for multiple in reversed(multiples)]
        layers: list[nn.Module] = [nn.Conv2d(z_channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            if level:
                before = widths[level - 1]
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(before, width, 3, padding=1, bias=False),
                ]
            layers += [Residual(width, pool and level == 0) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], out_channels, 3, padding=1))
        self.widen_output()
        self._note(z_channels)

    def forward(self, z: Tensor) -> Tensor:
        for stage in self._layers():
            z = self.step(stage.run, z)
        return z

    def stages(self) -> list[Stage] | None:
        """List the layers, one by one: see :class:`Stage`. None with ``pool``."""
        return None if self.pool else self._layers()

    def _layers(self) -> list[Stage]:
        reach = {nn.Conv2d: 1, Residual: 3}
        stages = [Stage(self._bound, 0)]
        for layer in self.layers:
            scale = 2 if isinstance(layer, nn.Upsample) else 1
            stages.append(Stage(layer, reach.get(type(layer), 0), scale))
        # From [0, 1] to [-1, 1].
        stages.append(Stage(lambda image: 2 * image - 1, 0))
        return self.and_shuffle(stages)

    def _bound(self, z: Tensor) -> Tensor:
        """Normalise the latent, and bound it softly, as TAESD does."""
        return torch.tanh((z - self.latents_mean) / self.latents_std / SOFT_BOUND) * SOFT_BOUND
