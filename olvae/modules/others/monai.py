"""MONAI's two-dimensional AutoencoderKL as our encoder and decoder, under its own names.

Beside Stable Diffusion's network, its decoder has one residual block less at each level, levels may
have unlike numbers of blocks, the middle may be missing whole, and mean and log-variance come from
convolutions of their own. Images are in [0, 1] there, by MONAI's transforms, unless ``values`` says
otherwise.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Decoder, Encoder, Steps, check_counts
from olvae.modules.litevae.encoder_model import GroupNorm
from olvae.modules.mixed_precision import casts_together


class Named(nn.Sequential):
    """A layer, or several in a row, under the names that MONAI gives them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def conv(in_channels: int, out_channels: int, size: int = 3, **settings: Any) -> Named:
    padding = settings.pop("padding", size // 2)
    return Named(conv=nn.Conv2d(in_channels, out_channels, size, padding=padding, **settings))


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside the input, which a 1x1 convolution may widen."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = conv(out_channels, out_channels)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, beside the input.

    Args:
        output: a linear layer comes last.
        combined: queries, keys and values are of one linear layer.
    """

    def __init__(
        self, channels: int, groups: int, eps: float, output: bool, combined: bool
    ) -> None:
        super().__init__()
        names = ("qkv",) if combined else ("to_q", "to_k", "to_v")
        layers: dict[str, nn.Module] = {}
        for name in names:
            layers[name] = nn.Linear(channels, 3 * channels // len(names))
        if output:
            layers["out_proj"] = nn.Linear(channels, channels)
        self.names = names
        self.norm = GroupNorm(groups, channels, eps)
        self.attn = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.norm(x).flatten(2).transpose(1, 2)  # (B, h w, C)
        projected = torch.cat([self.attn[name](positions) for name in self.names], dim=2)
        q, k, v = projected.chunk(3, dim=2)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        if "out_proj" in self.attn:
            h = self.attn["out_proj"](h)
        return x + h.transpose(1, 2).reshape(x.shape)


class _Monai(Steps):
    """A list of blocks, built from a width, its multiples and blocks per level."""

    blocks: nn.ModuleList

    def _build(
        self,
        ends: tuple[int, int],
        widths: Sequence[int],
        counts: Sequence[int],
        attention_levels: Collection[int],
        middle: bool,
        resample: type[nn.Module],
        norm: tuple[int, float],
        attention: tuple[bool, bool],
    ) -> None:
        """Build the blocks from the first level to the last, in this half's order of levels.

        ``ends``: channels before and after. ``resample``: between two levels. ``norm``: groups and
        epsilon. ``attention``: :class:`AttentionBlock`'s ``output`` and ``combined``.
        """
        if len(counts) != len(widths) or not {*attention_levels} <= {*range(len(widths))}:
            raise ValueError(
                f"num_res_blocks, attention_levels: there are {len(widths)} levels, from 0 on"
            )
        blocks: list[nn.Module] = [conv(ends[0], widths[0])]
        mid: list[nn.Module] = []
        if middle:
            inside = widths[-1] if isinstance(self, Encoder) else widths[0]
            for _ in range(2):
                mid.append(ResidualBlock(inside, inside, *norm))
            mid.insert(1, AttentionBlock(inside, *norm, *attention))
        if isinstance(self, Decoder):
            blocks += mid

        width = widths[0]
        for level, (wider, count) in enumerate(zip(widths, counts, strict=True)):
            if level:
                blocks.append(resample(width))
            for _ in range(count):
                blocks.append(ResidualBlock(width, wider, *norm))
                width = wider
                if level in attention_levels:
                    blocks.append(AttentionBlock(width, *norm, *attention))

        if isinstance(self, Encoder):
            blocks += mid
        self.blocks = nn.ModuleList([*blocks, GroupNorm(norm[0], width, norm[1])])
        self.blocks.append(conv(width, ends[1]))

    def _run(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = self.step(block, h)
        return h


class Downsampling(Named):
    """A strided convolution; zeros at the bottom and the right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(conv=conv(channels, channels, stride=2, padding=0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampling(Named):
    """Each position four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(postconv=conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class TransposedUpsampling(Named):
    """A transposed convolution whose patches touch."""

    def __init__(self, channels: int) -> None:
        super().__init__(deconv=nn.ConvTranspose2d(channels, channels, 2, stride=2))


class MonaiEncoder(_Monai, Encoder):
    """MONAI's encoder, and the two convolutions to mean and log-variance as one.

    Args:
        latent_dim, in_channels, image_size, channels, channel_mult: as SDEncoder's.
        num_res_blocks: of each level, from the image's to the latent's.
        norm_groups, norm_eps: of every GroupNorm; the groups divide every width.
        attention: residual blocks with self-attention between them, in the middle.
        attention_levels: levels with self-attention after each block, as SDEncoder's.
        include_fc: attention ends with a linear layer.
        combined_linear: queries, keys and values are of one linear layer.
        values: what -1 and 1 are in the network.

    Shapes: (B, in_channels, H, W) -> (B, latent_dim, H/f, W/f), f = 2^(len(channel_mult) - 1).
    """

    def __init__(
        self,
        latent_dim: int = 6,
        in_channels: int = 1,
        image_size: int = 256,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: Sequence[int] = (2, 2, 2, 2),
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        attention: bool = True,
        attention_levels: Sequence[int] = (2, 3),
        include_fc: bool = True,
        combined_linear: bool = False,
        values: Sequence[float] = (0.0, 1.0),
    ) -> None:
        check_counts(1, channels=channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks)
        super().__init__(latent_dim, in_channels, 2 ** (len(channel_mult) - 1), image_size)
        self.low, self.high = values
        self._build(
            (in_channels, latent_dim // 2),
            [channels * multiple for multiple in channel_mult],
            num_res_blocks,
            attention_levels,
            attention,
            Downsampling,
            (norm_groups, norm_eps),
            (include_fc, combined_linear),
        )
        self.quant_conv = conv(latent_dim // 2, latent_dim, 1)

    @casts_together
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.high - self.low) / 2
        moments: Tensor = self.quant_conv(self._run(x * scale + (self.low + scale)))
        return moments


class MonaiDecoder(_Monai, Decoder):
    """MONAI's decoder, after its 1x1 convolution.

    Args:
        channels, z_channels, out_channels, channel_mult: as SDDecoder's.
        num_res_blocks, norm_groups, norm_eps, attention: see :class:`MonaiEncoder`.
        attention_levels, include_fc, combined_linear, values: see :class:`MonaiEncoder`.
        convtranspose: transposed convolutions between the levels.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w), f = 2^(len(channel_mult) - 1).
    """

    def __init__(
        self,
        channels: int = 32,
        z_channels: int = 3,
        out_channels: int = 1,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: Sequence[int] = (2, 2, 2, 2),
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        attention: bool = True,
        attention_levels: Sequence[int] = (2, 3),
        include_fc: bool = True,
        combined_linear: bool = False,
        convtranspose: bool = False,
        values: Sequence[float] = (0.0, 1.0),
    ) -> None:
        check_counts(1, channels=channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks)
        super().__init__(z_channels, out_channels, 2 ** (len(channel_mult) - 1))
        self.low, self.high = values
        self.post_quant_conv = conv(z_channels, z_channels, 1)
        last = len(channel_mult) - 1
        self._build(
            (z_channels, out_channels),
            [channels * multiple for multiple in reversed(channel_mult)],
            [*reversed(num_res_blocks)],
            [last - level for level in attention_levels],
            attention,
            TransposedUpsampling if convtranspose else Upsampling,
            (norm_groups, norm_eps),
            (include_fc, combined_linear),
        )

    @casts_together
    def forward(self, z: Tensor) -> Tensor:
        scale = 2 / (self.high - self.low)
        return (self._run(self.post_quant_conv(z)) - self.low) * scale - 1
