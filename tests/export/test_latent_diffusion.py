"""One file with latent-diffusion's names, against the published layout."""

from itertools import product

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from olvae.export import latent_diffusion as module
from olvae.export.latent_diffusion import export_latent_diffusion, not_stock
from olvae.models.loading.stable_diffusion import as_litevae
from olvae.models.loading.targets import find_target
from tests.export.test_autoencoder_kl import ours, reflecting
from tests.models.autoencoder_kl import SHAPES, autoencoder_kl
from tests.models.loading.names import latent_diffusion_names

WIDTHS = (128, 256, 512, 512)


def published(widths: tuple[int, ...] = WIDTHS, n_z: int = 4, quant: bool = True) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Stable Diffusion's VAE, typed from the layout of the published files."""
    out: dict[str, tuple[int, ...]] = {}

    def conv(name: str, into: int, of: int, side: int = 3) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (into, of, side, side), (into,)

    def norm(name: str, width: int) -> None:
        out[f"{name}.weight"] = out[f"{name}.bias"] = (width,)

    def block(name: str, into: int, of: int) -> None:
        norm(f"{name}.norm1", of)
        conv(f"{name}.conv1", into, of)
        norm(f"{name}.norm2", into)
        conv(f"{name}.conv2", into, into)
        if into != of:
            conv(f"{name}.nin_shortcut", into, of, 1)

    top, levels = widths[-1], len(widths)
    for half in ("encoder", "decoder"):
        conv(f"{half}.conv_in", *((widths[0], 3) if half == "encoder" else (top, n_z)))
        for i in (1, 2):
            block(f"{half}.mid.block_{i}", top, top)
        norm(f"{half}.mid.attn_1.norm", top)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{part}", top, top, 1)
        norm(f"{half}.norm_out", top if half == "encoder" else widths[0])
        conv(f"{half}.conv_out", *((2 * n_z, top) if half == "encoder" else (3, widths[0])))
    for i, j in product(range(levels), range(2)):
        before = widths[max(i - 1, 0)]
        block(f"encoder.down.{i}.block.{j}", widths[i], before if j == 0 else widths[i])
    for i, j in product(range(levels), range(3)):  # level 0 is the image's size, and comes last
        before = widths[min(i + 1, levels - 1)]
        block(f"decoder.up.{i}.block.{j}", widths[i], before if j == 0 else widths[i])
    for i in range(levels - 1):
        conv(f"encoder.down.{i}.downsample.conv", widths[i], widths[i])
        conv(f"decoder.up.{i + 1}.upsample.conv", widths[i + 1], widths[i + 1])
    if quant:
        conv("quant_conv", 2 * n_z, 2 * n_z, 1)
        conv("post_quant_conv", n_z, n_z, 1)
    return out


def test_the_list_has_the_published_names():
    """Some that anybody can look up in vae-ft-mse-840000-ema-pruned.safetensors, and their number."""
    names = published()
    assert len(names) == 248
    assert names["encoder.down.0.block.0.norm1.weight"] == (128,)
    assert names["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert names["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert names["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert names["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in names
    assert names["quant_conv.weight"] == (8, 8, 1, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_names_bits_and_outputs(shape, tmp_path):
    before = autoencoder_kl(**SHAPES[shape])
    file = tmp_path / "new" / "vae.safetensors"
    assert export_latent_diffusion(ours(before), file) == {"loaded back": 0.0}
    written = load_file(file)
    channels, quant = before.config.latent_channels, before.config.use_quant_conv
    assert {n: tuple(t.shape) for n, t in written.items()} == published((32, 64, 128, 128), channels, quant)
    expected = latent_diffusion_names(before)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    assert not_stock(ours(before)) == "block_out_channels [32, 64, 128, 128]"

    after = as_litevae(find_target(file).load(), "vae")
    mine = ours(before).state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in after.state_dict().items())
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = before.encode(x).latent_dist
        assert torch.equal(after.moments(x), z.parameters)
        assert torch.equal(after.decode(z.mode()), before.decode(z.mode()).sample)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert [path.name for path in file.parent.iterdir()] == ["vae.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["sd1", "flux"])
def test_at_full_width(shape, tmp_path):
    before = autoencoder_kl(WIDTHS, **SHAPES[shape])
    assert not_stock(ours(before)) is None
    export_latent_diffusion(ours(before), tmp_path / "vae.safetensors")
    written = load_file(tmp_path / "vae.safetensors")
    quant = before.config.use_quant_conv
    assert {n: tuple(t.shape) for n, t in written.items()} == published(WIDTHS, before.config.latent_channels, quant)
    expected = latent_diffusion_names(before)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    before = autoencoder_kl()
    export_latent_diffusion(ours(before), tmp_path / "vae.safetensors", dtype)
    expected = latent_diffusion_names(before)
    assert all(torch.equal(t, expected[n].to(dtype)) for n, t in load_file(tmp_path / "vae.safetensors").items())


def test_reflect_padding(tmp_path):
    """The weights are the same; what reads them pads with zeros until it is told."""
    plain = autoencoder_kl()
    export_latent_diffusion(reflecting(plain, "encoder", "decoder"), tmp_path / "vae.safetensors")
    expected = latent_diffusion_names(plain)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in load_file(tmp_path / "vae.safetensors").items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 16}, "GroupNorm with 16 groups: latent-diffusion always has 32"),
        ({"mid_block_add_attention": False}, "no attention in the middle: latent-diffusion always has it"),
    ],
)
def test_what_the_layout_can_not_express(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_latent_diffusion(ours(autoencoder_kl(**changes)), tmp_path / "vae.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_nothing_and_takes_nothing(tmp_path, monkeypatch):
    file, model = tmp_path / "vae.safetensors", ours(autoencoder_kl())
    read = module.from_latent_diffusion

    def other(*arguments):
        found = read(*arguments)
        with torch.no_grad():
            found.model.decoder.conv_out.bias += 1e-3
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "from_latent_diffusion", other)
        with pytest.raises(ValueError, match=r"loading it back changes the result by"):
            export_latent_diffusion(model, file)
        assert not any(tmp_path.iterdir())
    export_latent_diffusion(model, file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"vae.safetensors: exists: --force replaces it"):
        export_latent_diffusion(model, file)
    with monkeypatch.context() as patch:
        patch.setattr(module, "from_latent_diffusion", other)
        with pytest.raises(ValueError, match=r"loading it back changes the result by"):
            export_latent_diffusion(model, file, force=True)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]
    export_latent_diffusion(model, file, torch.bfloat16, force=True)
    assert file.read_bytes() != before


def test_where_a_file_can_not_go(tmp_path):
    model = ours(autoencoder_kl(widths=(32, 32)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place, kind, message in (
        ("folder", FileExistsError, "folder: a folder, but this format is one file: name it, as in .*vae.safetensors"),
        ("vae.ckpt", ValueError, r"vae.ckpt: this format is one file: its name ends with .safetensors"),
        ("file/vae.safetensors", FileExistsError, "file is a file"),
    ):
        with pytest.raises(kind, match=message):
            export_latent_diffusion(model, tmp_path / place, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_link_stays_a_link(tmp_path):
    """A file that stands for one on a larger disk: now and when it is replaced."""
    (tmp_path / "disk").mkdir()
    link, model = tmp_path / "vae.safetensors", ours(autoencoder_kl(widths=(32, 32)))
    link.symlink_to(tmp_path / "disk" / "vae.safetensors")
    for force in (False, True):
        export_latent_diffusion(model, link, force=force)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["vae.safetensors"]


def test_stock_shapes():
    for widths, odd in (
        ((128, 256, 512), None),
        ((32, 64), "block_out_channels [32, 64]"),
    ):
        assert not_stock(ours(autoencoder_kl(widths=widths))) == odd
    assert not_stock(ours(autoencoder_kl(widths=(32,), layers_per_block=1))) == (
        "block_out_channels [32], layers_per_block 1"
    )


def test_diffusers_reads_the_file(tmp_path):
    """Its single-file loader, with its own conversion of the names and the widths from a config."""
    before = autoencoder_kl()
    before.save_pretrained(tmp_path / "config")
    export_latent_diffusion(ours(before), tmp_path / "vae.safetensors")
    after = AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path / "config"))
    expected = before.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
