"""The files of a latent in a shard, and its statistics: of `encode`, for the latent sources."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from olvae.data.image import MODES, tensor_to_picture
from olvae.data.pixels.size_and_range import Sides
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.tar_reading import Entry

# The posterior's ``mean`` and ``std``, or one ``latent``, each (n_z, h, w).
LATENT = "latent.safetensors"

LATENT_META = "latent.json"
"""The extension of an image's ``key``, its ``width`` and ``height`` before it was resized, and the
size of the ``image`` that the latent stands for, [width, height]: the image was padded if that is
not a multiple of f."""

# End of the names of the mirrored image's tensors.
FLIP = "_flip"

# The description beside the shards. It is written last: a folder without it is not complete.
STATS = "stats.json"

# Extension of the pixels; because of its dot, sources of images don't take the file for an image.
LATENT_PIXELS = "latent.png"

# zlib's level: it takes a third of the time of Pillow's 6, for .3 % more bytes at 256 pixels.
COMPRESSION = 3


# No autoencoder has larger latents, and squares of much larger ones overflow.
LARGEST = 1e6


class Latent(NamedTuple):
    """An image's Gaussian, ``mean`` and ``std``, or one latent with std None; (n_z, h, w)."""

    mean: Tensor
    std: Tensor | None = None

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Draw from the Gaussian, or take its mode if ``generator`` is None; float32."""
        mean = self.mean.float()
        if self.std is None or generator is None:
            return mean
        return mean + self.std.float() * torch.randn(mean.shape, generator=generator)


def read_latent(entry: Entry) -> tuple[Latent, Latent | None, dict[str, Any]]:
    """Read an image's latent, the mirrored image's if stored, and ``latent.json``.

    Raises UnreadableImageError: the files are broken, or ``olvae encode`` did not make them.
    """
    try:
        tensors = load(entry.data)
        meta = json.loads(entry.files[LATENT_META])
        flipped = None
        if any(name.endswith(FLIP) for name in tensors):
            flipped = _latent(tensors, FLIP)
        width, height = [int(side) for side in meta["image"]]
        if min(width, height) < 1:
            raise ValueError(f"of an image of {width}x{height} pixels")
        latent = _latent(tensors, "")
        own = {**meta, "key": str(meta["key"]), "image": [width, height]}
        return latent, flipped, own
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UnreadableImageError(
            entry.name, f"not a latent of `olvae encode`: {error}"
        ) from error


def _latent(tensors: Mapping[str, Tensor], ending: str) -> Latent:
    """Take the tensors of one latent, whose names have this ending; ValueError for odd ones."""
    names = ("latent",) if f"latent{ending}" in tensors else ("mean", "std")
    parts = [tensors[f"{name}{ending}"] for name in names]
    shape = parts[0].shape
    if (
        len(shape) != 3
        or 0 in shape
        or any(part.shape != shape or not part.is_floating_point() for part in parts)
    ):
        raise ValueError(", ".join(f"{part.dtype} of shape {tuple(part.shape)}" for part in parts))

    # Values that a decoder, or a diffusion model, would spread or turn into nothing.
    for name, part in zip(names, parts, strict=True):
        values = part.float()
        if not bool((values.abs() <= LARGEST).all()):
            raise ValueError(f"{name}{ending} has values that are not finite, or above {LARGEST:g}")
        if name == "std" and bool((values < 0).any()):
            raise ValueError(f"{name}{ending} has negative values")
    return Latent(*parts)


def read_stats(folder: str | Path) -> dict[str, Any]:
    """Read the description of a folder of latents.

    Raises FileNotFoundError: the latents are not complete. ValueError: the description is broken.
    """
    path = Path(folder).expanduser() / STATS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {STATS}, so these are not latents, or not all of them yet: "
            "run `olvae encode` (again)"
        )
    try:
        stats: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shape = stats["latent_shape"]
        for name in ("count", "downscale", "channels"):
            stats[name] = int(stats[name])
        if stats["size"]:
            stats["size"] = Sides.of(stats["size"]).node
        for name in ("shift_factor", "scaling_factor"):
            stats[name] = float(stats[name])
        for name in ("latents_mean", "latents_std", "means_std"):
            stats[name] = [float(x) for x in stats[name]]
        if shape is not None:
            stats["latent_shape"] = [int(side) for side in shape]
        _check_numbers(stats)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: not a description of latents: {error!r}") from error
    return stats


def _check_numbers(stats: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that no latents have: by name, with what was expected."""
    several = ("latents_mean", "latents_std", "means_std")
    for name in ("shift_factor", "scaling_factor", *several):
        values = stats[name] if name in several else [stats[name]]
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: expected finite numbers, got {stats[name]}")
    if stats["scaling_factor"] <= 0:
        raise ValueError(
            f"scaling_factor: expected a number above 0, got {stats['scaling_factor']}"
        )

    # The deviation of a channel that is the same everywhere is 0.
    shape = stats["latent_shape"]
    channels = shape[0] if shape else len(stats["latents_mean"])
    for name in several:
        if len(stats[name]) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one per channel")
        if name != "latents_mean" and min(stats[name]) < 0:
            raise ValueError(f"{name}: expected no negative number, got {stats[name]}")


def read_label(entry: Entry) -> int | None:
    """Read the number in an image's ``.cls`` file, if it has one.

    Raises UnreadableImageError: the file holds something else.
    """
    if "cls" not in entry.files:
        return None
    try:
        return int(entry.files["cls"])
    except ValueError as error:
        raise UnreadableImageError(entry.name, f"its .cls is not a number: {error}") from error


def pixel_bytes(pixels: Tensor) -> bytes:
    """Encode pixels, uint8 (C, H, W) with C of 1, 3 or 4, losslessly."""
    stream = io.BytesIO()
    picture = Image.merge(MODES[len(pixels)], tensor_to_picture(pixels).bands)
    picture.save(stream, "PNG", compress_level=COMPRESSION)
    return stream.getvalue()
