"""Where a folder's images are: patterns, lists, closed folders, sidecars, names below a root."""

import os
from pathlib import Path

import pytest

from olvae.data import picture_folder
from olvae.data.picture_folder import (
    Files,
    find_folder,
    find_images,
    find_parts,
    has_images,
    name_below,
    naming_folder,
    say_parts,
    split_folders,
    warn_of_slices,
)
from olvae.data.pixels.size_and_range import AS_STORED
from olvae.data.read_errors import ReadError
from olvae.files import file_state, warn_once
from tests.data.images import close_folders, write_photos


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_have_keys_below_their_root_and_names_below_another(tmp_path):
    write_photos(tmp_path, ["a/b/0.png", "a/c/1.png"])
    paths = [tmp_path / "a" / "b" / "0.png", tmp_path / "a" / "c" / "1.png"]
    closed = [ReadError("x", "denied")]
    found = Files(paths, 1, closed, AS_STORED)
    assert [found.key(index) for index in range(2)] == ["b/0.png", "c/1.png"]
    assert [found.name(index) for index in range(2)] == ["b/0.png", "c/1.png"]
    assert (len(found), found.closed) == (2, closed)
    assert found.state(1) == f"c/1.png\0{file_state(paths[1])}"
    assert found.identity(1) == f"c/1.png {paths[1].stat().st_size}"
    photo = found[1]
    assert (photo.name, photo.channels, photo.pixel_range) == (str(paths[1]), 1, AS_STORED)
    below = Files(paths, root=tmp_path, below=tmp_path / "a")
    assert (below.key(1), below.name(1)) == ("a/c/1.png", "c/1.png")
    assert name_below(Path("x/y.png"), Path("z")) == "x/y.png"


def test_closed_folders_are_listed_with_the_reason(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "a/0.png", "b/1.png")
    close_folders(monkeypatch, tmp_path / "b")
    closed: list[ReadError] = []
    assert [path.name for path in find_images(tmp_path, closed)] == ["0.png"]
    assert closed == [ReadError(str(tmp_path / "b"), "Permission denied", lost=False)]
    scandir = os.scandir

    def odd(path: str) -> object:
        if path == str(tmp_path / "b"):
            raise OSError("odd")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", odd)
    assert len(find_images(tmp_path, closed)) == 1
    assert closed[1].reason == "odd"
    assert caplog.messages[-1].endswith("and everything in it: odd")


def test_a_folder_has_images_at_any_depth(tmp_path):
    touch(tmp_path, "a/notes.txt", ".hidden/0.png", "a/.0.png")
    assert not has_images(tmp_path)
    touch(tmp_path, "a/b/c/0.png")
    assert has_images(tmp_path)
    assert [path.name for path in find_images(tmp_path / "*" / "**" / "*")] == ["0.png"]
    assert (find_folder(tmp_path), find_folder(tmp_path / "*.png")) == (tmp_path, None)


def test_other_kinds_of_files_are_wanted_by_others(tmp_path):
    touch(tmp_path, "a.nii", "b.png", "c.nii/d.png")
    found = find_images(tmp_path, None, lambda path: path.endswith(".nii"), (".nii",))
    assert found == [tmp_path / "a.nii"]
    with pytest.raises(FileNotFoundError, match=r"of this name \(looked for \.nii\)$"):
        find_images(tmp_path / "*.none", None, lambda _: False, (".nii",))


def test_the_five_most_frequent_kinds_are_named(tmp_path):
    names = [f"{n}.k{kind}" for kind in range(6) for n in range(9 - kind)]
    touch(tmp_path, *names, "a.nii.GZ")
    with pytest.raises(
        FileNotFoundError, match=r"it has 9 \.k0, 8 \.k1, 7 \.k2, 6 \.k3, 5 \.k4; conv"
    ):
        find_images(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    touch(tmp_path, "a.nii.gz", "a.tar.BZ2", "plain")
    with pytest.raises(FileNotFoundError) as error:
        find_images(tmp_path)
    for kind in ("1 .nii.gz", "1 .bz2", "1 without an extension"):
        assert kind in str(error.value)


def test_sidecars_are_named_like_a_picture_or_begin_like_it(tmp_path):
    touch(tmp_path, "a_b.jpg", "a_b_c.npz", "a.npz", "a_b.exr", "d_e.npz", "d.npz")
    assert [path.name for path in find_images(tmp_path)] == [
        "a.npz",
        "a_b.jpg",
        "d.npz",
        "d_e.npz",
    ]


def test_names_count_below_a_folder_a_lists_folder_or_a_patterns_fixed_parts(tmp_path):
    assert naming_folder(tmp_path) == tmp_path
    assert naming_folder("/data/List.TXT") == Path("/data")
    assert naming_folder("/data/a/b*/c/*.png") == Path("/data/a")
    assert naming_folder("/data/a [[]1]/*.png") == Path("/data/a [1]")
    assert naming_folder("/data/a.png") == Path("/data/a.png")


def test_two_parts_are_the_first_of_their_names(tmp_path):
    touch(tmp_path, "train/0.png", "Training/1.png", "test/2.png", "VALID/3.png", ".val/4.png")
    assert split_folders(tmp_path) == (str(tmp_path / "train"), str(tmp_path / "VALID"))
    assert split_folders(tmp_path / "train") == (tmp_path / "train", None)
    for name in ("test/2.png", "VALID/3.png"):
        (tmp_path / name).unlink()
        (tmp_path / name).parent.rmdir()
    assert split_folders(tmp_path) == (tmp_path, None)
    touch(tmp_path, "x/test/0.png", "x/other.png")
    assert split_folders(tmp_path / "x") == (tmp_path / "x", None)


def test_what_is_left_out_of_two_parts_is_named(tmp_path, caplog):
    touch(tmp_path, "train/0.png", "val/1.png")
    warn_once.cache_clear()
    say_parts(tmp_path, "{train} and {val} at {path}")
    say_parts(tmp_path / "train", "nothing")
    touch(tmp_path, "b/2.png", "a/3.png", "4.png", "5.png", "notes.txt")
    say_parts(tmp_path, "{train}")
    assert caplog.messages == [
        f"{tmp_path}: train/ and val/ at {tmp_path / 'val'}",
        f"{tmp_path}: train/; left out: a/, b/, 2 images beside them",
    ]


def test_parts_are_folders_or_a_share_in_which_a_file_named_twice_counts_once(tmp_path):
    touch(tmp_path, "a/0.png", "b/1.png", "b/2.png")
    a, b = tmp_path / "a", tmp_path / "b"
    assert find_parts(a, b) == ([a / "0.png"], [b / "1.png", b / "2.png"])
    train, val = find_parts(b)
    assert sorted(train + val) == [b / "1.png", b / "2.png"]
    assert len(val) == 1
    with pytest.raises(ValueError, match="one image can't be split"):
        find_parts(a)
    # Two groups, of which never both are held out.
    train, val = find_parts(tmp_path, val_fraction=0.99, hold_out_by="folder")
    assert {path.parent for path in train}.isdisjoint({path.parent for path in val})
    assert train
    assert val


def test_files_that_look_like_slices_are_a_warning(tmp_path, monkeypatch, caplog):
    names = [tmp_path / f"patient{p}_{i}.png" for p in range(3) for i in range(12)]
    asked = []
    known = picture_folder.look_like_slices
    monkeypatch.setattr(
        picture_folder, "look_like_slices", lambda all_: [asked.append(all_), known(all_)][1]
    )
    warn_of_slices([Files(names[:20]), Files(names[20:], below=tmp_path.parent)])
    assert asked[0][0] == "patient0_0.png"
    assert asked[0][-1] == f"{tmp_path.name}/patient2_11.png"
    assert len(asked[0]) == 36
    warn_of_slices([Files(names[:5])])
    warn_of_slices([Files(names)])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("36 files look like slices of 3 things")
