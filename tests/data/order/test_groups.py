"""Groups of images that are held out together, by the names of their files."""

import pytest

from olvae.data.order.groups import (
    SLICES,
    Grouping,
    fill_with_groups,
    look_like_slices,
    shared_groups,
)

NAMES = ["a/patient1_0.png", "a/patient1_1.png", "b/patient2_0.png", "b/c/patient1_2.png", "d.png"]
PATIENT = r"(?P<group>patient\d+)"
LAST = r"(?P<group>.*\D)\d+\.\w+$"


def test_each_file_is_a_group_by_default():
    assert Grouping().members(NAMES) == {name: [place] for place, name in enumerate(NAMES)}


def test_a_folder_is_a_group_without_its_subfolders():
    assert Grouping("folder").members(NAMES) == {"a": [0, 1], "b": [2], "b/c": [3], ".": [4]}


def test_a_pattern_groups_names_across_folders():
    assert Grouping(r"(?P<group>patient\d+)").members(NAMES[:4]) == {
        "patient1": [0, 1, 3],
        "patient2": [2],
    }


def test_a_name_in_which_the_pattern_finds_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no group .*d\.png"):
        Grouping(r"(?P<group>patient\d+)").members(NAMES)
    with pytest.raises(ValueError, match=r"no group .*d\.png"):
        Grouping(r"(?P<group>patient\d+)?d").of("d.png")


@pytest.mark.parametrize("how", ["patient", r"(patient\d+)", r"(?P<patient>\d+)"])
def test_a_pattern_needs_a_group_of_this_name(how):
    with pytest.raises(ValueError, match="no group of"):
        Grouping(how)


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"`hold_out_by` '\(\?P<group>'"):
        Grouping("(?P<group>")


def test_whole_groups_fill_lists_and_a_large_one_has_its_own():
    groups = [[0, 1], [2], [3, 4], [5, 6, 7, 8], [9]]
    assert fill_with_groups(groups, 3) == [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize(
    ("names", "how"),
    [
        ([f"patient{p}_{i:03d}.png" for p in range(3) for i in range(1, 41)], PATIENT),
        ([f"st/patient{p}/ct/{i}.png" for p in range(3) for i in range(12)], PATIENT),
        (
            [f"patient.{p}_{i}.png" for p in range(3) for i in range(12)],
            r"(?P<group>patient\.\d+)",
        ),
        ([f"scene-{p}/frame_{i}.png" for p in range(3) for i in range(12)], "folder"),
        ([f"{side}{p}_{i}.png" for side in ("l", "r") for p in range(2) for i in range(12)], LAST),
    ],
)
def test_slices_are_known_by_their_names_and_the_setting_keeps_them_together(names, how):
    line = look_like_slices([*names, "notes/cover.png"])
    assert line.endswith(f"for example to '{how}'")
    groups = Grouping(how).members(names)
    assert all(len(members) >= 12 for members in groups.values())
    assert len(groups) in (3, 4)


@pytest.mark.parametrize(
    "names",
    [
        [f"IMG_{i:04d}.jpg" for i in range(1, 200)],
        [f"{i:08d}.png" for i in range(200)],
        [f"{c}/{c}_{i}.jpg" for c in ("Forest", "River", "SeaLake", "Lake") for i in range(1, 50)],
        [f"n014435{c}/images/n014435{c}_{i}.JPEG" for c in range(37, 47) for i in range(50)],
        [f"{c}/{i:05d}.png" for c in range(10) for i in range(50)],
        [f"class{c}/{i:05d}.png" for c in range(10) for i in range(50)],
        [f"10{c}CANON/IMG_{50 * c + i:04d}.jpg" for c in range(4) for i in range(2, 50)],
        [f"patient{p}_{i}.png" for p in range(2) for i in range(100)],
        [f"patient{p}_{i}.png" for p in range(50) for i in range(4)],
    ],
)
def test_plain_numbers_are_no_slices(names):
    assert look_like_slices(names) is None


def rows(number: int = SLICES, first: int = 0, digits: int = 3) -> list[str]:
    """Slices of three patients."""
    numbers = range(first, first + number)
    return [f"patient{p}_{i:0{digits}d}.png" for p in range(3) for i in numbers]


def test_slices_are_rows_of_ten_numbers_from_0_or_1_and_half_of_all_files():
    start = "30 files look like slices of 3 things, such as patient0_*, and "
    others = [f"{letter}.png" for letter in "abcdefghijklmnopqrstuvwxyzABCD"]
    for names in (rows(), rows(first=1), rows(digits=9), others + rows()):
        assert look_like_slices(names).startswith(start)
    for names in (rows(SLICES - 1), rows(first=2), rows(digits=10), [*others, "E.png", *rows()]):
        assert look_like_slices(names) is None


def test_groups_on_both_sides_are_named():
    assert shared_groups({"a", "."}, {"b", "."}) is None
    for number, named in ((2, "a, b"), (10, "a, b, c, d, e, f, g, h, i, j")):
        groups = set("abcdefghijk"[:number])
        line = shared_groups({*groups, "y"}, {*groups, "z"})
        assert line.startswith(f"{number} groups by `hold_out_by` with images of training and")
        assert line.endswith(f": {named}: keep each on one side")
    line = shared_groups(set("abcdefghijk"), set("abcdefghijk"))
    assert line.startswith("11 groups")
    assert line.endswith(": a, b, c, d, e, f, g, h, i, j, ...: keep each on one side")
