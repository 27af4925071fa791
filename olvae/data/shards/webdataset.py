"""Images of WebDataset shards, local or remote, as a source to train on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olvae.data.image import ALL_FILTERS, Augment, Photo, RandomScaleCrop, image_to_tensor
from olvae.data.order.groups import FILE
from olvae.data.pixels.size_and_range import RangeNode, Size
from olvae.data.shards.index import (
    check_packed,
    find_shards,
    may_exist,
    split_shards,
    with_counts,
)
from olvae.data.shards.shard_source import ShardSource
from olvae.data.shards.tar_reading import Entry, Shard
from olvae.data.source import Sample, eval_sample
from olvae.files import counted


class WebDatasetSource(ShardSource):
    """Images of tar files, local or remote.

    An epoch is all shards, in an order of its own. If the number of images in each shard is known
    (from an index, or by counting local files at the start), images of ``interleave`` shards at a
    time follow in turn; this sequence is cut into n equal parts for n processes, loader processes
    times ranks: in an epoch no image comes twice, and at most one image per process is left out.
    Other processes may continue an epoch: they share the rest of it. If the numbers are unknown,
    each process takes every n-th shard, and processes with fewer images begin the next epoch
    earlier. Either way streams never end, so all ranks have the same number of batches.

    Each process shuffles its images in blocks of ``shuffle``, so the images in shards should be
    shuffled already, as ``olvae data pack`` does. To resume, known shards are entered at the image
    that comes next, where their index or headers say its place; unknown and compressed shards are
    read again from the start.

    Args:
        shards: a folder of .tar files; a pattern such as ``data/{000..127}.tar``; URLs (http, s3,
            gs, hf and others of fsspec), ``pipe:`` commands; or a list of these.
        size, batch_size, num_workers, channels, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        val_shards: the validation and test images; without it the last shards are held out.
        val_fraction: without val_shards, the share of the shards that is held out, at least one. By
            default 5 %, but no more than hold 10,000 images by their index.
        index: path or URL of the shards' ``index.json``; for local shards it is found beside them.
        shuffle: images in a shuffled block; each loader process keeps two blocks, undecoded.
        image_key: the extension of the image in a sample that has several, for example
            ``input.png``; by default the first image is taken.
        min_fraction, filters, flip, shuffle_channels, augment: see
            :class:`~olvae.data.image.RandomScaleCrop`.
        hold_out_by: what `olvae data pack` kept together in a shard, which training then checks in
            the index where it holds out shards itself; see
            :class:`~olvae.data.order.groups.Grouping`.
        interleave: shards that a block is taken from at once, which stay open; by default 32 where
            counts are known and shards can be read from the middle, else 1. With 1 they are laid
            end to end.

    Raises:
        FileNotFoundError: no shard is there for training, or for validation.
        ValueError: a shard has no images, two have the same name, there are too few, or they were
            not packed by ``hold_out_by``.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_shards: str | Path | Sequence[str | Path] | None = None,
        val_fraction: float | None = None,
        index: str | Path | None = None,
        shuffle: int = 500,
        image_key: str | None = None,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ALL_FILTERS,
        flip: bool = True,
        shuffle_channels: float = 0.0,
        channels: int = 3,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
        interleave: int | None = None,
        hold_out_by: str = FILE,
        augment: Augment | None = None,
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels, augment)

        # Shards of training and validation; a held-out part may have none that exists.
        found = find_shards(shards)
        given = None if val_shards is None else find_shards(val_shards)
        train, val, self.bound = split_shards(
            found, given, val_fraction, "val_shards", index, image_key
        )
        if given is None:
            check_packed(found, hold_out_by, index)
            for part, use in ((train, "training"), (val, "validation")):
                if not any(may_exist(url) for url in part):
                    raise FileNotFoundError(
                        f"{part[0]}: no such shard, nor another one for {use}, which has "
                        f"{len(part)} of {len(found)}: correct data.params.shards, or set "
                        "data.params.val_shards"
                    )

        # Their numbers of images; shards that serve for both are counted once.
        counted = with_counts(train, index, image_key)
        val_index = None if given else index
        if (val, val_index) == (train, index):
            held_out = counted
        else:
            held_out = with_counts(val, val_index, image_key)
        super().__init__(
            counted,
            held_out,
            shuffle,
            image_key,
            size,
            batch_size,
            num_workers,
            channels,
            max_unreadable,
            range,
            interleave,
        )
        self.transform = transform
        self.eval_transform = transform.evaluation

    @property
    def test_set(self) -> Sequence[Shard]:
        return self.val

    def describe(self) -> str:
        unknown = "an unknown number of"
        train = unknown if self.samples_per_epoch is None else self.samples_per_epoch
        val = unknown if self.val_images is None else self.val_images
        shards = counted(len(self.train), "shard")
        held_out = f"{val} validation and test images{self.bound}"
        return f"{train} training images in {shards}, {held_out}"

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        return Sample(image_to_tensor(self.transform(self._photo(entry), rng)), entry.key)

    def val_sample(self, entry: Entry) -> Sample:
        return eval_sample(self._photo(entry), entry.key, self.eval_transform)

    def _photo(self, entry: Entry) -> Photo:
        return Photo(entry.data, entry.name, self.channels, self.pixel_range)
