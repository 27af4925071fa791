"""Reading shards: in sequence and shuffled without end, shared and resumable at any image; or once, in order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from olvae.data.errors import ReadError, UnreadableImageError
from olvae.data.mapped.base import STAND_INS
from olvae.data.shards.read import Entry, Shard, read_shard
from olvae.data.source import LoaderProcess, Sample

__all__ = ["ShardReader", "check_shares", "read_once", "total_images"]


class _Block(NamedTuple):
    """Images that are shuffled together, shuffled; and those of which one can stand in for one that is lost."""

    entries: list[Entry | ReadError]
    good: list[Entry]


class ShardReader:
    """One consumer's share of an endless, shuffled stream of what is in shards; :class:`WebDatasetSource` says how.

    Args:
        shards: all of them, with their counts where they are known.
        size: of a block.
        image_key: the extension of what is read in a group of files; by default the first that is an image's.
        seed: of the order.
        consumer: whose share it is.
        sidecars: whether the other files of a group are wanted.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        size: int,
        image_key: str | None,
        seed: int,
        consumer: LoaderProcess,
        sidecars: bool = True,
    ) -> None:
        self.shards = shards
        self.size = size
        self.image_key = image_key
        self.seed = seed
        self.consumer = consumer
        self.sidecars = sidecars
        total = total_images(shards)
        self.share = None if total is None else total // consumer.count
        """Images of this consumer in an epoch, if the shards' counts are known."""
        assert self.share != 0  # check_processes has seen to that

    def samples(self, position: int, make: Callable[[Entry, np.random.Generator], Sample]) -> Iterator[Sample]:
        """The consumer's samples without end, from its own ``position`` on.

        Args:
            make: a sample of an entry, with a generator seeded by the position; raises UnreadableImageError where
                that can't be done, and gets another entry of the same block.
        """
        for block, index in self._from_position(position):
            yield _sample(block, index, (self.seed, self.consumer.index, self.consumer.count, position), make)
            position += 1

    def _from_position(self, position: int) -> Iterator[tuple[_Block, int]]:
        """Each image's block and place in it, from the consumer's own ``position`` on, without end."""
        epoch, number = 0, 0
        if self.share is not None:
            epoch, position = divmod(position, self.share)
            number, position = divmod(position, self.size)
        blocks = self._blocks(epoch, number)
        epoch, number, entries = next(blocks)
        block = self._shuffled(epoch, number, list(entries))
        for epoch, number, following in blocks:
            ahead: list[Entry | ReadError] = []
            for index in range(position, len(block.entries)):
                yield block, index
                ahead += islice(following, 1)  # read on while training uses these: no pause between blocks
            position = max(0, position - len(block.entries))
            ahead += following
            block = self._shuffled(epoch, number, ahead)

    def _blocks(self, epoch: int, number: int) -> Iterator[tuple[int, int, Iterator[Entry | ReadError]]]:
        """Epoch, number and entries of each block; a block is to be read to its end before the next is taken."""
        for epoch in count(epoch):  # noqa: B020  (from the given one on)
            entries = self._epoch(epoch, number * self.size)
            for first in entries:
                yield epoch, number, chain([first], islice(entries, self.size - 1))
                number += 1
            number = 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Entry | ReadError]:
        """What this consumer reads in an epoch, in the shards' order."""
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.shards))
        shards = [self.shards[i] for i in order]
        if self.share is None:
            return self._whole(shards[self.consumer.index :: self.consumer.count])
        first = self.consumer.index * self.share
        return self._range(shards, first + skip, first + self.share)

    def _whole(self, shards: Sequence[Shard]) -> Iterator[Entry]:
        """Entries of shards whose counts are not known; faults travel with the next image that is read."""
        faults: list[ReadError] = []
        read = False
        for shard in shards:
            for entry in read_shard(shard, self.image_key, self.sidecars):
                if isinstance(entry, ReadError):
                    faults.append(entry)
                else:
                    yield entry._replace(faults=tuple(faults))
                    faults, read = [], True
        if not read:
            reasons = "; ".join(f"{fault.name}: {fault.reason}" for fault in faults) or "no images in them"
            raise ValueError(f"none of the {len(shards)} shards of a loader process could be read: {reasons}")

    def _range(self, shards: Sequence[Shard], first: int, last: int) -> Iterator[Entry | ReadError]:
        """The images from ``first`` to ``last`` of shards laid end to end; a fault in the place of a lost one."""
        start = 0
        for shard in shards:
            assert shard.images is not None
            begin, end = max(first - start, 0), min(last - start, shard.images)
            start += shard.images
            if begin < end:
                yield from self._part(shard, begin, end)

    def _part(self, shard: Shard, begin: int, end: int) -> Iterator[Entry | ReadError]:
        place, reason = 0, "has fewer images than its index says"
        entries = read_shard(shard, self.image_key, self.sidecars)
        for entry in entries:
            if isinstance(entry, ReadError):
                reason = entry.reason
                continue
            if place >= begin:
                yield entry
            place += 1
            if place == end:
                return
        yield from (ReadError(shard.url, reason, str(i)) for i in range(max(place, begin), end))

    def _shuffled(self, epoch: int, number: int, entries: list[Entry | ReadError]) -> _Block:
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


def _sample(
    block: _Block, index: int, seed: tuple[int, ...], make: Callable[[Entry, np.random.Generator], Sample]
) -> Sample:
    """Of an entry of a block; where it can't be read, of another one of the same block."""
    rng = np.random.default_rng(seed)
    faults: list[ReadError] = []
    entry = block.entries[index]
    for stand_in in range(STAND_INS + 1):
        if isinstance(entry, ReadError):
            faults.append(entry)
        else:
            faults += entry.faults
            try:
                return make(entry, rng)._replace(faults=tuple(faults))
            except UnreadableImageError as error:
                faults.append(ReadError(error.name, error.reason))
        drawn = np.random.default_rng((*seed, 1, stand_in)).integers(len(block.good))
        entry = block.good[int(drawn)]
    raise UnreadableImageError(faults[0].name, f"{faults[0].reason}; nor are {STAND_INS} others near it")


def read_once(
    shards: Sequence[Shard],
    image_key: str | None,
    consumer: LoaderProcess,
    make: Callable[[Entry], Sample],
    limited: bool = False,
) -> Iterator[Sample]:
    """A consumer's share of the shards, each entry once and in order; samples without an image for lost ones.

    Args:
        limited: of each shard no more than its count says, though it may hold more.
    """
    for shard in shards[consumer.index :: consumer.count]:
        read = 0
        for entry in read_shard(shard, image_key):
            if limited and read == shard.images:
                break
            if isinstance(entry, ReadError):
                missing = max(0, (shard.images or 0) - read)
                lost = [ReadError(entry.name, entry.reason, str(read + i)) for i in range(missing)]
                yield Sample(None, shard.url, tuple(lost) or (entry,))
                continue
            read += 1
            try:
                yield make(entry)
            except UnreadableImageError as error:
                yield Sample(None, entry.key, (ReadError(error.name, error.reason),))


def check_shares(shards: Sequence[Shard], workers: int, world: int) -> None:
    """Raises ValueError where the shards are too few for the loader processes of ``world`` ranks."""
    consumers, images = max(1, workers) * world, total_images(shards)
    if images is None and len(shards) < consumers:
        raise ValueError(
            f"{len(shards)} training shards for {consumers} processes ({workers} workers x {world} ranks), of "
            "which each needs one of its own: lower data.params.num_workers, pack smaller shards, or give their "
            "index"
        )
    if images is not None and images < consumers:
        raise ValueError(f"{images} training images for {consumers} processes: lower data.params.num_workers")


def total_images(shards: Sequence[Shard]) -> int | None:
    """In all shards together; None if it is not known of one."""
    counts = [shard.images for shard in shards]
    return None if None in counts else sum(n for n in counts if n is not None)
