"""Latents of ``olvae encode``, given back to the trainer of a diffusion model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olvae.data.latent_files import LATENT, Latent, read_latent, read_stats
from olvae.data.reading import UnreadableImageError
from olvae.data.shard_reader import ShardReader, check_shares, read_once, total_images
from olvae.data.shard_urls import find_shards
from olvae.data.shards import INDEX, Entry, with_counts
from olvae.data.source import Consumer, Part, Sample, Source

__all__ = ["LatentSource"]


class LatentSource(Source):
    """Batches of scaled latents: ``latent``, float32 (B, n_z, h, w), their ``key`` and, with classes, ``label``.

    A latent is (z - shift_factor) * scaling_factor with the numbers of the folder's ``stats.json``, so that over the
    data its mean is 0 and its standard deviation 1. Of a posterior each visit draws another z. ``train_loader`` is
    endless and resumable at any sample, shared among loader processes and ranks, in the order that
    :class:`~olvae.data.webdataset.WebDatasetSource` describes. ``val_loader`` and ``test_loader`` give each latent
    once, in order, from the posterior's mode and not mirrored.

    ``label`` is the number in an image's ``.cls`` file, in batches of which every image has one.

    Args:
        folder: what ``olvae encode`` wrote.
        batch_size, num_workers, max_unreadable: see :class:`~olvae.data.source.Source`.
        shuffle: latents in a block that is shuffled, kept in memory twice per loader process.
        sample: in training, draw from the posterior; else take its mode.
        flip: in training, take the mirrored image's latent half of the times, where it was encoded too.

    Raises:
        FileNotFoundError: the folder has no latents, or not all of them yet.
        ValueError: its latents have several shapes and can't be put into a batch, or there are too few.
    """

    tensor = "latent"

    def __init__(
        self,
        folder: str,
        batch_size: int,
        num_workers: int = 0,
        shuffle: int = 500,
        sample: bool = True,
        flip: bool = True,
        max_unreadable: float = 0.01,
    ) -> None:
        self.stats = read_stats(folder)
        super().__init__(max(1, self.stats["size"]), batch_size, num_workers, max_unreadable=max_unreadable)
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1, got {shuffle}")
        if self.stats["latent_shape"] is None and batch_size > 1:
            raise ValueError(f"{folder}: latents of several shapes fit into no batch: set batch_size to 1")
        self.folder = folder
        self.shuffle = shuffle
        self.sample = sample
        self.flip = flip
        index = Path(folder).expanduser() / INDEX
        self.shards = with_counts(find_shards(folder), str(index), LATENT)
        if batch_size > self.samples_per_epoch:
            raise ValueError(
                f"{folder}: batch_size {batch_size} is larger than the data, {self.stats['count']} latents"
            )

    @property
    def shift_factor(self) -> float:
        """Mean of the latents as they are stored."""
        return float(self.stats["shift_factor"])

    @property
    def scaling_factor(self) -> float:
        """One over their standard deviation. A diffusion model's samples go back with z / scaling + shift."""
        return float(self.stats["scaling_factor"])

    @property
    def samples_per_epoch(self) -> int:
        total = total_images(self.shards)
        assert total is not None  # the index has them all
        return total

    @property
    def images(self) -> int:
        return self.samples_per_epoch

    def count(self, part: Part) -> int:  # noqa: ARG002  (all of them, in either part)
        return self.samples_per_epoch

    def describe(self) -> str:
        return f"{self.samples_per_epoch} latents in {len(self.shards)} shards"

    def check_consumers(self, world: int) -> None:
        check_shares(self.shards, self.num_workers, world)

    def stream(self, seed: int, position: int, consumer: Consumer) -> Iterator[Sample]:
        def make(entry: Entry, rng: np.random.Generator) -> Sample:
            latent, flipped, meta = read_latent(entry)
            mirrored = self.flip and flipped is not None and rng.random() < 0.5
            chosen = flipped if mirrored and flipped is not None else latent
            noise = torch.Generator().manual_seed(int(rng.integers(2**63))) if self.sample else None
            return self._sample(chosen, noise, meta["key"], entry)

        return ShardReader(self.shards, self.shuffle, LATENT, seed, consumer).samples(position, make)

    def once(self, part: Part, consumer: Consumer) -> Iterator[Sample]:  # noqa: ARG002
        def make(entry: Entry) -> Sample:
            latent, _, meta = read_latent(entry)
            return self._sample(latent, None, meta["key"], entry)

        return read_once(self.shards, LATENT, consumer, make)

    def _sample(self, latent: Latent, noise: torch.Generator | None, key: str, entry: Entry) -> Sample:
        z: Tensor = (latent.draw(noise) - self.shift_factor) * self.scaling_factor
        return Sample(z, key, label=_label(entry))


def _label(entry: Entry) -> int | None:
    content = entry.files.get("cls")
    if content is None:
        return None
    try:
        return int(content)
    except ValueError as error:
        raise UnreadableImageError(entry.name, f"its .cls is no number: {content[:20]!r}") from error
