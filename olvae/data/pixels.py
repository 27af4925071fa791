"""The two scales of pixels: uint8 on disk and up to the device, [-1, 1] in the networks."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["Bands", "Picture", "from_uint8", "image_to_tensor", "tensor_to_picture", "to_uint8"]


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


def image_to_tensor(image: Picture) -> Tensor:
    """A picture of C channels -> uint8 (C, H, W)."""
    if isinstance(image, Bands):
        return torch.cat([image_to_tensor(band) for band in image.bands])
    array: NDArray[np.uint8] = np.array(image, dtype=np.uint8)  # (H, W) or (H, W, C), a writable copy
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1).contiguous()


def tensor_to_picture(x: Tensor) -> Bands:
    """uint8 (C, H, W) -> a picture, the inverse of :func:`image_to_tensor`."""
    return Bands([Image.fromarray(band) for band in x.contiguous().cpu().numpy()])
