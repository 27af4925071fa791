import pytest
import yaml

from olvae.bench import cases
from olvae.bench.cases import TwoForwards, read_step, time_steps
from olvae.bench.measure import Setting, rows_of
from olvae.config import ConfigError
from olvae.data.image import RandomScaleCrop
from olvae.data.places import load
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import entry_of
from tests.conftest import tiny_config
from tests.data.images import picture, write_shards
from tests.models.steps import against


def params() -> dict:
    return tiny_config(adversary_config=against())["model"]["params"]


def test_network_table_sizes_and_macs_are_near_the_published_ones(network_rows):
    assert {row.name for row in network_rows if row.group == "encoder"} == {
        "S",
        "B",
        "M",
        "L",
        "sd",
    }
    assert {row.name for row in network_rows if row.group == "decoder"} == {
        "open_litevae",
        "paper_smc",
        "sd",
    }
    unets = {f"UNetGAN-{scale}" for scale in "SML"}
    assert {row.name for row in network_rows if row.group == "discriminator"} == {
        "PatchGAN",
        "GigaGAN",
        *unets,
    }
    for row in network_rows:
        assert row.params == pytest.approx(row.published_params, rel=0.01), row
        if row.published_macs is not None:
            assert row.macs == pytest.approx(row.published_macs, rel=0.02), row


def test_two_forwards_peer_of_a_training_step_encodes_twice(monkeypatch):
    calls = []
    encode = LiteAutoencoderKL.encode
    monkeypatch.setattr(
        LiteAutoencoderKL, "encode", lambda self, x: calls.append(0) or encode(self, x)
    )
    for kind, passes in ((LiteAutoencoderKL, 1), (TwoForwards, 2)):
        calls.clear()
        assert len(time_steps(kind(**params()), 16, 2, 2, "cpu")) == 2
        assert len(calls) == 3 * passes


def test_a_recipe_whose_adversary_starts_later_is_measured_with_it():
    recipe = "imagenet/paper_f8c12"
    starts = entry_of(load([recipe]), "model.params.adversary_config.params.start_step")
    measured = entry_of(read_step(recipe, 0, 0)[0], "adversary_config.params.start_step")
    assert (starts > 0, measured) == (True, 0)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(cases, "SECONDS", 0.02)


def measured(sources, workers=(0,), size=16, batch_size=4) -> list[dict]:
    setting = Setting(
        "cpu", size, batch_size, sources=[str(source) for source in sources], workers=workers
    )
    return rows_of("data", cases.GROUPS["data"].cases(setting), "cpu", 1, False)


@pytest.mark.usefixtures("short")
def test_data_rows_of_each_source_and_number_of_workers_beside_the_floor(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (8, 8))
    rows = measured([image_folder, tmp_path / "shards"], (0, 2))
    expected = [
        (str(source), variant)
        for source in (image_folder, tmp_path / "shards")
        for variant in ("limit: decoding alone", "0 workers", "2 workers")
    ]
    assert [(row["name"], row["variant"]) for row in rows] == expected
    floor, none, two = rows[:3]
    assert none["of_floor"] == pytest.approx(none["images_per_s"] / floor["images_per_s"])
    assert two["of_floor"] == pytest.approx(two["images_per_s"] / floor["images_per_s"] / 2)


@pytest.mark.usefixtures("short")
def test_data_rows_take_size_and_crops_from_a_config(tmp_path, image_folder, monkeypatch):
    made = []
    monkeypatch.setattr(
        RandomScaleCrop, "__call__", lambda self, *_: made.append(self) or picture(0, (24, 24))
    )
    params = {"root": str(image_folder), "size": 24, "batch_size": 1, "min_fraction": 0.9}
    node = {"target": "olvae.data.picture_folder.FolderSource", "params": params}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"data": node}))
    assert [row["size"] for row in measured([tmp_path / "one.yaml"], size=0)] == [24, 24]
    assert [row["size"] for row in measured([tmp_path / "one.yaml"], size=16)] == [16, 16]
    assert {(crop.size, crop.min_fraction) for crop in made} == {(24, 0.9), (16, 0.9)}


@pytest.mark.usefixtures("short")
def test_data_of_too_few_or_unreadable_images_is_not_timed(tmp_path, image_folder):
    write_shards(tmp_path / "shards", (3, 3))
    with pytest.raises(ConfigError, match=r"`workers` 8: .*6 .*8 processes"):
        measured([tmp_path / "shards"], (0, 8), batch_size=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad: no image"):
        measured([tmp_path / "bad"])
    (image_folder / "class0" / "bad.png").write_bytes(b"no picture")  # among others it is left out
    assert measured([image_folder])[1]["images_per_s"] > 0
