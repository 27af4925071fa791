"""The closed-form fit of linear paths, against NumPy, and where in a training it happens."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.metrics.metric import psnr
from olvae.models import linear_code
from olvae.models.linear_code import (
    HALVES,
    LinearDecoder,
    LinearEncoder,
    crops_and_means,
    fit_linear_paths,
    start_linearly,
)
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config

F = 4
CPU = torch.device("cpu")


def crops(n: int = 40, size: int = 32) -> torch.Tensor:
    """Smooth random images: uint8 (n, 3, size, size)."""
    small = torch.randn(n, 3, size // 4 + 2, size // 4 + 2)
    images = torch.nn.functional.interpolate(small, (size, size), mode="bicubic")
    return (128 + 40 * images).clamp(0, 255).to(torch.uint8)


def code(n: int = 5) -> LiteVAE:
    return LiteVAE(LinearEncoder(2 * n, 3, F), LinearDecoder(n, 3, F))


def patches_of(x: torch.Tensor) -> np.ndarray:
    """(n, h, w, 3 F F) in float64: channel by channel, row by row."""
    n, c, height, width = x.shape
    blocks = (
        x.double().numpy().reshape(n, c, height // F, F, width // F, F).transpose(0, 2, 4, 1, 3, 5)
    )
    return blocks.reshape(n, height // F, width // F, c * F * F)


@torch.no_grad()
def test_a_linear_code_at_2x_is_numpys_least_squares():
    """From 3x3 latents of the halved images to patches of the whole ones."""
    images = crops(size=16 * F)
    model = LiteVAE(LinearEncoder(10, 3, F), LinearDecoder(5, 3, F, enlarge=2))
    fit_linear_paths(model, images)
    halved = from_uint8(images).double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).float()
    z = model.encode(halved).mean
    assert z.shape == (len(images), 5, 8, 8)
    inner = sliding_window_view(z.double().numpy(), (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    known = inner.reshape(-1, 45)
    blocks = from_uint8(images).double().numpy().reshape(-1, 3, 8, 2 * F, 8, 2 * F)
    wanted = blocks[:, :, 1:-1, :, 1:-1].transpose(0, 2, 4, 1, 3, 5).reshape(len(known), -1)
    known = np.concatenate((known, np.ones((len(known), 1))), axis=1)
    predicted = known @ np.linalg.lstsq(known, wanted, rcond=None)[0]
    y = model.decode(z).double().numpy().reshape(-1, 3, 8, 2 * F, 8, 2 * F)
    found = y[:, :, 1:-1, :, 1:-1].transpose(0, 2, 4, 1, 3, 5).reshape(len(known), -1)
    assert np.abs(found - predicted).max() < 1e-3


def linear_config(root=None, **model) -> dict:
    config = tiny_config(root, **model)
    for half in ("encoder_config", "decoder_config"):
        config["model"]["params"][half]["params"]["linear"] = True
    return config


@pytest.mark.parametrize(("size", "count"), [(8 * F, 40), (3 * F, 120), (2 * F, 40)])
def test_linear_code_fit_is_numpys(size, count):
    """The decoder's on positions with all eight neighbours;
    on all, with copies of the border's, if there are none.
    """
    model, images = code(), crops(count, size)
    fit_linear_paths(model, images)
    patches = patches_of(from_uint8(images))
    flat = patches.reshape(-1, patches.shape[-1])
    variances, axes = np.linalg.eigh(np.cov(flat, rowvar=False, bias=True))
    codes = (patches - flat.mean(0)) @ (axes / np.sqrt(np.maximum(variances, 1e-9)))[:, ::-1][:, :5]
    with torch.no_grad():
        z = model.encode(from_uint8(images)).mean.double().numpy().transpose(0, 2, 3, 1)
    signs = np.sign((z * codes).sum((0, 1, 2)))
    np.testing.assert_allclose(z, codes * signs, atol=1e-4)

    border = 1 if size > 2 * F else 0
    inside = patches[:, border : size // F - border, border : size // F - border]
    codes = np.pad(codes * signs, ((0, 0), (1 - border,) * 2, (1 - border,) * 2, (0, 0)), "edge")
    around = sliding_window_view(codes, (3, 3), axis=(1, 2)).reshape(*inside.shape[:3], -1)
    design = np.concatenate([around, np.ones((*around.shape[:3], 1))], axis=3).reshape(
        -1, around.shape[-1] + 1
    )
    solution, *_ = np.linalg.lstsq(design, inside.reshape(len(design), -1), rcond=None)
    expected = (design @ solution).reshape(inside.shape)
    with torch.no_grad():
        y = model(from_uint8(images))[0]
    got = patches_of(y)[:, border : size // F - border, border : size // F - border]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_linear_code_with_a_teacher_fits_its_latents_in_both_halves():
    """The teacher's latents are linear in the patches,
    so that the encoder becomes the teacher's.
    """
    teacher, model, images, seen = code(3), code(3), crops(), []
    fit_linear_paths(model, images, lambda x: seen.append(len(x)) or teacher.encode(x).mean)
    assert sum(seen) == len(images)  # each crop once, for both halves
    torch.testing.assert_close(
        model.encoder.linear.weight, teacher.encoder.linear.weight, rtol=1e-3, atol=1e-4
    )
    own = code(3)
    own.encoder.load_state_dict(teacher.encoder.state_dict())
    # A decoder alone is fitted to what the encoder gives.
    own.encoder.linear, kept = (
        None,
        own.encoder.linear,
    )
    own.encoder.forward = lambda x: torch.cat((kept(x), kept(x)), dim=1)
    fit_linear_paths(own, images)
    torch.testing.assert_close(model.decoder.linear.weight, own.decoder.linear.weight)


@pytest.mark.parametrize(("positions", "sizes"), [(1, [1] * 5), (63, [1] * 5), (129, [2, 2, 1])])
def test_linear_code_takes_as_many_crops_as_have_that_many_positions(monkeypatch, positions, sizes):
    """Of 32x32 pixels, 64 positions each."""
    monkeypatch.setattr(linear_code, "POSITIONS_AT_A_TIME", positions)
    seen = []
    fit_linear_paths(
        code(3), crops(5), lambda x: seen.append(len(x)) or torch.rand(len(x), 3, 8, 8)
    )
    assert seen == sizes
    fit_linear_paths(code(3), crops(1))


def test_a_training_begins_as_the_linear_code(image_folder, monkeypatch):
    """Before step 1 means and images are the code's, in the networks of a config."""
    monkeypatch.setattr(linear_code, "CROPS", (256, 256))
    config = linear_config()["model"]["params"]
    model = LiteAutoencoderKL(**config)
    source = FolderSource(str(image_folder), 32, 4, val_fraction=0.2)
    (line,) = model.prepare(source, 3, CPU, fresh=HALVES)
    alone = LiteVAE(LinearEncoder(8, 3, 8), LinearDecoder(4, 3, 8))
    fit_linear_paths(alone, crops_and_means(source, 3, 8)[0])
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x).mean, alone.encode(x).mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x)[0], alone(x)[0], rtol=0, atol=1e-5)
    psnr, _ = start_linearly(alone, source, 3, CPU)
    assert f"{psnr:.2f} dB on {source.val_images} " in line
    assert not list(model.prepare(source, 4, CPU, fresh=()))


def test_linear_code_psnr_is_what_validation_will_see(tmp_path, monkeypatch):
    """Images that come back exactly are left out; beyond a number of images there is nothing to
    compare with.
    """
    monkeypatch.setattr(linear_code, "CROPS", (64, 64))
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = np.full((32, 32), 255) if i % 2 else rng.integers(0, 255, (32, 32))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    source = FolderSource(str(tmp_path), 16, 4, val_fraction=0.5, channels=1)
    model = LiteVAE(LinearEncoder(8, 1, 4), LinearDecoder(4, 1, 4))
    monkeypatch.setattr(
        linear_code, "psnr", lambda x, _: math.inf if x.amin() == x.amax() else 20.0
    )
    mean, line = start_linearly(model, source, 0, CPU)
    assert mean == 20
    assert f"20.00 dB on {source.val_images} " in line
    monkeypatch.setattr(linear_code, "MEASURED_IMAGES", source.val_images - 1)
    mean, line = start_linearly(model, source, 0, CPU)
    assert mean is None
    assert f"20.00 dB on {source.val_images - 1} " in line


def test_linear_code_of_too_large_patches_is_refused(monkeypatch):
    monkeypatch.setattr(linear_code, "LARGEST_PATCH", 47)
    with pytest.raises(ValueError, match="4x4 pixels"):
        fit_linear_paths(code(3), crops())
    monkeypatch.setattr(linear_code, "LARGEST_PATCH", 48)
    fit_linear_paths(code(3), crops())


@pytest.mark.parametrize("fresh", HALVES)
def test_a_half_that_is_not_fresh_stays_as_it_is(fresh):
    model = code(3)
    before = {half: getattr(model, half).linear.weight.clone() for half in HALVES}
    fit_linear_paths(model, crops(), fresh=[fresh])
    for half in HALVES:
        assert torch.equal(getattr(model, half).linear.weight, before[half]) == (half != fresh)


def test_linear_code_refuses_non_finite_latents():
    with pytest.raises(ValueError, match="not finite"):
        fit_linear_paths(code(3), crops(), lambda x: torch.full((len(x), 3, 8, 8), math.nan))


def test_linear_code_leaves_networks_without_paths_alone(image_folder, monkeypatch):
    monkeypatch.setattr(linear_code, "crops_and_means", None)
    model = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    assert not list(model.prepare(FolderSource(str(image_folder), 16, 4), 0, CPU, fresh=HALVES))


def test_linear_code_crops_are_those_of_the_seed(image_folder, monkeypatch):
    monkeypatch.setattr(linear_code, "CROPS", (8, 16))
    source = FolderSource(str(image_folder), 16, 4)
    first = crops_and_means(source, 0, 8)[0]
    assert first.shape == (16, 3, 16, 16)
    assert first.equal(crops_and_means(FolderSource(str(image_folder), 16, 2), 0, 8)[0])
    assert not first.equal(crops_and_means(source, 1, 8)[0])


def with_quantizer(latent_dim: int) -> LiteAutoencoderKL:
    params = linear_config(use_quant=True)["model"]["params"]
    params["encoder_config"]["params"]["latent_dim"] = latent_dim
    return LiteAutoencoderKL(**params)


def test_linear_code_starts_quantizers_as_the_identity():
    model, images = with_quantizer(8).autoencoder, crops(20, 64)
    fit_linear_paths(model, images)
    with torch.no_grad():
        mean = model.encode(from_uint8(images)).mean
    assert mean.std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-3
    with pytest.raises(ConfigError, match=r"quant_conv .*12 .*8"):
        with_quantizer(12)


def test_a_fresh_decoder_is_fitted_behind_a_trained_quantizer():
    """Least squares gives the same images from latents and from an invertible mixture of their
    channels.
    """
    model, images = with_quantizer(8).autoencoder, crops(40, 64)
    fit_linear_paths(model, images)
    with torch.no_grad():
        expected = model(from_uint8(images[:2]))[0]
        torch.nn.init.orthogonal_(model.quantizer.post_quant_conv.weight)
        assert not torch.allclose(model(from_uint8(images[:2]))[0], expected, atol=0.1)
        fit_linear_paths(model, images, fresh=["decoder"])
        torch.testing.assert_close(model(from_uint8(images[:2]))[0], expected, rtol=0, atol=1e-3)


def test_exports_have_the_linear_paths(tmp_path):
    model = LiteAutoencoderKL(**linear_config()["model"]["params"]).autoencoder
    fit_linear_paths(model, crops(20, 64))
    torch.nn.init.normal_(model.decoder.conv_out.weight, std=0.01)
    model.eval().save_pretrained(tmp_path / "export")
    loaded = LiteVAE.from_pretrained(tmp_path / "export")
    x = torch.rand(1, 3, 40, 24) * 2 - 1
    with torch.no_grad():
        assert loaded(x)[0].equal(model(x)[0])
        torch.testing.assert_close(model.fold()(x)[0], model(x)[0], rtol=0, atol=1e-5)


def test_linear_code_psnr_is_behind_a_quantizer(image_folder):
    model = with_quantizer(8).autoencoder
    data = FolderSource(str(image_folder), 32, 4, val_fraction=0.2)
    torch.nn.init.orthogonal_(model.quantizer.quant_conv.weight)
    torch.nn.init.orthogonal_(model.quantizer.post_quant_conv.weight)
    found, _ = start_linearly(model, data, 0, CPU, fresh=["decoder"])
    with torch.no_grad():
        images = torch.cat([batch["image"] for batch in data.val_loader()])
        y = model.decoder.linear_path(
            model.quantizer.post_quant_conv(model.encode(from_uint8(images)).mean)
        )
    assert found == pytest.approx(psnr(images, to_uint8(y)).mean().item(), abs=1e-4)


def test_linear_code_psnr_counts_as_many_images_as_are_measured_at_most(tmp_path, monkeypatch):
    """Exactly the most: their mean is the validation's."""
    monkeypatch.setattr(linear_code, "CROPS", (64, 64))
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    source = FolderSource(str(tmp_path), 16, 1, val_fraction=0.5, channels=1)
    monkeypatch.setattr(linear_code, "MEASURED_IMAGES", source.val_images)
    model = LiteVAE(LinearEncoder(8, 1, 4), LinearDecoder(4, 1, 4))
    mean, line = start_linearly(model, source, 0, CPU)
    assert f"{mean:.2f} dB on {source.val_images} " in line


def test_the_decoder_is_measured_on_a_teachers_latents_only_beside_a_frozen_encoder(tmp_path):
    for i in range(8):
        saved = torch.randint(0, 255, (32, 32), dtype=torch.uint8)
        Image.fromarray(saved.numpy()).save(tmp_path / f"{i:02}.png")
    source = FolderSource(str(tmp_path), 16, 1, val_fraction=0.5, channels=1)
    seen = []

    def teacher(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.nn.functional.pixel_unshuffle(x, 4)[:, :4]

    model = LiteVAE(LinearEncoder(8, 1, 4), LinearDecoder(4, 1, 4))
    own, _ = start_linearly(model, source, 0, CPU, teacher)
    fits = len(seen)
    taught, _ = start_linearly(model, source, 0, CPU, teacher, ["decoder"], ["encoder"])
    assert len(seen) == 2 * fits + source.val_images
    assert own is not None
    assert taught is not None
