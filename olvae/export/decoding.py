"""Decode shards of latents to files of images."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import MODES
from olvae.data.places import EXTENSIONS
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.scenes.georeference import PLACE_FILE, Tag, tags_from
from olvae.data.shards.latent_files import LATENT, Latent, read_latent
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.devices import full_float32
from olvae.figures import ARRAYS, can_store, save_image
from olvae.files import ON_WINDOWS, reason, remove_partials, safe_path
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, crop_to
from olvae.modules.base import device_of

# Options of Pillow.
JPEG = {"quality": 95, "subsampling": 0}

# File beside the images that names the ones that decoding made, a JSON string a line: these may be
# replaced.
DECODED_LIST = ".decoded"

# The longest name of a file on most systems, and half of the longest path, in bytes.
NAME_BYTES = 255
PATH_BYTES = 2048


class _Latent(NamedTuple):
    """A latent to decode, (n_z, h, w), with the key, height and width of its decoded image.

    ``tags`` say where it is on the earth, for a TIFF.
    """

    # Of its file, for errors.
    name: str
    key: str
    z: Tensor
    size: tuple[int, int]
    tags: Sequence[Tag] = ()


@torch.inference_mode()
def decode_shards(
    model: Autoencoder,
    shards: Sequence[Shard],
    folder: Path,
    image_format: str | None = None,
    batch_size: int = 8,
    memory: int = 4 * GIB,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[int, list[ReadError]]:
    """Decode every latent to a file, a posterior at its mode, without scaling; crop padding off.

    Files are named by the images' keys with the format's extension: png, jpg, npy, tif or exr; by
    default png or, where it can't hold them, npy. What takes more than ``memory`` bytes is tiled.
    ``advance`` is called with the number of further images. Return their number, and the latents
    that could not be read. Raise ValueError if there are none to decode, or they are
    another model's, ConfigError for a format that can't hold the model's channels or range, or if a
    file that decoding did not make would be replaced.
    """
    # The format has to hold the model's channels and values.
    pixels = model.pixel_range
    channels = model.in_channels
    if not image_format:
        image_format = "png" if pixels.eight_bits and channels in MODES else "npy"
    if not pixels.eight_bits and f".{image_format}" not in ARRAYS:
        raise ConfigError(
            f"`format` {image_format}: 8 bits can't hold values of {pixels}: choose npy, tif or exr"
        )
    if not can_store(f".{image_format}", channels):
        raise ConfigError(
            f"`format` {image_format}: can't hold {channels} channels: choose npy or tif"
        )
    options = JPEG if image_format == "jpg" else {}

    # What an earlier command made here, as lines of JSON.
    remove_partials(folder.rglob(".partial-*"), idle_s=1.0)
    listing = folder / DECODED_LIST
    ours: set[str] = set()
    if listing.is_file():
        ours = set(listing.read_text(encoding="utf-8").split("\n"))

    names: set[str] = set()
    unreadable: list[ReadError] = []
    for batch in _batches(shards, batch_size, model, unreadable, image_format == "tif"):
        z = torch.stack([latent.z for latent in batch])  # (B, n_z, h, w)
        if z.shape[1] != model.latent_channels:
            raise ValueError(
                f"{batch[0].key}: a latent of {z.shape[1]} channels, but the model's have "
                f"{model.latent_channels}: name the target that encoded it"
            )
        z = z.to(device_of(model))
        with full_float32(z):
            y = model.decode_tiled(z, memory=memory)
        finite = y.isfinite().flatten(1).all(1).tolist()
        for latent, image, whole in zip(batch, pixels.restore(y).cpu(), finite, strict=True):
            if not whole:
                reason = f"{_short(latent.key)} decodes to values that are not finite"
                unreadable.append(ReadError(latent.name, reason))
                continue
            name = _name(latent.key, image_format, names)
            names.add(name.lower() if ON_WINDOWS else name)
            place = folder / name
            line = json.dumps(name)
            # List a file before it is written: an interrupted command may replace it.
            if line not in ours:
                if place.exists():
                    raise ConfigError(
                        f"{place}: is there already, perhaps what was encoded: change `out`"
                    )
                place.parent.mkdir(parents=True, exist_ok=True)
                with listing.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            written = {"extratags": latent.tags} if latent.tags else options
            save_image(crop_to(image, latent.size), place, **written)
        advance(len(batch))

    if not names:
        reasons = "; ".join(f"{error.name}: {error.reason}" for error in unreadable[:3])
        raise ValueError(f"no latents to decode{': ' if reasons else ''}{reasons}")
    return len(names), unreadable


def _batches(
    shards: Sequence[Shard],
    batch_size: int,
    model: Autoencoder,
    unreadable: list[ReadError],
    placed: bool,
) -> Iterator[list[_Latent]]:
    """Yield up to ``batch_size`` latents of one shape, in order; collect the unreadable ones.

    If they are to be ``placed``, tiles of scenes that were not resized have tags.
    """
    batch: list[_Latent] = []
    for entry in chain.from_iterable(read_shard(shard, LATENT) for shard in shards):
        if isinstance(entry, ReadError):
            unreadable.append(entry)
            continue
        try:
            latent, _, meta = read_latent(entry)
            _check_place(entry.name, latent, meta, model)
            tags: Sequence[Tag] = ()
            whole = meta["image"] == [meta.get("width"), meta.get("height")]
            if placed and whole and PLACE_FILE in entry.files:
                tags = tags_from(entry.files[PLACE_FILE], model.enlarge)
        except UnreadableImageError as error:
            unreadable.append(error.read_error())
            continue
        except ValueError as error:
            unreadable.append(ReadError(entry.name, reason(error)))
            continue
        z = latent.draw(None)
        width, height = (model.enlarge * side for side in meta["image"])
        if batch and (len(batch) == batch_size or batch[0].z.shape != z.shape):
            yield batch
            batch = []
        batch.append(_Latent(entry.name, meta["key"], z, (height, width), tags))
    if batch:
        yield batch


def _check_place(name: str, latent: Latent, meta: Mapping[str, Any], model: Autoencoder) -> None:
    """Raise UnreadableImageError for a key that no file can have, or a size of another latent."""
    key = meta["key"]
    width, height = meta["image"]
    channels, high, wide = latent.mean.shape
    f = model.downscale
    try:
        file = os.fsencode(f"{_without_extension(key)}.png")
    except UnicodeEncodeError as error:
        raise UnreadableImageError(name, f"the key {_short(key)} is not text") from error
    except ValueError as error:
        raise UnreadableImageError(name, str(error)) from error
    longest = max(len(part) for part in file.split(b"/"))
    if b"\0" in file or longest > NAME_BYTES or len(file) > PATH_BYTES:
        raise UnreadableImageError(name, f"the key {_short(key)} can't name a file")
    fits = (high, wide) == (-(-height // f), -(-width // f))
    # Other channels are another model's, which ends the command.
    if channels == model.latent_channels and not fits:
        raise UnreadableImageError(
            name,
            f"{_short(key)} has {width}x{height} pixels, but a latent of {wide}x{high} positions, "
            f"f{f}",
        )


def _short(key: str) -> str:
    """Quote a key of a shard, at most 60 characters of it."""
    return repr(key if len(key) <= 60 else f"{key[:57]}...")


def _name(key: str, image_format: str, taken: set[str]) -> str:
    """Name a file: a/b.png for the key a/b.jpg; a/b.jpg.png if a/b.png is taken."""
    for path in (_without_extension(key), safe_path(key)):
        name = f"{path}.{image_format}"
        # Windows does not tell capitals.
        if (name.lower() if ON_WINDOWS else name) not in taken:
            return name
    raise ValueError(
        f"two latents have the key {key!r}: decode their shards into different folders"
    )


def _without_extension(key: str) -> PurePosixPath:
    """Turn a key into a path without an image's extension; ValueError as :func:`safe_path`."""
    path = safe_path(key)
    return path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
