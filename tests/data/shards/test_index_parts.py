"""An index's content, where indexes are found and shared, and what shards they say are missing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from olvae.data.shards import index as index_module
from olvae.data.shards.index import (
    Index,
    ShardRecord,
    check_packed,
    find_shards,
    images_listed,
    incomplete,
    may_exist,
    named_indexes,
    read_unchanged,
    share_indexes,
    split_shards,
    with_counts,
)
from olvae.data.source import BOUND
from olvae.files import file_state
from tests.data.images import write_shards


def write_index(folder: Path, images: dict[str, int], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    shards = {name: {"images": count} for name, count in images.items()}
    (folder / "index.json").write_text(json.dumps({"shards": shards, **more}))
    return folder / "index.json"


def test_an_index_is_written_whole_and_read_again(tmp_path):
    records = {"b.tar": ShardRecord(5, 40, "abc"), "a.tar": ShardRecord(3)}
    unreadable = [{"shard": "a.tar", "name": "x", "reason": "bad"}]
    whole = Index(records, {"seed": 1}, "plan", unreadable, True, "png", (1.5, 4))
    whole.write(tmp_path / "index.json")
    content = json.loads((tmp_path / "index.json").read_text())
    assert content == {
        "version": 1,
        "images": 8,
        "bytes": 40,
        "packed": {"seed": 1},
        "plan": "plan",
        "unreadable": unreadable,
        "offsets": True,
        "image_key": "png",
        "classes": [1.5, 4],
        "shards": {
            "a.tar": {"images": 3, "bytes": None, "sha256": None},
            "b.tar": {"images": 5, "bytes": 40, "sha256": "abc"},
        },
    }
    assert Index.read(tmp_path / "index.json") == whole
    place = write_index(tmp_path / "plain", {"a.tar": 3})
    assert Index.read(place) == Index({"a.tar": ShardRecord(3)})


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"shards": {"a": 1}}', '{"shards": {"a": {"images": "x"}}}']
)
def test_what_is_no_index_is_named(tmp_path, content):
    place = tmp_path / "index.json"
    place.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{place}: not a readable index of shards: ")):
        Index.read(place)
    with pytest.raises(FileNotFoundError):
        Index.read(tmp_path / "gone.json")


def test_indexes_are_found_in_nodes_and_beside_shards(tmp_path):
    for name in "ab":
        write_index(tmp_path / name, {})
    (tmp_path / "none").mkdir()
    a, b = (str(tmp_path / name) for name in "ab")
    places = {
        "params": {
            "sources": [{"shards": [f"{a}/0.tar", tmp_path / "b"]}, {"shards": f"{tmp_path}/none"}],
            "index": "https://example.org/index.json",
            "size": 3,
        },
        "index": [f"{tmp_path}/own.json"],
        "other": "https://example.org/a.tar",
    }
    assert list(named_indexes(places)) == [
        f"{a}/index.json",
        f"{b}/index.json",
        "https://example.org/index.json",
        f"{tmp_path}/own.json",
    ]
    assert list(named_indexes(3)) == []


def test_an_index_is_read_for_all_processes_and_forgotten_once_it_was_needed(tmp_path, monkeypatch):
    place = write_index(tmp_path, {"a.tar": 3})
    shared: dict[tuple[str, str], bytes] = {}
    monkeypatch.setattr(index_module, "_shared", shared)
    monkeypatch.setattr(index_module, "from_first", lambda read: read())
    read_unchanged.cache_clear()
    # Alone, a process needs nothing of others.
    monkeypatch.setattr(index_module, "this_process", lambda: (0, 1))
    share_indexes(str(tmp_path))
    assert Index.read(place).images == 3
    assert shared == {}

    monkeypatch.setattr(index_module, "this_process", lambda: (1, 2))
    read_unchanged.cache_clear()
    key = (str(place), file_state(place))
    share_indexes({"shards": str(tmp_path), "index": str(tmp_path / "gone.json")})
    assert shared == {key: place.read_bytes()}
    shared[key] = json.dumps({"shards": {"a.tar": {"images": 7}}}).encode()
    share_indexes(str(tmp_path))
    assert Index.read(place).images == 7
    assert shared == {key: b""}
    read_unchanged.cache_clear()
    assert Index.read(place).images == 3


def test_shards_packed_in_whole_groups_may_be_split(tmp_path):
    packed = {"packed": {"hold_out_by": "folder"}}
    write_index(tmp_path / "a", {}, **packed)
    write_index(tmp_path / "b", {}, packed={"seed": 1})
    (tmp_path / "none").mkdir()
    a, b, none = (f"{tmp_path}/{name}/0.tar" for name in ("a", "b", "none"))
    index_of_a = tmp_path / "a" / "index.json"
    for urls, how, index in (
        ([none], "file", None),
        ([a], "folder", None),
        ([a, none, "https://example.org/0.tar"], "folder", None),
        ([none], "folder", index_of_a),
        (["https://example.org/0.tar"], "folder", str(index_of_a)),
    ):
        check_packed(urls, how, index)
    for urls, how, index in (
        ([a], r"(?P<group>\d)", None),
        ([b], "folder", None),
        ([a, b], "folder", None),
        ([none], "folder", None),
        ([a], "folder", tmp_path / "b" / "index.json"),
    ):
        with pytest.raises(ValueError, match="were not packed by `hold_out_by`") as error:
            check_packed(urls, how, index)
        assert str(error.value).startswith(f"{urls[0]}: ")


def test_the_last_shards_are_held_out(tmp_path):
    urls = [f"{tmp_path}/{number:02d}.tar" for number in range(40)]
    assert split_shards(urls, None, None, "val") == (urls[:38], urls[38:], "")
    assert split_shards(urls, None, 0.5, "val") == (urls[:20], urls[20:], "")
    assert split_shards(urls, ["val.tar"], None, "val") == (urls, ["val.tar"], "")
    assert split_shards(urls[:2], None, None, "val") == (urls[:1], urls[1:2], "")
    assert split_shards(urls[:1], urls[:1], None, "val") == (urls[:1], urls[:1], "")
    with pytest.raises(ValueError, match=r"00\.tar: one shard can't be split.*data\.params\.val"):
        split_shards(urls[:1], None, None, "val")
    with pytest.raises(ValueError, match="val_fraction"):
        split_shards(urls, ["val.tar"], 1.5, "val")
    # By an index, no more than have 10,000 images.
    for images, held_out, bound in ((5000, 2, ""), (5001, 1, BOUND), (20_000, 1, BOUND)):
        write_index(tmp_path, {Path(url).name: images for url in urls})
        assert split_shards(urls, None, None, "val") == (urls[:-held_out], urls[-held_out:], bound)
    assert split_shards(urls, None, 0.05, "val") == (urls[:38], urls[38:], "")


def test_numbers_of_images_are_looked_up(tmp_path):
    place = write_index(tmp_path / "a", {"0.tar": 3, "1.tar": 4})
    urls = [f"{tmp_path}/a/{name}.tar" for name in "012"]
    assert images_listed(urls) == [3, 4, 0]
    assert images_listed([*urls, f"{tmp_path}/b/0.tar", "https://a.org/0.tar"])[3:] == [0, 0]
    remote = [f"https://example.org/{name}.tar" for name in "102"]
    assert images_listed(remote, place) == [4, 3, 0]


def test_an_index_of_other_images_or_without_a_shard_is_refused(tmp_path):
    place = write_index(tmp_path / "a", {"0.tar": 3}, image_key="png", offsets=True)
    url = "https://example.org/0.tar"
    (shard,) = with_counts([url], place, "png")
    assert (shard.url, shard.images) == (url, 3)
    assert shard.offsets == (str(tmp_path / "a" / "index.offsets"), 0)
    # A command's output has no middle.
    assert with_counts(["pipe:cat 0.tar"], place, "png")[0].offsets is None
    with pytest.raises(ValueError, match="is of images of the image_key png, not jpg"):
        with_counts([url], place, "jpg")
    with pytest.raises(ValueError, match=r"does not list https://example\.org/1\.tar"):
        with_counts(["https://example.org/1.tar"], place, "png")


def test_shards_that_can_not_be_counted_have_the_mean_of_the_others(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path / "s", [1, 1])]
    gone = str(tmp_path / "s" / "gone.tar")
    assert [shard.images for shard in with_counts([*paths, gone])] == [1, 1, 1]
    Path(paths[0]).write_bytes(b"no tar file" * 100)
    for urls in ([paths[0]], [paths[0], gone]):
        with pytest.raises(
            ValueError, match=r"a shard without images: no file in it ends in \.jpg,"
        ):
            with_counts(urls)
    with pytest.raises(ValueError, match=r"no file in it ends in \.x\.png from"):
        with_counts([paths[1]], image_key="x.png")


def test_a_folder_says_what_it_lacks(tmp_path, caplog):
    names = [f"{number}.tar" for number in range(5)]
    folder = tmp_path / "s"
    assert write_index(folder, dict.fromkeys(names, 3))
    for present, text in (
        (0, "0.tar, 1.tar, 2.tar and 2 more"),
        (1, "1.tar, 2.tar, 3.tar and 1 more"),
        (2, "2.tar, 3.tar, 4.tar"),
        (5, None),
    ):
        for name in names[:present]:
            (folder / name).touch()
        found = incomplete(folder)
        assert found == (text and f"shards of index.json are missing: {text}")
    (folder / ".packing").mkdir()
    assert incomplete(folder).startswith("its packing was interrupted")
    assert find_shards(folder) == [str(folder / name) for name in names]
    assert caplog.messages == [f"{folder}: {incomplete(folder)}"]
    (folder / ".packing").rmdir()
    for content in ("{", None):
        if content:
            (folder / "index.json").write_text(content)
        else:
            (folder / "index.json").unlink()
        assert incomplete(folder) is None


def test_places_of_shards_are_written_in_many_ways(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path / "s", [1])
    odd = path.rename(tmp_path / "s" / "a[1].tar")
    assert find_shards(str(odd)) == [str(odd)]
    assert find_shards(odd) == [str(odd)]
    monkeypatch.chdir(tmp_path / "s")
    assert find_shards(".") == ["a[1].tar"]
    assert find_shards("./") == ["a[1].tar"]
    assert find_shards(f"file:{odd}") == [str(odd)]
    with pytest.raises(ValueError, match=r"\$\{NO_SUCH_VARIABLE\}/a\.tar: "):
        find_shards("${NO_SUCH_VARIABLE}/a.tar")
    assert [may_exist(url) for url in (str(odd), "gone.tar", str(tmp_path), "https://a/b.tar")] == [
        True,
        False,
        False,
        True,
    ]
