"""Decode shards of latents to files of images."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.image import MODES
from olvae.data.places import EXTENSIONS
from olvae.data.read_errors import ReadError, UnreadableImageError
from olvae.data.shards.latent_files import LATENT, read_latent
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.figures import ARRAYS, can_store, save_image
from olvae.files import remove_partials, safe_path
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, crop_to
from olvae.modules.base import device_of

# Options of Pillow.
JPEG = {"quality": 95, "subsampling": 0}

# File beside the images that names the ones that decoding made, a JSON string a line: these may be
# replaced.
DECODED_LIST = ".decoded"


class _Latent(NamedTuple):
    """A latent to decode, (n_z, h, w), with its image's key, height and width."""

    key: str
    z: Tensor
    size: tuple[int, int]


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
    ``advance`` is called with the number of further images. Return the number of images, and the
    latents that could not be read. Raise ValueError if there are none to decode, or they are
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
    for batch in _batches(shards, batch_size, unreadable):
        z = torch.stack([latent.z for latent in batch])  # (B, n_z, h, w)
        if z.shape[1] != model.latent_channels:
            raise ValueError(
                f"{batch[0].key}: a latent of {z.shape[1]} channels, but the model's have "
                f"{model.latent_channels}: name the target that encoded it"
            )
        y = model.decode_tiled(z.to(device_of(model)), memory=memory)
        for latent, image in zip(batch, pixels.restore(y).cpu(), strict=True):
            name = _name(latent.key, image_format, names)
            names.add(name)
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
            save_image(crop_to(image, latent.size), place, **options)
        advance(len(batch))

    if not names:
        reasons = "; ".join(f"{error.name}: {error.reason}" for error in unreadable[:3])
        raise ValueError(f"no latents to decode{': ' if reasons else ''}{reasons}")
    return len(names), unreadable


def _batches(
    shards: Sequence[Shard], batch_size: int, unreadable: list[ReadError]
) -> Iterator[list[_Latent]]:
    """Yield up to ``batch_size`` latents of one shape, in order; collect the unreadable ones."""
    batch: list[_Latent] = []
    for entry in chain.from_iterable(read_shard(shard, LATENT) for shard in shards):
        if isinstance(entry, ReadError):
            unreadable.append(entry)
            continue
        try:
            latent, _, meta = read_latent(entry)
        except UnreadableImageError as error:
            unreadable.append(error.read_error())
            continue
        z = latent.draw(None)
        width, height = meta["image"]
        if batch and (len(batch) == batch_size or batch[0].z.shape != z.shape):
            yield batch
            batch = []
        batch.append(_Latent(meta["key"], z, (height, width)))
    if batch:
        yield batch


def _name(key: str, image_format: str, taken: set[str]) -> str:
    """Name a file: a/b.png for the key a/b.jpg; a/b.jpg.png if a/b.png is taken."""
    path = safe_path(key)
    short = path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path
    for name in (f"{short}.{image_format}", f"{path}.{image_format}"):
        if name not in taken:
            return name
    raise ValueError(
        f"two latents have the key {key!r}: decode their shards into different folders"
    )
