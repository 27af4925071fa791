"""Read shards, tar files in WebDataset's format, from disk, URLs and commands, even if damaged."""

import asyncio
import bz2
import gzip
import hashlib
import json
import logging
import lzma
import re
import signal
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from http.client import responses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec
from webdataset.tariterators import group_by_keys

from olvae.config.reading import is_local
from olvae.data.order.groups import GROUP
from olvae.data.places import EXTENSIONS
from olvae.data.read_errors import ReadError
from olvae.files import first_line, legible, printable, reason

log = logging.getLogger("olvae.data")

_UNPACKING = (zlib.error, lzma.LZMAError, EOFError)
SHARD_ERRORS = (
    tarfile.TarError,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
    struct.error,
    RecursionError,
    *_UNPACKING,
)
"""Exceptions from reading a broken tar file."""

# Largest file in a shard: an uncompressed TIFF of the largest picture that is read.
MAX_FILE_BYTES = 2**30
# Largest ratio of a compressed shard's content to its file; arrays of drawings shrink by some ten.
MAX_EXPANSION = 32
# Bytes of content allowed beyond that ratio, because the first block of a file may hold much.
FREE_EXPANSION = 2**26
# Readers of compressed shards by their first bytes.
COMPRESSED: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
# Extensions of the files that say what an image is, of `olvae data pack` and of `olvae encode`.
DETAILS = ("json", "latent.json")
# Names in WebDataset's shards that belong to no sample.
META = re.compile(r"__[^/]*__($|/)")
TAR_NAME = re.compile(r"[^/\s'\"?&=:]+\.(?:tar\.gz|tgz|tar)(?![\w.])")


class Shard(NamedTuple):
    """A tar file, by path or URL, and its number of images, if known."""

    url: str
    images: int | None = None
    # The file of an index with the offsets of images, and the number of this shard's first.
    offsets: tuple[str, int] | None = None
    bytes: int | None = None  # of the file when it was indexed
    # By its index, classes in a shard on average, and in all.
    classes: tuple[float, int] | None = None

    @property
    def name(self) -> str:
        """Its file's name without the extension: the keys of its images begin with it."""
        return legible(re.sub(r"\.(tar\.gz|tgz|tar)$", "", file_name(self.url)))


class Entry(NamedTuple):
    """An image of a shard, undecoded."""

    key: str  # the shard's name and the image's
    name: str  # for errors: the shard's path or URL and the file's name
    data: bytes  # of the file
    files: Mapping[str, bytes]  # the group's other files by extension
    errors: tuple[ReadError, ...] = ()  # met on the way to it

    @property
    def details(self) -> Mapping[str, Any]:
        """The entries of its JSON files, such as `olvae data pack` writes; empty without any."""
        found: dict[str, Any] = {}
        for extension in DETAILS:
            with suppress(KeyError, ValueError, TypeError, RecursionError):
                found |= json.loads(self.files[extension])
        return found

    @property
    def group(self) -> str | None:
        """The group that it was packed or encoded with; None if it is its own."""
        # Most images are their own, and JSON files from elsewhere may be large.
        if not any(GROUP.encode() in self.files.get(name, b"") for name in DETAILS):
            return None
        found = self.details.get(GROUP)
        return found if isinstance(found, str) else None


def file_name(url: str) -> str:
    """Find the name of a shard's file, even in a command or before a URL's signature.

    A URL without such a name gives its end, with a hash of the whole.
    """
    end = Path(url).name
    if is_local(url):
        return end
    names: list[str] = TAR_NAME.findall(url)
    if names:
        return names[-1]
    if end == url:
        return end
    return f"{end}-{hashlib.sha256(url.encode(errors='surrogateescape')).hexdigest()[:8]}"


def read_shard(
    shard: Shard, image_key: str | None = None, begin: int = 0
) -> Iterator[Entry | ReadError]:
    """Yield the images of a shard in order, undecoded; then a ReadError if it can't be read whole.

    ``begin`` is the byte at which to begin, the first one of a header.

    ``image_key`` is the extension of the image in a group of files of one name, by default the
    first image's. A group without one is left out.
    """
    errors: list[ReadError] = []

    def skip(error: Exception) -> bool:
        errors.append(ReadError(shard.url, _reason(error), lost=False))
        return True

    for group in group_by_keys(_files(shard.url, errors, begin), handler=skip):
        images = [ext for ext in group if is_image(ext, image_key)]
        # A picture comes before a .npz, which then is something else about it.
        extension = min(images, key=lambda ext: ext.endswith("npz"), default=None)
        if extension is None:
            continue
        others = {
            ext: content
            for ext, content in group.items()
            if ext != extension and not ext.startswith("__")
        }
        key = legible(group["__key__"])
        name = f"{legible(shard.url)}/{key}.{extension}"
        yield Entry(f"{shard.name}/{key}", name, group[extension], others)
    yield from errors


def is_image(extension: str, image_key: str | None) -> bool:
    """Whether an extension is ``image_key`` or, without one, a picture format's."""
    if image_key:
        return extension == image_key
    return f".{extension}" in EXTENSIONS


def _files(url: str, errors: list[ReadError], begin: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar file, compressed or not; add to ``errors`` if it ends early."""
    try:
        with closing(open_url(url, begin)) as stream:
            unpacked: Any = stream if begin else Unpacked(stream)
            with tarfile.open(fileobj=unpacked, mode="r|", tarinfo=StrictTarInfo) as archive:
                while (member := archive.next()) is not None:
                    # Forget the members that were read: a large shard's headers fill the memory.
                    archive.members = []  # type: ignore[attr-defined]
                    if not member.isreg() or META.match(member.name):
                        continue
                    if member.issparse() or member.size > MAX_FILE_BYTES:
                        raise ValueError(
                            f"{legible(member.name)}: a sparse file, or larger than "
                            f"{MAX_FILE_BYTES >> 30} GiB"
                        )
                    content: Any = archive.extractfile(member)
                    yield {"fname": member.name, "data": content.read(), "__url__": url}
            # Reading at the end raises if the command or connection failed there.
            stream.read(1)
    except SHARD_ERRORS as error:
        errors.append(ReadError(url, _reason(error)))


class Unpacked:
    """A stream's content, unpacked if it is compressed.

    ValueError if the content is out of proportion to the bytes read from the stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # First bytes, read to recognise the format, that a reader has still to get.
        self._ahead = b""
        # Number of packed bytes that the reader took.
        self._place = 0
        while len(self._ahead) < 6:
            data = stream.read(6 - len(self._ahead))
            if not data:
                break
            self._ahead += data
        self._opened: Any = None
        for first, reader in COMPRESSED.items():
            if self._ahead.startswith(first):
                self._opened = reader(SimpleNamespace(read=self._packed))
                break
        self.packed = self._opened is not None

    def _packed(self, size: int) -> bytes:
        data: bytes = self._ahead[:size] or self._stream.read(size)
        self._ahead = self._ahead[size:]
        self._place += len(data)
        return data

    def read(self, size: int) -> bytes:
        if self._opened is None:
            return self._packed(size)
        # At damage, read1 gives all bytes before it; the next call raises the reason.
        part: bytes = self._opened.read1(size)
        if self._opened.tell() > FREE_EXPANSION + MAX_EXPANSION * self._place:
            raise ValueError(
                f"it unpacks to more than {MAX_EXPANSION} times its size, "
                "a decompression bomb perhaps"
            )
        return part


def is_packed(url: str) -> bool:
    """Whether a shard is compressed, by its name or, if it is local, by its first bytes."""
    if file_name(url).endswith((".gz", ".tgz")):
        return True
    if not is_local(url) or not Path(url).is_file():
        return False
    with Path(url).open("rb") as file:
        return file.read(6).startswith(tuple(COMPRESSED))


class StrictTarInfo(tarfile.TarInfo):
    """Raise ReadError for a damaged or missing header; tarfile takes it for the archive's end."""

    # Not `frombuf`, which Python 3.13.5 does not call any more.
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        # The end mark is no damage.
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("not a tar file, or cut off or damaged") from error


# Seconds without a byte after which a download is resumed.
STALL_S = 60.0
CONNECT_S = 30.0
# Seconds after a failure during which a download is tried again before it is given up.
RETRY_S = 60.0
# Seconds of failures after which a line says that a download is tried again.
NOTE_S = 10.0
# What remains of that time with each download in a row that a store has failed.
SHORTER = 0.25
# Number of such downloads after which a store is left alone for as long as RETRY_S.
FAILED_IN_A_ROW = 3
# Seconds before the first of these tries; each pause is twice as long as the one before.
PAUSE_S = 1.0
# Number of times that one download is resumed, and once more for each DOWNLOAD_BYTES that came:
# servers close the connection of a shard that is read slowly, as one of many.
MAX_RESUMES = 20
# Bytes that are asked of a download at a time; fsspec passes each piece on from another thread.
DOWNLOAD_BYTES = 2**20
# Bytes of a request to an object store.
BLOCK = 2**23
# HTTP statuses below 500 after which a request is repeated.
TEMPORARY = (408, 425, 429)


def open_url(url: str, begin: int = 0) -> Any:
    """Open a file, a URL or a ``pipe:`` command for reading in sequence, from a byte on.

    A command is always read from its start. ``read(size)`` may give fewer bytes. When a command or
    download fails, it raises OSError after all bytes that came. Raises OSError if a local file
    can't be opened.
    """
    if url.startswith("pipe:"):
        return _Command(url.removeprefix("pipe:"))
    if not is_local(url):
        return _Download(url, begin)
    file = Path(url).open("rb")  # noqa: SIM115  (the caller closes it)
    file.seek(begin)
    return file


class _Command:
    """The output of a shell command."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
        self._output: Any = self._process.stdout

    def close(self) -> None:
        self._output.close()
        self._process.terminate()
        self._process.wait()

    def read(self, size: int) -> bytes:
        data: bytes = self._output.read(size)
        if data:
            return data
        status = self._process.wait()
        if status > 0:
            raise OSError(f"the command failed with exit status {status}")
        if status < 0:
            raise OSError(f"the command was ended by {signal.Signals(-status).name}")
        return data


# By store: the number of downloads in a row that this process gave up, and the time of the last.
_failures: dict[str, tuple[int, float]] = {}


class _Download:
    """The bytes of a URL in sequence; a cut or stalled connection is resumed at the next byte.

    Opened and used in one process only: fsspec's event loop does not survive a fork.
    """

    def __init__(self, url: str, begin: int = 0) -> None:
        self._url = url
        self._file: Any = None
        # Bytes that came and were not read yet.
        self._ahead = memoryview(b"")
        # Number of bytes that came, and of those before the first that is asked for.
        self._place = begin
        self._begin = begin
        # The version of the file, as far as the server names one.
        self._tag: str | None = None
        self._resumes = 0
        address = urlsplit(url)
        self._store = f"{address.scheme}://{address.netloc}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(self._more())
        data = self._ahead[:size]
        self._ahead = self._ahead[size:]
        return data.tobytes()

    def _more(self) -> bytes:
        """Fetch the next bytes; try again after temporary failures.

        A store that has failed other downloads, with no success since, is tried for a shorter time,
        and then left alone for a while: one that is down ends a command within some two minutes.
        """
        pause = PAUSE_S
        began = time.monotonic()
        failed, last = _failures.get(self._store, (0, began))
        given_up = failed >= FAILED_IN_A_ROW and began < last + RETRY_S
        if given_up and self._place == self._begin:
            raise OSError(f"not tried, as {failed} downloads in a row from there have failed")
        until: float | None = None
        noted = False
        while True:
            try:
                if self._file is None:
                    self._open()
                data: bytes = self._file.read(DOWNLOAD_BYTES)
            except Exception as error:  # each file system raises its own kinds
                self.close()
                if until is None:
                    until = time.monotonic() + RETRY_S * SHORTER**failed
                self._resumes += 1

                # Give up where trying again can't help, or has not helped.
                status = _status(error)
                refused = status is not None and status < 500 and status not in TEMPORARY
                final = FileNotFoundError | PermissionError | ImportError | ValueError
                resumes = MAX_RESUMES + (self._place - self._begin) // DOWNLOAD_BYTES
                spent = time.monotonic() + pause > until or self._resumes > resumes
                if refused or isinstance(error, final):
                    raise OSError(_explain(error)) from error
                if spent:
                    _failures[self._store] = (failed + 1, time.monotonic())
                    raise OSError(_explain(error)) from error

                # Break the silence once, before a pause that would last beyond it.
                since = time.monotonic() - began
                if since + pause > NOTE_S and not noted:
                    noted = True
                    log.warning(
                        "%s: %s; trying again, for %.0f s so far (%.0f s at most)",
                        printable(self._url),
                        _explain(error),
                        since,
                        since + until - time.monotonic(),
                    )
                time.sleep(pause)
                pause *= 2
            else:
                _failures.pop(self._store, None)
                self._place += len(data)
                return data

    def _open(self) -> None:
        """Open the URL at the byte after the last one that came."""
        # Object stores: fsspec's file can seek.
        if not self._url.startswith(("http://", "https://", "hf://")):
            system, path = fsspec.url_to_fs(self._url, skip_instance_cache=True)
            self._file = system.open(path, "rb", block_size=BLOCK, cache_type="readahead")
            self._file.seek(self._place)
            return
        import aiohttp

        # One HTTP request from that byte on, for the bytes as stored.
        url = self._url
        headers: dict[str, str] = {}
        if url.startswith("hf://"):
            from huggingface_hub import HfFileSystem, get_token, hf_hub_url

            # The file's address on the Hugging Face hub, and the user's token.
            file: Any = HfFileSystem(skip_instance_cache=True).resolve_path(url)
            url = hf_hub_url(
                file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision
            )
            token = get_token()
            if token:
                headers["Authorization"] = f"Bearer {token}"
        headers["Accept-Encoding"] = "identity"
        if self._place:
            headers["Range"] = f"bytes={self._place}-"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        # The proxy is set by hand: with trust_env, a .netrc would clash with the hub's token.
        client = {"timeout": timeout}
        system = fsspec.filesystem(
            "http", encoded=True, client_kwargs=client, skip_instance_cache=True
        )
        address = urlsplit(url)
        proxy = None
        if not proxy_bypass(address.hostname or ""):
            proxy = getproxies().get(address.scheme)
        # Any size will do: without one, fsspec sends a request to learn it.
        self._file = system.open(url, "rb", block_size=0, size=1, headers=headers, proxy=proxy)

        # Refuse another version than before, and skip what a server without ranges sends again.
        response = self._file.r
        tag = response.headers.get("ETag")
        if self._tag not in (None, tag):
            raise ValueError("it changed while it was read")
        self._tag = tag
        ahead = self._place if response.status != 206 else 0
        while ahead:
            skipped = len(self._file.read(min(ahead, DOWNLOAD_BYTES)))
            if not skipped:
                raise ValueError("it changed while it was read")
            ahead -= skipped


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of aiohttp or of the hub's library."""
    status = getattr(error, "status", None)
    if not status:
        status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _explain(error: Exception) -> str:
    """Say in plain words why a download failed."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, asyncio.TimeoutError):
        return f"nothing came for {STALL_S:g} s"
    if type(error).__name__ in ("ClientPayloadError", "ServerDisconnectedError"):
        return "the connection dropped"
    status = _status(error)
    if status is None:
        return first_line(error)
    # A server's own number, such as 522, has no phrase.
    return f"the server answers {status} {responses.get(status, '')}".rstrip()


def _reason(error: BaseException) -> str:
    """Say in one line why a shard can't be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, RecursionError):
        return "too many headers of long names or attributes in a row"
    if isinstance(error, OSError):
        return reason(error)
    text = str(error.args[0]) if error.args else type(error).__name__
    # webdataset may append " @ " and the file.
    return " ".join(text.partition(" @ ")[0].split())
