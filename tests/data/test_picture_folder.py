import glob
import hashlib
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data import dataset
from olvae.data.image import EvalTransform
from olvae.data.opening import open_images, open_source
from olvae.data.packing import PackOptions, pack
from olvae.data.picture_folder import Files, FolderSource, find_images
from olvae.export.encode_inputs import find_inputs
from olvae.files import warn_once
from tests.data.images import close_folders, keys_of, members, write_photos


def source(root: Path, **arguments) -> FolderSource:
    return FolderSource(
        str(root), **{"size": 16, "batch_size": 4, "val_fraction": 0.2, **arguments}
    )


def batches(loader, count: int) -> list[torch.Tensor]:
    return [batch["image"] for batch in islice(loader, count)]


@pytest.mark.posix
def test_every_picture_is_in_one_part_of_the_split(image_folder):
    s = source(image_folder)
    train, val = set(s.train.paths), set(s.val.paths)
    assert train | val == set(find_images(image_folder))
    assert not train & val
    assert val


def test_the_split_stays_when_pictures_come(image_folder):
    before = set(source(image_folder).val.paths)
    for i in range(30):
        Image.new("RGB", (20, 20)).save(image_folder / f"new{i}.png")
    assert before <= set(source(image_folder).val.paths)


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (9, 1), (56, 11), (100, 20), (300, 20), (2000, None)]
)
def test_the_default_split_holds_out_not_few(tmp_path, count, held_out):
    """5 % and at least 20, but at most a fifth; of many images the part that the hash gives."""
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.jpg" for i in range(count)))
    source = FolderSource(tmp_path / "list.txt", 16, 1)
    given = FolderSource(tmp_path / "list.txt", 16, 1, val_fraction=0.05)
    assert len(source.train) + len(source.val) == count
    assert len(source.val) == (len(given.val) if held_out is None else held_out)
    assert set(given.val.paths) <= set(source.val.paths)
    assert len(given.val) > 80 or held_out is not None
    if held_out is None:
        # The first 8 bytes of a name's hash, as a fraction.
        hashes = {f"{i}.jpg": hashlib.sha256(b"%d.jpg" % i).hexdigest()[:16] for i in range(count)}
        expected = {name for name, hashed in hashes.items() if int(hashed, 16) < 0.05 * 2**64}
        assert {path.name for path in given.val.paths} == expected


def test_val_root_is_the_validation_folder(image_folder, root):
    Image.new("RGB", (20, 20), "red").save(root / "a.jpg")
    s = source(image_folder, val_root=str(root))
    assert len(s.train) == 12
    (batch,) = batches(s.test_loader(), 9)
    assert batch.shape == (1, 3, 16, 16)


def test_validation_of_a_folder_is_each_picture_once_by_the_evaluation_transform(image_folder):
    s = source(image_folder)
    seen = torch.cat(batches(s.val_loader(), 99))
    expected = [np.asarray(EvalTransform(16)(Image.open(p).convert("RGB"))) for p in s.val.paths]
    assert np.array_equal(seen.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.posix
def test_each_image_is_found_once_whatever_leads_to_it(image_folder):
    expected = find_images(image_folder)
    (image_folder / "notes.txt").write_text("no image")
    (image_folder / ".hidden.png").write_bytes(b"")
    (image_folder / "class0" / "up").symlink_to(image_folder)
    (image_folder / "same").symlink_to(image_folder / "class1")
    found = find_images(image_folder)
    assert found == expected


def test_formats_that_are_read_are_found_by_their_names(tmp_path):
    for name in (names := ["a.avif", "b.PGM", "c.jfif", "d.jpg"]):
        (tmp_path / name).touch()
    (tmp_path / "e.heic").touch()
    assert [path.name for path in find_images(tmp_path)] == names


def test_features_and_depths_beside_a_picture_are_no_images(tmp_path):
    for name in ("a.jpg", "a.npz", "a_0048x0040_sd.npz", "a.EXR", "b.exr", "c.npz", "c.exr"):
        (tmp_path / name).touch()
    for root in (tmp_path, tmp_path / "*"):
        assert [path.name for path in find_images(root)] == ["a.jpg", "b.exr", "c.exr", "c.npz"]
    assert [path.name for path in find_images(tmp_path / "*.npz")] == [
        "a.npz",
        "a_0048x0040_sd.npz",
        "c.npz",
    ]


def test_a_list_names_files_whatever_its_lines_look_like(tmp_path, image_folder, monkeypatch):
    """A command, a URL or a pattern in a received list is the name of a missing file."""
    monkeypatch.chdir(tmp_path)
    received = [
        "pipe:touch executed",
        "| touch executed",
        "$(touch executed)",
        "file:///etc/passwd",
        "${oc.env:HOME}",
    ]
    good = [str(path) for path in find_images(image_folder)]
    (tmp_path / "list.txt").write_text("\n".join([*received, *good]))
    assert [str(path) for path in find_images("list.txt")] == [
        *(str(Path(line)) for line in received),
        *good,
    ]
    s = source("list.txt", val_root=image_folder, max_unreadable=1.0, batch_size=1)
    assert len(batches(s.train_loader(), 2)) == 2
    assert not (tmp_path / "executed").exists()


def test_folder_source_refuses_wrong_folders_and_fractions(image_folder, root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no images"):
        source(root)
    with pytest.raises(FileNotFoundError, match="missing: no such"):
        source(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"0\.png: .*a file"):
        source(image_folder / "class0" / "0.png")
    with pytest.raises(ValueError, match="larger than"):
        source(image_folder, batch_size=100)
    assert source(image_folder, val_fraction=0.99, batch_size=1).samples_per_epoch == 1
    with pytest.raises(ValueError, match="val_fraction"):
        source(image_folder, val_fraction=1.5)
    Image.new("RGB", (9, 9)).save(root / "one.png")
    with pytest.raises(ValueError, match="val_root"):
        source(root)


def test_a_list_of_images_has_any_paths_and_line_ends(image_folder, tmp_path, monkeypatch):
    """Absolute and relative paths; Windows' byte order mark and line ends; bytes without UTF-8."""
    monkeypatch.setenv("HOME", str(image_folder))
    images = find_images(image_folder)
    odd = [b"caf\xe9.png", "line\u2028separator.png".encode(), b"~copy.png"]
    for name in odd:
        shutil.copy(images[0], os.fsencode(tmp_path) + b"/" + name)
    relative = os.path.relpath(images[1], tmp_path)
    names = ["# žluťoučký", str(images[0]), "", relative, "~/class0/0.png"]
    (tmp_path / "list.txt").write_bytes(
        b"\r\n".join(["\r\n".join(names).encode("utf-8-sig"), *odd])
    )
    found = Files(find_images(tmp_path / "list.txt"))
    expected = [images[0], images[1], image_folder / "class0" / "0.png"]
    assert [path.resolve() for path in found.paths[:3]] == expected
    assert [found[i].read().size for i in range(len(found))] == [(48, 40)] * 6
    (tmp_path / "list.txt").write_text("# to be written\n\n")
    with pytest.raises(FileNotFoundError, match=r"list\.txt: .*no file"):
        find_images(tmp_path / "list.txt")


@pytest.mark.parametrize("here", [True, False])
def test_keys_of_a_list_do_not_lead_out_of_its_folder(image_folder, monkeypatch, here):
    """`olvae decode` would refuse them."""
    monkeypatch.chdir(image_folder / "class0")
    Path("list.txt").write_text("0.png\n../class1/1.png\n")
    found = Files(find_images("list.txt" if here else Path("list.txt").absolute()))
    assert [found.key(i) for i in range(2)] == ["class0/0.png", "class1/1.png"]
    assert all(found[i].read().size == (48, 40) for i in range(2))


def test_names_that_are_no_utf_8_are_keys_that_can_be_written(image_folder):
    for i in range(3):
        shutil.copy(
            image_folder / "class0" / "0.png", os.fsencode(image_folder) + b"/caf\xe9%d.png" % i
        )
    s = source(image_folder)
    keys = {part.key(i) for part in (s.train, s.val) for i in range(len(part))}
    assert {f"caf\\xe9{i}.png" for i in range(3)} < keys
    assert len(keys) == 15


def test_held_out_pictures_are_the_same_in_every_version(image_folder):
    s = source(image_folder)
    assert [s.val.key(i) for i in range(len(s.val))] == [
        "class0/0.png",
        "class1/10.png",
        "class2/11.png",
    ]


@pytest.mark.parametrize(
    "name", ["photos", "photos [1]", pytest.param("p?hotos*", marks=pytest.mark.posix)]
)
def test_held_out_pictures_of_a_pattern_are_the_same_wherever_the_folder_is(
    image_folder, tmp_path, name
):
    """Runs keep patterns with the folder they were started in, whose characters are escaped."""
    by_folder = source(image_folder)
    for place in (tmp_path / "here" / name, tmp_path / "there" / name):
        shutil.copytree(image_folder, place)
        found = source(f"{glob.escape(str(place))}/**/*.png")
        assert {path.relative_to(place) for path in found.val.paths} == {
            path.relative_to(image_folder) for path in by_folder.val.paths
        }


def test_a_key_is_the_path_below_the_folder_that_was_given(image_folder):
    for extra in ("class1", "class2"):
        shutil.rmtree(image_folder / extra)
    found = open_images(str(image_folder))
    assert {found.key(i) for i in range(len(found))} == {f"class0/{i}.png" for i in (0, 3, 6, 9)}


def test_a_folder_that_cannot_be_opened_is_told_once(image_folder, monkeypatch, caplog):
    close_folders(monkeypatch, image_folder / "class1")
    for _ in range(2):
        s = source(image_folder)
    assert len(s.train) + len(s.val) == 8
    told = f"skipped the folder {image_folder / 'class1'} and everything in it: Permission denied"
    assert caplog.messages == [told]
    close_folders(monkeypatch, image_folder)
    with pytest.raises(PermissionError, match=r"photos: .*Permission denied"):
        source(image_folder)


def test_a_folder_that_can_be_listed_but_not_entered(image_folder, monkeypatch):
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    assert len(find_images(image_folder)) == 12


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("train", "valid"), ("Train", "Val"), ("TRAINING", "Validation")],
)
def test_one_rule_for_both_parts_in_every_command(train, val, tmp_path, caplog):
    """A line names the rule and what it leaves out."""
    names = [f"{train}/{i}.png" for i in range(4)] + [f"{val}/{i}.png" for i in range(4, 6)]
    folder = write_photos(tmp_path / "set", [*names, "other/6.png", "7.png", ".thumbs/8.png"])
    warn_once.cache_clear()
    trained = FolderSource(folder, 16, 1)
    evaluated = open_source(str(folder), 16, 1)
    encoded = find_inputs(str(folder), 3, 0)
    pack(str(folder), tmp_path / "shards", PackOptions())
    packed = [details["name"] for _, details in members(tmp_path / "shards").values()]
    wanted = {f"{i}.png" for i in range(4)}
    assert {path.name for path in trained.train.paths} == set(packed) == wanted
    assert {encoded.images.key(i) for i in range(len(encoded.images))} == wanted
    for source in (trained, evaluated):
        assert keys_of(source.val_loader()) == ["4.png", "5.png"]
    rest = "; left out: other/, 1 image beside them"
    assert caplog.messages == [
        f"{folder}: trains on {train}/, and {val}/ is held out{rest}",
        f"{folder}: {val}/ is evaluated, and {train}/ is for training{rest}",
        f"{folder}: takes {train}/, and {val}/ is held out: {folder / val} takes that{rest}",
    ]


def test_parts_of_a_folder_with_braces_in_its_name(tmp_path, caplog):
    folder = write_photos(tmp_path / "{} {val}", ["train/0.png", "val/1.png"])
    assert len(find_inputs(str(folder), 3, 0).images) == 1
    (line,) = caplog.messages
    assert line == f"{folder}: takes train/, and val/ is held out: {folder / 'val'} takes that"


def test_a_folder_without_both_parts_is_taken_whole(tmp_path, caplog):
    folder = write_photos(tmp_path / "set", ["train/0.png", "values/1.png", "2.png"])
    assert len(open_source(str(folder), 16, 1).val) == 3
    assert len(find_inputs(str(folder), 3, 0).images) == 3
    assert caplog.messages == []


def test_a_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.HEIC", "b.heic", "deep/c.nii.gz", "deep/notes"):
        (tmp_path / name).touch()
    message = r"no images in this folder \(.*\): it has 2 \.heic, 1 .*convert them first"
    with pytest.raises(FileNotFoundError, match=message) as error:
        find_images(tmp_path)
    assert "1 .nii.gz" in str(error.value)
    assert "1 without" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\.exr\)$"):
        find_images(tmp_path / "empty")


def test_a_share_of_a_large_folder_is_bounded_unless_it_is_given(tmp_path, monkeypatch):
    """The bound is 10,000; here it is 100, to be quick."""
    monkeypatch.setattr(dataset, "MAX_VAL_IMAGES", 100)
    names = tmp_path / "list.txt"
    names.write_text("".join(f"{i}.jpg\n" for i in range(2200)))
    by_default = FolderSource(names, 16, 4)
    given = FolderSource(names, 16, 4, val_fraction=0.05)
    assert by_default.describe() == (
        "2100 training, 100 validation and test images "
        "(at most 10,000 without data.params.val_fraction)"
    )
    assert given.val_images > 100
    assert given.describe().endswith(f" {given.val_images} validation and test images")
    assert set(by_default.val.paths) < set(given.val.paths)
    assert not FolderSource(names, 16, 4, val_root=names).bound


def test_links_to_nothing_are_left_out_and_counted(tmp_path, caplog):
    """As of an archive whose files were moved, or not fetched."""
    for name in ("b.jpg", "a.jpg", "a.txt", ".c.jpg"):
        (tmp_path / name).symlink_to(tmp_path / "gone" / name)
    told = f"{tmp_path}: 2 left out, as {tmp_path}/a.jpg: links to no file"
    with pytest.raises(FileNotFoundError, match=r"no images in this folder \([^)]*\)$"):
        find_images(tmp_path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "b.jpg").touch()
    assert find_images(tmp_path) == [tmp_path / "b.jpg", tmp_path / "gone" / "b.jpg"]
    assert caplog.messages == [told, told.replace("2 left", "1 left")]


def test_shards_and_volumes_beside_pictures_are_told(tmp_path, caplog):
    """A folder that has pictures is one of pictures alone."""
    (tmp_path / "scan").mkdir()
    for name in ("a.jpg", "b.tar", "scan/c.dcm", "scan/d.nii.gz", "._b.tar", "._c.dcm", "e.json"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a.jpg"]
    told = "shards or volumes, which a pattern of their names takes"
    assert caplog.messages == [f"{tmp_path}: 3 left out, as {tmp_path}/b.tar: {told}"]


def test_find_images_asks_the_system_once_a_folder_and_not_for_each_file(tmp_path, monkeypatch):
    for number in range(60):
        folder = tmp_path / f"f{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").touch()
    (tmp_path / "f0" / "link.jpg").symlink_to(tmp_path / "f1" / "1.jpg")
    (tmp_path / "f0" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "f0" / "loop.jpg").symlink_to(tmp_path / "f0" / "loop.jpg")
    os.mkfifo(tmp_path / "f0" / "pipe.jpg")
    asked = []
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda *args, **kwargs: asked.append(1) or stat(*args, **kwargs)
    )
    found = find_images(tmp_path)
    assert len(asked) < 10
    assert len(found) == 61
    assert tmp_path / "f0" / "link.jpg" in found


def sides_of(root: Path, **arguments) -> tuple[set[str], set[str]]:
    """Names of the images of training, and of validation."""
    found = source(root, **arguments)
    train, val = (
        {part.name(index) for index in range(len(part))} for part in (found.train, found.val)
    )
    return train, val


@pytest.mark.parametrize("how", ["folder", r"^(?P<group>\w+)/"])
def test_groups_are_held_out_whole_and_more_images_of_them_change_nothing(root, how, caplog):
    names = [f"{'abcdefgh'[n % 8]}/{n}.png" for n in range(32)]
    write_photos(root, names)
    train, val = sides_of(root, hold_out_by=how)
    held_out = {name[0] for name in val}
    assert held_out == set("abcdefgh") - {name[0] for name in train}
    assert len(val) == 4 * len(held_out)
    write_photos(root, [f"{folder}/new.png" for folder in "abcdefgh"])
    train, val = sides_of(root, hold_out_by=how)
    assert {name[0] for name in val} == held_out
    assert len(val) == 5 * len(held_out)
    assert caplog.messages == []

    # A pattern and a list name the same groups as the folder, so they hold out the same ones.
    if how == "folder":
        (root / "list.txt").write_text("\n".join(names))
        for place in (root / "*" / "*.png", root / "list.txt"):
            assert {name[0] for name in sides_of(place, hold_out_by=how)[1]} == held_out
            # So do the intervals, also of one held-out folder, which holds all of its files.
            found = source(place, hold_out_by=how, val_fraction=0.1)
            parts = (found.train, found.val)
            groups = [{part.group(i, found.grouping) for i in range(len(part))} for part in parts]
            assert len(groups[1]) == 1
            assert groups[0] | groups[1] == set("abcdefgh")


@pytest.mark.parametrize(("largest", "names", "held_out"), [(30, "abcdef", 12), (19, "ab", 1)])
def test_a_group_with_most_of_the_images_is_trained_on(root, largest, names, held_out):
    """Though its name comes first; of its neighbours as many as are wanted are held out."""
    first, *others = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    each = 1 if len(others) == 1 else 4
    write_photos(root, [f"{first}/{n}.png" for n in range(largest)])
    write_photos(root, [f"{name}/{n}.png" for name in others for n in range(each)])
    train, val = sides_of(root, hold_out_by="folder", val_fraction=None)
    assert len(val) == held_out
    assert {name for name in train if name[0] == first} == {
        f"{first}/{n}.png" for n in range(largest)
    }


def test_one_group_alone_can_not_be_split(root):
    write_photos(root, [f"a/{n}.png" for n in range(5)])
    with pytest.raises(ValueError, match=r"one group.*data\.params\.val_root"):
        source(root, hold_out_by="folder")
    with pytest.raises(ValueError, match=r"no group .*'a/0\.png'"):
        source(root, hold_out_by=r"(?P<group>patient\d+)")


def test_a_group_in_both_folders_is_a_warning(root, caplog):
    write_photos(root, [f"train/{name}/{n}.png" for name in "abc" for n in range(3)])
    write_photos(root, [f"val/{name}/{n}.png" for name in "cde" for n in range(3)])
    warn_once.cache_clear()
    source(root, hold_out_by="folder")
    assert caplog.messages[-1].endswith(
        "1 group by `hold_out_by` with images of training and of validation: c: keep each on one "
        "side"
    )
