"""Convert pictures to sRGB by the ICC profile in their file."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Pillow's modes by a profile's colours, and those of pictures that such a profile is for.
PROFILE_MODES = {
    "RGB": ("RGB", "RGBA", "RGBa", "P", "PA", "1", "L", "LA", "La", "YCbCr"),
    "GRAY": ("L", "LA", "La", "1"),
    "CMYK": ("CMYK",),
}
PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError)
"""Exceptions from a broken profile."""

# Largest difference, of 255, between sRGB and a profile that is another writing of it.
SRGB_ROUNDING = 2


@dataclass(frozen=True)
class ColourProfile:
    """A profile that was read, with the modes of Pillow that it is for, the first as stored."""

    name: str
    modes: tuple[str, ...]
    to_srgb: ImageCms.ImageCmsTransform | None  # None: its colours are those of sRGB


@lru_cache(maxsize=16)
def read_profile(data: bytes) -> ColourProfile:
    """Read an ICC profile; raise one of PROFILE_ERRORS if it is broken or not for pictures."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    colours = profile.profile.xcolor_space.strip()
    if colours not in PROFILE_MODES:
        raise ValueError(f"a profile of {colours} colours")
    modes = PROFILE_MODES[colours]
    name = " ".join((profile.profile.profile_description or "without a name").split())
    to_srgb = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        modes[0],
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )

    # It is sRGB if it changes no colour, whatever its name: 18 x 18 x 18 of them, or all greys.
    if colours == "CMYK":
        return ColourProfile(name, modes, to_srgb)
    grid = np.moveaxis(np.indices((18, 18, 18)) * 15, 0, -1).reshape(18, -1, 3)
    probe = Image.fromarray(grid.astype(np.uint8))
    if colours == "GRAY":
        probe = Image.linear_gradient("L")
    shown = ImageCms.applyTransform(probe, to_srgb)
    assert shown is not None  # a copy was asked for
    change = np.asarray(shown, dtype=int) - np.asarray(probe.convert("RGB"), dtype=int)
    if np.abs(change).max() <= SRGB_ROUNDING:
        return ColourProfile(name, modes, None)
    return ColourProfile(name, modes, to_srgb)


def convert_to_srgb(image: Image.Image, profile: ColourProfile) -> Image.Image:
    """Convert a picture of this profile to RGB, or RGBA; unchanged if the profile is sRGB.

    Raises ValueError: the profile is for other colours. A grey picture may have one of RGB.
    """
    if profile.to_srgb is None:
        return image
    if image.mode not in profile.modes:
        raise ValueError(f"the profile {profile.name} is not for {image.mode} pixels")

    # Alpha has no colour: it stays as it is.
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB") if profile.modes[0] == "RGB" else image.getchannel("R")
    if image.mode != profile.modes[0]:
        image = image.convert(profile.modes[0])
    converted = ImageCms.applyTransform(image, profile.to_srgb)
    assert converted is not None  # a copy was asked for
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
