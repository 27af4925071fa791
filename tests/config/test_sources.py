"""The source of a config's data, by its place alone."""

import pytest

from olvae.config import ConfigError, load, validate

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
