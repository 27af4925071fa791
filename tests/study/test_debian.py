import hashlib
import io
import lzma
import shutil
import struct
import subprocess
import tarfile
import zlib

import pytest

from study.debian import Contents, fetch, system_mirror
from study.packages import Package

COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020 Somebody
License: GPL-2+

Files: pictures/sea.jpg
Copyright: 2021 Ada Lovelace
License: CC-BY-4.0
"""
PLASMA = '{"KPlugin": {"Authors": [{"Name": "Ann"}, {"Name": "Bob"}], "License": "CC-BY-SA-4.0"}}'
PALAPELI = (
    "[Desktop Entry]\nName=Bees\n"
    "X-KDE-PluginInfo-Author=Cy\nX-KDE-PluginInfo-License=Public Domain\n"
)


def ar(members):
    """An archive of Debian's form: 60 bytes before every member,
    each of which begins at an even place."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def deb(path, files):
    """A package of these files, as Debian packs it."""

    def tar_xz(files):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return lzma.compress(buffer.getvalue())

    parts = {"debian-binary": b"2.0\n", "control.tar.xz": tar_xz({"control": b"Package: x\n"})}
    path.write_bytes(ar(parts | {"data.tar.xz": tar_xz(files)}))
    return path


def package(path, photographs, source=()):
    return Package(
        "pictures",
        "1-1",
        path.name,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        photographs,
        source,
    )


def rcc(names, contents, compressed=False):
    """A resource file of Qt: a folder with files in it, version 1."""
    blocks, places = b"", []
    for content in contents:
        places.append(len(blocks))
        block = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        blocks += struct.pack(">I", len(block)) + block
    texts, offsets = b"", []
    for name in ("folder", *names):
        offsets.append(len(texts))
        texts += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", offsets[0], 2, len(names), 2)
    for offset, place in zip(offsets[1:], places, strict=True):
        tree += struct.pack(">IHHHI", offset, int(compressed), 0, 0, place)
    head = 20
    header = b"qres" + struct.pack(">4I", 1, head, head + len(tree) + len(texts), head + len(tree))
    return header + tree + texts + blocks


def test_photographs_of_a_package_have_their_licences(tmp_path):
    path = deb(
        tmp_path / "pictures_1-1_all.deb",
        {
            "usr/share/doc/pictures/copyright": COPYRIGHT.encode(),
            "usr/share/backgrounds/sea.jpg": b"sea",
            "usr/share/backgrounds/land.jpg": b"land",
            "usr/share/backgrounds/logo.svg": b"drawn",
            "usr/share/wallpapers/Lake/metadata.json": PLASMA.encode(),
            "usr/share/wallpapers/Lake/contents/images/100x80.jpg": b"lake",
            "usr/share/puzzles/bees.jpg": b"bees",
            "usr/share/puzzles/bees.desktop": PALAPELI.encode(),
            "usr/share/game.rcc": rcc(["cat.jpg", "dog.jpg"], [b"cat", b"dog"]),
            "usr/share/other.rcc": rcc(["cow.jpg"], [b"cow"], compressed=True),
        },
    )
    contents = Contents(path, package(path, ("*.jpg",), (("usr/share/backgrounds/", "pictures/"),)))
    found = {name.rpartition("/")[2]: content for name, content in contents.photographs.items()}
    assert found == {
        "sea.jpg": b"sea",
        "land.jpg": b"land",
        "100x80.jpg": b"lake",
        "bees.jpg": b"bees",
        "cat.jpg": b"cat",
        "dog.jpg": b"dog",
        "cow.jpg": b"cow",
    }
    licences = {
        name.rpartition("/")[2]: contents.licence(name)[:2] for name in contents.photographs
    }
    assert licences == {
        "sea.jpg": ("2021 Ada Lovelace", "CC-BY-4.0"),
        "land.jpg": ("2020 Somebody", "GPL-2+"),
        **dict.fromkeys(("cat.jpg", "dog.jpg", "cow.jpg"), ("2020 Somebody", "GPL-2+")),
        "100x80.jpg": ("Ann, Bob", "CC-BY-SA-4.0"),
        "bees.jpg": ("Cy", "Public Domain"),
    }
    with pytest.raises(ValueError, match=r"pictures 1-1 .*\*\.tiff"):
        Contents(path, package(path, ("*.jpg", "*.tiff")))


@pytest.mark.posix
def test_the_mirror_is_the_one_of_the_machine(tmp_path, monkeypatch):
    """By an apt-get that lists what apt's own does, or nothing, or isn't there."""
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\nprintf 'http://one/debian/\\nhttp://two/debian/\\n'\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system_mirror() == "http://one/debian/"
    apt.write_text("#!/bin/sh\n")
    with pytest.raises(ValueError, match="with --mirror"):
        system_mirror()
    apt.unlink()
    with pytest.raises(ValueError, match="with --mirror"):
        system_mirror()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_apt_understands_what_it_is_asked():
    """The mirror is one of the addresses in apt's own listing of all its indexes."""
    listed = subprocess.check_output(["apt-get", "indextargets"], text=True)
    if "Label: Debian\n" not in listed:
        with pytest.raises(ValueError, match="apt-get update"):
            system_mirror()
    else:
        assert f"Repo-URI: {system_mirror()}\n" in listed


def test_fetch_checks_and_keeps_a_package(tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    path = mirror / "x.deb"
    path.write_bytes(b"content")
    wanted = package(path, ())
    assert fetch(wanted, tmp_path / "here", mirror.as_uri()).read_bytes() == b"content"
    path.unlink()  # it is here already
    assert fetch(wanted, tmp_path / "here", mirror.as_uri()).read_bytes() == b"content"
    with pytest.raises(ValueError, match="reached with --mirror"):
        fetch(wanted, tmp_path / "elsewhere", mirror.as_uri())
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="is expected"):
        fetch(wanted, tmp_path / "elsewhere", mirror.as_uri())
    assert not (tmp_path / "elsewhere" / "x.deb").exists()
