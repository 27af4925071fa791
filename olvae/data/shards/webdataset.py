"""Stream samples of WebDataset shards: endless, shuffled and resumable; or each once, in order."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from olvae.data.image import ALL_FILTERS, Photo, RandomScaleCrop, image_to_tensor
from olvae.data.pixels.size_and_range import RangeNode, Size
from olvae.data.read_errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.shards.index import INDEX, find_shards, may_exist, split_shards, with_counts
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.data.source import LoaderProcess, Sample, Source, epoch_order, eval_sample, total
from olvae.files import file_state


class ShardSource(Source):
    """Samples of shards; :class:`WebDatasetSource` describes their order.

    Args:
        train, val: the shards, with their counts where they are known.
        shuffle: entries in a block that is shuffled.
        image_key: the extension of the file that is read in a group; by default the first image's.
        size, batch_size, num_workers, channels, max_unreadable, range: see :class:`Source`.

    Raises ValueError: a batch is larger than the training images of an epoch.
    """

    def __init__(
        self,
        train: Sequence[Shard],
        val: Sequence[Shard],
        shuffle: int,
        image_key: str | None,
        size: Size,
        batch_size: int,
        num_workers: int,
        channels: int = 3,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable, range)
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1, got {shuffle}")
        self.train = train
        self.val = val
        self.shuffle = shuffle
        self.image_key = image_key
        self._limited = False
        self.check_batch()

    @abstractmethod
    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        """Make a training sample of an entry.

        Raise UnreadableImageError if it can't be read: another entry of its block replaces it.
        """

    @abstractmethod
    def val_sample(self, entry: Entry) -> Sample:
        """Make a validation sample of an entry; raise UnreadableImageError if it can't be read."""

    def entries(self, shard: Shard) -> Iterator[Entry | ReadError]:
        """Read a shard; end with a ReadError if it turns out to have no images."""
        empty = shard.images is None
        for entry in read_shard(shard, self.image_key):
            empty = False
            yield entry
        if empty:
            yield ReadError(shard.url, "no images in it", lost=False)

    @property
    def samples_per_epoch(self) -> int | None:
        return total([shard.images for shard in self.train])

    @property
    def val_images(self) -> int | None:
        return total([shard.images for shard in self.val])

    def val_identities(self) -> Iterator[str]:
        for shard in self.val:
            size = file_state(shard.url).partition(" ")[0]  # "missing" for a URL
            yield f"{shard.name} {shard.images} {size}"

    def check_processes(self, world: int) -> None:
        processes = max(1, self.num_workers) * world
        images = self.samples_per_epoch
        if images is None and len(self.train) < processes:
            raise ValueError(
                f"{len(self.train)} training shards for {processes} processes "
                f"({self.num_workers} workers x {world} ranks): each needs one of its own: lower "
                "data.params.num_workers, pack smaller shards, or give their index"
            )
        if images is not None and images < processes:
            raise ValueError(
                f"{images} training images for {processes} processes: lower data.params.num_workers"
            )

    def limit(self, images: int) -> None:
        known = self.val_images
        if known is None or images > known:
            has = "an unknown number of" if known is None else known
            raise ValueError(f"the set has {has} images, {images} were asked for")
        # The last shard that is read may be cut; `once` stops at the count.
        left = images
        shards = []
        for shard in self.val:
            kept = min(left, shard.images or 0)
            shards.append(shard._replace(images=kept))
            left -= kept
        self.val = [shard for shard in shards if shard.images]
        self._limited = True

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        return _Reader(self, seed, process).samples(position)

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        for shard in self.val[process.index :: process.count]:
            read = 0
            errors: list[ReadError] = []
            for entry in self.entries(shard):
                if self._limited and read == shard.images:
                    break
                if isinstance(entry, ReadError):
                    errors.append(entry)
                    continue
                read += 1
                try:
                    yield self.val_sample(entry)
                except UnreadableImageError as error:
                    yield Sample(None, entry.key, (error.read_error(),))

            # Images that the index counts and the shard does not have: one error for each. Without
            # an index, nobody knows what comes after the end.
            missing = range(read, shard.images or 0)
            ended = errors[-1] if errors else None
            if missing and ended:
                count = f"{len(missing)} images by its {INDEX}, or as many or more without one"
                reason = f"{ended.reason}; the rest of the shard is missing: {count}"
                errors = [ReadError(ended.name, reason, str(i)) for i in missing]
            elif missing:
                reason = f"has fewer images than its {INDEX} says"
                errors = [ReadError(shard.url, reason, str(i)) for i in missing]
            elif ended and ended.lost:
                count = "an unknown number of images, because no index counts them"
                reason = f"{ended.reason}; the rest of the shard is missing: {count}"
                errors[-1] = ended._replace(reason=reason)
            if errors:
                yield Sample(None, shard.url, tuple(errors))


class WebDatasetSource(ShardSource):
    """Images of tar files, local or remote.

    An epoch is all shards, in an order of its own, laid end to end. If the number of images in each
    shard is known (from an index, or by counting local files at the start), this sequence is cut
    into n equal parts for n processes, loader processes times ranks: in an epoch no image comes
    twice, and at most one image per process is left out. If it is unknown, each process takes every
    n-th shard, and processes with fewer images begin the next epoch earlier. Either way streams
    never end, so all ranks have the same number of batches.

    Each process shuffles its images in blocks of ``shuffle``, so the images in shards should be
    shuffled already, as ``olvae data pack`` does. To resume, known shards are skipped, and at most
    one block and the beginning of its shard are read again; unknown shards are read again from the
    start.

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
        min_fraction, filters, flip, shuffle_channels: see
            :class:`~olvae.data.image.RandomScaleCrop`.

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
    ) -> None:
        transform = RandomScaleCrop(size, min_fraction, filters, flip, shuffle_channels)

        # Shards of training and validation; a held-out part may have none that exists.
        found = find_shards(shards)
        given = None if val_shards is None else find_shards(val_shards)
        train, val, self.bound = split_shards(found, given, val_fraction, "val_shards", index)
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
        held_out = f"{val} validation and test images{self.bound}"
        return f"{train} training images in {len(self.train)} shards, {held_out}"

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        return Sample(image_to_tensor(self.transform(self._photo(entry), rng)), entry.key)

    def val_sample(self, entry: Entry) -> Sample:
        return eval_sample(self._photo(entry), entry.key, self.eval_transform)

    def _photo(self, entry: Entry) -> Photo:
        return Photo(entry.data, entry.name, self.channels, self.pixel_range)


class _Block(NamedTuple):
    """Images that are shuffled together, and the readable ones that can replace a lost one."""

    entries: list[Entry | ReadError]
    good: list[Entry]


class _Reader:
    """Read a process's share of a source's endless stream, lazily, from any position on.

    Four generators, each fed by the one above it:

    - ``_epoch``: the process's entries of one epoch, in the shards' order. ``_range`` cuts them out
      of shards with known counts, ``_whole`` takes whole shards;
    - ``_blocks``: these entries, epoch after epoch, in blocks of ``shuffle`` that are not read yet;
    - ``_places``: each block is read while the one before it is used, and then shuffled;
    - ``samples``: the entries in the blocks' shuffled order are decoded.

    Example: shards a and b with 5 and 3 images, 2 processes, shuffle=3. A process has 8 // 2 = 4
    images an epoch. If epoch 0 has the order b, a, process 1 gets::

        b0 b1 b2 a0 | a1 a2 a3 a4       laid end to end, cut into 2 ranges; the second is its own
        (a1 a2 a3) (a4)                 its blocks; a block never spans two epochs
        a3 a1 a2, a4                    its samples, at positions 0 to 3

    Position 6 is place 6 % 4 = 2 of epoch 1: block 2 // 3 = 0, and there the sample at place 2.
    With unknown counts no position can be computed: blocks are read from epoch 0 on and skipped.
    """

    def __init__(self, source: ShardSource, seed: int, process: LoaderProcess) -> None:
        self.source = source
        self.seed = seed
        self.process = process
        images = source.samples_per_epoch
        self.share = None if images is None else images // process.count
        """Images of this process in an epoch, if the shards' counts are known."""
        assert self.share != 0  # check_processes raises

    def samples(self, position: int) -> Iterator[Sample]:
        """Yield the process's samples without end, from its own ``position`` on."""
        for block, index in self._places(position):
            yield self._sample(block, index, position)
            position += 1

    def _places(self, position: int) -> Iterator[tuple[_Block, int]]:
        """Yield each sample's block and place in it, without end, from a position on."""
        # The block with the first sample, and how many entries to skip in it (and after it).
        epoch = 0
        number = 0
        skip = position
        if self.share is not None:
            epoch, skip = divmod(position, self.share)
            number, skip = divmod(skip, self.source.shuffle)
        blocks = self._blocks(epoch, number)
        epoch, number, entries = next(blocks)
        block = self._shuffled(epoch, number, list(entries))

        for epoch, number, following in blocks:
            ahead: list[Entry | ReadError] = []
            for index in range(skip, len(block.entries)):
                yield block, index
                # Read one entry of the next block for each sample: no pause between blocks.
                ahead += islice(following, 1)
            skip = max(0, skip - len(block.entries))
            ahead += following
            block = self._shuffled(epoch, number, ahead)

    def _sample(self, block: _Block, index: int, position: int) -> Sample:
        """Decode an entry of a block or, if it can't be read, another one of the same block."""
        seed = (self.seed, self.process.index, self.process.count, position)
        rng = np.random.default_rng(seed)

        def read(entry: Entry | ReadError, errors: list[ReadError]) -> Sample:
            if isinstance(entry, ReadError):
                raise UnreadableImageError(entry.name, entry.reason, entry.image)
            errors += entry.errors
            return self.source.train_sample(entry, rng)

        sample, errors = read_or_replace(block.entries[index], block.good, seed, read)
        return sample._replace(errors=errors)

    def _blocks(
        self, epoch: int, number: int
    ) -> Iterator[tuple[int, int, Iterator[Entry | ReadError]]]:
        """Yield epoch, number and entries of each block, from a block of an epoch on.

        The entries are read from the epoch's stream as they are taken, so a block must be read to
        its end before the next one is taken.
        """
        for epoch in count(epoch):  # noqa: B020  (from the given one on)
            entries = self._epoch(epoch, number * self.source.shuffle)
            # Taking the first entry tells whether the epoch has another block.
            for first in entries:
                yield epoch, number, chain([first], islice(entries, self.source.shuffle - 1))
                number += 1
            number = 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Entry | ReadError]:
        """Give this process's entries of an epoch, in the shards' order, all but ``skip``.

        With unknown counts nothing is skipped.
        """
        order = epoch_order(self.seed, epoch, len(self.source.train))
        shards = [self.source.train[i] for i in order]
        if self.share is None:
            own = shards[self.process.index :: self.process.count]
            del shards[self.process.index :: self.process.count]
            return self._whole(own, shards)
        first = self.process.index * self.share
        return self._range(shards, first + skip, first + self.share)

    def _whole(self, own: Sequence[Shard], others: Sequence[Shard]) -> Iterator[Entry]:
        """Yield the entries of shards with unknown counts; each brings the errors met before it.

        If none of the process's own shards gives an image, the first other one that does is taken.
        """
        errors: list[ReadError] = []
        read = False
        for place, shard in enumerate(chain(own, others)):
            if read and place >= len(own):
                return
            for entry in self.source.entries(shard):
                if isinstance(entry, ReadError):
                    errors.append(entry)
                else:
                    yield entry._replace(errors=tuple(errors))
                    errors = []
                    read = True
        if not read:
            reasons = "; ".join(f"{error.name}: {error.reason}" for error in errors)
            raise ValueError(
                f"none of the {len(own) + len(others)} shards could be read: {reasons}"
            )

    def _range(self, shards: Sequence[Shard], first: int, last: int) -> Iterator[Entry | ReadError]:
        """Yield images ``first`` to ``last`` of shards laid end to end; a ReadError for a lost one.

        So the places of all later images stay the same, whatever can't be read.
        """
        for shard in shards:
            assert shard.images is not None
            # This shard's part of the range, and the range as counted from the next shard's start.
            begin = max(first, 0)
            end = min(last, shard.images)
            first -= shard.images
            last -= shard.images
            if begin >= end:
                continue

            place = 0
            reason = "has fewer images than its index says"
            for entry in self.source.entries(shard):
                if isinstance(entry, ReadError):
                    reason = entry.reason
                    continue
                if place >= begin:
                    yield entry
                place += 1
                if place == end:
                    break
            for i in range(max(place, begin), end):
                yield ReadError(shard.url, reason, str(i))

    def _shuffled(self, epoch: int, number: int, entries: list[Entry | ReadError]) -> _Block:
        """Shuffle a block; if it has no readable entry, a later block's replace its samples."""
        seed = (self.seed, epoch, number, self.process.index, self.process.count, 2)
        order = np.random.default_rng(seed).permutation(len(entries))
        shuffled = [entries[i] for i in order]
        good = [entry for entry in shuffled if isinstance(entry, Entry)]
        if good:
            return _Block(shuffled, good)

        # The rest of this epoch, and the whole next one, are searched for readable entries.
        for later, _, following in self._blocks(epoch, number + 1):
            good = [entry for entry in following if isinstance(entry, Entry)]
            if good or later > epoch + 1:
                break
        if not good:
            raise ValueError("none of the shards of a loader process could be read")
        return _Block(shuffled, good)
