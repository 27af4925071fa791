"""Muon: against NumPy's singular value decomposition, torch's own Muon and torch's Adam;
skipped updates.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from olvae.models.updates import muon
from olvae.models.updates.gradients import parameters_of
from olvae.models.updates.muon import RMS, Muon, orthogonalize

RATE, BETAS = 0.01, (0.9, 0.99)


@pytest.mark.parametrize("shape", [(12, 108), (108, 12), (16, 16)], ids=str)
def test_muon_orthogonal_factor_against_numpy(shape):
    """Singular vectors stay, singular values of a hundredth of the largest to all of it come to
    about 1.
    """
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    given = (u * np.geomspace(0.01, 1, min(shape))) @ v
    two = torch.from_numpy(np.stack([given, 1e-4 * given])).float()
    one, other = orthogonalize(two).double().numpy()
    np.testing.assert_allclose(one, other, atol=1e-4)  # the scale of a gradient is no matter
    values = u.T @ one @ v.T
    assert abs(values - np.diag(np.diag(values))).max() < 1e-4
    assert 0.6 < np.diag(values).min() < np.diag(values).max() < 1.3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(two), orthogonalize(two.clone()))
        assert orthogonalize(two).dtype == torch.float32
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def test_muon_iterates_on_the_shorter_side():
    """Of a tall matrix as of a wide one: products of 4 x 4, of 4 x 4 with 4 x 64."""
    counts = []
    for shape in ((4, 64), (64, 4)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(1, *shape))
        counts.append(counter.get_total_flops())
    assert counts == [5 * 2 * (4 * 64 * 4 + 4 * 4 * 4 + 4 * 4 * 64)] * 2


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0) -> None:
    for step in range(first, first + steps):
        for p in parameters_of(optimizer):
            p.grad = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(100 * step + p.numel())
            )
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_matrices_against_torchs_muon():
    """Which iterates in bfloat16, and takes a convolution only as a matrix."""
    ours, theirs = weights((8, 24), (24, 8), (12, 8, 3, 3)), weights((8, 24), (24, 8), (12, 72))
    begin = [p.detach().clone() for p in theirs]
    train(Muon(ours, RATE, BETAS))
    settings = {
        "weight_decay": 0.0,
        "momentum": BETAS[0],
        "nesterov": True,
        "adjust_lr_fn": "match_rms_adamw",
    }
    train(torch.optim.Muon(theirs, lr=RATE * RMS / 0.2, **settings))
    for one, other, start in zip(ours, theirs, begin, strict=True):
        change = other.detach() - start
        difference = (one.detach().view_as(other) - start - change).norm() / change.norm()
        assert difference < 0.05


def test_muon_vectors_and_depthwise_filters_against_adam():
    """Vectors, images' channels and depthwise filters, bit for bit; fused kernels on both sides."""
    shapes = (12,), (1,), (16, 3, 8, 8), (3, 16, 3, 3), (16, 1, 3, 3)
    ours, theirs = weights(*shapes), weights(*shapes)
    train(Muon(ours, RATE, BETAS))
    train(torch.optim.Adam(theirs, RATE, BETAS, fused=True))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_muon_skipped_update_changes_nothing():
    """NaN in the gradients; the next update is as if it had not been there."""
    trained, plain = weights((8, 8, 3, 3), (8,)), weights((8, 8, 3, 3), (8,))
    optimizer, other = Muon(trained, RATE, BETAS), Muon(plain, RATE, BETAS)
    for one in (optimizer, other):
        one.found_inf = torch.zeros(())
        train(one)
    for p in trained:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(trained, plain, strict=True))
    for one in (optimizer, other):
        one.found_inf = torch.zeros(())
        train(one, 1, first=9)
    assert all(torch.equal(one, two) for one, two in zip(trained, plain, strict=True))


def test_muon_under_torchs_loss_scaler():
    """The scale is taken off by the optimizer; an update with an overflow is skipped, and the
    scale halved.
    """
    scaled, plain = weights((8, 8, 3, 3), (8,)), weights((8, 8, 3, 3), (8,))
    optimizer, scaler = Muon(scaled, RATE, BETAS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    other = Muon(plain, RATE, BETAS)
    train(other, 1)
    for gradients in (
        [1024 * p.grad for p in plain],
        [torch.full_like(p, torch.inf) for p in plain],
    ):
        for p, gradient in zip(scaled, gradients, strict=True):
            p.grad = gradient
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(one, two) for one, two in zip(scaled, plain, strict=True))
        moments = [
            made.state[p]["exp_avg"] for made, (p, _) in ((optimizer, scaled), (other, plain))
        ]
        assert torch.equal(*moments)
    assert scaler.get_scale() == 512


def test_muon_loaded_state_continues_bit_for_bit():
    """One moment of a matrix, two of the rest; frozen parameters and a closure as in any
    optimizer.
    """
    whole, halves = weights((8, 8), (8,)), weights((8, 8), (8,))
    train(Muon(whole, RATE, BETAS), 4)
    begun = Muon(halves, RATE, BETAS)
    train(begun, 2)
    assert [len(state) for state in begun.state.values()] == [3, 1]
    continued = Muon(halves, RATE, BETAS)
    saved = begun.state_dict()
    saved["state"][0]["step"] = saved["state"][0]["step"].double()
    continued.load_state_dict(saved)
    # And on the weight's device: for fused kernels.
    assert continued.state[halves[1]]["step"].dtype == torch.float32
    train(continued, 2, first=2)
    assert all(torch.equal(one, two) for one, two in zip(whole, halves, strict=True))
    halves[0].grad, halves[1].grad = None, None
    assert continued.step(lambda: 2.5) == 2.5
    assert all(torch.equal(one, two) for one, two in zip(whole, halves, strict=True))


@pytest.mark.parametrize("stacked", [1, 2 * 192, 3 * 192])
def test_matrices_of_one_shape_are_stepped_in_stacks_of_a_bounded_size(stacked, monkeypatch):
    """Also those that are larger than a stack: one by one."""
    together = weights(*[(8, 24)] * 5, (16, 8))
    train(Muon(together, RATE, BETAS))
    monkeypatch.setattr(muon, "STACKED", stacked)
    sizes = []
    orthogonal = muon.orthogonalize
    monkeypatch.setattr(muon, "orthogonalize", lambda x: sizes.append(len(x)) or orthogonal(x))
    parts = weights(*[(8, 24)] * 5, (16, 8))
    train(Muon(parts, RATE, BETAS), steps=1)
    at_once = max(1, stacked // 192)
    full, rest = divmod(5, at_once)
    assert sizes == [*[at_once] * full, *[rest] * (rest > 0), 1]
    train(Muon(parts := weights(*[(8, 24)] * 5, (16, 8)), RATE, BETAS))
    for one, other in zip(together, parts, strict=True):
        torch.testing.assert_close(one, other)
