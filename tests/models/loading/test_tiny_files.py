"""Files of tiny autoencoders: TAESD's, TAEF2's and TAESANA's names and shapes, random weights,
against plain networks.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olvae import LiteVAE
from olvae.export.exporting import ExportSettings, export_target
from olvae.export.formats import LAYOUTS
from olvae.models.loading import tiny_files
from olvae.models.loading.loader import LoadOptions
from olvae.models.loading.targets import find_target
from olvae.models.loading.tiny_files import TinyLoader
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from tests.models.files import same_weights


def conv(a: int, b: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


class Bound(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class Block(nn.Module):
    def __init__(self, width: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
        )
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return (self.conv(x) + x).relu()


def down(width: int, pooled: bool = False) -> Iterable[nn.Module]:
    return conv(width, width, stride=2, bias=False), *(Block(width, pooled) for _ in range(3))


def up(width: int, narrower: int, pooled: bool = False) -> Iterable[nn.Module]:
    blocks = [Block(width, pooled) for _ in range(3)]
    return *blocks, nn.UpsamplingNearest2d(scale_factor=2), conv(width, narrower, bias=False)


def plain(kind: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder as published, by facts.md 12, with random weights."""
    torch.manual_seed(5)
    if kind == "taesana":
        encoder = [conv(3, 32, stride=2), nn.ReLU(), conv(32, 64, stride=2), nn.ReLU(), Block(64)]
        encoder += [*down(64), *down(64), *down(64), conv(64, 32)]
        decoder = [Bound(), conv(32, 256), nn.ReLU(), *up(256, 128), *up(128, 64)]
        decoder += [*up(64, 64), *up(64, 64), *up(64, 64), Block(64), conv(64, 3)]
    else:
        pooled, n_z = (True, 32) if kind == "taef2" else (False, 4)
        encoder = [conv(3, 64), Block(64), *down(64), *down(64), *down(64, pooled), conv(64, n_z)]
        decoder = [Bound(), conv(n_z, 64), nn.ReLU(), *up(64, 64, pooled), *up(64, 64)]
        decoder += [*up(64, 64), Block(64), conv(64, 3)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


KINDS = ["taesd", "taef2", "taesana"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


def publish(kind: str, folder: Path) -> None:
    """Write the two files as they are published: pickles, in float16 where TAEF2's are."""
    for half, network in zip(("encoder", "decoder"), plain(kind), strict=True):
        state = network.state_dict()
        if kind == "taef2":
            state = {name: tensor.half() for name, tensor in state.items()}
        torch.save(state, folder / f"{kind}_{half}.pth")


@pytest.fixture(scope="module")
def networks(kind) -> tuple[nn.Sequential, nn.Sequential]:
    """Those that are published, rounded to float16 where TAEF2's are; not to be changed."""
    halves = plain(kind)
    if kind == "taef2":
        for network in halves:
            network.half().float()
    return halves


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    """Of the published files; not to be changed."""
    folder = tmp_path_factory.mktemp(kind)
    publish(kind, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> LiteVAE:
    """Of the folder; not to be changed."""
    return find_target(folder).load()


@torch.no_grad()
def test_tiny_files_are_the_published_networks(kind, folder, networks, loaded):
    encoder, decoder = networks
    image = torch.rand(1, 3, 32, 64) if kind == "taesana" else torch.rand(1, 3, 16, 24)
    z = encoder(image)
    assert loaded.downscale == image.shape[-1] // z.shape[-1]
    assert loaded.latent_channels == z.shape[1]
    assert loaded.encode(2 * image - 1).deterministic
    decoded = loaded.decode(z)
    torch.testing.assert_close(loaded.encode(2 * image - 1).mean, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, 2 * decoder(z) - 1, rtol=0, atol=1e-5)
    if kind == "taef2":
        with pytest.raises(ValueError, match="whole latent"):
            loaded.decode_tiled(z, tile=4)
    else:
        torch.testing.assert_close(loaded.decode_tiled(z, tile=1), decoded)
    # Either half's file names the whole.
    for half in ("encoder", "decoder"):
        assert same_weights(find_target(folder / f"{kind}_{half}.pth").load(), loaded)


@torch.no_grad()
def test_tiny_files_are_written_again(kind, folder, loaded, tmp_path):
    """And our own folder is a TARGET, with ComfyUI's names."""
    out = tmp_path / "out"
    settings = ExportSettings(format="taesd")
    _, notes = export_target(find_target(folder), out, settings)
    for half in ("encoder", "decoder"):
        before = torch.load(folder / f"{kind}_{half}.pth", weights_only=True)
        after = load_file(out / f"{kind}_{half}.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].float(), after[name]) for name in before)
    assert ("taef2_decoder.safetensors to ComfyUI/models/vae_approx." in notes[0]) == (
        kind == "taef2"
    )
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(image)[0], find_target(out).load()(image)[0])


def test_only_taesds_networks_are_of_a_class_of_diffusers(kind, loaded):
    misfit = LAYOUTS["diffusers"]().misfit(loaded)
    assert (misfit is None) == (kind == "taesd")
    assert misfit is None or "`format` taesd" in misfit
    assert LAYOUTS["litevae"]().misfit(loaded) is None
    assert (LAYOUTS["comfyui"]().misfit(loaded) is None) == (kind != "taesd")


@pytest.fixture
def taesd(tmp_path) -> Path:
    for half, network in zip(("encoder", "decoder"), plain("taesd"), strict=True):
        save_file(network.state_dict(), tmp_path / f"taesd_{half}.safetensors")
    return tmp_path


def test_one_file_with_both_halves_as_in_comfyui(taesd):
    expected = find_target(taesd).load().state_dict()
    both = {}
    for half in ("encoder", "decoder"):
        for name, tensor in load_file(taesd / f"taesd_{half}.safetensors").items():
            both[f"taesd_{half}.{name}"] = tensor
    save_file(both, taesd / "both.safetensors")
    found = find_target(taesd / "both.safetensors").load().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_half_of_an_autoencoder_and_another_architecture_are_one_line(taesd):
    file = taesd / "taesd_encoder.safetensors"
    state = load_file(file)
    del state["14.bias"]
    save_file(state, file)
    with pytest.raises(ValueError, match="of TAESD"):
        find_target(taesd).load()
    flat = {**state, "14.bias": torch.zeros(4), "0.weight": torch.zeros(64)}
    save_file(flat, file)
    with pytest.raises(ValueError, match=r"TAESANA: no kernel in encoder\.layers\.0\.weight$"):
        find_target(taesd).load()
    del state["3.conv.2.weight"]
    save_file({**state, "14.bias": torch.zeros(4)}, file)
    with pytest.raises(ValueError, match=r"model: 1 missing \(encoder\.layers\.3\.conv\.2"):
        find_target(taesd).load()
    file.unlink()
    decoder = taesd / "taesd_decoder.safetensors"
    for target in (decoder, taesd):
        with pytest.raises(FileNotFoundError, match=r"decoder alone: .*taesd_encoder\.safetens"):
            find_target(target)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_of_blocks_alone_is_one_line(half, taesd):
    file = taesd / f"taesd_{half}.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".conv." in name}, file)
    with pytest.raises(ValueError, match=f"^{taesd}: .*TAESANA: no first and last .*its {half}$"):
        find_target(taesd).load()


def test_a_decoder_without_its_last_layer_or_with_another_is_named(taesd):
    file = taesd / "taesd_decoder.safetensors"
    state = load_file(file)
    bias = state.pop("19.bias")
    save_file(state, file)
    with pytest.raises(ValueError, match=rf"^{taesd}: .*TAESANA: no first and last .*its decoder$"):
        find_target(taesd).load()
    save_file({**state, "19.bias": bias, "20.weight": torch.zeros(3, 3, 3, 3)}, file)
    with pytest.raises(ValueError, match=rf"^{taesd}: .*levels"):
        find_target(taesd).load()


@pytest.mark.parametrize(
    ("n_z", "pool", "known"), [(32, True, True), (12, True, False), (32, False, False)]
)
def test_only_flux2s_network_is_called_taef2_for_comfyui(n_z, pool, known):
    """Factors that nobody measured are 1 and 0, TAEF2's."""
    model = LiteVAE(TinyEncoder(2 * n_z, pool=pool), TinyDecoder(z_channels=n_z, pool=True))
    note = next(LAYOUTS["taesd"]().notes(model))
    assert ("models/vae_approx" in note) == known


def test_files_are_checked_at_a_load_alone_and_options_are_ignored(taesd, tmp_path, monkeypatch):
    loader, read, checks = TinyLoader(), tiny_files.read_checkpoint, []
    monkeypatch.setattr(
        tiny_files,
        "read_checkpoint",
        lambda file, check=True: checks.append(check) or read(file, check),
    )
    text = str(taesd)
    assert loader.accepts(text)
    with pytest.warns(UserWarning, match="ignored") as warned:
        found = loader.find(text, LoadOptions(config="a.yaml", raw=True))
    assert [(str(one.message).partition("`")[2], one.filename) for one in warned] == [
        ("config` is ignored", __file__),
        ("raw` is ignored", __file__),
    ]
    assert (checks, found.name) == ([False] * 3, text)
    found.load()
    assert checks[3:] == [True, True]
    # No file, no weights, or several halves of one kind.
    (tmp_path / "notes.txt").touch()
    assert not loader.accepts(str(tmp_path / "missing.pth"))
    assert not loader.accepts(str(tmp_path / "notes.txt"))
    (tmp_path / "other_encoder.safetensors").touch()
    assert not loader.accepts(text)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ({"blocks": [2, 0, 1], "pool": False, "stem": []}, {"blocks": [0, 1, 3], "pool": False}),
        ({"blocks": [1, 2], "pool": True, "stem": [4, 8]}, {"blocks": [1, 0, 2, 1], "pool": True}),
    ],
)
@pytest.mark.parametrize("multiples", [None, (1, 1, 2, 2)])
def test_shapes_say_the_arguments_of_both_halves(encoder, decoder, multiples):
    """Of grey images and latents of five channels."""
    encoder = {**encoder, "channels": 8, "latent_dim": 10, "in_channels": 1}
    decoder = {**decoder, "channels": 4, "z_channels": 5, "out_channels": 1}
    decoder["channel_mult"] = multiples and [*multiples][: len(decoder["blocks"])]
    halves = {"encoder": TinyEncoder(**encoder), "decoder": TinyDecoder(**decoder)}
    state = {}
    for half, network in halves.items():
        state |= {f"{half}.{name}": tensor for name, tensor in network.state_dict().items()}
    spec = tiny_files._spec(state, "it")
    assert spec.encoder_config["params"] == encoder
    assert spec.decoder_config["params"] == decoder
    assert spec.embed_dim == 5
    other = TinyDecoder(**{**decoder, "z_channels": 4}).state_dict()
    state |= {f"decoder.{name}": tensor for name, tensor in other.items()}
    with pytest.raises(ValueError, match="it: the encoder makes 5 channels, the decoder 4"):
        tiny_files._spec(state, "it")


def test_latents_are_converted_to_another_models_units(taesd):
    model, image = find_target(taesd).load(), torch.rand(1, 3, 16, 16)
    z, decoded = model.encode(image).mean, model(image)[0]
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 5.0)
    model.use_latents(mean, std)
    torch.testing.assert_close(
        model.encode(image).mean, 5 * z + mean[:, None, None], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(model(image)[0], decoded)
    unknown = find_target(taesd).fresh()
    assert isinstance(unknown.encoder, TinyEncoder)
