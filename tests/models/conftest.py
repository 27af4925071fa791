"""Every update of an optimizer, as a fixture."""

import pytest
import torch

from tests.models.steps import Update, Updates


@pytest.fixture
def updates(monkeypatch) -> Updates:
    """Every update of either optimizer, in order."""
    seen = Updates()
    step = torch.optim.Adam.step

    def record(self, *args, **kwargs):
        (group,) = self.param_groups
        closure = kwargs.get("closure") or (args[0] if args else None)
        if closure is not None:
            closure()
        gradients = [p.grad.clone() for p in group["params"]]
        seen.append(Update(group["params"], gradients, group["lr"], group["betas"]))
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return seen
