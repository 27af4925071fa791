"""The two scales of pixels: uint8 on disk and up to the device, [-1, 1] in the networks."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["from_uint8", "image_to_tensor", "read_rgb", "tensor_to_image", "to_uint8"]


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Floats, nominally in [-1, 1] -> uint8 in 0..255, clamped and rounded; the inverse of from_uint8."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture -> uint8 (3, H, W)."""
    array: NDArray[np.uint8] = np.array(image, dtype=np.uint8)  # (H, W, 3), a writable copy
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def tensor_to_image(x: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> an RGB picture."""
    return Image.fromarray(x.permute(1, 2, 0).contiguous().cpu().numpy())


def read_rgb(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Turned upright by its EXIF orientation; transparent pictures are laid over white; 16-bit greyscale is
    scaled to 8 bits; greyscale, palette and CMYK are converted by Pillow.

    Raises:
        ValueError: the file is not a picture, or is a broken one.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB; see :func:`read_rgb` for the rules."""
    if image.mode.startswith("I"):  # 16-bit greyscale, as I;16 or I
        array = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(array.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
