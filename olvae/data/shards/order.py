"""Which images of shards each loader process reads: interleaved, cut into equal parts, dealt anew.

An epoch's images have places, 0 to N - 1. Shards come in a random order, in groups; within a group
places go from shard to shard in turn (:class:`ShardGroup`), so that neighbours are of many shards.
The places are cut into equal parts, one for each loader process of all ranks, and a process
shuffles its part in blocks.

When a run continues with other processes, they share the images that the earlier ones
(:class:`~olvae.data.source.LoaderLayout`) have not used of an epoch (:class:`Deal`). So no image
comes twice in an epoch, and fewer are left out than there are processes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from olvae.data.source import LoaderLayout


class ShardGroup:
    """Images of shards with these ``counts``, taken from all shards in turn, in proportion.

    There are as many rows as the largest shard has images. A shard with c of R images has one in
    row r where floor((r + 1) c / R) exceeds floor(r c / R).
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = [int(count) for count in counts]
        self.images = sum(self.counts)
        self._rows = max(self.counts, default=0)

    def _before(self, row: int) -> int:
        """Images in the rows before this one."""
        return sum(row * count // self._rows for count in self.counts)

    def at(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield shard and image, by number, at the places from ``first`` to before ``last``."""
        if first >= last:
            return
        begin = bisect_right(range(self._rows + 1), first, key=self._before) - 1
        skip = first - self._before(begin)
        left = last - first
        for row in range(begin, self._rows):
            for shard, count in enumerate(self.counts):
                image = row * count // self._rows
                if (row + 1) * count // self._rows == image:
                    continue
                if skip:
                    skip -= 1
                    continue
                yield shard, image
                left -= 1
                if not left:
                    return


class Places:
    """Some places of an epoch, ascending, as intervals from a first to before a last one."""

    def __init__(self, intervals: NDArray[np.int64]) -> None:
        self._intervals = intervals  # (K, 2)
        lengths = intervals[:, 1] - intervals[:, 0]
        self._ends = lengths.cumsum()  # places in an interval and those before it, (K,)

    @classmethod
    def of(cls, intervals: Sequence[tuple[int, int]]) -> "Places":
        """Join intervals that do not overlap, in any order; empty ones may be among them."""
        joined: list[tuple[int, int]] = []
        for first, last in sorted(intervals):
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], last)
            elif first < last:
                joined.append((first, last))
        return cls(np.array(joined, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def part(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the intervals of the places from the ``first``-th to before the ``last``-th."""
        number = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            end = int(self._intervals[number, 1])
            place = end - (int(self._ends[number]) - first)
            taken = min(end - place, last - first)
            yield place, place + taken
            first += taken
            number += 1


@dataclass(frozen=True)
class Round:
    """An epoch, or the rest of one, to be cut into equal parts for all processes."""

    epoch: int
    places: Places
    dealt: int = 0  # number of times that this epoch was dealt before

    def share(self, processes: int) -> int:
        """Places in the part of each of so many processes; fewer than these are left out."""
        return len(self.places) // processes

    def block_order(
        self, seed: int, block: int, index: int, processes: int, length: int
    ) -> list[int]:
        """The order in which process ``index`` shuffles a block of its part."""
        numbers = [seed, self.epoch, block, index, processes, 2]
        if self.dealt:
            numbers.append(self.dealt)
        order: list[int] = np.random.default_rng(numbers).permutation(length).tolist()
        return order


class Deal:
    """The rounds of a stream for its present processes, from their first sample on.

    Args:
        images: number of images in an epoch.
        layouts: all processes so far, the present ones last.
        seed, shuffle: of the stream; images in a block.
    """

    def __init__(
        self, images: int, layouts: Sequence[LoaderLayout], seed: int, shuffle: int
    ) -> None:
        self.whole = Places.of([(0, images)])
        self.count = layouts[-1].processes
        self._rests: list[Round] = []  # before the first whole epoch
        self._epoch = 0  # the first whole epoch
        for before, now in pairwise(layouts):
            self._continue(before, before.used(now.start), seed, shuffle)

    def _continue(self, layout: LoaderLayout, used: list[int], seed: int, shuffle: int) -> None:
        """Replace the rounds that processes have begun by what they left of them."""
        rests = []
        begun = 0
        while any(used):
            one = self.round(begun)
            share = one.share(layout.processes)
            intervals = list(places_left(one, layout.processes, used, seed, shuffle))
            left = Places.of(intervals)
            if len(left):
                rests.append(Round(one.epoch, left, one.dealt + 1))
            used = [max(0, number - share) for number in used]
            begun += 1
        whole = max(0, begun - len(self._rests))
        self._rests = rests + self._rests[begun:]
        self._epoch += whole

    def round(self, number: int) -> Round:
        """The round of this number: first the rests of epochs, then whole ones."""
        if number < len(self._rests):
            return self._rests[number]
        return Round(self._epoch + number - len(self._rests), self.whole)

    def find(self, position: int) -> tuple[int, int]:
        """Find a process's sample by its position: the round, and the place in its part."""
        for number, one in enumerate(self._rests):
            share = one.share(self.count)
            if position < share:
                return number, position
            position -= share
        epochs, place = divmod(position, len(self.whole) // self.count)
        return len(self._rests) + epochs, place


def places_left(
    one: Round, processes: int, used: Sequence[int], seed: int, shuffle: int
) -> Iterator[tuple[int, int]]:
    """Yield the intervals of a round's places that processes have not used.

    ``used`` are their samples since the beginning of the round.
    """
    share = one.share(processes)
    for index, samples in enumerate(used):
        begin = index * share
        block, inside = divmod(min(samples, share), shuffle)
        first = begin + block * shuffle
        if inside:
            # A block that was used in part, in its shuffled order.
            length = min(shuffle, share - block * shuffle)
            order = one.block_order(seed, block, index, processes, length)
            for place in order[inside:]:
                yield from one.places.part(first + place, first + place + 1)
            first += length
        yield from one.places.part(first, begin + share)
    yield from one.places.part(processes * share, len(one.places))


def classes_in_a_batch(batch: int, classes: float) -> float:
    """How many classes a batch has on average, of so many that are equally frequent."""
    return classes * (1.0 - (1.0 - 1.0 / classes) ** batch)


def describe_sorted(batch: int, in_a_shard: float, in_all: int, interleave: int) -> str | None:
    """Say what shards that are sorted by class do to a batch; None if that is little.

    Little is up to a tenth fewer classes in it than if all images were mixed.
    """
    mixed = classes_in_a_batch(batch, in_all)
    found = classes_in_a_batch(batch, min(in_all, max(1.0, in_a_shard * interleave)))
    if found > 0.9 * mixed:
        return None
    return (
        f"the shards are sorted by class: one has {in_a_shard:.1f} of {in_all} classes, so that a "
        f"batch of {batch} has about {found:.1f} of them, and {mixed:.1f} if all images were mixed"
    )
