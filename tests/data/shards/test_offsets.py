"""Where images begin in shards: against tarfile, and what reading from there gives."""

import gzip
import tarfile
from io import BytesIO
from itertools import islice

import numpy as np
import pytest

from olvae.data.shards import offsets
from olvae.data.shards.index import with_counts
from olvae.data.shards.indexing import index_shards
from olvae.data.shards.offsets import (
    LABEL_BYTES,
    NO_OFFSET,
    TAR_BLOCK,
    listed_offsets,
    offsets_of,
    scan,
)
from olvae.data.shards.tar_reading import Shard, open_url, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess
from tests.data.images import encoded, write_classes, write_shards, write_tar

COUNTS = (5, 9, 1, 4)


def test_offsets_begin_with_a_groups_first_file_and_long_names(tmp_path):
    """Other files of an image come before it, and headers of long names before the file."""
    long = "n" * 150
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("1.txt", b"one"),
            ("1.jpg", encoded(1)),
            ("note.txt", b"no image"),
            (f"{long}.json", b"{}"),
            (f"{long}.jpg", encoded(2)),
        ],
    )
    begins = offsets_of(Shard(str(path)))
    (entry, *rest) = read_shard(Shard(str(path)), None, int(begins[1]) * TAR_BLOCK)
    assert (entry.key, [*entry.files], rest) == (f"a/{long}", ["json"], [])
    first = next(iter(read_shard(Shard(str(path)), None, int(begins[0]) * TAR_BLOCK)))
    assert [*first.files] == ["txt"]
    assert len(begins) == 2


def test_compressed_shards_have_counts_and_no_offsets(tmp_path):
    write_shards(tmp_path / "plain", (3,))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "plain" / "000.tar").read_bytes()))
    _, index, _ = index_shards(str(packed))
    assert index.images == 3
    assert np.fromfile(tmp_path / "index.offsets", "<u4").tolist() == [NO_OFFSET] * 3
    (shard,) = with_counts([str(packed)])
    assert offsets_of(shard) is None


def test_shards_that_were_replaced_since_their_index_are_scanned_anew(tmp_path, caplog):
    """Of the old offsets, some lie amid a file, and others begin another image."""
    write_shards(tmp_path / "shards", (30, 30))
    write_shards(tmp_path / "val", (4,))
    index_shards(str(tmp_path / "shards"))
    for name in ("000", "001"):
        files = [(f"{i:04d}.jpg", encoded(i) + bytes(600 * (i % 3))) for i in range(30)]
        write_tar(tmp_path / "shards" / f"{name}.tar", files)
    source = WebDatasetSource(
        str(tmp_path / "shards"), size=16, batch_size=2, val_shards=str(tmp_path / "val")
    )
    parts = [islice(source.stream(0, 0, LoaderProcess(i, 3)), 20) for i in range(3)]
    samples = [sample for part in parts for sample in part]
    assert len({sample.key for sample in samples}) == 60
    assert not any(sample.errors for sample in samples)
    assert "changed since" in caplog.text


@pytest.mark.parametrize("image_key", [None, "jpg"])
def test_offsets_are_those_that_tarfile_finds(tmp_path, image_key):
    """In blocks of 512 bytes: of the first file of each image, which is its picture here."""
    for path in write_shards(tmp_path, COUNTS):
        with tarfile.open(path) as archive:
            begins = [m.offset // 512 for m in archive if m.name.endswith(".jpg")]
        found = scan(path, image_key)
        assert found.error is None
        assert found.offsets.dtype == np.dtype("<u4")
        assert found.offsets.tolist() == offsets_of(Shard(str(path)), image_key).tolist() == begins


def test_a_scan_reads_the_classes_if_asked(tmp_path):
    write_classes(tmp_path / "shards", (7,))  # the class is the number modulo 5
    path = tmp_path / "shards" / "000.tar"
    assert scan(path).classes == frozenset()
    assert scan(path, classes=True).classes == {b"0", b"1", b"2", b"3", b"4"}


def test_a_scan_of_a_damaged_shard_has_the_images_before_the_damage(tmp_path):
    (path,) = write_shards(tmp_path, (6,))
    whole = scan(path).offsets
    path.write_bytes(path.read_bytes()[: int(whole[4]) * TAR_BLOCK + 100])
    found = scan(path)
    assert isinstance(found.error, tarfile.TarError | EOFError | OSError)
    assert found.offsets.tolist() == whole[:4].tolist()


def test_pictures_that_nothing_reads_are_a_warning(tmp_path, caplog):
    """Names with several dots, and links."""
    files = [("1.jpg", encoded(1)), ("2.a.jpg", encoded(2)), ("3.jpg", encoded(3))]
    path = write_tar(tmp_path / "a.tar", files)
    assert len(scan(path).offsets) == 2
    assert "several dots" in caplog.text
    caplog.clear()
    assert len(scan(path, "a.jpg").offsets) == 1
    assert not caplog.messages


def test_a_file_of_offsets_that_is_too_short_is_read_once_with_a_line(
    tmp_path, caplog, monkeypatch
):
    paths = write_shards(tmp_path, (3, 2))
    index_shards(str(tmp_path))
    place = tmp_path / "index.offsets"
    shards = with_counts([str(path) for path in paths])
    assert listed_offsets(shards[1]).tolist() == scan(paths[1]).offsets.tolist()
    place.write_bytes(place.read_bytes()[:-4])
    opened = []

    def note(url, begin):
        opened.append((url, begin))
        return open_url(url, begin)

    monkeypatch.setattr(offsets, "open_url", note)
    for _ in range(2):
        assert listed_offsets(shards[1]) is None
    assert opened == [(str(place), 3 * 4)]
    assert [str(place) in line for line in caplog.messages] == [True]


def test_an_image_begins_with_the_first_file_of_its_key(tmp_path):
    """Also of a command's output. Folders, meta files and names without an extension are none."""
    label = b"x" * (LABEL_BYTES - 1)
    path = tmp_path / "a.tar"
    files = [
        ("d.jpg", None),
        ("__meta__/0.jpg", b"meta"),
        ("README", b"text"),
        ("1.cls", label),
        ("1.JPG", encoded(1)),
        ("1.json", b"{}"),
        ("2.cls", label + b"x"),
        ("2.jpg", encoded(2)),
        ("2.png", encoded(2, "PNG")),
        ("3.txt", b"alone"),
    ]
    begins = {}
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            begins[name] = archive.offset // 512
            archive.addfile(member, BytesIO(content or b""))
    wanted = [begins["1.cls"], begins["2.cls"]]
    for url in (path, f"pipe:cat {path}"):
        found = scan(url, classes=True)
        assert (found.error, found.offsets.tolist(), found.classes) == (None, wanted, {label})
    assert scan(path, "json").offsets.tolist() == wanted[:1]
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for url in (packed, f"pipe:cat {packed}"):
        assert scan(url).offsets.tolist() == [NO_OFFSET] * 2
    none = write_tar(tmp_path / "c.tar", [("1.txt", b"x")])
    assert offsets_of(Shard(str(none))).tolist() == []
    assert offsets_of(Shard(f"pipe:cat {path}")) is None


class Slow(BytesIO):
    """A stream that gives three bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 3))


def test_listed_offsets_come_in_any_pieces_and_are_of_the_file_that_was_indexed(
    tmp_path, monkeypatch, caplog
):
    content = np.arange(9, dtype="<u4").tobytes()

    def opened(url: str, begin: int) -> BytesIO:
        assert url == "index.offsets"
        return Slow(content[begin:])

    monkeypatch.setattr(offsets, "open_url", opened)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(100))
    place = ("index.offsets", 2)
    for size in (None, 100):
        assert listed_offsets(Shard(str(path), 4, place, size)).tolist() == [2, 3, 4, 5]
    assert listed_offsets(Shard(str(tmp_path / "gone.tar"), 4, place, 99)).tolist() == [2, 3, 4, 5]
    assert listed_offsets(Shard("https://a.org/a.tar", 7, place, 99)).tolist() == [*range(2, 9)]
    for shard in (Shard(str(path), 4), Shard(str(path), 0, place), Shard(str(path), None, place)):
        assert listed_offsets(shard) is None
    assert caplog.messages == []
    assert listed_offsets(Shard(str(path), 4, place, 99)) is None
    assert caplog.messages == [f"{path}: changed since it was indexed: its headers are read anew"]
