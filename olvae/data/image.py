"""Read image files as pictures, and crop and resize them: at random to train, fixed to evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    IMAGELENGTH,
    IMAGEWIDTH,
    TiffImageFile,
)
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.arrays import array_suffix, read_array
from olvae.data.pixels.colour_profiles import PROFILE_ERRORS, convert_to_srgb, read_profile
from olvae.data.pixels.pillow_files import exif_orientation, is_deep, open_by_pillow
from olvae.data.pixels.size_and_range import (
    AS_STORED,
    EIGHT_BIT_FILE,
    EIGHT_BITS,
    MAX_PIXELS,
    UNKEPT,
    UNSTATED,
    PixelRange,
    Sides,
    Size,
    TooManyPixelsError,
    check_size,
    nearest_float32,
)
from olvae.data.read_errors import UnreadableImageError
from olvae.files import counted, legible, reason


@dataclass
class MultiBand:
    """A picture of any number of channels, with the operations of Pillow that transforms use.

    Each operation is applied band by band. ``dtype`` is the dtype of the picture's tensor: uint8,
    uint16 or float32. The bands of the latter two hold float32, so that resizing rounds nothing.
    """

    bands: Sequence[Image.Image]
    dtype: str = "uint8"

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
    ) -> "MultiBand":
        return replace(self, bands=[band.resize(size, resample, box=box) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> "MultiBand":
        return replace(self, bands=[band.crop(box) for band in self.bands])

    def transpose(self, method: Image.Transpose) -> "MultiBand":
        return replace(self, bands=[band.transpose(method) for band in self.bands])


Picture = Image.Image | MultiBand

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes by number of channels
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")  # Pillow's modes


def image_to_tensor(image: Picture) -> Tensor:
    """A picture of C channels -> (C, H, W), uint8 but for bands of another dtype."""
    if isinstance(image, MultiBand) and image.dtype != "uint8":
        values = np.stack([np.asarray(band, dtype=np.float32) for band in image.bands])
        if image.dtype == "uint16":
            # Resize filters overshoot at edges.
            values = values.round().clip(0, 65535)
        return torch.from_numpy(values.astype(image.dtype))
    if isinstance(image, MultiBand):
        return torch.cat([image_to_tensor(band) for band in image.bands])
    # (H, W) or (H, W, C); a copy, because torch warns about memory that it may not write to.
    array: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1).contiguous()


def array_to_picture(array: NDArray[np.generic], dtype: str | None = None) -> MultiBand:
    """(H, W, C) -> a picture of ``dtype``, by default the array's uint8 or uint16, else float32."""
    if not dtype:
        dtype = array.dtype.name if array.dtype.name in ("uint8", "uint16") else "float32"
    stored = np.uint8 if dtype == "uint8" else np.float32
    bands = np.ascontiguousarray(np.moveaxis(array, -1, 0), dtype=stored)
    return MultiBand([Image.fromarray(band) for band in bands], dtype)


def stated_picture(
    array: NDArray[np.generic], pixel_range: PixelRange, nodata: float | None = None
) -> MultiBand:
    """An array, (H, W, C), as a picture of this range.

    Arguments and ValueError are as in :meth:`PixelRange.checked`.
    """
    if array.dtype == np.uint8 and pixel_range in (EIGHT_BITS, AS_STORED):
        return array_to_picture(array)
    if pixel_range.eight_bits:
        raise ValueError(f"{array.dtype.name} of shape {array.shape}: {UNSTATED}")
    # The dtype's name is the same for both byte orders.
    dtype = "uint16" if array.dtype.name == "uint16" else "float32"
    return array_to_picture(pixel_range.checked(array, nodata), dtype)


def tensor_to_picture(x: Tensor) -> MultiBand:
    """(C, H, W) -> a picture, the inverse of :func:`image_to_tensor`."""
    return array_to_picture(x.permute(1, 2, 0).cpu().numpy())


SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

# Most pixels that a byte of a file can hold. A block of 8 x 8 of a JPEG takes two bits, of a
# progressive one a bit. A code of a GIF has 12 bits, and stands for 4096 pixels at most.
PIXELS_A_BYTE = {"JPEG": 256, "MPO": 256, "GIF": 2731}
PIXELS_A_BYTE_PROGRESSIVE = 512

# Pixels that are converted at a time, so that few copies of a large picture are in memory.
STRIP_PIXELS = 2**22


class Photo:
    """A picture whose header has been read; its pixels are decoded by :meth:`read`.

    Args:
        content: a file's path or its bytes, or a picture in memory.
        name: for errors.
        channels: 3, 1 or 4; for arrays any number, or 0 for as many as they have. See
            :func:`read_picture`.
        pixel_range: the range that the data state; see :meth:`PixelRange.checked`.

    Raises UnreadableImageError: the header can't be read; for an array also if its values can't.
    """

    def __init__(
        self,
        content: Path | bytes | Picture,
        name: str,
        channels: int = 3,
        pixel_range: PixelRange = EIGHT_BITS,
    ) -> None:
        self.name = name
        self.channels = channels
        self.content = content
        self.pixel_range = pixel_range
        self.suffix = "npy"  # of an array's file, without the dot
        self.nodata: float | None = None  # the value that the file itself declares as missing
        self.pages = 0  # of a TIFF, if they became its channels
        # After reading: the name of a colour profile other than sRGB, or why it could not be used.
        self.profile: str | None = None
        self.profile_error: str | None = None
        self._image: Picture
        self._orientation = 1

        # Read the header; decoders raise all kinds of errors for a broken file.
        try:
            self._image = self._open(content)
            # Before EXIF is read: that decodes a PNG, which may be a decompression bomb.
            check_size(*self._image.size)
            self._check_bytes()
            if isinstance(self._image, Image.Image):
                self._orientation = exif_orientation(self._image)

            # The size, upright.
            width, height = self._image.size
            if self._orientation in SIDEWAYS:
                if isinstance(self._image, TiffImageFile):
                    # Some versions of Pillow have turned its .size already; the tags are as stored.
                    width = self._image.tag_v2[IMAGEWIDTH]
                    height = self._image.tag_v2[IMAGELENGTH]
                width, height = height, width
            self.size = (width, height)
        except ConfigError:
            raise
        except Exception as error:
            why = _reason(error)
            large = isinstance(error, TooManyPixelsError | Image.DecompressionBombError)
            if large and name.lower().endswith((".tif", ".tiff")):
                why += ": training reads its tiles if the data are scenes:FOLDER"
            raise UnreadableImageError(name, why) from error

        # Pillow's pictures have 1, 3 or 4 channels.
        if isinstance(self._image, Image.Image) and channels not in MODES:
            why = EIGHT_BIT_FILE
            if channels:
                why = f"{channels} channels are read from .npy, .npz, TIFF and EXR files"
            raise UnreadableImageError(name, why)

    def undecoded(self) -> bytes | Picture:
        """The file's bytes, or the picture in memory.

        Raises UnreadableImageError: the file can't be read.
        """
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
        """Pillow's name for the pixels in the file, for example RGB or I;16; None for an array.

        It ends with +A if the file says which colours are transparent, of a palette for example.
        """
        if not isinstance(self._image, Image.Image):
            return None
        return self._image.mode + ("+A" if "transparency" in self._image.info else "")

    @property
    def icc_profile(self) -> bytes | None:
        """The file's colour profile, as stored; None for an array, and where there is none."""
        if isinstance(self._image, MultiBand):
            return None
        profile: bytes | None = self._image.info.get("icc_profile")
        return profile

    def read(self, shrink: int = 1, masks: bool = False) -> Picture:
        """Decode the pixels, turn them upright, and convert them to sRGB by the file's profile.

        Pixels stay as they are if the profile can't be used, and those of ``masks``, which are no
        colours. A JPEG is decoded at 1/shrink (1, 2, 4 or 8) of its size, rounded up, which is
        faster.

        Raises UnreadableImageError: the file is broken.
        """
        image = self._image
        if isinstance(image, MultiBand):
            return image
        try:
            if image.format == "JPEG":
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()
            upright = image if self._orientation == 1 else ImageOps.exif_transpose(image)
            profile = None if masks else self.icc_profile

            # A large picture in strips of rows.
            width, height = upright.size
            rows = STRIP_PIXELS // width
            if height <= rows or (upright.mode == MODES[self.channels] == "RGB" and not profile):
                return self.converted(upright, profile)
            whole = Image.new(MODES[self.channels], upright.size)
            for top in range(0, height, rows):
                box = (0, top, width, min(top + rows, height))
                whole.paste(self.converted(upright.crop(box), profile), box)
            return whole
        except Exception as error:  # decoders raise all kinds for a broken file
            raise UnreadableImageError(self.name, _reason(error)) from error

    def _check_bytes(self) -> None:
        """Raise ValueError if a file is too small for the pixels that its header claims."""
        if not isinstance(self._image, Image.Image) or self.format not in PIXELS_A_BYTE:
            return
        if isinstance(self.content, Path):
            size = self.content.stat().st_size
        elif isinstance(self.content, bytes):
            size = len(self.content)
        else:
            return
        most = PIXELS_A_BYTE[self.format]
        if self._image.info.get("progressive"):
            most = PIXELS_A_BYTE_PROGRESSIVE
        width, height = self._image.size
        if width * height > most * size:
            raise ValueError(
                f"its header claims {width}x{height} pixels, more than its {size} bytes can hold"
            )

    def converted(self, image: Image.Image, profile: bytes | None) -> Image.Image:
        """Any mode of Pillow as one of MODES, by the rules of :func:`read_picture`."""
        # To sRGB; unchanged if the profile can't be used.
        if profile:
            try:
                known = read_profile(profile)
                converted = convert_to_srgb(image, known)
            except PROFILE_ERRORS as error:
                self.profile_error = reason(error)
            else:
                if converted is not image:
                    self.profile = known.name
                image = converted

        # The mode, any transparency over white.
        mode = MODES[self.channels]
        if image.mode in WITH_ALPHA or "transparency" in image.info:
            image = image.convert("RGBA")
            if mode == "RGBA":
                return image
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb if mode == "RGB" else rgb.convert(mode)

    def missing(self, values: NDArray[np.generic]) -> NDArray[np.bool_]:
        """A mask of the values that are not finite, or that the file declares as missing."""
        bad: NDArray[np.bool_] = ~np.isfinite(values)
        if self.nodata is not None:
            bad |= values == nearest_float32(self.nodata)
        return bad

    def _open(self, content: Path | bytes | Picture) -> Picture:
        # A picture in memory.
        if isinstance(content, MultiBand):
            found = len(content.bands)
            if self.channels not in (0, found):
                raise ValueError(f"it has {counted(found, 'channel')}, not {self.channels}")
            return content
        if not isinstance(content, Path | bytes):
            if is_deep(content):
                raise ValueError(UNSTATED)
            return content

        # A file without any bytes.
        if not (len(content) if isinstance(content, bytes) else content.stat().st_size):
            raise ValueError("the file is empty")

        # Pillow reads the header, unless the file is an array for certain. Only pictures of 8 bits
        # per channel stay with Pillow; deeper ones are read as arrays, where the format allows it.
        suffix = self._array_suffix(content)
        if suffix is None:
            image = open_by_pillow(content, self.channels)
            if image is not None and not is_deep(image):
                if self.pixel_range not in (EIGHT_BITS, AS_STORED):
                    raise ValueError(EIGHT_BIT_FILE)
                return image
            suffix = array_suffix(content)
            if suffix is None:
                raise ValueError(UNKEPT)
            if image is not None and self.pixel_range.eight_bits:
                raise ValueError(UNSTATED)
        self.suffix = suffix.removeprefix(".")

        # An array. Where any values will do, a deep TIFF or PNG may have any number of channels.
        channels = self.channels
        if self.pixel_range == AS_STORED and channels in MODES and suffix in (".tif", ".png"):
            channels = 0
        array, self.nodata, self.pages = read_array(content, channels)
        return stated_picture(array, self.pixel_range, self.nodata)

    def _array_suffix(self, content: Path | bytes) -> str | None:
        """The kind of array that a file holds; None if it may be a picture, for Pillow to open."""
        # The file's name says that it is an array; its first bytes say which kind.
        named = Path(self.name).suffix.lower()
        if named in (".npy", ".npz", ".exr"):
            return array_suffix(content) or named

        # Pillow can't give this number of channels, or this range of values.
        if self.channels not in MODES or self.pixel_range not in (EIGHT_BITS, AS_STORED):
            return array_suffix(content)

        # The usual photograph on disk: opened once, by Pillow alone.
        if self.pixel_range.eight_bits and isinstance(content, Path):
            return None

        # TIFF and PNG have 8 bits per channel or more, which only the header tells.
        suffix = array_suffix(content)
        return None if suffix in (".tif", ".png") else suffix


def read_picture(
    path: str | Path, channels: int = 3, pixel_range: PixelRange = EIGHT_BITS
) -> Picture:
    """Read a picture, and turn it upright by its EXIF orientation.

    Without a stated range it has 8 bits per channel. Three channels are RGB: transparent pictures
    are laid over white; greyscale, palette and CMYK are converted by Pillow, and colours of an
    embedded profile to sRGB; of a GIF the first frame is read. One channel is the luma of this RGB;
    four are RGB and alpha. Any other number of channels is read from a TIFF or a NumPy file, an
    array of uint8 of shape (H, W, channels).

    With a range it is an array of :data:`~olvae.data.pixels.arrays.ARRAY_DTYPES`, (H, W, channels),
    as it is in the file.

    Raises UnreadableImageError: the file can't be read, or has more than 8 bits per channel
    without a stated range, values that the range refuses, another number of channels, several
    pages, or a size that :func:`check_size` refuses.
    """
    return Photo(Path(path), legible(str(path)), channels, pixel_range).read()


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"its header claims more than {MAX_PIXELS // 10**6} million pixels"
    text = reason(error)
    return "no known picture format" if "cannot identify image file" in text else text


# Pillow's filters; all but nearest, which is for masks, are antialiased when they shrink.
FILTERS = {
    name: Image.Resampling[name.upper()]
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
ALL_FILTERS = ("box", "bilinear", "bicubic", "lanczos")  # training draws from these by default

# A JPEG is decoded at a fraction of its size if the window then is at least this many times as
# large as the result.
OVERSAMPLING = 2.0


def are_for_masks(filters: Sequence[str]) -> bool:
    """Whether these filters keep values as they are."""
    return set(filters) == {"nearest"}


# An assignment, which `validate` can evaluate without an import.
Augment = TypedDict(  # noqa: UP013
    "Augment",
    {
        "turns": bool,
        "flip_vertical": bool,
        "intensity_scale": float | int,
        "intensity_shift": float | int,
    },
    total=False,
)
"""``data.params.augment``: changes of training images that have neither top nor bottom, or no
fixed brightness, as sections of a tissue and scans.

``turns``: by 0, 90, 180 or 270 degrees, each as often. ``flip_vertical``: half of them upside
down. ``intensity_scale``: values times a number within this of 1. ``intensity_shift``: and plus as
much of the range, up or down. What leaves the range becomes its ends; all channels but alpha
change alike.
"""


@dataclass(frozen=True)
class RandomScaleCrop:
    """Stochastic image rescaling [R], random crop and flip.

    Cuts a window of the result's shape at a random place, and resizes it to ``size`` with a
    randomly chosen filter. The window's height is a random fraction, uniform between
    ``min_fraction`` and 1, of the largest window in the picture. This equals resizing the picture
    by a random factor and cropping ``size`` pixels from it [D], at a fraction of the cost. The
    window has at least ``size`` pixels if the picture has, so that nothing is enlarged. A window
    of exactly that size is cut at whole pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the window is then still at least twice as
    high as the result, which changes a pixel by less than 1 of 255 on average (docs/sources.md).

    Args:
        size: of the result.
        min_fraction: the smallest window's share of the largest, in (0, 1].
        filters: from which the resize draws. Nearest alone is for masks: then evaluation resizes by
            nearest, too.
        flip: mirror half of the results.
        shuffle_channels: share of the results whose channels are permuted, to get more colours from
            few pictures.
        augment: further changes, drawn after all else: ``turns`` by 0, 90, 180 or 270 degrees,
            ``flip_vertical`` for half of the results, ``intensity_scale`` and ``intensity_shift``.
    """

    size: Size
    min_fraction: float = 0.5
    filters: Sequence[str] = ALL_FILTERS
    flip: bool = True
    shuffle_channels: float = 0.0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.shuffle_channels <= 1.0:
            raise ValueError(
                f"shuffle_channels must be between 0 and 1, got {self.shuffle_channels}"
            )
        if not 0.0 < self.min_fraction <= 1.0:
            raise ValueError(f"min_fraction must be above 0 and at most 1, got {self.min_fraction}")
        if not self.filters or not set(self.filters) <= set(FILTERS):
            raise ValueError(
                f"filters must be some of {', '.join(FILTERS)}, got {list(self.filters)}"
            )
        augment = self.augment or {}
        unknown = augment.keys() - Augment.__annotations__.keys()
        if unknown:
            raise ValueError(
                f"augment: {', '.join(sorted(unknown))}: its settings are "
                f"{', '.join(Augment.__annotations__)}"
            )
        sides = Sides.of(self.size)
        if augment.get("turns") and sides.height != sides.width:
            raise ValueError(f"augment.turns: `size` is {sides}, and only squares keep their shape")
        for name, value in augment.items():
            if name.startswith("intensity_") and not 0.0 <= float(str(value)) < 1.0:
                raise ValueError(f"augment.{name} must be at least 0 and below 1, got {value}")
            if name.startswith("intensity_") and value and are_for_masks(self.filters):
                raise ValueError(f"augment.{name}: values of masks, of `filters` nearest, stay")

    def __call__(self, photo: Picture | Photo, rng: np.random.Generator) -> Picture:
        # Draw the window, in pixels of the picture: its height, then its place, then the filter.
        width, height = photo.size
        wanted = Sides.of(self.size)
        wide = wanted.width / wanted.height  # 1 for a square
        highest = min(width / wide, height)
        high = rng.uniform(max(self.min_fraction * highest, min(wanted.height, highest)), highest)
        left = rng.uniform(0.0, max(0.0, width - high * wide))
        top = rng.uniform(0.0, height - high)
        if abs(high - wanted.height) < 1e-6:
            # The result's own size, but for rounding: cut at whole pixels.
            high = float(wanted.height)
            left = float(round(left))
            top = float(round(top))
        resample = FILTERS[self.filters[int(rng.integers(len(self.filters)))]]

        # Decode the picture, at the smallest size that leaves the window large enough.
        shrink = 1
        for factor in (2, 4, 8):
            if high >= factor * OVERSAMPLING * wanted.height:
                shrink = factor
        masks = are_for_masks(self.filters)
        image = photo.read(shrink, masks) if isinstance(photo, Photo) else photo

        # Resize the window; its last column and row may reach beyond a shrunk picture.
        shrunk = round(width / image.width)  # 1, 2, 4 or 8
        box = (left / shrunk, top / shrunk, (left + high * wide) / shrunk, (top + high) / shrunk)
        crop: Picture = image.resize((wanted.width, wanted.height), resample, box=box)

        # Augment: a random mirror image, and a random order of channels.
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.shuffle_channels and rng.random() < self.shuffle_channels:
            channels = crop.bands if isinstance(crop, MultiBand) else crop.split()
            mixed = [channels[i] for i in rng.permutation(len(channels))]
            crop = replace(crop, bands=mixed) if isinstance(crop, MultiBand) else MultiBand(mixed)
        if not self.augment:
            return crop
        values = photo.pixel_range if isinstance(photo, Photo) else EIGHT_BITS
        return self.augmented(crop, rng, values)

    def augmented(
        self, crop: Picture, rng: np.random.Generator, pixel_range: PixelRange
    ) -> Picture:
        """Turn a crop, and change its values, as :attr:`augment` says; ``pixel_range`` is its."""
        augment = self.augment or {}
        if augment.get("flip_vertical") and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if augment.get("turns"):
            turns = int(rng.integers(4))
            if turns:
                crop = crop.transpose(Image.Transpose[f"ROTATE_{90 * turns}"])
        scale = float(augment.get("intensity_scale", 0.0))
        shift = float(augment.get("intensity_shift", 0.0))
        if not scale and not shift:
            return crop

        # The same for all channels, each in its own range.
        gain = 1.0 + scale * rng.uniform(-1.0, 1.0)
        moved = shift * rng.uniform(-1.0, 1.0)
        alpha = isinstance(crop, Image.Image) and crop.mode == "RGBA"
        several = crop if isinstance(crop, MultiBand) else MultiBand(crop.split())
        bands = list(several.bands)
        for number in range(len(bands) - alpha):
            low, high = pixel_range.ends_of(number)
            values = np.asarray(bands[number], dtype=np.float32) * np.float32(gain)
            values = (values + np.float32(moved * (high - low))).clip(low, high)
            if several.dtype == "uint8":
                values = values.round().astype(np.uint8)
            bands[number] = Image.fromarray(values)
        return replace(several, bands=bands)

    @property
    def evaluation(self) -> "EvalTransform":
        """The transform that evaluates on the same images: masks are resized by nearest, too."""
        resample = "nearest" if are_for_masks(self.filters) else "bicubic"
        return EvalTransform(self.size, resample=resample)


# Descriptions for the protocol.
RESIZES = {
    "shorter side": "{filter} antialiased resize of {what} (Pillow), centre crop",
    "adm": "halved by averaging while twice too large, {filter} resize of {what} (Pillow), "
    "centre crop",
}


@dataclass(frozen=True)
class EvalTransform:
    """Resize a picture, then crop its centre, for evaluation.

    ``shorter side`` resizes it to ``size``, as in the results table [R], or until height and width
    just cover it; ``adm`` halves it by averaging while it is at least twice too large, then
    resizes (Dhariwal and Nichol 2021).

    Raises ValueError: ``resize`` or ``resample`` is unknown.
    """

    size: Size
    resize: str = "shorter side"
    resample: str = "bicubic"  # one of FILTERS; nearest averages nothing

    def __post_init__(self) -> None:
        if self.resize not in RESIZES or self.resample not in FILTERS:
            raise ValueError(
                f"resize must be one of {', '.join(RESIZES)} and the filter of "
                f"{', '.join(FILTERS)}, got {self.resize} and {self.resample}"
            )

    def __call__(self, image: Picture) -> Picture:
        height, width = Sides.of(self.size)
        halves = self.resize == "adm" and self.resample != "nearest"
        while halves and image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), FILTERS["box"])
        image = resize_shorter_side(image, self.size, FILTERS[self.resample])
        left = (image.width - width) // 2
        top = (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def enlarges(self, image: Picture) -> bool:
        """Whether a picture is smaller than the result."""
        height, width = Sides.of(self.size)
        return image.width < width or image.height < height

    def describe(self) -> str:
        """A description for the protocol."""
        square = isinstance(Sides.of(self.size).node, int)
        what = "the shorter side" if square else "both sides until they cover it"
        text = RESIZES[self.resize].format(filter=self.resample, what=what)
        if self.resample == "nearest":
            text = text.replace("antialiased ", "")
            text = text.removeprefix("halved by averaging while twice too large, ")
        return text


def resize_shorter_side(
    image: Picture, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Picture:
    """Resize to a shorter side of ``size`` pixels, or until both sides just cover it."""
    height, width = Sides.of(size)
    scale = max(width / image.width, height / image.height)
    return image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), resample
    )
