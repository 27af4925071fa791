"""Replace, count and log unreadable images; stop if their share is too large."""

import hashlib
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from olvae.files import counted, list_skipped, printable
from olvae.launcher import of_each, this_process

log = logging.getLogger("olvae.data")

REPLACEMENTS = 20  # number of other images that are tried in place of an unreadable one
FEW_FILES = 3  # unless the limit is 0, one unreadable file per 50 images is allowed, up to this
ERRORS_AT_A_TIME = 1000  # of a process, in one exchange with the others
SHARED_NAMES = 10  # unreadable files of other processes, which this one can name
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


def _digest(name: str, image: str = "") -> int:
    """Shorten a file's name, or an image's, to 64 bits, the same in all processes."""
    text = f"{name}\0{image}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass
class UnreadableImages:
    """All files that the loaders of a source could not read."""

    reasons: dict[str, str] = field(default_factory=dict)  # by file, of this process's files
    elsewhere: dict[str, str] = field(default_factory=dict)  # the first files of other processes
    # Digests of the files and of the lost images of all processes, as far as they were shared.
    files: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    # Digests of a file and of its lost image, or None, that the other processes do not have yet.
    unshared: list[tuple[int, int | None]] = field(default_factory=list)
    delivered: int = 0  # images that were read

    def list_files(self) -> str:
        """List the first files with their reasons, and count the others."""
        named = {**self.reasons, **self.elsewhere}
        return list_skipped(named.items(), len(self.files))

    def merge(self, errors: Iterable[tuple[int, int | None]], reasons: Mapping[str, str]) -> None:
        """Add what another process has met, or this one itself."""
        for file, image in errors:
            self.files.add(file)
            if image is not None:
                self.lost.add(image)
        for name, reason in reasons.items():
            if len(self.elsewhere) < SHARED_NAMES and name not in self.reasons:
                self.elsewhere.setdefault(name, reason)


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
        return len(self.unreadable.lost)

    def take(self, errors: Iterable[ReadError], delivered: int, world: int = 1) -> None:
        """Count a batch of this process, with ``delivered`` images, and the errors met before it.

        One of several processes never stops alone, because the others would wait for it: see
        :meth:`share`.

        Raises TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        # Log each file once; an image may be skipped again in each epoch, but is lost once.
        known = self.unreadable
        for error in errors:
            file = _digest(error.name)
            image = _digest(error.name, error.image) if error.lost else None
            new_file = file not in known.files
            new_image = image is not None and image not in known.lost
            if new_file:
                log.warning("skipped %s: %s", printable(error.name), printable(error.reason))
                known.reasons[error.name] = error.reason
            if world > 1 and (new_file or new_image):
                known.unshared.append((file, image))
            known.merge([(file, image)], {})
            self._skipped += error.lost

        # The other processes deliver about as many.
        self._delivered += delivered * world
        self.unreadable.delivered += delivered * world
        if world == 1:
            self._check()
        if self.epoch and self._delivered // self.epoch > self._epochs:
            self._epochs = self._delivered // self.epoch
            self.end_of_epoch()

    def share(self) -> None:
        """Add the counts of the other processes, if there are any. Collective: all raise or none.

        Raises TooManyUnreadableError: the share of unreadable images is above the limit.
        """
        if this_process()[1] == 1:
            return
        known = self.unreadable
        names = dict(islice(known.reasons.items(), SHARED_NAMES))
        waiting = True
        while waiting:
            # A bounded part of the errors that the others do not have; names come with the first.
            new = known.unshared[:ERRORS_AT_A_TIME]
            del known.unshared[:ERRORS_AT_A_TIME]
            parts = of_each((new, names, known.delivered, len(known.unshared)))
            for errors, reasons, _, _ in parts:
                known.merge(errors, reasons)
            names = {}

            # The same in all processes, so that all decide alike.
            known.delivered = max(delivered for *_, delivered, _ in parts)
            waiting = any(left for *_, left in parts)
        self._check()

    def end_of_epoch(self) -> None:
        """Log the number of images skipped since the last call, if any."""
        if self._skipped:
            images = counted(self._skipped, "image")
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
        if self.lost > few and self.lost > self.limit * read:
            raise TooManyUnreadableError(
                f"{self.lost} of {read} images can't be read, "
                f"more than data.params.max_unreadable = {self.limit:g}: "
                f"{self.unreadable.list_files()}"
            )
