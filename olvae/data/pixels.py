"""The two scales of pixels: uint8 on disk and up to the device, [-1, 1] in the networks."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["Bands", "Picture", "from_uint8", "image_to_tensor", "read_picture", "tensor_to_picture", "to_uint8"]


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Floats, nominally in [-1, 1] -> uint8 in 0..255, clamped and rounded; the inverse of from_uint8."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


class Bands:
    """A picture of any number of channels, and those of Pillow's operations that transforms need, band by band."""

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = list(bands)

    @property
    def size(self) -> tuple[int, int]:
        return self.bands[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling,
        box: tuple[float, float, float, float] | None = None,
    ) -> "Bands":
        return Bands([band.resize(size, resample, box=box) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        return Bands([band.crop(box) for band in self.bands])

    def transpose(self, method: Image.Transpose) -> "Bands":
        return Bands([band.transpose(method) for band in self.bands])


Picture = Image.Image | Bands

DECODER_ERRORS = (
    OSError,  # with Pillow's UnidentifiedImageError
    ValueError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise at broken files."""


def image_to_tensor(image: Picture) -> Tensor:
    """A picture of C channels -> uint8 (C, H, W)."""
    if isinstance(image, Bands):
        return torch.cat([image_to_tensor(band) for band in image.bands])
    array: NDArray[np.uint8] = np.array(image, dtype=np.uint8)  # (H, W) or (H, W, C), a writable copy
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1).contiguous()


def tensor_to_picture(x: Tensor) -> Bands:
    """uint8 (C, H, W) -> a picture, the inverse of :func:`image_to_tensor`."""
    return Bands([Image.fromarray(band) for band in x.contiguous().cpu().numpy()])


def read_picture(path: str | Path, channels: int = 3) -> Picture:
    """Read a picture with 8 bits per channel, turned upright by its EXIF orientation.

    Three channels are RGB: transparent pictures are laid over white; 16-bit greyscale is scaled to 8 bits;
    greyscale, palette and CMYK are converted by Pillow. One channel is the luma of that; four are RGB and alpha.
    Any other number comes from a NumPy file, an array of uint8 of shape (H, W, channels).

    Raises:
        ValueError: the file is not a picture, is a broken one, or has another number of channels.
    """
    try:
        if Path(path).suffix == ".npy":
            return _read_array(path, channels)
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except DECODER_ERRORS as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
    if channels == 1:
        return to_rgb(upright).convert("L")
    if channels == 3:
        return to_rgb(upright)
    if channels == 4:
        return upright.convert("RGBA")
    raise ValueError(f"{path}: images of {channels} channels are read from .npy files, of shape (H, W, {channels})")


def _read_array(path: str | Path, channels: int) -> Bands:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"not an array: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ValueError(f"expected uint8 of shape (H, W, {channels}), got {array.dtype} of shape {array.shape}")
    return Bands([Image.fromarray(np.ascontiguousarray(array[..., c])) for c in range(channels)])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB; see :func:`read_picture` for the rules."""
    if image.mode.startswith("I"):  # 16-bit greyscale, as I;16 or I
        array = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(array.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
