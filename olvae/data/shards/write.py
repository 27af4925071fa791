"""Write shards one by one into a folder; after a kill at any moment the same command continues."""

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import ShardRecord
from olvae.data.shards.offsets import KIND, OFFSETS, TAR_BLOCK
from olvae.files import (
    ON_WINDOWS,
    atomic_write,
    file_sha256,
    lock_file,
    reason,
    remove_partials,
    write_json,
)
from olvae.launcher import gather, this_process

log = logging.getLogger(__name__)

# The lock's file, in the state; a part's has its first and last number behind.
LOCK = "lock"

# Seconds to wait for the lock: worker processes of a killed run need a moment to notice.
LOCK_S = 5.0


class WebDatasetSample(NamedTuple):
    """The files of one image, by extension, in the order in which they are stored under ``key``."""

    key: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class FinishedShard:
    """The description of a shard, written once its file is in place."""

    record: ShardRecord  # a shard without images has no file
    unreadable: Sequence[ReadError] = ()  # images of the source that were left out
    details: Mapping[str, Any] = field(default_factory=dict)  # the caller's, as JSON


@dataclass(frozen=True)
class ResumableShards:
    """Shards ``000000.tar``, ``000001.tar``, ... in a folder, written with interruptions.

    A folder inside it, the state, holds the plan (everything that the shards' bytes depend on), a
    JSON file about each finished shard, and half-written files. A shard is moved to its place when
    it is complete, and only then described. Any process may write any shard; no two should write
    the same one. So may commands that know nothing of each other, if each has a ``part``.
    """

    folder: Path  # made by :meth:`begin`
    state: str  # name of the folder inside it
    part: range | None = None  # numbers that this command writes, while others write others

    def path(self, number: int) -> Path:
        return self.folder / shard_name(number)

    @property
    def alone(self) -> bool:
        """Whether no other process may be writing into the folder, while this one has its lock."""
        return self.part is None and this_process()[1] == 1

    def any_stored(self) -> bool:
        """Whether a shard is in its place already."""
        return any(self.folder.glob("*.tar"))

    def check(self, plan: Mapping[str, Any]) -> None:
        """Raise ConfigError if shards of another plan are finished, or the folder has other files.

        ``plan["options"]`` is a mapping, whose values the message shows; it names other entries,
        such as ``images``, without their values.
        """
        others = self.folder.is_dir() and any(
            path.name != self.state for path in self.folder.iterdir()
        )
        # The plan comes after the listing: another process may be writing both.
        path = self._state / "plan.json"
        if not path.is_file():
            if others:
                raise ConfigError(
                    f"`out` {self.folder}: has other files already: name a new or empty folder, "
                    "or one that this command began"
                )
            return

        # Differences in words; other entries may depend on the options, so these come first.
        begun = json.loads(path.read_text(encoding="utf-8"))
        old = begun["options"]
        changes = [
            f"{name} {old.get(name)} (now {value})"
            for name, value in plan["options"].items()
            if old.get(name) != value
        ]
        if not changes:
            entries = {**begun, **plan}
            changes = [f"other {name}" for name in entries if begun.get(name) != plan.get(name)]
        finished = any(self._state.glob("[0-9]*.json")) or self.any_stored()
        # Another command may be at work on its part of the same plan.
        if changes and (finished or self.part is not None):
            raise ConfigError(
                f"`out` {self.folder}: was begun with {', '.join(changes)}: give the same options "
                "and images to continue, name another folder, or remove this one to start again"
            )

    def begin(self, plan: Mapping[str, Any]) -> None:
        """:meth:`check`, remove half-written files of a killed run, then write the plan."""
        self.check(plan)
        if self.alone:
            self.remove_partials()
        self._state.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            if self.part is not None:
                # Parts may begin at once: one by one, so that each finds the plan of the first.
                file = held.enter_context((self._state / "plan.lock").open("a", encoding="utf-8"))
                with suppress(OSError):
                    lock_file(file, LOCK_S)
                self.check(plan)
            write_json(plan, self._state / "plan.json")

    @contextmanager
    def locked(self, command: str) -> Iterator[None]:
        """Hold the folder's lock; the first process takes it, and the others wait until it has it.

        Commands with parts that do not overlap hold locks of their own. Raise ConfigError if
        another run, or its child processes, have it for too long; without locks only warn. If the
        body raises before the first shard is in its place, remove the state, but not the folder.
        """
        with ExitStack() as held:
            # Windows removes no open file: the lock goes last, once it is closed.
            if ON_WINDOWS:
                held.callback(self.remove_state, lock_alone=True)

            # One lock for all processes of the run: rank 0 takes it.
            if this_process()[0] == 0:
                self._state.mkdir(parents=True, exist_ok=True)
                place = self._state / lock_name(self.part)
                file = held.enter_context(place.open("a", encoding="utf-8"))
                try:
                    lock_file(file, LOCK_S)
                    # Nobody may hold a lock of some of these shards: of two commands that begin at
                    # once, one at least finds the other's.
                    for other in self._state.glob(f"{LOCK}*"):
                        if other != place and overlaps(other.name, self.part):
                            with other.open("a", encoding="utf-8") as theirs:
                                lock_file(theirs, LOCK_S)
                except BlockingIOError as error:
                    raise ConfigError(
                        f"`out` {self.folder}: another `{command}` is at work there"
                    ) from error
                except OSError as error:
                    log.warning(
                        "%s: no lock here (%s): let nothing else write there",
                        self.folder,
                        reason(error),
                    )
            # All wait here for the lock.
            gather(None)

            # The folder's user; an interrupted first shard is nothing to continue from.
            try:
                yield
            except BaseException:
                # Another process may have begun a shard.
                begun = self.any_stored() or any(self._state.glob(".partial-*"))
                if self.alone and not begun:
                    shutil.rmtree(self._state, ignore_errors=True)
                raise

    def finished(self, number: int) -> FinishedShard | None:
        """Read the description of a shard, if it is finished and its file has the right size."""
        description = self._description(number)
        if not description.is_file():
            return None
        content = json.loads(description.read_text(encoding="utf-8"))
        record = ShardRecord(**content["record"])
        path = self.path(number)
        if record.images and not (path.is_file() and path.stat().st_size == record.bytes):
            return None
        unreadable = [ReadError(*error) for error in content["unreadable"]]
        return FinishedShard(record, unreadable, content["details"])

    def write(
        self,
        number: int,
        samples: Iterable[WebDatasetSample | ReadError],
        details: Callable[[], Mapping[str, Any]] = dict,
    ) -> FinishedShard:
        """Write a shard, the same bytes for the same samples; then call ``details``."""
        offsets: list[int] = []  # where each image begins, in blocks
        unreadable: list[ReadError] = []
        path = self.path(number)
        remove_partials(self._left.pop(path.name, ()))

        # The shard, half-written in the state until it is complete.
        with atomic_write(path, self._state) as partial:
            with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
                for sample in samples:
                    if isinstance(sample, ReadError):
                        unreadable.append(sample)
                        continue
                    offsets.append(archive.offset // TAR_BLOCK)
                    for extension, content in sample.files.items():
                        member = tarfile.TarInfo(f"{sample.key}.{extension}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            size = partial.stat().st_size if offsets else 0
            record = ShardRecord(len(offsets), size, file_sha256(partial))

        # Its description, which makes it finished; without images it has no file.
        if not offsets:
            path.unlink()
        with atomic_write(self._offsets(number)) as partial:
            partial.write_bytes(np.array(offsets, KIND).tobytes())
        shard = FinishedShard(record, unreadable, details())
        write_json(asdict(shard), self._description(number))
        return shard

    def write_offsets(self, numbers: Iterable[int]) -> bool:
        """Join the offsets of finished shards, beside their index; False if some are missing.

        A run that was begun before November 2026 has none.
        """
        files = [self._offsets(number) for number in sorted(numbers, key=self.path)]
        if not all(file.is_file() for file in files):
            return False
        with atomic_write(self.folder / OFFSETS) as partial, partial.open("wb") as joined:
            for file in files:
                joined.write(file.read_bytes())
        return True

    def forget(self, number: int) -> None:
        """Mark a shard as unfinished, so that the next run writes it again."""
        self._description(number).unlink(missing_ok=True)

    def remove_partials(self) -> None:
        """Remove half-written files of a killed run; no other process may be writing."""
        for folder in (self.folder, self._state):
            remove_partials(folder.glob(".partial-*"))

    def remove_state(self, lock_alone: bool = False) -> None:
        """Remove the state, once the shards are complete; or only if nothing but a lock is left."""
        if lock_alone and any(path.name != LOCK for path in self._state.glob("*")):
            return
        shutil.rmtree(self._state, ignore_errors=True)

    @cached_property
    def _left(self) -> dict[str, list[Path]]:
        """Half-written files of a killed run by the names of their shards, when first asked for.

        A state with 100,000 descriptions takes a tenth of a second to list.
        """
        left: dict[str, list[Path]] = {}
        for path in self._state.glob(".partial-*"):
            left.setdefault(path.name.rpartition("-")[2], []).append(path)
        return left

    @property
    def _state(self) -> Path:
        return self.folder / self.state

    def _description(self, number: int) -> Path:
        return self._state / f"{number:06d}.json"

    def _offsets(self, number: int) -> Path:
        return self._state / f"{number:06d}.offsets"


def lock_name(part: range | None) -> str:
    return LOCK if part is None else f"{LOCK}-{part[0]}-{part[-1]}"


def overlaps(lock: str, part: range | None) -> bool:
    """Whether a lock, by its :func:`lock_name`, is of some of a part's shards."""
    ends = [int(end) for end in lock.split("-")[1:]]
    return part is None or not ends or (ends[0] <= part[-1] and part[0] <= ends[1])


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"
