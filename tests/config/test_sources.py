"""The source of a config's data, by its place alone."""

import os

import pytest

from olvae.config import ConfigError, load, save, validate
from olvae.config.sources import holds_shards

HUB = "olvae.data.hub."
FOLDER = "olvae.data.picture_folder.FolderSource"
SHARDS = "olvae.data.shards.webdataset.WebDatasetSource"


@pytest.mark.parametrize("recipe", ["phase_a", "demo", "distil/both", "imagenet/A2", "folder"])
@pytest.mark.parametrize(
    ("src", "target", "named"),
    [
        ("photos", FOLDER, {"root": "photos"}),
        ("list.txt", FOLDER, {"root": "list.txt"}),
        ("data/{000..010}.tar", SHARDS, {"shards": "data/{000..010}.tar"}),
        ("samples", "olvae.data.dataset.SamplePhotographs", {}),
        ("hf:cifar10,column=img", f"{HUB}HuggingFaceSource", {"path": "cifar10", "column": "img"}),
        (
            "torchvision:CIFAR10,root=data,train=false",
            f"{HUB}TorchvisionSource",
            {"dataset": {"target": "torchvision.datasets.CIFAR10", "params": {"root": "data", "train": False}}},
        ),
    ],
)
def test_every_recipe_takes_every_place(recipe, src, target, named):
    before = load([recipe])["data"]["params"]
    config = load([recipe], [f'data.params.root="{src}"'])
    kept = {name: before[name] for name in ("size", "batch_size", "num_workers", "min_fraction") if name in before}
    assert config["data"] == {"target": target, "params": {**kept, **named}}
    assert validate(config) == []


def test_a_folder_of_shards_is_one_of_shards(tmp_path):
    (tmp_path / "0.tar").touch()
    assert load(["folder"], [f"data.params.root={tmp_path}"])["data"]["target"] == SHARDS
    given = ["data.params.shards=[a.tar, b.tar]", "data.params.val_shards=c.tar", "data.params.flip=false"]
    data = load(["folder"], given)["data"]
    assert data["target"] == SHARDS
    assert data["params"].items() >= {"shards": ["a.tar", "b.tar"], "val_shards": "c.tar", "flip": False}.items()
    assert "root" not in data["params"]


def test_settings_of_the_new_source_stay_and_mistakes_are_found():
    data = load(["phase_a"], ["data.params.root=photos", "data.params.val_root=others"])["data"]
    assert data["params"]["val_root"] == "others"
    wrong = load(["phase_a"], ["data.params.root=photos", "data.params.sise=64"])
    assert validate(wrong) == ["data.params.sise: unknown key; did you mean size?"]
    with pytest.raises(ConfigError, match=r"run\.yaml is a config"):
        load(["phase_a"], ["data.params.root=run.yaml"])


@pytest.mark.parametrize("target", ["mine.Source", "olvae.data.nothing.There"])
def test_other_targets_are_left_alone(target):
    node = load(["phase_a"], [f"data.target={target}", "data.params.root=photos"])["data"]
    assert node == {"target": target, "params": {"root": "photos"}}


@pytest.mark.parametrize("image", ["0.JPG", "n01440764/0.png", None])
def test_a_stray_tar_does_not_change_a_folder_of_images(tmp_path, image):
    (tmp_path / "train.tar").touch()
    (tmp_path / "n01440764").mkdir()
    if image is not None:
        (tmp_path / image).touch()
    node = {"target": FOLDER, "params": {"root": str(tmp_path), "val_root": "others", "size": 16, "batch_size": 4}}
    save({"data": node}, tmp_path / "c.yaml")
    assert (load([tmp_path / "c.yaml"])["data"] == node) == (image is not None)
    assert holds_shards(str(tmp_path)) == (image is None)


def test_a_folder_is_read_up_to_its_first_image(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"{number}.jpg").touch()
    seen = []

    class Counted:
        def __init__(self, entries):
            self.entries = entries

        def __enter__(self):
            return (seen.append(entry) or entry for entry in self.entries)

        def __exit__(self, *_):
            self.entries.close()

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Counted(scandir(path)))
    assert not holds_shards(str(tmp_path))
    assert len(seen) == 1


DATASET = {"target": "torchvision.datasets.CIFAR10", "params": {"root": "data"}}


@pytest.mark.parametrize(
    ("target", "place", "parts", "other"),
    [
        (FOLDER, {"root": "photos"}, {"val_root": "a"}, "b"),
        (f"{HUB}TorchvisionSource", {"dataset": DATASET}, {"val_dataset": DATASET}, "torchvision:STL10,root=data"),
        (
            f"{HUB}HuggingFaceSource",
            {"path": "cifar10"},
            {"column": "img", "split": "a", "val_split": "b", "name": "c", "revision": "d"},
            "hf:imagefolder,data_dir=e",
        ),
    ],
)
def test_another_data_set_has_none_of_the_old_ones_parts(tmp_path, target, place, parts, other):
    common = {"size": 16, "batch_size": 4, "val_fraction": 0.1}
    save({"data": {"target": target, "params": {**place, **parts, **common}}}, tmp_path / "c.yaml")
    node = load([tmp_path / "c.yaml"], [f'data.params.root="{other}"'])["data"]
    assert node["target"] == target
    assert node["params"].items() >= common.items()
    assert not parts.keys() & node["params"].keys()
    part = next(iter(parts))
    kept = load([tmp_path / "c.yaml"], [f'data.params.root="{other}"', f"data.params.{part}=mine"])["data"]["params"]
    assert kept[part] == "mine"


def test_the_same_place_keeps_its_parts(tmp_path):
    for target, params, src in (
        (FOLDER, {"root": "photos", "val_root": "a"}, "photos"),
        (f"{HUB}HuggingFaceSource", {"path": "cifar10", "val_split": "test"}, "hf:cifar10"),
    ):
        save({"data": {"target": target, "params": params}}, tmp_path / "c.yaml")
        assert load([tmp_path / "c.yaml"], [f"data.params.root={src}"])["data"] == {"target": target, "params": params}
    follows = {"root": "photos", "val_root": "${data.params.root}/val"}
    save({"data": {"target": FOLDER, "params": follows}}, tmp_path / "c.yaml")
    assert load([tmp_path / "c.yaml"], ["data.params.root=b"])["data"]["params"] == {"root": "b", "val_root": "b/val"}


def test_a_mix_is_not_replaced(tmp_path):
    params = {"sources": [], "size": 16, "batch_size": 4}
    save({"model": {}, "data": {"target": "olvae.data.mix.MixSource", "params": params}}, tmp_path / "c.yaml")
    config = load([tmp_path / "c.yaml"], ["data.params.root=photos"])
    assert config["data"]["params"] == {**params, "root": "photos"}
    assert any(mistake.startswith("data.params.root: unknown key") for mistake in validate(config))
