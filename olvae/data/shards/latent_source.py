"""Read latents from shards for training: alone, or in pairs with their images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olvae.data.image import Augment, EvalTransform, Photo, image_to_tensor
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.index import INDEX, find_shards, split_shards, with_counts
from olvae.data.shards.latent_files import (
    LATENT,
    LATENT_PIXELS,
    STATS,
    Latent,
    read_label,
    read_latent,
    read_stats,
)
from olvae.data.shards.shard_source import ShardSource
from olvae.data.shards.tar_reading import Entry
from olvae.data.source import Sample
from olvae.files import counted
from olvae.modules.distributions import LOGVAR_RANGE


class LatentSource(ShardSource):
    """Batches of scaled latents: ``latent``, float32 (B, n_z, h, w), ``key`` and maybe ``label``.

    A latent is (z - shift_factor) * scaling_factor with the numbers of the folder's ``stats.json``,
    so that over the data its mean is 0 and its standard deviation 1: over all channels together, or
    of each channel. Each visit draws another z from a posterior. ``train_loader`` is endless and
    resumable at any sample, shared among loader processes and ranks, in the order that
    :class:`~olvae.data.shards.webdataset.WebDatasetSource` describes. ``val_loader`` and
    ``test_loader`` give each latent once, in order, from the posterior's mode and not mirrored.

    ``label`` is the number in an image's ``.cls`` file. A batch with an image that has no such file
    has no labels.

    Args:
        folder: written by ``olvae encode``.
        batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        shuffle: latents in a shuffled block; two blocks are in memory per loader process.
        sample: in training, draw from the posterior; else take its mode.
        flip: in training, take the mirrored image's latent half of the time, if it was encoded too.
        per_channel: shift and scale each channel by its own numbers, as VA-VAE's diffusion models.

    Raises FileNotFoundError: the folder has no latents, or not all of them yet. ValueError: they
    have several shapes and can't be put into a batch, there are too few, or a channel that is to be
    scaled is the same everywhere.
    """

    tensor = "latent"

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        num_workers: int = 0,
        shuffle: int = 500,
        sample: bool = True,
        flip: bool = True,
        max_unreadable: float = 0.01,
        per_channel: bool = False,
    ) -> None:
        self.stats = read_stats(folder)
        if self.stats["latent_shape"] is None and batch_size > 1:
            raise ValueError(
                f"{folder}: latents of several shapes don't fit into a batch: set batch_size to 1"
            )

        # The numbers that scale latents.
        self.shift_factor: float | Tensor = self.stats["shift_factor"]
        """Mean of the stored latents; of each channel, (n_z, 1, 1)."""
        self.scaling_factor: float | Tensor = self.stats["scaling_factor"]
        """One over their standard deviation. To undo the scaling: z / scaling + shift."""
        if per_channel:
            mean = torch.tensor(self.stats["latents_mean"])[:, None, None]
            std = torch.tensor(self.stats["latents_std"])[:, None, None]
            if not bool((std > 0).all()):
                raise ValueError(
                    f"{folder}: channel {int(std.argmin())} of its latents is the same everywhere"
                )
            self.shift_factor = mean
            self.scaling_factor = 1.0 / std

        # The same shards serve for training and validation.
        self.sample = sample
        self.flip = flip
        shards = with_counts(find_shards(folder), str(Path(folder).expanduser() / INDEX), LATENT)
        super().__init__(
            train=shards,
            val=shards,
            shuffle=shuffle,
            image_key=LATENT,
            size=self.stats["size"] or 1,
            batch_size=batch_size,
            num_workers=num_workers,
            max_unreadable=max_unreadable,
        )

    @property
    def images(self) -> int | None:
        return self.samples_per_epoch  # the same ones for validation

    def describe(self) -> str:
        return f"{self.samples_per_epoch} latents in {counted(len(self.train), 'shard')}"

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        latent, flipped, meta = read_latent(entry)
        if self.flip and flipped is not None and rng.random() < 0.5:
            latent = flipped
        noise = None
        if self.sample:
            noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self._sample(latent, noise, meta["key"], entry)

    def val_sample(self, entry: Entry) -> Sample:
        latent, _, meta = read_latent(entry)
        return self._sample(latent, None, meta["key"], entry)

    def _sample(
        self, latent: Latent, noise: torch.Generator | None, key: str, entry: Entry
    ) -> Sample:
        shape = [*latent.mean.shape]
        expected = self.stats["latent_shape"]
        if expected is not None and shape != expected:
            raise UnreadableImageError(
                entry.name, f"a latent of shape {shape}, but {expected} by {STATS}"
            )
        channels = len(self.stats["latents_mean"])
        if shape[0] != channels:
            raise UnreadableImageError(
                entry.name, f"a latent of {shape[0]} channels, but {channels} by {STATS}"
            )
        z: Tensor = (latent.draw(noise) - self.shift_factor) * self.scaling_factor
        return Sample(z, key, label=read_label(entry))


class PairSource(ShardSource):
    """Images with the moments of a teacher's latents, written by ``olvae encode`` with ``images``.

    A batch has ``image``, uint8 (B, C, H, W), ``moments``, float32 (B, 2 n_z, H / f, W / f): the
    means, then the log-variances, which are at least -30; ``key`` and, with classes, ``label``.
    Nothing is drawn: a trainer draws a new latent at every visit with
    ``DiagonalGaussian(batch["moments"])``.

    Training cuts the same window of image and latent, at a random multiple of f, and takes the
    mirrored image with the latent that was encoded from it; validation cuts the central window. The
    teacher saw the whole image, so that the latent of a window may depend on its surroundings. The
    order of training is the same as :class:`~olvae.data.shards.webdataset.WebDatasetSource` has.

    Args:
        folder: written by ``olvae encode`` with ``images``.
        batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        size: of the windows, in multiples of the teacher's f; by default the images' size.
        val_folder: another such folder for validation and test; without it the last shards are
            held out.
        val_fraction: without val_folder, the share of the shards that is held out, at least one. By
            default 5 %, but no more than hold 10,000 images by their index.
        shuffle: pairs in a shuffled block; two blocks are in memory, undecoded, per loader process.
        flip: in training, mirror half of the pairs, if mirrored images were encoded too.
        augment: refused, because images can't change without their latents.

    Raises FileNotFoundError: a folder has no latents, or not all of them yet. ValueError: it has no
    images, or one latent for each instead of moments; the size does not fit; the folders' teachers
    differ; there are too few pairs.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        size: Size | None = None,
        num_workers: int = 0,
        val_folder: str | Path | None = None,
        val_fraction: float | None = None,
        shuffle: int = 500,
        flip: bool = True,
        max_unreadable: float = 0.01,
        augment: Augment | None = None,
    ) -> None:
        if augment:
            raise ValueError(
                "data.params.augment: an image can't change without its latent, which is stored: "
                "leave it out, or train on the images with the teacher itself"
            )
        self.stats = _read_stats(folder, size)
        self.latent_stats = (self.stats,)
        self.means_std = self.stats["means_std"]
        if size is None:
            size = self.stats["size"]

        # Shards of validation, by the same teacher: another folder's, or the last of this one.
        held_out = self.stats
        given = None
        if val_folder is not None:
            held_out = _read_stats(val_folder, size)
            if held_out["weights"] != self.stats["weights"]:
                raise ValueError(
                    f"data.params.val_folder: {val_folder} has latents of other weights than "
                    f"{folder}: encode both with the same target"
                )
            given = find_shards(val_folder)
        train, val, self.bound = split_shards(
            find_shards(folder), given, val_fraction, "val_folder", image_key=LATENT
        )
        self.flip = flip and self.stats["flip"]
        super().__init__(
            with_counts(train, image_key=LATENT),
            with_counts(val, image_key=LATENT),
            shuffle,
            LATENT,
            size,
            batch_size,
            num_workers,
            self.stats["channels"],
            max_unreadable,
        )

        # How validation images were cut: once when they were encoded, once more for a smaller size.
        self.crops = f"at {held_out['size']} pixels: {EvalTransform(held_out['size']).describe()}"
        if self.size.node != held_out["size"]:
            self.crops += (
                f", then a central crop of {self.size.node} pixels, which begins at a multiple of "
                f"{self.stats['downscale']}"
            )

    def describe(self) -> str:
        shards = counted(len(self.train), "shard")
        mirrored = ", half of them mirrored" if self.flip else ""
        return (
            f"{self.samples_per_epoch} training images in {shards}{mirrored}, "
            f"{self.val_images} validation and test images{self.bound}, with the latents of "
            f"{self.stats['target']}"
        )

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        mirror = self.flip and rng.random() < 0.5
        return self._window(entry, mirror, lambda places: int(rng.integers(places)))

    def val_sample(self, entry: Entry) -> Sample:
        return self._window(entry, False, lambda places: (places - 1) // 2)

    def _window(self, entry: Entry, mirror: bool, choose: Callable[[int], int]) -> Sample:
        """Cut a window of the pair; ``choose`` picks one of n places: for rows, then columns."""
        # The latent, and the pixels that it stands for, (C, H, W).
        plain, mirrored, meta = read_latent(entry)
        latent = mirrored if mirror else plain
        if LATENT_PIXELS not in entry.files or latent is None or latent.std is None:
            raise UnreadableImageError(
                entry.name, f"no {LATENT_PIXELS} beside it, or no mean and std in it"
            )
        name = f"{entry.name.removesuffix(LATENT)}{LATENT_PIXELS}"
        pixels = image_to_tensor(Photo(entry.files[LATENT_PIXELS], name, self.channels).read())

        # Their shapes must agree, and a window of (high, wide) positions must fit.
        f = self.stats["downscale"]
        high, wide = self.size // f
        channels, height, width = latent.mean.shape
        fits = pixels.shape[1:] == (height * f, width * f) and height >= high and width >= wide
        if channels != len(self.stats["latents_mean"]) or not fits:
            raise UnreadableImageError(
                name, f"{tuple(pixels.shape)} pixels for a latent {tuple(latent.mean.shape)}"
            )

        # Only the plain pixels are stored; the mirrored latent was encoded from these, mirrored.
        if mirror:
            pixels = pixels.flip(-1)
        top = choose(height - high + 1)
        left = choose(width - wide + 1)
        image = pixels[:, top * f :, left * f :][:, : self.size.height, : self.size.width]
        window = (slice(None), slice(top, top + high), slice(left, left + wide))
        mean = latent.mean[window].float()
        std = latent.std[window].float()
        moments = torch.cat([mean, (2.0 * std.log()).clamp(*LOGVAR_RANGE)])  # (2 n_z, H/f, W/f)
        return Sample(image, meta["key"], label=read_label(entry), moments=moments)


def _read_stats(folder: str | Path, size: Size | None) -> dict[str, Any]:
    """Read the description of a folder of pairs, with the errors of :class:`PairSource`."""
    # It holds images, what a trainer asks of their teacher, and posteriors: latents that are drawn
    # from these vary more than their means do.
    stats = read_stats(folder)
    if not stats.get("images"):
        raise ValueError(
            f"{folder}: latents without their images: let `olvae encode` store both, "
            "in another folder"
        )
    missing = [name for name in ("weights", "flip", "target") if name not in stats]
    if missing:
        raise ValueError(
            f"{Path(folder) / STATS}: not a description of latents: without {', '.join(missing)}"
        )
    if stats["latents_std"] == stats["means_std"]:
        raise ValueError(
            f"{folder}: one latent for each image instead of a mean and a standard deviation: "
            "encode posteriors, not samples of them, with a target that has a distribution, into "
            "another folder"
        )

    # Windows lie within the images, and begin and end between two latent positions.
    if size is None:
        return stats
    window = Sides.of(size)
    whole = Sides.of(stats["size"])
    if window.height > whole.height or window.width > whole.width:
        raise ValueError(
            f"data.params.size: {size} pixels, but the images of {folder} have {stats['size']}: "
            "encode larger ones, or train on smaller crops"
        )
    if not window.fits(stats["downscale"]):
        raise ValueError(
            f"data.params.size: {size} is not a multiple of {stats['downscale']}, the downscaling "
            f"factor of the latents of {folder}"
        )
    return stats
