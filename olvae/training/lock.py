"""A run is trained by one command at a time: a file in its folder says by which process, where, and since when."""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from olvae.config import ConfigError
from olvae.runs import Run

__all__ = ["RunLock"]

log = logging.getLogger("olvae.training")

PATIENCE_S = 2.0
"""How long a lock may have no content: it is created first, and then written."""


@dataclass(frozen=True)
class Holder:
    """A process that trains a run."""

    host: str
    pid: int
    since: str
    """When it took the lock, in ISO 8601."""
    started: str | None
    """When the process began, in the system's own words; None where the system does not tell."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Holds a run while the ``with`` block lasts, from :meth:`take` on; only the first process of a training has one.

    The lock is a file that is created if there is none, which every file system does for one process alone. A lock that
    a killed process of this machine left is taken over; of another machine nobody can know.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._text = ""

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None and _text_of(self._path) == self._text:
            self._path.unlink(missing_ok=True)

    def take(self, run: Run) -> None:
        """Take the lock of a run.

        Raises:
            ConfigError: another process has it, or may have it.
            OSError: the folder is not writable.
        """
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        me = Holder(socket.gethostname(), os.getpid(), since, _start_of(os.getpid()))
        text = json.dumps(asdict(me))
        while not _create(run.lock, text):
            self._clear(run)
        self._path, self._text = run.lock, text

    def _clear(self, run: Run) -> None:
        """Remove a lock that was left; returns too if the lock has gone."""
        text = _written(run.lock)
        if text is None:
            return
        holder = _holder(text)
        if holder is None:
            raise ConfigError(f"{run.path}: its lock can't be read: if nobody trains this run, remove {run.lock}")
        if holder.host != socket.gethostname():
            raise ConfigError(
                f"{run.path}: locked by {holder}; whether it still trains this run can't be seen from here: if it does "
                f"not, remove {run.lock}"
            )
        if _lives(holder):
            raise ConfigError(f"{run.path}: is being trained by {holder}: wait for its end, or stop it")
        aside = run.lock.with_name(f".partial-{uuid4().hex[:8]}")
        try:
            run.lock.rename(aside)
        except FileNotFoundError:  # somebody else was faster
            return
        if _text_of(aside) != text:  # somebody else was faster, and has taken it
            aside.rename(run.lock)
            return
        aside.unlink()
        log.warning("%s: the lock of %s was left when that process was killed, and is taken over", run.path, holder)


def _create(path: Path, text: str) -> bool:
    """Create a file with this text, whole at once; False if there is one."""
    partial = path.with_name(f".partial-{uuid4().hex[:8]}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: a kill between these two lines leaves a lock that can't be read
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _text_of(path: Path) -> str | None:
    """What is in a file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _written(path: Path) -> str | None:
    """As :func:`_text_of`, for a file that may be about to be written."""
    end = time.monotonic() + PATIENCE_S
    while (text := _text_of(path)) == "" and time.monotonic() < end:
        time.sleep(0.05)
    return text


def _holder(text: str) -> Holder | None:
    """The process that a lock names; None if it can't be read."""
    try:
        content: dict[str, Any] = json.loads(text)
        holder = Holder(**content)
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) and holder.pid > 0 else None


def _lives(holder: Holder) -> bool:
    """Whether a process of this machine is still there, and not another one that got its number."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    start = _start_of(holder.pid)
    return start is None or holder.started is None or start == holder.started


def _start_of(pid: int) -> str | None:
    """When a process began: ticks since a boot of the machine. Empty for one that has ended; None if Linux is not here
    to tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return "" if state in "ZX" else f"{boot} {fields[18]}"
