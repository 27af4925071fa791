"""Images of WebDataset shards, local or remote, as a source to train on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olvae.data.image import ALL_FILTERS, Photo, RandomScaleCrop, image_to_tensor
from olvae.data.pixels.size_and_range import RangeNode, Size
from olvae.data.shards.index import find_shards, may_exist, split_shards, with_counts
from olvae.data.shards.shard_source import ShardSource
from olvae.data.shards.tar_reading import Entry, Shard
from olvae.data.source import Sample, eval_sample
from olvae.files import counted


class WebDatasetSource(ShardSource):
    """Images of tar files, local or remote.

    An epoch takes the shards in an order of its own, in groups of ``interleave``, and the images of
    a group from all its shards in turn. If the number of images in each shard is known (from an
    index, or by local files' headers at the start), this order is cut into n equal parts for n
    processes, loader processes times ranks: in an epoch no image comes twice, and at most one image
    per process is left out, also if other processes continue it. If it is unknown, each process
    takes every n-th shard, and processes with fewer images begin the next epoch earlier. Either way
    streams never end, so all ranks have the same number of batches.

    Each process shuffles its images in blocks of ``shuffle``. To resume, a process begins in the
    middle of shards that are local or have offsets in their index, and reads at most one block
    again; unknown shards are read again from the start.

    Args:
        shards: a folder of .tar files; a pattern such as ``data/{000..127}.tar``; URLs (http, s3,
            gs, hf and others of fsspec), ``pipe:`` commands; or a list of these.
        size, batch_size, num_workers, channels, max_unreadable, range: see
            :class:`~olvae.data.source.Source`.
        val_shards: the validation and test images; without it the last shards are held out.
        val_fraction: without val_shards, the share of the shards that is held out, at least one.
        index: path or URL of the shards' ``index.json``; for local shards it is found beside them.
        shuffle: images in a shuffled block; each loader process keeps two blocks, undecoded.
        image_key: the extension of the image in a sample that has several, for example
            ``input.png``; by default the first image is taken.
        min_fraction, filters, flip, shuffle_channels: see
            :class:`~olvae.data.image.RandomScaleCrop`.
        interleave: shards that a block is taken from at once, which stay open; by default 32 where
            counts are known and shards can be read from the middle, else 1. With 1 they are laid
            end to end.

    Raises:
        FileNotFoundError: no shard is there for training, or for validation.
        ValueError: a shard has no images, two have the same name, or there are too few.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        val_shards: str | Path | Sequence[str | Path] | None = None,
        val_fraction: float = 0.05,
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
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels)

        # Shards of training and validation; a held-out part may have none that exists.
        found = find_shards(shards)
        given = None if val_shards is None else find_shards(val_shards)
        train, val = split_shards(found, given, val_fraction, "val_shards")
        if given is None:
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
        return f"{train} training images in {shards}, {val} validation and test images"

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        return Sample(image_to_tensor(self.transform(self._photo(entry), rng)), entry.key)

    def val_sample(self, entry: Entry) -> Sample:
        return eval_sample(self._photo(entry), entry.key, self.eval_transform)

    def _photo(self, entry: Entry) -> Photo:
        return Photo(entry.data, entry.name, self.channels, self.pixel_range)
