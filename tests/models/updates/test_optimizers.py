"""Seeds, learning rates, and the states of optimizers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from olvae.models.updates.muon import Muon
from olvae.models.updates.optimizers import (
    follow,
    lr_factor,
    make_optimizer,
    make_optimizers,
    mix_seeds,
)


def test_seeds_differ_with_every_number_and_with_their_order():
    grid = [
        (seed, step, micro, rank)
        for seed in (0, 1, 7)
        for step in range(9)
        for micro in (0, 1)
        for rank in (0, 1)
    ]
    seeds = [mix_seeds(*numbers) for numbers in grid]
    assert len(set(seeds)) == len(grid)
    assert seeds == [mix_seeds(*numbers) for numbers in grid]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch takes
    assert mix_seeds(1, 2) != mix_seeds(2, 1)
    # Others would give a resumed run other noise.
    (word,) = np.random.SeedSequence((2, 1, 2)).generate_state(1, np.uint64)
    assert mix_seeds(1, 2) == word // 2


def test_lr_factor_of_warm_up_and_cosine():
    assert [lr_factor(s, "constant", 4, 100, 0.0) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    values = [lr_factor(s, "cosine", 10, 110, 0.1) for s in (10, 60, 110, 500)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_loaded_moments_have_the_strides_of_their_parameters(name):
    """A run may change its memory layout when it is resumed;
    fused kernels read moments as their parameters lie.
    """
    torch.manual_seed(0)
    weights, gradients = torch.randn(8, 8, 3, 3), torch.randn(3, 8, 8, 3, 3)

    def trained(
        steps: range, layout: torch.memory_format, state: dict | None = None, start=weights
    ):
        parameter = nn.Parameter(start.clone(memory_format=layout))
        optimizer = make_optimizer(name, [parameter], 0.1, (0.5, 0.9))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            parameter.grad = gradients[step].clone(memory_format=layout)
            optimizer.step()
        return parameter.detach(), optimizer

    plain, lasting = torch.contiguous_format, torch.channels_last
    whole, _ = trained(range(3), plain)
    begun, optimizer = trained(range(2), plain)
    continued, other = trained(range(2, 3), lasting, optimizer.state_dict(), begun)
    assert torch.equal(whole, continued)
    (state,) = other.state.values()
    moments = [value for value in state.values() if value.ndim == 4]
    assert len(moments) == {"adam": 2, "muon": 1}[name]
    assert all(moment.stride() == continued.stride() != whole.stride() for moment in moments)


def test_a_loaded_optimizer_keeps_its_own_rate_and_betas():
    """The saved rate is scaled, as a schedule had lowered it; equal settings change no bit."""
    weights = [nn.Parameter(torch.ones(3))]
    before = make_optimizer("adam", weights, 0.3, (0.5, 0.9))
    before.param_groups[0] |= {"initial_lr": 0.3, "lr": 0.3 * 0.7}
    same = make_optimizer("adam", weights, 0.3, (0.5, 0.9))
    other = make_optimizer("adam", weights, 0.03, (0.0, 0.99))
    for optimizer in (same, other):
        optimizer.load_state_dict(before.state_dict())
    assert same.state_dict() == before.state_dict()
    (group,) = other.param_groups
    assert group["lr"] == pytest.approx(0.03 * 0.7, rel=1e-12)
    assert (group["initial_lr"], group["betas"]) == (0.03, (0.0, 0.99))


def a_model(**changes) -> SimpleNamespace:
    """What its optimizers ask of a model: a cosine over the run's 20 steps, after 4 of warm-up."""
    settings = {"learning_rate": 1e-2, "betas": (0.5, 0.9), "optimizer": "adam"}
    settings |= {"scheduler": "cosine", "warmup_steps": 4, "decay_steps": None}
    settings |= {"min_lr_factor": 0.1, "rate_factor": 1.0, "global_step": 0, "adversary": None}
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))]
    return SimpleNamespace(
        trainer=SimpleNamespace(max_steps=20),
        autoencoder_parameters=lambda: weights,
        **{**settings, **changes},
    )


def by_hand(step: int, end: int = 20) -> float:
    if step < 4:
        return (step + 1) / 4
    progress = min(1.0, (step - 4) / (end - 4))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(("decay_steps", "end"), [(None, 20), (12, 12)])
def test_the_autoencoders_schedule_by_hand(decay_steps, end):
    """To the run's last step, or to its own; times the factor of a return."""
    model = a_model(decay_steps=decay_steps)
    (optimizer,), (schedule,) = make_optimizers(model)
    (group,) = optimizer.param_groups
    assert [len(p) for p in group["params"]] == [1, 2]
    assert (group["initial_lr"], group["betas"]) == (1e-2, (0.5, 0.9))
    (factor,) = schedule.lr_lambdas
    assert [factor(step) for step in range(25)] == pytest.approx(
        [by_hand(step, end) for step in range(25)]
    )
    model.rate_factor = 0.5
    assert factor(7) == pytest.approx(0.5 * by_hand(7, end))


def test_the_discriminator_warms_up_from_its_own_first_update():
    """Times the autoencoder's schedule, after its warm-up and from the start step on."""
    adversary = SimpleNamespace(
        start_step=8, learning_rate_ratio=2.0, betas=(0.0, 0.99), discriminator=nn.Linear(2, 1)
    )
    model = a_model(adversary=adversary, optimizer="muon")
    (first, second), (_, schedule) = make_optimizers(model)
    assert isinstance(first, Muon)
    assert isinstance(second, torch.optim.Adam)
    (group,) = second.param_groups
    assert (group["initial_lr"], group["betas"]) == (2e-2, (0.0, 0.99))
    assert len(group["params"]) == 2
    (factor,) = schedule.lr_lambdas
    for step, at in ((0, 8), (8, 8), (15, 15)):
        model.global_step = step
        rises = [factor(update) / by_hand(at) for update in (0, 1, 3, 4, 100)]
        assert rises == pytest.approx([0.25, 0.5, 1, 1, 1])
    adversary.start_step = 0
    model = a_model(adversary=adversary)
    (factor,) = make_optimizers(model)[1][1].lr_lambdas
    assert factor(3) == pytest.approx(by_hand(4))  # after the warm-up
    model.warmup_steps = 0
    assert factor(0) == pytest.approx(1.0)


def test_loaded_rates_of_zero_begin_at_the_base_rate():
    weights = [nn.Parameter(torch.ones(3))]
    before = make_optimizer("adam", weights, 0.3, (0.5, 0.9))
    before.param_groups[0] |= {"initial_lr": 0.0, "lr": 0.0}
    after = make_optimizer("adam", weights, 0.2, (0.5, 0.9))
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["lr"] == 0.2


def scheduled(saved: float, base: float, epoch: int = 3) -> LambdaLR:
    """A schedule of halves, as it was loaded: with an old rate."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=base)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    schedule.last_epoch = epoch
    optimizer.param_groups[0]["lr"] = saved
    return schedule


def test_rates_follow_a_changed_schedule_after_a_resume():
    """Of both players; none where the first one's is as it was saved."""
    changed = [scheduled(0.7, 8.0), scheduled(0.6, 16.0)]
    follow(changed)
    assert [s.optimizer.param_groups[0]["lr"] for s in changed] == [1.0, 2.0]
    same = [scheduled(1.0, 8.0), scheduled(0.6, 16.0)]
    follow(same)
    assert [s.optimizer.param_groups[0]["lr"] for s in same] == [1.0, 0.6]
    second = [scheduled(0.7, 8.0), scheduled(2.0, 16.0), scheduled(0.1, 8.0)]
    follow(second)
    assert [s.optimizer.param_groups[0]["lr"] for s in second] == [1.0, 2.0, 1.0]


def test_lr_factor_at_its_edges():
    assert lr_factor(0, "cosine", 0, 0, 0.2) == 1.0
    assert lr_factor(1, "cosine", 0, 0, 0.2) == pytest.approx(0.2)
    assert lr_factor(5, "cosine", 4, 8, 0.2) == pytest.approx(
        0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    )
