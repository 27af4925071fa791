"""Classes of diffusers as a LiteVAE object, trained for two steps, and back,
against diffusers' own calls.
"""

import copy
import json
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export.exporting import ExportSettings, export
from olvae.export.formats import DiffusersLayout
from olvae.models.autoencoder import Quantizer
from olvae.models.loading.families import (
    Representation,
    StableDiffusion,
    Tiny,
    Wrapped,
    drop_factors,
    family_of,
)
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.targets import find_target
from olvae.models.spec import UNMEASURED, WEIGHTS_NAME
from olvae.modules.base import HALVES
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.others.wrapped import TRAINABLE, DiffusersEncoder
from tests.export.latents import Shrunk, tiny_vae
from tests.models.autoencoder_kl import PER_CHANNEL, SHAPES, autoencoder_kl, tiny_kl
from tests.models.loading.classes import make, see_patches

FORMS = {name: (name, {}) for name in TRAINABLE} | {
    "Wan 2.2": (
        "AutoencoderKLWan",
        {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True},
    )
}
VIDEO = {"AutoencoderKLQwenImage", "AutoencoderKLWan"}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[DiffusersAutoencoder, LiteVAE]]:
    """Diffusers' model, and ours of it."""
    found = {
        n: DiffusersAutoencoder(make(k, **a)).eval()
        for n, (k, a) in FORMS.items()
        if hasattr(diffusers, k)
    }
    return {name: (theirs, theirs.as_litevae("it")) for name, theirs in found.items()}


def arguments(model: Any) -> dict[str, Any]:
    return json.loads(
        json.dumps({key: value for key, value in model.config.items() if key[0] != "_"})
    )


def train(model: LiteVAE, *halves: str) -> None:
    """Two steps of Adam on an image."""
    parameters = [p for half in halves for p in getattr(model, half).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    x = torch.rand(1, model.in_channels, 16, 16) * 2 - 1
    for _ in range(2):
        optimizer.zero_grad()
        image, posterior = model(x)
        ((image - x).square().mean() + 0.1 * (posterior.mean - 1).square().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_litevae_of_a_diffusers_class_has_its_function_and_weights(name, pairs):
    if name not in pairs:
        pytest.skip("a later diffusers has it")
    theirs, ours = pairs[name]
    x = torch.rand(2, ours.in_channels, 16, 24) * 2 - 1
    expected, found = theirs.encode(x), ours.encode(x)
    assert (ours.downscale, ours.latent_channels, ours.deterministic) == (
        *(theirs.downscale, theirs.latent_channels, theirs.deterministic),
    )
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.var, expected.var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.decode(expected.mean), theirs.decode(expected.mean), rtol=1e-5, atol=1e-5
    )
    before, after = theirs.model.state_dict(), family_of(ours).to_diffusers(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ours.for_diffusion == theirs.for_diffusion
    again = LiteVAE.from_config(**ours.config)  # what a run's config and an export hold
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert ours.encoder.image_size == 256
    # A config has the factors of the model, where its class has such arguments.
    given = arguments(theirs.model)
    changed = copy.deepcopy(ours).set_for_diffusion({"scaling_factor": 0.125})
    wanted = {**given, "scaling_factor": 0.125} if "scaling_factor" in given else given
    assert json.loads(json.dumps(family_of(ours).config(changed))) == wanted
    assert family_of(ours).kind(ours) == type(theirs.model).__name__


@pytest.mark.parametrize("halves", [("decoder",), ("encoder", "decoder")], ids=" ".join)
@pytest.mark.parametrize("name", FORMS)
def test_trained_litevae_is_written_back_to_diffusers(name, halves, pairs, tmp_path):
    if name not in pairs:
        pytest.skip("a later diffusers has it")
    theirs, ours = pairs[name][0], copy.deepcopy(pairs[name][1]).train()
    train(ours, *halves)
    layout = DiffusersLayout()
    assert layout.misfit(ours.eval()) is None
    layout.write(ours, tmp_path / "vae")
    ((_, moments, decode, factors),) = layout.load(tmp_path / "vae", ours)
    x = torch.rand(1, ours.in_channels, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(moments(x), ours.moments(x), rtol=1e-4, atol=1e-5)
        z = ours.encode(x).mean
        torch.testing.assert_close(decode(z), ours.decode(z), rtol=1e-4, atol=1e-5)
    assert factors == ours.for_diffusion
    kind = type(theirs.model)
    back = kind.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    before, after = theirs.model.state_dict(), back.state_dict()
    own = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    trained = tuple(part for half in halves for part in own[half])
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(key.startswith(trained) for key in moved)
    assert not any("time_conv" in key for key in moved)
    for key in moved if kind.__name__ in VIDEO else ():
        if before[key].ndim == 5 and "norm" not in key and "gamma" not in key:
            assert torch.equal(before[key][:, :, :-1], after[key][:, :, :-1]), key
            assert not torch.equal(before[key][:, :, -1], after[key][:, :, -1]), key
    assert arguments(back) == arguments(theirs.model)


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderKLQwenImage", "Wan 2.2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_litevae_of_a_diffusers_class_is_exported_and_compared(name, dtype, pairs, tmp_path):
    """Also where one frame is computed in another order,
    and where rounding would reach FLUX.2's statistics.
    """
    ours = copy.deepcopy(pairs[name][1])
    torch.manual_seed(0)
    for weight in (w for w in ours.parameters() if w.ndim > 1):
        torch.nn.init.normal_(weight, std=2 * weight[0].numel() ** -0.5)
    export(ours, tmp_path / "vae", DiffusersLayout(), ExportSettings(dtype=dtype))
    assert find_target(tmp_path / "vae").load().for_diffusion == ours.for_diffusion
    assert load_file(tmp_path / "vae" / WEIGHTS_NAME)["decoder.conv_in.weight"].dtype == getattr(
        torch, dtype
    )


def test_litevae_of_a_diffusers_class_is_exported_in_our_own_format(pairs, tmp_path):
    theirs, ours = pairs["AutoencoderKLFlux2"]
    ours.save_pretrained(tmp_path)
    back = find_target(tmp_path).load()
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(back(x)[0], ours(x)[0])
    assert back.latents_std == theirs.latents_std


def test_a_smaller_decoder_of_flux2(pairs, tmp_path):
    """diffusers' class has one width for the encoder, and another one for the decoder."""
    ours = pairs["AutoencoderKLFlux2"][1]
    config = copy.deepcopy(ours.config)
    config["decoder_config"]["params"]["config"]["decoder_block_out_channels"] = [4, 4]
    small = LiteVAE.from_config(**config).eval().set_for_diffusion(ours.for_diffusion)
    small.encoder.load_state_dict(ours.encoder.state_dict())
    small.decoder.model.bn.load_state_dict(ours.decoder.model.bn.state_dict())
    DiffusersLayout().write(small, tmp_path / "vae")
    back = diffusers.AutoencoderKLFlux2.from_pretrained(
        tmp_path / "vae", low_cpu_mem_usage=False
    ).eval()
    assert back.config.decoder_block_out_channels == [4, 4]
    assert torch.equal(back.bn.running_var, pairs["AutoencoderKLFlux2"][0].model.bn.running_var)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(back.decode(z).sample, small.decode(z))


def test_diffusers_encoder_refuses_other_classes():
    with pytest.raises(ValueError, match=r"^UNet2DModel: only AutoencoderDC, "):
        DiffusersEncoder("UNet2DModel", {}, 8)


def test_checkpointing_of_diffusers_networks(pairs):
    """Flux2's blocks are computed again in the backward pass; Wan's can't."""
    with pytest.raises(ValueError, match=r"^checkpoint: diffusers' AutoencoderKLWan can't"):
        copy.deepcopy(pairs["AutoencoderKLWan"][1].decoder).checkpoint_steps()
    plain = copy.deepcopy(pairs["AutoencoderKLFlux2"][1].decoder).train()
    again = copy.deepcopy(plain)
    again.checkpoint_steps()
    z = torch.randn(1, 4, 4, 4)
    for network in (plain, again):
        network(z).square().mean().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


OTHERS = {
    "per channel": PER_CHANNEL,
    "no attention": {"mid_block_add_attention": False},
    "other groups": {"norm_num_groups": 8},
    "no multiples": {"widths": (24, 40, 56), "norm_num_groups": 8},
    "one level": {"widths": (32,)},
    "grey": {"in_channels": 1, "out_channels": 1},
    "one block": {"widths": (16, 32), "norm_num_groups": 4, "layers_per_block": 1},
}
"""Each beside diffusers' defaults, and narrow where it is not about widths."""

NARROW = {"widths": (32, 64), "layers_per_block": 1}


def make_kl(name: str) -> diffusers.AutoencoderKL:
    return autoencoder_kl(**(SHAPES[name] if name in SHAPES else {**NARROW, **OTHERS[name]}))


def ours_of(theirs: diffusers.AutoencoderKL) -> LiteVAE:
    return DiffusersAutoencoder(theirs).eval().as_litevae("it")


@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
@torch.no_grad()
def test_encode_and_decode_are_diffusers_own_and_names_go_back(name):
    theirs = make_kl(name)
    ours = ours_of(theirs)
    x = torch.rand(2, theirs.config.in_channels, 16, 24) * 2 - 1
    expected, posterior = theirs.encode(x).latent_dist, ours.encode(x)
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    assert expected.mean.std() > 0
    assert torch.equal(ours.decode(expected.mean), theirs.decode(expected.mean).sample)
    assert isinstance(family_of(ours), StableDiffusion)
    assert family_of(ours).kind(ours) == "AutoencoderKL"
    assert family_of(ours).units(ours) is None
    assert not ours.training
    assert (ours.downscale, ours.latent_channels) == (
        x.shape[-1] // expected.mean.shape[-1],
        expected.mean.shape[1],
    )
    assert (ours.quantizer is not None) == theirs.config.use_quant_conv
    # Nothing in their config is left out.
    again = diffusers.AutoencoderKL(**StableDiffusion().config(ours))
    for key in set(theirs.config) - {"_use_default_values"}:
        given, back = theirs.config[key], again.config[key]
        assert (list(back) if isinstance(back, tuple | list) else back or 0.0) == (
            list(given) if isinstance(given, tuple | list) else given or 0.0
        ), key
    before, after = theirs.state_dict(), StableDiffusion().to_diffusers(ours)
    assert before.keys() == after.keys() == again.state_dict().keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_are_copies_and_the_generator_is_left_alone():
    theirs = tiny_kl()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ours = ours_of(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        ours.decoder.model.conv_in.weight.zero_()
    assert theirs.decoder.conv_in.weight.abs().max() > 0


def test_as_litevae_of_a_litevae_is_itself():
    ours = tiny_vae()
    assert ours.as_litevae("x") is ours
    assert family_of(ours) is None


@pytest.mark.parametrize("sample_size", [64, 20, (64, 32), 30])
def test_sample_size_that_our_encoder_does_not_take_becomes_256(sample_size):
    """diffusers' encoder does not use it."""
    ours = ours_of(tiny_kl(sample_size=sample_size))
    assert ours.encoder.image_size == (sample_size if sample_size in (64, 20) else 256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make("VQModel"), "diffusers' VQModel can be a teacher"),
        (lambda: tiny_kl(use_quant_conv=False), "it has one of quant_conv and post_quant_conv"),
        (lambda: tiny_kl(act_fn="gelu"), "act_fn: gelu: only silu"),
    ],
)
def test_as_litevae_refuses_networks_that_ours_are_not(make, message):
    with pytest.raises(ConfigError, match=f"^diffusers:it: {message}") as caught:
        DiffusersAutoencoder(make()).as_litevae("diffusers:it")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^it: only LiteVAE and AutoencoderKL"):
        Shrunk().as_litevae("it")


@pytest.mark.parametrize(
    ("half", "params", "message"),
    [
        ("decoder", {"channels": 16}, r"widths \[8, 8, 16\], the decoder \[16, 16, 32\]"),
        ("decoder", {"num_res_blocks": 2}, "num_res_blocks 1, the decoder 2"),
        ("encoder", {"attention": False}, "attention False, the decoder True"),
        ("encoder", {"norm_groups": 8}, "norm_groups 8, the decoder 4"),
        ("encoder", {"latent_dim": 16}, "moments 16, the decoder 8: AutoencoderKL"),
        ("decoder", {"z_channels": 6}, "moments 8, the decoder 12"),
    ],
)
def test_halves_that_autoencoder_kl_does_not_have(half, params, message):
    ours = ours_of(tiny_kl()).config
    node = ours[f"{half}_config"]
    mixed = LiteVAE.from_config(
        **{**ours, f"{half}_config": {**node, "params": {**node["params"], **params}}}
    )
    with pytest.raises(ValueError, match=message):
        StableDiffusion().config(mixed)


def test_latents_of_another_width_than_the_networks_are_none_of_autoencoder_kl():
    narrow = LiteVAE.from_config(**{**ours_of(tiny_kl()).config, "embed_dim": 3})
    assert StableDiffusion().original_config(narrow)["latent_channels"] == 3
    with pytest.raises(ValueError, match="of 3 channels, networks of 4"):
        StableDiffusion().config(narrow)


@pytest.mark.parametrize("half", HALVES)
def test_a_linear_path_in_either_half_is_none_of_autoencoder_kl(half):
    config = copy.deepcopy(ours_of(tiny_kl()).config)
    config[f"{half}_config"]["params"]["linear"] = True
    with pytest.raises(ValueError, match="linear path"):
        StableDiffusion().to_diffusers(LiteVAE.from_config(**config))


def test_halves_of_two_families_and_of_two_classes_are_none(pairs):
    ours = ours_of(tiny_kl())
    shape = {"channels": 8, "channel_mult": (1, 1, 1), "num_res_blocks": 0}
    mixed = LiteVAE(ours.encoder, LiteVAE_Decoder(z_channels=4, **shape))
    assert family_of(mixed) is None
    halves = [
        SimpleNamespace(node={"params": {"kind": kind, "config": {}}})
        for kind in ("AutoencoderDC", "AutoencoderKLWan")
    ]
    with pytest.raises(ValueError, match=r"encoder is AutoencoderDC's, .* AutoencoderKLWan's"):
        Wrapped().config(SimpleNamespace(encoder=halves[0], decoder=halves[1]))


def test_factors_that_training_has_outdated_are_dropped_but_a_classs_own(pairs):
    """FLUX.2's per channel, which its class can't be without."""
    factors = {"scaling_factor": 3.0, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
    for model in (tiny_vae(), ours_of(tiny_kl())):
        drop_factors(model.set_for_diffusion(factors))
        assert model.for_diffusion.items() >= UNMEASURED.items()
    wrapped = copy.deepcopy(pairs["AutoencoderKLFlux2"][1])
    before = wrapped.for_diffusion
    drop_factors(wrapped)
    assert wrapped.for_diffusion == before
    drop_factors(wrapped.set_for_diffusion({"latents_mean": None, "scaling_factor": 3.0}))
    assert wrapped.for_diffusion.items() >= UNMEASURED.items()


class Enlarging:
    """A DiffusersAutoencoder at 2x, as far as a family looks at it."""

    enlarge, in_channels, latent_channels, downscale = 2, 3, 4, 4
    kind, frames, deterministic = "AutoencoderKLWan", True, False
    for_diffusion: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: dict[str, Any], outputs: int) -> None:
        last = SimpleNamespace(out_channels=outputs)
        self.model = SimpleNamespace(config=config, decoder=SimpleNamespace(conv_out=last))


def test_a_decoder_at_2x_has_the_images_channels():
    """Its last convolution has four times as many, in a folder's config or beside it."""
    kl = {**tiny_kl().config, "out_channels": 12}
    decoder = StableDiffusion().spec(Enlarging(kl, 12), "it").decoder_config["params"]
    assert (decoder["out_channels"], decoder["enlarge"]) == (3, 2)
    for given, outputs, found in ((12, 12, 3), (3, 12, 3)):
        spec = Wrapped().spec(Enlarging({"out_channels": given, "_private": 1}, outputs), "it")
        params = spec.decoder_config["params"]
        assert params["config"] == {"out_channels": found}
        assert (params["out_channels"], params["enlarge"]) == (3, 2)
        assert spec.encoder_config["params"]["latent_dim"] == 8
    plain = Enlarging({"out_channels": 12}, 12)
    plain.enlarge = 1
    params = Wrapped().spec(plain, "it").decoder_config["params"]
    assert params["config"] == {"out_channels": 12}


def test_the_networks_of_an_autoencoder_of_representations():
    """Each half has its own arguments beside diffusers' config.

    32 / 8 positions a side, each decoded to 4 pixels.
    """
    theirs = DiffusersAutoencoder(make("AutoencoderRAE"))
    spec = Representation().spec(theirs, "it")
    given = {"config": arguments(theirs.model)}
    assert spec.encoder_config == {
        "target": "olvae.modules.others.rae.RAEEncoder",
        "params": {**given, "latent_dim": 64, "image_size": 16, "downscale": 4},
    }
    assert spec.decoder_config == {
        "target": "olvae.modules.others.rae.RAEDecoder",
        "params": {**given, "z_channels": 32, "upscale": 4},
    }
    assert spec.embed_dim == 32
    flat = DiffusersAutoencoder(make("AutoencoderRAE"))
    flat.model.register_to_config(reshape_to_2d=False)
    with pytest.raises(ConfigError, match="it: reshape_to_2d: false"):
        Representation().spec(flat, "it")


@torch.no_grad()
def test_an_autoencoder_of_representations_has_diffusers_function_and_weights(monkeypatch):
    see_patches(monkeypatch)
    theirs = DiffusersAutoencoder(make("AutoencoderRAE")).eval()
    ours = theirs.as_litevae("it")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    z = theirs.encode(x).mean
    torch.testing.assert_close(ours.encode(x).mean, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z), rtol=1e-5, atol=1e-5)
    family = family_of(ours)
    assert family.kind(ours) == "AutoencoderRAE"
    assert family.config(ours) == arguments(theirs.model)
    before, after = theirs.model.state_dict(), family.to_diffusers(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ours.quantizer = Quantizer(64, 32, 32)
    with pytest.raises(ValueError, match="no quantizer"):
        family.to_diffusers(ours)
    ours.decoder.node["params"]["config"] = {}
    with pytest.raises(ValueError, match="two AutoencoderRAE"):
        family.config(ours)


@torch.no_grad()
def test_taesd_goes_back_in_its_own_units_alone():
    theirs = make("AutoencoderTiny")
    ours = DiffusersAutoencoder(theirs).as_litevae("it")
    family, before = family_of(ours), theirs.state_dict()
    assert family.kind(ours) == "AutoencoderTiny"
    config = family.config(ours)
    assert json.loads(json.dumps(config)) == {key: arguments(theirs)[key] for key in config}
    assert diffusers.AutoencoderTiny(**config).state_dict().keys() == before.keys()
    after = family.to_diffusers(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    other = copy.deepcopy(ours)
    other.quantizer = Quantizer(8, 4, 4)
    ours.decoder.latents_std.mul_(2)
    for model in (ours, other):
        with pytest.raises(ValueError, match="neither a quantizer nor two units"):
            family.to_diffusers(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_block_out_channels": (8, 8, 16, 8)},
        {"act_fn": "gelu"},
        {"upsampling_scaling_factor": 3},
        {},
    ],
)
def test_tiny_autoencoders_of_another_form_than_taesd_are_refused(changes):
    theirs = SimpleNamespace(
        model=SimpleNamespace(config={**make("AutoencoderTiny").config, **changes}),
        latent_channels=4,
        in_channels=3,
        enlarge=1,
        for_diffusion={},
    )
    if not changes:
        assert Tiny().spec(theirs, "it").embed_dim == 4
        return
    with pytest.raises(ConfigError, match="it: only TAESD's form"):
        Tiny().spec(theirs, "it")


@torch.no_grad()
def test_taesds_latents_begin_in_its_own_units():
    ours = DiffusersAutoencoder(make("AutoencoderTiny")).as_litevae("it")
    for half in (ours.encoder, ours.decoder):
        assert torch.equal(half.latents_mean, torch.zeros(4, 1, 1))
        assert torch.equal(half.latents_std, torch.ones(4, 1, 1))
