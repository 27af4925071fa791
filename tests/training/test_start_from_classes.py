"""Runs that start from other classes of diffusers than AutoencoderKL,
as the commands train and export them."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export_target
from olvae.models.loading.targets import find_target
from olvae.modules.others.tiny import TinyEncoder
from tests.conftest import parts, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.classes import make
from tests.models.loading.compvis import CompVisKL, with_random_weights
from tests.models.loading.test_monai_files import COMMON, RECORDED, RECORDS, bundle, drawn
from tests.models.loading.test_tiny_files import publish
from tests.models.steps import WITHOUT_KL

ANCHOR = "model.params.parts.anchor.target=olvae.models.parts.anchor.Anchor"
SMALL = "model.params.decoder_config.params.config.decoder_block_out_channels=[4,4]"


def exported(run, folder):
    export_target(find_target(run.path), folder, ExportSettings())
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("AutoencoderKLQwenImage", [ANCHOR, "model.params.use_ema=true"]),
        pytest.param("AutoencoderKLFlux2", ["model.params.use_ema=true"], marks=pytest.mark.slow),
        ("AutoencoderDC", ["model.params.freeze_encoder=false"]),
    ],
)
def test_a_diffusers_class_is_trained_exported_and_loaded_by_diffusers(
    name, changes, train_with, tmp_path
):
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "source")
    run = train_with(*changes, start_from=f"diffusers:{tmp_path / 'source'}")
    folder = exported(run, tmp_path / "vae")
    back = getattr(diffusers, name).from_pretrained(folder, low_cpu_mem_usage=False)
    before, after = theirs.state_dict(), back.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    halves = {key.partition(".")[0].removesuffix("quant_conv").rstrip("_") for key in moved}
    assert halves == (
        {"decoder", "encoder"}
        if "encoder" in "".join(changes) or ANCHOR in changes
        else {"decoder"}
    ) | (halves & {"", "post"})
    for key in (key for key in moved if before[key].ndim == 5):
        assert torch.equal(before[key][:, :, :-1], after[key][:, :, :-1]), key
    card = (folder / "README.md").read_text()
    assert f"diffusers import {name}" in card
    assert f"networks of diffusers' {name}," in card
    found = find_target(folder).load()
    assert (
        found.for_diffusion == find_target(f"diffusers:{tmp_path / 'source'}").load().for_diffusion
    )


def test_a_small_decoder_for_flux2(train_with, tmp_path, capsys):
    """The encoder and the statistics are FLUX.2's, the decoder is another one."""
    theirs = make("AutoencoderKLFlux2")
    theirs.save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="starts fresh"):
        run = train_with(SMALL, start_from=f"diffusers:{tmp_path / 'source'}")
    back = diffusers.AutoencoderKLFlux2.from_pretrained(
        exported(run, tmp_path / "vae"), low_cpu_mem_usage=False
    )
    before, after = theirs.state_dict(), back.state_dict()
    assert back.config.decoder_block_out_channels == [4, 4]
    assert after["decoder.conv_in.weight"].shape != before["decoder.conv_in.weight"].shape
    for key in (key for key in before if key.startswith(("encoder.", "bn.", "quant_conv."))):
        assert torch.equal(before[key], after[key]), key
    with pytest.raises(ConfigError, match=r"frozen: .*freeze_decoder"):
        train_with(
            *(SMALL, "model.params.freeze_decoder=true", "model.params.freeze_encoder=false"),
            start_from=f"diffusers:{tmp_path / 'source'}",
        )
    other = "model.params.encoder_config.params.config.block_out_channels=[4,8]"
    with pytest.raises(ConfigError, match="another encoder"):
        train_with(other, start_from=f"diffusers:{tmp_path / 'source'}")


def test_a_start_takes_other_image_channels(train_with, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "source")
    target = f"diffusers:{tmp_path / 'source'}"
    grey = train_with("data.params.channels=1", start_from=target)
    assert find_target(grey.path).load().in_channels == 1
    with pytest.raises(ConfigError, match="the channels"):
        train_with("data.params.channels=4", start_from=target)
    clear = train_with(
        "data.params.channels=4", "model.params.freeze_encoder=false", start_from=target
    )
    assert find_target(clear.path).load().in_channels == 4


def test_a_tiny_student_is_exported_as_autoencoder_tiny(train_with, tmp_path, image_folder):
    """It gets the statistics of the teacher's latents, learns them,
    and is written as AutoencoderTiny."""
    tiny_kl(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "teacher")
    teacher = {"autoencoder": f"diffusers:{tmp_path / 'teacher'}", "logvar_weight": 0}
    config = tiny_config(image_folder, lossconfig=WITHOUT_KL, parts=parts(teacher=teacher))
    module = "olvae.modules.others.tiny"
    config["model"]["params"] |= {
        "encoder_config": {
            "target": f"{module}.TinyEncoder",
            "params": {"channels": 8, "blocks": [1, 1, 1]},
        },
        "decoder_config": {
            "target": f"{module}.TinyDecoder",
            "params": {"channels": 8, "blocks": [1, 1, 1]},
        },
    }
    run = train_with("lightning.trainer.max_steps=2", config=config)
    back = diffusers.AutoencoderTiny.from_pretrained(
        exported(run, tmp_path / "vae"), low_cpu_mem_usage=False
    )
    assert back.config.scaling_factor == 1
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "no factor" in card
    assert "scaling factor" not in card
    with pytest.raises(ConfigError, match=r"diffusion model's .*`scaling_factor`"):
        export_target(find_target(run.path), tmp_path / "other", ExportSettings(scaling_factor=0.5))
    found = find_target(run.path).load()
    assert torch.equal(found.encoder.latents_std, torch.full((4, 1, 1), 2.0))
    assert torch.equal(found.decoder.latents_mean, torch.full((4, 1, 1), 0.25))
    config["model"]["params"]["parts"]["teacher"]["params"].pop("logvar_weight")
    with pytest.raises(ConfigError, match=r"logvar_weight: .*0"):
        train_with(config=config)


def test_taef2s_files_are_trained_and_written_again(train_with, tmp_path):
    publish("taef2", tmp_path)
    run = train_with(
        "model.params.freeze_encoder=false",
        "lightning.trainer.max_steps=2",
        start_from=str(tmp_path),
    )
    out = tmp_path / "trained"
    export_target(find_target(run.path), out, ExportSettings(format="taesd"))
    for half in ("encoder", "decoder"):
        before = torch.load(tmp_path / f"taef2_{half}.pth", weights_only=True)
        after = load_file(out / f"taef2_{half}.safetensors")
        assert {name: t.shape for name, t in before.items()} == {
            name: t.shape for name, t in after.items()
        }
        assert all(not torch.equal(before[name].float(), after[name]) for name in before)
    assert isinstance(find_target(exported(run, tmp_path / "vae")).load().encoder, TinyEncoder)


def test_monais_autoencoder_is_trained_and_written_again(train_with, tmp_path):
    records = json.loads(RECORDS.read_text())
    state = drawn(records["attention"]["shapes"])
    source = bundle(tmp_path / "bundle", state, {**COMMON, **RECORDED["attention"]})
    run = train_with(
        "data.params.channels=1",
        "model.params.freeze_encoder=false",
        "lightning.trainer.max_steps=2",
        start_from=str(source),
    )
    out = tmp_path / "trained.safetensors"
    export_target(find_target(run.path), out, ExportSettings(format="monai"))
    after = load_file(out)
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in after.items()}
    assert not any(torch.equal(tensor, after[name]) for name, tensor in state.items())


def test_a_student_of_taef2s_architecture_learns_from_its_files(train_with, tmp_path):
    publish("taef2", tmp_path)
    target = "olvae.modules.others.tiny.Tiny"
    shape = {"channels": 8, "pool": True}
    config = tiny_config(
        tmp_path / "photos",
        embed_dim=32,
        encoder_config={"target": f"{target}Encoder", "params": shape},
        decoder_config={"target": f"{target}Decoder", "params": {**shape, "z_channels": 32}},
        lossconfig=WITHOUT_KL,
        parts=parts(teacher={"autoencoder": str(tmp_path), "logvar_weight": 0.0}),
    )
    run = train_with("lightning.trainer.max_steps=1", config=config)
    export_target(find_target(run.path), tmp_path / "student", ExportSettings(format="taesd"))
    assert find_target(tmp_path / "student").load().latent_channels == 32


def test_latents_of_another_width_than_the_networks_are_trained(train_with, tmp_path):
    """CompVis's ``embed_dim`` beside ``z_channels``, and back to its names."""
    theirs = with_random_weights(CompVisKL((32, 32), embedded=3, blocks=1))
    save_file(theirs.state_dict(), tmp_path / "kl.safetensors")
    run = train_with(
        "model.params.freeze_encoder=false",
        "model.params.scaling_factor=0.5",
        start_from=str(tmp_path / "kl.safetensors"),
    )
    out = tmp_path / "back.safetensors"
    export_target(find_target(run.path), out, ExportSettings(format="ldm"))
    theirs.load_state_dict(load_file(out))
