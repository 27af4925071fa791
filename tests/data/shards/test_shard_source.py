"""The order of training over real shards: mixed, continued by other processes, read in parts."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olvae.data.read_errors import ReadError
from olvae.data.shards import shard_source
from olvae.data.shards.offsets import TAR_BLOCK, offsets_of
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderLayout, LoaderProcess
from tests.data.images import encoded, rewrite, write_shards, write_tar

COUNTS = (5, 9, 1, 14, 7, 3, 11)  # 50 images


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "shards", COUNTS)
    write_shards(tmp_path / "val", (4, 3))
    return tmp_path


def source(root: Path, **arguments: Any) -> WebDatasetSource:
    defaults = {"size": 16, "batch_size": 2, "val_shards": str(root / "val"), "shuffle": 6}
    return WebDatasetSource(str(root / "shards"), **{**defaults, **arguments})


def batches(s: WebDatasetSource, layouts: list[LoaderLayout], until: int) -> list[str]:
    """Keys of all ranks' samples from the last layout's start on, as its loaders give them."""
    now = layouts[-1]
    s.num_workers, s.batch_size = now.workers, now.batch_size
    streams: dict[tuple[int, int], Iterator[Any]] = {}
    found = []
    for number in range((until - now.start) // (now.batch_size * now.world)):
        for rank in range(now.world):
            worker = number % now.workers
            if (worker, rank) not in streams:
                process = LoaderProcess(worker, now.workers, rank, now.world, now.batch_size)
                streams[worker, rank] = s.continued_stream(3, now.start, process, layouts)
            found += [sample.key for sample in islice(streams[worker, rank], now.batch_size)]
    return found


@pytest.mark.parametrize("interleave", [1, 3, 32])
@pytest.mark.parametrize("then", [(1, 2, 2), (4, 1, 3), (1, 1, 2)], ids=str)
def test_an_epoch_that_other_processes_continue_has_each_image_once(shards, interleave, then):
    s = source(shards, interleave=interleave)
    first = LoaderLayout(0, 2, 2, 2)
    second = LoaderLayout(24, *then)
    seen = batches(s, [first], 24)
    seen += batches(s, [first, second], 24 + 24 // (then[1] * then[2]) * then[1] * then[2])
    assert max(Counter(seen).values()) == 1
    assert len(seen) >= 50 - 12


def test_interleave_of_one_lays_shards_end_to_end(shards):
    """Written down again by hand: the shards in the epoch's order, cut into parts, in blocks."""
    s = source(shards, interleave=1)
    order = np.random.default_rng((0, 0, 1)).permutation(7)
    names = [f"{number:03d}" for number in range(7)]
    laid = [(int(i), image) for i in order for image in range(COUNTS[i])]
    part = laid[25:50]
    expected = []
    for block in range(5):
        entries = part[6 * block : 6 * block + 6]
        shuffled = np.random.default_rng((0, 0, block, 1, 2, 2)).permutation(len(entries))
        expected += [entries[i] for i in shuffled]
    found = [sample.key for sample in islice(s.stream(0, 0, LoaderProcess(1, 2)), 25)]
    everything = sorted(set(found))
    by_shard = Counter(key.split("/")[0] for key in everything)
    assert by_shard == Counter(names[shard] for shard, _ in part)
    assert [key.split("/")[0] for key in found] == [names[shard] for shard, _ in expected]


def sorted_by_class(root: Path, classes: int, images: int) -> Path:
    picture = encoded(0)
    (root / "shards").mkdir(parents=True)
    for number in range(classes):
        files = [(f"c{number:03d}_{i:04d}.jpg", picture) for i in range(images)]
        write_tar(root / "shards" / f"{number:03d}.tar", files)
    return root


@pytest.fixture
def undecoded(monkeypatch):
    """Samples have their keys alone."""
    monkeypatch.setattr(
        WebDatasetSource,
        "train_sample",
        lambda _self, entry, _rng: shard_source.Sample(None, entry.key),
    )


def classes_in_a_batch(s: WebDatasetSource) -> float:
    samples = islice(s.stream(0, 0, LoaderProcess(batch_size=16)), 640)
    keys = [sample.key.split("/")[1][:4] for sample in samples]
    return float(np.mean([len(set(keys[i : i + 16])) for i in range(0, 640, 16)]))


@pytest.mark.usefixtures("undecoded")
def test_shards_that_are_sorted_by_class_give_mixed_batches(tmp_path):
    root = sorted_by_class(tmp_path, 64, 32)
    write_shards(tmp_path / "val", (4, 3))
    one = source(root, shuffle=32, batch_size=16, interleave=1)
    many = source(root, shuffle=500, batch_size=16)
    assert many.interleave == 32
    assert classes_in_a_batch(one) == 1.0
    assert classes_in_a_batch(many) >= 12.0


class Counting:
    """Count the entries that are read of shards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        monkeypatch.setattr(shard_source, "read_shard", self)

    def __call__(self, *arguments: Any) -> Iterator[Entry | ReadError]:
        for entry in read_shard(*arguments):
            self.read += isinstance(entry, Entry)
            yield entry


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("interleave", [1, 32])
@pytest.mark.parametrize("processes", [1, 5, 40])
def test_processes_read_little_more_than_they_use(tmp_path, monkeypatch, interleave, processes):
    """Of few and large shards, each begins in the middle, not at the first byte."""
    root = sorted_by_class(tmp_path, 3, 200)
    write_shards(tmp_path / "val", (4, 3))
    s = source(root, interleave=interleave, shuffle=5)
    counting = Counting(monkeypatch)
    used = 0
    for index in range(processes):
        share = 600 // processes
        used += len(list(islice(s.stream(0, 0, LoaderProcess(index, processes)), share)))
    # Each process has read one entry of its next block for each sample.
    assert counting.read <= 1.1 * used + processes * 5


@pytest.mark.usefixtures("undecoded")
def test_a_resumed_process_begins_where_it_was(tmp_path, monkeypatch):
    root = sorted_by_class(tmp_path, 2, 300)
    write_shards(tmp_path / "val", (4, 3))
    s = source(root, shuffle=10)
    whole = [sample.key for sample in islice(s.stream(0, 0, LoaderProcess()), 560)]
    counting = Counting(monkeypatch)
    rest = [sample.key for sample in islice(s.stream(0, 540, LoaderProcess()), 20)]
    assert rest == whole[540:]
    assert counting.read <= 60


def test_a_shard_that_ends_early_loses_its_own_images_alone(shards):
    cut = shards / "shards" / "003.tar"
    content = cut.read_bytes()
    s = source(shards, batch_size=1)
    cut.write_bytes(content[: len(content) // 2])
    samples = list(islice(s.stream(0, 0, LoaderProcess()), 50))
    lost = {error.image for sample in samples for error in sample.errors}
    assert 0 < len(lost) < 14
    assert {error.name for sample in samples for error in sample.errors} == {str(cut)}
    keys = {sample.key for sample in samples}
    others = sum(COUNTS) - COUNTS[3]
    assert len([key for key in keys if not key.startswith("003/")]) == others


def test_unknown_shards_say_what_other_processes_repeat(shards):
    unknown = WebDatasetSource(
        [f"pipe:cat {path}" for path in sorted((shards / "shards").iterdir())],
        size=16,
        batch_size=2,
        val_shards=str(shards / "val"),
    )
    assert "`olvae data index" in unknown.describe_new_processes()
    assert source(shards).describe_new_processes() is None
    assert unknown.interleave == 1
    old = source(shards)
    old.keep_order(None)
    assert old.interleave == 1
    chosen = source(shards, interleave=4)
    chosen.keep_order(None)
    assert chosen.interleave == 4
    with pytest.raises(ValueError, match="interleave must"):
        source(shards, interleave=0)


def test_a_shard_of_unknown_images_without_any_ends_with_an_error(shards):
    s = source(shards)
    path = str(shards / "shards" / "001.tar")
    keys = [entry.key for entry in s.entries(Shard(path))]
    assert len(keys) == 9
    assert keys == [entry.key for entry in s.entries(Shard(path, 9))]
    empty = str(write_tar(shards / "empty.tar", [("a.txt", b"x")]))
    assert list(s.entries(Shard(empty))) == [ReadError(empty, "no images in it", lost=False)]
    assert list(s.entries(Shard(empty, 0))) == []


def test_one_entry_of_the_next_block_is_read_for_each_sample(shards, monkeypatch):
    """So no pause lies between blocks."""
    counting = Counting(monkeypatch)
    stream = source(shards, interleave=1).stream(0, 0, LoaderProcess())
    read = []
    for _ in range(12):
        next(stream)
        read.append(counting.read)
    # The first one of a block tells that there is one.
    assert read == [7, 7, 8, 9, 10, 11, 13, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("changes", [0, 1])
def test_a_samples_numbers_are_seeded_by_its_process_and_position(shards, monkeypatch, changes):
    """And, once an epoch was continued by other processes, by how often that was."""
    drawn = []

    def note(_self, entry, rng):
        drawn.append(rng.random())
        return shard_source.Sample(None, entry.key)

    monkeypatch.setattr(WebDatasetSource, "train_sample", note)
    s = source(shards)
    layouts = [LoaderLayout(0, 1, 1, 2), LoaderLayout(4, 2, 1, 2)][: 1 + changes]
    list(islice(s.continued_stream(7, layouts[-1].start, LoaderProcess(1, 2), layouts), 3))
    more = (changes,) if changes else ()
    expected = [np.random.default_rng((7, 1, 2, p, *more)).random() for p in range(9)]
    assert drawn[0] in expected
    first = expected.index(drawn[0])
    assert drawn == expected[first : first + 3]


def test_what_was_met_on_the_way_to_an_image_comes_with_it(shards):
    """Of shards whose images nobody has counted: in three epochs, as it may be the last of one."""
    folder = shards / "shards"
    empty = write_tar(folder / "000.tar", [("a.txt", b"x")])
    urls = [f"pipe:cat {path}" for path in sorted(folder.iterdir())]
    val = str(shards / "val")
    s = WebDatasetSource(urls, size=16, batch_size=2, val_shards=val, shuffle=6)
    samples = list(islice(s.stream(0, 0, LoaderProcess()), 3 * 45))
    errors = {error for sample in samples for error in sample.errors}
    assert errors == {ReadError(f"pipe:cat {empty}", "no images in it", lost=False)}


class Unreadable:
    """A source none of whose shards gives an image."""

    image_key = None

    def __init__(self) -> None:
        self.begun: list[int] = []

    def entries(self, shard: Shard, begin: int = 0) -> Iterator[ReadError]:
        self.begun.append(begin)
        yield ReadError(shard.url, "damaged")


def test_three_images_in_a_row_that_can_not_be_read_are_the_end_of_a_shard(monkeypatch):
    """Each is looked for at its own offset; then no more are."""
    monkeypatch.setattr(shard_source, "offsets_of", lambda *_: np.arange(9) * 2)
    broken = Unreadable()
    opened = shard_source._OpenShard(broken, Shard("a.tar", 9))
    errors = [opened.take(image) for image in range(2, 8)]
    assert errors == [ReadError("a.tar", "damaged", str(image)) for image in range(2, 8)]
    assert broken.begun == [2 * TAR_BLOCK * image for image in (2, 3, 4)]


def validated(s: WebDatasetSource, *shards: Shard) -> tuple[list[str], list[ReadError]]:
    """Keys of the images that were read, and all errors."""
    s.val = shards
    samples = list(s.once(LoaderProcess()))
    keys = [sample.key for sample in samples if sample.image is not None]
    return keys, [error for sample in samples for error in sample.errors]


def test_validation_counts_an_error_for_each_image_that_a_shard_lacks(shards):
    s = source(shards)
    whole = shards / "shards" / "000.tar"
    keys = [f"000/{number:04d}" for number in range(5)]
    assert validated(s, Shard(str(whole), 5)) == (keys, [])
    assert validated(s, Shard(str(whole), 4)) == (keys, [])
    assert validated(s, Shard(str(whole))) == (keys, [])
    reason = "has fewer images than its index.json says"
    errors = [ReadError(str(whole), reason, str(number)) for number in (5, 6)]
    assert validated(s, Shard(str(whole), 7)) == (keys, errors)

    # One that can't be decoded, beside one that is missing.
    rewrite(whole, {"0002.jpg": b"broken"})
    found, errors = validated(s, Shard(str(whole), 6))
    assert found == keys[:2] + keys[3:]
    assert [(error.name, error.image) for error in errors] == [
        (f"{whole}/0002.jpg", ""),
        (str(whole), "5"),
    ]


def test_validation_over_a_damaged_shard_says_how_much_is_missing(shards):
    s = source(shards)
    cut = shards / "shards" / "001.tar"
    content = cut.read_bytes()
    cut.write_bytes(content[: 4 * len(content) // 9])
    found, errors = validated(s, Shard(str(cut), 9))
    assert 2 <= len(found) <= 5
    assert [error.image for error in errors] == [str(i) for i in range(len(found), 9)]
    count = f"{9 - len(found)} images by its index.json, or as many or more without one"
    assert all(error.lost and error.reason.endswith(count) for error in errors)
    unknown, (error,) = validated(s, Shard(str(cut)))
    assert unknown == found
    assert error.lost
    assert "unknown number" in error.reason
    empty = str(write_tar(shards / "empty.tar", [("a.txt", b"x")]))
    assert validated(s, Shard(empty)) == ([], [ReadError(empty, "no images in it", lost=False)])


def test_offsets_of_an_index_are_used_for_remote_shards(shards):
    """The bytes are those of the middle of the file."""
    path = shards / "shards" / "003.tar"
    offsets = offsets_of(Shard(str(path)))
    assert len(offsets) == 14
    everything = [entry.key for entry in read_shard(Shard(str(path)))]
    for image in (0, 1, 7, 13):
        rest = read_shard(Shard(str(path)), None, int(offsets[image]) * TAR_BLOCK)
        assert [entry.key for entry in rest] == everything[image:]


def unknown(root: Path, **arguments: Any) -> WebDatasetSource:
    """A source of shards whose images nobody has counted."""
    urls = [f"pipe:cat {path}" for path in sorted((root / "shards").iterdir())]
    return WebDatasetSource(urls, 16, 2, val_shards=str(root / "val"), shuffle=6, **arguments)


def test_each_process_has_a_training_image_or_a_shard_of_unknown_images(shards):
    counted, piped = source(shards), unknown(shards)
    for s, workers, world in ((counted, 0, 50), (counted, 2, 25), (piped, 7, 1), (piped, 0, 7)):
        s.num_workers = workers
        s.check_processes(world)
        with pytest.raises(ValueError, match=f"for {max(1, workers) * (world + 1)} processes"):
            s.check_processes(world + 1)
    assert next(counted.stream(0, 0, LoaderProcess(3, 50))).image is not None


def test_a_limit_cuts_the_last_shard_that_is_read(shards):
    for images, kept in ((7, [4, 3]), (5, [4, 1]), (4, [4]), (1, [1])):
        s = source(shards)
        s.limit(images)
        assert [shard.images for shard in s.val] == kept
        assert s.val_images == images
        samples = list(s.once(LoaderProcess()))
        assert len(samples) == images
        assert all(sample.image is not None for sample in samples)
    s = source(shards)
    s.val = [s.val[0]._replace(images=0), s.val[1]]
    s.limit(3)
    assert [shard.images for shard in s.val] == [3]
    with pytest.raises(ValueError, match="the set has 7 images, 8 were asked for"):
        source(shards).limit(8)
    s = source(shards)
    s.val = [s.val[0], s.val[1]._replace(images=None)]
    with pytest.raises(ValueError, match="an unknown number of images, 1 were asked for"):
        s.limit(1)


def test_validation_shards_are_known_by_name_images_and_size(shards):
    first, second = sorted((shards / "val").glob("*.tar"))
    sizes = [path.stat().st_size for path in (first, second)]
    s = source(shards)
    s.val = [*s.val, Shard("https://example.org/a.tar", 3)]
    found = list(s.val_identities())
    assert found == [f"000 4 {sizes[0]}", f"001 3 {sizes[1]}", "a 3 missing"]


def test_sorted_shards_are_described_by_their_classes(shards, monkeypatch):
    asked = []
    line = "few"
    monkeypatch.setattr(shard_source, "describe_sorted", lambda *a: [asked.append(a), line][1])
    s = source(shards, interleave=3)
    assert s.describe_sorted() is None
    s.train = [shard._replace(classes=(1.5 + n, 40)) for n, shard in enumerate(s.train)]
    assert s.describe_sorted() == "few: raise data.params.interleave, or mix the shards"
    line = None
    assert s.describe_sorted() is None
    assert asked == [(2, 1.5, 40, 3)] * 2
    s.train[1] = s.train[1]._replace(classes=None)
    assert s.describe_sorted() is None
    assert len(asked) == 2


def test_shards_are_interleaved_if_their_images_are_counted_and_found(shards):
    usual = source(shards)
    assert (usual.interleave, usual.order) == (32, 32)
    usual.keep_order(5)
    assert usual.order == 5
    assert unknown(shards, interleave=4).interleave == 4
    # Remote ones need offsets; compressed ones are read from their start.
    for url, images, offsets, interleave in (
        ("https://example.org/a.tar", 9, ("index", 0), 32),
        ("https://example.org/a.tar", None, ("index", 0), 1),
        ("https://example.org/a.tar", 9, None, 1),
        ("https://example.org/a.tar.gz", 9, ("index", 0), 1),
    ):
        made = Made([Shard(url, images, offsets)], [], 6, None, 16, 1, 0)
        assert made.interleave == interleave
    # The first shard tells how all are compressed.
    urls = ("https://a.org/a.tar", "https://a.org/b.tar.gz")
    remote = [Shard(url, 9, ("index", 0)) for url in urls]
    assert Made(remote, [], 6, None, 16, 1, 0).interleave == 32
    for setting in ("shuffle", "interleave"):
        source(shards, **{setting: 1})
        with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
            source(shards, **{setting: 0})
    with pytest.raises(ValueError, match="batch_size 51 is larger"):
        source(shards, batch_size=51)


def test_unknown_images_are_continued_as_if_nothing_had_changed(shards):
    """Nobody knows what other processes have used."""
    s = unknown(shards)
    layouts = [LoaderLayout(0, 2, 1, 2), LoaderLayout(24, 1, 1, 2)]
    process, position = LoaderProcess(batch_size=2).resumed(24)
    found = s.continued_stream(3, 24, LoaderProcess(batch_size=2), layouts)
    for one, other in zip(islice(found, 5), s.stream(3, position, process), strict=False):
        assert one.key == other.key
        assert (one.image == other.image).all()


class Made(shard_source.ShardSource):
    """A source of samples without images."""

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> shard_source.Sample:
        return shard_source.Sample(None, entry.key)

    def val_sample(self, entry: Entry) -> shard_source.Sample:
        return shard_source.Sample(None, entry.key)

    def describe(self) -> str:
        return "made"


def test_a_block_without_a_readable_image_has_those_of_a_later_one(shards):
    """Also where that is not the first one of the next epoch."""
    gone = str(shards / "gone.tar")
    whole = str(shards / "shards" / "000.tar")

    def stream(seed: int, *urls: str) -> Iterator[Any]:
        made = Made([Shard(url, 5) for url in urls], [], 5, None, 16, 1, 0, interleave=1)
        return made.stream(seed, 0, LoaderProcess())

    samples = list(islice(stream(0, gone, whole), 10))
    assert all(sample.key.startswith("000/") for sample in samples)
    lost = sorted(error.image for sample in samples for error in sample.errors)
    assert lost == ["0", "1", "2", "3", "4"]

    def firsts(seed: int) -> list[int]:
        return [int(shard_source.epoch_order(seed, epoch, 3)[0]) for epoch in (0, 1)]

    seed = next(seed for seed in range(99) if firsts(seed)[0] == 2 != firsts(seed)[1])
    samples = list(islice(stream(seed, gone, gone, whole), 15))
    assert all(sample.key.startswith("000/") for sample in samples)
    assert sum(len(sample.errors) for sample in samples) == 10
    with pytest.raises(ValueError, match="none of the shards of a loader process could be read"):
        next(stream(0, gone, gone))


def test_a_process_whose_shards_have_no_images_takes_one_of_another(shards):
    empty = Shard(str(write_tar(shards / "empty.tar", [("a.txt", b"x")])))
    a, b = (Shard(str(shards / "shards" / f"00{number}.tar")) for number in (0, 1))
    reader = shard_source._Reader(unknown(shards), 0, LoaderProcess())
    nothing = ReadError(empty.url, "no images in it", lost=False)
    for own, others, keys, errors in (
        ([empty], [a, b], ["000"] * 5, (nothing,)),
        ([empty], [empty, b], ["001"] * 9, (nothing, nothing)),
        ([a], [b], ["000"] * 5, ()),
        ([a, b], [a], ["000"] * 5 + ["001"] * 9, ()),
    ):
        entries = list(reader._whole(own, others))
        assert [entry.key[:3] for entry in entries] == keys
        assert entries[0].errors == errors
        assert not any(entry.errors for entry in entries[1:])
    message = f"none of the 3 shards could be read: {empty.url}: no images in it; "
    with pytest.raises(ValueError, match=message):
        list(reader._whole([empty], [empty, empty]))


def test_errors_after_an_epochs_last_image_come_with_it(shards):
    """And errors before it stay where they are."""
    empty = Shard(str(write_tar(shards / "empty.tar", [("a.txt", b"x")])))
    a, b = (Shard(str(shards / "shards" / f"00{number}.tar")) for number in (0, 1))
    reader = shard_source._Reader(unknown(shards), 0, LoaderProcess())
    nothing = ReadError(empty.url, "no images in it", lost=False)
    entries = list(reader._whole([empty, a, empty, empty], [b]))
    assert [entry.key[:3] for entry in entries] == ["000"] * 5
    assert [entry.errors for entry in entries] == [(nothing,), (), (), (), (nothing, nothing)]

    # A shard that is cut off in its third image, as the epoch's last one and as its first one.
    for path in (shards / "shards").iterdir():
        if path.name != "000.tar":
            path.unlink()
    cut = shards / "shards" / "cut.tar"
    content = Path(a.url).read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    images = len(list(reader._whole([Shard(str(cut))], []))) + 5
    for seed in range(4):
        samples = islice(unknown(shards).stream(seed, 0, LoaderProcess()), images)
        errors = [error for sample in samples for error in sample.errors]
        assert [error.name for error in errors] == [f"pipe:cat {cut}"]
    orders = [np.random.default_rng((seed, 0, 1)).permutation(2)[1] for seed in range(4)]
    assert set(orders) == {0, 1}


def test_unknown_images_are_whole_shards_in_blocks(shards):
    """Written down again by hand, as of one process: from the first epoch and block on."""
    laid = []
    for number in np.random.default_rng((4, 0, 1)).permutation(7):
        first = sum(COUNTS[:number])
        laid += [f"{number:03d}/{first + i:04d}" for i in range(COUNTS[number])]
    expected = []
    for block in range(3):
        order = np.random.default_rng((4, 0, block, 0, 1, 2)).permutation(6)
        expected += [laid[6 * block + i] for i in order]
    found = [sample.key for sample in islice(unknown(shards).stream(4, 0, LoaderProcess()), 18)]
    assert found == expected
    rest = [sample.key for sample in islice(unknown(shards).stream(4, 9, LoaderProcess()), 9)]
    assert rest == expected[9:]
    # Each process has every second shard of the epoch's order.
    own = [f"{number:03d}" for number in np.random.default_rng((4, 0, 1)).permutation(7)[1::2]]
    second = unknown(shards).stream(4, 0, LoaderProcess(1, 2))
    count = sum(COUNTS[int(name)] for name in own)
    assert sorted({sample.key[:3] for sample in islice(second, count)}) == sorted(own)
