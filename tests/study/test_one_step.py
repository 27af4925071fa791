"""The comparison of decoders: its crops, its rows, and its steps."""

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.modules.litevae.one_step import OneStepDecoder
from study import one_step
from study.one_step import crops, decoders, measure, several_steps
from tests.conftest import tiny
from tests.models.parts.flow.generating import one_step_config


@pytest.fixture
def tiles(tmp_path):
    """Two tiles of which each quarter has a colour of its own."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    for tile in range(2):
        quarters = np.arange(4, dtype=np.uint8).reshape(2, 2) * 50 + tile
        pixels = quarters.repeat(256, 0).repeat(256, 1)
        Image.fromarray(np.stack([pixels] * 3, 2)).save(folder / f"{tile}.png")
    return folder


def generating():
    torch.manual_seed(0)
    model = tiny(decoder_config=one_step_config()).eval()
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_crops_are_the_middles_of_two_quarters(tiles):
    small = crops(tiles, 64)
    assert small.shape == (4, 3, 64, 64)
    assert [crop.unique().tolist() for crop in small] == [[0], [150], [1], [151]]
    assert crops(tiles, 128).shape == (4, 3, 128, 128)


def test_one_of_several_steps_is_the_decoder_itself():
    decoder = generating().decoder
    assert isinstance(decoder, OneStepDecoder)
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(several_steps(decoder, z, 1), decoder(z), rtol=1e-4, atol=1e-4)
        assert (several_steps(decoder, z, 4) - decoder(z)).abs().max() > 0.01


def test_each_decoder_is_measured_at_each_size(tiles, monkeypatch):
    class Pixels:
        def of(self, batches):
            return torch.cat([batch.flatten(1)[:, :2].float() for batch in batches]).numpy()

    monkeypatch.setattr(one_step, "Lite0", Pixels)
    models = {"plain": tiny().eval(), "generating": generating()}
    by_name = decoders(models)
    assert list(by_name) == ["plain", "generating", "generating_first", "generating_4_steps"]
    found = measure(models["plain"], by_name, tiles)
    sizes = {f"{name}_{side}" for name in ("psnr", "frechet_lite0") for side in (64, 128)}
    for values in found.values():
        assert values.keys() == sizes | {"images"}
        assert values["images"] == 4
