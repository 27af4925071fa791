"""Latent masking: shares of blocks, the token's gradient, and what contradicts it."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from olvae.config import ConfigError
from olvae.models.parts.part import Step
from olvae.models.parts.statistics.latent_masking import LatentMasking
from tests.conftest import parts
from tests.models.steps import against, build, fit, moved, snapshot, source


def masking(channels: int = 4, **given) -> LatentMasking:
    part = LatentMasking(**given)
    model = type("Model", (), {"autoencoder": type("Vae", (), {"latent_channels": channels})})
    part.attach(model)
    return part


def replaced(part: LatentMasking, z: torch.Tensor, ratio: float) -> torch.Tensor:
    """Where the token is, (B, h, w); elsewhere the latent stays."""
    found = part(z, ratio)
    token = (found == part.token).all(1)
    kept = ~token[:, None].expand_as(z)
    assert torch.equal(found[kept], z[kept])
    return token


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_share_of_the_positions_of_each_image_is_the_token(ratio):
    token = replaced(masking(), torch.randn(5, 4, 8, 8), ratio)
    assert token.sum((1, 2)).tolist() == [round(64 * ratio)] * 5
    if ratio in (0.25, 0.5, 0.75):
        assert len({tuple(mask.flatten().tolist()) for mask in token}) == 5


def test_every_position_is_as_likely():
    token = replaced(masking(), torch.randn(2000, 4, 2, 2), 0.25)
    for count in token.sum(0).flatten().tolist():
        assert binomtest(int(count), 2000, 0.25).pvalue > 1e-4


def test_blocks_are_whole_and_what_is_no_block_stays():
    token = replaced(masking(block=2), torch.randn(6, 4, 5, 6), 0.5)
    blocks = token[:, :4].float().unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4))
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}
    assert blocks.sum((1, 2)).tolist() == [3.0] * 6
    assert not token[:, 4].any()


def test_gradients_are_the_tokens_where_it_is_and_the_latents_elsewhere():
    part = masking()
    z = torch.randn(3, 4, 4, 4, requires_grad=True)
    along = torch.randn(3, 4, 4, 4)
    found = part(z, 0.5)
    (found * along).sum().backward()
    token = (found == part.token).all(1, keepdim=True)
    assert torch.equal(z.grad, torch.where(token, 0.0, along))
    wanted = torch.where(token, along, 0.0).double().sum((0, 2, 3), keepdim=True)
    torch.testing.assert_close(part.token.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_replaced_gives_the_token_a_gradient_of_zero():
    """So that processes agree on what has a gradient."""
    part = masking()
    part(torch.randn(1, 4, 4, 4), 0.0).sum().backward()
    assert torch.equal(part.token.grad, torch.zeros(1, 4, 1, 1))


def test_ratios_are_drawn_by_their_probabilities_once_for_an_update():
    part = masking()
    counts = {0: 0, 16: 0, 32: 0, 48: 0}
    for seed in range(600):
        step = Step(
            torch.zeros(1), None, np.random.default_rng(seed), warming_up=False,
            adversary_plays=False,
        )  # fmt: skip
        z = step.latent = torch.randn(2, 4, 8, 8)
        part.on_latent(None, step)
        one, other = (step.latent != z).all(1).sum((1, 2)).tolist()
        assert one == other
        counts[one] += 1
    for count, probability in zip(counts.values(), (0.7, 0.1, 0.1, 0.1), strict=True):
        assert binomtest(count, 600, probability).pvalue > 1e-4


def test_nothing_is_replaced_while_the_discriminator_warms_up():
    rng = np.random.default_rng(0)
    step = Step(torch.zeros(1), None, rng, warming_up=True, adversary_plays=True)
    z = step.latent = torch.randn(2, 4, 8, 8)
    masking(ratios=[1.0], probabilities=[1.0]).on_latent(None, step)
    assert step.latent is z


def test_training_moves_token_and_networks_and_validation_masks_nothing(image_folder):
    given = {"ratios": [0.5], "probabilities": [1.0]}
    model = build(parts=parts(latent_masking=given))
    x = model.images(next(iter(source(image_folder).train_loader())))
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], model.decode(model.encode(x).mean))
    before = snapshot(model)
    fit(model, image_folder, 1)
    changed = moved(before, snapshot(model))
    assert "parts.latent_masking.token" in changed
    assert any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("decoder.") for name in changed)
    assert "parts.latent_masking.token" not in {
        name for name, _ in model.autoencoder.named_parameters()
    }


def test_the_token_learns_in_the_players_first_optimizer_alone(image_folder):
    model = build(against(), parts=parts(latent_masking={}))
    token = model.parts["latent_masking"].token
    assert any(p is token for p in model.autoencoder_parameters())
    assert all(p is not token for p in model.adversary.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratios": []}, "ratios must be from 0 to 1"),
        ({"ratios": [0.0], "probabilities": [1.0]}, "and not all 0"),
        ({"ratios": [0.5, 2.0]}, "ratios must be from 0 to 1"),
        ({"ratios": [0.0, 0.5]}, "probabilities must be as many as ratios, 2, got 4"),
        ({"ratios": [0.0, 0.5], "probabilities": [0.7, 0.7]}, "must sum to 1"),
        ({"ratios": [0.0, 0.5], "probabilities": [1.5, -0.5]}, "must sum to 1"),
        ({"block": 0}, "block must be at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        LatentMasking(**given)


def test_probabilities_sum_to_1_but_for_their_rounding():
    """One may be 0."""
    part = LatentMasking(ratios=[0.0, 0.5, 1.0], probabilities=[0.0, 0.3333333, 0.6666666])
    assert part.probabilities[0] == 0.0
    assert sum(part.probabilities) == pytest.approx(1.0, abs=1e-12)


def test_settings_that_contradict_it_are_refused(image_folder):
    with pytest.raises(ConfigError, match=r"latent_masking: .*freeze_decoder"):
        build(parts=parts(latent_masking={}), freeze_decoder=True)
    with pytest.raises(ConfigError, match=r"after parts\.latent_masking"):
        build(parts=parts(channel_masking={"widths": [2, 4]}, latent_masking={}))
    model = build(parts=parts(latent_masking={"block": 4}))
    with pytest.raises(ConfigError, match=r"2 .*block of 4"):
        model.check(source(image_folder))
    model.check(source(image_folder, size=32))
