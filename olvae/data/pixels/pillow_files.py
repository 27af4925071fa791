"""Open files of pictures by Pillow, and refuse what it would misread."""

import contextlib
import io
import logging
import warnings
from itertools import count
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

from olvae.data.pixels.arrays import array_suffix

# Pillow logs an error for each TIFF that it cannot read; those are read as arrays here.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
    *(("AVIF",) if features.check("avif") else ()),
)
"""Formats to open, by Pillow's names. Others are refused: EPS, for one, would start Ghostscript."""

MAX_PAGES = 1000  # of a TIFF, with its smaller copies; each is read
SIGNED = 2  # a TIFF's SampleFormat: integers below 0, too
IN_PLANES = 2  # a TIFF's PlanarConfiguration: each channel apart
COLOURS_IN_PLANES = ("RGB", "RGBA", "CMYK")  # Pillow's modes
NEW_SUBFILE_TYPE = 254  # a TIFF's tag: bit 0 is set for a smaller copy, bit 2 for a mask


def open_by_pillow(content: Path | bytes, channels: int) -> Image.Image | None:
    """Read a picture's header; None for a TIFF that only read_array can read.

    Pillow may not know such a TIFF, or reads fewer channels from it than are wanted.
    """
    # Pillow warns from half the size that it refuses.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            if array_suffix(content) != ".tif":
                raise
            return None
    if not isinstance(image, TiffImageFile):
        return image
    # Pillow takes these for 0 to 255.
    if SIGNED in image.tag_v2.get(SAMPLEFORMAT, ()) and not is_deep(image):
        raise ValueError("8 bits per channel from -128 to 127: save it with 0 to 255")

    # A TIFF with as many channels as are wanted: Pillow drops some of them. Of channels in planes,
    # unless they are RGB or CMYK, it reads the first one alone.
    samples = image.tag_v2.get(SAMPLESPERPIXEL, 1)
    first_alone = (
        image.tag_v2.get(PLANAR_CONFIGURATION) == IN_PLANES
        and samples > 1
        and image.mode not in COLOURS_IN_PLANES
        and not is_deep(image)
    )
    if first_alone and image.mode in ("LAB", "YCbCr"):
        raise ValueError(f"its {image.mode} colours are in planes: save it interleaved, or as RGB")
    if first_alone or len(image.getbands()) < channels == samples:
        if exif_orientation(image) != 1:
            raise ValueError(
                f"{channels} channels are read of upright pictures alone: "
                "save it with orientation 1"
            )
        return None

    # A TIFF of several pages, without smaller copies and masks of other pages. Pages of a deep one
    # may be bands, which read_array joins.
    if not is_deep(image):
        pages = 0
        with contextlib.suppress(EOFError):
            for page in count():
                # Pillow does not know the pixels of a mask, only its tags.
                with contextlib.suppress(SyntaxError):
                    image.seek(page)
                pages += not int(image.tag_v2.get(NEW_SUBFILE_TYPE, 0)) & 0b101
                if page == MAX_PAGES:
                    raise ValueError(f"it holds more than {MAX_PAGES} pages")
        image.seek(0)
        if pages > 1:
            raise ValueError(
                f"it holds {pages} pages, not one: save each in a file of its own, or as bands"
            )
    return image


def is_deep(image: Image.Image) -> bool:
    """Whether a picture of Pillow has more than 8 bits per channel, which Pillow may cut to 8."""
    # Of a TIFF stored in planes, Pillow's tiles do not show the bits.
    if isinstance(image, TiffImageFile) and max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8:
        return True
    # Tiles name the decoder and its arguments, which end with the largest value for a PPM.
    for tile in getattr(image, "tile", ()):
        decoder, arguments = tile[0], tile[3]
        if ";16" in str(arguments) or (decoder.startswith("ppm") and arguments[-1] > 255):
            return True
    return image.mode[0] in "IF"


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation; upright if EXIF is broken, because the pixels may still be whole."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Without EXIF in front, Pillow searched for it behind a PNG's pixels: those are broken.
        if not image.info.keys() & {"exif", "Raw profile type exif"}:
            raise
        return 1
