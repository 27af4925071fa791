"""Every autoencoder of the installed diffusers as a TARGET, against diffusers' own calls."""

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from olvae.models.loading import from_diffusers
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.targets import find_target
from tests.models.loading.classes import CLASSES, NOT_OF_IMAGES, make

PAGE = Path(__file__).parents[3] / "docs" / "autoencoders.md"


@pytest.fixture(scope="module")
def wrapped() -> dict[str, DiffusersAutoencoder]:
    """One of each class that takes images; some need larger ones than other tests measure with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_diffusers, "PROBE", 64)
        return {
            name: DiffusersAutoencoder(make(name)) for name in CLASSES if hasattr(diffusers, name)
        }


def test_every_autoencoder_class_of_diffusers_is_listed():
    """One of a later diffusers belongs into the tables of tests/models/loading/classes.py and
    docs/autoencoders.md.
    """
    found = {
        name for name, kind in vars(diffusers.models.autoencoders).items() if inspect.isclass(kind)
    }
    assert found - {*CLASSES, *NOT_OF_IMAGES} == set()
    assert len(found) > 20


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_encode_and_decode_are_diffusers_own(name, wrapped):
    if name not in wrapped:
        pytest.skip("a later diffusers has it")
    ours = wrapped[name]
    model, side = ours.model, 2 * ours.downscale if ours.side is None else ours.side
    x = torch.rand(2, ours.in_channels, side, side) * 2 - 1
    given = x[:, :, None] if ours.frames else x / 2 + 0.5 if name == "AutoencoderRAE" else x
    output = model.encode(given, return_dict=False)[0]
    expected = output if isinstance(output, torch.Tensor) else output.mode()
    posterior = ours.encode(x)
    assert posterior.mean.shape == (
        2,
        ours.latent_channels,
        side // ours.downscale,
        side // ours.downscale,
    )
    torch.testing.assert_close(
        posterior.mean, expected[:, :, 0] if ours.frames else expected, rtol=1e-5, atol=1e-5
    )
    assert posterior.deterministic == ours.deterministic == (not hasattr(output, "logvar"))
    if posterior.deterministic:
        assert torch.equal(posterior.sample(), posterior.mode())
        assert posterior.var.abs().max() == 0
        for ask in (lambda: posterior.logvar, posterior.kl):
            with pytest.raises(ValueError, match="deterministic latent"):
                ask()
    else:
        torch.testing.assert_close(
            posterior.var, output.var[:, :, 0] if ours.frames else output.var
        )
    image = model.decode(expected, return_dict=False)[0]
    image = image[:, :, 0] if ours.frames else 2 * image - 1 if name == "AutoencoderRAE" else image
    assert image.shape == x.shape
    torch.testing.assert_close(ours.decode(posterior.mean), image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, arguments in NOT_OF_IMAGES.items() if arguments])
def test_diffusers_classes_that_take_no_images_are_refused_by_name(name):
    if not hasattr(diffusers, name):
        pytest.skip("a later diffusers has it")
    with pytest.raises(
        ValueError,
        match=rf"^{name} (does not (en|de)code|is an autoencoder of sound|decodes by|makes)",
    ) as e:
        DiffusersAutoencoder(make(name))
    assert "\n" not in str(e.value)


def test_factors_of_diffusers_classes(wrapped):
    wan, ltx, flux, cosmos, rae = (
        wrapped[f"Autoencoder{name}"]
        for name in ("KLWan", "KLLTXVideo", "KLFlux2", "KLCosmos", "RAE")
    )
    assert (wan.latents_mean, wan.latents_std) == ([0.1, 0.2, 0.3, 0.4], [1.5, 2.0, 0.5, 1.0])
    assert ltx.latents_std == ltx.model.latents_std.tolist()
    assert cosmos.latents_mean == [0.0, 0.2, 0.4, 0.6]  # of the first frame
    assert (rae.latents_mean, rae.scaling_factor) == (None, 1.0)
    z, bn = torch.randn(2, 4, 6, 8), flux.model.bn
    std = (bn.running_var + flux.model.config.batch_norm_eps).sqrt()
    # As Flux2Pipeline packs them.
    packed = pixel_unshuffle(z, 2) * std[:, None, None] + bn.running_mean[:, None, None]
    torch.testing.assert_close(flux.from_diffusion(z), pixel_shuffle(packed, 2))
    assert flux.from_diffusion(z[..., :5, :7]).shape == (2, 4, 5, 7)


def test_autoencoder_rae_refuses_images_of_another_size(wrapped):
    with pytest.raises(ValueError, match=r"^AutoencoderRAE .*16x16 .*32x32$"):
        wrapped["AutoencoderRAE"].encode(torch.zeros(1, 3, 32, 32))
    assert wrapped["AutoencoderRAE"].image_size == 16


@pytest.mark.parametrize(
    "name", ["AutoencoderKLWan", "AutoencoderKLFlux2", "AutoencoderKLQwenImage21"]
)
def test_diffusers_classes_load_from_a_folder(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    found = find_target(f"diffusers:{tmp_path}").load()
    x = torch.zeros(1, found.in_channels, 16, 16)
    assert found(x)[0].shape == x.shape
    with pytest.raises(ValueError, match="16x15"):
        found.encode(x[..., :15])


def test_diffusers_autoencoders_of_other_numbers_of_channels():
    grey = DiffusersAutoencoder(make("AutoencoderKLWan", in_channels=1, out_channels=1))
    assert (grey.in_channels, grey.frames) == (1, True)
    patched = DiffusersAutoencoder(
        make("AutoencoderKLWan", in_channels=12, out_channels=12, patch_size=2)
    )
    assert (patched.in_channels, patched.downscale) == (3, 8)  # Wan 2.2's


def test_table_of_diffusers_classes_in_the_documentation_is_right(wrapped):
    """Made here; where the installed diffusers lacks a class, its row is as it stands."""

    def row(name: str) -> str:
        if name not in wrapped:
            return f"| {name} | refused | | |"
        model = wrapped[name]
        takes = "images of one size" if model.side else "one frame" if model.frames else "images"
        each = 0 if model.latents_mean is None else len(model.latents_mean) // model.latent_channels
        factors = ("scaling", "mean and deviation per channel")[min(each, 1)]
        patches = " and position of a 2x2 patch" if each == 4 else ""
        gives = "points" if model.deterministic else "a distribution"
        return f"| {name} | {takes} | {gives} | {factors}{patches} |"

    lines = (
        PAGE.read_text(encoding="utf-8")
        .partition("\n|---|---|---|---|---|---|---|\n")[2]
        .partition("\n\n")[0]
        .splitlines()
    )
    # The first four columns; the last three say what can be done with a class.
    given = {line.split()[1]: "|".join(line.split("|")[:5]) + "|" for line in lines}
    built = (*CLASSES, *(name for name, arguments in NOT_OF_IMAGES.items() if arguments))
    assert list(given) == sorted(built, key=str.lower)
    assert given == {
        name: row(name) if hasattr(diffusers, name) else line for name, line in given.items()
    }
