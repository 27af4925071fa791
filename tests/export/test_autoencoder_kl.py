"""diffusers' AutoencoderKL through our networks, and back."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from olvae import LiteVAE
from olvae.export import folder as folder_module
from olvae.export.folder import Provenance, export
from olvae.models.loading.diffusers import DiffusersAutoencoder
from olvae.models.loading.stable_diffusion import as_litevae
from olvae.models.loading.targets import find_target
from olvae.models.spec import WEIGHTS_NAME
from olvae.modules.sdvae import set_padding
from tests.models.autoencoder_kl import PER_CHANNEL, SHAPES, autoencoder_kl

SOURCE = Provenance("sd", factors_from="from sd")


def ours(model: AutoencoderKL) -> LiteVAE:
    return as_litevae(DiffusersAutoencoder(model), "sd")


def reflecting(model: AutoencoderKL, *halves: str) -> LiteVAE:
    """Ours, whose encoder or decoder pads by reflection, as configs say it."""
    spec = ours(model)
    config = {
        **spec.config,
        **{
            f"{half}_config": {
                **spec.config[f"{half}_config"],
                "params": {**spec.config[f"{half}_config"]["params"], "padding": "reflect"},
            }
            for half in halves
        },
    }
    built = LiteVAE.from_config(**config).eval()
    built.load_state_dict(spec.state_dict())
    return built.set_for_diffusion(spec.for_diffusion)


def settings(model: AutoencoderKL) -> dict:
    return json.loads(json.dumps({name: value for name, value in model.config.items() if name[0] != "_"}))


def test_the_shapes_are_the_published_ones():
    counts = {name: len(autoencoder_kl(**shape).state_dict()) for name, shape in SHAPES.items()}
    assert counts == {"sd1": 248, "sdxl": 248, "sd3": 244, "flux": 244}


@pytest.mark.parametrize("shape", [*SHAPES.values(), PER_CHANNEL], ids=[*SHAPES, "per channel"])
def test_there_and_back(shape, tmp_path):
    before = autoencoder_kl(**shape)
    assert export(ours(before), tmp_path / "vae", SOURCE, stock=True) == {"in diffusers": 0.0}
    after, report = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(report.values())
    expected = before.state_dict()
    assert after.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
    assert settings(after) == {**settings(before), "shift_factor": before.config.shift_factor or 0.0}
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = before.encode(x).latent_dist
        assert torch.equal(after.encode(x).latent_dist.parameters, z.parameters)
        assert torch.equal(after.decode(z.mode()).sample, before.decode(z.mode()).sample)
    again = as_litevae(find_target(f"diffusers:{tmp_path / 'vae'}").load(), "vae")
    assert again.for_diffusion == ours(before).for_diffusion
    files = sorted(path.name for path in (tmp_path / "vae").iterdir())
    assert files == ["README.md", "config.json", WEIGHTS_NAME]
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["sdxl", "flux"])
def test_there_and_back_at_full_width(shape, tmp_path):
    before = autoencoder_kl((128, 256, 512, 512), **SHAPES[shape])
    export(ours(before), tmp_path / "vae", SOURCE, stock=True)
    after = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())


def test_half_precision(tmp_path):
    before = autoencoder_kl()
    export(ours(before), tmp_path / "vae", SOURCE, torch.float16, stock=True)
    written = load_file(tmp_path / "vae" / WEIGHTS_NAME)
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in before.state_dict().items())


def test_fp16_weights_whose_activations_overflow_are_no_failure(tmp_path):
    """As SDXL's: the weights fit, what fp16 computes of them does not, and the comparison is in float32."""
    model = autoencoder_kl(**SHAPES["sdxl"])
    with torch.no_grad():
        model.decoder.conv_in.weight *= 1e5
        model.decoder.conv_in.bias *= 1e3
    export(ours(model), tmp_path / "vae", SOURCE, torch.float16, stock=True)


@pytest.mark.parametrize("halves", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_reflect_padding(halves, tmp_path):
    """The folder's weights give our outputs once the padding is set, and others at the borders before."""
    model = reflecting(autoencoder_kl(), *halves)
    export(model, tmp_path / "vae", SOURCE, stock=True)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model(x)[0]
        assert (theirs(x).sample - expected).abs().max() > 1e-3
        for half in halves:
            set_padding(getattr(theirs, half), "reflect")
        torch.testing.assert_close(theirs(x).sample, expected, rtol=0, atol=1e-5)

    card = (tmp_path / "vae" / "README.md").read_text()
    assert f"| padding | reflect, in the {' and the '.join(halves)}; loaders have to set it" in card
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER_OR_ID", str(tmp_path / "vae"))
    names = {"images": x}
    exec(code.replace(".sample()  #", ".mode()  #"), names)  # the card's own lines
    torch.testing.assert_close(names["images"], expected, rtol=0, atol=1e-5)


def test_the_card(tmp_path):
    export(ours(autoencoder_kl(**PER_CHANNEL)), tmp_path / "vae", SOURCE, stock=True)
    card = (tmp_path / "vae" / "README.md").read_text()
    for text in (
        "tags: [autoencoder, vae]\n",
        "An autoencoder with the networks of diffusers' AutoencoderKL, f8 with 4 channels, made with open-LiteVAE.",
        "| scaling factor | 1 (from sd); a diffusion model takes (z - latents_mean) * scaling / latents_std |",
        "| latents_mean | 0.1, -0.2, 0.3, 0 |",
        "| latents_std | 1.5, 0.5, 2, 1 |",
        "AutoencoderKL.from_pretrained(",
    ):
        assert text in card
    assert "padding" not in card
    assert "shift factor" not in card


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("diffusers:stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("diffusers:/home/me/sd-vae", "sd-vae"),
        ("/home/me/vae.safetensors", "vae.safetensors"),
    ],
)
def test_the_card_names_the_teacher(teacher, name, tmp_path):
    config = {"model": {"params": {"teacher_config": {"params": {"autoencoder": teacher}}}}}
    export(ours(autoencoder_kl()), tmp_path / "vae", Provenance("a_run", config))
    card = (tmp_path / "vae" / "README.md").read_text()
    assert f"| latents | distilled from {name}: latents are those of {name} |" in card
    assert "AutoencoderLiteVAE.from_pretrained(" in card


def test_force_replaces_our_folders_only(tmp_path):
    """A stock folder that was downloaded looks like ours but for the card."""
    model = ours(autoencoder_kl())
    export(model, tmp_path / "vae", SOURCE, stock=True)
    with pytest.raises(FileExistsError, match=r"contains an export: --force replaces it"):
        export(model, tmp_path / "vae", SOURCE, stock=True)
    export(model, tmp_path / "vae", SOURCE, stock=True, force=True)
    autoencoder_kl().save_pretrained(tmp_path / "downloaded")
    (tmp_path / "downloaded" / "README.md").write_text("# A VAE\n")
    with pytest.raises(FileExistsError, match=r"not empty, and not an export"):
        export(model, tmp_path / "downloaded", SOURCE, stock=True, force=True)


def spoiled(write):
    def spoil(model, folder):
        write(model, folder)
        state = load_file(folder / WEIGHTS_NAME)
        state["decoder.conv_out.bias"] += 1e-6
        save_file(state, folder / WEIGHTS_NAME)

    return spoil


def with_other_factors(write):
    def spoil(model, folder):
        write(model, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "latents_std": [1.5, 0.5, 2.0, 1.1]}))

    return spoil


def of_another_function(write):
    def spoil(model, folder):
        write(model, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "norm_num_groups": 16}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoiled, "decoder.conv_out.bias differs from what was written"),
        (with_other_factors, "config.json: latents_std differs from what was written"),
        (of_another_function, "loading it with diffusers changes the result by"),
    ],
)
def test_what_differs_is_noticed_and_leaves_nothing(spoil, message, tmp_path, monkeypatch):
    write = folder_module.write_autoencoder_kl
    monkeypatch.setattr(folder_module, "write_autoencoder_kl", spoil(write))
    with pytest.raises(ValueError, match=message):
        export(ours(autoencoder_kl(**PER_CHANNEL)), tmp_path / "vae", SOURCE, stock=True)
    assert not any(tmp_path.iterdir())


def test_what_autoencoder_kl_can_not_express(tmp_path):
    model = ours(autoencoder_kl())
    model.decoder.node["params"]["num_res_blocks"] = 3
    with pytest.raises(ValueError, match=r"the encoder has num_res_blocks 2, the decoder 3"):
        export(model, tmp_path / "vae", SOURCE, stock=True)
    assert not any(tmp_path.iterdir())
