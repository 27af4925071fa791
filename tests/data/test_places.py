"""The source of the data that a config or a command names."""

import os

import pytest

from olvae.config import ConfigError, save, validate
from olvae.data.places import holds_shards, load
from olvae.data.shards.index import find_shards

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
            "scenes:tiles,tile=512,max_nodata=0.1",
            "olvae.data.scenes.scene_source.SceneSource",
            {"scenes": "tiles", "tile": 512, "max_nodata": 0.1},
        ),
        (
            "torchvision:CIFAR10,root=data,train=false",
            f"{HUB}TorchvisionSource",
            {
                "dataset": {
                    "target": "torchvision.datasets.CIFAR10",
                    "params": {"root": "data", "train": False},
                }
            },
        ),
    ],
)
def test_every_recipe_takes_every_source_of_data(recipe, src, target, named):
    before = load([recipe])["data"]["params"]
    config = load([recipe], [f'data.params.root="{src}"'])
    settings = ("size", "batch_size", "num_workers", "min_fraction", "shuffle_channels")
    kept = {name: before[name] for name in settings if name in before}
    assert config["data"] == {"target": target, "params": {**kept, **named}}
    assert validate(config) == []


def test_load_takes_a_folder_of_shards_for_shards(tmp_path):
    (tmp_path / "0.tar").touch()
    assert load(["folder"], [f"data.params.root={tmp_path}"])["data"]["target"] == SHARDS
    given = [
        "data.params.shards=[a.tar, b.tar]",
        "data.params.val_shards=c.tar",
        "data.params.flip=false",
    ]
    data = load(["folder"], given)["data"]
    assert data["target"] == SHARDS
    assert (
        data["params"].items()
        >= {"shards": ["a.tar", "b.tar"], "val_shards": "c.tar", "flip": False}.items()
    )
    assert "root" not in data["params"]


def test_load_keeps_settings_of_the_new_source_and_finds_mistakes():
    data = load(["phase_a"], ["data.params.root=photos", "data.params.val_root=others"])["data"]
    assert data["params"]["val_root"] == "others"
    wrong = load(["phase_a"], ["data.params.root=photos", "data.params.sise=64"])
    assert validate(wrong) == ["data.params.sise: unknown key; did you mean size?"]
    with pytest.raises(ConfigError, match=r"run\.yaml .*config"):
        load(["phase_a"], ["data.params.root=run.yaml"])


@pytest.mark.parametrize("target", ["mine.Source", "olvae.data.nothing.There"])
def test_load_leaves_other_targets_alone(target):
    node = load(["phase_a"], [f"data.target={target}", "data.params.root=photos"])["data"]
    assert node == {"target": target, "params": {"root": "photos"}}


@pytest.mark.parametrize("image", ["0.JPG", "n01440764/0.png", None])
def test_a_stray_tar_does_not_change_a_folder_of_images(tmp_path, image):
    (tmp_path / "train.tar").touch()
    (tmp_path / "n01440764").mkdir()
    if image is not None:
        (tmp_path / image).touch()
    node = {
        "target": FOLDER,
        "params": {"root": str(tmp_path), "val_root": "others", "size": 16, "batch_size": 4},
    }
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
        (
            f"{HUB}TorchvisionSource",
            {"dataset": DATASET},
            {"val_dataset": DATASET},
            "torchvision:STL10,root=data",
        ),
        (
            f"{HUB}HuggingFaceSource",
            {"path": "cifar10"},
            {"column": "img", "split": "a", "val_split": "b", "name": "c", "revision": "d"},
            "hf:imagefolder,data_dir=e",
        ),
    ],
)
def test_load_drops_parts_of_the_old_data_set(tmp_path, target, place, parts, other):
    common = {"size": 16, "batch_size": 4, "val_fraction": 0.1}
    save({"data": {"target": target, "params": {**place, **parts, **common}}}, tmp_path / "c.yaml")
    node = load([tmp_path / "c.yaml"], [f'data.params.root="{other}"'])["data"]
    assert node["target"] == target
    assert node["params"].items() >= common.items()
    assert not parts.keys() & node["params"].keys()
    part = next(iter(parts))
    kept = load([tmp_path / "c.yaml"], [f'data.params.root="{other}"', f"data.params.{part}=mine"])[
        "data"
    ]["params"]
    assert kept[part] == "mine"


def test_load_keeps_parts_of_the_same_place(tmp_path):
    for target, params, src in (
        (FOLDER, {"root": "photos", "val_root": "a"}, "photos"),
        (f"{HUB}HuggingFaceSource", {"path": "cifar10", "val_split": "test"}, "hf:cifar10"),
    ):
        save({"data": {"target": target, "params": params}}, tmp_path / "c.yaml")
        assert load([tmp_path / "c.yaml"], [f"data.params.root={src}"])["data"] == {
            "target": target,
            "params": params,
        }
    follows = {"root": "photos", "val_root": "${data.params.root}/val"}
    (tmp_path / "c.yaml").write_text(str({"data": {"target": FOLDER, "params": follows}}))
    assert load([tmp_path / "c.yaml"], ["data.params.root=b"])["data"]["params"] == {
        "root": "b",
        "val_root": "b/val",
    }


def test_load_does_not_replace_a_mix(tmp_path):
    params = {"sources": [], "size": 16, "batch_size": 4}
    save(
        {"model": {}, "data": {"target": "olvae.data.mix.MixSource", "params": params}},
        tmp_path / "c.yaml",
    )
    config = load([tmp_path / "c.yaml"], ["data.params.root=photos"])
    assert config["data"]["params"] == {**params, "root": "photos"}
    assert any(mistake.startswith("data.params.root: unknown key") for mistake in validate(config))


def test_holds_shards_tells_shards_from_images(tmp_path, image_folder):
    assert holds_shards("s3://bucket/{000..010}.tar")
    assert holds_shards("pipe:aws s3 cp s3://bucket/1.tar -")
    assert holds_shards("data/*.tar")
    assert not holds_shards("torchvision:CIFAR10,root=data")
    assert not holds_shards("hf:cifar10")
    assert not holds_shards(str(image_folder))
    assert not holds_shards("photos/*.jpg")
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("0.tar", "._0.tar", "._0.jpg"):  # macOS's, of extended attributes
        (folder / name).touch()
    assert holds_shards(str(folder))
    assert find_shards(str(folder)) == [str(folder / "0.tar")]
