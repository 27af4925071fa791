"""Bad steps on a Mac, whose fused Adam ignores ``found_inf`` and the scale of fp16's gradients."""

import pytest
import torch

from olvae.models.updates.nonfinite import NonFiniteGuard
from olvae.models.updates.optimizers import OPTIMIZERS, make_optimizer
from tests.mac import emulated_mac
from tests.models.steps import against, assert_same, build_shallow, fit
from tests.models.updates.test_nonfinite import BAD, CASES, EVERYTHING, Before


@pytest.fixture(autouse=True)
def mac(monkeypatch):
    with emulated_mac(monkeypatch) as mac:
        yield mac


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "muon"])
@pytest.mark.parametrize("precision", ["32-true", pytest.param("16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["a loss is nan", pytest.param("LeCam", marks=pytest.mark.slow)])
def test_a_bad_step_changes_nothing_on_mps(image_folder, case, precision, optimizer):
    spoil, term = CASES[case]
    model = build_shallow(
        against(**EVERYTHING), use_ema=True, gradient_clip_val=1.0, optimizer=optimizer
    )
    spoil(model)
    before = Before()
    fit(model, image_folder, 4, callbacks=[before], accelerator="mps", precision=precision)
    history = before.history
    assert {t.device.type for t in history[BAD].values() if t.ndim > 1} == {"mps"}
    assert_same(history[BAD], history[BAD + 1])
    assert all(t.isfinite().all() for t in history[3].values())
    changed = [n for n, t in history[3].items() if not torch.equal(history[BAD][n], t)]
    assert {name.partition(".")[0] for name in changed} > {"encoder", "adversary", "average"}
    seen = [step for step in model.guard.collect() if step is not None]
    assert [(step.step, step.term) for step in seen if not step.overflow][-1] == (BAD + 1, term)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_kernels_of_mps_alone_would_update(name):
    """Without this the tests above would show nothing."""
    for skips in (False, True):
        weight = torch.nn.Parameter(torch.ones(16, 16).to("mps"))
        bias = torch.nn.Parameter(torch.ones(16).to("mps"))
        optimizer = make_optimizer(name, [weight, bias], 0.1, (0.9, 0.99))
        for p in (weight, bias):
            p.grad = torch.full_like(p, torch.nan)
        bad = torch.ones((), device="mps")
        if skips:
            NonFiniteGuard.skip_if(bad, optimizer, None)
        optimizer.found_inf = bad
        optimizer.step()
        assert bool((bias == 1).all()) == skips
        assert not optimizer.state or not skips
