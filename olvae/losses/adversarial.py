"""Adversarial losses, both sides, from their definitions; and how often the discriminator is right.

With r the logits of real images, f those of reconstructions, softplus(t) = log(1 + e^t):

| name     | discriminator                        | generator     |                                            |
|----------|--------------------------------------|---------------|--------------------------------------------|
| hinge    | E max(0, 1 - r) + E max(0, 1 + f)    | -E f          | Lim & Ye 2017, Miyato et al. 2018          |
| logistic | E softplus(-r) + E softplus(f)       | E softplus(-f)| Goodfellow et al. 2014, non-saturating     |
| lsgan    | E (r - 1)^2 / 2 + E f^2 / 2          | E (f - 1)^2 / 2 | Mao et al. 2017, targets 1 and 0         |
| wgan     | E f - E r                            | -E f          | Arjovsky et al. 2017                       |
| bce      | E H(1, r) + E H(0, f)                | E H(1, f)     | H(y, t): cross-entropy of sigmoid(t) with y |

H(1, t) = softplus(-t) and H(0, t) = softplus(t), so with these hard labels bce is the same function as logistic,
on both sides; it stands here under the name that configs use. wgan bounds nothing by itself: it needs a
Lipschitz discriminator (spectral norm, or a gradient penalty).

Every discriminator returns a list of logit tensors; a loss is the mean over each tensor, then over the list,
in float32 under autocast too (float64 for float64).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.modules.precision import island

__all__ = ["ADVERSARIAL_LOSSES", "discriminator_accuracy", "discriminator_loss", "generator_loss"]


@dataclass(frozen=True)
class _Loss:
    """Per logit: the discriminator's loss on a real and on a fake image, and the generator's."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    threshold: float | None  # the logit on the fence; None where only differences of logits mean anything


def _cross_entropy(label: float) -> Callable[[Tensor], Tensor]:
    return lambda t: F.binary_cross_entropy_with_logits(t, torch.full_like(t, label), reduction="none")


_LOSSES = {
    "hinge": _Loss(lambda r: F.relu(1 - r), lambda f: F.relu(1 + f), lambda f: -f, threshold=0.0),
    "logistic": _Loss(lambda r: F.softplus(-r), F.softplus, lambda f: F.softplus(-f), threshold=0.0),
    "lsgan": _Loss(
        lambda r: 0.5 * (r - 1).square(),
        lambda f: 0.5 * f.square(),
        lambda f: 0.5 * (f - 1).square(),
        threshold=0.5,
    ),
    "wgan": _Loss(lambda r: -r, lambda f: f, lambda f: -f, threshold=None),
    "bce": _Loss(_cross_entropy(1.0), _cross_entropy(0.0), _cross_entropy(1.0), threshold=0.0),
}

ADVERSARIAL_LOSSES = tuple(_LOSSES)


def generator_loss(name: str, fake_logits: Sequence[Tensor]) -> Tensor:
    """What the autoencoder minimises: its reconstructions should get the logits of real images.

    Args:
        name: one of ``ADVERSARIAL_LOSSES``.
        fake_logits: the discriminator's on the reconstructions, tensors of any shapes.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: the name is unknown or the list is empty; TypeError: it is a tensor, not a list.
    """
    loss = _lookup(name)
    return _mean([loss.generator(f) for f in _logits(fake_logits)])


def discriminator_loss(name: str, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """What the discriminator minimises; detach the reconstructions before it sees them.

    Args:
        name: one of ``ADVERSARIAL_LOSSES``.
        real_logits, fake_logits: the discriminator's on images and on reconstructions, lists of one length.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: the name is unknown, or the lists are empty or of different lengths.
    """
    loss = _lookup(name)
    real, fake = _pair(real_logits, fake_logits)
    return _mean([loss.real(r) for r in real]) + _mean([loss.fake(f) for f in fake])


@torch.no_grad()
def discriminator_accuracy(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], name: str) -> Tensor:
    """The share of logits on the right side of the fence: 1 for a perfect discriminator, 0.5 for a blind one.

    The fence is where the loss puts an even chance of being real: a logit of 0 for hinge, logistic and bce, 0.5
    for lsgan. wgan's logits are defined up to a constant only: there it is the midpoint between the mean of the
    real and the mean of the fake ones, tensor by tensor. A logit on the fence counts half. Real and fake weigh
    the same; mean over each tensor, then over the list.

    Returns:
        A scalar in [0, 1], float32, without gradient.

    Raises:
        ValueError: as :func:`discriminator_loss`.
    """
    threshold = _lookup(name).threshold
    shares: list[Tensor] = []
    for r, f in zip(*_pair(real_logits, fake_logits), strict=True):
        fence = 0.5 * (r.mean() + f.mean()) if threshold is None else threshold
        shares.append(0.5 * (_share_above(r - fence) + _share_above(fence - f)))
    return torch.stack(shares).mean()


def _share_above(x: Tensor) -> Tensor:
    return 0.5 * (1 + x.sign()).mean()


def _mean(per_logit: Sequence[Tensor]) -> Tensor:
    return torch.stack([values.mean() for values in per_logit]).mean()


def _lookup(name: str) -> _Loss:
    if name not in _LOSSES:
        raise ValueError(f"adversarial loss must be one of {', '.join(_LOSSES)}, got {name!r}")
    return _LOSSES[name]


def _logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(logits, Tensor):
        raise TypeError("logits come as the list that a discriminator returns, got a single tensor: wrap it in [ ]")
    if not logits:
        raise ValueError("the list of logits is empty: a discriminator returns at least one tensor")
    return [island(t) for t in logits]


def _pair(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    real, fake = _logits(real_logits), _logits(fake_logits)
    if len(real) != len(fake):
        raise ValueError(f"{len(real)} real and {len(fake)} fake logit tensors: they come from one discriminator")
    return real, fake
