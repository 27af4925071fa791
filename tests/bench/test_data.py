import pytest
import yaml

from olvae.bench.data import bench_data
from olvae.config import ConfigError
from olvae.data.transforms import RandomScaleCrop
from tests.data.images import picture, write_shards


def test_each_source_and_number_of_workers_beside_the_floor(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (8, 8))
    folder, shards = str(image_folder), str(tmp_path / "shards")
    rows = bench_data([folder, shards], 16, 4, [0, 2], 0.05)
    assert [(row["source"], row["workers"]) for row in rows] == [
        ("floor", 1),
        *((name, count) for name in (folder, shards) for count in (0, 2)),
    ]
    floor = rows[0]["images_per_s"]
    for row in rows:
        assert row["images_per_s"] > 0
        assert abs(row["of_floor"] - row["images_per_s"] / floor / max(1, row["workers"])) < 1e-9


def node(kind: str, **params) -> dict:
    return {"target": f"olvae.data.{kind}", "params": {"size": 24, "batch_size": 1, **params}}


def test_a_mix_and_a_size_of_its_own(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (8, 8))
    folder = node("mapped.picture_folder.FolderSource", root=str(image_folder), min_fraction=0.9)
    shards = node("shards.webdataset.WebDatasetSource", shards=str(tmp_path / "shards"))
    config = str(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"data": node("mix.MixSource", sources=[folder, shards])}))
    rows = bench_data([config, str(image_folder)], 16, 4, [0], 0.05)
    assert [(row["source"], row["size"]) for row in rows] == [
        ("floor", 24),
        (f"floor of {image_folder}", 16),
        (config, 24),
        (str(image_folder), 16),
    ]
    assert rows[2]["of_floor"] == rows[2]["images_per_s"] / rows[0]["images_per_s"]
    assert rows[3]["of_floor"] == rows[3]["images_per_s"] / rows[1]["images_per_s"]


def test_the_floor_crops_as_the_source_does(tmp_path, image_folder, monkeypatch):
    made = []
    monkeypatch.setattr(RandomScaleCrop, "__call__", lambda self, *_: made.append(self) or picture(0, (24, 24)))
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"data": node("mapped.picture_folder.FolderSource", root=str(image_folder), min_fraction=0.9)})
    )
    bench_data([str(tmp_path / "a.yaml")], 16, 1, [0], 0.01)
    assert {(crop.size, crop.min_fraction) for crop in made} == {(24, 0.9)}


def test_what_cannot_be_timed_is_told(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (3, 3))
    with pytest.raises(ConfigError, match=r"--workers 8: .*shards: 6 training images for 8 processes"):
        bench_data([str(tmp_path / "shards")], 16, 1, [0, 8], 0.01)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad: no image of it can be read"):
        bench_data([str(tmp_path / "bad")], 16, 1, [0], 0.01)
    (image_folder / "class0" / "bad.png").write_bytes(b"no picture")  # among others it is left out
    assert bench_data([str(image_folder)], 16, 1, [0], 0.01)[0]["images_per_s"] > 0
