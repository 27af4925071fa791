"""Classes of diffusers as a LiteVAE object, trained for four steps, and back, against diffusers' own calls."""

import copy
import json
from typing import Any

import diffusers
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export.formats import DiffusersLayout
from olvae.models.loading import diffusers_models
from olvae.models.loading.diffusers_models import DiffusersAutoencoder
from olvae.models.loading.families import family_of
from olvae.models.loading.targets import find_target
from olvae.modules.others.wrapped import TRAINED, DiffusersEncoder
from tests.models.loading.classes import make

FORMS = {name: (name, {}) for name in TRAINED} | {
    "Wan 2.2": ("AutoencoderKLWan", {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True})
}
VIDEO = {"AutoencoderKLQwenImage", "AutoencoderKLWan"}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[DiffusersAutoencoder, LiteVAE]]:
    """Diffusers' model, and ours of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_models, "PROBE", 32)
        found = {n: DiffusersAutoencoder(make(k, **a)).eval() for n, (k, a) in FORMS.items() if hasattr(diffusers, k)}
        return {name: (theirs, theirs.as_litevae("it")) for name, theirs in found.items()}


def arguments(model: Any) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in model.config.items() if key[0] != "_"}))


def train(model: LiteVAE, *halves: str) -> None:
    """Four steps of Adam on an image."""
    parameters = [p for half in halves for p in getattr(model, half).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    x = torch.rand(1, model.in_channels, 16, 16) * 2 - 1
    for _ in range(4):
        optimizer.zero_grad()
        image, posterior = model(x)
        ((image - x).square().mean() + 0.1 * (posterior.mean - 1).square().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_the_same_function_and_the_same_weights(name, pairs):
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
    torch.testing.assert_close(ours.decode(expected.mean), theirs.decode(expected.mean), rtol=1e-5, atol=1e-5)
    before, after = theirs.model.state_dict(), family_of(ours).theirs(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ours.for_diffusion == theirs.for_diffusion
    again = LiteVAE.from_config(**ours.config)  # what a run's config and an export hold
    assert again.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("halves", [("decoder",), ("encoder", "decoder")], ids=" ".join)
@pytest.mark.parametrize("name", FORMS)
def test_trained_and_written_back(name, halves, pairs, tmp_path, monkeypatch):
    if name not in pairs:
        pytest.skip("a later diffusers has it")
    monkeypatch.setattr(diffusers_models, "PROBE", 32)
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


def test_an_export_in_our_own_format(pairs, tmp_path):
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
    back = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False).eval()
    assert back.config.decoder_block_out_channels == [4, 4]
    assert torch.equal(back.bn.running_var, pairs["AutoencoderKLFlux2"][0].model.bn.running_var)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(back.decode(z).sample, small.decode(z))


def test_what_can_not_be_trained(monkeypatch):
    monkeypatch.setattr(diffusers_models, "PROBE", 32)
    with pytest.raises(ConfigError, match=r"^it: diffusers' AutoencoderKLMagvit can be a teacher; those that can be"):
        DiffusersAutoencoder(make("AutoencoderKLMagvit")).as_litevae("it")
    with pytest.raises(ValueError, match=r"^UNet2DModel: only AutoencoderDC, "):
        DiffusersEncoder("UNet2DModel", {}, 8)


def test_checkpointing(pairs):
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
