"""The LiteVAE decoder: Stable Diffusion's, with self-modulated convolution, without attention.

Convolutions of [P Eq. 3], no attention [P 4.2].
"""

from collections.abc import Sequence
from math import gcd
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Decoder, Enlarge, Stage, check_choice, check_counts
from olvae.modules.litevae.encoder_model import GroupNorm, PreActivationBlock, conv3, shortcut
from olvae.modules.litevae.smc import SMC
from olvae.modules.mixed_precision import casts_together
from olvae.modules.wavelet import idwt2

Variant = Literal["open_litevae", "paper_smc", "group_norm"]


class SMCBlock(nn.Module):
    """Two SMCs and a plain 1x1 shortcut.

    ``open_litevae``: SMC, SiLU, dropout, SMC, SiLU, add [R, M]; ``paper_smc``: SiLU, SMC, SiLU,
    dropout, SMC, add [P App. G].
    """

    def __init__(
        self, in_channels: int, out_channels: int, dropout: float, pre_activation: bool
    ) -> None:
        super().__init__()
        self.pre_activation = pre_activation
        self.conv1 = SMC(in_channels, out_channels)
        self.conv2 = SMC(out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_activation:
            h = self.conv1(F.silu(x))
            h = self.conv2(self.dropout(F.silu(h)))
        else:
            h = self.dropout(F.silu(self.conv1(x)))
            h = F.silu(self.conv2(h))
        out: Tensor = h + self.nin_shortcut(x)
        return out


class Upsample(nn.Module):
    """Nearest neighbour, then a plain 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class LiteVAE_Decoder(Decoder):
    """Latent to image.

    Args:
        channels: base width.
        z_channels: channels of the latent.
        out_channels: channels of the image.
        channel_mult: multiples of the width, from the image's resolution to the latent's.
        num_res_blocks: blocks per level, less one, as in the latent-diffusion dialect.
        variant: ``open_litevae`` [R, M] has three middle blocks and SMC, SiLU before the last
            convolution; ``paper_smc`` [P App. G] has pre-activation blocks, two middle blocks, SiLU
            before the last convolution; ``group_norm`` is the same with GroupNorm and plain
            convolutions for SMC, which the paper compares with [P Fig. 8]. It cannot decode an
            image in tiles.
        output: ``image``; or ``wavelet``: instead of the last upsampling it predicts the four
            level-1 Haar sub-bands in the image's range, and applies the inverse transform (times 2)
            [P App. G]; or ``packets``: it replaces every upsampling so, and all blocks work at the
            latent's resolution, for small machines [D].
        dropout: inside the blocks.
        linear: add a linear path from 3x3 latents to pixels; see :mod:`olvae.models.linear_code`.
        enlarge: times by which the image is larger than the encoded one, along each side, 1 to 4:
            a decoder at 2x has 2.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w) with
    f = enlarge 2^(len(channel_mult) - 1); [-1, 1], not clamped.
    """

    def __init__(
        self,
        channels: int = 128,
        z_channels: int = 12,
        out_channels: int = 3,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        variant: Variant = "open_litevae",
        output: Literal["image", "wavelet", "packets"] = "image",
        dropout: float = 0.0,
        linear: bool = False,
        enlarge: Enlarge = 1,
    ) -> None:
        check_counts(1, channels=channels, channel_mult=channel_mult)
        check_counts(0, num_res_blocks=num_res_blocks)
        super().__init__(z_channels, out_channels, 2 ** (len(channel_mult) - 1), enlarge)
        check_choice(get_args(Variant), variant=variant)
        check_choice(("image", "wavelet", "packets"), output=output)
        if output != "image" and len(channel_mult) < 2:
            raise ValueError(
                f"{output} output replaces an upsampling: channel_mult needs two entries or more"
            )
        pre_activation = variant != "open_litevae"
        self.variant = variant
        # How many of the upsamplings are inverse wavelet transforms.
        self.wavelet_levels = {"image": 0, "wavelet": 1, "packets": len(channel_mult) - 1}[output]

        def block(in_channels: int, out_channels: int) -> nn.Module:
            if variant == "group_norm":
                return PreActivationBlock(in_channels, out_channels, dropout)
            return SMCBlock(in_channels, out_channels, dropout, pre_activation)

        # The middle.
        width = channels * channel_mult[-1]
        self.conv_in = conv3(z_channels, width)
        self.mid = nn.Sequential(*(block(width, width) for _ in range(2 if pre_activation else 3)))

        # Levels, made and run from the coarsest. `up` is indexed from the finest, as the published
        # names are [M].
        levels: list[nn.ModuleDict] = []
        for index, mult in reversed(list(enumerate(channel_mult))):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(block(width, channels * mult))
                width = channels * mult
            level = nn.ModuleDict({"block": blocks})
            if index > self.wavelet_levels:
                level["upsample"] = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))

        # What comes before the last convolution, and the convolution to pixels or sub-bands.
        self.conv_norm: nn.Module = nn.Identity()
        if variant == "group_norm":
            self.conv_norm = GroupNorm(gcd(32, width), width)
        elif variant == "open_litevae":
            self.conv_norm = SMC(width, width)
        self.conv_out = conv3(width, out_channels * 4**self.wavelet_levels)
        self.widen_output()
        if linear:
            self.add_linear_path()

    @casts_together
    def forward(self, z: Tensor) -> Tensor:
        self.check_latent(z)
        h = z
        for stage in self._stages():
            h = self.step(stage.run, h)
        return h if self.linear is None else h + self.linear_path(z)

    def check_latent(self, z: Tensor) -> None:
        """Raise ValueError unless z is (B, z_channels, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.z_channels:
            raise ValueError(
                f"expected latents of shape (B, {self.z_channels}, h, w), got {tuple(z.shape)}"
            )

    def stages(self) -> list[Stage] | None:
        """List the steps from latent to image, one block each: see :class:`Stage`.

        None with GroupNorm, which depends on the whole image.
        """
        return None if self.variant == "group_norm" else self._stages()

    def blocks(self) -> list[nn.Module]:
        """List the first convolution, the blocks and the upsamplings, in the order they run."""
        modules: list[nn.Module] = [self.conv_in, *self.mid]
        for level in reversed(self.up):
            blocks, *upsample = level.children()
            modules += [*blocks.children(), *upsample]
        return modules

    def _stages(self) -> list[Stage]:
        out: list[Stage] = []
        for module in self.blocks():
            scale = 2 if isinstance(module, Upsample) else 1
            out.append(Stage(module, reach_of(module), scale))
        out.append(Stage(self.head, reach_of(self.conv_norm, self.conv_out)))
        out += [Stage(inverse_wavelet, 0, scale=2)] * self.wavelet_levels
        return self.and_shuffle(out)

    def head(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv_out(F.silu(self.conv_norm(h)))
        return out


def inverse_wavelet(bands: Tensor) -> Tensor:
    return idwt2(2.0 * bands)  # (B, 4C, fh/2, fw/2) -> (B, C, fh, fw)


def reach_of(*modules: nn.Module) -> int:
    """Add up the reach, in positions, of convolutions in a row; an SMC is one, folded or not."""
    convolutions = (m for module in modules for m in module.modules() if isinstance(m, nn.Conv2d))
    return sum(conv.kernel_size[0] // 2 for conv in convolutions)
