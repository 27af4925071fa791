"""MONAI's AutoencoderKL against records of it, and where tests are slow, against MONAI itself."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from olvae.checkpoint import header_of
from olvae.export.exporting import ExportSettings, export_target
from olvae.export.formats import LAYOUTS
from olvae.models.autoencoder import LiteVAE, Quantizer
from olvae.models.loading import monai_files
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.monai_files import (
    MonaiLoader,
    _half_params,
    _stated,
    monai_config,
)
from olvae.models.loading.targets import find_target
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.others.monai import MonaiDecoder, MonaiEncoder
from tests.export.latents import tiny_vae

RECORDS = Path(__file__).parents[2] / "reference" / "monai.json"
COMMON: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}
NO_MIDDLE = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
# Of these MONAI's outputs are recorded.
RECORDED: dict[str, dict[str, Any]] = {
    "attention": {
        "channels": [8, 16],
        "num_res_blocks": [1, 2],
        "attention_levels": [False, True],
        "norm_eps": 1e-3,
    },
    "transposed": {
        "channels": [8, 16, 24],
        "num_res_blocks": [1, 1, 2],
        "attention_levels": [True, False, False],
        "with_decoder_nonlocal_attn": False,
        "use_convtranspose": True,
        "use_combined_linear": True,
        "include_fc": False,
    },
}
OTHERS: list[dict[str, Any]] = [
    {"channels": [8], "num_res_blocks": [1], "attention_levels": [False], "in_channels": 3}
    | {"out_channels": 3},
    {"channels": [8, 16], "num_res_blocks": [2, 2], "attention_levels": [False, True], **NO_MIDDLE},
    {"channels": [8, 16], "num_res_blocks": [2, 1], "attention_levels": [True, True]},
    {"channels": [16, 8], "num_res_blocks": [3, 1], "attention_levels": [False] * 2, **NO_MIDDLE},
    {"channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, True]}
    | {"use_flash_attention": True, "with_encoder_nonlocal_attn": False},
]


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights that depend on names and shapes alone."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator) / 5 for name, shape in sorted(shapes.items())
    }


def image(channels: int = 1) -> Tensor:
    """In [0, 1]."""
    return (torch.arange(channels * 16 * 8).view(1, channels, 16, 8) % 23) / 22


def bundle(folder: Path, state: dict[str, Tensor], form: dict[str, Any], **ends: float) -> Path:
    """A bundle's folder: the file beside a diffusion model's, the config with a reference."""
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save({"net": {"x.weight": torch.zeros(2)}}, folder / "models" / "model.pt")
    torch.save(state, folder / "models" / "model_autoencoder.pt")
    network = {"_target_": "monai.networks.nets.AutoencoderKL", **form, "norm_num_groups": "@n"}
    scaled = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255}
    content = {
        "device": "$torch.device('cpu')",
        "n": form["norm_num_groups"],
        "preprocessing": [scaled | {"b_min": 0, "b_max": 1} | ends],
        "autoencoder_def": network,
    }
    (folder / "configs" / "train_autoencoder.json").write_text(json.dumps(content))
    (folder / "configs" / "metadata.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text())


@pytest.fixture
def attention(records, tmp_path) -> Path:
    state = drawn(records["attention"]["shapes"])
    return bundle(tmp_path / "bundle", state, {**COMMON, **RECORDED["attention"]})


def close(found: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected).view(found.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", RECORDED)
def test_networks_are_monais_and_written_again(name, records, tmp_path):
    record = records[name]
    state = drawn(record["shapes"])
    folder = bundle(tmp_path / "bundle", state, {**COMMON, **RECORDED[name]})
    model = find_target(folder).load()
    posterior = model.encode(2 * image() - 1)
    close(posterior.mean, record["mean"])
    close(posterior.std, record["std"])
    close((model.decode(posterior.mean) + 1) / 2, record["image"])

    out = tmp_path / "again.safetensors"
    _, notes = export_target(find_target(folder), out, ExportSettings(format="monai"))
    assert any("0 to 1 there" in note for note in notes)
    again = load_file(out)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    written = json.loads(header_of(out)["config"])
    assert written["images"] == {"b_min": 0.0, "b_max": 1.0}
    network, form = written["autoencoder_def"], {**COMMON, **RECORDED[name]}
    assert {key: network[key] for key in form} == form
    assert torch.equal(find_target(out).load()(image())[0], model(image())[0])


@torch.no_grad()
def test_the_file_alone_its_old_names_and_a_trainers_checkpoint(records, attention, tmp_path):
    """The config of the bundle says the norms' groups, wherever the file lies."""
    expected = find_target(attention).load().state_dict()
    file = attention / "models" / "model_autoencoder.pt"
    state = torch.load(file)
    old = {}
    for name, tensor in state.items():
        name = name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_")
        old[name.replace(".postconv.", ".conv.")] = tensor
    assert old.keys() != state.keys()
    elsewhere = tmp_path / "elsewhere.pt"
    config = attention / "configs" / "train_autoencoder.json"
    for content in (old, {"epoch": 3, "autoencoder": state}, {"model": old}):
        torch.save(content, elsewhere)
        found = find_target(elsewhere, config=config).load().state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    named = find_target(file).load().state_dict()
    assert all(torch.equal(tensor, named[name]) for name, tensor in expected.items())


def test_one_of_several_autoencoders_has_to_be_named(attention):
    file = attention / "models" / "model_autoencoder.pt"
    shutil.copy(file, file.with_name("best.pt"))
    with pytest.raises(FileNotFoundError, match=r"\(best.pt, model_autoencoder.pt\): name one"):
        find_target(attention)


def test_values_of_images_are_the_configs(records, tmp_path):
    form = {**COMMON, **RECORDED["attention"]}
    state = drawn(records["attention"]["shapes"])
    folder = bundle(tmp_path / "centred", state, form, b_min=-1, b_max=1)
    with torch.no_grad():
        mean = find_target(folder).load().encode(image()).mean
    close(mean, records["attention"]["mean"])


def test_a_file_without_a_config_has_monais_defaults_and_a_warning(records, tmp_path, monkeypatch):
    """A file in the working directory, too."""
    monkeypatch.chdir(tmp_path)
    torch.save(drawn(records["attention"]["shapes"]), "vae.pt")
    with (
        pytest.warns(UserWarning, match="norm_groups 32, norm_eps 1e-06, values") as warned,
        pytest.raises(ValueError, match="norm_num_groups, 32: "),
    ):
        MonaiLoader().find("vae.pt", LoadOptions())
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: (n, t[..., None] if t.ndim == 4 else t), "of 3 dimensions: only 2 are read"),
        (
            lambda n, t: (re.sub(r"(decoder.*norm1)\.", r"\1.mlp_gamma.conv.", n), t),
            "SPADE autoencoder, whose decoder takes a segmentation",
        ),
        (
            lambda n, t: (n.replace("encoder.blocks", "encoder.layers"), t),
            r"not the layers of MONAI's AutoencoderKL",
        ),
        (
            lambda n, t: (n.replace("blocks.3.norm2", "blocks.3.norm3"), t),
            "of another model: 4 mis",
        ),
    ],
)
def test_other_networks_are_refused_in_a_line(change, message, attention):
    file = attention / "models" / "model_autoencoder.pt"
    torch.save(dict(change(name, tensor) for name, tensor in torch.load(file).items()), file)
    with pytest.raises(ValueError, match=message) as raised:
        find_target(attention).load()
    assert str(raised.value).startswith(f"{attention}: ")
    assert "\n" not in str(raised.value)


def test_files_are_checked_at_a_load_alone_and_configs_are_received(attention, monkeypatch):
    """As somebody else's, which may not include others."""
    loader, checks, given = MonaiLoader(), [], []
    read, read_config = monai_files.read_checkpoint, monai_files.read_config
    monkeypatch.setattr(
        monai_files,
        "read_checkpoint",
        lambda file, check=True: checks.append(check) or read(file, check),
    )
    monkeypatch.setattr(
        monai_files,
        "read_config",
        lambda path, received=False: given.append(received) or read_config(path, received),
    )
    (attention / "models" / "notes.txt").touch()
    assert loader.accepts(str(attention))
    config = attention / "configs" / "train_autoencoder.json"
    target = loader.find(str(attention), LoadOptions(config=config))
    assert checks == [False] * 5  # two files, twice, and the one
    target.load()
    assert checks[5:] == [True]
    assert len(given) > 1
    assert all(given)


@pytest.mark.parametrize(("low", "high", "stated"), [(1, 1, False), (2, 1, False), (-1, 1, True)])
def test_values_of_images_begin_below_where_they_end(low, high, stated):
    found = dict(_stated({"b_min": low, "b_max": high}, {}))
    assert found == ({"values": [-1.0, 1.0]} if stated else {})


def test_a_quantizer_and_other_networks_are_not_monais():
    shape = {"channels": 8, "channel_mult": [1], "num_res_blocks": [1], "attention_levels": []}
    encoder = MonaiEncoder(4, norm_groups=4, in_channels=3, **shape)
    decoder = MonaiDecoder(z_channels=2, norm_groups=4, out_channels=3, **shape)
    assert monai_config(LiteVAE(encoder, decoder))["images"] == {"b_min": 0.0, "b_max": 1.0}
    with pytest.raises(ValueError, match="no other quantizer"):
        monai_config(LiteVAE(encoder, decoder, Quantizer(4, 2, 2)))
    ours = LiteVAE_Decoder(channels=8, z_channels=2, channel_mult=(1,), num_res_blocks=0)
    with pytest.raises(ValueError, match="only MonaiEncoder"):
        monai_config(LiteVAE(encoder, ours))


def test_an_encoder_of_many_levels_is_for_images_of_one_position():
    form = {"channel_mult": [1] * 10, "num_res_blocks": [1] * 10, "attention_levels": []}
    with torch.device("meta"):
        encoder = MonaiEncoder(
            4, channels=2, norm_groups=2, image_size=512, attention=False, **form
        ).state_dict()
    found = _half_params({f"encoder.{name}": t for name, t in encoder.items()}, "encoder")
    assert found["image_size"] == 512


def test_only_monais_networks_have_its_names():
    layout = LAYOUTS["monai"]()
    assert layout.misfit(tiny_vae()) is not None
    shape = {"channels": 8, "channel_mult": [1], "num_res_blocks": [1], "attention_levels": []}
    encoder = MonaiEncoder(4, norm_groups=4, **shape)
    other = type(tiny_vae())(encoder, MonaiDecoder(z_channels=2, norm_groups=8, **shape))
    assert "norm_groups 4, the decoder 8" in str(layout.misfit(other))
    for wrong in ({"num_res_blocks": [1, 1]}, {"attention_levels": [1]}):
        with pytest.raises(ValueError, match="1 levels"):
            MonaiEncoder(4, **{**shape, **wrong})


def monai_model(form: dict[str, Any]) -> Any:
    """MONAI's class, with drawn weights, and the shapes of its state."""
    from monai.networks.nets import AutoencoderKL

    model = AutoencoderKL(**form).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(drawn(shapes))
    return model, shapes


@torch.no_grad()
def record() -> dict[str, Any]:
    """What is in :data:`RECORDS`."""
    found = {}
    for name, form in RECORDED.items():
        model, shapes = monai_model({**COMMON, **form})
        mean, std = model.encode(image())
        outputs = {"mean": mean, "std": std, "image": model.decode(mean)}
        numbers = {key: tensor.flatten().tolist() for key, tensor in outputs.items()}
        found[name] = {"shapes": shapes, **numbers}
    return found


@pytest.mark.slow
def test_records_are_monais(records):
    for name, found in record().items():
        assert found.pop("shapes") == records[name]["shapes"]
        for key, numbers in found.items():
            close(torch.tensor(numbers), records[name][key])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("form", [*RECORDED.values(), *OTHERS])
def test_outputs_are_monais_both_ways(form, tmp_path):
    form = {**COMMON, **form}
    model, _ = monai_model(form)
    folder = bundle(tmp_path / "bundle", model.state_dict(), form)
    ours = find_target(folder).load()
    x = image(form["in_channels"])
    mean, std = model.encode(x)
    posterior = ours.encode(2 * x - 1)
    close(posterior.mean, mean)
    close(posterior.std, std)
    close((ours.decode(mean) + 1) / 2, model.decode(mean))

    # Other weights of ours, written, are MONAI's by its own reader.
    for parameter in ours.parameters():
        parameter.mul_(1.1)
    run = tmp_path / "ours.safetensors"
    save_file(LAYOUTS["monai"]().tensors(ours), run)
    model.load_state_dict(load_file(run))
    close(ours.encode(2 * x - 1).mean, model.encode(x)[0])
    close((ours.decode(mean) + 1) / 2, model.decode(mean))


@pytest.mark.slow
def test_old_names_are_read_as_monai_reads_them(tmp_path):
    form = {**COMMON, **RECORDED["attention"]}
    model, _ = monai_model(form)
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_")
        old[name.replace(".postconv.", ".conv.")] = tensor + 1
    model.load_old_state_dict(dict(old))
    folder = bundle(tmp_path / "bundle", old, form)
    written = LAYOUTS["monai"]().tensors(find_target(folder).load())
    assert all(torch.equal(written[name], t) for name, t in model.state_dict().items())


@pytest.mark.slow
def test_spade_and_three_dimensions_are_refused(tmp_path):
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL, SPADEAutoencoderKL

    small = {"channels": (8, 8), "num_res_blocks": (1, 1), "attention_levels": (False, False)}
    arguments = {**COMMON, **small}
    maisi = {"num_splits": 1, "dim_split": 0, "norm_float16": False, "print_info": False}
    models = {
        "SPADE autoencoder": SPADEAutoencoderKL(label_nc=2, **arguments),
        "of 3 dimensions": AutoencoderKL(**{**arguments, "spatial_dims": 3}),
        "AutoencoderKL of 3": AutoencoderKlMaisi(
            **{**COMMON, "spatial_dims": 3},
            **maisi,
            num_channels=(8, 8),
            norm_eps=1e-6,
            num_res_blocks=(1, 1),
            attention_levels=(False, False),
        ),
    }
    for message, model in models.items():
        torch.save(model.state_dict(), tmp_path / "vae.pt")
        with (
            pytest.warns(UserWarning, match="no config"),
            pytest.raises(ValueError, match=message),
        ):
            find_target(tmp_path / "vae.pt")


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("combined", [True, False])
def test_arguments_of_a_half_are_read_from_its_tensors(attention, combined):
    """Those that its network was made of."""
    form = {
        "channels": 4,
        "channel_mult": [2, 1, 3],
        "num_res_blocks": [1, 3, 2],
        "attention": attention,
        "attention_levels": [1],
        "include_fc": not combined,
        "combined_linear": combined,
    }
    groups = {"norm_groups": 2}
    ends = {"latent_dim": 10, "in_channels": 2, "image_size": 256}
    encoder = MonaiEncoder(**form, **groups, **ends).state_dict()
    found = _half_params({f"encoder.{name}": t for name, t in encoder.items()}, "encoder")
    assert found == form | ends
    ends = {"z_channels": 5, "out_channels": 2, "convtranspose": combined}
    decoder = MonaiDecoder(**form, **groups, **ends).state_dict()
    found = _half_params({f"decoder.{name}": t for name, t in decoder.items()}, "decoder")
    assert found == form | ends
