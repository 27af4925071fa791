"""The study's encoders: what their names say is there, or is not."""

from typing import Any

import pytest
import torch

from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.others.tiny import TinyEncoder
from olvae.modules.sdvae import SDEncoder
from study.encoders import (
    LinearMoments,
    NormalizedLiteVAE,
    PatchedLiteVAE,
    ShortPathSDEncoder,
    ShuffledLiteVAE,
    TinyMoments,
    UnnormalizedSDEncoder,
)

LITE: dict[str, Any] = {"latent_dim": 8, "scale": "S", "image_size": 64}
SD: dict[str, Any] = {"latent_dim": 8, "channels": 8, "norm_groups": 4, "image_size": 64}


def doubled(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0] * 2,)


@pytest.mark.parametrize(
    ("encoder", "last", "normalized"),
    [
        (SDEncoder(**SD), "model.conv_norm_out", True),
        (UnnormalizedSDEncoder(**SD), "model.conv_norm_out", False),
        (LiteVAE_Encoder(**LITE), "aggregator.conv_out", False),
        (NormalizedLiteVAE(**LITE), "aggregator.conv_out", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
@torch.no_grad()
def test_a_normalized_encoder_does_not_see_how_large_its_last_features_are(
    encoder, last, normalized
):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = encoder(x)
    encoder.get_submodule(last).register_forward_pre_hook(doubled)
    same = torch.allclose(encoder(x), moments, atol=1e-3 * moments.std())
    assert same == normalized


@torch.no_grad()
def test_the_short_path_adds_a_linear_map_of_the_mean_colours():
    encoder = ShortPathSDEncoder(**SD)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with_it, moments = encoder(x), encoder.model(x)
    means = x.view(2, 3, 8, 8, 8, 8).mean((3, 5))  # of 8x8 pixels
    expected = torch.einsum("nc,bchw->bnhw", encoder.short.weight[:, :, 0, 0], means)
    torch.testing.assert_close(with_it - moments, expected + encoder.short.bias[:, None, None])
    assert (
        sum(p.numel() for p in encoder.parameters())
        - sum(p.numel() for p in encoder.model.parameters())
        == 8 * 4
    )


@torch.no_grad()
def test_shuffled_levels_hold_every_pixel_and_all_else_is_as_large_as_litevae():
    shuffled, lite = ShuffledLiteVAE(**LITE), LiteVAE_Encoder(**LITE)
    seen: list[torch.Tensor] = []
    for extractor in shuffled.extractors:
        extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(2, 3, 64, 64)
    assert shuffled(x).shape == lite(x).shape
    assert [tuple(level.shape) for level in seen] == [
        (2, 12, 32, 32),
        (2, 48, 16, 16),
        (2, 192, 8, 8),
    ]
    assert all(
        torch.equal(level.flatten().sort().values, x.flatten().sort().values) for level in seen
    )
    more = sum(p.numel() for p in shuffled.parameters()) - sum(p.numel() for p in lite.parameters())
    # input channels of the second and the third first convolution
    assert more == (36 + 180) * 16 * 9


@torch.no_grad()
def test_taesds_encoder_has_log_variances_beside_the_same_means():
    tiny = TinyEncoder(latent_dim=8, image_size=64)
    with_moments = TinyMoments(latent_dim=8, image_size=64)
    last = with_moments.layers[-1]
    weights = with_moments.state_dict() | {
        "layers.14.weight": last.weight[:4],
        "layers.14.bias": last.bias[:4],
    }
    tiny.load_state_dict(weights)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    moments = with_moments(x)
    assert moments.shape == (2, 8, 8, 8)
    torch.testing.assert_close(moments[:, :4], tiny(x)[:, :4])
    assert moments[:, 4:].std() > 0


@torch.no_grad()
def test_haar_packets_of_patches_are_an_orthogonal_transform_of_shuffled_pixels():
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    packets, pixels = PatchedLiteVAE(**LITE), ShuffledLiteVAE(**LITE)
    # networks and the size of their first weights are the same
    assert [p.shape for p in packets.parameters()] == [p.shape for p in pixels.parameters()]
    for level, (found, shuffled) in enumerate(
        zip(packets.seen(x), pixels.seen(x), strict=True), start=1
    ):
        assert found.shape == shuffled.shape == (2, 3 * 4**level, 64 >> level, 64 >> level)
        torch.testing.assert_close(
            found.square().sum(1), shuffled.square().sum(1), rtol=1e-10, atol=1e-10
        )
        # PyWavelets' packet of averages: the mean colours times 2^level
        means = shuffled.view(2, 3, 4**level, *shuffled.shape[2:]).mean(2)
        torch.testing.assert_close(found[:, :3], means * 2**level)


def test_linear_layers_alone_are_linear_and_start_as_the_linear_path():
    encoder = LinearMoments(latent_dim=8, image_size=32).double()
    assert encoder.linear is not None
    x, y = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[:, :4], encoder.linear(x))
    with torch.no_grad():
        encoder.colours.weight.normal_()
    zero = encoder(torch.zeros_like(x))
    torch.testing.assert_close(encoder(x + 2 * y) - zero, encoder(x) + 2 * encoder(y) - 3 * zero)
    assert encoder(x)[:, 4:].std() > 0
