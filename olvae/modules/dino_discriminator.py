"""A discriminator on a frozen vision encoder's features, as StyleGAN-T's and RAE's on DINO's."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import check_counts
from olvae.modules.frozen import load_vision_encoder
from olvae.modules.mixed_precision import upcast
from olvae.modules.patchgan import SharedBatchNorm
from olvae.modules.unetgan import SpectralConv2d

# Tokens that a head's residual layer sees (StyleGAN-T).
KERNEL = 9


class DinoDiscriminator(nn.Module):
    """Heads on a frozen vision encoder's features; one logit per token of each head.

    As StyleGAN-T's (Sauer et al. 2023, arXiv 2301.09515, 3.2) and RAE's (arXiv 2510.11690):
    features of equidistant blocks of a ViT-S that DINO trained, each with a small head, and
    DiffAugment in front (Zhao et al. 2020, arXiv 2006.10738), in training only. A head has a
    convolution of single tokens, one of nine along the tokens with a shortcut around it, and the
    logits' convolution, with spectral norm; after the first two BatchNorm, and so no bias, and
    LeakyReLU 0.2.

    The encoder is no part of the state dict, and has no parameters here. BatchNorm is over the
    whole batch and all processes, as PatchGAN's, in place of StyleGAN-T's groups of 8 images [D].
    Published code also adds the class token to each token, and has a head on the patches before the
    first block; RAE's configs have no cutout, and a norm of each image alone. Not here [D].

    Args:
        encoder: a timm model; RAE's is DINO's ViT-S with patches of 8 pixels.
        weights: a file of its weights, or an id of the hub; by default timm's published weights,
            downloaded into the hub's cache.
        image_size: to this the shorter side of images is resized, in pixels; StyleGAN-T takes
            random crops of 224 of larger images.
        heads: number of blocks whose features are judged, the last one among them.
        augment: the augmentations: colour, translation, cutout.
    """

    def __init__(
        self,
        encoder: str = "vit_small_patch8_224.dino",
        weights: str | None = None,
        image_size: int = 224,
        heads: int = 4,
        augment: Sequence[str] = ("colour", "translation", "cutout"),
    ) -> None:
        super().__init__()
        check_counts(1, image_size=image_size, heads=heads)
        unknown = [name for name in augment if name not in AUGMENTATIONS]
        if unknown:
            known = ", ".join(AUGMENTATIONS)
            raise ValueError(f"augment: expected some of {known}, got {', '.join(unknown)}")
        try:
            self.features = load_vision_encoder(encoder, weights)
        except OSError as error:
            raise type(error)(
                f"{error}; set discriminator_config.params.weights to a file of {encoder}'s weights"
            ) from error
        depth = self.features.depth
        if heads > depth:
            raise ValueError(f"heads: {encoder} has {depth} blocks, got {heads} heads")
        self.image_size = image_size
        self.augment = tuple(augment)
        self.num_outputs = heads

        # The last block of each part, of equally many blocks.
        self.places = [depth * (head + 1) // heads - 1 for head in range(heads)]
        self.heads = nn.ModuleList(_Head(self.features.channels) for _ in range(heads))

    def checksum(self) -> str:
        """See :meth:`olvae.models.parts.part.Part.checksum`."""
        return self.features.checksum

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> [logits of tokens (B, 1, h, w)] of each head."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"a vision encoder takes images (B, 3, H, W), got {tuple(x.shape)}: take another "
                "discriminator for images of other channels"
            )
        if self.training:
            x = diff_augment(x, self.augment)
        height, width = x.shape[-2:]
        scale = self.image_size / min(height, width) / self.features.stride
        grid = (max(1, round(height * scale)), max(1, round(width * scale)))
        features = self.features.after_blocks(x, grid, self.places)
        return [head(upcast(map_)) for head, map_ in zip(self.heads, features, strict=True)]


class _Head(nn.Module):
    """Logits of tokens: (B, C, h, w) -> (B, 1, h, w), by convolutions along the tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        margin = (0, KERNEL // 2)
        self.first = SpectralConv2d(channels, channels, kernel_size=1, bias=False)
        self.norm1 = SharedBatchNorm(channels)
        self.second = SpectralConv2d(
            channels, channels, (1, KERNEL), padding=margin, padding_mode="circular", bias=False
        )
        self.norm2 = SharedBatchNorm(channels)
        self.last = SpectralConv2d(channels, 1, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        # Row by row, the tokens are one line: (B, C, 1, h w).
        tokens = features.flatten(2)[:, :, None]
        if tokens.shape[-1] < KERNEL:
            raise ValueError(
                f"images of {tokens.shape[-1]} tokens: a head takes {KERNEL} and more: raise "
                "image_size"
            )
        h = F.leaky_relu(self.norm1(self.first(tokens)), 0.2)
        inner = F.leaky_relu(self.norm2(self.second(h)), 0.2)
        h = (h + inner) / math.sqrt(2)
        logits: Tensor = self.last(h)  # (B, 1, 1, h w)
        return logits.view(-1, 1, *features.shape[-2:])


def diff_augment(x: Tensor, names: Sequence[str]) -> Tensor:
    """Augment images (B, C, H, W) at random, each in its own way; gradients flow through.

    The strengths are the published code's defaults (Zhao et al. 2020), for images in [-1, 1].
    """
    x = upcast(x)
    for name in names:
        x = AUGMENTATIONS[name](x)
    return x


def _colour(x: Tensor) -> Tensor:
    """Shift the brightness by up to 0.5; scale the saturation by 0 to 2, the contrast by .5 to 1.5.

    Saturation is the distance from a pixel's mean, contrast from the image's.
    """
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    changed: Tensor = mean + (contrast + 0.5) * (x - mean)
    return changed


def translate(x: Tensor) -> Tensor:
    """Move by up to an eighth of the side in both directions; what comes in is 0."""
    for axis in (2, 3):
        side = x.shape[axis]
        most = round(side / 8)
        shift = torch.randint(-most, most + 1, (len(x), 1), device=x.device)
        places = torch.arange(side, device=x.device) + shift  # (B, side)
        outside = (places < 0) | (places >= side)

        # Of each image the rows, or columns, at its own places.
        shape = [len(x), 1, 1, 1]
        shape[axis] = side
        index = places.clamp(0, side - 1).view(shape).expand_as(x)
        x = x.gather(axis, index) * ~outside.view(shape)
    return x


def cut_out(x: Tensor) -> Tensor:
    """Set a rectangle of half of each side to 0, whose centre is anywhere in the image."""
    inside = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for axis in (2, 3):
        side = x.shape[axis]
        centre = torch.randint(0, side + 1, (len(x), 1, 1, 1), device=x.device)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        places = torch.arange(side, device=x.device).view(shape)
        start = centre - side // 4
        inside = inside & (places >= start) & (places < start + side // 2)
    return x * ~inside


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "colour": _colour,
    "translation": translate,
    "cutout": cut_out,
}
