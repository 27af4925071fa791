"""A plain network with the names of CompVis's KL autoencoders, for tests: what others load."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, N)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)  # (B, N, N)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Level(nn.Module):
    def __init__(self, width: int, out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([Block(width if i == 0 else out, out) for i in range(blocks)])
        self.attn = nn.ModuleList([Attention(out) for _ in range(blocks if attention else 0)])

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Sampling(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, padding=2 - stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (2, 2):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Block(width, width),
            Attention(width),
            Block(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], z: int, blocks: int, attention: set[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        levels, width = [], widths[0]
        for i, out in enumerate(widths):
            level = Level(width, out, blocks, i in attention)
            if i < len(widths) - 1:
                level.downsample = Sampling(out, 2)
            levels.append(level)
            width = out
        self.down, self.mid = nn.ModuleList(levels), Middle(width)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 2 * z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths: Sequence[int], z: int, blocks: int, attention: set[int]) -> None:
        super().__init__()
        width = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z, width, 3, padding=1), Middle(width)
        levels = []
        for i, out in reversed(list(enumerate(widths))):
            level = Level(width, out, blocks + 1, i in attention)
            if i:
                level.upsample = Sampling(out, 1)
            levels.insert(0, level)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
            if hasattr(level, "upsample"):
                z = level.upsample(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class CompVisKL(nn.Module):
    """An autoencoder with attention at some levels, counted from the image's.

    The decoder's are the encoder's, or its own. ``embedded`` channels are stored; the decoder takes
    ``z``.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64),
        z: int = 4,
        embedded: int = 4,
        blocks: int = 2,
        attention: Sequence[int] = (),
        decoder_attention: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, z, blocks, {*attention})
        own = attention if decoder_attention is None else decoder_attention
        self.decoder = Decoder(widths, z, blocks, {*own})
        self.quant_conv = nn.Conv2d(2 * z, 2 * embedded, 1)
        self.post_quant_conv = nn.Conv2d(embedded, z, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An image (B, 3, H, W) to moments, (B, 2 embedded, h, w), and the mean's image."""
        moments = self.quant_conv(self.encoder(x))
        return moments, self.decoder(self.post_quant_conv(moments.chunk(2, dim=1)[0]))


def with_random_weights(model: CompVisKL) -> CompVisKL:
    """The model, with norms and biases that are not at their start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
