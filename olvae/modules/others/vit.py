"""Vision transformers on latents: blocks, positions, Send-VAE's mapper, RAE's decoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import Decoder, check_counts

# Channels of an attention head.
HEAD_CHANNELS = 64

# Positions along a side to which every grid is scaled: DINOv2's and SigLIP2's of 256 pixels.
SCALED_GRID = 16


class Attention(nn.Module):
    """Add to tokens (B, N, width) what attention finds after a LayerNorm with this ``eps``."""

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Queries, keys and values of each head, (B, heads, N, width / heads).
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = x + self.proj(attended.transpose(1, 2).flatten(2))  # (B, N, width)
        return y


class Block(nn.Module):
    """A transformer block: attention, then a perceptron with GELU, each after a LayerNorm.

    Args:
        width: channels of a token.
        heads: of the attention; a divisor of the width.
        hidden: channels inside the perceptron; four times the width by default.
        eps: of the norms.

    Shapes: (B, N, width) -> (B, N, width).
    """

    def __init__(
        self, width: int, heads: int, hidden: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        self.attention = Attention(width, heads, eps)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        h = F.gelu(self.fc1(self.norm(x)))  # (B, N, hidden)
        y: Tensor = x + self.fc2(h)
        return y


def start_as_in_mae(network: nn.Module) -> None:
    """Draw a transformer's weights as MAE does (He et al. 2021): Xavier's, without biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Embed the positions of a grid by sines and cosines, (1, rows columns, width).

    As in MAE: the first half of the channels has the column, the second the row, each by sines,
    then cosines, of width / 4 frequencies from 1 down to nearly 1 / 10,000. Coordinates are scaled
    to a grid of 16 x 16, so that a grid of any size has them in one range.
    """
    if width % 4:
        raise ValueError(f"positions need a width that 4 divides, got {width}")
    exponents = torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4)
    frequencies = torch.exp(-math.log(10_000) * exponents)

    halves = []
    for count in (columns, rows):
        places = torch.arange(count, dtype=torch.float64, device=device) * (SCALED_GRID / count)
        angles = places[:, None] * frequencies  # (count, width / 4)
        halves.append(torch.cat((angles.sin(), angles.cos()), dim=1))
    of_columns = halves[0].repeat(rows, 1)
    of_rows = halves[1].repeat_interleave(columns, dim=0)
    embedded: Tensor = torch.cat((of_columns, of_rows), dim=1)[None].float()
    return embedded


def to_tokens(x: Tensor) -> Tensor:
    """Make a token of each position: (B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Put tokens back into their places: (B, rows columns, C) -> (B, C, rows, columns)."""
    placed: Tensor = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return placed


class ViTMapper(nn.Module):
    """Map latents to a vision encoder's features by one transformer block, as in Send-VAE.

    A 1x1 convolution, the block with heads of 64 channels, and an MLP (arXiv 2601.05823, 3.3 and
    4.1). The paper gives neither positions nor the MLP: sines and cosines, and three layers with
    SiLU between them, twice as wide [D].

    Args:
        latent_channels: n_z.
        width: the features' channels, a multiple of 64.

    Shapes: (B, n_z, h, w) -> (B, width, h, w).
    """

    def __init__(self, latent_channels: int, width: int) -> None:
        super().__init__()
        if width % HEAD_CHANNELS:
            raise ValueError(
                f"a ViT with heads of {HEAD_CHANNELS} channels maps to features of a multiple of "
                f"that, not to {width}"
            )
        self.embed = nn.Conv2d(latent_channels, width, kernel_size=1)
        self.block = Block(width, width // HEAD_CHANNELS)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        start_as_in_mae(self)

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = z.shape[-2:]
        tokens = to_tokens(self.embed(z))  # (B, h w, width)
        tokens = tokens + positions(rows, columns, tokens.shape[-1], z.device).to(tokens.dtype)
        mapped = self.mlp(self.block(tokens))
        return to_map(mapped, rows, columns)  # (B, width, h, w)


class ViTDecoder(Decoder):
    """Decode latents by a transformer, as RAE: a token of each position becomes a patch of pixels.

    As MAE's decoder and RAE's (arXiv 2510.11690): a linear layer, one more token that is learned,
    positions of sines and cosines, blocks, a norm, and a linear layer to patches. Latents of any
    grid are decoded.

    Args:
        z_channels, out_channels: channels of the latent and of the image.
        upscale: a patch's pixels along each side.
        width, depth, heads: channels of a token, blocks, and heads of a block. ViT-B's by default
            [D]; RAE's best, ViT-XL, has 1152, 28 and 16.
        hidden: channels inside a block's perceptron, four times the width by default; 4096 in RAE.
        eps: of the norms.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, upscale h, upscale w).
    """

    def __init__(
        self,
        z_channels: int,
        out_channels: int = 3,
        upscale: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(z_channels, out_channels, upscale)
        check_counts(1, width=width, depth=depth, heads=heads)
        self.embed = nn.Conv2d(z_channels, width, kernel_size=1)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.conv_out = nn.Conv2d(width, out_channels * upscale**2, kernel_size=1)
        start_as_in_mae(self)

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = z.shape[-2:]
        tokens = to_tokens(self.embed(z))  # (B, h w, width)
        tokens = tokens + positions(rows, columns, tokens.shape[-1], z.device).to(tokens.dtype)
        first = self.first.expand(len(z), -1, -1).to(tokens.dtype)
        tokens = torch.cat((first, tokens), dim=1)
        for block in self.blocks:
            tokens = self.step(block, tokens)
        tokens = self.norm(tokens)[:, 1:]
        patches = self.conv_out(to_map(tokens, rows, columns))  # (B, out_channels f f, h, w)
        return F.pixel_shuffle(patches, self.upscale)
