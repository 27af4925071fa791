"""Reading shards, which are tar files of images in WebDataset's format, as far as they are whole."""

import bz2
import contextlib
import gzip
import lzma
import re
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.gopen import Pipe, gopen, rewrite_url, set_options
from webdataset.tariterators import base_plus_ext, group_by_keys

from olvae.data.image import EXTENSIONS
from olvae.data.read_errors import ReadError
from olvae.files import legible

__all__ = ["Entry", "Shard", "extensions", "failure", "open_url", "read_shard"]


SHARD_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    OverflowError,
    IndexError,
)
"""What reading a broken tar file raises."""

TAR_BLOCK = 512  # bytes; two blocks of zeros end an archive

COMPRESSED: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""By their first bytes, how these formats are read, which fails where they are cut off."""

LARGEST = 2**30
"""Bytes of an image and the files of its name in all: an uncompressed TIFF of the largest picture that is read."""

PROPORTION = 32
"""How much larger than its file a compressed shard may be; images hardly are, arrays of drawings by some ten."""

SLACK = 2**26
"""Bytes that a compressed shard may have beyond that, because its first block may hold much."""

META = re.compile(r"__[^/]*__($|/)")
"""Names in WebDataset's shards that are not of samples."""


class Shard(NamedTuple):
    """A tar file, by path or URL, and how many images are in it, if that is known.

    ``label`` is what its images' keys begin with, by default the stem of its name.
    """

    url: str
    images: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or stem(self.url)


class Entry(NamedTuple):
    """An image of a shard, undecoded.

    Args:
        key: the shard's name and the image's.
        name: for errors: the shard's path or URL and the file's name.
        data: the file's bytes.
        files: the group's other files by extension, as bytes.
        errors: met on the way to it.
    """

    key: str
    name: str
    data: bytes
    files: Mapping[str, bytes]
    errors: tuple[ReadError, ...] = ()


def read_shard(
    shard: Shard, image_key: str | None = None, sidecars: bool = True, dotted: list[str] | None = None
) -> Iterator[Entry | ReadError]:
    """The images of a shard in order, undecoded; last a ReadError where it can't be opened or ends early.

    A group, which is files of one name, is left out if no image is in it.

    Args:
        image_key: the extension of the image in a group; by default the first that is an image's.
        sidecars: whether the other files of a group are wanted; without them it is less work.
        dotted: gets the names of files in groups without an image that would be images without a second dot in their
            names: WebDataset splits ``a.b.jpg`` at the first, which makes ``b.jpg`` the extension. Needs the sidecars.
    """
    errors: list[ReadError] = []

    def skip(error: Exception) -> bool:
        errors.append(ReadError(shard.url, _reason(error), lost=False))
        return True

    wanted = None if sidecars else lambda name: is_image((base_plus_ext(name)[1] or "").lower(), image_key)
    groups = group_by_keys(_files(shard.url, errors, wanted), handler=skip)
    name, url = shard.name, legible(shard.url)
    for group in groups:
        extension = next((ext for ext in group if is_image(ext, image_key)), None)
        key = legible(group["__key__"])
        if extension is None:
            if dotted is not None:
                dotted += [f"{key}.{ext}" for ext in group if is_image(ext.rpartition(".")[2], None)]
            continue
        others = {ext: group[ext] for ext in group if ext != extension and not ext.startswith("__")}
        yield Entry(f"{name}/{key}", f"{url}/{key}.{extension}", group[extension], others)
    yield from errors


def extensions(urls: Sequence[str]) -> set[str]:
    """Of the files of one name with which the first shard begins that can be read; empty if none can."""
    groups: Iterator[dict[str, Any]] = (
        next(group_by_keys(_files(url, [], None), handler=lambda _: True), {}) for url in urls
    )
    return next(({ext for ext in group if not ext.startswith("__")} for group in groups if group), set())


def _files(url: str, errors: list[ReadError], wanted: Callable[[str], bool] | None) -> Iterator[dict[str, Any]]:
    """The files of a tar file; what ends it early is added to ``errors``, and what came before is kept."""
    stream: Any = None
    tail: _Tail | None = None
    try:
        stream = open_url(url)
        tail = _Tail(stream)
        for name, data in _members(tail, wanted):
            yield {"fname": name, "data": data, "__url__": url}
        ended = tail.ended
        tail.read(TAR_BLOCK)
        if tail.exhausted and (why := failure(stream)):
            errors.append(ReadError(url, why))
        elif not ended:
            errors.append(ReadError(url, "no end mark: cut off, or damaged on the way", lost=False))
    except SHARD_ERRORS as error:
        # A command whose output is not read to its end may fail for that reason alone.
        why = failure(stream) if tail is not None and tail.exhausted else None
        errors.append(ReadError(url, why or _reason(error)))
    finally:
        if stream is not None:
            with contextlib.suppress(OSError):  # of a command whose output is not read to its end
                stream.close()


def _members(file: "_Tail", wanted: Callable[[str], bool] | None) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a tar file.

    Raises:
        ValueError: those of one sample, or what the file unpacks to, are larger than they can be meant to be.
    """
    last, held = None, 0
    with tarfile.open(fileobj=unpacked(file, file.start), mode="r|") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # which would hold the headers of all
            if not member.isreg() or META.match(member.name) or not (wanted is None or wanted(member.name)):
                continue
            key = base_plus_ext(member.name)[0]
            last, held = key, member.size + (held if key == last else 0)
            if member.issparse() or held > LARGEST:
                why = (
                    "a sparse file" if member.issparse() else f"larger than {LARGEST >> 30} GiB with those of its name"
                )
                raise ValueError(f"{legible(member.name)}: {why}")
            content = archive.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def unpacked(file: Any, start: bytes) -> Any:
    """A file that begins with ``start`` or, where it is compressed, what is in it, within :data:`PROPORTION`."""
    opened = next((read(file) for first, read in COMPRESSED.items() if start.startswith(first)), None)
    return file if opened is None else _Within(opened, file)


class _Within:
    """What a compressed file unpacks to, as far as that is in proportion to what was read of the file."""

    def __init__(self, opened: Any, file: Any) -> None:
        self.opened = opened
        self.file = file
        self.seek = opened.seek
        self.tell = opened.tell

    def read(self, size: int) -> bytes:
        """As far as the file is whole; the next call says why it ended."""
        parts: list[bytes] = []
        while size > 0 and (part := self._part(size, first=not parts)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _part(self, size: int, first: bool) -> bytes:
        try:
            part: bytes = self.opened.read1(size)
        except SHARD_ERRORS:
            if first:
                raise
            return b""
        if self.opened.tell() > SLACK + PROPORTION * self.file.tell():
            raise ValueError(f"it unpacks to more than {PROPORTION} times its size, a decompression bomb perhaps")
        return part


class _Tail:
    """A stream that knows whether the last bytes read are zeros, as they are at the end of an archive.

    ``exhausted`` says whether it was read to its end.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.exhausted = False
        self.start = self._ahead = stream.read(6)
        """Its first bytes."""
        self._last = b""
        self._place = 0

    def read(self, size: int) -> bytes:
        data: bytes = self._ahead[:size] or self.stream.read(size)
        self._ahead = self._ahead[size:]
        if data:
            self._last = data[-TAR_BLOCK:]
            self._place += len(data)
        self.exhausted = not data
        return data

    def tell(self) -> int:
        return self._place

    @property
    def ended(self) -> bool:
        return self.start.startswith((*COMPRESSED,)) or not any(self._last)


def is_image(extension: str, image_key: str | None) -> bool:
    return extension == image_key if image_key else f".{extension}" in EXTENSIONS


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.partition(" @ ")[0].split())


STALL_S = 60
"""Seconds without a byte after which a download has stalled."""

CURL = ("curl", "-fsL", "--connect-timeout", "30", "--speed-limit", "1")

RETRIES = ("--retry", "30", "--retry-delay", "2")
"""curl retries for a minute while a server is busy or gone, but not after a refusal such as 404."""

RESUMES = 5
"""How often at most a download goes on where it stopped."""

STOPPED = (16, 18, 28, 52, 55, 56, 92)
"""Exit statuses of curl after which it may go on."""

CURL_STATUS = {
    6: "host not found",
    7: "no connection",
    18: "the connection dropped",
    22: "the server answers with an HTTP error, 400 or above",
    28: "nothing came in time",
    33: "it stopped in the middle, and the server can't send the rest alone",
    56: "the connection dropped",
}
"""What curl's exit statuses mean."""

GSUTIL = ("gsutil", "-o", "Boto:num_retries=6", "cat")
"""It waits for 70 s by itself, as `aws` does for 60 s, but would try 23 times."""


class _Curl(Pipe):
    """What curl downloads. Where that stops in the middle, it goes on after the last byte that came.

    Bytes that were read can't be taken back, and curl's own retries would send them again: those end when a download
    can first have stalled.
    """

    def __init__(self, *what: str) -> None:
        self._what = what
        self._place = self._begun = 0
        self._resumes = RESUMES
        self._begin()

    def read(self, size: int = -1) -> bytes:
        data = b""
        while True:
            came: bytes = super().read(size if size < 0 else size - len(data))
            data += came
            self._place += len(came)
            if len(data) == size or not self._resumed():
                return data

    def close(self) -> None:
        self.proc.terminate()  # one that has stalled would not notice that nobody reads
        super().close()

    def _begin(self, *more: str) -> None:
        stall = str(STALL_S)
        command = [*CURL, "--speed-time", stall, *RETRIES, "--retry-max-time", stall, *more, *self._what]
        super().__init__(command, mode="rb", ignore_errors=True, ignore_status=[141, 23])

    def _resumed(self) -> bool:
        """At the stream's end: whether it stopped too early and goes on. If the last time brought nothing, it does
        not."""
        self.wait_for_child()
        if self.status not in STOPPED or self._place == self._begun or not self._resumes:
            return False
        self.close()
        self._begun, self._resumes = self._place, self._resumes - 1
        self._begin("--retry-connrefused", "--continue-at", str(self._place))
        return True


def open_url(url: str) -> Any:
    """A stream of a file, a URL or a ``pipe:`` command. It ends early if the command fails: ask :func:`failure` then.

    A download that stalls ends after minutes; a ``pipe:`` command has to limit itself.

    Raises:
        OSError, ValueError: it can't be opened.
    """
    address = rewrite_url(url)
    try:
        if address.startswith(("http://", "https://")):
            stream = _Curl(address)
        elif address.startswith("hf://"):
            stream = _Curl(*_on_the_hub(address))
        elif address.startswith("gs://"):
            stream = Pipe([*GSUTIL, address], mode="rb", ignore_status=[141, 23])
        elif address.startswith("s3://"):  # which webdataset can't open
            stream = Pipe(["aws", "s3", "cp", address, "-"], mode="rb", ignore_status=[141, 23])
        else:
            stream = gopen(url)
    except FileNotFoundError as error:
        if "://" not in address or address.startswith("file:"):
            raise
        command = f"it needs the command {error.filename}, which is not installed"
        raise OSError(command if error.filename else str(error)) from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever the hub's library raises
        raise OSError(str(error) or type(error).__name__) from error
    set_options(stream, ignore_errors=True)  # else it would raise before the bytes read so far are used
    return stream


def _on_the_hub(url: str) -> list[str]:
    """curl's arguments for a file on the Hugging Face hub."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    file: Any = HfFileSystem().resolve_path(url)
    address = hf_hub_url(file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision)
    token = get_token()
    return [*(("--header", f"Authorization: Bearer {token}") if token else ()), address]


def failure(stream: Any) -> str | None:
    """Why the command behind a stream that was read to its end failed, if it did. Closes it."""
    if not isinstance(stream, Pipe):
        return None
    stream.close()
    if stream.status in (*stream.ignore_status, -signal.SIGPIPE):
        return None
    command = stream.proc.args
    who = command[0] if isinstance(command, list) else "the command"
    if stream.status < 0:
        return f"{who} was ended by {signal.Signals(-stream.status).name}"
    meaning = CURL_STATUS.get(stream.status) if who == "curl" else None
    return f"{who} failed with exit status {stream.status}{f': {meaning}' if meaning else ''}"


TAR_NAME = re.compile(r"[^/\s'\"?&=:]+\.(?:tar\.gz|tgz|tar)(?![\w.])")


def is_local(url: str) -> bool:
    """Whether a shard is a file here, rather than a URL or a pipe."""
    return not (url.startswith("pipe:") or "://" in url or url == "-")


def file_name(url: str) -> str:
    """The name of a shard's file, even inside a command or before a URL's signature."""
    names = [] if is_local(url) else TAR_NAME.findall(url)
    return names[-1] if names else Path(url).name


def stem(url: str) -> str:
    """The name of a shard's file up to its first dot."""
    return legible(file_name(url).partition(".")[0])
