"""Read images with a teacher's latents: batches of both, cropped and mirrored in step."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from olvae.data.image import Photo, image_to_tensor, tensor_to_picture
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.index import find_shards, split_shards, with_counts
from olvae.data.shards.latent_source import LATENT, STATS, Latent, read_label, read_latent, read_stats
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.data.shards.webdataset import ShardSource
from olvae.data.source import Sample
from olvae.data.transforms import EvalTransform
from olvae.modules.distributions import LOGVAR_RANGE

PIXELS = "latent.png"
"""The extension of the pixels that were encoded. With its dot, sources of images don't take it for an image."""

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Pillow's modes that PNG stores, and their channels."""

COMPRESSION = 3
"""zlib's level: a third of the time of Pillow's default, 6, and .3 % more bytes for photographs of 256 pixels."""


def pixel_bytes(pixels: Tensor) -> bytes:
    """Encode pixels, uint8 (C, H, W) with C of :data:`CHANNELS`, losslessly."""
    mode = next(mode for mode, channels in CHANNELS.items() if channels == pixels.shape[0])
    stream = io.BytesIO()
    Image.merge(mode, tensor_to_picture(pixels).bands).save(stream, "PNG", compress_level=COMPRESSION)
    return stream.getvalue()


@dataclass(frozen=True)
class EncodedBy:
    """The autoencoder that made a folder's latents, as the folder's ``stats.json`` describes it.

    Args:
        downscale: pixels per side of a latent element.
        latent_channels: n_z.
        latents_mean, latents_std: of the latents z, before any scaling, by channel: n_z numbers each.
        means_std: standard deviation of the posteriors' means alone, by channel.
        scaling_factor, shift_factor: of the latents as a whole; (z - shift) * scaling has mean 0 and deviation 1.
        described: ``target``, its name, and ``weights``, a checksum of them.
    """

    downscale: int
    latent_channels: int
    latents_mean: list[float]
    latents_std: list[float]
    means_std: list[float]
    scaling_factor: float
    shift_factor: float
    described: dict[str, str]


class PairSource(ShardSource):
    """Images with the moments of a teacher's latents, from shards that ``olvae encode`` wrote with ``images``.

    A batch has ``image``, uint8 (B, C, size, size), ``moments``, float32 (B, 2 n_z, size / f, size / f): the means,
    then the log-variances, which are at least -30; ``key`` and, with classes, ``label``. Nothing is drawn: a trainer
    draws a new latent at every visit with ``DiagonalGaussian(batch["moments"])``.

    Training cuts the same window of image and latent, at a random multiple of f, and takes the mirrored image with the
    latent that was encoded from it; validation cuts the central window. The teacher saw the whole image, so that the
    latent of a window may depend on its surroundings. The order of training is that of
    :class:`~olvae.data.shards.webdataset.WebDatasetSource`.

    Args:
        folder: written by ``olvae encode`` with ``images``.
        batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        size: side of the windows in pixels, a multiple of the teacher's f; by default that of the images.
        val_folder: another such folder for validation and test; without it the last shards are held out.
        val_fraction: without val_folder, the share of the shards that is held out, at least one.
        shuffle: pairs in a shuffled block; two blocks are in memory, undecoded, per loader process.
        flip: in training, mirror half of the pairs, if mirrored images were encoded too.

    Raises:
        FileNotFoundError: a folder has no latents, or not all of them yet.
        ValueError: a folder has no images, or one latent for each instead of moments; the size does not fit; the two
            folders have different teachers; there are too few shards or pairs.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        size: int | None = None,
        num_workers: int = 0,
        val_folder: str | Path | None = None,
        val_fraction: float = 0.05,
        shuffle: int = 500,
        flip: bool = True,
        max_unreadable: float = 0.01,
    ) -> None:
        self.encoded_by, self.stats = _open(folder, size)
        size = self.stats["size"] if size is None else size
        teacher, held_out = (self.encoded_by, self.stats) if val_folder is None else _open(val_folder, size)
        if teacher.described["weights"] != self.encoded_by.described["weights"]:
            raise ValueError(
                f"data.params.val_folder: {val_folder} has latents of other weights than {folder}: encode both with "
                "the same target"
            )
        given = None if val_folder is None else find_shards(val_folder)
        train, val = split_shards(find_shards(folder), given, val_fraction, "val_folder")
        self.flip = flip and self.stats["flip"]
        parts = with_counts(train, image_key=LATENT), with_counts(val, image_key=LATENT)
        channels = self.stats["channels"]
        super().__init__(*parts, shuffle, LATENT, size, batch_size, num_workers, channels, max_unreadable)
        self.crops = f"at {held_out['size']} pixels: {EvalTransform(held_out['size']).describe()}"
        if self.size < held_out["size"]:
            self.crops += f", of which the central {self.size} pixels, at a multiple of {self.encoded_by.downscale}"

    def describe(self) -> str:
        mirrored = ", half of them mirrored" if self.flip else ""
        return (
            f"{self.samples_per_epoch} training images in {len(self.train)} shards{mirrored}, {self.val_images} "
            f"validation and test images, with the latents of {self.encoded_by.described['target']}"
        )

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        mirror = self.flip and rng.random() < 0.5
        return self._window(entry, mirror, lambda places: int(rng.integers(places)))

    def val_sample(self, entry: Entry) -> Sample:
        return self._window(entry, False, lambda places: (places - 1) // 2)

    def _window(self, entry: Entry, mirror: bool, choose: Callable[[int], int]) -> Sample:
        """Cut a window of the pair; ``choose`` picks one of n places, for the rows and then for the columns.

        Raises UnreadableImageError: the files are broken or do not belong together.
        """
        plain, mirrored, meta = read_latent(entry)
        latent = mirrored if mirror else plain
        f, side = self.encoded_by.downscale, self.size // self.encoded_by.downscale
        if PIXELS not in entry.files or latent is None or latent.std is None:
            raise UnreadableImageError(entry.name, f"no {PIXELS} beside it, or no mean and std in it")
        name = f"{entry.name.removesuffix(LATENT)}{PIXELS}"
        pixels = image_to_tensor(Photo(entry.files[PIXELS], name, self.channels).read())  # (C, H, W)
        channels, height, width = latent.mean.shape
        fits = pixels.shape[1:] == (height * f, width * f) and min(height, width) >= side
        if channels != self.encoded_by.latent_channels or not fits:
            raise UnreadableImageError(name, f"{tuple(pixels.shape)} pixels for a latent {tuple(latent.mean.shape)}")
        if mirror:
            pixels = pixels.flip(-1)
        top, left = choose(height - side + 1), choose(width - side + 1)
        image = pixels[:, top * f :, left * f :][:, : self.size, : self.size]
        mean, std = (part[:, top:, left:][:, :side, :side].float() for part in (latent.mean, latent.std))
        moments = torch.cat([mean, (2.0 * std.log()).clamp(*LOGVAR_RANGE)])  # (2 n_z, size/f, size/f)
        return Sample(image, meta["key"], label=read_label(entry), moments=moments)


def _open(folder: str | Path, size: int | None) -> tuple[EncodedBy, dict[str, Any]]:
    """The teacher of a folder of pairs, and the folder's description.

    Raises FileNotFoundError, ValueError: see :class:`PairSource`.
    """
    stats = read_stats(folder)
    if not stats.get("images"):
        raise ValueError(f"{folder}: latents without their images: let `olvae encode` store both, in another folder")
    try:
        teacher = EncodedBy(
            int(stats["downscale"]),
            int(stats["latent_shape"][0]),
            [float(value) for value in stats["latents_mean"]],
            [float(value) for value in stats["latents_std"]],
            [float(value) for value in stats["means_std"]],
            stats["scaling_factor"],
            stats["shift_factor"],
            {name: str(stats[name]) for name in ("target", "weights")},
        )
        stats |= {"channels": int(stats["channels"]), "flip": bool(stats["flip"])}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{folder}: {STATS} is not a description of latents: {error!r}") from error
    if size is not None and size > stats["size"]:
        raise ValueError(
            f"data.params.size: {size} pixels, but the images of {folder} have {stats['size']}: encode larger ones, "
            "or train on smaller crops"
        )
    if size is not None and size % teacher.downscale:
        raise ValueError(
            f"data.params.size: {size} is not a multiple of {teacher.downscale}, the downscaling factor of the latents "
            f"of {folder}"
        )
    first = _first_latent(folder)
    if first is not None and first.std is None:
        raise ValueError(
            f"{folder}: one latent for each image instead of a mean and a standard deviation: encode "
            "posteriors, not samples of them, with a target that has a distribution, into another folder"
        )
    return teacher, stats


def _first_latent(folder: str | Path) -> Latent | None:
    """The first readable one."""
    for entry in chain.from_iterable(read_shard(Shard(url), LATENT) for url in find_shards(folder)):
        if isinstance(entry, Entry):
            with contextlib.suppress(UnreadableImageError):
                return read_latent(entry)[0]
    return None
