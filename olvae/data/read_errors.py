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
FEW_FILES = 3  # unless the limit is 0, one unreadable file per 50 images is allowed, up to this
_T = TypeVar("_T")
_R = TypeVar("_R")


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


class TooManyUnreadableError(ValueError):
    """More images are unreadable than ``max_unreadable`` allows."""


FEWER_LOADERS = "lower data.params.num_workers or data.params.batch_size"


def worker_death(error: BaseException, remedy: str = FEWER_LOADERS) -> str | None:
    """Explain an error that a killed loader process caused; None for other errors.

    torch raises it, or Python while it receives a batch.
    """
    match = re.match(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+))?", str(error)
    )
    if match is not None:
        which = f" ({match[1]}) was killed"
        if match[2]:
            which += f" ({match[2]})"
    elif isinstance(error, ConnectionError | EOFError) and any(
        "multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__)
    ):
        which = " was killed"
    elif error.__context__ is not None:
        # torch raises in a signal's handler, so within any code, which may raise something else.
        return worker_death(error.__context__, remedy)
    else:
        return None
    return f"a loader process{which}, by the system perhaps because memory ran out: {remedy}"


def read_or_replace(
    first: _T, others: Sequence[_T], seed: Sequence[int], read: Callable[[_T, list[ReadError]], _R]
) -> tuple[_R, tuple[ReadError, ...]]:
    """Read ``first`` or, if that fails, one of ``others``, drawn with the sample's seed.

    So batches keep their size, and later samples stay the same. ``read`` gets the list of errors,
    to add those that it can read past. Returns what was read, and all errors.

    Raises UnreadableImageError: none of :data:`REPLACEMENTS` others can be read either.
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

    # images in an epoch of training, over all processes; None if unknown, or for a loader that ends
    epoch: int | None
    images: int | None  # all images of the source; None if unknown
    limit: float  # share of all images that may be unreadable
    purpose: str  # of the loader, as messages name it
    unreadable: UnreadableImages  # shared by the source's loaders
    _delivered: int = field(default=0, init=False)
    _epochs: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)

    @property
    def lost(self) -> int:
        """Images that could not be read, each counted once."""
        return len(self.unreadable.images)

    def take(self, errors: Iterable[ReadError], delivered: int, world: int = 1) -> None:
        """Count a batch of this process, with ``delivered`` images, and the errors met before it.

        One of several processes never stops alone, because the others would wait for it: see
        :meth:`share`.

        Raises TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        # Log each file once; an image may be skipped again in each epoch, but is lost once.
        for error in errors:
            if error.name not in self.unreadable.reasons:
                log.warning("skipped %s: %s", printable(error.name), printable(error.reason))
                self.unreadable.reasons[error.name] = error.reason
            if error.lost:
                self._skipped += 1
                self.unreadable.images.add((error.name, error.image))

        # The other processes deliver about as many.
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
        # The same in all processes, so that all decide alike.
        self.unreadable.delivered = max(part.delivered for part in parts)
        self._check()

    def end_of_epoch(self) -> None:
        """Log the number of images skipped since the last call, if any."""
        if self._skipped:
            images = f"{self._skipped} image{'s' if self._skipped > 1 else ''}"
            when = " in this epoch" if self.epoch else ""
            log.warning("%s: %s skipped%s", self.purpose, images, when)
        self._skipped = 0

    def _check(self) -> None:
        read = self.images
        if not read:
            # As many as were read, but enough for the limit to allow a first one to be lost.
            least = round(1 / self.limit) if self.limit else 1
            read = max(self.unreadable.delivered + self.lost, least)
        few = min(FEW_FILES, (self.images or 0) // 50) if self.limit else 0
        if self.lost > max(self.limit * read, few):
            raise TooManyUnreadableError(
                f"{self.lost} of {read} images can't be read, "
                f"more than data.params.max_unreadable = {self.limit:g}: "
                f"{list_skipped(self.unreadable.reasons.items())}"
            )
