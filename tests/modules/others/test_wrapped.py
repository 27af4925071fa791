"""Halves of diffusers' autoencoders: which layer is the last, what an image trains,
and float32 where it counts.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.modules.base import last_convolution
from olvae.modules.counting import watch_outputs
from olvae.modules.others import wrapped
from olvae.modules.others.wrapped import (
    TRAINABLE,
    DiffusersDecoder,
    _on_one_frame,
    decode_image,
    encode_image,
    has_frames,
)
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
            out = half(given)
        moments, image = (
            (model.encoder.latent_dim, 4, 4),
            (model.decoder.out_channels, 4 * f, 4 * f),
        )
        assert out.shape[1:] == (moments if half is model.encoder else image)
        out.square().mean().backward()
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


@pytest.mark.parametrize(
    ("kind", "changes", "patch"),
    [
        ("AutoencoderKLWan", {}, 1),
        ("AutoencoderKLWan", {"patch_size": 2, "in_channels": 12, "out_channels": 12}, 2),
        ("AutoencoderKLFlux2", {}, 1),
    ],
)
def test_an_enlarging_decoder_begins_with_every_pixel_repeated(kind, changes, patch):
    """With patches of pixels as outputs, too."""
    theirs = make(kind, **changes)
    plain = DiffusersAutoencoder(theirs).as_litevae(kind).decoder
    params = plain.node["params"]
    twice = DiffusersDecoder(**{**params, "enlarge": 2})
    assert twice.output_patch == plain.output_patch == patch
    assert twice.upscale == 2 * plain.upscale
    twice.load_state_dict(twice.enlarged(plain.state_dict()))
    z = torch.randn(1, plain.z_channels, 3, 2)
    with torch.no_grad():
        image = plain.eval()(z)
        enlarged = twice.eval()(z)
    assert image.shape == (1, 3, 3 * plain.upscale, 2 * plain.upscale)
    expected = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(enlarged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, (1, 2, 1)])
@torch.no_grad()
def test_one_frame_needs_the_last_slice_of_a_causal_kernel(stride):
    """Against the whole kernel, which several frames, or one after others, get."""
    conv, x = WanCausalConv3d(2, 3, 3, stride, padding=1), torch.randn(2, 2, 1, 6, 4)
    whole = type(conv).forward
    torch.testing.assert_close(_on_one_frame(conv, x), whole(conv, x))
    several, cache = torch.randn(2, 2, 4, 6, 4), torch.randn(2, 2, 2, 6, 4)
    assert torch.equal(_on_one_frame(conv, several), whole(conv, several))
    assert torch.equal(_on_one_frame(conv, x, cache), whole(conv, x, cache))
    with torch.no_grad():
        conv.weight[:, :, :-1] = torch.nan
    assert _on_one_frame(conv, x).isfinite().all()


@pytest.mark.parametrize("exact", [False, True])
@torch.no_grad()
def test_one_frame_is_exact_under_autocast_where_it_has_to_be(exact):
    conv, x = WanCausalConv3d(2, 3, 3, padding=1), torch.randn(1, 2, 1, 4, 4)
    expected = _on_one_frame(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = _on_one_frame(conv, x, exact=exact)
        of_half = _on_one_frame(conv, x.bfloat16(), exact=exact)
    assert found.dtype == of_half.dtype == (torch.float32 if exact else torch.bfloat16)
    assert torch.equal(found, expected) == exact
    # A network in half precision stays so.
    assert _on_one_frame(conv.bfloat16(), x.bfloat16(), exact=exact).dtype == torch.bfloat16


class Output(dict):
    """As diffusers': values by name, and attributes."""

    def __getattr__(self, name: str) -> object:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize("frames", [False, True])
def test_an_image_is_one_frame_of_a_video(frames):
    """Of moments, or of a latent by either name."""
    x, seen = torch.randn(2, 3, 4, 4), []
    y = torch.randn(2, 8, 2, 2)
    inner = y[:, :, None] if frames else y

    def model(output: object) -> SimpleNamespace:
        return SimpleNamespace(
            **{name: lambda given: seen.append(given) or output for name in ("encode", "decode")}
        )

    varied = SimpleNamespace(parameters=inner, logvar=0)
    for output, certain in (
        (Output(latent_dist=varied), True),
        (Output(latent_dist=SimpleNamespace(parameters=inner)), False),
        (Output(latent=inner), False),
        (Output(latents=inner), False),
    ):
        found, has_distribution = encode_image(model(output), x, frames)
        assert torch.equal(found, y)
        assert has_distribution == certain
    for output in (Output(sample=inner), inner):
        assert torch.equal(decode_image(model(output), x, frames), y)
    assert {tuple(given.shape) for given in seen} == {(2, 3, *[1] * frames, 4, 4)}


@pytest.mark.parametrize("made", [torch.zeros(2, 8, 2, 4, 4), torch.zeros(2, 8, 4, 4)])
def test_a_model_that_makes_no_single_frame_is_refused(made):
    model = SimpleNamespace(decode=lambda z: made, encode=lambda x: Output(latent=made))
    shape = ", ".join(map(str, made.shape))
    with pytest.raises(ValueError, match=rf"it makes \({shape}\)"):
        decode_image(model, torch.zeros(2, 4, 4, 4), frames=True)
    with pytest.raises(ValueError, match="it makes"):
        encode_image(model, torch.zeros(2, 3, 4, 4), frames=True)


def test_the_time_axis_of_a_model_is_guessed_by_its_convolutions():
    assert has_frames(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1))) == (True, False)
    assert has_frames(nn.Conv2d(1, 1, 1)) == (False, True)


def test_wrapped_halves_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="AutoencoderKL: only AutoencoderDC"):
        DiffusersDecoder("AutoencoderKL", {}, 4)
    model = DiffusersAutoencoder(make("AutoencoderDC")).as_litevae("it")
    with pytest.raises(ValueError, match=r"checkpoint: .*AutoencoderDC"):
        model.encoder.checkpoint_steps()
    model.encoder.checkpoint_steps(False)
    assert not model.encoder.checkpoint


def test_dc_without_blocks_at_the_images_size_ends_with_an_upsampling():
    """Its convolution is the last one; it can't be enlarged."""
    theirs = make("AutoencoderDC", decoder_layers_per_block=(0, 1, 1))
    decoder = DiffusersAutoencoder(theirs).as_litevae("it").decoder
    assert last_convolution(decoder) is decoder.model.decoder.conv_out.conv
    z = torch.randn(1, 8, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval()(z), theirs.decode(z).sample)
    with pytest.raises(ValueError, match="enlarge: this AutoencoderDC"):
        DiffusersDecoder(**{**decoder.node["params"], "enlarge": 2})


def test_causal_convolutions_see_one_frame_and_the_encoders_last_is_exact():
    model = DiffusersAutoencoder(make("AutoencoderKLWan")).as_litevae("it")
    left = ["encoder.down_blocks.3.time_conv"]  # pads nothing
    for half, whole, last in ((model.encoder, left, ["quant_conv"]), (model.decoder, [], [])):
        layers = {n: m for n, m in half.model.named_modules() if isinstance(m, nn.Conv3d)}
        own = {n: m.__dict__["forward"] for n, m in layers.items() if "forward" in m.__dict__}
        assert [name for name in layers if name not in own] == whole
        assert [name for name, forward in own.items() if forward.keywords["exact"]] == last


def test_a_plain_convolution_of_frames_is_left_alone(monkeypatch):
    """One that pads on both sides of the time axis."""
    monkeypatch.setattr(wrapped, "causal_padding", lambda _: None)
    model = DiffusersAutoencoder(make("AutoencoderKLWan")).as_litevae("it")
    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Conv3d)]
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_blocks_of_diffusers_are_called_by_the_step_of_their_half():
    model = DiffusersAutoencoder(make("AutoencoderKLFlux2")).as_litevae("it").train()
    encoder = model.encoder
    assert (encoder.latent_dim, encoder.in_channels) == (8, 3)
    assert (model.decoder.z_channels, model.decoder.out_channels) == (4, 3)
    calls = []
    encoder.step = lambda run, *given: calls.append(run) or run(*given)
    encoder.checkpoint_steps()
    assert encoder.checkpoint
    encoder(torch.randn(1, 3, 8, 8))
    assert len(calls) == 4  # two levels, the middle, and a block in it


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_wrapped_half_has_no_weights_of_the_other(kind):
    theirs = make(kind)
    ours = DiffusersAutoencoder(theirs).as_litevae(kind)
    own = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    for half, others in (("encoder", own["decoder"]), ("decoder", own["encoder"])):
        names = [name for name, _ in getattr(ours, half).model.named_parameters()]
        assert names
        assert not [name for name in names if name.startswith(others)]
        expected = [name for name, _ in theirs.named_parameters() if name.startswith(own[half])]
        assert set(expected) <= set(names)
