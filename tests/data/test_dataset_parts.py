"""Data sets by number, their parts and groups; a mapped source's samples, one by one."""

from collections.abc import Mapping
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from olvae.data.dataset import (
    HELD_OUT,
    ImageDataset,
    InMemory,
    MappedSource,
    SamplePhotographs,
    Subset,
    groups_of,
    usual_groups,
)
from olvae.data.image import EvalTransform, Photo
from olvae.data.order.groups import FILE, Grouping
from olvae.data.read_errors import UnreadableImageError
from olvae.data.source import BOUND, LoaderProcess


class Plain(ImageDataset):
    """Pictures of one level, by number; some can't be read."""

    def __init__(self, count: int, *broken: int) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Photo:
        if index in self.broken:
            raise UnreadableImageError(f"{index}.png", "bad")
        return Photo(Image.new("RGB", (8, 6), (index, 0, 0)), str(index))


class Known(Plain):
    """What is said of each picture differs."""

    def key(self, index: int) -> str:
        return f"key{index}"

    def file(self, index: int) -> str:
        return f"file{index // 2}"

    def name(self, index: int) -> str:
        return f"name{index // 3}/{index}"

    def state(self, index: int) -> str:
        return f"state{index}"

    def identity(self, index: int) -> str:
        return f"identity{index}"

    def files(self, index: int) -> Mapping[str, bytes]:
        return {"x": b"%d" % index}


def test_pictures_are_known_by_their_numbers_unless_more_is_known():
    plain = Plain(9)
    assert {plain.key(3), plain.file(3), plain.name(3), plain.state(3), plain.identity(3)} == {
        "00000003"
    }
    assert (plain.files(3), plain.eval_transform(), plain.whole_files) == ({}, None, True)
    part = Subset(Known(9), [7, 4])
    assert len(part) == 2
    assert [
        part.key(1),
        part.file(1),
        part.name(1),
        part.state(1),
        part.identity(1),
        part.files(1),
        part[1].name,
    ] == ["key4", "file2", "name1/4", "state4", "identity4", {"x": b"4"}, "4"]
    assert (part.whole_files, Subset(plain, [1]).whole_files) == (False, True)


def test_groups_are_files_or_found_in_names():
    known = Known(6)
    assert known.group(4, Grouping()) == "file2"
    assert known.group(4, Grouping("folder")) == "name1"
    assert groups_of(known, Grouping()) == [[0, 1], [2, 3], [4, 5]]
    assert groups_of(known, Grouping("folder")) == [[0, 1, 2], [3, 4, 5]]
    assert groups_of(known, Grouping(r"/(?P<group>\d)")) is None
    assert groups_of(Plain(6), Grouping()) is None


def test_groups_larger_than_most_are_not_held_out():
    assert usual_groups([40] * 10 + [700], 1100, None) == (55, list(range(10)))
    assert usual_groups([3, 5, 7, 9], 24, 0.1) == (2, [0, 1])
    assert usual_groups([3, 6, 6, 9], 24, 0.1) == (2, [0, 1, 2])
    assert usual_groups([3, 5, 7, 9], 24, 0.3) == (7, [0, 1, 2])


class Numbers:
    """A transform that keeps the numbers that it draws."""

    size = 4
    evaluation = EvalTransform(4)

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def __call__(self, photo: Photo, rng: np.random.Generator) -> Image.Image:
        self.drawn.append(rng.random())
        return photo.read()


def source(train: ImageDataset, val: ImageDataset | None = None, **more: object) -> MappedSource:
    return MappedSource(train, val or Plain(7), Numbers(), **{"batch_size": 2, **more})


def test_samples_are_drawn_by_the_seed_and_cropped_by_their_positions():
    """Twice in an epoch; a picture that can't be read is replaced by another."""
    s = source(Plain(5, 3), samples_per_image=2)
    assert s.samples_per_epoch == 10
    samples = list(islice(s.stream(9, 4, LoaderProcess(1, 2)), 6))
    orders = [np.random.default_rng((9, epoch, 1)).permutation(10) for epoch in range(2)]
    positions = [9, 11, 13, 15, 17, 19]
    numbers = [int(orders[p // 10][p % 10]) % 5 for p in positions]
    for position, number, sample in zip(positions, numbers, samples, strict=True):
        attempt = 0
        while number == 3:
            number = int(np.random.default_rng((9, position, 1, attempt)).integers(5))
            attempt += 1
        assert sample.key == f"{number:08d}"
        assert len(sample.errors) == attempt
    assert s.transform.drawn == [np.random.default_rng((9, p)).random() for p in positions]


def test_the_order_of_an_old_run_is_listed():
    s = source(Plain(5))
    assert s.order == "computed"
    for kept, order in (("listed", "listed"), ("computed", "computed"), (None, "listed")):
        s.keep_order(kept)
        assert s.order == order


def test_validation_reads_each_and_names_groups_that_are_not_files():
    samples = list(source(Plain(5), Plain(7, 2)).once(LoaderProcess(0, 3)))
    assert [sample.key for sample in samples] == ["00000000", "00000003", "00000006"]
    samples = list(source(Plain(5), Plain(7, 2)).once(LoaderProcess(2, 3)))
    assert [(sample.key, sample.image is None) for sample in samples] == [
        ("00000002", True),
        ("00000005", False),
    ]
    assert samples[0].errors[0].name == "2.png"
    assert [sample.group for sample in samples] == [None, None]
    for how, groups in ((FILE, ["file0", "file0", "file1"]), ("folder", ["name0"] * 3)):
        samples = source(Plain(5), Known(3), hold_out_by=how).once(LoaderProcess())
        assert [sample.group for sample in samples] == groups
    samples = source(Plain(5), Plain(2), hold_out_by="folder").once(LoaderProcess())
    assert [sample.group for sample in samples] == [".", "."]


def test_a_source_describes_itself_and_is_limited():
    s = source(Plain(5), samples_per_image=3)
    assert s.describe() == "5 training, 7 validation and test images"
    assert list(s.val_identities()) == [f"{number:08d}" for number in range(7)]
    assert s.test_set is s.val
    for held_out, fraction, bound in ((9_999, None, ""), (10_000, 0.1, ""), (10_000, None, BOUND)):
        s.note_bound(held_out, fraction)
        assert s.bound == bound
    s.limit(7)
    with pytest.raises(ValueError, match="the set has 7 images, fewer than the 8 asked for"):
        s.limit(8)
    s.limit(2)
    assert (s.val_images, s.images) == (2, 17)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"samples_per_image must be at least 1, got {wrong}"):
            source(Plain(5), samples_per_image=wrong)


def test_groups_on_both_sides_are_named_once(caplog):
    s = source(Known(6), Known(3), hold_out_by="folder")
    assert s.shared_groups().startswith("1 group by `hold_out_by`")
    s.warn_of_shared_groups()
    assert len(caplog.messages) == 1
    for how in (FILE, r"/(?P<group>\d)"):
        other = source(Known(6), Subset(Known(9), [8]), hold_out_by=how)
        assert other.shared_groups() is None
        other.warn_of_shared_groups()
    assert len(caplog.messages) == 1


def test_pictures_in_memory_have_names_and_channels():
    images = InMemory([("a", Image.new("RGB", (4, 3))), ("b", Image.new("RGB", (5, 3)))], 1)
    assert len(images) == 2
    assert [images.key(index) for index in range(2)] == ["a", "b"]
    assert (images[1].name, images[1].size, images[1].read().mode) == ("b", (5, 3), "L")


def test_oblong_tiles_of_the_photographs():
    """Of coffee.jpg, 456x304 pixels: shrunk to 300x200, or cut as it is."""
    (path,) = (path for path in HELD_OUT if path.name == "coffee.jpg")
    photograph = Image.open(path)
    shrunk = photograph.resize((300, 200), Image.Resampling.BICUBIC)
    for size, place, expected in (
        ([100, 50], "1-5", shrunk.crop((250, 100, 300, 200))),
        ([200, 100], "0-1", photograph.crop((128, 52, 228, 252))),
        ([60, 260], "2-0", photograph.crop((98, 122, 358, 182))),
    ):
        found = SamplePhotographs(size, 1)
        tiles = dict(found.val.pictures)
        assert tiles[f"coffee.jpg/{place}"].tobytes() == expected.tobytes()
    assert found.describe() == f"crops of 52 photographs, {len(tiles)} tiles of 8 held-out ones"
    tiny = SamplePhotographs(1, 1).val.pictures
    assert {tile.size for _, tile in tiny} == {(1, 1)}
    # One larger than the photograph has its proportions.
    large = dict(SamplePhotographs([608, 608], 1).val.pictures)
    assert large["coffee.jpg/0-0"].size == (304, 304)


def test_the_photographs_settings_are_those_of_their_crops():
    found = SamplePhotographs(8, 3, 2, 5, 0.4, ["box"], False, 0.1, {"turns": True})
    crop = found.transform
    assert SimpleNamespace(**vars(crop)) == SimpleNamespace(
        size=8,
        min_fraction=0.4,
        filters=["box"],
        flip=False,
        shuffle_channels=0.1,
        augment={"turns": True},
    )
    assert (found.batch_size, found.num_workers, found.samples_per_epoch) == (3, 2, 260)
