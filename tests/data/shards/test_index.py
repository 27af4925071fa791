import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from olvae.config import save
from olvae.data.opening import open_source
from olvae.data.shards import index
from olvae.data.shards.index import (
    Index,
    ShardRecord,
    find_shards,
    read_unchanged,
    share_indexes,
    split_shards,
    with_counts,
)
from olvae.data.shards.indexing import index_shards
from olvae.data.shards.offsets import scan
from olvae.data.shards.tar_reading import Shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.launcher import join, leave
from tests.data.images import encoded, write_shards, write_tar
from tests.forks import fork_ranks


def test_with_counts_of_an_empty_shard_and_a_broken_one(tmp_path, caplog):
    """One without images is said, and has none.

    One that can't be read has as many as the others have on average.
    """
    paths = [str(path) for path in write_shards(tmp_path / "s", [3, 5, 1, 1])]
    Path(paths[2]).write_bytes(bytes(10240))
    Path(paths[3]).write_bytes(b"no tar file" * 100)
    assert [shard.images for shard in with_counts(paths)] == [3, 5, 0, 3]
    (line,) = caplog.messages
    assert line.startswith(
        f"skipped {paths[2]}: a shard without images: no file in it ends in .jpg, "
    )


@pytest.mark.parametrize(
    ("url", "beside"),
    [("d/index.json", "d/index.offsets"), ("s3://b/d/other.json", "s3://b/d/index.offsets")],
)
def test_shards_of_an_index_are_described_with_where_their_offsets_begin(url, beside):
    """In the order of their names, each after the images of those before it."""
    records = {"b.tar": ShardRecord(5, 40), "a.tar": ShardRecord(3), "c.tar": ShardRecord(2, 8)}
    index = Index(records, offsets=True, image_key="png", classes=(1.5, 4))
    assert (index.images, index.bytes) == (10, 48)
    assert index.located(url, "png") == {
        "a.tar": Shard("", 3, (beside, 0), None, (1.5, 4)),
        "b.tar": Shard("", 5, (beside, 3), 40, (1.5, 4)),
        "c.tar": Shard("", 2, (beside, 8), 8, (1.5, 4)),
    }
    for unknown in (index, Index(records)):
        found = unknown.located(url, "jpg" if unknown is index else None)
        assert [shard.offsets for shard in found.values()] == [None] * 3
    assert [index.counts(key) for key in ("png", "jpg", None)] == [True, False, False]
    assert [Index(records).counts(key) for key in ("png", None)] == [True, True]


def test_find_shards_takes_folders_patterns_braces_and_urls(tmp_path, monkeypatch):
    paths = [str(path) for path in write_shards(tmp_path / "s", [1, 1, 1])]
    (tmp_path / "s" / "notes.txt").write_text("")
    folder = str(tmp_path / "s")
    assert find_shards(folder) == paths
    assert find_shards(f"{folder}/{{000..002}}.tar") == paths
    assert find_shards(f"{folder}/*.tar") == find_shards(f"file://{folder}/*.tar") == paths
    assert find_shards([f"{folder}/000.tar", f"{folder}/00{{1,2}}.tar"]) == paths
    assert find_shards("http://a/{00..01}.tar") == ["http://a/00.tar", "http://a/01.tar"]
    assert find_shards("pipe:cat {1..2}.tar") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]
    # missing ones
    assert find_shards(f"{folder}/00{{2..4}}.tar")[1:] == [f"{folder}/003.tar", f"{folder}/004.tar"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards("~/s") == paths
    for nothing in (str(tmp_path), f"{folder}/x*.tar", f"{folder}/{{7..9}}.tar", []):
        with pytest.raises(FileNotFoundError, match="no shards"):
            find_shards(nothing)


def test_with_counts_takes_an_index_or_counts(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path / "s", [3, 5])]
    assert [shard.images for shard in with_counts(paths)] == [3, 5]
    missing = str(tmp_path / "s" / "002.tar")
    # as many as the others have
    assert [shard.images for shard in with_counts([*paths, missing])] == [3, 5, 4]
    assert with_counts(["http://a/0.tar"])[0].images is None
    index = tmp_path / "s" / "index.json"
    index.write_text(json.dumps({"shards": {"000.tar": {"images": 30}, "001.tar": {"images": 50}}}))
    assert [shard.images for shard in with_counts(paths)] == [30, 50]  # believed
    assert with_counts(["http://a/000.tar"], str(index))[0].images == 30
    with pytest.raises(ValueError, match=r"does not list .*002\.tar"):
        with_counts([missing], str(index))
    index.write_text("{")
    with pytest.raises(ValueError, match="readable index"):
        with_counts(paths)


@pytest.mark.parametrize(
    "url",
    [
        "https://a.b/c/000.tar",
        "https://a.b/c/000.tar?X-Signature=abc&name=x",
        "pipe:aws s3 cp s3://bucket/c/000.tar -",
        "pipe:curl -s 'https://a.b/000.tar'",
        "pipe:cat /x.tar/000.tar | cat",
        "pipe:hadoop fs -cat hdfs:///d/000.tar",
    ],
)
def test_an_index_knows_shards_whatever_brings_them(tmp_path, url):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"shards": {"000.tar": {"images": 30}}}))
    (shard,) = with_counts([url], str(index))
    assert shard.images == 30
    assert shard.name == "000"


@pytest.mark.parametrize(
    "urls",
    [
        ["a/000.tar", "b/001.tar", "b/000.tar"],
        ["x/a/0.tar", "x/b/0.tar.gz"],
        ["http://h/a/0.tar?s=1", "http://h/b/0.tar?s=2"],
        ["pipe:cat /a/0.tar", "pipe:cat /b/0.tar"],
        ["../0.tar", "0.tar"],
    ],
)
def test_shards_of_one_name_are_refused(urls):
    message = (
        rf"{re.escape(urls[0])} and {re.escape(urls[-1])}: shards of the same name.*: "
        r"rename one of them, .*Mix"
    )
    with pytest.raises(ValueError, match=message):
        with_counts(urls)


@pytest.mark.parametrize(
    "urls",
    [
        ["pipe:fetch /a/0 | gunzip -c -", "pipe:fetch /b/0 | gunzip -c -"],
        ["pipe:get 1 > /dev/stdout", "pipe:get 2 > /dev/stdout"],
        ["https://h/1/download", "https://h/2/download"],
    ],
)
def test_commands_and_urls_that_end_alike_are_different_shards(urls):
    shards = with_counts(urls)
    assert [shard.url for shard in shards] == urls
    names = [shard.name for shard in shards]
    assert len(set(names)) == 2
    assert names == [shard.name for shard in with_counts(urls)]
    with pytest.raises(ValueError, match="same name"):
        with_counts([urls[0], urls[0]])


def test_remote_folders_and_patterns_are_listed(tmp_path):
    """By fsspec, here in its file system in memory; the web has no folders."""
    system = fsspec.filesystem("memory")
    for path in write_shards(tmp_path / "s", [3, 5, 2]):
        system.pipe_file(f"/bucket/d/{path.name}", path.read_bytes())
    system.pipe_file("/bucket/d/index.json", b"{}")
    urls = [f"memory://bucket/d/00{i}.tar" for i in range(3)]
    assert find_shards("memory://bucket/d/") == urls
    assert find_shards("memory://bucket/d/*.tar") == urls
    assert find_shards("memory://bucket/d/00[12].tar") == urls[1:]
    source = open_source("memory://bucket/d/", 16, 1)
    assert len([*source.val_loader()]) == 10
    for url in ("https://a.org/d/?x=1", "s3://a/000.tar", "pipe:cat *.tar"):
        assert find_shards(url) == [url]
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/none/: no shards"):
        find_shards("memory://bucket/none/")
    with pytest.raises(OSError, match=r"nosuch://a/: .*nosuch"):
        find_shards("nosuch://a/")


class Hosted(MemoryFileSystem):
    """Files at a host, which is no part of their names, as of FTP."""

    protocol = "hosted"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return re.sub("^hosted://[^/]*", "", path).rstrip("/")


def test_remote_shards_keep_their_host_and_their_own_names():
    """A shard whose name has a wildcard's character is no pattern."""
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    urls = [f"hosted://user@host:21/hosted/{name}.tar" for name in ("0", "1", "a[1]")]
    for url in urls:
        fsspec.filesystem("memory").pipe_file(Hosted._strip_protocol(url), b"x")
    assert find_shards("hosted://user@host:21/hosted/") == urls
    assert find_shards("hosted://user@host:21/hosted/[01].tar") == urls[:2]
    assert find_shards(urls[2]) == urls[2:]


@pytest.mark.parametrize("kind", ["dots", tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_pictures_of_a_shard_that_nothing_reads_are_not_left_out_in_silence(kind, tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("1.jpg", encoded(1)), ("photo.v2.jpg", encoded(2))])
    if kind != "dots":
        write_tar(path, [("1.jpg", encoded(1))])
        link = tarfile.TarInfo("2.jpg")
        link.type = kind
        link.linkname = "1.jpg"
        with tarfile.open(path, "a") as archive:
            archive.addfile(link)
    assert len(scan(path).offsets) == 1
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: pictures of its shards are left out: links, or names with")


def test_other_pictures_of_an_image_are_not_left_out(tmp_path, caplog):
    files = [("1.depth.png", encoded(1, "PNG")), ("1.jpg", encoded(1)), ("1.seg.png", b"s")]
    assert len(scan(write_tar(tmp_path / "a.tar", files)).offsets) == 1
    assert len(scan(write_tar(tmp_path / "b.tar", files[:1]), "depth.png").offsets) == 1
    assert not caplog.messages


def test_shards_of_ten_thousand_images_are_held_out_unless_a_share_is_given(tmp_path):
    """By an index; 3 of 60 shards are 5 %."""
    names = [f"{i:03d}.tar" for i in range(60)]
    for name in names:
        (tmp_path / name).touch()

    def held_out(images: int, fraction: float | None = None) -> tuple[list[str], str]:
        records = {name: {"images": images} for name in names}
        (tmp_path / "index.json").write_text(json.dumps({"shards": records}))
        source = WebDatasetSource(str(tmp_path), 16, 4, val_fraction=fraction)
        return [Path(shard.url).name for shard in source.val], source.describe()

    few, _ = held_out(3000)
    assert few == names[-3:]
    bounded, text = held_out(5000)
    assert bounded == names[-2:]
    assert text == (
        "290000 training images in 58 shards, 10000 validation and test images "
        "(at most 10,000 without data.params.val_fraction)"
    )
    assert held_out(5001)[0] == held_out(90_000)[0] == names[-1:]
    assert held_out(5001, 0.05) == (
        names[-3:],
        "285057 training images in 57 shards, 15003 validation and test images",
    )

    # Without an index the last 5 % are held out as before, and where an index is given, by that.
    (tmp_path / "index.json").rename(tmp_path / "other.json")
    urls = [f"http://a/{name}" for name in names]
    assert len(WebDatasetSource(urls, 16, 4).val) == 3
    given = WebDatasetSource(urls, 16, 4, index=tmp_path / "other.json")
    assert len(given.val) == 1


def test_an_index_of_another_image_key_bounds_no_validation_set(tmp_path):
    paths = write_shards(tmp_path, [2] * 60)
    records = {path.name: {"images": 6000} for path in paths}
    content = {"shards": records, "image_key": "x.png"}
    (tmp_path / "index.json").write_text(json.dumps(content))
    urls = [str(path) for path in paths]
    assert index.images_listed(urls, image_key="x.png") == [6000] * 60
    assert index.images_listed(urls) == [0] * 60
    assert len(split_shards(urls, None, None, "val", image_key="x.png")[1]) == 1
    assert len(split_shards(urls, None, None, "val")[1]) == 3
    assert len(WebDatasetSource(urls, 16, 4).val) == 3


def test_an_index_is_parsed_once_and_no_shard_is_asked_for_by_itself(tmp_path, monkeypatch):
    write_shards(tmp_path, [2] * 12)
    index_shards(str(tmp_path))
    read: list[str] = []
    asked: list[str] = []
    open_url, stat = index.open_url, Path.stat

    def note_read(url: str) -> Any:
        read.append(url)
        return open_url(url)

    def note_stat(path: Path, **options: Any) -> Any:
        asked.append(path.name)
        return stat(path, **options)

    monkeypatch.setattr(index, "open_url", note_read)
    monkeypatch.setattr(Path, "stat", note_stat)
    for _ in range(2):
        found = with_counts(find_shards(tmp_path))
    assert [shard.images for shard in found] == [2] * 12
    assert read == [str(tmp_path / "index.json")]
    # The first one alone, as a sign that there are any.
    assert {name for name in asked if name.endswith(".tar")} == {"000.tar"}


def test_an_index_that_has_changed_is_read_again(tmp_path):
    write_shards(tmp_path, [2, 3])
    place, _, _ = index_shards(str(tmp_path))
    assert Index.read(place).images == 5
    write_shards(tmp_path, [2, 3, 4])
    index_shards(str(tmp_path))
    assert Index.read(place).images == 9


@pytest.mark.parametrize("where", ["beside", "given", "in a mix"])
def test_the_first_process_reads_an_index_for_all(tmp_path, where, monkeypatch):
    """A local one beside shards, and a remote one that a config names."""
    folder = tmp_path / "shards"
    write_shards(folder, [2, 3])
    place, _, _ = index_shards(str(folder))
    params = {"shards": str(folder), "size": 16, "batch_size": 1}
    if where != "beside":
        place = place.rename(tmp_path / "other.json")
        params["index"] = f"file://{place}"
    node = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    if where == "in a mix":
        common = {"size": 16, "batch_size": 1, "sources": [node, node]}
        node = {"target": "olvae.data.mix.MixSource", "params": common}
    save({"data": node}, tmp_path / "data.yaml")
    log = tmp_path / "log"
    open_url = index.open_url

    def note_read(url: str) -> Any:
        stream = open_url(url)
        with log.open("a") as file:
            file.write(f"{os.environ['RANK']} {url}\n")
        return stream

    def work() -> None:
        join()
        for _ in range(2):
            source = open_source(str(tmp_path / "data.yaml"), 16, 1)
            assert source.samples_per_epoch == (4 if where == "in a mix" else 2)
        leave()

    monkeypatch.setattr(index, "open_url", note_read)
    read_unchanged.cache_clear()
    fork_ranks(work)
    assert log.read_text() == f"0 {params.get('index', place)}\n"


def test_an_index_that_the_first_process_can_not_read_is_named_in_all(tmp_path):
    write_shards(tmp_path, [2, 3])
    (tmp_path / "index.json").write_text("{")

    def work() -> None:
        join()
        with pytest.raises(ValueError, match="readable index"):
            open_source(str(tmp_path), 16, 1)
        share_indexes({"index": "file:///gone.json"})
        with pytest.raises(ValueError, match=r"gone\.json"):
            WebDatasetSource(str(tmp_path), 16, 1, index="file:///gone.json")
        leave()

    fork_ranks(work)
