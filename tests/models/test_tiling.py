import subprocess
import sys
from pathlib import Path

import pytest
import torch

from olvae import LiteVAE
from olvae.models.autoencoder import Quantizer
from olvae.models.memory import GIB
from olvae.models.tiling import decode_tiled, split, tile_bytes, tile_for
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.sdvae import SDDecoder, SDEncoder
from tests.models.test_receptive import CONFIGURATIONS

ROOT = Path(__file__).parent.parent.parent


def autoencoder(quantizer: bool = False, **arguments) -> LiteVAE:
    levels = len(arguments["channel_mult"]) - 1
    half = LiteVAE_Decoder(channels=8, z_channels=4, **arguments)
    encoder = LiteVAE_Encoder(8, "S", dct_levels=levels)
    return LiteVAE(encoder, half, Quantizer(8, 4, 4) if quantizer else None).eval()


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_tiles_give_the_untiled_image(arguments):
    vae = autoencoder(**arguments)
    z = torch.randn(1, 4, 7, 11)
    with torch.no_grad():
        whole = vae.decode(z)
    for tile in (1, 3, 4, 8, 99):
        for model in (vae, vae.fold()) if tile == 4 else (vae,):
            assert (decode_tiled(model, z, tile) - whole).abs().max() < 1e-4 * whole.std().clamp(max=1.0)


def test_batches_quantizer_and_latents_larger_than_the_field():
    vae = autoencoder(True, channel_mult=(1, 1), num_res_blocks=0)
    z = torch.randn(2, 4, 50, 37)
    with torch.no_grad():
        whole = vae.decode(z)
    fractions = []
    tiled = decode_tiled(vae, z, 13, progress=fractions.append)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert fractions == [i / 12 for i in range(1, 13)]
    torch.testing.assert_close(decode_tiled(vae, z, memory=2**21), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", [c for c in CONFIGURATIONS if c["num_res_blocks"] < 2])
def test_a_seam_would_be_seen(arguments, monkeypatch):
    """With every stage reaching one position less, the tiles differ by more than the tolerance."""
    vae = autoencoder(**arguments)
    z = torch.randn(1, 4, 12, 12)
    short = [stage._replace(reach=max(0, stage.reach - 1)) for stage in vae.decoder.stages()]
    with torch.no_grad():
        whole = vae.decode(z)
        monkeypatch.setattr(vae.decoder, "stages", lambda: short)
        assert (decode_tiled(vae, z, 5) - whole).abs().max() > 1e-3


def test_half_precision_under_autocast():
    vae = autoencoder(channel_mult=(1, 1), num_res_blocks=0)
    z = torch.randn(1, 4, 9, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tiled, whole = decode_tiled(vae, z, 4), vae.decode(z)
    assert tiled.dtype == torch.float32
    torch.testing.assert_close(tiled, whole.float(), rtol=0, atol=0.05)


def test_the_tile_is_the_largest_within_the_memory():
    half = LiteVAE_Decoder(channels=16, z_channels=4)
    shape = (1, 4, 100, 80)
    tile = tile_for(half, 2**24, shape)
    assert tile_bytes(half, tile, shape) <= 2**24 < tile_bytes(half, tile + 1, shape)
    assert tile_for(half, 64 * GIB, shape) == 100
    with pytest.raises(ValueError, match=r"the smallest tile takes 0\.\d*[1-9]\d* GiB, more than 9\.31e-07: allow"):
        tile_for(half, 1000, shape)


MEASURE = """
import sys
import torch
from olvae.models.receptive import decode_window
from olvae.models.tiling import tile_bytes
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder

torch.set_num_threads(1)
def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

decoder = LiteVAE_Decoder(channels=48, channel_mult=(1, 2, 2, 2), num_res_blocks=0, variant=sys.argv[1]).eval()
z = torch.randn(1, 12, 90, 90)
stages = decoder.stages()
with torch.no_grad():
    decode_window(stages, z, ((0, 16), (0, 16)))
    computed = tile_bytes(decoder, 40, z.shape)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    decode_window(stages, z, ((200, 520), (200, 520)))
print(computed, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("variant", ["open_litevae", pytest.param("paper_smc", marks=pytest.mark.slow)])
def test_the_computed_memory_is_honest(variant):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, variant], cwd=ROOT, capture_output=True, text=True, check=True
    )
    computed, measured = (int(word) / 2**20 for word in done.stdout.split())
    assert computed > 100
    assert 0.6 * computed < measured < 1.1 * computed + 16


def sd() -> LiteVAE:
    shape = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 0, "norm_groups": 4}
    return LiteVAE(SDEncoder(latent_dim=8, image_size=16, **shape), SDDecoder(z_channels=4, **shape)).eval()


def test_stable_diffusions_decoder_is_not_tiled():
    z = torch.randn(1, 4, 6, 5)
    with pytest.raises(ValueError, match="SDDecoder sees the whole latent"):
        decode_tiled(sd(), z, tile=4)
    with pytest.raises(ValueError, match="can't be tiled; decoding 10x12 pixels whole takes"):
        decode_tiled(sd(), z, memory=100)
    vae = sd()
    with torch.no_grad():
        torch.testing.assert_close(decode_tiled(vae, z, memory=GIB), vae.decode(z))


def test_mistakes():
    vae = autoencoder(channel_mult=(1, 1), num_res_blocks=0)
    z = torch.randn(1, 4, 2, 2)
    for both in ({}, {"tile": 1, "memory": 1}):
        with pytest.raises(ValueError, match="a tile or a memory"):
            decode_tiled(vae, z, **both)
    with pytest.raises(ValueError, match="at least one latent position, got 0"):
        decode_tiled(vae, z, tile=0)


def test_pieces_are_even():
    assert split(10, 4, 8) == [(0, 24), (24, 48), (48, 80)]
    assert split(3, 9, 8) == [(0, 24)]
    for size, tile in ((250, 59), (7, 3), (13, 1)):
        pieces = split(size, tile, 1)
        assert [place for piece in pieces for place in range(*piece)] == list(range(size))
        assert max(b - a for a, b in pieces) <= tile


@pytest.mark.gpu
def test_tiles_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = autoencoder(channel_mult=(1, 2, 4, 4), num_res_blocks=2).cuda()
    z = torch.randn(1, 4, 50, 37, device="cuda")
    with torch.no_grad():
        assert (decode_tiled(vae, z, 13) - vae.decode(z)).abs().max() < 1e-4


@pytest.mark.slow
def test_the_published_decoder_on_768x512():
    vae = LiteVAE(LiteVAE_Encoder(24, "B"), LiteVAE_Decoder()).eval().fold()
    z = torch.randn(1, 12, 64, 96)
    with torch.no_grad():
        whole = vae.decode(z)
    assert (decode_tiled(vae, z, 40) - whole).abs().max() < 1e-4 * whole.std()  # fresh weights: far below 1
