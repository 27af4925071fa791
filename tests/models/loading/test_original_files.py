"""Files of other projects: read through diffusers' converters,
and written so that these read them.
"""

import json
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import load_file, save_file

from olvae.export.exporting import export
from olvae.export.formats import LAYOUTS
from olvae.models.loading import original_files
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.original_files import OriginalLoader, original_names
from olvae.models.loading.targets import find_target
from tests.export.latents import tiny_vae
from tests.models.loading.classes import KL, make

WAN = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
FORMS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": WAN,
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLFlux2": {
        "block_out_channels": (32, 32),
        "decoder_block_out_channels": (32, 64),
        "norm_num_groups": 32,
    },
}


def same(found: Any, theirs: Any) -> None:
    """Compare class and weights with diffusers' model."""
    assert type(found.model) is type(theirs)
    before, after = theirs.state_dict(), found.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLWan"])
def test_original_names_are_those_that_diffusers_converts(kind):
    """Of the published sizes; latent-diffusion's converter knows FLUX.2's quantizers by their
    other place.
    """
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    arguments = (
        {} if kind == "AutoencoderKLWan" else {**shape, "block_out_channels": (128, 256, 512, 512)}
    )
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**arguments)
    state = model.state_dict()
    named = original_names(kind, state)
    if kind == "AutoencoderKLWan":
        assert len(named) == 194
        assert named.keys() >= {
            "conv1.weight",
            "encoder.downsamples.2.resample.1.weight",
            "decoder.upsamples.4.shortcut.weight",
            "decoder.upsamples.7.time_conv.bias",
            "decoder.middle.1.to_qkv.weight",
        }
        assert convert_wan_vae_to_diffusers(dict(named)).keys() == state.keys()
        return
    known = {
        name.replace("encoder.quant", "quant").replace("decoder.post", "post"): t
        for name, t in named.items()
    }
    found = convert_ldm_vae_checkpoint(known, model.config)
    kept = {name for name in state if not name.startswith("bn.")}
    assert found.keys() == kept
    assert all(found[name].shape == state[name].shape for name in kept)
    assert (
        ("decoder.post_quant_conv.weight" in named)
        == ("bn.running_var" in named)
        == (kind != "AutoencoderKL")
    )


@pytest.mark.parametrize("kind", FORMS)
def test_ldm_export_of_diffusers_classes_is_read_again(kind, tmp_path):
    """With its class and its factors, which the header holds for us."""
    theirs, file = make(kind, **FORMS[kind]), tmp_path / "vae.safetensors"
    export(DiffusersAutoencoder(theirs).as_litevae("it").eval(), file, LAYOUTS["ldm"]())
    found = find_target(file).load()
    same(found, theirs)
    assert found.for_diffusion == DiffusersAutoencoder(theirs).for_diffusion
    assert found.factors_known


@pytest.mark.parametrize(("prefix", "inside"), [("", True), ("vae.", False)])
def test_flux2_as_it_is_published_and_in_comfyui(prefix, inside, tmp_path):
    """Without a config: shapes say all.

    ComfyUI's other files have the quantizers outside of encoder and decoder.
    """
    theirs = make("AutoencoderKLFlux2", **FORMS["AutoencoderKLFlux2"])
    named = original_names("AutoencoderKLFlux2", theirs.state_dict())
    if not inside:
        named = {
            name.replace("encoder.quant", "quant").replace("decoder.post", "post"): t
            for name, t in named.items()
        }
    save_file(
        {prefix + name: t.contiguous() for name, t in named.items()}, tmp_path / "ae.safetensors"
    )
    found = find_target(tmp_path / "ae.safetensors").load()
    same(found, theirs)
    assert len(found.latents_mean) == 16


@pytest.mark.parametrize("groups", [32, 16, 0])
@pytest.mark.parametrize("widths", [[32, 32], [0, 0], None])
def test_a_config_beside_is_of_this_file_if_it_has_its_shapes(groups, widths, tmp_path):
    """Where shapes say all; one that is given is believed,
    and what is wrong with it is one line.
    """
    theirs = make("AutoencoderKL", block_out_channels=(32, 32), norm_num_groups=32)
    config = tmp_path / "config.json"
    save_file(original_names("AutoencoderKL", theirs.state_dict()), tmp_path / "vae.safetensors")
    theirs.save_config(tmp_path)
    changes = {"scaling_factor": 0.5, "norm_num_groups": groups, "block_out_channels": widths}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    found = find_target(tmp_path / "vae.safetensors").load()
    same(found, theirs)
    assert found.model.config.norm_num_groups == 32
    assert (
        (found.scaling_factor == 0.5)
        == found.factors_known
        == (groups == 32 and widths == [32, 32])
    )
    if not groups or widths != [32, 32]:
        with pytest.raises(
            ValueError, match=r"vae.safetensors: .*another AutoencoderKL\?"
        ) as caught:
            find_target(tmp_path / "vae.safetensors", config=config).load()
        assert "\n" not in str(caught.value)


DC_NAMES = {
    r"(?:down|up)_blocks\.(\d)\.(\d)": r"stages.\1.op_list.\2.main",
    r"main\.norm": "main.conv2.norm",
    r"(main\.conv\d?)\.(weight|bias)": r"\1.conv.\2",
    r"encoder\.conv_in": "encoder.project_in.conv",
    r"encoder\.conv_out": "encoder.project_out.0.conv",
    r"decoder\.conv_in": "decoder.project_in.conv",
    r"decoder\.norm_out": "decoder.project_out.0",
    r"decoder\.conv_out": "decoder.project_out.2.conv",
}
"""diffusers' names of DC-AE's residual blocks, and efficientvit's."""


def test_dc_ae_by_the_config_of_its_class(tmp_path):
    theirs, state = make("AutoencoderDC"), {}
    for name, tensor in theirs.state_dict().items():
        for pattern, new in DC_NAMES.items():
            name = re.sub(pattern, new, name)
        state[name] = tensor
    save_file(state, tmp_path / "dc.safetensors")
    with pytest.raises(
        ValueError,
        match=r"dc.safetensors: .*another AutoencoderDC\?",
    ):
        find_target(tmp_path / "dc.safetensors").load()
    theirs.save_config(tmp_path / "configs")
    found = find_target(
        tmp_path / "dc.safetensors", config=tmp_path / "configs" / "config.json"
    ).load()
    same(found, theirs)
    theirs.save_config(tmp_path)
    same(find_target(tmp_path / "dc.safetensors").load(), theirs)


def test_classes_without_original_names_are_refused_by_ldm_and_comfyui(tmp_path):
    for kind, message in {
        "AutoencoderDC": "AutoencoderDC has no names here but diffusers'",
        "AutoencoderKLWan": "diffusers knows the names of Wan 2.1's files alone",
        "AutoencoderKLFlux2": "GroupNorm with 4 groups: latent-diffusion always has 32",
    }.items():
        model = DiffusersAutoencoder(make(kind)).as_litevae("it")
        assert LAYOUTS["ldm"]().misfit(model).startswith(message)
        assert LAYOUTS["comfyui"]().misfit(model) == f"an {kind}: `format` diffusers"
    for form, instead in (
        ({}, "`format` ldm is what ComfyUI loads"),
        ({"is_residual": True}, "`format` diffusers"),
    ):
        # Wan 2.1's and 2.2's.
        model = DiffusersAutoencoder(make("AutoencoderKLWan", **WAN, **form)).as_litevae("it")
        assert LAYOUTS["comfyui"]().misfit(model) == f"an AutoencoderKLWan: {instead}"


def test_sizes_in_a_header_are_not_believed(tmp_path):
    theirs = make("AutoencoderKLWan", **WAN)
    config = {**theirs.config, "_class_name": "AutoencoderKLWan", "base_dim": 2**20}
    named = original_names("AutoencoderKLWan", theirs.state_dict())
    save_file(named, tmp_path / "vae.safetensors", metadata={"config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"vae.safetensors: base_dim: more than"):
        find_target(tmp_path / "vae.safetensors")


def flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen2D's tensors, written from its shapes: every kernel and norm loses its axis of time."""
    kept = {name: tensor for name, tensor in state.items() if "time_conv" not in name}
    for name, tensor in kept.items():
        if tensor.ndim == 5:
            kept[name] = tensor[:, :, -1].contiguous()
        elif name.endswith("gamma") and tensor.ndim == 4:
            kept[name] = tensor.flatten(1)[:, :, None]
    return kept


@torch.no_grad()
@pytest.mark.parametrize("names", ["diffusers'", "Wan's"])
def test_qwen2d_is_qwen_images_autoencoder_for_one_frame(names, tmp_path):
    kind, file = "AutoencoderKLQwenImage", tmp_path / "Qwen2D_VAE.safetensors"
    theirs = make(kind, **WAN)
    state = theirs.state_dict()
    if names == "Wan's":
        state = original_names(kind, state)
    config = {**theirs.config, "_class_name": kind}
    stored = {name: tensor.half() for name, tensor in flat(state).items()}
    save_file(stored, file, metadata={"config": json.dumps(config)})
    found = find_target(file).load()
    x = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    theirs.half().float()
    expected = theirs.encode(x).latent_dist.mean
    torch.testing.assert_close(found.encode(x[:, :, 0]).mean, expected[:, :, 0])
    torch.testing.assert_close(
        found.decode(expected[:, :, 0]), theirs.decode(expected).sample[:, :, 0]
    )

    # And back: the file that was read.
    out = tmp_path / "out.safetensors"
    model = found.as_litevae("it").eval()
    export(model, out, LAYOUTS["qwen2d"]())
    again = load_file(out)
    wanted = flat(theirs.state_dict())
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    same(find_target(out).load(), found.model)


def test_qwen2d_is_for_qwen_images_and_wans_autoencoders(tmp_path):
    model = DiffusersAutoencoder(make("AutoencoderKLFlux2")).as_litevae("it")
    assert "Qwen-Image's and Wan's" in LAYOUTS["qwen2d"]().misfit(model)
    # A whole one with diffusers' names is a folder's.
    theirs = make("AutoencoderKLQwenImage", **WAN)
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="diffusers autoencoder"):
        find_target(tmp_path / "vae.safetensors")


FIRST = "decoder.up_blocks.3.resnets.2.conv1.weight"
SECOND = "decoder.up_blocks.2.upsamplers.0.resample.1.weight"


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ([FIRST, SECOND], True),
        ([FIRST], False),
        ([SECOND, "decoder.up_blocks.3.resnets.1.conv1.weight"], False),
        ([FIRST, SECOND, "decoder.up_blocks.4.resnets.0.conv1.weight"], False),
    ],
)
def test_wans_names_are_of_four_levels_of_two_blocks(names, known):
    state = {name: torch.zeros(1) for name in names}
    if known:
        assert original_names("AutoencoderKLWan", state).keys() == {
            "decoder.upsamples.14.residual.2.weight",
            "decoder.upsamples.11.resample.1.weight",
        }
        return
    with pytest.raises(ValueError, match="four levels of two blocks"):
        original_names("AutoencoderKLWan", state)


def test_kernels_for_images_are_the_last_in_time_and_nothing_else_is_filled_in():
    model = torch.nn.Module()
    model.conv, model.time_conv = torch.nn.Conv3d(2, 3, 3), torch.nn.Conv3d(1, 1, 3)
    flat = {"conv.weight": torch.randn(3, 2, 3, 3)}
    whole = original_files.with_frames(model, flat)
    times = {"time_conv.weight", "time_conv.bias"}
    assert whole.keys() == times | {"conv.weight"}
    assert torch.equal(whole["conv.weight"][:, :, -1], flat["conv.weight"])
    assert not whole["conv.weight"][:, :, :2].any()
    assert not any(whole[name].any() for name in times)
    flat["conv.bias"] = torch.randn(3)
    whole = original_files.with_frames(model, flat)
    assert torch.equal(whole["conv.bias"], flat["conv.bias"])
    assert original_files.without_frames(whole).keys() == flat.keys()


@pytest.mark.parametrize(
    ("outputs", "widened"), [(None, 3), (3, 3), (12, 12), (27, 27), (24, 3), (128, 3)]
)
def test_a_decoder_for_an_image_of_several_times_the_size(outputs, widened):
    """Four or nine times the channels; other numbers are no image's."""
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in KL.items()}
    if outputs is not None:
        config["conv_out_channels"] = outputs
    model = original_files._built("AutoencoderKL", config)
    last = model.decoder.conv_out
    assert (last.out_channels, last.weight.shape[0]) == (widened, widened)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("AutoencoderKL", {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}),
        ("AutoencoderKL", {"use_quant_conv": False, "use_post_quant_conv": False}),
        ("AutoencoderKL", {"mid_block_add_attention": False, "layers_per_block": 2}),
        ("AutoencoderKLFlux2", {"decoder_block_out_channels": (8, 16)}),
        ("AutoencoderKLFlux2", {"decoder_block_out_channels": None}),
    ],
)
def test_shapes_say_the_arguments_of_latent_diffusions_networks(kind, changes, tmp_path):
    model = make(kind, **changes)
    named = original_names(kind, model.state_dict())
    file = tmp_path / "vae.safetensors"
    save_file({name: t.contiguous() for name, t in named.items()}, file)
    found_kind, tensors = original_files._tensors(file)
    assert found_kind == kind
    found = original_files._latent_diffusion_config(kind, tensors, file)
    assert found.pop("norm_num_groups") == 32
    for key, value in found.items():
        given = model.config[key]
        assert value == (list(given) if isinstance(given, tuple) else given), key
    assert ("decoder_block_out_channels" in found) == (kind == "AutoencoderKLFlux2")


def test_a_config_is_given_inside_or_of_this_class(tmp_path):
    """One beside a file whose shapes say all is believed if it is of its class."""
    model, file = make("AutoencoderKL"), tmp_path / "vae.safetensors"
    tensors = original_names("AutoencoderKL", model.state_dict())
    ours = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}
    flux = {"_class_name": "AutoencoderKLFlux2", "scaling_factor": 0.25}
    theirs = {"_class_name": "VQModel", "scaling_factor": 0.125}

    def found(given=None, inside=None, beside=None, kind="AutoencoderKL"):
        header = None if inside is None else {"config": json.dumps(inside)}
        save_file(tensors, file, header)
        (tmp_path / "config.json").unlink(missing_ok=True)
        if beside is not None:
            (tmp_path / "config.json").write_text(json.dumps(beside))
        name, config = original_files._config(kind, tensors, file, given)
        assert config.pop("conv_out_channels") == 3
        return name, config.get("scaling_factor"), "norm_num_groups" in config

    (tmp_path / "flux.json").write_text(json.dumps(flux))
    (tmp_path / "other.json").write_text(json.dumps(theirs))
    (tmp_path / "ours.yaml").write_text("_class_name: AutoencoderKL\nscaling_factor: 0.5\n")
    kl = "AutoencoderKL"
    assert found() == (kl, None, True)
    assert found(tmp_path / "ours.yaml") == (kl, None, True)
    assert found(tmp_path / "missing.json", ours) == (kl, 0.5, False)
    assert found(tmp_path / "flux.json", ours) == ("AutoencoderKLFlux2", 0.25, False)
    assert found(tmp_path / "other.json", ours) == (kl, 0.5, False)
    assert found(None, theirs, ours) == (kl, 0.5, True)
    assert found(None, None, theirs) == (kl, None, True)
    wan = {"_class_name": "AutoencoderKLWan", "scaling_factor": 2.0}
    assert found(None, None, wan, "AutoencoderKLQwenImage") == ("AutoencoderKLWan", 2.0, False)
    qwen = "AutoencoderKLQwenImage"
    assert found(None, None, ours, qwen) == (qwen, None, False)


def test_files_are_checked_at_a_load_alone(tmp_path, monkeypatch):
    """And ours are not read to know that they are of no other project."""
    file, checks, read = tmp_path / "vae.safetensors", [], original_files.read_checkpoint
    theirs = make("AutoencoderKL", block_out_channels=(32, 32), norm_num_groups=32)
    save_file(original_names("AutoencoderKL", theirs.state_dict()), file)
    tiny_vae().save_pretrained(tmp_path / "export")
    monkeypatch.setattr(
        original_files,
        "read_checkpoint",
        lambda file, check=True: checks.append(check) or read(file, check),
    )
    loader = OriginalLoader()
    assert loader.accepts(str(file))
    found = loader.find(str(file), LoadOptions())
    assert checks == [False, False]
    found.load()
    assert checks[2:] == [True]
    monkeypatch.setattr(original_files, "_tensors", lambda *_, **__: ("AutoencoderKL", {}))
    assert not loader.accepts(str(tmp_path / "export"))
    assert not loader.accepts(str(tmp_path / "missing"))
