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
from olvae.modules.others.tiny import Residual, TinyDecoder, TinyEncoder
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
    reaches = [stage.reach for stage in model.decoder.stages()]
    assert reaches == [0, 1, 0, 3, 3, 0, 1, 3, 1, 0]  # the bound, ..., the range
    torch.testing.assert_close(model.decode_tiled(z, tile=4), model.decode(z))


@torch.no_grad()
def test_tiny_student_is_written_as_diffusers_and_as_taesd(tmp_path):
    model = student()
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    z = model.encode(x).mean
    mean, std = model.encoder.latents_mean, model.encoder.latents_std
    assert mean.flatten().tolist() == [0.5, -1.0, 0.0, 2.0]
    assert std.flatten().tolist() == [2.0, 0.5, 1.0, 3.0]
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


def test_a_block_that_sees_the_whole_image_by_hand():
    """Four times as many channels inside, in four groups; then the convolutions."""
    block, x = Residual(3, pool=True).double(), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    widen, norm, _, narrow = block.pool
    torch.nn.init.normal_(norm.weight)
    h = torch.einsum("oi,bihw->bohw", widen.weight[:, :, 0, 0], x)  # (2, 12, 5, 4)
    groups = h.reshape(2, 4, 3 * 20)
    centred = groups - groups.mean(2, keepdim=True)
    h = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    h = (h.view(2, 12, 5, 4) * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
    h = x + torch.einsum("oi,bihw->bohw", narrow.weight[:, :, 0, 0], h)
    torch.testing.assert_close(block(x), torch.relu(block.conv(h) + h))
    assert widen.bias is None
    assert narrow.bias is None
    plain = Residual(3)
    assert plain.pool is None
    y = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(plain(y), torch.relu(plain.conv(y) + y))


def kinds(network: torch.nn.Module) -> list[str]:
    """Each layer: its width and stride, or its name; a star sees the whole image."""
    found = []
    for layer in network.layers:
        if isinstance(layer, torch.nn.Conv2d):
            bias = "" if layer.bias is None else " b"
            found.append(f"{layer.in_channels}-{layer.out_channels} /{layer.stride[0]}{bias}")
        else:
            found.append(type(layer).__name__ + "*" * (getattr(layer, "pool", None) is not None))
    return found


def test_layers_of_a_tiny_encoder_and_decoder():
    """By TAESD's form, TAEF2's pool in the latent's level, and TAESANA's stem and widths."""
    plain = TinyEncoder(8, 3, 16, 6, (1, 0, 2), pool=True)
    assert kinds(plain) == [
        *("3-6 /1 b", "Residual", "6-6 /2", "6-6 /2", "Residual*", "Residual*", "6-4 /1 b"),
    ]
    assert (plain.downscale, plain.latent_dim, plain.in_channels) == (4, 8, 3)
    stem = TinyEncoder(8, 3, 16, 6, (0, 1), stem=(4, 6))
    assert kinds(stem) == [
        *("3-4 /2 b", "ReLU", "4-6 /2 b", "ReLU", "6-6 /2", "Residual", "6-4 /1 b"),
    ]
    assert stem.downscale == 8
    convolutions = [layer for layer in stem.layers if isinstance(layer, torch.nn.Conv2d)]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert stem(torch.rand(1, 3, 16, 24)).shape == (1, 8, 2, 3)
    decoder = TinyDecoder(2, 4, 3, (1, 0, 1), pool=True, channel_mult=(1, 2, 3))
    assert kinds(decoder) == [
        *("4-6 /1 b", "ReLU", "Residual*", "Upsample", "6-4 /1"),
        *("Upsample", "4-2 /1", "Residual", "2-3 /1 b"),
    ]
    assert (decoder.upscale, decoder.z_channels, decoder.out_channels) == (4, 4, 3)
    assert decoder.stages() is None
    assert decoder(torch.rand(1, 4, 2, 3)).shape == (1, 3, 8, 12)
    larger = TinyDecoder(2, 4, 3, (1, 1), enlarge=2)
    assert larger.upscale == 4
    assert larger(torch.rand(1, 4, 2, 3)).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: TinyEncoder(channels=0), "channels must be at least 1, got 0"),
        (lambda: TinyEncoder(blocks=(1, -1)), "blocks must"),
        (lambda: TinyEncoder(channels=8, stem=(4, 6)), "stem: .* 6, .* 8"),
        (lambda: TinyDecoder(channels=0), "channels must be at least 1, got 0"),
        (lambda: TinyDecoder(blocks=(1, -1)), "blocks must"),
        (lambda: TinyDecoder(channel_mult=(1, 0, 1, 1)), "channel_mult must be at least 1"),
        (lambda: TinyDecoder(channel_mult=(1, 1, 1)), "channel_mult: 3 levels, .* 4"),
    ],
)
def test_tiny_networks_refuse_settings_that_make_no_network(make, wrong):
    with pytest.raises(ValueError, match=wrong):
        make()


def test_a_tiny_network_without_blocks_has_its_channels_alone():
    """No block in a level is possible."""
    assert kinds(TinyEncoder(channels=1, blocks=(0,))) == ["3-1 /1 b", "1-4 /1 b"]
    assert kinds(TinyDecoder(1, blocks=(0,))) == ["4-1 /1 b", "ReLU", "1-3 /1 b"]


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_level_of_a_tiny_network_after_the_first_doubles_the_image(levels):
    blocks = [0] * levels
    encoder, decoder = TinyEncoder(channels=2, blocks=blocks), TinyDecoder(2, blocks=blocks)
    assert encoder.downscale == decoder.upscale == 2 ** (levels - 1)
