"""Read images with a teacher's latents: batches of both, cropped and mirrored in step."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from olvae.data.image import MODES, EvalTransform, Photo, image_to_tensor, tensor_to_picture
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.index import find_shards, split_shards, with_counts
from olvae.data.shards.latent_source import LATENT, STATS, read_label, read_latent, read_stats
from olvae.data.shards.tar_reading import Entry
from olvae.data.shards.webdataset import ShardSource
from olvae.data.source import Sample
from olvae.modules.distributions import LOGVAR_RANGE

PIXELS = "latent.png"  # extension of the pixels; for its dot, sources of images don't take it for an image
COMPRESSION = 3  # zlib's level: a third of the time of Pillow's 6, and .3 % more bytes for photographs of 256 pixels


def pixel_bytes(pixels: Tensor) -> bytes:
    """Encode pixels, uint8 (C, H, W) with C of 1, 3 or 4, losslessly."""
    stream = io.BytesIO()
    Image.merge(MODES[len(pixels)], tensor_to_picture(pixels).bands).save(stream, "PNG", compress_level=COMPRESSION)
    return stream.getvalue()


class PairSource(ShardSource):
    """Images with the moments of a teacher's latents, from shards that ``olvae encode`` wrote with ``images``.

    A batch has ``image``, uint8 (B, C, H, W), ``moments``, float32 (B, 2 n_z, H / f, W / f): the means, then the
    log-variances, which are at least -30; ``key`` and, with classes, ``label``. Nothing is drawn: a trainer
    draws a new latent at every visit with ``DiagonalGaussian(batch["moments"])``.

    Training cuts the same window of image and latent, at a random multiple of f, and takes the mirrored image with the
    latent that was encoded from it; validation cuts the central window. The teacher saw the whole image, so that the
    latent of a window may depend on its surroundings. The order of training is that of
    :class:`~olvae.data.shards.webdataset.WebDatasetSource`.

    Args:
        folder: written by ``olvae encode`` with ``images``.
        batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        size: of the windows, in multiples of the teacher's f; by default that of the images.
        val_folder: another such folder for validation and test; without it the last shards are held out.
        val_fraction: without val_folder, the share of the shards that is held out, at least one.
        shuffle: pairs in a shuffled block; two blocks are in memory, undecoded, per loader process.
        flip: in training, mirror half of the pairs, if mirrored images were encoded too.

    Raises FileNotFoundError: a folder has no latents, or not all of them yet. ValueError: it has no images, or one
    latent for each instead of moments; the size does not fit; the folders' teachers differ; there are too few pairs.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        size: Size | None = None,
        num_workers: int = 0,
        val_folder: str | Path | None = None,
        val_fraction: float = 0.05,
        shuffle: int = 500,
        flip: bool = True,
        max_unreadable: float = 0.01,
    ) -> None:
        self.stats = _read_stats(folder, size)
        self.latent_stats = (self.stats,)
        size = self.stats["size"] if size is None else size
        held_out = self.stats if val_folder is None else _read_stats(val_folder, size)
        if held_out["weights"] != self.stats["weights"]:
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
        if self.size.node != held_out["size"]:
            central = f"the central {self.size.node} pixels"
            self.crops += f", of which {central}, at a multiple of {self.stats['downscale']}"

    def describe(self) -> str:
        mirrored = ", half of them mirrored" if self.flip else ""
        return (
            f"{self.samples_per_epoch} training images in {len(self.train)} shards{mirrored}, {self.val_images} "
            f"validation and test images, with the latents of {self.stats['target']}"
        )

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        mirror = self.flip and rng.random() < 0.5
        return self._window(entry, mirror, lambda places: int(rng.integers(places)))

    def val_sample(self, entry: Entry) -> Sample:
        return self._window(entry, False, lambda places: (places - 1) // 2)

    def _window(self, entry: Entry, mirror: bool, choose: Callable[[int], int]) -> Sample:
        """Cut a window of the pair; ``choose`` picks one of n places, for the rows and then for the columns."""
        plain, mirrored, meta = read_latent(entry)
        latent = mirrored if mirror else plain
        f = self.stats["downscale"]
        high, wide = self.size // f
        if PIXELS not in entry.files or latent is None or latent.std is None:
            raise UnreadableImageError(entry.name, f"no {PIXELS} beside it, or no mean and std in it")
        name = f"{entry.name.removesuffix(LATENT)}{PIXELS}"
        pixels = image_to_tensor(Photo(entry.files[PIXELS], name, self.channels).read())  # (C, H, W)
        channels, height, width = latent.mean.shape
        fits = pixels.shape[1:] == (height * f, width * f) and height >= high and width >= wide
        if channels != len(self.stats["latents_mean"]) or not fits:
            raise UnreadableImageError(name, f"{tuple(pixels.shape)} pixels for a latent {tuple(latent.mean.shape)}")
        if mirror:
            pixels = pixels.flip(-1)
        top, left = choose(height - high + 1), choose(width - wide + 1)
        image = pixels[:, top * f :, left * f :][:, : self.size.height, : self.size.width]
        mean, std = (part[:, top:, left:][:, :high, :wide].float() for part in (latent.mean, latent.std))
        moments = torch.cat([mean, (2.0 * std.log()).clamp(*LOGVAR_RANGE)])  # (2 n_z, H/f, W/f)
        return Sample(image, meta["key"], label=read_label(entry), moments=moments)


def _read_stats(folder: str | Path, size: Size | None) -> dict[str, Any]:
    """Read the description of a folder of pairs, with the errors of :class:`PairSource`."""
    stats = read_stats(folder)
    if not stats.get("images"):
        raise ValueError(f"{folder}: latents without their images: let `olvae encode` store both, in another folder")
    if missing := [name for name in ("weights", "flip", "target") if name not in stats]:
        raise ValueError(f"{Path(folder) / STATS}: not a description of latents: without {', '.join(missing)}")
    if stats["latents_std"] == stats["means_std"]:
        raise ValueError(
            f"{folder}: one latent for each image instead of a mean and a standard deviation: encode "
            "posteriors, not samples of them, with a target that has a distribution, into another folder"
        )
    if size is None:
        return stats
    if any(one > other for one, other in zip(Sides.of(size), Sides.of(stats["size"]), strict=True)):
        raise ValueError(
            f"data.params.size: {size} pixels, but the images of {folder} have {stats['size']}: encode larger ones, "
            "or train on smaller crops"
        )
    if not Sides.of(size).fits(stats["downscale"]):
        raise ValueError(
            f"data.params.size: {size} is not a multiple of {stats['downscale']}, the downscaling factor of the "
            f"latents of {folder}"
        )
    return stats
