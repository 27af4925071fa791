"""Write and lock files as the system can, know its signals, print names and errors on one line."""

import contextlib
import difflib
import errno
import glob
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, cast
from uuid import uuid4

log = logging.getLogger("olvae")

# Extensions of files of weights, the preferred one first.
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Seconds to wait, on Windows, for another process that reads a file which is to be replaced.
READER_S = 10.0

# The byte of a file that a lock takes on Windows: behind the text, which others could not read.
LOCKED_BYTE = 2**30

# Ends the name of a folder that gives way to a new one.
OLD = ".old"


# Signals that end a command, of those that this system has, as messages name them. Windows has
# neither SIGHUP nor SIGUSR1, and other systems have no SIGBREAK: Ctrl-Break, or a closed console.
SIGNALS: dict[int, str] = {
    getattr(signal, name): "Ctrl-C" if name == "SIGINT" else name
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
    if hasattr(signal, name)
}

# Seconds in which further signals are the first one's echo: torchrun forwards a terminal's Ctrl-C
# to processes that have it already, and schedulers repeat theirs.
ECHO_S = 1.0

# Python has this signal on Windows alone.
ON_WINDOWS = "SIGBREAK" in SIGNALS.values()

# Errors of a disk that say nothing of the file: full, over a quota or a limit, read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def atomic_write(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the file to ``path`` at the end.

    After an exception the file is removed instead. It is on the disk before it replaces an older
    one, because the machine may crash as well as the process. The temporary name ends with the name
    of ``path``, so that libraries recognise its extension. It is a new one each time, so that
    several processes may write the same file at once. It lies beside ``path``, or in ``folder``.

    OSError names ``path`` if the disk is full or the like, also where a library hides the reason.
    """
    partial = (folder or path.parent) / f".partial-{uuid4().hex[:8]}-{path.name[-50:]}"
    try:
        yield partial
        # Windows writes back only what is open for writing.
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        until = time.monotonic() + (READER_S if ON_WINDOWS else 0)
        while partial.exists():
            try:
                partial.replace(path)
            except PermissionError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    except RuntimeError as error:
        # A library may hide the system's reason: a few more bytes meet the same obstacle.
        try:
            if partial.exists():
                with partial.open("ab") as more:
                    more.write(bytes(2**16))
                    os.fsync(more.fileno())
        except OSError as cause:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def file_state(path: str | Path) -> str:
    """Return a file's size and time as text, which changes when the file is written to."""
    try:
        state = Path(path).stat()
    except (OSError, ValueError):
        # ValueError: a name that no file can have.
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"


def remove_partials(partials: Iterable[Path], idle_s: float = 0.0) -> None:
    """Remove temporary files of :func:`atomic_write`, ``.partial-*``, that a killed process left.

    Files that were written to in the last ``idle_s`` seconds stay, as another process may be at
    work.
    """
    until = time.time() - idle_s
    for partial in partials:
        # FileNotFoundError: its process has moved it into place by now.
        with contextlib.suppress(FileNotFoundError):
            # Without idle_s the time is not asked: clocks may jump back.
            if partial.is_file() and (not idle_s or partial.stat().st_mtime <= until):
                partial.unlink()


@contextmanager
def folder_beside(place: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``place``, and remove it at the end.

    Folders that killed processes of this machine left are removed first, after :func:`put_back`. A
    folder's name has the machine and the process: ``.PLACE.HOST~PROCESS-RANDOM``.
    """
    put_back(place)
    for left in _left_beside(place):
        shutil.rmtree(left, ignore_errors=True)
    prefix = f"{_beside(place)}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=nearest_folder(place.parent)) as folder:
        yield Path(folder)


def replace_folder(new: Path, place: Path) -> None:
    """Move a new folder or file to ``place``; a folder that is there is moved beside ``new``.

    If it fails, the old folder is moved back; after a kill, :func:`put_back` does that.
    """
    old = new.with_name(place.name + OLD)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if place.is_dir():
            place.replace(old)
        new.replace(place)
    except (OSError, KeyboardInterrupt):
        if old.exists() and not place.exists():
            old.replace(place)
        raise


def put_back(place: Path) -> None:
    """Move a folder to its place if a process was killed after it had been moved away.

    It may be another place of this name: with a new ``place.parent``, the folder above is searched.
    """
    for left in _left_beside(place):
        home = left.parent / place.name
        old = left / (place.name + OLD)
        # An empty folder there gives way.
        taken = home.is_file() or (home.is_dir() and any(home.iterdir()))
        if old.is_dir() and not taken:
            if home.is_dir():
                home.rmdir()
            old.replace(home)


def _beside(place: Path) -> str:
    """Begin the names of temporary folders beside a place, before the process."""
    return f".{place.name[-100:]}.{socket.gethostname()}~"


def _left_beside(place: Path) -> Iterator[Path]:
    """Find temporary folders beside a place that killed processes of this machine left."""
    own = _beside(place)
    for left in nearest_folder(place.parent).glob(f"{glob.escape(own)}*"):
        process = left.name.removeprefix(own).partition("-")[0]
        if not process.isdigit():
            continue
        if not is_running(int(process)):
            yield left


def is_running(process: int) -> bool:
    """Whether a process of this machine, of any user, has this number."""
    if ON_WINDOWS:
        # There, os.kill would send Ctrl-C.
        psutil: Any = importlib.import_module("psutil")
        return bool(psutil.pid_exists(process))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is another user's.
        return True
    return True


def lock_file(file: TextIO, patience: float = 0.0) -> None:
    """Lock an open file until it is closed; wait up to ``patience`` seconds for another process.

    BlockingIOError if another process still holds it then, OSError on a file system without locks.
    """
    system: Any = importlib.import_module("msvcrt" if ON_WINDOWS else "fcntl")
    held = PermissionError if ON_WINDOWS else BlockingIOError
    until = time.monotonic() + patience
    while True:
        try:
            if not ON_WINDOWS:
                system.flock(file, system.LOCK_EX | system.LOCK_NB)
            else:
                file.seek(LOCKED_BYTE)
                system.locking(file.fileno(), system.LK_NBLCK, 1)
            return
        except held as error:
            if time.monotonic() >= until:
                raise BlockingIOError(error.errno, error.strerror) from error
            time.sleep(min(0.2, patience))


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a file of JSON, atomically; ValueError for a number that is not finite."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class _SilentAfterError:
    """A stream of text that is silent, instead of an error, once it can't be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BlockingIOError:
            # A non-blocking pipe is full: this text is lost, and later ones may find room.
            pass
        except OSError:
            self._silence()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Send what follows to nowhere, with Python's last flush of the stream."""
        # OSError: a stream without a descriptor, which then fails in silence at each write.
        with contextlib.suppress(OSError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def unread_output() -> Iterator[None]:
    """Keep working where nobody reads the output, as after ``| head`` or in a closed terminal.

    Standard output and standard error are silent from the first error on.
    """
    before = sys.stdout, sys.stderr
    ours = [stream and cast(TextIO, _SilentAfterError(stream)) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in filter(None, ours):
            stream.flush()
        # Another program's stream, set in between, stays.
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]


def check_folder(folder: Path) -> Path:
    """Check, before long work, that files can be written into a folder; else raise OSError.

    The folder may be a new one.
    """
    place = nearest_folder(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{folder}: results need a folder, and {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: {place} is not writable: name another folder")
    return folder


def nearest_folder(folder: Path) -> Path:
    """Return the folder itself, or the nearest of its parents that exists, which may be a file."""
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """After an exception, remove the folder and its parents, as far as they are new and empty."""
    place = folder.absolute()
    before = nearest_folder(place)
    try:
        yield
    except BaseException:
        # OSError: a folder that has something in it.
        with contextlib.suppress(OSError):
            for path in (place, *place.parents):
                if before in path.parents and path.exists():
                    path.rmdir()
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def lines_sha256(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines, such as the names and sizes of files, in hexadecimal."""
    text = "".join(f"{line}\n" for line in lines)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# Names that no file has on Windows: with characters that it reserves, and of devices.
RESERVED = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)( *\..*)?", re.IGNORECASE)


def safe_path(key: str) -> PurePosixPath:
    """Turn an image's key into a path below a folder; ValueError for one outside, or no name.

    On Windows, characters that no name has there become %3a, and con becomes %con.
    """
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(
            f"the key {key[:60]!r} leads out of the folder of the images: do not trust its shard"
        )
    if not ON_WINDOWS:
        return path
    parts = []
    for part in path.parts:
        name = RESERVED.sub(lambda found: f"%{ord(found[0]):02x}", part)
        parts.append(f"%{name}" if DEVICES.fullmatch(name) else name)
    return PurePosixPath(*parts)


def nearest_path(path: str | Path, others: Iterable[str] = ()) -> str:
    """End a message on a missing path with the most similar name beside it, or of ``others``."""
    path = Path(path)
    try:
        names = [*(other.name for other in path.parent.iterdir()), *others]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if not close or not path.name:
        return ""
    return f"; did you mean {printable(str(path.with_name(close[0])))}?"


def reason(error: BaseException) -> str:
    """Return an error's message on one line, without the file name that the system adds."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def legible(name: str) -> str:
    r"""Make a file's name valid Unicode: bytes that are not UTF-8 become ``\xe9``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(name: str) -> str:
    """Put a file's name on one line: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in legible(name))


def plain(text: str) -> str:
    """Put a user's text on one line, and escape Markdown, except underscores inside a word."""
    line = printable(" ".join(text.split()))
    return re.sub(r"([\\|*`<>\[\]#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Count things in words: 1 step, 2 steps; ``ending`` makes a plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


@cache
def warn_once(message: str) -> None:
    """Log a warning, on one line, at its first call in a process."""
    log.warning(printable(message))


def list_skipped(skipped: Iterable[tuple[str, str]], count: int | None = None) -> str:
    """List the first ten names with their reasons, and count the others.

    ``count`` is the number of all, if ``skipped`` has the first ones alone.
    """
    texts = [f"{printable(name)} ({reason})" for name, reason in skipped]
    others = (len(texts) if count is None else count) - 10
    more = f", and {others} more" if others > 0 else ""
    return ", ".join(texts[:10]) + more
