import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.image import EvalTransform, Photo, image_to_tensor
from olvae.data.packing import PackOptions, pack
from olvae.data.read_errors import TooManyUnreadableError, UnreadableImageError
from olvae.data.shards import webdataset
from olvae.data.shards.indexing import index_shards
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess, Sample
from tests.data.images import encoded, keys_of, same, take, write_photos, write_shard, write_shards

ALONE = LoaderProcess()

COUNTS = (5, 9, 1, 14, 7, 3, 11)  # 50 images


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "shards", COUNTS)
    write_shards(tmp_path / "val", (4, 3))
    return tmp_path


def source(root: Path, **arguments: Any) -> WebDatasetSource:
    defaults = {"size": 16, "batch_size": 4, "val_shards": str(root / "val"), "shuffle": 6}
    return WebDatasetSource(
        arguments.pop("shards", str(root / "shards")), **{**defaults, **arguments}
    )


def remote(root: Path) -> list[str]:
    """The same shards through a command, so that their numbers of images are unknown."""
    return [f"pipe:cat {path}" for path in sorted((root / "shards").iterdir())]


def keys(
    s: WebDatasetSource,
    count: int,
    position: int = 0,
    process: LoaderProcess = ALONE,
    seed: int = 0,
) -> list[str]:
    return [sample.key for sample in islice(s.stream(seed, position, process), count)]


@pytest.mark.parametrize("shuffle", [1, 6, 7, 1000])
def test_each_image_of_shards_once_an_epoch_in_an_order_of_its_own(shards, shuffle):
    seen = keys(source(shards, shuffle=shuffle), 150)
    epochs = [seen[i : i + 50] for i in (0, 50, 100)]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert keys(source(shards, shuffle=shuffle), 50, seed=1) != epochs[0]


@pytest.mark.parametrize("processes", [2, 3, 4, 7, 16])
def test_known_shards_are_shared_evenly_and_no_image_comes_twice(shards, processes):
    s, share = source(shards), 50 // processes
    for epoch in (0, 1):
        seen = [
            key
            for i in range(processes)
            for key in keys(s, share, epoch * share, LoaderProcess(i, processes))
        ]
        assert len(set(seen)) == len(seen) == share * processes


def test_shards_of_unknown_counts_are_shared_whole(shards):
    """Each process's own epoch is every n-th shard, whatever the others have read by then."""
    s = source(shards, shards=remote(shards))
    first = [keys(s, 200, 0, LoaderProcess(i, 2)) for i in (0, 1)]
    order = np.random.default_rng((0, 0, 1)).permutation(7)
    for i, seen in enumerate(first):
        mine = [int(shard) for shard in order[i::2]]
        count = sum(COUNTS[shard] for shard in mine)
        assert Counter(key.split("/")[0] for key in seen[:count]) == {
            f"{m:03d}": COUNTS[m] for m in mine
        }
        assert len(set(seen[:count])) == count
    assert s.samples_per_epoch is None


def test_validation_of_shards_is_each_picture_once(shards):
    s = source(shards)
    for workers in (0, 2):
        found = take(source(shards, num_workers=workers).val_loader(), 99)
        assert sorted(keys_of(found)) == [f"{n // 4:03d}/{n:04d}" for n in range(7)]
    (batch,) = take(s.val_loader(), 1)
    assert batch["key"][0] == "000/0000"
    expected = EvalTransform(16)(Image.open(io.BytesIO(encoded(0))))
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_the_last_shards_are_held_out(shards):
    s = source(shards, val_shards=None, val_fraction=0.3)
    assert [Path(shard.url).name for shard in s.val] == ["005.tar", "006.tar"]
    assert (s.samples_per_epoch, s.val_images, s.images) == (36, 14, 50)
    assert "36 training images in 5 shards, 14 validation" in s.describe()
    assert len(source(shards, val_shards=None, val_fraction=0.99).val) == 6  # of 7


def test_broken_images_are_replaced_by_others_of_their_block_and_counted(shards, caplog):
    write_shard(shards / "shards" / "003.tar", range(15, 29), {17: b"", 20: b"no picture"})
    s = source(shards, max_unreadable=0.05)
    loader = s.train_loader()
    seen = take(loader, 12)
    assert all(len(batch["key"]) == 4 for batch in seen)
    assert {"003/0017", "003/0020"}.isdisjoint(keys_of(seen))
    assert loader.read_errors.lost == 2
    assert sum("skipped" in message for message in caplog.messages) == 2
    assert same(take(source(shards, max_unreadable=0.05).train_loader(start=20), 7), seen[5:])


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_lost_shard_does_not_change_what_the_others_give(shards, damage, caplog):
    """All of its 14 places, whole blocks among them, are taken by other images."""
    index = {f"{i:03d}.tar": {"images": count} for i, count in enumerate(COUNTS)}
    (shards / "shards" / "index.json").write_text(json.dumps({"shards": index}))
    before = keys(source(shards), 100)
    path = shards / "shards" / "003.tar"
    if damage == "missing":
        path.unlink()
        s = source(shards, shards=str(shards / "shards" / "{000..006}.tar"), max_unreadable=0.5)
    else:
        path.write_bytes(path.read_bytes()[: 5000 if damage == "cut" else 0])
        s = source(shards, max_unreadable=0.5)
    samples = list(islice(s.stream(0, 0, LoaderProcess()), 100))
    kept = [a if not b.errors else None for a, b in zip(before, samples, strict=True)]
    assert all(k is None or k == sample.key for k, sample in zip(kept, samples, strict=True))
    assert all(sample.image is not None for sample in samples)
    lost = {error.image for sample in samples for error in sample.errors}
    assert len(lost) == (
        14 if damage != "cut" else 14 - sum(k.startswith("003") for k in set(keys(s, 50)))
    )
    assert keys(s, 20, 60) == [sample.key for sample in samples[60:80]]
    with pytest.raises(
        TooManyUnreadableError,
        match=r"of 57 .*data\.params\.max_unreadable = 0\.01.*003\.tar",
    ):
        take(source(shards, shards=str(shards / "shards" / "{000..006}.tar")).train_loader(), 13)


@pytest.mark.parametrize("counts", ["counted", "index", "unknown"])
def test_an_empty_shard_among_many_is_said_once_and_loses_nothing(shards, counts, caplog):
    """In training and in validation, even where it is all that a loader process has."""
    for path in (shards / "shards" / "003.tar", shards / "val" / "002.tar"):
        path.write_bytes(bytes(10240))
    urls = sorted(map(str, (shards / "shards").iterdir()))
    if counts == "index":
        index = {
            f"{i:03d}.tar": {"images": 0 if i == 3 else count} for i, count in enumerate(COUNTS)
        }
        (shards / "shards" / "index.json").write_text(json.dumps({"shards": index}))
    if counts == "unknown":
        urls = [f"pipe:cat {url}" for url in urls]
    val = [url.replace("shards/", "val/") for url in urls[:3]]
    s = source(shards, shards=urls, val_shards=val, num_workers=2, batch_size=2, max_unreadable=0)
    loader, held_out = s.train_loader(), s.val_loader()
    seen = keys_of(take(loader, 30))
    assert {key.partition("/")[0] for key in seen} == {f"{i:03d}" for i in range(7) if i != 3}
    assert len(keys_of(held_out)) == 7
    assert loader.read_errors.lost == held_out.read_errors.lost == 0
    for url in (urls[3], val[2]):
        assert sum(f"skipped {url}: " in line for line in caplog.messages) == 1
    # has the empty one
    alone = LoaderProcess(list(np.random.default_rng((0, 0, 1)).permutation(7)).index(3), 7)
    assert keys(s, 12, 5, alone) == keys(s, 17, 0, alone)[5:]


def test_a_broken_shard_in_validation(shards):
    path = shards / "val" / "000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    (shards / "val" / "index.json").write_text(
        json.dumps({"shards": {"000.tar": {"images": 4}, "001.tar": {"images": 3}}})
    )
    s = source(shards, max_unreadable=0.5)
    loader = s.val_loader()
    found = keys_of(loader)
    assert found[-3:] == ["001/0004", "001/0005", "001/0006"]
    assert loader.read_errors.lost == 7 - len(found)


@pytest.mark.parametrize("counted", ["index", "headers"])
def test_the_rest_of_a_truncated_shard_is_missing(counted, shards, caplog):
    path = shards / "val" / "000.tar"
    with tarfile.open(path) as archive:
        second = [member for member in archive if member.name.endswith(".jpg")][1]
    path.write_bytes(path.read_bytes()[: second.offset])
    if counted == "index":
        counts = {"000.tar": {"images": 4}, "001.tar": {"images": 3}}
        (shards / "val" / "index.json").write_text(json.dumps({"shards": counts}))
    loader = source(shards, max_unreadable=0.9).val_loader()
    assert keys_of(loader) == ["000/0000", "001/0004", "001/0005", "001/0006"]
    (line,) = [line for line in caplog.messages if "000.tar" in line]
    assert "rest of the shard" in line
    if counted == "index":
        assert line.endswith(": 3 images by its index.json, or as many or more without one")
        assert loader.read_errors.lost == 3
    else:
        assert line.endswith(": an unknown number of images, because no index counts them")
        assert loader.read_errors.lost == 1


def test_a_shard_in_validation_that_has_become_shorter(shards, caplog):
    """Whole, but with fewer images than its index says; and one that is not there any more."""
    counts = {"000.tar": {"images": 6}, "001.tar": {"images": 3}, "002.tar": {"images": 5}}
    (shards / "val" / "index.json").write_text(json.dumps({"shards": counts}))
    loader = source(shards, max_unreadable=0.5).val_loader()
    assert len(keys_of(loader)) == 7
    assert loader.read_errors.lost == 2
    assert f"{shards / 'val'}: shards of index.json are missing: 002.tar" in caplog.messages
    assert any("000.tar: has fewer" in message for message in caplog.messages)


def test_a_split_of_missing_shards_is_told_before_training(shards):
    pattern = str(shards / "shards" / "{000..009}.tar")  # 000 to 006 are there
    with pytest.raises(FileNotFoundError, match=r"008\.tar: .*validation, .*2 of 10"):
        source(shards, shards=pattern, val_shards=None, val_fraction=0.2)
    assert source(shards, shards=pattern, val_shards=None, val_fraction=0.4).val_images
    with pytest.raises(FileNotFoundError, match=r"x\.tar: .*training"):
        source(
            shards,
            shards=[str(shards / "x.tar"), str(shards / "shards" / "000.tar")],
            val_shards=None,
        )


def test_too_few_shards_are_told_before_training(shards):
    with pytest.raises(ValueError, match=r"7 .*shards for 8"):
        source(shards, shards=remote(shards), num_workers=4).check_processes(2)
    source(shards, num_workers=4).check_processes(2)  # known shards can be cut
    with pytest.raises(ValueError, match=r"50 .*images for 64"):
        source(shards, num_workers=32).check_processes(2)
    with pytest.raises(ValueError, match=r"set data\.params\.val_shards"):
        source(shards, shards=str(shards / "shards" / "000.tar"), val_shards=None)
    with pytest.raises(ValueError, match="larger than"):
        source(shards, batch_size=51)
    with pytest.raises(ValueError, match="shuffle"):
        source(shards, shuffle=0)
    with pytest.raises(ValueError, match="val_fraction"):
        source(shards, val_fraction=1.0)


def test_unknown_shards_are_dealt_without_a_comparison_of_each_with_all(shards, monkeypatch):
    compared = []
    equal = Shard.__eq__
    s = source(shards, shards=remote(shards))
    s.train = [s.train[0]._replace(url=f"{s.train[0].url} #{i}") for i in range(400)]
    monkeypatch.setattr(
        Shard, "__eq__", lambda one, other: compared.append(one) or equal(one, other)
    )
    for i in range(2):
        assert keys(s, 3, process=LoaderProcess(i, 2))
    assert len(compared) <= 10 * len(s.train)


def test_shards_none_of_which_can_be_read_end_training():
    s = WebDatasetSource(["pipe:false", "pipe:exit 3"], 16, 1, val_shards="pipe:true")
    with pytest.raises(ValueError, match=r"none of .*2 .*pipe:false"):
        keys(s, 1)


def test_shards_that_serve_for_both_parts_are_counted_once(shards, monkeypatch):
    """An index is that of the training shards."""
    asked = []
    known = webdataset.with_counts
    monkeypatch.setattr(
        webdataset, "with_counts", lambda *args: [asked.append(args), known(*args)][1]
    )
    urls = [str(path) for path in sorted((shards / "shards").iterdir())]
    val = [str(path) for path in sorted((shards / "val").iterdir())]
    source(shards, val_shards=str(shards / "shards"))
    assert asked == [(urls, None, None)]
    asked.clear()
    index_shards(urls, shards / "index")
    index = shards / "index" / "index.json"
    source(shards, index=index, image_key=None)
    assert asked == [(urls, index, None), (val, None, None)]
    asked.clear()
    source(shards, val_shards=None, val_fraction=0.3, index=index, hold_out_by="file")
    assert asked == [(urls[:5], index, None), (urls[5:], index, None)]


def test_a_source_of_shards_has_its_settings_and_says_what_it_knows(shards):
    s = source(shards)
    assert s.describe() == "50 training images in 7 shards, 7 validation and test images"
    assert s.test_set is s.val
    unknown = source(shards, shards=remote(shards), val_shards=remote(shards)[:1])
    assert unknown.describe() == (
        "an unknown number of training images in 7 shards, "
        "an unknown number of validation and test images"
    )
    s = source(
        shards,
        size=[8, 9],
        min_fraction=0.4,
        filters=["box"],
        flip=False,
        shuffle_channels=0.3,
        channels=1,
        num_workers=2,
        max_unreadable=0.2,
        interleave=3,
        augment={"turns": False},
    )
    crop = s.transform
    assert (crop.size, crop.min_fraction, crop.filters, crop.flip) == ([8, 9], 0.4, ["box"], False)
    assert (crop.shuffle_channels, crop.augment) == (0.3, {"turns": False})
    assert (s.size, s.channels, s.num_workers, s.interleave) == ((8, 9), 1, 2, 3)
    assert (s.max_unreadable, s.shuffle, s.batch_size) == (0.2, 6, 4)


def test_an_entry_is_cut_for_training_and_resized_for_validation(shards):
    s = source(shards, size=[8, 12])
    (entry, *_) = read_shard(Shard(str(shards / "shards" / "000.tar")))
    found = s.train_sample(entry, np.random.default_rng(4))
    expected = s.transform(Photo(encoded(0), "x"), np.random.default_rng(4))
    assert torch.equal(found.image, image_to_tensor(expected))
    assert found.key == "000/0000"
    found = s.val_sample(entry)
    expected = EvalTransform([8, 12])(Photo(encoded(0), "x").read())
    assert torch.equal(found.image, image_to_tensor(expected))
    assert found.key == "000/0000"
    with pytest.raises(UnreadableImageError) as error:
        s.val_sample(entry._replace(data=b"broken"))
    assert error.value.name == entry.name


def test_every_visit_of_an_image_and_every_process_draws_anew(shards):
    visits = {}
    for sample in islice(source(shards, shuffle=1).stream(0, 0, ALONE), 200):
        visits.setdefault(sample.key, set()).add(sample.image.numpy().tobytes())
    assert min(map(len, visits.values())) > 2  # of four
    s, drawn = source(shards), []
    s.train_sample = lambda entry, rng: drawn.append(rng.random()) or Sample(None, entry.key)
    for worker in (0, 1):
        list(islice(s.stream(0, 0, LoaderProcess(worker, 2)), 5))
    assert len(set(drawn)) == 10


def test_limit_evaluates_the_first_images_alone(shards):
    s = source(shards)
    s.limit(5)
    assert keys_of(s.val_loader()) == [f"{n // 4:03d}/{n:04d}" for n in range(5)]
    assert s.val_images == 5


def test_shards_say_which_images_they_keep_together(tmp_path):
    write_photos(tmp_path / "photos", [f"{name}/{n}.png" for name in "abc" for n in range(4)])
    pack(str(tmp_path / "photos"), tmp_path / "by_folder", PackOptions(hold_out_by="folder"))
    found = WebDatasetSource(tmp_path / "by_folder", 16, 2, hold_out_by="folder")
    assert (found.samples_per_epoch, found.val_images) == (8, 4)
    assert len({group for batch in found.val_loader() for group in batch["group"]}) == 1
    pack(str(tmp_path / "photos"), tmp_path / "by_file", PackOptions())
    for folder, how in (("by_file", "folder"), ("by_folder", r"(?P<group>\w)/")):
        with pytest.raises(ValueError, match=r"`hold_out_by` .*val_shards"):
            WebDatasetSource(tmp_path / folder, 16, 2, hold_out_by=how)
        given = tmp_path / folder / "000000.tar"
        WebDatasetSource(tmp_path / folder, 16, 2, val_shards=given, hold_out_by=how)


def test_more_images_than_there_are_or_an_unknown_number_are_refused(shards):
    with pytest.raises(ValueError, match="7 images, 8"):
        source(shards).limit(8)
    unknown = source(shards, val_shards=remote(shards)[0])
    with pytest.raises(ValueError, match=r"unknown number .*1"):
        unknown.limit(1)
