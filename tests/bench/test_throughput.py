import pytest
import yaml

from olvae.bench import throughput
from olvae.bench.measure import Setting, rows_of
from olvae.config import ConfigError
from olvae.data.transforms import RandomScaleCrop
from tests.data.images import picture, write_shards


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.02)


def measured(sources, workers=(0,), size=16, batch_size=4) -> list[dict]:
    setting = Setting("cpu", size, batch_size, sources=[str(source) for source in sources], workers=workers)
    return rows_of("data", throughput.data_cases(setting), "cpu", 1, False)


def test_each_source_and_number_of_workers_beside_the_floor(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (8, 8))
    rows = measured([image_folder, tmp_path / "shards"], (0, 2))
    expected = [
        (name, variant)
        for source in (image_folder, tmp_path / "shards")
        for name, variant in (("decoding alone", "limit"), (str(source), "0 workers"), (str(source), "2 workers"))
    ]
    assert [(row["name"], row["variant"]) for row in rows] == expected
    floor, none, two = rows[:3]
    assert none["of_floor"] == pytest.approx(none["images_per_s"] / floor["images_per_s"])
    assert two["of_floor"] == pytest.approx(two["images_per_s"] / floor["images_per_s"] / 2)


def node(kind: str, **params) -> dict:
    return {"target": f"olvae.data.{kind}", "params": {"size": 24, "batch_size": 1, **params}}


def test_a_config_brings_its_size_and_crops(tmp_path, image_folder, monkeypatch):
    made = []
    monkeypatch.setattr(RandomScaleCrop, "__call__", lambda self, *_: made.append(self) or picture(0, (24, 24)))
    write_shards(tmp_path / "shards", (8, 8))
    folder = node("picture_folder.FolderSource", root=str(image_folder), min_fraction=0.9)
    shards = node("shards.webdataset.WebDatasetSource", shards=str(tmp_path / "shards"))
    for name, content in (("one", folder), ("mix", node("mix.MixSource", sources=[folder, shards]))):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": content}))
    assert [row["size"] for row in measured([tmp_path / "one.yaml"])] == [24, 24]
    assert {(crop.size, crop.min_fraction) for crop in made} == {(24, 0.9)}
    made.clear()
    assert [row["size"] for row in measured([tmp_path / "mix.yaml"])] == [24, 24]
    assert len({crop.min_fraction for crop in made}) == 2


def test_what_cannot_be_timed(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (3, 3))
    with pytest.raises(ConfigError, match=r"`workers` 8: .*shards: 6 training images for 8 processes"):
        measured([tmp_path / "shards"], (0, 8), batch_size=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad: no image of it can be read"):
        measured([tmp_path / "bad"])
    (image_folder / "class0" / "bad.png").write_bytes(b"no picture")  # among others it is left out
    assert measured([image_folder])[1]["images_per_s"] > 0
