"""Read images from WebDataset shards: in sequence, shuffled, shared among processes, resumable at any image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olvae.data.image import Photo, image_to_tensor
from olvae.data.shards.index import find_shards, may_exist, split_shards, with_counts
from olvae.data.shards.stream import ShardSource
from olvae.data.shards.tar_reading import Entry
from olvae.data.source import Sample, eval_sample
from olvae.data.transforms import ALL_FILTERS, RandomScaleCrop


class WebDatasetSource(ShardSource):
    """Images of tar files, local or remote.

    An epoch is all shards, in an order of its own, laid end to end. If the number of images in each shard is known
    (from an index, or by counting local files at the start), this sequence is cut into n equal parts for n
    processes, loader processes times ranks: in an epoch no image comes twice, and at most one image per process is
    left out. If it is unknown, each process takes every n-th shard, and those with fewer images begin the next epoch
    earlier. Either way streams never end, so all ranks have the same number of batches.

    Each process shuffles its images in blocks of ``shuffle``, so the images in shards should be shuffled already, as
    ``olvae data pack`` does. To resume, known shards are skipped, and at most one block and the beginning of its
    shard are read again; unknown ones are read again from the start.

    Args:
        shards: a folder of .tar files; a pattern such as ``data/{000..127}.tar``; URLs (http, s3, gs, hf and others
            of fsspec), ``pipe:`` commands; or a list of these.
        size, batch_size, num_workers, channels, max_unreadable: see :class:`~olvae.data.source.Source`.
        val_shards: the validation and test images; without it the last shards are held out.
        val_fraction: without val_shards, the share of the shards that is held out, at least one.
        index: path or URL of the shards' ``index.json``; that of local shards is found beside them.
        shuffle: images in a shuffled block; two blocks are in memory, undecoded, per loader process.
        image_key: the extension of the image in a sample that has several, for example ``input.png``; by default
            the first that is an image's.
        min_fraction, filters, flip: see :class:`~olvae.data.transforms.RandomScaleCrop`.

    Raises:
        FileNotFoundError: no shard is there for training, or for validation.
        ValueError: a shard has no images, two have the same name, or there are too few.
    """

    sidecars = False

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        size: int,
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
        channels: int = 3,
        max_unreadable: float = 0.01,
    ) -> None:
        self.transform = RandomScaleCrop(size, min_fraction, filters, flip)
        found = find_shards(shards)
        given = None if val_shards is None else find_shards(val_shards)
        train, val = split_shards(found, given, val_fraction, "val_shards")
        if given is None:
            for part, use in ((train, "training"), (val, "validation")):
                if not any(may_exist(url) for url in part):
                    raise FileNotFoundError(
                        f"{part[0]}: no such shard, nor another one for {use}, which has {len(part)} of "
                        f"{len(found)}: correct data.params.shards, or set data.params.val_shards"
                    )
        parts = with_counts(train, index, image_key), with_counts(val, None if given else index, image_key)
        super().__init__(*parts, shuffle, image_key, size, batch_size, num_workers, channels, max_unreadable)

    def describe(self) -> str:
        counts = (self.samples_per_epoch, self.val_images)
        train, val = ("an unknown number of" if count is None else str(count) for count in counts)
        return f"{train} training images in {len(self.train)} shards, {val} validation and test images"

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        image = self.transform(Photo(entry.data, entry.name, self.channels), rng)
        return Sample(image_to_tensor(image), entry.key)

    def val_sample(self, entry: Entry) -> Sample:
        return eval_sample(Photo(entry.data, entry.name, self.channels), entry.key, self.eval_transform)
