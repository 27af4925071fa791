"""Decoders at 2x in every format: ours, the files of Wan's names, and what refuses them."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export, export_target
from olvae.export.formats import LAYOUTS
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.loader import Target
from olvae.models.loading.original_files import original_names
from olvae.models.loading.targets import find_target
from olvae.modules.base import last_convolution
from olvae.training.start_from import enlarged_as
from tests.conftest import tiny, tiny_config
from tests.models.autoencoder_kl import SHAPES, autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.test_original_files import WAN

KINDS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": WAN,
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLFlux2": {
        "block_out_channels": (32, 32),
        "norm_num_groups": 32,
        "decoder_block_out_channels": (32, 32),
    },
    "AutoencoderDC": {},
    "AutoencoderKLKVAE": {},
    "AutoencoderTiny": {},
}


def twice(theirs: Any, by: int = 2) -> LiteVAE:
    """A class of diffusers with a decoder at 2x, whose four copies differ."""
    one = DiffusersAutoencoder(theirs).as_litevae("it").eval()
    node = copy.deepcopy(one.decoder.node)
    node["params"]["enlarge"] = by
    model = enlarged_as(one, node, "it")
    with torch.no_grad():
        last_convolution(model.decoder).weight.add_(
            0.1 * torch.randn_like(last_convolution(model.decoder).weight)
        )
    return model.eval()


def made(kind: str) -> LiteVAE:
    if kind == "AutoencoderKL":
        return twice(autoencoder_kl((32, 32), **SHAPES["sdxl"]))
    return twice(make(kind, **KINDS[kind]))


@torch.no_grad()
def assert_same(one: Any, other: Any) -> None:
    x = torch.rand(1, one.in_channels, 4 * one.downscale, 4 * one.downscale) * 2 - 1
    z = one.encode(x).mean
    torch.testing.assert_close(other.encode(x).mean, z, rtol=1e-4, atol=1e-5)
    image = one.decode(z)
    torch.testing.assert_close(other.decode(z), image, rtol=1e-4, atol=1e-5)
    assert image.shape[-1] == 8 * one.downscale
    assert (other.enlarge, other.upscale) == (2, 2 * one.downscale)


@pytest.mark.parametrize("kind", ["AutoencoderKL", *KINDS])
def test_our_format_holds_every_decoder_at_2x(kind, tmp_path):
    model = made(kind)
    export(model, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["decoder_config"]["params"]["enlarge"] == 2
    assert_same(model, find_target(tmp_path / "vae").load())
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "2 times as large" in card


@torch.no_grad()
def test_a_litevae_at_2x_in_diffusers(tmp_path):
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    model = tiny(decoder_config=decoder)
    export(model, tmp_path / "vae", settings=ExportSettings(fold=True))
    theirs = AutoencoderLiteVAE.from_pretrained(tmp_path / "vae")
    assert len(theirs.config.block_out_channels) == 4  # by which pipelines know f8
    x = torch.rand(1, 3, 20, 31) * 2 - 1
    assert theirs(x).sample.shape == (1, 3, 40, 62)
    z = torch.randn(1, 4, 3, 5)
    expected = model.decode(z)
    torch.testing.assert_close(theirs.decode(z).sample, expected, rtol=1e-4, atol=1e-5)
    theirs.enable_tiling(memory=2**20)
    torch.testing.assert_close(theirs.decode(z).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
@torch.no_grad()
def test_wans_names_with_twelve_outputs(kind, tmp_path):
    """What ComfyUI's loader looks at, and a pixel shuffle of what diffusers' own class decodes."""
    model = made(kind)
    file = tmp_path / "vae.safetensors"
    export(model, file, LAYOUTS["ldm"]())
    written = load_file(file)
    assert written["decoder.head.2.weight"].shape[:2] == (12, 8)
    assert written["encoder.conv1.weight"].shape[1] == 3
    found = find_target(file).load()
    assert_same(model, found)
    (note,) = (line for line in LAYOUTS["ldm"]().notes(model) if "outputs" in line)
    assert note.startswith("the last convolution has 12 outputs; ComfyUI has no pixel shuffle")

    # Independently: the class at 1x, with another last convolution.
    theirs = make(kind, **WAN)
    theirs.decoder.conv_out = type(theirs.decoder.conv_out)(8, 12, 3, padding=1)
    theirs.load_state_dict(
        {
            name.removeprefix("decoder.model."): t
            for name, t in model.state_dict().items()
            if name.startswith("decoder.model.")
        }
        | {
            name.removeprefix("encoder.model."): t
            for name, t in model.state_dict().items()
            if name.startswith("encoder.model.")
        }
    )
    z = torch.randn(1, 4, 4, 4)
    image = F.pixel_shuffle(theirs.eval().decode(z[:, :, None]).sample[:, :, 0], 2)
    torch.testing.assert_close(found.decode(z), image, rtol=1e-4, atol=1e-5)

    # As somebody else would have written it: without our header.
    save_file(written, tmp_path / "theirs.safetensors")
    theirs_config = {**make(kind, **WAN).config, "_class_name": kind}
    (tmp_path / "config.json").write_text(json.dumps(theirs_config))
    assert_same(model, find_target(tmp_path / "theirs.safetensors").load())


def test_flat_kernels_of_a_decoder_at_2x(tmp_path):
    model = made("AutoencoderKLQwenImage")
    export(model, tmp_path / "flat.safetensors", LAYOUTS["qwen2d"]())
    assert load_file(tmp_path / "flat.safetensors")["decoder.conv_out.weight"].shape == (
        (12, 8, 3, 3)
    )
    assert_same(model, find_target(tmp_path / "flat.safetensors").load())


@torch.no_grad()
def test_files_of_a_decoder_at_3x_and_who_shuffles_them(tmp_path):
    """The node takes the square root of a third of the outputs, whose names are Wan's."""
    model = twice(make("AutoencoderKLWan", **WAN), 3)
    z = torch.randn(1, 4, 4, 4)
    for form, reader, first in (
        ("ldm", '"VAE Decode (VAE Utils)" of ', "decoder.middle.0.residual.0.gamma"),
        ("qwen2d", "only this package shuffles them: ", "decoder.conv_in.weight"),
    ):
        file = tmp_path / f"{form}.safetensors"
        export(model, file, LAYOUTS[form]())
        assert first in load_file(file)
        torch.testing.assert_close(find_target(file).load().decode(z), model.decode(z))
        (note,) = (line for line in LAYOUTS[form]().notes(model) if "27 outputs" in line)
        assert reader in note
        assert form == "ldm" or "VAE Utils" not in note


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLFlux2"])
def test_latent_diffusions_names_with_twelve_outputs(kind, tmp_path):
    model = made(kind)
    file = tmp_path / "vae.safetensors"
    export(model, file, LAYOUTS["ldm"]())
    assert load_file(file)["decoder.conv_out.weight"].shape[0] == 12
    assert_same(model, find_target(file).load())
    back = find_target(file).load().as_litevae("it")
    # Also with a config of the published class, whose decoder has 3 outputs.
    if kind == "AutoencoderKL":
        autoencoder_kl((32, 32), **SHAPES["sdxl"]).save_config(tmp_path / "published")
        config = tmp_path / "published" / "config.json"
        assert_same(model, find_target(file, config=config).load().as_litevae("it"))
    assert back.decoder.node["params"]["enlarge"] == 2
    first, *_ = LAYOUTS["ldm"]().notes(model)
    assert first.startswith("decoded images are 2 times as large as encoded ones")
    (note,) = (line for line in LAYOUTS["ldm"]().notes(model) if "outputs" in line)
    assert "`format` comfyui" in note
    # That advice holds.
    export(model, tmp_path / "node.safetensors", LAYOUTS["comfyui"]())
    assert_same(model, find_target(tmp_path / "node.safetensors").load())


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderKLWan"])
def test_a_folder_of_diffusers_with_four_times_the_channels_is_read(kind, tmp_path):
    model = made(kind)
    outputs = {"out_channels": 12}
    if kind == "AutoencoderKL":
        theirs = autoencoder_kl((32, 32), **SHAPES["sdxl"], **outputs)
    else:
        theirs = make(kind, **KINDS[kind], **outputs)
    theirs.save_pretrained(tmp_path / "vae")
    found = find_target(f"diffusers:{tmp_path / 'vae'}").load()
    assert found.enlarge == 2
    assert_same(found, found.as_litevae("it"))
    assert model.decoder.upscale == found.upscale


@pytest.mark.parametrize(
    ("kind", "form", "remedies"),
    [
        ("AutoencoderKL", "diffusers", ["ldm", "litevae"]),
        ("AutoencoderKLWan", "diffusers", ["ldm", "litevae"]),
        ("AutoencoderDC", "ldm", ["litevae"]),
        ("AutoencoderDC", "diffusers", ["litevae"]),
        ("AutoencoderKLKVAE", "ldm", ["litevae"]),
        ("AutoencoderTiny", "diffusers", ["litevae"]),
        ("AutoencoderTiny", "taesd", ["litevae"]),
    ],
)
def test_formats_without_a_pixel_shuffle_refuse_with_a_remedy_that_works(
    kind, form, remedies, tmp_path
):
    model = made(kind)
    reason = LAYOUTS[form]().misfit(model)
    assert "\n" not in reason
    assert reason.endswith(f": `format` {' or '.join(remedies)} can hold it")
    for remedy in remedies:
        layout = LAYOUTS[remedy]()
        place = tmp_path / f"{remedy}{layout.suffix}"
        export(model, place, layout)
        assert_same(model, find_target(place).load())
    target = Target(lambda: model, name="it", given="it")
    with pytest.raises(ConfigError, match="hold it"):
        export_target(target, tmp_path / f"out{LAYOUTS[form].suffix}", ExportSettings(format=form))


def test_the_usual_format_of_a_decoder_at_2x_is_ours(tmp_path):
    target = Target(lambda: made("AutoencoderKL"), name="it", given="it")
    export_target(target, tmp_path / "vae", ExportSettings())
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderLiteVAE"


def test_a_last_convolution_of_no_square_is_another_network(tmp_path):
    kind = "AutoencoderKLWan"
    theirs = make(kind, **WAN)
    state = original_names(kind, theirs.state_dict())
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[name] = torch.cat([state[name]] * 2)
    config = {**theirs.config, "_class_name": kind}
    save_file(state, tmp_path / "six.safetensors", metadata={"config": json.dumps(config)})
    with safe_open(tmp_path / "six.safetensors", "pt") as file:
        assert file.get_slice("decoder.head.2.weight").get_shape()[0] == 6
    with pytest.raises(ValueError, match=r"six\.safetensors: .* 2 .* 6 for 3"):
        find_target(tmp_path / "six.safetensors").load()
