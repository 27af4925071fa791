import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from PIL import Image

from olvae.data.dataset import (
    HELD_OUT,
    PHOTOGRAPHS,
    AllBut,
    ImageDataset,
    MappedSource,
    SamplePhotographs,
    bound_held_out,
    evenly_spread,
    hold_out,
    sample_photographs,
)
from olvae.data.hub import Items
from olvae.data.image import Photo, Picture, RandomScaleCrop
from olvae.data.order.groups import Grouping
from tests.data.images import be_rank, encoded, keys_of, same, take


class Pictures(ImageDataset):
    def __init__(self, count: int, broken: Sequence[int] = ()) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Picture | Photo:
        return Photo(encoded(index)[: 100 if index in self.broken else None], f"{index}.jpg")


def source(count: int = 20, broken: Sequence[int] = (), **arguments: Any) -> MappedSource:
    train, val = Pictures(count, broken), Pictures(7, broken)
    transform = RandomScaleCrop(arguments.pop("size", 16))
    return MappedSource(train, val, transform, **{"batch_size": 4, **arguments})


def test_the_order_of_images_is_the_same_with_any_number_of_workers():
    whole = take(source(broken=(3, 8), max_unreadable=0.5).train_loader(3), 9)
    for workers, batches in ((1, 0), (2, 0), (2, 5)):
        s = source(broken=(3, 8), num_workers=workers, max_unreadable=0.5)
        assert same(take(s.train_loader(3, batches * 4), 9 - batches), whole[batches:])


@pytest.mark.parametrize("rank", [0, 7])
def test_no_rank_believes_that_it_has_nothing_to_validate(rank, monkeypatch):
    """Lightning makes the process group after it was given the loader, here of seven images."""
    loader = source().val_loader()
    be_rank(monkeypatch, rank, 8)
    assert len(loader) == 1
    assert [batch["key"] for batch in loader] == ([["0"]] if rank == 0 else [])


def test_the_length_of_a_loader_is_known_where_it_ends():
    """Lightning's limit_val_batches takes a share of it."""
    assert len(source().val_loader()) == 2
    assert len(source().test_loader(3)) == 3
    with pytest.raises(TypeError, match="unknown before"):
        len(source().train_loader())


def test_another_image_stands_in_for_one_that_cannot_be_read(caplog):
    s = source(broken=(3, 8), max_unreadable=0.5)
    loader = s.train_loader()
    batches = take(loader, 10)
    assert all(len(batch["key"]) == len(batch["image"]) == 4 for batch in batches)
    assert not {"3", "8"} & {*keys_of(batches)}
    assert loader.read_errors.lost == 2
    # in the second, a stand-in was a broken one too
    totals = [m for m in caplog.messages if "epoch" in m]
    assert totals == [f"training: {n} images skipped in this epoch" for n in (2, 3)]


def test_validation_goes_without_what_cannot_be_read():
    loader = source(broken=(0, 1, 2, 3, 6), max_unreadable=1.0).val_loader()
    assert [batch["key"] for batch in loader] == [["4", "5"]]  # the first batch was empty
    assert loader.read_errors.lost == 5


def test_mapped_source_refuses_wrong_arguments():
    for arguments in (
        {"size": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"channels": 0},
        {"max_unreadable": 2.0},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            source(**arguments)
    with pytest.raises(ValueError, match="samples_per_image"):
        source(samples_per_image=0)


ALL = (*PHOTOGRAPHS, *HELD_OUT)
FOLDER = ALL[0].parent
LICENCES = (FOLDER / "LICENCES.txt").read_text(encoding="utf-8")


def test_every_sample_photograph_has_its_author_and_an_open_licence():
    assert sorted(re.findall(r"^\S+\.jpg$", LICENCES, re.M)) == sorted(
        path.name for path in FOLDER.glob("*.jpg")
    )
    for photograph in ALL:
        entry = LICENCES.split(f"\n\n{photograph.name}\n", 1)[1].split("\n\n", 1)[0]
        fields = dict(line.strip().split(": ", 1) for line in entry.splitlines())
        assert [field for field in fields if field != "Address"] == [
            "Title",
            "Author",
            "Source",
            "Licence",
            "Changes",
        ]
        assert re.fullmatch(r"public domain|CC0 1\.0|CC BY(-SA)? \d\.\d", fields["Licence"])
        assert f"\n  {fields['Licence']} " in LICENCES  # with its address


def test_an_eighth_of_the_sample_photographs_is_held_out():
    assert (len(PHOTOGRAPHS), len(HELD_OUT)) == (52, 8)
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)
    assert len(sample_photographs()) == 60


def test_an_epoch_has_each_sample_photograph_as_often():
    source = SamplePhotographs(size=8, crops_per_photograph=3, batch_size=1)
    drawn = Counter(batch["key"][0] for batch in islice(source.train_loader(), 3 * 52))
    assert drawn == {photograph.name: 3 for photograph in PHOTOGRAPHS}


def test_tiles_of_sample_photographs_are_cut_around_the_centre():
    (batch,) = SamplePhotographs(size=64, batch_size=42).test_loader()
    # from 456x304
    coffee = Image.open(FOLDER / "coffee.jpg").resize((192, 128), Image.Resampling.BICUBIC)
    place = batch["key"].index("coffee.jpg/1-2")
    expected = np.asarray(coffee.crop((128, 64, 192, 128)))
    assert np.array_equal(batch["image"][place].permute(1, 2, 0).numpy(), expected)
    # from 405x304
    gateway = Image.open(FOLDER / "gateway-of-india.jpg").resize(
        (171, 128), Image.Resampling.BICUBIC
    )
    place = batch["key"].index("gateway-of-india.jpg/0-1")
    # of the 43 columns left over, 21 on the left
    expected = np.asarray(gateway.crop((21 + 64, 0, 21 + 128, 64)))
    assert np.array_equal(batch["image"][place].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("size", "tiles", "enlarged"), [(128, 42, 0), (256, 8, 0), (312, 8, 8)])
def test_tiles_are_enlarged_only_where_they_are_larger_than_the_photograph(size, tiles, enlarged):
    loader = SamplePhotographs(size=size, batch_size=42, crops_per_photograph=1).test_loader()
    (batch,) = loader
    assert batch["image"].shape == (tiles, 3, size, size)
    assert loader.enlarged == enlarged
    if size == 256:  # the centre of 451x300 pixels
        chelsea = np.asarray(Image.open(FOLDER / "chelsea.jpg"))
        image = batch["image"][batch["key"].index("chelsea.jpg/0-0")].permute(1, 2, 0).numpy()
        assert np.array_equal(image, chelsea[22 : 22 + 256, 97 : 97 + 256])


class Dataset:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_hold_out_lists_no_images_that_are_kept():
    tracemalloc.start()
    train, val = hold_out(Pictures(10**8))
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 10**7
    assert (len(train), len(val)) == (10**8 - 10_000, 10_000)
    assert [val.key(i) for i in (0, 1, 9999)] == ["0", "10001", "99999999"]
    kept = [train.key(i) for i in (0, 9999, 10_000, len(train) - 1)]
    assert kept == ["1", "10000", "10002", "99999998"]


def test_all_but_some_numbers_are_a_sequence():
    kept = AllBut(10, [0, 3, 4, 9])
    assert list(kept) == [1, 2, 5, 6, 7, 8]
    assert kept[1:3] == [2, 5]
    assert kept[-1] == 8
    with pytest.raises(IndexError):
        kept[6]


@pytest.mark.parametrize(
    ("share", "images", "fraction", "held_out"),
    [
        (0.2, 100, 0.002, 1),
        (3.6, 100, 0.036, 4),
        (99.9, 100, 0.999, 99),
        (2.0, 2, 0.99, 1),
        (20_000.0, 10**6, 0.02, 20_000),
        # By default a fifth, at least 1; then 20 up to 400 images; then the share up to 10,000.
        (0.1, 2, None, 1),
        (0.2, 4, None, 1),
        (2.5, 50, None, 10),
        (4.9, 99, None, 19),
        (5.0, 100, None, 20),
        (20.0, 400, None, 20),
        (21.0, 420, None, 21),
        (9_999.0, 199_980, None, 9_999),
        (10_001.0, 200_020, None, 10_000),
    ],
)
def test_the_number_of_images_that_is_held_out(share, images, fraction, held_out):
    assert bound_held_out(share, images, fraction) == held_out


def test_numbers_that_are_held_out_are_evenly_spread():
    assert evenly_spread(5, None) == [0]
    assert evenly_spread(10, 0.3) == [0, 4, 9]
    assert evenly_spread(100, None) == [int(99 * i / 19 + 1e-9) for i in range(20)]


def test_hold_out_splits_into_two_parts():
    def keys(count: int, fraction: float | None) -> list[list[int]]:
        parts = hold_out(Items(Dataset([None] * count)), fraction)
        return [[int(part.key(i)) for i in range(len(part))] for part in parts]

    assert keys(2, 0.05) == [[1], [0]]
    rest, held = keys(1000, 0.05)
    assert len(held) == 50
    assert sorted(rest + held) == list(range(1000))
    assert [len(keys(count, None)[1]) for count in (2, 56, 300, 1000)] == [1, 11, 20, 50]
    many = Items(Dataset([None] * 220_000))
    assert [len(hold_out(many, fraction)[1]) for fraction in (None, 0.05)] == [10_000, 11_000]
    assert [len(part) for part in keys(10, 0.99)] == [1, 9]
    for arguments in ((1, 0.5), (10, 0.0), (10, 1.0)):
        with pytest.raises(ValueError, match=r"split|val_fraction"):
            keys(*arguments)


def test_the_card_of_the_demos_teacher_names_the_terms_of_its_pictures():
    entries = re.findall(r"^(\S+)\.jpg\n(?:  .+\n)*?  Licence: (.+)", LICENCES, re.M)
    alike = {name for name, licence in entries if "BY-SA" in licence}
    trained = alike & {path.stem for path in PHOTOGRAPHS}
    card = (FOLDER.parents[1] / "recipes" / "distil" / "teacher" / "README.md").read_text()
    counts = f"{len(alike)} of the {len(entries)}, and {len(trained)} of the {len(PHOTOGRAPHS)},"
    assert f"{counts} are under CC BY-SA" in " ".join(card.split())


class Slices(Pictures):
    """Numbered slices of volumes with these numbers of them."""

    def __init__(self, *counts: int) -> None:
        super().__init__(sum(counts))
        self.volumes = np.repeat(np.arange(len(counts)), counts)

    def key(self, index: int) -> str:
        return f"{self.file(index)}/{index}"

    def file(self, index: int) -> str:
        return f"scan{self.volumes[index] // 2}/{self.volumes[index]}.nii.gz"


@pytest.mark.parametrize(
    ("how", "parted"), [("file", 1), ("folder", 2), (r"/(?P<group>\d)\d*\.nii", 11)]
)
def test_hold_out_takes_whole_groups_evenly_until_the_share_is_reached(how, parted):
    """Twenty volumes of 5 to 24 slices; of a pattern, those whose numbers begin alike."""
    images = Slices(*range(5, 25))
    train, val = hold_out(images, 0.1, Grouping(how))
    sides = [{part.group(i, Grouping(how)) for i in range(len(part))} for part in (train, val)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {images.group(i, Grouping(how)) for i in range(290)}
    assert len(train) + len(val) == 290
    # A tenth, and no more than a group beyond it: of a folder two volumes, of a pattern up to 11.
    assert 29 <= len(val) <= 29 + 24 * parted


def test_hold_out_never_takes_all_groups():
    for how, fraction in (("file", 0.9), ("folder", 0.99), ("file", None)):
        train, val = hold_out(Slices(3, 50, 3, 3), fraction, Grouping(how))
        assert len(train) > 0
        assert len(val) > 0
    with pytest.raises(ValueError, match=r"one group.*data\.params\.val_root"):
        hold_out(Slices(9, 9), None, Grouping("folder"))
    with pytest.raises(ValueError, match="one group"):
        hold_out(Slices(9))


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [([40] * 10 + [700], 80), ([700] + [40] * 10, 80), ([600, 30], 30), ([3] + [120] * 10, 123)],
)
def test_hold_out_leaves_a_group_that_is_larger_than_most_to_training(counts, held_out):
    assert len(hold_out(Slices(*counts))[1]) == held_out


def test_validation_names_the_group_of_each_image_that_is_not_its_own():
    train, val = hold_out(Slices(5, 6, 7), 0.2)
    batches = list(MappedSource(train, val, RandomScaleCrop(16), 4).val_loader())
    assert [group for batch in batches for group in batch["group"]] == ["scan0/0.nii.gz"] * 5
    assert all("group" not in batch for batch in source().val_loader())
