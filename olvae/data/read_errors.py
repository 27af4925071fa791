"""Replace, count and log unreadable images; stop if their share is too large."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist

from olvae.files import list_skipped, printable

log = logging.getLogger("olvae.data")

REPLACEMENTS = 20  # number of other images that are tried in place of an unreadable one
T = TypeVar("T")
R = TypeVar("R")


class ReadError(NamedTuple):
    """A file, a shard or a part of one that could not be read."""

    name: str  # of the file
    reason: str
    image: str = ""  # which image of the file, if it holds several
    lost: bool = True  # whether an image is lost with it


class UnreadableImageError(ValueError):
    """A file is no picture, is broken, or has another number of channels."""

    def __init__(self, name: str, reason: str, image: str = "") -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())
        self.image = image

    def __str__(self) -> str:
        return f"{self.name}: not a readable image: {self.reason}"

    def read_error(self) -> ReadError:
        return ReadError(self.name, self.reason, self.image)


FEW_FILES = 3  # that may be unreadable among 150 images whatever the share is, 1 among 50


class TooManyUnreadableError(ValueError):
    """More images are unreadable than ``max_unreadable`` allows."""


def worker_death(error: BaseException) -> str | None:
    """Explain an error of torch, or of Python while it receives a batch, about a killed loader process; else None."""
    match = re.match(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+))?", str(error)
    )
    if match is not None:
        which = f" ({match[1]}) was killed" + (f" ({match[2]})" if match[2] else "")
    elif isinstance(error, ConnectionError | EOFError) and any(
        "multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__)
    ):
        which = " was killed"
    else:  # torch raises it in a signal's handler, so within any code: inspect's raises a TypeError for it
        return None if error.__context__ is None else worker_death(error.__context__)
    return (
        f"a loader process{which}, by the system perhaps because memory ran out: lower data.params.num_workers or "
        "data.params.batch_size"
    )


def read_or_replace(
    first: T, others: Sequence[T], seed: Sequence[int], read: Callable[[T, list[ReadError]], R]
) -> tuple[R, tuple[ReadError, ...]]:
    """Read ``first`` or, if that fails, one of ``others``, drawn with the sample's seed; returns the errors as well.

    Batches keep their size, and the samples after it stay the same. ``read`` gets the list of errors, to add those that
    it can read past. Raises UnreadableImageError: none of :data:`REPLACEMENTS` others can be read either.
    """
    errors: list[ReadError] = []
    item = first
    for attempt in range(REPLACEMENTS + 1):
        try:
            return read(item, errors), tuple(errors)
        except UnreadableImageError as error:
            errors.append(error.read_error())
        item = others[int(np.random.default_rng((*seed, 1, attempt)).integers(len(others)))]
    raise UnreadableImageError(
        errors[0].name, f"{errors[0].reason}; nor are {REPLACEMENTS} others drawn in its place"
    )


@dataclass
class UnreadableImages:
    """All files that the loaders of a source could not read."""

    reasons: dict[str, str] = field(default_factory=dict)  # by file
    images: set[tuple[str, str]] = field(default_factory=set)  # lost ones, each by file and image
    delivered: int = 0  # images that were read


@dataclass
class ReadErrors:
    """Counts the read errors of one loader."""

    epoch: (
        int | None
    )  # images in an epoch of training, over all processes; None if unknown, or for a loader that ends
    images: int | None  # all images of the source; None if unknown
    limit: float  # share of those that may be unreadable
    purpose: str  # of the loader, a word for messages
    unreadable: UnreadableImages  # shared by the source's loaders
    _delivered: int = field(default=0, init=False)
    _epochs: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)

    @property
    def lost(self) -> int:
        """Images that could not be read, each counted once."""
        return len(self.unreadable.images)

    def take(self, errors: Iterable[ReadError], delivered: int, world: int = 1) -> None:
        """Count a batch of this process, with ``delivered`` images, and the errors on the way to it.

        One of several processes never stops alone, because the others would wait for it: see :meth:`share`.

        Raises TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        for error in errors:
            if error.name not in self.unreadable.reasons:
                log.warning("skipped %s: %s", printable(error.name), printable(error.reason))
                self.unreadable.reasons[error.name] = error.reason
            if error.lost:
                self._skipped += 1
                self.unreadable.images.add((error.name, error.image))
        self._delivered += delivered * world
        self.unreadable.delivered += delivered * world
        if world == 1:
            self._check()
        if self.epoch and self._delivered // self.epoch > self._epochs:
            self._epochs = self._delivered // self.epoch
            self.end_of_epoch()

    def share(self) -> None:
        """Add the counts of the other processes. Collective: all raise or none.

        Raises TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        parts = [self.unreadable] * dist.get_world_size()
        dist.all_gather_object(parts, self.unreadable)
        for part in parts:
            self.unreadable.reasons.update(part.reasons)
            self.unreadable.images.update(part.images)
        self.unreadable.delivered = max(
            part.delivered for part in parts
        )  # the same in all, so that all decide alike
        self._check()

    def end_of_epoch(self) -> None:
        """Log the number of images skipped since the last call, if any."""
        if self._skipped:
            images = f"{self._skipped} image{'s' if self._skipped > 1 else ''}"
            log.warning(
                "%s: %s skipped%s", self.purpose, images, " in this epoch" if self.epoch else ""
            )
        self._skipped = 0

    def _check(self) -> None:
        read = self.images or max(
            self.unreadable.delivered + self.lost, round(1 / self.limit) if self.limit else 1
        )
        few = min(FEW_FILES, (self.images or 0) // 50) if self.limit else 0
        if self.lost > max(self.limit * read, few):
            raise TooManyUnreadableError(
                f"{self.lost} of {read} images can't be read, more than data.params.max_unreadable = {self.limit:g}: "
                f"{list_skipped(self.unreadable.reasons.items())}"
            )
