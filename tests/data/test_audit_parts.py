"""The audit's parts by themselves: facts, notes, problems and lines of small results."""

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from olvae.config import ConfigError
from olvae.data import audit
from olvae.data.audit import (
    AuditResult,
    ShardFacts,
    _check_images,
    _check_shards,
    _counts,
    _difference,
    _Found,
    _read_images,
    _read_shard,
    _summarise,
    _train_source,
    audit_lines,
    audit_source,
)
from olvae.data.image import Photo, array_to_picture
from olvae.data.order.groups import Grouping
from olvae.data.picture_folder import Files, FolderSource
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.places import FOLDER, SAMPLES, SHARDS, VOLUMES
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import ShardRecord
from olvae.data.shards.shard_source import INTERLEAVE
from olvae.files import file_sha256
from tests.data.images import encoded, noise, saved, write_photos, write_tar
from tests.data.volumes.scans import hounsfield, nifti

pytestmark = pytest.mark.usefixtures("one_process")

DEEP = PixelRange.from_node([0, 9])


def result(**facts: object) -> AuditResult:
    return AuditResult(**{"source": "x", "size": [80, 256], "images": 9, "unreadable": [], **facts})


def test_the_lines_of_a_result():
    lost = [ReadError("v.nii", why) for why in ("first", "second")]
    lost += [ReadError(f"f{number}", "bad") for number in range(10)]
    spreads = {
        "shorter_side": {"min": 1000.4, "median": 2000.0, "max": 3000.0},
        "aspect_ratio": {"min": 0.5, "median": 1.0, "max": 1.234},
    }
    shards = [ShardFacts("b.tar", 6, None, "cut"), ShardFacts("a.tar", 4, None, None)]
    found = result(
        images=1200,
        unreadable=lost,
        kinds={"PNG RGB": 1100},
        spreads=spreads,
        smaller=7,
        shards=shards,
        images_per_s=12.3,
        notes=["a\x1b"],
        problems=["b\x1b"],
    )
    assert list(audit_lines(found)) == [
        "images        1,200, 12 of them unreadable (1.00%)",
        "files         1,100 PNG RGB",
        "shorter side  1,000 to 3,000, median 2,000",
        "aspect ratio  0.50 to 1.23, median 1.00",
        "small         7 smaller than 80x256 pixels",
        "speed         12 images/s per loader process at 80x256 pixels",
        "shards        2, 4 to 6 images each; 1 broken",
        "unreadable: v.nii: first (2 images of it)",
        *(f"unreadable: f{number}: bad" for number in range(9)),
        "and 1 more; the JSON has all",
        "note: a\\x1b",
        "problem: b\\x1b",
    ]
    found = result(unreadable=lost[2:], shards=[ShardFacts("a.tar", 1, None, None)])
    assert list(audit_lines(found)) == [
        "images  9, 10 of them unreadable (111.11%)",
        "files   -",
        "small   0 smaller than 80x256 pixels",
        "shards  1, 1 image each",
        *(f"unreadable: f{number}: bad" for number in range(10)),
        "fine: ready for training",
    ]


def test_ten_kinds_are_listed_and_others_counted():
    kinds = {f"kind{number}": 1000 - number for number in range(10)}
    listed = ", ".join(f"{1000 - number:,} kind{number}" for number in range(10))
    assert _counts(kinds) == listed
    assert _counts({**kinds, "rare": 1}) == f"{listed}, and 1 more"


@pytest.mark.parametrize(
    ("facts", "channels", "pixel_range", "problems", "notes"),
    [
        ({"kinds": {"PNG RGBA": 3, "TIFF LA": 2, "JPEG RGB": 1}}, 3, EIGHT_BITS, 0, 1),
        ({"kinds": {"PNG RGBA": 3}}, 4, EIGHT_BITS, 0, 0),
        ({"kinds": {"PNG RGB": 3}}, 3, DEEP, 0, 0),
        ({"kinds": {"PNG RGB": 3, "array": 1}}, 3, DEEP, 1, 0),
        ({"images": 0}, 3, EIGHT_BITS, 1, 0),
        ({"images": 200, "unreadable": [1, 2]}, 3, EIGHT_BITS, 0, 0),
        ({"images": 200, "unreadable": [1, 2, 3]}, 3, EIGHT_BITS, 1, 0),
    ],
)
def test_images_have_problems_by_their_kinds_and_those_that_are_lost(
    facts, channels, pixel_range, problems, notes
):
    found = result(**facts)
    _check_images(found, channels, 0.01, pixel_range)
    assert (len(found.problems), len(found.notes)) == (problems, notes)
    if notes:
        assert found.notes[0].startswith("images with alpha, laid over white: 5;")
    if not found.images:
        assert found.problems == ["no images"]
    if pixel_range is DEEP and problems:
        assert found.problems[0].endswith(": 3 PNG RGB, 1 array")


def test_a_shard_differs_from_its_record():
    shard = ShardFacts("a.tar", 6, "abc", None)
    known = ShardRecord(6, 100, "abc")
    assert _difference(shard, known) is None
    assert _difference(shard, ShardRecord(6)) is None
    assert _difference(ShardFacts("a.tar", 6, None, None), known) is None
    assert _difference(shard, None).startswith("a.tar: is not in index.json")
    assert _difference(shard, ShardRecord(5)) == "a.tar: has 6 images, but 5 by index.json"
    assert _difference(shard, ShardRecord(6, 100, "abd")).startswith("a.tar: its checksum differs")


def test_a_summary_of_sizes_kinds_and_profiles():
    lost = [ReadError("b", "bad"), ReadError("a", "bad")]
    images = [(30, 20, "PNG RGB"), (9, 20, "JPEG RGB"), (10, 19, "JPEG RGB"), (10, 20, "JPEG RGB")]
    found = _Found(images, lost)
    found.profiles.update(["Adobe"] * 2 + ["P3"])
    found.profile_errors.update(["broken"])
    summary = _summarise("x", [20, 10], found)
    assert (summary.source, summary.size, summary.images) == ("x", [20, 10], 6)
    assert [error.name for error in summary.unreadable] == ["a", "b"]
    assert [*summary.kinds.items()] == [("JPEG RGB", 3), ("PNG RGB", 1)]
    assert summary.profiles == {"Adobe": 2, "P3": 1}
    assert summary.smaller == 2
    assert summary.spreads["shorter_side"] == {"min": 9, "median": 10, "max": 20}
    assert summary.spreads["aspect_ratio"] == {"min": 0.45, "median": 0.5132, "max": 1.5}
    assert summary.notes == [
        "2 images would be enlarged, being smaller than 20x10 pixels",
        "converted to sRGB by their colour profile: 2 Adobe, 1 P3",
        "left as they are, because their colour profile can't be used: 1 broken",
    ]
    alone = _summarise("x", 8, _Found(images[:1]))
    assert (alone.smaller, alone.notes, alone.profiles) == (0, [], {})
    assert _summarise("x", 8, _Found([], lost)).spreads == {}


def test_sorted_classes_are_noted_by_those_of_a_shard(monkeypatch):
    asked = []
    line = "few classes"
    monkeypatch.setattr(audit, "describe_sorted", lambda *args: [asked.append(args), line][1])
    shards = [
        ShardFacts("a", 6, None, None, classes) for classes in ({b"1", b"2"}, {b"2"}, {b"3", b"4"})
    ]
    found = result(shards=shards)
    found.note_sorted_classes()
    assert asked == [(16, pytest.approx(5 / 3), 4, INTERLEAVE)]
    assert found.notes == [line]
    line = None
    found.note_sorted_classes()
    result(shards=[ShardFacts("a", 6, None, None)]).note_sorted_classes()
    assert len(asked) == 2
    assert len(found.notes) == 1
    (shard, *_) = found.as_dict()["shards"]
    assert shard["classes"] == 2


def test_closed_folders_are_problems():
    found = result()
    found.note_images(Files([Path("a/b.png")], closed=[ReadError("a/c", "denied")]))
    assert found.problems == ["a/c: this folder can't be opened: denied"]
    found.note_images(None)
    assert (len(found.problems), found.notes) == (1, [])


def test_images_are_known_by_their_size_kind_and_pixels():
    found = _Found()
    tall = noise(0, (5, 300))
    deep = array_to_picture(np.full((4, 3, 1), 999, dtype=np.uint16))
    bands = array_to_picture(np.full((4, 3, 2), 7, dtype=np.uint8))
    for content, channels in ((saved(tall, "PNG"), 3), (tall, 3), (deep, 1), (bands, 2)):
        found.decode(lambda c=content, n=channels: Photo(c, "it", n), "name", "place")
    assert found.images == [
        (5, 300, "PNG RGB"),
        (5, 300, "in memory RGB"),
        (3, 4, "array uint16"),
        (3, 4, "array"),
    ]
    rows = [np.asarray(tall)[top : top + 256].transpose(2, 0, 1).tobytes() for top in (0, 256)]
    digest = hashlib.sha256(b"(5, 300)" + b"".join(rows)).hexdigest()
    assert found.pixels[:2] == [("place", "name", digest)] * 2
    assert len({names[2] for names in found.pixels}) == 3


def test_what_cannot_be_read_is_named_by_its_file_and_profiles_are_counted():
    found = _Found()

    def fail(image: str) -> Photo:
        raise audit.UnreadableImageError("file", "bad", image)

    for image in ("", "3"):
        found.decode(lambda image=image: fail(image), "name", "place")
    assert found.unreadable == [ReadError("name", "bad"), ReadError("file", "bad")]

    for profile, error in (("P3", None), (None, "broken"), ("P3", None)):
        photo = Photo(noise(0), "it")
        photo.profile, photo.profile_error = profile, error
        found.decode(lambda photo=photo: photo, "name", "place")
    assert (found.profiles, found.profile_errors) == (Counter(P3=2), Counter(broken=1))


def test_what_several_tasks_have_found_is_added():
    part = _Found(
        [(1, 2, "a")],
        [ReadError("b", "bad")],
        [ShardFacts("c", 1, None, None)],
        [("d", "e", "f")],
        Counter({("g", "h"): 1}),
        Counter("i"),
        Counter("j"),
    )
    found = _Found()
    for _ in range(2):
        found.add(part)
    assert found == _Found(
        part.images * 2,
        part.unreadable * 2,
        part.shards * 2,
        part.pixels * 2,
        Counter({("g", "h"): 2}),
        Counter("ii"),
        Counter("jj"),
    )


class Progress:
    steps = 0

    def advance(self) -> None:
        self.steps += 1


def test_files_are_placed_by_their_paths(tmp_path):
    write_photos(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    paths = sorted(tmp_path.rglob("*.png"))
    progress = Progress()
    found = _read_images(Files(paths, root=tmp_path), range(1, 3), progress)
    assert progress.steps == 2
    assert [names[:2] for names in found.pixels] == [
        (str(paths[1]), "a/1.png"),
        (str(paths[2]), "b/2.png"),
    ]


def test_a_shard_is_read_with_its_classes_and_groups(tmp_path):
    files = [
        ("p1_0.jpg", encoded(0)),
        ("p1_0.cls", b"7" * 2000),
        ("p1_0.json", b'{"name": "q1_0.jpg", "hold_out_group": "packed"}'),
        ("p2_0.jpg", b"broken"),
        ("p2_0.cls", b"8"),
        ("p3_0.jpg", encoded(1)),
    ]
    shard = write_tar(tmp_path / "0.tar", files)
    url = str(shard)
    for how, groups in (
        ("file", {(url, "packed")}),
        (r"(?P<group>\w\d)_", {(url, "q1"), (url, "p2"), (url, "p3")}),
    ):
        progress = Progress()
        found = _read_shard(3, EIGHT_BITS, Grouping(how), url, progress)
        assert progress.steps == 3
        assert set(found.groups) == groups
        assert [names[:2] for names in found.pixels] == [(url, "0/p1_0"), (url, "0/p3_0")]
        assert [error.name for error in found.unreadable] == ["0/p2_0"]
        assert found.shards == [ShardFacts(url, 3, None, None, {b"7" * 1024, b"8"})]
    # A checksum is compared with an index; an end that is missing is named.
    (tmp_path / "index.json").touch()
    shard.write_bytes(shard.read_bytes()[:-15_000])
    (facts,) = _read_shard(3, EIGHT_BITS, Grouping(), url, Progress()).shards
    assert facts.sha256 == file_sha256(shard)
    assert facts.broken


@pytest.mark.parametrize(
    ("target", "more"),
    [
        (FOLDER, {"channels": 5, "range": DEEP.as_node(), "hold_out_by": "folder"}),
        (SHARDS, {"channels": 5, "range": DEEP.as_node()}),
        (SAMPLES, {}),
        (
            VOLUMES,
            {
                "neighbours": 2,
                "range": {**DEEP.as_node(), "outside": "clip"},
                "hold_out_by": "folder",
            },
        ),
    ],
)
def test_the_source_that_would_train_has_the_audits_settings(target, more, monkeypatch):
    monkeypatch.setattr(audit, "find_source", lambda _: (target, {"root": "x"}))
    asked = []

    def made(node: object) -> object:
        asked.append(node)
        if len(asked) > 1:
            raise FileNotFoundError("none")
        return "source"

    monkeypatch.setattr(audit, "instantiate", made)
    assert _train_source("x", 16, 5, DEEP, "folder") == ("source", [])
    assert _train_source("x", 16, 5, DEEP, "folder") == (None, ["none"])
    node = {"target": target, "params": {"root": "x", "size": 16, "batch_size": 1, **more}}
    assert asked == [node, node]


def test_the_speed_is_measured_after_a_first_image(root, monkeypatch):
    write_photos(root, [f"{number}.png" for number in range(4)])
    asked = []

    def seconds(run: object, *args: object) -> float:
        run()
        asked.append(args)
        return 0.123

    def stream(_: object, *args: object):
        for number in range(3):
            asked.append((number, *args[:2]))
            yield None

    monkeypatch.setattr(audit, "seconds_per_image", seconds)
    monkeypatch.setattr(FolderSource, "stream", stream)
    found = audit_source(str(root), 16, workers=0)
    assert found.images_per_s == 8.1
    assert asked == [(0, 0, 0), (1, 0, 0), (1, audit.MEASURE_S)]


def test_ranks_see_the_same_files_and_the_first_has_the_result(root, monkeypatch):
    write_photos(root, [f"{number}.png" for number in range(4)])
    monkeypatch.setattr(audit, "run_in_processes", lambda *_: None)
    monkeypatch.setattr(audit, "_train_source", lambda *_: pytest.fail("of the first rank alone"))
    monkeypatch.setattr(audit, "this_process", lambda: (1, 2))
    assert audit_source(str(root), 16) is None
    monkeypatch.setattr(audit, "of_each", lambda own: [own, "other"])
    with pytest.raises(ConfigError, match="the processes see different files"):
        audit_source(str(root), 16)


def test_images_are_read_in_tasks_of_so_many(root, monkeypatch):
    write_photos(root, [f"{number}.png" for number in range(5)])
    asked = []
    monkeypatch.setattr(audit, "IMAGES_PER_TASK", 2)
    monkeypatch.setattr(audit, "run_in_processes", lambda *args: asked.append(args))
    done = []
    audit_source(str(root), 16, workers=3, on_progress=lambda *args: done.append(args))
    ((read, tasks, workers, on_progress),) = asked
    assert (tasks, workers) == ([range(2), range(2, 4), range(4, 5)], 3)
    on_progress(4)
    assert done == [(4, 5)]
    assert len(read(tasks[0], SimpleNamespace(advance=lambda: None)).images) == 2


def test_volumes_are_compared_as_wholes(root):
    """Their empty slices are alike."""
    for number in range(4):
        nifti(root / f"{number}.nii", hounsfield(number))
    window = PixelRange.from_node([-1000, 900])
    found = audit_source(str(root), 8, 1, workers=0, pixel_range=window)
    assert found.problems == []
    assert found.notes
    for number in range(4):
        nifti(root / f"{number}.nii", hounsfield(0))
    (problem,) = audit_source(str(root), 8, 1, workers=0, pixel_range=window).problems
    assert problem.startswith("1 of the validation images are training images as well: ")
    assert ".nii (the pixels of " in problem


def test_a_picture_in_memory_is_no_file():
    found = _Found()
    found.decode(lambda: Photo(Image.new("L", (4, 3)), "it", 1), "name", "place")
    assert found.images == [(4, 3, "in memory L")]


def test_an_index_that_can_not_be_read_is_noted(tmp_path):
    (tmp_path / "index.json").write_text("{")
    found = result(source=str(tmp_path))
    _check_shards(found, [tmp_path])
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / 'index.json'}: not a readable index of shards: ")


def test_of_images_none_of_which_can_be_read_no_speed_is_measured(root, monkeypatch):
    for name in "ab":
        (root / f"{name}.png").write_bytes(b"no picture")
    monkeypatch.setattr(FolderSource, "stream", lambda *_: pytest.fail("there is nothing to read"))
    assert audit_source(str(root), 16, workers=0).images_per_s is None


def test_shards_are_checked_for_groups_on_both_sides_and_for_sorted_classes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(AuditResult, "note_sorted_classes", lambda self: asked.append(self))
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"p{number // 2}_{number}.jpg", encoded(number))])
    how = r"(?P<group>p\d)_"
    found = audit_source(str(tmp_path), 8, workers=0, hold_out_by=how)
    assert not [line for line in found.problems if "hold_out_by" in line]
    write_tar(tmp_path / "2.tar", [("p0_2.jpg", encoded(2))])
    found = audit_source(str(tmp_path), 8, workers=0, hold_out_by=how)
    (line,) = [line for line in found.problems if "hold_out_by" in line]
    assert line.startswith("1 group by `hold_out_by` with images of training and of validation: p0")
    assert len(asked) == 2
