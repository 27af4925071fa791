"""ActivationBound: the excess of activations over a bound."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from olvae.models.parts.activation_bound import ActivationBound
from tests.conftest import parts
from tests.models.steps import Each, build, fit, metrics, objective


class Pair(nn.Module):
    """An inner module with two outputs, of which none is watched."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 100 * x


class Small(nn.Module):
    """x -> 2x -> 6x, and a tuple on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.thrice, self.pair = (
            nn.Linear(1, 1, bias=False),
            nn.Linear(1, 1, bias=False),
            Pair(),
        )
        with torch.no_grad():
            self.twice.weight.fill_(2.0)
            self.thrice.weight.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.thrice(self.pair(self.twice(x))[0])
        return out


def watched(bound: ActivationBound, network: nn.Module):
    return bound.watch(SimpleNamespace(trained_networks=[network]))


def penalty_of(bound: ActivationBound) -> Tensor:
    (loss, _), *_ = bound.losses(None, None).values()
    return loss


def test_activation_bound_excess_by_hand():
    """Activations 2 and -8 of ``twice``, 6 and -24 of ``thrice``,
    which are those of the whole too; the bound is 4.
    """
    network, bound = Small(), ActivationBound(4.0)
    x = torch.tensor([[1.0], [-4.0]])
    with watched(bound, network):
        y = network(x)
    assert y.flatten().tolist() == [6.0, -24.0]
    double, triple = (8 / 4 - 1) ** 2 / 2, ((6 / 4 - 1) ** 2 + (24 / 4 - 1) ** 2) / 2
    assert penalty_of(bound).item() == pytest.approx(double + 2 * triple, rel=1e-6)
    high, low = ActivationBound(24.0), ActivationBound(1e-3)
    with watched(high, network):
        network(torch.tensor([[4.0]]))
    assert penalty_of(high).item() == 0.0
    with watched(low, network.half()):
        network(torch.tensor([[100.0]]).half())
    penalty = penalty_of(low)  # 600000 times the bound, squared: beyond fp16
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(
        (200 / 1e-3 - 1) ** 2 + 2 * (600 / 1e-3 - 1) ** 2, rel=1e-3
    )


def test_activation_bound_gradient_by_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 1, 1)).double()
    weights = [p.detach().clone().requires_grad_() for p in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    bound = ActivationBound(0.2)

    def penalty(*values: Tensor) -> Tensor:
        with watched(bound, network):
            torch.func.functional_call(network, dict(zip(names, values, strict=True)), (x,))
        return penalty_of(bound)

    assert penalty(*weights).item() > 0
    assert torch.autograd.gradcheck(penalty, weights)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_activation_bound_hooks_are_removed_after_an_error_too():
    network, bound = Small(), ActivationBound(4.0)
    with watched(bound, network):
        assert hooks(network) == 4
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="mat1 and mat2"), watched(bound, network):
        network(torch.zeros(1, 2))
    assert hooks(network) == 0
    network(torch.tensor([[99.0]]))  # not watched
    with watched(bound, network):
        network(torch.tensor([[0.1]]))
    assert penalty_of(bound).item() == 0.0


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_a_bound_is_above_zero(bound):
    with pytest.raises(ValueError, match="bound must"):
        ActivationBound(bound)
    with pytest.raises(ValueError, match="weight must not be negative"):
        ActivationBound(1.0, bound - 1.0)


@pytest.mark.parametrize("checkpoint", [False, True, "decoder"])
@pytest.mark.parametrize("compiled", [False, True])
def test_activations_are_neither_dropped_nor_compiled(checkpoint, compiled):
    model = SimpleNamespace(checkpoint=checkpoint, compiled=compiled)
    lines = [line.partition(",")[0] for line in ActivationBound(1.0).conflicts(model)]
    assert lines == ["checkpoint"] * bool(checkpoint) + ["compile"] * compiled


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_activation_bound_lowers_activations_of_what_is_trained(image_folder, frozen):
    pixels = objective(kl_weight=0, wavelet_weight=0)
    settings = {f"freeze_{frozen}": True, "lossconfig": pixels, "learning_rate": 3e-2}
    model, penalties = build(parts=parts(activation_bound={"bound": 0.1}), **settings), []
    half = model.decoder if frozen == "encoder" else model.encoder
    assert model.trained_networks == [half]

    def look(m) -> None:
        values = metrics(m)
        terms = sum(
            weight * values[f"train/{name}"] for name, weight in m.objective.weights.items()
        )
        assert values["train/loss"] == pytest.approx(terms + values["train/activation"], rel=1e-5)
        penalties.append(values["train/activation"])

    fit(model, image_folder, 8, log_every_n_steps=1, callbacks=[Each(look)])
    assert penalties[-1] < 0.8 * penalties[0]
