"""Data that are found again from another folder."""

import logging
from pathlib import Path

import pytest

from olvae.config import ConfigError
from olvae.data.opening import make_absolute, open_source, open_test_source, where_it_is
from tests.data.images import encoded

FOLDER = "olvae.data.mapped.picture_folder.FolderSource"
SHARDS = "olvae.data.shards.webdataset.WebDatasetSource"


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


def test_paths_become_absolute_and_other_values_stay(home):
    (home / "photos" / "2.tar").touch()
    sources = [
        {"target": FOLDER, "params": {"root": "photos/*.png", "val_root": "./more", "size": 8, "filters": ["box"]}},
        {"target": SHARDS, "params": {"shards": ["photos/{0..3}.tar", "pipe:cat photos/{0..3}.tar", "s3://b/{1..2}"]}},
        {"target": FOLDER, "params": {"root": "nowhere", "val_root": str(home / "more"), "size": 8}},
        {"target": "torchvision.datasets.CIFAR10", "params": {"root": "more", "train": False}},
    ]
    config = {"data": {"target": "olvae.data.mix.MixSource", "params": {"size": 8, "sources": sources}}}
    escaped = str(home).replace("[", "[[]")
    assert make_absolute(config) == {
        f"{escaped}/photos/*.png": "photos/*.png",
        f"{home}/more": "more",
        f"{escaped}/photos/{{0..3}}.tar": "photos/{0..3}.tar",
    }
    first, second, third, fourth = (node["params"] for node in config["data"]["params"]["sources"])
    assert first == {"root": f"{escaped}/photos/*.png", "val_root": f"{home}/more", "size": 8, "filters": ["box"]}
    assert second["shards"] == [f"{escaped}/photos/{{0..3}}.tar", *sources[1]["params"]["shards"][1:]]
    assert third == sources[2]["params"]
    assert fourth["root"] == f"{home}/more"
    assert sources[0]["params"]["root"] == "photos/*.png"  # the node that was given is another one


def test_a_config_opens_the_same_images_elsewhere(home, tmp_path, monkeypatch):
    params = {"root": Path("photos/*.png"), "val_root": "more", "size": 8, "batch_size": 1}
    config = {"data": {"target": FOLDER, "params": {**params, "root": str(params["root"])}}}
    assert open_test_source(config).describe() == "4 training, 4 validation and test images"
    make_absolute(config)
    monkeypatch.chdir(tmp_path)
    assert open_test_source(config).describe() == "4 training, 4 validation and test images"


def test_moved_data_are_one_line_with_both_places(home, tmp_path, monkeypatch, caplog):
    config = {"data": {"target": FOLDER, "params": {"root": "photos", "size": 8, "batch_size": 1}}}
    config["run"] = {"paths": make_absolute(config)}
    moved = tmp_path / "b"
    home.rename(moved)
    monkeypatch.chdir(moved)
    with caplog.at_level(logging.WARNING, "olvae.data"):
        assert open_test_source(config).images == 4
        assert where_it_is(config)["params"]["root"] == str(moved / "photos")
    expected = f"{home / 'photos'}: this run's data are not there any more: taken from {moved / 'photos'}"
    assert caplog.messages == [expected]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as refusal:
        open_test_source(config)
    assert str(refusal.value).startswith(
        f"{home / 'photos'}: this run's data are not there any more, nor are they {tmp_path / 'photos'}: name others"
    )
    assert open_test_source(config, str(moved / "more")).val_images == 4  # with --data nobody asks for them


def test_a_data_set_that_is_gone_is_fetched_again(home, monkeypatch):
    dataset = {"target": "torchvision.datasets.CIFAR10", "params": {"root": "photos"}}
    params = {"dataset": dataset, "size": 8, "batch_size": 1}
    config = {"data": {"target": "olvae.data.mapped.hub.TorchvisionSource", "params": params}}
    config["run"] = {"paths": make_absolute(config)}
    (home / "photos").rename(home / "gone")
    with pytest.raises(FileNotFoundError, match="not there any more"):
        where_it_is(config)
    config["data"]["params"]["dataset"]["params"]["download"] = True
    assert where_it_is(config)["params"]["dataset"]["params"]["root"] == str(home / "photos")


def test_data_that_are_no_node_are_refused_as_before(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {params: {root: photos}}")
    with pytest.raises(ConfigError, match="expected a node of target and params"):
        open_source(str(tmp_path / "c.yaml"), 8, 1)
