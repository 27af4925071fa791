"""Shared low-pass: latent and target lose the same frequencies, and what contradicts it."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from olvae.config import ConfigError
from olvae.models.parts.part import Step
from olvae.models.parts.statistics.shared_low_pass import SharedLowPass
from olvae.models.updates.optimizers import mix_seeds
from tests.conftest import parts
from tests.models.steps import against, build, fit, metrics, source


def step_of(latent, target, seed: int = 0, warming_up: bool = False) -> Step:
    rng = np.random.default_rng(seed)
    step = Step(target, None, rng, warming_up=warming_up, adversary_plays=True)
    step.latent, step.target = latent, target
    return step


def lost(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """Which coefficients of 8x8 blocks are gone, (8, 8)."""
    assert before.shape[-2:] == (8, 8)
    kept = dctn(after.double().numpy(), axes=(-2, -1), norm="ortho")
    return (np.abs(kept) < 1e-5).all((0, 1))


def test_each_cut_is_drawn_and_takes_the_papers_frequencies():
    u, v = np.mgrid[:8, :8]
    part = SharedLowPass()
    seen = set()
    for seed in range(40):
        latent, target = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64, 64)
        step = step_of(latent, target, seed)
        part.on_latent(None, step)
        gone = lost(latent, step.latent)
        cuts = [cut for cut in (0, 8, 10, 12) if np.array_equal(gone, u + v >= 15 - cut)]
        assert len(cuts) == 1
        seen.update(cuts)
        assert np.array_equal(lost(target[..., :8, :8], step.target[..., :8, :8]), gone)
        assert step.adversary_plays == (cuts == [0])
    assert seen == {0, 8, 10, 12}


def test_gradient_is_filtered_too():
    latent = torch.randn(1, 1, 8, 8, requires_grad=True)
    part = SharedLowPass(cuts=[10])
    (gradient,) = torch.autograd.grad(part(latent, 10).square().sum(), latent)
    torch.testing.assert_close(gradient, 2 * part(latent.detach(), 10), rtol=1e-4, atol=1e-5)


def test_nothing_is_filtered_while_the_discriminator_warms_up():
    latent, target = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64, 64)
    step = step_of(latent, target, warming_up=True)
    SharedLowPass(cuts=[12]).on_latent(None, step)
    assert step.latent is latent
    assert step.target is target
    assert step.adversary_plays


def test_step_by_hand_compares_with_the_filtered_image(image_folder):
    model = build(parts=parts(shared_low_pass={"cuts": [2], "block": 2}), sample_posterior=False)
    x = model.images(next(iter(source(image_folder).train_loader())))
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    posterior = model.encode(x)
    part = model.parts["shared_low_pass"]
    # Of 2x2 positions or pixels, a cut of 2 leaves the mean.
    mean = posterior.mean.mean((2, 3), keepdim=True).expand_as(posterior.mean)
    torch.testing.assert_close(part(posterior.mean, 2), mean, rtol=0, atol=1e-5)
    target = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted, terms = model.objective(target, model.decode(mean), posterior, x)
    values = metrics(fit(model, image_folder, 1))
    assert values["train/loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert values["train/kl"] == pytest.approx(terms["kl"].item(), rel=1e-4)


@pytest.mark.parametrize("adversary", [False, True])
def test_the_adversary_plays_on_cut_steps_if_asked(adversary):
    step = step_of(torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64, 64))
    SharedLowPass(cuts=[8], adversary=adversary).on_latent(None, step)
    assert step.adversary_plays is adversary


def test_training_against_a_discriminator_runs_with_and_without_it(image_folder):
    """A step where it does not play leaves it as it was."""
    for adversary in (False, True):
        given = {"cuts": [0, 2], "block": 2, "adversary": adversary}
        model = build(against(), parts=parts(shared_low_pass=given))
        model.parts["shared_low_pass"].cuts = [2]
        values = metrics(fit(model, image_folder, 1))
        assert ("train/discriminator" in values) is adversary


@pytest.mark.parametrize("params", [{"cuts": []}, {"cuts": [0]}, {"cuts": [15]}, {"cuts": [-1]}])
def test_cuts_that_make_no_sense_are_refused(params):
    with pytest.raises(ValueError, match="cuts must"):
        SharedLowPass(**params)
    assert SharedLowPass(cuts=[14]).cuts == [14]
    with pytest.raises(ValueError, match="block must be at least 2, got 1"):
        SharedLowPass(block=1)


def test_cuts_by_which_the_adversary_never_plays_are_refused():
    given = {"cuts": [1, 2], "block": 2}
    with pytest.raises(ConfigError, match="cuts: every"):
        build(against(), parts=parts(shared_low_pass=given))
    build(parts=parts(shared_low_pass=given))
    build(against(), parts=parts(shared_low_pass={**given, "adversary": True}))


def test_other_parts_that_move_latents_are_refused():
    with pytest.raises(ConfigError, match=r"parts\.equivariance .*sides"):
        build(parts=parts(shared_low_pass={}, equivariance={}))


def test_sizes_whose_latents_are_no_blocks_are_refused(image_folder):
    model = build(parts=parts(shared_low_pass={}))
    with pytest.raises(ConfigError, match=r"block: 8 .*data\.params\.size"):
        model.check(source(image_folder, size=16))
