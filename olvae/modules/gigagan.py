"""GigaGAN: a discriminator at several scales, with attention at the coarse ones [R].

Its self-attention is by distance: Lipschitz-continuous, which the dot product is not (Kim et al.
2021).
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import check_choice
from olvae.modules.mixed_precision import casts_together, no_autocast, upcast
from olvae.modules.unetgan import SpectralConv2d


def l2_attention(qk: Tensor, v: Tensor) -> Tensor:
    """Attend by distance: softmax_j(-|q_i - q_j|^2 / sqrt(D)) v_j.

    Queries, which are also the keys, (..., N, D) and values (..., N, E) -> (..., N, E), in float32
    without autocast (float64 for float64). |q_i|^2 is the same for all j and cancels in the
    softmax, so it is left out. The mean is subtracted first, which changes no distance and keeps
    the differences exact.
    """
    with no_autocast(qk):
        q = upcast(qk)
        q = q - q.mean(dim=-2, keepdim=True)
        square = q.square().sum(dim=-1).unsqueeze(-2)  # (..., 1, N), of the keys
        logits = (2.0 * (q @ q.mT) - square) / sqrt(q.shape[-1])  # (..., N, N)
        return logits.softmax(dim=-1) @ upcast(v)


class TransformerBlock(nn.Module):
    """L2-distance attention, then a gated feed-forward network.

    Each has a LayerNorm before it, and its input is added after it. The projection to queries and
    keys has no bias, as no distance depends on it; the projection to values has none, since the
    output has one. The feed-forward network is W3 (GELU(W1 x) * W2 x), four times as wide as the
    input.
    """

    def __init__(self, channels: int, heads: int = 8, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_channels
        self.attention_norm = nn.LayerNorm(channels)
        self.to_qk = SpectralConv2d(channels, inner, kernel_size=1, bias=False)
        self.to_v = SpectralConv2d(channels, inner, kernel_size=1, bias=False)
        self.to_out = SpectralConv2d(inner, channels, kernel_size=1)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.gate_and_value = SpectralConv2d(channels, 8 * channels, kernel_size=1)
        self.feed_forward_out = SpectralConv2d(4 * channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape; every pixel attends to every other."""
        h = _channel_norm(x, self.attention_norm)
        qk = self._split_heads(self.to_qk(h))  # (B, heads, H W, D)
        v = self._split_heads(self.to_v(h))  # (B, heads, H W, D)
        attended = l2_attention(qk, v).mT.flatten(1, 2)  # (B, heads D, H W)
        attended = attended.unflatten(-1, x.shape[-2:])  # (B, heads D, H, W)
        x = x + self.to_out(attended.to(v.dtype))

        gate, value = self.gate_and_value(_channel_norm(x, self.feed_forward_norm)).chunk(2, dim=1)
        out: Tensor = x + self.feed_forward_out(F.gelu(gate) * value)
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.flatten(2).unflatten(1, (self.heads, -1))  # (B, heads, D, H W)
        return heads.mT


def _channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W)."""
    normed: Tensor = norm(x.movedim(1, -1))
    return normed.movedim(-1, 1)


class GigaGAN(nn.Module):
    """Levels at half the image's size, a quarter, and so on down to 4 pixels; logits from several.

    A level of ``size`` pixels is min(base / size, max_channels) wide. It halves the map from above,
    adds features of the image at its own size, and applies two 3x3 convolutions; at the sizes in
    ``attention`` there follow ``blocks`` transformer blocks with a learned position embedding. The
    predictor of the last level reads its map through a 2x2 convolution of stride 2, as one vector.
    Spectral norm and orthogonal init throughout, no BatchNorm. At the defaults 14.38 M parameters
    and 3.27 GMACs; published are 14.38 M and 3.23 G [R]. Not in the README, and decided here: the
    shortcut around a level, position embeddings, 8 heads, half the width inside predictors [D].

    Args:
        in_channels: the image's channels.
        image_size: height and width of the images, a power of two from 64.
        base: channels times size of a level before the limit.
        max_channels: the limit.
        blocks: transformer blocks at each size in ``attention``.
        attention: the sizes in pixels of the levels with attention.
        predictors: "ends" for the first and the last level, "all" for one at every level.
        heads, head_channels: of the attention.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 256,
        base: int = 4096,
        max_channels: int = 256,
        blocks: int = 2,
        attention: Sequence[int] = (8, 16),
        predictors: Literal["ends", "all"] = "ends",
        heads: int = 8,
        head_channels: int = 64,
    ) -> None:
        super().__init__()
        # A power of two has one bit that is set.
        if image_size < 64 or image_size.bit_count() != 1:
            raise ValueError(
                f"GigaGAN's image_size must be a power of two from 64, got {image_size}"
            )
        if base < image_size or max_channels < 2:
            raise ValueError(
                "every level of GigaGAN needs two channels: base at least image_size = "
                f"{image_size} and max_channels at least 2, got {base} and {max_channels}"
            )
        check_choice(("ends", "all"), predictors=predictors)

        # The levels' sizes in pixels: image_size / 2, ..., 4.
        sizes = [image_size >> i for i in range(1, image_size.bit_length() - 2)]
        unknown = sorted(set(attention) - set(sizes))
        if unknown:
            raise ValueError(
                f"GigaGAN at {image_size} px has levels of {sizes} px: "
                f"attention cannot be at {unknown}"
            )
        widths = [min(base // size, max_channels) for size in sizes]

        # Levels; transformers at some of them, by the index of the level.
        self.image_size = image_size
        self.stem = SpectralConv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.levels = nn.ModuleList(
            _Level(in_channels, c_in, c_out)
            for c_in, c_out in zip([widths[0], *widths], widths, strict=False)
        )
        self.transformers = nn.ModuleDict()
        for i, size in enumerate(sizes):
            if size in attention and blocks > 0:
                self.transformers[str(i)] = _Transformer(
                    widths[i], size, blocks, heads, head_channels
                )

        # Predictors at some levels, and the last level's, which makes one logit per image.
        before_last = range(len(sizes) - 1) if predictors == "all" else [0]
        self.predictors = nn.ModuleDict({str(i): _Predictor(widths[i]) for i in before_last})
        self.reduce = SpectralConv2d(widths[-1], widths[-1], kernel_size=2, stride=2)
        self.last_predictor = _Predictor(4 * widths[-1])
        self.num_outputs = len(self.predictors) + 1

    @casts_together
    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_channels, image_size, image_size) -> a list of logits.

        Of patches (B, 1, s, s), finest first, then of the image (B, 1).
        """
        if x.ndim != 4 or x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this GigaGAN takes images (B, C, {self.image_size}, {self.image_size}), "
                f"its image_size, got {tuple(x.shape)}"
            )
        logits: list[Tensor] = []
        image = x
        h = self.stem(x)  # (B, widths[0], S, S)
        for i, level in enumerate(self.levels):
            # Half the size, in float32; a triangle filter four pixels wide prevents aliasing.
            with no_autocast(image):
                image = F.interpolate(
                    upcast(image), scale_factor=0.5, mode="bilinear", antialias=True
                ).to(image.dtype)  # (B, C, S/2^(i+1), S/2^(i+1))
            h = level(h, image)  # (B, widths[i], S/2^(i+1), S/2^(i+1))
            if str(i) in self.transformers:
                h = self.transformers[str(i)](h)
            if str(i) in self.predictors:
                logits.append(self.predictors[str(i)](h))
        vector = self.reduce(F.leaky_relu(h, 0.2)).flatten(1)  # (B, 4 widths[-1])
        logits.append(self.last_predictor(vector[..., None, None]).flatten(1))  # (B, 1)
        return logits


class _Level(nn.Module):
    """Halve the map with a 4x4 convolution, add features of the image, apply two 3x3 convolutions.

    A shortcut goes around all of it: a 1x1 convolution, then the mean of 2x2 pixels, as in UNetGAN.
    """

    def __init__(self, image_channels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = SpectralConv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)
        self.image_stem = SpectralConv2d(image_channels, out_channels, kernel_size=3, padding=1)
        self.conv1 = SpectralConv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = SpectralConv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = SpectralConv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x: (B, in, 2h, 2w), image: (B, C, h, w) -> (B, out, h, w)."""
        h: Tensor = self.down(F.leaky_relu(x, 0.2)) + self.image_stem(image)
        h = self.conv1(F.leaky_relu(h, 0.2))
        h = self.conv2(F.leaky_relu(h, 0.2))
        return h + F.avg_pool2d(self.shortcut(x), kernel_size=2)


class _Transformer(nn.Module):
    """A learned position embedding and transformer blocks."""

    def __init__(
        self, channels: int, size: int, blocks: int, heads: int, head_channels: int
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, channels, size, size))
        self.blocks = nn.Sequential(
            *(TransformerBlock(channels, heads, head_channels) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x + self.positions)
        return out


class _Predictor(nn.Module):
    """Three 1x1 convolutions through half the width with a 1x1 skip, then a logit per position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = SpectralConv2d(channels, half, kernel_size=1)
        self.conv2 = SpectralConv2d(half, half, kernel_size=1)
        self.conv3 = SpectralConv2d(half, channels, kernel_size=1)
        self.skip = SpectralConv2d(channels, channels, kernel_size=1)
        self.to_logit = SpectralConv2d(channels, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 1, h, w)."""
        h = self.conv1(F.leaky_relu(x, 0.2))
        h = self.conv2(F.leaky_relu(h, 0.2))
        h = self.conv3(F.leaky_relu(h, 0.2))
        logits: Tensor = self.to_logit(F.leaky_relu(h + self.skip(x), 0.2))
        return logits
