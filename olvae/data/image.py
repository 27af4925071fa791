"""Read image files as 8-bit pictures, crop and resize them to squares: random for training, fixed for evaluation."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, features
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor

from olvae.data.read_errors import UnreadableImageError
from olvae.files import legible, reason


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Floats, nominally in [-1, 1] -> uint8 in 0..255, clamped and rounded; the inverse of from_uint8."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


@dataclass
class Bands:
    """A picture of any number of channels, with Pillow's operations for transforms, band by band."""

    bands: Sequence[Image.Image]

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
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> "Bands":
        return Bands([band.resize(size, resample, box=box) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        return Bands([band.crop(box) for band in self.bands])

    def transpose(self, method: Image.Transpose) -> "Bands":
        return Bands([band.transpose(method) for band in self.bands])


Picture = Image.Image | Bands

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes by number of channels


def image_to_tensor(image: Picture) -> Tensor:
    """A picture of C channels -> uint8 (C, H, W)."""
    if isinstance(image, Bands):
        return torch.cat([image_to_tensor(band) for band in image.bands])
    array: NDArray[np.uint8] = np.array(image, dtype=np.uint8)  # (H, W) or (H, W, C), a writable copy
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1).contiguous()


def array_to_picture(array: NDArray[np.uint8]) -> Bands:
    """uint8 (H, W, C) -> a picture."""
    return Bands([Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(array, -1, 0)])


def tensor_to_picture(x: Tensor) -> Bands:
    """uint8 (C, H, W) -> a picture, the inverse of :func:`image_to_tensor`."""
    return array_to_picture(x.permute(1, 2, 0).cpu().numpy())


EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".npy")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", *(("AVIF",) if features.check("avif") else ()))
"""Formats that are opened, by Pillow's names; others start programs, as EPS does Ghostscript."""

MAX_PIXELS = 160_000_000  # the largest camera's pictures have 151 million; each takes up to 20 bytes while it is read
MAX_RATIO = 100  # largest ratio of a picture's sides: resized to size s, it has up to 100 s^2 pixels
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Photo:
    """A picture whose header has been read; its pixels are decoded by :meth:`read`.

    Args:
        content: a file's path or its bytes, or a picture in memory.
        name: for errors.
        channels: 3, 1, 4 or, for arrays, any other number; see :func:`read_picture`.

    Raises UnreadableImageError: the header is not that of a picture.
    """

    def __init__(self, content: Path | bytes | Picture, name: str, channels: int = 3) -> None:
        self.name = name
        self.channels = channels
        self.content = content
        self._image: Picture
        try:
            self._image = self._open(content)
            _check_size(*self._image.size)  # before EXIF is read, which decodes a PNG
            self._orientation = _orientation(self._image) if isinstance(self._image, Image.Image) else 1
            self.size = self._upright_size()
        except Exception as error:  # decoders raise all kinds for a broken file
            raise UnreadableImageError(name, _reason(error)) from error
        if isinstance(self._image, Image.Image) and channels not in MODES:
            raise UnreadableImageError(name, f"{channels} channels are read from .npy files, (H, W, {channels})")

    def undecoded(self) -> bytes | Picture:
        """The file's bytes, or the picture in memory. Raises UnreadableImageError if the file can't be read."""
        if not isinstance(self.content, Path):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise UnreadableImageError(self.name, _reason(error)) from error

    @property
    def format(self) -> str | None:
        """Pillow's name for the file's format; None for an array or a picture in memory."""
        return self._image.format if isinstance(self._image, Image.Image) else None

    @property
    def mode(self) -> str | None:
        """Pillow's name for the pixels' format in the file, for example RGB or I;16; None for an array."""
        return self._image.mode if isinstance(self._image, Image.Image) else None

    def read(self, shrink: int = 1) -> Picture:
        """The pixels, turned upright, 8 bits per channel.

        Args:
            shrink: 1, 2, 4 or 8. A JPEG is decoded at 1/shrink of its size, rounded up, which is faster; other formats
                are decoded in full.

        Raises UnreadableImageError: the file is broken.
        """
        image = self._image
        if isinstance(image, Bands):
            return image
        try:
            if shrink > 1 and image.format == "JPEG":
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()
            upright = image if self._orientation == 1 else ImageOps.exif_transpose(image)
            return _convert(upright, MODES[self.channels])
        except Exception as error:  # decoders raise all kinds for a broken file
            raise UnreadableImageError(self.name, _reason(error)) from error

    def _open(self, content: Path | bytes | Picture) -> Picture:
        if isinstance(content, Bands) and len(content.bands) != self.channels:
            raise ValueError(f"it has {len(content.bands)} channels, not {self.channels}")
        if not isinstance(content, Path | bytes):
            return content
        if not (len(content) if isinstance(content, bytes) else content.stat().st_size):
            raise ValueError("the file is empty")
        if Path(self.name).suffix.lower() == ".npy":
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                return _array(file, self.channels)
        with warnings.catch_warnings():  # Pillow warns from half the size that it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)

    def _upright_size(self) -> tuple[int, int]:
        width, height = self._image.size
        if isinstance(self._image, TiffImageFile) and self._orientation in SIDEWAYS:
            width, height = (self._image.tag_v2[tag] for tag in (IMAGEWIDTH, IMAGELENGTH))  # some Pillows turn .size
        return (height, width) if self._orientation in SIDEWAYS else (width, height)


def read_picture(path: str | Path, channels: int = 3) -> Picture:
    """Read a picture with 8 bits per channel, turned upright by its EXIF orientation.

    Three channels are RGB: transparent pictures are laid over white; 16-bit greyscale is scaled to 8 bits (Pillow
    keeps the upper 8 bits of 16-bit colour); greyscale, palette and CMYK are converted by Pillow; only the first of
    several frames is read. One channel is the luma of that; four are RGB and alpha. Any other number of channels is
    read from a NumPy file, an array of uint8 of shape (H, W, channels).

    Raises:
        UnreadableImageError: the file is not a picture, is broken, has floating-point pixels or integers beyond 16
            bits, whose range is unknown, has another number of channels, more than :data:`MAX_PIXELS` pixels, or a
            side that is more than :data:`MAX_RATIO` times the other.
    """
    return Photo(Path(path), legible(str(path)), channels).read()


def _check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """From any mode of Pillow to one of :data:`MODES`; see :func:`read_picture` for the rules."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range: convert it to 8 or 16 bits")
    image = _to_8_bits(image)
    if _is_transparent(image):
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb if mode == "RGB" else rgb.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale, I;16 or I, as L, or as LA if it has a transparent value; other modes as they are."""
    if not image.mode.startswith("I"):
        return image
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are integers from {low} to {high}, not 0 to 65535: convert it to 8 or 16 bits")
    grey = Image.fromarray((array / 257.0).round().astype(np.uint8))
    if not _is_transparent(image):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (array != image.info["transparency"]))))


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; upright if EXIF is broken, because the pixels may still be whole."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        if not image.info.keys() & {"exif", "Raw profile type exif"}:  # Pillow searched behind a PNG's broken pixels
            raise
        return 1


def _array(file: io.BufferedIOBase, channels: int) -> Bands:
    array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ValueError(f"expected uint8 of shape (H, W, {channels}), got {array.dtype} of shape {array.shape}")
    return array_to_picture(array)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"its header claims more than {MAX_PIXELS // 10**6} million pixels"
    text = reason(error)
    return "no known picture format" if "cannot identify image file" in text else text


# Pillow's filters; all are antialiased when they shrink.
FILTERS = {name: Image.Resampling[name.upper()] for name in ("box", "bilinear", "hamming", "bicubic", "lanczos")}
ALL_FILTERS = ("box", "bilinear", "bicubic", "lanczos")  # filters that training draws from by default
OVERSAMPLING = 2.0  # least ratio of the square to the result for a JPEG that is decoded at a fraction of its size


@dataclass(frozen=True)
class RandomScaleCrop:
    """Stochastic image rescaling [R], random crop and flip.

    Cuts a square at a random place, whose side is a random fraction of the picture's shorter side, uniform between
    ``min_fraction`` and 1, and resizes it to ``size`` with a randomly chosen antialiased filter: the same as resizing
    the picture by a random factor and cropping ``size`` pixels of it [D], at a fraction of the cost. The square is at
    least ``size`` wide if the picture is, so that nothing is enlarged.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the square is then still at least twice as wide as the result,
    which changes a pixel by less than 1 of 255 on average (docs/data.md).

    Args:
        size: side of the result in pixels.
        min_fraction: in (0, 1].
        filters: names of :data:`FILTERS` to choose from.
        flip: mirror half of the results.
        shuffle_channels: share of the results whose channels are permuted: more colours, if there are few pictures.
    """

    size: int
    min_fraction: float = 0.5
    filters: Sequence[str] = ALL_FILTERS
    flip: bool = True
    shuffle_channels: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.shuffle_channels <= 1.0:
            raise ValueError(f"shuffle_channels must be between 0 and 1, got {self.shuffle_channels}")
        if not 0.0 < self.min_fraction <= 1.0:
            raise ValueError(f"min_fraction must be above 0 and at most 1, got {self.min_fraction}")
        if not self.filters or not set(self.filters) <= set(FILTERS):
            raise ValueError(f"filters must be some of {', '.join(FILTERS)}, got {list(self.filters)}")

    def __call__(self, photo: Picture | Photo, rng: np.random.Generator) -> Picture:
        width, height = photo.size
        shorter = min(width, height)
        side = rng.uniform(max(self.min_fraction * shorter, min(self.size, shorter)), shorter)
        left = rng.uniform(0.0, width - side)
        top = rng.uniform(0.0, height - side)
        resample = FILTERS[self.filters[int(rng.integers(len(self.filters)))]]
        image = photo.read(self._shrink(side)) if isinstance(photo, Photo) else photo
        shrunk = round(width / image.width)  # 1, 2, 4 or 8; the last column and row may reach beyond the picture
        box = (left / shrunk, top / shrunk, (left + side) / shrunk, (top + side) / shrunk)
        crop: Picture = image.resize((self.size, self.size), resample, box=box)
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.shuffle_channels and rng.random() < self.shuffle_channels:
            channels = crop.bands if isinstance(crop, Bands) else crop.split()
            crop = Bands([channels[i] for i in rng.permutation(len(channels))])
        return crop

    def _shrink(self, side: float) -> int:
        """Factor by which a decoder may shrink a square of this side."""
        return next((n for n in (8, 4, 2) if side >= n * OVERSAMPLING * self.size), 1)


RESIZES = {  # descriptions for the protocol
    "shorter side": "{filter} antialiased resize of the shorter side (Pillow), centre crop",
    "adm": "halved by averaging while twice too large, {filter} resize of the shorter side (Pillow), centre crop",
    "squash": "{filter} antialiased resize of both sides (Pillow)",
    "none": "not resized, centre crop",
}


@dataclass(frozen=True)
class EvalTransform:
    """Resize and crop a picture to a square of ``size`` pixels for evaluation, without randomness.

    Args:
        resize: ``shorter side``: to ``size``, as in the results table [R]; ``adm``: the same, after halving the
            picture by averaging while its shorter side is at least twice ``size`` (Dhariwal and Nichol 2021);
            ``squash``: both sides; ``none``: only pictures that are smaller. Then the centre is cropped.
        resample: one of :data:`FILTERS`, antialiased.

    Raises ValueError: the resize or filter is unknown.
    """

    size: int
    resize: str = "shorter side"
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES or self.resample not in FILTERS:
            raise ValueError(
                f"resize must be one of {', '.join(RESIZES)} and the filter of {', '.join(FILTERS)}, got "
                f"{self.resize} and {self.resample}"
            )

    def __call__(self, image: Picture) -> Picture:
        size, resample = self.size, FILTERS[self.resample]
        if self.resize == "squash":
            return image.resize((size, size), resample)
        while self.resize == "adm" and min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), FILTERS["box"])
        if self.resize != "none" or min(image.size) < size:
            image = resize_shorter_side(image, size, resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def describe(self) -> str:
        """A description for the protocol."""
        return RESIZES[self.resize].format(filter=self.resample)


def resize_shorter_side(image: Picture, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Picture:
    """Resize to a shorter side of ``size`` pixels; by default bicubic and antialiased."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image.resize((width, height), resample)
