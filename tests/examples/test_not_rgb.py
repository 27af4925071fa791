"""The files of examples/not_rgb.py are what the recipes of their names read."""

import pytest
import torch
from PIL import Image

from olvae.data.opening import open_test_source
from olvae.data.places import load
from tests.examples.loading import load_example

KINDS = {
    "xray": (1, torch.uint16),
    "satellite": (13, torch.uint16),
    "depth": (1, torch.float32),
    "rgba": (4, torch.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stand_ins_are_read_by_the_recipe_of_their_kind(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load_example("not_rgb")
    pictures = [tmp_path / f"{number}.jpg" for number in range(6)]
    for number, path in enumerate(pictures):
        Image.new("RGB", (80, 70), (40 * number, 90, 200)).save(path)
    monkeypatch.setattr(example, "PICTURES", pictures)
    example.main([kind])
    assert len(list((tmp_path / kind).iterdir())) == 6
    config = load([f"not_rgb/{kind}"])
    config["data"]["params"]["num_workers"] = 0
    batch = next(iter(open_test_source(config).train_loader()))
    channels, dtype = KINDS[kind]
    assert (batch["image"].shape, batch["image"].dtype) == ((4, channels, 64, 64), dtype)
