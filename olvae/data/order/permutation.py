"""The order in which images are drawn by number: listed, or computed in no memory for very many."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_LISTED = 2**20  # images in an epoch whose order is an array

WORD = 2**64 - 1
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its products spread over all bits
ROUNDS = 6


class Permutation:
    """A permutation of 0 to ``length`` - 1, chosen by a seed; ``permutation[i]`` is computed.

    It encrypts i with a Feistel network: a number of 2 h bits is halved, and each round adds to one
    half (by xor) a scrambled copy of the other, which can be undone, so that no two numbers meet.
    A result of ``length`` or more is encrypted again, at most three times on average, because 2^2h
    is the next such power. That keeps it a permutation: these walks lie on the network's cycles.
    """

    def __init__(self, length: int, seed: Sequence[int]) -> None:
        self.length = length
        self._half = max(1, -(-(length - 1).bit_length() // 2))
        keys = np.random.default_rng(seed).integers(2**64, size=ROUNDS, dtype=np.uint64)
        self._keys: list[int] = keys.tolist()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"{index} of {self.length}")
        half = self._half
        low = (1 << half) - 1
        shift = 64 - half
        while True:
            left = index >> half
            right = index & low
            for key in self._keys:
                # Two products, with a shift between them, let every bit change the upper ones.
                mixed = (right + key) * ODD & WORD
                mixed = (mixed ^ mixed >> 32) * ODD & WORD
                left, right = right, left ^ mixed >> shift
            index = left << half | right
            if index < self.length:
                return index


def draws(
    seed: int, length: int, positions: Iterable[int], listed: bool = False
) -> Iterator[tuple[int, int]]:
    """Yield positions of an endless stream of ``length`` images, each with its image's number.

    The positions ascend. Every image comes once per epoch, and each epoch has another order. If the
    augmentation is seeded by (seed, p), the p-th sample depends on the seed and on p alone.
    More than :data:`MOST_LISTED` images are not listed in their order, which takes 8 bytes an image
    in each loader process, but computed one by one, unless ``listed`` asks for the old order.
    """
    epoch: int | None = None
    order: NDArray[np.int64] | Permutation
    for position in positions:
        now, place = divmod(position, length)
        if now != epoch:
            epoch = now
            if length > MOST_LISTED and not listed:
                order = Permutation(length, (seed, epoch, 1))
            else:
                order = epoch_order(seed, epoch, length)
        yield position, int(order[place])


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of ``length`` images or shards, another one for each epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(length)
