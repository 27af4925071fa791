"""What could not be read: named once, counted, and too much when it is above a set share."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist

__all__ = ["ReadError", "ReadErrors", "TooManyUnreadableError", "UnreadableImageError", "UnreadableImages"]


log = logging.getLogger("olvae.data")

NAMED = 10  # files that the last message names


class ReadError(NamedTuple):
    """A file, a shard or a part of one that could not be read.

    Args:
        name: of the file.
        reason: in a few words.
        image: which image of it, where a file holds several.
        lost: whether an image is lost with it; a shard without its end mark may be whole all the same.
    """

    name: str
    reason: str
    image: str = ""
    lost: bool = True


class TooManyUnreadableError(ValueError):
    """More than the set share of the images can't be read."""


@dataclass
class UnreadableImages:
    """What a source's loaders could not read, together: reasons by file, the images that are lost, and the others."""

    reasons: dict[str, str] = field(default_factory=dict)
    images: set[tuple[str, str]] = field(default_factory=set)
    delivered: int = 0


class ReadErrors:
    """The account of one loader.

    Args:
        epoch: images in an epoch of training, over all processes; None if it is not known, or for a loader
            that ends by itself.
        images: all images of the source; None if it is not known.
        limit: share of those that may be unreadable.
        what: the loader is for, in a word for messages.
        losses: those of the source's loaders so far.
    """

    def __init__(
        self, epoch: int | None, images: int | None, limit: float, what: str, losses: UnreadableImages
    ) -> None:
        self.epoch = epoch
        self.images = images
        self.limit = limit
        self.what = what
        self.losses = losses
        self._delivered = 0
        self._epochs = 0
        self._skipped = 0

    @property
    def lost(self) -> int:
        """Images that could not be read, each counted once."""
        return len(self.losses.images)

    def take(self, faults: Iterable[ReadError], delivered: int, world: int = 1) -> None:
        """Count a batch of this process: what it met, and how many images there were in it.

        Args:
            world: how many processes read the same images, each its own share. If they are several, no one of them
                stops alone, for the others would wait for it: see :meth:`share`.

        Raises:
            TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        for fault in faults:
            if fault.name not in self.losses.reasons:
                log.warning("skipped %s: %s", fault.name, fault.reason)
                self.losses.reasons[fault.name] = fault.reason
            if fault.lost:
                self._skipped += 1
                self.losses.images.add((fault.name, fault.image))
        self._delivered += delivered * world
        self.losses.delivered += delivered * world
        if world == 1:
            self._check()
        if self.epoch and self._delivered // self.epoch > self._epochs:
            self._epochs = self._delivered // self.epoch
            self.end_of_epoch()

    def share(self) -> None:
        """Add what the other processes met. All have to call this at the same point, and all raise or none.

        Raises:
            TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        parts = [self.losses] * dist.get_world_size()
        dist.all_gather_object(parts, self.losses)
        for part in parts:
            self.losses.reasons.update(part.reasons)
            self.losses.images.update(part.images)
        self.losses.delivered = max(part.delivered for part in parts)  # the same in all, so that all decide alike
        self._check()

    def end_of_epoch(self) -> None:
        """Say how many were skipped since the last one, if any were."""
        if self._skipped:
            images = f"{self._skipped} image{'s' if self._skipped > 1 else ''}"
            log.warning("%s: %s skipped%s", self.what, images, " in this epoch" if self.epoch else "")
        self._skipped = 0

    def _check(self) -> None:
        read = self.images or max(self.losses.delivered + self.lost, round(1 / self.limit) if self.limit else 1)
        if self.lost > self.limit * read:
            names = [f"{name} ({reason})" for name, reason in self.losses.reasons.items()]
            more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise TooManyUnreadableError(
                f"{self.lost} of {read} images can't be read, more than max_unreadable = {self.limit:g}: "
                f"{', '.join(names[:NAMED])}{more}"
            )


class UnreadableImageError(ValueError):
    """A file that holds no picture, a broken one, or one with another number of channels."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: not a readable image: {self.reason}"
