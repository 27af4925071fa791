"""The tiny networks against diffusers' AutoencoderTiny, in tiles, and as exports."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export.exporting import export
from olvae.export.formats import LAYOUTS
from olvae.models.large.tiling import receptive_field
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from tests.export.latents import tiny_vae
from tests.models.loading.classes import make


def student() -> LiteVAE:
    """Two levels, with statistics of a teacher's latents."""
    torch.manual_seed(3)
    model = LiteVAE(
        TinyEncoder(8, image_size=16, channels=8, blocks=(1, 2)), TinyDecoder(8, 4, blocks=(2, 1))
    )
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([2.0, 0.5, 1.0, 3.0])
    for half in (model.encoder, model.decoder):
        half.use_latents(mean, std)
    return model.eval()


@torch.no_grad()
def test_tiny_networks_are_the_function_of_diffusers():
    theirs = DiffusersAutoencoder(make("AutoencoderTiny")).eval()
    ours = theirs.as_litevae("it")
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    z = theirs.encode(x).mean
    torch.testing.assert_close(ours.encode(x).mean, z)
    torch.testing.assert_close(ours.decode(3 * z), theirs.decode(3 * z))
    assert ours.encode(x).deterministic
    with pytest.raises(ConfigError, match=r"^it: .*AutoencoderTiny"):
        DiffusersAutoencoder(make("AutoencoderTiny", act_fn="gelu")).as_litevae("it")


@torch.no_grad()
def test_tiny_decoder_is_exact_in_tiles():
    model, z = student(), torch.randn(1, 4, 13, 10)
    # 1 + 2 * 3 positions, and 1 + 3 + 1 of half their size.
    assert receptive_field(model.decoder) == 10
    torch.testing.assert_close(model.decode_tiled(z, tile=4), model.decode(z))


@torch.no_grad()
def test_tiny_student_is_written_as_diffusers_and_as_taesd(tmp_path):
    model = student()
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    z = model.encode(x).mean
    mean, std = model.encoder.latents_mean, model.encoder.latents_std
    export(model, tmp_path / "vae", LAYOUTS["diffusers"]())
    back = diffusers.AutoencoderTiny.from_pretrained(
        tmp_path / "vae", low_cpu_mem_usage=False
    ).eval()
    torch.testing.assert_close(back.encode(x).latents, (z - mean) / std)
    torch.testing.assert_close(back.decode((z - mean) / std).sample, model.decode(z))
    assert (back.config.scaling_factor, back.config.shift_factor) == (1.0, 0.0)
    export(model, tmp_path / "taesd", LAYOUTS["taesd"]())
    encoder, decoder = (
        load_file(tmp_path / "taesd" / f"taesd_{half}.safetensors")
        for half in ("encoder", "decoder")
    )
    assert torch.equal(encoder["0.weight"], back.encoder.layers[0].weight)
    assert torch.equal(encoder["1.conv.4.bias"], back.encoder.layers[1].conv[4].bias)
    # 0 is the bound, 2 a ReLU.
    assert torch.equal(decoder["1.weight"], back.decoder.layers[0].weight)
    assert torch.equal(decoder["3.conv.0.weight"], back.decoder.layers[2].conv[0].weight)
    assert "diffusion model's" in (tmp_path / "taesd" / "README.md").read_text()
    with pytest.raises(ValueError, match="TinyEncoder and TinyDecoder"):
        export(tiny_vae(), tmp_path / "other", LAYOUTS["taesd"]())
    model.decoder.use_latents(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="AutoencoderTiny has"):
        export(model, tmp_path / "two", LAYOUTS["diffusers"]())


@pytest.mark.parametrize(
    ("n_z", "factors", "note"),
    [
        (4, (0.18215, 0.0), "taesd_decoder.safetensors to ComfyUI/models/vae_approx."),
        (
            4,
            (0.13025, 0.0),
            "vae_approx, as taesdxl_encoder.safetensors and taesdxl_decoder.safetensors.",
        ),
        (
            16,
            (1.5305, 0.0609),
            "vae_approx, as taesd3_encoder.safetensors and taesd3_decoder.safetensors.",
        ),
        (
            16,
            (0.3611, 0.1159),
            "vae_approx, as taef1_encoder.safetensors and taef1_decoder.safetensors.",
        ),
        (4, (1.0, 0.0), "knows none for these: for other programs."),
        (16, (0.18215, 0.0), "knows none for these: for other programs."),
        (4, (1.5305, 0.0609), "knows none for these: for other programs."),
    ],
)
def test_channels_and_scale_of_latents_are_in_the_name_for_comfyui(n_z, factors, note):
    model = LiteVAE(TinyEncoder(2 * n_z), TinyDecoder(z_channels=n_z)).set_for_diffusion(
        dict(zip(("scaling_factor", "shift_factor"), factors, strict=True))
    )
    assert next(LAYOUTS["taesd"]().notes(model)).endswith(note)


@torch.no_grad()
def test_tiny_export_is_checked_by_its_means(tmp_path, monkeypatch):
    """The log-variances are -30: a thousandth of these is more than all of the means."""
    load = LAYOUTS["diffusers"].load

    def other(self, path, model):
        (loaded,) = load(self, path, model)
        return [
            loaded._replace(
                moments=lambda x: (
                    loaded.moments(x)
                    * torch.tensor([1.001, 1.0]).repeat_interleave(4)[:, None, None]
                )
            )
        ]

    monkeypatch.setattr(LAYOUTS["diffusers"], "load", other)
    with pytest.raises(ValueError, match=r"differs by 1\.0e-03"):
        export(student(), tmp_path / "vae", LAYOUTS["diffusers"]())
