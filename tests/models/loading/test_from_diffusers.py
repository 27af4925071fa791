import json
import re
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olvae.config import ConfigError
from olvae.models.loading.from_diffusers import (
    DiffusersAutoencoder,
    DiffusersLoader,
    check_parameters,
    find_diffusers_folder,
)
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.targets import find_target
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.names import hub_folder

kl = partial(autoencoder_kl, (32, 32, 64))


def test_diffusers_target_of_the_hub(tmp_path, monkeypatch, image):
    model = kl()
    model.save_pretrained(hub_folder(tmp_path, monkeypatch, "some/pipeline") / "vae")
    assert torch.equal(find_target("diffusers:some/pipeline").load()(image)[0], model(image).sample)
    with pytest.raises(FileNotFoundError, match=r"pipeline::unet: config.json not found in it:"):
        find_target("diffusers:some/pipeline::unet")
    with pytest.raises(FileNotFoundError, match=r"some/other: .*reached"):
        find_target("diffusers:some/other")


def test_diffusers_folders_without_an_autoencoder_are_refused(tmp_path):
    for content, message in (
        ('{"_class_name": "UNet2DModel"}', "UNet2DModel is not an autoencoder"),
        (
            '{"_class_name": "AutoencoderNovel"}',
            "AutoencoderNovel is not an autoencoder of diffusers",
        ),
        ("{", "has no _class_name"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            find_target(f"diffusers:{tmp_path}").load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not found in it or in its vae: "):
        find_target(f"diffusers:{tmp_path / 'empty'}")
    kl().save_pretrained(tmp_path / "vae")  # beside a config.json of something else
    assert find_target(f"diffusers:{tmp_path}").load().downscale == 2 ** (
        len(kl().config.block_out_channels) - 1
    )
    with pytest.raises(FileNotFoundError, match="diffusers:nothing here: "):
        find_target("diffusers:nothing here")


def test_diffusers_weights_that_do_not_fit_are_refused(tmp_path):
    kl().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    first, second, *_ = state
    save_file({name: t for name, t in state.items() if name != first}, file)
    with pytest.raises(ValueError, match=rf"config.json: 1 missing \({first}"):
        find_target(f"diffusers:{tmp_path}").load()
    save_file({**state, second: torch.zeros(3), "more": torch.zeros(1)}, file)
    listed = rf"1 unexpected \(more\); 1 of another shape \({second} \(3,\) for \("
    with pytest.raises(ValueError, match=rf"config.json: {listed}") as caught:
        find_target(f"diffusers:{tmp_path}").load()
    assert "\n" not in str(caught.value)
    save_file({**state, second: torch.full_like(state[second], torch.nan)}, file)
    with pytest.raises(ValueError, match=rf"non-finite values \({second}"):
        find_target(f"diffusers:{tmp_path}").load()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="readable AutoencoderKL") as caught:
        find_target(f"diffusers:{tmp_path}").load()
    assert "\n" not in str(caught.value)


def test_a_diffusers_autoencoders_state_is_its_models_own():
    """Without what its latents are converted to, which TAESD alone takes."""
    tiny = DiffusersAutoencoder(make("AutoencoderTiny"))
    assert all(name.startswith("model.") for name in tiny.state_dict())
    x, z = torch.rand(1, 3, 16, 16), torch.randn(1, tiny.latent_channels, 2, 2)
    latent, image = tiny.encode(x).mean, tiny.decode(z)
    mean, std = torch.arange(4.0), torch.arange(4.0) + 2
    tiny.use_latents(mean, std)
    own = tiny.encode(x).mean
    torch.testing.assert_close(own, latent * std.view(-1, 1, 1) + mean.view(-1, 1, 1))
    back = z * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    torch.testing.assert_close(tiny.decode(back), image, rtol=1e-4, atol=1e-5)
    other = DiffusersAutoencoder(make("AutoencoderKL"))
    before = other.encode(x).mean
    other.use_latents(mean, std)
    assert torch.equal(other.encode(x).mean, before)


def test_images_of_another_size_are_refused_by_their_sides():
    model = DiffusersAutoencoder(make("AutoencoderKL"))
    assert (model.downscale, model.enlarge, model.side) == (2, 1, None)
    with pytest.raises(ValueError, match=r"5x4 .*2"):
        model.encode(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"4x5 .*2"):
        model.encode(torch.zeros(1, 3, 4, 5))
    one_size = DiffusersAutoencoder(make("AutoencoderRAE"))
    assert one_size.encode(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 32, 4, 4)
    for size in ((16, 32), (32, 16)):
        with pytest.raises(ValueError, match="images of 16x16 only, not {}x{}".format(*size)):
            one_size.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("made", "enlarge"),
    [
        ((1, 3, 8, 6), 1),
        ((1, 12, 8, 6), 2),
        ((1, 27, 8, 6), 3),
        ((1, 24, 8, 6), None),
        ((1, 12, 6, 8), None),
        ((1, 3, 16, 12), None),
        ((2, 3, 8, 6), None),
        ((1, 3, 1, 8, 6), None),
    ],
)
def test_a_decoder_makes_an_image_or_several_for_a_pixel_shuffle(monkeypatch, made, enlarge):
    """Of five channels of 4x3 positions, at a factor of 2."""
    model = DiffusersAutoencoder(make("AutoencoderKL"))
    seen = []
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z.shape) or torch.zeros(made))
    z = torch.zeros(1, 5, 9, 3)
    if enlarge is None:
        with pytest.raises(ValueError, match="AutoencoderKL decodes to "):
            model._check_decoder(z, 2)
        return
    model._check_decoder(z, 2)
    assert model.enlarge == enlarge
    assert seen == [(1, 5, 4, 3)]  # a part is enough
    made = (1, made[1], 6, 8)
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z.shape) or torch.zeros(made))
    model._check_decoder(torch.zeros(1, 5, 3, 9), 2)
    assert seen[1:] == [(1, 5, 3, 4)]


def test_a_model_without_images_says_why(monkeypatch):
    model = DiffusersAutoencoder(make("AutoencoderKL"))

    def fails(_: object) -> None:
        raise RuntimeError("a matrix does not fit\nand more")

    monkeypatch.setattr(model, "decode", fails)
    with pytest.raises(ValueError, match=r"decode to an image: a matrix does not fit$"):
        model._check_decoder(torch.zeros(1, 4, 2, 2), 2)
    with pytest.raises(ValueError, match=r"decode to an image: a matrix does not fit$"):
        model._measure()
    for shape in ((4, 2, 16, 16), (4, 15, 15), (4, 16, 8), (4, 8, 16)):
        latent = SimpleNamespace(mean=torch.zeros(1, *shape))
        monkeypatch.setattr(model, "encode", lambda _, latent=latent: latent)
        with pytest.raises(ValueError, match=re.escape(f"makes {shape} of an image of ")):
            model._measure()
    monkeypatch.setattr(model, "encode", fails)
    with pytest.raises(ValueError, match=r"encode images: a matrix does not fit$"):
        model._measure()


@pytest.mark.parametrize(
    ("own", "inside", "accepted"),
    [
        (None, None, False),
        ("AutoencoderLiteVAE", None, False),
        ("AutoencoderKL", None, True),
        (None, "AutoencoderKL", True),
        ("StableDiffusionPipeline", "AutoencoderLiteVAE", True),
    ],
)
def test_diffusers_folders_are_known_by_their_configs(tmp_path, own, inside, accepted):
    """Of the folder, or of `vae` in it; an export of ours alone is for another loader."""
    for folder, name in ((tmp_path, own), (tmp_path / "vae", inside)):
        folder.mkdir(exist_ok=True)
        if name is not None:
            (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    loader = DiffusersLoader()
    assert loader.accepts(str(tmp_path)) == accepted
    assert loader.accepts("diffusers:anything")
    assert not loader.accepts(str(tmp_path / "missing"))
    assert not loader.accepts("some/model")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_of_the_hub_are_fetched_beside_their_config_alone(tmp_path, monkeypatch, suffix):
    """Pickles only where there is no safe file."""
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (folder / f"model{suffix}").touch()
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "olvae.models.on_the_hub.snapshot", lambda *given: calls.append(given) or tmp_path
    )
    assert find_diffusers_folder("a/b") == folder
    ignored = ["vae/*/*", "*.fp16.*", "*.non_ema.*"]
    patterns = ["vae/*.safetensors", "vae/*.bin"][: 1 if suffix == ".safetensors" else 2]
    fetched = [("a/b", ["vae/config.json", pattern], ignored) for pattern in patterns]
    assert calls == [("a/b", ["config.json", "vae/config.json"]), *fetched]


def test_a_folder_is_loaded_built_anew_or_left_to_another_loader(tmp_path):
    kl().save_pretrained(tmp_path / "kl")
    text, loader = str(tmp_path / "kl"), DiffusersLoader()
    with pytest.warns(UserWarning, match="`raw`") as warned:
        found = loader.find(text, LoadOptions(raw=True))
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.find(text, LoadOptions()).name == text
    trained, fresh = (model.state_dict() for model in (found.load(), found.untrained()))
    assert any(not torch.equal(trained[name], fresh[name]) for name in trained)
    assert found.load().encoder is not None
    (tmp_path / "ours" / "vae").mkdir(parents=True)
    config = {"_class_name": "AutoencoderLiteVAE"}
    (tmp_path / "ours" / "vae" / "config.json").write_text(json.dumps(config))
    assert loader.find(str(tmp_path / "ours"), LoadOptions()) == tmp_path / "ours" / "vae"


def test_a_class_that_needs_another_package_says_which(tmp_path, monkeypatch):
    kl().save_pretrained(tmp_path)

    def needs(*_: Any, **__: Any) -> None:
        raise NameError("name 'flash' is not defined")

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", needs)
    with pytest.raises(ValueError, match=r"AutoencoderKL needs a package .*'flash'"):
        find_target(f"diffusers:{tmp_path}").load()


def test_a_network_has_at_most_a_parameter_for_each_byte():
    with torch.device("meta"):
        network = torch.nn.Linear(2, 3)
    check_parameters(network, 9)
    check_parameters(network, 0)  # without weights there is nothing to compare with
    with pytest.raises(ValueError, match="9 parameters, they 8 bytes"):
        check_parameters(network, 8)


@torch.no_grad()
def test_a_litevae_of_it_has_its_weights_if_its_class_can_be_one():
    theirs = DiffusersAutoencoder(make("AutoencoderKL"))
    assert theirs.encoder is theirs.model.encoder
    ours, x = theirs.eval().as_litevae("it"), torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(ours.encode(x).mean, theirs.encode(x).mean)
    torch.testing.assert_close(ours.decode(ours.encode(x).mean), theirs(x)[0])
    with pytest.raises(
        ConfigError,
        match=r"VQModel .*: LiteVAE, AutoencoderKL, .*, AutoencoderRAE, AutoencoderTiny",
    ):
        DiffusersAutoencoder(make("VQModel")).as_litevae("it")
