"""The study's question of maps: rows by seed, which are kept."""

import json
from types import SimpleNamespace

import pytest
import torch

from olvae.cli.main import main as olvae
from study import maps
from study.maps import Encoded, MappedLatents, Setting, keep, run
from study.maps_table import read, table
from tests.export.latents import tiny_vae
from tests.metrics.test_features import extract

SETTING = Setting(steps=2, batch_size=4, width=32, depth=1, samples=6, fitted_on=24)


@pytest.fixture
def encoded(tmp_path, image_folder, monkeypatch):
    """A tiny autoencoder's latents of 12 images, with the networks of features replaced."""
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    given = [str(tmp_path / "vae"), "--data", str(image_folder), "--size", "64", "--flip"]
    with pytest.raises(SystemExit):
        olvae(["encode", *given, "--out", str(tmp_path / "latents")])
    crops = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8)
    target = str(tmp_path / "vae")
    return Encoded("f8c12", target, tmp_path / "latents", crops, SETTING, extract)


def test_each_row_and_seed_leaves_a_file_and_is_kept(tmp_path, encoded, monkeypatch, capsys):
    monkeypatch.setattr(maps, "SEEDS", (0, 1))
    run([encoded], tmp_path, ["plain", "F"])
    rows = capsys.readouterr().out.splitlines()
    # all rows with seed 0 first
    stems = [row.split(":")[0] for row in rows]
    assert stems == ["f8c12_plain_0", "f8c12_F_0", "f8c12_plain_1", "f8c12_F_1"]
    found = json.loads((tmp_path / "f8c12_F_1.json").read_text())
    assert found["loss_in_linear"] == pytest.approx(found["loss"] / found["loss_of_linear"])
    # packed or not, a token has the same numbers
    parameters = {
        json.loads((tmp_path / f"{stem}.json").read_text())["parameters"] for stem in stems
    }
    assert len(parameters) == 1

    (tmp_path / "f8c12_F_1.json").write_text(json.dumps(found | {"loss_in_linear": 7.0}))
    run([encoded], tmp_path, ["plain", "F"])
    assert "7.000 of" in capsys.readouterr().out
    assert "| F: 2x2 positions packed |" in table(read(tmp_path)["f8c12"])


def test_a_file_of_another_setting_is_refused(tmp_path):
    path = tmp_path / "row.json"
    assert keep(path, SETTING, lambda: {"loss": 1.0})["loss"] == 1.0
    assert keep(path, SETTING, lambda: {"loss": 2.0})["loss"] == 1.0
    with pytest.raises(ValueError, match=r"row\.json .*setting"):
        keep(path, Setting(), lambda: {"loss": 2.0})


def test_training_draws_mapped_latents_in_the_order_of_before(encoded):
    double = SimpleNamespace(apply=lambda z: 2 * z)
    mapped = next(iter(MappedLatents(encoded.latents, 4, double).train_loader(3)))
    plain = next(iter(maps.LatentSource(encoded.latents, 4).train_loader(3)))
    assert torch.equal(mapped["latent"], 2 * plain["latent"])


def test_reference_pictures_are_the_same_for_all_maps(encoded):
    plain = maps.decode(encoded.decoder, encoded.source, encoded.drawn)
    for name in ("W", "U", "R", "T+", "T-", "F", "X"):
        latent_map = maps.fit(name, encoded.drawn, encoded.shrunk)
        assert torch.equal(encoded.decoded(latent_map.apply(encoded.drawn), latent_map), plain)
