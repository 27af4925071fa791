import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from olvae.data.audit import audit_source
from olvae.data.opening import open_source
from olvae.data.read_errors import ReadError
from olvae.data.shards import tar_reading
from olvae.data.shards.index import with_counts
from olvae.data.shards.offsets import scan
from olvae.data.shards.tar_reading import Entry, Shard, Unpacked, is_packed, read_shard
from tests.data.images import encoded, write_shard, write_tar


def read(path: Path | str, image_key: str | None = None) -> tuple[list[Entry], list[ReadError]]:
    items = list(read_shard(Shard(str(path)), image_key))
    return [i for i in items if isinstance(i, Entry)], [
        i for i in items if isinstance(i, ReadError)
    ]


def count_images(path: Path, image_key: str | None = None) -> int:
    return len(scan(path, image_key).offsets)


def test_read_shard_gives_images_with_their_sidecars_in_order(tmp_path):
    entries, errors = read(write_shard(tmp_path / "a.tar", range(5)))
    assert [entry.key for entry in entries] == [f"a/{n:04d}" for n in range(5)]
    assert [entry.data for entry in entries] == [encoded(n) for n in range(5)]
    assert [json.loads(entry.files["json"]) for entry in entries] == [{"n": n} for n in range(5)]
    assert not errors


def test_samples_without_an_image_are_left_out(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("1.txt", b"a"), ("2.txt", b"b"), ("2.png", encoded(2, "PNG"))]
    )
    assert [entry.key for entry in read(path)[0]] == ["a/2"]
    assert count_images(path) == 1


def test_image_key_names_the_image_of_a_sample(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("1.mask.png", b"m"), ("1.input.jpg", b"i"), ("2.mask.png", b"m")]
    )
    assert [(e.key, e.data) for e in read(path, "input.jpg")[0]] == [("a/1", b"i")]
    assert count_images(path, "input.jpg") == 1
    assert count_images(path) == 0  # neither extension is an image's alone


def test_gzipped_shards_are_read_up_to_damage(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    zipped = tmp_path / "b.tar.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    entries, errors = read(zipped)
    assert len(entries) == count_images(zipped) == 3
    assert not errors
    zipped.write_bytes(zipped.read_bytes()[:-100])
    entries, errors = read(zipped)
    assert len(entries) in (2, 3)
    assert len(errors) == 1


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_gzipped_shards_of_several_parts_are_read(tmp_path, compress):
    whole = write_shard(tmp_path / "a.tar", range(6)).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(
        b"".join(compress(whole[i : i + 3000]) for i in range(0, len(whole), 3000))
    )
    entries, errors = read(tmp_path / "b.tar.gz")
    assert [entry.data for entry in entries] == [encoded(n) for n in range(6)]
    assert not errors


def test_a_shard_that_unpacks_to_much_more_than_its_size_ends_there(tmp_path):
    image, member = encoded(0), tarfile.TarInfo("b.jpg")
    before = write_tar(tmp_path / "a.tar", [("a.jpg", image)]).read_bytes().rstrip(b"\0")
    member.size = 2**27
    header = before + bytes(-len(before) % 512) + member.tobuf()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header + bytes(2**27), 1))
    (entry,), (error,) = read(tmp_path / "a.tar.gz")
    assert entry.data == image
    assert "decompression bomb" in error.reason


def test_the_reason_of_the_system_is_a_line(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "gone.tar", "no such file")):
        assert read(path) == ([], [ReadError(str(path), why)])


def read_unpacked(packed: bytes) -> bytes:
    unpacked = Unpacked(io.BytesIO(packed))
    return b"".join(iter(lambda: unpacked.read(2**16), b""))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_content_may_be_so_many_times_as_large_as_what_was_read_of_it(pack, monkeypatch):
    """To the byte."""
    content = bytes(20_000)
    packed = pack(content)
    monkeypatch.setattr(tar_reading, "MAX_EXPANSION", 3)
    monkeypatch.setattr(tar_reading, "FREE_EXPANSION", len(content) - 3 * len(packed))
    assert read_unpacked(packed) == content
    monkeypatch.setattr(tar_reading, "FREE_EXPANSION", len(content) - 3 * len(packed) - 1)
    with pytest.raises(ValueError, match="more than 3 times its size"):
        read_unpacked(packed)


def test_compressed_shards_are_known_by_their_names_or_if_they_are_local_by_their_bytes(tmp_path):
    plain = write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    packed = tmp_path / "b.tar"
    packed.write_bytes(bz2.compress(plain.read_bytes()))
    found = {
        str(plain): False,
        str(packed): True,
        f"{tmp_path}/gone.tar": False,
        f"{tmp_path}/gone.tgz": True,
        "http://h/a.tar?s=1": False,
        "http://h/a.tar.gz?s=1": True,
        "pipe:cat a.tar": False,
    }
    assert {url: is_packed(url) for url in found} == found


@pytest.mark.parametrize("content", [b"", b"plain", b"no more than this"])
def test_what_is_not_compressed_is_read_as_it_is(content):
    unpacked = Unpacked(io.BytesIO(content))
    assert not unpacked.packed
    assert b"".join(iter(lambda: unpacked.read(4), b"")) == content


def test_a_shard_cut_anywhere_gives_what_is_whole_before_the_cut(tmp_path):
    """150 random places: never an exception, never a good image lost, and always said."""
    whole = write_shard(tmp_path / "whole.tar", range(6)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [m.offset_data + m.size for m in archive if m.name.endswith(".jpg")]
    cut = tmp_path / "cut.tar"
    shard_end = whole.rstrip(b"\0").__len__()
    rng = random.Random(0)
    for place in [0, 1, 511, 512, 513, *(rng.randrange(len(whole)) for _ in range(145))]:
        cut.write_bytes(whole[:place])
        entries, errors = read(cut)
        assert [entry.data for entry in entries] == [
            encoded(n) for n in range(sum(end <= place for end in ends))
        ]
        assert errors or place > shard_end
        assert count_images(cut) <= len(entries) + 1  # one whose header is there


def test_damage_in_the_middle_of_a_shard_keeps_what_came_before_and_is_said(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    with tarfile.open(path) as archive:
        third = [m for m in archive if m.name.endswith(".jpg")][3]
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    entries, errors = read(path)
    assert [entry.key for entry in entries] == ["a/0000", "a/0001", "a/0002"]
    assert [error.name for error in errors] == [str(path)]


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100, bytes(3000)])
def test_read_shard_of_what_is_no_shard_is_an_error(content, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    entries, errors = read(path)
    assert not entries
    assert len(errors) == (0 if content == bytes(3000) else 1)  # zeros are an empty archive
    with pytest.raises(ValueError, match=r"a\.tar: .*without images"):
        with_counts([str(path)])


def test_an_unreadable_shard_says_what_happened_to_a_file_or_a_command(tmp_path):
    assert read("/nowhere/a.tar")[1] == [ReadError("/nowhere/a.tar", "no such file")]
    path = write_shard(tmp_path / "a.tar", range(6))
    for command, reason in {
        "false": "the command failed with exit status 1",
        f"head -c 9000 {path}; exit 56": "the command failed with exit status 56",
        "kill -9 $$": "the command was ended by SIGKILL",
    }.items():
        assert [error.reason for error in read(f"pipe:{command}")[1]] == [reason]
    # is left when the archive has ended
    assert read(f"pipe:cat {path}; head -c 1000000 /dev/zero")[1] == []


def test_a_command_that_is_left_at_damage_is_not_blamed(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    damaged = bytearray(path.read_bytes())
    damaged[512 * 8 : 512 * 60] = b"x" * 512 * 52
    path.write_bytes(damaged)
    (error,) = read(
        f"pipe:for i in 1 2 3 4 5 6 7 8 9; do cat {path} {path} {path} || exit 1; done"
    )[1]
    assert "exit status" not in error.reason


def test_pipes_are_shards_and_may_be_left_early(tmp_path, monkeypatch):
    begun = []

    def begin(*args, **kwargs):
        begun.append(popen(*args, **kwargs))
        return begun[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", begin)
    path = write_shard(tmp_path / "a.tar", range(40))
    items = read_shard(Shard(f"pipe:cat {path}"))
    assert isinstance(next(items), Entry)
    items.close()
    # Its process has ended, and is waited for.
    (process,) = begun
    assert process.returncode is not None


def test_a_file_of_a_shard_that_says_it_is_huge_is_not_read(tmp_path):
    image = encoded(0)
    first = tarfile.TarInfo("a.jpg")
    first.size = len(image)
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE):
        huge = tarfile.TarInfo("b.jpg")
        huge.size, huge.type = 2**33, kind
        path = tmp_path / "a.tar"
        path.write_bytes(
            first.tobuf() + image + bytes(-len(image) % 512) + huge.tobuf() + bytes(1024)
        )
        (entry,), (error,) = read(path)
        assert entry.key == "a/a"
        assert error.reason == "b.jpg: a sparse file, or larger than 1 GiB"


def test_a_local_shard_may_have_any_name():
    assert Shard("a b/my photos.v2.tar").name == "my photos.v2"
    assert [Shard(f"http://h/{name}?s=1").name for name in ("0.tar", "a.1.tar.gz")] == ["0", "a.1"]
    assert Shard("pipe:make-images").name == "pipe:make-images"


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_thousands_of_headers_in_a_row_are_one_unreadable_shard(kind, tmp_path, caplog):
    """Attributes and long names, each of which tarfile reads within the one before."""
    header = tarfile.TarInfo("a")
    header.type = kind
    path = write_shard(tmp_path / "s.tar", range(2))
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole + bytes(-len(whole) % 512) + header.tobuf() * 3000)
    good = write_shard(tmp_path / "t.tar", range(2, 4))
    entries, errors = read(path)
    assert [entry.key for entry in entries] == ["s/0000", "s/0001"]
    assert [error.reason for error in errors] == [
        "too many headers of long names or attributes in a row"
    ]
    assert [shard.images for shard in with_counts([str(path), str(good)])] == [2, 2]
    result = audit_source(str(tmp_path), 16)
    assert (result.images, result.problems[0]) == (4, f"{path}: {errors[0].reason}")
    found = [batch["key"][0] for batch in open_source(str(tmp_path), 16, 1).val_loader()]
    assert found == ["s/0000", "s/0001", "t/0002", "t/0003"]
