"""Read shards, tar files in WebDataset's format, from disk, URLs and commands, up to where they are damaged."""

import asyncio
import bz2
import gzip
import hashlib
import lzma
import re
import signal
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec
from webdataset.tariterators import group_by_keys

from olvae.config.reading import EXTENSIONS, is_local
from olvae.data.read_errors import ReadError
from olvae.files import first_line, legible, reason

_UNPACKING = (zlib.error, lzma.LZMAError, EOFError)
SHARD_ERRORS = (
    tarfile.TarError,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
    struct.error,
    *_UNPACKING,
)
"""Exceptions from reading a broken tar file."""

MAX_FILE_BYTES = (
    2**30
)  # largest file in a shard: an uncompressed TIFF of the largest picture that is read
MAX_EXPANSION = (
    32  # largest ratio of a compressed shard to its file; arrays of drawings shrink by some ten
)
FREE_EXPANSION = (
    2**26
)  # bytes that it may have beyond that ratio, because its first block may hold much
COMPRESSED: Mapping[
    bytes, Callable[[Any], Any]
] = {  # readers of compressed shards by their first bytes
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
META = re.compile(r"__[^/]*__($|/)")  # names in WebDataset's shards that belong to no sample
TAR_NAME = re.compile(r"[^/\s'\"?&=:]+\.(?:tar\.gz|tgz|tar)(?![\w.])")


class Shard(NamedTuple):
    """A tar file, by path or URL, and its number of images, if known."""

    url: str
    images: int | None = None

    @property
    def name(self) -> str:
        """The name of its file without the extension: with it begin the keys of its images."""
        return legible(re.sub(r"\.(tar\.gz|tgz|tar)$", "", file_name(self.url)))


class Entry(NamedTuple):
    """An image of a shard, undecoded."""

    key: str  # the shard's name and the image's
    name: str  # for errors: the shard's path or URL and the file's name
    data: bytes  # of the file
    files: Mapping[str, bytes]  # the group's other files by extension
    errors: tuple[ReadError, ...] = ()  # met on the way to it


def file_name(url: str) -> str:
    """The name of a shard's file, even inside a command or before a URL's signature; else its end, with a hash."""
    names, end = [] if is_local(url) else TAR_NAME.findall(url), Path(url).name
    if names or is_local(url) or end == url:
        return names[-1] if names else end
    return f"{end}-{hashlib.sha256(url.encode(errors='surrogateescape')).hexdigest()[:8]}"


def read_shard(shard: Shard, image_key: str | None = None) -> Iterator[Entry | ReadError]:
    """Yield the images of a shard in order, undecoded; last a ReadError if it can't be opened or ends early.

    ``image_key`` is the extension of the image in a group of files of one name, by default the first that is an
    image's. A group without one is left out.
    """
    errors: list[ReadError] = []

    def skip(error: Exception) -> bool:
        errors.append(ReadError(shard.url, _reason(error), lost=False))
        return True

    for group in group_by_keys(_files(shard.url, errors), handler=skip):
        images = [
            ext for ext in group if is_image(ext, image_key)
        ]  # a .npz beside a picture is something else
        extension = min(images, key=lambda ext: ext.endswith("npz"), default=None)
        if extension is not None:
            key = legible(group["__key__"])
            others = {
                ext: group[ext] for ext in group if ext != extension and not ext.startswith("__")
            }
            yield Entry(
                f"{shard.name}/{key}",
                f"{legible(shard.url)}/{key}.{extension}",
                group[extension],
                others,
            )
    yield from errors


def is_image(extension: str, image_key: str | None) -> bool:
    """Whether an extension is ``image_key`` or, without one, that of a picture format."""
    return extension == image_key if image_key else f".{extension}" in EXTENSIONS


def _files(url: str, errors: list[ReadError]) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar file, compressed or not; add to ``errors`` if it ends early."""
    try:
        with closing(open_url(url)) as stream:
            unpacked: Any = _Unpacked(stream)
            with tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_StrictTarInfo) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # which would hold the headers of all
                    if member.isreg() and not META.match(member.name):
                        if member.issparse() or member.size > MAX_FILE_BYTES:
                            name, most = legible(member.name), MAX_FILE_BYTES >> 30
                            raise ValueError(f"{name}: a sparse file, or larger than {most} GiB")
                        content: Any = archive.extractfile(member)
                        yield {"fname": member.name, "data": content.read(), "__url__": url}
            stream.read(1)  # raises if the command or connection failed at its end
    except SHARD_ERRORS as error:
        errors.append(ReadError(url, _reason(error)))


class _Unpacked:
    """A stream or, if it is compressed, its content, as long as that is in proportion to the bytes read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._ahead, self._place = stream, b"", 0
        while len(self._ahead) < 6 and (data := stream.read(6 - len(self._ahead))):
            self._ahead += data
        readers = (reader for first, reader in COMPRESSED.items() if self._ahead.startswith(first))
        packed: Any = SimpleNamespace(read=self._packed)
        self._opened = next((reader(packed) for reader in readers), None)

    def _packed(self, size: int) -> bytes:
        data: bytes = self._ahead[:size] or self._stream.read(size)
        self._ahead = self._ahead[size:]
        self._place += len(data)
        return data

    def read(self, size: int) -> bytes:
        if self._opened is None:
            return self._packed(size)
        part: bytes = self._opened.read1(size)  # what is whole; the next call raises the reason
        if self._opened.tell() > FREE_EXPANSION + MAX_EXPANSION * self._place:
            raise ValueError(
                f"it unpacks to more than {MAX_EXPANSION} times its size, a decompression bomb perhaps"
            )
        return part


class _StrictTarInfo(tarfile.TarInfo):
    """Raise ReadError for a damaged or missing header, which tarfile takes for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("not a tar file, or cut off or damaged") from error


STALL_S = 60.0  # seconds without a byte after which a download is taken up anew
CONNECT_S = 30.0
RETRY_S = (
    60.0  # seconds after a failure during which a download is tried again before it is given up
)
PAUSE_S = (
    1.0  # seconds before the first of these tries; each pause is twice as long as the one before
)
MAX_RESUMES = 20  # number of times that one download is taken up anew
CHUNK = (
    2**20
)  # bytes that are asked of a download at a time; fsspec passes each on from another thread
BLOCK = 2**23  # bytes of a request to an object store
TEMPORARY = (408, 425, 429)  # HTTP statuses below 500 after which a request is repeated


def open_url(url: str) -> Any:
    """Open a file, a URL or a ``pipe:`` command for reading in sequence; OSError if a local file can't be opened.

    ``read(size)`` may give fewer bytes; it raises OSError, after all bytes that came, when a command or download fails.
    """
    if url.startswith("pipe:"):
        return _Command(url.removeprefix("pipe:"))
    return Path(url).open("rb") if is_local(url) else _Download(url)


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
        if not data and (status := self._process.wait()):
            why = (
                f"failed with exit status {status}"
                if status > 0
                else f"was ended by {signal.Signals(-status).name}"
            )
            raise OSError(f"the command {why}")
        return data


class _Download:
    """The bytes of a URL in sequence; after a cut or stalled connection it reads on from the next byte.

    Opened and used in one process only: fsspec's event loop does not survive a fork.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        self._ahead = memoryview(b"")
        self._place = 0
        self._tag: str | None = None
        self._resumes = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(self._more())
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data.tobytes()

    def _more(self) -> bytes:
        """The next bytes; tries again after temporary failures."""
        pause, until = PAUSE_S, None
        while True:
            try:
                if self._file is None:
                    self._open()
                data: bytes = self._file.read(CHUNK)
            except Exception as error:  # each file system raises its own kinds
                self.close()
                until = until or time.monotonic() + RETRY_S
                self._resumes += 1
                if (
                    _is_final(error)
                    or time.monotonic() + pause > until
                    or self._resumes > MAX_RESUMES
                ):
                    raise OSError(_explain(error)) from error
                time.sleep(pause)
                pause *= 2
            else:
                self._place += len(data)
                return data

    def _open(self) -> None:
        """Open the URL at the byte after the last one that came."""
        if not self._url.startswith(("http://", "https://", "hf://")):
            system, path = fsspec.url_to_fs(self._url, skip_instance_cache=True)
            self._file = system.open(path, "rb", block_size=BLOCK, cache_type="readahead")
            self._file.seek(self._place)
            return
        import aiohttp

        url, headers = _on_the_hub(self._url) if self._url.startswith("hf://") else (self._url, {})
        headers["Accept-Encoding"] = "identity"
        if self._place:
            headers["Range"] = f"bytes={self._place}-"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        client = {"timeout": timeout}  # with trust_env, a .netrc would clash with the hub's token
        system = fsspec.filesystem(
            "http", encoded=True, client_kwargs=client, skip_instance_cache=True
        )
        # any size: else a request would ask for it
        self._file = system.open(
            url, "rb", block_size=0, size=1, headers=headers, proxy=_proxy(url)
        )
        response = self._file.r
        tag = response.headers.get("ETag")
        if self._tag not in (None, tag):
            raise ValueError("it changed while it was read")
        self._tag = tag
        ahead = self._place if response.status != 206 else 0
        while ahead:  # the server sends everything again
            skipped = len(self._file.read(min(ahead, CHUNK)))
            if not skipped:
                raise ValueError("it changed while it was read")
            ahead -= skipped


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL."""
    address = urlsplit(url)
    return None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)


def _on_the_hub(url: str) -> tuple[str, dict[str, str]]:
    """The address of a file on the Hugging Face hub, and the user's token as a header."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    file: Any = HfFileSystem(skip_instance_cache=True).resolve_path(url)
    address = hf_hub_url(
        file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision
    )
    token = get_token()
    return address, {"Authorization": f"Bearer {token}"} if token else {}


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of aiohttp or of the hub's library."""
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    return status if isinstance(status, int) else None


def _is_final(error: Exception) -> bool:
    """Whether trying again can't help."""
    status = _status(error)
    refused = status is not None and status < 500 and status not in TEMPORARY
    return refused or isinstance(
        error, FileNotFoundError | PermissionError | ImportError | ValueError
    )


def _explain(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, asyncio.TimeoutError):
        return f"nothing came for {STALL_S:g} s"
    if type(error).__name__ in ("ClientPayloadError", "ServerDisconnectedError"):
        return "the connection dropped"
    status = _status(error)
    return (
        first_line(error)
        if status is None
        else f"the server answers {status} {HTTPStatus(status).phrase}"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return "no such file" if isinstance(error, FileNotFoundError) else reason(error)
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.partition(" @ ")[0].split())
