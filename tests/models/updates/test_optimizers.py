"""Seeds, learning rates, and the states of optimizers."""

import pytest
import torch
from torch import nn

from olvae.models.updates.optimizers import lr_factor, make_optimizer, mix_seeds


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
