"""The names, shapes, bits and outputs of each format, against diffusers and the published files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olvae import LiteVAE
from olvae.config import ConfigError, save
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.export.exporting import ExportSettings, export
from olvae.export.formats import LAYOUTS, find_layout
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.targets import find_target
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import config_inside, locate
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.sdvae import set_padding
from tests.export.test_reconstruction_volumes import grey
from tests.export.tiny import ours, reflecting, tiny_litevae
from tests.models.autoencoder_kl import PER_CHANNEL, SHAPES, autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.names import latent_diffusion_names

WIDTHS = (128, 256, 512, 512)

DIFFUSERS, LDM, COMFYUI = (LAYOUTS[name]() for name in ("diffusers", "ldm", "comfyui"))


def settings(model: AutoencoderKL) -> dict:
    return json.loads(
        json.dumps({name: value for name, value in model.config.items() if name[0] != "_"})
    )


def assert_equal(tensors: dict, expected: dict) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


# litevae
# diffusers
@pytest.mark.parametrize(
    "shape", [SHAPES["sdxl"], SHAPES["flux"], PER_CHANNEL], ids=["sdxl", "flux", "per channel"]
)
def test_autoencoder_kl_there_and_back(shape, tmp_path):
    before = autoencoder_kl(**shape)
    export(ours(before), tmp_path / "vae", DIFFUSERS)
    after, report = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(report.values())
    assert_equal(after.state_dict(), before.state_dict())
    assert settings(after) == {
        **settings(before),
        "shift_factor": before.config.shift_factor or 0.0,
    }
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = before.encode(x).latent_dist
        assert torch.equal(after.encode(x).latent_dist.parameters, z.parameters)
        assert torch.equal(after.decode(z.mode()).sample, before.decode(z.mode()).sample)
    again = find_target(f"diffusers:{tmp_path / 'vae'}").load().as_litevae("vae")
    assert again.for_diffusion == ours(before).for_diffusion
    assert {"README.md", "config.json", WEIGHTS_NAME} <= {
        path.name for path in (tmp_path / "vae").iterdir()
    }
    assert (
        json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    )


@pytest.mark.parametrize("halves", [("encoder",), ("encoder", "decoder")])
def test_diffusers_export_of_reflect_padding(halves, tmp_path):
    """The weights give our outputs once the padding is set, and others at the borders before."""
    plain = autoencoder_kl((32, 32))
    model = reflecting(plain, *halves)
    export(model, tmp_path / "vae", DIFFUSERS)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model(x)[0]
        assert (theirs(x).sample - expected).abs().max() > 1e-3
        for half in halves:
            set_padding(getattr(theirs, half), "reflect")
        torch.testing.assert_close(theirs(x).sample, expected, rtol=0, atol=1e-5)

    card = (tmp_path / "vae" / "README.md").read_text()
    assert f"| note | padding: reflect in the {' and the '.join(halves)}, " in card

    export(model, tmp_path / "vae.safetensors", LDM)
    assert_equal(load_file(tmp_path / "vae.safetensors"), latent_diffusion_names(plain))
    for layout in (DIFFUSERS, LDM):
        assert next(layout.notes(model)).startswith(
            f"padding: reflect in the {' and the '.join(halves)}, which"
        )


@pytest.mark.parametrize(
    "name", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLQwenImage"]
)
def test_the_usage_on_a_card_runs_with_the_class_of_diffusers(name, tmp_path):
    """Encoding returns latent, latents or latent_dist; classes for videos take frames."""
    theirs = make(name).eval()
    theirs.save_pretrained(tmp_path / "vae")
    model = DiffusersAutoencoder(theirs).as_litevae("vae").eval()
    code = DIFFUSERS.usage(model)
    sides = (1, 32, 32) if name.endswith("QwenImage") else (32, 32)
    images = torch.rand(1, 3, *sides) * 2 - 1
    names = {"images": images}
    exec(code.replace("FOLDER_OR_ID", str(tmp_path / "vae")), names)
    assert names["images"].shape == images.shape
    assert names["z"].shape[1] == model.latent_channels
    assert f"(B, 3, {', '.join(['1', 'H', 'W'][-len(sides) :])})" in code


def test_the_usage_on_the_card_of_a_litevae_runs(tmp_path):
    layout = LAYOUTS["litevae"]()
    model = tiny_litevae()
    export(model, tmp_path / "vae", layout)
    code = layout.usage(model).replace("FOLDER_OR_ID", str(tmp_path / "vae"))
    names = {"images": torch.rand(1, 3, 16, 24) * 2 - 1}
    exec(code, names)
    assert names["images"].shape == (1, 3, 16, 24)
    assert names["z"].shape == (1, 4, 2, 3)
    assert_equal(names["vae"].autoencoder.state_dict(), model.state_dict())


@pytest.mark.parametrize(("pool", "kind"), [(False, "taesd"), (True, "taef2")])
def test_tiny_files_are_two_whose_layers_have_the_published_numbers(pool, kind, tmp_path):
    """The decoder's begin at 1: its bound, which has no weights, is layer 0 there."""
    layout = LAYOUTS["taesd"]()
    model = DiffusersAutoencoder(make("AutoencoderTiny")).as_litevae("tiny").eval()
    model.decoder.node["params"]["pool"] = pool
    layout.write(model, tmp_path / "tiny")
    files = {f"{kind}_{half}.safetensors" for half in ("encoder", "decoder")}
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == files
    encoder, decoder = (
        load_file(tmp_path / "tiny" / f"{kind}_{half}.safetensors")
        for half in ("encoder", "decoder")
    )
    assert min(int(name.split(".")[0]) for name in encoder) == 0
    assert min(int(name.split(".")[0]) for name in decoder) == 1
    written = layout.read(tmp_path / "tiny")
    assert_equal(written, dict(layout.tensors(model)))
    halves = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    assert_equal(written, halves | {f"decoder.{name}": t for name, t in decoder.items()})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"), [("diffusers", "kl"), ("diffusers", "tiny"), ("taesd", "tiny")]
)
def test_what_diffusers_loads_has_the_models_outputs(name, kind, tmp_path):
    """A tiny student's latents are scaled by its own units, so there is no factor there."""
    layout = LAYOUTS[name]()
    if kind == "kl":
        model = ours(autoencoder_kl((32, 32)))
        model.set_for_diffusion({"scaling_factor": 0.5, "shift_factor": 0.25})
    else:
        model = DiffusersAutoencoder(make("AutoencoderTiny")).as_litevae("it").eval()
        for half in (model.encoder, model.decoder):
            half.use_latents(torch.full((4,), 3.0), torch.full((4,), 2.0))
    assert layout.in_units(model) == (kind == "tiny")
    layout.write(model, tmp_path / "it")
    (loaded,) = layout.load(tmp_path / "it", model)
    assert loaded.loader == "in diffusers"
    known = {} if loaded.for_diffusion is None else loaded.for_diffusion
    assert (known.get("scaling_factor"), known.get("shift_factor")) == (
        (0.5, 0.25) if kind == "kl" else (None, None)
    )
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(loaded.moments(x), model.moments(x), rtol=1e-5, atol=1e-5)
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(loaded.decode(z), model.decode(z), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_taef2_files_are_loaded_in_their_units(tmp_path):
    """No class of diffusers has its network."""
    layout = LAYOUTS["taesd"]()
    model = LiteVAE(
        TinyEncoder(8, 3, 16, 8, (1, 1, 1), pool=True),
        TinyDecoder(8, 4, blocks=(1, 1, 1), pool=True),
    ).eval()
    mean, std = torch.arange(4.0), torch.linspace(1.0, 2.0, 4)
    for half in (model.encoder, model.decoder):
        half.use_latents(mean, std)
    layout.write(model, tmp_path / "it")
    (loaded,) = layout.load(tmp_path / "it", model)
    assert loaded.for_diffusion is None
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(loaded.moments(x), model.moments(x), rtol=1e-5, atol=1e-5)
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(loaded.decode(z), model.decode(z), rtol=1e-5, atol=1e-5)


TAESD, TAEF2, TAESANA = ({}, {"pool": True}, {"stem": [4, 8]})


@pytest.mark.parametrize(
    ("network", "latents", "copied"),
    [
        (TAESD, (4, 0.18215, 0.0), "vae_approx."),
        (TAESD, (4, 0.1821504, None), "vae_approx."),
        (TAESD, (4, 0.18216, 0.0), None),
        (TAESD, (4, 0.18215, 0.5), None),
        (TAESD, (4, 0.13025, 0.0), "taesdxl_encoder.safetensors and taesdxl_decoder.safetensors."),
        (TAESD, (16, 0.18215, 0.0), None),
        (TAESD, (16, 1.5305, 0.0609), "taesd3_encoder.safetensors and taesd3_decoder.safetensors."),
        (TAESD, (32, 1.0, 0.0), None),
        (TAEF2, (32, 1.0, 0.0), "vae_approx."),
        (TAEF2, (4, 0.18215, 0.0), None),
        ({"pool": (False, True)}, (32, 1.0, 0.0), None),
        (TAESANA, (4, 0.18215, 0.0), None),
    ],
)
def test_comfyui_knows_tiny_files_by_name_channels_and_factors(network, latents, copied):
    pools = network.get("pool", False)
    encoder, decoder = pools if isinstance(pools, tuple) else (pools, pools)
    kind = "taef2" if decoder else "taesana" if "stem" in network else "taesd"
    params = {"pool": encoder, "stem": network.get("stem")}
    channels, scaling, shift = latents
    model = SimpleNamespace(
        encoder=SimpleNamespace(node={"params": params}),
        decoder=SimpleNamespace(node={"params": {"pool": decoder}}),
        latent_channels=channels,
        for_diffusion={"scaling_factor": scaling, "shift_factor": shift},
        enlarge=1,
        pixel_range=EIGHT_BITS,
    )
    note, units = LAYOUTS["taesd"]().notes(model)
    assert units.startswith("latents: in a diffusion model's units")
    start = f"Copy {kind}_encoder.safetensors and {kind}_decoder.safetensors to ComfyUI/models/"
    assert note.startswith("ComfyUI takes" if copied is None else start)
    assert copied is None or note.endswith(copied)
    renamed = copied is not None and copied != "vae_approx."
    assert (", as " in note) == renamed


def test_formats_are_found_by_name_or_by_a_class():
    for name, kind in LAYOUTS.items():
        assert type(find_layout(name)) is kind
        assert type(find_layout(f"olvae.export.formats.{kind.__name__}")) is kind
    assert [LAYOUTS[name]().in_units(tiny_litevae()) for name in ("litevae", "comfyui")] == [
        False
    ] * 2
    with pytest.raises(ConfigError, match="`format` numpy: choose from litevae, diffusers"):
        find_layout("numpy")


def test_images_that_comfyui_does_not_have_are_refused():
    usual, deep, mixed = tiny_litevae(), tiny_litevae(), tiny_litevae()
    assert COMFYUI.misfit(usual) is None
    one_channel = grey()
    one_channel.pixel_range = EIGHT_BITS
    deep.pixel_range = PixelRange.from_node([0, 4095])
    for model in (one_channel, deep):
        assert COMFYUI.misfit(model).endswith("`format` litevae can hold it")
    mixed.decoder = TinyDecoder(8, 4, blocks=(1, 1))
    assert LAYOUTS["taesd"]().misfit(mixed).startswith("only TinyEncoder and TinyDecoder")


# ldm
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_ldm_export_has_the_published_names_bits_and_outputs(kind, tmp_path):
    before = autoencoder_kl((32, 64, 128, 128), **SHAPES[kind])
    file = tmp_path / "vae.safetensors"
    export(ours(before), file, LDM)
    written = load_file(file)
    assert_equal(written, latent_diffusion_names(before))
    # As anybody can look them up in vae-ft-mse-840000-ema-pruned.safetensors, at full width.
    for (
        name,
        shape,
    ) in {
        "encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.mid.attn_1.q.weight": (128, 128, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "decoder.up.3.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.norm_out.bias": (32,),
    }.items():
        assert written[name].shape == shape
    after = find_target(file).load().as_litevae("vae")
    assert_equal(after.state_dict(), ours(before).state_dict())
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = before.encode(x).latent_dist
        assert torch.equal(after.moments(x), z.parameters)
        assert torch.equal(after.decode(z.mode()), before.decode(z.mode()).sample)


def test_diffusers_reads_an_ldm_export(tmp_path):
    """Its single-file loader, with its own conversion of the names and the widths from a config."""
    before = autoencoder_kl()
    before.save_pretrained(tmp_path / "config")
    export(ours(before), tmp_path / "vae.safetensors", LDM)
    after = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "config")
    )
    assert_equal(after.state_dict(), before.state_dict())


def test_shapes_that_comfyui_does_not_build_are_noted():
    note = "ComfyUI and A1111 build Stable Diffusion's widths only, not "
    for shape, odd in (
        ({"widths": (32, 64)}, [f"{note}block_out_channels [32, 64]"]),
        (
            {"widths": (32,), "layers_per_block": 1},
            [f"{note}block_out_channels [32], layers_per_block 1"],
        ),
        (
            {"in_channels": 4, "out_channels": 4, "widths": (32, 64)},
            [f"{note}in_channels 4, out_channels 4, block_out_channels [32, 64]"],
        ),
    ):
        assert list(LDM.notes(ours(autoencoder_kl(**shape)))) == odd


def test_attention_that_comfyui_does_not_build_is_noted():
    narrow = {"widths": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    plain = ours(autoencoder_kl(**narrow))
    assert not [note for note in LDM.notes(plain) if "attention" in note]
    blocks = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
    blocks["up_block_types"] = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    attending = ours(autoencoder_kl(**narrow, **blocks))
    assert sum("attention in the middle only" in note for note in LDM.notes(attending)) == 1


@pytest.mark.parametrize(("values", "noted"), [(None, 0), ([0, 4095], 1)])
def test_monai_says_what_its_values_stand_for(values, noted):
    stated = PixelRange.from_node(values)
    encoder = SimpleNamespace(node={"params": {"values": (0, 1)}})
    model = SimpleNamespace(encoder=encoder, pixel_range=stated)
    loading, images, *more = LAYOUTS["monai"]().notes(model)
    assert loading.startswith("MONAI loads it")
    assert images.startswith("images are 0 to 1 there")
    assert more == ["these stand for values, 0 to 4095, linear"][:noted]


def test_pixel_range_that_a_format_does_not_hold_is_noted():
    model = tiny_litevae()
    model.pixel_range = PixelRange.from_node([0, 4095])
    node, *notes = COMFYUI.notes(model)
    assert node.startswith("this file needs the node in integrations/comfyui")
    assert notes == [
        "values of images, 0 to 4095, linear: "
        "what loads this format takes and gives [-1, 1] for them"
    ]
    assert not list(LAYOUTS["litevae"]().notes(model))
    model = ours(autoencoder_kl(widths=(32,)))
    model.pixel_range = PixelRange.from_node([0, 4095])
    for layout in (LDM, DIFFUSERS):
        assert next(layout.notes(model)).startswith("values of images, 0 to 4095")


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            LDM,
            {"norm_num_groups": 16},
            "16 groups: .* 32: `format` diffusers",
        ),
        (
            LDM,
            {"mid_block_add_attention": False},
            "no attention in the middle",
        ),
        (
            DIFFUSERS,
            None,
            "num_res_blocks 2, the decoder 3.*: `format` litevae can hold it$",
        ),
        (COMFYUI, {}, "an AutoencoderKL: `format` ldm is what ComfyUI loads"),
        (COMFYUI, {"norm_num_groups": 16}, "an AutoencoderKL: `format` diffusers$"),
    ],
)
def test_autoencoders_that_a_format_can_not_express_are_refused(layout, changes, message, tmp_path):
    model = ours(autoencoder_kl((32, 32), **(changes or {})))
    if changes is None:
        model.decoder.node["params"]["num_res_blocks"] = 3
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / f"vae{layout.suffix}", layout)
    assert not any(tmp_path.iterdir())


# comfyui; its node is tested in tests/integrations/test_comfyui.py
@pytest.mark.parametrize("fold", [False, True])
def test_comfyui_file_of_a_litevae_is_a_target(fold, tmp_path):
    model, file = tiny_litevae(), tmp_path / "vae.safetensors"
    model.set_for_diffusion(
        {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4, "force_upcast": True}
    )
    export(model, file, COMFYUI, ExportSettings(fold=fold))
    expected = (model.fold() if fold else model).state_dict()
    assert_equal(load_file(file), {f"olvae.{name}": tensor for name, tensor in expected.items()})
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["config"])["folded"] == fold
    (tmp_path / "config.json").write_text("{}")  # one that lies beside it does not count
    found = find_target(file)
    assert (found.name, found.config, found.run) == (str(file), {}, None)
    for loaded in (found.load(), LiteVAE.from_pretrained(file)):
        assert (loaded.for_diffusion, loaded.folded) == (model.for_diffusion, fold)
        assert_equal(loaded.state_dict(), expected)
    with pytest.warns(UserWarning, match="one kind"):
        find_target(file, raw=True)
    with pytest.raises(ValueError, match=r"encoder_config"):
        find_target(file, config=tmp_path / "config.json")  # one that is named does


def write_comfyui(model: LiteVAE, file: Path, /, **changes: object) -> None:
    """As an export, with another config in the header."""
    state = {f"olvae.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, file, metadata={"config": json.dumps({**model.export_config(), **changes})})


HARMFUL = {"target": "os.system", "params": {"command": "touch harmed"}}


def test_comfyui_files_build_networks_of_ours_only(tmp_path):
    write_comfyui(tiny_litevae(), tmp_path / "vae.safetensors", encoder_config=HARMFUL)
    with pytest.raises(ValueError, match=r"os\.system"):
        find_target(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("in_run", [False, True])
def test_training_config_in_a_safetensors_header_does_not_count(tmp_path, in_run):
    """Wherever the file lies: beside a run's config, that one counts."""
    model, file = tiny_litevae(), tmp_path / "checkpoints" / "vae.safetensors"
    file.parent.mkdir()
    write_comfyui(
        model, file, model={"params": {**model.config, "encoder_config": HARMFUL}}, data=HARMFUL
    )
    assert config_inside(file) is None
    if in_run:
        save({"model": {"params": model.config}}, tmp_path / "config.yaml")
        assert locate(file).config == {"model": {"params": model.config}}
    else:
        with pytest.raises(ValueError, match="no config"):
            find_target(file)


def test_flipped_bit_of_a_comfyui_file_is_seen(tmp_path):
    """Of the weights, and of the config in the header."""
    file = tmp_path / "vae.safetensors"
    export(tiny_litevae(), file, COMFYUI)
    whole, key = file.read_bytes(), b'scaling_factor\\": 0'
    for where in (len(whole) - 5, whole.index(key) + len(key) - 1):
        file.write_bytes(whole[:where] + bytes([whole[where] ^ 2]) + whole[where + 1 :])
        with pytest.raises(ValueError, match=r"vae.safetensors: damaged: its SHA-256"):
            LiteVAE.from_pretrained(file)
