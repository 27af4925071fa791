"""A TARGET of one's own: a loader from outside of the package, by its path."""

import json
import sys

from PIL import Image

from tests.models.loading.test_targets import TOY


def test_commands_take_a_loader_from_outside(olvae, tmp_path, monkeypatch):
    (tmp_path / "toy_loader.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_loader", raising=False)
    target, photos = "toy_loader.MeanLoader:4", tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (16, 16), "red").save(photos / "red.png")
    Image.new("RGB", (16, 16), "blue").save(photos / "blue.png")
    options = ["--data", photos, "--size", 16]
    code, _, err = olvae("evaluate", target, *options, "--metrics", "l1", "--out", tmp_path / "e")
    assert code == 0, err
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["results"][0]["target"] == target
    code, _, err = olvae("encode", target, *options, "--out", tmp_path / "latents")
    assert code == 0, err
    assert json.loads((tmp_path / "latents" / "stats.json").read_text())["latent_shape"] == [3, 4, 4]
