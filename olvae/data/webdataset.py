"""Images from WebDataset shards: read in sequence, shuffled, shared among processes, resumable at any image."""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from olvae.data.faults import Fault
from olvae.data.lists import STAND_INS, eval_sample
from olvae.data.pixels import image_to_tensor
from olvae.data.reading import Photo, UnreadableImageError
from olvae.data.shards import Entry, Shard, find_shards, read_shard, with_counts
from olvae.data.source import Consumer, Part, Sample, Source
from olvae.data.transforms import RandomScaleCrop

__all__ = ["WebDatasetSource"]


class WebDatasetSource(Source):
    """Images of tar files, local or remote.

    An epoch is all shards, in an order of its own, laid end to end. Where the number of images in each shard is
    known (an index, or local files, which are counted at the start), the sequence is cut into as many equal parts
    as there are processes, loader processes times ranks: in an epoch no image comes twice, and at most one image
    per process does not come. Where it is not known, each process takes every so-manieth shard, and processes with
    less in theirs begin the next epoch earlier. Either way nobody's images end, so all ranks have as many batches.

    Each process shuffles its images in blocks of ``shuffle``; so pack shards of shuffled images, as
    ``olvae data pack`` does. To continue at an image, known shards are skipped and at most one block and the
    beginning of its shard are read again; unknown ones are read again from the start.

    Args:
        shards: a folder of .tar files; a pattern such as ``data/{000..127}.tar``; URLs (http, s3, gs, hf and others
            that webdataset opens), ``pipe:`` commands; or a list of these.
        size, batch_size, num_workers, channels, max_unreadable: see :class:`~olvae.data.source.Source`.
        val_shards: the validation and test images. Without it the last shards are held out.
        val_fraction: without val_shards, the share of the shards that is held out, at least one.
        index: path or URL of the shards' ``index.json``; that of local shards is found beside them.
        shuffle: images in a block, kept undecoded in memory, twice per loader process.
        image_key: the extension of the image in a sample, such as ``input.png``, where it has several; by default
            the first one that is an image's.
        min_fraction, filters, flip: see :class:`RandomScaleCrop`.

    Raises:
        FileNotFoundError: no shard is there.
        ValueError: a shard has no images, or there are too few.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        size: int,
        batch_size: int,
        num_workers: int = 0,
        val_shards: str | Sequence[str] | None = None,
        val_fraction: float = 0.05,
        index: str | None = None,
        shuffle: int = 500,
        image_key: str | None = None,
        min_fraction: float = 0.5,
        filters: Sequence[str] = ("box", "bilinear", "bicubic", "lanczos"),
        flip: bool = True,
        channels: int = 3,
        max_unreadable: float = 0.01,
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable)
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1, got {shuffle}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        self.shuffle = shuffle
        self._limited = False
        self.image_key = image_key
        self.transform = RandomScaleCrop(size, min_fraction, filters, flip)
        found = find_shards(shards)
        if val_shards is not None:
            train, val = found, find_shards(val_shards)
        elif len(found) < 2:
            raise ValueError(f"{found[0]}: one shard can't be split into training and validation: set val_shards")
        else:
            held_out = max(1, round(val_fraction * len(found)))
            train, val = found[:-held_out], found[-held_out:]
        self.train = with_counts(train, index, image_key)
        self.val = with_counts(val, None if val_shards is not None else index, image_key)
        if self.samples_per_epoch is not None and batch_size > self.samples_per_epoch:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {self.samples_per_epoch} training images: "
                "lower data.params.batch_size or add shards"
            )

    @property
    def samples_per_epoch(self) -> int | None:
        return _total(self.train)

    def count(self, part: Part) -> int | None:  # noqa: ARG002  (validation and test are the same images)
        return _total(self.val)

    def describe(self) -> str:
        train, val = (f"{'an unknown number of' if (n := _total(s)) is None else n}" for s in (self.train, self.val))
        return f"{train} training images in {len(self.train)} shards, {val} validation and test images"

    def check_consumers(self, world: int) -> None:
        consumers, shards = max(1, self.num_workers) * world, len(self.train)
        images = self.samples_per_epoch
        if images is None and shards < consumers:
            raise ValueError(
                f"{shards} training shards for {consumers} processes ({self.num_workers} workers x {world} ranks), of "
                "which each needs one of its own: lower data.params.num_workers, pack smaller shards, or give their "
                "index"
            )
        if images is not None and images < consumers:
            raise ValueError(f"{images} training images for {consumers} processes: lower data.params.num_workers")

    def limit(self, images: int) -> None:
        total, left, shards = self.count("test"), images, []
        if total is None or images > total:
            has = "an unknown number of" if total is None else total
            raise ValueError(f"the set has {has} images, and not surely the {images} asked for")
        for shard in self.val:
            assert shard.images is not None
            shards.append(shard._replace(images=min(left, shard.images)))
            left -= shards[-1].images or 0
            if not left:
                break
        self.val, self._limited = shards, True

    def once(self, part: Part, consumer: Consumer) -> Iterator[Sample]:  # noqa: ARG002
        for shard in self.val[consumer.index :: consumer.count]:
            read = 0
            for entry in read_shard(shard, self.image_key):
                if self._limited and read == shard.images:
                    break
                if isinstance(entry, Fault):
                    missing = max(0, (shard.images or 0) - read)
                    lost = [Fault(entry.name, entry.reason, str(read + i)) for i in range(missing)]
                    yield Sample(None, shard.url, tuple(lost) or (entry,))
                    continue
                read += 1
                try:
                    yield eval_sample(Photo(entry.data, entry.name, self.channels), entry.key, self.eval_transform)
                except UnreadableImageError as error:
                    yield Sample(None, entry.key, (Fault(error.name, error.reason),))

    def stream(self, seed: int, position: int, consumer: Consumer) -> Iterator[Sample]:
        reader = _Reader(self.train, self.shuffle, self.image_key, seed, consumer)
        for block, index in reader.from_position(position):
            yield self._sample(block, index, (seed, consumer.index, consumer.count, position))
            position += 1

    def _sample(self, block: "_Block", index: int, seed: tuple[int, ...]) -> Sample:
        """An image of a block; where it can't be read, another one of the same block."""
        rng, others = np.random.default_rng(seed), np.random.default_rng((*seed, 1))
        faults: list[Fault] = []
        entry = block.entries[index]
        for _ in range(STAND_INS + 1):
            if isinstance(entry, Fault):
                faults.append(entry)
            else:
                faults += entry.faults
                try:
                    image = self.transform(Photo(entry.data, entry.name, self.channels), rng)
                    return Sample(image_to_tensor(image), entry.key, tuple(faults))
                except UnreadableImageError as error:
                    faults.append(Fault(error.name, error.reason))
            entry = block.good[int(others.integers(len(block.good)))]
        raise UnreadableImageError(faults[0].name, f"{faults[0].reason}; nor are {STAND_INS} others near it")


class _Block(NamedTuple):
    """Images that are shuffled together, shuffled; and those of which one can stand in for one that is lost."""

    entries: list[Entry | Fault]
    good: list[Entry]


class _Reader:
    """The blocks of one consumer."""

    def __init__(
        self, shards: Sequence[Shard], size: int, image_key: str | None, seed: int, consumer: Consumer
    ) -> None:
        self.shards = shards
        self.size = size
        self.image_key = image_key
        self.seed = seed
        self.consumer = consumer
        total = _total(shards)
        self.share = None if total is None else total // consumer.count
        """Images of this consumer in an epoch, if the shards' counts are known."""
        assert self.share != 0  # check_consumers has seen to that

    def from_position(self, position: int) -> Iterator[tuple[_Block, int]]:
        """Each image's block and place in it, from the consumer's own ``position`` on, without end."""
        epoch, number = 0, 0
        if self.share is not None:
            epoch, position = divmod(position, self.share)
            number, position = divmod(position, self.size)
        blocks = self._blocks(epoch, number)
        epoch, number, entries = next(blocks)
        block = self._shuffled(epoch, number, list(entries))
        for epoch, number, following in blocks:
            ahead: list[Entry | Fault] = []
            for index in range(position, len(block.entries)):
                yield block, index
                ahead += islice(following, 1)  # read on while training uses these: no pause between blocks
            position = max(0, position - len(block.entries))
            ahead += following
            block = self._shuffled(epoch, number, ahead)

    def _blocks(self, epoch: int, number: int) -> Iterator[tuple[int, int, Iterator[Entry | Fault]]]:
        """Epoch, number and entries of each block; a block is to be read to its end before the next is taken."""
        for epoch in count(epoch):  # noqa: B020  (from the given one on)
            entries = self._epoch(epoch, number * self.size)
            for first in entries:
                yield epoch, number, chain([first], islice(entries, self.size - 1))
                number += 1
            number = 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Entry | Fault]:
        """What this consumer reads in an epoch, in the shards' order."""
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.shards))
        shards = [self.shards[i] for i in order]
        if self.share is None:
            return self._whole(shards[self.consumer.index :: self.consumer.count])
        first = self.consumer.index * self.share
        return self._range(shards, first + skip, first + self.share)

    def _whole(self, shards: Sequence[Shard]) -> Iterator[Entry]:
        """Entries of shards whose counts are not known; faults travel with the next image that is read."""
        faults: list[Fault] = []
        read = False
        for shard in shards:
            for entry in read_shard(shard, self.image_key):
                if isinstance(entry, Fault):
                    faults.append(entry)
                else:
                    yield entry._replace(faults=tuple(faults))
                    faults, read = [], True
        if not read:
            reasons = "; ".join(f"{fault.name}: {fault.reason}" for fault in faults) or "no images in them"
            raise ValueError(f"none of the {len(shards)} shards of a loader process could be read: {reasons}")

    def _range(self, shards: Sequence[Shard], first: int, last: int) -> Iterator[Entry | Fault]:
        """The images from ``first`` to ``last`` of shards laid end to end; a fault in the place of a lost one."""
        start = 0
        for shard in shards:
            assert shard.images is not None
            begin, end = max(first - start, 0), min(last - start, shard.images)
            start += shard.images
            if begin < end:
                yield from self._part(shard, begin, end)

    def _part(self, shard: Shard, begin: int, end: int) -> Iterator[Entry | Fault]:
        place, reason = 0, "has fewer images than its index says"
        entries = read_shard(shard, self.image_key)
        for entry in entries:
            if isinstance(entry, Fault):
                reason = entry.reason
                continue
            if place >= begin:
                yield entry
            place += 1
            if place == end:
                return
        yield from (Fault(shard.url, reason, str(i)) for i in range(max(place, begin), end))

    def _shuffled(self, epoch: int, number: int, entries: list[Entry | Fault]) -> _Block:
        rng = np.random.default_rng((self.seed, epoch, number, self.consumer.index, self.consumer.count, 2))
        shuffled = [entries[i] for i in rng.permutation(len(entries))]
        good = [entry for entry in shuffled if isinstance(entry, Entry)]
        return _Block(shuffled, good or self._next_good(epoch, number))

    def _next_good(self, epoch: int, number: int) -> list[Entry]:
        """For a block of which nothing could be read: the next one of which something can."""
        for later, _, entries in self._blocks(epoch, number + 1):
            good = [entry for entry in entries if isinstance(entry, Entry)]
            if good or later > epoch + 1:
                break
        if not good:
            raise ValueError("none of the shards of a loader process could be read")
        return good


def _total(shards: Sequence[Shard]) -> int | None:
    counts = [shard.images for shard in shards]
    return None if None in counts else sum(n for n in counts if n is not None)
