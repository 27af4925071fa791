"""Halves of diffusers' autoencoders: which layer is the last, what an image trains,
and float32 where it counts.
"""

import pytest
import torch

from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.modules.base import last_convolution
from olvae.modules.counting import watch_outputs
from olvae.modules.others.wrapped import TRAINABLE
from tests.models.loading.classes import make


@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_trainable_weight_gets_a_gradient_and_the_last_layer_is_the_last(kind):
    """DDP waits for each; a gradient at the last layer is what the losses are balanced by."""
    model = DiffusersAutoencoder(make(kind)).as_litevae(kind).train()
    f = model.downscale
    x = torch.randn(1, model.in_channels, 4 * f, 4 * f)
    z = torch.randn(1, model.latent_channels, 4, 4)
    for half, given in ((model.encoder, x), (model.decoder, z)):
        last, called = last_convolution(half), dict[str, torch.Tensor]()
        layers = {
            n: m
            for n, m in half.named_modules()
            if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)
        }
        with watch_outputs(layers, called.__setitem__):
            half(given).square().mean().backward()
        assert last is layers[list(called)[-1]]
        assert last.weight.grad is not None
        without = [
            name for name, p in half.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert without == []


@pytest.mark.parametrize(
    "kind", ["AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan"]
)
def test_wrapped_encoder_moments_are_not_rounded_to_half_precision(kind):
    model = DiffusersAutoencoder(make(kind)).as_litevae(kind)
    x = torch.randn(1, model.in_channels, 4 * model.downscale, 4 * model.downscale)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        moments = model.encoder(x)
    assert moments.dtype == torch.float32
    assert not torch.equal(moments, moments.bfloat16().float())
