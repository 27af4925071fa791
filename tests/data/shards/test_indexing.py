"""Indexes of shards from elsewhere: counts and offsets, against what reading them gives."""

import gzip
import json

import pytest

from olvae.config import ConfigError
from olvae.data.audit import audit_source
from olvae.data.shards import indexing
from olvae.data.shards.index import Index, ShardRecord, with_counts
from olvae.data.shards.indexing import index_shards, is_unfetched
from olvae.data.shards.offsets import TAR_BLOCK, offsets_of
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from tests.data.images import encoded, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("one_process")

COUNTS = (5, 9, 1, 4)


def keys(shard: Shard, begin: int = 0) -> list[str]:
    return [entry.key for entry in read_shard(shard, None, begin)]


@pytest.mark.usefixtures("processes")
def test_an_index_counts_images_and_finds_where_each_begins(tmp_path):
    write_shards(tmp_path, COUNTS)
    place, index, damaged = index_shards(str(tmp_path), workers=2)
    assert place == tmp_path / "index.json"
    assert (index.images, damaged) == (19, [])
    content = json.loads(place.read_text())
    assert [shard["images"] for shard in content["shards"].values()] == list(COUNTS)
    assert (tmp_path / "index.offsets").stat().st_size == 4 * 19

    shards = with_counts([str(tmp_path / f"{i:03d}.tar") for i in range(4)])
    for shard, count in zip(shards, COUNTS, strict=True):
        offsets = offsets_of(shard)
        assert len(offsets) == count
        everything = keys(shard)
        for image in range(count):
            assert keys(shard, int(offsets[image]) * TAR_BLOCK) == everything[image:]


def test_remote_shards_are_indexed_once_and_read_from_their_middle(tmp_path, monkeypatch):
    import fsspec

    write_shards(tmp_path / "here", COUNTS)
    memory = fsspec.filesystem("memory")
    urls = []
    for path in sorted((tmp_path / "here").iterdir()):
        memory.pipe(f"/indexed/{path.name}", path.read_bytes())
        urls.append(f"memory://indexed/{path.name}")
    with pytest.raises(ConfigError, match="`out`"):
        index_shards(urls)
    index_shards(urls, tmp_path / "new" / "index")
    whole = tmp_path / "new" / "index" / "index.json"
    shards = with_counts(urls, str(whole))
    assert [shard.images for shard in shards] == list(COUNTS)
    offsets = offsets_of(shards[1])
    assert keys(shards[1], int(offsets[7]) * TAR_BLOCK) == keys(shards[1])[7:]

    source = WebDatasetSource(urls, 16, 2, index=str(whole), val_shards=urls[:1])
    assert source.interleave == 32
    assert source.describe_new_processes() is None


def test_damaged_and_empty_shards_are_named(tmp_path):
    write_shards(tmp_path, (6, 4))
    cut = tmp_path / "000.tar"
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    _, index, damaged = index_shards(str(tmp_path))
    assert damaged == ["000.tar"]
    assert 0 < index.shards["000.tar"].images < 6
    (tmp_path / "none").mkdir()
    write_tar(tmp_path / "none" / "a.tar", [("1.txt", b"a")])
    with pytest.raises(ValueError, match="no images"):
        index_shards(str(tmp_path / "none"))


def test_what_a_packs_index_says_of_its_shards_stays(tmp_path):
    """But what it says of a shard that was replaced since then."""
    paths = write_shards(tmp_path, (2, 3))
    sizes = [path.stat().st_size for path in paths]
    old = {
        "000.tar": {"images": 9, "bytes": sizes[0], "sha256": "ab"},
        "001.tar": {"images": 9, "bytes": 7, "sha256": "cd"},
    }
    (tmp_path / "index.json").write_text(json.dumps({"shards": old, "plan": "p"}))
    _, index, _ = index_shards(str(tmp_path))
    assert index.shards == {
        "000.tar": ShardRecord(2, sizes[0], "ab"),
        "001.tar": ShardRecord(3, sizes[1], None),
    }
    assert index.plan == "p"


def test_another_image_key_has_offsets_of_its_own(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.x.png", encoded(1, "PNG")), ("2.png", encoded(2, "PNG"))])
    index_shards(str(tmp_path), image_key="x.png")
    path = str(tmp_path / "a.tar")
    assert with_counts([path], image_key="x.png")[0].offsets is not None
    assert with_counts([path])[0].offsets is None


def test_two_shards_of_one_name_are_refused(tmp_path):
    write_shards(tmp_path / "a", (1,))
    write_shards(tmp_path / "b", (1,))
    with pytest.raises(ValueError, match=r"000\.tar: two shards"):
        index_shards([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")


def test_sorted_shards_are_described_by_their_index_and_by_a_check(tmp_path):
    for number in range(40):
        files = []
        for i in range(3):
            files += [(f"{i}.jpg", encoded(number)), (f"{i}.cls", str(number).encode())]
        write_tar(tmp_path / f"{number:03d}.tar", files)
    before = WebDatasetSource(str(tmp_path), 16, 16)
    assert before.describe_sorted() is None  # nobody knows
    _, index, _ = index_shards(str(tmp_path))
    assert index.classes == (1.0, 40)
    source = WebDatasetSource(str(tmp_path), 16, 16, interleave=2)
    assert "2.0 of them" in source.describe_sorted()
    assert WebDatasetSource(str(tmp_path), 16, 16).describe_sorted() is None  # 32 of 40 at once

    result = audit_source(str(tmp_path), 16)
    assert result.as_dict()["shards"][0]["classes"] == 1
    assert not [note for note in result.notes if "sorted by class" in note]
    for number in range(40, 100):
        files = [("0.jpg", encoded(1)), ("0.cls", str(number).encode())]
        write_tar(tmp_path / f"{number:03d}.tar", files)
    (note,) = [n for n in audit_source(str(tmp_path), 16).notes if "sorted by class" in n]
    assert "1.0 of 100" in note


def test_a_shard_that_can_not_be_fetched_is_not_one_without_images(tmp_path):
    """The index has the others; so training names the one that it lacks."""
    write_shards(tmp_path, COUNTS)
    (tmp_path / "index.json").unlink(missing_ok=True)
    places = [str(tmp_path / "000.tar"), f"pipe:cat {tmp_path}/gone/9.tar", f"{tmp_path}/008.tar"]
    with pytest.raises(OSError, match=r"2 shards .*exit status 1.*008\.tar"):
        index_shards(places, tmp_path / "index")
    assert [*Index.read(tmp_path / "index" / "index.json").shards] == ["000.tar"]
    with pytest.raises(ValueError, match=r"index\.json: .*list pipe:cat"):
        with_counts(places, tmp_path / "index" / "index.json")
    with pytest.raises(OSError, match=r"2 shards .*exit status 1.*008\.tar"):
        index_shards(places[1:], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_index_of_other_shards_is_not_replaced(tmp_path):
    write_shards(tmp_path, COUNTS)
    index_shards(str(tmp_path))
    with pytest.raises(ConfigError, match=r"lists other .*002"):
        index_shards(str(tmp_path / "{000..001}.tar"))
    for name in ("002.tar", "003.tar"):
        (tmp_path / name).unlink()
    assert index_shards(str(tmp_path / "{000..001}.tar"))[1].images == 14


def test_an_index_of_another_image_key_does_not_count(tmp_path):
    files = [("1.jpg", encoded(1)), ("2.jpg", encoded(2)), ("2.mask.png", encoded(2, "PNG"))]
    path = write_tar(tmp_path / "a.tar", files)
    index_shards(str(path), image_key="mask.png")
    assert [shard.images for shard in with_counts([str(path)], None, "mask.png")] == [1]
    assert [shard.images for shard in with_counts([str(path)])] == [2]
    with pytest.raises(ValueError, match=r"image_key mask\.png, not None"):
        with_counts([str(path)], tmp_path / "index.json")


def test_compressed_shards_are_read_one_after_the_other(tmp_path):
    write_shards(tmp_path / "shards", COUNTS)
    for file in (tmp_path / "shards").glob("*.tar"):
        file.write_bytes(gzip.compress(file.read_bytes()))
    for index in (False, True):
        source = WebDatasetSource(str(tmp_path / "shards"), size=16, batch_size=2)
        assert source.interleave == 1
        if not index:
            index_shards(str(tmp_path / "shards"))


def test_classes_are_those_of_a_shard_on_average_and_of_all(tmp_path):
    for name, labels in (("a", (1, 1)), ("b", (1, 2)), ("c", (3, 4))):
        files = []
        for i, label in enumerate(labels):
            files += [(f"{i}.jpg", encoded(i)), (f"{i}.cls", b"%d" % label)]
        write_tar(tmp_path / f"{name}.tar", files)
    done = []
    _, index, _ = index_shards(str(tmp_path), on_progress=lambda *args: done.append(args))
    assert index.classes == (5 / 3, 4)
    assert done == [(1, 3), (2, 3), (3, 3)]
    write_tar(tmp_path / "a.tar", [("1.jpg", encoded(1))])
    assert index_shards(str(tmp_path / "a.tar"), tmp_path / "out")[1].classes is None


def test_an_index_has_a_place(tmp_path, monkeypatch):
    write_shards(tmp_path / "a", (1, 1))
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "other.tar", [])
    local = str(tmp_path / "a" / "000.tar")
    for places in (
        [local, str(tmp_path / "b" / "other.tar")],
        [local, "pipe:cat x.tar"],
        ["pipe:cat x.tar"],
    ):
        with pytest.raises(ConfigError, match="`out`: name a folder"):
            index_shards(places)
    monkeypatch.setattr(indexing, "run_in_processes", lambda *_: None)
    assert index_shards(local, tmp_path / "out") is None


@pytest.mark.parametrize(
    ("url", "error", "unfetched"),
    [
        ("a.tar", FileNotFoundError(2, "gone"), True),
        ("a.tar", OSError("cut"), False),
        ("https://a.org/a.tar", OSError("cut"), True),
        ("https://a.org/a.tar", gzip.BadGzipFile("damaged"), False),
        ("https://a.org/a.tar", ValueError("damaged"), False),
    ],
)
def test_damage_is_no_failure_to_fetch(url, error, unfetched):
    assert is_unfetched(url, error) == unfetched


def test_an_index_elsewhere_keeps_what_it_says_of_remote_shards(tmp_path):
    """Their sizes are not known; a local shard's is that of the file."""
    (path,) = write_shards(tmp_path / "a", (2,))
    (tmp_path / "index.json").write_text(
        json.dumps({"shards": {"000.tar": {"images": 9, "bytes": 7, "sha256": "ab"}}})
    )
    _, index, _ = index_shards(f"pipe:cat {path}", tmp_path)
    assert index.shards == {"000.tar": ShardRecord(2, 7, "ab")}
    _, index, _ = index_shards(str(path), tmp_path)
    assert index.shards == {"000.tar": ShardRecord(2, path.stat().st_size, None)}
    other = write_tar(tmp_path / "a" / "b.tar", [("1.jpg", encoded(1))])
    with pytest.raises(ConfigError, match=r"lists other shards, such as 000\.tar"):
        index_shards(str(other), tmp_path)
