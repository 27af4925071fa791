"""Config files over each other, what they include, and back; the source of the data that they name."""

import os
from pathlib import Path

import pytest

from olvae.config import ConfigError, read_received, save, validate
from olvae.config.reading import ABSENT, changed_keys
from olvae.data.src import holds_shards, load

HUB = "olvae.data.hub."
FOLDER = "olvae.data.picture_folder.FolderSource"
SHARDS = "olvae.data.shards.webdataset.WebDatasetSource"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_and_overrides_win(tmp_path):
    a = write(tmp_path / "a.yaml", "model: {x: 1, y: 1, z: 1}\nlist: [1, 2]")
    b = write(tmp_path / "b.yaml", "model: {y: 2, z: 2}\nlist: [3]")
    merged = load([a, b], ["model.z=3", "model.w=[1, 2]", "rate=1e-4", "name=a=b"])
    assert merged == {
        "model": {"x": 1, "y": 2, "z": 3, "w": [1, 2]},
        "list": [3],
        "rate": 1e-4,
        "name": "a=b",
    }
    assert load([write(tmp_path / "c.yaml", "size: 64\nother: ${size}")])["other"] == 64
    with pytest.raises(ConfigError, match="key=value"):
        load([], ["model.params"])


def test_another_target_has_params_of_its_own(tmp_path):
    a = write(
        tmp_path / "a.yaml", "data: {target: a.A, params: {x: 1, y: {target: b.B, params: {z: 1}}}}"
    )
    b = write(tmp_path / "b.yaml", "data: {target: a.C, params: {w: 2}}")
    assert load([a, b]) == {"data": {"target": "a.C", "params": {"w": 2}}}
    same = write(tmp_path / "same.yaml", "data: {target: a.A, params: {w: 2}}")
    assert load([a, same])["data"]["params"].keys() == {"x", "y", "w"}
    inner = load([a], ["data.params.y.target=b.D", "data.params.y.params.v=3"])["data"]["params"][
        "y"
    ]
    assert inner == {"target": "b.D", "params": {"v": 3}}


def test_a_list_takes_the_place_of_a_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {params: {range: {pairs: [0, 9]}, more: [1]}}")
    (tmp_path / "b.yaml").write_text("data: {params: {range: [0, 5], more: {of: 1}}}")
    merged = load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert merged["data"]["params"] == {"range": [0, 5], "more": {"of": 1}}


def test_includes(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "x: 1\ny: 1\nz: 1")
    write(tmp_path / "middle.yaml", "include: base.yaml\ny: 2\nz: 2")
    write(tmp_path / "other.yaml", "w: 9\ny: 9")
    top = write(tmp_path / "sub" / "top.yaml", "include: [../other.yaml, ../middle.yaml]\nz: 3")
    assert load([top]) == {"w": 9, "x": 1, "y": 2, "z": 3}
    write(tmp_path / "base.yaml", "include: sub/top.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load([top])
    write(tmp_path / "base.yaml", "include: missing.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such config file"):
        load([top])


@pytest.mark.parametrize(
    ("include", "named"), [("5", "5"), ("[a.yaml, 5]", "5"), ("{a: 1}", "{'a': 1}"), ("", "None")]
)
def test_includes_that_are_no_paths(tmp_path, include, named):
    write(tmp_path / "a.yaml", "x: 1")
    top = write(tmp_path / "top.yaml", f"include: {include}\ny: 1")
    with pytest.raises(ConfigError) as caught:
        load([top])
    assert str(caught.value) == f"{top}: include: expected a path or a list of paths, got {named}"


def test_a_part_is_changed_or_removed_by_a_later_file(tmp_path):
    a = write(
        tmp_path / "a.yaml", "parts: {x: {target: a.A, params: {k: 1, l: 1}}, y: {target: a.B}}"
    )
    b = write(tmp_path / "b.yaml", "parts: {x: {params: {k: 2}}, y: null, z: {target: a.C}}")
    assert load([a, b])["parts"] == {
        "x": {"target": "a.A", "params": {"k": 2, "l": 1}},
        "y": None,
        "z": {"target": "a.C"},
    }


def test_differences():
    before = {"a": {"x": 1, "y": [1]}, "b": {}, "c": 1}
    after = {"a": {"x": 2, "y": [1]}, "b": {"z": None}, "c": 1}
    assert changed_keys(before, after) == {"a.x": (1, 2), "b": ({}, ABSENT), "b.z": (ABSENT, None)}
    assert changed_keys(before, before) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not readable as YAML"),
        ("- a\n- b", "is a mapping"),
        ("a: ${missing}", "missing"),
        ("\x00", "not readable"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load([write(tmp_path / "bad.yaml", text)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "- a\n- b", "a: &a [*a, *a]", "a: {target: x.Y}\na: {b: [\x00]}"]
)
def test_unreadable_files_of_others(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        read_received(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "demo.yaml", "{}")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean demo\.yaml\?"):
        load([tmp_path / "dem.yaml"])
    with pytest.raises(ConfigError, match="not readable as YAML: Is a directory"):
        load([tmp_path])


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
            {
                "dataset": {
                    "target": "torchvision.datasets.CIFAR10",
                    "params": {"root": "data", "train": False},
                }
            },
        ),
    ],
)
def test_every_recipe_takes_every_place(recipe, src, target, named):
    before = load([recipe])["data"]["params"]
    config = load([recipe], [f'data.params.root="{src}"'])
    settings = ("size", "batch_size", "num_workers", "min_fraction", "shuffle_channels")
    kept = {name: before[name] for name in settings if name in before}
    assert config["data"] == {"target": target, "params": {**kept, **named}}
    assert validate(config) == []


def test_a_folder_of_shards_is_one_of_shards(tmp_path):
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


def test_a_saved_config_is_read_back_unchanged(tmp_path):
    """With the dollar signs of a shell, or of a folder's name: they were escaped in the user's file."""
    texts = [
        "${TOKEN}",
        r"\${x}",
        r"a\\${x}b",
        "a ${b} \\${c}",
        "$5",
        {"nested": ["${a", "${oc.env:HOME}"]},
    ]
    save({"data": {"params": texts}}, tmp_path / "c.yaml")
    assert load([tmp_path / "c.yaml"])["data"]["params"] == texts


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
def test_another_data_set_has_none_of_the_old_ones_parts(tmp_path, target, place, parts, other):
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


def test_the_same_place_keeps_its_parts(tmp_path):
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


def test_a_mix_is_not_replaced(tmp_path):
    params = {"sources": [], "size": 16, "batch_size": 4}
    save(
        {"model": {}, "data": {"target": "olvae.data.mix.MixSource", "params": params}},
        tmp_path / "c.yaml",
    )
    config = load([tmp_path / "c.yaml"], ["data.params.root=photos"])
    assert config["data"]["params"] == {**params, "root": "photos"}
    assert any(mistake.startswith("data.params.root: unknown key") for mistake in validate(config))
