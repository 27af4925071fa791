import math

import pytest
import torch
from torch import Tensor

from olvae.losses.gan_losses import (
    ADVERSARIAL_LOSSES,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two tensors of different lengths: the mean is over each, then over the two.
REAL = [_double(2.0, -0.5), _double(0.25)]
FAKE = [_double(-3.0, 0.5), _double(-0.25)]

L = math.log1p
E = math.exp
BY_HAND = {  # name: (discriminator, generator), from the definitions, term by term
    "hinge": (((0 + 1.5) / 2 + 0.75) / 2 + ((0 + 1.5) / 2 + 0.75) / 2, ((3 - 0.5) / 2 + 0.25) / 2),
    "logistic": (
        ((L(E(-2.0)) + L(E(0.5))) / 2 + L(E(-0.25))) / 2
        + ((L(E(-3.0)) + L(E(0.5))) / 2 + L(E(-0.25))) / 2,
        ((L(E(3.0)) + L(E(-0.5))) / 2 + L(E(0.25))) / 2,
    ),
    "lsgan": (
        ((0.5 * 1 + 0.5 * 2.25) / 2 + 0.5 * 0.5625) / 2
        + ((0.5 * 9 + 0.5 * 0.25) / 2 + 0.5 * 0.0625) / 2,
        ((0.5 * 16 + 0.5 * 0.25) / 2 + 0.5 * 1.5625) / 2,
    ),
    "wgan": (
        -((2 - 0.5) / 2 + 0.25) / 2 + ((-3 + 0.5) / 2 - 0.25) / 2,
        -((-3 + 0.5) / 2 - 0.25) / 2,
    ),
}
SIGMOID = lambda t: 1 / (1 + E(-t))  # noqa: E731
BY_HAND["bce"] = (
    -((math.log(SIGMOID(2.0)) + math.log(SIGMOID(-0.5))) / 2 + math.log(SIGMOID(0.25))) / 2
    - (
        (math.log(1 - SIGMOID(-3.0)) + math.log(1 - SIGMOID(0.5))) / 2
        + math.log(1 - SIGMOID(-0.25))
    )
    / 2,
    -((math.log(SIGMOID(-3.0)) + math.log(SIGMOID(0.5))) / 2 + math.log(SIGMOID(-0.25))) / 2,
)


@pytest.mark.parametrize("name", dict.fromkeys((*ADVERSARIAL_LOSSES, *BY_HAND)))
def test_discriminator_and_generator_losses_by_hand(name: str):
    d, g = BY_HAND[name]
    assert discriminator_loss(name, REAL, FAKE).item() == pytest.approx(d, rel=1e-12)
    assert generator_loss(name, FAKE).item() == pytest.approx(g, rel=1e-12)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_gan_losses_take_half_precision_logits_in_float32(name: str):
    torch.manual_seed(0)
    r, f = torch.randn(4096).bfloat16() + 100, torch.randn(4096).bfloat16() + 100
    with torch.autocast("cpu", torch.bfloat16):
        d, g = discriminator_loss(name, [r], [f]), generator_loss(name, [f])
    assert d.dtype == g.dtype == torch.float32
    assert d.item() == pytest.approx(
        discriminator_loss(name, [r.double()], [f.double()]).item(), rel=1e-5, abs=1e-5
    )
    assert g.item() == pytest.approx(generator_loss(name, [f.double()]).item(), rel=1e-5, abs=1e-5)


def test_discriminator_accuracy_by_hand():
    real = [torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.tensor([[0.6, 0.4]])]
    fake = [torch.tensor([-2.0, -1.0, 1.0]), torch.tensor([[0.4]])]
    # fence 0: real right 2.5 of 4, fake 2 of 3; then 2 of 2, 0 of 1
    expected = ((2.5 / 4 + 2 / 3) / 2 + (2 / 2 + 0 / 1) / 2) / 2
    for name in ("hinge", "logistic", "bce"):
        assert discriminator_accuracy(real, fake, name).item() == pytest.approx(expected)
    # fence 0.5: 2 of 4, 2 of 3; 1 of 2, 1 of 1
    expected = ((2 / 4 + 2 / 3) / 2 + (1 / 2 + 1 / 1) / 2) / 2
    assert discriminator_accuracy(real, fake, "lsgan").item() == pytest.approx(expected)


def test_discriminator_accuracy_of_wgan_ignores_a_constant():
    # Means 1, -2: the fence is at -0.5.
    real = torch.tensor([3.0, 1.0, -1.0])
    fake = torch.tensor([-4.0, -2.0, 0.0])
    expected = (2 / 3 + 2 / 3) / 2
    for constant in (0.0, 100.0, -7.0):
        accuracy = discriminator_accuracy([real + constant], [fake + constant], "wgan")
        assert accuracy.item() == pytest.approx(expected)


def test_gan_losses_refuse_unknown_names_and_unpaired_logits():
    t = torch.zeros(2)
    with pytest.raises(ValueError, match=r"hinge, logistic, .*'vanilla'"):
        generator_loss("vanilla", [t])
    with pytest.raises(ValueError, match=r"2 real .*1 fake"):
        discriminator_loss("hinge", [t, t], [t])
    with pytest.raises(ValueError, match="empty"):
        generator_loss("hinge", [])
    with pytest.raises(TypeError, match="wrap it"):
        generator_loss("hinge", t)
