"""Files of latent-diffusion that ask for more than they hold."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from olvae.export.exporting import export
from olvae.export.formats import find_layout
from olvae.models.loading.targets import find_target
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.compvis import CompVisKL, with_random_weights
from tests.models.loading.names import latent_diffusion_names


def test_latent_diffusion_file_whose_shapes_hold_nothing_is_refused(tmp_path):
    shapes = {
        "encoder.conv_in.weight": (3, 3),
        "encoder.conv_out.weight": (8, 3),
        "decoder.conv_in.weight": (0, 4),
    }
    shapes |= {"decoder.conv_out.weight": (3, 0), "encoder.down.0.block.0.norm1.weight": (0,)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors["encoder.down.0.block.0.conv1.weight"] = torch.zeros(9024, 0)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="another model"):
        find_target(tmp_path / "vae.safetensors").load()


kl = partial(autoencoder_kl, (32, 32, 64))


@pytest.mark.parametrize(
    ("file", "prefix", "changes"),
    [
        ("kl.ckpt", "first_stage_model.", {}),
        ("checkpoints/kl.safetensors", "", {}),  # as ComfyUI's folder, which is no run's
        # FLUX's.
        (
            "ae.safetensors",
            "",
            {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        ),
    ],
)
def test_latent_diffusion_files_are_read_as_autoencoder_kl(file, prefix, changes, tmp_path, image):
    model, path = kl(**changes), tmp_path / file
    state = {prefix + name: tensor for name, tensor in latent_diffusion_names(model).items()}
    assert f"{prefix}encoder.down.1.block.0.conv1.weight" in state
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        save_file(state, path)
    target = find_target(path)
    assert target.name == str(path)
    found = target.load()
    assert (found.downscale, found.latent_channels) == (4, model.config.latent_channels)
    with torch.no_grad():
        assert torch.equal(found(image)[0], model(image).sample)
    assert not torch.equal(target.untrained()(image)[0], model(image).sample)


def test_latent_diffusion_files_that_do_not_fit_are_refused(tmp_path):
    state = latent_diffusion_names(kl())
    for change, message in (
        ({"quantize.embedding.weight": torch.zeros(3, 4)}, "vector-quantised"),
        (
            {"encoder.down.2.attn.0.norm.weight": torch.zeros(64)},
            "unexpected .*encoder.down_blocks.2.attentions.0.group_norm.weight",
        ),
        (
            {"post_quant_conv.weight": torch.zeros(4, 3, 1, 1)},
            "3 channels, the decoder takes 4",
        ),
        (
            {"encoder.extra.weight": torch.zeros(1)},
            "1 of its tensors have no place",
        ),
        ({"encoder.mid.block_1.conv1.weight": torch.zeros(1)}, "1 of another shape"),
        ({"encoder.conv_out.bias": torch.full((8,), torch.nan)}, "non-finite"),
        ({"encoder.conv_out.weight": None}, "without encoder.conv_out.weight"),
        ({"encoder.conv_out.bias": None}, r"1 missing \(encoder.conv_out.bias\)"),
    ):
        changed = {
            name: tensor for name, tensor in {**state, **change}.items() if tensor is not None
        }
        save_file(changed, tmp_path / "kl.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            find_target(tmp_path / "kl.safetensors").load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attention", "decoder_attention"),
    [((), ()), ((2,), (2,)), ((1, 2), (1, 2)), ((2,), ()), ((), (1,))],
    ids=str,
)
def test_attention_at_levels_is_read_and_computed_as_compvis_does(
    attention, decoder_attention, tmp_path, image
):
    """As kl-f16 and kl-f32 have it, beside attention in the middle; MAR's in the encoder alone."""
    shape = {"attention": attention, "decoder_attention": decoder_attention}
    theirs = with_random_weights(CompVisKL(**shape))
    torch.save({"model": theirs.state_dict()}, tmp_path / "kl.ckpt")
    found = find_target(tmp_path / "kl.ckpt").load()
    with torch.no_grad():
        moments, y = theirs(image)
        torch.testing.assert_close(found.encode(image).mean, moments[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found(image)[0], y, rtol=1e-4, atol=1e-5)

    # Ours, to be trained, and written back under CompVis's names.
    ours = found.as_litevae("kl").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(image).mean, moments[:, :4], rtol=1e-4, atol=1e-5)
    export(ours, tmp_path / "back.safetensors", find_layout("ldm"))
    back = CompVisKL(**shape)
    back.load_state_dict(load_file(tmp_path / "back.safetensors"))
    with torch.no_grad():
        assert torch.equal(back.eval()(image)[1], y)
    export(ours, tmp_path / "folder", find_layout("diffusers"))
    with torch.no_grad():
        again = AutoencoderKL.from_pretrained(tmp_path / "folder")(image).sample
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    notes = " ".join(find_layout("ldm").notes(ours))
    assert ("at levels" in notes) == bool(attention or decoder_attention)


@pytest.mark.parametrize("embedded", [3, 6])
def test_latents_of_another_width_than_the_networks_are_read_and_written(embedded, tmp_path, image):
    """CompVis's `embed_dim` beside `z_channels`; AutoencoderKL has one number for both."""
    theirs = with_random_weights(CompVisKL(embedded=embedded))
    save_file(theirs.state_dict(), tmp_path / "kl.safetensors")
    target = find_target(tmp_path / "kl.safetensors")
    found = target.load()
    assert found.latent_channels == target.untrained().latent_channels == embedded
    ours = found.as_litevae("kl").eval()
    with torch.no_grad():
        moments, y = theirs(image)
        mean = moments[:, :embedded]
        for model in (found, ours):
            torch.testing.assert_close(model.encode(image).mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(image)[0], y, rtol=1e-4, atol=1e-5)

    export(ours, tmp_path / "back.safetensors", find_layout("ldm"))
    back = CompVisKL(embedded=embedded)
    back.load_state_dict(load_file(tmp_path / "back.safetensors"))
    with torch.no_grad():
        assert torch.equal(back.eval()(image)[1], y)
    misfit = find_layout("diffusers").misfit(ours)
    assert f"{embedded} channels, networks of 4" in misfit
    assert "`format` ldm or litevae" in misfit
    export(ours, tmp_path / "litevae")
