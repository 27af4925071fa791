"""Checking: what is planted is found, and nothing else."""

import json
import shutil

import numpy as np
import pytest

from olvae.data.audit import audit_lines, audit_source
from olvae.data.image import Photo
from olvae.data.packing import PackOptions, pack
from tests.data.images import close_folders, noise, saved, write_photos
from tests.export.latents import encode

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def photos(tmp_path):
    """Twenty-four PNG files of 24 x 20 pixels."""
    return write_photos(tmp_path / "photos", [f"class{i % 2}/{i:02d}.png" for i in range(24)])


@pytest.fixture
def shards(photos, tmp_path):
    pack(str(photos), tmp_path / "shards", PackOptions(shard_size=6))
    return tmp_path / "shards"


@pytest.mark.usefixtures("processes")
def test_audit_of_a_folder_that_is_fine(photos):
    counted = []
    result = audit_source(
        str(photos), 16, 3, 0.01, 2, lambda done, total: counted.append((done, total))
    )
    assert (result.images, result.unreadable, result.problems, result.notes) == (24, [], [], [])
    assert (result.kinds, counted[-1]) == ({"PNG RGB": 24}, (24, 24))
    assert result.images_per_s > 10


def test_a_note_has_the_ten_most_common_profiles(root, monkeypatch):
    """The result, and so the JSON, has all."""
    write_photos(root, [f"{i}.png" for i in range(12)])
    named = property(lambda photo: photo.content.stem, lambda *_: None)
    monkeypatch.setattr(Photo, "profile", named, raising=False)
    result = audit_source(str(root), 16, workers=0)
    (note,) = [note for note in result.notes if note.startswith("converted to sRGB")]
    assert note.count("1 ") == 10
    assert note.endswith(", and 2 more")
    assert len(result.profiles) == 12


def test_audit_of_sizes(root):
    sizes = [(300, 40), (160, 80), (64, 64), (63, 200), (130, 128)]
    for i, size in enumerate(sizes):
        noise(i, size).save(root / f"{i}.png")
    result = audit_source(str(root), 64, workers=2)
    for name, measured in (
        ("width", [w for w, _ in sizes]),
        ("height", [h for _, h in sizes]),
        ("shorter_side", [min(s) for s in sizes]),
        ("aspect_ratio", [w / h for w, h in sizes]),
    ):
        measured = sorted(measured)
        assert tuple(result.spreads[name].values()) == pytest.approx(
            (measured[0], measured[2], measured[4]), abs=1e-4
        )
    assert result.smaller == 2
    assert "2 images would be enlarged" in result.notes[0]


def test_audit_of_kinds_of_files(root):
    rgb = noise(0)
    rgb.save(root / "a.jpg")
    rgb.convert("L").save(root / "b.png")
    rgb.convert("CMYK").save(root / "c.jpg")
    rgb.convert("RGBA").save(root / "d.png")
    rgb.convert("P").save(root / "e.png", transparency=3)
    rgb.save(root / "f.gif")
    np.save(root / "g.npy", np.asarray(rgb))
    result = audit_source(str(root), 16)
    kinds = ["JPEG RGB", "PNG L", "JPEG CMYK", "PNG RGBA", "PNG P+A", "GIF P", "array"]
    assert result.kinds == dict.fromkeys(kinds, 1)
    assert result.notes == ["images with alpha, laid over white: 2; `channels` 4 keeps it"]


@pytest.mark.usefixtures("processes")
def test_audit_of_unreadable_files(photos):
    (photos / "empty.jpg").touch()
    (photos / "cut.png").write_bytes(saved(noise(0, (90, 90)), "PNG")[:9000])
    (photos / "new\nline.png").write_text("no picture")
    (photos / "folder.jpg").mkdir()
    (photos / "nowhere.jpg").symlink_to(photos / "missing.jpg")
    result = audit_source(str(photos), 16, workers=2)
    assert result.images == 27
    assert [error.name for error in result.unreadable] == ["cut.png", "empty.jpg", "new\nline.png"]
    assert result.unreadable[1].reason == "the file is empty"
    assert result.problems == ["3 of 27 images can't be read, more than `max_unreadable` 0.01"]
    assert audit_source(str(photos), 16, max_unreadable=0.2).problems == []


def test_audit_of_a_folder_that_cannot_be_opened(photos, monkeypatch):
    close_folders(monkeypatch, photos / "class1")
    result = audit_source(str(photos), 16, workers=2)
    assert result.images == 12
    assert result.problems == [
        f"{photos / 'class1'}: this folder can't be opened: Permission denied"
    ]
    close_folders(monkeypatch, photos)
    with pytest.raises(PermissionError, match=r"photos: .*opened"):
        audit_source(str(photos), 16, workers=2)


def test_audit_of_one_image_is_a_problem(tmp_path):
    noise(0).save(tmp_path / "one.png")
    for source in (str(tmp_path), f"{tmp_path}/*.png"):
        (problem,) = audit_source(source, 16).problems
        assert "one image" in problem


@pytest.mark.usefixtures("processes")
def test_audit_of_shards_that_are_fine(shards):
    counted = []
    result = audit_source(
        str(shards), 16, workers=2, on_progress=lambda done, total: counted.append((done, total))
    )
    assert (result.images, result.problems, result.unreadable, result.notes) == (24, [], [], [])
    assert [shard.images for shard in result.shards] == [6, 6, 6, 6]
    assert counted[-1] == (24, 24)


class CountedUrl(str):
    """A shard's URL that counts its comparisons."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedUrl.compared += 1
        return str.__eq__(self, other)


def test_audit_compares_each_shard_with_few_others(shards, monkeypatch):
    (shards / "index.json").unlink()
    for i in range(4, 60):
        shutil.copy(shards / "000000.tar", shards / f"{i:06d}.tar")
    urls = [CountedUrl(path) for path in sorted(shards.glob("*.tar"))]
    monkeypatch.setattr("olvae.data.audit.find_shards", lambda src: urls)
    result = audit_source(str(shards), 16, workers=2)
    assert [shard.url for shard in result.shards] == [str(url) for url in urls]
    assert CountedUrl.compared <= 10 * len(urls)  # for 60 shards, 1770 by a search of each


def test_audit_of_a_truncated_shard(shards):
    data = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(data[: len(data) // 2])
    result = audit_source(str(shards), 16, workers=2)
    read = result.shards[1].images
    assert 0 < read < 6
    assert result.images == 18 + read
    assert result.shards[1].broken
    assert result.problems[0].startswith(f"{shards / '000001.tar'}: ")
    assert result.problems[1] == f"{shards / '000001.tar'}: has {read} images, but 6 by index.json"
    assert [shard.broken for shard in result.shards].count(None) == 3


def test_audit_of_a_changed_shard_and_a_missing_one(shards):
    data = bytearray((shards / "000002.tar").read_bytes())
    place = data.index(b'"name"')
    data[place + 1] = ord("N")  # of a sidecar: the images are as they were
    (shards / "000002.tar").write_bytes(data)
    (shards / "000003.tar").unlink()
    problems = audit_source(str(shards), 16, workers=2).problems
    assert problems == [
        f"{shards}: shards of index.json are missing: 000003.tar",
        f"{shards / '000002.tar'}: its checksum differs from index.json: changed or damaged since",
    ]
    shutil.copy(shards / "000000.tar", shards / "new.tar")
    problems = audit_source(str(shards), 16, workers=2).problems
    assert any(f"{shards / 'new.tar'}: is not in index.json" in it for it in problems)
    picked = audit_source(str(shards / "{000000..000001}.tar"), 16, workers=2)
    assert picked.problems == []


def test_audit_notes_an_index_that_is_missing_or_has_no_checksums(shards):
    (shards / "index.json").write_text(
        json.dumps({"shards": {f"00000{i}.tar": {"images": 6} for i in range(4)}})
    )
    result = audit_source(str(shards), 16, workers=2)
    assert result.problems == []
    assert result.notes == [
        f"{shards}: index.json has no checksums: damage inside a shard can't be seen"
    ]
    (shards / "index.json").unlink()
    result = audit_source(str(shards), 16, workers=2)
    assert result.problems == []
    (shards / ".packing").mkdir()
    (problem,) = audit_source(str(shards), 16, workers=2).problems
    assert (
        problem
        == f"{shards}: its packing was interrupted, so shards are missing: repeat `olvae data pack`"
    )
    note = f"{shards}: has no index.json: training counts the images of these shards when it starts"
    assert result.notes == [note]


def test_audit_notes_a_shard_without_images(shards):
    (shards / "index.json").unlink()
    (shards / "000001.tar").write_bytes(bytes(10240))
    result = audit_source(str(shards), 16, workers=2)
    assert result.problems == []
    assert f"{shards / '000001.tar'}: a shard without images" in result.notes


@pytest.mark.parametrize("images", [False, True])
def test_audit_refuses_latents_even_with_images_beside_them(tmp_path, image_folder, images):
    encode(image_folder, tmp_path / "latents", images=images, classes=True)
    (tmp_path / "latents" / "000000.tar").write_bytes(b"")  # one that can't be read hides nothing
    with pytest.raises(ValueError, match="are latents"):
        audit_source(str(tmp_path / "latents"), 16, workers=2)


def test_audit_of_a_data_set_in_memory():
    result = audit_source("torchvision:FakeData,size=3")
    assert result.kinds == {"in memory RGB": 3}
    assert result.notes == ["3 images would be enlarged, being smaller than 256 pixels"]


def test_audit_lines_have_counts_kinds_and_problems(photos, shards):
    for name in ("[bold]copy\n.png", *(f"bad{i:02d}.jpg" for i in range(11))):
        (photos / name).touch()
    lines = list(audit_lines(audit_source(str(photos), 16, workers=2)))
    for line in (
        "images        36, 12 of them unreadable (33.33%)",
        "files         24 PNG RGB",
        "unreadable: [bold]copy\\n.png: the file is empty",
        "and 2 more; the JSON has all",
        "problem: 12 of 36 images can't be read, more than `max_unreadable` 0.01",
    ):
        assert line in lines, line
    assert "fine: ready for training" not in lines
    lines = list(audit_lines(audit_source(str(shards), 16, workers=2)))
    assert lines[-1] == "fine: ready for training"
    assert "shards        4, 6 images each" in lines


def test_validation_images_that_are_trained_on_are_named_by_content(tmp_path):
    """A copy, one in another format, and one by another spelling; in folders, lists and shards."""
    photos = write_photos(tmp_path / "set", [f"train/{i}.png" for i in range(4)] + ["val/4.png"])
    assert audit_source(str(photos), 16).problems == []
    shutil.copy(photos / "train" / "1.png", photos / "val" / "copy.png")
    noise(2).save(photos / "val" / "other.tif")
    (problem,) = audit_source(str(photos), 16, workers=2).problems
    assert problem == (
        "2 of the validation images are training images as well: val/copy.png (the pixels of "
        "train/1.png), val/other.tif (the pixels of train/2.png): keep one of each"
    )

    # A list, with a fifth of its images held out.
    names = [f"{prefix}{i}.png" for prefix in ("train/", "train/../train/") for i in range(4)]
    (photos / "list.txt").write_text("\n".join(names))
    (problem,) = audit_source(str(photos / "list.txt"), 16).problems
    assert problem.startswith("1 of the validation images are training images as well")

    # The last shard is held out.
    several = write_photos(tmp_path / "several", [f"{i}.png" for i in range(4)])
    shutil.copy(several / "0.png", several / "4.png")
    pack(str(several), tmp_path / "shards", PackOptions(shard_size=1, seed=None))
    (problem,) = audit_source(str(tmp_path / "shards"), 16).problems
    assert "000004/00000004 (the pixels of 000000/00000000)" in problem
