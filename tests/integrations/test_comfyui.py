"""The node for ComfyUI, on a stub of what ComfyUI gives to nodes,
and the names that ComfyUI's own loader looks for."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import olvae
from olvae import LiteVAE
from olvae.export.exporting import ExportSettings, export
from olvae.export.formats import LAYOUTS
from tests.export.tiny import tiny_litevae

COMFYUI = LAYOUTS["comfyui"]()

NODE = Path(__file__).parent.parent.parent / "integrations" / "comfyui"

LOOKED_FOR = [
    "decoder.up_blocks.0.resnets.0.norm1.weight",
    "decoder.mid.block_1.mix_factor",
    "taesd_decoder.1.weight",
    "vquantizer.codebook.weight",
    "backbone.1.0.block.0.1.num_batches_tracked",
    "blocks.11.num_batches_tracked",
    "encoder.backbone.1.0.block.0.1.num_batches_tracked",
    "decoder.conv_in.weight",
    "decoder.layers.1.layers.0.beta",
    "blocks.2.blocks.3.stack.5.weight",
    "decoder.blocks.2.blocks.3.stack.5.weight",
    "layers.4.layers.1.attn_block.attn.qkv.weight",
    "encoder.layers.4.layers.1.attn_block.attn.qkv.weight",
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
    "decoder.conv_in.conv.weight",
    "decoder.unpatcher3d.wavelets",
    "decoder.middle.0.residual.0.gamma",
    "geo_decoder.cross_attn_decoder.ln_1.bias",
    "vocoder.backbone.channel_layers.0.0.bias",
    "pixel_space_vae",
    "vocoder.activation_post.downsample.lowpass.filter",
    "decoder.22.bias",
    "vocoder.resblocks.0.convs1.0.weight",
    "vocoder.vocoder.resblocks.0.convs1.0.weight",
    "pre_block.attn.zero_k_bias",
]
"""Names of which one tells ComfyUI's loader what an autoencoder is (comfy/sd.py, VAE.__init__, as
read in November 2026). Without any of them it warns "No VAE weights detected", and then fails with
"ERROR: VAE is invalid: None"."""


@pytest.fixture
def model() -> LiteVAE:
    factors = {"scaling_factor": 0.5, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    return tiny_litevae().set_for_diffusion(factors)


@pytest.fixture
def vae_folder(tmp_path) -> Path:
    (tmp_path / "models" / "vae").mkdir(parents=True)
    return tmp_path / "models" / "vae"


@pytest.fixture
def node(vae_folder, monkeypatch):
    """The node package, imported from its folder as ComfyUI does,
    with ComfyUI's modules on the CPU."""
    paths, comfy, management = (
        ModuleType(n) for n in ("folder_paths", "comfy", "comfy.model_management")
    )
    folders = {"vae": vae_folder}
    paths.get_filename_list = lambda kind: sorted(path.name for path in folders[kind].iterdir())
    paths.get_full_path = lambda kind, name: (
        str(folders[kind] / name) if (folders[kind] / name).is_file() else None
    )
    for name in ("vae_device", "vae_offload_device", "intermediate_device"):
        setattr(management, name, lambda: torch.device("cpu"))
    comfy.model_management = management
    for module in (paths, comfy, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("custom_nodes_litevae", NODE / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, package)
    monkeypatch.delitem(sys.modules, f"{spec.name}.vae", raising=False)
    spec.loader.exec_module(package)
    yield package
    sys.modules.pop(f"{spec.name}.vae", None)


def load(node, name: str = "litevae.safetensors", **inputs):
    """What ComfyUI does with a node: its class by name, its function by name."""
    kind = node.NODE_CLASS_MAPPINGS["LoadLiteVAE"]
    assert node.NODE_DISPLAY_NAME_MAPPINGS["LoadLiteVAE"] == "Load LiteVAE"
    assert kind.RETURN_TYPES == ("VAE",)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        (vae,) = getattr(kind(), kind.FUNCTION)(vae_name=name, **inputs)
    return vae


def test_the_node_uses_public_names_alone():
    """Later versions of the package keep these."""
    imported = [
        node
        for path in NODE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and "olvae" in ast.unparse(node)
    ]
    names = {alias.name for node in imported for alias in node.names}
    assert names == {"LiteVAE", "GIB", "config_inside"}
    assert {node.module for node in imported} == {"olvae"}
    assert names <= set(olvae.__all__)


def test_the_stock_loader_recognises_the_plain_export_and_not_this_one(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    (plain,) = (tmp_path / "plain").glob("*.safetensors")
    assert "decoder.conv_in.weight" in {*LOOKED_FOR} & {*load_file(plain)}
    export(model, tmp_path / "vae.safetensors", COMFYUI)
    assert not {*LOOKED_FOR} & {*load_file(tmp_path / "vae.safetensors")}


@pytest.mark.parametrize("fold", [False, True])
def test_comfyui_encode_and_decode_are_the_models(node, model, vae_folder, fold):
    export(model, vae_folder / "litevae.safetensors", COMFYUI, ExportSettings(fold=fold))
    (names,) = node.LoadLiteVAE.INPUT_TYPES()["required"]["vae_name"]
    assert names == ["litevae.safetensors"]
    vae = load(node)
    assert vae.first_stage_model.folded == fold
    assert (vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio, vae.output_channels) == (
        4,
        8,
        8,
        3,
    )
    assert (vae.spacial_compression_encode(), vae.spacial_compression_decode()) == (8, 8)
    assert vae.temporal_compression_decode() is None
    pixels = torch.rand(2, 24, 32, 3)  # (B, H, W, C)
    with torch.no_grad():
        z = model.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).mode()
        image = (model.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(vae.encode(pixels), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), image, rtol=1e-4, atol=1e-5)
    assert vae.decode(z).shape == (2, 24, 32, 3)
    # a video of one frame
    torch.testing.assert_close(vae.decode(z[:, :, None]), image, rtol=1e-4, atol=1e-5)


def test_comfyuis_tiled_nodes_give_the_same(node, model, vae_folder):
    """As VAEDecodeTiled and VAEEncodeTiled call them; also in little memory."""
    export(model, vae_folder / "litevae.safetensors", COMFYUI)
    pixels = torch.rand(1, 64, 96, 3)
    vae, small = load(node), load(node, memory_gib=0.0005)
    z = vae.encode(pixels)
    tiles = vae.encode_tiled(pixels, tile_x=64, tile_y=64, overlap=16, tile_t=None, overlap_t=None)
    for tiled in (tiles, small.encode(pixels)):
        torch.testing.assert_close(tiled, z, rtol=1e-4, atol=1e-5)
    image = vae.decode(z)
    tiles = vae.decode_tiled(z, tile_x=3, tile_y=5, overlap=1, tile_t=None, overlap_t=None)
    for tiled in (tiles, small.decode(z)):
        torch.testing.assert_close(tiled, image, rtol=1e-4, atol=1e-5)


def test_comfyui_node_crops_sides_around_the_middle(node, model, vae_folder):
    export(model, vae_folder / "litevae.safetensors", COMFYUI)
    vae = load(node)
    pixels = torch.rand(1, 21, 30, 4)  # with alpha
    torch.testing.assert_close(
        vae.encode(pixels), vae.encode(pixels[:, 2:18, 3:27, :3]), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"30x7 .*8"):
        vae.encode(pixels[:, :7])


def test_comfyui_node_moves_the_model_between_devices(node, model, vae_folder, monkeypatch):
    """Moved to the device for the work, with memory asked for, and back, also after an error."""
    export(model, vae_folder / "litevae.safetensors", COMFYUI)
    vae = load(node)
    moves, asked = [], []
    to = LiteVAE.to
    monkeypatch.setattr(
        LiteVAE, "to", lambda self, device: moves.append(str(device)) or to(self, "cpu")
    )
    management = sys.modules["comfy.model_management"]
    management.free_memory = lambda memory, device: asked.append((memory, str(device)))
    z = torch.zeros(1, 4, 2, 2)
    vae.device, vae.offload_device = torch.device("meta"), torch.device("cpu")
    with pytest.raises(RuntimeError):  # the weights stay on the CPU here, the latent does not
        vae.decode(z)
    assert moves == ["meta", "cpu"]
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert asked == [(weights + 2 * 2**30, "meta")]


def test_bad_input_of_the_comfyui_node_is_one_line(node, model, vae_folder):
    model.save_pretrained(vae_folder / "plain")
    (vae_folder / "plain" / "diffusion_pytorch_model.safetensors").rename(
        vae_folder / "plain.safetensors"
    )
    save_file({"x": torch.zeros(1)}, vae_folder / "other.safetensors", metadata={"config": "{"})
    (vae_folder / "broken.safetensors").write_bytes(b"nothing")
    (vae_folder / "old.pt").write_bytes(b"nothing")
    for name in ("plain.safetensors", "other.safetensors", "broken.safetensors", "old.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a LiteVAE") as caught:
            load(node, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="missing: no such"):
        load(node, "missing")
    export(model, vae_folder / "litevae.safetensors", COMFYUI)
    with pytest.raises(ValueError, match=r"16 channels, .* have 4"):
        load(node).decode(torch.zeros(1, 16, 2, 2))
    content = (vae_folder / "litevae.safetensors").read_bytes()
    (vae_folder / "litevae.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"litevae.safetensors: not a"):
        load(node)
