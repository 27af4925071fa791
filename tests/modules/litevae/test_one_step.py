"""The one-step decoder: it starts as the plain one, and its noise belongs to the place."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.models.large.tiling import decode_tiled, peak_bytes, receptive_field, tile_bytes
from olvae.modules.base import last_convolution
from olvae.modules.counting import count_macs, count_parameters
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder, reach_of
from olvae.modules.litevae.one_step import (
    HARMONICS,
    NOISE_POSITIONS,
    Injection,
    OneStepDecoder,
)
from olvae.modules.litevae.smc import SMC, fold_smc

OUTPUTS = ("image", "wavelet", "packets")


def arguments(output: str = "image", **other) -> dict:
    given = {"variant": "paper_smc", "num_res_blocks": 0, "linear": True, **other}
    return {"channels": 4, "z_channels": 2, "channel_mult": (1, 2, 2), "output": output, **given}


def random_weights(decoder: nn.Module, std: float = 0.3) -> nn.Module:
    for p in decoder.parameters():
        nn.init.normal_(p, std=std)
    return decoder.double().eval()


def one_step(output: str = "image", **other) -> OneStepDecoder:
    torch.manual_seed(0)
    decoder = random_weights(OneStepDecoder(**arguments(output, **other)))
    assert isinstance(decoder, OneStepDecoder)
    return decoder


def pair(output: str = "image", **other) -> tuple[LiteVAE_Decoder, OneStepDecoder]:
    """A plain decoder, and the one-step decoder that starts from its weights."""
    torch.manual_seed(0)
    plain = random_weights(LiteVAE_Decoder(**arguments(output, **other)))
    decoder = OneStepDecoder(**arguments(output, **other)).double().eval()
    missing, unexpected = decoder.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith(("injections.", "noise")) for name in missing)
    return plain, decoder


def latents(height: int = 5, width: int = 6) -> Tensor:
    return torch.randn(2, 2, height, width, dtype=torch.float64)


def noise_of(decoder: OneStepDecoder, height: int, width: int) -> Tensor:
    """The noise of `decode`, unfolded: (1, C, f h, f w)."""
    return decoder.unfold(decoder.noise[None, :, :height, :width])


# The estimate


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("linear", [True, False])
def test_one_step_decoder_starts_as_the_plain_one(output, linear):
    plain, decoder = pair(output, linear=linear)
    z = latents()
    with torch.no_grad():
        torch.testing.assert_close(decoder(z), plain(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", OUTPUTS)
def test_estimate_by_hand(output):
    """At any time, of the network's picture and the noised one, which keeps every pixel's place."""
    plain, decoder = pair(output)
    z = latents()
    noised = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    with torch.no_grad():
        first = plain.linear_path(z)
        network = plain(z) - first
        at = t.view(2, 1, 1, 1)
        size = (1 - at) ** 2 + at**2
        wanted = first + at / size**0.5 * network + (1 - at) / size * (noised - first)
        torch.testing.assert_close(decoder(z, noised, t), wanted, rtol=1e-12, atol=1e-12)


def test_networks_own_target_has_one_size_at_every_time():
    """If an image differs from the first picture by noise_std, as the docstring says."""
    torch.manual_seed(0)
    sigma = 0.08
    r, noise = (torch.randn(100_000, dtype=torch.float64) for _ in range(2))
    for t in (0.05, 0.3, 0.5, 0.9, 1.0):
        size = (1 - t) ** 2 + t**2
        noised = sigma * ((1 - t) * r + t * noise)
        target = (sigma * r - (1 - t) / size * noised) / (t / size**0.5)
        assert target.std().item() == pytest.approx(sigma, rel=0.02)


def test_start_is_the_first_picture_with_noise_of_its_deviation():
    decoder = one_step(noise_std=0.25)
    z = latents()
    noise = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        wanted = decoder.linear_path(z) + 0.25 * noise
        torch.testing.assert_close(decoder.start(z, noise), wanted, rtol=0, atol=0)
    without = one_step(linear=False)
    assert torch.equal(without.start(z, noise), without.noise_std * noise)
    assert torch.equal(without.first_picture(z[:1]), torch.zeros(1, 3, 20, 24))


def test_an_injection_by_hand():
    """The picture through a 3x3 convolution, scaled by 1 and a gain of the time, and a bias."""
    torch.manual_seed(0)
    injection = random_weights(Injection(3, 4))
    h, picture = (torch.randn(2, c, 3, 5, dtype=torch.float64) for c in (4, 3))
    harmonics = torch.randn(2, 2 * HARMONICS, dtype=torch.float64)
    time = harmonics @ injection.time.weight.T + injection.time.bias
    gain, bias = time[:, :4, None, None], time[:, 4:, None, None]
    expected = h + injection.conv(picture) + gain * injection.conv(picture) + bias
    torch.testing.assert_close(injection(h, picture, harmonics), expected)
    assert injection.conv.kernel_size == (3, 3)


@torch.no_grad()
def test_blocks_see_the_picture_at_their_resolution_and_the_time_by_its_harmonics():
    """In units of the noise, folded by twos; 0.5 to 8 periods of cosine, then of sine."""
    decoder = one_step(channel_mult=(1, 2, 3), noise_std=0.25)
    seen: list[tuple[Tensor, ...]] = []
    for injection in decoder.injections:
        injection.register_forward_pre_hook(lambda _, given: seen.append(given))
    z, noised = latents(), torch.randn(2, 3, 20, 24, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    decoder(z, noised, t)
    finest = (noised - decoder.linear_path(z)) / 0.25
    by_fold = {1: finest, 2: F.pixel_unshuffle(finest, 2)}
    by_fold[4] = F.pixel_unshuffle(by_fold[2], 2)
    angles = [[math.pi * k * at for k in range(1, HARMONICS + 1)] for at in (0.2, 0.7)]
    harmonics = [[*map(math.cos, each), *map(math.sin, each)] for each in angles]
    assert [given[0].shape[1] for given in seen] == [12, 12, 12, 12, 8]
    for (_, picture, found), fold in zip(seen, (4, 4, 4, 2, 1), strict=True):
        torch.testing.assert_close(picture, by_fold[fold])
        torch.testing.assert_close(found.tolist(), harmonics, rtol=0, atol=1e-5)


def test_pictures_pixels_reach_their_surroundings_alone():
    """Every block sees the noised picture where it is, at each resolution."""
    decoder = one_step(output="wavelet")
    field = receptive_field(decoder)
    z = torch.zeros(1, 2, 2 * field + 5, 3, dtype=torch.float64)
    noised = torch.zeros(1, 3, 4 * len(z[0, 0]), 12, dtype=torch.float64, requires_grad=True)
    middle = noised.shape[2] // 2
    picture = decoder(z, noised, torch.full((1,), 0.6, dtype=torch.float64))
    picture[:, :, middle].sum().backward()
    rows = noised.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert middle - int(rows.min()) <= 4 * field + 4
    assert int(rows.max()) - middle <= 4 * field + 4
    assert len(rows) > 4


# The noise of decode


def test_decode_is_one_step_from_the_noise_of_its_place():
    """Far beyond where it repeats, too."""
    decoder = one_step()
    z = torch.randn(2, 2, 4, NOISE_POSITIONS + 9, dtype=torch.float64)
    noise = torch.cat((noise_of(decoder, 4, NOISE_POSITIONS), noise_of(decoder, 4, 9)), dim=3)
    with torch.no_grad():
        wanted = decoder.sample(z, noise.expand(2, -1, -1, -1), 1)
        torch.testing.assert_close(decoder(z), wanted, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(decoder(z), decoder(z), rtol=0, atol=0)
        # The noise matters.
        decoder.noise.neg_()
        assert (decoder(z) - wanted).abs().max() > 0.01


def test_noise_is_gaussian_and_belongs_to_its_seed():
    noise = OneStepDecoder(**arguments()).noise
    assert noise.shape == (3 * 4**2, NOISE_POSITIONS, NOISE_POSITIONS)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(noise, OneStepDecoder(**arguments()).noise)
    assert not torch.equal(noise, OneStepDecoder(**arguments(), noise_seed=1).noise)
    with torch.device("meta"):
        assert OneStepDecoder(**arguments()).noise.is_meta


def test_folding_by_hand():
    """A pixel's place, by bits: the finest bit of row and column is the first to be folded."""
    decoder = OneStepDecoder(**arguments(out_channels=1))
    picture = torch.arange(64.0).view(1, 1, 8, 8)
    folded = decoder.fold(picture)
    assert folded.shape == (1, 16, 2, 2)
    for row in range(8):
        for column in range(8):
            fine = 2 * (row % 2) + column % 2
            coarse = 2 * (row // 2 % 2) + column // 2 % 2
            assert folded[0, 4 * fine + coarse, row // 4, column // 4] == 8 * row + column
    assert torch.equal(decoder.unfold(folded), picture)


def test_noise_has_a_random_place_in_training():
    decoder = one_step().train()
    z = latents()
    with torch.no_grad():
        torch.manual_seed(0)
        first = decoder(z)
        again = decoder(z)
        torch.manual_seed(0)
        assert torch.equal(decoder(z), first)
    assert not torch.equal(again, first)
    # By hand: the first two numbers are its row and its column.
    torch.manual_seed(0)
    top, left = torch.randint(NOISE_POSITIONS, (2,)).tolist()
    assert top != left
    decoder.noise = decoder.noise.roll((-top, -left), (1, 2))
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval()(z), first)


@pytest.mark.parametrize("output", OUTPUTS)
def test_stages_are_the_plain_ones_with_an_injections_reach_more(output):
    """A block's 3x3 convolution of the picture comes before its own; the estimate has none."""
    decoder = one_step(output)
    plain = LiteVAE_Decoder(**arguments(output))
    blocks = [reach_of(module) > 1 for module in plain.blocks()]
    expected = []
    for place, stage in enumerate(plain.stages()):
        is_block = place < len(blocks) and blocks[place]
        expected.append((stage.reach + is_block, stage.scale))
    assert [(stage.reach, stage.scale) for stage in decoder.stages()] == [*expected, (0, 1)]
    network, path = decoder.paths()
    assert len(network) == len(expected) + 1
    assert [(stage.reach, stage.scale) for stage in path] == [(1, 4)]
    assert len(one_step(output, linear=False).paths()) == 1


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("variant", ["open_litevae", "paper_smc"])
def test_tiles_give_the_whole_image(output, variant, monkeypatch):
    """Each tile has the noise of its place; across the place where it repeats."""
    monkeypatch.setattr("olvae.modules.litevae.one_step.NOISE_POSITIONS", 8)
    decoder = one_step(output, variant=variant)
    z = torch.randn(1, 2, 7, 13, dtype=torch.float64)
    with torch.no_grad():
        whole = decoder(z)
    for network in (decoder, fold_smc(decoder)):
        for tile in (3, 8):
            tiled = decode_tiled(network, z, tile)
            torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-9)
    # Too short a reach is noticed.
    short = [stage._replace(reach=max(0, stage.reach - 1)) for stage in decoder.stages()]
    decoder.stages = lambda: short
    assert (decode_tiled(decoder, z, 3) - whole).abs().max() > 1e-4


def test_tiles_within_memory_need_less():
    decoder = one_step()
    shape = (1, 2, 48, 48)
    whole = peak_bytes(decoder, lambda d, x: d(x), shape)
    assert 0 < tile_bytes(decoder, 8, shape) < whole / 4
    z = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        tiled = decode_tiled(decoder, z, memory=whole // 2)
        torch.testing.assert_close(tiled, decoder(z), rtol=1e-9, atol=1e-9)


def test_with_group_norm_there_are_no_tiles():
    decoder = one_step(variant="group_norm")
    assert receptive_field(decoder) is None
    with pytest.raises(ValueError, match="OneStepDecoder sees"):
        decode_tiled(decoder, latents(), 3)


# What learns, and what it costs


@pytest.mark.parametrize("variant", ["open_litevae", "paper_smc", "group_norm"])
def test_every_parameter_learns_from_decoding_and_from_noised_pictures(variant):
    z = latents()
    noised = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    for given in ((), (noised, t)):
        decoder = one_step(variant=variant)
        decoder(z, *given).square().mean().backward()
        for name, p in decoder.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


def test_injections_learn_from_the_first_step():
    """They are 0 there, and their gradient is not."""
    _, decoder = pair()
    noised = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    decoder(latents(), noised, t).square().mean().backward()
    for injection in decoder.injections:
        assert injection.conv.weight.abs().max() == 0
        assert injection.conv.weight.grad.abs().max() > 0
        assert injection.time.weight.grad.abs().max() > 0


def test_checkpointing_gives_the_same_gradients():
    found = []
    for on in (False, True):
        decoder = one_step().train()
        decoder.checkpoint_steps(on)
        torch.manual_seed(1)
        decoder(latents()).square().mean().backward()
        found.append([p.grad for p in decoder.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


def test_parameters_and_macs_are_the_plain_ones_and_the_injections():
    """Of photos-f8c12's decoder; a convolution and a linear layer for each of six blocks."""
    shape = {"channels": 16, "z_channels": 12, "num_res_blocks": 0, "variant": "paper_smc"}
    plain, decoder = (kind(**shape, linear=True) for kind in (LiteVAE_Decoder, OneStepDecoder))
    # Width of each block's input, and how many pixels per side the picture is folded by.
    blocks = [(64, 8), (64, 8), (64, 8), (64, 4), (64, 2), (32, 1)]
    parameters = 0
    macs = 0
    for width, fold in blocks:
        parameters += 9 * 3 * fold**2 * width + width + (2 * HARMONICS + 1) * 2 * width
        macs += 9 * 3 * fold**2 * width * (256 // fold) ** 2 + 2 * HARMONICS * 2 * width
    assert count_parameters(decoder) - count_parameters(plain) == parameters
    more = count_macs(decoder, 1, 12, 32, 32) - count_macs(plain, 1, 12, 32, 32)
    assert more == macs


def test_folding_keeps_the_picture():
    decoder = one_step()
    folded = fold_smc(decoder)
    assert not any(isinstance(m, SMC) for m in folded.modules())
    with torch.no_grad():
        z = latents()
        torch.testing.assert_close(folded(z), decoder(z), rtol=1e-10, atol=1e-10)
    assert last_convolution(decoder) is decoder.conv_out


def test_in_half_precision_it_is_near():
    """Under autocast, at an early time too, where the network's part is small."""
    torch.manual_seed(0)
    decoder = random_weights(one_step(), std=0.15).float().train()
    z = latents().float()
    noised = decoder.start(z, torch.randn(2, 3, 20, 24))
    t = torch.tensor([0.02, 0.9])
    with torch.no_grad():
        whole = decoder(z, noised, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = decoder(z, noised, t)
    assert half.dtype == torch.float32
    errors = (half - whole).std((1, 2, 3)) / whole.std((1, 2, 3))
    assert errors[0] < 0.01
    assert errors[1] < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OneStepDecoder(noise_std=0.0), "noise_std must be above 0, got 0.0"),
        (lambda: OneStepDecoder(output="bands"), "output must be one of image"),
        (lambda: one_step()(torch.zeros(1, 3, 4, 4)), r"\(B, 2, h, w\)"),
    ],
)
def test_one_step_decoder_refuses_wrong_settings_and_latents(call, message):
    with pytest.raises(ValueError, match=message):
        call()
