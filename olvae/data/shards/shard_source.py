"""Stream samples of WebDataset shards: endless, shuffled and resumable; or each once, in order."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, islice
from typing import NamedTuple

import numpy as np

from olvae.config.reading import is_local
from olvae.data.order.permutation import epoch_order
from olvae.data.pixels.size_and_range import RangeNode, Size
from olvae.data.read_errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.shards.index import INDEX
from olvae.data.shards.offsets import TAR_BLOCK, offsets_of
from olvae.data.shards.order import Deal, Places, Round, ShardGroup, describe_sorted
from olvae.data.shards.tar_reading import Entry, Shard, is_packed, read_shard
from olvae.data.source import LoaderLayout, LoaderProcess, Sample, Source, total
from olvae.files import counted, file_state

INTERLEAVE = 32  # shards that are read at once
FRUITLESS = 3  # images in a row that can't be read, after which the rest of a shard is lost
NO_PLACES = Places.of([])


class ShardSource(Source):
    """Samples of shards; :class:`WebDatasetSource` describes their order.

    Args:
        train, val: the shards, with their counts where they are known.
        shuffle: entries in a block that is shuffled.
        interleave: shards that a block is taken from at once; by default 32 where a shard can be
            read from its middle, else 1.
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
        interleave: int | None = None,
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable, range)
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1, got {shuffle}")
        if interleave is not None and interleave < 1:
            raise ValueError(f"interleave must be at least 1, got {interleave}")
        self.train = train
        self.val = val
        self.shuffle = shuffle
        self.image_key = image_key
        counted = all(shard.images is not None for shard in train)
        # Shards of one set are compressed alike: the first one tells.
        in_the_middle = all(is_local(shard.url) or shard.offsets for shard in train) and not any(
            is_packed(shard.url) for shard in train[:1]
        )
        usual = INTERLEAVE if counted and in_the_middle else 1
        self.interleave = usual if interleave is None else interleave
        self._usual_interleave = interleave is None
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

    def entries(self, shard: Shard, begin: int = 0) -> Iterator[Entry | ReadError]:
        """Read a shard from a byte on; end with a ReadError if it turns out to have no images."""
        empty = shard.images is None
        for entry in read_shard(shard, self.image_key, begin):
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
                f"{counted(len(self.train), 'training shard')} for {processes} processes "
                f"({self.num_workers} workers x {world} ranks): each needs one of its own: lower "
                "data.params.num_workers, pack smaller shards, or give their index"
            )
        if images is not None and images < processes:
            raise ValueError(
                f"{counted(images, 'training image')} for {processes} processes: "
                "lower data.params.num_workers"
            )

    def limit(self, images: int) -> None:
        known = self.val_images
        if known is None or images > known:
            has = "an unknown number of images" if known is None else counted(known, "image")
            raise ValueError(f"the set has {has}, {images} were asked for")
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

    def continued_stream(
        self, seed: int, start: int, process: LoaderProcess, layouts: Sequence[LoaderLayout]
    ) -> Iterator[Sample]:
        if len(layouts) < 2 or self.samples_per_epoch is None:
            return super().continued_stream(seed, start, process, layouts)
        process, position = process.resumed(start - layouts[-1].start)
        return _Reader(self, seed, process, layouts).samples(position)

    def describe_sorted(self) -> str | None:
        known = [shard.classes for shard in self.train if shard.classes is not None]
        if len(known) < len(self.train):
            return None
        line = describe_sorted(self.batch_size, *known[0], self.interleave)
        return line and f"{line}: raise data.params.interleave, or mix the shards"

    @property
    def order(self) -> int:
        return self.interleave

    def keep_order(self, order: int | None) -> None:
        # An index that came since may have changed what is usual.
        if self._usual_interleave:
            self.interleave = order or 1

    def describe_new_processes(self) -> str | None:
        if self.samples_per_epoch is not None:
            return None
        return (
            "other loader processes than before: of this epoch, some images come again and some "
            "do not come, because no index has the numbers of images in the shards: `olvae data "
            "index` writes one"
        )

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
                    yield self.val_sample(entry)._replace(group=entry.group)
                except UnreadableImageError as error:
                    yield Sample(None, entry.key, (error.read_error(),))

            # Images that the index counts and the shard does not have: one error for each. Without
            # an index, nobody knows what comes after the end.
            missing = range(read, shard.images or 0)
            ended = errors[-1] if errors else None
            if missing and ended:
                images = counted(len(missing), "image")
                count = f"{images} by its {INDEX}, or as many or more without one"
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


class _Block(NamedTuple):
    """Images that are shuffled together, and the readable ones that can replace a lost one."""

    entries: list[Entry | ReadError]
    good: list[Entry]


class _Reader:
    """Read a process's share of a source's endless stream, lazily, from any position on.

    Rounds are epochs or, after a change of processes, what was left of them: see
    :mod:`olvae.data.shards.order`. Generators, each fed by the one above it:

    - ``_part``: the process's entries of one round, in the order of places. ``_entries`` takes them
      from shards with known counts, ``_whole`` takes whole shards;
    - ``_blocks``: these entries, round after round, in blocks of ``shuffle`` that are not read yet;
    - ``_places``: each block is read while the one before it is used, and then shuffled;
    - ``samples``: the entries in the blocks' shuffled order are decoded.

    Example: shards a and b with 5 and 3 images, 2 processes, shuffle=3, interleave=1. A process has
    8 // 2 = 4 images an epoch. If epoch 0 has the order b, a, process 1 gets::

        b0 b1 b2 a0 | a1 a2 a3 a4       laid end to end, cut into 2 parts; the second is its own
        (a1 a2 a3) (a4)                 its blocks; a block never spans two epochs
        a3 a1 a2, a4                    its samples, at positions 0 to 3

    With interleave=2 the places are a0 | b0 a1 | a2 | b1 a3 | b2 a4: in each of 5 rows one of a, in
    three of them one of b. Position 6 is place 6 % 4 = 2 of epoch 1: block 2 // 3 = 0, and there
    the sample at place 2. With unknown counts no position can be computed: blocks are read from
    epoch 0 on and skipped.
    """

    def __init__(
        self,
        source: ShardSource,
        seed: int,
        process: LoaderProcess,
        layouts: Sequence[LoaderLayout] = (),
    ) -> None:
        self.source = source
        self.seed = seed
        self.process = process
        self.dealt = max(0, len(layouts) - 1)  # number of times that the processes changed
        images = source.samples_per_epoch
        # Places can be computed if the shards' counts are known.
        self.deal: Deal | None = None
        if images is not None:
            assert images >= process.count  # check_processes raises
            now = LoaderLayout(0, process.workers, process.world, process.batch_size)
            self.deal = Deal(images, layouts or [now], seed, source.shuffle)

    def samples(self, position: int) -> Iterator[Sample]:
        """Yield the process's samples without end, from its own ``position`` on."""
        for block, index in self._places(position):
            yield self._sample(block, index, position)
            position += 1

    def _places(self, position: int) -> Iterator[tuple[_Block, int]]:
        """Yield each sample's block and place in it, without end, from a position on."""
        # The block with the first sample, and how many entries to skip in it (and after it).
        one = 0
        number = 0
        skip = position
        if self.deal is not None:
            one, skip = self.deal.find(position)
            number, skip = divmod(skip, self.source.shuffle)
        blocks = self._blocks(one, number)
        one, number, entries = next(blocks)
        block = self._shuffled(one, number, list(entries))

        for one, number, following in blocks:
            ahead: list[Entry | ReadError] = []
            for index in range(skip, len(block.entries)):
                yield block, index
                # Read one entry of the next block for each sample: no pause between blocks.
                ahead += islice(following, 1)
            skip = max(0, skip - len(block.entries))
            ahead += following
            block = self._shuffled(one, number, ahead)

    def _sample(self, block: _Block, index: int, position: int) -> Sample:
        """Decode an entry of a block or, if it can't be read, another one of the same block."""
        numbers = [self.seed, self.process.index, self.process.count, position]
        if self.dealt:
            numbers.append(self.dealt)
        seed = tuple(numbers)
        rng = np.random.default_rng(seed)

        def read(entry: Entry | ReadError, errors: list[ReadError]) -> Sample:
            if isinstance(entry, ReadError):
                raise UnreadableImageError(entry.name, entry.reason, entry.image)
            errors += entry.errors
            return self.source.train_sample(entry, rng)

        sample, errors = read_or_replace(block.entries[index], block.good, seed, read)
        return sample._replace(errors=errors)

    def _round(self, one: int) -> Round:
        """A round by its number; with unknown counts an epoch, whose places nobody knows."""
        return Round(one, NO_PLACES) if self.deal is None else self.deal.round(one)

    def _blocks(
        self, one: int, number: int
    ) -> Iterator[tuple[int, int, Iterator[Entry | ReadError]]]:
        """Yield round, number and entries of each block, from a block of a round on.

        The entries are read from the round's stream as they are taken, so a block must be read to
        its end before the next one is taken.
        """
        for one in count(one):  # noqa: B020  (from the given one on)
            entries = self._part(one, number * self.source.shuffle)
            # Taking the first entry tells whether the round has another block.
            for first in entries:
                yield one, number, chain([first], islice(entries, self.source.shuffle - 1))
                number += 1
            number = 0

    def _part(self, one: int, skip: int) -> Iterator[Entry | ReadError]:
        """Give this process's entries of a round, in the order of places, all but ``skip``.

        With unknown counts nothing is skipped.
        """
        found = self._round(one)
        order = epoch_order(self.seed, found.epoch, len(self.source.train))
        shards = [self.source.train[i] for i in order]
        if self.deal is None:
            own = shards[self.process.index :: self.process.count]
            del shards[self.process.index :: self.process.count]
            return self._whole(own, shards)
        share = found.share(self.process.count)
        first = self.process.index * share
        return self._entries(shards, found, first + skip, first + share)

    def _whole(self, own: Sequence[Shard], others: Sequence[Shard]) -> Iterator[Entry]:
        """Yield the entries of shards with unknown counts; each brings the errors met before it.

        The last one also brings those after it: an entry is kept until the next one is read. If
        none of the process's own shards gives an image, the first other one that does is taken.
        """
        errors: list[ReadError] = []
        last: Entry | None = None
        for number, shard in enumerate(chain(own, others)):
            if last and number >= len(own):
                break
            for entry in self.source.entries(shard):
                if isinstance(entry, ReadError):
                    errors.append(entry)
                    continue
                if last:
                    yield last
                last = entry._replace(errors=tuple(errors))
                errors = []
        if not last:
            reasons = "; ".join(f"{error.name}: {error.reason}" for error in errors)
            raise ValueError(
                f"none of the {len(own) + len(others)} shards could be read: {reasons}"
            )
        yield last._replace(errors=(*last.errors, *errors))

    def _entries(
        self, shards: Sequence[Shard], one: Round, first: int, last: int
    ) -> Iterator[Entry | ReadError]:
        """Yield the images of a round from its ``first``-th place on; a ReadError for a lost one.

        So the places of all later images stay the same, whatever can't be read.
        """
        # Groups of shards, and where each begins among the places.
        size = self.source.interleave
        groups = [shards[i : i + size] for i in range(0, len(shards), size)]
        images = [sum(shard.images or 0 for shard in group) for group in groups]
        ends = list(accumulate(images))

        number = -1
        for begin, end in one.places.part(first, last):
            while begin < end:
                # One group after the other, whose shards stay open.
                found = bisect_right(ends, begin)
                if found != number:
                    number = found
                    group = ShardGroup([shard.images or 0 for shard in groups[number]])
                    open_shards = [_OpenShard(self.source, shard) for shard in groups[number]]
                start = ends[number] - images[number]
                until = min(end, ends[number])
                for shard, image in group.at(begin - start, until - start):
                    yield open_shards[shard].take(image)
                begin = until

    def _shuffled(self, one: int, number: int, entries: list[Entry | ReadError]) -> _Block:
        """Shuffle a block; if it has no readable entry, a later block's replace its samples."""
        order = self._round(one).block_order(
            self.seed, number, self.process.index, self.process.count, len(entries)
        )
        shuffled = [entries[i] for i in order]
        good = [entry for entry in shuffled if isinstance(entry, Entry)]
        if good:
            return _Block(shuffled, good)

        # The rest of this round, and the whole next one, are searched for readable entries.
        for later, _, following in self._blocks(one, number + 1):
            good = [entry for entry in following if isinstance(entry, Entry)]
            if good or later > one + 1:
                break
        if not good:
            raise ValueError("none of the shards of a loader process could be read")
        return _Block(shuffled, good)


class _OpenShard:
    """A shard whose images are taken by ascending numbers, some of them or all."""

    def __init__(self, source: ShardSource, shard: Shard) -> None:
        self._source = source
        self._shard = shard
        self._entries: Iterator[Entry | ReadError] | None = None
        self._next = 0  # number of the image that comes next
        self._fruitless = 0  # images in a row that could not be read
        self._reason = f"has fewer images than its {INDEX} says"

    def take(self, image: int) -> Entry | ReadError:
        """Read an image; a ReadError if the shard ends or is damaged before it."""
        if self._entries is None or (image > self._next and self._fruitless < FRUITLESS):
            self._seek(image)
        assert self._entries is not None
        for entry in self._entries:
            if isinstance(entry, ReadError):
                self._reason = entry.reason
                continue
            self._next += 1
            if self._next > image:
                self._fruitless = 0
                return entry
        self._fruitless += 1
        return ReadError(self._shard.url, self._reason, str(image))

    def _seek(self, image: int) -> None:
        """Open the shard at an image or, where nobody knows where that begins, at its start."""
        offsets = None
        if image:
            offsets = offsets_of(self._shard, self._source.image_key)
        if offsets is not None and len(offsets):
            # A shard that is damaged before this image is read from the last one that is whole.
            self._next = min(image, len(offsets) - 1)
            begin = int(offsets[self._next]) * TAR_BLOCK
            self._entries = self._source.entries(self._shard, begin)
        elif self._entries is None:
            self._entries = self._source.entries(self._shard)
            self._next = 0
