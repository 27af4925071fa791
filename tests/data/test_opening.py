"""Data that are found again from another folder."""

import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

from olvae import config as cfg
from olvae.config import ConfigError
from olvae.data.dataset import SamplePhotographs
from olvae.data.opening import open_images, open_source, open_test_source, trains_on
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import AS_STORED, PixelRange, Sides
from olvae.export.encode_inputs import find_inputs
from olvae.runs import make_data_absolute, present_data
from tests.conftest import tiny_config
from tests.data.images import encoded, write_photos, write_shards


def count(src: object, **arguments: int) -> int:
    return sum(len(b["key"]) for b in open_source(str(src), 16, 4, **arguments).test_loader(4))


def test_open_source_takes_folders_lists_patterns_shards_and_configs(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (2, 3))
    (tmp_path / "list.txt").write_text("# two\nphotos/class0/0.png\n\nphotos/class1/1.png\n")
    cfg.save(tiny_config(image_folder), tmp_path / "config.yaml")
    for src, expected in {
        image_folder: 12,
        tmp_path / "list.txt": 2,
        image_folder / "**" / "1*.png": 3,
        tmp_path / "shards": 5,
        tmp_path / "shards" / "{000..001}.tar": 5,
        f"pipe:cat {tmp_path}/shards/001.tar": 3,
        "torchvision:FakeData,size=5,image_size=[3, 20, 20]": 5,
        "torchvision:FakeData,size=6": 6,
        f"hf:imagefolder,data_dir={image_folder}": 12,
        "samples": 42,
        tmp_path / "config.yaml": None,
    }.items():
        if expected is not None:
            assert count(src) == expected, src
    assert (
        count(tmp_path / "config.yaml")
        == open_source(str(tmp_path / "config.yaml"), 1, 1).val_images
    )


@pytest.mark.parametrize(("full", "empty"), [("val", "train"), ("train", "val")])
def test_open_source_takes_the_one_part_that_has_images(tmp_path, caplog, full, empty):
    folder = write_photos(tmp_path / "set", [f"{full}/0.png", f"{full}/1.png"])
    (folder / empty).mkdir()
    assert count(folder) == 2
    assert f"{folder}: {full}/ is evaluated" in caplog.messages[0]


def test_open_source_skips_unreadable_images_however_many(image_folder):
    for path in sorted(image_folder.rglob("*.png"))[:5]:
        path.write_bytes(b"")
    source = open_source(str(image_folder), 16, 4)
    assert sum(len(b["key"]) for b in source.test_loader(4)) == 7
    assert len(source.unreadable.reasons) == 5


def test_open_source_refuses_what_is_not_there(tmp_path):
    (tmp_path / "one.jpg").write_bytes(encoded(1))
    for src, error, text in (
        (tmp_path / "nowhere", FileNotFoundError, "no such folder"),
        (tmp_path / "list.txt", FileNotFoundError, "no such list"),
        (tmp_path / "*.png", FileNotFoundError, "no images of this name"),
        (tmp_path / "x.tar", FileNotFoundError, "no shards"),
        ("torchvision:Nothing", ConfigError, "does not import"),
        ("torchvision:FakeData,size", ConfigError, "size is not key=value"),
        (tmp_path / "config.yaml", ConfigError, "no such config file"),
    ):
        with pytest.raises(error, match=text):
            open_source(str(src), 16, 4)
    cfg.save({"model": {}}, tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match="no data"):
        open_source(str(tmp_path / "empty.yaml"), 16, 4)


FOLDER = "olvae.data.picture_folder.FolderSource"
SHARDS = "olvae.data.shards.webdataset.WebDatasetSource"
HUB = "olvae.data.hub.HuggingFaceSource"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A working folder, of which a pattern would have to be escaped, with two folders of images."""
    home = tmp_path / "a [1]"
    for name in ("photos", "more", "box"):
        (home / name).mkdir(parents=True)
        for i in range(4):
            (home / name / f"{i}.png").write_bytes(encoded(i))
    monkeypatch.chdir(home)
    return home


def test_make_data_absolute_changes_paths_alone(home):
    (home / "photos" / "2.tar").touch()
    sources = [
        {
            "target": FOLDER,
            "params": {"root": "photos/*.png", "val_root": "./more", "size": 8, "filters": ["box"]},
        },
        {
            "target": SHARDS,
            "params": {
                "shards": ["photos/{0..3}.tar", "pipe:cat photos/{0..3}.tar", "s3://b/{1..2}"]
            },
        },
        {
            "target": FOLDER,
            "params": {"root": "nowhere", "val_root": str(home / "more"), "size": 8},
        },
        {"target": "torchvision.datasets.CIFAR10", "params": {"root": "more", "train": False}},
        {
            "target": HUB,
            "params": {"path": "parquet", "data_files": ["photos/*.png", "data/at_the_hub.png"]},
        },
        {"target": HUB, "params": {"path": "more", "data_dir": "more"}},
        {"target": HUB, "params": {"path": "user/photos", "data_dir": "more"}},
    ]
    config = {
        "data": {"target": "olvae.data.mix.MixSource", "params": {"size": 8, "sources": sources}}
    }
    escaped = str(home).replace("[", "[[]")
    assert make_data_absolute(config) == {
        f"{escaped}/photos/*.png": "photos/*.png",
        f"{home}/more": "more",
        f"{escaped}/photos/{{0..3}}.tar": "photos/{0..3}.tar",
    }
    first, second, third, fourth, *sets = (
        node["params"] for node in config["data"]["params"]["sources"]
    )
    assert first == {
        "root": f"{escaped}/photos/*.png",
        "val_root": f"{home}/more",
        "size": 8,
        "filters": ["box"],
    }
    assert second["shards"] == [
        f"{escaped}/photos/{{0..3}}.tar",
        *sources[1]["params"]["shards"][1:],
    ]
    assert third == sources[2]["params"]
    assert fourth["root"] == f"{home}/more"
    assert sets[0] == {
        "path": "parquet",
        "data_files": [f"{escaped}/photos/*.png", "data/at_the_hub.png"],
    }
    assert sets[1] == {"path": f"{home}/more", "data_dir": f"{home}/more"}
    assert sets[2] == {"path": "user/photos", "data_dir": "more"}  # in the repository
    assert sources[0]["params"]["root"] == "photos/*.png"  # the node that was given is another one


def test_a_mix_is_evaluated_at_another_size(home):
    nodes = [
        {"target": FOLDER, "params": {"root": root, "size": 8, "batch_size": 1}}
        for root in ("photos", "more")
    ]
    config = {
        "data": {
            "target": "olvae.data.mix.MixSource",
            "params": {"sources": nodes, "size": 8, "batch_size": 1},
        }
    }
    batch = next(iter(open_test_source(config, size=16).val_loader()))
    assert batch["image"].shape[2:] == (16, 16)
    assert nodes[0]["params"]["size"] == 8


class Named(SamplePhotographs):
    """Takes words where a mix takes nodes."""

    def __init__(self, sources: list[str], **arguments: int) -> None:
        super().__init__(**arguments)
        self.names = sources


def test_sources_that_are_no_nodes_are_evaluated_at_another_size():
    node = {
        "target": f"{__name__}.Named",
        "params": {"sources": ["a", "b"], "size": 64, "batch_size": 1},
    }
    source = open_test_source({"data": node}, size=32)
    assert (source.size, source.names) == ((32, 32), ["a", "b"])


def test_moved_data_are_one_line_with_both_places(home, tmp_path, monkeypatch, caplog):
    config = {"data": {"target": FOLDER, "params": {"root": "photos", "size": 8, "batch_size": 1}}}
    config["run"] = {"paths": make_data_absolute(config)}
    moved = tmp_path / "b"
    home.rename(moved)
    monkeypatch.chdir(moved)
    with caplog.at_level(logging.WARNING, "olvae"):
        assert open_test_source(config).images == 4
        assert present_data(config)["params"]["root"] == str(moved / "photos")
    expected = (
        f"{home / 'photos'}: this run's data are not there any more: taken from {moved / 'photos'}"
    )
    assert caplog.messages == [expected]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="photos: no images"):
        open_test_source(config)
    # with --data nobody asks for them
    assert open_test_source(config, str(moved / "more")).val_images == 4


def test_trains_on_knows_a_runs_images(home, monkeypatch):
    """The place itself, a part of it or a folder around it; not the held-out half, a shard, or
    another's images."""
    for name in ("photos/train", "photos/val", "more/deep"):
        (home / name).mkdir(parents=True)
    shards = [str(home / "more" / "0.tar"), "https://a.org/0.tar"]
    sources = [{"params": {"root": str(home / "photos")}}, {"params": {"shards": shards}}]
    config = {"data": {"target": "olvae.data.mix.MixSource", "params": {"sources": sources}}}
    trained = ("photos/train", "photos/train/*.png", "more", "more/0.tar")
    assert all(trains_on(config, str(home / place)) for place in trained)
    others = [
        home / "photos",
        home / "photos" / "val",
        home / "photos" / "train2",
        home / "more" / "deep",
    ]
    monkeypatch.setenv("HOME", str(home))
    assert trains_on(config, "~/photos/train")
    assert trains_on({"data": {"params": {"root": "~/photos"}}}, str(home / "photos" / "train"))
    monkeypatch.chdir(home / "photos" / "train")
    elsewhere = ("https://a.org/0.tar", "samples", "torchvision:CIFAR10", "other.yaml", "list.txt")
    assert not any(trains_on(config, str(place)) for place in (*others, *elsewhere))
    folder = {"data": {"params": {"shards": str(home / "more")}}}
    assert trains_on(folder, str(home / "more"))
    assert not trains_on(folder, str(home / "more" / "3.tar"))  # which may be held out
    assert not trains_on({}, str(home))


def test_trains_on_knows_what_is_evaluated_where_a_part_is_empty(image_folder, tmp_path):
    """With an empty val/, the training images are."""
    (tmp_path / "set" / "val").mkdir(parents=True)
    shutil.move(image_folder, tmp_path / "set" / "train")
    config = {"data": {"params": {"root": str(tmp_path / "set" / "train")}}}
    assert open_source(str(tmp_path / "set"), 16, 1).val_images > 0
    assert trains_on(config, str(tmp_path / "set"))
    Image.new("RGB", (20, 20)).save(tmp_path / "set" / "val" / "a.png")
    assert not trains_on(config, str(tmp_path / "set"))


def test_lists_and_patterns_of_what_a_run_trains_on(home, image_folder):
    """Image by image: those that the run holds out are none."""
    source = FolderSource(image_folder, 16, 1)
    config = {"data": {"params": {"root": str(image_folder)}}}
    (home / "held_out.txt").write_text("\n".join(map(str, source.val.paths)))
    (home / "trained.txt").write_text(
        "\n".join(map(str, [*source.val.paths, *source.train.paths[:1]]))
    )
    assert not trains_on(config, str(home / "held_out.txt"))
    assert trains_on(config, str(home / "trained.txt"))
    assert trains_on(config, str(image_folder / "../*/class0/*.png"))
    listed = {"data": {"params": {"root": str(home / "trained.txt"), "val_fraction": 0.01}}}
    assert trains_on(listed, str(image_folder))
    assert not trains_on(listed, str(home / "gone.txt"))


def test_open_test_source_resizes_other_masks_as_the_runs_own(home):
    masks = {"params": {"filters": ["nearest"]}}
    both, half = ({"sources": [masks, node]} for node in (masks, {}))
    for params, resample in (
        (masks["params"], "nearest"),
        (both, "nearest"),
        (half, "bicubic"),
        ({}, "bicubic"),
    ):
        config = {"data": {"target": FOLDER, "params": {"size": 8, **params}}}
        assert open_test_source(config, "more").eval_transform.resample == resample


def test_open_test_source_takes_another_config_at_a_size(home):
    cfg.save(
        {"data": {"target": FOLDER, "params": {"root": "more", "size": 16, "batch_size": 1}}},
        home / "other.yaml",
    )
    for size, expected in ((None, 16), (8, 8)):
        source = open_test_source(
            {"data": {"params": {"filters": ["nearest"]}}}, str(home / "other.yaml"), size
        )
        assert source.size == Sides.of(expected)
        assert next(iter(source.test_loader()))["image"].shape[-2:] == (expected, expected)
        assert source.eval_transform.resample == "nearest"  # as the run's own masks


def test_open_source_refuses_data_that_are_no_node(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {params: {root: photos}}")
    with pytest.raises(ConfigError, match="target and params"):
        open_source(str(tmp_path / "c.yaml"), 8, 1)


def test_a_models_images_elsewhere_have_the_groups_of_its_training(root, caplog):
    """Where its pattern fits their names; else each is its own, with a warning."""
    write_photos(root, ["p1/0.png", "p1/1.png", "p2/0.png"])
    config = tiny_config(root)
    config["data"]["params"]["hold_out_by"] = r"(?P<group>p\d)"
    source = open_test_source(config, str(root))
    (batch,) = source.test_loader(3)
    assert batch["group"] == ["p1", "p1", "p2"]
    (root / "q.png").write_bytes((root / "p1" / "0.png").read_bytes())
    (batch,) = open_test_source(config, str(root)).test_loader(4)
    assert "group" not in batch
    assert "single images" in caplog.messages[-1]
    assert find_inputs(str(root), 3, 2, trained_by=r"(?P<group>p\d)").grouping.how == "file"
    assert "`hold_out_by`" in caplog.messages[-1]

    # A scene's blocks are no groups of other images, and null is the default of its source.
    for how in ("blocks", None):
        config["data"]["params"]["hold_out_by"] = how
        assert open_test_source(config, str(root)).grouping.how == "file"
        assert find_inputs(str(root), 3, 2, trained_by=how).grouping.how == "file"


def test_the_sample_photographs_have_8_bits_unless_values_are_taken_as_stored():
    assert len(open_images("samples", pixel_range=AS_STORED)) == len(open_images("samples")) == 60
    with pytest.raises(ConfigError, match="`data`: its values are 8 bits"):
        open_images("samples", pixel_range=PixelRange.from_node([0, 4095]))
