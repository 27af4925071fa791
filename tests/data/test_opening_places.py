"""What SRC opens as, with which arguments; and what of it a run trains on."""

from pathlib import Path
from typing import Any

import pytest

from olvae import config as cfg
from olvae.config import ConfigError
from olvae.data import opening
from olvae.data.opening import (
    evaluated_place,
    open_images,
    open_source,
    open_test_source,
    open_training_images,
    trains_on,
)
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.volumes.volume_source import VolumeSlices, VolumeSource
from tests.conftest import tiny_config
from tests.data.images import write_photos, write_shards
from tests.data.scenes.geotiffs import geotiff, ground
from tests.data.volumes.scans import WINDOW, hounsfield, nifti

DEEP = PixelRange.from_node([0, 9])


@pytest.fixture
def both(tmp_path) -> Path:
    """Three training images and two for validation."""
    names = [f"train/{number}.png" for number in range(3)]
    return write_photos(tmp_path / "both", [*names, "val/0.png", "val/1.png"])


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, ...]]:
    """Arguments of `open_images` beside what it opens."""
    calls: list[tuple[Any, ...]] = []
    known = opening.open_images

    def opened(src: str, *args: Any) -> Any:
        calls.append((src, *args))
        return known("samples") if src.startswith("scenes:") else known(src, *args)

    monkeypatch.setattr(opening, "open_images", opened)
    return calls


def test_a_folders_two_parts_are_a_source(both, asked):
    source = open_source(str(both), 8, 4, num_workers=2)
    assert (source.samples_per_epoch, source.val_images) == (3, 2)
    assert (source.batch_size, source.num_workers, source.max_unreadable) == (1, 2, 1.0)
    parts = [str(both / part) for part in ("train", "val")]
    assert asked == [(part, 3, EIGHT_BITS) for part in parts]


def test_a_scenes_tiles_have_the_size(asked):
    source = open_source("scenes:somewhere", 8, 4)
    assert source.val_images == 60
    assert asked == [("scenes:somewhere", 3, EIGHT_BITS, 8)]


def test_scenes_are_opened_with_their_settings(tmp_path):
    place = geotiff(tmp_path / "a.tif", ground(0, (64, 96)))
    assert len(open_images(f"scenes:{place},tile=32", 4)) == 6
    assert len(open_images(f"scenes:{place}", 4, size=64)) == 2


def test_a_folder_is_opened_with_its_channels_and_range(both, asked):
    source = open_source(str(both / "val"), 8, 4, channels=1, pixel_range=EIGHT_BITS)
    assert asked == [(str(both / "val"), 1, EIGHT_BITS)]
    assert (source.channels, source.batch_size) == (1, 1)
    assert open_source(str(both / "val"), 8, 4, pixel_range=DEEP).pixel_range == DEEP


def test_samples_are_at_most_64_a_batch_and_shards_one(tmp_path):
    for batch_size, kept in ((8, 8), (65, 64)):
        source = open_source("samples", [8, 9], batch_size, num_workers=3)
        assert (source.batch_size, source.num_workers, source.size) == (kept, 3, (8, 9))
    write_shards(tmp_path / "shards", (2, 3))
    source = open_source(str(tmp_path / "shards"), 8, 4, 2, 1)
    assert (source.batch_size, source.num_workers, source.channels) == (1, 2, 1)


def test_indexes_are_shared_of_the_place_and_of_a_configs_data(both, tmp_path, monkeypatch):
    shared: list[Any] = []
    monkeypatch.setattr(opening, "share_indexes", shared.append)
    config = tiny_config(both / "train")
    config["data"]["params"]["batch_size"] = 1
    cfg.save(config, tmp_path / "a.yaml")
    source = open_source(str(tmp_path / "a.yaml"), 8, 1)
    assert shared[0] == str(tmp_path / "a.yaml")
    assert shared[1]["params"]["root"] == str(both / "train")
    # The config's own size unless another is asked for.
    size = config["data"]["params"]["size"]
    assert source.size == (size, size)
    assert open_source(str(tmp_path / "a.yaml"), 8, 1, resized=True).size == (8, 8)


def test_a_model_is_evaluated_at_the_size_asked_for_or_trained_with_or_the_usual(both):
    src = str(both / "val")
    trained = {"data": {"params": {"size": 12, "num_workers": 3}}}
    for config, size, wanted, workers in (
        (trained, 16, 16, 3),
        (trained, None, 12, 3),
        ({"data": {"params": None}}, None, 20, 0),
        ({}, None, 20, 0),
    ):
        source = open_test_source(config, src, size, usual=20)
        assert (source.size, source.num_workers) == ((wanted, wanted), workers)
    assert open_test_source({}, "samples", 8).batch_size == 1
    for config in ({}, {"data": None}):
        with pytest.raises(ConfigError, match="the first target has no data"):
            open_test_source(config)
    config = {"data": {"target": "collections.OrderedDict", "params": {}}}
    with pytest.raises(
        ConfigError, match=r"data\.target: collections\.OrderedDict is not a source"
    ):
        open_test_source(config)


def test_training_images_are_those_of_one_part(both, asked, caplog):
    assert len(open_training_images(str(both), 3, EIGHT_BITS, 8)) == 3
    (message,) = caplog.messages
    assert message.startswith(f"{both}: takes train/, and val/ is held out: {both / 'val'} takes")
    assert len(open_training_images(str(both / "val"), 1, EIGHT_BITS)) == 2
    assert asked == [
        (str(both / "train"), 3, EIGHT_BITS, 8),
        (str(both / "val"), 1, EIGHT_BITS, None),
    ]


def test_the_part_that_is_evaluated_has_images(both):
    assert evaluated_place(str(both)) == str(both / "val")
    assert evaluated_place(str(both / "train")) == str(both / "train")
    for path in (both / "val").iterdir():
        path.unlink()
    assert evaluated_place(str(both)) == str(both / "train")


def test_images_are_by_number_and_shards_are_no_images(both, tmp_path):
    found = open_images(f"{both}/*/*.png", 1, EIGHT_BITS)
    assert [found.key(index) for index in range(5)] == [
        *(f"train/{number}.png" for number in range(3)),
        "val/0.png",
        "val/1.png",
    ]
    assert found[0].channels == 1
    write_shards(tmp_path / "shards", (2,))
    for src in (str(tmp_path / "shards"), "hf://datasets/a/b.tar"):
        with pytest.raises(ConfigError, match="these are shards already"):
            open_images(src)


def test_volumes_are_opened_with_neighbours(root):
    nifti(root / "0.nii", hounsfield(0))
    found = open_images(str(root), 3, PixelRange.from_node(WINDOW))
    assert isinstance(found, VolumeSlices)
    assert (len(found), found.neighbours) == (7, 1)


def test_volumes_are_trained_on_one_by_one(root):
    """Of a list or a file, those that the run trains on."""
    for number in range(4):
        nifti(root / f"{number}.nii", hounsfield(number))
    node = {"root": str(root), "size": 8, "batch_size": 1, "range": WINDOW}
    config = {"data": {"params": node}}
    trained, held_out = VolumeSource(**node).parts
    assert all(trains_on(config, str(volume.path)) for volume in trained)
    assert not any(trains_on(config, str(volume.path)) for volume in held_out)
    assert trains_on(config, str(root))
    assert not trains_on({"data": {"params": {"root": str(root)}}}, str(trained[0].path))


def test_a_scenes_folder_is_trained_on_with_what_is_in_it(tmp_path):
    (tmp_path / "scenes" / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    config = {"data": {"params": {"scenes": [str(tmp_path / "scenes")]}}}
    for place, known in (("scenes", True), ("scenes/a", True), ("other", False)):
        assert trains_on(config, f"scenes:{tmp_path / place}") == known
    shards = {"data": {"params": {"shards": [str(tmp_path / "scenes"), 3]}}}
    assert trains_on(shards, str(tmp_path / "scenes"))
    assert not trains_on(shards, str(tmp_path / "scenes" / "a"))
    assert not trains_on(config, "samples")
