"""Streams of shards: endless, shuffled, shared among processes, resumable at any image; or once, in order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from olvae.data.errors import ReadError, UnreadableImageError, read_or_replace
from olvae.data.sampler import LoaderProcess, epoch_order
from olvae.data.shards.read import Entry, Shard, read_shard
from olvae.data.source import Sample

__all__ = ["ShardReader", "check_shares", "read_once", "total_images"]


class _Block(NamedTuple):
    """Images that are shuffled together, shuffled; and those that can replace a lost one."""

    entries: list[Entry | ReadError]
    good: list[Entry]


class ShardReader:
    """A process's share of an endless, shuffled stream of the entries of shards; see :class:`WebDatasetSource`.

    Args:
        shards: all of them, with their counts where they are known.
        size: entries that are shuffled together.
        image_key, sidecars: see :func:`read_shard`.
        seed: of the order.
        process: whose share it is.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        size: int,
        image_key: str | None,
        seed: int,
        process: LoaderProcess,
        sidecars: bool = True,
    ) -> None:
        self.shards = shards
        self.size = size
        self.image_key = image_key
        self.seed = seed
        self.process = process
        self.sidecars = sidecars
        total = total_images(shards)
        self.share = None if total is None else total // process.count
        """Images of this process in an epoch, if the shards' counts are known."""
        assert self.share != 0  # check_processes raises

    def samples(self, position: int, make: Callable[[Entry, np.random.Generator], Sample]) -> Iterator[Sample]:
        """The process's endless samples, from its own ``position`` on.

        Args:
            make: makes a sample of an entry, with a generator seeded by the position. If it raises
                UnreadableImageError, it gets another entry of the same block.
        """
        for block, index in self._from_position(position):
            yield _sample(block, index, (self.seed, self.process.index, self.process.count, position), make)
            position += 1

    def _from_position(self, position: int) -> Iterator[tuple[_Block, int]]:
        """Each image's block and place in it, from the process's own ``position`` on, without end."""
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
        """Epoch, number and entries of each block; each must be read to its end before the next is taken."""
        for epoch in count(epoch):  # noqa: B020  (from the given one on)
            entries = self._epoch(epoch, number * self.size)
            for first in entries:
                yield epoch, number, chain([first], islice(entries, self.size - 1))
                number += 1
            number = 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Entry | ReadError]:
        """What this process reads in an epoch, in the shards' order."""
        shards = [self.shards[i] for i in epoch_order(self.seed, epoch, len(self.shards))]
        if self.share is None:
            return self._whole(shards[self.process.index :: self.process.count])
        first = self.process.index * self.share
        return self._range(shards, first + skip, first + self.share)

    def _whole(self, shards: Sequence[Shard]) -> Iterator[Entry]:
        """Entries of shards whose counts are unknown; errors come with the next image that is read."""
        errors: list[ReadError] = []
        read = False
        for shard in shards:
            for entry in read_shard(shard, self.image_key, self.sidecars):
                if isinstance(entry, ReadError):
                    errors.append(entry)
                else:
                    yield entry._replace(errors=tuple(errors))
                    errors, read = [], True
        if not read:
            reasons = "; ".join(f"{error.name}: {error.reason}" for error in errors) or "no images in them"
            raise ValueError(f"none of the {len(shards)} shards of a loader process could be read: {reasons}")

    def _range(self, shards: Sequence[Shard], first: int, last: int) -> Iterator[Entry | ReadError]:
        """The images from ``first`` to ``last`` of shards laid end to end; a ReadError in the place of a lost one."""
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
        rng = np.random.default_rng((self.seed, epoch, number, self.process.index, self.process.count, 2))
        shuffled = [entries[i] for i in rng.permutation(len(entries))]
        good = [entry for entry in shuffled if isinstance(entry, Entry)]
        return _Block(shuffled, good or self._next_good(epoch, number))

    def _next_good(self, epoch: int, number: int) -> list[Entry]:
        """Entries of the next block in which anything can be read, for a block in which nothing can."""
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
    """A sample of an entry of a block or, if that can't be read, of another one of the same block."""
    rng = np.random.default_rng(seed)

    def read(entry: Entry | ReadError, errors: list[ReadError]) -> Sample:
        if isinstance(entry, ReadError):
            raise UnreadableImageError(entry.name, entry.reason, entry.image)
        errors += entry.errors
        return make(entry, rng)

    sample, errors = read_or_replace(block.entries[index], block.good, seed, read)
    return sample._replace(errors=errors)


def read_once(
    shards: Sequence[Shard],
    image_key: str | None,
    process: LoaderProcess,
    make: Callable[[Entry], Sample],
    limited: bool = False,
) -> Iterator[Sample]:
    """A process's share of the shards, each entry once and in order; samples without an image for lost ones.

    Args:
        limited: read no more of each shard than its count says, even if it holds more.
    """
    for shard in shards[process.index :: process.count]:
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
                yield Sample(None, entry.key, (error.read_error(),))


def check_shares(shards: Sequence[Shard], workers: int, world: int) -> None:
    """Raises ValueError where the shards are too few for the loader processes of ``world`` ranks."""
    processes, images = max(1, workers) * world, total_images(shards)
    if images is None and len(shards) < processes:
        raise ValueError(
            f"{len(shards)} training shards for {processes} processes ({workers} workers x {world} ranks): each needs "
            "one of its own: lower data.params.num_workers, pack smaller shards, or give their index"
        )
    if images is not None and images < processes:
        raise ValueError(f"{images} training images for {processes} processes: lower data.params.num_workers")


def total_images(shards: Sequence[Shard]) -> int | None:
    """Images in all shards together; None if the number of images in one is unknown."""
    counts = [shard.images for shard in shards]
    return None if None in counts else sum(n for n in counts if n is not None)
