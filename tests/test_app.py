import math

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.app import (
    PAGE_MAX_PIXELS,
    compare,
    crop_around,
    enlarged,
    latent_pictures,
    load_choice,
    read_image,
)
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.metrics.metric import psnr, ssim
from olvae.models.loading.targets import find_target
from tests.conftest import tiny, tiny_config


@pytest.fixture
def model(tmp_path):
    tiny().save_pretrained(tmp_path / "small-f8")
    (loaded,) = load_choice([find_target(str(tmp_path / "small-f8"))], "cpu").values()
    return loaded


def photograph(*size):
    return torch.randint(
        0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_page_shows_what_the_model_makes(model):
    x = photograph(32, 48)
    found = compare({"a": model, "b": model}, x, "cpu")
    posterior = model.encode(from_uint8(x[None]))
    y = to_uint8(model.decode(posterior.mode()))
    for result in found.values():
        assert torch.equal(result.latent, posterior.mode()[0])
        assert (result.y.int() - y[0].int()).abs().max() <= 1
        assert result.psnr == pytest.approx(psnr(x[None], result.y[None]).item())
        assert result.ssim == ssim(x[None], result.y[None]).item()
        assert result.seconds > 0
        assert result.error.shape == x.shape


@torch.no_grad()
def test_the_image_of_a_decoder_at_2x_is_shown_halved():
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    model = tiny(decoder_config=decoder)
    x = photograph(32, 48)
    (result,) = compare({"a": model}, x, "cpu").values()
    y = model.decode(model.encode(from_uint8(x[None])).mode())
    halved = to_uint8(y.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)))[0]
    assert (result.y.int() - halved.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (10, 40)])
def test_images_too_small_for_ssim(model, size):
    (result,) = compare({"a": model}, photograph(*size), "cpu").values()
    assert result.y.shape == (3, *size)
    assert result.ssim is None
    assert math.isfinite(result.psnr)


def test_a_model_that_gives_no_numbers_is_named(model):
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"^broken: .* non-finite values"):
        compare({"broken": model}, photograph(16, 16), "cpu")


def test_page_refuses_broken_and_large_images(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png: "):
        read_image(tmp_path / "broken.png", 3)
    Image.new("RGB", (PAGE_MAX_PIXELS // 1000, 1001)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"^4000x1001 .*4 million"):
        read_image(tmp_path / "large.png", 3)
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    assert torch.equal(
        read_image(tmp_path / "grey.png", 3), torch.full((3, 2, 3), 7, dtype=torch.uint8)
    )


def test_page_refuses_models_of_different_channels(tmp_path):
    params = tiny_config()["model"]["params"]
    params["encoder_config"]["params"]["in_channels"] = params["decoder_config"]["params"][
        "out_channels"
    ] = 1
    tiny(**params).save_pretrained(tmp_path / "grey")
    tiny().save_pretrained(tmp_path / "colour")
    with pytest.raises(ValueError, match="1 and 3 channels"):
        load_choice([find_target(str(tmp_path / name)) for name in ("grey", "colour")], "cpu")


def test_latent_pictures_have_a_scale_per_channel():
    latent = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[-3.0, -3.0], [-3.0, -3.0]]])
    pictures = latent_pictures(latent)
    assert pictures.shape == (2, 1, 256, 256)
    assert pictures[0, 0, ::128, ::128].tolist() == [[0, 64], [128, 255]]
    assert not pictures[1].any()
    assert enlarged(pictures).shape == pictures.shape
    assert np.unique(pictures[0, 0, :128, :128]).tolist() == [0]


@pytest.mark.parametrize(
    ("place", "corner"), [((0, 0), (0, 0)), ((9, 4), (7, 2)), ((11, 9), (8, 6)), ((5, 5), (3, 3))]
)
def test_crop_around_stays_inside_the_image(place, corner):
    image = torch.arange(12 * 10).view(1, 10, 12)
    left, top = corner
    assert torch.equal(crop_around(image, place, 4), image[:, top : top + 4, left : left + 4])
    assert torch.equal(crop_around(image, place, 99), image)
