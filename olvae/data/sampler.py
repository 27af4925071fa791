"""The order of training samples as a function of the seed: endless, resumable at any sample, split by rank."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

__all__ = ["Draw", "StreamSampler"]


class Draw(NamedTuple):
    """One sample of the stream: which image, and the seed of its augmentation."""

    image: int
    seed: tuple[int, int]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


class StreamSampler(Sampler[Draw]):
    """Epoch after epoch of shuffled indices, without end.

    The p-th sample of the stream, counted over all ranks, depends on the seed and on p alone: every image
    comes once per epoch, in an order of its own for each epoch, and its augmentation is seeded by (seed, p).
    So neither workers, nor ranks, nor a restart at ``start`` change what the p-th sample is. Each rank takes
    every world-size-th sample.

    Args:
        length: number of images.
        seed: of order and augmentation.
        start: the position in the stream, over all ranks, to begin at.
        every: take only every so-manieth sample from there; by default as many as there are ranks, from the
            rank's own on.
    """

    def __init__(self, length: int, seed: int, start: int = 0, every: int | None = None) -> None:
        if length < 1:
            raise ValueError("a stream needs at least one image")
        self.length = length
        self.seed = seed
        self.start = start
        self.every = every

    def __iter__(self) -> Iterator[Draw]:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        rank, every = (rank, world) if self.every is None else (0, self.every)
        position = self.start + rank
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.length)
            yield Draw(int(order[position % self.length]), (self.seed, position))
            position += every
