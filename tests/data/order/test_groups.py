"""Groups of images that are held out together, by the names of their files."""

import pytest

from olvae.data.order.groups import Grouping

NAMES = ["a/patient1_0.png", "a/patient1_1.png", "b/patient2_0.png", "b/c/patient1_2.png", "d.png"]


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
    with pytest.raises(ValueError, match=r"finds no group in 'd.png'"):
        Grouping(r"(?P<group>patient\d+)").members(NAMES)
    with pytest.raises(ValueError, match=r"finds no group in 'd.png'"):
        Grouping(r"(?P<group>patient\d+)?d").of("d.png")


@pytest.mark.parametrize("how", ["patient", r"(patient\d+)", r"(?P<patient>\d+)"])
def test_a_pattern_needs_a_group_of_this_name(how):
    with pytest.raises(ValueError, match="has no group of this name"):
        Grouping(how)


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"`hold_out_by` '\(\?P<group>' is no regular expression"):
        Grouping("(?P<group>")
