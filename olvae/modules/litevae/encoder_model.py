"""The LiteVAE encoder: wavelet sub-bands, an extractor per level, an aggregator [P 4.1, Fig. 2].

Extractors and aggregator are UNets of constant resolution: "down" and "up" are channels only.
``OpenUNet`` is open-LiteVAE's [R, M], with its parameter names; ``PaperUNet`` is the paper's
[P App. G].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Encoder, Steps, check_choice, check_counts
from olvae.modules.distributions import deterministic_moments
from olvae.modules.mixed_precision import casts_together
from olvae.modules.wavelet import dwt2, wavedec2


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def conv1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    return conv1(in_channels, out_channels) if in_channels != out_channels else nn.Identity()


class GroupNorm(nn.GroupNorm):
    """torch's, but a group of one value, as in images of one latent position, is allowed: 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PostActivationBlock(nn.Module):
    """conv, GroupNorm, SiLU, conv, GroupNorm, SiLU, then the (1x1-projected) input is added [M]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 8) -> None:
        super().__init__()
        self.conv1 = conv3(in_channels, out_channels)
        self.norm1 = GroupNorm(groups, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels)
        self.residual_conv = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        h = F.silu(self.norm2(self.conv2(h)))
        out: Tensor = h + self.residual_conv(x)
        return out


class PreActivationBlock(nn.Module):
    """GroupNorm, SiLU, conv, GroupNorm, SiLU, dropout, conv; adds the input [P App. G].

    A 1x1 convolution projects the input where the width changes. The number of groups is
    gcd(32, channels), because 32 does not divide S's widths [D].
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNorm(gcd(32, in_channels), in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = GroupNorm(gcd(32, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3(out_channels, out_channels)
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = h + self.shortcut(x)
        return out


class UNet(Steps, ABC):
    """Base class of both UNets: levels down, a middle, levels up, with skip connections.

    Each block on the way down leaves its output as a skip, each block on the way up takes one;
    convolutions change the width.
    """

    init_conv: nn.Conv2d
    conv_out: nn.Conv2d

    @abstractmethod
    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """List blocks and convolutions on the way down, in the middle, and on the way up."""

    @casts_together
    def forward(self, x: Tensor) -> Tensor:
        h = self.init_conv(x)
        skips: list[Tensor] = []
        down, middle, up = self.steps()
        for step in down:
            if isinstance(step, nn.Conv2d):
                h = step(h)
            else:
                h = self.step(step, h)
                skips.append(h)
        for step in middle:
            h = self.step(step, h)
        for step in up:
            if isinstance(step, nn.Conv2d):
                h = step(h)
            else:
                # Not a lambda: checkpointing runs it again when ``step`` is the loop's last one.
                h = self.step(partial(_joined, step), h, skips.pop())
        out: Tensor = self.conv_out(h)
        return out


def _joined(block: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
    """Concatenate within the step, so that checkpoints do not keep the result."""
    out: Tensor = block(torch.cat((h, skip), dim=1))  # (B, 2 width, H, W)
    return out


class OpenUNet(UNet):
    """open-LiteVAE's UNet [R, M].

    Widths are ``channels * mult``; every width but the last is a level with ``blocks`` residual
    blocks, whose outputs are skips, and a 1x1 convolution to the next width; the last width is the
    middle. On the way up a 1x1 convolution narrows, then each block takes one skip. Ends in a 1x1
    convolution.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, mult: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        widths = [channels * m for m in mult]
        middle = widths[-1]
        self.init_conv = conv3(in_channels, channels)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()

        for width, wider in pairwise(widths):
            level = [PostActivationBlock(width, width) for _ in range(blocks)]
            self.down_blocks.append(nn.ModuleList([*level, conv1(width, wider)]))
        self.mid_block = nn.Sequential(
            *(PostActivationBlock(middle, middle) for _ in range(blocks))
        )
        for wider, width in pairwise(reversed(widths)):
            level = [PostActivationBlock(2 * width, width) for _ in range(blocks)]
            self.up_blocks.append(nn.ModuleList([conv1(wider, width), *level]))
        self.conv_out = conv1(channels * mult[0], out_channels)

    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        down = [step for level in self.down_blocks for step in level.children()]
        up = [step for level in self.up_blocks for step in level.children()]
        return down, list(self.mid_block), up


class PaperUNet(UNet):
    """The paper's UNet [P App. G]: pre-activation blocks; a level's first block changes the width.

    ``blocks`` blocks per level down and up, each leaving or taking one skip, and two in the middle;
    a 3x3 convolution at both ends and no norm before the last: this layout has the paper's counts
    [M].

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        mult: Sequence[int],
        blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.init_conv = conv3(in_channels, channels)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        skips: list[int] = []  # widths that the way up takes, last one first
        width = channels
        for m in mult:
            for _ in range(blocks):
                down.append(PreActivationBlock(width, channels * m, dropout))
                width = channels * m
                skips.append(width)
        self.mid_blocks = nn.Sequential(
            *(PreActivationBlock(width, width, dropout) for _ in range(2))
        )
        for m in reversed(mult):
            for _ in range(blocks):
                up.append(PreActivationBlock(width + skips.pop(), channels * m, dropout))
                width = channels * m
        self.down_blocks = nn.ModuleList(down)
        self.up_blocks = nn.ModuleList(up)
        self.conv_out = conv3(width, out_channels)

    def steps(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        return list(self.down_blocks), list(self.mid_blocks), list(self.up_blocks)


class Scale(NamedTuple):
    """Widths of a preset, and blocks per level of the open_litevae variant [R]."""

    extractor_channels: int
    extractor_mult: tuple[int, ...]
    extractor_resblocks: int
    aggregate_channels: int
    aggregate_mult: tuple[int, ...]
    aggregate_resblocks: int


SCALES = {
    "S": Scale(16, (1, 2, 2), 3, 16, (1, 2, 2), 3),
    "B": Scale(32, (1, 2, 3), 4, 32, (1, 2, 3), 4),
    "M": Scale(64, (1, 2, 4), 5, 32, (1, 2, 3), 4),
    "L": Scale(64, (1, 2, 4), 5, 64, (1, 2, 4), 4),
}


class LiteVAE_Encoder(Encoder):
    """Image to moments, or to features if a 1x1 convolution follows.

    Each level of the wavelet transform, 4 * in_channels channels at H/2^l, goes through an
    extractor of its own, which keeps the shape; the features are pooled to H/2^levels,
    concatenated, and aggregated to ``latent_dim`` channels.

    Args:
        latent_dim: channels of the output; the autoencoder sets it to 2 n_z if no 1x1 convolution
            follows.
        scale: a preset of widths: S, B, M or L; further widths override the preset's.
        variant: ``open_litevae`` is the published code [R, M]; ``paper`` is the paper's [P App. G].
        in_channels: channels of the image.
        dct_levels: levels of the wavelet transform; f = 2^levels.
        image_size: the intended size in pixels, at which summaries count operations.
        extractor_channels, extractor_mult, extractor_resblocks: base width, its multiples, blocks
            per level.
        aggregate_channels, aggregate_mult, aggregate_resblocks: the same for the aggregator.
        wavelet: an orthogonal PyWavelets wavelet.
        pool: to the common resolution: ``average``, or ``conv``, an average and a learned 3x3
            convolution [P App. G], in the paper variant only.
        dropout: in the blocks of the paper variant.
        shared_extractor: one extractor for all levels [P Table 19]: fewer parameters, as many
            operations [P App. D.4].
        skip_levels: how many of the finest levels no extractor sees; 1 of 3 leaves the last two
            [P Table 21].
        packets: transform the details further, too, until every value of a patch is a channel at
            H/f (wavelet packets), and give those to the aggregator alone: no work at finer
            resolutions, for small machines [D]. The extractors' widths have no effect then.
        linear: add a linear path from patches to the means; see :mod:`olvae.models.linear_code`.

    Shapes: (B, in_channels, H, W) in [-1, 1] -> (B, latent_dim, H/2^levels, W/2^levels).
    """

    def __init__(
        self,
        latent_dim: int = 24,
        scale: Literal["S", "B", "M", "L"] | None = None,
        variant: Literal["open_litevae", "paper"] = "open_litevae",
        in_channels: int = 3,
        dct_levels: int = 3,
        image_size: int = 256,
        extractor_channels: int | None = None,
        extractor_mult: Sequence[int] | None = None,
        extractor_resblocks: int | None = None,
        aggregate_channels: int | None = None,
        aggregate_mult: Sequence[int] | None = None,
        aggregate_resblocks: int | None = None,
        wavelet: str = "haar",
        pool: Literal["average", "conv"] = "average",
        dropout: float = 0.0,
        shared_extractor: bool = False,
        skip_levels: int = 0,
        packets: bool = False,
        linear: bool = False,
    ) -> None:
        # Settings that contradict each other.
        check_counts(1, dct_levels=dct_levels)
        super().__init__(latent_dim, in_channels, 2**dct_levels, image_size)
        check_choice(("open_litevae", "paper"), variant=variant)
        if variant == "open_litevae" and (pool != "average" or dropout):
            raise ValueError(
                "pool and dropout belong to the paper variant: set variant to paper, "
                "or leave them out"
            )
        if not 0 <= skip_levels < dct_levels:
            raise ValueError(
                f"skip_levels must be from 0 to {dct_levels - 1}, one level is left, "
                f"got {skip_levels}"
            )
        if packets and (skip_levels or shared_extractor or pool != "average"):
            raise ValueError(
                "packets has no extractors: leave out skip_levels, shared_extractor and pool"
            )

        # [P App. G]: level l is divided by 2^l, so that LL stays in the image's range. The
        # published code does not divide [M].
        self.levels = dct_levels
        self.skip_levels = skip_levels
        self.wavelet = wavelet
        self.packets = packets
        base = 0.5 if variant == "paper" else 1.0
        self.band_scales = [base**level for level in range(1, dct_levels + 1)]

        # The first three widths are the extractor's, the others the aggregator's.
        extractor = extractor_channels, extractor_mult, extractor_resblocks
        aggregator = aggregate_channels, aggregate_mult, aggregate_resblocks
        widths = _widths(scale, variant, (*extractor, *aggregator))
        unet: Callable[..., UNet] = OpenUNet
        if variant == "paper":
            unet = partial(PaperUNet, dropout=dropout)

        # Extractors, and what follows the pooling of each level.
        bands = 4 * in_channels
        used = 0 if packets else dct_levels - skip_levels
        extractors = 1 if shared_extractor else used
        self.extractors = nn.ModuleList(unet(bands, bands, *widths[:3]) for _ in range(extractors))
        self.pool_convs = nn.ModuleList(
            conv3(bands, bands) if pool == "conv" else nn.Identity() for _ in range(used)
        )

        # The aggregator sees the features of all levels, or all packets.
        features = in_channels * 4**dct_levels if packets else bands * used
        self.aggregator = unet(features, latent_dim, *widths[3:])
        if linear:
            self.add_linear_path()

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self)
        features = self.seen(x)
        if not self.packets:
            features = [
                pool_conv(F.avg_pool2d(extractor(bands), factor))  # (B, 4C, H/f, W/f)
                for bands, (extractor, factor, pool_conv) in zip(
                    features, self.stages(), strict=True
                )
            ]
        whole = torch.cat(features, dim=1) if len(features) > 1 else features[0]
        return self.with_linear_path(self.aggregator(whole), x)

    def seen(self, x: Tensor) -> list[Tensor]:
        """Transform images into what the first UNets see.

        A level's sub-bands for each extractor, (B, 4C, H/2^l, W/2^l), the finest first; or all
        packets for the aggregator, (B, C f f, H/f, W/f).
        """
        if self.packets:
            features = x
            for _ in range(self.levels):
                features = dwt2(features, self.wavelet)
            return [features * self.band_scales[-1]]
        levels = wavedec2(x, self.wavelet, self.levels)[self.skip_levels :]
        scales = self.band_scales[self.skip_levels :]
        return [
            bands if scale == 1.0 else bands * scale
            for bands, scale in zip(levels, scales, strict=True)
        ]

    def stages(self) -> list[tuple[nn.Module, int, nn.Module]]:
        """Each level's extractor, factor of its pooling, and convolution after that."""
        # One extractor per level, or the same one for all.
        used = len(self.pool_convs)
        extractors = [*self.extractors] * (used // max(1, len(self.extractors)))
        factors = [2**level for level in reversed(range(used))]
        return list(zip(extractors, factors, self.pool_convs, strict=True))


class WaveletEncoder(Encoder):
    """The coarsest level of the wavelet transform as latent: nothing learns [P Tables 11 and 12].

    The four sub-bands are divided by 2^levels, so that LL is in the image's range; keeping all of
    them is our choice [D]. Only the decoder trains: set ``freeze_encoder``, and KL's weight to 0.

    Args:
        latent_dim: 8 in_channels for moments with the smallest log-variances; 4 in_channels for the
            sub-bands alone, which ``use_quant`` turns into moments of any number of channels.
        in_channels, dct_levels, image_size, wavelet: as LiteVAE_Encoder's.

    Shapes: (B, in_channels, H, W) in [-1, 1] -> (B, latent_dim, H/2^levels, W/2^levels).
    """

    def __init__(
        self,
        latent_dim: int = 24,
        in_channels: int = 3,
        dct_levels: int = 3,
        image_size: int = 256,
        wavelet: str = "haar",
    ) -> None:
        check_counts(1, dct_levels=dct_levels)
        super().__init__(latent_dim, in_channels, 2**dct_levels, image_size)
        bands = 4 * in_channels
        if latent_dim not in (bands, 2 * bands):
            misfit = f"has {bands} bands, which latent_dim {latent_dim} does not fit"
            remedy = (
                f"set embed_dim and z_channels to {bands}, or use_quant with latent_dim {bands}"
            )
            raise ValueError(f"a wavelet level of {in_channels} channels {misfit}: {remedy}")
        self.levels = dct_levels
        self.wavelet = wavelet

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self)
        bands = wavedec2(x, self.wavelet, self.levels)[-1] / self.downscale  # (B, 4C, H/f, W/f)
        if self.latent_dim == bands.shape[1]:
            return bands
        return deterministic_moments(bands)  # (B, 8C, H/f, W/f)


def _check_images(x: Tensor, encoder: Encoder) -> None:
    if x.ndim != 4 or x.shape[1] != encoder.in_channels:
        raise ValueError(
            f"expected images of shape (B, {encoder.in_channels}, H, W), got {tuple(x.shape)}"
        )
    h, w = x.shape[-2:]
    f = encoder.downscale
    if h % f or w % f:
        # -(-h // f) is h / f, rounded up.
        padded = f"{-(-h // f) * f}x{-(-w // f) * f}"
        raise ValueError(
            f"image size {h}x{w} is not a multiple of {f}: crop or pad it, for example to {padded}"
        )


def _widths(
    scale: str | None, variant: str, given: tuple[int | Sequence[int] | None, ...]
) -> Scale:
    """Override the preset's widths by given ones; the paper has two blocks per level [P App. G]."""
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    widths: dict[str, Any] = SCALES[scale]._asdict() if scale else {}
    if variant == "paper":
        widths.update(extractor_resblocks=2, aggregate_resblocks=2)
    for name, value in zip(Scale._fields, given, strict=True):
        if value is not None:
            widths[name] = value
    missing = [name for name in Scale._fields if name not in widths]
    if missing:
        raise ValueError(
            f"the encoder needs a scale ({', '.join(SCALES)}) or these widths: {', '.join(missing)}"
        )
    for name, counts in widths.items():
        check_counts(0 if name.endswith("resblocks") else 1, **{name: counts})
    return Scale(**widths)
