"""The order of training samples as a function of the seed: endless, resumable at any sample, shared among processes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["LoaderProcess", "draws", "epoch_order"]


@dataclass(frozen=True)
class LoaderProcess:
    """One of a rank's loader processes, and which samples of a stream are its own.

    A DataLoader takes whole batches from its workers in turn, so own sample s of worker w is in batch
    (s // batch_size) * workers + w of its rank; ranks take every ``world``-th sample.

    Args:
        worker: below ``workers``, the number of loader processes of each rank.
        rank: below ``world``, the number of ranks.
        batch_size: samples that are taken from a worker at a time.
        offset: of the first sample in the stream, where training begins between two batches.
    """

    worker: int = 0
    workers: int = 1
    rank: int = 0
    world: int = 1
    batch_size: int = 1
    offset: int = 0

    @property
    def index(self) -> int:
        """This process's number among all processes of all ranks, below :attr:`count`."""
        return self.worker * self.world + self.rank

    @property
    def count(self) -> int:
        return self.workers * self.world

    def positions(self, first: int = 0) -> Iterator[int]:
        """Positions in the stream, over all ranks, of this process's samples from its own ``first`` on."""
        for own in count(first):
            batch = own // self.batch_size * self.workers + self.worker
            yield self.offset + (batch * self.batch_size + own % self.batch_size) * self.world + self.rank

    def resumed(self, start: int) -> tuple["LoaderProcess", int]:
        """Which process's part this one takes when ``start`` samples over all ranks are done, and that one's position.

        A DataLoader begins with worker 0, which has to go on with the batch whose turn it is.
        """
        done, offset = divmod(start, self.batch_size * self.world)
        worker = (self.worker + done) % self.workers
        batches = len(range(worker, done, self.workers))
        return replace(self, worker=worker, offset=offset), batches * self.batch_size


def draws(seed: int, length: int, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Positions, which ascend, of an endless stream of ``length`` images, each with the number of the image there.

    Every image comes once per epoch, in an order of its own for each epoch. With its augmentation seeded by (seed, p),
    the p-th sample depends on the seed and on p alone.
    """
    epoch, order = -1, epoch_order(seed, 0, 0)
    for position in positions:
        if position // length != epoch:
            epoch = position // length
            order = epoch_order(seed, epoch, length)
        yield position, int(order[position % length])


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of ``length`` images or shards, another one for each epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(length)
