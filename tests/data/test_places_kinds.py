"""What is a shard, a picture, a volume; and what SRC names to which source."""

from pathlib import Path

import pytest

from olvae.config import ConfigError, save
from olvae.data.places import (
    FOLDER,
    SAMPLES,
    SCENE,
    SHARDS,
    VOLUMES,
    check_outside,
    find_source,
    holds_pictures,
    holds_shards,
    holds_volumes,
    is_image_file,
    is_shard,
    is_volume_file,
    load,
    names_volume,
    place_of,
    with_source,
)

DICOM = bytes(128) + b"DICM"


def test_the_place_of_data_is_that_of_its_held_out_images():
    params = {"folder": "f", "path": "p", "scenes": "s", "shards": ["a", "b"], "root": "r"}
    params |= {"val_scenes": "vs", "val_shards": "vt", "val_root": "vr"}
    found = []
    while params:
        found.append(place_of({"target": "t", "params": params}))
        del params[list(params)[-1]]
    assert found == ["vr", "vt", "vs", "r", "['a', 'b']", "s", "p", "f"]
    assert place_of({"target": "t", "params": {"root": ""}}) == "t"
    assert place_of({"target": "t", "params": None}) == "t"


def test_files_are_shards_or_pictures_by_their_names():
    assert [is_shard(name) for name in ("a.tar", "a.tar.gz", "a.tgz", "._a.tar", "a.zip")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    names = ("a/b.JPG", "a.exr", "a/.b.png", "a.tar", ".hidden/b.npy")
    assert [is_image_file(name) for name in names] == [True, True, False, False, True]


def test_names_of_volumes_are_extensions_or_uids():
    names = ("a/b.NII.GZ", "a.nrrd", "1.2.826.7", "a/1.2.3", "1.2", "1.2.x", "a.png", "a.nii/b")
    assert [name for name in names if names_volume(name)] == list(names[:4])


def test_files_are_volumes_by_name_or_dicoms_mark(tmp_path):
    for name, content, known in (
        ("a.nii", b"", True),
        ("a.DCM", b"", True),
        (".a.nii", b"", False),
        ("DICOMDIR", DICOM, False),
        ("dicomdir", DICOM, False),
        ("IM001", DICOM, True),
        ("IM.001", DICOM, True),
        ("IM.7", DICOM, True),
        ("IM.png", DICOM, False),
        ("IM002", DICOM[1:], False),
        ("IM003", DICOM[:-1], False),
    ):
        (tmp_path / name).write_bytes(content)
        assert is_volume_file(str(tmp_path / name)) == known, name
    assert not is_volume_file(str(tmp_path / "gone"))


def test_places_hold_pictures_or_volumes_at_any_depth(tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert not holds_pictures(tmp_path)
    assert not holds_volumes(str(tmp_path))
    assert find_source(str(tmp_path), volumes=True) == (VOLUMES, {"root": str(tmp_path)})
    assert find_source(str(tmp_path)) == (FOLDER, {"root": str(tmp_path)})
    (deep / "1.nii").touch()
    assert not holds_pictures(tmp_path)
    assert holds_volumes(str(tmp_path))
    assert find_source(str(tmp_path)) == (VOLUMES, {"root": str(tmp_path)})
    (deep / "2.png").touch()
    assert holds_pictures(tmp_path)
    assert not holds_volumes(str(tmp_path))
    assert holds_volumes(str(tmp_path), beside_pictures=True)
    assert find_source(str(tmp_path))[0] == FOLDER
    assert find_source(str(tmp_path), volumes=True)[0] == VOLUMES
    (deep / "1.nii").unlink()
    assert find_source(str(tmp_path), volumes=True)[0] == FOLDER


def test_a_list_or_pattern_is_of_volumes_by_its_names(tmp_path):
    for lines, known in (
        ("# scans\n\n a.nii \nb.png\n", True),
        ("b.png\na.nii\n", False),
        ("# none\n", False),
    ):
        (tmp_path / "list.TXT").write_text(lines)
        assert holds_volumes(str(tmp_path / "list.TXT")) == known
    (tmp_path / "IM001").write_bytes(DICOM)
    (tmp_path / "list.TXT").write_text("IM001")
    assert holds_volumes(str(tmp_path / "list.TXT"))
    assert holds_volumes("scans/*.nii.gz")
    assert not holds_volumes("https://example.org/a.nii")
    assert not holds_volumes("scans/*.png")


def test_sources_by_what_is_written():
    assert find_source("samples") == (SAMPLES, {})
    assert find_source("https://example.org/a.tar") == (
        SHARDS,
        {"shards": "https://example.org/a.tar"},
    )
    assert find_source("hf://data/a.tar")[0] == SHARDS
    assert find_source("scenes:a,bands=[1, 2],x={y: 1, z: 2}") == (
        SCENE,
        {"scenes": "a", "bands": [1, 2], "x": {"y": 1, "z": 2}},
    )
    assert find_source("hf:a,name=b=c")[1] == {"path": "a", "name": "b=c"}
    for src in ("run.yaml", "run.yml"):
        with pytest.raises(ConfigError, match=f"root: {src} is a config"):
            find_source(src)
    with pytest.raises(ConfigError, match="b is not key=value"):
        find_source("hf:a,b")
    assert not holds_shards("scenes:a.tar")
    assert not holds_shards("hf:user/a.tar")
    assert holds_shards("torchvision://a.tar")


def test_a_configs_node_is_of_the_source_that_reads_its_place(tmp_path):
    (tmp_path / "0.tar").touch()
    params = {"root": str(tmp_path), "size": 8, "val_root": "x"}
    found = with_source({"data": {"target": FOLDER, "params": params}, "model": 1})
    assert found["model"] == 1
    assert found["data"] == {"target": SHARDS, "params": {"size": 8, "shards": str(tmp_path)}}
    for config in ({}, {"data": None}, {"data": {"target": FOLDER}}, {"data": {"params": params}}):
        assert with_source(config) == config
    for place in (3, ["a"]):
        config = {"data": {"target": FOLDER, "params": {"root": place}}}
        assert with_source(config) == config
    # A folder of volumes stays one, beside pictures too.
    (tmp_path / "0.tar").unlink()
    for name in ("a.nii", "a.png"):
        (tmp_path / name).touch()
    for target in (VOLUMES, FOLDER):
        node = {"target": target, "params": {"root": str(tmp_path)}}
        assert with_source({"data": node})["data"]["target"] == target


def test_results_are_outside_of_the_images(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for out in ("a", "a/b", "a/b/../new"):
        with pytest.raises(ConfigError, match="is inside the images' folder"):
            check_outside(tmp_path / out, str(tmp_path / "a"))
    check_outside(tmp_path / "b", str(tmp_path / "a"))
    check_outside(tmp_path, str(tmp_path / "a"))
    check_outside(Path("gone/b"), "gone")


def test_a_folder_that_can_not_be_opened_has_no_shards(tmp_path, monkeypatch):
    def refused(_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.scandir", refused)
    assert not holds_shards(str(tmp_path))


def test_a_config_is_loaded_as_it_is_or_with_the_source_of_its_data(tmp_path):
    (tmp_path / "0.tar").touch()
    path = tmp_path / "c.yaml"
    save({"data": {"target": FOLDER}}, path)
    root = f"data.params.root={tmp_path}"
    assert load([path], [root])["data"] == {"target": SHARDS, "params": {"shards": str(tmp_path)}}
    assert load([path], [root], resolve=False)["data"]["target"] == FOLDER
    for config in ({"data": None}, {"model": {}}):
        save(config, path)
        assert load([path]) == config
    # What is null in the files alone stays.
    params = {"root": "photos", "val_root": None}
    save({"data": {"target": FOLDER, "params": params}}, path)
    assert load([path])["data"]["params"] == params
    # The files alone may lack what an override gives.
    path.write_text("data: {target: " + FOLDER + ", params: {root: '${place}/a', size: 8}}")
    found = load([path], ["place=x", "data.params.root=b"])["data"]
    assert found["params"] == {"root": "b", "size": 8}
